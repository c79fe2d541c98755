use loom::thread;
use std::sync::Arc;

use crate::Scenario;
use crate::memory::*;
use crate::world::*;

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario { name: "one_writer", preemptions: 3, cases: 1, body: |_| one_writer(), witnesses: &[] },
    Scenario { name: "signals", preemptions: 2, cases: 3 * 30, body: signals, witnesses: &[] },
    Scenario { name: "tables", preemptions: 3, cases: 1, body: |_| tables(), witnesses: &[] },
];

fn ordered(snapshot: &[u32]) {
    let [a, b] = *snapshot else { unreachable!() };
    assert!(b <= a && a <= b + 1, "out of order");
    if a > b { note("cut between A and B"); }
}

fn one_writer() {
    let set = Set::new(1, [File::plain(), File::plain()]);
    let writer = Writer::new(&set, 0, Patience::Endless);
    let w = thread::spawn(move || {
        for k in 1..=2 {
            writer.call(A, k);
            writer.call(B, k);
        }
    });
    if let Some(s) = checkpoint(&set, &[A, B], Drain::Endless) { ordered(&s) }
    w.join().unwrap();
    assert_quiet(&set);
}

fn signals(case: usize) {
    let (kind, after) = (case / 30, case % 30);
    let set = Set::new(1, [File::plain(), File::plain(), File::plain()]);
    let writer = Writer::new(&set, 0, Patience::Endless);
    let handler = writer.clone();
    let w = thread::spawn(move || {
        signal_after(after, move || { note("signal"); handler.call(B, 1) });
        if kind == 2 { writer.call(C, 1); }
        writer.call(A, 1);
        if cancel_signal() { note("no signal") }
    });
    let members: &[usize] = if kind == 0 { &[B] } else { &[A, B] };
    checkpoint(&set, members, Drain::Looks(2));
    w.join().unwrap();
    assert_quiet(&set);
}

fn tables() {
    let set = Set::new(1, [File::plain(), File::plain()]);
    let writer = Writer::new(&set, 0, Patience::Endless);
    let w = thread::spawn(move || {
        writer.call(A, 1);
        note("done");
    });
    checkpoint(&set, &[B], Drain::Endless);
    checkpoint(&set, &[A, B], Drain::Endless);
    w.join().unwrap();
    assert_quiet(&set);
}
