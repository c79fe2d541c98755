//! Finding, checking and mapping the gate, and noticing fork and exec.
//!
//! A process is attached once and for good: the mapping is kept, the descriptor
//! is not. Without a gate every call passes; a look for one is taken again about
//! every tenth of a second in which calls are made.

use core::cell::UnsafeCell;
use core::ffi::{CStr, c_char};
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64};

use snapshim_gate::abi::{Gate, HEADER_SIZE, MAX_SLOTS, REFUSE_RINGS, STDIO_RECORDS, file_size};
use snapshim_gate::reap::{self, Claimed};
use snapshim_gate::slot::{FORKED, Owner, PIDNS_MASK};
use snapshim_gate::sys::ticks;

use crate::hooks::stdio;
use crate::{libc, sys};

/// What is true of this process and must not be of its children: kept in a page
/// that the kernel empties in a child made by fork (MADV_WIPEONFORK, Linux 4.14),
/// however the child was made; handlers registered with pthread_atfork would miss
/// `_Fork` and raw clone.
///
/// The page is one of this library's own, so that the way to it is a constant. It
/// lies beyond what is mapped from the file, where memory is anonymous.
#[repr(C)]
#[cfg_attr(target_arch = "x86_64", repr(align(4096)))]
#[cfg_attr(target_arch = "aarch64", repr(align(65536)))]
pub(crate) struct Page {
    /// Keeps what follows off the places in a page where slots have their counts
    /// (multiples of 128): loads and stores that agree in their low 12 bits wait
    /// for each other.
    _lead: [AtomicU64; 0x840 / 8],
    /// Which process of those descended from one attachment this is, from 1; 0 in
    /// a process that is not attached, and in a child that has not noticed yet.
    pub(crate) generation: AtomicU64,
    pub(crate) pid: AtomicU32,
    /// Low bits of the inode number of the pid namespace (fork may enter another).
    pidns: AtomicU32,
    pub(crate) start_time: AtomicU64,
    /// Steps that only one thread may take. In this page, because a child forked
    /// while another thread takes one must be able to begin anew.
    attaching: AtomicU32,
    reading: AtomicU32,
    /// A file that was just mapped is being patched.
    pub(crate) patching: AtomicU32,
}

static PAGE: Page = Page {
    _lead: [const { AtomicU64::new(0) }; 0x840 / 8],
    generation: AtomicU64::new(0),
    pid: AtomicU32::new(0),
    pidns: AtomicU32::new(0),
    start_time: AtomicU64::new(0),
    attaching: AtomicU32::new(IDLE),
    reading: AtomicU32::new(IDLE),
    patching: AtomicU32::new(IDLE),
};

static LAST_GENERATION: AtomicU64 = AtomicU64::new(0);

/// What survives fork: the mapping, and what identifies the program image.
struct Attached {
    gate: UnsafeCell<Option<Gate>>,
    has_gate: AtomicBool,
    image: AtomicU64,
    /// A sandbox was entered.
    sandboxed: AtomicBool,
    /// Threads that are just trying to.
    sandboxing: AtomicU32,
    is_wiped: AtomicBool,
}

// SAFETY: `gate` is written once, by the thread that won `Page::attaching`, before `has_gate`
// is set with release, and only read after `has_gate` was seen.
unsafe impl Sync for Attached {}

static ATTACHED: Attached = Attached {
    gate: UnsafeCell::new(None),
    has_gate: AtomicBool::new(false),
    image: AtomicU64::new(0),
    sandboxed: AtomicBool::new(false),
    sandboxing: AtomicU32::new(0),
    is_wiped: AtomicBool::new(false),
};

const IDLE: u32 = 0;
const BUSY: u32 = 1;
const DONE: u32 = 2;

/// The process's page.
#[inline(always)]
pub(crate) fn page() -> &'static Page {
    &PAGE
}

/// The gate, if this process is attached.
pub(crate) fn gate() -> Option<&'static Gate> {
    if !ATTACHED.has_gate.load(Acquire) {
        return None;
    }
    // SAFETY: written before `has_gate` was set, never after.
    unsafe { (*ATTACHED.gate.get()).as_ref() }
}

/// Whether io_uring is to look as if this kernel did not have it.
pub(crate) fn refuses_rings() -> bool {
    gate().is_some_and(|gate| gate.header().options.load(Relaxed) & REFUSE_RINGS != 0)
}

/// Whether the program has put itself into a seccomp sandbox: from then on any
/// system call that it did not make itself may kill it.
pub(crate) fn is_sandboxed() -> bool {
    ATTACHED.sandboxed.load(Relaxed) || ATTACHED.sandboxing.load(Relaxed) > 0
}

/// Runs a call that enters a sandbox if it succeeds. From the moment it has, no
/// call of ours is safe, in any thread, so it is noted before; programs also make the
/// call to find out what the kernel can do, and then it fails.
pub(crate) fn sandboxing(call: impl FnOnce() -> isize) -> isize {
    ATTACHED.sandboxing.fetch_add(1, SeqCst);
    let result = call();
    if result >= 0 {
        ATTACHED.sandboxed.store(true, SeqCst);
    }
    ATTACHED.sandboxing.fetch_sub(1, SeqCst);
    result
}

/// Hash of the random bytes the kernel gave this program image: changes with execve. With it,
/// [`FORKED`].
pub(crate) fn image() -> u64 {
    ATTACHED.image.load(Relaxed)
}

/// The identity of thread `tid` of this process.
pub(crate) fn owner(tid: u32) -> Owner {
    Owner {
        pid: page().pid.load(Relaxed),
        tid,
        pidns: page().pidns.load(Relaxed),
    }
}

/// The environment as the dynamic linker passes it to constructors, for those that
/// run before libc's own has set `environ`.
static EARLY_ENVIRONMENT: AtomicPtr<*const c_char> = AtomicPtr::new(core::ptr::null_mut());

/// Whether libc itself has not begun yet: there cannot be a second thread.
#[cfg(target_arch = "x86_64")]
pub(crate) fn is_early() -> bool {
    libc::environment().is_null()
}

/// The first look for a gate, from the constructor.
pub(crate) fn at_start(environment: *mut *const c_char) {
    EARLY_ENVIRONMENT.store(environment, Relaxed);
    const MADV_WIPEONFORK: i32 = 18;
    let page = page();
    let is_wiped = sys::advise((&raw const PAGE).cast(), size_of::<Page>(), MADV_WIPEONFORK);
    ATTACHED.is_wiped.store(is_wiped, Relaxed);
    page.pid.store(sys::getpid(), Relaxed);
    if read_environment() && gate().is_none() {
        attach();
    }
}

/// Makes sure this process is attached, if there is a gate to attach to, and
/// known under its own name if it was forked. `false`: there is no gate, or this
/// thread cannot have a slot.
pub(crate) fn ensure() -> bool {
    if is_sandboxed() {
        return gate().is_some() && page().generation.load(Acquire) != 0;
    }
    if gate().is_none()
        && (!is_time_to_look() || is_borrowing() || !read_environment() || !attach())
    {
        return false;
    }
    if page().generation.load(Acquire) == 0 {
        if is_borrowing() {
            return false;
        }
        become_process();
    }
    true
}

/// Whether this is a child of vfork (or of clone with CLONE_VM): a process of its
/// own in the memory of another, which must not be taken for that other.
pub(crate) fn is_borrowing() -> bool {
    match page().pid.load(Relaxed) {
        // A forked child's page is empty: the memory is this process's, unless it
        // is already a grandchild's that borrows from it.
        0 => sys::shares_memory_with_parent(),
        pid => pid != sys::getpid(),
    }
}

/// Whether about a tenth of a second has passed since the last look, by a clock
/// that costs no system call and whose rate need not be known well.
fn is_time_to_look() -> bool {
    static LAST: AtomicU64 = AtomicU64::new(0);
    const STEP: u64 = if cfg!(target_arch = "x86_64") {
        1 << 28
    } else {
        1 << 23
    };
    let now = ticks();
    let last = LAST.load(Relaxed);
    if last != 0 && now.wrapping_sub(last) < STEP {
        return false;
    }
    LAST.compare_exchange(last, now.max(1), Relaxed, Relaxed)
        .is_ok()
}

/// Attaches, unless another thread is at it (then this call passes: the
/// coordinator proves from outside that calls in flight at that moment do no harm).
#[cold]
fn attach() -> bool {
    let step = &page().attaching;
    if step.compare_exchange(IDLE, BUSY, Acquire, Relaxed).is_err() {
        return step.load(Acquire) == DONE;
    }
    let attached = try_attach();
    step.store(if attached { DONE } else { IDLE }, Release);
    attached
}

fn try_attach() -> bool {
    let settings = settings();
    if settings.ignored || !ATTACHED.is_wiped.load(Relaxed) {
        return false;
    }
    let Some(gate) = settings
        .candidates()
        .find_map(|path| map_gate(path, settings))
    else {
        return false;
    };
    ATTACHED.image.store(image_id() & !FORKED, Relaxed);
    // SAFETY: this thread alone holds BUSY, and nobody reads before `has_gate`.
    unsafe { *ATTACHED.gate.get() = Some(gate) };
    ATTACHED.has_gate.store(true, Release);
    stdio::want(gate.header().options.load(Relaxed) & STDIO_RECORDS != 0);
    // Who we are is asked at the first call: that the gate is mapped is all the
    // coordinator needs to see. But what an earlier image of this process left
    // counted must not wait for a call that may never come.
    let pid = page().pid.load(Relaxed);
    if gate
        .used_slots()
        .iter()
        .any(|slot| Owner::unpack(slot.owner.load(Relaxed)).is_some_and(|owner| owner.pid == pid))
    {
        become_process();
    }
    true
}

/// Learns who this process is, and clears what an earlier image of it, or an
/// earlier process of the same id, left counted. Two threads, or a thread and
/// its handler, may do so at once: they write the same.
#[cold]
fn become_process() {
    let page = page();
    // A forked child's page is empty. Before the id is written: whoever finds that finds this.
    if page.pid.load(Relaxed) == 0 {
        ATTACHED.image.fetch_or(FORKED, Release);
    }
    page.pid.store(sys::getpid(), Release);
    page.pidns.store(pid_namespace(), Relaxed);
    page.start_time.store(start_time(), Relaxed);
    clear_stale_slots();
    let next = LAST_GENERATION.fetch_add(1, Relaxed) + 1;
    let _ = page.generation.compare_exchange(0, next, Release, Relaxed);
}

/// No live process but this has this pid in this pid namespace.
fn clear_stale_slots() {
    let Some(gate) = gate() else { return };
    let own = owner(0);
    let start = page().start_time.load(Relaxed);
    for slot in gate.used_slots() {
        let Some(claimed) = Claimed::read(slot) else {
            continue;
        };
        let is_ours = Owner::unpack(claimed.owner)
            .is_some_and(|owner| owner.pid == own.pid && owner.pidns == own.pidns);
        // 0: it could not be read, here or there.
        let other_start = claimed.start_time != start && claimed.start_time != 0 && start != 0;
        let is_stale = other_start || slot.image.load(Relaxed) != image();
        if is_ours && is_stale {
            gate.header().watch.note_end(slot);
            reap::reap(slot, claimed);
        }
    }
}

/// Maps the gate at `path` if it is one, and safe.
fn map_gate(path: &[u8], settings: &Settings) -> Option<Gate> {
    const O_RDWR: i32 = 2;
    const MAP_SHARED: i32 = 1;

    // O_NONBLOCK: a FIFO put in its place must not hang the program.
    let fd = sys::open(
        path,
        O_RDWR | sys::O_CLOEXEC | sys::O_NOFOLLOW | sys::O_NONBLOCK,
    )?;
    let mapped = check_gate_file(fd, settings)
        .and_then(|len| sys::map(fd, len, MAP_SHARED).map(|at| (at, len)));
    sys::close(fd);
    let (at, len) = mapped?;
    // SAFETY: just mapped shared for `len` bytes, and unmapped only below.
    match unsafe { Gate::attach(at, len) } {
        Ok(gate) => Some(gate),
        Err(_) => {
            sys::unmap(at, len);
            None
        }
    }
}

/// The size to map, if the file may be trusted with our calls.
fn check_gate_file(fd: i32, settings: &Settings) -> Option<usize> {
    const TMPFS_MAGIC: i64 = 0x0102_1994;
    const OTHERS_WRITE: u32 = 0o002;
    let stat = sys::fstat(fd)?;
    let len = usize::try_from(stat.size).ok()?;
    let pinned = settings
        .pinned
        .map(|(dev, ino)| stat.dev == dev && stat.ino == ino);
    // A file named by device and inode is the one whoever started us meant.
    let trusted = pinned.unwrap_or(stat.uid == 0 || stat.uid == sys::geteuid());
    let fits = (HEADER_SIZE..=file_size(MAX_SLOTS)).contains(&len);
    // On a disk file system a freeze would block us at our own store, and a full
    // one kill us with SIGBUS.
    (stat.is_regular()
        && trusted
        && stat.mode & OTHERS_WRITE == 0
        && fits
        && sys::filesystem_type(fd) == TMPFS_MAGIC)
        .then_some(len)
}

/// Field 22 of /proc/self/stat: when this process started, in clock ticks since
/// boot. 0 if there is no /proc. Read in small pieces: the stack may be a small one.
fn start_time() -> u64 {
    let Some(fd) = sys::open(b"/proc/self/stat\0", sys::O_RDONLY | sys::O_CLOEXEC) else {
        return 0;
    };
    let mut piece = [0u8; 32];
    let mut field = Field::default();
    loop {
        let n = sys::read(fd, &mut piece);
        for byte in piece.get(..n).unwrap_or(&[]) {
            field.take(*byte);
        }
        if n == 0 {
            break;
        }
    }
    sys::close(fd);
    field.value
}

/// A number in a stat file, found as its bytes go by. The name, in parentheses, may
/// hold spaces and parentheses itself: what follows the last one counts.
#[derive(Default)]
struct Field {
    /// Spaces since the last closing parenthesis.
    spaces: u32,
    value: u64,
}

impl Field {
    fn take(&mut self, byte: u8) {
        match byte {
            b')' => *self = Field::default(),
            b' ' => self.spaces += 1,
            // ") S ppid ...": one space before field 3, so 22 is after 20 of them.
            b'0'..=b'9' if self.spaces == 20 => {
                let digit = u64::from(byte - b'0');
                self.value = self.value.wrapping_mul(10).wrapping_add(digit);
            }
            _ => {}
        }
    }
}

fn pid_namespace() -> u32 {
    // SAFETY: a NUL-terminated constant.
    let stat = unsafe { sys::fstatat(sys::AT_FDCWD, c"/proc/self/ns/pid".as_ptr(), 0) };
    stat.map_or(0, |s| s.ino as u32 & PIDNS_MASK)
}

fn image_id() -> u64 {
    const AT_RANDOM: usize = 25;
    let bytes = libc::auxiliary(AT_RANDOM) as *const [u64; 2];
    if bytes.is_null() {
        return 1;
    }
    // SAFETY: AT_RANDOM is the address of 16 random bytes that stay mapped; they need not
    // be aligned.
    let [a, b] = unsafe { bytes.read_unaligned() };
    (a ^ b.rotate_left(32)) | 1
}

/// What the environment says, kept because programs change and free theirs.
struct Settings {
    /// Paths to try, each NUL-terminated.
    paths: [Path; 4],
    pinned: Option<(u64, u64)>,
    /// Directories of site tables.
    sites: [Path; 3],
    /// The program runs with privileges its caller lacks: the environment is not to be trusted.
    ignored: bool,
}

/// A NUL-terminated path of bounded length; empty if it did not fit.
#[derive(Clone, Copy)]
struct Path {
    bytes: [u8; 512],
    len: usize,
}

impl Path {
    const EMPTY: Path = Path {
        bytes: [0; 512],
        len: 0,
    };

    fn join(parts: &[&[u8]]) -> Path {
        let mut path = Path::EMPTY;
        let total: usize = parts.iter().map(|p| p.len()).sum();
        if total >= path.bytes.len() {
            return path;
        }
        let bytes = parts.iter().flat_map(|p| p.iter());
        for (to, from) in path.bytes.iter_mut().zip(bytes) {
            *to = *from;
        }
        path.len = total;
        path
    }
}

impl Settings {
    fn candidates(&self) -> impl Iterator<Item = &[u8]> {
        self.paths
            .iter()
            .filter(|p| p.len > 0)
            .filter_map(|p| p.bytes.get(..=p.len))
    }
}

/// The directories of site tables, empty paths among them; `None` if the
/// environment is not to be trusted, or not read yet.
pub(crate) fn site_places_known() -> Option<[&'static [u8]; 3]> {
    if page().reading.load(Acquire) != DONE || settings().ignored {
        return None;
    }
    let [a, b, c] = &settings().sites;
    Some([a, b, c].map(|p| p.bytes.get(..p.len).unwrap_or(&[])))
}

struct SettingsCell(UnsafeCell<Settings>);
// SAFETY: written only by whoever moves `Page::reading` from IDLE to BUSY; read only after DONE.
unsafe impl Sync for SettingsCell {}

static SETTINGS: SettingsCell = SettingsCell(UnsafeCell::new(Settings {
    paths: [Path::EMPTY; 4],
    pinned: None,
    sites: [Path::EMPTY; 3],
    ignored: true,
}));

fn settings() -> &'static Settings {
    // SAFETY: called only after `read_environment` returned true: `Page::reading`
    // is DONE, and nobody writes any more.
    unsafe { &*SETTINGS.0.get() }
}

/// Reads the environment, once. `false` while another thread, or the code that
/// this handler interrupted, is at it.
fn read_environment() -> bool {
    let step = &page().reading;
    if step.compare_exchange(IDLE, BUSY, Acquire, Relaxed).is_err() {
        return step.load(Acquire) == DONE;
    }
    let settings = gather();
    // SAFETY: the step is ours; see `settings`.
    unsafe { *SETTINGS.0.get() = settings };
    step.store(DONE, Release);
    true
}

fn gather() -> Settings {
    const AT_SECURE: usize = 23;
    let secure = libc::auxiliary(AT_SECURE) != 0;
    let mut paths = [Path::EMPTY; 4];
    let mut pinned = None;
    if let Some(path) = variable(b"SNAPSHIM_GATE=") {
        paths[0] = Path::join(&[path]);
        pinned = variable(b"SNAPSHIM_GATE_ID=").and_then(device_and_inode);
    } else {
        // The same places, in the same order, as the coordinator's.
        let set = variable(b"SNAPSHIM_SET=").unwrap_or(b"default");
        let user = sys::geteuid();
        if let Some(dir) = variable(b"SNAPSHIM_DIR=") {
            paths[0] = Path::join(&[dir, b"/", set, b"/gate"]);
        } else {
            if user == 0 {
                paths[1] = Path::join(&[b"/run/snapshim/", set, b"/gate"]);
            } else if let Some(dir) = variable(b"XDG_RUNTIME_DIR=") {
                paths[1] = Path::join(&[dir, b"/snapshim/", set, b"/gate"]);
            }
            let mut digits = [0; 10];
            let user = write_decimal(user, &mut digits);
            paths[2] = Path::join(&[b"/dev/shm/snapshim-", user, b"/", set, b"/gate"]);
        }
    }
    Settings {
        paths,
        pinned,
        sites: site_places(),
        ignored: secure,
    }
}

/// The same places, in the same order, as the coordinator's.
fn site_places() -> [Path; 3] {
    if let Some(dir) = variable(b"SNAPSHIM_SITES=") {
        return [Path::join(&[dir]), Path::EMPTY, Path::EMPTY];
    }
    let cache = match (variable(b"XDG_CACHE_HOME="), variable(b"HOME=")) {
        _ if sys::geteuid() == 0 => Path::EMPTY,
        (Some(dir), _) => Path::join(&[dir, b"/snapshim/sites"]),
        (None, Some(home)) => Path::join(&[home, b"/.cache/snapshim/sites"]),
        (None, None) => Path::EMPTY,
    };
    let shared = Path::join(&[b"/var/cache/snapshim/sites"]);
    [cache, shared, Path::EMPTY]
}

/// The value of the variable that starts with `prefix` ("NAME=").
fn variable(prefix: &[u8]) -> Option<&'static [u8]> {
    // SAFETY: before main, and at the first calls of constructors, the
    // environment is the one the kernel laid out; later it is what the program
    // keeps valid for its own getenv.
    unsafe {
        let mut at = libc::environment();
        if at.is_null() {
            at = EARLY_ENVIRONMENT.load(Relaxed);
        }
        if at.is_null() {
            return None;
        }
        while !(*at).is_null() {
            let text = CStr::from_ptr(*at).to_bytes();
            if let Some(value) = text.strip_prefix(prefix) {
                return Some(value);
            }
            at = at.add(1);
        }
    }
    None
}

/// "DEV:INO", decimal.
fn device_and_inode(text: &[u8]) -> Option<(u64, u64)> {
    let mut parts = text.splitn(2, |b| *b == b':');
    Some((decimal(parts.next()?)?, decimal(parts.next()?)?))
}

fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() {
        return None;
    }
    text.iter().try_fold(0u64, |n, b| {
        b.is_ascii_digit()
            .then(|| n.checked_mul(10)?.checked_add(u64::from(b - b'0')))?
    })
}

fn write_decimal(mut n: u32, digits: &mut [u8; 10]) -> &[u8] {
    let mut used = 0;
    for digit in digits.iter_mut().rev() {
        *digit = b'0' + (n % 10) as u8;
        used += 1;
        n /= 10;
        if n == 0 {
            break;
        }
    }
    digits.get(10 - used..).unwrap_or(&[])
}
