//! Who writes to the files that are to be replaced.

use crate::capture::Member;
use crate::hold::evidence::{self, Members, View};
use crate::hold::outside::Report;
use crate::{Error, Result};

/// Writers named in a message.
const SHOWN: usize = 5;

/// Refuses if a process has one of these open for writing, or mapped so that it can write.
///
/// # Errors
///
/// There is one; or processes cannot be listed.
pub(super) fn refuse_writers(members: &[Member]) -> Result<()> {
    if members.is_empty() {
        return Ok(());
    }
    let view = View {
        gate: None,
        tries: View::ONCE,
    };
    let scan = evidence::scan(view, &Members::new(members.to_vec()))?;
    let writers = scan.foreign(&Report::default());
    if writers.is_empty() {
        return Ok(());
    }
    let each: Vec<String> = writers
        .iter()
        .take(SHOWN)
        .map(|writer| {
            let how = match writer.how.as_str() {
                "mapped" => "mapped, and can write to it",
                _ => "open for writing",
            };
            let (name, pid) = (&writer.name, writer.pid);
            format!("{name} ({pid}) has {} {how}", writer.path.0.display())
        })
        .collect();
    let more = match writers.len().saturating_sub(SHOWN) {
        0 => String::new(),
        more => format!("; and {more} more"),
    };
    Err(Error::new(format!("{}{more}", each.join("; "))).next(
        "end that program first, or pass --force to replace the files under it: it goes on with the old ones",
    ))
}
