//! Model checks of the gate protocol: loom plays every interleaving, within the
//! bounds below, of the very code the shim and the coordinator run, over a memory
//! that reorders as the language allows. Then each [`Mutation`] breaks the protocol
//! in one place, and a scenario has to notice.
//!
//! Bounds. Each [`Scenario`] says its threads, calls and holds. Its executions
//! include at most so many preemptions (a thread made to stop where it could go
//! on), any number of switches at waits, and all values a load may see.
//! `LOOM_MAX_PREEMPTIONS=n` sets another bound for all; each step costs about
//! eight times as much. Every scenario is played under both ways to build
//! sequentially consistent accesses (see [`Fences`]).
//!
//! Not in the model: stores that take effect before earlier loads (loom has none),
//! what a file is (a member table is a word of bits), time (a call waits for ever or
//! not at all), what `/proc` tells of calls in flight, two signals within one entry,
//! and words and generations that wrap.
//!
//! `cargo test -p snapshim-gate --test model -- --nocapture` prints what was played.

#[path = "model/memory.rs"]
mod memory;
#[path = "model/scenarios.rs"]
mod scenarios;
#[path = "model/set.rs"]
mod set;

use std::any::Any;
use std::cell::Cell;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Once;
use std::thread;
use std::time::Instant;

use memory::Fences;
use scenarios::*;
use set::Events;
use snapshim_gate::Mutation;

/// Plays all cases of a scenario; what happened, or why it failed.
fn explore(
    scenario: &Scenario,
    fences: Fences,
    mutation: Option<Mutation>,
) -> Result<Events, String> {
    silence_expected_panics();
    let (builder, cases, play) = (scenario.builder(), scenario.cases, scenario.play);
    // A thread of its own: nothing is left over from a model that failed.
    let explorer = thread::spawn(move || {
        EXPECTED.set(mutation.is_some());
        memory::set_up(fences, mutation);
        for case in 0..cases {
            let explored = panic::catch_unwind(AssertUnwindSafe(|| {
                builder.check(move || {
                    set::note("executions");
                    play(case);
                });
            }));
            if let Err(cause) = explored {
                return Err(format!("case {case}: {}", message(&*cause)));
            }
        }
        Ok(set::take_events())
    });
    explorer.join().expect("panics are caught")
}

fn message(cause: &(dyn Any + Send)) -> &str {
    let owned = cause.downcast_ref::<String>().map(String::as_str);
    let text = owned.or_else(|| cause.downcast_ref::<&str>().copied());
    text.and_then(|text| text.lines().next()).unwrap_or("?")
}

thread_local! {
    static EXPECTED: Cell<bool> = const { Cell::new(false) };
}

fn silence_expected_panics() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let report = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !EXPECTED.get() {
                report(info);
            }
        }));
    });
}

fn holds(scenario: &Scenario) {
    let Scenario { name, size, .. } = scenario;
    let preemptions = scenario.builder().preemption_bound.expect("it has a bound");
    for fences in [Fences::Before, Fences::After] {
        let start = Instant::now();
        let events = explore(scenario, fences, None)
            .unwrap_or_else(|cause| panic!("{name}, fences {fences:?}: {cause}"));
        println!(
            "{name}: {size}; {preemptions} preemptions; fences {fences:?}; {:.1?}; {events:?}",
            start.elapsed()
        );
        for event in scenario.happens {
            assert!(
                events.contains_key(event),
                "{name}: never happened: {event}"
            );
        }
    }
}

macro_rules! scenarios {
    ($($test:ident: $scenario:ident),* $(,)?) => {
        $(#[test]
        fn $test() {
            holds(&$scenario);
        })*
    };
}
scenarios! {
    one_writer: ONE_WRITER,
    two_writers: TWO_WRITERS,
    sleepers: SLEEPERS,
    broken_holds: BROKEN_HOLDS,
    dead_coordinator: DEAD_COORDINATOR,
    dead_writer: DEAD_WRITER,
    reused_ids: REUSED_IDS,
    nested_call: NESTED_CALL,
    signal_anywhere: SIGNAL_ANYWHERE,
    fork: FORK,
    jump: JUMP,
    other_members: OTHER_MEMBERS,
    guarded_cut: GUARDED,
    broken_guards: BROKEN_GUARDS,
    marked: MARKED,
}

macro_rules! mutations {
    ($($mutation:ident: $scenario:ident),* $(,)?) => {
        /// Every mutation, and a scenario that fails under it.
        const MUTATIONS: &[(Mutation, &Scenario)] =
            &[$((Mutation::$mutation, &$scenario)),*];

        /// Does not compile unless every mutation is listed.
        const fn _all_are_listed(mutation: Mutation) {
            match mutation {
                $(Mutation::$mutation => (),)*
            }
        }
    };
}
mutations! {
    EnterWithoutFence: ONE_WRITER,
    LookBeforeCount: ONE_WRITER,
    LeaveRelaxed: ONE_WRITER,
    CloseWithoutFence: ONE_WRITER,
    DrainRelaxed: ONE_WRITER,
    DrainAcquire: ONE_WRITER,
    CutWithoutDrain: ONE_WRITER,
    OpenWithoutCompare: BROKEN_HOLDS,
    BreakWithoutCompare: BROKEN_HOLDS,
    OpenWithoutWake: SLEEPERS,
    ReapWithoutSecondLook: REUSED_IDS,
    ReapBeforeTaking: REUSED_IDS,
    ReapRelaxed: DEAD_WRITER,
    NestedAlwaysPasses: NESTED_CALL,
    NestedInUnpassed: SIGNAL_ANYWHERE,
    AsideForEver: OTHER_MEMBERS,
    TableWithoutRecheck: OTHER_MEMBERS,
    LeaveWithoutGeneration: FORK,
    GuardedAsOpen: GUARDED,
    MarkRelaxed: GUARDED,
    UnguardWithoutCompare: BROKEN_GUARDS,
    MarkNothing: MARKED,
}

#[test]
fn every_mutation_is_caught() {
    let mut missed = Vec::new();
    for &(mutation, scenario) in MUTATIONS {
        let caught = [Fences::Before, Fences::After].into_iter().find_map(|f| {
            explore(scenario, f, Some(mutation))
                .err()
                .map(|cause| (f, cause))
        });
        match caught {
            Some((fences, cause)) => {
                println!(
                    "{mutation:?} → {}, fences {fences:?}, {cause}",
                    scenario.name
                );
            }
            None => missed.push((mutation, scenario.name)),
        }
    }
    assert!(missed.is_empty(), "not caught: {missed:?}");
}
