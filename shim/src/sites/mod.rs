//! Syscall sites: the system call instructions inside libc, the dynamic linker and
//! every other file mapped executable, replaced by jumps to the gate.
//!
//! libc calls the kernel without its own exported functions (stdio, the flush at
//! exit, helper threads), so hooks by name see only part of what it does. Where the
//! sites of the file a hook would call are all patched, it stands aside.
//!
//! | module | what it does |
//! |---|---|
//! | `objects` | which files are mapped, and their identities |
//! | `tables` | the coordinator's site tables, found and checked |
//! | `patch` | replacing the instructions |
//! | `memory` | code that can be changed |
//! | `stubs` | the code that is jumped to |
//! | `dispatch` | what happens there |

use core::sync::atomic::AtomicUsize;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use snapshim_gate::sites::COMPLETE;

use crate::{attach, sys};

mod dispatch;
mod memory;
mod objects;
mod patch;
mod stubs;
mod tables;

use memory::Code;
use objects::{Object, Segment};
use tables::Tables;

/// Most files that are remembered to be patched.
const FILES: usize = 64;

/// The text of files whose sites are all patched, or that have none: functions there need
/// not be gated by name.
struct Covered {
    ranges: [(AtomicUsize, AtomicUsize); FILES],
    count: AtomicUsize,
}

static COVERED: Covered = Covered {
    ranges: [const { (AtomicUsize::new(0), AtomicUsize::new(0)) }; FILES],
    count: AtomicUsize::new(0),
};

impl Covered {
    fn add(&self, begin: usize, end: usize) {
        let index = self.count.fetch_add(1, Relaxed);
        if let Some(range) = self.ranges.get(index) {
            range.0.store(begin, Relaxed);
            range.1.store(end, Relaxed);
        }
    }

    fn contains(&self, at: usize) -> bool {
        let inside =
            |r: &(AtomicUsize, AtomicUsize)| (r.0.load(Relaxed)..r.1.load(Relaxed)).contains(&at);
        self.ranges.iter().any(inside)
    }
}

/// Whether all system calls of the function at `at` pass the gate at their sites.
pub(crate) fn is_covered(at: usize) -> bool {
    COVERED.contains(at)
}

/// Patches all that is loaded. Before any of the program's own code runs, while
/// there is one thread, and none of what is changed is in the middle of a site.
pub(crate) fn install() {
    let Some(tables) = Tables::find() else { return };
    if !is_single_threaded() {
        return;
    }
    let mut stubs = None;
    objects::each_loaded(&mut |object| patch_loaded(&tables, object, &mut stubs));
    if let Some(stubs) = stubs {
        stubs.seal();
    }
}

/// Patches one object. The stubs are opened for the first that needs any.
fn patch_loaded(tables: &Tables, object: &Object<'_>, stubs: &mut Option<Code>) {
    let Some(id) = object.id() else { return };
    tables.with(&id, |table| {
        if stubs.is_none() && !table.records.is_empty() {
            *stubs = stubs::open();
        }
        let code = object.segments.iter().filter(|s| s.is_code());
        let mut all_done = true;
        for segment in code.clone() {
            all_done &= match stubs {
                // SAFETY: a loaded object; nobody else is there to run it.
                Some(stubs) => unsafe { patch::patch(object.base, segment, table, stubs) },
                None => table.records.is_empty(),
            };
        }
        if all_done && table.header.flags & COMPLETE != 0 {
            for segment in code {
                let begin = object.base.wrapping_add(segment.address as usize);
                COVERED.add(begin, begin.wrapping_add(segment.in_memory as usize));
            }
        }
    });
}

fn is_single_threaded() -> bool {
    if attach::is_early() {
        return true;
    }
    // Directories count themselves, their name and one for each directory in them.
    const ALONE: u64 = 3;
    // SAFETY: NUL-terminated.
    unsafe { sys::fstatat(sys::AT_FDCWD, c"/proc/self/task".as_ptr(), 0) }
        .is_ok_and(|stat| stat.links() == ALONE)
}

/// A file was just mapped executable: a library on its way in, of which no
/// instruction has run yet.
#[cold]
fn mapped(at: usize, len: usize, fd: i32, offset: usize) {
    const SEGMENTS: usize = 32;
    const NOTES: usize = 512;
    // In a sandbox no system call of ours is safe.
    if fd < 0 || attach::is_sandboxed() {
        return;
    }
    let Some(tables) = Tables::find() else { return };
    let mut segments = [Segment::default(); SEGMENTS];
    let Some(segments) = objects::read_segments(fd, &mut segments) else {
        return;
    };
    let is_it = |s: &&Segment| s.is_code() && (s.offset & !4095) == offset as u64;
    let Some(segment) = segments.iter().find(is_it) else {
        return;
    };
    let mut notes = [0; NOTES];
    let Some(id) = objects::read_id(fd, segments, &mut notes) else {
        return;
    };
    let base = at.wrapping_sub((segment.address & !4095) as usize);
    // What is mapped may be less than what the header says.
    let mut segment = *segment;
    let whole = (segment.address & 4095).saturating_add(segment.in_file);
    if whole > len as u64 {
        segment.in_file = (len as u64).saturating_sub(segment.address & 4095);
    }
    // Two threads that map files at once: stubs are taken by one at a time. What is
    // left unpatched is seen by the coordinator.
    let busy = &attach::page().patching;
    if busy.swap(1, Acquire) != 0 {
        return;
    }
    tables.with(&id, |table| {
        if !table.records.is_empty()
            && let Some(mut stubs) = stubs::open()
        {
            // SAFETY: just mapped, and the mapping's address has not been returned yet.
            unsafe { patch::patch(base, &segment, table, &mut stubs) };
            stubs.seal();
        }
    });
    busy.store(0, Release);
}
