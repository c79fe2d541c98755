//! The coordinator's end of the pipes to its guardian.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use nix::libc;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::protocol::{self, Answer};
use super::{Method, Methods, Target, freezer, guardian, sigstop};
use crate::error::Context;
use crate::{Error, Result};

/// How long a guardian may take to start.
const START: Duration = Duration::from_secs(5);
/// How long it may take to end before it is killed.
const END: Duration = Duration::from_millis(200);

/// A guardian.
#[derive(Debug)]
pub(super) struct Guard {
    child: Child,
    to: Option<ChildStdin>,
    from: ChildStdout,
    buffer: Vec<u8>,
    /// What outlives the guardian.
    undo: Vec<(Target, Method)>,
    /// When everything is let go at the latest.
    until: Option<Instant>,
}

impl Guard {
    /// Starts one.
    pub(super) fn spawn() -> Result<Guard> {
        let what = || "start the process that holds others from outside".to_owned();
        let mut child = Command::new("/proc/self/exe")
            .arg(guardian::COMMAND)
            .env_remove("LD_PRELOAD")
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .context(what)?;
        let (Some(to), Some(from)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(Error::new("the guardian has no pipes"));
        };
        let mut guard = Guard {
            child,
            to: Some(to),
            from,
            buffer: Vec::new(),
            undo: Vec::new(),
            until: None,
        };
        let line = guard.line(Instant::now() + START)?;
        if line != "ready" {
            return Err(Error::new(format!("cannot {}: {line}", what())));
        }
        Ok(guard)
    }

    /// Stops `targets`; an error means that nobody is known to be held any more.
    pub(super) fn stop(
        &mut self,
        targets: &[Target],
        methods: &Methods,
        left: Duration,
    ) -> Result<Vec<(Target, Answer)>> {
        let until = *self.until.get_or_insert(Instant::now() + left);
        self.say(&protocol::stop(targets, methods, left.as_micros()))?;
        let mut answers = Vec::new();
        loop {
            let line = self.line(until)?;
            if line == "end" {
                return Ok(answers);
            }
            let answer = protocol::read_answer(&line);
            answers.push(answer.ok_or_else(|| Error::new(format!("the guardian said {line:?}")))?);
        }
    }

    /// Whether it is still there. It says nothing unless it is asked.
    pub(super) fn is_there(&self) -> bool {
        self.buffer.is_empty() && !can_read(&self.from, Duration::ZERO)
    }

    /// Lets everybody go; the longest stop. An error: somebody had been let go before.
    pub(super) fn release(mut self) -> Result<Duration> {
        let until = self.until.unwrap_or_else(|| Instant::now() + END);
        let answer = self.say("release").and_then(|()| self.line(until));
        let released = answer.and_then(|line| {
            let us = line.strip_prefix("released ").and_then(|n| n.parse().ok());
            us.map(Duration::from_micros)
                .ok_or_else(|| Error::new(line.strip_prefix("fell ").unwrap_or(&line).to_owned()))
        });
        match &released {
            Ok(_) => self.end(),
            Err(_) => self.give_up(),
        }
        released
    }

    /// Ends the guardian, which lets everybody go; what it did not undo is undone here.
    pub(super) fn give_up(mut self) {
        self.end();
        // What it said last, to the end of the pipe: it is dead.
        while self.line(Instant::now() + END).is_ok() {}
        for (target, method) in &self.undo {
            match method {
                // Let go of by the kernel.
                Method::Ptrace => {}
                Method::Freezer => freezer::thaw(*target),
                Method::Sigstop => sigstop::resume(*target),
            }
        }
    }

    /// Closes its pipe, which ends it; kills it if it does not end (it may be stopped).
    fn end(&mut self) {
        drop(self.to.take());
        let until = Instant::now() + END;
        while Instant::now() < until {
            match self.child.try_wait() {
                Ok(None) => std::thread::sleep(Duration::from_micros(100)),
                Ok(Some(_)) | Err(_) => return,
            }
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    fn say(&mut self, line: &str) -> Result<()> {
        let to = self.to.as_mut().ok_or_else(ended)?;
        to.write_all(format!("{line}\n").as_bytes())
            .map_err(|_| ended())
    }

    /// The next line it says.
    fn line(&mut self, until: Instant) -> Result<String> {
        loop {
            if let Some(end) = self.buffer.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                let line = String::from_utf8_lossy(&line[..end]).into_owned();
                match protocol::read_undo(&line) {
                    Some(undo) => self.undo.push(undo),
                    None => return Ok(line),
                }
                continue;
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::new("the time allowed for the hold was over"));
            }
            if !can_read(&self.from, left) {
                continue;
            }
            let mut chunk = [0; 4096];
            match self.from.read(&mut chunk) {
                Ok(0) => return Err(ended()),
                Ok(n) => self.buffer.extend(&chunk[..n]),
                Err(e) if e.raw_os_error() == Some(libc::EINTR) => {}
                Err(_) => return Err(ended()),
            }
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if self.to.is_some() {
            self.end();
        }
    }
}

/// Waits until there is something to read, or an end of it, for at most `left`.
pub(super) fn can_read(from: &impl AsFd, left: Duration) -> bool {
    let timeout = Timespec {
        tv_sec: left.as_secs() as i64,
        tv_nsec: left.subsec_nanos().into(),
    };
    let mut fds = [PollFd::new(from, PollFlags::IN)];
    matches!(poll(&mut fds, Some(&timeout)), Ok(1..))
}

fn ended() -> Error {
    Error::new("the process that held them (the guardian) ended")
}
