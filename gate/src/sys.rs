//! The few system calls both sides make on the segment, without libc: no
//! `errno` is touched and nothing can be interposed.

use core::sync::atomic::AtomicU32;

use crate::nr;

/// Makes one system call; returns the result, or minus the error number.
///
/// # Safety
/// As the call `nr` demands of its arguments.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub unsafe fn syscall6(nr: usize, a: [usize; 6]) -> isize {
    let result: isize;
    // SAFETY: the kernel clobbers only rax, rcx and r11 (x86-64 ABI, A.2.1);
    // memory effects are the caller's business.
    unsafe {
        core::arch::asm!(
            "syscall",
            inlateout("rax") nr as isize => result,
            in("rdi") a[0], in("rsi") a[1], in("rdx") a[2],
            in("r10") a[3], in("r8") a[4], in("r9") a[5],
            lateout("rcx") _, lateout("r11") _,
            options(nostack),
        );
    }
    result
}

/// Makes one system call; returns the result, or minus the error number.
///
/// # Safety
/// As the call `nr` demands of its arguments.
#[cfg(target_arch = "aarch64")]
#[inline(always)]
pub unsafe fn syscall6(nr: usize, a: [usize; 6]) -> isize {
    let result: isize;
    // SAFETY: the kernel preserves every register but x0 (svc calling convention).
    unsafe {
        core::arch::asm!(
            "svc 0",
            in("x8") nr,
            inlateout("x0") a[0] as isize => result,
            in("x1") a[1], in("x2") a[2], in("x3") a[3], in("x4") a[4], in("x5") a[5],
            options(nostack),
        );
    }
    result
}

/// `struct timespec` of the 64-bit ABIs.
#[repr(C)]
struct Timespec {
    sec: i64,
    nsec: i64,
}

const CLOCK_MONOTONIC: usize = 1;
// Not FUTEX_PRIVATE_FLAG: the waiters are in other processes.
const FUTEX_WAIT: usize = 0;
const FUTEX_WAKE: usize = 1;

/// CLOCK_MONOTONIC in nanoseconds, by a real system call (no vDSO, no libc).
pub fn monotonic_ns() -> u64 {
    let mut now = Timespec { sec: 0, nsec: 0 };
    // SAFETY: `now` is a writable timespec.
    unsafe {
        syscall6(
            nr::CLOCK_GETTIME,
            [CLOCK_MONOTONIC, &raw mut now as usize, 0, 0, 0, 0],
        );
    }
    now.sec as u64 * 1_000_000_000 + now.nsec as u64
}

/// Sleeps while `*word == seen`, at most `ns`. Returns for any reason: value
/// changed, woken, timed out, a signal. 0 if woken, else minus the error number.
pub fn futex_wait(word: &AtomicU32, seen: u32, ns: u64) -> isize {
    let timeout = Timespec {
        sec: (ns / 1_000_000_000) as i64,
        nsec: (ns % 1_000_000_000) as i64,
    };
    // SAFETY: the word is a live, aligned u32 and the timeout a readable timespec.
    unsafe {
        syscall6(
            nr::FUTEX,
            [
                word.as_ptr() as usize,
                FUTEX_WAIT,
                seen as usize,
                &raw const timeout as usize,
                0,
                0,
            ],
        )
    }
}

/// Wakes everybody who sleeps on `word`.
pub fn futex_wake_all(word: &AtomicU32) {
    // SAFETY: FUTEX_WAKE only uses the address of the word.
    unsafe {
        syscall6(
            nr::FUTEX,
            [
                word.as_ptr() as usize,
                FUTEX_WAKE,
                i32::MAX as usize,
                0,
                0,
                0,
            ],
        );
    }
}

/// A counter that user space can read without a system call: the time stamp
/// counter, or the generic timer. Its rate is in [`crate::abi::Header::ticks_per_us`].
#[inline(always)]
pub fn ticks() -> u64 {
    #[cfg(target_arch = "x86_64")]
    {
        // SAFETY: rdtsc is unprivileged unless PR_SET_TSC forbids it, which kills
        // programs that use clock_gettime through the vDSO just as well.
        unsafe { core::arch::x86_64::_rdtsc() }
    }
    #[cfg(target_arch = "aarch64")]
    {
        let now: u64;
        // SAFETY: CNTVCT_EL0 is readable from user space on Linux.
        unsafe { core::arch::asm!("mrs {}, cntvct_el0", out(reg) now, options(nomem, nostack)) };
        now
    }
}
