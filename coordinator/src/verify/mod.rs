//! Whether a snapshot is good: what its files are against what its manifest says
//! ([`content`]), and what a command of the user's says of them ([`command`]).
//!
//! | module | what it does |
//! |---|---|
//! | [`content`] | walks the tree and compares every entry with its record |
//! | [`command`] | runs a command on the tree, within bounds, and judges how it ended |
//! | `process` | the command's process group, its output and its time |
//! | `scratch` | a copy of the tree that the command may write to |
//! | `unchanged` | that the command did not write to the snapshot itself |
//! | [`mark`] | what was found, in the manifest of a published snapshot |

pub mod command;
pub mod content;
pub mod mark;

mod scratch;
mod unchanged;

use std::path::Path;

/// The code of the reason that a command speaks against a snapshot.
pub const COMMAND: &str = "verify-command";
/// The code of the reason that a snapshot is not what its manifest says.
pub const CONTENT: &str = "damaged-content";

/// The path in the live tree of an entry below the tree of a snapshot.
fn live(below: &Path) -> std::path::PathBuf {
    Path::new("/").join(below)
}
