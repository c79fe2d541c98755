//! While calls mark what they change: which blocks that is, for those who want to know later
//! what has changed since a cut. Nothing in here is done while no set asks for it.
//!
//! Which file a descriptor means is asked of the kernel each time: any table of descriptors
//! would go stale without a trace. What is marked is in [`snapshim_gate::marks`].

use core::sync::atomic::Ordering::{Relaxed, Release};

use snapshim_gate::abi::Gate;
use snapshim_gate::guard::{Ask, MAX_EXPECTED, NAMES};
use snapshim_gate::marks::{Marks, PLACES};
use snapshim_gate::slot::{Class, Slot};
use snapshim_gate::table::FileId;

use crate::chunks::{self, Change};
use crate::{attach, sys};

/// Bits of the position, or the address of a path, in [`Ask::Marked`]; above it, the file's place in
/// the table, and one.
const VALUE_BITS: u32 = 48;
const MAX_VALUE: u64 = (1 << VALUE_BITS) - 1;
const _: () = assert!(PLACES as u64 <= MAX_EXPECTED >> VALUE_BITS);

/// What is compared when a call returns.
pub(crate) struct Expected {
    /// The file that it was about to change; `None` if none of those that are known.
    pub(crate) id: Option<FileId>,
    /// Where it was to write to, or the address of the path.
    pub(crate) value: u64,
    /// It is that of a path, if the call took one and opened nothing.
    pub(crate) has_path: bool,
}

impl Expected {
    /// What was noted in [`Ask::Marked`].
    pub(crate) fn of_marked(gate: &Gate, packed: u64) -> Expected {
        let index = (packed >> VALUE_BITS).checked_sub(1);
        let known = index.and_then(|index| gate.marks().at(index as u32));
        Expected {
            id: known.map(|known| known.id()),
            value: packed & MAX_VALUE,
            has_path: true,
        }
    }
}

/// Marks what a call is about to change. `slot`: in which it is counted; without one, what it
/// changes may be changed after the next cut. Whether there is something to compare when it
/// returns: where it was to write at the position of a file, and what a path led to.
pub(crate) fn note(gate: &Gate, slot: Option<&Slot>, change: Change, is_nested: bool) -> bool {
    let marks = gate.marks();
    // What cannot be told is not, or not only, in marks.
    let (index, at) = match change {
        Change::Nothing => return false,
        Change::ByPath(what) => {
            marks.note_by_path(what);
            return false;
        }
        Change::Everything => {
            marks.set_blind();
            (None, 0)
        }
        Change::Range(id, from, to) => {
            let Some(known) = marks.find(id) else {
                return false;
            };
            known.mark(from, to);
            (None, 0)
        }
        Change::FromPosition { id, at, len } => {
            let Some(known) = marks.find(id) else {
                return false;
            };
            known.mark(at, at.saturating_add(len));
            (Some(u64::from(known.index) + 1), at)
        }
        Change::ByName { id, len, truncated } => {
            // If there is none, one is made.
            if id.is_none() {
                marks.note_by_path(NAMES);
            }
            let known = id.and_then(|id| marks.find(id));
            if let Some(known) = known {
                known.mark(len, u64::MAX);
            }
            let path = truncated.map_or(0, |path| path as u64);
            (
                Some(known.map_or(0, |known| u64::from(known.index) + 1)),
                path,
            )
        }
    };
    let Some(slot) = slot else {
        marks.set_blind_for_next();
        return false;
    };
    let (Some(index), false) = (index, is_nested) else {
        return false;
    };
    let Some(cell) = gate.ask(slot) else {
        marks.set_blind();
        return false;
    };
    if at > MAX_VALUE {
        marks.set_blind();
        return false;
    }
    let value = (index << VALUE_BITS | at) & MAX_EXPECTED;
    // What is there is left by a call that will never return, and so was never compared.
    if matches!(Ask::unpack(cell.load(Relaxed)), Ask::Marked(_)) {
        marks.set_blind();
    }
    cell.store(Ask::Marked(value).pack(), Release);
    true
}

/// Marks what a call in a sandbox changes: there, to ask which file that is may be fatal.
pub(crate) fn note_blind(gate: &Gate) {
    gate.marks().set_blind_for_next();
}

/// After a call that has marked what it changes, and is still counted: whether that was it.
/// Of what is not, all is marked.
pub(crate) fn returned(gate: &Gate, slot: &Slot, expected: Expected, result: isize) {
    let Expected {
        id,
        value,
        has_path,
    } = expected;
    let marks = gate.marks();
    match Class::from_raw(slot.class.load(Relaxed)) {
        _ if attach::is_sandboxed() => marks.set_blind_for_next(),
        Some(Class::Write) if result > 0 => {
            let fd = slot.fd.load(Relaxed) as i32;
            // Another thread, or process, may have moved the position, or put another file in
            // place of this one.
            if sys::position(fd) != Some(value.saturating_add(result as u64)) {
                match id {
                    Some(id) => mark_whole(marks, id),
                    None => marks.set_blind(),
                }
                mark_open(marks, fd);
            }
        }
        // The descriptor that it got.
        Some(Class::Open) if result >= 0 => mark_open(marks, result as i32),
        Some(Class::Path) if result >= 0 && has_path => leads_there(marks, id, value),
        _ => {}
    }
}

fn mark_whole(marks: &Marks, id: FileId) {
    if let Some(known) = marks.find(id) {
        known.mark_whole();
    }
}

/// After a truncate of the file behind a path: whether that leads where it did. (Two renames in
/// the midst of it could hide that.)
fn leads_there(marks: &Marks, id: Option<FileId>, path: u64) {
    let path = core::ptr::with_exposed_provenance(path as usize);
    // SAFETY: the program passed the path; the kernel checks it.
    match unsafe { sys::fstatat(sys::AT_FDCWD, path, 0) } {
        Ok(stat) if id == Some(chunks::id_of(&stat)) => {}
        // Nor was it marked before.
        Ok(stat) if id.is_none() && marks.find(chunks::id_of(&stat)).is_none() => {}
        _ => marks.set_blind(),
    }
}

/// Marks all of an open file.
fn mark_open(marks: &Marks, fd: i32) {
    match sys::fstat(fd) {
        Some(stat) => mark_whole(marks, chunks::id_of(&stat)),
        None => marks.set_blind(),
    }
}
