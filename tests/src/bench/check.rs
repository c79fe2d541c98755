//! Could a copy of a workload's files be of one instant? Nothing here knows how it was made.
//!
//! Each check holds for every state that the files have between two calls of their writer, and only
//! for those, so that it does not depend on when the copy was made.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::records::{self, Shape};
use crate::{Random, process};

/// Bytes of a block.
pub const BLOCK: usize = 4096;
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// The word `index` of a block that was never written to: nothing that compresses, or that is
/// twice in the file.
pub fn untouched(page: u64, index: usize) -> u64 {
    if index == 0 {
        return 0;
    }
    Random(page.wrapping_mul(GOLDEN).wrapping_add(index as u64)).number()
}

fn words(block: &[u8]) -> impl Iterator<Item = u64> {
    let words = block.chunks_exact(8);
    words.map(|w| u64::from_le_bytes(w.try_into().expect("eight bytes")))
}

/// One file of blocks: its newest record is the k-th, so it must hold what the first k records
/// leave, each in its block, which follows from `seed`.
pub fn pages(file: &Path, seed: u64) -> bool {
    let Ok(bytes) = fs::read(file) else {
        return false;
    };
    let serials: Vec<u64> = bytes
        .chunks_exact(BLOCK)
        .map(|block| words(block).next().expect("a word"))
        .collect();
    let newest = serials.iter().copied().max().unwrap_or(0);
    // Nobody writes that many; a torn word might say so.
    if newest > 1 << 32 || serials.is_empty() {
        return false;
    }
    let mut expected = vec![0; serials.len()];
    let mut random = Random(seed);
    for serial in 1..=newest {
        expected[random.below(serials.len() as u64) as usize] = serial;
    }
    let mut blocks = bytes.chunks_exact(BLOCK).enumerate();
    serials == expected
        && blocks.all(|(page, block)| {
            let serial = serials[page];
            words(block).enumerate().all(|(i, word)| match serial {
                0 => word == untouched(page as u64, i),
                _ => word == serial.wrapping_add((i as u64).wrapping_mul(GOLDEN)),
            })
        })
}

/// Records in `files` files, each written to one after the other.
pub fn ordered(dir: &Path, files: usize, lanes: usize) -> bool {
    let shape = Shape {
        files,
        lanes,
        record: BLOCK,
    };
    records::check(dir, shape).is_consistent()
}

/// A log of records, and an index with the place of each, written after it: the log has the
/// records of the index, whole, and at most one more.
pub fn log(dir: &Path) -> bool {
    let (Ok(log), Ok(index)) = (fs::read(dir.join("log")), fs::read(dir.join("index"))) else {
        return false;
    };
    let log: Vec<u64> = words(&log).collect();
    let (mut at, mut records) = (0, 0);
    let entries: Vec<u64> = words(&index).collect();
    while at < log.len() {
        let serial = records + 1;
        let length = 8 + serial as usize % 25;
        let Some(record) = log.get(at..at + length) else {
            return false;
        };
        let body = record.iter().enumerate().skip(2);
        let whole = record[0] == serial
            && record[1] == length as u64
            && body
                .clone()
                .all(|(i, w)| *w == serial.wrapping_mul(GOLDEN).wrapping_add(i as u64));
        let entry = [serial, at as u64 * 8, length as u64 * 8, !serial];
        let place = records as usize * 4;
        let indexed = match entries.get(place..place + 4) {
            Some(found) => found == entry,
            // The last one may not be in the index yet.
            None => place == entries.len() && at + length == log.len(),
        };
        if !whole || !indexed {
            return false;
        }
        at += length;
        records += 1;
    }
    index.len() % 32 == 0 && entries.len() as u64 / 4 <= records
}

/// A SQLite database. It is opened, and so recovered, in a copy of the copy at `scratch`, which is
/// not there yet: recovery writes, and the copy may be read-only, or one to keep.
pub fn sqlite(dir: &Path, scratch: &Path) -> bool {
    let mut command = Command::new("cp");
    command.arg("-a").arg(dir).arg(scratch);
    let copied = process::run(command, Duration::from_secs(60)).code() == 0;
    let mut command = Command::new("sqlite3");
    command.arg(scratch.join("app.db")).arg(
        "pragma integrity_check; select (select count(*) from a) = (select count(*) from b) \
         and (select sum(amount) from account) = 0 \
         and (select count(*) from a) = (select coalesce(max(n), 0) from a);",
    );
    let ended = process::run(command, Duration::from_secs(60));
    let _ = fs::remove_dir_all(scratch);
    copied && ended.code() == 0 && ended.out().trim() == "ok\n1"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dir(name: &str) -> std::path::PathBuf {
        let dir = std::env::temp_dir().join(format!("bench-{name}-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        dir
    }

    fn block(serial: u64, page: u64) -> Vec<u8> {
        let word = |i: usize| match serial {
            0 => untouched(page, i),
            _ => serial.wrapping_add((i as u64).wrapping_mul(GOLDEN)),
        };
        (0..BLOCK / 8).flat_map(|i| word(i).to_le_bytes()).collect()
    }

    #[test]
    fn pages_are_replayed() {
        let dir = dir("pages");
        let file = dir.join("f");
        let after = |count: u64| {
            let mut serials = [0; 8];
            let mut random = Random(7);
            for serial in 1..=count {
                serials[random.below(8) as usize] = serial;
            }
            serials
        };
        let write = |serials: [u64; 8]| {
            let blocks = serials.iter().enumerate();
            let bytes: Vec<u8> = blocks.flat_map(|(p, s)| block(*s, p as u64)).collect();
            fs::write(&file, bytes).unwrap();
        };
        for count in [0, 1, 5, 40] {
            write(after(count));
            assert!(pages(&file, 7), "{count}");
        }
        // One block of an earlier moment.
        let (mut torn, before) = (after(40), after(20));
        let old = (0..8)
            .find(|p| before[*p] != torn[*p] && torn[*p] != 40)
            .unwrap();
        torn[old] = before[old];
        write(torn);
        assert!(!pages(&file, 7));
        // Half a block.
        write(after(40));
        let mut bytes = fs::read(&file).unwrap();
        let newest = after(40).iter().position(|s| *s == 40).unwrap();
        bytes[newest * BLOCK + 2048..(newest + 1) * BLOCK].fill(1);
        fs::write(&file, bytes).unwrap();
        assert!(!pages(&file, 7));
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_log_has_what_its_index_has_and_one_more() {
        let dir = dir("log");
        let record = |serial: u64| {
            let length = 8 + serial % 25;
            let body = (2..length).map(move |i| serial.wrapping_mul(GOLDEN).wrapping_add(i));
            [serial, length].into_iter().chain(body)
        };
        let write = |records: u64, entries: u64| {
            let (mut log, mut index) = (Vec::new(), Vec::new());
            for serial in 1..=records.max(entries) {
                let at = log.len() as u64;
                if serial <= records {
                    log.extend(record(serial).flat_map(u64::to_le_bytes));
                }
                let bytes = (8 + serial % 25) * 8;
                if serial <= entries {
                    index.extend(
                        [serial, at, bytes, !serial]
                            .into_iter()
                            .flat_map(u64::to_le_bytes),
                    );
                }
            }
            fs::write(dir.join("log"), log).unwrap();
            fs::write(dir.join("index"), index).unwrap();
            super::log(&dir)
        };
        assert!(write(0, 0) && write(1, 0) && write(30, 30) && write(30, 29));
        assert!(!write(30, 28) && !write(29, 30));
        fs::remove_dir_all(dir).unwrap();
    }
}
