//! Addresses: how they are written, and when two of them are the same place.

use std::net::{IpAddr, SocketAddr, UdpSocket};

use super::Upstream;

/// `ip:port`; `localhost` is 127.0.0.1. Other names would have to be looked up.
pub(super) fn socket_address(text: &str) -> Result<SocketAddr, String> {
    let text = match text.strip_prefix("localhost:") {
        Some(port) => format!("127.0.0.1:{port}"),
        None => text.to_string(),
    };
    text.parse()
        .map_err(|_| "must be an address and a port, such as 0.0.0.0:8080".to_string())
}

/// `host:port`, `http://host[:port]` or `https://host[:port]`.
pub(super) fn upstream(text: &str) -> Result<Upstream, String> {
    let remedy = "must be host:port, http://host or https://host, without a path";
    let (tls, port, rest) = match text.split_once("://") {
        Some(("http", rest)) => (false, Some(80), rest),
        Some(("https", rest)) => (true, Some(443), rest),
        Some(_) => return Err(remedy.to_string()),
        None => (false, None, text),
    };
    let rest = if port.is_some() {
        rest.strip_suffix('/').unwrap_or(rest)
    } else {
        rest
    };
    let (host, port) = split_host(rest, port).ok_or(remedy)?;
    Ok(Upstream { host, port, tls })
}

/// `host:port` of a cluster node; control traffic is on the next port.
pub(super) fn peer_address(text: &str) -> Result<String, String> {
    let remedy = "must be host:port, such as node1:7001";
    let (host, port) = split_host(text, None).ok_or(remedy)?;
    if host
        .trim_matches(['[', ']'])
        .parse()
        .is_ok_and(|ip: IpAddr| ip.is_unspecified())
    {
        return Err("must be an address that the others can reach, not 0.0.0.0".to_string());
    }
    if !has_next_port(port) {
        return Err(NEXT_PORT_REMEDY.to_string());
    }
    Ok(format!("{host}:{port}"))
}

/// Host (IPv6 in brackets) in lower case, and port.
fn split_host(text: &str, default_port: Option<u16>) -> Option<(String, u16)> {
    let (host, port) = match text.rsplit_once(':') {
        // A colon inside brackets belongs to an IPv6 address.
        Some((host, port)) if !port.ends_with(']') => (host, Some(port.parse().ok()?)),
        _ => (text, None),
    };
    let port = port.or(default_port).filter(|port| *port != 0)?;
    let is_host = match host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'))
    {
        Some(ip) => ip.parse::<std::net::Ipv6Addr>().is_ok(),
        None => {
            let allowed = |b: u8| b.is_ascii_alphanumeric() || b"-._".contains(&b);
            !host.is_empty() && host.bytes().all(allowed)
        }
    };
    is_host.then(|| (host.to_ascii_lowercase(), port))
}

/// A value for the Host field: a host, or host:port.
pub(super) fn host_header(text: &str) -> Result<String, String> {
    match split_host(text, Some(80)) {
        Some(_) => Ok(text.to_string()),
        None => Err("must be a host name, or host:port".to_string()),
    }
}

/// What to do where [`has_next_port`] is false.
pub(super) const NEXT_PORT_REMEDY: &str =
    "must be a port from 1 to 65534: control traffic is on the next one";

/// Whether a cluster endpoint fits: a real port, and one above it.
pub(super) fn has_next_port(port: u16) -> bool {
    (1..u16::MAX).contains(&port)
}

/// Whether both cannot be bound at once. `[::]` takes IPv4 too, as Linux has it.
pub(super) fn overlap(a: SocketAddr, b: SocketAddr) -> bool {
    let (ip_a, ip_b) = (a.ip().to_canonical(), b.ip().to_canonical());
    let covers = |x: IpAddr, y: IpAddr| x.is_unspecified() && (x.is_ipv6() || y.is_ipv4());
    a.port() == b.port()
        && a.port() != 0
        && (ip_a == ip_b || covers(ip_a, ip_b) || covers(ip_b, ip_a))
}

/// Whether connecting to `host:port` arrives at `listen` on this machine, as
/// far as the text can tell: other names are left to `CDN-Loop`.
pub(super) fn reaches(host: &str, port: u16, listen: SocketAddr) -> bool {
    if port != listen.port() {
        return false;
    }
    let listen_ip = listen.ip().to_canonical();
    if host == "localhost" || host.ends_with(".localhost") {
        return listen_ip.is_unspecified() || listen_ip.is_loopback();
    }
    let Ok(ip) = host.trim_matches(['[', ']']).parse::<IpAddr>() else {
        return false;
    };
    // Connecting to the unspecified address means this machine's loopback.
    let ip = ip.to_canonical();
    let is_loopback = ip.is_loopback() || ip.is_unspecified();
    // Only an address of this machine can be bound.
    let is_ours = || is_loopback || UdpSocket::bind((ip, 0)).is_ok();
    ip == listen_ip
        || (ip.is_unspecified() && listen_ip.is_loopback())
        || (listen_ip.is_unspecified() && is_ours())
}
