//! Frames on a QUIC stream: `wire` says what they look like, this file reads
//! and writes them. It also names the codes with which streams are closed.

use bytes::{BufMut, Bytes, BytesMut};
use futures::{FutureExt, StreamExt, stream};
use quinn::{
    ConnectionError, ReadError, ReadExactError, RecvStream, SendStream, VarInt, WriteError,
};
use tokio::io::AsyncReadExt;
use tokio::time::timeout;

use super::{BODY_WRITE_TIMEOUT, Body, BodyBroken};
use crate::wire::{self, Answer, BODY_END, FrameError, HEAD_PREFIX_BYTES, PART_BYTES_MAX, Part};

/// Memory set aside for a frame before its bytes have come.
const RESERVE_BYTES_MAX: usize = 64 * 1024;
/// Parts that are ready together are written together, up to about this much.
const GATHER_BYTES: usize = 64 * 1024;

/// Why a stream or a connection was closed: QUIC application error codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloseCode {
    /// Not wanted any more.
    Done = 0,
    /// The certificate is good, but its node is not a member.
    NotMember = 1,
    /// A frame of another version.
    Version = 2,
    /// A frame beyond its limit.
    TooLong = 3,
    /// Not a message.
    Garbage = 4,
    /// The rest of a frame did not come in time.
    TooSlow = 5,
    /// The answer's body could not be completed.
    BodyBroken = 6,
    /// Too many requests at once.
    Busy = 7,
    /// The certificate names no node, or another than was dialled.
    WrongNode = 8,
    /// The node stops.
    Stopping = 9,
    /// The peer has fallen silent.
    Silent = 10,
}

impl CloseCode {
    const ALL: [CloseCode; 11] = [
        CloseCode::Done,
        CloseCode::NotMember,
        CloseCode::Version,
        CloseCode::TooLong,
        CloseCode::Garbage,
        CloseCode::TooSlow,
        CloseCode::BodyBroken,
        CloseCode::Busy,
        CloseCode::WrongNode,
        CloseCode::Stopping,
        CloseCode::Silent,
    ];

    /// For a person.
    pub fn text(self) -> &'static str {
        match self {
            CloseCode::Done => "not wanted any more",
            CloseCode::NotMember => "not a member of the cluster",
            CloseCode::Version => "another version of the protocol",
            CloseCode::TooLong => "frame too long",
            CloseCode::Garbage => "not a message",
            CloseCode::TooSlow => "frame did not arrive in time",
            CloseCode::BodyBroken => "body could not be completed",
            CloseCode::Busy => "too many requests at once",
            CloseCode::WrongNode => "certificate of another node",
            CloseCode::Stopping => "node is stopping",
            CloseCode::Silent => "peer fell silent",
        }
    }

    /// What a received code means.
    pub(super) fn describe(code: VarInt) -> String {
        match Self::ALL.iter().find(|known| VarInt::from(**known) == code) {
            Some(known) => known.text().to_owned(),
            None => format!("closed with code {code}"),
        }
    }
}

impl From<CloseCode> for VarInt {
    fn from(code: CloseCode) -> VarInt {
        VarInt::from_u32(code as u32)
    }
}

/// Why a frame did not arrive or could not be sent.
#[derive(Debug)]
pub(super) enum Broken {
    /// What came is not a frame.
    Frame(FrameError),
    /// The stream ended inside it.
    Ended,
    /// The other side closed the stream with this code.
    Closed(VarInt),
    /// The connection is gone.
    Lost(ConnectionError),
    /// It did not move in time.
    TooSlow,
}

impl Broken {
    /// With which code to close our side.
    pub(super) fn code(&self) -> CloseCode {
        match self {
            Broken::Frame(FrameError::Version(_)) => CloseCode::Version,
            Broken::Frame(FrameError::TooLong { .. }) => CloseCode::TooLong,
            Broken::Frame(FrameError::Garbage(_)) | Broken::Ended => CloseCode::Garbage,
            Broken::TooSlow => CloseCode::TooSlow,
            Broken::Closed(_) | Broken::Lost(_) => CloseCode::Done,
        }
    }
}

impl std::fmt::Display for Broken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Broken::Frame(e) => e.fmt(f),
            Broken::Ended => f.write_str("the stream ended inside a frame"),
            Broken::Closed(code) => f.write_str(&CloseCode::describe(*code)),
            Broken::Lost(e) => e.fmt(f),
            Broken::TooSlow => f.write_str("no progress in time"),
        }
    }
}

impl From<FrameError> for Broken {
    fn from(e: FrameError) -> Self {
        Broken::Frame(e)
    }
}

impl From<ReadError> for Broken {
    fn from(e: ReadError) -> Self {
        match e {
            ReadError::Reset(code) => Broken::Closed(code),
            ReadError::ConnectionLost(e) => Broken::Lost(e),
            ReadError::ClosedStream
            | ReadError::IllegalOrderedRead
            | ReadError::ZeroRttRejected => Broken::Ended,
        }
    }
}

impl From<ReadExactError> for Broken {
    fn from(e: ReadExactError) -> Self {
        match e {
            ReadExactError::FinishedEarly(_) => Broken::Ended,
            ReadExactError::ReadError(e) => e.into(),
        }
    }
}

impl From<WriteError> for Broken {
    fn from(e: WriteError) -> Self {
        match e {
            WriteError::Stopped(code) => Broken::Closed(code),
            WriteError::ConnectionLost(e) => Broken::Lost(e),
            WriteError::ClosedStream | WriteError::ZeroRttRejected => Broken::Ended,
        }
    }
}

/// Closes both directions of a stream with a code.
pub(super) fn close(send: &mut SendStream, recv: &mut RecvStream, code: CloseCode) {
    // An error here means that it is closed already.
    let _ = send.reset(code.into());
    let _ = recv.stop(code.into());
}

/// Reads one head frame; returns its payload.
pub(super) async fn read_head(recv: &mut RecvStream, limit: usize) -> Result<Bytes, Broken> {
    let mut prefix = [0; HEAD_PREFIX_BYTES];
    recv.read_exact(&mut prefix).await?;
    let length = wire::decode_prefix(prefix, limit)?;
    Ok(read_bytes(recv, length).await?.freeze())
}

/// Reads a head frame that is all there is on the stream.
pub(super) async fn read_only_head(recv: &mut RecvStream, limit: usize) -> Result<Bytes, Broken> {
    let payload = read_head(recv, limit).await?;
    match recv.read_chunk(1, true).await? {
        None => Ok(payload),
        Some(_) => Err(FrameError::Garbage("bytes after the frame".to_owned()).into()),
    }
}

/// Reads exactly `length` bytes. Memory grows as they come: an announced length costs nothing.
async fn read_bytes(recv: &mut RecvStream, length: usize) -> Result<BytesMut, Broken> {
    let mut bytes = BytesMut::with_capacity(length.min(RESERVE_BYTES_MAX));
    while bytes.len() < length {
        let missing = length - bytes.len();
        if recv
            .read_buf(&mut (&mut bytes).limit(missing))
            .await
            .map_err(broken_read)?
            == 0
        {
            return Err(Broken::Ended);
        }
    }
    Ok(bytes)
}

/// quinn hides its error in an `io::Error` when read through tokio's trait.
fn broken_read(e: std::io::Error) -> Broken {
    match e
        .into_inner()
        .and_then(|inner| inner.downcast::<ReadError>().ok())
    {
        Some(e) => (*e).into(),
        None => Broken::Ended,
    }
}

/// Whether a body follows this answer on the wire.
pub(super) fn has_body(answer: &Answer) -> bool {
    matches!(answer, Answer::Relay { .. } | Answer::Slice { .. })
}

/// The rest of a stream as a body, to its end or broken; its parts as they come, to be
/// checked by whoever uses them. `held` is kept until the body has ended or is
/// dropped, which tells the owner to stop. It may pause for as long as what the owner
/// reads it from: how long that is, the owner judges. A peer that has vanished ends
/// its connection, and so this.
pub(super) fn read_body<T: Send + 'static>(recv: RecvStream, held: T) -> Body {
    Box::pin(stream::try_unfold(
        (recv, held),
        |(mut recv, held)| async move {
            match read_part(&mut recv).await {
                Ok(Some(part)) => Ok(Some((part, (recv, held)))),
                Ok(None) => {
                    // The stream's end came with the body's; once read, dropping the
                    // stream need not tell the owner to stop.
                    let _ = recv.read_chunk(1, true).now_or_never();
                    Ok(None)
                }
                Err(e) => Err(BodyBroken(e.to_string())),
            }
        },
    ))
}

/// The next part, or `None` at the body's end.
async fn read_part(recv: &mut RecvStream) -> Result<Option<Part>, Broken> {
    let mut prefix = [0; wire::PART_PREFIX_BYTES];
    recv.read_exact(&mut prefix).await?;
    let Some((length, crc32c)) = wire::decode_part_prefix(prefix)? else {
        return Ok(None);
    };
    let part = Part {
        bytes: read_bytes(recv, length).await?.freeze(),
        crc32c,
    };
    Ok(Some(part))
}

/// A body that ends where a part is not what its checksum says.
pub(super) fn checked(body: Body) -> Body {
    let checked = |part: Part| match part.is_intact() {
        true => Ok(part),
        false => Err(BodyBroken("a part's checksum is wrong".to_owned())),
    };
    body.map(move |part| part.and_then(checked)).boxed()
}

/// How writing an answer ended, when not well.
#[derive(Debug)]
pub(super) enum Unwritten {
    /// The asker left, or reads too slowly.
    Asker(Broken),
    /// The body failed at its source.
    Source(BodyBroken),
}

/// Writes an answer's head and its body, and finishes the stream. Bytes are
/// handed to quinn as they are, without a copy. What is ready at once leaves
/// at once; while the body is waited for, an asker that leaves ends the wait. The
/// body is dropped, and with it the memory that is set aside for it, when all of it
/// has arrived.
pub(super) async fn write_answer(
    send: &mut SendStream,
    head: Vec<u8>,
    body: Option<Body>,
) -> Result<(), Unwritten> {
    let mut gathered = vec![Bytes::from(head)];
    let Some(mut body) = body else {
        return finish(send, gathered).await;
    };
    let mut gathered_bytes = gathered[0].len();
    let mut stopped = std::pin::pin!(send.stopped());
    loop {
        let next = match body.next().now_or_never() {
            Some(next) => next,
            None => {
                flush(send, &mut gathered).await?;
                gathered_bytes = 0;
                tokio::select! {
                    next = body.next() => next,
                    _ = &mut stopped => {
                        return Err(Unwritten::Asker(Broken::Closed(CloseCode::Done.into())));
                    }
                }
            }
        };
        match next {
            None => {
                gathered.push(Bytes::from_static(&BODY_END));
                finish(send, gathered).await?;
                // Or the asker has left, or the connection has ended.
                let _ = stopped.await;
                return Ok(());
            }
            Some(Err(e)) => return Err(Unwritten::Source(e)),
            Some(Ok(part)) if part.bytes.is_empty() => {}
            Some(Ok(part)) if part.bytes.len() > PART_BYTES_MAX => {
                let length = part.bytes.len();
                let reason = format!("part of {length} bytes, the limit is {PART_BYTES_MAX}");
                return Err(Unwritten::Source(BodyBroken(reason)));
            }
            Some(Ok(part)) => {
                gathered_bytes += part.bytes.len();
                gathered.push(Bytes::copy_from_slice(&part.prefix()));
                gathered.push(part.bytes);
                if gathered_bytes >= GATHER_BYTES {
                    flush(send, &mut gathered).await?;
                    gathered_bytes = 0;
                }
            }
        }
    }
}

async fn finish(send: &mut SendStream, mut gathered: Vec<Bytes>) -> Result<(), Unwritten> {
    flush(send, &mut gathered).await?;
    send.finish().map_err(|_| Unwritten::Asker(Broken::Ended))
}

async fn flush(send: &mut SendStream, gathered: &mut Vec<Bytes>) -> Result<(), Unwritten> {
    if !gathered.is_empty() {
        timeout(BODY_WRITE_TIMEOUT, send.write_all_chunks(gathered))
            .await
            .map_err(|_| Unwritten::Asker(Broken::TooSlow))?
            .map_err(|e| Unwritten::Asker(e.into()))?;
        gathered.clear();
    }
    Ok(())
}
