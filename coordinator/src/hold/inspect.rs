//! What can be said of the machine and of one process for `snapshim doctor`, from
//! `/proc` and `/sys` alone. Everything may be absent, or end at any moment.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, AtFlags, CWD, Mode, OFlags, accessat};
use serde::Serialize;

use super::outside::freezer;
use super::process::{self, MapLine, Pid, Polling};
use super::{evidence, gate_file};

/// What the machine offers.
#[derive(Debug, Serialize)]
pub struct Machine {
    /// Kernel release.
    pub kernel: String,
    /// Every change moves a file's ctime, on file systems that know how.
    pub fine_ctime: bool,
    /// yama's setting; absent without yama.
    pub ptrace_scope: Option<u32>,
    /// cgroup v2 is mounted.
    pub cgroup2: bool,
    /// Our own cgroup can be frozen, and ones below it can be made.
    pub freezer: bool,
    /// We may look into processes of others.
    pub privileged: bool,
}

impl Machine {
    /// Looks at it.
    pub fn look() -> Machine {
        const CAP_SYS_PTRACE: u64 = 1 << 19;
        let release = rustix::system::uname()
            .release()
            .to_string_lossy()
            .into_owned();
        let scope = fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope");
        let own = freezer::cgroup(std::process::id());
        let is_ours =
            |path: PathBuf| accessat(CWD, path, Access::WRITE_OK, AtFlags::EACCESS).is_ok();
        Machine {
            fine_ctime: evidence::has_multigrain(&release),
            kernel: release,
            ptrace_scope: scope.ok().and_then(|s| s.trim().parse().ok()),
            cgroup2: freezer::is_mounted(),
            freezer: own.is_some_and(|own| is_ours(own.join("cgroup.procs")) && is_ours(own)),
            privileged: process::capabilities(std::process::id())
                .is_some_and(|all| all & CAP_SYS_PTRACE != 0),
        }
    }

    /// Whether a process of this user that is no child of ours could be stopped with ptrace.
    pub fn can_trace(&self) -> bool {
        self.privileged && self.ptrace_scope.unwrap_or(0) < 3 || self.ptrace_scope.unwrap_or(0) == 0
    }
}

/// What a file system offers.
#[derive(Debug, Serialize)]
pub struct FileSystem {
    /// Its type, by its mount.
    pub kind: Option<String>,
    /// Files can be cloned; absent if it could not be tried.
    pub reflink: Option<bool>,
    /// It is known to move a file's ctime with every change.
    pub fine_ctime: bool,
}

impl FileSystem {
    /// Looks at the one `path` is on, by cloning one nameless, empty file to another.
    pub fn look(path: &Path) -> FileSystem {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let kind = evidence::filesystem(path, &mounts);
        let dir = match path.is_dir() {
            true => path,
            false => path.parent().unwrap_or(path),
        };
        let nameless = || {
            let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
            rustix::fs::open(dir, flags, Mode::from_raw_mode(0o600)).ok()
        };
        let pair = nameless().zip(nameless());
        FileSystem {
            fine_ctime: evidence::is_fine(kind.as_deref()),
            kind,
            reflink: pair.map(|(from, to)| rustix::fs::ioctl_ficlone(to, from).is_ok()),
        }
    }
}

/// An io_uring of a process.
#[derive(Debug, Serialize)]
pub struct Ring {
    /// Its descriptor.
    pub fd: u32,
    /// A kernel thread takes what is submitted: no system call is made for it.
    pub sqpoll: bool,
}

/// A running process.
#[derive(Debug, Serialize)]
pub struct Process {
    /// Its threads.
    pub threads: usize,
    /// The shim is mapped.
    pub shim: bool,
    /// The set whose gate it has mapped.
    pub set: Option<String>,
    /// Its io_urings.
    pub io_uring: Vec<Ring>,
    /// It has a kernel AIO context.
    pub aio: bool,
    /// Files it has mapped shared and can write to.
    pub shared_writable: Vec<String>,
    /// `none`, `strict` or `filter`.
    pub seccomp: &'static str,
    /// It can gain no privileges.
    pub no_new_privs: bool,
    /// Who traces it already.
    pub tracer: Option<u32>,
    /// It, or its memory, may not be looked at; nor may it be traced then.
    pub hidden: bool,
    /// It is a thread of the kernel.
    #[serde(skip)]
    pub is_kernel: bool,
}

impl Process {
    /// Looks at one; `None` if there is none.
    pub fn look(pid: Pid) -> Option<Process> {
        if !process::is_alive(pid) {
            return None;
        }
        let tid = process::live_thread(pid).unwrap_or(pid);
        let field = |name| process::status_number(pid, tid, name);
        let maps = process::maps(pid);
        let hidden = maps.is_err();
        let maps = maps.ok().flatten().unwrap_or_default();
        let mut found = Process {
            threads: process::threads(pid).map_or(0, |all| all.len()),
            shim: false,
            set: None,
            io_uring: rings(pid),
            aio: false,
            shared_writable: Vec::new(),
            seccomp: match field("Seccomp:") {
                Some(1) => "strict",
                Some(2) => "filter",
                _ => "none",
            },
            no_new_privs: field("NoNewPrivs:") == Some(1),
            tracer: field("TracerPid:").filter(|pid| *pid != 0),
            hidden,
            is_kernel: process::task(pid, pid).is_some_and(|t| t.is_kernel),
        };
        for line in maps.split(|b| *b == b'\n').filter_map(MapLine::parse) {
            found.take(tid, &line);
        }
        Some(found)
    }

    /// Takes in a line of its map.
    fn take(&mut self, tid: Pid, line: &MapLine<'_>) {
        let path = Path::new(std::ffi::OsStr::from_bytes(line.path));
        let name = path.file_name().unwrap_or_default().as_bytes();
        self.shim |= name.starts_with(b"libsnapshim") && name.windows(3).any(|w| w == b".so");
        self.aio |= line.is_aio();
        if !line.shared || !path.is_absolute() || line.is_aio() {
            return;
        }
        if name == gate_file::GATE.as_bytes() && gate_file::is_gate(&line.file(tid)) {
            let set = path.parent().and_then(Path::file_name);
            self.set = set.map(|s| s.to_string_lossy().into_owned());
        } else if line.writable {
            let shown = path.to_string_lossy().into_owned();
            if !self.shared_writable.contains(&shown) {
                self.shared_writable.push(shown);
            }
        }
    }
}

fn rings(pid: Pid) -> Vec<Ring> {
    let shown = |ring: process::Ring| Ring {
        fd: ring.fd,
        sqpoll: ring.polling == Polling::Yes,
    };
    let rings = process::rings(pid).unwrap_or_default();
    rings.into_iter().map(shown).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_and_machine() {
        let process = Process::look(std::process::id()).unwrap();
        assert!(process.threads >= 1 && !process.shim && !process.hidden);
        assert!(process.io_uring.is_empty());
        assert!(!Machine::look().kernel.is_empty());
        assert!(FileSystem::look(Path::new("/proc")).kind.is_some());
        assert!(Process::look(u32::MAX >> 1).is_none());
    }
}
