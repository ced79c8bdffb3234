//! Purges of every kind, and the ways in which they are sent.

use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use pingora_slice_tests::Ask;
use pingora_slice_tests::cluster::{ADMIN_TOKEN, PURGE_TOKEN};
use pingora_slice_tests::http::Reply;
use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::{IndexedRandom, IteratorRandom};
use serde_json::json;
use tokio::time::timeout;

use super::fan_out::FanOut;
use super::world::{HOSTS, Object};

/// A purge takes two leases and a second at most, where its node answers at all.
pub(super) const PURGE_PATIENCE: Duration = Duration::from_secs(8);
/// Most URLs in a batch.
const BATCH_MAX: usize = 5;
/// What carries the number of a try, to be sent back with a retry.
const NUMBER: &str = "x-purge-request-id";

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Kind {
    Url(usize),
    Prefix(&'static str, &'static str),
    Tag(&'static str),
    Host(&'static str),
    All,
    /// Several objects and a tag, as one.
    Batch(Vec<usize>, &'static str),
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Mode {
    Plain,
    Soft,
    Hard,
}

pub(super) struct Purge {
    pub kind: Kind,
    pub mode: Mode,
    /// The objects that it makes forgotten.
    pub covered: Vec<usize>,
}

impl fmt::Display for Purge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {:?}", self.mode, self.kind)
    }
}

impl Purge {
    /// Any purge.
    pub fn some(objects: &[Object], rng: &mut StdRng) -> Purge {
        let object = rng.random_range(0..objects.len());
        let tag = *["red", "blue", "every"].choose(rng).unwrap();
        let kind = match rng.random_range(0..20) {
            0..10 => Kind::Url(object),
            10..12 => {
                let [films, shows] = HOSTS;
                let all = [
                    (films, "/a/"),
                    (films, "/a/b/"),
                    (films, "/b/"),
                    (films, "/"),
                    (shows, "/s/"),
                    (shows, "/u/"),
                ];
                let (host, path) = *all.choose(rng).unwrap();
                Kind::Prefix(host, path)
            }
            12..14 => Kind::Tag(tag),
            14 => Kind::Host(HOSTS.choose(rng).unwrap()),
            15 => Kind::All,
            _ => {
                let count = rng.random_range(1..=BATCH_MAX);
                Kind::Batch((0..objects.len()).choose_multiple(rng, count), tag)
            }
        };
        let mode = match rng.random_range(0..4) {
            0 | 1 => Mode::Plain,
            2 => Mode::Soft,
            _ => Mode::Hard,
        };
        Purge::of(kind, mode, objects)
    }

    /// With the objects that it covers.
    pub fn of(kind: Kind, mode: Mode, objects: &[Object]) -> Purge {
        let tagged = |o: usize, tag: &str| tag == "every" || objects[o].tag == tag;
        let covers = |o: usize| match &kind {
            Kind::Url(object) => o == *object,
            Kind::Prefix(host, path) => {
                objects[o].host == *host && objects[o].film.path().starts_with(path)
            }
            Kind::Tag(tag) => tagged(o, tag),
            Kind::Host(host) => objects[o].host == *host,
            Kind::All => true,
            Kind::Batch(listed, tag) => listed.contains(&o) || tagged(o, tag),
        };
        let covered = (0..objects.len()).filter(|o| covers(*o)).collect();
        Purge {
            kind,
            mode,
            covered,
        }
    }

    /// As a PURGE to one of our nodes, or a call of its admin API.
    fn ask(&self, objects: &[Object], number: Option<&str>) -> (Ask, bool) {
        if let Kind::Batch(listed, tag) = &self.kind {
            let url = |o: &usize| format!("http://{}{}", objects[*o].host, objects[*o].film.path());
            let urls: Vec<String> = listed.iter().map(url).collect();
            let mode = format!("{:?}", self.mode).to_lowercase();
            let mut body = json!({"urls": urls, "tags": [tag], "mode": mode});
            if let Some(number) = number {
                body["request_id"] = number.into();
            }
            let ask = Ask::new("POST", "/v1/purge")
                .header("Authorization", format!("Bearer {ADMIN_TOKEN}"))
                .header("Content-Type", "application/json")
                .body(body.to_string());
            return (ask, true);
        }
        let (host, path, header) = match &self.kind {
            Kind::Url(o) => (objects[*o].host, objects[*o].film.path(), None),
            Kind::Prefix(host, path) => (*host, *path, Some(("X-Purge-Pattern", "prefix"))),
            Kind::Tag(tag) => (HOSTS[0], "/", Some(("X-Purge-Tag", *tag))),
            Kind::Host(host) => (*host, "/", Some(("X-Purge-Pattern", "host"))),
            _ => (HOSTS[0], "/", Some(("X-Purge-All", "true"))),
        };
        let mode = match self.mode {
            Mode::Plain => None,
            Mode::Soft => Some(("X-Purge-Mode", "soft")),
            Mode::Hard => Some(("X-Purge-Mode", "hard")),
        };
        let number = number.map(|number| (NUMBER, number));
        let mut ask = Ask::new("PURGE", path)
            .header("Host", host)
            .header("X-Purge-Token", PURGE_TOKEN);
        for (name, value) in header.into_iter().chain(mode).chain(number) {
            ask = ask.header(name, value);
        }
        (ask, false)
    }
}

/// Where one of our nodes takes purges.
pub(super) struct Door {
    pub clients: SocketAddr,
    pub admin: SocketAddr,
}

/// How purges are sent.
pub(super) enum Doors {
    /// To any of our nodes.
    Ours(Vec<Door>),
    /// To each of another cache's nodes.
    Each(FanOut),
}

impl Doors {
    /// Sends a purge; whether it was answered 200.
    pub async fn purge(
        &self,
        purge: &Purge,
        objects: &[Object],
        rng: &mut StdRng,
        tell: impl Fn(String),
    ) -> bool {
        let doors = match self {
            Doors::Ours(doors) => doors,
            Doors::Each(fan_out) => return fan_out.purge(purge, objects, rng, tell).await,
        };
        let mut number = None;
        loop {
            let (ask, by_admin) = purge.ask(objects, number.as_deref());
            let node = rng.random_range(0..doors.len());
            let door = &doors[node];
            let address = if by_admin { door.admin } else { door.clients };
            let answered = timeout(PURGE_PATIENCE, ask.send(address)).await;
            tell(format!("node {}: {}", node + 1, outcome(&answered)));
            let Ok(Ok(reply)) = answered else {
                return false;
            };
            if reply.status == 200 {
                return true;
            }
            // Whoever gets 503 may ask any node what became of it, or let it be.
            let given = reply.header(NUMBER);
            if reply.status != 503 || given.is_empty() || rng.random_bool(0.3) {
                return false;
            }
            number = Some(given.to_owned());
        }
    }
}

fn outcome<E: fmt::Display>(answered: &Result<Result<Reply, E>, impl fmt::Debug>) -> String {
    match answered {
        Ok(Ok(reply)) => format!("{} {}", reply.status, reply.text()),
        Ok(Err(error)) => format!("{error:#}"),
        Err(_) => "no answer".to_owned(),
    }
}
