//! Work on very many things, each of which takes some µs, by several threads.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::thread::Builder;

use crate::interrupt;

/// Fewer than this are done by the thread that is there: to begin one takes as long as some ten of them.
const FEW: usize = 256;
/// Most threads.
const MOST: usize = 4;
/// Each takes so many parts, if they are equal: one that gets its processor late leaves the others more. No part is
/// small, for what is next to each other may be in one directory, where they would wait for each other.
const PARTS: usize = 8;

/// Does the work on each of `all`, with a `state` for each thread; what it brings, in their order.
pub(super) fn in_parts<T: Sync, S: Send, R: Send>(
    all: &[T],
    mut state: impl FnMut() -> S,
    work: impl Fn(&mut S, &T) -> R + Sync,
) -> Vec<R> {
    let threads = match all.len() {
        ..FEW => 1,
        _ => threads(),
    };
    if threads == 1 {
        let mut its = state();
        return all.iter().map(|one| work(&mut its, one)).collect();
    }
    let next = AtomicUsize::new(0);
    let size = all.len().div_ceil(threads * PARTS).max(FEW / 2);
    let take_parts = |mut its: S| {
        let mut done = Vec::new();
        loop {
            let number = next.fetch_add(1, Relaxed);
            let Some(part) = all.chunks(size).nth(number) else {
                return done;
            };
            let part: Vec<R> = part.iter().map(|one| work(&mut its, one)).collect();
            done.push((number, part));
        }
    };
    let mut done = std::thread::scope(|scope| {
        let begin = |its| {
            Builder::new().spawn_scoped(scope, move || {
                interrupt::leave_to_others();
                take_parts(its)
            })
        };
        // Who cannot be begun takes no part.
        let others: Vec<_> = (1..threads).flat_map(|_| begin(state())).collect();
        let mut done = take_parts(state());
        for other in others {
            match other.join() {
                Ok(more) => done.extend(more),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        done
    });
    done.sort_unstable_by_key(|(number, _)| *number);
    done.into_iter().flat_map(|(_, part)| part).collect()
}

/// How many there are to be. Asked for once: that reads some files.
fn threads() -> usize {
    static THREADS: OnceLock<usize> = OnceLock::new();
    let ask = || std::thread::available_parallelism().map_or(1, |n| n.get().min(MOST));
    *THREADS.get_or_init(ask)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_it_brings_is_in_order() {
        for count in [0, 1, FEW - 1, FEW, 1_000, 1_001] {
            let all: Vec<usize> = (0..count).collect();
            let done = in_parts(&all, || 1, |one, n| n + *one);
            assert_eq!(done, (1..=count).collect::<Vec<_>>());
        }
    }
}
