//! HTTP answers from memory by `read`, `writev` and `epoll` alone: what sockets and
//! the client leave to whoever copies out of memory when a socket is ready. It reads
//! the requests of this bench and no others.

use std::collections::HashMap;
use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::ops::Range;

use anyhow::{Context, Result};
use bytes::Bytes;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};

/// Connections that wait to be accepted, at most.
const BACKLOG: i32 = 4096;
/// Bytes of a body that are offered in one write at most, as the daemon does.
const WRITE_BYTES: usize = 1024 * 1024;
/// Bytes of a request at most.
const REQUEST_BYTES: usize = 2048;
/// What events of the listener say; a connection's say where it is in the list.
const LISTENER: u64 = u64::MAX;

/// Answers `GET /BYTES` with that many of `bytes`, or a range of them, and what is in
/// `objects` with an object of its own, until the process is killed.
pub fn serve(address: &str, bytes: &Bytes, objects: &HashMap<String, Bytes>) -> Result<()> {
    let listener = TcpListener::bind(address)?;
    rustix::net::listen(&listener, BACKLOG)?;
    listener.set_nonblocking(true)?;
    let epoll = epoll::create(CreateFlags::CLOEXEC)?;
    epoll::add(
        &epoll,
        &listener,
        EventData::new_u64(LISTENER),
        EventFlags::IN,
    )?;
    let mut connections: Vec<Option<Connection>> = Vec::new();
    let mut events: Vec<Event> = Vec::with_capacity(1024);
    loop {
        epoll::wait(&epoll, rustix::buffer::spare_capacity(&mut events), None)?;
        for event in events.drain(..) {
            let at = event.data.u64();
            if at == LISTENER {
                while let Ok((stream, _)) = listener.accept() {
                    stream.set_nonblocking(true)?;
                    stream.set_nodelay(true)?;
                    let data = EventData::new_u64(connections.len() as u64);
                    let flags = EventFlags::IN | EventFlags::OUT | EventFlags::ET;
                    epoll::add(&epoll, &stream, data, flags)?;
                    connections.push(Some(Connection::new(stream)));
                }
                continue;
            }
            // Places of closed ones are not used again: a row opens some 20,000.
            let connection = &mut connections[at as usize];
            if let Some(open) = connection
                && open.go_on(bytes, objects).is_err()
            {
                *connection = None;
            }
        }
    }
}

/// A client's connection: it sends its next request when it has its answer.
struct Connection {
    stream: TcpStream,
    head: Vec<u8>,
    /// How much of it is written.
    written: usize,
    /// What is still to be written.
    body: Bytes,
}

impl Connection {
    fn new(stream: TcpStream) -> Connection {
        Connection {
            stream,
            head: Vec::new(),
            written: 0,
            body: Bytes::new(),
        }
    }

    /// Writes what the socket takes, or reads the next request and begins its answer.
    fn go_on(&mut self, bytes: &Bytes, objects: &HashMap<String, Bytes>) -> Result<()> {
        if !self.write()? {
            return Ok(());
        }
        let mut request = [0; REQUEST_BYTES];
        let length = match self.stream.read(&mut request) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
            read => read?,
        };
        let request = std::str::from_utf8(&request[..length])?;
        let request = request.strip_suffix("\r\n\r\n").context("its end")?;
        let mut lines = request.lines();
        let target = lines.next().and_then(|line| line.split(' ').nth(1));
        let target = target.context("a target")?;
        let range = lines.find_map(|line| line.strip_prefix("Range: bytes="));
        self.answer(target, range, bytes, objects)?;
        self.write().map(drop).map_err(Into::into)
    }

    fn answer(
        &mut self,
        target: &str,
        range: Option<&str>,
        bytes: &Bytes,
        objects: &HashMap<String, Bytes>,
    ) -> Result<()> {
        let path = target.split('?').next().unwrap_or_default();
        let total: usize = path[1..].parse()?;
        let body = objects.get(target).unwrap_or(bytes);
        let range: Option<Range<usize>> = match range.and_then(|range| range.split_once('-')) {
            Some((first, last)) => Some(first.parse()?..last.parse::<usize>()? + 1),
            None => None,
        };
        self.head.clear();
        self.written = 0;
        match &range {
            Some(range) => {
                let (first, last) = (range.start, range.end - 1);
                write!(
                    self.head,
                    "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {first}-{last}/{total}\r\n"
                )?;
            }
            None => write!(self.head, "HTTP/1.1 200 OK\r\n")?,
        }
        self.body = body.slice(range.unwrap_or(0..total));
        write!(self.head, "Content-Length: {}\r\n\r\n", self.body.len())?;
        Ok(())
    }

    /// Whether all is written.
    fn write(&mut self) -> io::Result<bool> {
        while self.written < self.head.len() || !self.body.is_empty() {
            let head = &self.head[self.written..];
            let body = &self.body[..self.body.len().min(WRITE_BYTES)];
            let parts = [IoSlice::new(head), IoSlice::new(body)];
            let offered = head.len() + body.len();
            let written = match self.stream.write_vectored(&parts) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                written => written?,
            };
            let of_head = written.min(head.len());
            self.written += of_head;
            self.body = self.body.slice(written - of_head..);
            if written < offered {
                // The socket is full: epoll will tell when it is not.
                return Ok(false);
            }
        }
        Ok(true)
    }
}
