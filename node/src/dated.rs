//! The Date of a stored answer, on its way to an HTTP/1 client.
//!
//! A cache hands on the Date that the origin gave (RFC 9110 section 6.6.1), but
//! Pingora 0.9.1 writes the present time over it as it puts the head on the
//! wire, and has no switch against that. A date has one length whatever it says
//! (29 bytes), so it is put back in the bytes of the head as they leave. Not
//! here: HTTP/2, whose heads are compressed; there Date is the present time,
//! and Age, which is right in both, tells the rest.

use std::cell::Cell;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use async_trait::async_trait;
use bytes::{Buf, Bytes};
use memchr::memmem;
use pingora_core::apps::ServerApp;
use pingora_core::protocols::tls::SslDigest;
use pingora_core::protocols::{
    ALPN, GetProxyDigest, GetSocketDigest, GetTimingDigest, Peek, Shutdown, SocketDigest, Ssl,
    Stream, TimingDigest, UniqueID, UniqueIDType,
};
use pingora_core::server::ShutdownWatch;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Length of an IMF-fixdate (RFC 9110 section 5.6.7).
const DATE_BYTES: usize = 29;
/// How a date's line begins in a head that Pingora wrote.
const DATE_NAME: &[u8] = b"Date: ";

tokio::task_local! {
    /// The date of the next head that this connection writes, where it is not now.
    static NEXT_DATE: Cell<Option<[u8; DATE_BYTES]>>;
}

/// Says what Date the next head of this task's connection has; the present
/// time where `date` is none, or no IMF-fixdate.
pub(crate) fn next_head_is_of(date: Option<&[u8]>) {
    let date = date.and_then(|date| date.try_into().ok());
    // HTTP/2 streams have tasks of their own: nothing to tell.
    let _ = NEXT_DATE.try_with(|next| next.set(date));
}

/// An application whose HTTP/1 answers keep their dates.
pub struct Dated<A>(Arc<A>);

impl<A> Dated<A> {
    /// Around `app`.
    pub fn new(app: A) -> Dated<A> {
        Dated(Arc::new(app))
    }
}

#[async_trait]
impl<A: ServerApp + Send + Sync + 'static> ServerApp for Dated<A> {
    async fn process_new(
        self: &Arc<Self>,
        stream: Stream,
        shutdown: &ShutdownWatch,
    ) -> Option<Stream> {
        let stream = Box::new(DatedStream {
            stream,
            head: Bytes::new(),
        });
        let answering = self.0.process_new(stream, shutdown);
        NEXT_DATE.scope(Cell::new(None), answering).await
    }

    async fn cleanup(&self) {
        self.0.cleanup().await;
    }
}

/// A client's connection.
#[derive(Debug)]
struct DatedStream {
    stream: Stream,
    /// What is still to be written of a head with its date put back; the
    /// caller's own bytes are as many.
    head: Bytes,
}

/// The head with the date put back; `None` where these bytes are no such head.
fn with_date(bytes: &[u8], date: &[u8; DATE_BYTES]) -> Option<Bytes> {
    if !bytes.starts_with(b"HTTP/1.") {
        return None;
    }
    let mut line = 0;
    for end in memmem::find_iter(bytes, b"\r\n") {
        if end == line {
            // The head's end.
            return None;
        }
        let name = bytes.get(line..line + DATE_NAME.len())?;
        if !name.eq_ignore_ascii_case(DATE_NAME) {
            line = end + 2;
            continue;
        }
        let start = line + DATE_NAME.len();
        if end - start != DATE_BYTES {
            return None;
        }
        let mut copy = bytes.to_vec();
        copy[start..end].copy_from_slice(date);
        return Some(copy.into());
    }
    None
}

impl AsyncWrite for DatedStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.head.is_empty()
            && let Some(date) = NEXT_DATE.try_with(Cell::take).ok().flatten()
        {
            match with_date(bytes, &date) {
                Some(head) => self.head = head,
                // Not the head yet: an informational one, or a body's end.
                None => next_head_is_of(Some(&date)),
            }
        }
        if self.head.is_empty() {
            return Pin::new(&mut self.stream).poll_write(cx, bytes);
        }
        let this = &mut *self;
        let most = this.head.len().min(bytes.len());
        let written = ready!(Pin::new(&mut this.stream).poll_write(cx, &this.head[..most]))?;
        this.head.advance(written);
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let awaits_head = NEXT_DATE.try_with(|next| {
            let date = next.take();
            next.set(date);
            date.is_some()
        });
        if self.head.is_empty() && !awaits_head.unwrap_or(false) {
            return Pin::new(&mut self.stream).poll_write_vectored(cx, slices);
        }
        let first = slices.iter().find(|slice| !slice.is_empty());
        self.poll_write(cx, first.map_or(&[][..], |slice| slice))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

impl AsyncRead for DatedStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

#[async_trait]
impl Shutdown for DatedStream {
    async fn shutdown(&mut self) {
        self.stream.shutdown().await;
    }
}

impl UniqueID for DatedStream {
    fn id(&self) -> UniqueIDType {
        self.stream.id()
    }
}

impl Ssl for DatedStream {
    fn get_ssl_digest(&self) -> Option<Arc<SslDigest>> {
        self.stream.get_ssl_digest()
    }

    fn selected_alpn_proto(&self) -> Option<ALPN> {
        self.stream.selected_alpn_proto()
    }
}

impl GetTimingDigest for DatedStream {
    fn get_timing_digest(&self) -> Vec<Option<TimingDigest>> {
        self.stream.get_timing_digest()
    }

    fn get_read_pending_time(&self) -> std::time::Duration {
        self.stream.get_read_pending_time()
    }

    fn get_write_pending_time(&self) -> std::time::Duration {
        self.stream.get_write_pending_time()
    }
}

impl GetProxyDigest for DatedStream {
    fn get_proxy_digest(&self) -> Option<Arc<pingora_core::protocols::raw_connect::ProxyDigest>> {
        self.stream.get_proxy_digest()
    }
}

impl GetSocketDigest for DatedStream {
    fn get_socket_digest(&self) -> Option<Arc<SocketDigest>> {
        self.stream.get_socket_digest()
    }
}

#[async_trait]
impl Peek for DatedStream {
    async fn try_peek(&mut self, buffer: &mut [u8]) -> io::Result<bool> {
        self.stream.try_peek(buffer).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DATE: &[u8; DATE_BYTES] = b"Sun, 06 Nov 1994 08:49:37 GMT";

    #[test]
    fn a_head_gets_its_date_and_nothing_else_changes() {
        let head = b"HTTP/1.1 200 OK\r\nAge: 3\r\nDate: Sat, 21 Nov 2026 10:48:26 GMT\r\n\r\nbody\r\nDate: x";
        let patched = with_date(head, DATE).unwrap();
        assert_eq!(patched.len(), head.len());
        let text = String::from_utf8(patched.to_vec()).unwrap();
        assert!(text.starts_with(
            "HTTP/1.1 200 OK\r\nAge: 3\r\nDate: Sun, 06 Nov 1994 08:49:37 GMT\r\n\r\nbody"
        ));
        assert!(text.ends_with("\r\nDate: x"));
    }

    #[test]
    fn what_is_no_head_with_a_date_stays_as_it_is() {
        for bytes in [
            &b"just a body"[..],
            b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nDate: short\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nDate: Sat, 21 Nov 2026",
            b"HTTP/1.1 200 OK\r\nAge: 1\r\n\r\n\r\nDate: Sat, 21 Nov 2026 10:48:26 GMT\r\n\r\n",
        ] {
            assert_eq!(with_date(bytes, DATE), None);
        }
    }
}
