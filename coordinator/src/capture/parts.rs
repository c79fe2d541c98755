//! Work on very many things, each of which takes some µs, by several threads.

use std::thread::{Builder, ScopedJoinHandle};

/// Fewer than this are done by the thread that is there: to begin one takes as long as some ten of them.
const FEW: usize = 256;
/// Most threads.
const MOST: usize = 4;

/// Does the work in parts of `all`, each with a `state` of its own; what it brings, in their order.
pub(super) fn in_parts<T: Sync, S: Send, R: Send>(
    all: &[T],
    mut state: impl FnMut() -> S,
    work: impl Fn(S, &[T]) -> Vec<R> + Sync,
) -> Vec<R> {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get().min(MOST));
    if all.len() < FEW || threads == 1 {
        return work(state(), all);
    }
    let work = &work;
    let mut parts = all.chunks(all.len().div_ceil(threads));
    std::thread::scope(|scope| {
        let first = parts.next().unwrap_or_default();
        let mut begin = |part| {
            let its = state();
            let begun = Builder::new().spawn_scoped(scope, move || work(its, part));
            (part, begun)
        };
        let begun: Vec<_> = parts.map(&mut begin).collect();
        let mut done = work(state(), first);
        for (part, thread) in begun {
            match thread.map(ScopedJoinHandle::join) {
                Ok(Ok(more)) => done.extend(more),
                // Without a thread, here.
                Ok(Err(_)) | Err(_) => done.extend(work(state(), part)),
            }
        }
        done
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_it_brings_is_in_order() {
        for count in [0, 1, FEW - 1, FEW, 1_000, 1_001] {
            let all: Vec<usize> = (0..count).collect();
            let done = in_parts(
                &all,
                || 1,
                |one, part| part.iter().map(|n| n + one).collect(),
            );
            assert_eq!(done, (1..=count).collect::<Vec<_>>());
        }
    }
}
