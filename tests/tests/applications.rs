//! Real programs under load: snapshots restored elsewhere, opened by the program itself, and
//! checked. A few of each here; the full counts are those of
//! `cargo run --release -p snapshim-tests --bin applications`.

use std::time::Duration;

use snapshim_tests::apps::bench::HOT;
use snapshim_tests::apps::{Bench, Row, table};
use snapshim_tests::{lab, rounds};

const LIMIT: Duration = Duration::from_secs(1800);
/// What is asked of each checkpoint.
const AUTO: &[&str] = &["--at", "auto", "--wait", "2s"];

/// Some snapshots of an application: none fails. `point`: what `auto` must have found, at
/// least once.
fn snapshots(bench: &mut Bench, count: usize, point: &str) -> Row {
    let mut row = Row::new(bench.app.name);
    for _ in 0..count {
        bench.snapshot(AUTO, &mut row);
    }
    println!(
        "{}: {} failed of {}, {} verified; at {:?}, held by {:?}; not verified {:?}; not published {:?}",
        row.name,
        row.failures.len(),
        row.taken,
        row.verified,
        row.points,
        row.layers,
        row.reasons,
        row.unpublished
    );
    assert!(row.failures.is_empty(), "{:#?}", row.failures);
    assert!(row.taken > 0, "{:?}", row.unpublished);
    assert!(row.points.contains_key(point), "{:?}", row.points);
    assert!(row.units.1 > row.units.0, "the load did nothing");
    row
}

/// The control: copies made file by file, without the gate, of which some must be unsound.
fn plain(bench: &mut Bench, most: usize) {
    let unsound = (1..=most).find_map(|nth| {
        let copy = bench.plain_copy(Duration::from_millis(500 * nth as u64));
        Some((nth, bench.check(&copy).err()?))
    });
    let (nth, why) = unsound.expect("the control shows nothing: plain copies are all sound");
    let line = why.lines().last().unwrap_or_default();
    println!("{}: plain copy {nth} is unsound: {line}", bench.app.name);
}

/// An application with its control.
fn sound(name: &str, count: usize, point: &str) {
    let _serial = lab::serial();
    let Some(mut bench) = Bench::start(table::named(name), LIMIT) else {
        return;
    };
    snapshots(&mut bench, rounds(100, count), point);
    plain(&mut bench, 10);
    bench.end();
}

/// At its locks, SQLite has no hot journal; at `write`, and stopped and cloned, it has.
#[test]
fn sqlite_with_a_rollback_journal() {
    let _serial = lab::serial();
    let Some(mut bench) = Bench::start(table::named("sqlite-rollback"), LIMIT) else {
        return;
    };
    let row = snapshots(&mut bench, rounds(1000, 25), "lock");
    assert_eq!(
        row.hot.get("lock"),
        None,
        "hot journals at lock: {:?}",
        row.hot
    );
    let mut at_write = Row::new("at write");
    let mut stopped = Row::new("stopped");
    for nth in 0..rounds(200, 20) {
        bench.snapshot(&["--at", "write"], &mut at_write);
        let copy = bench.stopped_copy();
        stopped.found(bench.check(&copy), &format!("stopped {nth}"));
    }
    println!(
        "hot journals: {} of {} at lock, {} of {} at write, {} when stopped and cloned",
        row.with(HOT),
        row.taken,
        at_write.with(HOT),
        at_write.taken,
        stopped.with(HOT)
    );
    // They are rolled back, and all is well: that is the work that the point saves.
    assert!(at_write.failures.is_empty(), "{:#?}", at_write.failures);
    assert!(
        at_write.with(HOT) > 0 && stopped.with(HOT) > 0,
        "the controls show nothing"
    );
    plain(&mut bench, 10);
    bench.end();
}

#[test]
fn sqlite_with_a_wal() {
    sound("sqlite-wal", 25, "lock");
}

/// Held from outside: no point, but any instant is sound.
#[test]
fn lmdb() {
    sound("lmdb", 15, "write");
}

/// Mapped by whoever has it open: not when its lock is given up.
#[test]
fn gdbm_opened_for_each_update() {
    sound("gdbm", 15, "lock");
}

#[test]
fn gdbm_kept_open() {
    sound("gdbm-nommap", 15, "sync");
}

#[test]
fn redis_with_an_append_only_file() {
    sound("redis-aof", 10, "sync");
}

/// No control: one file that is put in place by a rename cannot be copied wrongly.
#[test]
fn redis_with_dumps() {
    let _serial = lab::serial();
    let Some(mut bench) = Bench::start(table::named("redis-rdb"), LIMIT) else {
        return;
    };
    let mut row = Row::new("redis-rdb");
    for _ in 0..rounds(100, 10) {
        bench.snapshot(AUTO, &mut row);
    }
    println!(
        "redis-rdb: {} of {} verified, at {:?}",
        row.verified, row.taken, row.points
    );
    assert!(row.failures.is_empty(), "{:#?}", row.failures);
    assert_eq!(row.verified, row.taken);
    bench.end();
}

#[test]
fn postgresql() {
    sound("postgresql", 4, "sync");
}
