//! `--before-cut` and `--after-cut`: commands of the user's on either side of the hold.

use std::time::Duration;

use crate::child::{self, End};
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

/// Does `work` between the two. What is to be run after it is run in any case, also if
/// the first one failed: it may have done half of what the other undoes.
///
/// # Errors
///
/// Those of `work`; a hook failed or did not end in time.
pub(crate) fn around<T>(
    hooks: &Hooks,
    set: &str,
    progress: &mut dyn Progress,
    work: impl FnOnce() -> Result<T>,
) -> Result<T> {
    let before = run(
        "--before-cut",
        hooks.before.as_deref(),
        hooks,
        set,
        progress,
    );
    let done = before.and_then(|()| work());
    let after = run("--after-cut", hooks.after.as_deref(), hooks, set, progress);
    match (done, after) {
        (Ok(done), after) => after.map(|()| done),
        (Err(error), Ok(())) => Err(error),
        (Err(error), Err(after)) => Err(Error {
            message: format!("{}; and {}", error.message, after.message),
            ..error
        }),
    }
}

fn run(
    flag: &str,
    text: Option<&str>,
    hooks: &Hooks,
    set: &str,
    progress: &mut dyn Progress,
) -> Result<()> {
    let Some(text) = text else {
        return Ok(());
    };
    let mut command = child::shell(text);
    command.env("SNAPSHIM_SET", set);
    let mut say = |line: &str| progress.note(&format!("{}: {line}", flag.trim_start_matches('-')));
    let ended = child::run(command, hooks.timeout, &Stop::default(), &mut say)?;
    let what = match ended.end {
        End::Status(0) => return Ok(()),
        End::Status(code) => format!("ended with status {code}"),
        End::Signal(number) => format!("was ended by signal {number}"),
        End::TimedOut | End::Stopped => format!(
            "did not end within {} ms and was ended",
            hooks.timeout.as_millis()
        ),
    };
    Err(Error::new(format!("the command of {flag} {what}"))
        .next("nothing was published; the program goes on. --hook-timeout gives it more time"))
}
