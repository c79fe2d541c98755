//! Commands of the user's: outside any set, in a group of their own, bounded in time and in what is
//! kept of their output.

use std::io::{PipeReader, Read};
use std::os::fd::AsFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::libc;
use nix::sys::signal::{SigSet, Signal, killpg};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::Result;
use crate::error::Context;
use crate::urgency;

/// Between SIGTERM and SIGKILL, and how long a stop that was asked for can wait.
const GRACE: Duration = Duration::from_secs(5);
/// How long is waited for what SIGKILL does not end at once.
const LAST: Duration = Duration::from_secs(5);
/// Between two looks at what else may end the wait.
const TICK: Duration = Duration::from_millis(20);
/// Bytes that are kept of what is printed last.
const KEPT: usize = 4 << 10;

/// The variables that would bring the command into a set.
const WITHOUT: [&str; 4] = [
    "LD_PRELOAD",
    "SNAPSHIM_GATE",
    "SNAPSHIM_GATE_ID",
    "SNAPSHIM_SITES",
];

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Status(i32),
    Signal(i32),
    /// It was ended: its time was up.
    TimedOut,
    /// It was ended: somebody asked for it.
    Stopped,
}

#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) end: End,
    /// The end of what it printed.
    pub(crate) output: String,
}

/// The command for `text` with the tree as its argument.
pub(crate) fn command(text: &str, tree: &Path) -> Command {
    let mut command = match names_a_program(text) {
        true => {
            let mut program = Command::new(text);
            leave_sets(&mut program);
            program
        }
        false => shell(text),
    };
    command.arg(tree);
    command
}

/// A line for the shell.
pub(crate) fn shell(text: &str) -> Command {
    let mut shell = Command::new("/bin/sh");
    shell.args(["-c", text, "sh"]);
    leave_sets(&mut shell);
    shell
}

/// Takes the command out of any set: it must not wait at the gate that is shut for it.
pub(crate) fn leave_sets(command: &mut Command) {
    for name in WITHOUT {
        command.env_remove(name);
    }
}

/// Whether a text is one word that an executable file is found by.
fn names_a_program(text: &str) -> bool {
    if text.is_empty() || text.contains(char::is_whitespace) {
        return false;
    }
    if text.contains('/') {
        return is_executable(Path::new(text));
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| is_executable(&dir.join(text)))
}

pub(crate) fn is_executable(path: &Path) -> bool {
    path.is_file() && rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok()
}

/// Gives a command a process group of its own, so that what it starts can be ended with it, and
/// the signals back that are blocked here, and its share of the processors; it does not outlive us,
/// however we end.
pub(crate) fn set_apart(command: &mut Command) {
    command.process_group(0);
    urgency::remember();
    // SAFETY: the calls are async-signal-safe, and touch nothing of ours.
    unsafe {
        command.pre_exec(|| {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong);
            urgency::put_back();
            SigSet::empty()
                .thread_set_mask()
                .map_err(std::io::Error::from)
        });
    }
}

/// What else than its time ends a command.
#[derive(Clone, Copy)]
pub(crate) struct Patience<'a> {
    /// Whether somebody asks for its end.
    pub(crate) is_asked: &'a dyn Fn() -> bool,
    /// How long it may go on then.
    pub(crate) grace: Duration,
}

impl Patience<'_> {
    /// Nothing else does.
    pub(crate) const ENDLESS: Patience<'static> = Patience {
        is_asked: &|| false,
        grace: Duration::ZERO,
    };

    /// Until it is no longer worth waiting for it.
    pub(crate) fn of(is_asked: &dyn Fn() -> bool) -> Patience<'_> {
        Patience {
            is_asked,
            grace: GRACE,
        }
    }
}

/// Runs a command in a process group of its own until it ends, its time is up or its end
/// is asked for; then nothing of the group is left. `say` gets each line that is printed.
///
/// # Errors
///
/// It cannot be started.
pub(crate) fn run(
    mut command: Command,
    timeout: Duration,
    patience: Patience<'_>,
    say: &mut dyn FnMut(&str),
) -> Result<Ended> {
    let (reader, writer) = std::io::pipe().context(|| "make a pipe".into())?;
    let second = writer.try_clone().context(|| "make a pipe".into())?;
    command.stdin(Stdio::null()).stdout(writer).stderr(second);
    set_apart(&mut command);
    let child = command.spawn();
    let program = command.get_program().to_string_lossy().into_owned();
    // With it go our writing ends of the pipe.
    drop(command);
    let child = child.context(|| format!("start {program}"))?;
    rustix::io::ioctl_fionbio(&reader, true).context(|| "use a pipe".into())?;
    let mut group = Group {
        pid: Pid::from_raw(child.id() as i32),
        child,
        output: Output::new(reader),
    };
    let end = group.attend(timeout, patience, say);
    group.output.rest(say);
    Ok(Ended {
        end,
        output: group.output.kept(),
    })
}

/// A process, its group and their output.
struct Group {
    child: Child,
    pid: Pid,
    output: Output,
}

impl Group {
    fn attend(
        &mut self,
        timeout: Duration,
        patience: Patience<'_>,
        say: &mut dyn FnMut(&str),
    ) -> End {
        let begun = Instant::now();
        let mut asked: Option<Instant> = None;
        loop {
            self.output.wait(TICK, say);
            if self.has_ended() {
                return self.reap();
            }
            if (patience.is_asked)()
                && asked.get_or_insert_with(Instant::now).elapsed() >= patience.grace
            {
                return self.end(End::Stopped, say);
            }
            if begun.elapsed() >= timeout {
                return self.end(End::TimedOut, say);
            }
        }
    }

    /// Whether it has ended; it keeps its id until it is reaped.
    fn has_ended(&self) -> bool {
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        !matches!(
            waitid(Id::Pid(self.pid), flags),
            Ok(WaitStatus::StillAlive) | Err(nix::errno::Errno::EINTR)
        )
    }

    /// Ends the group, politely first.
    fn end(&mut self, end: End, say: &mut dyn FnMut(&str)) -> End {
        for (signal, patience) in [(Signal::SIGTERM, GRACE), (Signal::SIGKILL, LAST)] {
            self.signal(signal);
            let sent = Instant::now();
            while sent.elapsed() < patience {
                self.output.wait(TICK, say);
                if self.has_ended() {
                    self.reap();
                    return end;
                }
            }
        }
        // Asleep in the kernel, where no signal reaches it: it ends when it wakes up.
        end
    }

    /// To the group, by an id that its first process, not reaped yet, keeps taken.
    fn signal(&self, signal: Signal) {
        let _ = killpg(self.pid, signal);
    }

    /// Ends what the process left behind in its group, then reaps it.
    fn reap(&mut self) -> End {
        self.signal(Signal::SIGKILL);
        match self.child.wait() {
            Ok(status) => match status.signal() {
                Some(number) => End::Signal(number),
                None => End::Status(status.code().unwrap_or(-1)),
            },
            // Somebody else reaped it: nothing is known of it.
            Err(_) => End::Status(-1),
        }
    }
}

/// What is printed: told by lines, and the end of it kept.
struct Output {
    pipe: Option<PipeReader>,
    line: Vec<u8>,
    tail: Vec<u8>,
}

impl Output {
    fn new(pipe: PipeReader) -> Output {
        Output {
            pipe: Some(pipe),
            line: Vec::new(),
            tail: Vec::new(),
        }
    }

    /// Reads what there is, for at most `time`.
    fn wait(&mut self, time: Duration, say: &mut dyn FnMut(&str)) {
        let Some(pipe) = &self.pipe else {
            // All who had it have closed it; not all of them need have ended.
            std::thread::sleep(time.min(Duration::from_millis(2)));
            return;
        };
        let time = Timespec {
            tv_sec: 0,
            tv_nsec: time.subsec_nanos().into(),
        };
        let mut fds = [PollFd::from_borrowed_fd(pipe.as_fd(), PollFlags::IN)];
        if poll(&mut fds, Some(&time)).is_ok_and(|ready| ready > 0) {
            self.read(say);
        }
    }

    /// One buffer full; whether there may be more.
    fn read(&mut self, say: &mut dyn FnMut(&str)) -> bool {
        let mut buffer = [0; 8 << 10];
        let Some(pipe) = &mut self.pipe else {
            return false;
        };
        match pipe.read(&mut buffer) {
            Ok(0) => {
                self.pipe = None;
                false
            }
            Ok(got) => {
                self.take(&buffer[..got], say);
                true
            }
            Err(error) => error.kind() == std::io::ErrorKind::Interrupted,
        }
    }

    /// What is in the pipe at the end. A process that left the group may still write to it.
    fn rest(&mut self, say: &mut dyn FnMut(&str)) {
        for _ in 0..64 {
            if !self.read(say) {
                break;
            }
        }
        self.end_line(say);
    }

    fn take(&mut self, bytes: &[u8], say: &mut dyn FnMut(&str)) {
        self.tail.extend_from_slice(bytes);
        let surplus = self.tail.len().saturating_sub(KEPT);
        self.tail.drain(..surplus);
        for byte in bytes {
            if *byte == b'\n' || self.line.len() >= KEPT {
                self.end_line(say);
            }
            if *byte != b'\n' {
                self.line.push(*byte);
            }
        }
    }

    fn end_line(&mut self, say: &mut dyn FnMut(&str)) {
        if !self.line.is_empty() {
            say(&String::from_utf8_lossy(&self.line));
            self.line.clear();
        }
    }

    fn kept(&self) -> String {
        String::from_utf8_lossy(&self.tail).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(text: &str, timeout_ms: u64) -> (Ended, Vec<String>) {
        let mut lines = Vec::new();
        let command = command(text, Path::new("/nonexistent/tree"));
        let timeout = Duration::from_millis(timeout_ms);
        let ended = run(command, timeout, Patience::ENDLESS, &mut |line| {
            lines.push(line.to_owned());
        });
        (ended.unwrap(), lines)
    }

    #[test]
    fn how_commands_end() {
        assert_eq!(ended("true", 60_000).0.end, End::Status(0));
        assert_eq!(ended("exit 3", 60_000).0.end, End::Status(3));
        assert_eq!(ended("kill -9 $$", 60_000).0.end, End::Signal(9));
        assert_eq!(
            ended("no-such-command-here", 60_000).0.end,
            End::Status(127)
        );
    }

    #[test]
    fn one_word_is_a_program_and_all_else_is_for_the_shell() {
        let (by_name, lines) = ended("echo", 60_000);
        assert_eq!(by_name.end, End::Status(0));
        assert_eq!(lines, ["/nonexistent/tree"]);
        let (_, lines) = ended("echo \"<$1>\"; echo two >&2; printf three", 60_000);
        assert_eq!(lines, ["</nonexistent/tree>", "two", "three"]);
    }

    #[test]
    fn the_end_of_a_long_output_is_kept() {
        let (ended, lines) = ended("seq 1 20000; echo last; exit 1", 60_000);
        assert_eq!(lines.len(), 20_001);
        assert!(ended.output.len() <= KEPT);
        assert!(
            ended.output.ends_with("\n20000\nlast\n"),
            "{}",
            ended.output
        );
    }

    #[test]
    fn nothing_outlives_its_time() {
        let begun = Instant::now();
        let (ended, lines) = ended("echo $$; sleep 600 & sleep 600", 100);
        assert_eq!(ended.end, End::TimedOut);
        assert!(begun.elapsed() < GRACE, "{:?}", begun.elapsed());
        let group: i32 = lines[0].parse().unwrap();
        let gone = || killpg(Pid::from_raw(group), None).is_err();
        for _ in 0..500 {
            if gone() {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        assert!(gone(), "a process of the group {group} is left");
    }

    #[test]
    fn what_stays_behind_is_not_waited_for() {
        let begun = Instant::now();
        let (ended, _) = ended("sleep 600 & exit 0", 60_000);
        assert_eq!(ended.end, End::Status(0));
        assert!(begun.elapsed() < Duration::from_secs(30));
    }

    #[test]
    fn a_stop_is_heard() {
        let command = command("trap '' TERM; sleep 600; sleep 600", Path::new("/"));
        let begun = Instant::now();
        let ended = run(
            command,
            Duration::from_secs(600),
            Patience::of(&|| true),
            &mut |_| (),
        )
        .unwrap();
        assert_eq!(ended.end, End::Stopped);
        assert!(begun.elapsed() < GRACE * 2 + LAST);
    }
}
