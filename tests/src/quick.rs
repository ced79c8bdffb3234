//! A client for millions of reads: one kept connection, one buffer, nothing
//! allocated per answer. As strict about framing as [`crate::http`], but it
//! takes only answers that say their length.

use std::io;
use std::net::SocketAddr;
use std::ops::Range;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Most header fields of an answer.
const FIELDS_MAX: usize = 64;
/// What is read from the socket at a time, at least.
const READ_BYTES: usize = 16 * 1024;
/// Longest head.
const HEAD_BYTES_MAX: usize = 64 * 1024;

/// A connection for one GET after another. Of no use after an error.
#[derive(Debug)]
pub struct Quick {
    tcp: TcpStream,
    buffer: Vec<u8>,
    filled: usize,
    /// Of the last answer.
    head_end: usize,
    end: usize,
    fields: Vec<(Range<usize>, Range<usize>)>,
}

impl Quick {
    /// Connects.
    ///
    /// # Errors
    /// No connection.
    pub async fn connect(address: SocketAddr) -> io::Result<Quick> {
        let tcp = TcpStream::connect(address).await?;
        tcp.set_nodelay(true)?;
        Ok(Quick {
            tcp,
            buffer: vec![0; READ_BYTES],
            filled: 0,
            head_end: 0,
            end: 0,
            fields: Vec::new(),
        })
    }

    /// Sends `request` as it is and reads the whole answer; returns its status.
    ///
    /// # Errors
    /// The connection broke, or the answer is none, or says no length.
    pub async fn ask(&mut self, request: &[u8]) -> io::Result<u16> {
        // Whatever lies beyond the last answer was not asked for.
        if self.filled > self.end {
            return Err(io::ErrorKind::InvalidData.into());
        }
        (self.filled, self.head_end, self.end) = (0, 0, 0);
        self.tcp.write_all(request).await?;
        let (status, length) = loop {
            self.more().await?;
            if let Some(head) = self.head()? {
                break head;
            }
            if self.filled > HEAD_BYTES_MAX {
                return Err(io::ErrorKind::InvalidData.into());
            }
        };
        self.end = self.head_end + length;
        while self.filled < self.end {
            self.more().await?;
        }
        Ok(status)
    }

    /// The last answer's body.
    pub fn body(&self) -> &[u8] {
        &self.buffer[self.head_end..self.end]
    }

    /// A header of the last answer, empty when absent.
    pub fn header(&self, name: &str) -> &str {
        let found = self
            .fields
            .iter()
            .find(|(have, _)| self.buffer[have.clone()].eq_ignore_ascii_case(name.as_bytes()));
        found.map_or("", |(_, value)| {
            std::str::from_utf8(&self.buffer[value.clone()]).unwrap_or_default()
        })
    }

    async fn more(&mut self) -> io::Result<()> {
        if self.buffer.len() - self.filled < READ_BYTES {
            self.buffer.resize(2 * self.buffer.len(), 0);
        }
        match self.tcp.read(&mut self.buffer[self.filled..]).await? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            read => {
                self.filled += read;
                Ok(())
            }
        }
    }

    /// Status and length of the body, once the head is complete.
    fn head(&mut self) -> io::Result<Option<(u16, usize)>> {
        let bad = || io::Error::from(io::ErrorKind::InvalidData);
        let mut fields = [httparse::EMPTY_HEADER; FIELDS_MAX];
        let mut head = httparse::Response::new(&mut fields);
        let bytes = &self.buffer[..self.filled];
        let httparse::Status::Complete(end) = head.parse(bytes).map_err(|_| bad())? else {
            return Ok(None);
        };
        let status = head.code.ok_or_else(bad)?;
        let start = bytes.as_ptr() as usize;
        let place = |part: &[u8]| {
            let from = part.as_ptr() as usize - start;
            from..from + part.len()
        };
        self.fields.clear();
        self.fields.extend(
            head.headers
                .iter()
                .map(|field| (place(field.name.as_bytes()), place(field.value))),
        );
        self.head_end = end;
        if status == 204 || status == 304 {
            return Ok(Some((status, 0)));
        }
        let length = self.header("content-length").parse().map_err(|_| bad())?;
        Ok(Some((status, length)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::origin::{Fault, Origin};

    #[tokio::test]
    async fn one_answer_after_another() {
        let origin = Origin::start().await;
        let film = origin.publish("/film", 100_000);
        let mut quick = Quick::connect(origin.address()).await.unwrap();
        let whole = b"GET /film HTTP/1.1\r\nHost: a\r\n\r\n";
        let part = b"GET /film HTTP/1.1\r\nHost: a\r\nRange: bytes=70000-70004\r\n\r\n";
        for _ in 0..3 {
            assert_eq!(quick.ask(whole).await.unwrap(), 200);
            assert_eq!(quick.body(), film.content().all());
            assert_eq!(quick.ask(part).await.unwrap(), 206);
            assert_eq!(quick.body(), film.content().bytes(70_000..70_005));
            assert_eq!(quick.header("content-range"), "bytes 70000-70004/100000");
            assert_eq!(quick.header("nothing"), "");
        }
        film.once(Fault::CloseAfter(50_000));
        assert!(quick.ask(whole).await.is_err());
    }
}
