//! The interposed functions: [`table`] lists them all, one row each.

use core::ffi::{c_char, c_int};

use snapshim_gate::calls::fcntl_locks_description;
use snapshim_gate::slot::{Class, Seen};

use crate::guard::{Frame, enter, seen};
use crate::member::Target;
use crate::sys::AT_FDCWD;
use crate::watch::{self, Event};

pub(crate) mod raw;
pub(crate) mod stdio;
mod table;

/// Finds the functions behind those hooks that cannot look for themselves, for they may
/// have no frame.
pub(crate) fn begin() {
    raw::resolve();
    stdio::resolve();
}

/// Makes one exported function of each row:
///
/// ```text
/// name(arguments) -> result: what happens at the gate; else what happens if
///     nobody behind us defines the name;
/// ```
macro_rules! hooks {
    ($( $(#[$meta:meta])* $name:ident($($arg:ident: $ty:ty),* $(,)?) -> $ret:ty:
        $gate:expr; else $fallback:expr; )*) => {
        mod behind {
            use crate::next::Next;
            $( #[allow(non_upper_case_globals)] pub(super) static $name: Next = Next::new(); )*
        }

        $(
            $(#[$meta])*
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $name($($arg: $ty),*) -> $ret {
                // clone's has nothing to do with files: it is about threads.
                const ALWAYS: bool = matches!(stringify!($name).as_bytes(), b"clone" | b"__clone");
                // First: only then it is known whether it passes the gate at its site, and one call that
                // passes twice counts as one that was left by a jump.
                let behind = behind::$name.get(name!($name));
                let frame: Frame = if !ALWAYS && behind::$name.is_covered() {
                    Frame::NONE
                } else {
                    $gate
                };
                let result = match behind {
                    // SAFETY: what the next object in search order defines under
                    // this name has the signature of the row; the call is the
                    // program's own, handed on.
                    Some(at) => unsafe {
                        let call: unsafe extern "C" fn($($ty),*) -> $ret =
                            core::mem::transmute(at);
                        call($($arg),*)
                    },
                    // SAFETY: the program's own call, made another way.
                    #[allow(unused_unsafe)]
                    None => unsafe { $fallback },
                };
                leave(frame, Outcome::of(&result));
                result
            }
        )*
    };
}

macro_rules! name {
    ($name:ident) => {{
        const NAME: &core::ffi::CStr =
            match core::ffi::CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes())
            {
                Ok(name) => name,
                Err(_) => c"",
            };
        NAME
    }};
}

use hooks;
use name;

const O_CREAT: c_int = 0o100;
const O_TRUNC: c_int = 0o1000;

/// The gate for open and its kin: only a call that may create or truncate counts.
#[inline(always)]
fn opens(dirfd: c_int, path: *const c_char, flags: c_int) -> Frame {
    opens_as(dirfd, path, flags, 0)
}

/// The same; `how`: see [`Target::Open`].
#[inline(always)]
fn opens_as(dirfd: c_int, path: *const c_char, flags: c_int, how: usize) -> Frame {
    if flags & (O_CREAT | O_TRUNC) == 0 {
        return Frame::NONE;
    }
    enter(Class::Open, -1, || Target::Open {
        dirfd,
        path,
        creates: flags & O_CREAT != 0,
        truncates: flags & O_TRUNC != 0,
        how,
    })
}

/// The gate for open_by_handle_at: it creates nothing, but may truncate any file.
fn opens_handle(flags: c_int) -> Frame {
    if flags & O_TRUNC == 0 {
        return Frame::NONE;
    }
    enter(Class::Path, -1, || Target::Any)
}

/// The gate for fopen: "w" and "a" create, "w" truncates, "r+" does neither.
fn opens_stream(path: *const c_char, mode: *const c_char) -> Frame {
    if path.is_null() || mode.is_null() {
        return Frame::NONE;
    }
    // SAFETY: a mode is a string; its first byte is there.
    match unsafe { *mode } as u8 {
        b'w' => opens(AT_FDCWD, path, O_CREAT | O_TRUNC),
        b'a' => opens(AT_FDCWD, path, O_CREAT),
        _ => Frame::NONE,
    }
}

/// The gate for calls on an open file.
#[inline(always)]
pub(crate) fn on(class: Class, fd: c_int) -> Frame {
    enter(class, fd, || Target::Fd(fd))
}

/// The gate for system calls on the open file in argument `arg`, which say what they change.
#[inline(always)]
pub(crate) fn on_call(class: Class, arg: u8, number: usize, args: &[usize; 6]) -> Frame {
    let fd = args[usize::from(arg & 3)] as c_int;
    enter(class, fd, || Target::Call { fd, number, args })
}

/// The gate for stdio, which writes from where the file stands.
#[inline(always)]
fn on_stream(fd: c_int) -> Frame {
    enter(Class::Write, fd, || Target::Stream(fd))
}

/// The gate for truncate.
#[inline(always)]
fn truncates(path: *const c_char, len: i64) -> Frame {
    enter(Class::Path, -1, || Target::Truncate { path, len })
}

/// The gate for calls that change the memory of another process.
#[inline(always)]
fn into_memory() -> Frame {
    enter(Class::Path, -1, || Target::Any)
}

/// The gate for calls that change a directory.
#[inline(always)]
fn names() -> Frame {
    enter(Class::Name, -1, || Target::Name)
}

/// The gate for renames, which are also a commit point.
#[inline(always)]
fn renames() -> Frame {
    seen(Seen::Rename);
    enter(Class::Name, -1, || Target::Rename)
}

/// The gate for calls that change a file by name.
#[inline(always)]
fn by_path() -> Frame {
    enter(Class::Path, -1, || Target::Name)
}

/// Calls that are only noted.
#[inline(always)]
fn noted(what: Seen) -> Frame {
    seen(what);
    Frame::NONE
}

/// Calls that make an open file durable.
fn syncs(fd: c_int) -> Frame {
    seen(Seen::Sync);
    watch::event(Event::Sync, fd, 0)
}

/// Calls that make everything durable.
fn syncs_all() -> Frame {
    seen(Seen::Sync);
    watch::event(Event::SyncAll, -1, 0)
}

/// fcntl's locks; `lock` points to a `struct flock`.
fn locks(fd: c_int, command: usize, lock: usize) -> Frame {
    watch::seen_lock();
    match fcntl_locks_description(command) {
        true => watch::event(Event::Ofd, fd, lock as u64),
        false => watch::event(Event::Lock, fd, lock as u64),
    }
}

/// flock and its operation.
fn flocks(fd: c_int, operation: c_int) -> Frame {
    watch::seen_lock();
    watch::event(Event::Flock, fd, operation as u32 as u64)
}

/// lockf and its command.
fn lockfs(fd: c_int, command: c_int) -> Frame {
    watch::seen_lock();
    watch::event(Event::Lockf, fd, command as u32 as u64)
}

/// Calls that close a descriptor.
#[inline(always)]
fn closes(fd: c_int) -> Frame {
    seen(Seen::Close);
    watch::event(Event::Close, fd, 0)
}

/// What a hook returns, as far as [`leave`](crate::guard::leave) wants to know.
trait Outcome {
    /// Not negative if the call succeeded.
    fn of(&self) -> isize;
}

impl Outcome for isize {
    #[inline(always)]
    fn of(&self) -> isize {
        *self
    }
}

impl Outcome for c_int {
    #[inline(always)]
    fn of(&self) -> isize {
        *self as isize
    }
}

impl Outcome for *mut core::ffi::c_void {
    #[inline(always)]
    fn of(&self) -> isize {
        if self.is_null() { -1 } else { 0 }
    }
}

impl Outcome for () {
    #[inline(always)]
    fn of(&self) -> isize {
        0
    }
}

/// mmap: a shared and writable mapping lets a file be changed without a call, so
/// making one waits like a change, and is counted apart. So does one that can be made
/// writable without a call that waits.
#[inline(always)]
fn maps(protection: usize, flags: usize, fd: c_int) -> Frame {
    const PROT_WRITE: usize = 2;
    const MAP_SHARED: usize = 1;
    if fd < 0 || flags & MAP_SHARED == 0 {
        return noted(Seen::Map);
    }
    if protection & PROT_WRITE == 0 {
        seen(Seen::Map);
        seen(Seen::MapShared);
        return enter(Class::Write, fd, || Target::Map(fd));
    }
    let frame = on(Class::Write, fd);
    seen(Seen::MapShared);
    watch::mapped();
    frame
}
