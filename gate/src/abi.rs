//! The layout of the gate file, version 4.
//!
//! Rule: fields are only ever appended, into reserved space; anything else is a
//! new version, which is a new file. Every field is an atomic of fixed width,
//! valid at any mapping address. What is read from here is untrusted: the only
//! numbers used as sizes or indices are checked by [`Gate::attach`] against the
//! size of the file, and clamped on every later use.
//!
//! ```text
//! 0     Header   identity, then the gate word on a line of its own, then policy
//! 192   Header   two member tables
//! 4800  Header   what is noted while the gate is armed
//! 13696 Slot × slot_count, 128 bytes each
//!       Guard, what is guarded after a cut
//!       u64 × slot_count, what each thread asks the guard for
//!       Marks, what was changed since which cut: blocks of memory only where a set asks for it
//! ```

use core::mem::{offset_of, size_of};
use core::sync::atomic::Ordering::{Acquire, Relaxed, SeqCst};
use core::sync::atomic::{AtomicU32, AtomicU64};

use crate::guard::Guard;
use crate::marks::Marks;
use crate::slot::Slot;
use crate::table::MemberTable;
use crate::watch::Watch;

/// The first eight bytes of a gate file, written last when one is made.
pub const MAGIC: u64 = u64::from_le_bytes(*b"snapshim");
/// The version of this layout.
pub const ABI_VERSION: u32 = 4;
/// Slots of a gate unless asked otherwise: one for each thread of the set.
pub const DEFAULT_SLOTS: u32 = 4096;
/// Most slots a gate may have.
pub const MAX_SLOTS: u32 = 65536;
/// Bytes before the first slot. Not a multiple of a page: what lies at the start of
/// a page shares its place in the caches with much else that does, and the first
/// slots, which are used most, cost 5 ns more a call there.
pub const HEADER_SIZE: usize = 13696;
/// Longest time one call may be made to wait, unless asked otherwise: 1 s.
pub const DEFAULT_HOLD_BOUND_MS: u32 = 1_000;
/// Longest time that may be asked for: 10 s.
pub const MAX_HOLD_BOUND_MS: u32 = 10_000;

/// Option: stdio calls that made libc write flush the rest.
pub const STDIO_RECORDS: u32 = 1;
/// Option: io_uring_setup fails with ENOSYS.
pub const REFUSE_RINGS: u32 = 2;
/// Option: calls mark what they change, once the coordinator says so ([`crate::word::MARKS`]).
pub const MARK_BLOCKS: u32 = 4;

/// The head of a gate file. W: who writes the field (M the maker of the file,
/// C the coordinator holding the set's lock, S any shim).
#[repr(C, align(64))]
#[derive(Debug)]
pub struct Header {
    /// M. [`MAGIC`].
    pub magic: AtomicU64,
    /// M. [`ABI_VERSION`].
    pub version: AtomicU32,
    /// M. [`HEADER_SIZE`].
    pub header_size: AtomicU32,
    /// M. Size of a slot in bytes.
    pub slot_size: AtomicU32,
    /// M. Number of slots.
    pub slot_count: AtomicU32,
    /// M. Random; tells two gates of the same name apart.
    pub gate_id: AtomicU64,
    _identity: [AtomicU32; 8],

    /// C, and S to break a hold. The gate word, see [`crate::word`]: the futex.
    pub word: AtomicU32,
    _word_line: [AtomicU32; 15],

    /// C. Longest time one call waits in total, ms; clamped to [`MAX_HOLD_BOUND_MS`].
    pub hold_bound_ms: AtomicU32,
    /// M. Rate of [`crate::sys::ticks`], per µs.
    pub ticks_per_us: AtomicU32,
    /// S. Threads that found no free slot: writers nobody can wait for.
    pub overflow: AtomicU32,
    /// S. One more than the highest slot ever claimed.
    pub high_water: AtomicU32,
    /// S. Holds broken by a waiter.
    pub breaks: AtomicU32,
    /// C. What the set asks of its programs: [`STDIO_RECORDS`], [`REFUSE_RINGS`],
    /// [`MARK_BLOCKS`].
    pub options: AtomicU32,
    /// C. Length of the last hold, ns.
    pub last_hold_ns: AtomicU64,
    /// C. When the gate was last opened, CLOCK_MONOTONIC, ns.
    pub last_open_ns: AtomicU64,
    _policy_line: [AtomicU32; 6],

    /// C. The member tables; see [`crate::word::bank`].
    pub tables: [MemberTable; 2],

    /// C and S. What is noted while the gate is armed.
    pub watch: Watch,
}

const _: () = {
    assert!(offset_of!(Header, word) == 64);
    assert!(offset_of!(Header, hold_bound_ms) == 128);
    assert!(offset_of!(Header, tables) == 192);
    assert!(offset_of!(Header, watch) == 4800);
    assert!(size_of::<Header>() <= HEADER_SIZE);
    assert!(size_of::<MemberTable>() == 2304);
    assert!(size_of::<Slot>() == 128);
    assert!(HEADER_SIZE.is_multiple_of(size_of::<Slot>()));
    assert!(offset_of!(Slot, sp) == 24);
    assert!(offset_of!(Slot, owner) == 32);
    assert!(offset_of!(Slot, longest_wait_us) == 56);
    assert!(offset_of!(Slot, seen) == 80);
    assert!(offset_of!(Slot, ticket) == 124);
    assert!(size_of::<Slot>().is_multiple_of(align_of::<Guard>()));
    assert!(HEADER_SIZE.is_multiple_of(align_of::<Guard>()));
    assert!(size_of::<Guard>() == 1_180_224);
    assert!(size_of::<Marks>() == 4_456_576);
    assert!(align_of::<Marks>() <= PAGE);
};

/// Where the guard of a gate with `slots` slots lies.
const fn guard_offset(slots: u32) -> usize {
    HEADER_SIZE + slots as usize * size_of::<Slot>()
}

/// Where its asks lie.
const fn asks_offset(slots: u32) -> usize {
    guard_offset(slots) + size_of::<Guard>()
}

/// What the marks are aligned to: their memory can be had, or not, apart from all else.
const PAGE: usize = 65_536;

/// Where the marks of a gate with `slots` slots lie. What is before them is needed always.
pub const fn marks_offset(slots: u32) -> usize {
    (asks_offset(slots) + slots as usize * size_of::<AtomicU64>()).next_multiple_of(PAGE)
}

/// The size of a gate file with `slots` slots, bytes.
pub const fn file_size(slots: u32) -> usize {
    marks_offset(slots) + size_of::<Marks>()
}

/// Why a file is not a gate this build can use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Invalid {
    /// Shorter than a header.
    Truncated,
    /// Not a gate file, or not finished.
    Magic,
    /// Another version of the layout.
    Version(u32),
    /// Sizes that contradict each other or the file.
    Geometry,
}

impl core::fmt::Display for Invalid {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Invalid::Truncated => write!(f, "it is too short"),
            Invalid::Magic => write!(f, "it is not a gate file"),
            Invalid::Version(v) => {
                write!(
                    f,
                    "it has layout version {v}, this build speaks version {ABI_VERSION}"
                )
            }
            Invalid::Geometry => write!(f, "its sizes contradict each other"),
        }
    }
}

/// A mapped gate file whose sizes have been checked once.
#[derive(Clone, Copy, Debug)]
pub struct Gate {
    header: &'static Header,
    slots: &'static [Slot],
    guard: &'static Guard,
    asks: &'static [AtomicU64],
    marks: &'static Marks,
}

impl Gate {
    /// Checks `len` bytes mapped at `base`.
    ///
    /// # Safety
    /// `base` is page-aligned and mapped shared, readable and writable, for `len`
    /// bytes, until the process ends or execs. (If the owner of the file truncates
    /// it, any access is a SIGBUS; nothing on this side can prevent that.)
    pub unsafe fn attach(base: *const u8, len: usize) -> Result<Gate, Invalid> {
        if len < HEADER_SIZE {
            return Err(Invalid::Truncated);
        }
        // SAFETY: mapped, aligned to a page, long enough; all fields are atomics.
        let header = unsafe { &*base.cast::<Header>() };
        if header.magic.load(Acquire) != MAGIC {
            return Err(Invalid::Magic);
        }
        let version = header.version.load(Relaxed);
        if version != ABI_VERSION {
            return Err(Invalid::Version(version));
        }
        let count = header.slot_count.load(Relaxed);
        if count == 0
            || count > MAX_SLOTS
            || header.header_size.load(Relaxed) as usize != HEADER_SIZE
            || header.slot_size.load(Relaxed) as usize != size_of::<Slot>()
            || len != file_size(count)
        {
            return Err(Invalid::Geometry);
        }
        // SAFETY: `count` slots lie within `len`; a slot is made of atomics.
        let slots = unsafe {
            core::slice::from_raw_parts(base.add(HEADER_SIZE).cast::<Slot>(), count as usize)
        };
        // SAFETY: it lies within `len`, aligned (see above), and is made of atomics.
        let guard = unsafe { &*base.add(guard_offset(count)).cast::<Guard>() };
        // SAFETY: as with the slots.
        let asks = unsafe {
            let asks = base.add(asks_offset(count)).cast::<AtomicU64>();
            core::slice::from_raw_parts(asks, count as usize)
        };
        // SAFETY: as with the guard. A page that no block was reserved for is not touched: whoever
        // sets `MARK_BLOCKS`, or `word::MARKS`, has seen to that.
        let marks = unsafe { &*base.add(marks_offset(count)).cast::<Marks>() };
        Ok(Gate {
            header,
            slots,
            guard,
            asks,
            marks,
        })
    }

    /// The header.
    #[inline(always)]
    pub fn header(&self) -> &'static Header {
        self.header
    }

    /// All slots.
    #[inline(always)]
    pub fn slots(&self) -> &'static [Slot] {
        self.slots
    }

    /// The slots that were ever claimed. To drain a hold, looked up after the close,
    /// like the counts: a thread raises the mark (SeqCst) before its first look.
    pub fn used_slots(&self) -> &'static [Slot] {
        let high = self.header.high_water.load(SeqCst) as usize;
        &self.slots[..high.min(self.slots.len())]
    }

    /// What is guarded.
    pub fn guard(&self) -> &'static Guard {
        self.guard
    }

    /// What was changed since which cut. Only to be looked at if the set asks for it
    /// ([`MARK_BLOCKS`]): else there may be no memory for it.
    pub fn marks(&self) -> &'static Marks {
        self.marks
    }

    /// Whether the set asks for marks.
    pub fn wants_marks(&self) -> bool {
        self.header.options.load(Acquire) & MARK_BLOCKS != 0
    }

    /// What the owners of [`Gate::used_slots`] ask the guard for ([`crate::guard::Ask`]).
    pub fn used_asks(&self) -> &'static [AtomicU64] {
        &self.asks[..self.used_slots().len()]
    }

    /// The cell in which the owner of a slot of this gate asks.
    pub fn ask(&self, slot: &Slot) -> Option<&'static AtomicU64> {
        let offset = (core::ptr::from_ref(slot) as usize).checked_sub(self.slots.as_ptr() as usize);
        self.asks.get(offset? / size_of::<Slot>())
    }

    /// The member table of `bank` (0 or 1).
    pub fn table(&self, bank: usize) -> &'static MemberTable {
        &self.header.tables[bank & 1]
    }

    /// The hold bound in force, ns.
    pub fn hold_bound_ns(&self) -> u64 {
        let ms = self.header.hold_bound_ms.load(Relaxed);
        u64::from(ms.clamp(1, MAX_HOLD_BOUND_MS)) * 1_000_000
    }
}
