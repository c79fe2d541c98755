//! Memory that chunks are read into: whole pages, a bounded number of them.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

/// Memory for one chunk, at a page's address, as O_DIRECT wants it.
pub(super) struct Buffer {
    at: *mut u8,
    len: usize,
    /// Whether the sweep has it.
    is_swept: bool,
}

// SAFETY: it owns its memory, like a Box.
unsafe impl Send for Buffer {}

impl Buffer {
    /// `len` bytes, which are there: nobody has to wait for the kernel to find them.
    fn new(len: usize) -> rustix::io::Result<Buffer> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::POPULATE;
        // SAFETY: no address is asked for: nothing that is there is replaced.
        let at = unsafe { mmap_anonymous(std::ptr::null_mut(), len, protection, flags)? };
        Ok(Buffer {
            at: at.cast(),
            len,
            is_swept: false,
        })
    }

    pub(super) fn bytes(&self) -> &[u8] {
        // SAFETY: mapped, `len` bytes, and initialised by the kernel.
        unsafe { std::slice::from_raw_parts(self.at, self.len) }
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: likewise, and only ours.
        unsafe { std::slice::from_raw_parts_mut(self.at, self.len) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, and not referred to any more.
        let _ = unsafe { munmap(self.at.cast(), self.len) };
    }
}

/// The buffers of one capture.
pub(super) struct Pool {
    len: usize,
    free: Mutex<Free>,
    returned: Condvar,
    /// Somebody who was asked for a chunk waits for a buffer.
    is_wanted: AtomicBool,
}

struct Free {
    buffers: Vec<Buffer>,
    /// How many there are in all.
    made: usize,
    /// How many are in use, and how many of these by the sweep.
    used: usize,
    swept: usize,
    /// How many may be: by the sweep, and kept for what was asked for.
    limit: usize,
    reserve: usize,
}

impl Free {
    /// One that is there, or leave to make one, if there is room. The sweep goes on beside what is asked for, until
    /// that has more than the reserve.
    fn take(&mut self, is_asked: bool) -> Option<Option<Buffer>> {
        let is_room = self.used < self.limit + self.reserve;
        if !is_room || !is_asked && self.swept >= self.limit {
            return None;
        }
        self.used += 1;
        self.swept += usize::from(!is_asked);
        let there = self.buffers.pop();
        self.made += usize::from(there.is_none());
        Some(there)
    }
}

impl Pool {
    /// Buffers of `len` bytes: as many as fit into `memory` for the sweep, and into `reserve`
    /// for what is asked for. The first `ahead` of them, of the sweep's, are made now.
    pub(super) fn new(
        len: usize,
        memory: usize,
        reserve: usize,
        ahead: usize,
    ) -> rustix::io::Result<Pool> {
        let limit = (memory / len).max(4);
        let ahead = ahead.min(limit);
        let buffers: rustix::io::Result<Vec<Buffer>> =
            (0..ahead).map(|_| Buffer::new(len)).collect();
        Ok(Pool {
            len,
            free: Mutex::new(Free {
                buffers: buffers?,
                made: ahead,
                used: 0,
                swept: 0,
                limit,
                reserve: (reserve / len).max(2),
            }),
            returned: Condvar::new(),
            is_wanted: AtomicBool::new(false),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Free> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A buffer; waits for one for a while, `None` if there is none then. `is_asked`: for a
    /// chunk that somebody waits for.
    pub(super) fn take(&self, is_asked: bool) -> rustix::io::Result<Option<Buffer>> {
        const WAIT: Duration = Duration::from_millis(20);
        let mut free = self.lock();
        loop {
            if let Some(there) = free.take(is_asked) {
                drop(free);
                return self.made(there, is_asked).map(Some);
            }
            self.is_wanted.fetch_or(is_asked, Relaxed);
            let waited = self.returned.wait_timeout(free, WAIT);
            if is_asked {
                self.is_wanted.store(false, Relaxed);
            }
            let (again, time) = waited.unwrap_or_else(PoisonError::into_inner);
            if time.timed_out() {
                return Ok(None);
            }
            free = again;
        }
    }

    /// The same without waiting.
    pub(super) fn take_now(&self, is_asked: bool) -> rustix::io::Result<Option<Buffer>> {
        let there = self.lock().take(is_asked);
        there.map(|there| self.made(there, is_asked)).transpose()
    }

    fn made(&self, there: Option<Buffer>, is_asked: bool) -> rustix::io::Result<Buffer> {
        let mut buffer = match there {
            Some(buffer) => buffer,
            None => Buffer::new(self.len)?,
        };
        buffer.is_swept = !is_asked;
        Ok(buffer)
    }

    /// Whether somebody who was asked for a chunk waits for a buffer.
    pub(super) fn is_wanted(&self) -> bool {
        self.is_wanted.load(Relaxed)
    }

    /// Gives buffers back.
    pub(super) fn give(&self, buffers: impl IntoIterator<Item = Buffer>) {
        let mut free = self.lock();
        for buffer in buffers {
            free.used -= 1;
            free.swept -= usize::from(buffer.is_swept);
            free.buffers.push(buffer);
        }
        drop(free);
        self.returned.notify_all();
    }

    /// Bytes of all that were made.
    pub(super) fn memory(&self) -> usize {
        self.lock().made * self.len
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_has_a_reserve() {
        let pool = Pool::new(1 << 16, 4 << 16, 2 << 16, 1).unwrap();
        let taken: Vec<Buffer> = (0..4).map(|_| pool.take(false).unwrap().unwrap()).collect();
        assert!(pool.take(false).unwrap().is_none());
        let asked = pool.take(true).unwrap().unwrap();
        let more = pool.take(true).unwrap().unwrap();
        assert!(pool.take(true).unwrap().is_none());
        assert_eq!(pool.memory(), 6 << 16);
        assert!(pool.take_now(true).unwrap().is_none());
        pool.give([asked, more]);
        assert!(pool.take(false).unwrap().is_none(), "the reserve is kept");
        pool.give(taken);
        let all: Vec<Buffer> = (0..5).map(|_| pool.take(true).unwrap().unwrap()).collect();
        // Whatever was asked for, the sweep has what is left.
        let swept = pool.take(false).unwrap().unwrap();
        assert!(pool.take(false).unwrap().is_none());
        pool.give(all);
        pool.give([swept]);
        assert_eq!(pool.memory(), 6 << 16);
        assert!(pool.take(false).unwrap().is_some());
    }

    #[test]
    fn whole_pages() {
        let mut buffer = Buffer::new(1 << 16).unwrap();
        assert_eq!(buffer.bytes().as_ptr() as usize % 4096, 0);
        assert!(buffer.bytes().iter().all(|byte| *byte == 0));
        buffer.bytes_mut()[65_535] = 1;
        assert_eq!(buffer.bytes()[65_535], 1);
    }
}
