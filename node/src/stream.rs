//! A client's HTTP/1 connection, as Pingora sees it: it gets first what was read
//! before it (`connection`), and what it writes keeps its Date.
//!
//! A cache hands on the Date that the origin gave (RFC 9110 section 6.6.1), but
//! Pingora 0.9.1 writes the present time over it as it puts the head on the
//! wire, and has no switch against that. A date has one length whatever it says
//! (29 bytes), so it is put back in the bytes of the head as they leave.
//!
//! A head longer than [`HEAD_BYTES_MAX`] is answered 431 here (RFC 6585 section 5);
//! Pingora itself would read 1 MiB.
//!
//! Not here: HTTP/2. Its heads are compressed, so Date is the present time; Age,
//! which is right in both, tells the rest.

use std::cell::Cell;
use std::io;
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use async_trait::async_trait;
use bytes::{Buf, Bytes, BytesMut};
use memchr::memmem;
use pingora_core::protocols::tls::SslDigest;
use pingora_core::protocols::{
    ALPN, GetProxyDigest, GetSocketDigest, GetTimingDigest, Peek, Shutdown, SocketDigest, Ssl,
    Stream, TimingDigest, UniqueID, UniqueIDType,
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::connection::awaits_head;
use crate::reset;

/// Length of an IMF-fixdate (RFC 9110 section 5.6.7).
pub(crate) const DATE_BYTES: usize = 29;
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

/// Runs what answers on one connection, whose heads may have dates of their own,
/// and whose bodies may end with it.
pub(crate) async fn with_dates<T>(answering: impl Future<Output = T>) -> T {
    reset::within(NEXT_DATE.scope(Cell::new(None), answering)).await
}

/// Bytes that one read takes at most.
const READ_BYTES: usize = 8 * 1024;
/// Bytes of a request's head at most: a connection's share has room for no more
/// (`budget`).
const HEAD_BYTES_MAX: usize = 64 * 1024;
/// What is answered to a longer one.
const TOO_LONG: &[u8] = b"HTTP/1.1 431 Request Header Fields Too Large\r\n\
    Content-Length: 0\r\nCache-Control: no-store\r\nConnection: close\r\n\r\n";
/// Reads of what came behind it, thrown away: 1 MiB.
const THROWN_AWAY: usize = 128;
/// Room that a connection keeps while it waits.
const IDLE_BYTES: usize = 1024;

/// See the module's text.
#[derive(Debug)]
pub(crate) struct ClientStream {
    stream: Stream,
    /// What is still to be written of a head with its date put back; the
    /// caller's own bytes are as many.
    head: Bytes,
    /// Read, but not by Pingora yet.
    ahead: BytesMut,
    /// How much of it belongs to the request that Pingora is to answer.
    given: usize,
    /// Pingora has read further than that.
    is_beyond: bool,
    /// Bytes that Pingora has read of the request whose head it waits for; not what
    /// it read while it answered the one before, a buffer of 64 KiB at most.
    head_bytes: usize,
}

impl ClientStream {
    pub(crate) fn new(stream: Stream) -> ClientStream {
        ClientStream {
            stream,
            head: Bytes::new(),
            ahead: BytesMut::new(),
            given: 0,
            is_beyond: false,
            head_bytes: 0,
        }
    }

    /// What has been read and not been used.
    pub(crate) fn ahead(&self) -> &[u8] {
        &self.ahead
    }

    /// Reads more; 0 at the end.
    pub(crate) async fn read_ahead(&mut self) -> io::Result<usize> {
        std::future::poll_fn(|cx| {
            // On the stack: a connection that waits takes no memory for what may come.
            let mut bytes = [MaybeUninit::uninit(); READ_BYTES];
            let mut bytes = ReadBuf::uninit(&mut bytes);
            ready!(Pin::new(&mut self.stream).poll_read(cx, &mut bytes))?;
            self.ahead.extend_from_slice(bytes.filled());
            Poll::Ready(Ok(bytes.filled().len()))
        })
        .await
    }

    /// The next `bytes` bytes have been used.
    pub(crate) fn used(&mut self, bytes: usize) {
        if bytes < self.ahead.len() {
            self.ahead.advance(bytes);
        } else if self.ahead.capacity() > IDLE_BYTES {
            self.ahead = BytesMut::new();
        } else {
            self.ahead.clear();
        }
    }

    /// The next `bytes` bytes are a request for Pingora; 0: nobody knows how many.
    pub(crate) fn give(&mut self, bytes: usize) {
        self.given = bytes;
    }

    /// From here on Pingora reads another head.
    pub(crate) fn begin_head(&mut self) {
        self.head_bytes = 0;
    }

    /// Answers a head that is too long, as far as the socket takes it at once.
    fn refuse_head(&mut self, cx: &mut Context<'_>) -> io::Error {
        let mut stream = Pin::new(&mut self.stream);
        let _ = stream.as_mut().poll_write(cx, TOO_LONG);
        let _ = stream.as_mut().poll_flush(cx);
        // A socket that is closed with bytes unread may take its answer along.
        for _ in 0..THROWN_AWAY {
            let mut bytes = [MaybeUninit::uninit(); READ_BYTES];
            let mut bytes = ReadBuf::uninit(&mut bytes);
            let read = stream.as_mut().poll_read(cx, &mut bytes);
            if !matches!(read, Poll::Ready(Ok(()))) || bytes.filled().is_empty() {
                break;
            }
        }
        io::Error::other("the head is too long")
    }

    /// Whether Pingora has read more than it was given: what came after it is
    /// in its hands.
    pub(crate) fn is_beyond(&self) -> bool {
        self.is_beyond
    }

    /// The connection itself, for heads that are written as they should be.
    pub(crate) fn direct(&mut self) -> &mut Stream {
        &mut self.stream
    }
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

impl Drop for ClientStream {
    fn drop(&mut self) {
        if reset::is_wanted() {
            reset::at_close(self.stream.id());
        }
    }
}

impl AsyncWrite for ClientStream {
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

impl AsyncRead for ClientStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.head_bytes >= HEAD_BYTES_MAX && awaits_head() {
            return Poll::Ready(Err(this.refuse_head(cx)));
        }
        if this.ahead.is_empty() {
            let before = buffer.filled().len();
            ready!(Pin::new(&mut this.stream).poll_read(cx, buffer))?;
            let bytes = buffer.filled().len() - before;
            this.is_beyond |= bytes > 0;
            this.head_bytes = this.head_bytes.saturating_add(bytes);
            return Poll::Ready(Ok(()));
        }
        this.is_beyond |= this.given == 0;
        let most = match this.given {
            0 => this.ahead.len(),
            given => given.min(this.ahead.len()),
        };
        let bytes = most.min(buffer.remaining());
        buffer.put_slice(&this.ahead[..bytes]);
        this.head_bytes = this.head_bytes.saturating_add(bytes);
        this.used(bytes);
        this.given = this.given.saturating_sub(bytes);
        Poll::Ready(Ok(()))
    }
}

#[async_trait]
impl Shutdown for ClientStream {
    async fn shutdown(&mut self) {
        self.stream.shutdown().await;
    }
}

impl UniqueID for ClientStream {
    fn id(&self) -> UniqueIDType {
        self.stream.id()
    }
}

impl Ssl for ClientStream {
    fn get_ssl_digest(&self) -> Option<Arc<SslDigest>> {
        self.stream.get_ssl_digest()
    }

    fn selected_alpn_proto(&self) -> Option<ALPN> {
        self.stream.selected_alpn_proto()
    }
}

impl GetTimingDigest for ClientStream {
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

impl GetProxyDigest for ClientStream {
    fn get_proxy_digest(&self) -> Option<Arc<pingora_core::protocols::raw_connect::ProxyDigest>> {
        self.stream.get_proxy_digest()
    }
}

impl GetSocketDigest for ClientStream {
    fn get_socket_digest(&self) -> Option<Arc<SocketDigest>> {
        self.stream.get_socket_digest()
    }
}

#[async_trait]
impl Peek for ClientStream {
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
