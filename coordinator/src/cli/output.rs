//! Standard output and standard error.

use std::io::{self, Write};

use serde::{Serialize, Serializer};

use crate::Result;
use crate::error::Context;
use crate::store::manifest::PathName;

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
    let mut out = io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(cause) if cause.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other.context(|| "write to standard output".into()),
    }
}

/// Prints a line to standard error, whole, and whether or not there is one:
/// where this goes wrong there is nobody to tell.
pub fn note(line: &str) {
    let _ = io::stderr()
        .lock()
        .write_all(format!("{line}\n").as_bytes());
}

/// Lays rows out in columns, the last one as it is.
pub fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns)
        .map(|i| {
            rows.iter()
                .filter_map(|r| r.get(i))
                .map(|c| c.chars().count())
                .max()
                .unwrap_or(0)
        })
        .collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line.push_str(&format!("{cell:<width$}  "));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
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
    fn columns_line_up() {
        let row = |cells: &[&str]| cells.iter().map(|c| (*c).to_owned()).collect::<Vec<_>>();
        let text = table(&[row(&["ID", "SIZE"]), row(&["é1", "10 B"]), row(&["longer"])]);
        assert_eq!(text, "ID      SIZE\né1      10 B\nlonger\n");
    }

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
    }
}
