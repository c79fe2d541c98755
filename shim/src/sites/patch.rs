//! Replacing system call instructions by jumps (x86-64).

use snapshim_gate::sites::{JUMP, NUMBERED, Record, SYSCALL, Table};

use super::memory::{self, Code};
use super::objects::Segment;
use super::stubs::{self, GENERAL, NUMBERED as NUMBERED_POOL};

/// Replaces the sites of `table` that lie in the segment `code` of a file loaded at
/// `base`, by jumps to stubs that are written to `stubs`. `false` if any was left.
///
/// # Safety
/// The segment is mapped there, and no other thread runs code in it.
pub(super) unsafe fn patch(
    base: usize,
    code: &Segment,
    table: &Table<'_>,
    stubs: &mut Code,
) -> bool {
    let all = table.records.iter();
    let inside = all.filter(|r| r.window().is_some_and(|w| code.holds(r.address, w.len())));
    let address = |r: &Record| base.wrapping_add(r.address as usize);
    let range = inside
        .clone()
        .fold(None, |range: Option<(usize, usize)>, r| {
            let (at, end) = (address(r), address(r) + r.window().map_or(0, <[u8]>::len));
            Some(range.map_or((at, end), |(a, b)| (a.min(at), b.max(end))))
        });
    let Some((begin, end)) = range else {
        return true;
    };
    if code.is_writable() {
        return false;
    }
    let mut room = if stubs::is_near(begin) && stubs::is_near(end) {
        Room { own: None, stubs }
    } else {
        let needed = inside.clone().map(loose_len).sum();
        let Some(own) = memory::near(begin, end, needed) else {
            return false;
        };
        let own = Some(own);
        Room { own, stubs }
    };
    // SAFETY: the caller's promise; the range lies in the segment.
    let Some(mut text) = (unsafe { Code::open(begin, end) }) else {
        room.discard();
        return false;
    };
    let mut all_done = true;
    for record in inside.clone() {
        all_done &= site(&mut text, &mut room, address(record), record).is_some();
    }
    // The stubs must be there before anything jumps to them. Text that was changed in its
    // place is put back if they cannot be.
    if !room.seal() {
        for record in inside {
            restore(&mut text, address(record), record);
        }
        text.discard();
        return false;
    }
    text.seal() && all_done
}

/// Bytes of code that a site may need near by.
fn loose_len(record: &Record) -> usize {
    usize::from(record.before) + usize::from(record.after) + 2 * FAR_JUMP
}

/// Where code can be put that a site's jump reaches.
struct Room<'a> {
    stubs: &'a mut Code,
    /// Pages near the file, if the stubs are not.
    own: Option<Code>,
}

impl Room<'_> {
    fn next(&self) -> usize {
        self.own.as_ref().map_or_else(stubs::loose, Code::next)
    }

    fn push(&mut self, bytes: &[u8]) -> Option<()> {
        match &mut self.own {
            Some(own) => own.push(bytes),
            None => stubs::push_loose(self.stubs, bytes),
        }
    }

    fn seal(self) -> bool {
        self.own.is_none_or(Code::seal) && self.stubs.publish()
    }

    fn discard(self) {
        if let Some(own) = self.own {
            own.discard();
        }
    }
}

/// Bytes of a jump to anywhere.
pub(super) const FAR_JUMP: usize = 14;

/// `jmp [rip + 0]` and the address.
pub(super) fn far_jump(target: usize) -> [u8; FAR_JUMP] {
    let mut jump = [0; FAR_JUMP];
    let (code, address) = jump.split_at_mut(6);
    code.copy_from_slice(&[0xff, 0x25, 0, 0, 0, 0]);
    address.copy_from_slice(&target.to_le_bytes());
    jump
}

fn site(text: &mut Code, room: &mut Room<'_>, at: usize, record: &Record) -> Option<()> {
    let window = record.window()?;
    if text.read(at, window.len())? != window {
        return None;
    }
    let end = at.checked_add(window.len())?;
    let (before, rest) = window.split_at(usize::from(record.before));
    let after = rest.get(SYSCALL.len()..)?;
    let target = if record.shape == NUMBERED {
        let stub = NUMBERED_POOL.take(room.stubs, record.number, end)?;
        reach(room, at, stub)?
    } else if let Some(known) = stubs::moved(at, &record.original) {
        // The same library, unloaded and loaded again at its old place.
        known
    } else {
        // What stood before the call, then the call, then what stood after it.
        let back = if after.is_empty() {
            end
        } else {
            let begin = room.next();
            room.push(after)?;
            jump(room, end)?;
            begin
        };
        let stub = GENERAL.take(room.stubs, -1, back)?;
        let target = if before.is_empty() {
            reach(room, at, stub)?
        } else {
            let begin = room.next();
            room.push(before)?;
            jump(room, stub)?;
            begin
        };
        if room.own.is_none() {
            stubs::keep_moved(room.stubs, stub, at, &record.original, target)?;
        }
        target
    };
    let mut jump = [0xcc; snapshim_gate::sites::MAX_WINDOW];
    let jump = jump.get_mut(..window.len())?;
    let distance = near_distance(at, target)?;
    jump.get_mut(..JUMP)?.copy_from_slice(&near_jump(distance));
    text.write(at, jump)
}

/// Puts back what stood at a site, if it is a jump now.
fn restore(text: &mut Code, at: usize, record: &Record) {
    if let Some(window) = record.window()
        && text
            .read(at, window.len())
            .is_some_and(|now| now != window && now.first() == near_jump(0).first())
    {
        text.write(at, window);
    }
}

/// What a near jump at `from` says to lead to `to`.
pub(super) fn near_distance(from: usize, to: usize) -> Option<i32> {
    let next = from.wrapping_add(JUMP);
    i32::try_from(to.wrapping_sub(next) as isize).ok()
}

fn near_jump(distance: i32) -> [u8; JUMP] {
    let [a, b, c, d] = distance.to_le_bytes();
    [0xe9, a, b, c, d]
}

/// A place that a near jump from `at` can reach and that leads to `target`.
fn reach(room: &mut Room<'_>, at: usize, target: usize) -> Option<usize> {
    if near_distance(at, target).is_some() {
        return Some(target);
    }
    let begin = room.next();
    jump(room, target)?;
    Some(begin)
}

/// Appends a jump to `target`.
fn jump(room: &mut Room<'_>, target: usize) -> Option<()> {
    match near_distance(room.next(), target) {
        Some(distance) => room.push(&near_jump(distance)),
        None => room.push(&far_jump(target)),
    }
}
