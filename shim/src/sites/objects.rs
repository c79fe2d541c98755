//! The executable files that are mapped into this process, and their identities.

use core::ffi::{c_char, c_int, c_void};

use snapshim_gate::sites::SUFFIX;

use crate::{libc, sys};

/// <elf.h>, `Elf64_Phdr`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct Segment {
    pub(super) kind: u32,
    pub(super) flags: u32,
    pub(super) offset: u64,
    pub(super) address: u64,
    physical: u64,
    pub(super) in_file: u64,
    pub(super) in_memory: u64,
    align: u64,
}

const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const PF_X: u32 = 1;
const PF_W: u32 = 2;

impl Segment {
    pub(super) fn is_code(&self) -> bool {
        self.kind == PT_LOAD && self.flags & PF_X != 0
    }

    /// Whether the program may write to it.
    pub(super) fn is_writable(&self) -> bool {
        self.flags & PF_W != 0
    }

    pub(super) fn is_note(&self) -> bool {
        self.kind == PT_NOTE
    }

    /// Whether the bytes from `address` on, `len` of them, came from the file.
    pub(super) fn holds(&self, address: u64, len: usize) -> bool {
        let end = self.address.saturating_add(self.in_file);
        address >= self.address && address.saturating_add(len as u64) <= end
    }
}

/// The head of <link.h>'s `struct dl_phdr_info`.
#[repr(C)]
struct Info {
    base: usize,
    name: *const c_char,
    segments: *const Segment,
    count: u16,
}

/// A file that the dynamic linker has loaded.
pub(super) struct Object<'a> {
    /// What to add to the addresses in its headers.
    pub(super) base: usize,
    /// NUL-terminated; empty for the program itself.
    pub(super) name: &'a core::ffi::CStr,
    pub(super) segments: &'a [Segment],
}

/// Calls `each` with every object but this library and the kernel's own.
pub(super) fn each_loaded(mut each: &mut dyn FnMut(&Object<'_>)) {
    unsafe extern "C" fn step(info: *const Info, _: usize, data: *mut c_void) -> c_int {
        // SAFETY: the dynamic linker passes a valid description, and `data` as given below.
        unsafe {
            let each = &mut *data.cast::<&mut dyn FnMut(&Object<'_>)>();
            let info = &*info;
            if info.segments.is_null() {
                return 0;
            }
            let object = Object {
                base: info.base,
                name: if info.name.is_null() {
                    c""
                } else {
                    core::ffi::CStr::from_ptr(info.name)
                },
                segments: core::slice::from_raw_parts(info.segments, info.count.into()),
            };
            let is_kernels = object.base == libc::auxiliary(AT_SYSINFO_EHDR);
            if !is_kernels && !object.contains(step as *const () as usize) {
                each(&object);
            }
        }
        0
    }
    const AT_SYSINFO_EHDR: usize = 33;
    // SAFETY: `step` is called with `data` before this returns. glibc and musl take
    // a recursive lock of their own and allocate nothing.
    unsafe { libc::each_object(step, (&raw mut each).cast()) };
}

impl Object<'_> {
    fn contains(&self, address: usize) -> bool {
        let at = (address as u64).wrapping_sub(self.base as u64);
        self.segments
            .iter()
            .any(|s| s.is_code() && at.wrapping_sub(s.address) < s.in_memory)
    }

    /// Its identity.
    pub(super) fn id(&self) -> Option<Id> {
        let path = if self.name.is_empty() {
            c"/proc/self/exe"
        } else {
            self.name
        };
        // SAFETY: NUL-terminated.
        let stat = unsafe { sys::fstatat(sys::AT_FDCWD, path.as_ptr(), 0) }.ok()?;
        let notes = self.segments.iter().filter(|s| s.is_note());
        let build_id = notes.into_iter().find_map(|note| {
            let at = self.base.wrapping_add(note.address as usize) as *const u8;
            // SAFETY: notes are part of a loaded segment.
            build_id(unsafe { core::slice::from_raw_parts(at, note.in_file as usize) })
        });
        Id::of(&stat, build_id)
    }
}

/// The build id among the notes of a file.
pub(super) fn build_id(mut notes: &[u8]) -> Option<&[u8]> {
    const NT_GNU_BUILD_ID: u32 = 3;
    let word = |bytes: &[u8], at: usize| {
        let word = bytes.get(at..at + 4)?;
        Some(u32::from_le_bytes([word[0], word[1], word[2], word[3]]))
    };
    loop {
        let (name, len) = (word(notes, 0)? as usize, word(notes, 4)? as usize);
        let kind = word(notes, 8)?;
        let begin = 12usize.checked_add(name.checked_add(3)? & !3)?;
        let id = notes.get(begin..begin.checked_add(len)?)?;
        if kind == NT_GNU_BUILD_ID && notes.get(12..16)? == b"GNU\0" {
            return Some(id);
        }
        notes = notes.get(begin.checked_add(len.checked_add(3)? & !3)?..)?;
    }
}

/// The name of a table.
pub(super) struct Id {
    text: [u8; Id::MAX],
    len: usize,
}

impl Id {
    const MAX: usize = 160;

    fn new() -> Id {
        Id {
            text: [0; Id::MAX],
            len: 0,
        }
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        self.text.get(..self.len).unwrap_or(&[])
    }

    fn push(&mut self, bytes: &[u8]) -> Option<()> {
        let end = self.len.checked_add(bytes.len())?;
        self.text.get_mut(self.len..end)?.copy_from_slice(bytes);
        self.len = end;
        Some(())
    }

    fn push_decimal(&mut self, mut n: u64) -> Option<()> {
        let mut digits = [0; 20];
        let mut begin = digits.len();
        loop {
            begin -= 1;
            *digits.get_mut(begin)? = b'0' + (n % 10) as u8;
            n /= 10;
            if n == 0 {
                return self.push(digits.get(begin..)?);
            }
        }
    }

    /// A build id is anybody's to choose, so it stands only for files that nobody but
    /// root can have made. The coordinator has the same rule.
    fn of(stat: &sys::Stat, build_id: Option<&[u8]>) -> Option<Id> {
        const OTHERS_WRITE: u32 = 0o022;
        const BUILD_ID: core::ops::RangeInclusive<usize> = 8..=64;
        let roots = stat.uid == 0 && stat.mode & OTHERS_WRITE == 0;
        match build_id.filter(|id| roots && BUILD_ID.contains(&id.len())) {
            Some(id) => Id::of_build(id),
            None => Id::of_file(stat),
        }
    }

    /// The hexadecimal digits of a build id.
    fn of_build(id: &[u8]) -> Option<Id> {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let mut text = Id::new();
        for byte in id {
            let (high, low) = (usize::from(byte >> 4), usize::from(byte & 15));
            text.push(&[DIGITS[high], DIGITS[low]])?;
        }
        text.push(SUFFIX.as_bytes())?;
        Some(text)
    }

    /// What tells a file, and this content of it, from others.
    fn of_file(stat: &sys::Stat) -> Option<Id> {
        let mut text = Id::new();
        text.push(b"f-")?;
        text.push_decimal(stat.dev)?;
        text.push(b"-")?;
        text.push_decimal(stat.ino)?;
        text.push(b"-")?;
        text.push_decimal(stat.size as u64)?;
        text.push(b"-")?;
        text.push_decimal(stat.ctime_ns())?;
        text.push(SUFFIX.as_bytes())?;
        Some(text)
    }
}

/// <elf.h>, `Elf64_Ehdr`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct FileHeader {
    magic: [u8; 4],
    class: u8,
    _rest: [u8; 11],
    _kind: u16,
    _machine: u16,
    _version: u32,
    _entry: u64,
    segments_at: u64,
    _sections_at: u64,
    _flags: u32,
    _size: u16,
    segment_size: u16,
    segment_count: u16,
    _sections: [u16; 3],
}

/// Reads the program headers of the file `fd`. `None`: it is no library, or one
/// with more headers than there is room for.
pub(super) fn read_segments(fd: i32, segments: &mut [Segment]) -> Option<&[Segment]> {
    let mut header = FileHeader::default();
    // SAFETY: integers, for which any bits are a value.
    let bytes = unsafe {
        core::slice::from_raw_parts_mut((&raw mut header).cast::<u8>(), size_of::<FileHeader>())
    };
    const CLASS_64: u8 = 2;
    let is_whole = sys::read_at(fd, bytes, 0) == size_of::<FileHeader>();
    let is_elf = header.magic == *b"\x7fELF" && header.class == CLASS_64;
    if !is_whole || !is_elf || usize::from(header.segment_size) != size_of::<Segment>() {
        return None;
    }
    let segments = segments.get_mut(..header.segment_count.into())?;
    // SAFETY: as above.
    let bytes = unsafe {
        core::slice::from_raw_parts_mut(segments.as_mut_ptr().cast::<u8>(), size_of_val(segments))
    };
    let len = bytes.len();
    (sys::read_at(fd, bytes, header.segments_at) == len).then_some(segments)
}

/// The identity of the file `fd`.
pub(super) fn read_id(fd: i32, segments: &[Segment], notes: &mut [u8]) -> Option<Id> {
    let stat = sys::fstat(fd)?;
    for note in segments.iter().filter(|s| s.is_note()) {
        let len = (note.in_file as usize).min(notes.len());
        let Some(notes) = notes.get_mut(..len) else {
            continue;
        };
        let read = sys::read_at(fd, notes, note.offset);
        if let Some(id) = notes.get(..read).and_then(build_id) {
            return Id::of(&stat, Some(id));
        }
    }
    Id::of(&stat, None)
}
