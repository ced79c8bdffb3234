//! The cluster's own certificate authority, as files in a directory.
//!
//! `ca.pem` and `ca.key` are made once; each node gets `node<N>.pem` and
//! `node<N>.key`, which both serve and dial. `ca.key` is needed on no node:
//! whoever has it can be any node. Keys are ECDSA P-256, readable by their owner only.
//! Not here: verifying (`pingora-slice` does, at its start and at each connection).

use std::fs::{self, OpenOptions, Permissions};
use std::io::Write;
use std::net::IpAddr;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType,
};

/// The DNS name in every node's certificate, which diallers verify.
/// `pingora-slice-cluster` has the same in `peer`; a test there compares them.
pub const SERVER_NAME: &str = "peer.pingora-slice.internal";
/// A node's own DNS name is this, its number, and [`NODE_NAME_SUFFIX`].
pub const NODE_NAME_PREFIX: &str = "node-";
/// See [`NODE_NAME_PREFIX`].
pub const NODE_NAME_SUFFIX: &str = ".pingora-slice.internal";

const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// How long an authority is valid: ten years.
const CA_DAYS: u32 = 3653;
/// How long a node's certificate is valid: two years.
const NODE_DAYS: u32 = 731;
/// Certificates are valid from a little before they are made, for clocks that are late.
const CLOCK_SKEW: Duration = Duration::from_secs(60 * 60);

/// Makes an authority: `ca.pem` and `ca.key` in `dir`, which is made if need be.
///
/// # Errors
/// There is one already (it is never overwritten), or the disk.
pub fn ca_init(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("{} cannot be made", dir.display()))?;
    let (cert_path, key_path) = (dir.join("ca.pem"), dir.join("ca.key"));
    for path in [&cert_path, &key_path] {
        ensure!(
            !path.exists(),
            "{} exists: an authority is never overwritten, as all certificates that it has \
             issued would stop working; choose another directory",
            path.display()
        );
    }
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let mut params = params("pingora-slice cluster authority", CA_DAYS);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let certificate = params.self_signed(&key)?;
    create(&key_path, &key.serialize_pem(), 0o600)?;
    create(&cert_path, &certificate.pem(), 0o644)
}

/// Issues the certificate of node `node`: `node<N>.pem` and `node<N>.key` in
/// `dir`, where the authority is. `hosts` are names and addresses to put in
/// besides the node's own; nothing depends on them. Issuing again replaces the files.
///
/// # Errors
/// No authority in `dir`, a number or host that cannot be, or the disk.
pub fn ca_issue(dir: &Path, node: u64, hosts: &[String]) -> Result<()> {
    ensure!(node > 0, "node numbers begin at 1");
    let authority = read(dir.join("ca.pem"))?;
    let authority_key = KeyPair::from_pem(&read(dir.join("ca.key"))?)
        .with_context(|| format!("{} is not a private key", dir.join("ca.key").display()))?;
    let issuer = Issuer::from_ca_cert_pem(&authority, authority_key)
        .with_context(|| format!("{} is not a certificate", dir.join("ca.pem").display()))?;

    let own_name = format!("{NODE_NAME_PREFIX}{node}{NODE_NAME_SUFFIX}");
    let mut params = params(&own_name, NODE_DAYS);
    params.subject_alt_names = vec![dns_name(&own_name)?, dns_name(SERVER_NAME)?];
    for host in hosts {
        params.subject_alt_names.push(host_name(host)?);
    }
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    params.use_authority_key_identifier_extension = true;
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let certificate = params.signed_by(&key, &issuer)?;
    replace(
        &dir.join(format!("node{node}.key")),
        &key.serialize_pem(),
        0o600,
    )?;
    replace(
        &dir.join(format!("node{node}.pem")),
        &certificate.pem(),
        0o644,
    )
}

/// What both kinds of certificate share.
fn params(common_name: &str, days: u32) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params
        .distinguished_name
        .push(DnType::CommonName, common_name);
    let now = SystemTime::now();
    params.not_before = (now - CLOCK_SKEW).into();
    params.not_after = (now + DAY * days).into();
    params
}

/// A `--host`: an address, or a DNS name that cannot be taken for a node's own.
fn host_name(host: &str) -> Result<SanType> {
    if let Ok(address) = host.parse::<IpAddr>() {
        return Ok(SanType::IpAddress(address));
    }
    let plausible = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    if host.is_empty() || host.len() > 253 || !host.chars().all(plausible) {
        bail!("--host {host:?} is neither a host name nor an address (and takes no port)");
    }
    ensure!(
        !host.to_ascii_lowercase().ends_with(NODE_NAME_SUFFIX),
        "--host {host}: names under {} say which node it is",
        NODE_NAME_SUFFIX.trim_start_matches('.')
    );
    dns_name(host)
}

fn dns_name(name: &str) -> Result<SanType> {
    Ok(SanType::DnsName(
        name.try_into()
            .with_context(|| format!("{name} is not a DNS name"))?,
    ))
}

fn read(path: PathBuf) -> Result<String> {
    fs::read_to_string(&path).with_context(|| {
        format!(
            "{} cannot be read; make it with `pingora-slicectl ca init`",
            path.display()
        )
    })
}

/// Writes a file that does not exist yet, with its mode from the first byte on.
fn create(path: &Path, contents: &str, mode: u32) -> Result<()> {
    let written = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)
        .and_then(|mut file| {
            // The mode given to `open` passes through the umask.
            file.set_permissions(Permissions::from_mode(mode))?;
            file.write_all(contents.as_bytes())?;
            file.sync_all()
        });
    written.with_context(|| format!("{} cannot be written", path.display()))
}

/// Writes a file in place of another: whoever reads it sees one or the other.
fn replace(path: &Path, contents: &str, mode: u32) -> Result<()> {
    let mut draft = path.as_os_str().to_owned();
    draft.push(format!(".{}", std::process::id()));
    let draft = PathBuf::from(draft);
    let replaced = create(&draft, contents, mode).and_then(|()| {
        fs::rename(&draft, path).with_context(|| format!("{} cannot be written", path.display()))
    });
    if replaced.is_err() {
        // Best effort: the first error is the one to report.
        let _ = fs::remove_file(&draft);
    }
    replaced
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory of this test's own, removed at its end.
    struct Dir(PathBuf);

    impl Dir {
        fn new(name: &str) -> Result<Dir> {
            let path = std::env::temp_dir()
                .join(format!("pingora-slice-ca-{name}-{}", std::process::id()));
            fs::create_dir_all(&path)?;
            Ok(Dir(path))
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn mode(path: &Path) -> Result<u32> {
        Ok(fs::metadata(path)?.permissions().mode() & 0o777)
    }

    #[test]
    fn keys_are_private_and_an_authority_is_never_overwritten() -> Result<()> {
        let dir = Dir::new("modes")?;
        ca_init(&dir.0)?;
        let authority = fs::read(dir.0.join("ca.pem"))?;
        let again = ca_init(&dir.0).expect_err("it must refuse");
        assert!(again.to_string().contains("never overwritten"), "{again}");
        assert_eq!(fs::read(dir.0.join("ca.pem"))?, authority);

        ca_issue(
            &dir.0,
            7,
            &["node7".into(), "127.0.0.1".into(), "::1".into()],
        )?;
        let first = fs::read(dir.0.join("node7.pem"))?;
        ca_issue(&dir.0, 7, &[])?;
        assert_ne!(fs::read(dir.0.join("node7.pem"))?, first);
        for (name, expected) in [
            ("ca.key", 0o600),
            ("node7.key", 0o600),
            ("ca.pem", 0o644),
            ("node7.pem", 0o644),
        ] {
            assert_eq!(mode(&dir.0.join(name))?, expected, "{name}");
        }
        let files = fs::read_dir(&dir.0)?.count();
        assert_eq!(files, 4, "no drafts are left behind");
        Ok(())
    }

    #[test]
    fn what_cannot_be_issued_is_refused_with_a_reason() -> Result<()> {
        let dir = Dir::new("refusals")?;
        let refused = |node, host: &str| {
            let hosts = if host.is_empty() {
                vec![]
            } else {
                vec![host.to_owned()]
            };
            format!(
                "{:#}",
                ca_issue(&dir.0, node, &hosts).expect_err("it must refuse")
            )
        };
        assert!(refused(1, "").contains("ca init"));
        ca_init(&dir.0)?;
        assert!(refused(0, "").contains("begin at 1"));
        assert!(refused(1, "node1:7001").contains("takes no port"));
        assert!(refused(1, "node-2.pingora-slice.internal").contains("which node"));
        Ok(())
    }
}
