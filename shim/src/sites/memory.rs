//! Memory with code in it that is being changed.
//!
//! Text is made writable and executable at once, changed in place, and made
//! executable again: at no moment can it not be run. Where that is refused
//! (PR_SET_MDWE, MemoryDenyWriteExecute, SELinux's execmod), the changed text is
//! written to a memory file, which is mapped over the old one: no page is ever both.

use crate::sys::{self, nr, raw};

const PAGE: usize = 4096;
const PROT_READ: usize = 1;
const PROT_WRITE: usize = 2;
const PROT_EXEC: usize = 4;
const MAP_PRIVATE: usize = 2;
const MAP_FIXED: usize = 0x10;
const MAP_ANONYMOUS: usize = 0x20;
const MAP_32BIT: usize = 0x40;

/// How far away code may lie: near jumps reach 2 GiB, less some for what lies between.
const NEAR: usize = 0x7800_0000;

/// Pages whose content is being made.
pub(super) struct Code {
    begin: usize,
    len: usize,
    used: usize,
    kind: Kind,
}

enum Kind {
    /// Text, writable for now.
    InPlace,
    /// Fresh pages of ours, writable, not yet executable.
    Fresh,
    /// Text whose changed copy is in this memory file; whether that is mapped in its
    /// place, where what is written to it is then seen at once.
    Copy(i32, bool),
}

impl Code {
    /// The pages of a file's text from `begin` to `end`, to be changed.
    ///
    /// # Safety
    /// They are mapped, readable and executable, private, and nobody else changes them.
    pub(super) unsafe fn open(begin: usize, end: usize) -> Option<Code> {
        let begin = begin & !(PAGE - 1);
        let len = end.checked_sub(begin)?.checked_add(PAGE - 1)? & !(PAGE - 1);
        let kind = if protect(begin, len, PROT_READ | PROT_WRITE | PROT_EXEC) {
            Kind::InPlace
        } else {
            if !sys::may_make_file(len) {
                return None;
            }
            let file = sys::memory_file(c"snapshim")?;
            // SAFETY: the caller says that it is readable.
            let text = unsafe { core::slice::from_raw_parts(begin as *const u8, len) };
            if !sys::write_all_at(file, text, 0) {
                sys::close(file);
                return None;
            }
            Kind::Copy(file, false)
        };
        Some(Code {
            begin,
            len,
            used: 0,
            kind,
        })
    }

    /// The bytes at address `at` as they are now.
    pub(super) fn read(&self, at: usize, len: usize) -> Option<&[u8]> {
        self.offset(at, len)?;
        // SAFETY: within pages that are mapped and readable; see `open`.
        Some(unsafe { core::slice::from_raw_parts(at as *const u8, len) })
    }

    fn offset(&self, at: usize, len: usize) -> Option<usize> {
        let offset = at.checked_sub(self.begin)?;
        (offset.checked_add(len)? <= self.len).then_some(offset)
    }

    /// Puts `bytes` at address `at`.
    pub(super) fn write(&mut self, at: usize, bytes: &[u8]) -> Option<()> {
        let offset = self.offset(at, bytes.len())?;
        match self.kind {
            Kind::Copy(file, _) => sys::write_all_at(file, bytes, offset).then_some(()),
            Kind::InPlace | Kind::Fresh => {
                // SAFETY: the pages are ours to write, and long enough.
                unsafe { core::ptr::copy(bytes.as_ptr(), at as *mut u8, bytes.len()) };
                Some(())
            }
        }
    }

    /// Where [`Code::push`] puts the next byte.
    pub(super) fn next(&self) -> usize {
        self.begin + self.used
    }

    /// Appends to fresh pages.
    pub(super) fn push(&mut self, bytes: &[u8]) -> Option<()> {
        self.write(self.next(), bytes)?;
        self.used += bytes.len();
        Some(())
    }

    /// Makes what was written so far take effect, for pages of text.
    pub(super) fn publish(&mut self) -> bool {
        if let Kind::Copy(file, is_mapped) = &mut self.kind {
            *is_mapped = *is_mapped || map_over(self.begin, self.len, *file);
            return *is_mapped;
        }
        true
    }

    /// Makes the pages executable, with their new content.
    pub(super) fn seal(mut self) -> bool {
        let is_published = self.publish();
        let Code {
            begin, len, kind, ..
        } = self;
        match kind {
            // Refused or not, it can be run.
            Kind::InPlace => {
                protect(begin, len, PROT_READ | PROT_EXEC);
                true
            }
            Kind::Fresh => {
                if protect(begin, len, PROT_READ | PROT_EXEC) {
                    return true;
                }
                if !sys::may_make_file(len) {
                    return false;
                }
                let Some(file) = sys::memory_file(c"snapshim") else {
                    return false;
                };
                // SAFETY: our own pages.
                let bytes = unsafe { core::slice::from_raw_parts(begin as *const u8, len) };
                let done = sys::write_all_at(file, bytes, 0) && map_over(begin, len, file);
                sys::close(file);
                done
            }
            Kind::Copy(file, _) => {
                sys::close(file);
                is_published
            }
        }
    }

    /// Leaves everything as it was.
    pub(super) fn discard(self) {
        match self.kind {
            Kind::InPlace => {
                protect(self.begin, self.len, PROT_READ | PROT_EXEC);
            }
            Kind::Fresh => sys::unmap(self.begin as *mut u8, self.len),
            Kind::Copy(file, _) => sys::close(file),
        }
    }
}

/// Fresh pages for `needed` bytes, from which all between `begin` and `end` is near.
pub(super) fn near(begin: usize, end: usize, needed: usize) -> Option<Code> {
    let len = needed.checked_add(PAGE - 1)? & !(PAGE - 1);
    let is_near = |at: usize| {
        let (low, high) = (begin.min(at), end.max(at + len));
        high - low < NEAR
    };
    // Beside the newest mappings; below 2 GiB, for programs at fixed addresses; or
    // wherever there is a gap close by.
    let step = NEAR / 16;
    let plain = [(0, 0), (0, MAP_32BIT)].into_iter();
    let around = (1..8).flat_map(|i| {
        let below = begin.saturating_sub(i * step) & !(PAGE - 1);
        let above = end.saturating_add(i * step) & !(PAGE - 1);
        [(below, 0), (above, 0)]
    });
    for (hint, flags) in plain.chain(around) {
        let flags = MAP_PRIVATE | MAP_ANONYMOUS | flags;
        // SAFETY: without MAP_FIXED nothing mapped is replaced.
        let at = unsafe {
            raw!(
                nr::MMAP,
                hint,
                len,
                PROT_READ | PROT_WRITE,
                flags,
                -1isize,
                0
            )
        };
        if (-4095..=0).contains(&at) {
            continue;
        }
        let at = at as usize;
        if is_near(at) {
            return Some(Code {
                begin: at,
                len,
                used: 0,
                kind: Kind::Fresh,
            });
        }
        sys::unmap(at as *mut u8, len);
    }
    None
}

fn protect(begin: usize, len: usize, protection: usize) -> bool {
    // SAFETY: only permissions change, and only to more than the program needs, or
    // to what they were.
    unsafe { raw!(nr::MPROTECT, begin, len, protection) == 0 }
}

/// Maps `file` over what is mapped.
fn map_over(begin: usize, len: usize, file: i32) -> bool {
    let (protection, flags) = (PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_FIXED);
    // SAFETY: replaces pages by a copy of themselves, in which only sites differ.
    let at = unsafe { raw!(nr::MMAP, begin, len, protection, flags, file, 0) };
    at == begin as isize
}
