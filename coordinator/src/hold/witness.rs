//! The program whose files are put back when it crashes, so that every coordinator of the set
//! knows of its end: what is captured after that is what the crash left.
//!
//! A file in the set's directory, which `run --restore-on-crash` has locked as long as it
//! lives. If nobody has it locked, nobody will put anything back, and it says nothing.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use rustix::fs::{FlockOperation, Mode, OFlags, flock, openat};
use snapshim_gate::slot::Owner;

use super::locate::Locator;
use super::process::{self, Pid};
use super::set::Set;
use crate::error::Context;
use crate::{Error, Result};

const NAME: &str = "witness";
/// Written in one piece, so that nobody reads half of it.
const LINE: usize = 64;
const TRIES: u32 = 50;
const PAUSE: Duration = Duration::from_millis(10);

/// Says who the witness is, as long as it lives.
#[derive(Debug)]
pub struct Witness(File);

/// What is known of the witness of a set.
#[derive(Debug)]
pub enum Found {
    /// Its files are put back by nobody; or it is out of sight.
    Nobody,
    /// It lives, or did a moment ago: readable when it has ended.
    Lives(OwnedFd),
    /// It has ended, and what it left has not been dealt with.
    Ended,
}

impl Witness {
    /// Nobody yet: it is as if the program had ended.
    ///
    /// # Errors
    ///
    /// The file cannot be made; another `run` has it.
    pub fn of(set: &Set) -> Result<Witness> {
        let what = || format!("use {}", set.dir.join(NAME).display());
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(0o600);
        let file = openat(set.set_dir.fd(), NAME, flags, mode).context(what)?;
        let sharing = &set.config.sharing;
        sharing.apply(file.as_fd(), sharing.file_mode(), &set.dir.join(NAME))?;
        let file = File::from(file);
        // Whoever looks at it has it locked for a moment.
        for _ in 0..TRIES {
            if flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
                file.set_len(0).context(what)?;
                return Ok(Witness(file));
            }
            std::thread::sleep(PAUSE);
        }
        Err(Error::new(format!(
            "the set {} has a program already whose files are put back when it crashes",
            set.name
        ))
        .next("give this one a set of its own with --name"))
    }

    /// From now on it is this process.
    ///
    /// # Errors
    ///
    /// The file cannot be written: then nothing is verified.
    pub fn name(&self, pid: Pid) -> Result<()> {
        let owner = (|| {
            let inner = process::inner_id(pid, pid)?;
            let pidns = process::pid_namespace(pid)?;
            Some((inner, pidns, process::start_time(pid)?))
        })();
        let Some((inner, pidns, start)) = owner else {
            return Ok(()); // gone already
        };
        let line = format!("{inner} {pidns} {start}");
        let line = format!("{line:<width$}\n", width = LINE - 1);
        self.0
            .write_all_at(line.as_bytes(), 0)
            .context(|| "note which program it is".into())
    }
}

/// Who the witness of a set is.
pub fn find(set: &Set) -> Found {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let Ok(file) = openat(set.set_dir.fd(), NAME, flags, Mode::empty()) else {
        return Found::Nobody;
    };
    if flock(&file, FlockOperation::NonBlockingLockShared).is_ok() {
        return Found::Nobody;
    }
    let mut line = [0; LINE];
    let is_read = File::from(file).read_exact_at(&mut line, 0).is_ok();
    let Some((owner, start)) = parse(&line).filter(|_| is_read) else {
        return Found::Ended;
    };
    let locator = Locator::default();
    let pid = locator
        .process(owner)
        .filter(|pid| !locator.is_another(*pid, start));
    let Some(pid) = pid else {
        return match locator.is_gone(owner, start) {
            true => Found::Ended,
            false => Found::Nobody,
        };
    };
    let fd = rustix::process::Pid::from_raw(pid as i32).and_then(|pid| {
        rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).ok()
    });
    match fd {
        // Its id was not given to another in between.
        Some(fd) if !locator.is_another(pid, start) => Found::Lives(fd),
        _ => Found::Ended,
    }
}

fn parse(line: &[u8]) -> Option<(Owner, u64)> {
    let text = std::str::from_utf8(line).ok()?;
    let mut words = text.split_ascii_whitespace();
    let pid = words.next()?.parse().ok()?;
    let owner = Owner {
        pid,
        tid: pid,
        pidns: words.next()?.parse().ok()?,
    };
    Some((owner, words.next()?.parse().ok()?))
}
