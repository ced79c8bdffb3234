//! `make bench-micro`: the steps of a hit and of a frame, one by one.
//!
//! Figures of one run may be compared with each other, and with those of the
//! commit before on the same machine; not across machines.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::sync::Arc;

use bytes::Bytes;
use criterion::Criterion;
use http::HeaderMap;
use http::header::{HOST, RANGE};
use pingora_slice::l1::{Kept, L1};
use pingora_slice::manifest::{Freshness, Manifest, Stored};
use pingora_slice::plan;
use pingora_slice::slice::Slice;
use pingora_slice::url::Url;
use pingora_slice_cluster::purge::{PurgeItem, PurgeMode, Scope, Subject};
use pingora_slice_cluster::ring::Ring;
use pingora_slice_cluster::slice::{HashKey, touched};
use pingora_slice_cluster::wire::{self, Ask, OriginRequest, Part, SliceAsk, Version};
use pingora_slice_cluster::{Cluster, Generation, NodeId, ObjectKey, PurgeIndex, SliceId};

const MIB: usize = 1024 * 1024;
const HASH_KEY: HashKey = HashKey([7; 16]);
const HOST_NAME: &str = "cdn.example.com";
const TARGET: &str = "/films/2026/a-film-with-a-name.mp4?session=1234";

fn version() -> Version {
    Version {
        etag: Some("\"5f3e-12345\"".into()),
        last_modified: Some("Sat, 21 Nov 2026 10:00:00 GMT".into()),
        exact_date: true,
        length: Some(1 << 30),
        slice_bytes: MIB as u32,
        whole: false,
        hard: PurgeIndex::default(),
    }
}

fn manifest() -> Manifest {
    let field = |name: &str, value: &str| (name.to_owned(), value.as_bytes().to_vec());
    Manifest {
        url: Url {
            host: HOST_NAME.into(),
            target: TARGET.into(),
        },
        status: 200,
        headers: vec![
            field("content-type", "video/mp4"),
            field("etag", "\"5f3e-12345\""),
            field("last-modified", "Sat, 21 Nov 2026 10:00:00 GMT"),
            field("date", "Sat, 21 Nov 2026 10:00:01 GMT"),
            field("cache-control", "public, max-age=86400"),
        ],
        generation: Generation(1),
        version: version(),
        probe: 0,
        stamp: PurgeIndex(1),
        subject: Subject::new(&HASH_KEY, HOST_NAME, TARGET, &[] as &[&str]),
        variant: Vec::new(),
        part: None,
        freshness: Freshness {
            received_ms: 0,
            initial_age: 0,
            lifetime: 86400,
            no_cache: false,
            must_revalidate: false,
            stale_while_revalidate: 0,
            stale_if_error: 0,
        },
    }
}

fn planning(c: &mut Criterion) {
    let manifest = manifest();
    let mut plain = HeaderMap::new();
    plain.insert(HOST, HOST_NAME.parse().expect("a value"));
    let mut ranged = plain.clone();
    ranged.insert(RANGE, "bytes=123456789-123522324".parse().expect("a value"));
    c.bench_function("plan/whole", |b| {
        b.iter(|| plan::plan(true, black_box(&plain), &manifest))
    });
    c.bench_function("plan/range", |b| {
        b.iter(|| plan::plan(true, black_box(&ranged), &manifest))
    });
    c.bench_function("plan/slices of a range", |b| {
        b.iter(|| touched(black_box(123_456_789..123_522_325), MIB as u32).count())
    });
}

fn hashing(c: &mut Criterion) {
    c.bench_function("key/object", |b| {
        b.iter(|| HASH_KEY.object(black_box(HOST_NAME), black_box(TARGET)))
    });
}

fn rings(c: &mut Criterion) {
    for nodes in [3, 30, 300] {
        let weights: BTreeMap<NodeId, u32> = (1..=nodes).map(|id| (NodeId(id), 1)).collect();
        let ring = Ring::of_weights(&weights, &HASH_KEY, 1);
        let mut index = 0u32;
        c.bench_function(&format!("ring/{nodes} nodes"), |b| {
            b.iter(|| {
                index = index.wrapping_add(1);
                ring.owners(black_box(ObjectKey(42)), index).len()
            })
        });
    }
}

fn purges(c: &mut Criterion) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .expect("a runtime");
    let cluster = Cluster::alone(None).expect("alone, in memory");
    let key = cluster.view().hash_key.expect("alone it has one");
    let stored = Stored::new(manifest());
    let subject = Subject::new(&key, HOST_NAME, TARGET, &["a", "b"]);
    c.bench_function("purge/unchanged since the last check", |b| {
        stored.note_floors_passed_at(cluster.version());
        b.iter(|| black_box(&stored).passed_floors_at(cluster.version()))
    });
    c.bench_function("purge/floor, none live", |b| {
        b.iter(|| cluster.floor(black_box(&subject)))
    });
    for batch in 0..100u32 {
        let items = (0..1000u32).map(|n| PurgeItem {
            scope: Scope::url(&key, HOST_NAME, &format!("/{batch}/{n}")),
            mode: PurgeMode::Plain,
        });
        let purged = cluster.purge(items.collect(), u128::from(batch) + 1);
        runtime.block_on(purged).expect("alone it always holds");
    }
    c.bench_function("purge/floor, 100,000 live", |b| {
        b.iter(|| cluster.floor(black_box(&subject)))
    });
}

fn memory(c: &mut Criterion) {
    let l1 = L1::new(256 * MIB as u64, None, MIB as u32);
    let object = Arc::new(Stored::new(manifest()));
    l1.keep_record(1, Kept::Manifest(object));
    let id = SliceId {
        generation: Generation(1),
        index: 0,
    };
    l1.keep_slice(id, Slice::new(Bytes::from(vec![0x5a; MIB])));
    c.bench_function("l1/manifest", |b| {
        b.iter(|| l1.record(black_box(1)).is_some())
    });
    c.bench_function("l1/slice", |b| {
        b.iter(|| l1.slice(black_box(&id)).is_some())
    });
    let slice = l1.slice(&id).expect("it was kept");
    for (name, bytes) in [("1 KiB", 1024), ("64 KiB", 64 * 1024), ("1 MiB", MIB)] {
        let first = if bytes == MIB { 0 } else { 100_000 };
        c.bench_function(&format!("l1/checking {name}"), |b| {
            b.iter(|| slice.is_intact_in(black_box(first..first + bytes)))
        });
    }
}

fn frames(c: &mut Criterion) {
    let ask = Ask::Slice(SliceAsk {
        key: ObjectKey(1),
        slice: SliceId {
            generation: Generation(1),
            index: 7,
        },
        start: 0,
        end: MIB as u32,
        request: OriginRequest {
            host: HOST_NAME.into(),
            target: TARGET.into(),
            headers: vec![("user-agent".into(), b"bench".to_vec())],
        },
        version: version(),
        place: 7,
        stamp: PurgeIndex(1),
        stored_only: false,
    });
    let frame = wire::encode(&ask).expect("it fits");
    let payload = &frame[wire::HEAD_PREFIX_BYTES..];
    c.bench_function("frame/encode", |b| {
        b.iter(|| wire::encode(black_box(&ask)).map(|frame| frame.len()))
    });
    c.bench_function("frame/decode", |b| {
        b.iter(|| wire::decode::<Ask>(black_box(payload)).is_ok())
    });
    let part = Bytes::from(vec![0x5a; 64 * 1024]);
    c.bench_function("frame/part of 64 KiB", |b| {
        b.iter(|| Part::new(black_box(part.clone())).prefix())
    });
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    for group in [planning, hashing, rings, purges, memory, frames] {
        group(&mut criterion);
    }
    criterion.final_summary();
}
