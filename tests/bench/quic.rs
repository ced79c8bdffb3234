//! Slices of 1 MiB, and parts of 64 KiB, between two QUIC endpoints: with nothing
//! but quinn, in this process and on one thread, or each in a process of its own as
//! nodes are; and with our peers, in this process. And the other two of three nodes
//! that have nothing else.

use std::fs;
use std::io::{BufRead, BufReader, Read, stdin};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use async_trait::async_trait;
use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::{self, FuturesUnordered};
use futures::{FutureExt, StreamExt};
use pingora_slice_client::ca;
use pingora_slice_cluster::peer::{Body, PeerHandler, Peers, SERVER_NAME, TlsFiles};
use pingora_slice_cluster::wire::{
    Answer, Ask, OriginRequest, Part, SliceAsk, SliceOrigin, Version,
};
use pingora_slice_cluster::{Generation, NodeId, ObjectKey, PurgeIndex, SliceId};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::sync::OnceCell;

use crate::{MIB, PAGE_BYTES, cpu, stat};

/// Slices that are fetched at once.
pub const AT_ONCE: usize = 4;
/// Connections that they are spread over, as the peers do it.
const CONNECTIONS: usize = 4;
/// Buffers of each socket, as the peers ask for them.
const SOCKET_BUFFER_BYTES: usize = 4 * 1024 * 1024;
/// Largest UDP payload, as the peers use it.
const PAYLOAD_BYTES: u16 = 6500;
/// Windows, as the peers use them for slices.
const STREAM_WINDOW_BYTES: u32 = 16 * 1024 * 1024;
const CONNECTION_WINDOW_BYTES: u32 = 64 * 1024 * 1024;
const SEND_WINDOW_BYTES: u64 = 8 * 1024 * 1024;
/// Connections outlive the turns of others, as the peers' do.
const KEEP_ALIVE: Duration = Duration::from_secs(2);

/// See the module's text: `kind` is `bare`, `apart` or `ours`.
pub fn run(kind: &str, time: Duration) -> Result<()> {
    let dir = tempfile::tempdir()?;
    issue(dir.path())?;
    one_worker()?.block_on(async {
        match kind {
            "bare" => {
                let owner = bare_owner(dir.path())?;
                let read = bare_asker(dir.path(), owner.local_addr()?).await?;
                let answer = measure(time, cpu, read).await;
                owner.close(0u32.into(), b"");
                answer
            }
            "apart" => {
                let owner = Owner::start(dir.path())?;
                let (address, pid) = (owner.address, owner.child.id());
                let read = bare_asker(dir.path(), address).await?;
                let owners = move || stat::own_cpu_seconds(pid).unwrap_or_default();
                let both = move || cpu() + Duration::from_secs_f64(owners());
                measure(time, both, read).await
            }
            "ours" => {
                let (asker, owner) = ours(dir.path())?;
                let asker = Arc::new(asker);
                let read = move |bytes| read_ours(asker.clone(), bytes);
                let answer = measure(time, cpu, read).await;
                owner.stop().await;
                answer
            }
            other => bail!("{other}: bare, apart or ours"),
        }
    })
}

/// Certificates for two.
fn issue(dir: &Path) -> Result<()> {
    ca::ca_init(dir)?;
    (1..=2).try_for_each(|id| ca::ca_issue(dir, id, &[]).map(drop))
}

fn one_worker() -> Result<tokio::runtime::Runtime> {
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    Ok(runtime.worker_threads(1).enable_all().build()?)
}

/// The other process of `apart`: says where it listens, and answers until its input ends.
pub fn own(dir: &Path) -> Result<()> {
    one_worker()?.block_on(async {
        let owner = bare_owner(dir)?;
        println!("{}", owner.local_addr()?);
        tokio::task::spawn_blocking(|| stdin().read_to_end(&mut Vec::new())).await??;
        Ok(())
    })
}

/// [`own`] in a process, stopped when dropped.
struct Owner {
    child: Child,
    address: SocketAddr,
}

impl Owner {
    fn start(dir: &Path) -> Result<Owner> {
        let mut child = Command::new(std::env::current_exe()?)
            .arg("quic-owner")
            .arg(dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let said = child.stdout.take().context("its output is a pipe")?;
        let mut line = String::new();
        BufReader::new(said).read_line(&mut line)?;
        let address = line.trim().parse()?;
        Ok(Owner { child, address })
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

type ReadBare = Box<dyn Fn(usize) -> BoxFuture<'static, Result<Bytes>> + Send + Sync>;

/// The two nodes beside one that clients ask: each of the three has every third slice,
/// these two the same bytes in each.
pub struct Others {
    dir: PathBuf,
    owners: [Owner; 2],
    /// Connected by the first request, in the server's runtime.
    read: OnceCell<[ReadBare; 2]>,
}

impl Others {
    /// Starts them; `dir` is for certificates.
    pub fn start(dir: &Path) -> Result<Others> {
        fs::create_dir_all(dir)?;
        issue(dir)?;
        Ok(Others {
            dir: dir.to_owned(),
            owners: [Owner::start(dir)?, Owner::start(dir)?],
            read: OnceCell::new(),
        })
    }

    /// A range within a slice of an object: here it is cut out of `bytes`, or an owner sends as much.
    pub async fn slice(&self, bytes: &Bytes, range: Range<usize>) -> Result<Bytes> {
        let connect = async || {
            let [first, second] = &self.owners;
            let first = bare_asker(&self.dir, first.address).await?;
            let second = bare_asker(&self.dir, second.address).await?;
            anyhow::Ok([Box::new(first) as ReadBare, Box::new(second)])
        };
        match range.start / MIB % 3 {
            0 => Ok(bytes.slice(range)),
            owner => {
                let read = &self.read.get_or_try_init(connect).await?[owner - 1];
                tokio::spawn(read(range.len())).await?
            }
        }
    }
}

/// Half of the time slices, `AT_ONCE` at a time; then parts, one at a time.
async fn measure<F, T>(
    time: Duration,
    cpu: impl Fn() -> Duration + Send + 'static,
    read: impl Fn(usize) -> F + Send + 'static,
) -> Result<()>
where
    F: Future<Output = Result<T>> + Send + 'static,
    T: Send,
{
    // In a task, so that all of it runs on the one worker.
    let line = tokio::spawn(async move {
        // Until the path's largest packets are found.
        let warm = Instant::now();
        while warm.elapsed() < Duration::from_millis(500) {
            read(MIB).await?;
        }
        let (begin, cpu_before) = (Instant::now(), cpu());
        let mut count = 0u64;
        let mut reading: FuturesUnordered<_> = (0..AT_ONCE).map(|_| read(MIB)).collect();
        while let Some(one) = reading.next().await {
            one?;
            count += 1;
            if begin.elapsed() < time / 2 {
                reading.push(read(MIB));
            }
        }
        let per_second = count as f64 / begin.elapsed().as_secs_f64();
        let cpu_us_per_mib = (cpu() - cpu_before).as_secs_f64() * 1e6 / count as f64;
        let begin = Instant::now();
        let mut times = Vec::new();
        while begin.elapsed() < time / 2 {
            let asked = Instant::now();
            read(PAGE_BYTES).await?;
            times.push(asked.elapsed());
        }
        times.sort();
        let p50 = times[times.len() / 2].as_secs_f64() * 1e6;
        anyhow::Ok(format!(
            "{{\"per_second\": {per_second}, \"cpu_us_per_mib\": {cpu_us_per_mib}, \"p50_us\": {p50}}}"
        ))
    });
    println!("{}", line.await??);
    Ok(())
}

fn tls(dir: &Path, id: u64) -> TlsFiles {
    TlsFiles {
        ca: dir.join("ca.pem"),
        cert: dir.join(format!("node{id}.pem")),
        key: dir.join(format!("node{id}.key")),
    }
}

/// Two free ports in a row: the peers' second endpoint takes the next one.
fn free_pair() -> Result<SocketAddr> {
    loop {
        let first = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
        if let Some(next) = first.port().checked_add(1)
            && UdpSocket::bind((Ipv4Addr::LOCALHOST, next)).is_ok()
        {
            return Ok(first);
        }
    }
}

// --- nothing but quinn

/// How both ends show who they are.
struct Identity {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    roots: Arc<rustls::RootCertStore>,
    provider: Arc<rustls::crypto::CryptoProvider>,
}

impl Identity {
    fn read(dir: &Path) -> Result<Identity> {
        let files = tls(dir, 1);
        // As the peers have it.
        let mut provider = rustls::crypto::ring::default_provider();
        let first = rustls::CipherSuite::TLS13_AES_128_GCM_SHA256;
        provider
            .cipher_suites
            .sort_by_key(|suite| suite.suite() != first);
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(&files.ca)?)?;
        Ok(Identity {
            chain: CertificateDer::pem_file_iter(&files.cert)?.collect::<Result<_, _>>()?,
            key: PrivateKeyDer::from_pem_file(&files.key)?,
            roots: Arc::new(roots),
            provider: Arc::new(provider),
        })
    }
}

/// An endpoint with the payload and the buffers of the peers.
fn endpoint(server: Option<quinn::ServerConfig>) -> Result<quinn::Endpoint> {
    let mut config = quinn::EndpointConfig::default();
    config.max_udp_payload_size(PAYLOAD_BYTES)?;
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    let buffers = socket2::SockRef::from(&socket);
    buffers.set_recv_buffer_size(SOCKET_BUFFER_BYTES)?;
    buffers.set_send_buffer_size(SOCKET_BUFFER_BYTES)?;
    let runtime = Arc::new(quinn::TokioRuntime);
    Ok(quinn::Endpoint::new(config, server, socket, runtime)?)
}

fn transport() -> Arc<quinn::TransportConfig> {
    let mut discovery = quinn::MtuDiscoveryConfig::default();
    discovery.upper_bound(PAYLOAD_BYTES);
    let mut transport = quinn::TransportConfig::default();
    transport
        .mtu_discovery_config(Some(discovery))
        .stream_receive_window(STREAM_WINDOW_BYTES.into())
        .receive_window(CONNECTION_WINDOW_BYTES.into())
        .send_window(SEND_WINDOW_BYTES)
        .keep_alive_interval(Some(KEEP_ALIVE));
    Arc::new(transport)
}

fn bare_owner(dir: &Path) -> Result<quinn::Endpoint> {
    let identity = Identity::read(dir)?;
    let verifier = rustls::server::WebPkiClientVerifier::builder_with_provider(
        identity.roots,
        identity.provider.clone(),
    )
    .build()?;
    let mut server = rustls::ServerConfig::builder_with_provider(identity.provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(identity.chain, identity.key)?;
    server.alpn_protocols = vec![b"bare".to_vec()];
    let crypto = quinn::crypto::rustls::QuicServerConfig::try_from(server)?;
    let mut server = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    server.transport_config(transport());
    let owner = endpoint(Some(server))?;
    let accepting = owner.clone();
    let slice = Bytes::from(vec![0x5a; MIB]);
    tokio::spawn(async move {
        while let Some(incoming) = accepting.accept().await {
            tokio::spawn(answer_bare(incoming.await?, slice.clone()));
        }
        anyhow::Ok(())
    });
    Ok(owner)
}

/// Reads that many bytes, over each connection in turn.
async fn bare_asker(
    dir: &Path,
    owner: SocketAddr,
) -> Result<impl Fn(usize) -> BoxFuture<'static, Result<Bytes>> + Send + Sync + 'static> {
    let identity = Identity::read(dir)?;
    let mut client = rustls::ClientConfig::builder_with_provider(identity.provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(identity.roots)
        .with_client_auth_cert(identity.chain, identity.key)?;
    client.alpn_protocols = vec![b"bare".to_vec()];
    let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(client)?;
    let mut client = quinn::ClientConfig::new(Arc::new(crypto));
    client.transport_config(transport());
    let asker = endpoint(None)?;
    let mut connections = Vec::new();
    for _ in 0..CONNECTIONS {
        let connecting = asker.connect_with(client.clone(), owner, SERVER_NAME)?;
        connections.push(connecting.await?);
    }
    let asked = AtomicUsize::new(0);
    Ok(move |bytes| {
        let turn = asked.fetch_add(1, Ordering::Relaxed) % CONNECTIONS;
        read_bare(connections[turn].clone(), bytes).boxed()
    })
}

async fn answer_bare(connection: quinn::Connection, slice: Bytes) {
    while let Ok((mut send, mut receive)) = connection.accept_bi().await {
        let slice = slice.clone();
        tokio::spawn(async move {
            let mut wanted = [0; 4];
            receive.read_exact(&mut wanted).await?;
            let bytes = slice.slice(..u32::from_be_bytes(wanted) as usize);
            send.write_chunk(bytes).await?;
            send.finish()?;
            anyhow::Ok(())
        });
    }
}

async fn read_bare(connection: quinn::Connection, bytes: usize) -> Result<Bytes> {
    let (mut send, mut receive) = connection.open_bi().await?;
    send.write_all(&(bytes as u32).to_be_bytes()).await?;
    send.finish()?;
    let mut gathered = Vec::with_capacity(bytes);
    while let Some(chunk) = receive.read_chunk(usize::MAX, true).await? {
        gathered.extend_from_slice(&chunk.bytes);
    }
    ensure!(gathered.len() == bytes, "{} bytes", gathered.len());
    Ok(gathered.into())
}

// --- our peers

/// Gives everybody the same slice from memory: the transport's part of an owner.
struct Memory(Vec<Part>);

#[async_trait]
impl PeerHandler for Memory {
    fn is_member(&self, _from: NodeId) -> bool {
        true
    }

    async fn slices(&self, _from: NodeId, ask: Ask) -> (Answer, Option<Body>) {
        let Ask::Slice(ask) = ask else {
            return (Answer::Missing, None);
        };
        let count = (ask.end as usize).div_ceil(PAGE_BYTES).min(self.0.len());
        let parts: Vec<_> = self.0[..count].iter().cloned().map(Ok).collect();
        let answer = Answer::Slice {
            slice_bytes: Some(MIB as u32),
            source: SliceOrigin::Stored,
        };
        (answer, Some(stream::iter(parts).boxed()))
    }

    async fn control(&self, _from: NodeId, _request: Bytes) -> Result<Vec<u8>, String> {
        Err("no control traffic here".to_owned())
    }
}

fn ours(dir: &Path) -> Result<(Peers, Peers)> {
    let slice = Bytes::from(vec![0x5a; MIB]);
    let pages = (0..MIB).step_by(PAGE_BYTES);
    let parts = pages.map(|at| Part::new(slice.slice(at..at + PAGE_BYTES)));
    let memory = Arc::new(Memory(parts.collect()));
    let bind = |id| -> Result<(Peers, SocketAddr)> {
        let address = free_pair()?;
        let peers = Peers::bind(address, NodeId(id), &tls(dir, id), memory.clone())?;
        Ok((peers, address))
    };
    let (asker, _) = bind(1)?;
    let (owner, address) = bind(2)?;
    asker.set_address(NodeId(2), &address.to_string());
    Ok((asker, owner))
}

async fn read_ours(asker: Arc<Peers>, bytes: usize) -> Result<()> {
    let ask = Ask::Slice(SliceAsk {
        key: ObjectKey(1),
        slice: SliceId {
            generation: Generation(1),
            index: 0,
        },
        start: 0,
        end: bytes as u32,
        request: OriginRequest {
            host: "a".into(),
            target: "/".into(),
            headers: vec![],
        },
        version: Version {
            etag: None,
            last_modified: None,
            exact_date: false,
            length: None,
            slice_bytes: MIB as u32,
            whole: false,
            hard: PurgeIndex::default(),
        },
        place: 0,
        stamp: PurgeIndex::default(),
        stored_only: true,
    });
    let (_, body) = asker.ask(NodeId(2), &ask, Duration::from_secs(10)).await?;
    let mut body = body.context("an answer without a body")?;
    // As the engine gathers for its memory store what the frames have gathered.
    let mut gathered = Vec::with_capacity(bytes);
    while let Some(part) = body.next().await {
        let part = part?;
        ensure!(part.is_intact(), "a damaged part");
        gathered.extend_from_slice(&part.bytes);
    }
    ensure!(gathered.len() == bytes, "{} bytes", gathered.len());
    std::hint::black_box(&gathered);
    Ok(())
}
