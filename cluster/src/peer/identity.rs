//! Who a peer is: mutual TLS 1.3 inside the cluster's own authority.
//!
//! A node's certificate carries its number as the DNS name
//! `node-<id>.pingora-slice.internal` and, with all others, the name
//! [`SERVER_NAME`], which diallers ask for: verification depends neither on
//! host names nor on addresses. What is wrong with the files is said at the
//! start, with a remedy; nothing is verified less strictly later. No 0-RTT and
//! no session tickets: every connection shows its certificate.
//! Not here: who issues certificates (`pingora-slicectl ca`), and who is a
//! member (`serve` asks at each request).

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use ring::hmac;
use rustls::client::danger::ServerCertVerifier;
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::CryptoProvider;
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::sign::CertifiedKey;
use rustls::{CertificateError, CipherSuite, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use super::TlsFiles;
use crate::NodeId;
use crate::handle::StartError;

/// The DNS name that every node's certificate carries, and diallers verify.
pub const SERVER_NAME: &str = "peer.pingora-slice.internal";
/// What comes before the number in a node's own DNS name.
pub const NODE_NAME_PREFIX: &str = "node-";
/// What comes after it.
pub const NODE_NAME_SUFFIX: &str = ".pingora-slice.internal";

/// A certificate file larger than this is not one: a chain of four is 8 KiB.
const PEM_BYTES_MAX: u64 = 1024 * 1024;
/// Less time than this before the end is worth a warning at each start.
const EXPIRY_WARNING_DAYS: i64 = 30;

/// This node's certificate and key, and whom it trusts; all verified.
pub(super) struct Identity {
    roots: Arc<RootCertStore>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    provider: Arc<CryptoProvider>,
}

impl Identity {
    /// Reads and checks the three files for node `me`.
    pub(super) fn load(me: NodeId, tls: &TlsFiles) -> Result<Identity, StartError> {
        let reissue = format!("issue it with `pingora-slicectl ca issue --dir DIR --node {me}`");
        let authorities = certificates("ca", &tls.ca, "make it with `pingora-slicectl ca init`")?;
        let chain = certificates("cert", &tls.cert, &reissue)?;
        // What is wrong is not told in the reader's words: they may hold the key.
        let key = PrivateKeyDer::from_pem_slice(&contents("key", &tls.key, &reissue)?)
            .map_err(|_| wrong("key", &tls.key, "not a private key in PEM", &reissue))?;
        let mut provider = rustls::crypto::ring::default_provider();
        // Ten rounds where AES-256 has fourteen; whoever dials chooses.
        let first = CipherSuite::TLS13_AES_128_GCM_SHA256;
        provider
            .cipher_suites
            .sort_by_key(|suite| suite.suite() != first);
        let provider = Arc::new(provider);

        let mut roots = RootCertStore::empty();
        for authority in &authorities {
            let fault = match X509Certificate::from_der(authority) {
                Ok((_, parsed)) if !parsed.validity().is_valid() => {
                    Some("outside its validity".to_owned())
                }
                Ok(_) => roots.add(authority.clone()).err().map(|e| e.to_string()),
                Err(e) => Some(e.to_string()),
            };
            if let Some(fault) = fault {
                let remedy = "make a new authority with `pingora-slicectl ca init` in an empty \
                              directory and issue all certificates again";
                return Err(wrong(
                    "ca",
                    &tls.ca,
                    &format!("the authority is {fault}"),
                    remedy,
                ));
            }
        }

        CertifiedKey::from_der(chain.clone(), key.clone_key(), &provider).map_err(|e| {
            let what = format!("it does not belong to {} ({e})", tls.cert.display());
            wrong(
                "key",
                &tls.key,
                &what,
                &format!("use both files of one issue, or {reissue}"),
            )
        })?;
        let identity = Identity {
            roots: Arc::new(roots),
            chain,
            key,
            provider,
        };
        identity.verify_own().map_err(|e| {
            let what = match e {
                rustls::Error::InvalidCertificate(
                    CertificateError::UnknownIssuer | CertificateError::BadSignature,
                ) => format!("not issued by the authority in {}", tls.ca.display()),
                rustls::Error::InvalidCertificate(
                    CertificateError::Expired | CertificateError::ExpiredContext { .. },
                ) => "expired".to_owned(),
                rustls::Error::InvalidCertificate(
                    CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. },
                ) => "not valid yet; is the clock right?".to_owned(),
                other => other.to_string(),
            };
            wrong("cert", &tls.cert, &what, &reissue)
        })?;

        let owner = node_in_certificate(&identity.chain[0])
            .map_err(|what| wrong("cert", &tls.cert, &what, &reissue))?;
        if owner != me {
            let what = format!("it belongs to node {owner}, but cluster.node_id is {me}");
            return Err(wrong(
                "cert",
                &tls.cert,
                &what,
                &format!("use node {me}'s, or {reissue}"),
            ));
        }
        identity.warn_before_expiry(&tls.cert);
        Ok(identity)
    }

    /// For the endpoint that speaks `alpn`: only holders of a certificate get in.
    pub(super) fn server_config(&self, alpn: &[u8]) -> Result<quinn::ServerConfig, StartError> {
        let verifier = self.client_verifier().map_err(unusable)?;
        let mut config = rustls::ServerConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(unusable)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(self.chain.clone(), self.key.clone_key())
            .map_err(unusable)?;
        config.alpn_protocols = vec![alpn.to_vec()];
        config.send_tls13_tickets = 0;
        config.max_early_data_size = 0;
        let crypto = QuicServerConfig::try_from(config).map_err(unusable)?;
        Ok(quinn::ServerConfig::with_crypto(Arc::new(crypto)))
    }

    /// The dialling side of the same.
    pub(super) fn client_config(&self, alpn: &[u8]) -> Result<quinn::ClientConfig, StartError> {
        let mut config = rustls::ClientConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(unusable)?
            .with_root_certificates(self.roots.clone())
            .with_client_auth_cert(self.chain.clone(), self.key.clone_key())
            .map_err(unusable)?;
        config.alpn_protocols = vec![alpn.to_vec()];
        config.resumption = Resumption::disabled();
        config.enable_early_data = false;
        let crypto = QuicClientConfig::try_from(config).map_err(unusable)?;
        Ok(quinn::ClientConfig::new(Arc::new(crypto)))
    }

    /// Signs stateless resets. The same after a restart, so that a restarted
    /// node ends its former connections at the first packet instead of
    /// leaving the others to wait for it.
    pub(super) fn reset_key(&self) -> hmac::Key {
        let own = hmac::Key::new(hmac::HMAC_SHA256, self.key.secret_der());
        let derived = hmac::sign(&own, b"pingora-slice stateless reset");
        hmac::Key::new(hmac::HMAC_SHA256, derived.as_ref())
    }

    /// Looks at the own certificate as both kinds of peer will.
    fn verify_own(&self) -> Result<(), rustls::Error> {
        let (own, intermediates) = (&self.chain[0], &self.chain[1..]);
        let now = UnixTime::now();
        let other = |e: rustls::server::VerifierBuilderError| rustls::Error::General(e.to_string());
        self.client_verifier()
            .map_err(other)?
            .verify_client_cert(own, intermediates, now)?;
        let name =
            ServerName::try_from(SERVER_NAME).map_err(|e| rustls::Error::General(e.to_string()))?;
        WebPkiServerVerifier::builder_with_provider(self.roots.clone(), self.provider.clone())
            .build()
            .map_err(other)?
            .verify_server_cert(own, intermediates, &name, &[], now)?;
        Ok(())
    }

    fn client_verifier(
        &self,
    ) -> Result<Arc<dyn ClientCertVerifier>, rustls::server::VerifierBuilderError> {
        WebPkiClientVerifier::builder_with_provider(self.roots.clone(), self.provider.clone())
            .build()
    }

    fn warn_before_expiry(&self, path: &Path) {
        if let Ok((_, parsed)) = X509Certificate::from_der(&self.chain[0])
            && let Some(left) = parsed.validity().time_to_expiration()
            && left.whole_days() < EXPIRY_WARNING_DAYS
        {
            tracing::warn!(
                certificate = %path.display(),
                days_left = left.whole_days(),
                "this node's certificate expires soon: issue a new one and restart the node"
            );
        }
    }
}

/// When the first certificate of a PEM file ends; `None` where there is none
/// that can be read.
pub fn certificate_expires(path: &Path) -> Option<SystemTime> {
    let chain = certificates("certificate", path, "").ok()?;
    let (_, parsed) = X509Certificate::from_der(chain.first()?).ok()?;
    let seconds = parsed.validity().not_after.timestamp().try_into().ok()?;
    UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
}

/// The number of the node at the other end, from its verified certificate.
pub(super) fn node_of(connection: &quinn::Connection) -> Result<NodeId, String> {
    let chain = connection
        .peer_identity()
        .and_then(|any| any.downcast::<Vec<CertificateDer<'static>>>().ok())
        .ok_or("no certificate")?;
    node_in_certificate(chain.first().ok_or("no certificate")?)
}

/// The number that a certificate was issued for: exactly one, in decimal.
fn node_in_certificate(certificate: &CertificateDer<'_>) -> Result<NodeId, String> {
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(|e| e.to_string())?;
    let names = parsed
        .subject_alternative_name()
        .map_err(|e| e.to_string())?;
    let mut nodes = names
        .iter()
        .flat_map(|extension| &extension.value.general_names)
        .filter_map(|name| match name {
            GeneralName::DNSName(name) => node_in_name(name),
            _ => None,
        });
    match (nodes.next(), nodes.next()) {
        (Some(node), None) => Ok(node),
        (None, _) => Err(format!(
            "no name of the form {NODE_NAME_PREFIX}<number>{NODE_NAME_SUFFIX} in the certificate"
        )),
        (Some(_), Some(_)) => Err("the certificate names more than one node".to_owned()),
    }
}

/// The number in a node's DNS name; `None` for any other name.
fn node_in_name(name: &str) -> Option<NodeId> {
    let digits = name
        .strip_prefix(NODE_NAME_PREFIX)?
        .strip_suffix(NODE_NAME_SUFFIX)?;
    let node = digits.parse().ok().filter(|node| *node > 0)?;
    // One spelling per number: no sign, no leading zero.
    (digits == u64::to_string(&node)).then_some(NodeId(node))
}

fn certificates(
    key: &str,
    path: &Path,
    remedy: &str,
) -> Result<Vec<CertificateDer<'static>>, StartError> {
    let pem = contents(key, path, remedy)?;
    let found: Vec<_> = CertificateDer::pem_slice_iter(&pem)
        .collect::<Result<_, _>>()
        .map_err(|_| wrong(key, path, "not PEM", remedy))?;
    if found.is_empty() {
        return Err(wrong(key, path, "no certificate in it", remedy));
    }
    Ok(found)
}

fn contents(key: &str, path: &Path, remedy: &str) -> Result<Vec<u8>, StartError> {
    let cannot = |e: std::io::Error| wrong(key, path, &format!("cannot be read ({e})"), remedy);
    if std::fs::metadata(path).map_err(cannot)?.len() > PEM_BYTES_MAX {
        return Err(wrong(key, path, "too large for a certificate", remedy));
    }
    std::fs::read(path).map_err(cannot)
}

fn wrong(key: &str, path: &Path, what: &str, remedy: &str) -> StartError {
    StartError::Config(format!(
        "cluster.tls.{key}: {}: {what}; {remedy}",
        path.display()
    ))
}

fn unusable(e: impl std::fmt::Display) -> StartError {
    StartError::Config(format!("cluster.tls: the certificates cannot be used: {e}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_has_one_name() {
        assert_eq!(
            node_in_name("node-12.pingora-slice.internal"),
            Some(NodeId(12))
        );
        for other in [
            "node-0.pingora-slice.internal",
            "node-012.pingora-slice.internal",
            "node-+1.pingora-slice.internal",
            "node-1.pingora-slice.internal.example",
            "node-99999999999999999999.pingora-slice.internal",
            "node-.pingora-slice.internal",
            "Node-1.pingora-slice.internal",
            SERVER_NAME,
        ] {
            assert_eq!(node_in_name(other), None, "{other}");
        }
    }
}
