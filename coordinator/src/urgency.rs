//! Who waits for whom when there are fewer processors than threads: the program for us only
//! where it has to.
//!
//! Linux lets a thread run for its slice (some 3 ms, and up to the next tick) before one that
//! wakes up gets the processor, unless the slice of that one is shorter and it was not given more
//! than its share (EEVDF's PREEMPT_SHORT and eligibility, since 6.12, kernel/sched/fair.c). A capture
//! that takes its slices makes the program's calls late by one. So what nobody waits for has a
//! long slice here, and a small share; what a program may wait for has a short slice, and a large
//! share where that is allowed. Kernels without slices have the shares. Shares count within a session or
//! a cgroup (sched(7)), slices on any processor that both want.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use nix::libc;

/// How soon a thread is to run when it can.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Urgency {
    /// Everybody who wakes up goes first, and while all processors are busy this gets a tenth of
    /// one.
    Yielding,
    /// As everything was before: what is started then is as prompt.
    Usual,
    /// With the usual share, but soon.
    Prompt,
    /// A program waits for it.
    Awaited,
}

/// The longest and the shortest slice that there are, ns (`__setparam_fair`, kernel/sched/syscalls.c).
const LONG: u64 = 100_000_000;
const SHORT: u64 = 100_000;

impl Urgency {
    /// The attributes, `usual` being those of before.
    fn of(self, usual: Attributes) -> Attributes {
        let (runtime, nice) = match self {
            Urgency::Yielding => (LONG, usual.nice.max(10)),
            Urgency::Usual => (usual.runtime, usual.nice),
            Urgency::Prompt => (SHORT, usual.nice),
            Urgency::Awaited => (SHORT, usual.nice.min(-10)),
        };
        Attributes {
            runtime,
            nice,
            ..usual
        }
    }
}

/// `struct sched_attr`, sched_setattr(2), of its first version.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
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

/// What this process was like before any of this; `None` for a policy that somebody chose (real
/// time, idle), which stays.
fn usual() -> Option<Attributes> {
    static USUAL: OnceLock<Option<Attributes>> = OnceLock::new();
    let get = || {
        let is_usual =
            |now: &Attributes| matches!(now.policy as i32, libc::SCHED_OTHER | libc::SCHED_BATCH);
        Thread(0).get().filter(is_usual)
    };
    *USUAL.get_or_init(get)
}

/// To be called before anything else here, and before there are threads.
pub(crate) fn remember() {
    let _ = usual();
}

/// Everybody who wakes up goes before this thread from now on, but its share stays: from that there is a way back for
/// everybody.
pub(crate) fn give_way() {
    if let Some(usual) = usual() {
        Thread(0).put(&Attributes {
            runtime: LONG,
            ..usual
        });
    }
}

/// Of this thread, from now on.
pub(crate) fn of_this_thread(urgency: Urgency) {
    Thread(0).set(urgency);
}

/// A thread of this process, by its id; 0 is the calling one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Thread(libc::pid_t);

impl Thread {
    pub(crate) fn this() -> Thread {
        Thread(rustix::thread::gettid().as_raw_nonzero().get())
    }

    /// As near to it as this process may: not everybody may have a larger share.
    fn set(self, urgency: Urgency) {
        let Some(usual) = usual() else { return };
        let wanted = urgency.of(usual);
        let now = self.get().map_or(usual.nice, |now| now.nice);
        for nice in [wanted.nice, usual.nice, now] {
            if self.put(&Attributes { nice, ..wanted }) {
                break;
            }
        }
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

/// How long a thread that nobody waits for runs at a stretch.
const STRETCH: Duration = Duration::from_micros(500);

/// The pauses of a thread that nobody waits for. A long slice lets whoever wakes up go first only if he
/// is also the first of all in the queue; behind somebody who was sent back there (a worker of
/// the kernel's, say, that had more than its share) he waits for the next tick. In a pause, however short,
/// it is everybody's turn. It takes some 60 µs, as much leave as timers have (prctl(2),
/// PR_SET_TIMERSLACK).
#[derive(Debug)]
pub(crate) struct Pauses {
    since: Instant,
}

impl Pauses {
    pub(crate) fn begin() -> Pauses {
        Pauses {
            since: Instant::now(),
        }
    }

    /// Makes one, if it is time. To be called often.
    pub(crate) fn pause(&mut self) {
        if self.since.elapsed() >= STRETCH {
            std::thread::sleep(Duration::from_nanos(1));
            self.since = Instant::now();
        }
    }
}

/// For a process that was just made by this one and will be somebody's command. Async-signal-safe once
/// [`remember`] was called.
pub(crate) fn put_back() {
    Thread(0).set(Urgency::Usual);
}

/// Lets another thread of ours, which has what a program waits for, go on sooner while this lives.
pub(crate) struct Hurried {
    thread: Thread,
    before: Attributes,
}

impl Hurried {
    pub(crate) fn new(thread: Thread, urgency: Urgency) -> Option<Hurried> {
        let before = thread.get()?;
        thread.set(urgency);
        Some(Hurried { thread, before })
    }
}

impl Drop for Hurried {
    fn drop(&mut self) {
        self.thread.put(&self.before);
    }
}

/// The turns of a thread that is started for nothing in particular: in the end it is as this process was at first.
pub(crate) struct Turns {
    may_return: bool,
}

impl Turns {
    pub(crate) fn begin() -> Turns {
        remember();
        Turns {
            may_return: may_return(),
        }
    }

    /// From now on, until the next one.
    pub(crate) fn take(&self, urgency: Urgency) {
        match urgency {
            // There would be no way back, and the next hold would begin with that.
            Urgency::Yielding if !self.may_return => give_way(),
            urgency => Thread(0).set(urgency),
        }
    }
}

impl Drop for Turns {
    fn drop(&mut self) {
        Thread(0).set(Urgency::Usual);
    }
}

/// Whether a thread of this process can have its usual share again after a smaller one. Capabilities do
/// not tell: those of a user namespace do not count for this (`set_one_prio`, `can_nice`).
fn may_return() -> bool {
    static MAY: OnceLock<bool> = OnceLock::new();
    let probe = || {
        let Some(usual) = usual() else { return false };
        let smaller = Attributes {
            nice: (usual.nice + 1).min(19),
            ..usual
        };
        Thread(0).put(&smaller) && Thread(0).put(&usual)
    };
    // In a thread that ends with it.
    let in_thread = || std::thread::Builder::new().spawn(probe).ok()?.join().ok();
    *MAY.get_or_init(|| in_thread().unwrap_or(false))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_a_thread<T: Send + 'static>(what: impl FnOnce() -> T + Send + 'static) -> T {
        std::thread::spawn(what).join().unwrap()
    }

    fn now() -> (i32, u64) {
        let now = Thread(0).get().unwrap();
        (now.nice, now.runtime)
    }

    /// Kernels before 6.12 say 0.
    fn has_slices() -> bool {
        now().1 != 0
    }

    #[test]
    fn turns_end_as_they_began() {
        let Some(usual) = usual() else { return };
        let slice = |slice| if has_slices() { slice } else { 0 };
        let before = now();
        of_a_thread(move || {
            let turns = Turns::begin();
            turns.take(Urgency::Yielding);
            let nice = if turns.may_return {
                10.max(usual.nice)
            } else {
                usual.nice
            };
            assert_eq!(now(), (nice, slice(LONG)));
            turns.take(Urgency::Prompt);
            assert_eq!(now(), (usual.nice, slice(SHORT)));
            turns.take(Urgency::Yielding);
            drop(turns);
            assert_eq!(now(), (usual.nice, usual.runtime));
        });
        assert_eq!(now(), before);
    }

    #[test]
    fn a_thread_that_is_awaited() {
        let Some(usual) = usual() else { return };
        let nice = of_a_thread(|| {
            of_this_thread(Urgency::Awaited);
            now().0
        });
        match rustix::process::geteuid().is_root() && may_return() {
            true => assert_eq!(nice, usual.nice.min(-10)),
            false => assert!([usual.nice, usual.nice.min(-10)].contains(&nice)),
        }
    }

    #[test]
    fn a_thread_is_hurried_for_a_while() {
        let Some(usual) = usual() else { return };
        let (tell, told) = std::sync::mpsc::channel();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let slow = std::thread::spawn(move || {
            of_this_thread(Urgency::Yielding);
            tell.send(Thread::this()).unwrap();
            let _ = ended.recv();
        });
        let thread = told.recv().unwrap();
        let nice = || thread.get().unwrap().nice;
        let before = nice();
        assert_eq!(before, usual.nice.max(10));
        let hurried = Hurried::new(thread, Urgency::Prompt);
        if may_return() {
            assert_eq!(nice(), usual.nice);
        }
        if has_slices() {
            assert_eq!(thread.get().unwrap().runtime, SHORT);
        }
        drop(hurried);
        assert_eq!(nice(), before);
        drop(end);
        slow.join().unwrap();
    }

    #[test]
    fn commands_begin_as_usual() {
        let Some(usual) = usual() else { return };
        let nice = of_a_thread(|| {
            let turns = Turns::begin();
            turns.take(Urgency::Yielding);
            let mut command = std::process::Command::new("sh");
            command.args(["-c", "cut -d' ' -f19 /proc/$$/stat"]);
            crate::child::set_apart(&mut command);
            String::from_utf8(command.output().unwrap().stdout).unwrap()
        });
        assert_eq!(nice.trim(), usual.nice.to_string());
    }
}
