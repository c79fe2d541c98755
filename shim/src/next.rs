//! The function behind a hook: the next definition of its name, in the order
//! the dynamic linker searches, after this library. What `dlsym(RTLD_NEXT, …)`
//! would say, found by reading the list of loaded objects.
//!
//! Not `dlsym`, because it takes a lock and may allocate (and so call hooks),
//! because its symbol version differs between libcs (a reference to that of
//! glibc 2.34 keeps programs on older ones from starting), and because old ones
//! have it in a library that may not be loaded.

use core::cell::UnsafeCell;
use core::ffi::{CStr, c_char};
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use core::sync::atomic::{AtomicBool, AtomicUsize};

use crate::{libc, sites};

const UNKNOWN: usize = 0;
const ABSENT: usize = 1;

/// The address behind one hook, once known. Finding it twice gives the same
/// answer, so two threads (or a thread and its handler) may both look.
#[repr(C)] // the address is read by assembly
pub(crate) struct Next {
    at: AtomicUsize,
    /// It lies in a file whose system calls all pass the gate by themselves.
    covered: AtomicBool,
}

impl Next {
    pub(crate) const fn new() -> Next {
        Next {
            at: AtomicUsize::new(UNKNOWN),
            covered: AtomicBool::new(false),
        }
    }

    /// Whether the hook has nothing to do.
    #[inline(always)]
    pub(crate) fn is_covered(&self) -> bool {
        self.covered.load(Relaxed)
    }

    /// The address; `None` if nobody else defines `name`.
    #[inline(always)]
    pub(crate) fn get(&self, name: &'static CStr) -> Option<usize> {
        let at = self.at.load(Relaxed);
        if at > ABSENT {
            return Some(at);
        }
        self.find(name, at)
    }

    #[cold]
    fn find(&self, name: &'static CStr, known: usize) -> Option<usize> {
        if known == UNKNOWN {
            self.resolve(name);
            let at = self.at.load(Relaxed);
            return (at > ABSENT).then_some(at);
        }
        // It was not there at start, so the library that has it now may go again:
        // what is found is used once, not kept.
        find_anew(name)
    }

    /// Looks among what was there at start, and keeps what is found.
    pub(crate) fn resolve(&self, name: &'static CStr) {
        if self.at.load(Relaxed) != UNKNOWN {
            return;
        }
        let found = match initial() {
            Some(search) => search.find(name),
            // A constructor that runs before ours.
            None => find_anew(name),
        };
        let is_covered = found.is_some_and(sites::is_covered);
        self.covered.store(is_covered, Relaxed);
        self.at.store(found.unwrap_or(ABSENT), Release);
    }
}

/// Looks among all objects there are now. Out of line, for it takes more of the stack
/// than a small one has.
#[cold]
#[inline(never)]
fn find_anew(name: &CStr) -> Option<usize> {
    Search::new().find(name)
}

/// The public head of the dynamic linker's list (<link.h>).
#[repr(C)]
struct LinkMap {
    addr: usize,
    name: *const c_char,
    dynamic: *const Dyn,
    next: *const LinkMap,
    prev: *const LinkMap,
}

/// <link.h>, `struct r_debug`.
#[repr(C)]
struct Debug {
    version: i32,
    map: *const LinkMap,
}

/// <elf.h>, `Elf64_Dyn`.
#[repr(C)]
struct Dyn {
    tag: i64,
    value: usize,
}

/// <elf.h>, `Elf64_Phdr`.
#[repr(C)]
struct Phdr {
    kind: u32,
    _flags: u32,
    _offset: u64,
    vaddr: usize,
    _rest: [u64; 4],
}

/// <elf.h>, `Elf64_Sym`.
#[repr(C)]
struct Sym {
    name: u32,
    info: u8,
    _other: u8,
    section: u16,
    value: usize,
    _size: u64,
}

const DT_NULL: i64 = 0;
const DT_HASH: i64 = 4;
const DT_STRTAB: i64 = 5;
const DT_SYMTAB: i64 = 6;
const DT_DEBUG: i64 = 21;
const DT_GNU_HASH: i64 = 0x6fff_fef5;
const DT_VERSYM: i64 = 0x6fff_fff0;
const PT_DYNAMIC: u32 = 2;
const PT_PHDR: u32 = 6;
const AT_PHDR: usize = 3;
const AT_PHNUM: usize = 5;
const STT_FUNC: u8 = 2;
const STT_GNU_IFUNC: u8 = 10;

/// This library's own dynamic section.
fn own_dynamic() -> usize {
    let at: usize;
    // SAFETY: computes an address the linker defines in every shared object.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        core::arch::asm!(
            ".hidden _DYNAMIC",
            "lea {}, [rip + _DYNAMIC]",
            out(reg) at,
            options(nomem, nostack, pure),
        );
        #[cfg(target_arch = "aarch64")]
        core::arch::asm!(
            ".hidden _DYNAMIC",
            "adrp {0}, _DYNAMIC",
            "add {0}, {0}, :lo12:_DYNAMIC",
            out(reg) at,
            options(nomem, nostack, pure),
        );
    }
    at
}

// The dynamic linker's list, under the names glibc and musl give it. Weak: each has
// only one of them.
core::arch::global_asm!(".weak _r_debug", ".weak _dl_debug_addr");

/// The addresses of `_r_debug` and `_dl_debug_addr`; 0 where there is none.
fn linker_symbols() -> (usize, usize) {
    let (glibc, musl): (usize, usize);
    // SAFETY: loads two addresses from the global offset table.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        core::arch::asm!(
            "mov {0}, [rip + _r_debug@GOTPCREL]",
            "mov {1}, [rip + _dl_debug_addr@GOTPCREL]",
            out(reg) glibc,
            out(reg) musl,
            options(nostack, pure, readonly),
        );
        #[cfg(target_arch = "aarch64")]
        core::arch::asm!(
            "adrp {0}, :got:_r_debug",
            "ldr {0}, [{0}, :got_lo12:_r_debug]",
            "adrp {1}, :got:_dl_debug_addr",
            "ldr {1}, [{1}, :got_lo12:_dl_debug_addr]",
            out(reg) glibc,
            out(reg) musl,
            options(nostack, pure, readonly),
        );
    }
    (glibc, musl)
}

/// The list of loaded objects: the dynamic linker's own, or by way of the
/// executable's DT_DEBUG.
fn first_object() -> Option<*const LinkMap> {
    let (glibc, musl) = linker_symbols();
    // SAFETY: `_r_debug` is a structure, `_dl_debug_addr` a pointer to one.
    let debug = unsafe {
        match (glibc, musl) {
            (0, 0) => debug_of_executable()?,
            (0, at) => *(at as *const *const Debug),
            (at, _) => at as *const Debug,
        }
    };
    if debug.is_null() {
        return None;
    }
    // SAFETY: the dynamic linker fills it in before it runs any code but its own.
    let first = unsafe { (*debug).map };
    (!first.is_null()).then_some(first)
}

/// DT_DEBUG of the executable, if its program headers say where they lie.
fn debug_of_executable() -> Option<*const Debug> {
    // SAFETY: the kernel's auxiliary vector describes the executable's program
    // headers, which stay mapped; PT_PHDR tells where the rest is.
    unsafe {
        let headers = libc::auxiliary(AT_PHDR) as *const Phdr;
        if headers.is_null() {
            return None;
        }
        let headers = core::slice::from_raw_parts(headers, libc::auxiliary(AT_PHNUM).min(1024));
        let own = headers.iter().find(|h| h.kind == PT_PHDR)?;
        let base = (headers.as_ptr() as usize).wrapping_sub(own.vaddr);
        let dynamic = headers.iter().find(|h| h.kind == PT_DYNAMIC)?;
        let dynamic = base.wrapping_add(dynamic.vaddr) as *const Dyn;
        Some(entry(dynamic, DT_DEBUG)? as *const Debug)
    }
}

/// The value of the first entry of `tag`.
///
/// # Safety
/// `dynamic` is a dynamic section, ended by DT_NULL.
unsafe fn entry(mut dynamic: *const Dyn, tag: i64) -> Option<usize> {
    // SAFETY: the loop stops at DT_NULL.
    unsafe {
        while (*dynamic).tag != DT_NULL {
            if (*dynamic).tag == tag {
                return Some((*dynamic).value);
            }
            dynamic = dynamic.add(1);
        }
    }
    None
}

/// The objects that are searched after this library, their tables read once.
struct Search {
    objects: [Option<Symbols>; Search::KEPT],
    /// Where the list goes on, if it is longer.
    rest: *const LinkMap,
    /// Where it ended when it was read; null if it did not go on.
    last: *const LinkMap,
}

/// The objects that were loaded at start, and are never unloaded.
struct Initial {
    search: UnsafeCell<Search>,
    is_read: AtomicBool,
}

// SAFETY: written once, before `is_read` is set with release, and only read after it was
// seen.
unsafe impl Sync for Initial {}

static INITIAL: Initial = Initial {
    search: UnsafeCell::new(Search::EMPTY),
    is_read: AtomicBool::new(false),
};

/// Reads which objects there are at start. Functions are then looked up among them when
/// they are first called: most programs call few of those that are hooked.
pub(crate) fn begin() {
    if !INITIAL.is_read.load(Acquire) {
        // SAFETY: called by the constructor alone, once.
        unsafe { *INITIAL.search.get() = Search::new() };
        INITIAL.is_read.store(true, Release);
    }
}

fn initial() -> Option<&'static Search> {
    // SAFETY: not written any more once it is read.
    INITIAL
        .is_read
        .load(Acquire)
        .then(|| unsafe { &*INITIAL.search.get() })
}

impl Search {
    const KEPT: usize = 24;
    const EMPTY: Search = Search {
        objects: [const { None }; Search::KEPT],
        rest: core::ptr::null(),
        last: core::ptr::null(),
    };

    /// Reads the dynamic linker's list.
    fn new() -> Search {
        let mut search = Search::EMPTY;
        let own = own_dynamic();
        let Some(mut object) = first_object() else {
            return search;
        };
        // SAFETY: the objects on the list are valid while they are listed. It is
        // read at start; later only for names that were not there then, which takes
        // the chance that another thread is just unloading something.
        unsafe {
            while !object.is_null() && (*object).dynamic as usize != own {
                object = (*object).next;
            }
            if object.is_null() {
                return search;
            }
            search.rest = (*object).next;
            for kept in &mut search.objects {
                if search.rest.is_null() {
                    break;
                }
                *kept = Symbols::of(search.rest);
                search.rest = (*search.rest).next;
            }
            let mut last = search.rest;
            while !last.is_null() {
                search.last = last;
                last = (*last).next;
            }
        }
        search
    }

    /// The next definition of `name`.
    fn find(&self, name: &CStr) -> Option<usize> {
        let hash = gnu_hash(name);
        let mut rest = self.rest;
        // SAFETY: as in `new`.
        unsafe {
            let kept = self.objects.iter().flatten();
            if let Some(at) = kept.into_iter().find_map(|s| s.find(name, hash)) {
                return Some(at);
            }
            while !rest.is_null() {
                if let Some(at) = Symbols::of(rest).and_then(|s| s.find(name, hash)) {
                    return Some(at);
                }
                if rest == self.last {
                    break;
                }
                rest = (*rest).next;
            }
        }
        None
    }
}

fn gnu_hash(name: &CStr) -> u32 {
    name.to_bytes().iter().fold(5381u32, |h, c| {
        h.wrapping_mul(33).wrapping_add(u32::from(*c))
    })
}

/// The symbol table of one loaded object.
struct Symbols {
    base: usize,
    symbols: *const Sym,
    strings: *const c_char,
    versions: *const u16,
    gnu_hash: *const u32,
    hash: *const u32,
}

impl Symbols {
    /// # Safety
    /// `object` is on the dynamic linker's list.
    unsafe fn of(object: *const LinkMap) -> Option<Symbols> {
        // SAFETY: an object's dynamic section is mapped and ended by DT_NULL.
        unsafe {
            let base = (*object).addr;
            let mut dynamic = (*object).dynamic;
            if dynamic.is_null() {
                return None;
            }
            let mut found = Symbols {
                base,
                symbols: core::ptr::null(),
                strings: core::ptr::null(),
                versions: core::ptr::null(),
                gnu_hash: core::ptr::null(),
                hash: core::ptr::null(),
            };
            while (*dynamic).tag != DT_NULL {
                // glibc replaces offsets by addresses, musl and the vDSO do not.
                let value = (*dynamic).value;
                let at = if value < base {
                    value.wrapping_add(base)
                } else {
                    value
                };
                match (*dynamic).tag {
                    DT_SYMTAB => found.symbols = at as *const Sym,
                    DT_STRTAB => found.strings = at as *const c_char,
                    DT_VERSYM => found.versions = at as *const u16,
                    DT_GNU_HASH => found.gnu_hash = at as *const u32,
                    DT_HASH => found.hash = at as *const u32,
                    _ => {}
                }
                dynamic = dynamic.add(1);
            }
            (!found.symbols.is_null() && !found.strings.is_null()).then_some(found)
        }
    }

    /// # Safety
    /// The tables are those of a loaded object.
    unsafe fn find(&self, name: &CStr, hash: u32) -> Option<usize> {
        // SAFETY: as the caller.
        unsafe {
            if !self.gnu_hash.is_null() {
                self.find_gnu(name, hash)
            } else if !self.hash.is_null() {
                self.find_sysv(name)
            } else {
                None
            }
        }
    }

    /// The GNU hash table: header, Bloom filter, buckets, chains.
    ///
    /// # Safety
    /// As [`Symbols::find`].
    unsafe fn find_gnu(&self, name: &CStr, hash: u32) -> Option<usize> {
        // SAFETY: sizes are those of the table's own header.
        unsafe {
            let head = self.gnu_hash;
            let (buckets, first, words, shift) = (*head, *head.add(1), *head.add(2), *head.add(3));
            if buckets == 0 || !words.is_power_of_two() {
                return None;
            }
            let bloom = head.add(4).cast::<u64>();
            let word = *bloom.add(((hash / 64) & (words - 1)) as usize);
            let mask = 1u64 << (hash % 64) | 1u64 << ((hash >> (shift & 31)) % 64);
            if word & mask != mask {
                return None;
            }
            let bucket = bloom.add(words as usize).cast::<u32>();
            let chain = bucket.add(buckets as usize);
            let mut index = *bucket.add((hash % buckets) as usize);
            if index < first {
                return None;
            }
            let mut older = None;
            loop {
                let link = *chain.add((index - first) as usize);
                if (link ^ hash) & !1 == 0 {
                    match self.definition(index, name) {
                        Definition::Default(at) => return Some(at),
                        Definition::Hidden(at) => older = older.or(Some(at)),
                        Definition::None => {}
                    }
                }
                if link & 1 == 1 {
                    return older;
                }
                index += 1;
            }
        }
    }

    /// The System V hash table: bucket and chain counts, buckets, chains.
    ///
    /// # Safety
    /// As [`Symbols::find`].
    unsafe fn find_sysv(&self, name: &CStr) -> Option<usize> {
        let hash = name.to_bytes().iter().fold(0u32, |h, c| {
            let h = (h << 4).wrapping_add(u32::from(*c));
            let high = h & 0xf000_0000;
            (h ^ (high >> 24)) & !high
        });
        // SAFETY: sizes are those of the table's own header.
        unsafe {
            let (buckets, chains) = (*self.hash, *self.hash.add(1));
            if buckets == 0 {
                return None;
            }
            let bucket = self.hash.add(2);
            let chain = bucket.add(buckets as usize);
            let mut index = *bucket.add((hash % buckets) as usize);
            let mut older = None;
            let mut steps = 0;
            while index != 0 && index < chains && steps < chains {
                match self.definition(index, name) {
                    Definition::Default(at) => return Some(at),
                    Definition::Hidden(at) => older = older.or(Some(at)),
                    Definition::None => {}
                }
                index = *chain.add(index as usize);
                steps += 1;
            }
            older
        }
    }

    /// Whether symbol `index` defines `name` as a function, and where.
    ///
    /// # Safety
    /// `index` comes from one of the object's hash tables.
    unsafe fn definition(&self, index: u32, name: &CStr) -> Definition {
        const SHN_UNDEF: u16 = 0;
        const HIDDEN: u16 = 0x8000;
        // SAFETY: hash tables hold only indices of existing symbols.
        unsafe {
            let symbol = &*self.symbols.add(index as usize);
            let kind = symbol.info & 0xf;
            if symbol.section == SHN_UNDEF
                || (kind != STT_FUNC && kind != STT_GNU_IFUNC)
                || !same(self.strings.add(symbol.name as usize), name)
            {
                return Definition::None;
            }
            let mut at = self.base.wrapping_add(symbol.value);
            if kind == STT_GNU_IFUNC {
                let resolver: extern "C" fn() -> usize = core::mem::transmute(at);
                at = resolver();
            }
            let hidden =
                !self.versions.is_null() && *self.versions.add(index as usize) & HIDDEN != 0;
            if hidden {
                Definition::Hidden(at)
            } else {
                Definition::Default(at)
            }
        }
    }
}

/// What a symbol says of a name. An older version of a symbol is hidden: new
/// programs do not get it, but it will do if there is no other.
enum Definition {
    Default(usize),
    Hidden(usize),
    None,
}

/// Whether the C string at `at` is `name`.
///
/// # Safety
/// `at` is a NUL-terminated string.
unsafe fn same(at: *const c_char, name: &CStr) -> bool {
    for (i, byte) in name.to_bytes_with_nul().iter().enumerate() {
        // SAFETY: a difference, the NUL at the latest, ends the loop.
        if unsafe { *at.add(i) } as u8 != *byte {
            return false;
        }
    }
    true
}
