//! `syscall()`, and what a system call does told from its number and arguments
//! alone: also for syscall sites.

use core::arch::naked_asm;
use core::ffi::{c_char, c_int, c_ulong};

use snapshim_gate::calls::{self, Action, NUMBERS, fcntl_locks, ioctl_changes};
use snapshim_gate::slot::Class::{self, Meta};
use snapshim_gate::slot::Seen;

use super::{
    O_CREAT, O_TRUNC, by_path, closes, flocks, into_memory, locks, maps, name, names, noted, on,
    on_call, opens, opens_as, opens_handle, renames, syncs, syncs_all, truncates,
};
use crate::attach;
use crate::guard::{Frame, enter, leave, seen, submit};
use crate::member::Target;
use crate::next::Next;
use crate::sys::{AT_FDCWD, nr};
use crate::thread::SHARING;

/// The numbers [`gate_for`] knows, a bit each: all others go on without a frame.
pub(crate) static OURS: [u64; NUMBERS / 64] = calls::bits();

static BEHIND: Next = Next::new();

/// Finds the `syscall` behind ours.
pub(super) fn resolve() {
    BEHIND.resolve(name!(syscall));
}

/// `syscall(2)` as a library function.
///
/// No frame may be laid before it is known that the number is one of ours: after
/// vfork, or clone with a new stack, two threads of control return through it. (The
/// flags of a raw clone are not looked at: it may make a thread that shares a slot.)
#[unsafe(naked)]
#[unsafe(no_mangle)]
#[cfg(target_arch = "x86_64")]
pub unsafe extern "C" fn syscall() -> isize {
    naked_asm!(
        ".cfi_startproc",
        "cmp rdi, {numbers}",
        "jae 2f",
        "mov r10, rdi",
        "shr r10, 6",
        "lea r11, [rip + {ours}]",
        "mov r11, [r11 + r10 * 8]",
        "bt r11, rdi",
        "jc {gated}",
        "2:",
        "cmp rdi, {clone}",
        "je 3f",
        "cmp rdi, {clone3}",
        "jne 4f",
        "3:",
        "mov byte ptr [rip + {sharing}], 1",
        "4:",
        "mov r10, [rip + {behind}]",
        "cmp r10, 1",
        "jbe {unresolved}",
        "jmp r10",
        ".cfi_endproc",
        numbers = const NUMBERS,
        ours = sym OURS,
        clone = const nr::CLONE,
        clone3 = const nr::CLONE3,
        sharing = sym SHARING,
        behind = sym BEHIND,
        gated = sym gated,
        unresolved = sym unresolved,
    )
}

/// `syscall(2)` as a library function; see the other architecture.
#[unsafe(naked)]
#[unsafe(no_mangle)]
#[cfg(target_arch = "aarch64")]
pub unsafe extern "C" fn syscall() -> isize {
    naked_asm!(
        ".cfi_startproc",
        "cmp x0, #{numbers}",
        "b.hs 2f",
        "lsr x9, x0, #6",
        "adrp x10, {ours}",
        "add x10, x10, :lo12:{ours}",
        "ldr x9, [x10, x9, lsl #3]",
        "lsr x9, x9, x0",
        "tbz x9, #0, 2f",
        "b {gated}",
        "2:",
        "cmp x0, #{clone}",
        "b.eq 4f",
        "cmp x0, #{clone3}",
        "b.ne 5f",
        "4:",
        "adrp x9, {sharing}",
        "mov w10, #1",
        "strb w10, [x9, :lo12:{sharing}]",
        "5:",
        "adrp x9, {behind}",
        "ldr x9, [x9, :lo12:{behind}]",
        "cmp x9, #1",
        "b.ls 3f",
        "br x9",
        "3:",
        "b {unresolved}",
        ".cfi_endproc",
        numbers = const NUMBERS,
        ours = sym OURS,
        clone = const nr::CLONE,
        clone3 = const nr::CLONE3,
        sharing = sym SHARING,
        behind = sym BEHIND,
        gated = sym gated,
        unresolved = sym unresolved,
    )
}

type Syscall = unsafe extern "C" fn(usize, usize, usize, usize, usize, usize, usize) -> isize;

unsafe extern "C" fn gated(
    number: usize,
    a: usize,
    b: usize,
    c: usize,
    d: usize,
    e: usize,
    f: usize,
) -> isize {
    // SAFETY: the program's own call, handed on.
    let call = || unsafe { unresolved(number, a, b, c, d, e, f) };
    if BEHIND.is_covered() {
        return call();
    }
    if sandboxes(number, a) {
        seen(Seen::Sandbox);
        return attach::sandboxing(call);
    }
    if number == nr::IO_URING_SETUP && attach::refuses_rings() {
        return super::table::no_function();
    }
    let frame = gate_for(number, [a, b, c, d, e, f]);
    let result = call();
    leave(frame, result);
    result
}

/// The call itself, before or after the function behind us is known.
unsafe extern "C" fn unresolved(
    number: usize,
    a: usize,
    b: usize,
    c: usize,
    d: usize,
    e: usize,
    f: usize,
) -> isize {
    match BEHIND.get(name!(syscall)) {
        // SAFETY: libc's syscall() takes a number and up to six arguments.
        Some(at) => unsafe { core::mem::transmute::<usize, Syscall>(at)(number, a, b, c, d, e, f) },
        None => -1,
    }
}

/// PR_SET_SECCOMP.
pub(super) const fn prctl_sandboxes(option: usize) -> bool {
    option == 22
}

#[inline(always)]
fn fd(arg: usize) -> i32 {
    arg as i32
}

#[inline(always)]
fn path(arg: usize) -> *const c_char {
    arg as *const c_char
}

fn meta(fd: i32) -> Frame {
    on(Meta, fd)
}

pub(super) fn ioctl(fd: i32, request: usize) -> Frame {
    if ioctl_changes(request) {
        on(Class::Copy, fd)
    } else {
        Frame::NONE
    }
}

/// fcntl: only lock commands are of interest.
pub(super) fn fcntl(fd: i32, command: usize, lock: usize) -> Frame {
    if fcntl_locks(command) {
        locks(fd, command, lock)
    } else {
        Frame::NONE
    }
}

/// Whether a call, if it succeeds, puts the program into a sandbox.
pub(crate) fn sandboxes(number: usize, argument: usize) -> bool {
    match number {
        nr::PRCTL => prctl_sandboxes(argument),
        // Operations 0 and 1 enter one, the others only ask.
        nr::SECCOMP => argument <= 1,
        _ => false,
    }
}

static PRCTL_BEHIND: Next = Next::new();
type Prctl = unsafe extern "C" fn(c_int, c_ulong, c_ulong, c_ulong, c_ulong) -> c_int;

/// `prctl(2)`: not in the table, because what is noted depends on the result.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn prctl(
    option: c_int,
    a: c_ulong,
    b: c_ulong,
    c: c_ulong,
    d: c_ulong,
) -> c_int {
    let call = || match PRCTL_BEHIND.get(name!(prctl)) {
        // SAFETY: libc's prctl() is variadic over up to four words.
        Some(at) => unsafe { core::mem::transmute::<usize, Prctl>(at)(option, a, b, c, d) },
        None => -1,
    };
    if !PRCTL_BEHIND.is_covered() && prctl_sandboxes(option as usize) {
        seen(Seen::Sandbox);
        return attach::sandboxing(|| call() as isize) as c_int;
    }
    call()
}

fn utimensat(dirfd: i32, path: usize) -> Frame {
    if path == 0 { meta(dirfd) } else { by_path() }
}

/// Takes the system call `number` past the gate.
fn gate_for(number: usize, args: [usize; 6]) -> Frame {
    calls::action(number).map_or(Frame::NONE, |action| gate_action(number, action, &args))
}

/// Takes a system call that does `action` past the gate.
#[inline(always)]
pub(crate) fn gate_action(number: usize, action: Action, a: &[usize; 6]) -> Frame {
    match action {
        Action::File(class, arg) => on_call(class, arg, number, a),
        Action::Ioctl => ioctl(fd(a[0]), a[1]),
        Action::Open(0) => opens(AT_FDCWD, path(a[0]), fd(a[1])),
        Action::Open(_) => opens(fd(a[0]), path(a[1]), fd(a[2])),
        Action::Open2 => opens_as(fd(a[0]), path(a[1]), O_CREAT | O_TRUNC, a[2]),
        Action::Handle => opens_handle(fd(a[2])),
        Action::Create => opens(AT_FDCWD, path(a[0]), O_CREAT | O_TRUNC),
        Action::Name => names(),
        Action::Rename => renames(),
        Action::Path => by_path(),
        Action::Truncate => truncates(path(a[0]), a[1] as i64),
        Action::Memory => into_memory(),
        Action::Times => utimensat(fd(a[0]), a[1]),
        Action::Submit => submit(),
        // Without anything to hand over it only waits for what was.
        Action::Enter if a[1] == 0 => Frame::NONE,
        Action::Enter => submit(),
        Action::Map => maps(a[2], a[3], fd(a[4])),
        Action::Remap => noted(Seen::Map),
        Action::Sync => syncs(fd(a[0])),
        Action::SyncAll => syncs_all(),
        Action::Flush => noted(Seen::Sync),
        Action::Fcntl => fcntl(fd(a[0]), a[1], a[2]),
        Action::Lock => flocks(fd(a[0]), fd(a[1])),
        Action::Close(arg) => closes(fd(a[usize::from(arg & 1)])),
        Action::CloseRange => noted(Seen::Close),
        // The kernel may take from it without being called again (IORING_SETUP_SQPOLL).
        Action::Ring => {
            leave(enter(Class::Submit, -1, || Target::Any), -1);
            Frame::NONE
        }
        // Told apart by `sandboxes`, if they matter.
        Action::Prctl | Action::Seccomp => Frame::NONE,
    }
}
