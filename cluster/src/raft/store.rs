//! The log, the vote and the snapshot on disk; the state machine in memory.
//!
//! One fjall database of its own holds the log, the vote and the committed
//! index: an fsync of the log never writes out anything else, and nothing
//! else can fill or poison it. The snapshot is a file beside it, replaced by
//! renaming. The state machine lives in [`Replica`]; after a restart it is the
//! snapshot plus every entry up to the saved committed index, so what was
//! applied never runs backwards (rule 15).
//!
//! Every error here is final: openraft stops, and the node with it (invariant 5).
//!
//! ```text
//! "e" + index   version, entry          "v"  version, vote
//! "p"           version, last purged    "c"  version, committed
//! ```

use std::fmt::Debug;
use std::fs::{self, File};
use std::io::{Cursor, Write as _};
use std::ops::{Bound, RangeBounds};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use fjall::{Database, Keyspace, KeyspaceCreateOptions, PersistMode};
use openraft::storage::{LogFlushed, RaftLogStorage, RaftStateMachine};
use openraft::{
    AnyError, BasicNode, Entry, EntryPayload, LogState, RaftLogId as _, RaftLogReader,
    RaftSnapshotBuilder, SnapshotMeta, StorageIOError, StoredMembership,
};
use serde::{Serialize, de::DeserializeOwned};
use tokio::sync::watch;

use crate::crc32c::crc32c;
use crate::handle::StartError;
use crate::replica::Replica;
use crate::state::{ClusterState, Command, Outcome};
use crate::{PurgeIndex, wire};

openraft::declare_raft_types!(
    /// What openraft is to carry.
    pub TypeConfig:
        D = Command,
        R = Outcome,
        NodeId = u64,
        Node = BasicNode,
        Entry = Entry<TypeConfig>,
        SnapshotData = Cursor<Vec<u8>>,
        AsyncRuntime = openraft::TokioRuntime,
);

pub(crate) type LogId = openraft::LogId<u64>;
pub(crate) type Vote = openraft::Vote<u64>;
pub(crate) type StorageError = openraft::StorageError<u64>;
pub(crate) type Membership = StoredMembership<u64, BasicNode>;
pub(crate) type Snapshot = openraft::Snapshot<TypeConfig>;

/// First byte of every row and of the snapshot file.
const FORMAT: u8 = 1;
/// Bytes written between two rotations of the memtable by our own hand: the
/// database's own rotation can block forever when writers are fast.
const ROTATE_BYTES: u64 = 16 << 20;
/// Entries are sent in frames; this many bytes of them (at least one entry) fit
/// into one with room to spare, and pass within a heartbeat over 10 Mbit/s. What
/// was not answered by then is sent again, and the one who hangs holds it all.
const ENTRIES_BYTES_MAX: usize = 128 << 10;
const _: () = assert!(ENTRIES_BYTES_MAX <= crate::peer::CONTROL_BYTES_MAX / 2);

/// How long the log waits for the snapshot that takes the place of its entries:
/// 128 MiB at 4 MiB/s, twice. A disk that takes longer stops the node.
const SNAPSHOT_WAIT: Duration = Duration::from_secs(60);

const VOTE: &[u8] = b"v";
const PURGED: &[u8] = b"p";
const COMMITTED: &[u8] = b"c";

/// The rows of a small database that is fsynced by its owner.
#[derive(Clone)]
pub(crate) struct Rows {
    db: Database,
    rows: Keyspace,
    unrotated: Arc<AtomicU64>,
}

impl Rows {
    /// Opens or creates the database in `dir`.
    pub(crate) fn open(dir: &Path) -> Result<Rows, StartError> {
        let storage = |reason: String| StartError::Storage {
            path: dir.into(),
            reason,
        };
        fs::create_dir_all(dir).map_err(|e| storage(e.to_string()))?;
        let db = Database::builder(dir)
            .worker_threads(2)
            .journal_compression(fjall::CompressionType::None)
            .cache_size(8 << 20)
            .max_journaling_size(64 << 20)
            .open()
            .map_err(|e| storage(e.to_string()))?;
        let rows = db
            .keyspace("rows", || {
                KeyspaceCreateOptions::default().max_memtable_size(u64::MAX)
            })
            .map_err(|e| storage(e.to_string()))?;
        // Bytes that were replayed count as if they had just been written.
        let unrotated = db.journal_disk_space().unwrap_or(0);
        Ok(Rows {
            db,
            rows,
            unrotated: Arc::new(AtomicU64::new(unrotated)),
        })
    }

    /// The value of `key`, decoded.
    pub(crate) fn read<T: DeserializeOwned>(&self, key: &[u8]) -> Result<Option<T>, AnyError> {
        match self.rows.get(key).map_err(|e| AnyError::new(&e))? {
            Some(value) => decode(&value).map(Some),
            None => Ok(None),
        }
    }

    /// All rows whose key begins with `prefix`, in order.
    pub(crate) fn scan<T: DeserializeOwned>(&self, prefix: &[u8]) -> Result<Vec<T>, AnyError> {
        self.rows
            .prefix(prefix)
            .map(|row| decode(&row.value().map_err(|e| AnyError::new(&e))?))
            .collect()
    }

    /// Writes and removes all at once; on disk when `sync`, else with the next that is.
    pub(crate) fn commit(
        &self,
        put: impl IntoIterator<Item = (Vec<u8>, Vec<u8>)>,
        remove: impl IntoIterator<Item = Vec<u8>>,
        sync: bool,
    ) -> Result<(), AnyError> {
        let mut batch = self.db.batch();
        let mut bytes = 0;
        for (key, value) in put {
            bytes += (key.len() + value.len()) as u64;
            batch.insert(&self.rows, key, value);
        }
        for key in remove {
            bytes += key.len() as u64;
            batch.remove(&self.rows, key);
        }
        let mode = if sync {
            PersistMode::SyncData
        } else {
            PersistMode::Buffer
        };
        batch
            .durability(Some(mode))
            .commit()
            .map_err(|e| AnyError::new(&e))?;
        if self.unrotated.fetch_add(bytes, Ordering::Relaxed) + bytes > ROTATE_BYTES {
            self.unrotated.store(0, Ordering::Relaxed);
            self.rows
                .rotate_memtable_and_wait()
                .map_err(|e| AnyError::new(&e))?;
        }
        Ok(())
    }
}

/// A value as it lies on disk: a format byte, then bincode.
pub(crate) fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, AnyError> {
    let mut bytes = vec![FORMAT];
    bincode::serde::encode_into_std_write(value, &mut bytes, bincode::config::standard())
        .map_err(|e| AnyError::new(&e))?;
    Ok(bytes)
}

/// The inverse of [`encode`].
pub(crate) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, AnyError> {
    match bytes.split_first() {
        Some((&FORMAT, payload)) => wire::decode(payload).map_err(|e| AnyError::new(&e)),
        Some((format, _)) => Err(AnyError::error(format!(
            "format {format}, expected {FORMAT}"
        ))),
        None => Err(AnyError::error("an empty value")),
    }
}

/// Replaces the file at `path` so that a crash leaves the old or the new one.
pub(crate) fn replace_file(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let unfinished = path.with_extension("new");
    let mut file = File::create(&unfinished)?;
    file.write_all(&crc32c(bytes).to_be_bytes())?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&unfinished, path)?;
    match path.parent() {
        Some(dir) => File::open(dir)?.sync_all(),
        None => Ok(()),
    }
}

/// What [`replace_file`] wrote, if anything.
pub(crate) fn read_file(path: &Path) -> std::io::Result<Option<Vec<u8>>> {
    let mut bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    let damaged = || std::io::Error::new(std::io::ErrorKind::InvalidData, "checksum differs");
    let checksum: [u8; 4] = bytes
        .get(..4)
        .and_then(|c| c.try_into().ok())
        .ok_or_else(damaged)?;
    bytes.drain(..4);
    if crc32c(&bytes) != u32::from_be_bytes(checksum) {
        return Err(damaged());
    }
    Ok(Some(bytes))
}

fn entry_key(index: u64) -> Vec<u8> {
    let mut key = vec![b'e'];
    key.extend_from_slice(&index.to_be_bytes());
    key
}

/// The log, the vote and the committed index.
#[derive(Clone)]
pub(crate) struct LogStore {
    rows: Rows,
    /// Last entry in the snapshot on disk.
    snapshot: watch::Receiver<Option<LogId>>,
}

impl LogStore {
    /// The log in `dir`, beside a state machine whose snapshots `snapshot` follows.
    pub(crate) fn open(
        dir: &Path,
        snapshot: watch::Receiver<Option<LogId>>,
    ) -> Result<LogStore, StartError> {
        Ok(LogStore {
            rows: Rows::open(dir)?,
            snapshot,
        })
    }

    /// Writes off the async threads, since an fsync may take long.
    async fn commit(
        &self,
        put: Vec<(Vec<u8>, Vec<u8>)>,
        remove: Vec<Vec<u8>>,
    ) -> Result<(), AnyError> {
        let rows = self.rows.clone();
        tokio::task::spawn_blocking(move || rows.commit(put, remove, true))
            .await
            .map_err(|e| AnyError::new(&e))?
    }

    /// Keys of the entries whose index lies in `range`.
    fn keys(&self, range: (Bound<u64>, Bound<u64>)) -> Result<Vec<Vec<u8>>, AnyError> {
        self.range(range)
            .map(|row| {
                row.key()
                    .map(|key| key.to_vec())
                    .map_err(|e| AnyError::new(&e))
            })
            .collect()
    }

    fn range(&self, (start, end): (Bound<u64>, Bound<u64>)) -> fjall::Iter {
        let first = match start {
            Bound::Included(index) => index,
            Bound::Excluded(index) => index.saturating_add(1),
            Bound::Unbounded => 0,
        };
        let past = match end {
            Bound::Included(index) => index.saturating_add(1),
            Bound::Excluded(index) => index,
            Bound::Unbounded => u64::MAX,
        };
        self.rows
            .rows
            .range(entry_key(first)..entry_key(past.max(first)))
    }

    fn entries(
        &self,
        range: (Bound<u64>, Bound<u64>),
        bytes_max: usize,
    ) -> Result<Vec<Entry<TypeConfig>>, AnyError> {
        let mut entries = Vec::new();
        let mut bytes = 0;
        for row in self.range(range) {
            let value = row.value().map_err(|e| AnyError::new(&e))?;
            bytes += value.len();
            if bytes > bytes_max && !entries.is_empty() {
                break;
            }
            entries.push(decode(&value)?);
        }
        Ok(entries)
    }
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<R: RangeBounds<u64> + Clone + Debug + Send>(
        &mut self,
        range: R,
    ) -> Result<Vec<Entry<TypeConfig>>, StorageError> {
        let range = (range.start_bound().cloned(), range.end_bound().cloned());
        self.entries(range, usize::MAX)
            .map_err(|e| StorageIOError::read_logs(e).into())
    }

    async fn limited_get_log_entries(
        &mut self,
        start: u64,
        end: u64,
    ) -> Result<Vec<Entry<TypeConfig>>, StorageError> {
        self.entries(
            (Bound::Included(start), Bound::Excluded(end)),
            ENTRIES_BYTES_MAX,
        )
        .map_err(|e| StorageIOError::read_logs(e).into())
    }
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = LogStore;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, StorageError> {
        let state = || -> Result<LogState<TypeConfig>, AnyError> {
            let last_purged_log_id: Option<LogId> = self.rows.read(PURGED)?;
            let last = self.rows.rows.prefix(b"e").next_back();
            let last_log_id = match last {
                Some(row) => {
                    let value = row.value().map_err(|e| AnyError::new(&e))?;
                    Some(*decode::<Entry<TypeConfig>>(&value)?.get_log_id())
                }
                None => last_purged_log_id,
            };
            Ok(LogState {
                last_purged_log_id,
                last_log_id,
            })
        };
        state().map_err(|e| StorageIOError::read_logs(e).into())
    }

    async fn get_log_reader(&mut self) -> LogStore {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), StorageError> {
        let write = async {
            self.commit(vec![(VOTE.into(), encode(vote)?)], vec![])
                .await
        };
        write
            .await
            .map_err(|e| StorageIOError::write_vote(e).into())
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, StorageError> {
        self.rows
            .read(VOTE)
            .map_err(|e| StorageIOError::read_vote(e).into())
    }

    /// Not fsynced by itself: a crash of the process keeps it, and a power cut
    /// costs no more than asking the leader again before the next lease.
    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), StorageError> {
        encode(&committed)
            .and_then(|value| self.rows.commit([(COMMITTED.into(), value)], [], false))
            .map_err(|e| StorageIOError::write_logs(e).into())
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, StorageError> {
        self.rows
            .read(COMMITTED)
            .map(Option::flatten)
            .map_err(|e| StorageIOError::read_logs(e).into())
    }

    async fn append<I>(
        &mut self,
        entries: I,
        callback: LogFlushed<TypeConfig>,
    ) -> Result<(), StorageError>
    where
        I: IntoIterator<Item = Entry<TypeConfig>> + Send,
        I::IntoIter: Send,
    {
        let rows: Result<Vec<_>, AnyError> = entries
            .into_iter()
            .map(|entry| Ok((entry_key(entry.log_id.index), encode(&entry)?)))
            .collect();
        let write = async { self.commit(rows?, vec![]).await };
        match write.await {
            Ok(()) => {
                callback.log_io_completed(Ok(()));
                Ok(())
            }
            Err(e) => {
                callback.log_io_completed(Err(std::io::Error::other(e.to_string())));
                Err(StorageIOError::write_logs(e).into())
            }
        }
    }

    async fn truncate(&mut self, log_id: LogId) -> Result<(), StorageError> {
        let remove = self.keys((Bound::Included(log_id.index), Bound::Unbounded));
        let write = async { self.commit(vec![], remove?).await };
        write
            .await
            .map_err(|e| StorageIOError::write_logs(e).into())
    }

    /// openraft asks for it while a snapshot that it was sent is still being
    /// installed, by a task that waits for nothing here. A crash between would
    /// leave neither the entries nor what takes their place.
    async fn purge(&mut self, log_id: LogId) -> Result<(), StorageError> {
        let mut snapshot = self.snapshot.clone();
        let covers = |newest: &Option<LogId>| newest.is_some_and(|id| id.index >= log_id.index);
        let write = async {
            let wait = async { snapshot.wait_for(covers).await.is_ok() };
            if !tokio::time::timeout(SNAPSHOT_WAIT, wait)
                .await
                .unwrap_or(false)
            {
                let why = format!("no snapshot up to {log_id}, so the log is kept");
                return Err(AnyError::error(why));
            }
            let remove = self.keys((Bound::Unbounded, Bound::Included(log_id.index)))?;
            self.commit(vec![(PURGED.into(), encode(&log_id)?)], remove)
                .await
        };
        write
            .await
            .map_err(|e| StorageIOError::write_logs(e).into())
    }
}

/// A snapshot as it is stored and sent.
#[derive(serde::Serialize, serde::Deserialize)]
struct Kept {
    meta: SnapshotMeta<u64, BasicNode>,
    state: Vec<u8>,
}

/// The state machine: applies entries to the [`Replica`], keeps its snapshots.
#[derive(Clone)]
pub(crate) struct StateMachine {
    replica: Arc<Replica>,
    snapshot: PathBuf,
    /// Last applied entry and membership; beside the replica since only openraft asks.
    position: Arc<Mutex<(Option<LogId>, Membership)>>,
    /// Last entry in the snapshot on disk.
    newest: watch::Sender<Option<LogId>>,
    /// Held while that snapshot is replaced.
    replacing: Arc<Mutex<()>>,
}

impl StateMachine {
    /// The state of the snapshot at `path`, if there is one, in `replica`.
    pub(crate) fn open(path: PathBuf, replica: Arc<Replica>) -> Result<StateMachine, StartError> {
        let machine = StateMachine {
            replica,
            snapshot: path,
            position: Arc::default(),
            newest: watch::Sender::new(None),
            replacing: Arc::default(),
        };
        let load = || -> Result<(), AnyError> {
            if let Some(kept) = machine.kept()? {
                machine.replace(&kept.meta, state_of(&kept.state)?);
                machine.newest.send_replace(kept.meta.last_log_id);
            }
            Ok(())
        };
        load().map_err(|e| StartError::Storage {
            path: machine.snapshot.clone(),
            reason: e.to_string(),
        })?;
        Ok(machine)
    }

    /// Follows the last entry in the snapshot on disk.
    pub(crate) fn newest(&self) -> watch::Receiver<Option<LogId>> {
        self.newest.subscribe()
    }

    fn kept(&self) -> Result<Option<Kept>, AnyError> {
        match read_file(&self.snapshot).map_err(|e| AnyError::new(&e))? {
            Some(bytes) => decode(&bytes).map(Some),
            None => Ok(None),
        }
    }

    /// Keeps a snapshot unless one as new has been installed meanwhile.
    fn keep(&self, meta: &SnapshotMeta<u64, BasicNode>, state: &[u8]) -> Result<(), AnyError> {
        let _alone = self
            .replacing
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let newest = *self.newest.borrow();
        if newest.is_some() && meta.last_log_id <= newest {
            return Ok(());
        }
        let bytes = encode(&Kept {
            meta: meta.clone(),
            state: state.into(),
        })?;
        replace_file(&self.snapshot, &bytes).map_err(|e| AnyError::new(&e))?;
        self.newest.send_replace(meta.last_log_id);
        Ok(())
    }

    fn position(&self) -> std::sync::MutexGuard<'_, (Option<LogId>, Membership)> {
        self.position.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Position and state change together, as in `apply`.
    fn replace(&self, meta: &SnapshotMeta<u64, BasicNode>, state: ClusterState) {
        let mut position = self.position();
        *position = (meta.last_log_id, meta.last_membership.clone());
        self.replica.install(state);
    }
}

fn state_of(bytes: &[u8]) -> Result<ClusterState, AnyError> {
    ClusterState::from_bytes(bytes).map_err(|e| AnyError::new(&e))
}

impl RaftSnapshotBuilder<TypeConfig> for StateMachine {
    async fn build_snapshot(&mut self) -> Result<Snapshot, StorageError> {
        let machine = self.clone();
        let build = move || -> Result<Snapshot, AnyError> {
            // Position and state belong together: `apply` holds the position
            // for as long as it changes the state.
            let (last_log_id, last_membership, state) = {
                let position = machine.position();
                (
                    position.0,
                    position.1.clone(),
                    machine.replica.state().clone(),
                )
            };
            let state = state.to_bytes();
            let snapshot_id = last_log_id.map_or("empty".into(), |id| id.to_string());
            let meta = SnapshotMeta {
                last_log_id,
                last_membership,
                snapshot_id,
            };
            machine.keep(&meta, &state)?;
            Ok(Snapshot {
                meta,
                snapshot: Box::new(Cursor::new(state)),
            })
        };
        match tokio::task::spawn_blocking(build).await {
            Ok(Ok(snapshot)) => Ok(snapshot),
            Ok(Err(e)) => Err(StorageIOError::write_snapshot(None, e).into()),
            Err(e) => Err(StorageIOError::write_snapshot(None, AnyError::new(&e)).into()),
        }
    }
}

impl RaftStateMachine<TypeConfig> for StateMachine {
    type SnapshotBuilder = StateMachine;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, Membership), StorageError> {
        Ok(self.position().clone())
    }

    async fn apply<I>(&mut self, entries: I) -> Result<Vec<Outcome>, StorageError>
    where
        I: IntoIterator<Item = Entry<TypeConfig>> + Send,
        I::IntoIter: Send,
    {
        let mut position = self.position();
        let entries = entries.into_iter().map(|entry| {
            position.0 = Some(entry.log_id);
            let command = match entry.payload {
                EntryPayload::Normal(command) => Some(command),
                EntryPayload::Membership(membership) => {
                    position.1 = Membership::new(Some(entry.log_id), membership);
                    None
                }
                EntryPayload::Blank => None,
            };
            (PurgeIndex(entry.log_id.index), command)
        });
        Ok(self.replica.apply(entries))
    }

    async fn get_snapshot_builder(&mut self) -> StateMachine {
        self.clone()
    }

    async fn begin_receiving_snapshot(&mut self) -> Result<Box<Cursor<Vec<u8>>>, StorageError> {
        Ok(Box::default())
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta<u64, BasicNode>,
        snapshot: Box<Cursor<Vec<u8>>>,
    ) -> Result<(), StorageError> {
        let bytes = snapshot.into_inner();
        let install = || -> Result<(), AnyError> {
            let state = state_of(&bytes)?;
            self.keep(meta, &bytes)?;
            self.replace(meta, state);
            Ok(())
        };
        install().map_err(|e| StorageIOError::write_snapshot(Some(meta.signature()), e).into())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot>, StorageError> {
        let kept = self
            .kept()
            .map_err(|e| StorageIOError::read_snapshot(None, e))?;
        Ok(kept.map(|kept| Snapshot {
            meta: kept.meta,
            snapshot: Box::new(Cursor::new(kept.state)),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::NodeId;
    use crate::purge::{PurgeItem, PurgeMode, Scope};
    use crate::slice::HashKey;
    use openraft::testing::{StoreBuilder, Suite, log_id};

    struct InTempDir;

    fn open(dir: &Path) -> (LogStore, StateMachine) {
        let replica = Replica::new(NodeId(1), ClusterState::default());
        let machine = StateMachine::open(dir.join("snapshot"), replica).unwrap();
        let log = LogStore::open(&dir.join("log"), machine.newest()).unwrap();
        (log, machine)
    }

    impl StoreBuilder<TypeConfig, LogStore, StateMachine, tempfile::TempDir> for InTempDir {
        async fn build(&self) -> Result<(tempfile::TempDir, LogStore, StateMachine), StorageError> {
            let dir = tempfile::tempdir().unwrap();
            let (mut log, machine) = open(dir.path());
            // It purges logs whose entries no snapshot holds.
            log.snapshot = watch::Sender::new(Some(log_id(1, 1, u64::MAX))).subscribe();
            Ok((dir, log, machine))
        }
    }

    #[test]
    fn passes_the_suite_of_openraft() {
        Suite::test_all(InTempDir).unwrap();
    }

    fn entry(index: u64, command: Command) -> Entry<TypeConfig> {
        Entry {
            log_id: log_id(1, 1, index),
            payload: EntryPayload::Normal(command),
        }
    }

    fn purge_all(token: u128) -> Command {
        let item = PurgeItem {
            scope: Scope::All,
            mode: PurgeMode::Plain,
        };
        Command::Purge {
            items: vec![item],
            token,
        }
    }

    #[tokio::test]
    async fn a_snapshot_survives_reopening_and_travels() {
        let dir = tempfile::tempdir().unwrap();
        let (_, mut machine) = open(dir.path());
        let found = Command::Found {
            hash_key: HashKey([3; 16]),
            lease: std::time::Duration::from_secs(2),
        };
        machine
            .apply([entry(1, found), entry(2, purge_all(7))])
            .await
            .unwrap();
        let snapshot = machine.build_snapshot().await.unwrap();
        // Applied after the snapshot: not in it.
        machine.apply([entry(3, purge_all(8))]).await.unwrap();

        let (_, mut reopened) = open(dir.path());
        assert_eq!(
            reopened.applied_state().await.unwrap().0,
            Some(log_id(1, 1, 2))
        );
        assert_eq!(reopened.replica.view().hash_key, Some(HashKey([3; 16])));

        let other = tempfile::tempdir().unwrap();
        let (_, mut follower) = open(other.path());
        let before = follower.replica.version();
        follower
            .install_snapshot(&snapshot.meta, snapshot.snapshot)
            .await
            .unwrap();
        assert_eq!(follower.replica.applied(), PurgeIndex(2));
        assert_ne!(follower.replica.version(), before);
        let sent = follower.get_current_snapshot().await.unwrap().unwrap();
        assert_eq!(sent.meta, snapshot.meta);
    }

    fn sent(index: u64) -> (SnapshotMeta<u64, BasicNode>, Vec<u8>) {
        let mut state = ClusterState::default();
        state.advance(index);
        let meta = SnapshotMeta {
            last_log_id: Some(log_id(1, 1, index)),
            ..SnapshotMeta::default()
        };
        (meta, state.to_bytes())
    }

    /// A process that is killed while it installs a snapshot can start again.
    #[tokio::test(flavor = "multi_thread")]
    async fn the_log_is_purged_after_its_snapshot_is_on_disk() {
        let dir = tempfile::tempdir().unwrap();
        let (mut log, mut machine) = open(dir.path());
        let rows: Vec<_> = (1..=2)
            .map(|index| {
                (
                    entry_key(index),
                    encode(&entry(index, purge_all(7))).unwrap(),
                )
            })
            .collect();
        log.commit(rows, vec![]).await.unwrap();
        let mut beside = log.clone();

        // A disk that stands still while it is to take the snapshot.
        let replacing = machine.replacing.clone();
        let (stands, standing) = std::sync::mpsc::channel();
        let (go_on, stand) = std::sync::mpsc::channel::<()>();
        let disk = std::thread::spawn(move || {
            let _held = replacing.lock().unwrap();
            stands.send(()).unwrap();
            stand.recv().unwrap();
        });
        standing.recv().unwrap();
        let (meta, state) = sent(9);
        let install = async move {
            let snapshot = Box::new(Cursor::new(state));
            machine.install_snapshot(&meta, snapshot).await
        };
        let installing = tokio::spawn(install);
        let mut purging = tokio::spawn(async move { log.purge(log_id(1, 1, 9)).await });
        // Nothing tells that something does not happen.
        let early = tokio::time::timeout(Duration::from_millis(300), &mut purging).await;
        // What a process that is killed now would find.
        let left = beside.get_log_state().await.unwrap();
        drop(beside);
        go_on.send(()).unwrap();
        disk.join().unwrap();
        installing.await.unwrap().unwrap();
        assert!(early.is_err() && left.last_purged_log_id.is_none());
        assert_eq!(left.last_log_id, Some(log_id(1, 1, 2)));
        purging.await.unwrap().unwrap();
        let (mut log, mut machine) = open(dir.path());
        let purged = log.get_log_state().await.unwrap().last_purged_log_id;
        assert_eq!(purged, Some(log_id(1, 1, 9)));
        assert_eq!(machine.applied_state().await.unwrap().0, purged);
    }

    /// A snapshot holds what its name says, whatever is installed meanwhile.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_snapshot_is_never_named_after_what_it_does_not_hold() {
        let dir = tempfile::tempdir().unwrap();
        let (_, machine) = open(dir.path());
        let mut builder = machine.clone();
        let over = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let ended = over.clone();
        let installing = std::thread::spawn(move || {
            for index in 1..=20_000 {
                let (meta, state) = sent(index);
                machine.replace(&meta, state_of(&state).unwrap());
            }
            ended.store(true, Ordering::Relaxed);
        });
        while !over.load(Ordering::Relaxed) {
            let built = builder.build_snapshot().await.unwrap();
            let held = state_of(built.snapshot.get_ref()).unwrap().applied().0;
            let named = built.meta.last_log_id.map_or(0, |id| id.index);
            assert_eq!(held, named);
        }
        installing.join().unwrap();
    }

    #[tokio::test]
    async fn a_damaged_snapshot_stops_the_start() {
        let dir = tempfile::tempdir().unwrap();
        let (_, mut machine) = open(dir.path());
        machine.apply([entry(1, purge_all(7))]).await.unwrap();
        machine.build_snapshot().await.unwrap();
        let path = dir.path().join("snapshot");
        let mut bytes = fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&path, bytes).unwrap();
        let replica = Replica::new(NodeId(1), ClusterState::default());
        let opened = StateMachine::open(path, replica);
        assert!(matches!(opened, Err(StartError::Storage { .. })));
    }

    #[tokio::test]
    async fn vote_and_committed_index_survive_reopening() {
        let dir = tempfile::tempdir().unwrap();
        let (vote, committed) = (Vote::new(7, 3), Some(log_id(1, 1, 4)));
        {
            let (mut log, _) = open(dir.path());
            log.save_vote(&vote).await.unwrap();
            log.save_committed(committed).await.unwrap();
        }
        let (mut log, _) = open(dir.path());
        assert_eq!(log.read_vote().await.unwrap(), Some(vote));
        assert_eq!(log.read_committed().await.unwrap(), committed);
    }

    #[tokio::test]
    async fn long_replies_are_cut_but_never_empty() {
        let dir = tempfile::tempdir().unwrap();
        let (mut log, _) = open(dir.path());
        let item = PurgeItem {
            scope: Scope::Url(u64::MAX),
            mode: PurgeMode::Plain,
        };
        let big = Command::Purge {
            items: vec![item; 60_000],
            token: 1,
        };
        let rows: Vec<_> = (1..5)
            .map(|index| {
                (
                    entry_key(index),
                    encode(&entry(index, big.clone())).unwrap(),
                )
            })
            .collect();
        log.commit(rows, vec![]).await.unwrap();
        let some = log.limited_get_log_entries(1, 5).await.unwrap();
        assert_eq!(some.len(), 1);
        assert_eq!(log.try_get_log_entries(1..5).await.unwrap().len(), 4);
        // A follower that hangs is sent the same again and again, and holds it all.
        let small = Command::Purge {
            items: vec![item; 5_000],
            token: 2,
        };
        let row = |index| {
            (
                entry_key(index),
                encode(&entry(index, small.clone())).unwrap(),
            )
        };
        log.commit((5..9).map(row).collect(), vec![]).await.unwrap();
        let some = log.limited_get_log_entries(5, 9).await.unwrap();
        assert_eq!(some.len(), 2);
        let none = log.try_get_log_entries(9..12).await.unwrap();
        assert_eq!(none, Vec::<Entry<TypeConfig>>::new());
    }
}
