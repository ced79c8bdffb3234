//! An HTTP client for the tests: strict about framing, and nothing clever.
//!
//! One connection per request, so that no test depends on another's. A body
//! that ends before its framing says so is an error, never a short success.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytes::{Bytes, BytesMut};
use http::response::Parts;
use http::{HeaderMap, Method, Request};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// Host that the tests ask for: one name at every node, as clients of one
/// site would, whatever the node's own address.
pub const HOST: &str = "films.test";

/// Longest silence that a test waits through before it calls it a hang.
pub const SILENCE: Duration = Duration::from_secs(60);

/// A request.
#[derive(Clone, Debug)]
pub struct Ask {
    method: Method,
    target: String,
    headers: Vec<(String, String)>,
    body: Bytes,
}

impl Ask {
    /// A request with any method.
    pub fn new(method: &str, target: &str) -> Ask {
        Ask {
            method: Method::from_bytes(method.as_bytes()).expect("a method"),
            target: target.to_owned(),
            headers: Vec::new(),
            body: Bytes::new(),
        }
    }

    /// GET.
    pub fn get(target: &str) -> Ask {
        Ask::new("GET", target)
    }

    /// Adds a header; a second one of the same name is sent as a second line.
    pub fn header(mut self, name: &str, value: impl AsRef<str>) -> Ask {
        self.headers
            .push((name.to_owned(), value.as_ref().to_owned()));
        self
    }

    /// `Range: VALUE`, whatever it says.
    pub fn range(self, value: &str) -> Ask {
        self.header("Range", value)
    }

    /// Sends a body with its length.
    pub fn body(mut self, body: impl Into<Bytes>) -> Ask {
        self.body = body.into();
        self
    }

    /// Sends the request and returns with the answer's head.
    ///
    /// # Errors
    /// No connection, no answer within [`SILENCE`], or one that is not HTTP.
    pub async fn open(&self, address: SocketAddr) -> Result<Stream> {
        let mut kept = Kept::connect(address).await?;
        let (head, body) = kept.answer(self).await?;
        Ok(Stream {
            status: head.status.as_u16(),
            informational: informational(&head),
            headers: head.headers,
            body,
            _kept: kept,
        })
    }

    fn request(&self) -> Result<Request<Full<Bytes>>> {
        let mut request = Request::builder()
            .method(self.method.clone())
            .uri(&self.target);
        if !self
            .headers
            .iter()
            .any(|(name, _)| name.eq_ignore_ascii_case("host"))
        {
            request = request.header("Host", HOST);
        }
        for (name, value) in &self.headers {
            request = request.header(name, value);
        }
        Ok(request.body(Full::new(self.body.clone()))?)
    }

    /// Sends the request and reads the whole answer into memory.
    ///
    /// # Errors
    /// As [`Ask::open`], and a body that ends early.
    pub async fn send(&self, address: SocketAddr) -> Result<Reply> {
        self.open(address).await?.collect().await
    }
}

/// A connection for one request after another: for tests that count requests
/// in thousands. Dropping it closes it.
#[derive(Debug)]
pub struct Kept {
    sender: SendRequest<Full<Bytes>>,
    connection: JoinHandle<()>,
}

impl Kept {
    /// Connects.
    ///
    /// # Errors
    /// No connection within [`SILENCE`].
    pub async fn connect(address: SocketAddr) -> Result<Kept> {
        let tcp = timeout(SILENCE, TcpStream::connect(address))
            .await?
            .context("connect")?;
        tcp.set_nodelay(true)?;
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(tcp)).await?;
        let connection = tokio::spawn(async move {
            // What goes wrong here is seen by the reader of the body, too.
            let _ = connection.await;
        });
        Ok(Kept { sender, connection })
    }

    /// Sends a request and reads the whole answer into memory.
    ///
    /// # Errors
    /// As [`Ask::send`]; the connection is of no use then.
    pub async fn send(&mut self, ask: &Ask) -> Result<Reply> {
        self.sender.ready().await?;
        let (head, body) = self.answer(ask).await?;
        let body = timeout(SILENCE, body.collect()).await??;
        Ok(Reply {
            status: head.status.as_u16(),
            informational: informational(&head),
            headers: head.headers,
            body: body.to_bytes(),
        })
    }

    async fn answer(&mut self, ask: &Ask) -> Result<(Parts, Incoming)> {
        let mut request = ask.request()?;
        let before = Before::default();
        let noted = before.clone();
        hyper::ext::on_informational(&mut request, move |response| {
            let mut noted = noted.0.lock().expect("no panic while held");
            noted.push((response.status().as_u16(), response.headers().clone()));
        });
        let answer = timeout(SILENCE, self.sender.send_request(request))
            .await
            .with_context(|| format!("{} {}: no answer", ask.method, ask.target))??;
        let (mut head, body) = answer.into_parts();
        head.extensions.insert(before);
        Ok((head, body))
    }
}

/// Informational responses: status and headers.
type Informational = Vec<(u16, HeaderMap)>;

/// What came before an answer.
#[derive(Clone, Default)]
struct Before(Arc<Mutex<Informational>>);

fn informational(head: &Parts) -> Informational {
    let before = head.extensions.get::<Before>();
    before.map_or_else(Vec::new, |before| {
        before.0.lock().expect("no panic while held").clone()
    })
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

/// An answer whose body is still arriving. Dropping it closes the connection.
#[derive(Debug)]
pub struct Stream {
    /// Status code.
    pub status: u16,
    informational: Informational,
    /// Headers.
    pub headers: HeaderMap,
    body: Incoming,
    _kept: Kept,
}

impl Stream {
    /// The next piece of the body; `None` at its proper end.
    ///
    /// # Errors
    /// The body ended early, or nothing came for [`SILENCE`].
    pub async fn next(&mut self) -> Result<Option<Bytes>> {
        loop {
            let frame = timeout(SILENCE, self.body.frame())
                .await
                .context("the body stands still")?;
            match frame {
                None => return Ok(None),
                Some(frame) => {
                    if let Ok(data) = frame?.into_data() {
                        return Ok(Some(data));
                    }
                }
            }
        }
    }

    /// The rest of the body.
    ///
    /// # Errors
    /// As [`Stream::next`].
    pub async fn collect(mut self) -> Result<Reply> {
        let mut body = BytesMut::new();
        while let Some(piece) = self.next().await? {
            body.extend_from_slice(&piece);
        }
        let headers = std::mem::take(&mut self.headers);
        Ok(Reply {
            status: self.status,
            informational: self.informational,
            headers,
            body: body.freeze(),
        })
    }

    /// One header as text, empty when absent.
    pub fn header(&self, name: &str) -> &str {
        text(&self.headers, name)
    }
}

/// A whole answer.
#[derive(Clone)]
pub struct Reply {
    /// Status code.
    pub status: u16,
    /// What came before it: informational responses.
    pub informational: Informational,
    /// Headers.
    pub headers: HeaderMap,
    /// Body.
    pub body: Bytes,
}

impl std::fmt::Debug for Reply {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} with {} bytes, {:?}",
            self.status,
            self.body.len(),
            self.headers
        )
    }
}

impl Reply {
    /// One header as text, empty when absent.
    pub fn header(&self, name: &str) -> &str {
        text(&self.headers, name)
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> &'a str {
    headers
        .get(name)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default()
}

/// Writes `request` as it is and reads until the other side closes: for
/// requests that no client library would send.
///
/// # Errors
/// No connection, or the other side neither answers nor closes within [`SILENCE`].
pub async fn raw(address: SocketAddr, request: &[u8]) -> Result<Vec<u8>> {
    let mut tcp = TcpStream::connect(address).await?;
    // The other side may refuse and close before it has read everything.
    let _ = tcp.write_all(request).await;
    let mut answer = Vec::new();
    match timeout(SILENCE, tcp.read_to_end(&mut answer)).await {
        Err(_) => bail!("{} bytes, and the connection stays open", answer.len()),
        // A reset after the answer is a close as good as any.
        Ok(_) => Ok(answer),
    }
}
