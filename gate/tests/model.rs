//! Model checks.

#[path = "model/memory.rs"]
mod memory;
#[path = "model/scenarios.rs"]
mod scenarios;
#[path = "model/world.rs"]
mod world;

use std::collections::BTreeMap;
use std::time::Instant;
use std::panic::{AssertUnwindSafe, catch_unwind};

use snapshim_gate::Mutation;
use memory::{Fences, set_up};
use scenarios::*;

fn explore(s: &Scenario, fences: Fences, mutation: Option<Mutation>) -> Result<BTreeMap<&'static str, u64>, String> {
    let (preemptions, cases, body) = (s.preemptions, s.cases, s.play);
    std::thread::spawn(move || {
        set_up(fences, mutation);
        for case in 0..cases {
            let mut builder = loom::model::Builder::new();
            builder.preemption_bound = builder.preemption_bound.or(Some(preemptions));
            builder.max_branches = 2000;
            let r = catch_unwind(AssertUnwindSafe(|| builder.check(move || { world::note("executions"); body(case) })));
            if let Err(e) = r {
                let why = e.downcast_ref::<String>().cloned().or(e.downcast_ref::<&str>().map(|s| s.to_string())).unwrap_or("?".into());
                return Err(format!("case {case} [{:?}]: {why}", world::take_events()));
            }
        }
        Ok(world::take_events())
    }).join().unwrap()
}

#[test]
fn all() {
    let only = std::env::var("ONLY").unwrap_or_default();
    let bound: Option<usize> = std::env::var("BOUND").ok().map(|b| b.parse().unwrap());
    for s in [&ONE_WRITER,&TWO_WRITERS,&SLEEPERS,&BROKEN_HOLDS,&REUSED_IDS,&NESTED_CALL,&SIGNAL_ANYWHERE,&FORK,&OTHER_MEMBERS,&JUMP,&DEAD_COORDINATOR] {
        if !s.name.contains(&only) { continue }
        for fences in [Fences::Before, Fences::After] {
            let t = Instant::now();
            let s = Scenario { preemptions: bound.unwrap_or(s.preemptions), ..*s };
            let r = explore(&s, fences, None);
            eprintln!("{:20} {:?} bound {} {:?} {:.1?}", s.name, fences, s.preemptions, r, t.elapsed());
        }
    }
}
