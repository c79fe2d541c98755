//! Who waits for whom when there are fewer processors than threads: the program for us only
//! where it has to.
//!
//! Linux lets a thread run for its slice (some 3 ms, and up to the next tick) before one that
//! wakes up gets the processor, unless the slice of that one is shorter and it was not given more
//! than its share (EEVDF's PREEMPT_SHORT and eligibility, since 6.12, kernel/sched/fair.c). A capture
//! that takes its slices makes the program's calls late by one. So what nobody waits for has a
//! long slice here, and a small share; what a program may wait for has a short slice, and a large
//! share where that is allowed. Kernels without slices have the shares.

use std::sync::OnceLock;

use nix::libc;
use rustix::process::{Resource, getrlimit};
use rustix::thread::{CapabilitySet, capabilities};

/// How soon a thread is to run when it can.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Urgency {
    /// Everybody who wakes up goes first, and while all processors are busy this gets a tenth of
    /// one.
    Yielding,
    /// As it was: for commands that are started. Threads and processes begin as who starts them.
    Usual,
    /// As it was, but soon.
    Prompt,
    /// A program waits for it.
    Awaited,
}

impl Urgency {
    /// The slice, ns: the longest and the shortest that there are (`__setparam_fair`,
    /// kernel/sched/syscalls.c).
    fn slice(self, usual: u64) -> u64 {
        match self {
            Urgency::Yielding => 100_000_000,
            Urgency::Usual => usual,
            Urgency::Prompt | Urgency::Awaited => 100_000,
        }
    }

    fn nice(self, usual: i32) -> i32 {
        match self {
            Urgency::Yielding => usual.max(10),
            Urgency::Usual | Urgency::Prompt => usual,
            Urgency::Awaited => usual.min(-10),
        }
    }
}

/// `struct sched_attr`, sched_setattr(2), of its first version.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Attributes {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

const SIZE: u32 = size_of::<Attributes>() as u32;

/// Of this thread, which was started for this work, from now on. A policy that somebody chose for us
/// (real time, idle) stays.
pub(crate) fn of_this_thread(urgency: Urgency) {
    let this = Thread(0);
    let Some(mut wanted) = this.get().filter(is_usual) else {
        return;
    };
    wanted.runtime = urgency.slice(wanted.runtime);
    let nice = urgency.nice(wanted.nice);
    // Not everybody may be nicer to himself.
    if !this.put(&Attributes { nice, ..wanted }) {
        this.put(&wanted);
    }
}

/// Lets another thread of ours, which has what a program waits for, finish that now.
pub(crate) struct Hurried {
    thread: Thread,
    before: Attributes,
}

impl Hurried {
    pub(crate) fn new(thread: Thread) -> Option<Hurried> {
        let before = thread.get().filter(is_usual)?;
        let urgency = Urgency::Awaited;
        let wanted = Attributes {
            runtime: urgency.slice(before.runtime),
            nice: urgency.nice(before.nice),
            ..before
        };
        thread.put(&wanted).then_some(Hurried { thread, before })
    }
}

impl Drop for Hurried {
    fn drop(&mut self) {
        self.thread.put(&self.before);
    }
}

/// A thread of this process, by its id; 0 is the calling one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Thread(libc::pid_t);

impl Thread {
    pub(crate) fn this() -> Thread {
        Thread(rustix::thread::gettid().as_raw_nonzero().get())
    }

    fn get(self) -> Option<Attributes> {
        let mut attributes = Attributes::default();
        // SAFETY: the kernel writes at most SIZE bytes to the struct.
        let got = unsafe {
            libc::syscall(
                libc::SYS_sched_getattr,
                self.0,
                &raw mut attributes,
                SIZE,
                0,
            )
        };
        (got == 0).then_some(attributes)
    }

    fn put(self, attributes: &Attributes) -> bool {
        let attributes = Attributes {
            size: SIZE,
            ..*attributes
        };
        // SAFETY: the struct says how long it is, and is only read.
        unsafe { libc::syscall(libc::SYS_sched_setattr, self.0, &raw const attributes, 0) == 0 }
    }
}

/// What a thread was like before it took turns, and is again when this ends.
pub(crate) struct Turns {
    before: Option<Attributes>,
    returns: bool,
}

impl Turns {
    pub(crate) fn begin() -> Turns {
        let before = Thread(0).get().filter(is_usual);
        Turns {
            before,
            returns: before.is_some_and(|before| may_have(before.nice)),
        }
    }

    /// From now on, until the next one.
    pub(crate) fn take(&self, urgency: Urgency) {
        if let Some(before) = self.before {
            Thread(0).put(&Attributes {
                runtime: urgency.slice(before.runtime),
                nice: match self.returns {
                    true => urgency.nice(before.nice),
                    // There would be no way back.
                    false => before.nice,
                },
                ..before
            });
        }
    }
}

impl Drop for Turns {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            Thread(0).put(before);
        }
    }
}

/// Whether this process may set this nice value again after a higher one (setpriority(2)).
fn may_have(nice: i32) -> bool {
    static IS_PRIVILEGED: OnceLock<bool> = OnceLock::new();
    let is_privileged =
        || capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::SYS_NICE));
    let limit = || match getrlimit(Resource::Nice).current {
        Some(limit) => i64::from(nice) >= 20 - i64::try_from(limit).unwrap_or(i64::MAX),
        None => true,
    };
    *IS_PRIVILEGED.get_or_init(is_privileged) || limit()
}

fn is_usual(attributes: &Attributes) -> bool {
    matches!(
        attributes.policy as i32,
        libc::SCHED_OTHER | libc::SCHED_BATCH
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn taking_turns() {
        let before = Thread(0).get().unwrap();
        if !is_usual(&before) {
            return;
        }
        // Kernels before 6.12 say 0.
        let has_slice = |slice: u64| [0, slice].contains(&Thread(0).get().unwrap().runtime);
        {
            let turns = Turns::begin();
            turns.take(Urgency::Yielding);
            let now = Thread(0).get().unwrap();
            assert_eq!(now.policy, before.policy);
            let nice = if turns.returns { 10 } else { before.nice };
            assert_eq!(now.nice, nice.max(before.nice));
            assert!(has_slice(100_000_000));
            turns.take(Urgency::Usual);
            let usual = Thread(0).get().unwrap();
            assert_eq!((usual.runtime, usual.nice), (before.runtime, before.nice));
            turns.take(Urgency::Prompt);
            assert_eq!(Thread(0).get().unwrap().nice, before.nice);
            assert!(has_slice(100_000));
        }
        let after = Thread(0).get().unwrap();
        assert_eq!((after.runtime, after.nice), (before.runtime, before.nice));
    }

    #[test]
    fn of_a_thread() {
        let nice = |urgency| {
            let thread = move || {
                of_this_thread(urgency);
                Thread(0).get().unwrap().nice
            };
            std::thread::spawn(thread).join().unwrap()
        };
        assert!(nice(Urgency::Yielding) >= 10);
        let before = Thread(0).get().unwrap().nice;
        assert!([before, before.min(-10)].contains(&nice(Urgency::Awaited)));
    }
}
