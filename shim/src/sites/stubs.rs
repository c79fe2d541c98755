//! The code that patched system call instructions jump to (x86-64).
//!
//! A window of the program's code is replaced by `jmp stub`. The stubs lie in two
//! pools in this library's own text; one is made ready for a site by writing the
//! address to go on at, and the number, into its instructions.
//!
//! | pool | the window was | the stub |
//! |---|---|---|
//! | numbered | `mov $nr, %eax; syscall` | loads the number |
//! | general | anything else | finds the number in `eax`; a number of no interest is called right there, on the program's own stack, for it may be clone or vfork |
//!
//! A stub steps over the red zone, calls `snapshim_enter`, makes the system call, calls
//! `snapshim_leave` and jumps back. There is no indirect jump in it, and no return to
//! a caller from before the system call: a processor does not predict those well after
//! the kernel has run.
//!
//! The pools have unwind tables: pthread_cancel and debuggers unwind by signal
//! through a call that blocks in here, from any instruction. What they see is a call
//! made at the end of the window.
//!
//! The system call instruction preserves every register but rax, rcx and r11, so
//! this does; but the flags, which it also preserves: no compiler relies on those.
//! Vector registers are simply not used ([`dispatch::enter`]).

use core::arch::global_asm;
use core::sync::atomic::AtomicUsize;
use core::sync::atomic::Ordering::Relaxed;

use super::dispatch;
use super::memory::Code;
use super::patch::{far_jump, near_distance};
use crate::hooks::raw::OURS;

/// Bytes of the pools: eight pages each.
const POOL: usize = 8 * 4096;
/// Bytes of a stub, and where in it the address to go on at stands.
const NUMBERED_SHIFT: usize = 6;
const NUMBERED_BACK: usize = 48;
const GENERAL_SHIFT: usize = 7;
const GENERAL_BACK: usize = 64;
/// Bytes beside the stubs, for code of any kind.
const LOOSE: usize = 4 * 4096;

static LOOSE_USED: AtomicUsize = AtomicUsize::new(0);

unsafe extern "C" {
    static snapshim_numbered_pool: u8;
    static snapshim_general_pool: u8;
    static snapshim_loose_pool: u8;
}

/// A pool of stubs.
pub(super) struct Pool {
    /// Bytes of a stub.
    size: usize,
    used: AtomicUsize,
    /// Where in a stub the number stands, if it does, and where distances back do.
    number_at: Option<usize>,
    distances_at: &'static [usize],
    /// Where the address to go on at stands, for the unwinder; behind it what a general stub
    /// was made for: the site, a hash of the bytes that stood there, and where the site's
    /// jump leads.
    back_at: usize,
}

pub(super) static NUMBERED: Pool = Pool {
    size: 1 << NUMBERED_SHIFT,
    used: AtomicUsize::new(0),
    number_at: Some(9),
    distances_at: &[34],
    back_at: NUMBERED_BACK,
};

pub(super) static GENERAL: Pool = Pool {
    size: 1 << GENERAL_SHIFT,
    used: AtomicUsize::new(0),
    number_at: None,
    distances_at: &[23, 56],
    back_at: GENERAL_BACK,
};

/// Where all stubs lie: from the first byte to the last.
fn bounds() -> (usize, usize) {
    let begin = (&raw const snapshim_numbered_pool) as usize;
    let loose = (&raw const snapshim_loose_pool) as usize;
    (begin, loose + LOOSE)
}

/// The pools, to be written to.
pub(super) fn open() -> Option<Code> {
    let (begin, end) = bounds();
    // SAFETY: whole pages of our own text. Stubs that are in use are not changed.
    unsafe { Code::open(begin, end) }
}

/// Whether near jumps from `at` reach every stub.
pub(super) fn is_near(at: usize) -> bool {
    const NEAR: usize = 0x7f00_0000;
    let (begin, end) = bounds();
    at.abs_diff(begin).max(at.abs_diff(end)) < NEAR
}

impl Pool {
    fn begin(&self) -> usize {
        match self.number_at {
            Some(_) => (&raw const snapshim_numbered_pool) as usize,
            None => (&raw const snapshim_general_pool) as usize,
        }
    }

    /// The stubs that are in use.
    fn stubs(&self) -> impl Iterator<Item = usize> {
        (0..self.used.load(Relaxed)).map(|index| self.begin() + index * self.size)
    }

    /// The address of a stub that goes on at `back`, for call `number`, written to
    /// `stubs`. `None`: there is none left.
    pub(super) fn take(&self, stubs: &mut Code, number: i32, back: usize) -> Option<usize> {
        // A library that was unloaded and is loaded again at its old place.
        let same = |stub: &usize| {
            let number_at = self.number_at.map(|at| stub + at);
            word(stub + self.back_at) == back
                && number_at.is_none_or(|at| stubs.read(at, 4) == Some(&number.to_le_bytes()))
        };
        if let Some(stub) = self.stubs().find(same) {
            return Some(stub);
        }
        let used = self.used.load(Relaxed);
        if (used + 1) * self.size > POOL {
            return None;
        }
        let stub = self.begin() + used * self.size;
        let target = match near_distance(stub, back) {
            Some(_) => back,
            None => take_far(stubs, back)?,
        };
        if let Some(at) = self.number_at {
            stubs.write(stub + at, &number.to_le_bytes())?;
        }
        for at in self.distances_at {
            // A distance counts from the end of its jump.
            let jump = stub + at - 1;
            stubs.write(stub + at, &near_distance(jump, target)?.to_le_bytes())?;
        }
        stubs.write(stub + self.back_at, &back.to_le_bytes())?;
        self.used.store(used + 1, Relaxed);
        Some(stub)
    }
}

/// A word in a stub.
fn word(at: usize) -> usize {
    // SAFETY: called only with addresses in the pools, which are readable.
    unsafe { (at as *const usize).read_volatile() }
}

/// FNV-1a.
fn hash(bytes: &[u8]) -> usize {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ usize::from(*byte)).wrapping_mul(0x100_0000_01b3)
    })
}

/// Where the jump of this very site led, if it was patched before.
pub(super) fn moved(site: usize, original: &[u8]) -> Option<usize> {
    let kept = |stub: usize| stub + GENERAL.back_at + 8;
    let stub = GENERAL
        .stubs()
        .find(|stub| word(kept(*stub)) == site && word(kept(*stub) + 8) == hash(original))?;
    Some(word(kept(stub) + 16))
}

/// Keeps what the general stub `stub` was made for.
pub(super) fn keep_moved(
    stubs: &mut Code,
    stub: usize,
    site: usize,
    original: &[u8],
    target: usize,
) -> Option<()> {
    let mut bytes = [0; 24];
    for (to, word) in bytes.chunks_mut(8).zip([site, hash(original), target]) {
        to.copy_from_slice(&word.to_le_bytes());
    }
    stubs.write(stub + GENERAL.back_at + 8, &bytes)
}

/// A jump to `target` that stubs can reach.
fn take_far(stubs: &mut Code, target: usize) -> Option<usize> {
    let at = loose();
    push_loose(stubs, &far_jump(target))?;
    Some(at)
}

/// Where [`push_loose`] puts the next byte.
pub(super) fn loose() -> usize {
    (&raw const snapshim_loose_pool) as usize + LOOSE_USED.load(Relaxed)
}

/// Appends code to what lies beside the stubs.
pub(super) fn push_loose(stubs: &mut Code, bytes: &[u8]) -> Option<()> {
    let used = LOOSE_USED.load(Relaxed);
    let end = used.checked_add(bytes.len()).filter(|end| *end <= LOOSE)?;
    stubs.write(loose(), bytes)?;
    LOOSE_USED.store(end, Relaxed);
    Some(())
}

// The stubs. Their instructions have fixed lengths, in the comments the offsets;
// `unwind_of_pool` and `Pool` know them.
global_asm!(
    ".section .text.snapshim_stubs,\"ax\",@progbits",
    ".balign 4096, 0xcc",
    ".hidden snapshim_numbered_pool",
    ".globl snapshim_numbered_pool",
    "snapshim_numbered_pool:",
    ".rept {numbered}",
    "lea rsp, [rsp - 144]",    //  0: the red zone, and a frame
    ".byte 0xb8, 0, 0, 0, 0",  //  8: mov eax, number
    "call snapshim_enter",     // 13
    "syscall",                 // 18
    "call snapshim_leave",     // 20
    "lea rsp, [rsp + 144]",    // 25
    ".byte 0xe9, 0, 0, 0, 0",  // 33: jmp back
    ".balign 16, 0xcc",
    ".quad 0, 0",              // 48: the address to go on at
    ".endr",
    ".hidden snapshim_general_pool",
    ".globl snapshim_general_pool",
    "snapshim_general_pool:",
    ".rept {general}",
    ".byte 0x3d",              //  0: cmp eax, limit
    ".long {limit}",
    ".byte 0x73, 13",          //  5: jae 20
    "mov r11d, eax",           //  7
    "bt qword ptr [rip + {ours}], r11", // 10
    ".byte 0x72, 7",           // 18: jc 27
    "syscall",                 // 20
    ".byte 0xe9, 0, 0, 0, 0",  // 22: jmp back
    "lea rsp, [rsp - 144]",    // 27
    "call snapshim_enter",     // 35
    "syscall",                 // 40
    "call snapshim_leave",     // 42
    "lea rsp, [rsp + 144]",    // 47
    ".byte 0xe9, 0, 0, 0, 0",  // 55: jmp back
    ".balign 64, 0xcc",
    ".quad 0, 0, 0, 0, 0, 0, 0, 0", // 64: the address to go on at, and what is kept
    ".endr",
    ".hidden snapshim_loose_pool",
    ".globl snapshim_loose_pool",
    "snapshim_loose_pool:",
    ".fill {loose}, 1, 0xcc",
    ".text",
    numbered = const POOL >> NUMBERED_SHIFT,
    general = const POOL >> GENERAL_SHIFT,
    loose = const LOOSE,
    limit = const snapshim_gate::calls::NUMBERS,
    ours = sym OURS,
);

// What stubs call. Both keep every register but rcx and r11; `snapshim_enter` has
// dispatch::Call on its stack and dispatch::Kept in the stub's.
global_asm!(
    // As dispatch::Call, from rax up.
    ".macro snapshim_keep",
    "push rbp",
    ".cfi_def_cfa_offset 16",
    ".cfi_offset rbp, -16",
    "mov rbp, rsp",
    ".cfi_def_cfa_register rbp",
    "push r9",
    "push r8",
    "push r10",
    "push rdx",
    "push rsi",
    "push rdi",
    "push rax",
    ".endm",
    ".macro snapshim_put_back",
    "pop rax",
    "pop rdi",
    "pop rsi",
    "pop rdx",
    "pop r10",
    "pop r8",
    "pop r9",
    "pop rbp",
    ".cfi_def_cfa rsp, 8",
    ".cfi_restore rbp",
    ".endm",
    ".text",
    ".balign 64, 0xcc",
    ".hidden snapshim_enter",
    ".globl snapshim_enter",
    "snapshim_enter:",
    ".cfi_startproc",
    "snapshim_keep",
    "mov rdi, rsp",
    "lea rsi, [rbp + 16]",
    "and rsp, -16",
    "call {enter}",
    "lea rsp, [rbp - 56]",
    "test al, al",
    "snapshim_put_back",
    "jne 2f",
    "ret",
    // The call has been made, its result is in the place of the number: skip it and
    // what follows it.
    "2:",
    "add qword ptr [rsp], 7",
    "ret",
    ".cfi_endproc",
    ".balign 64, 0xcc",
    ".hidden snapshim_leave",
    ".globl snapshim_leave",
    "snapshim_leave:",
    ".cfi_startproc",
    "snapshim_keep",
    "lea rdi, [rbp + 16]",
    "mov rsi, rax",
    "and rsp, -16",
    "call {leave}",
    "lea rsp, [rbp - 56]",
    "snapshim_put_back",
    "ret",
    ".cfi_endproc",
    enter = sym dispatch::enter,
    leave = sym dispatch::leave,
);

// The unwind tables of the pools, by hand: where a stub's return address is to be
// found depends on which stub it is. The expressions find the stub from rip (register
// 16, which the unwinder knows of the frame it comes from), and the address in it.
//
// Opcodes (DWARF 5, 7.7.1): breg7 0 = 77 00, breg16 0 = 80 00, const1u = 08,
// dup = 12, swap = 16, and = 1a, minus = 1c, mul = 1e, plus = 22, plus_uconst = 23,
// shl = 24, shr = 25, ge = 2a, lit n = 30 + n, deref = 06.
macro_rules! unwind_of_pool {
    ($pool:literal, $shift:path, $stepped:literal, $end:literal, $back_at:path) => {
        global_asm!(
            ".section .eh_frame,\"a\",@unwind",
            ".balign 8",
            "771:",
            ".long 773f - 772f",
            "772:",
            ".long 0",       // a CIE
            ".byte 1",       // version
            ".asciz \"zR\"",
            ".byte 1",       // code alignment
            ".byte 0x78",    // data alignment: -8
            ".byte 16",      // return address: rip
            ".byte 1, 0x1b", // addresses: pc-relative, 4 bytes
            // CFA = rsp + ((offset >= stepped) - (offset >= end)) * 144
            ".byte 0x0f",
            ".uleb128 775f - 774f",
            "774:",
            ".byte 0x77, 0, 0x80, 0, 0x08, (1 << {shift}) - 1, 0x1a, 0x12",
            ".byte 0x08, {stepped}, 0x2a, 0x16, 0x08, {end}, 0x2a, 0x1c",
            ".byte 0x08, 144, 0x1e, 0x22",
            "775:",
            ".balign 8, 0",
            "773:",
            ".long 783f - 782f",
            "782:",
            ".long 782b - 771b",
            concat!(".long ", $pool, " - ."),
            ".long {pool}",
            ".byte 0",
            // rip = *((rip >> shift << shift) + back_at)
            ".byte 0x16, 16",
            ".uleb128 785f - 784f",
            "784:",
            ".byte 0x80, 0, 0x30 + {shift}, 0x25, 0x30 + {shift}, 0x24, 0x23, {back_at}, 0x06",
            "785:",
            ".balign 8, 0",
            "783:",
            ".text",
            pool = const POOL,
            shift = const $shift,
            back_at = const $back_at,
            stepped = const $stepped,
            end = const $end,
        );
    };
}

unwind_of_pool!(
    "snapshim_numbered_pool",
    NUMBERED_SHIFT,
    8,
    33,
    NUMBERED_BACK
);
unwind_of_pool!("snapshim_general_pool", GENERAL_SHIFT, 35, 55, GENERAL_BACK);
