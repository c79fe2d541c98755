//! At which of the program's own points the gate is shut.

use std::fmt;
use std::str::FromStr;

/// A point at which a cut may be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CommitPoint {
    /// Between complete calls.
    Write,
}

impl fmt::Display for CommitPoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CommitPoint::Write => f.write_str("write"),
        }
    }
}

impl FromStr for CommitPoint {
    type Err = String;

    fn from_str(text: &str) -> Result<CommitPoint, String> {
        match text {
            "write" => Ok(CommitPoint::Write),
            "auto" | "sync" | "lock" | "close" | "rename" => Err(format!(
                "the commit point `{text}` is not available in this version; use `write`"
            )),
            other => Err(format!("there is no commit point `{other}`; use `write`")),
        }
    }
}
