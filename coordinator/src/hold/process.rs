//! What `/proc` says of other processes. Everything here is a look at something
//! that may change or end at any moment; every answer may be "gone".
//!
//! Only ENOENT and ESRCH mean "gone"; whatever else keeps us from looking at a process
//! leaves it [`Unreadable`], never absent.
//!
//! The first thread of a process may end before the others. Its `/proc/PID` then shows
//! no descriptors and no mappings, though the process has them: [`live_thread`] is the
//! one to look at instead. (`/proc/TID` exists for every thread, unlisted, and has
//! `map_files`, which `/proc/PID/task/TID` has not.)

use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::{fmt, fs, io};

use nix::libc;
use rustix::io::Errno;
use rustix::process::{Pid as RawPid, test_kill_process};
use snapshim_gate::table::FileId;

/// A process id as this process sees it.
pub type Pid = u32;

/// Why we cannot look at a process that is there.
#[derive(Debug)]
pub struct Unreadable(io::Error);

impl Unreadable {
    fn too_fast() -> Unreadable {
        let cause = "its threads end faster than they can be looked at";
        Unreadable(io::Error::other(cause))
    }

    /// Whether it is for lack of permission.
    pub fn is_forbidden(&self) -> bool {
        self.0.kind() == io::ErrorKind::PermissionDenied
    }
}

impl fmt::Display for Unreadable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Whether an error says that there is no such process (thread, descriptor) any more.
fn is_gone(cause: &io::Error) -> bool {
    matches!(cause.raw_os_error(), Some(libc::ENOENT | libc::ESRCH))
}

/// What is there; `None` if it is gone.
fn present<T>(result: io::Result<T>) -> Result<Option<T>, Unreadable> {
    match result {
        Ok(found) => Ok(Some(found)),
        Err(cause) if is_gone(&cause) => Ok(None),
        Err(cause) => Err(Unreadable(cause)),
    }
}

/// All processes there are.
///
/// # Errors
///
/// `/proc` cannot be read, or is not that of our pid namespace (a container that was given
/// the host's): what it says of an id is then about another process than we mean.
pub fn all() -> io::Result<Vec<Pid>> {
    let own = fs::read_link("/proc/self")?;
    if own.to_str() != Some(std::process::id().to_string().as_str()) {
        return Err(io::Error::other(
            "it is that of another pid namespace: mount one of this command's own",
        ));
    }
    ids(Path::new("/proc"))
}

/// All threads of a process; none if it is gone.
pub fn threads(pid: Pid) -> Result<Vec<Pid>, Unreadable> {
    let listed = present(ids(Path::new(&format!("/proc/{pid}/task"))))?;
    Ok(listed.unwrap_or_default())
}

/// Whether a process has this thread.
pub fn has_thread(pid: Pid, tid: Pid) -> Result<bool, Unreadable> {
    Ok(present(look(pid, tid))?.is_some())
}

/// The first thread of a process that `is_it`; `None` if there is none.
pub fn find_thread(pid: Pid, is_it: impl Fn(Pid) -> bool) -> Result<Option<Pid>, Unreadable> {
    for _ in 0..LOOKS {
        let listed = threads(pid)?;
        let found = listed.iter().copied().find(|tid| is_it(*tid));
        // A list may end early where a thread ends as it is read.
        if found.is_some() || thread_count(pid).is_none_or(|n| n <= listed.len()) {
            return Ok(found);
        }
    }
    Err(Unreadable::too_fast())
}

fn ids(dir: &Path) -> io::Result<Vec<Pid>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name();
        found.extend(name.to_str().and_then(|n| n.parse::<Pid>().ok()));
    }
    Ok(found)
}

/// How often a look is begun again, of which the thread it went by way of has ended.
const LOOKS: u32 = 20;

/// A thread of the process that has not ended, to be looked at as `/proc/TID`: the first
/// one, unless it has ended before the others. `None` if the process has ended.
pub fn live_thread(pid: Pid) -> Option<Pid> {
    for _ in 0..LOOKS {
        match look(pid, pid) {
            Ok(task) if !task.is_ending => return Some(pid),
            Ok(_) => {}
            Err(cause) if is_gone(&cause) => return None,
            // It is there, whatever it does.
            Err(_) => return Some(pid),
        }
        let Ok(listed) = threads(pid) else {
            return Some(pid);
        };
        let mut ending = None;
        for tid in &listed {
            match look(pid, *tid) {
                Ok(task) if !task.is_ending => return Some(*tid),
                Ok(task) if !task.has_ended() => ending = Some(*tid),
                Ok(_) => {}
                Err(cause) if is_gone(&cause) => {}
                Err(_) => return Some(*tid),
            }
        }
        // A list may end early where a thread ends as it is read.
        if ending.is_some() || thread_count(pid).is_none_or(|n| n <= listed.len()) {
            return ending;
        }
    }
    Some(pid)
}

/// Reads something by way of `/proc/TID` of a thread that did not end meanwhile; `None`
/// if the process is gone, or has no such thing (a thread of the kernel has none).
fn through<T>(
    pid: Pid,
    mut read: impl FnMut(Pid) -> io::Result<T>,
) -> Result<Option<T>, Unreadable> {
    let mut tid = pid;
    for _ in 0..LOOKS {
        let found = read(tid);
        let is_missing = found.as_ref().is_err_and(is_gone);
        match look(pid, tid) {
            // Not there for a moment: another thread takes its place by an exec.
            Ok(task) if is_missing && !task.is_kernel && !task.is_ending => {}
            Ok(task) if !task.is_ending => return present(found),
            Err(cause) if !is_gone(&cause) => return present(found),
            _ => {}
        }
        match live_thread(pid) {
            None => return Ok(None),
            // The last one, on its way out, or not to be had.
            Some(same) if same == tid && look(pid, tid).is_ok_and(|t| !t.has_ended()) => {
                return present(found);
            }
            Some(other) => tid = other,
        }
    }
    Err(Unreadable::too_fast())
}

/// The command name.
pub fn name(pid: Pid) -> String {
    fs::read(format!("/proc/{pid}/comm"))
        .map(|bytes| String::from_utf8_lossy(&bytes).trim_end().to_owned())
        .unwrap_or_default()
}

/// Effective user id; `None` if the process is gone.
pub fn owner(pid: Pid) -> Option<u32> {
    Some(fs::metadata(format!("/proc/{pid}")).ok()?.uid())
}

/// Permitted capabilities, as a bit set; `None` if the process is gone.
pub fn capabilities(pid: Pid) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("CapPrm:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

/// Whether there is such a process, and a thread of it that has not ended. One that
/// `/proc` hides from us (hidepid) counts as alive.
pub fn is_alive(pid: Pid) -> bool {
    live_thread(pid).is_some() || is_hidden(pid)
}

/// Whether there is a process that `/proc` does not show.
fn is_hidden(pid: Pid) -> bool {
    let exists = |pid| !matches!(test_kill_process(pid), Err(Errno::SRCH));
    let raw = i32::try_from(pid).ok().and_then(RawPid::from_raw);
    raw.is_some_and(exists) && !fs::exists(format!("/proc/{pid}")).unwrap_or(true)
}

/// When the process started, in clock ticks since boot; `None` if it is gone.
pub fn start_time(pid: Pid) -> Option<u64> {
    look(pid, pid).ok().map(|task| task.start)
}

/// What a thread's stat file says (proc_pid_stat(5)).
#[derive(Clone, Copy, Debug)]
pub struct Task {
    /// State letter.
    pub state: char,
    /// A thread the kernel made for an io_uring, which runs no code of the program's.
    pub is_io_worker: bool,
    /// A thread of the kernel's own.
    pub is_kernel: bool,
    /// It has ended, or is about to: it has no memory and no descriptors any more.
    is_ending: bool,
    /// When it started.
    start: u64,
}

impl Task {
    /// Whether it has ended.
    pub fn has_ended(&self) -> bool {
        matches!(self.state, 'Z' | 'X')
    }

    fn parse(text: &[u8]) -> Option<Task> {
        /// include/linux/sched.h.
        const PF_EXITING: u64 = 0x4;
        const PF_IO_WORKER: u64 = 0x10;
        const PF_KTHREAD: u64 = 0x20_0000;
        // The name, in parentheses, may hold anything, parentheses included.
        let end = text.iter().rposition(|b| *b == b')')?;
        let rest = std::str::from_utf8(text.get(end + 1..)?).ok()?;
        let mut fields = rest.split_ascii_whitespace();
        let state = fields.next()?.chars().next()?;
        let flags: u64 = fields.nth(5)?.parse().ok()?;
        Some(Task {
            state,
            is_io_worker: flags & PF_IO_WORKER != 0,
            is_kernel: flags & PF_KTHREAD != 0,
            is_ending: flags & PF_EXITING != 0 || matches!(state, 'Z' | 'X'),
            start: fields.nth(12)?.parse().ok()?,
        })
    }
}

/// One thread of a process; `None` if it is gone.
pub fn task(pid: Pid, tid: Pid) -> Option<Task> {
    look(pid, tid).ok()
}

fn look(pid: Pid, tid: Pid) -> io::Result<Task> {
    let text = fs::read(format!("/proc/{pid}/task/{tid}/stat"))?;
    Task::parse(&text).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
}

/// A number in a thread's status file; of sizes, those in KiB.
pub fn status_number(pid: Pid, tid: Pid, field: &str) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/task/{tid}/status")).ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix(field))?;
    line.trim().trim_end_matches(" kB").parse().ok()
}

/// The process that traces a thread, 0 if none does; `None` if the thread is gone.
pub fn tracer(pid: Pid, tid: Pid) -> Option<Pid> {
    status_number(pid, tid, "TracerPid:")
}

/// How many threads a process has, by the kernel's own count; `None` if it is gone.
pub fn thread_count(pid: Pid) -> Option<usize> {
    status_number(pid, pid, "Threads:").map(|n| n as usize)
}

/// The process that a thread belongs to; `None` if it is gone.
pub fn group(tid: Pid) -> Option<Pid> {
    status_number(tid, tid, "Tgid:")
}

/// Whether a process counts time from another moment than this one does: then
/// its own view of its start time says nothing here (time_namespaces(7)).
pub fn is_in_other_time(pid: Pid) -> bool {
    let namespace = |pid: &str| fs::metadata(format!("/proc/{pid}/ns/time")).map(|m| m.ino());
    let theirs = live_thread(pid).unwrap_or(pid).to_string();
    matches!((namespace(&theirs), namespace("self")), (Ok(a), Ok(b)) if a != b)
}

/// Low bits of the inode number of a process's pid namespace, as the shim
/// publishes them; `None` if it may not be looked at.
pub fn pid_namespace(pid: Pid) -> Option<u32> {
    let ino = fs::metadata(format!("/proc/{pid}/ns/pid")).ok()?.ino();
    Some(ino as u32 & snapshim_gate::slot::PIDNS_MASK)
}

/// The id a process (or thread) has in its own, innermost pid namespace.
pub fn inner_id(pid: Pid, tid: Pid) -> Option<Pid> {
    ids_by_namespace(pid, tid)?.pop()
}

/// The same of a process that is in another pid namespace than the one `/proc` shows;
/// `None` if it is in that one, or gone.
pub fn id_elsewhere(pid: Pid) -> Option<Pid> {
    let mut ids = ids_by_namespace(pid, pid)?;
    (ids.len() > 1).then(|| ids.pop())?
}

/// The ids a thread has, from the pid namespace that `/proc` shows to its own. Unlike the
/// namespaces themselves, anybody may read them.
fn ids_by_namespace(pid: Pid, tid: Pid) -> Option<Vec<Pid>> {
    let status = fs::read_to_string(format!("/proc/{pid}/task/{tid}/status")).ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("NSpid:"))?;
    let ids = line.split_ascii_whitespace().map(|id| id.parse().ok());
    ids.collect()
}

/// A thread's state and how often it was taken off a CPU: two equal readings of
/// a sleeping thread mean that it did not run between them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// State letter (proc_pid_stat(5)).
    pub state: char,
    voluntary: u64,
    involuntary: u64,
}

/// The schedule of a thread; `None` if it is gone.
pub fn schedule(pid: Pid, tid: Pid) -> Option<Schedule> {
    let status = fs::read_to_string(format!("/proc/{pid}/task/{tid}/status")).ok()?;
    let field = |name: &str| {
        let line = status.lines().find_map(|l| l.strip_prefix(name))?;
        Some(line.trim_start().to_owned())
    };
    Some(Schedule {
        state: field("State:")?.chars().next()?,
        voluntary: field("voluntary_ctxt_switches:")?.parse().ok()?,
        involuntary: field("nonvoluntary_ctxt_switches:")?.parse().ok()?,
    })
}

/// What a thread is doing (proc_pid_syscall(5)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Doing {
    /// On a CPU, in the program or in the kernel.
    Running,
    /// Asleep in a system call.
    Call {
        /// Its number.
        number: i64,
        /// Its arguments.
        args: [u64; 6],
    },
    /// Asleep, but not in a system call.
    Elsewhere,
    /// We may not look.
    Hidden,
    /// The thread is gone.
    Gone,
}

/// What a thread is doing now.
pub fn doing(pid: Pid, tid: Pid) -> Doing {
    let text = match fs::read_to_string(format!("/proc/{pid}/task/{tid}/syscall")) {
        Ok(text) => text,
        Err(e) if matches!(e.raw_os_error(), Some(2 | 3)) => return Doing::Gone,
        Err(_) => return Doing::Hidden,
    };
    parse_doing(text.trim_end())
}

fn parse_doing(text: &str) -> Doing {
    if text == "running" {
        return Doing::Running;
    }
    let mut fields = text.split(' ');
    let Some(number) = fields.next().and_then(|n| n.parse().ok()) else {
        return Doing::Hidden;
    };
    if number < 0 {
        return Doing::Elsewhere;
    }
    let mut args = [0; 6];
    for arg in &mut args {
        let field = fields.next().and_then(|f| f.strip_prefix("0x"));
        let Some(value) = field.and_then(|f| u64::from_str_radix(f, 16).ok()) else {
            return Doing::Hidden;
        };
        *arg = value;
    }
    Doing::Call { number, args }
}

/// What is behind a descriptor of a thread: its identity and mode bits.
pub fn file_behind(pid: Pid, tid: Pid, fd: i64) -> Option<(FileId, u32)> {
    let meta = fs::metadata(format!("/proc/{pid}/task/{tid}/fd/{fd}")).ok()?;
    let id = FileId {
        dev: meta.dev(),
        ino: meta.ino(),
    };
    Some((id, meta.mode()))
}

/// The files that matter and a process has open for writing, and its io_urings.
#[derive(Debug, Default)]
pub struct OpenFiles {
    /// Identity of each.
    pub writable: Vec<FileId>,
    /// The worst of its io_urings, if it has any.
    pub ring: Option<Polling>,
}

/// Who submits what is put into an io_uring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Polling {
    /// The program, by system calls.
    No,
    /// A thread of the kernel, when it finds something (IORING_SETUP_SQPOLL).
    Yes,
}

/// What fdinfo says of an io_uring.
#[derive(Clone, Debug)]
pub struct Ring {
    /// Its descriptor.
    pub fd: u32,
    /// Who submits.
    pub polling: Polling,
    /// How many entries the kernel has taken, if this kernel says so.
    pub taken: Option<u32>,
    /// How many completions it has posted.
    pub done: Option<u32>,
    /// Nothing was told: the kernel was working at it, and does not wait for itself
    /// (`io_uring_show_fdinfo` tries `uring_lock`).
    pub is_busy: bool,
}

impl Ring {
    /// Reads `/proc/PID/fdinfo/FD`.
    pub fn parse(fd: u32, info: &str) -> Ring {
        let field = |name: &str| {
            let line = info.lines().find_map(|l| l.strip_prefix(name))?;
            line.trim().parse::<i64>().ok()
        };
        Ring {
            fd,
            // -1: no such thread.
            polling: match field("SqThread:") {
                Some(0..) => Polling::Yes,
                _ => Polling::No,
            },
            taken: field("CachedSqHead:").map(|n| n as u32),
            done: field("CachedCqTail:").map(|n| n as u32),
            is_busy: field("SqHead:").is_none() && field("CqHead:").is_none(),
        }
    }
}

fn is_ring(target: &Path) -> bool {
    target.to_string_lossy().starts_with("anon_inode:[io_uring")
}

/// The io_urings that a process has descriptors of.
pub fn rings(pid: Pid) -> Result<Vec<Ring>, Unreadable> {
    Ok(through(pid, rings_through)?.unwrap_or_default())
}

/// What a descriptor is on; `None` if it is closed. Of a file whose path is too long to be
/// told, only that it is a file: paths of nothing else are that long.
fn descriptor(link: &Path) -> io::Result<Option<PathBuf>> {
    match fs::read_link(link) {
        Ok(target) => Ok(Some(target)),
        Err(cause) if is_gone(&cause) => Ok(None),
        Err(cause) if cause.raw_os_error() == Some(libc::ENAMETOOLONG) => Ok(Some("/".into())),
        Err(cause) => Err(cause),
    }
}

fn rings_through(tid: Pid) -> io::Result<Vec<Ring>> {
    let mut rings = Vec::new();
    for entry in fs::read_dir(format!("/proc/{tid}/fd"))? {
        let entry = entry?;
        let is_ring = descriptor(&entry.path())?.is_some_and(|target| is_ring(&target));
        let name = entry.file_name();
        if is_ring && let Some(fd) = name.to_str().and_then(|n| n.parse().ok()) {
            match fs::read_to_string(format!("/proc/{tid}/fdinfo/{fd}")) {
                Ok(info) => rings.push(Ring::parse(fd, &info)),
                Err(cause) if is_gone(&cause) => {}
                Err(cause) => return Err(cause),
            }
        }
    }
    Ok(rings)
}

/// What is looked for among descriptors.
pub trait Wanted {
    /// Whether this file matters.
    fn has(&self, id: FileId) -> bool;
    /// Whether any file on this device does.
    fn has_device(&self, dev: u64) -> bool;
}

/// The descriptors of a process on files that matter; an empty answer if it is gone.
pub fn open_files(pid: Pid, wanted: &impl Wanted) -> Result<OpenFiles, Unreadable> {
    let read = |tid| open_files_through(tid, wanted);
    Ok(through(pid, read)?.unwrap_or_default())
}

fn open_files_through(tid: Pid, wanted: &impl Wanted) -> io::Result<OpenFiles> {
    let mut found = OpenFiles::default();
    for entry in fs::read_dir(format!("/proc/{tid}/fd"))? {
        let entry = entry?;
        let Some(target) = descriptor(&entry.path())? else {
            continue;
        };
        if is_ring(&target) && found.ring.is_none() {
            let worst = rings_through(tid)?.iter().map(|ring| ring.polling).max();
            found.ring = Some(worst.unwrap_or(Polling::Yes));
        }
        // Anything in the tree of files has an absolute path; the rest is
        // sockets, pipes and anonymous inodes.
        if !target.is_absolute() {
            continue;
        }
        let meta = match fs::metadata(entry.path()) {
            Ok(meta) => meta,
            Err(cause) if is_gone(&cause) || is_elsewhere(&entry.path(), wanted) => continue,
            Err(cause) => return Err(cause),
        };
        let id = FileId {
            dev: meta.dev(),
            ino: meta.ino(),
        };
        // This look may be one under a hold: no more system calls than it needs.
        if !wanted.has(id) {
            continue;
        }
        let info = format!("/proc/{tid}/fdinfo/{}", entry.file_name().to_string_lossy());
        let is_writer = match fs::read_to_string(info) {
            Ok(info) => is_writable(&info),
            // Closed meanwhile: a writer would be caught at it by its file's ctime.
            Err(e) => !is_gone(&e),
        };
        if meta.is_file() && is_writer {
            found.writable.push(id);
        }
    }
    Ok(found)
}

/// Whether a file that cannot be asked who it is (FUSE answers its owner only, a server
/// may be down) is on a device that nothing wanted is on, which it tells nevertheless.
fn is_elsewhere(path: &Path, wanted: &impl Wanted) -> bool {
    use rustix::fs::{AtFlags, CWD, StatxFlags, statx};
    statx(CWD, path, AtFlags::STATX_DONT_SYNC, StatxFlags::empty()).is_ok_and(|stat| {
        let dev = rustix::fs::makedev(stat.stx_dev_major, stat.stx_dev_minor);
        !wanted.has_device(dev)
    })
}

/// Whether fdinfo says O_WRONLY or O_RDWR.
pub fn is_writable(info: &str) -> bool {
    const O_ACCMODE: u32 = 3;
    info.lines()
        .find_map(|l| l.strip_prefix("flags:"))
        .and_then(|f| u32::from_str_radix(f.trim(), 8).ok())
        .is_some_and(|flags| flags & O_ACCMODE != 0)
}

/// A shared mapping of a file.
#[derive(Debug)]
pub struct Mapping {
    /// Inode number.
    pub ino: u64,
    /// The path shown, without the mark of a deleted file.
    pub path: PathBuf,
    /// Where it begins, as in `/proc/PID/maps`.
    start: u64,
    end: u64,
    is_writable: bool,
}

impl Mapping {
    /// The identity of the file, as stat tells it (`/proc/PID/map_files`, which only root
    /// may follow).
    pub fn identity(&self, pid: Pid) -> Option<FileId> {
        let tid = live_thread(pid)?;
        let path = format!("/proc/{tid}/map_files/{:x}-{:x}", self.start, self.end);
        let meta = fs::metadata(path).ok()?;
        Some(FileId {
            dev: meta.dev(),
            ino: meta.ino(),
        })
    }
}

/// The mappings of a process that matter.
#[derive(Debug, Default)]
pub struct Mappings {
    /// Shared mappings of files, but for the gate's.
    pub shared: Vec<Mapping>,
    /// The gate file is mapped: the hooks of this program image look at it.
    pub gate: bool,
    /// There is a kernel AIO context.
    pub aio: bool,
}

/// The text of `/proc/PID/maps`; `None` if the process is gone.
pub fn maps(pid: Pid) -> Result<Option<Vec<u8>>, Unreadable> {
    through(pid, |tid| fs::read(format!("/proc/{tid}/maps")))
}

/// The mappings of a process; an empty answer if it is gone.
pub fn mappings(pid: Pid, gate: FileId) -> Result<Mappings, Unreadable> {
    let mut found = Mappings::default();
    let text = maps(pid)?.unwrap_or_default();
    for line in text.split(|b| *b == b'\n') {
        let Some(map) = MapLine::parse(line) else {
            continue;
        };
        if map.is_aio() {
            found.aio = true;
            continue;
        }
        if !map.shared || map.ino == 0 {
            continue;
        }
        // tmpfs shows the device number that stat shows (btrfs would not).
        if map.ino == gate.ino && rustix::fs::makedev(map.major, map.minor) == gate.dev {
            found.gate = true;
        } else {
            use std::os::unix::ffi::OsStrExt;
            let path = map.path.strip_suffix(b" (deleted)").unwrap_or(map.path);
            found.shared.push(Mapping {
                ino: map.ino,
                path: Path::new(std::ffi::OsStr::from_bytes(path)).to_owned(),
                start: map.start,
                end: map.end,
                is_writable: map.writable,
            });
        }
    }
    Ok(found)
}

/// Whether the process can store through one of the mappings, now or after a call
/// of mprotect, which need not move the file's ctime: the flag `mw` in
/// `/proc/PID/smaps` (proc_pid_smaps(5)).
pub fn may_write(pid: Pid, mappings: &[&Mapping]) -> bool {
    if mappings.iter().any(|m| m.is_writable) {
        return true;
    }
    let text = match through(pid, |tid| fs::read(format!("/proc/{tid}/smaps"))) {
        Ok(Some(text)) => text,
        Ok(None) => return false,
        Err(_) => return true,
    };
    let mut inside = false;
    for line in text.split(|b| *b == b'\n') {
        if let Some(map) = MapLine::parse(line) {
            inside = mappings
                .iter()
                .any(|m| m.start == map.start && m.ino == map.ino);
        } else if let Some(flags) = line.strip_prefix(b"VmFlags:")
            && inside
            && flags.split(|b| *b == b' ').any(|flag| flag == b"mw")
        {
            return true;
        }
    }
    false
}

/// One line of `/proc/PID/maps`: "start-end perms offset major:minor inode   path".
pub struct MapLine<'a> {
    start: u64,
    end: u64,
    /// MAP_SHARED.
    pub shared: bool,
    /// PROT_WRITE.
    pub writable: bool,
    major: u32,
    minor: u32,
    ino: u64,
    /// The path, or whatever is in its place.
    pub path: &'a [u8],
}

impl<'a> MapLine<'a> {
    /// Whether this is a kernel AIO context.
    pub fn is_aio(&self) -> bool {
        matches!(self.path, b"/[aio] (deleted)" | b"/[aio]")
    }

    /// The file that is mapped (`map_files`, for root only); else where its path leads.
    pub fn file(&self, tid: Pid) -> PathBuf {
        let direct = PathBuf::from(format!(
            "/proc/{tid}/map_files/{:x}-{:x}",
            self.start, self.end
        ));
        match fs::metadata(&direct) {
            Ok(_) => direct,
            Err(_) => {
                let mut path = format!("/proc/{tid}/root").into_bytes();
                path.extend(self.path);
                PathBuf::from(std::ffi::OsString::from_vec(path))
            }
        }
    }

    /// Reads a line.
    pub fn parse(line: &'a [u8]) -> Option<MapLine<'a>> {
        let mut fields = line.splitn(6, |b| *b == b' ');
        let range = std::str::from_utf8(fields.next()?).ok()?;
        let (start, end) = range.split_once('-')?;
        let perms = fields.next()?;
        let _offset = fields.next()?;
        let device = std::str::from_utf8(fields.next()?).ok()?;
        let (major, minor) = device.split_once(':')?;
        let ino = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
        let path = fields.next().unwrap_or_default();
        Some(MapLine {
            start: u64::from_str_radix(start, 16).ok()?,
            end: u64::from_str_radix(end, 16).ok()?,
            shared: perms.get(3) == Some(&b's'),
            writable: perms.get(1) == Some(&b'w'),
            major: u32::from_str_radix(major, 16).ok()?,
            minor: u32::from_str_radix(minor, 16).ok()?,
            ino,
            path: path.trim_ascii_start(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls() {
        assert_eq!(parse_doing("running"), Doing::Running);
        assert_eq!(parse_doing("-1 0x7ffd 0x7f00"), Doing::Elsewhere);
        let call = parse_doing("1 0x3 0x7f 0x2 0x0 0x0 0x0 0x7ffd 0x7f00");
        assert_eq!(
            call,
            Doing::Call {
                number: 1,
                args: [3, 0x7f, 2, 0, 0, 0]
            }
        );
        assert_eq!(parse_doing("1 0x3"), Doing::Hidden);
        assert_eq!(parse_doing(""), Doing::Hidden);
    }

    #[test]
    fn stat_lines() {
        let rest = "0 -1 4227084 10320 0 40 0 0 3 0 0 20 0 2 0 1783670 0 0";
        let parse = |head: &str| Task::parse(format!("{head} 1 1 1 {rest}").as_bytes());
        let ended = parse("7 (a) b) Z").unwrap();
        assert!(ended.has_ended() && ended.is_ending && !ended.is_kernel);
        assert_eq!(ended.start, 1_783_670);
        let ending = parse("7 (x) R").unwrap();
        assert!(!ending.has_ended() && ending.is_ending && !ending.is_io_worker);
        assert!(Task::parse(b"7 (x) R 1 1").is_none());
    }

    #[test]
    fn only_absence_is_absence() {
        let fails = |code| present::<()>(Err(io::Error::from_raw_os_error(code)));
        assert!(matches!(fails(libc::ENOENT), Ok(None)));
        assert!(matches!(fails(libc::ESRCH), Ok(None)));
        assert!(fails(libc::EACCES).is_err_and(|why| why.is_forbidden()));
        assert!(fails(libc::EMFILE).is_err_and(|why| !why.is_forbidden()));
        let me = std::process::id();
        let read = |_| Err::<(), _>(io::Error::from_raw_os_error(libc::EMFILE));
        assert!(through(me, read).is_err());
        assert!(matches!(through(u32::MAX >> 1, read), Ok(None)));
    }

    #[test]
    fn map_lines() {
        let line = b"7f12-7f13 rw-s 00001000 103:02 4711                  /data/a b (deleted)";
        let map = MapLine::parse(line).unwrap();
        assert!(map.shared && map.writable);
        assert_eq!((map.major, map.minor, map.ino), (0x103, 2, 4711));
        assert_eq!(map.path, b"/data/a b (deleted)");
        let map = MapLine::parse(b"7f12-7f13 r--p 00000000 00:00 0 ").unwrap();
        assert!(!map.shared && map.path.is_empty());
    }

    #[test]
    fn access_modes() {
        assert!(is_writable("pos:\t0\nflags:\t0100001\nmnt_id:\t1\n"));
        assert!(is_writable("flags:\t02\n"));
        assert!(!is_writable("flags:\t0100000\n"));
        assert!(!is_writable(""));
    }

    #[test]
    fn this_process() {
        let me = std::process::id();
        assert!(is_alive(me) && start_time(me).is_some_and(|s| s > 0));
        assert!(all().unwrap().contains(&me) && threads(me).unwrap().contains(&me));
        assert!(live_thread(me) == Some(me) && live_thread(u32::MAX >> 1).is_none());
        assert_eq!(inner_id(me, me), Some(me));
        assert_eq!(id_elsewhere(me), None);
        assert!(pid_namespace(me).is_some() && owner(me).is_some());
        assert!(!is_alive(u32::MAX >> 1));
        assert_eq!((tracer(me, me), group(me)), (Some(0), Some(me)));
        assert!(task(me, me).is_some_and(|t| !t.is_io_worker));
    }
}
