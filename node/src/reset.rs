//! A body whose end is the connection's: how a client can tell that it broke off.
//!
//! To a client of HTTP/1.0 a body of unknown length is all there when the connection
//! ends (RFC 9112 section 6.3). So while such a body is under way, its connection
//! ends with a reset and not as a complete one does (promise P5).

use std::cell::Cell;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use rustix::net::sockopt::set_socket_linger;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

tokio::task_local! {
    /// Whether this connection's end would be taken for the end of the body that is under way.
    static WOULD_LOOK_COMPLETE: Cell<bool>;
}

/// Says whether the end of this task's connection would be taken for the end of a
/// body that is not over.
pub(crate) fn would_look_complete(would: bool) {
    // HTTP/2 streams have an end of their own, and no such state.
    let _ = WOULD_LOOK_COMPLETE.try_with(|now| now.set(would));
}

/// What was last said of this task's connection.
pub(crate) fn is_wanted() -> bool {
    WOULD_LOOK_COMPLETE.try_with(Cell::get).unwrap_or(false)
}

/// Runs what answers on one connection.
pub(crate) async fn within<T>(answering: impl Future<Output = T>) -> T {
    WOULD_LOOK_COMPLETE.scope(Cell::new(false), answering).await
}

/// Has the connection end with a reset once it is closed.
pub(crate) fn at_close(socket: RawFd) {
    let reset = owned(socket).and_then(|socket| {
        set_socket_linger(&socket, Some(Duration::ZERO)).map_err(io::Error::from)
    });
    if let Err(error) = reset {
        tracing::warn!(%error, "an answer that broke off looks complete to its client");
    }
}

/// A descriptor of our own for a socket of which Pingora tells no more than the
/// number: sent to ourselves, which is how numbers become descriptors safely.
fn owned(socket: RawFd) -> io::Result<OwnedFd> {
    let (to, from) = UnixStream::pair()?;
    let (byte, sockets) = ([IoSlice::new(&[0])], [socket]);
    let rights = [ControlMessage::ScmRights(&sockets)];
    sendmsg::<()>(to.as_raw_fd(), &byte, &rights, MsgFlags::empty(), None)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut received = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let mut bytes = [IoSliceMut::new(&mut byte)];
    recvmsg(&from, &mut bytes, &mut received, RecvFlags::CMSG_CLOEXEC)?;
    let mut sockets = received.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut sockets) => sockets.next(),
        _ => None,
    });
    sockets.next().ok_or(io::ErrorKind::NotFound.into())
}
