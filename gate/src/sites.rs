//! The layout of a site table: where an executable file has its system call
//! instructions, and how they can be replaced by jumps. Computed by the
//! coordinator, which has a decoder; read by the shim, which has none.
//!
//! A table is a file named after the executable's identity ([`Header`], then
//! [`Record`]s sorted by address). It is believed no more than its owner is, and
//! the bytes of each site are compared before they are replaced.

use core::mem::size_of;

/// The first eight bytes of a table.
pub const MAGIC: u64 = u64::from_le_bytes(*b"snapsite");
/// The version of this layout and of the rules tables are computed by, and a hash of the
/// list of calls of interest: with another list, a table is another.
pub const VERSION: u32 = RULES << 16 | calls_hash();
const RULES: u32 = 2;

/// What the names of tables end with: a dot and the version. Builds that differ in it keep
/// theirs side by side.
pub const SUFFIX: &str = {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    const BYTES: [u8; 9] = {
        let mut bytes = [b'.'; 9];
        let mut i = 0;
        while i < 8 {
            bytes[8 - i] = DIGITS[(VERSION >> (4 * i) & 15) as usize];
            i += 1;
        }
        bytes
    };
    match core::str::from_utf8(&BYTES) {
        Ok(suffix) => suffix,
        Err(_) => "",
    }
};

const fn calls_hash() -> u32 {
    let bits = crate::calls::bits();
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    let mut i = 0;
    while i < bits.len() {
        hash = (hash ^ bits[i]).wrapping_mul(0x100_0000_01b3);
        hash ^= hash >> 32;
        i += 1;
    }
    (hash & 0xffff) as u32
}
/// Most sites a table may have.
pub const MAX_SITES: u32 = 4096;
/// Most bytes that one site's patch may replace.
pub const MAX_WINDOW: usize = 24;

/// The head of a table. All fields little-endian.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Header {
    /// [`MAGIC`].
    pub magic: u64,
    /// [`VERSION`].
    pub version: u32,
    /// Number of records.
    pub count: u32,
    /// [`COMPLETE`] and the like.
    pub flags: u32,
    /// Bytes of one record.
    pub record_size: u32,
    /// Lowest and highest virtual address (as in the program headers) that any
    /// window touches: begin.
    pub begin: u64,
    /// End of that range.
    pub end: u64,
    _reserved: [u64; 3],
}

/// Flag: every system call instruction of the file that matters is in the table.
pub const COMPLETE: u32 = 1;
/// Flag: this file must not be patched (its libc compares the address of a blocked
/// call with a range, to cancel it); there are no records.
pub const UNPATCHABLE: u32 = 2;
/// Flag: this is a C library.
pub const LIBC: u32 = 4;

/// One site.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Record {
    /// Virtual address, as in the program headers, of the first byte replaced.
    pub address: u64,
    /// The call's number, or -1 if only the program knows it.
    pub number: i32,
    /// [`NUMBERED`] or [`MOVED`].
    pub shape: u8,
    /// Bytes of whole instructions before the system call instruction.
    pub before: u8,
    /// Bytes of whole instructions after it.
    pub after: u8,
    _reserved: u8,
    /// All bytes that are replaced: `before`, the two of the system call
    /// instruction, `after`; zero from there on.
    pub original: [u8; MAX_WINDOW],
}

/// Shape: the window is `mov $number, %eax; syscall`.
pub const NUMBERED: u8 = 0;
/// Shape: the instructions around the system call are position-independent, do not
/// branch, and can be run elsewhere.
pub const MOVED: u8 = 1;

const _: () = {
    assert!(size_of::<Header>() == 64);
    assert!(size_of::<Record>() == 40);
};

/// The system call instruction.
pub const SYSCALL: [u8; 2] = [0x0f, 0x05];
/// Bytes of the jump that replaces a window's head.
pub const JUMP: usize = 5;

impl Header {
    /// A head for `count` records that lie between `begin` and `end`.
    pub const fn new(count: u32, flags: u32, begin: u64, end: u64) -> Header {
        Header {
            magic: MAGIC,
            version: VERSION,
            count,
            flags,
            record_size: size_of::<Record>() as u32,
            begin,
            end,
            _reserved: [0; 3],
        }
    }

    /// The bytes of the file.
    pub fn as_bytes(&self) -> &[u8] {
        // SAFETY: made of integers without padding.
        unsafe { core::slice::from_raw_parts((&raw const *self).cast::<u8>(), size_of::<Header>()) }
    }
}

impl Record {
    /// A record; `None` if it is none that the shim could use.
    pub fn new(
        address: u64,
        number: i32,
        shape: u8,
        before: usize,
        window: &[u8],
    ) -> Option<Record> {
        let after = window.len().checked_sub(before + SYSCALL.len())?;
        let mut original = [0; MAX_WINDOW];
        original.get_mut(..window.len())?.copy_from_slice(window);
        let record = Record {
            address,
            number,
            shape,
            before: before as u8,
            after: after as u8,
            _reserved: 0,
            original,
        };
        record.window().is_some().then_some(record)
    }

    /// The bytes that are replaced; `None` if the record contradicts itself.
    pub fn window(&self) -> Option<&[u8]> {
        let (before, after) = (usize::from(self.before), usize::from(self.after));
        let window = self.original.get(..before + SYSCALL.len() + after)?;
        let holds_call = window.get(before..before + SYSCALL.len())? == SYSCALL;
        let fits = window.len() >= JUMP && holds_call;
        let shaped = match self.shape {
            NUMBERED => before == 5 && after == 0 && window[0] == 0xb8 && self.number >= 0,
            MOVED => true,
            _ => false,
        };
        (fits && shaped).then_some(window)
    }

    /// The bytes of the file.
    pub fn as_bytes(&self) -> &[u8] {
        // SAFETY: made of integers without padding.
        unsafe { core::slice::from_raw_parts((&raw const *self).cast::<u8>(), size_of::<Record>()) }
    }
}

/// A table whose sizes have been checked.
#[derive(Clone, Copy, Debug)]
pub struct Table<'a> {
    /// Its head.
    pub header: &'a Header,
    /// Its records.
    pub records: &'a [Record],
}

impl<'a> Table<'a> {
    /// Reads the bytes of a file. `None`: it is no table this build can use.
    pub fn read(bytes: &'a [u8]) -> Option<Table<'a>> {
        let aligned = bytes.as_ptr().align_offset(align_of::<Header>()) == 0;
        if bytes.len() < size_of::<Header>() || !aligned {
            return None;
        }
        // SAFETY: long enough, aligned, and any bits are a value.
        let header = unsafe { &*bytes.as_ptr().cast::<Header>() };
        let rest = bytes.get(size_of::<Header>()..)?;
        let fits = header.magic == MAGIC
            && header.version == VERSION
            && header.record_size as usize == size_of::<Record>()
            && header.count <= MAX_SITES
            && rest.len() == header.count as usize * size_of::<Record>();
        if !fits {
            return None;
        }
        // SAFETY: `count` records lie in `rest`, aligned as the head is; any bits are a value.
        let records = unsafe {
            core::slice::from_raw_parts(rest.as_ptr().cast::<Record>(), header.count as usize)
        };
        Some(Table { header, records })
    }
}
