//! Capturing after the cut: chunks are read while programs run, those first that
//! somebody is about to change.
//!
//! | thread | what it does |
//! |---|---|
//! | the caller's | sweeps over all chunks in order, and helps the service if that is late; ends the guard when the last one is read |
//! | service | reads what calls ask for, and wakes them |
//! | `writer` | writes what was read into the snapshot |
//!
//! The latter two are there before the cut (`standby`).
//!
//! A chunk counts as captured once it is in memory. Memory is bounded (`buffers`): where
//! the store is slower than the programs write, calls wait for it, as long as they may.

mod buffers;
mod live;
mod standby;
mod writer;

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use snapshim_gate::guard::{self, Ask, Guard, Span};
use snapshim_gate::sys::{futex_wait, futex_wake_all};

use super::delta::Delta;
use super::walk::unreadable;
use crate::Result;
use crate::digest::Pieces;
use crate::tally::{Step, Tally};
use crate::urgency::{Hurried, Pauses, Thread, Urgency};
use buffers::{Buffer, Pool};
use live::Window;
use standby::Standby;

/// Memory for chunks that were read by the sweep and not written yet.
const MEMORY: usize = 64 << 20;
/// Memory for chunks that were asked for: calls wait for them, and a disk may be slow.
const RESERVE: usize = 512 << 20;
/// Chunks read between looks whether to go on.
const BATCH: u32 = 16;
/// The service, once woken, has read a chunk within a fraction of this.
const LATE: Duration = Duration::from_micros(100);

/// A file that is captured after the cut.
#[derive(Debug)]
pub(super) struct Source {
    /// Of the live file, for messages.
    pub(super) path: PathBuf,
    pub(super) file: OwnedFd,
    /// Its size at the cut, bytes.
    pub(super) size: u64,
    /// Number of its first chunk.
    pub(super) first: u32,
    pub(super) target: writer::Target,
    /// Its entry, by index.
    pub(super) entry: usize,
    /// What of it is in place already, or (see [`sweep`]) is only to be known.
    pub(super) delta: Option<Delta>,
    /// For its digest, if it is to have one.
    pub(super) pieces: Option<Pieces>,
}

pub(super) use writer::Target;

/// What a capture was like.
#[derive(Clone, Copy, Debug, Default)]
pub struct Swept {
    /// Chunks that calls asked for before the sweep came to them.
    pub asked: u32,
    /// All chunks.
    pub chunks: u32,
    /// Memory used for chunks, bytes.
    pub memory: usize,
    /// Bytes that were captured: not what was in place already.
    pub bytes: u64,
    /// Bytes that were in place already.
    pub in_place: u64,
    /// A file that was shorter than at the cut, though nobody had asked to cut it down.
    pub(super) short: Option<usize>,
}

/// The part of a gate that a sweep needs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked<'a> {
    pub(super) guard: &'a Guard,
    /// What threads ask for.
    pub(super) asks: &'a [AtomicU64],
    /// How far it is.
    pub(super) tally: &'a Tally,
}

/// Buffers and threads for a sweep, made ahead.
pub(super) struct Ready {
    pool: Pool,
    service: Standby,
    writer: Standby,
    shift: u32,
}

impl std::fmt::Debug for Ready {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ready").field("shift", &self.shift).finish()
    }
}

/// Gets ready for chunks of 2 to the power of `shift` bytes, some `bytes` in all.
pub(super) fn ready(shift: u32, bytes: u64) -> Result<Ready> {
    let len = 1usize << shift;
    let ahead = usize::try_from(guard::chunks_of(bytes, shift)).unwrap_or(usize::MAX);
    let pool = Pool::new(len, MEMORY, RESERVE.min(bytes_to_spare()), ahead).map_err(no_memory)?;
    let start = |name, urgency| {
        Standby::start(name, urgency)
            .map_err(|cause| crate::Error::new(format!("cannot start a thread: {cause}")))
    };
    Ok(Ready {
        pool,
        service: start("service", Urgency::Awaited)?,
        writer: start("writer", Urgency::Yielding)?,
        shift,
    })
}

/// An eighth of the memory that the system can spare.
pub(super) fn bytes_to_spare() -> usize {
    let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = info
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<usize>().ok());
    kib.map_or(MEMORY, |kib| kib / 8 * 1024)
}

fn no_memory(cause: Errno) -> crate::Error {
    crate::Error::new(format!("there is no memory for the capture: {cause}"))
}

const FREE: u8 = 0;
const CLAIMED: u8 = 1;

/// What the threads share.
struct Sweep<'a> {
    asked: Asked<'a>,
    is_under_hold: bool,
    sources: &'a [Source],
    sweeper: Thread,
    writer: OnceLock<Thread>,
    shift: u32,
    pool: &'a Pool,
    claims: Vec<AtomicU8>,
    /// If all is captured: the pieces of each chunk that were not marked.
    unmarked: Vec<AtomicU64>,
    bytes: AtomicU64,
    in_place: AtomicU64,
    left: AtomicU32,
    served: AtomicU32,
    /// The requests that the service has seen to.
    looked: AtomicU32,
    /// A source that ended early, or one that is not there.
    short: AtomicUsize,
    is_over: AtomicBool,
    /// It comes to nothing: what was read need not be written.
    is_lost: AtomicBool,
    failed: Mutex<Option<crate::Error>>,
}

/// A chunk in memory.
struct Read {
    source: usize,
    offset: u64,
    len: usize,
    /// Pieces of it that are in place already, a bit for each.
    unmarked: u64,
    piece_shift: u32,
    buffer: Buffer,
}

/// The parts of a chunk of `len` bytes that are not in place already: its pieces are 2 to the power
/// of `piece_shift` bytes, and those in place have a bit.
fn to_read(
    in_place: u64,
    piece_shift: u32,
    len: usize,
) -> impl Iterator<Item = std::ops::Range<usize>> {
    let mut from = 0;
    std::iter::from_fn(move || {
        // A chunk has at most 64 pieces.
        let is_in_place = |at: usize| in_place >> (at >> piece_shift).min(63) & 1 != 0;
        let piece = 1 << piece_shift;
        while from < len && is_in_place(from) {
            from += piece;
        }
        let begin = from;
        while from < len && !is_in_place(from) {
            from += piece;
        }
        (begin < len).then(|| begin..from.min(len))
    })
}

/// What is particular about a sweep.
#[derive(Clone, Copy, Debug)]
pub(super) struct How {
    /// What is in place already is captured all the same.
    pub(super) is_compared: bool,
    /// Programs are held until its end.
    pub(super) is_under_hold: bool,
}

/// Captures all chunks of `sources`, which are in the order of their chunks. `goes_on` says
/// whether the guard stands; `end` ends it, when all chunks are in memory. Also returns which pieces of
/// each chunk were not marked, if all is compared.
pub(super) fn sweep(
    ready: Ready,
    asked: Asked<'_>,
    sources: &[Source],
    how: How,
    goes_on: &mut dyn FnMut() -> bool,
    end: impl FnOnce() -> Result<()>,
) -> Result<(Swept, Vec<AtomicU64>)> {
    let Ready {
        pool,
        service,
        writer,
        shift,
    } = ready;
    let chunks: u64 = sources
        .iter()
        .map(|source| guard::chunks_of(source.size, shift))
        .sum();
    let How {
        is_compared,
        is_under_hold,
    } = how;
    let chunks = chunks as u32; // the guard's table holds no more than 2^20
    let bytes = sources.iter().map(|source| source.size);
    asked.tally.begin(Step::Capture, bytes.sum());
    let sweep = Sweep {
        asked,
        is_under_hold,
        sources,
        sweeper: Thread::this(),
        writer: OnceLock::new(),
        shift,
        pool: &pool,
        claims: (0..chunks).map(|_| AtomicU8::new(FREE)).collect(),
        unmarked: match is_compared {
            true => (0..chunks).map(|_| AtomicU64::new(0)).collect(),
            false => Vec::new(),
        },
        bytes: AtomicU64::new(0),
        in_place: AtomicU64::new(0),
        left: AtomicU32::new(chunks),
        served: AtomicU32::new(0),
        // None of those that there are by now.
        looked: AtomicU32::new(asked.guard.requests.load(Relaxed).wrapping_sub(1)),
        short: AtomicUsize::new(usize::MAX),
        is_over: AtomicBool::new(false),
        is_lost: AtomicBool::new(false),
        failed: Mutex::new(None),
    };
    let (to_writer, read) = channel();
    let asked_for = to_writer.clone();
    let serve = || {
        let to_writer = asked_for;
        sweep.serve(&to_writer);
    };
    let all = || {
        let to_writer = to_writer;
        let swept = sweep.all(&to_writer, goes_on);
        let ended = match swept && !sweep.has_failed() {
            true => end(),
            false => Err(sweep
                .failure()
                .unwrap_or_else(|| crate::Error::aborted("the capture was interrupted"))),
        };
        sweep.is_lost.store(ended.is_err(), Relaxed);
        sweep.is_over.store(true, Relaxed);
        asked.guard.requests.fetch_add(1, Relaxed);
        futex_wake_all(&asked.guard.requests);
        ended
    };
    writer.beside(|| sweep.write(read), || service.beside(serve, all))?;
    asked.tally.end();
    match sweep.failure() {
        Some(failure) => Err(failure),
        None => {
            let swept = Swept {
                asked: sweep.served.load(Relaxed),
                chunks,
                memory: pool.memory(),
                bytes: sweep.bytes.load(Relaxed),
                in_place: sweep.in_place.load(Relaxed),
                short: Some(sweep.short.load(Relaxed)).filter(|index| *index < sources.len()),
            };
            Ok((swept, sweep.unmarked))
        }
    }
}

impl Sweep<'_> {
    fn has_failed(&self) -> bool {
        self.lock().is_some()
    }

    fn failure(&self) -> Option<crate::Error> {
        self.lock().take()
    }

    fn fail(&self, error: crate::Error) {
        self.lock().get_or_insert(error);
        self.is_over.store(true, Relaxed);
    }

    /// What was taken from the pool; `None` if there is no memory, which ends the sweep.
    fn or_fail<T>(&self, taken: rustix::io::Result<T>) -> Option<T> {
        taken.map_err(|cause| self.fail(no_memory(cause))).ok()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<crate::Error>> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a chunk upon oneself; whether nobody had it.
    fn claim(&self, chunk: u32) -> bool {
        let cell = self.claims.get(chunk as usize);
        cell.is_some_and(|cell| {
            cell.compare_exchange(FREE, CLAIMED, AcqRel, Relaxed)
                .is_ok()
        })
    }

    /// The source of a chunk, by its place in the list.
    fn source_of(&self, chunk: u32) -> usize {
        // Of several that begin there, the last: those before it have no chunk.
        self.sources.partition_point(|source| source.first <= chunk) - 1
    }

    /// All chunks, in order. `false`: it does not go on.
    fn all(&self, to: &Sender<Read>, goes_on: &mut dyn FnMut() -> bool) -> bool {
        let mut hole = 0..0;
        let mut window = Window::new();
        let mut aside = Window::new();
        let mut pauses = Pauses::begin();
        let mut late = None;
        for chunk in 0..self.claims.len() as u32 {
            if chunk % BATCH == 0 && (self.is_over.load(Relaxed) || !goes_on()) {
                return false;
            }
            if self.is_late(&mut late) && !(self.help(&mut aside, to) && goes_on()) {
                return false;
            }
            if self.claims[chunk as usize].load(Relaxed) != FREE {
                continue;
            }
            if !self.is_awaited() {
                pauses.pause();
            }
            if !hole.contains(&chunk) {
                hole = self.hole(chunk);
            }
            if hole.contains(&chunk) {
                // Nothing to read: nobody has changed it, or he would have asked.
                if self.claim(chunk) {
                    self.done(chunk, 1 << self.shift);
                }
                continue;
            }
            if self.is_in_place(chunk) {
                self.leave(chunk);
                continue;
            }
            // The buffer first: a claim must not wait for one.
            let buffer = loop {
                match self.or_fail(self.pool.take(false)) {
                    Some(Some(buffer)) => break buffer,
                    Some(None) if goes_on() && !self.is_over.load(Relaxed) => {
                        if self.is_late(&mut late) && !self.help(&mut aside, to) {
                            return false;
                        }
                    }
                    _ => return false,
                }
            };
            if !self.claim(chunk) {
                self.pool.give([buffer]);
                continue;
            }
            if !self.read(chunk, buffer, Some(&mut window), false, to) {
                return false;
            }
        }
        // What the other thread has begun.
        while self.left.load(Acquire) > 0 {
            if self.is_over.load(Relaxed) || !goes_on() {
                return false;
            }
            std::thread::yield_now();
        }
        true
    }

    /// Whether the service has not come to what is asked for in the time that it takes otherwise. `since`: what it had
    /// seen to when that was looked at first, and when.
    fn is_late(&self, since: &mut Option<(u32, Instant)>) -> bool {
        let looked = self.looked.load(Relaxed);
        if self.asked.guard.requests.load(Acquire) == looked {
            *since = None;
            return false;
        }
        match since {
            Some((before, begun)) if *before == looked => begun.elapsed() >= LATE,
            _ => {
                *since = Some((looked, Instant::now()));
                false
            }
        }
    }

    /// Reads what calls ask for in the service's place, which may have its processor taken from it for
    /// milliseconds, by a thread of the kernel's for one: some chunks. What is asked for much at once is the sweep's
    /// work anyway. `false`: it does not go on.
    fn help(&self, window: &mut Window, to: &Sender<Read>) -> bool {
        let (mut left, mut is_any) = (BATCH, false);
        for ask in self.asked.asks {
            let span = match Ask::unpack(ask.load(Acquire)) {
                Ask::Chunks(span) if span.count <= left => span,
                _ => continue,
            };
            let range = span.range();
            for chunk in range.start..range.end.min(self.claims.len() as u32) {
                if self.claims[chunk as usize].load(Relaxed) != FREE {
                    continue;
                }
                if self.is_in_place(chunk) {
                    self.leave(chunk);
                    continue;
                }
                let buffer = match self.or_fail(self.pool.take_now(true)) {
                    Some(Some(buffer)) => buffer,
                    // Who serves waits for one.
                    Some(None) => break,
                    None => return false,
                };
                if !self.claim(chunk) {
                    self.pool.give([buffer]);
                    continue;
                }
                self.served.fetch_add(1, Relaxed);
                left -= 1;
                if !self.read(chunk, buffer, Some(window), true, to) {
                    return false;
                }
            }
            is_any |= self.asked.guard.has(span);
        }
        if is_any {
            self.wake();
        }
        !self.is_over.load(Relaxed)
    }

    /// Lets calls look whether they have what they asked for.
    fn wake(&self) {
        self.asked.guard.served.fetch_add(1, AcqRel);
        futex_wake_all(&self.asked.guard.served);
    }

    /// The pieces of a chunk that nobody has marked, and their size. It must not count as captured.
    fn unmarked(&self, chunk: u32) -> (u64, u32) {
        let source = &self.sources[self.source_of(chunk)];
        match &source.delta {
            Some(delta) => {
                let offset = u64::from(chunk - source.first) << self.shift;
                let unmarked = delta.unmarked(offset, self.shift);
                (unmarked, delta.piece_shift(self.shift))
            }
            None => (0, self.shift),
        }
    }

    /// Whether nothing of a chunk has to be captured.
    fn is_in_place(&self, chunk: u32) -> bool {
        let (unmarked, piece_shift) = self.unmarked(chunk);
        let pieces = 1u32 << (self.shift - piece_shift);
        self.unmarked.is_empty() && unmarked == u64::MAX >> (64 - pieces)
    }

    /// Leaves a chunk as it is, if nobody has it.
    fn leave(&self, chunk: u32) {
        let source = &self.sources[self.source_of(chunk)];
        let offset = u64::from(chunk - source.first) << self.shift;
        if self.claim(chunk) {
            let len = (source.size - offset).min(1 << self.shift);
            self.in_place.fetch_add(len, Relaxed);
            self.done(chunk, len);
        }
    }

    /// The chunks from this one on that are all hole.
    fn hole(&self, chunk: u32) -> std::ops::Range<u32> {
        let source = &self.sources[self.source_of(chunk)];
        // What is compared is read, be it a hole.
        if !source.target.is_sparse() || !self.unmarked.is_empty() {
            return 0..0;
        }
        let begin = u64::from(chunk - source.first) << self.shift;
        let data = match seek(&source.file, SeekFrom::Data(begin)) {
            Ok(data) => data.min(source.size),
            Err(Errno::NXIO) => source.size,
            Err(_) => return 0..0,
        };
        let end = match data >= source.size {
            true => guard::chunks_of(source.size, self.shift),
            false => data >> self.shift,
        };
        chunk..source.first + end as u32
    }

    /// Reads a chunk that was claimed, and sends it to be written.
    ///
    /// `window`: of a thread that may lose its processor in the middle; `is_asked`: somebody waits for it.
    fn read(
        &self,
        chunk: u32,
        mut buffer: Buffer,
        mut window: Option<&mut Window>,
        is_asked: bool,
        to: &Sender<Read>,
    ) -> bool {
        let index = self.source_of(chunk);
        let source = &self.sources[index];
        let offset = u64::from(chunk - source.first) << self.shift;
        let len = (source.size - offset).min(1 << self.shift) as usize;
        let (mut unmarked, piece_shift) = self.unmarked(chunk);
        if let Some(cell) = self.unmarked.get(chunk as usize) {
            cell.store(unmarked, Relaxed);
            unmarked = 0;
        }
        for part in to_read(unmarked, piece_shift, len) {
            self.bytes.fetch_add(part.len() as u64, Relaxed);
            if !self.read_part(index, offset, part, &mut buffer, window.as_deref_mut()) {
                return false;
            }
        }
        let in_place = u64::from(unmarked.count_ones()) << piece_shift;
        self.in_place.fetch_add(in_place.min(len as u64), Relaxed);
        // To the end of its page, for O_DIRECT.
        let padded = len.next_multiple_of(writer::ALIGNMENT);
        buffer.bytes_mut()[len..padded].fill(0);
        self.done(chunk, len as u64);
        // Who was asked for it has no time for that: it is done before it is written.
        if !is_asked && unmarked == 0 && !self.is_awaited() {
            self.hash(source, offset, &buffer.bytes()[..len]);
        }
        let read = Read {
            source: index,
            offset,
            len,
            unmarked,
            piece_shift,
            buffer,
        };
        // Who writes ends after us, or has said why not.
        to.send(read).is_ok()
    }

    /// Whether somebody waits for the end.
    fn is_awaited(&self) -> bool {
        self.is_under_hold || self.asked.guard.is_awaited()
    }

    /// Hashes a chunk that is all in memory, unless that was done.
    fn hash(&self, source: &Source, offset: u64, bytes: &[u8]) {
        if let Some(pieces) = &source.pieces {
            pieces.add(offset, bytes);
        }
    }

    /// Reads a part of a chunk that begins at `offset`.
    fn read_part(
        &self,
        index: usize,
        offset: u64,
        part: std::ops::Range<usize>,
        buffer: &mut Buffer,
        window: Option<&mut Window>,
    ) -> bool {
        let source = &self.sources[index];
        let mut done = part.start;
        let into = &mut buffer.bytes_mut()[part.clone()];
        if let Some(window) = window
            && window.read(index, &source.file, source.size, into, offset + done as u64)
        {
            return true;
        }
        while done < part.end {
            let into = &mut buffer.bytes_mut()[done..part.end];
            match rustix::io::pread(&source.file, &mut *into, offset + done as u64) {
                Ok(0) => {
                    into.fill(0);
                    self.short.store(index, Relaxed);
                    break;
                }
                Ok(got) => done += got,
                Err(Errno::INTR) => {}
                Err(cause) => {
                    self.fail(unreadable(&source.path, cause));
                    return false;
                }
            }
        }
        true
    }

    fn done(&self, chunk: u32, bytes: u64) {
        self.asked.tally.add(bytes);
        self.asked.guard.mark(chunk);
        self.left.fetch_sub(1, AcqRel);
    }

    /// Reads what calls ask for until it is over.
    fn serve(&self, to: &Sender<Read>) {
        let requests = &self.asked.guard.requests;
        let mut hurried = None;
        while !self.is_over.load(Relaxed) {
            let seen = requests.load(Acquire);
            if hurried.is_none() && self.asked.guard.is_awaited() {
                // A call waits for all of it: those who do it are in a hurry from now on.
                let all = [Some(self.sweeper), self.writer.get().copied()];
                let all = all.into_iter().flatten();
                hurried = Some(
                    all.map(|thread| Hurried::new(thread, Urgency::Prompt))
                        .collect::<Vec<_>>(),
                );
            }
            let (mut is_any, mut is_asked) = (false, false);
            for ask in self.asked.asks {
                if let Ask::Chunks(span) = Ask::unpack(ask.load(Acquire)) {
                    is_asked = true;
                    is_any |= self.serve_one(span, to);
                }
            }
            if is_asked {
                // Also if the sweep had come to it: nobody else tells.
                self.wake();
            }
            if !is_any {
                self.looked.store(seen, Relaxed);
                // Again after a while: not every mistake of a program should make it wait.
                futex_wait(requests, seen, 10_000_000);
            }
        }
    }

    /// Whether there was anything to do about it.
    fn serve_one(&self, span: Span, to: &Sender<Read>) -> bool {
        let mut is_any = false;
        let range = span.range();
        for chunk in range.start..range.end.min(self.claims.len() as u32) {
            if self.asked.guard.has_chunk(chunk) {
                continue;
            }
            is_any = true;
            if self.claims[chunk as usize].load(Relaxed) == FREE {
                if self.is_in_place(chunk) {
                    self.leave(chunk);
                    continue;
                }
                let mut hurried = None;
                let buffer = loop {
                    match self.or_fail(self.pool.take(true)) {
                        Some(Some(buffer)) => break buffer,
                        Some(None) if !self.is_over.load(Relaxed) => {
                            // Who writes has them all.
                            let writer = self.writer.get().copied();
                            hurried = hurried.or_else(|| Hurried::new(writer?, Urgency::Prompt));
                        }
                        _ => return false,
                    }
                };
                if self.claim(chunk) {
                    self.served.fetch_add(1, Relaxed);
                    if !self.read(chunk, buffer, None, true, to) {
                        return false;
                    }
                    continue;
                }
                self.pool.give([buffer]);
            }
            // The sweep is just reading it, unless it has lost its processor in the middle.
            let (mut looks, mut hurried) = (0, None);
            while !self.asked.guard.has_chunk(chunk) && !self.is_over.load(Relaxed) {
                std::thread::sleep(Duration::from_micros(5));
                looks += 1;
                if looks == 2 {
                    hurried = Hurried::new(self.sweeper, Urgency::Awaited);
                }
            }
            drop(hurried);
        }
        is_any
    }

    /// Writes what was read until there is no more.
    fn write(&self, read: Receiver<Read>) {
        let _ = self.writer.set(Thread::this());
        let mut pauses = Pauses::begin();
        let mut pause = || {
            if !self.is_awaited() && !self.pool.is_wanted() {
                pauses.pause();
            }
        };
        let mut writer = writer::Writer::new(self.sources, self.pool, &mut pause);
        while let Ok(first) = read.recv() {
            let run = std::iter::once(first).chain(read.try_iter());
            let run = run.take_while(|_| !self.is_lost.load(Relaxed));
            let run = run.inspect(|read| {
                if read.unmarked == 0 {
                    let bytes = &read.buffer.bytes()[..read.len];
                    self.hash(&self.sources[read.source], read.offset, bytes);
                }
            });
            if let Err(error) = writer.write(run) {
                self.fail(error);
                // What is still read is not needed; nobody may wait for its buffers.
                for rest in read {
                    self.pool.give([rest.buffer]);
                }
                return;
            }
        }
        if self.is_lost.load(Relaxed) {
            return;
        }
        if let Err(error) = writer.finish() {
            self.fail(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_a_chunk_that_are_not_in_place() {
        let parts = |in_place, shift, len| {
            let parts = to_read(in_place, shift, len);
            parts.map(|part| (part.start, part.end)).collect::<Vec<_>>()
        };
        assert_eq!(parts(0, 12, 65_536), [(0, 65_536)]);
        assert_eq!(parts(0, 12, 10), [(0, 10)]);
        assert_eq!(parts(0xffff, 12, 65_536), []);
        assert_eq!(parts(0b101, 12, 16_000), [(4096, 8192), (12_288, 16_000)]);
        assert_eq!(parts(0xfff0, 12, 65_536), [(0, 16_384)]);
        assert_eq!(parts(0x7fff, 12, 65_536), [(61_440, 65_536)]);
        assert_eq!(parts(u64::MAX >> 1, 16, 1 << 22), [(63 << 16, 1 << 22)]);
    }
}
