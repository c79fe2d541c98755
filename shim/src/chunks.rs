//! While the gate is guarded: which bytes of the cut a call is about to change, asking
//! for them, and what is compared when it returns.
//!
//! Nothing in here is done while the gate is open. What is asked for, and who answers,
//! is in [`snapshim_gate::guard`].

use core::ffi::c_char;
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};

use snapshim_gate::Shared;
use snapshim_gate::abi::Gate;
use snapshim_gate::guard::{self, Ask, Broken, Guard, Known, MAX_EXPECTED, METADATA, NAMES, Span};
use snapshim_gate::slot::{Call, Class, Slot};
use snapshim_gate::sys::{futex_wake_all, monotonic_ns};
use snapshim_gate::table::FileId;
use snapshim_gate::{passage, word};

use crate::marks::Expected;
use crate::member::Target;
use crate::sys::{self, Stat, nr};
use crate::{attach, marks, thread};

/// What of the cut a call is about to change.
pub(crate) enum Effect<'a> {
    /// Nothing.
    Nothing,
    /// Nothing of any file's bytes: names ([`NAMES`]), metadata ([`METADATA`]) by path.
    ByPath(u32),
    /// These chunks of this file; none if it only changes what lies beyond the cut.
    Chunks(Known<'a>, Span),
    /// The same, if the file still stands where it stood: it begins at this byte.
    FromPosition(Known<'a>, Span, u64),
    /// The same, if the path still leads to this file; `None`: to none of the cut.
    ByName(Option<Known<'a>>, Span),
    /// What cannot be told.
    Everything,
}

/// Bytes of a file.
enum Bytes {
    /// None of those that are there.
    None,
    /// From one to before another.
    Range(u64, u64),
    /// So many from where the file stands.
    Here(u64),
    /// All that there are from where it stands.
    Onwards,
    /// All.
    All,
}

/// What a call changes, whoever wants to know.
#[derive(Clone, Copy)]
pub(crate) enum Change {
    /// Nothing, or nothing of a file that anybody knows.
    Nothing,
    /// Nothing of any file's bytes: names ([`NAMES`]), metadata ([`METADATA`]) by path.
    ByPath(u32),
    /// The bytes of this file from one to before another; none if it is only touched.
    Range(FileId, u64, u64),
    /// So many bytes of this file, if it still stands where it stood.
    FromPosition {
        /// Which.
        id: FileId,
        /// Where it stood.
        at: u64,
        /// How many.
        len: u64,
    },
    /// What the path leads to is cut down, if it still leads to this file; `None`: to none.
    ByName {
        /// Which.
        id: Option<FileId>,
        /// To so many bytes.
        len: u64,
        /// By a call that does not open it: the path.
        truncated: Option<*const c_char>,
    },
    /// What cannot be told.
    Everything,
}

/// What `call` on `target` changes of the files that somebody `knows`. `is_nested`: inside
/// another call of its thread, so that nothing can be noted for its return. `look` tells what an
/// open file is.
pub(crate) fn change(
    call: Call,
    target: Target,
    is_nested: bool,
    look: impl Fn(i32) -> Option<Stat>,
    knows: impl Fn(FileId) -> bool,
) -> Change {
    // Threads that share a slot share the note.
    let is_compared = !is_nested && !thread::SHARING.load(Relaxed);
    let (fd, bytes) = match target {
        // Captured at the cut.
        Target::Fd(fd) if call.class == Class::Meta => (fd, Bytes::None),
        Target::Fd(fd) => (fd, Bytes::All),
        Target::Stream(fd) => (fd, Bytes::Onwards),
        Target::Call { fd, number, args } => {
            // SAFETY: the call is on its way past the gate: see `Target::Call`.
            let args = unsafe { &*args };
            (fd, bytes_of(number, args))
        }
        Target::Truncate { path, len } => {
            let Ok(len) = u64::try_from(len) else {
                return Change::Nothing; // it will fail
            };
            return match is_compared {
                true => by_name(sys::AT_FDCWD, path, len, Some(path)),
                false => Change::Everything,
            };
        }
        Target::Open {
            dirfd,
            path,
            truncates: true,
            how,
            ..
        } => {
            return match opened_how(how) {
                How::Truncating if is_compared => by_name(dirfd, path, 0, None),
                How::Plainly => Change::ByPath(NAMES),
                How::Truncating | How::Unknown => Change::Everything,
            };
        }
        // Makes a file: that is none of the cut's.
        Target::Open { .. } => return Change::ByPath(NAMES),
        Target::Name if call.class == Class::Path => return Change::ByPath(METADATA),
        Target::Name | Target::Rename => return Change::ByPath(NAMES),
        Target::Map(fd) if !sys::is_writable(fd) => return Change::Nothing,
        Target::Map(fd) => (fd, Bytes::All),
        Target::Any => return Change::Everything,
    };
    let Some(stat) = look(fd).filter(Stat::is_regular) else {
        return Change::Nothing;
    };
    let id = id_of(&stat);
    if !knows(id) {
        return Change::Nothing;
    }
    match bytes {
        Bytes::None => Change::Range(id, 0, 0),
        Bytes::All => Change::Range(id, 0, u64::MAX),
        Bytes::Range(from, to) => Change::Range(id, from, to),
        Bytes::Here(len) => match sys::appends(fd) {
            // To the end, wherever that is: what the cut has there is captured, or the file
            // could not have been cut down to it.
            Some(true) => Change::Range(id, 0, 0),
            Some(false) if is_compared && call.class == Class::Write => {
                match sys::position(fd).filter(|at| *at <= MAX_POSITION) {
                    Some(at) => Change::FromPosition { id, at, len },
                    None => Change::Everything,
                }
            }
            _ => Change::Range(id, 0, u64::MAX),
        },
        Bytes::Onwards => match sys::appends(fd) {
            Some(true) => Change::Range(id, 0, 0),
            _ => Change::Range(id, sys::position(fd).unwrap_or(0), u64::MAX),
        },
    }
}

/// What of the cut a change is about.
pub(crate) fn effect(change: Change, guard: &Guard) -> Effect<'_> {
    match change {
        Change::Nothing => Effect::Nothing,
        Change::ByPath(what) => Effect::ByPath(what),
        Change::Range(id, from, to) => match guard.find(id) {
            Some(known) => Effect::Chunks(known, known.span(from, to)),
            None => Effect::Nothing,
        },
        Change::FromPosition { id, at, len } => match guard.find(id) {
            Some(known) => Effect::FromPosition(known, known.span(at, at.saturating_add(len)), at),
            None => Effect::Nothing,
        },
        // Nothing is left open that would show which file it was. So no name may have been
        // changed; whether one is meanwhile is seen when it returns.
        Change::ByName {
            truncated: Some(_), ..
        } if guard.changed_by_path() & NAMES != 0 => Effect::Everything,
        Change::ByName { id, len, .. } => {
            // None of the cut's, or none at all. By the time of the call it may be.
            let known = id.and_then(|id| guard.find(id));
            let span = known.map_or(Span::default(), |known| known.span(len, u64::MAX));
            Effect::ByName(known, span)
        }
        Change::Everything => Effect::Everything,
    }
}

pub(crate) fn id_of(stat: &Stat) -> FileId {
    FileId {
        dev: stat.dev,
        ino: stat.ino,
    }
}

/// What cutting the file behind a path down to `len` bytes changes.
fn by_name(dirfd: i32, path: *const c_char, len: u64, truncated: Option<*const c_char>) -> Change {
    // SAFETY: the program passed the path; the kernel checks it.
    let stat = unsafe { sys::fstatat(dirfd, path, 0) };
    Change::ByName {
        id: stat.ok().map(|stat| id_of(&stat)),
        len,
        truncated,
    }
}

/// What an open does to what it opens.
enum How {
    /// Nothing.
    Plainly,
    /// Cuts it down to nothing.
    Truncating,
    /// It cannot be told to what.
    Unknown,
}

/// The same of openat2, by the address of its `struct open_how`; 0: another call, which truncates.
fn opened_how(how: usize) -> How {
    const O_TRUNC: u64 = 0o1000;
    /// Paths lead elsewhere then.
    const RESOLVE_IN_ROOT: u64 = 0x10;
    if how == 0 {
        return How::Truncating;
    }
    match sys::peek::<[u64; 3]>(how) {
        Some([flags, ..]) if flags & O_TRUNC == 0 => How::Plainly,
        Some([_, _, resolve]) if resolve & RESOLVE_IN_ROOT == 0 => How::Truncating,
        _ => How::Unknown,
    }
}

/// Bits of a position in [`Ask::Expects`]; above it, the file's place in the table, and one.
const POSITION_BITS: u32 = 46;
const MAX_POSITION: u64 = (1 << POSITION_BITS) - 1;
const _: () = assert!(guard::PLACES as u64 <= MAX_EXPECTED >> POSITION_BITS);

/// What is expected of a call that changes `known`, from `at` on.
fn expected(known: Option<&Known<'_>>, at: u64) -> Ask {
    let file = known.map_or(0, |known| u64::from(known.index) + 1);
    Ask::Expects((file << POSITION_BITS | at) & MAX_EXPECTED)
}

const RWF_APPEND: usize = 0x10;
const RWF_NOAPPEND: usize = 0x20;

/// Which bytes of its file a system call changes.
fn bytes_of(number: usize, a: &[usize; 6]) -> Bytes {
    match number {
        nr::WRITE => Bytes::Here(a[2] as u64),
        nr::PWRITE64 => range(a[3] as i64, Some(a[2] as u64)),
        nr::WRITEV => parts(a[1], a[2]).map_or(Bytes::All, Bytes::Here),
        nr::PWRITEV => range(a[3] as i64, parts(a[1], a[2])),
        nr::PWRITEV2 if a[5] & RWF_APPEND != 0 => Bytes::None,
        // At its position, even of a file to which everything else is appended.
        nr::PWRITEV2 if a[3] as i64 == -1 && a[5] & RWF_NOAPPEND != 0 => Bytes::All,
        nr::PWRITEV2 if a[3] as i64 == -1 => parts(a[1], a[2]).map_or(Bytes::All, Bytes::Here),
        nr::PWRITEV2 => range(a[3] as i64, parts(a[1], a[2])),
        // With an offset that lies in memory, or from where it stands.
        nr::COPY_FILE_RANGE | nr::SPLICE => match a[3] {
            0 => Bytes::All,
            at => sys::peek(at).map_or(Bytes::All, |at| range(at, Some(a[4] as u64))),
        },
        nr::FTRUNCATE => match u64::try_from(a[1] as i64) {
            Ok(len) => Bytes::Range(len, u64::MAX),
            Err(_) => Bytes::None, // it will fail
        },
        nr::FALLOCATE => allocated(a[1], a[2] as i64, a[3] as i64),
        nr::FCHMOD | nr::FCHOWN | nr::FSETXATTR | nr::FREMOVEXATTR => Bytes::None,
        _ => Bytes::All,
    }
}

fn range(at: i64, len: Option<u64>) -> Bytes {
    match (u64::try_from(at), len) {
        (Ok(at), Some(len)) => Bytes::Range(at, at.saturating_add(len)),
        (Ok(at), None) => Bytes::Range(at, u64::MAX),
        (Err(_), _) => Bytes::None, // it will fail
    }
}

/// What fallocate does to bytes that are there.
fn allocated(mode: usize, at: i64, len: i64) -> Bytes {
    const KEEP_SIZE: usize = 1;
    const PUNCH_HOLE: usize = 2;
    const ZERO_RANGE: usize = 0x10;
    const UNSHARE_RANGE: usize = 0x40;
    if mode & !(KEEP_SIZE | UNSHARE_RANGE) == 0 {
        return Bytes::None;
    }
    if mode & !(KEEP_SIZE | PUNCH_HOLE | ZERO_RANGE) == 0 {
        return range(at, u64::try_from(len).ok());
    }
    // COLLAPSE_RANGE, INSERT_RANGE, and what later kernels may have.
    Bytes::All
}

/// Bytes in the parts of a writev; `None` if that cannot be read.
fn parts(at: usize, count: usize) -> Option<u64> {
    const IOV_MAX: usize = 1024;
    /// Longer lists are not read one by one.
    const FEW: usize = 64;
    if count > IOV_MAX {
        return Some(0); // it will fail
    }
    if count > FEW {
        return None;
    }
    let mut sum = 0u64;
    for part in 0..count {
        let [_, len] = sys::peek::<[usize; 2]>(at.wrapping_add(part * size_of::<[usize; 2]>()))?;
        sum = sum.saturating_add(len as u64);
    }
    Some(sum)
}

/// One call at a guarded gate.
pub(crate) struct Asking {
    /// What it waits for, and where it asks; `None`: for the end of the guard.
    asked: Option<(Span, &'static AtomicU64)>,
}

/// For the end of the guard.
const ASKING_NOTHING: Answer = Answer::Wait(Asking { asked: None });

/// What became of a question.
pub(crate) enum Answer {
    /// It may go on; `true`: there is something to compare when it returns.
    Granted(bool),
    /// It has to wait.
    Wait(Asking),
}

/// Asks for what `effect` changes, under the guard `seen`. `is_nested`: as for [`effect`].
pub(crate) fn ask(
    gate: &Gate,
    slot: Option<&Slot>,
    effect: Effect<'_>,
    seen: u32,
    is_nested: bool,
) -> Answer {
    let guard = gate.guard();
    let span = match &effect {
        Effect::Nothing | Effect::ByPath(_) => Span::default(),
        Effect::Chunks(_, span) | Effect::FromPosition(_, span, _) | Effect::ByName(_, span) => {
            *span
        }
        Effect::Everything => return ASKING_NOTHING,
    };
    let is_captured = guard.has(span);
    // What was read belongs to this guard only if that still stands.
    core::sync::atomic::fence(Acquire);
    if !guard.is_of(seen) || gate.header().word.load(Acquire) != seen {
        return ASKING_NOTHING;
    }
    let mut cell = slot.and_then(|slot| gate.ask(slot));
    if cell.is_some_and(|cell| matches!(Ask::unpack(cell.load(Relaxed)), Ask::Expects(_))) {
        if is_nested {
            // The outer call's, which is still to be compared.
            cell = None;
        } else {
            // Of a call that was left by a jump, or whose thread is gone: nobody has compared it.
            miss(gate);
            return ASKING_NOTHING;
        }
    }
    if !is_captured {
        let Some(cell) = cell else {
            return ASKING_NOTHING;
        };
        request(guard, cell, span);
        return Answer::Wait(Asking {
            asked: Some((span, cell)),
        });
    }
    let expected = match effect {
        Effect::Chunks(known, _) => {
            known.touch();
            Ask::None
        }
        Effect::FromPosition(known, _, at) => {
            known.touch();
            expected(Some(&known), at)
        }
        Effect::ByName(known, _) => {
            // If there is none, one is made.
            guard.note_by_path(if known.is_none() { NAMES } else { 0 });
            if let Some(known) = known {
                known.touch();
            }
            expected(known.as_ref(), 0)
        }
        Effect::ByPath(what) => {
            guard.note_by_path(what);
            Ask::None
        }
        Effect::Nothing | Effect::Everything => Ask::None,
    };
    let Some(cell) = cell else {
        // Nothing can be compared later.
        return match expected {
            Ask::None => Answer::Granted(false),
            _ => ASKING_NOTHING,
        };
    };
    if cell.load(Relaxed) != expected.pack() {
        cell.store(expected.pack(), Release);
    }
    Answer::Granted(expected != Ask::None)
}

/// Asks for chunks, in this cell.
fn request(guard: &Guard, cell: &AtomicU64, span: Span) {
    cell.store(Ask::Chunks(span).pack(), Release);
    guard.requests.fetch_add(1, AcqRel);
    futex_wake_all(&guard.requests);
}

/// How long is waited before a look whether it is still asked for, ns.
const AGAIN_NS: u64 = 2_000_000;

impl Asking {
    /// Waits under the guard `seen` for at most `left_ns`, or until there may be an answer.
    pub(crate) fn wait(&self, gate: &Gate, seen: u32, left_ns: u64) {
        let guard = gate.guard();
        let word = &gate.header().word;
        let Some((span, cell)) = self.asked else {
            guard.note_awaited();
            snapshim_gate::sys::futex_wait(word, seen, left_ns);
            return;
        };
        let end = monotonic_ns().saturating_add(left_ns);
        loop {
            let served = guard.served.load(Acquire);
            if word.load(Acquire) != seen || guard.has(span) {
                return;
            }
            let left_ns = end.saturating_sub(monotonic_ns());
            if left_ns == 0 {
                return;
            }
            // A signal handler's call may have asked for something else in our place.
            if cell.load(Relaxed) != Ask::Chunks(span).pack() {
                request(guard, cell, span);
            }
            snapshim_gate::sys::futex_wait(&guard.served, served, left_ns.min(AGAIN_NS));
        }
    }
}

/// After a call that was granted what it asked for: whether it has changed just that.
/// `slot` is that of its thread, `result` what it returned.
pub(crate) fn returned(gate: &Gate, slot: &Slot, result: isize) {
    let Some(cell) = gate.ask(slot) else {
        return;
    };
    let expected = match Ask::unpack(cell.load(Relaxed)) {
        Ask::Expects(expected) => expected,
        Ask::Marked(expected) => {
            marks::returned(gate, slot, Expected::of_marked(gate, expected), result);
            // After the marks: it stands for them when the slots are drained.
            cell.store(Ask::None.pack(), Release);
            return;
        }
        Ask::None | Ask::Chunks(_) => return,
    };
    if word::has_marks(gate.header().word.load(Relaxed)) {
        let known = guard_index(expected).and_then(|index| gate.guard().at(index));
        let expected = Expected {
            id: known.map(|known| known.id()),
            value: expected & MAX_POSITION,
            // No name may have been changed meanwhile, or the guard is broken.
            has_path: false,
        };
        marks::returned(gate, slot, expected, result);
    }
    let guard = gate.guard();
    let missed = match Class::from_raw(slot.class.load(Relaxed)) {
        // Looking may be fatal now.
        _ if attach::is_sandboxed() => true,
        Some(Class::Write) if result > 0 => {
            has_moved(guard, slot.fd.load(Relaxed) as i32, expected, result as u64)
        }
        // The descriptor that it got.
        Some(Class::Open) if result >= 0 => opened_other(guard, result as i32, expected),
        // A truncate: another file may have got the name.
        Some(Class::Path) if result >= 0 => guard.changed_by_path() & NAMES != 0,
        _ => false,
    };
    if missed {
        miss(gate);
    }
    // After the note: the coordinator looks at it when it finds this gone.
    cell.store(Ask::None.pack(), Release);
}

/// The place in the table of what was packed by [`expected`].
fn guard_index(expected: u64) -> Option<u32> {
    u32::try_from((expected >> POSITION_BITS).checked_sub(1)?).ok()
}

/// Breaks the guard: something was changed that had not been asked for.
fn miss(gate: &Gate) {
    let guard = gate.guard();
    guard.note_broken(Broken::Missed);
    let seen = gate.header().word.load(Acquire);
    if word::is_guarded(seen)
        && passage::end_hold::<Shared>(&gate.header().word, seen)
        && !attach::is_sandboxed()
    {
        futex_wake_all(&gate.header().word);
        futex_wake_all(&guard.served);
    }
}

/// Whether a write of `len` bytes may have changed chunks that were not granted, for it was to
/// begin where was `expected`, and another thread has moved the file's position meanwhile, or
/// put another file in its place.
fn has_moved(guard: &Guard, fd: i32, expected: u64, len: u64) -> bool {
    let (file, expected) = (expected >> POSITION_BITS, expected & MAX_POSITION);
    let known = sys::fstat(fd).and_then(|stat| guard.find(id_of(&stat)));
    let Some(known) = known.filter(|known| u64::from(known.index) + 1 == file) else {
        return true;
    };
    let Some(now) = sys::position(fd) else {
        return true;
    };
    if now == expected.saturating_add(len) {
        return false;
    }
    // Others that write there, too, only move it on: it began between the two.
    let begun = expected.min(now.saturating_sub(len));
    let granted = known.span(expected, expected.saturating_add(len));
    let changed = known.span(begun, now);
    changed.count > 0
        && (changed.first < granted.first || changed.range().end > granted.range().end)
}

/// Whether what was opened, and cut down to nothing, is another file of the cut than the one
/// that was granted.
fn opened_other(guard: &Guard, fd: i32, expected: u64) -> bool {
    let opened = sys::fstat(fd).and_then(|stat| guard.find(id_of(&stat)));
    let file = expected >> POSITION_BITS;
    opened.is_some_and(|known: Known<'_>| u64::from(known.index) + 1 != file && known.size > 0)
}

/// Notes that a call has waited as long as it may, for what the guard `seen` has not captured.
pub(crate) fn gives_up(gate: &Gate, seen: u32) {
    if word::is_guarded(seen) && gate.header().word.load(Acquire) == seen {
        gate.guard().note_broken(guard::Broken::TimeOut);
    }
}
