//! The interposed functions: [`table`] lists them all, one row each.

use core::ffi::{c_char, c_int};

use snapshim_gate::slot::{Class, Seen};

use crate::guard::{Frame, enter, seen};
use crate::member::Target;
use crate::sys::AT_FDCWD;

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
                let frame: Frame = if !ALWAYS && behind::$name.is_covered() {
                    Frame::NONE
                } else {
                    $gate
                };
                let result = match behind::$name.get(name!($name)) {
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
                leave(frame);
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
    if flags & (O_CREAT | O_TRUNC) == 0 {
        return Frame::NONE;
    }
    let creates = flags & O_CREAT != 0;
    enter(Class::Open, -1, || Target::Open {
        dirfd,
        path,
        creates,
    })
}

/// The gate for open_by_handle_at: it creates nothing, but may truncate any file.
fn opens_handle(flags: c_int) -> Frame {
    if flags & O_TRUNC == 0 {
        return Frame::NONE;
    }
    by_path()
}

/// The gate for fopen: "w" and "a" create, "w" truncates, "r+" does neither.
fn opens_stream(path: *const c_char, mode: *const c_char) -> Frame {
    if path.is_null() || mode.is_null() {
        return Frame::NONE;
    }
    // SAFETY: a mode is a string; its first byte is there.
    match unsafe { *mode } as u8 {
        b'w' | b'a' => opens(AT_FDCWD, path, O_CREAT),
        _ => Frame::NONE,
    }
}

/// The gate for calls on an open file.
#[inline(always)]
pub(crate) fn on(class: Class, fd: c_int) -> Frame {
    enter(class, fd, || Target::Fd(fd))
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
    names()
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

/// mmap: a shared and writable mapping lets a file be changed without a call, so
/// making one waits like a change, and is counted apart.
#[inline(always)]
fn maps(protection: usize, flags: usize, fd: c_int) -> Frame {
    const PROT_WRITE: usize = 2;
    const MAP_SHARED: usize = 1;
    if fd < 0 || protection & PROT_WRITE == 0 || flags & MAP_SHARED == 0 {
        return noted(Seen::Map);
    }
    let frame = on(Class::Write, fd);
    seen(Seen::MapShared);
    frame
}
