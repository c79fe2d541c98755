//! Units of work, for programs that cooperate with snapshim: what is done in a unit is in a
//! snapshot as a whole or not at all.
//!
//! A snapshot that is taken with `snapshim checkpoint --at unit` is made while no thread of the
//! program is in a unit. Without snapshim all of this does nothing, and costs a load and a branch.
//!
//! ```
//! use std::fs;
//! # let dir = std::env::temp_dir().join(format!("snapshim-unit-{}", std::process::id()));
//! # fs::create_dir_all(&dir)?;
//! # let (from, to) = (dir.join("from"), dir.join("to"));
//!
//! // With a guard: the unit ends where it goes out of scope.
//! {
//!     let _unit = snapshim_unit::Unit::begin();
//!     fs::write(&from, "90")?;
//!     fs::write(&to, "110")?;
//! }
//!
//! // Or around a closure, whose value is handed on.
//! snapshim_unit::unit(|| {
//!     fs::write(&from, "80")?;
//!     fs::write(&to, "120")
//! })?;
//! # fs::remove_dir_all(&dir)?;
//! # Ok::<(), std::io::Error>(())
//! ```
//!
//! Units nest; the outermost counts. Each belongs to the thread that began it:
//!
//! ```compile_fail
//! let unit = snapshim_unit::Unit::begin();
//! std::thread::spawn(move || drop(unit));
//! ```
//!
//! Keep them short, and let none be open while nothing is done: a thread that stays in one keeps
//! every snapshot from being taken at this point. Beginning a unit may wait, for as long as snapshim
//! was told that a call may (a second, unless told otherwise). So no unit should be
//! begun while another thread's waits for a lock that this one holds.
//!
//! # How it is found
//!
//! snapshim's library, which is preloaded into the program, has the functions `snapshim_begin` and
//! `snapshim_end`; see also `include/snapshim.h`, for C. They are looked up by weak references,
//! which the dynamic linker leaves at zero if there is no such library. So there is nothing to
//! link with, nothing is loaded, and it also works where everything is linked statically (there is
//! no shim then). Linux on x86-64 and aarch64; elsewhere, nothing is done.

#![no_std]

use core::marker::PhantomData;

/// A unit of work of this thread, until it is dropped.
///
/// A panic that is caught ends it as well: what was half done then is not kept from
/// snapshots for ever. If it is forgotten ([`core::mem::forget`]), no snapshot is taken at this
/// point while the thread lives.
#[derive(Debug)]
#[must_use = "the unit ends when this is dropped"]
pub struct Unit {
    /// Begun and ended by the same thread: neither `Send` nor `Sync`.
    _of_thread: PhantomData<*const ()>,
}

impl Unit {
    /// Begins one.
    #[inline]
    pub fn begin() -> Unit {
        begin();
        Unit {
            _of_thread: PhantomData,
        }
    }
}

impl Drop for Unit {
    #[inline]
    fn drop(&mut self) {
        end();
    }
}

/// Does `work` in a unit, and returns what it returns.
#[inline]
pub fn unit<T>(work: impl FnOnce() -> T) -> T {
    let _unit = Unit::begin();
    work()
}

/// Begins a unit that [`end`] ends, for where no guard can be kept. Each needs its end, by the
/// same thread.
#[inline]
pub fn begin() {
    if let Some(begin) = symbols::begin() {
        begin();
    }
}

/// Ends what [`begin`] began. Without that it does nothing.
#[inline]
pub fn end() {
    if let Some(end) = symbols::end() {
        end();
    }
}

/// Whether snapshim's library is in this program, so that units are of use to anybody.
#[inline]
pub fn is_watched() -> bool {
    symbols::begin().is_some() && symbols::end().is_some()
}

/// The two functions, if there are any.
///
/// What `#[linkage = "extern_weak"]` would do, which stable Rust does not have. The
/// address is read from the global offset table, never written into code or data: a linker
/// takes other weak references of a program for zero for good.
#[cfg(all(
    target_os = "linux",
    target_pointer_width = "64",
    any(target_arch = "x86_64", target_arch = "aarch64")
))]
mod symbols {
    use core::arch::asm;

    /// `snapshim_begin` or `snapshim_end`.
    pub(crate) type Function = extern "C" fn();

    macro_rules! address_of {
        ($name:literal) => {{
            let address: usize;
            // SAFETY: loads one word, which the linker provides and the dynamic linker has
            // filled in before any code of the program ran; changes nothing else. `.weak` may be
            // said as often as one likes.
            #[cfg(target_arch = "x86_64")]
            unsafe {
                asm!(
                    concat!(".weak ", $name),
                    concat!("mov {}, qword ptr [rip + ", $name, "@GOTPCREL]"),
                    out(reg) address,
                    options(pure, readonly, nostack, preserves_flags),
                );
            }
            // SAFETY: the same.
            #[cfg(target_arch = "aarch64")]
            unsafe {
                asm!(
                    concat!(".weak ", $name),
                    concat!("adrp {0}, :got:", $name),
                    concat!("ldr {0}, [{0}, :got_lo12:", $name, "]"),
                    out(reg) address,
                    options(pure, readonly, nostack, preserves_flags),
                );
            }
            // SAFETY: zero, which is `None`; or the address of that function, which has this
            // type (include/snapshim.h) in whatever library has one of this name.
            unsafe { core::mem::transmute::<usize, Option<Function>>(address) }
        }};
    }

    #[inline]
    pub(crate) fn begin() -> Option<Function> {
        address_of!("snapshim_begin")
    }

    #[inline]
    pub(crate) fn end() -> Option<Function> {
        address_of!("snapshim_end")
    }
}

/// Where there is no shim.
#[cfg(not(all(
    target_os = "linux",
    target_pointer_width = "64",
    any(target_arch = "x86_64", target_arch = "aarch64")
)))]
mod symbols {
    pub(crate) fn begin() -> Option<extern "C" fn()> {
        None
    }

    pub(crate) fn end() -> Option<extern "C" fn()> {
        None
    }
}
