//! What is played, and what must hold in every execution of it.

use std::rc::Rc;

use loom::model::Builder;
use loom::sync::atomic::AtomicU32;
use loom::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use loom::thread;
use snapshim_gate::hold;
use snapshim_gate::memory::Cell;
use snapshim_gate::reap::{Claimed, reap};
use snapshim_gate::slot::Owner;

use crate::memory::{Modelled, cancel_signal, signal_after};
use crate::set::{A, B, C, Drain, File, Patience, Set, Writer, note};

pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    /// Most times that a thread is made to stop where it could go on.
    pub(crate) preemptions: usize,
    /// Threads and calls, for the reader.
    pub(crate) size: &'static str,
    /// The scenario is played once for each number below this.
    pub(crate) cases: usize,
    pub(crate) play: fn(usize),
    /// What must happen in some execution: nothing passes because nothing happens.
    pub(crate) happens: &'static [&'static str],
}

impl Scenario {
    /// The bound in force: `LOOM_MAX_PREEMPTIONS`, or else its own.
    pub(crate) fn builder(&self) -> Builder {
        let mut builder = Builder::new();
        builder.preemption_bound.get_or_insert(self.preemptions);
        builder
    }
}

fn guarded<const N: usize>() -> [File; N] {
    std::array::from_fn(|_| File::guarded())
}

fn exposed<const N: usize>() -> [File; N] {
    std::array::from_fn(|_| File::exposed())
}

/// A and B of a writer that always writes A first.
fn assert_in_order(records: &[u32]) {
    let [a, b] = *records else {
        panic!("two files")
    };
    assert!(b <= a && a <= b + 1, "A at {a}, B at {b}");
    if a > b {
        note("cut between A and B");
    }
}

pub(crate) const ONE_WRITER: Scenario = Scenario {
    name: "one writer",
    preemptions: 4,
    size: "2 threads; 4 calls, 1 hold",
    cases: 1,
    play: |_| {
        let set = Set::new(1, guarded::<2>());
        let writer = Writer::new(&set, 0, Patience::Endless);
        let writing = thread::spawn(move || {
            for k in 1..=2 {
                writer.call(A, k);
                writer.call(B, k);
            }
        });
        let records = set
            .checkpoint(&[A, B], Drain::Endless)
            .expect("nobody breaks the hold");
        assert_in_order(&records);
        writing.join().unwrap();
        set.assert_quiet();
    },
    happens: &["published", "cut between A and B", "slept"],
};

/// The order of two writers' calls is as good as that of one's.
pub(crate) const TWO_WRITERS: Scenario = Scenario {
    name: "two writers",
    preemptions: 2,
    size: "3 threads; 2 calls each, 1 hold",
    cases: 1,
    play: |_| {
        let set = Set::new(2, guarded::<2>());
        let progress = Rc::new(AtomicU32::new(0));
        let (first, told) = (Writer::new(&set, 0, Patience::Endless), progress.clone());
        let leader = thread::spawn(move || {
            for k in 1..=2 {
                first.call(A, k);
                told.store(k, Release);
            }
        });
        let second = Writer::new(&set, 1, Patience::Endless);
        let follower = thread::spawn(move || {
            for _ in 0..2 {
                match progress.load(Acquire) {
                    0 => {}
                    k => second.call(B, k),
                }
            }
        });
        let records = set
            .checkpoint(&[A, B], Drain::Endless)
            .expect("nobody breaks the hold");
        assert!(records[B] <= records[A], "B ahead of A");
        note(if records[B] > 0 {
            "cut after B"
        } else {
            "cut before B"
        });
        leader.join().unwrap();
        follower.join().unwrap();
        set.assert_quiet();
    },
    happens: &["published", "cut after B", "cut before B", "slept"],
};

/// Nobody sleeps for ever: not at a gate the coordinator opens, not without a slot,
/// not in a hold that another call breaks.
pub(crate) const SLEEPERS: Scenario = Scenario {
    name: "sleepers",
    preemptions: 2,
    size: "3 threads; 1 call each, 2 holds",
    cases: 3,
    play: |case| {
        let set = Set::new(2, exposed::<2>());
        let writers = [A, B].map(|file| {
            let patience = match (case, file) {
                (2, A) => Patience::None,
                _ => Patience::Endless,
            };
            let writer = Writer::new(&set, file, patience);
            thread::spawn(move || match (case, file) {
                (1, B) => writer.pass_without_slot(B),
                _ => writer.call(file, 1),
            })
        });
        for _ in 0..2 {
            set.checkpoint(&[A, B], Drain::Endless);
        }
        for writer in writers {
            writer.join().unwrap();
        }
        set.assert_quiet();
    },
    happens: &["published", "slept", "broken"],
};

/// A call that waited in vain ends that hold, and no other; what was captured
/// under a broken hold is not published.
pub(crate) const BROKEN_HOLDS: Scenario = Scenario {
    name: "broken holds",
    preemptions: 3,
    size: "2 threads; 2 calls, 2 holds",
    cases: 1,
    play: |_| {
        let set = Set::new(1, exposed::<2>());
        let writer = Writer::new(&set, 0, Patience::None);
        let writing = thread::spawn(move || {
            writer.call(A, 1);
            writer.call(B, 1);
        });
        for _ in 0..2 {
            if let Some(records) = set.checkpoint(&[A, B], Drain::Endless) {
                assert_in_order(&records);
            }
        }
        writing.join().unwrap();
        set.assert_quiet();
    },
    happens: &["published", "broken", "cut between A and B"],
};

/// What is captured after the cut is as it was at the cut: A is never behind B, and a call
/// that changes something waits until that is captured.
pub(crate) const GUARDED: Scenario = Scenario {
    name: "guarded",
    preemptions: 3,
    size: "2 threads; 4 calls, 1 guarded cut",
    cases: 1,
    play: |_| {
        let set = Set::new(1, guarded::<2>());
        let writer = Writer::new(&set, 0, Patience::Endless);
        let writing = thread::spawn(move || {
            for k in 1..=2 {
                writer.call(A, k);
                writer.call(B, k);
            }
        });
        let records = set.checkpoint_guarded(&[B, A]).expect("nobody breaks it");
        assert_in_order(&[records[1], records[0]]);
        writing.join().unwrap();
        set.assert_quiet();
    },
    happens: &[
        "published",
        "cut between A and B",
        "asked for a chunk",
        "found its chunk captured",
        "slept for a chunk",
    ],
};

/// Of two cuts, the later has from the earlier one what was not marked meanwhile.
pub(crate) const MARKED: Scenario = Scenario {
    name: "marked",
    preemptions: 2,
    size: "2 threads; 3 calls, 2 guarded cuts",
    cases: 1,
    play: |_| {
        let set = Set::new(1, guarded::<2>());
        let writer = Writer::new(&set, 0, Patience::Endless);
        let writing = thread::spawn(move || {
            writer.call(A, 1);
            writer.call(B, 1);
            writer.call(A, 2);
        });
        let base = set.checkpoint_marked(&[B, A], None);
        assert_in_order(&[base.1[1], base.1[0]]);
        let (_, records) = set.checkpoint_marked(&[B, A], Some(base));
        assert_in_order(&[records[1], records[0]]);
        writing.join().unwrap();
        set.assert_quiet();
    },
    happens: &[
        "cut between A and B",
        "asked for a chunk",
        "found its chunk captured",
        "taken from the base",
        "marked since the base",
    ],
};

/// A call that waited for a chunk in vain ends that guard, and what was captured under it is
/// not published.
pub(crate) const BROKEN_GUARDS: Scenario = Scenario {
    name: "broken guards",
    preemptions: 2,
    size: "2 threads; 2 calls, 2 guarded cuts",
    cases: 1,
    play: |_| {
        let set = Set::new(1, exposed::<2>());
        let writer = Writer::new(&set, 0, Patience::None);
        let writing = thread::spawn(move || {
            writer.call(A, 1);
            writer.call(B, 1);
        });
        for _ in 0..2 {
            if let Some(records) = set.checkpoint_guarded(&[B, A]) {
                assert_in_order(&[records[1], records[0]]);
            }
        }
        writing.join().unwrap();
        set.assert_quiet();
    },
    happens: &["published", "broken guard"],
};

/// A thread that is killed in a call stays counted until somebody frees its slot.
pub(crate) const DEAD_WRITER: Scenario = Scenario {
    name: "dead writer",
    preemptions: 4,
    size: "3 threads; 1 call, 1 hold",
    cases: 1,
    play: |_| {
        let set = Set::new(1, guarded::<1>());
        assert!(set.slots[0].claim(OWNER, DEAD, 0));
        let claimed = Claimed::read(&set.slots[0]).expect("just claimed");
        let dead = Writer::new(&set, 0, Patience::Endless);
        let reaping = set.clone();
        let reaper = thread::spawn(move || {
            let dying = thread::spawn(move || dead.call_and_die(A, 1));
            dying.join().unwrap();
            assert!(reap(&reaping.slots[0], claimed));
        });
        let records = set
            .checkpoint(&[A], Drain::Endless)
            .expect("nobody breaks the hold");
        note(if records[A] == 0 {
            "cut before its call"
        } else {
            "cut after its call"
        });
        reaper.join().unwrap();
        set.assert_quiet();
    },
    happens: &[
        "published",
        "cut before its call",
        "cut after its call",
        "slept",
    ],
};

const OWNER: Owner = Owner {
    pid: 7,
    tid: 7,
    pidns: 1,
};
/// Start times of two processes of the same ids.
const DEAD: u64 = 10;
const LIVE: u64 = 20;

/// A dead thread left its slot counted, and its ids are given to a new one, which
/// takes the slot, while the coordinator and a third process are about to free it.
pub(crate) const REUSED_IDS: Scenario = Scenario {
    name: "reused ids",
    preemptions: 3,
    size: "3 threads; 2 calls, 1 hold",
    cases: 2,
    play: |case| {
        let set = Set::new(2, guarded::<2>());
        let dead = Writer::new(&set, 0, Patience::Endless);
        assert!(set.slots[0].claim(OWNER, DEAD, 0));
        dead.enter(A);
        let claimed = Claimed::read(&set.slots[0]).expect("just claimed");
        let reap_dead = move |set: &Set| reap(&set.slots[0], claimed);
        // A process with a reused id started later; a thread of the same process
        // with a reused id, or an exec, has the same start time.
        let born = [LIVE, DEAD][case];
        let (here, there) = (set.clone(), set.clone());
        let reborn = thread::spawn(move || {
            reap_dead(&here);
            let claimed = here
                .slots
                .iter()
                .position(|slot| slot.claim(OWNER, born, 0));
            let slot = claimed.expect("two slots");
            note(["took the same slot", "took another slot"][slot]);
            let writer = Writer::new(&here, slot, Patience::Endless);
            writer.call(A, 1);
            writer.call(B, 1);
            slot
        });
        let neighbour = thread::spawn(move || {
            reap_dead(&there);
        });
        reap_dead(&set);
        let records = set
            .checkpoint(&[A, B], Drain::Endless)
            .expect("nobody breaks the hold");
        assert_in_order(&records);
        let slot = reborn.join().unwrap();
        neighbour.join().unwrap();
        let owner = set.slots[slot].owner.load(Relaxed);
        assert_eq!(Owner::unpack(owner), Some(OWNER), "lost its slot");
        set.assert_quiet();
    },
    happens: &[
        "published",
        "took the same slot",
        "took another slot",
        "cut between A and B",
    ],
};

/// A signal handler's call in a call. It passes a shut gate if the drain waits
/// for the outer call, or else the drain would wait for both for ever.
pub(crate) const NESTED_CALL: Scenario = Scenario {
    name: "nested call",
    preemptions: 3,
    size: "2 threads; 2 or 3 calls, 1 hold",
    cases: 5,
    play: |case| {
        let set = Set::new(1, guarded::<3>());
        let writer = Writer::new(&set, 0, Patience::Endless);
        // The drain waits for an outer call on no member as well, unless that came
        // after the close, and so for a nested one that waits. Who would tell the
        // coordinator is not in the model, so it gives the hold up.
        let drain = match case {
            0 | 1 => Drain::Endless,
            _ => Drain::Looks(2),
        };
        let writing = thread::spawn(move || match case {
            0 => writer.call_and(A, 1, || {
                writer.call(B, 1);
                writer.call(B, 2);
            }),
            1 => {
                writer.signal_while_asking(B);
                writer.call(A, 1);
            }
            2 => writer.call_and(C, 1, || writer.call(B, 1)),
            3 => writer.call_and(C, 1, || writer.replaced().call(B, 1)),
            // The call between is what the drain has to wait for.
            _ => writer.call_and(C, 1, || {
                writer.call_and(A, 1, || writer.call(C, 1));
            }),
        });
        set.checkpoint(&[A, B], drain);
        writing.join().unwrap();
        set.assert_quiet();
    },
    happens: &[
        "published",
        "given up",
        "slept",
        "outer call is on a member",
        "outer call is on no member",
        "signal while asking",
    ],
};

/// A signal handler's call between any two steps of another call's way.
pub(crate) const SIGNAL_ANYWHERE: Scenario = Scenario {
    name: "signal anywhere",
    preemptions: 2,
    size: "2 threads; 2 or 3 calls, 1 hold",
    cases: 3 * STEPS,
    play: |case| {
        let (kind, step) = (case / STEPS, case % STEPS);
        let set = Set::new(1, guarded::<3>());
        let writer = Writer::new(&set, 0, Patience::Endless);
        let handler = writer.clone();
        let writing = thread::spawn(move || {
            let (earlier, file) = [(None, A), (None, C), (Some(C), A)][kind];
            if let Some(earlier) = earlier {
                writer.call(earlier, 1);
            }
            signal_after(step, move || {
                note("signal");
                handler.call(B, 1);
            });
            writer.call(file, 1);
            let is_late = cancel_signal();
            assert!(is_late || step < STEPS - 1, "there are more steps");
        });
        // In the few steps between its count and its look, a call can neither know
        // whether the drain waits for it nor let a handler's call know: that waits,
        // and the drain for both. It is given up, at the bound.
        set.checkpoint(&[A, B], Drain::Looks(2));
        writing.join().unwrap();
        set.assert_quiet();
    },
    happens: &["published", "given up", "slept", "signal"],
};
/// More than any call takes.
const STEPS: usize = 30;

/// A child forked in a call returns from it as well.
pub(crate) const FORK: Scenario = Scenario {
    name: "fork",
    preemptions: 5,
    size: "3 threads; 1 call, left twice, 1 hold",
    cases: 1,
    play: |_| {
        let set = Set::new(1, guarded::<1>());
        let parent = Writer::new(&set, 0, Patience::Endless);
        let writing = thread::spawn(move || {
            let child = parent.clone();
            let frame = parent.enter(A);
            let forked = thread::spawn(move || child.leave_in_child(frame));
            parent.write_and_leave(A, 1, frame);
            forked.join().unwrap();
        });
        set.checkpoint(&[A], Drain::Endless)
            .expect("nobody breaks the hold");
        writing.join().unwrap();
        set.assert_quiet();
    },
    happens: &["published", "slept"],
};

/// A file that one hold does not shut, and the next does.
pub(crate) const OTHER_MEMBERS: Scenario = Scenario {
    name: "other members",
    preemptions: 3,
    size: "2 threads; 1 or 2 calls, 1 to 3 holds",
    cases: 4,
    play: |case| {
        let holds: &[&[usize]] = match case {
            0 => &[&[B], &[A, B]],
            // The third hold's table takes the place of the first one's.
            1 => &[&[B], &[A], &[A, B]],
            2 => &[&[A], &[B], &[A, B]],
            _ => &[&[A]],
        };
        let set = Set::new(1, guarded::<2>());
        let writer = Writer::new(&set, 0, Patience::Endless);
        let writing = thread::spawn(move || {
            writer.call(A, 1);
            if case == 3 {
                writer.call(B, 1);
            }
        });
        for members in holds {
            set.checkpoint(members, Drain::Endless)
                .expect("nobody breaks the hold");
        }
        writing.join().unwrap();
        set.assert_quiet();
    },
    happens: &[
        "published",
        "slept",
        "found its file shut",
        "found its file not shut",
    ],
};

/// A call left by siglongjmp stays counted until the thread's next call.
pub(crate) const JUMP: Scenario = Scenario {
    name: "jump",
    preemptions: 4,
    size: "2 threads; 4 calls, 1 hold",
    cases: 1,
    play: |_| {
        let set = Set::new(1, guarded::<2>());
        let writer = Writer::new(&set, 0, Patience::Endless);
        let writing = thread::spawn(move || {
            let left = writer.enter(A);
            writer.jumped().call_and(A, 1, || {
                // Should the old call return after all, it undoes nobody's count.
                writer.leave(left);
                // The new one is as good an outer call as any.
                writer.call(B, 1);
            });
            writer.call(A, 2);
        });
        let records = set
            .checkpoint(&[A, B], Drain::Endless)
            .expect("nobody breaks the hold");
        assert_in_order(&records);
        writing.join().unwrap();
        set.assert_quiet();
    },
    happens: &["published", "slept", "cut between A and B"],
};

/// A coordinator dies in a hold; the next one opens the gate and makes its own hold.
pub(crate) const DEAD_COORDINATOR: Scenario = Scenario {
    name: "dead coordinator",
    preemptions: 3,
    size: "2 threads; 2 calls, 2 holds",
    cases: 3,
    play: |case| {
        let (set, patience) = match case {
            0 | 1 => (Set::new(1, guarded::<2>()), Patience::Endless),
            _ => (Set::new(1, exposed::<2>()), Patience::None),
        };
        let writer = Writer::new(&set, 0, patience);
        let writing = thread::spawn(move || {
            writer.call(A, 1);
            writer.call(B, 1);
        });
        set.close(&[A, B]);
        let recovered = hold::recover::<Modelled>(&set.word, |_| set.wake());
        note(if recovered { "recovered" } else { "found open" });
        // Without a hold of its own: its opening would wake everybody once more.
        if case > 0
            && let Some(records) = set.checkpoint(&[A, B], Drain::Endless)
        {
            assert_in_order(&records);
        }
        writing.join().unwrap();
        set.assert_quiet();
    },
    happens: &[
        "published",
        "slept",
        "recovered",
        "found open",
        "cut between A and B",
    ],
};
