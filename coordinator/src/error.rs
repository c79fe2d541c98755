//! Errors as a user meets them: what, why, and what to do next.

use std::fmt;

/// The exit codes of every command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Done; a snapshot, if one was made, is verified.
    Verified = 0,
    /// It failed.
    Failure = 1,
    /// The command line or a setting is wrong.
    Usage = 2,
    /// The commit point asked for was not reached.
    NotReached = 3,
    /// The hold bound was hit; nothing was published.
    Aborted = 4,
    /// Captured and published, but not verified.
    Unverified = 5,
}

/// A failure: one line that names the thing and the cause, and one with the next step.
#[derive(Debug)]
pub struct Error {
    /// The exit code it ends the command with.
    pub exit: Exit,
    /// The thing and the cause.
    pub message: String,
    /// What the user can do.
    pub next: Option<String>,
    /// It came about by chance: the same command may well succeed at once.
    pub is_chance: bool,
    /// Somebody asked for the end (^C), and what was begun has been put in order.
    pub is_interruption: bool,
}

/// Result with an [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// A failure with exit code 1.
    pub fn new(message: impl Into<String>) -> Error {
        Error {
            exit: Exit::Failure,
            message: message.into(),
            next: None,
            is_chance: false,
            is_interruption: false,
        }
    }

    /// Work that was ended because somebody asked for it.
    pub fn interrupted(message: impl Into<String>) -> Error {
        Error {
            is_interruption: true,
            ..Error::new(message)
        }
    }

    /// A mistake in the command line or settings.
    pub fn usage(message: impl Into<String>) -> Error {
        Error {
            exit: Exit::Usage,
            ..Error::new(message)
        }
    }

    /// A hold that ended before the capture did.
    pub fn aborted(message: impl Into<String>) -> Error {
        Error {
            exit: Exit::Aborted,
            ..Error::new(message)
        }
    }

    /// An abort that came about by chance.
    pub fn by_chance(message: impl Into<String>) -> Error {
        Error {
            is_chance: true,
            ..Error::aborted(message)
        }
    }

    /// Adds the next step.
    #[must_use]
    pub fn next(mut self, next: impl Into<String>) -> Error {
        self.next = Some(next.into());
        self
    }
}

impl Error {
    /// All of it in one line, for a note.
    pub(crate) fn line(&self) -> String {
        match &self.next {
            Some(next) => format!("{}: {next}", self.message),
            None => self.message.clone(),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        if let Some(next) = &self.next {
            write!(f, "\n  {next}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}

/// Names the thing an I/O error happened to.
pub trait Context<T> {
    /// Turns the error into an [`Error`] that says what was being done: "cannot {what}: {cause}".
    fn context(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: fmt::Display> Context<T> for std::result::Result<T, E> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|cause| Error::new(format!("cannot {}: {cause}", what())))
    }
}
