//! The admin API: its messages, and a client for it.
//!
//! The client blocks: the command line makes one call and ends, and a test
//! wraps it in `spawn_blocking`. It speaks plain HTTP; where the admin address
//! must be reached over an untrusted network, put a tunnel before it.

pub mod api;
pub mod ca;

use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Longest wait for an answer.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest wait for what needs the leader, a purge above all: a node tries for a
/// second and two leases, of at most a minute each, and 9 s are for the way.
pub const LEADER_TIMEOUT: Duration = Duration::from_secs(1 + 2 * 60 + 9);
/// Longest wait for a warm request: it reads whole objects from the origin.
const WARM_TIMEOUT: Duration = Duration::from_secs(3600);
/// Longest answer read, bytes: a thousand warmed URLs of 4 KiB each.
const ANSWER_BYTES_MAX: u64 = 8 * 1024 * 1024;

/// Why there is no answer.
#[derive(Debug)]
pub enum ClientError {
    /// Nobody there, or the connection broke: a purge may or may not have been
    /// committed; try again with the same `request_id`.
    Unreachable {
        /// The server that was asked.
        server: String,
        /// Why.
        reason: String,
    },
    /// The node said no.
    Refused {
        /// HTTP status.
        status: u16,
        /// Its words.
        message: String,
        /// For a retry of a purge that was not confirmed (503).
        request_id: Option<String>,
    },
    /// What answered is not this API.
    Garbage(String),
}

impl std::fmt::Display for ClientError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ClientError::Unreachable { server, reason } => {
                write!(f, "{server} cannot be reached: {reason}")
            }
            ClientError::Refused {
                status, message, ..
            } => write!(f, "refused ({status}): {message}"),
            ClientError::Garbage(reason) => {
                write!(f, "the answer is not the admin API's: {reason}")
            }
        }
    }
}

impl std::error::Error for ClientError {}

/// Calls the admin API of one node. Cheap to clone.
#[derive(Clone)]
pub struct Client {
    server: String,
    token: String,
    agent: ureq::Agent,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Client({})", self.server)
    }
}

impl Client {
    /// A client for the admin address `server` (`http://host:port`, or
    /// `host:port`). Nothing is sent before the first call.
    pub fn new(server: &str, token: &str) -> Client {
        let server = server.trim_end_matches('/');
        let server = if server.contains("://") {
            server.to_owned()
        } else {
            format!("http://{server}")
        };
        let agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .proxy(None)
            .timeout_connect(Some(Duration::from_secs(5)))
            .build()
            .into();
        Client {
            server,
            token: token.to_owned(),
            agent,
        }
    }

    /// The cluster as that node sees it.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn cluster(&self) -> Result<api::Cluster, ClientError> {
        self.get("/v1/cluster", CALL_TIMEOUT)
    }

    /// Forgets; returns when the promise holds on every node.
    ///
    /// # Errors
    /// [`ClientError`]: nothing is promised.
    pub fn purge(&self, purge: &api::Purge) -> Result<api::Purged, ClientError> {
        self.post("/v1/purge", purge, LEADER_TIMEOUT)
    }

    /// How far a purge has come, by its `request_id`.
    ///
    /// # Errors
    /// [`ClientError`]; refused with 404 until it is committed.
    pub fn purge_progress(&self, request_id: &str) -> Result<api::Progress, ClientError> {
        self.get(
            &format!("/v1/purge/{}", percent_encoded(request_id)),
            CALL_TIMEOUT,
        )
    }

    /// Takes a node out of the ring; it goes on answering.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn drain(&self, node: u64) -> Result<api::Done, ClientError> {
        self.post(&format!("/v1/nodes/{node}/drain"), &(), LEADER_TIMEOUT)
    }

    /// Removes a node for good; its number is never used again.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn remove(&self, node: u64) -> Result<api::Done, ClientError> {
        let path = format!("/v1/nodes/{node}");
        let request = self.agent.delete(format!("{}{path}", self.server));
        let request = request.header("Authorization", self.bearer());
        let request = request
            .config()
            .timeout_global(Some(LEADER_TIMEOUT))
            .build();
        self.read(request.call())
    }

    /// Where a URL's bytes are, and what a request for it would get now.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn explain(&self, url: &str) -> Result<api::Explain, ClientError> {
        self.get(
            &format!("/v1/explain?url={}", percent_encoded(url)),
            CALL_TIMEOUT,
        )
    }

    /// Fetches URLs into the cache; returns when each has arrived or failed.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn warm(&self, urls: Vec<String>) -> Result<api::Warmed, ClientError> {
        self.post("/v1/warm", &api::Warm { urls }, WARM_TIMEOUT)
    }

    fn bearer(&self) -> String {
        format!("Bearer {}", self.token)
    }

    fn get<A: DeserializeOwned>(&self, path: &str, wait: Duration) -> Result<A, ClientError> {
        let request = self.agent.get(format!("{}{path}", self.server));
        let request = request.header("Authorization", self.bearer());
        let request = request.config().timeout_global(Some(wait)).build();
        self.read(request.call())
    }

    fn post<A: DeserializeOwned>(
        &self,
        path: &str,
        message: &impl Serialize,
        wait: Duration,
    ) -> Result<A, ClientError> {
        let body = serde_json::to_vec(message).map_err(|e| ClientError::Garbage(e.to_string()))?;
        let request = self.agent.post(format!("{}{path}", self.server));
        let request = request
            .header("Authorization", self.bearer())
            .header("Content-Type", "application/json");
        let request = request.config().timeout_global(Some(wait)).build();
        self.read(request.send(&body))
    }

    fn read<A: DeserializeOwned>(
        &self,
        answer: Result<ureq::http::Response<ureq::Body>, ureq::Error>,
    ) -> Result<A, ClientError> {
        let unreachable = |e: ureq::Error| ClientError::Unreachable {
            server: self.server.clone(),
            reason: e.to_string(),
        };
        let mut answer = answer.map_err(unreachable)?;
        let status = answer.status().as_u16();
        let body = answer
            .body_mut()
            .with_config()
            .limit(ANSWER_BYTES_MAX)
            .read_to_vec()
            .map_err(unreachable)?;
        if status == 200 {
            return serde_json::from_slice(&body).map_err(|e| ClientError::Garbage(e.to_string()));
        }
        // Whatever stands between us and the node may refuse in its own words.
        let failure: api::Failure = serde_json::from_slice(&body).unwrap_or_default();
        let message = if failure.error.is_empty() {
            format!("{} gave no reason", self.server)
        } else {
            failure.error
        };
        Err(ClientError::Refused {
            status,
            message,
            request_id: failure.request_id,
        })
    }
}

/// `text` as the value of a query parameter: all but unreserved bytes escaped.
fn percent_encoded(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len() + 16);
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                encoded.push(char::from(byte));
            }
            _ => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::TcpListener;

    /// Answers one request with `answer` and returns what was asked.
    fn one_answer(answer: &str) -> (String, std::thread::JoinHandle<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let answer = answer.to_owned();
        let asked = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut asked = vec![0; 4096];
            let mut read = 0;
            while !asked[..read].windows(4).any(|w| w == b"\r\n\r\n") {
                read += stream.read(&mut asked[read..]).unwrap();
            }
            stream.write_all(answer.as_bytes()).unwrap();
            String::from_utf8_lossy(&asked[..read]).into_owned()
        });
        (address, asked)
    }

    fn http(status: &str, body: &str) -> String {
        format!(
            "HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )
    }

    #[test]
    fn a_call_carries_the_token_and_reads_the_answer() {
        let (server, asked) = one_answer(&http("200 OK", r#"{"url":"a/b c","verdict":"hit"}"#));
        let explain = Client::new(&server, "s3cret").explain("a/b c").unwrap();
        assert_eq!(explain.verdict, "hit");
        let asked = asked.join().unwrap().to_lowercase();
        assert!(
            asked.starts_with("get /v1/explain?url=a%2fb%20c http/1.1"),
            "{asked}"
        );
        assert!(asked.contains("authorization: bearer s3cret\r\n"));
    }

    #[test]
    fn a_refusal_keeps_its_reason() {
        let body = r#"{"error":"no quorum","request_id":"0b"}"#;
        let (server, _asked) = one_answer(&http("503 Service Unavailable", body));
        match Client::new(&server, "t").purge(&api::Purge::default()) {
            Err(ClientError::Refused {
                status: 503,
                message,
                request_id,
            }) => {
                assert_eq!(
                    (message.as_str(), request_id.as_deref()),
                    ("no quorum", Some("0b"))
                );
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_is_not_the_api_is_told_apart_from_nobody() {
        let (server, _asked) = one_answer(&http("200 OK", "<html>"));
        assert!(matches!(
            Client::new(&server, "t").cluster(),
            Err(ClientError::Garbage(_))
        ));
        let (server, _asked) = one_answer("");
        assert!(matches!(
            Client::new(&server, "t").cluster(),
            Err(ClientError::Unreachable { .. })
        ));
    }
}
