//! The checker of ordered records, independent of all product code.
//!
//! The writers (`programs/lanes.h`) keep *lanes*: one thread each. A lane writes
//! record k into file 0, then file 1, … file N-1, then k + 1 into file 0. So at
//! any instant between its calls the counters of a lane fall along the files by
//! at most one in all. Each record is one call, and is filled with words that
//! follow from its number, so that a torn one shows.

use std::fs;
use std::path::{Path, PathBuf};

/// The files of one ordered workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Number of files.
    pub files: usize,
    /// Number of lanes: threads times processes.
    pub lanes: usize,
    /// Bytes of a record.
    pub record: usize,
}

/// What is wrong with one copy of the files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Records that are not whole.
    pub torn: usize,
    /// Lanes whose counters no single instant could show.
    pub out_of_order: usize,
    /// Files that are missing or too short.
    pub missing: usize,
    /// The sum of the newest record's number over the lanes: how far it came.
    pub progress: u64,
}

impl Verdict {
    /// Whether the copy could be of one instant.
    pub fn is_consistent(&self) -> bool {
        self.torn == 0 && self.out_of_order == 0 && self.missing == 0
    }
}

/// The name of file `index`.
pub fn file(dir: &Path, index: usize) -> PathBuf {
    dir.join(format!("f{index:04}"))
}

/// Checks the copy in `dir`.
pub fn check(dir: &Path, shape: Shape) -> Verdict {
    let mut verdict = Verdict::default();
    let mut first = vec![0; shape.lanes];
    let mut last: Vec<Option<u64>> = vec![None; shape.lanes];
    let mut disordered = vec![false; shape.lanes];
    for index in 0..shape.files {
        let bytes = fs::read(file(dir, index)).unwrap_or_default();
        if bytes.len() != shape.lanes * shape.record {
            verdict.missing += 1;
            continue;
        }
        for (lane, record) in bytes.chunks_exact(shape.record).enumerate() {
            let Some(number) = number(record, lane, index) else {
                verdict.torn += 1;
                continue;
            };
            if index == 0 {
                first[lane] = number;
                verdict.progress += number;
            }
            if last[lane].is_some_and(|before| number > before) || first[lane] > number + 1 {
                disordered[lane] = true;
            }
            last[lane] = Some(number);
        }
    }
    verdict.out_of_order = disordered.iter().filter(|d| **d).count();
    verdict
}

/// The number of a record, or `None` if it is not whole. 0: never written.
fn number(record: &[u8], lane: usize, file: usize) -> Option<u64> {
    let words: Vec<u64> = record
        .chunks_exact(8)
        .map(|w| u64::from_le_bytes(w.try_into().expect("eight bytes")))
        .collect();
    let (sum, body) = words.split_last()?;
    let k = *body.first()?;
    if k == 0 {
        return words.iter().all(|w| *w == 0).then_some(0);
    }
    let base = k.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let whole = body[1] == lane as u64
        && body[2] == file as u64
        && body[3..]
            .iter()
            .enumerate()
            .all(|(i, w)| *w == base.wrapping_add(i as u64))
        && *sum == body.iter().fold(0u64, |a, w| a.wrapping_add(*w));
    whole.then_some(k)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: Shape = Shape {
        files: 3,
        lanes: 2,
        record: 64,
    };

    fn record(k: u64, lane: usize, file: usize) -> Vec<u8> {
        let mut words = vec![k, lane as u64, file as u64];
        let base = k.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        words.extend((0..4).map(|i| base.wrapping_add(i)));
        words.push(words.iter().fold(0, |a: u64, w| a.wrapping_add(*w)));
        words.iter().flat_map(|w| w.to_le_bytes()).collect()
    }

    fn verdict(name: &str, counters: [[u64; 3]; 2], damage: impl Fn(&Path)) -> Verdict {
        let dir = std::env::temp_dir().join(format!("records-{name}-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        for index in 0..3 {
            let lanes = counters.iter().enumerate();
            let bytes: Vec<u8> = lanes
                .flat_map(|(lane, k)| match k[index] {
                    0 => vec![0; 64],
                    k => record(k, lane, index),
                })
                .collect();
            fs::write(file(&dir, index), bytes).unwrap();
        }
        damage(&dir);
        let verdict = check(&dir, SHAPE);
        fs::remove_dir_all(&dir).unwrap();
        verdict
    }

    #[test]
    fn one_instant_passes() {
        let v = verdict("good", [[8, 8, 7], [1, 0, 0]], |_| ());
        assert!(v.is_consistent(), "{v:?}");
        assert_eq!(v.progress, 9);
    }

    #[test]
    fn a_file_ahead_of_an_earlier_one_is_out_of_order() {
        let v = verdict("ahead", [[7, 8, 8], [5, 5, 5]], |_| ());
        assert_eq!(v.out_of_order, 1);
    }

    #[test]
    fn two_records_apart_is_out_of_order() {
        let v = verdict("apart", [[9, 8, 7], [9, 9, 7]], |_| ());
        assert_eq!(v.out_of_order, 2);
    }

    #[test]
    fn a_mixed_record_is_torn_and_a_lost_file_missing() {
        let v = verdict("torn", [[8, 8, 8], [1, 1, 1]], |dir| {
            let mut bytes = fs::read(file(dir, 1)).unwrap();
            bytes[40..64].copy_from_slice(&record(9, 0, 1)[40..]);
            fs::write(file(dir, 1), bytes).unwrap();
            fs::remove_file(file(dir, 2)).unwrap();
        });
        assert_eq!((v.torn, v.missing), (1, 1));
    }
}
