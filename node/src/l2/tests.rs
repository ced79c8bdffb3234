//! The store as its callers see it, and as crashes and bad disks leave it.

#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use pingora_slice_cluster::Generation;

use super::index::IndexWriter;
use super::region::{REGION_BYTES_MAX, Regions, disk_bytes};
use super::row::{INLINE_BYTES_MAX, SliceRow};
use super::store::{
    L2_BYTES_MIN, Layout, REGION_SLACK_BYTES, REGIONS_MIN, SLACK_BYTES, Store, cut,
};
use super::writer::Job;
use super::*;

const MIB: u64 = 1 << 20;
/// Names the directory to a test that runs in a process of its own.
const CHILD_DIR: &str = "L2_TEST_CHILD_DIR";

fn config(dir: &Path, bytes_max: u64) -> L2Config {
    L2Config {
        dir: dir.to_owned(),
        bytes_max,
        life: Life::Alone,
    }
}

fn open(dir: &Path, bytes_max: u64) -> Store {
    Store::open(config(dir, bytes_max), InMemory::default()).unwrap()
}

fn id(n: u32) -> SliceId {
    SliceId {
        generation: Generation(u128::from(n) << 70 | 7),
        index: n,
    }
}

/// `len` bytes that no other `n` has.
fn slice(n: u32, len: usize) -> Slice {
    let mut state = u64::from(n).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    Slice::new(bytes.into())
}

async fn keep(l2: &Store, n: u32, len: usize) {
    l2.keep_slice(id(n), slice(n, len).into());
    l2.settled().await;
}

async fn has(l2: &Store, n: u32, len: usize) -> bool {
    match l2.slice(id(n)).await {
        Some(found) => {
            assert_eq!(
                found.bytes(),
                slice(n, len).bytes(),
                "slice {n} is not what was kept"
            );
            true
        }
        None => false,
    }
}

/// Looks at the disk use all the time, not only when the store is at rest.
struct Watch {
    dir: PathBuf,
    is_over: Arc<AtomicBool>,
    watching: std::thread::JoinHandle<u64>,
}

impl Watch {
    fn start(dir: &Path) -> Watch {
        let (dir, is_over) = (dir.to_owned(), Arc::new(AtomicBool::new(false)));
        let (watched, until) = (dir.clone(), is_over.clone());
        let watching = std::thread::spawn(move || {
            let mut most = 0;
            while !until.load(Ordering::Relaxed) {
                most = disk_bytes(&watched).max(most);
                std::thread::sleep(Duration::from_millis(4));
            }
            most
        });
        Watch {
            dir,
            is_over,
            watching,
        }
    }

    /// The most that was seen.
    fn most(self) -> u64 {
        self.is_over.store(true, Ordering::Relaxed);
        self.watching.join().unwrap().max(disk_bytes(&self.dir))
    }
}

fn region_files(dir: &Path) -> Vec<PathBuf> {
    let mut files: Vec<_> = std::fs::read_dir(dir.join("regions"))
        .unwrap()
        .map(|file| file.unwrap().path())
        .collect();
    files.sort();
    files
}

#[tokio::test]
async fn gives_back_what_was_kept_now_and_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let sizes = [
        7,
        INLINE_BYTES_MAX,
        INLINE_BYTES_MAX + 1,
        65_536,
        65_537,
        1_048_579,
        10 << 20,
    ];
    let l2 = open(dir.path(), 128 * MIB);
    for (n, len) in (0..).zip(sizes) {
        assert!(!has(&l2, n, len).await);
        keep(&l2, n, len).await;
        assert!(has(&l2, n, len).await);
    }
    assert_eq!(l2.stats().writes, sizes.len() as u64);
    l2.stop().await;
    assert!(!has(&l2, 0, 7).await, "a stopped store answers with a miss");

    let before = Instant::now();
    let l2 = open(dir.path(), 128 * MIB);
    assert!(has(&l2, 5, sizes[5]).await);
    assert!(before.elapsed() < Duration::from_secs(2));
    for (n, len) in (0..).zip(sizes) {
        assert!(has(&l2, n, len).await);
        let whole = slice(n, len);
        let page = 65_536;
        for (start, end) in [
            (0, 1),
            (3, 7),
            (page - 1, page + 1),
            (page, 2 * page),
            (page + 5, u32::MAX),
            (8, 3),
        ] {
            let part = l2.slice_range(id(n), start, end).await.unwrap();
            let (start, end) = cut(start, end, len as u32);
            assert_eq!(
                part.bytes,
                whole.bytes().slice(start as usize..end as usize)
            );
            assert_eq!(part.slice_bytes as usize, len);
        }
    }
    assert_eq!(l2.stats().damaged, 0);
    l2.stop().await;
}

#[tokio::test]
async fn what_was_looked_for_in_vain_is_found_once_it_is_kept() {
    const LEN: usize = 100_000;
    let dir = tempfile::tempdir().unwrap();
    let l2 = open(dir.path(), 1 << 30);
    for n in 0..2 {
        assert!(!has(&l2, n, LEN).await);
        assert!(l2.shared.places().is_nowhere(&id(n)));
    }
    l2.keep_slice(id(0), slice(0, LEN).into());
    assert!(has(&l2, 0, LEN).await, "while it is on its way");
    l2.settled().await;
    assert!(has(&l2, 0, LEN).await && !has(&l2, 1, LEN).await);
    keep(&l2, 1, LEN).await;
    assert!(l2.holds(id(1)).await && l2.slice_range(id(1), 5, 9).await.is_some());
}

#[tokio::test]
async fn a_manifest_is_there_at_once_and_can_be_replaced_and_forgotten() {
    let dir = tempfile::tempdir().unwrap();
    let l2 = open(dir.path(), 32 * MIB);
    for version in 0..100u32 {
        let manifest = Bytes::from(version.to_string());
        l2.keep_manifest(1, manifest.clone());
        assert_eq!(l2.manifest(1).await, Some(manifest));
    }
    l2.keep_manifest(2, Bytes::from_static(b"two"));
    l2.settled().await;
    assert!(l2.shared.pending().manifests.is_empty());
    assert_eq!(l2.manifest(1).await, Some(Bytes::from_static(b"99")));
    l2.drop_manifest(1);
    assert_eq!(l2.manifest(1).await, None);
    l2.stop().await;
    let l2 = open(dir.path(), 32 * MIB);
    assert_eq!(l2.manifest(1).await, None);
    assert_eq!(l2.manifest(2).await, Some(Bytes::from_static(b"two")));
    l2.stop().await;
}

/// Four times the store's size passes through; what is asked for stays, the rest leaves, the bound holds.
#[tokio::test]
async fn churn_keeps_what_is_asked_for_within_the_bound() {
    let (dir, bytes_max, len) = (tempfile::tempdir().unwrap(), 64 * MIB, 256 << 10);
    let l2 = open(dir.path(), bytes_max);
    let watch = Watch::start(dir.path());
    let count = (4 * bytes_max / len as u64) as u32;
    keep(&l2, 0, len).await;
    for n in 1..=count {
        keep(&l2, n, len).await;
        if n % 16 == 0 {
            assert!(has(&l2, 0, len).await, "lost after {n}");
            assert!(has(&l2, n - 15, len).await);
        }
    }
    assert!(!has(&l2, 2, len).await);
    let stats = l2.stats();
    let most = watch.most();
    assert!(most <= bytes_max && most > bytes_max / 2, "{most}");
    assert!(stats.rewritten > 0);
    assert_eq!((stats.damaged, stats.dropped), (0, 0));
    let on_disk = disk_bytes(&dir.path().join("regions")) + disk_bytes(&dir.path().join("index"));
    assert!(
        stats.bytes.abs_diff(on_disk) < MIB,
        "{} against {on_disk}",
        stats.bytes
    );
    l2.stop().await;
}

/// While the entries of a region are moved to its front, each is read where it lies.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_kept_of_a_region_is_there_while_it_is_moved() {
    let dir = tempfile::tempdir().unwrap();
    let (len, runtime) = (1 << 20, tokio::runtime::Handle::current());
    let store: Arc<OnceLock<Store>> = Arc::default();
    let (asked, found) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let in_memory = InMemory::default();
    let _ = in_memory.0.set(Box::new({
        let (store, asked, found) = (store.clone(), asked.clone(), found.clone());
        move |id| {
            let Some(l2) = store.get() else { return true };
            asked.fetch_add(1, Ordering::Relaxed);
            if runtime.block_on(l2.slice(*id)).is_some() {
                found.fetch_add(1, Ordering::Relaxed);
            }
            // As a look-up has it while the index makes room for the new row.
            let mut places = l2.shared.places();
            let kept = places.kept(id);
            places.insert_nowhere(*id, kept);
            true
        }
    }));
    let config = L2Config {
        dir: dir.path().to_owned(),
        bytes_max: 64 * MIB,
        life: Life::Alone,
    };
    let l2 = Store::open(config, in_memory).unwrap();
    assert!(store.set(l2.clone()).is_ok());
    for n in 0..60 {
        keep(&l2, n, len).await;
    }
    let asked = asked.load(Ordering::Relaxed);
    assert!(asked > 10 && l2.stats().rewritten > 0, "{asked}");
    assert_eq!(found.load(Ordering::Relaxed), asked);
    for n in 0..60 {
        let row = l2.shared.index.slice(id(n)).unwrap();
        let is_there = row.is_some_and(|found| match found.row {
            SliceRow::InRegion(place, _) => l2.shared.regions.is_live(&place),
            SliceRow::Inline(_) => true,
        });
        assert!(!(is_there && l2.shared.places().is_nowhere(&id(n))), "{n}");
    }
    l2.stop().await;
}

/// A look-up that missed its row, while that was moved to the newest epoch, says that
/// it is nowhere.
#[tokio::test]
async fn a_small_slice_is_found_once_its_row_has_been_moved() {
    let dir = tempfile::tempdir().unwrap();
    let l2 = open(dir.path(), 64 * MIB);
    keep(&l2, 1, 1000).await;
    let kept = l2.shared.places().kept(&id(1));
    l2.shared.places().insert_nowhere(id(1), kept);
    assert!(!has(&l2, 1, 1000).await);
    assert!(l2.queue(Job::RenewSlice(id(1))));
    l2.settled().await;
    assert!(has(&l2, 1, 1000).await);
    l2.stop().await;
}

/// A region holds one of the largest slices, and all else is in memory, too.
#[tokio::test]
async fn a_large_slice_finds_room_beside_what_stays() {
    let dir = tempfile::tempdir().unwrap();
    let in_memory = InMemory::default();
    let _ = in_memory.0.set(Box::new(|_| true));
    let config = L2Config {
        dir: dir.path().to_owned(),
        bytes_max: 64 * MIB,
        life: Life::Alone,
    };
    let l2 = Store::open(config, in_memory).unwrap();
    for n in 0..60 {
        keep(&l2, n, 1 << 20).await;
    }
    let kept = tokio::time::timeout(Duration::from_secs(20), keep(&l2, 1000, 10 << 20)).await;
    assert!(kept.is_ok(), "the writer does not come to an end");
    assert!(has(&l2, 1000, 10 << 20).await && has(&l2, 59, 1 << 20).await);
    l2.stop().await;
}

/// Manifests and small slices alone may be more than the bound, too.
#[tokio::test]
async fn small_things_leave_in_order_within_the_bound() {
    let (dir, bytes_max) = (tempfile::tempdir().unwrap(), 32 * MIB);
    let l2 = open(dir.path(), bytes_max);
    let watch = Watch::start(dir.path());
    let manifest = |n: u32| slice(n, 1500).bytes().clone();
    keep(&l2, 0, 4000).await;
    l2.keep_manifest(0, manifest(0));
    keep(&l2, 1, 300 << 10).await;
    let count = (bytes_max / 5500) as u32;
    for n in 2..count {
        l2.keep_slice(id(n), slice(n, 4000).into());
        l2.keep_manifest(n.into(), manifest(n));
        if n % 32 == 0 {
            l2.settled().await;
            assert!(has(&l2, 0, 4000).await, "lost after {n}");
            assert_eq!(l2.manifest(0).await, Some(manifest(0)), "lost after {n}");
            assert_eq!(
                l2.manifest(u128::from(n) - 30).await,
                Some(manifest(n - 30))
            );
        }
    }
    assert!(
        has(&l2, 1, 300 << 10).await,
        "rows of slices are carried over without being asked for"
    );
    assert!(!has(&l2, 2, 4000).await);
    assert_eq!(l2.stats().dropped, 0);
    let most = watch.most();
    assert!(most <= bytes_max, "{most}");
    l2.stop().await;
    let l2 = open(dir.path(), bytes_max);
    assert!(has(&l2, count - 1, 4000).await && has(&l2, 1, 300 << 10).await);
    assert!(disk_bytes(dir.path()) <= bytes_max);
    l2.stop().await;
}

/// Not a test by itself: what `kill_loses_nothing_that_was_settled` starts and kills.
#[tokio::test]
#[ignore = "runs in a process of its own, forever"]
async fn child_writes_until_killed() {
    let Some(dir) = std::env::var_os(CHILD_DIR) else {
        return;
    };
    let l2 = open(Path::new(&dir), 48 * MIB);
    for n in 0.. {
        for part in 0..4 {
            let n = n * 4 + part;
            l2.keep_slice(id(n), slice(n, sized(n)).into());
            l2.keep_manifest(n.into(), slice(n, 900).bytes().clone());
        }
        l2.settled().await;
        println!("settled {}", n * 4 + 3);
    }
}

fn sized(n: u32) -> usize {
    [100, 20_000, 300_000, 1 << 20][n as usize % 4]
}

#[tokio::test]
async fn kill_loses_nothing_that_was_settled() {
    let dir = tempfile::tempdir().unwrap();
    for settled in [3, 15, 150] {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "l2::tests::child_writes_until_killed",
                "--ignored",
                "--nocapture",
            ])
            .env(CHILD_DIR, dir.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let reached = lines.find_map(|line| {
            let n: u32 = line.unwrap().split("settled ").nth(1)?.parse().ok()?;
            (n >= settled).then_some(n)
        });
        child.kill().unwrap();
        child.wait().unwrap();
        let reached = reached.unwrap();

        let before = Instant::now();
        let l2 = open(dir.path(), 48 * MIB);
        assert!(before.elapsed() < Duration::from_secs(2));
        for n in reached.saturating_sub(15)..=reached {
            assert!(has(&l2, n, sized(n)).await, "slice {n} of {reached}");
            assert_eq!(
                l2.manifest(n.into()).await.as_ref(),
                Some(slice(n, 900).bytes())
            );
        }
        for n in 0..reached + 40 {
            has(&l2, n, sized(n)).await;
        }
        // It goes on where the other stopped.
        keep(&l2, u32::MAX, 100_000).await;
        assert!(has(&l2, u32::MAX, 100_000).await);
        assert!(has(&l2, reached, sized(reached)).await);
        assert_eq!(l2.stats().damaged, 0);
        assert!(disk_bytes(dir.path()) <= 48 * MIB);
        l2.stop().await;
    }
}

#[tokio::test]
async fn a_flipped_bit_is_a_miss_for_its_page_alone() {
    let (dir, len) = (tempfile::tempdir().unwrap(), 200_000);
    let l2 = open(dir.path(), 48 * MIB);
    keep(&l2, 1, len).await;
    let file = first_region(dir.path());
    flip(&file, 130_000);

    let first = l2.slice_range(id(1), 0, 65_536).await.unwrap();
    assert_eq!(first.bytes, slice(1, len).bytes().slice(..65_536));
    assert!(
        l2.slice_range(id(1), 129_000, 129_010)
            .await
            .is_none_or(|part| part.bytes.len() == 10)
    );
    assert!(!has(&l2, 1, len).await);
    assert!(l2.stats().damaged >= 1);
    l2.settled().await;
    assert!(l2.slice_range(id(1), 0, 10).await.is_none(), "dropped");
    keep(&l2, 1, len).await;
    assert!(has(&l2, 1, len).await, "fetched again and kept");
    l2.stop().await;
}

#[tokio::test]
async fn what_was_read_is_read_again_without_waiting_as_long_as_it_is_good() {
    const LEN: usize = 1 << 20;
    let dir = tempfile::tempdir().unwrap();
    let l2 = open(dir.path(), 48 * MIB);
    for n in 1..4 {
        keep(&l2, n, LEN).await;
        assert!(l2.slice_now(id(n)).is_none(), "where it lies is not known");
        assert!(has(&l2, n, LEN).await);
    }
    // Each in memory of its own, for as long as somebody has it.
    let held: Vec<Slice> = (1..4).map(|n| l2.slice_now(id(n)).unwrap()).collect();
    for (n, held) in (1..4).zip(&held) {
        assert_eq!(held.bytes(), slice(n, LEN).bytes());
        assert_eq!(l2.slice_now(id(n)).unwrap().bytes(), slice(n, LEN).bytes());
    }
    drop(held);

    let file = first_region(dir.path());
    flip(&file, 700_000);
    assert!(l2.slice_now(id(1)).is_none(), "damaged");
    assert!(l2.slice_now(id(2)).is_some());
    assert!(!has(&l2, 1, LEN).await);
    assert_eq!(l2.stats().damaged, 1);
    // Its region is written over again and again.
    for n in 10..200 {
        keep(&l2, n, LEN).await;
    }
    for n in 1..4 {
        let again = l2.slice_now(id(n));
        assert!(again.is_none_or(|again| again.bytes() == slice(n, LEN).bytes()));
    }
    l2.stop().await;
}

fn first_region(dir: &Path) -> File {
    let path = &region_files(dir)[0];
    File::options().read(true).write(true).open(path).unwrap()
}

fn flip(file: &File, at: u64) {
    use std::os::unix::fs::FileExt;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
}

#[tokio::test]
async fn truncated_and_missing_regions_are_misses() {
    let (dir, len) = (tempfile::tempdir().unwrap(), 1 << 20);
    let l2 = open(dir.path(), 48 * MIB);
    for n in 0..20 {
        keep(&l2, n, len).await;
    }
    let files = region_files(dir.path());
    assert!(files.len() >= 2);
    File::options()
        .write(true)
        .open(&files[0])
        .unwrap()
        .set_len(5 * MIB / 2)
        .unwrap();
    std::fs::remove_file(&files[1]).unwrap();
    assert!(has(&l2, 0, len).await && has(&l2, 1, len).await);
    assert!(!has(&l2, 2, len).await && !has(&l2, 19, len).await);
    assert!(l2.stats().damaged >= 2);
    l2.stop().await;

    let l2 = open(dir.path(), 48 * MIB);
    assert!(has(&l2, 0, len).await && !has(&l2, 18, len).await);
    for n in 20..80 {
        keep(&l2, n, len).await;
        assert!(has(&l2, n, len).await);
    }
    assert!(disk_bytes(dir.path()) <= 48 * MIB);
    l2.stop().await;
}

#[tokio::test]
async fn a_damaged_index_is_set_aside() {
    for garbage in [&b"garbage"[..], &[0; 5000], &[0xff; 100_000]] {
        let dir = tempfile::tempdir().unwrap();
        let l2 = open(dir.path(), 32 * MIB);
        keep(&l2, 1, 100_000).await;
        l2.stop().await;
        spoil(&dir.path().join("index"), garbage);

        let l2 = open(dir.path(), 32 * MIB);
        assert!(!has(&l2, 1, 100_000).await);
        keep(&l2, 2, 100_000).await;
        assert!(has(&l2, 2, 100_000).await);
        assert!(l2.stats().writable);
        l2.stop().await;
        let l2 = open(dir.path(), 32 * MIB);
        assert!(has(&l2, 2, 100_000).await);
        l2.stop().await;
    }
}

/// Not a test by itself: `a_read_that_fails_for_now_costs_nothing_else` runs it with
/// few files allowed.
#[tokio::test]
#[ignore = "takes all the files that its process may open"]
async fn child_runs_out_of_files() {
    let Some(dir) = std::env::var_os(CHILD_DIR) else {
        return;
    };
    let (dir, len) = (Path::new(&dir), 1 << 20);
    let l2 = open(dir, 48 * MIB);
    keep(&l2, 1, len).await;
    let mut files = Vec::new();
    while let Ok(file) = File::open("/dev/null") {
        files.push(file);
    }
    assert!(!has(&l2, 1, len).await);
    assert!(l2.slice_range(id(1), 5, 9).await.is_none());
    drop(files);
    l2.settled().await;
    assert!(has(&l2, 1, len).await, "forgotten");
    let stats = l2.stats();
    assert_eq!((stats.unreadable, stats.damaged), (2, 0));
    l2.stop().await;
    println!("done");
}

#[test]
fn a_read_that_fails_for_now_costs_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let child = Command::new("sh")
        .args(["-c", "ulimit -n 200 && exec \"$0\" \"$@\""])
        .arg(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "l2::tests::child_runs_out_of_files",
            "--ignored",
            "--nocapture",
        ])
        .env(CHILD_DIR, dir.path())
        .output()
        .unwrap();
    let output = String::from_utf8_lossy(&child.stdout);
    assert!(
        child.status.success() && output.contains("done"),
        "{child:?}"
    );
}

/// Whoever holds the newest part of the index for now: the rest waits for it.
#[tokio::test]
async fn an_index_that_cannot_be_opened_now_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let l2 = open(dir.path(), 32 * MIB);
    keep(&l2, 1, 100_000).await;
    l2.stop().await;
    let files = region_files(dir.path());
    assert!(!files.is_empty());

    let epoch = std::fs::read_dir(dir.path().join("index")).unwrap().next();
    let held = File::open(epoch.unwrap().unwrap().path().join("lock")).unwrap();
    held.lock().unwrap();
    let config = L2Config {
        dir: dir.path().to_owned(),
        bytes_max: 32 * MIB,
        life: Life::Alone,
    };
    let opened = Store::open(config, InMemory::default());
    assert!(matches!(opened, Err(L2Error::Disk { .. })));
    drop((opened, held));
    assert_eq!(region_files(dir.path()), files);
    let l2 = open(dir.path(), 32 * MIB);
    assert!(has(&l2, 1, 100_000).await);
    l2.stop().await;
}

/// However often no other can be begun: only an index that was begun because of a
/// failure is given up for the next one.
#[test]
fn repairs_that_fail_cost_no_index_that_was_good() {
    let dir = tempfile::tempdir().unwrap();
    let index = dir.path().join("index");
    std::fs::create_dir(&index).unwrap();
    let regions = Regions::open(dir.path().join("regions"), 1 << 20, 3, &[]).unwrap();
    let mut writer = IndexWriter::open(index.clone(), 16 * MIB).unwrap();
    writer.begin(&regions).unwrap();
    writer.put_manifest(1, Some(b"manifest")).unwrap();
    writer.repair(&regions).unwrap();

    std::fs::rename(&index, dir.path().join("away")).unwrap();
    File::create(&index).unwrap();
    for _ in 0..3 {
        assert!(writer.repair(&regions).is_err());
        let found = writer.index().manifest(1).unwrap();
        assert!(found.is_some_and(|found| &found.row[..] == b"manifest"));
    }
}

/// Overwrites every file below `dir`.
fn spoil(dir: &Path, garbage: &[u8]) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            spoil(&path, garbage);
        } else {
            std::fs::write(path, garbage).unwrap();
        }
    }
}

#[tokio::test]
async fn a_directory_has_one_process() {
    let dir = tempfile::tempdir().unwrap();
    let l2 = open(dir.path(), 32 * MIB);
    let config = config(dir.path(), 32 * MIB);
    let second = Store::open(config, InMemory::default());
    assert!(matches!(second, Err(L2Error::Locked(_))));
    l2.stop().await;
    open(dir.path(), 32 * MIB).stop().await;
}

/// What a machine purges in one life, its other life does not know.
#[tokio::test]
async fn a_store_of_another_life_begins_empty() {
    let dir = tempfile::tempdir().unwrap();
    let live = |life| {
        let config = L2Config {
            life,
            ..config(dir.path(), 32 * MIB)
        };
        Store::open(config, InMemory::default()).unwrap()
    };
    let l2 = live(Life::Alone);
    keep(&l2, 1, 100_000).await;
    l2.keep_manifest(1, Bytes::from_static(b"film"));
    l2.stop().await;
    let l2 = live(Life::Alone);
    assert!(l2.manifest(1).await.is_some() && has(&l2, 1, 100_000).await);
    l2.stop().await;
    let l2 = live(Life::InCluster);
    assert_eq!(l2.manifest(1).await, None);
    assert!(!has(&l2, 1, 100_000).await);
    l2.keep_manifest(2, Bytes::from_static(b"film"));
    l2.stop().await;
    let l2 = live(Life::InCluster);
    assert!(l2.manifest(2).await.is_some());
    l2.stop().await;
    let l2 = live(Life::Alone);
    assert_eq!((l2.manifest(1).await, l2.manifest(2).await), (None, None));
    l2.stop().await;
}

/// Nothing is removed that the store has not made.
#[tokio::test]
async fn what_is_of_others_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let theirs = ["index/photos/one", "regions/notes.txt", "regions/7"];
    let write = || {
        for path in theirs.map(|path| dir.path().join(path)) {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "dear").unwrap();
        }
    };
    write();
    let config = config(dir.path(), 32 * MIB);
    let refused = Store::open(config, InMemory::default());
    assert!(
        matches!(refused, Err(L2Error::Disk { reason, .. }) if reason.contains("l2_cache_dir"))
    );
    for name in ["index", "regions"] {
        std::fs::remove_dir_all(dir.path().join(name)).unwrap();
    }
    open(dir.path(), 32 * MIB).stop().await;
    write();
    std::fs::create_dir(dir.path().join("index/00000009.gone")).unwrap();
    open(dir.path(), 32 * MIB).stop().await;
    for path in theirs.map(|path| dir.path().join(path)) {
        assert!(path.exists(), "{} is gone", path.display());
    }
    assert!(!dir.path().join("index/00000009.gone").exists());
}

#[tokio::test]
async fn the_bound_may_change_between_runs() {
    let (dir, len) = (tempfile::tempdir().unwrap(), 1 << 20);
    let l2 = open(dir.path(), 512 * MIB);
    for n in 0..200 {
        keep(&l2, n, len).await;
    }
    l2.stop().await;
    for bytes_max in [256 * MIB, 100 * MIB, 20 * MIB, 400 * MIB] {
        let l2 = open(dir.path(), bytes_max);
        assert!(
            disk_bytes(dir.path()) <= bytes_max,
            "{bytes_max}: {}",
            disk_bytes(dir.path())
        );
        for n in 200..200 + (2 * bytes_max / MIB) as u32 {
            keep(&l2, n, len).await;
            assert!(has(&l2, n, len).await, "{bytes_max}: {n}");
        }
        assert!(
            disk_bytes(dir.path()) <= bytes_max,
            "{bytes_max}: {}",
            disk_bytes(dir.path())
        );
        l2.stop().await;
    }
}

#[tokio::test]
async fn a_full_queue_drops_and_counts() {
    let dir = tempfile::tempdir().unwrap();
    let l2 = open(dir.path(), 64 * MIB);
    let (big, count) = (slice(1, 1 << 20), 200);
    for n in 0..count {
        l2.keep_slice(id(n), big.clone().into());
    }
    l2.settled().await;
    let stats = l2.stats();
    assert_eq!(stats.writes + stats.dropped, u64::from(count));
    assert!(stats.dropped > 0 && stats.writes > 0, "{stats:?}");
    assert_eq!(l2.shared.queued_bytes.load(Ordering::Relaxed), 0);
    // One that never fits.
    let too_large = slice(2, 40 << 20).into();
    assert!(!l2.keep_slice(id(count), too_large), "not to be expected");
    l2.settled().await;
    assert_eq!(l2.stats().dropped, stats.dropped + 1);
    l2.stop().await;
}

#[test]
fn every_bound_is_divided_without_excess() {
    let config = config(Path::new("/nonexistent"), L2_BYTES_MIN - 1);
    assert!(matches!(
        Store::open(config, InMemory::default()),
        Err(L2Error::Disk { reason, .. }) if reason.contains("l2_cache_size_bytes")
    ));
    for bytes_max in [
        L2_BYTES_MIN,
        50 * MIB,
        100 * MIB,
        200 * MIB,
        1024 * MIB,
        10_240 * MIB,
        4_194_304 * MIB,
    ] {
        let layout = Layout::of(bytes_max, None);
        let regions = u64::from(layout.regions);
        assert!(
            regions >= REGIONS_MIN && (regions >= 8 || bytes_max < 150 * MIB),
            "{bytes_max}: {layout:?}"
        );
        let sum = layout.index_bytes
            + regions * (u64::from(layout.region_bytes) + REGION_SLACK_BYTES)
            + SLACK_BYTES;
        assert!(
            sum <= bytes_max && sum > bytes_max * 3 / 5,
            "{bytes_max}: {layout:?}"
        );
        assert!(layout.region_bytes <= REGION_BYTES_MAX && layout.index_bytes >= 4 * MIB);
        assert!(Layout::of(bytes_max, Some(u32::MAX)).regions <= layout.regions);
    }
}

/// Not a test by itself: `a_full_disk_costs_writes_and_nothing_else` runs it on a small file system.
#[tokio::test]
#[ignore = "fills the file system it is given"]
async fn child_fills_its_disk() {
    let Some(dir) = std::env::var_os(CHILD_DIR) else {
        return;
    };
    let (dir, len) = (Path::new(&dir), 1 << 20);
    // The bound is larger than the disk: the store makes do with what it gets.
    let l2 = open(&dir.join("store"), 512 * MIB);
    for n in 0..200 {
        keep(&l2, n, len).await;
        assert!(has(&l2, n, len).await);
    }
    keep(&l2, 1000, 5000).await;
    assert!(l2.stats().writable);

    // Nothing is left for the index.
    let held = region_files(&dir.join("store")).len();
    let filler = File::create(dir.join("filler")).unwrap();
    fill(&filler);
    let mut n = 1000;
    while l2.stats().writable {
        n += 1;
        keep(&l2, n, 5000).await;
    }
    assert!(l2.stats().dropped > 0);
    for n in (190..200).chain([1000]) {
        assert!(
            has(&l2, n, if n < 1000 { len } else { 5000 }).await,
            "reading {n} goes on"
        );
    }

    // It helps itself by one region; and again, until others make room.
    until_writable(&l2).await;
    assert_eq!(region_files(&dir.join("store")).len(), held - 1);
    fill(&filler);
    while l2.stats().writable {
        n += 1;
        keep(&l2, n, 5000).await;
    }
    drop(filler);
    std::fs::remove_file(dir.join("filler")).unwrap();
    until_writable(&l2).await;
    keep(&l2, 3000, len).await;
    assert!(has(&l2, 3000, len).await && has(&l2, 199, len).await);
    // It is as large as it wants to be again, for now.
    let held = region_files(&dir.join("store")).len();
    let mut n = 3000;
    while region_files(&dir.join("store")).len() == held {
        n += 1;
        assert!(n < 3100, "no region was begun");
        keep(&l2, n, len).await;
    }
    assert!(l2.shared.is_keeping.load(Ordering::Relaxed));
    l2.stop().await;
    let l2 = open(&dir.join("store"), 512 * MIB);
    assert!(has(&l2, 3000, len).await && has(&l2, 199, len).await);
    l2.stop().await;

    // The index is lost, and the regions' files hold all the space.
    std::fs::remove_dir_all(dir.join("store/index")).unwrap();
    let l2 = open(&dir.join("store"), 512 * MIB);
    keep(&l2, 4000, len).await;
    assert!(has(&l2, 4000, len).await);
    assert!(l2.shared.is_keeping.load(Ordering::Relaxed));
    l2.stop().await;
    println!("done");
}

/// Takes all the space there is, in ever smaller steps, as the index may be at work.
fn fill(filler: &File) {
    let (mut len, mut step) = (filler.metadata().unwrap().len(), 16 * MIB);
    while step >= 4096 {
        match region::allocate(filler, len + step) {
            Ok(()) => len += step,
            Err(_) => step /= 2,
        }
    }
}

async fn until_writable(l2: &Store) {
    let before = Instant::now();
    while !l2.stats().writable {
        assert!(
            before.elapsed() < Duration::from_secs(40),
            "not tried again"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[test]
fn a_full_disk_costs_writes_and_nothing_else() {
    on_a_disk_of("96m", "child_fills_its_disk");
}

/// Not a test by itself: `others_on_its_disk_have_room` runs it on a small file system.
#[tokio::test]
#[ignore = "fills the file system it is given"]
async fn child_leaves_room() {
    let Some(dir) = std::env::var_os(CHILD_DIR) else {
        return;
    };
    let l2 = open(&Path::new(&dir).join("store"), 400 * MIB);
    for n in 0..240 {
        keep(&l2, n, 1 << 20).await;
    }
    assert!(!l2.shared.is_keeping.load(Ordering::Relaxed));
    let disk = rustix::fs::statvfs(&dir).unwrap();
    let free = disk.f_bavail * disk.f_frsize;
    // An eighth, less what the index has taken since the last region was begun.
    assert!(free > 30 * MIB, "{free}");
    l2.stop().await;

    // Now it is full: what is stored is found all the same.
    let filler = File::create(Path::new(&dir).join("filler")).unwrap();
    fill(&filler);
    let l2 = open(&Path::new(&dir).join("store"), 400 * MIB);
    assert!(has(&l2, 239, 1 << 20).await);
    l2.stop().await;
    println!("done");
}

#[test]
fn others_on_its_disk_have_room() {
    on_a_disk_of("256m", "child_leaves_room");
}

/// Runs a test alone, in a mount namespace, with a file system of this size for its
/// directory. Where the system does not allow one, it says so and proves nothing.
fn on_a_disk_of(size: &str, test: &str) {
    let dir = tempfile::tempdir().unwrap();
    let mount = format!("mount -t tmpfs -o size={size} tmpfs \"$0\" || exit 77; exec \"$@\"");
    let child = Command::new("unshare")
        .args(["-rm", "sh", "-c", &mount])
        .args([dir.path(), &std::env::current_exe().unwrap()])
        .args(["--exact", &format!("l2::tests::{test}")])
        .args(["--ignored", "--nocapture"])
        .env(CHILD_DIR, dir.path())
        .output();
    match child {
        Ok(output) if output.status.success() => {
            assert!(
                String::from_utf8_lossy(&output.stdout).contains("done"),
                "{output:?}"
            );
        }
        Ok(output) if output.status.code() == Some(101) => {
            panic!("{}", String::from_utf8_lossy(&output.stderr))
        }
        refused => eprintln!("not run, no mount namespace here: {refused:?}"),
    }
}
