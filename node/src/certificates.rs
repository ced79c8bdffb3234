//! The certificates that clients are shown: read at the start and at each reload
//! (SIGHUP). A handshake takes the pair that is there when it begins; connections
//! that stand go on. Not here: certificates between nodes (the cluster's `peer`).

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;

use crate::config::{Listen, ListenTls, Problem, Problems};

/// A file larger than this is neither: a chain of four is 8 KiB.
const PEM_BYTES_MAX: u64 = 1 << 20;

/// The pair of each listener with TLS, as its files were when they were read.
pub struct Pairs(Vec<Option<Arc<CertifiedKey>>>);

impl Pairs {
    /// Reads the files and checks that each key belongs to its certificate.
    ///
    /// # Errors
    /// All that cannot be used, by their keys.
    pub fn read(listen: &[Listen]) -> Result<Pairs, Problems> {
        let (mut pairs, mut problems) = (Vec::new(), Vec::new());
        for (i, listen) in listen.iter().enumerate() {
            match listen.tls.as_ref().map(read_pair).transpose() {
                Ok(pair) => pairs.push(pair.map(Arc::new)),
                Err((name, path, remedy)) => problems.push(Problem {
                    key: format!("listen[{i}].tls.{name}"),
                    value: path.display().to_string(),
                    remedy,
                }),
            }
        }
        match problems.is_empty() {
            true => Ok(Pairs(pairs)),
            false => Err(Problems(problems)),
        }
    }
}

/// What each listener shows now, where it has TLS.
pub struct Certificates(Vec<Option<Arc<Shown>>>);

impl Certificates {
    /// Begins with these.
    pub fn new(pairs: Pairs) -> Certificates {
        let shown = |pair: Option<_>| pair.map(|pair| Arc::new(Shown(ArcSwap::new(pair))));
        Certificates(pairs.0.into_iter().map(shown).collect())
    }

    /// Those of the listeners, in their order.
    pub fn shown(&self) -> &[Option<Arc<Shown>>] {
        &self.0
    }

    /// Goes on with these, of the same listeners, for handshakes from now on; whether
    /// one is another than before.
    pub fn renew(&self, pairs: Pairs) -> bool {
        let mut is_other = false;
        for (shown, pair) in self.0.iter().zip(pairs.0) {
            if let (Some(shown), Some(pair)) = (shown, pair) {
                let before = shown.0.swap(pair.clone());
                is_other |= before.cert != pair.cert;
            }
        }
        is_other
    }
}

/// What one listener shows now.
#[derive(Debug)]
pub struct Shown(ArcSwap<CertifiedKey>);

impl ResolvesServerCert for Shown {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.load_full())
    }
}

/// A certificate chain and its key; else the key of the file at fault, its path, and
/// what to do.
fn read_pair(files: &ListenTls) -> Result<CertifiedKey, (&'static str, &Path, String)> {
    let of_cert = |remedy| ("cert", files.cert.as_path(), remedy);
    let of_key = |remedy| ("key", files.key.as_path(), remedy);
    let pem = contents(&files.cert).map_err(of_cert)?;
    let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(&pem)
        .collect::<Result<_, _>>()
        .map_err(|_| of_cert("is no certificate chain in PEM".to_owned()))?;
    if chain.is_empty() {
        let remedy = "has no certificate: give a chain in PEM, the server's own first";
        return Err(of_cert(remedy.to_owned()));
    }
    let key = PrivateKeyDer::from_pem_slice(&contents(&files.key).map_err(of_key)?)
        // The reader's own words may hold the key.
        .map_err(|_| of_key("is no private key in PEM".to_owned()))?;
    let provider = rustls::crypto::ring::default_provider();
    CertifiedKey::from_der(chain, key, &provider).map_err(|e| {
        let cert = files.cert.display();
        of_key(format!(
            "cannot be used with {cert} ({e}): give the key that it was made for"
        ))
    })
}

fn contents(path: &Path) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|file| file.take(PEM_BYTES_MAX).read_to_end(&mut bytes));
    read.map_err(|e| format!("cannot be read: {e}"))?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_used_is_named_by_its_key() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let of = |cert, key| Listen {
            tls: Some(ListenTls { cert, key }),
            ..Listen::plain(([127, 0, 0, 1], 8443).into())
        };
        let empty = file("empty.pem", "");
        let torn = file("torn.pem", "-----BEGIN CERTIFICATE-----\nMIIB");
        let plain = Listen::plain(([127, 0, 0, 1], 8080).into());
        let one_line = "-----BEGIN PRIVATE KEY-----c2VjcmV0-----END PRIVATE KEY-----";
        let one_line = file("one_line.pem", one_line);
        let cert = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        let cert = file("cert.pem", cert);
        let listen = [
            of(cert, one_line),
            plain.clone(),
            of(empty.clone(), empty.clone()),
            of(torn, empty),
            of(dir.path().join("none.pem"), dir.path().join("none.key")),
        ];
        let Err(Problems(problems)) = Pairs::read(&listen) else {
            panic!("none of them is a pair");
        };
        let told: Vec<_> = problems.iter().map(|p| (&*p.key, &*p.remedy)).collect();
        for (told, (key, remedy)) in told.iter().zip([
            ("listen[0].tls.key", "is no private key in PEM"),
            ("listen[2].tls.cert", "has no certificate"),
            ("listen[3].tls.cert", "is no certificate chain in PEM"),
        ]) {
            assert_eq!(*told, (key, told.1));
            assert!(told.1.starts_with(remedy), "{told:?}");
        }
        assert_eq!(told[0].1, "is no private key in PEM", "and nothing of it");
        assert_eq!(told[3].0, "listen[4].tls.cert");
        assert!(told[3].1.starts_with("cannot be read"), "{told:?}");
        assert_eq!(told.len(), 4);
        let shown = Certificates::new(Pairs::read(&[plain]).unwrap());
        assert!(matches!(shown.shown(), [None]));
    }
}
