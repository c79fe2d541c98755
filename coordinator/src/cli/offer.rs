//! Writing to standard error without waiting for whoever reads it.
//!
//! He may be held, by us, or wait for us. What he does not take at once is not written.

use std::io::IsTerminal;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::FileType;

/// No pipe that has any room at all takes less at once: PIPE_BUF, pipe(7).
const MOST: usize = 4096;

/// Whether there is a line on the terminal that will be replaced. Whoever else writes there takes
/// it away first.
static LINE: AtomicBool = AtomicBool::new(false);

/// What standard error is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Terminal,
    /// Something with a reader, who may be slow.
    Stream,
    /// A file, which may be one of those that are captured.
    File,
}

impl Kind {
    pub(super) fn of_stderr() -> Kind {
        let stderr = rustix::stdio::stderr();
        let kind = rustix::fs::fstat(stderr).map(|stat| FileType::from_raw_mode(stat.st_mode));
        match kind {
            _ if std::io::stderr().is_terminal() => Kind::Terminal,
            Ok(FileType::RegularFile) | Err(_) => Kind::File,
            Ok(_) => Kind::Stream,
        }
    }
}

/// Writes a line, if there is room for it now.
pub(super) fn line(text: &str) {
    let clear = match LINE.swap(false, Relaxed) {
        true => CLEAR,
        false => "",
    };
    write(&format!("{clear}{text}\n"));
}

/// Takes the cursor to the beginning of its line, and empties that.
const CLEAR: &str = "\r\u{1b}[2K";

/// Puts a line on the terminal in the place of the one before. Long ones are cut short.
pub(super) fn replace(text: &str) {
    let columns = columns();
    let cut: String = text.chars().take(columns.saturating_sub(1)).collect();
    LINE.store(true, Relaxed);
    write(&format!("{CLEAR}{cut}"));
}

/// Takes that line away.
pub(super) fn clear() {
    write(take_line());
}

/// What takes the line away that is on the terminal, if there is one; for whoever writes there next.
pub(super) fn take_line() -> &'static str {
    match LINE.swap(false, Relaxed) {
        true => CLEAR,
        false => "",
    }
}

fn columns() -> usize {
    let size = rustix::termios::tcgetwinsize(rustix::stdio::stderr());
    let columns = size.map_or(0, |size| usize::from(size.ws_col));
    if columns == 0 { 80 } else { columns }
}

fn write(text: &str) {
    let stderr = rustix::stdio::stderr();
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let mut fds = [PollFd::new(&stderr, PollFlags::OUT)];
    let has_room = poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
        && fds[0].revents().contains(PollFlags::OUT);
    if has_room && !text.is_empty() && text.len() <= MOST {
        // Without a lock, which somebody might wait for.
        let _ = rustix::io::write(stderr, text.as_bytes());
    }
}
