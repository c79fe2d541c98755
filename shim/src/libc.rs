//! What this library asks of a libc. All of it is weak: a program may have none (Go
//! without cgo, linked as a position-independent executable, has only the dynamic
//! linker), and must start all the same.

use core::ffi::{c_char, c_int, c_void};

core::arch::global_asm!(
    ".weak environ",
    ".weak getauxval",
    ".weak dl_iterate_phdr",
    ".weak __errno_location",
    ".weak stdout",
    ".weak __fpending",
    ".weak fflush_unlocked",
    ".weak fileno_unlocked",
    ".weak flockfile",
    ".weak funlockfile",
    ".weak pthread_setcancelstate",
);

/// The address of a symbol that may be missing; 0 if it is.
macro_rules! address {
    ($name:literal) => {{
        let at: usize;
        // SAFETY: loads an address from the global offset table.
        unsafe {
            #[cfg(target_arch = "x86_64")]
            core::arch::asm!(
                concat!("mov {}, [rip + ", $name, "@GOTPCREL]"),
                out(reg) at,
                options(nostack, pure, readonly),
            );
            #[cfg(target_arch = "aarch64")]
            core::arch::asm!(
                concat!("adrp {0}, :got:", $name),
                concat!("ldr {0}, [{0}, :got_lo12:", $name, "]"),
                out(reg) at,
                options(nostack, pure, readonly),
            );
        }
        at
    }};
}

/// A function of libc; `None` if it is missing.
macro_rules! function {
    ($name:literal: $type:ty) => {{
        let at = address!($name);
        // SAFETY: libc's function of this name has this type.
        (at != 0).then(|| unsafe { core::mem::transmute::<usize, $type>(at) })
    }};
}

/// Whether there is a libc.
pub(crate) fn is_present() -> bool {
    address!("getauxval") != 0 && address!("environ") != 0 && address!("__errno_location") != 0
}

/// `environ`; null if there is none, or before libc's constructor has run.
pub(crate) fn environment() -> *const *const c_char {
    let at = address!("environ") as *const *const *const c_char;
    if at.is_null() {
        return core::ptr::null();
    }
    // SAFETY: libc's variable.
    unsafe { *at }
}

/// An entry of the auxiliary vector; 0 if it is missing.
pub(crate) fn auxiliary(kind: usize) -> usize {
    // SAFETY: only reads what the kernel left.
    function!("getauxval": unsafe extern "C" fn(usize) -> usize)
        .map_or(0, |getauxval| unsafe { getauxval(kind) })
}

/// This thread's `errno`; null if there is none.
pub(crate) fn errno() -> *mut c_int {
    // SAFETY: only takes an address.
    function!("__errno_location": unsafe extern "C" fn() -> *mut c_int)
        .map_or(core::ptr::null_mut(), |location| unsafe { location() })
}

/// Calls `each` for every loaded object (dl_iterate_phdr(3)).
///
/// # Safety
/// `each` is safe to be called with `data`.
pub(crate) unsafe fn each_object<I>(
    each: unsafe extern "C" fn(*const I, usize, *mut c_void) -> c_int,
    data: *mut c_void,
) {
    type Each<I> = unsafe extern "C" fn(*const I, usize, *mut c_void) -> c_int;
    type Iterate<I> = unsafe extern "C" fn(Each<I>, *mut c_void) -> c_int;
    if let Some(iterate) = function!("dl_iterate_phdr": Iterate<I>) {
        // SAFETY: the caller's promise.
        unsafe { iterate(each, data) };
    }
}

/// The parts of stdio that `--stdio-records` uses.
#[derive(Clone, Copy)]
pub(crate) struct Stdio {
    /// Bytes in a stream's buffer that are not written yet.
    pub(crate) pending: unsafe extern "C" fn(*mut c_void) -> usize,
    /// Writes them.
    pub(crate) flush: unsafe extern "C" fn(*mut c_void) -> c_int,
    /// The stream's descriptor, or -1.
    pub(crate) descriptor: unsafe extern "C" fn(*mut c_void) -> c_int,
    /// Locks a stream, again and again for the same thread.
    pub(crate) lock: unsafe extern "C" fn(*mut c_void),
    /// Unlocks it once.
    pub(crate) unlock: unsafe extern "C" fn(*mut c_void),
    /// pthread_setcancelstate(3).
    pub(crate) set_cancel_state: unsafe extern "C" fn(c_int, *mut c_int) -> c_int,
}

impl Stdio {
    /// All of it; `None` if anything is missing.
    pub(crate) fn find() -> Option<Stdio> {
        type Stream = *mut c_void;
        Some(Stdio {
            pending: function!("__fpending": unsafe extern "C" fn(Stream) -> usize)?,
            flush: function!("fflush_unlocked": unsafe extern "C" fn(Stream) -> c_int)?,
            descriptor: function!("fileno_unlocked": unsafe extern "C" fn(Stream) -> c_int)?,
            lock: function!("flockfile": unsafe extern "C" fn(Stream))?,
            unlock: function!("funlockfile": unsafe extern "C" fn(Stream))?,
            set_cancel_state: function!("pthread_setcancelstate": unsafe extern "C" fn(c_int, *mut c_int) -> c_int)?,
        })
    }
}

/// The stream `stdout`; null if there is none.
pub(crate) fn stdout() -> *mut c_void {
    let at = address!("stdout") as *const *mut c_void;
    if at.is_null() {
        return core::ptr::null_mut();
    }
    // SAFETY: libc's variable.
    unsafe { *at }
}
