//! What `/proc` says of other processes. Everything here is a look at something
//! that may change or end at any moment; every answer may be "gone".

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use snapshim_gate::table::FileId;

/// A process id as this process sees it.
pub type Pid = u32;

/// We may not look at this process.
#[derive(Clone, Copy, Debug)]
pub struct NotOurs;

/// All processes there are.
pub fn all() -> Vec<Pid> {
    ids(Path::new("/proc"))
}

/// All threads of a process.
pub fn threads(pid: Pid) -> Vec<Pid> {
    ids(Path::new(&format!("/proc/{pid}/task")))
}

fn ids(dir: &Path) -> Vec<Pid> {
    let Ok(entries) = fs::read_dir(dir) else {
        return Vec::new();
    };
    entries
        .filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok())
        .collect()
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

/// Whether there is such a process, and it has not ended (a zombie has).
pub fn is_alive(pid: Pid) -> bool {
    !matches!(
        stat(&format!("/proc/{pid}/stat")),
        None | Some(('Z' | 'X', _))
    )
}

/// When the process started, in clock ticks since boot; `None` if it is gone.
pub fn start_time(pid: Pid) -> Option<u64> {
    stat(&format!("/proc/{pid}/stat")).map(|(_, start)| start)
}

/// State letter and start time out of a stat file (proc_pid_stat(5), fields 3 and 22).
fn stat(path: &str) -> Option<(char, u64)> {
    let text = fs::read(path).ok()?;
    // The name, in parentheses, may hold anything, parentheses included.
    let end = text.iter().rposition(|b| *b == b')')?;
    let rest = std::str::from_utf8(text.get(end + 1..)?).ok()?;
    let mut fields = rest.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((state, fields.nth(18)?.parse().ok()?))
}

/// What a thread's stat file says.
#[derive(Clone, Copy, Debug)]
pub struct Task {
    /// State letter (proc_pid_stat(5)).
    pub state: char,
    /// A thread the kernel made for an io_uring, which runs no code of the program's.
    pub is_io_worker: bool,
}

/// One thread of a process; `None` if it is gone.
pub fn task(pid: Pid, tid: Pid) -> Option<Task> {
    /// include/linux/sched.h.
    const PF_IO_WORKER: u64 = 0x10;
    let text = fs::read(format!("/proc/{pid}/task/{tid}/stat")).ok()?;
    let end = text.iter().rposition(|b| *b == b')')?;
    let mut fields = std::str::from_utf8(text.get(end + 1..)?)
        .ok()?
        .split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    let flags: u64 = fields.nth(5)?.parse().ok()?;
    Some(Task {
        state,
        is_io_worker: flags & PF_IO_WORKER != 0,
    })
}

/// A number in a thread's status file.
fn status_number(path: &str, field: &str) -> Option<Pid> {
    let status = fs::read_to_string(path).ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix(field))?;
    line.trim().parse().ok()
}

/// The process that traces a thread, 0 if none does; `None` if the thread is gone.
pub fn tracer(pid: Pid, tid: Pid) -> Option<Pid> {
    status_number(&format!("/proc/{pid}/task/{tid}/status"), "TracerPid:")
}

/// How many threads a process has, by the kernel's own count; `None` if it is gone.
pub fn thread_count(pid: Pid) -> Option<usize> {
    status_number(&format!("/proc/{pid}/status"), "Threads:").map(|n| n as usize)
}

/// The process that a thread belongs to; `None` if it is gone.
pub fn group(tid: Pid) -> Option<Pid> {
    status_number(&format!("/proc/{tid}/status"), "Tgid:")
}

/// Whether a process counts time from another moment than this one does: then
/// its own view of its start time says nothing here (time_namespaces(7)).
pub fn is_in_other_time(pid: Pid) -> bool {
    let namespace = |pid: &str| fs::metadata(format!("/proc/{pid}/ns/time")).map(|m| m.ino());
    matches!((namespace(&pid.to_string()), namespace("self")), (Ok(a), Ok(b)) if a != b)
}

/// Low bits of the inode number of a process's pid namespace, as the shim
/// publishes them; `None` if it may not be looked at.
pub fn pid_namespace(pid: Pid) -> Option<u32> {
    let ino = fs::metadata(format!("/proc/{pid}/ns/pid")).ok()?.ino();
    Some(ino as u32 & snapshim_gate::slot::PIDNS_MASK)
}

/// The id a process (or thread) has in its own, innermost pid namespace.
pub fn inner_id(pid: Pid, tid: Pid) -> Option<Pid> {
    let status = fs::read_to_string(format!("/proc/{pid}/task/{tid}/status")).ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("NSpid:"))?;
    line.split_ascii_whitespace().next_back()?.parse().ok()
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

/// What is behind a descriptor of a process: its identity and mode bits.
pub fn file_behind(pid: Pid, fd: i64) -> Option<(FileId, u32)> {
    let meta = fs::metadata(format!("/proc/{pid}/fd/{fd}")).ok()?;
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
        }
    }
}

fn is_ring(target: &Path) -> bool {
    target.to_string_lossy().starts_with("anon_inode:[io_uring")
}

/// The io_urings that a process has descriptors of; `None` if it may not be looked at.
pub fn rings(pid: Pid) -> Option<Vec<Ring>> {
    let mut rings = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).ok()?.flatten() {
        if fs::read_link(entry.path()).is_ok_and(|target| is_ring(&target)) {
            let fd = entry.file_name().to_str()?.parse().ok()?;
            let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}")).ok()?;
            rings.push(Ring::parse(fd, &info));
        }
    }
    Some(rings)
}

/// The descriptors of a process on files that matter; an empty answer if it is gone.
pub fn open_files(pid: Pid, matters: impl Fn(FileId) -> bool) -> Result<OpenFiles, NotOurs> {
    let mut found = OpenFiles::default();
    let entries = match fs::read_dir(format!("/proc/{pid}/fd")) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => return Err(NotOurs),
        Err(_) => return Ok(found),
    };
    for entry in entries.flatten() {
        let Ok(target) = fs::read_link(entry.path()) else {
            continue;
        };
        let text = target.to_string_lossy();
        if is_ring(&target) {
            let rings = rings(pid).unwrap_or_default();
            let worst = rings.iter().map(|ring| ring.polling).max();
            found.ring = Some(worst.unwrap_or(Polling::Yes));
        }
        // Anything in the tree of files has an absolute path; the rest is
        // sockets, pipes and anonymous inodes.
        if !text.starts_with('/') {
            continue;
        }
        let Ok(meta) = fs::metadata(entry.path()) else {
            continue;
        };
        let id = FileId {
            dev: meta.dev(),
            ino: meta.ino(),
        };
        // This look may be one under a hold: no more system calls than it needs.
        if !matters(id) {
            continue;
        }
        let info = format!("/proc/{pid}/fdinfo/{}", entry.file_name().to_string_lossy());
        if meta.is_file() && fs::read_to_string(info).map_or(true, |i| is_writable(&i)) {
            found.writable.push(id);
        }
    }
    Ok(found)
}

/// Whether fdinfo says O_WRONLY or O_RDWR.
fn is_writable(info: &str) -> bool {
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
        let path = format!("/proc/{pid}/map_files/{:x}-{:x}", self.start, self.end);
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

/// The mappings of a process; an empty answer if it is gone.
pub fn mappings(pid: Pid, gate: FileId) -> Result<Mappings, NotOurs> {
    let mut found = Mappings::default();
    let mut text = Vec::new();
    let read = File::open(format!("/proc/{pid}/maps")).and_then(|mut f| f.read_to_end(&mut text));
    match read {
        Ok(_) => {}
        Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => return Err(NotOurs),
        Err(_) => return Ok(found),
    }
    for line in text.split(|b| *b == b'\n') {
        let Some(map) = MapLine::parse(line) else {
            continue;
        };
        if map.path == b"/[aio] (deleted)" || map.path == b"/[aio]" {
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
    let Ok(text) = fs::read(format!("/proc/{pid}/smaps")) else {
        return is_alive(pid);
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
struct MapLine<'a> {
    start: u64,
    end: u64,
    shared: bool,
    writable: bool,
    major: u32,
    minor: u32,
    ino: u64,
    path: &'a [u8],
}

impl<'a> MapLine<'a> {
    fn parse(line: &'a [u8]) -> Option<MapLine<'a>> {
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
        assert!(all().contains(&me) && threads(me).contains(&me));
        assert_eq!(inner_id(me, me), Some(me));
        assert!(pid_namespace(me).is_some() && owner(me).is_some());
        assert!(!is_alive(u32::MAX >> 1));
        assert_eq!((tracer(me, me), group(me)), (Some(0), Some(me)));
        assert!(task(me, me).is_some_and(|t| !t.is_io_worker));
    }
}
