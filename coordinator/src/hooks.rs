//! `--before-cut` and `--after-cut`: commands of the user's on either side of the hold.

use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use crate::child::{self, End, Patience};
use crate::interrupt::{self, Deferred};
use crate::progress::Progress;
use crate::stop::Stop;
use crate::{Error, Result};

/// How long one may take unless told otherwise.
pub const TIMEOUT: Duration = Duration::from_secs(30);

/// What is run before and after a hold.
#[derive(Clone, Debug)]
pub struct Hooks {
    /// Before the gate is shut, or armed.
    pub before: Option<String>,
    /// After it is open again, whatever came of it.
    pub after: Option<String>,
    /// How long each may take.
    pub timeout: Duration,
}

impl Default for Hooks {
    fn default() -> Hooks {
        Hooks {
            before: None,
            after: None,
            timeout: TIMEOUT,
        }
    }
}

/// Commands of `--after-cut` that are still to be run in this process.
static OWED: AtomicUsize = AtomicUsize::new(0);

/// Whether this process has to live on for a while: a command of `--after-cut` is to be run.
pub fn is_owed() -> bool {
    OWED.load(SeqCst) > 0
}

struct Owed;

impl Owed {
    fn begin() -> Owed {
        OWED.fetch_add(1, SeqCst);
        Owed
    }
}

impl Drop for Owed {
    fn drop(&mut self) {
        OWED.fetch_sub(1, SeqCst);
    }
}

/// Does `work` between the two. What is to be run after it is run in any case, also if
/// the first one failed: it may have done half of what the other undoes. So signals that ask for
/// the end, and `stop`, are heeded only after it; they end the first one, and the work where it
/// looks at them.
///
/// # Errors
///
/// Those of `work`; a hook failed or did not end in time; a signal came.
pub(crate) fn around<T>(
    hooks: &Hooks,
    set: &str,
    stop: &Stop,
    progress: &mut dyn Progress,
    work: impl FnOnce() -> Result<T>,
) -> Result<T> {
    let owed = Owed::begin();
    let deferred = Deferred::begin();
    let is_asked = || interrupt::is_asked() || stop.is_asked();
    let now = Patience {
        is_asked: &is_asked,
        grace: Duration::ZERO,
    };
    let before = hooks.before.as_deref();
    let before = run("--before-cut", before, hooks, set, now, progress);
    let done = before.and_then(|()| match interrupt::is_asked() {
        true => Err(interrupted()),
        false => work(),
    });
    // Whoever asks for the end while it runs has to wait for it, at most for its time.
    let after = hooks.after.as_deref();
    let after = run(
        "--after-cut",
        after,
        hooks,
        set,
        Patience::ENDLESS,
        progress,
    );
    drop(deferred);
    drop(owed);
    let done = match interrupt::is_asked() {
        true => done.and_then(|_| Err(interrupted())),
        false => done,
    };
    match (done, after) {
        (Ok(done), after) => after.map(|()| done),
        (Err(error), Ok(())) => Err(error),
        (Err(error), Err(after)) => Err(Error {
            message: format!("{}; and {}", error.message, after.message),
            ..error
        }),
    }
}

/// The error of whatever a signal ended.
pub(crate) fn interrupted() -> Error {
    Error::interrupted("interrupted; nothing was published")
}

fn run(
    flag: &str,
    text: Option<&str>,
    hooks: &Hooks,
    set: &str,
    patience: Patience<'_>,
    progress: &mut dyn Progress,
) -> Result<()> {
    let Some(text) = text else {
        return Ok(());
    };
    let mut command = child::shell(text);
    command.env("SNAPSHIM_SET", set);
    let mut say = |line: &str| progress.note(&format!("{}: {line}", flag.trim_start_matches('-')));
    let ended = child::run(command, hooks.timeout, patience, &mut say)?;
    let what = match ended.end {
        End::Status(0) => return Ok(()),
        End::Status(code) => format!("ended with status {code}"),
        End::Signal(number) => format!("was ended by signal {number}"),
        End::Stopped => return Err(interrupted()),
        End::TimedOut => format!(
            "did not end within {} ms and was ended",
            hooks.timeout.as_millis()
        ),
    };
    Err(Error::new(format!("the command of {flag} {what}"))
        .next("nothing was published; the program goes on. --hook-timeout gives it more time"))
}
