//! A machine without a cluster: it numbers its own purges and keeps them.
//!
//! Each command is on disk before it is applied, so that a purge which was
//! answered is still known after a power cut; every [`SNAPSHOT_EVERY`] commands
//! the state is written as a whole and the commands before it are dropped.
//! Without a directory everything is in memory, and dies with the cache.
//!
//! A disk that others have filled does not end the node at once: a few bytes are
//! held in reserve for the commands, and given up for them then. Nor does one that
//! takes no writes for a while: nothing is promised meanwhile.

use std::fs::File;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use openraft::AnyError;
use rustix::fs::FallocateFlags;
use tokio::sync::{oneshot, watch};
use tokio::time::timeout;

use crate::data_dir::DataDir;
use crate::handle::{ClusterStatus, NodeStatus, PurgeError, PurgeReceipt, StartError};
use crate::members::{Member, NodeState, Role};
use crate::purge::PurgeItem;
use crate::raft::store::{Rows, encode, read_file, replace_file};
use crate::replica::Replica;
use crate::slice::HashKey;
use crate::state::{ClusterState, Command, Outcome};
use crate::{NodeId, PurgeIndex};

/// The number of a machine alone.
pub(crate) const ME: NodeId = NodeId(1);
/// Commands between two snapshots: a start replays no more than these.
const SNAPSHOT_EVERY: u64 = 4096;
/// Held in reserve: a command takes some 200 bytes, so these are enough for 20,000
/// of them, or for days of purges on a full disk.
const RESERVE_BYTES: u64 = 4 << 20;
/// It is taken, again, only where this many times as much is free.
const RESERVE_MARGIN: u64 = 4;
/// A purge that the disk has not taken by then is not confirmed; as in a cluster with
/// the default lease.
const WRITTEN_WITHIN: Duration = Duration::from_secs(5);

/// See the module's text.
pub(crate) struct Alone {
    pub(crate) replica: Arc<Replica>,
    /// Locked from choosing an index until its command is applied.
    kept: Mutex<Option<Kept>>,
    /// Whose purge is being written; where the disk hangs, it is one thread that does.
    turn: Arc<tokio::sync::Mutex<()>>,
    /// Told of each that has been.
    written: watch::Sender<()>,
    failed: watch::Sender<Option<StartError>>,
}

/// The commands on disk.
struct Kept {
    /// `None`: closed by a failure, and not opened again.
    rows: Option<Rows>,
    snapshot: PathBuf,
    /// Whether the reserve is held.
    has_reserve: bool,
    /// Highest command in the snapshot.
    folded: PurgeIndex,
    dir: DataDir,
}

impl Alone {
    /// Opens or founds the cluster of one.
    pub(crate) fn open(data_dir: Option<PathBuf>) -> Result<Alone, StartError> {
        let (kept, replica) = match data_dir {
            Some(path) => {
                let (kept, replica) = Kept::open(DataDir::take(&path)?)?;
                (Some(kept), replica)
            }
            None => (None, Replica::new(ME, ClusterState::default())),
        };
        let alone = Alone {
            replica,
            kept: Mutex::new(kept),
            turn: Arc::default(),
            written: watch::Sender::new(()),
            failed: watch::Sender::new(None),
        };
        if alone.replica.view().hash_key.is_none() {
            alone
                .execute(Command::Found {
                    hash_key: HashKey(rand::random()),
                    lease: Duration::MAX,
                })
                .map_err(|reason| alone.disk(reason))?;
        }
        let member = Member {
            id: ME,
            machine: 0,
            advertise: "localhost".into(),
            role: Role::Voter,
            weight: 1,
            state: NodeState::Active,
        };
        if !alone.replica.view().members.contains_key(&ME) {
            alone
                .execute(Command::NodeJoin(member))
                .map_err(|reason| alone.disk(reason))?;
        }
        Ok(alone)
    }

    /// Purges; on disk, and in force, when this returns.
    ///
    /// # Errors
    /// [`PurgeError`]: nothing is promised. So it is where the disk takes nothing for
    /// [`WRITTEN_WITHIN`]; a purge that it had been given may come to hold later.
    pub(crate) async fn purge(
        self: &Arc<Self>,
        items: Vec<PurgeItem>,
        token: u128,
    ) -> Result<PurgeReceipt, PurgeError> {
        self.purge_within(WRITTEN_WITHIN, items, token).await
    }

    async fn purge_within(
        self: &Arc<Self>,
        patience: Duration,
        items: Vec<PurgeItem>,
        token: u128,
    ) -> Result<PurgeReceipt, PurgeError> {
        let hangs = |_| PurgeError::NotConfirmed("the disk takes no writes".into());
        let mut written = self.written.subscribe();
        let mut turn = pin!(self.turn.clone().lock_owned());
        let turn = loop {
            tokio::select! {
                turn = &mut turn => break turn,
                another = timeout(patience, written.changed()) => {
                    // No error but this: `self` holds the sender.
                    let _ = another.map_err(hangs)?;
                }
            }
        };
        let (tell, told) = oneshot::channel();
        let alone = Arc::clone(self);
        tokio::task::spawn_blocking(move || {
            // Its asker may have left.
            let _ = tell.send(alone.write(items, token));
            alone.fold_if_long();
            alone.written.send_replace(());
            drop(turn);
        });
        let told = timeout(patience, told).await.map_err(hangs)?;
        told.unwrap_or_else(|e| Err(PurgeError::NotConfirmed(e.to_string())))
    }

    /// The same, blocking for an fsync.
    fn write(&self, items: Vec<PurgeItem>, token: u128) -> Result<PurgeReceipt, PurgeError> {
        match self.execute(Command::Purge { items, token }) {
            Ok(Outcome::Purged(index)) => Ok(PurgeReceipt {
                index,
                acked: vec![ME],
                fenced: vec![],
                pending: vec![],
            }),
            Ok(Outcome::Refused(why)) => Err(PurgeError::Invalid(why.to_string())),
            Ok(Outcome::Done) => Err(PurgeError::NotConfirmed("not a purge".into())),
            Err(reason) => Err(PurgeError::NotConfirmed(reason.to_string())),
        }
    }

    /// See [`crate::Cluster::failed`].
    pub(crate) async fn failed(&self) -> StartError {
        let mut failed = self.failed.subscribe();
        let reason = failed
            .wait_for(Option::is_some)
            .await
            .map(|reason| reason.clone());
        match reason {
            Ok(Some(reason)) => reason,
            Ok(None) | Err(_) => std::future::pending().await,
        }
    }

    /// See [`crate::Cluster::status`].
    pub(crate) fn status(&self) -> ClusterStatus {
        let view = self.replica.view();
        let of_member = |member: &Member| NodeStatus {
            member: member.clone(),
            up: true,
            leader: true,
            applied: Some(self.replica.applied()),
            ring_share: view.ring.share(member.id),
        };
        ClusterStatus {
            node_id: ME,
            leader: Some(ME),
            term: 0,
            ring_epoch: view.ring.epoch(),
            purge_index: self.replica.applied(),
            lease_valid: true,
            nodes: view.members.values().map(of_member).collect(),
        }
    }

    fn execute(&self, command: Command) -> Result<Outcome, AnyError> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let index = PurgeIndex(self.replica.applied().0 + 1);
        if let Some(kept) = &mut *kept
            && let Err(e) = kept.append_surely(index, &command)
        {
            let path = kept.snapshot.clone();
            let reason = e.to_string();
            self.failed
                .send_replace(Some(StartError::Storage { path, reason }));
            return Err(e);
        }
        let outcome = self.replica.apply([(index, Some(command))]);
        Ok(outcome.into_iter().next().unwrap_or(Outcome::Done))
    }

    /// Shortens the log once it is long. What is in it stands whether or not this
    /// succeeds; after the next purge it is tried again.
    fn fold_if_long(&self) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kept) = &mut *kept
            && self.replica.applied().0 - kept.folded.0 >= SNAPSHOT_EVERY
            && let Err(e) = kept.fold(&self.replica)
        {
            tracing::warn!(error = %e, "the purge log could not be shortened");
        }
    }

    fn disk(&self, reason: AnyError) -> StartError {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let path = kept
            .as_ref()
            .map(|kept| kept.snapshot.clone())
            .unwrap_or_default();
        StartError::Storage {
            path,
            reason: reason.to_string(),
        }
    }
}

fn rows_path(dir: &DataDir) -> PathBuf {
    dir.path().join("alone")
}

fn reserve_path(dir: &DataDir) -> PathBuf {
    dir.path().join("reserve")
}

impl Kept {
    fn open(dir: DataDir) -> Result<(Kept, Arc<Replica>), StartError> {
        let snapshot = dir.path().join("alone.snapshot");
        let rows = Rows::open(&rows_path(&dir))?;
        let load = || -> Result<(Arc<Replica>, PurgeIndex), AnyError> {
            let state = match read_file(&snapshot).map_err(|e| AnyError::new(&e))? {
                Some(bytes) => ClusterState::from_bytes(&bytes).map_err(|e| AnyError::new(&e))?,
                None => ClusterState::default(),
            };
            let folded = state.applied();
            let replica = Replica::new(ME, state);
            let commands: Vec<(u64, Command)> = rows.scan(&[])?;
            replica.apply(
                commands
                    .into_iter()
                    .filter(|(index, _)| *index > folded.0)
                    .map(|(index, command)| (PurgeIndex(index), Some(command))),
            );
            Ok((replica, folded))
        };
        let (replica, folded) = load().map_err(|e| StartError::Storage {
            path: dir.path().into(),
            reason: e.to_string(),
        })?;
        let mut kept = Kept {
            rows: Some(rows),
            snapshot,
            has_reserve: false,
            folded,
            dir,
        };
        kept.hold_reserve();
        Ok((kept, replica))
    }

    /// Puts a command on disk; once more, with the reserve given up, where that fails.
    fn append_surely(&mut self, index: PurgeIndex, command: &Command) -> Result<(), AnyError> {
        let appended = match self.append(index, command) {
            // What was written of it, if anything, has the same index.
            Err(error) if self.give_reserve() => {
                tracing::warn!(%error, "the purge log could not be written; its reserve on disk is given up, and it is tried again");
                self.append(index, command)
            }
            appended => appended,
        };
        if appended.is_ok() {
            self.hold_reserve();
        }
        appended
    }

    fn append(&self, index: PurgeIndex, command: &Command) -> Result<(), AnyError> {
        let row = (index.0.to_be_bytes().to_vec(), encode(&(index.0, command))?);
        self.rows()?.commit([row], [], true)
    }

    fn rows(&self) -> Result<&Rows, AnyError> {
        self.rows
            .as_ref()
            .ok_or_else(|| AnyError::error("the log is closed"))
    }

    /// Takes the reserve, unless it is held or the disk is short of room.
    fn hold_reserve(&mut self) {
        let path = reserve_path(&self.dir);
        let hold = || -> std::io::Result<bool> {
            let disk = rustix::fs::statvfs(self.dir.path())?;
            if disk.f_bavail * disk.f_frsize < RESERVE_MARGIN * RESERVE_BYTES {
                return Ok(false);
            }
            let file = File::create(&path)?;
            rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, RESERVE_BYTES)?;
            Ok(true)
        };
        self.has_reserve = self.has_reserve || hold().unwrap_or(false);
    }

    /// Frees the reserve, and opens the log again, which a failure has closed for
    /// good. `false`: it is the same as before.
    fn give_reserve(&mut self) -> bool {
        if !std::mem::take(&mut self.has_reserve)
            || std::fs::remove_file(reserve_path(&self.dir)).is_err()
        {
            return false;
        }
        // First this one: two cannot have it.
        self.rows = None;
        match Rows::open(&rows_path(&self.dir)) {
            Ok(rows) => self.rows = Some(rows),
            Err(error) => tracing::warn!(%error, "the purge log could not be opened again"),
        }
        true
    }

    fn fold(&mut self, replica: &Replica) -> Result<(), AnyError> {
        let state = replica.state().clone();
        replace_file(&self.snapshot, &state.to_bytes()).map_err(|e| AnyError::new(&e))?;
        let commands: Vec<(u64, Command)> = self.rows()?.scan(&[])?;
        let covered = commands
            .into_iter()
            .map(|(index, _)| index)
            .filter(|index| *index <= state.applied().0)
            .map(|index| index.to_be_bytes().to_vec());
        self.rows()?.commit([], covered, true)?;
        self.folded = state.applied();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::purge::{PurgeMode, Scope, Subject};

    fn url(key: &HashKey, path: &str) -> Vec<PurgeItem> {
        vec![PurgeItem {
            scope: Scope::url(key, "a.test", path),
            mode: PurgeMode::Plain,
        }]
    }

    #[test]
    fn purges_survive_reopening() {
        let dir = tempfile::tempdir().unwrap();
        let path = Some(dir.path().to_owned());
        let alone = Alone::open(path.clone()).unwrap();
        let key = alone.replica.view().hash_key.unwrap();
        let film = Subject::new(&key, "a.test", "/film", &[""; 0]);
        let other = Subject::new(&key, "a.test", "/other", &[""; 0]);
        let version = alone.replica.version();
        let receipt = alone.write(url(&key, "/film"), 5).unwrap();
        assert_ne!(alone.replica.version(), version);
        assert_eq!(alone.replica.applied(), receipt.index);
        assert_eq!(
            alone.write(url(&key, "/film"), 5).unwrap().index,
            receipt.index
        );
        let applied = alone.replica.applied();
        assert!(matches!(
            Alone::open(path.clone()),
            Err(StartError::Locked { .. })
        ));
        drop(alone);

        let alone = Alone::open(path).unwrap();
        assert_eq!(alone.replica.view().hash_key, Some(key));
        assert_eq!(alone.replica.applied(), applied);
        assert_eq!(alone.replica.floor(&film).plain, receipt.index);
        assert_eq!(alone.replica.floor(&other).plain, PurgeIndex(0));
        assert!(alone.replica.view().ring.share(ME) > 0.999);
    }

    #[test]
    fn the_log_is_folded_and_still_complete() {
        let dir = tempfile::tempdir().unwrap();
        let path = Some(dir.path().to_owned());
        let alone = Alone::open(path.clone()).unwrap();
        let key = alone.replica.view().hash_key.unwrap();
        let last = (0..20)
            .map(|n| alone.write(url(&key, &format!("/{n}")), n).unwrap().index)
            .last();
        {
            let mut kept = alone.kept.lock().unwrap();
            let kept = kept.as_mut().unwrap();
            kept.fold(&alone.replica).unwrap();
            let rows = kept.rows().unwrap();
            assert_eq!(rows.scan::<(u64, Command)>(&[]).unwrap(), []);
        }
        let after = alone.write(url(&key, "/after"), 99).unwrap().index;
        drop(alone);
        let alone = Alone::open(path).unwrap();
        let floor = |path: &str| {
            alone
                .replica
                .floor(&Subject::new(&key, "a.test", path, &[""; 0]))
                .plain
        };
        assert_eq!(Some(floor("/19")), last);
        assert_eq!(floor("/after"), after);
        assert_eq!(alone.replica.applied(), after);
    }

    /// However few commands come between two starts.
    #[test]
    fn a_start_does_not_put_off_the_next_snapshot() {
        let dir = tempfile::tempdir().unwrap();
        let path = Some(dir.path().to_owned());
        for start in 0..3 {
            let alone = Alone::open(path.clone()).unwrap();
            let key = alone.replica.view().hash_key.unwrap();
            alone.write(url(&key, "/film"), start).unwrap();
            let kept = alone.kept.lock().unwrap();
            assert_eq!(kept.as_ref().unwrap().folded, PurgeIndex(0));
        }
        let alone = Alone::open(path.clone()).unwrap();
        let folded = {
            let mut kept = alone.kept.lock().unwrap();
            kept.as_mut().unwrap().fold(&alone.replica).unwrap();
            alone.replica.applied()
        };
        let key = alone.replica.view().hash_key.unwrap();
        alone.write(url(&key, "/film"), 9).unwrap();
        drop(alone);
        let alone = Alone::open(path).unwrap();
        assert!(alone.replica.applied() > folded);
        assert_eq!(alone.kept.lock().unwrap().as_ref().unwrap().folded, folded);
    }

    #[tokio::test]
    async fn a_purge_waits_for_others_but_not_for_a_disk_that_hangs() {
        const PATIENCE: Duration = Duration::from_millis(200);
        let alone = Arc::new(Alone::open(None).unwrap());
        let key = alone.replica.view().hash_key.unwrap();
        let turn = alone.turn.clone().lock_owned().await;
        let began = Instant::now();
        let others = async {
            for _ in 0..3 {
                tokio::time::sleep(PATIENCE / 2).await;
                alone.written.send_replace(());
            }
        };
        let waiting = alone.purge_within(PATIENCE, url(&key, "/film"), 1);
        let (purged, ()) = tokio::join!(waiting, others);
        assert!(matches!(purged, Err(PurgeError::NotConfirmed(_))));
        assert!(began.elapsed() >= PATIENCE / 2 * 3 + PATIENCE);
        let before = alone.replica.applied();
        drop(turn);
        let receipt = alone.purge(url(&key, "/film"), 2).await.unwrap();
        assert_eq!(receipt.index.0, before.0 + 1);
    }

    #[test]
    fn without_a_directory_nothing_is_kept() {
        let alone = Alone::open(None).unwrap();
        let key = alone.replica.view().hash_key.unwrap();
        assert!(alone.write(url(&key, "/"), 1).is_ok());
        assert!(matches!(
            alone.write(vec![], 1),
            Err(PurgeError::Invalid(_))
        ));
        let again = Alone::open(None).unwrap().replica.view().hash_key;
        assert_ne!(again, Some(key));
    }
}
