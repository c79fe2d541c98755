//! Standard output and standard error.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::sync::OnceLock;

use serde::{Serialize, Serializer};

use super::args::GlobalArgs;
use super::table::{Cell, Table};
use super::{progress, style};
use crate::Result;
use crate::error::Context;
use crate::store::manifest::{Manifest, PathName};

/// How much is said on standard error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Level {
    /// Errors only.
    Quiet,
    /// What is worth a line.
    Usual,
    /// Every step.
    Verbose,
}

static LEVEL: OnceLock<Level> = OnceLock::new();

fn level() -> Level {
    *LEVEL.get().unwrap_or(&Level::Usual)
}

/// Does from now on as the global flags say.
pub fn set_up(flags: &GlobalArgs) {
    let level = match (flags.quiet, flags.verbose) {
        (true, _) => Level::Quiet,
        (false, true) => Level::Verbose,
        (false, false) => Level::Usual,
    };
    // A process has one command line.
    let _ = LEVEL.set(level);
    let color = match flags.color {
        clap::ColorChoice::Auto => anstream::ColorChoice::Auto,
        clap::ColorChoice::Always => anstream::ColorChoice::Always,
        clap::ColorChoice::Never => anstream::ColorChoice::Never,
    };
    color.write_global();
}

/// Whether only errors and what was asked for are printed.
pub fn is_quiet() -> bool {
    level() == Level::Quiet
}

/// Whether every step is told.
pub fn is_verbose() -> bool {
    level() == Level::Verbose
}

/// Prints one JSON object to standard output.
pub fn json(value: &impl Serialize) -> Result<()> {
    let mut text = serde_json::to_vec_pretty(value).context(|| "write JSON".into())?;
    text.push(b'\n');
    bytes(&text)
}

/// Writes a path as a plain string; one that is not UTF-8 as an object that loses
/// nothing. For single paths; lists have the form of the manifest.
pub fn plain<S: Serializer>(
    path: &PathName,
    serializer: S,
) -> std::result::Result<S::Ok, S::Error> {
    match path.0.to_str() {
        Some(text) => serializer.serialize_str(text),
        None => path.serialize(serializer),
    }
}

/// Prints text to standard output.
pub fn text(text: &str) -> Result<()> {
    bytes(text.as_bytes())
}

/// Prints bytes to standard output. A reader that went away has seen enough.
pub fn bytes(bytes: &[u8]) -> Result<()> {
    progress::above(|| {
        let mut out = io::stdout().lock();
        match out.write_all(bytes).and_then(|()| out.flush()) {
            Err(cause) if cause.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            other => other.context(|| "write to standard output".into()),
        }
    })
}

/// Prints a file to standard output as it is. A reader that went away has seen enough.
pub fn stream(mut file: File, path: &Path) -> Result<()> {
    // Text after the last line feed would wait in std's buffer; this goes around it.
    let out =
        rustix::io::dup(rustix::stdio::stdout()).context(|| "write to standard output".into())?;
    match io::copy(&mut file, &mut File::from(out)) {
        Err(cause) if cause.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other
            .map(drop)
            .context(|| format!("copy {} to standard output", path.display())),
    }
}

/// Prints what went wrong to standard error, whole, and whether or not there is one:
/// where this goes wrong there is nobody to tell. `--quiet` does not silence it.
pub fn error(line: &str) {
    /// What each of our lines begins with.
    const US: &str = "snapshim:";
    let line = lines(line);
    let line = match line.strip_prefix(US) {
        Some(rest) => format!(
            "{}{rest}\n",
            style::paint(US, style::BAD, style::on_stderr())
        ),
        None => format!("{line}\n"),
    };
    to_stderr(&line);
}

/// Prints a line to standard error that is good to know, unless `--quiet`.
pub fn note(line: &str) {
    if level() >= Level::Usual {
        to_stderr(&format!("{}\n", lines(line)));
    }
}

/// Prints a line to standard error with `--verbose`.
pub fn detail(line: &str) {
    if is_verbose() {
        to_stderr(&format!("{}\n", lines(line)));
    }
}

/// In one write, so that lines of several processes do not mix.
fn to_stderr(text: &str) {
    progress::above(|| {
        let _ = io::stderr().lock().write_all(text.as_bytes());
    });
}

/// Lays out labels and their values, as standard output takes it. See [`Table`].
pub fn table(rows: &[Vec<String>]) -> String {
    let mut table = Table::default();
    for row in rows {
        table.row(row.iter().map(Cell::new));
    }
    table.to_text()
}

/// Whether a snapshot is verified, for standard output.
pub fn state(verified: bool) -> String {
    let (text, style) = match verified {
        true => ("verified", style::GOOD),
        false => ("NOT VERIFIED", style::DOUBTFUL),
    };
    style::paint(text, style, style::on_stdout())
}

/// Says why something is not verified, a line for each reason.
pub fn reasons(manifest: &Manifest) {
    for reason in &manifest.reasons {
        error(&format!("snapshim: not verified: {}", name(&reason.text)));
    }
}

/// A size for people.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{bytes} B")
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

/// A time in µs for people.
pub fn micros(us: u64) -> String {
    match us {
        0..1_000 => format!("{us} µs"),
        1_000..1_000_000 => format!("{:.1} ms", us as f64 / 1e3),
        _ => format!("{:.2} s", us as f64 / 1e6),
    }
}

/// A message of one line or more, safe to print on a terminal: names of files are in it.
fn lines(text: &str) -> String {
    let each: Vec<String> = text.split('\n').map(name).collect();
    each.join("\n")
}

/// A name from outside, safe to print on a terminal.
pub fn name(text: &str) -> String {
    text.chars()
        .flat_map(|c| {
            if c.is_control() {
                c.escape_default().collect()
            } else {
                vec![c]
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times() {
        assert_eq!(size(999), "999 B");
        assert_eq!(size(1536), "1.5 KiB");
        assert_eq!(size(u64::MAX), "16777216.0 TiB");
        assert_eq!(micros(999), "999 µs");
        assert_eq!(micros(1_500), "1.5 ms");
        assert_eq!(micros(2_000_000), "2.00 s");
    }

    #[test]
    fn names_cannot_drive_a_terminal() {
        assert_eq!(name("a\u{1b}[2J\nb"), "a\\u{1b}[2J\\nb");
        assert_eq!(lines("a\u{1b}[2J\n  b"), "a\\u{1b}[2J\n  b");
    }
}
