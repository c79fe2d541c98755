//! The code that patched system call instructions jump to (x86-64).
//!
//! A window of the program's code is replaced by `jmp stub`. There are two pools
//! of stubs in this library's own text, and what differs between stubs lies in
//! tables beside: the address to go on at ([`Pool::returns`]), and for the first
//! pool the number of the call.
//!
//! | pool | the window was | the stub |
//! |---|---|---|
//! | numbered | `mov $nr, %eax; syscall` | loads the number |
//! | general | anything else | finds the number in `eax`; a number of no interest is called right there, on the program's own stack, for it may be clone or vfork |
//!
//! Being static, stubs have unwind tables: pthread_cancel and debuggers unwind by
//! signal through a call that blocks in here, from any instruction. A stub steps
//! over the red zone, puts the address to go on at where a return address would
//! stand, and so looks like a call made at the end of the window.
//!
//! The system call instruction preserves every register but rax, rcx and r11, so
//! this does, vector registers included; and the flags, which it also preserves,
//! are not: no compiler relies on that.

use core::arch::global_asm;
use core::sync::atomic::AtomicUsize;
use core::sync::atomic::Ordering::{Relaxed, Release};

use super::dispatch;
use crate::hooks::raw::OURS;

/// Stubs of each pool.
const NUMBERED: usize = 1024;
const GENERAL: usize = 512;
/// Bytes of a stub; [`unwind_of_pool`] knows what is where in it.
const NUMBERED_SIZE: usize = 32;
const GENERAL_SIZE: usize = 64;

#[repr(C)]
struct Table<const N: usize>([AtomicUsize; N]);

static NUMBERED_RETURNS: Table<NUMBERED> = Table([const { AtomicUsize::new(0) }; NUMBERED]);
static NUMBERED_NUMBERS: Table<NUMBERED> = Table([const { AtomicUsize::new(0) }; NUMBERED]);
static GENERAL_RETURNS: Table<GENERAL> = Table([const { AtomicUsize::new(0) }; GENERAL]);

unsafe extern "C" {
    static snapshim_numbered_pool: u8;
    static snapshim_general_pool: u8;
}

/// A pool of stubs.
pub(super) struct Pool {
    returns: &'static [AtomicUsize],
    numbers: &'static [AtomicUsize],
    size: usize,
    used: AtomicUsize,
    code: unsafe fn() -> usize,
}

pub(super) static NUMBERED_POOL: Pool = Pool {
    returns: &NUMBERED_RETURNS.0,
    numbers: &NUMBERED_NUMBERS.0,
    size: NUMBERED_SIZE,
    used: AtomicUsize::new(0),
    code: || (&raw const snapshim_numbered_pool) as usize,
};

pub(super) static GENERAL_POOL: Pool = Pool {
    returns: &GENERAL_RETURNS.0,
    numbers: &[],
    size: GENERAL_SIZE,
    used: AtomicUsize::new(0),
    code: || (&raw const snapshim_general_pool) as usize,
};

impl Pool {
    /// Whether near jumps from `at` reach every stub.
    pub(super) fn is_near(&self, at: usize) -> bool {
        const NEAR: usize = 0x7f00_0000;
        // SAFETY: only takes an address.
        unsafe { (self.code)() }.abs_diff(at) < NEAR
    }

    /// The address of a stub that goes on at `back`, for call `number`. `None`:
    /// there is none left.
    pub(super) fn take(&self, number: usize, back: usize) -> Option<usize> {
        // A library that was unloaded and is loaded again at its old place.
        let used = self.used.load(Relaxed).min(self.returns.len());
        let same = |i: &usize| {
            let of_number = self
                .numbers
                .get(*i)
                .is_none_or(|n| n.load(Relaxed) == number);
            of_number
                && self
                    .returns
                    .get(*i)
                    .is_some_and(|r| r.load(Relaxed) == back)
        };
        let index = match (0..used).find(same) {
            Some(index) => index,
            None => self.used.fetch_add(1, Relaxed),
        };
        let Some(slot) = self.returns.get(index) else {
            self.used.fetch_sub(1, Relaxed);
            return None;
        };
        if let Some(slot) = self.numbers.get(index) {
            slot.store(number, Relaxed);
        }
        slot.store(back, Release);
        // SAFETY: only takes an address.
        Some(unsafe { (self.code)() } + index * self.size)
    }
}

// The stubs. Their instructions have fixed lengths; `.org` makes sure of it.
global_asm!(
    ".section .text.snapshim_stubs,\"ax\",@progbits",
    ".balign 4096, 0xcc",
    ".hidden snapshim_numbered_pool",
    ".globl snapshim_numbered_pool",
    "snapshim_numbered_pool:",
    ".set snapshim_i, 0",
    ".rept {numbered}",
    "lea rsp, [rsp - 128]",                                  // 0
    "push qword ptr [rip + {returns} + 8 * snapshim_i]",     // 5
    "mov eax, dword ptr [rip + {numbers} + 8 * snapshim_i]", // 11
    "jmp snapshim_site",                                     // 17
    ".balign 32, 0xcc",
    ".set snapshim_i, snapshim_i + 1",
    ".endr",
    ".balign 4096, 0xcc",
    ".hidden snapshim_general_pool",
    ".globl snapshim_general_pool",
    "snapshim_general_pool:",
    ".set snapshim_i, 0",
    ".rept {general}",
    ".byte 0x3d", // cmp eax, {limit}                           0
    ".long {limit}",
    ".byte 0x73, 13",       // jae 20                           5
    "mov r11d, eax",        //                                  7
    "bt qword ptr [rip + {ours}], r11", //                     10
    ".byte 0x72, 8",        // jc 28                           18
    "syscall",              //                                 20
    "jmp qword ptr [rip + {general_returns} + 8 * snapshim_i]", // 22
    "lea rsp, [rsp - 128]", //                                 28
    "push qword ptr [rip + {general_returns} + 8 * snapshim_i]", // 33
    "jmp snapshim_site",    //                                 39
    ".balign 64, 0xcc",
    ".set snapshim_i, snapshim_i + 1",
    ".endr",
    ".text",
    numbered = const NUMBERED,
    general = const GENERAL,
    limit = const snapshim_gate::calls::NUMBERS,
    returns = sym NUMBERED_RETURNS,
    numbers = sym NUMBERED_NUMBERS,
    general_returns = sym GENERAL_RETURNS,
    ours = sym OURS,
);

// Where all stubs lead. On the stack: the address to go on at, above it the
// program's red zone. Below, what dispatch::Call is made of.
global_asm!(
    ".text",
    ".balign 64, 0xcc",
    ".hidden snapshim_site",
    ".globl snapshim_site",
    "snapshim_site:",
    ".cfi_startproc",
    ".cfi_def_cfa rsp, 136",
    ".cfi_offset rip, -136",
    "push rbp",
    ".cfi_adjust_cfa_offset 8",
    ".cfi_offset rbp, -144",
    "mov rbp, rsp",
    ".cfi_def_cfa_register rbp",
    "push r9",
    "push r8",
    "push r10",
    "push rdx",
    "push rsi",
    "push rdi",
    "push rax",
    "mov rdi, rsp",
    "sub rsp, 256",
    "and rsp, -16",
    "movaps [rsp], xmm0",
    "movaps [rsp + 16], xmm1",
    "movaps [rsp + 32], xmm2",
    "movaps [rsp + 48], xmm3",
    "movaps [rsp + 64], xmm4",
    "movaps [rsp + 80], xmm5",
    "movaps [rsp + 96], xmm6",
    "movaps [rsp + 112], xmm7",
    "movaps [rsp + 128], xmm8",
    "movaps [rsp + 144], xmm9",
    "movaps [rsp + 160], xmm10",
    "movaps [rsp + 176], xmm11",
    "movaps [rsp + 192], xmm12",
    "movaps [rsp + 208], xmm13",
    "movaps [rsp + 224], xmm14",
    "movaps [rsp + 240], xmm15",
    "call {dispatch}",
    "movaps xmm0, [rsp]",
    "movaps xmm1, [rsp + 16]",
    "movaps xmm2, [rsp + 32]",
    "movaps xmm3, [rsp + 48]",
    "movaps xmm4, [rsp + 64]",
    "movaps xmm5, [rsp + 80]",
    "movaps xmm6, [rsp + 96]",
    "movaps xmm7, [rsp + 112]",
    "movaps xmm8, [rsp + 128]",
    "movaps xmm9, [rsp + 144]",
    "movaps xmm10, [rsp + 160]",
    "movaps xmm11, [rsp + 176]",
    "movaps xmm12, [rsp + 192]",
    "movaps xmm13, [rsp + 208]",
    "movaps xmm14, [rsp + 224]",
    "movaps xmm15, [rsp + 240]",
    "lea rsp, [rbp - 48]",
    "pop rdi",
    "pop rsi",
    "pop rdx",
    "pop r10",
    "pop r8",
    "pop r9",
    "pop rbp",
    ".cfi_def_cfa rsp, 136",
    ".cfi_restore rbp",
    // The instruction leaves the address after it in rcx as well.
    "pop rcx",
    ".cfi_adjust_cfa_offset -8",
    ".cfi_register rip, rcx",
    "lea rsp, [rsp + 128]",
    ".cfi_adjust_cfa_offset -128",
    "jmp rcx",
    ".cfi_endproc",
    dispatch = sym dispatch::call,
);

// The unwind tables of the pools, by hand: the return address of a stub that has
// not pushed it yet is in its table, at the place that its own address says. The
// expressions find the stub's page from rip (register 16, which the unwinder
// knows: only a signal can interrupt a stub), and the table from the page, by
// distances that the linker fills in.
//
// Opcodes (DWARF 5, 7.7.1): breg7 0 = 77 00, breg16 0 = 80 00, const1u = 08,
// const2u = 0a, const4s = 0d, dup = 12, swap = 16, and = 1a, minus = 1c, mul = 1e,
// plus = 22, shr = 25, ge = 2a, lit n = 30+n, deref = 06.
macro_rules! unwind_of_pool {
    ($pool:literal, $returns:path, $mask:literal, $shift:literal, $stepped:literal, $pushed:literal) => {
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
            // CFA = rsp + (offset >= stepped) * 128 + (offset >= pushed) * 8
            ".byte 0x0f",
            ".uleb128 775f - 774f",
            "774:",
            ".byte 0x77, 0, 0x80, 0, 0x08, {mask}, 0x1a, 0x12",
            ".byte 0x08, {stepped}, 0x2a, 0x08, 128, 0x1e, 0x16",
            ".byte 0x08, {pushed}, 0x2a, 0x38, 0x1e, 0x22, 0x22",
            "775:",
            ".balign 8, 0",
            "773:",
            ".set snapshim_page, 0",
            ".rept 8",
            ".long 783f - 782f",
            "782:",
            ".long 782b - 771b",
            concat!(".long ", $pool, " + snapshim_page - ."),
            ".long 4096",
            ".byte 0",
            // rip = *((rip & 4095) / size * 8 + (rip >> 12 << 12) + (table - page))
            ".byte 0x16, 16",
            ".uleb128 785f - 784f",
            "784:",
            ".byte 0x80, 0, 0x0a, 0xff, 0x0f, 0x1a, 0x30 + {shift}, 0x25, 0x33, 0x24",
            ".byte 0x80, 0, 0x3c, 0x25, 0x3c, 0x24, 0x22",
            ".byte 0x0d",
            ".long {returns} + (snapshim_page >> {shift}) * 8 - .",
            ".byte 0x22, 0x0d",
            concat!(".long ", $pool, " + snapshim_page - ."),
            // That distance is counted from 6 bytes further on than the other.
            ".byte 0x1c, 0x36, 0x1c, 0x06",
            "785:",
            ".balign 8, 0",
            "783:",
            ".set snapshim_page, snapshim_page + 4096",
            ".endr",
            ".text",
            mask = const $mask,
            shift = const $shift,
            stepped = const $stepped,
            pushed = const $pushed,
            returns = sym $returns,
        );
    };
}

unwind_of_pool!("snapshim_numbered_pool", NUMBERED_RETURNS, 31, 5, 5, 11);
unwind_of_pool!("snapshim_general_pool", GENERAL_RETURNS, 63, 6, 33, 39);

const _: () = {
    // Eight pages each.
    assert!(NUMBERED * NUMBERED_SIZE == 8 * 4096);
    assert!(GENERAL * GENERAL_SIZE == 8 * 4096);
};
