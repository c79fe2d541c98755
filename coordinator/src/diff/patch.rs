//! The difference of two text files as a patch that patch(1) and `git apply` take.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

use similar::TextDiff;

use super::{Found, Side};
use crate::Result;
use crate::store::manifest::Kind;

/// Bytes: a longer file is no text to read.
pub const MAX_SIZE: u64 = 8 << 20;
/// A file with a zero among so many of its first bytes is no text; as git has it.
const LOOKED_AT: usize = 8000;
/// A shorter patch is not looked for any longer.
const PATIENCE: Duration = Duration::from_secs(5);

/// What a patch has to say of two files.
#[derive(Debug, PartialEq, Eq)]
pub enum Patch {
    /// The patch.
    Text(Vec<u8>),
    /// At least one of them is no text.
    Binary,
    /// At least one of them is longer than [`MAX_SIZE`].
    TooLarge,
}

/// The patch that makes of a file in A what it is in B. `None` stands for no file.
///
/// # Errors
///
/// A file cannot be read.
pub fn patch(
    path: &Path,
    a: Option<(&Side<'_>, Found<'_>)>,
    b: Option<(&Side<'_>, Found<'_>)>,
) -> Result<Patch> {
    let read = |side: Option<(&Side<'_>, Found<'_>)>| match side {
        Some((side, found)) if found.record.kind == Kind::File => match side.open(found)? {
            Some((file, _)) => text(path, file),
            None => Ok(Text::Some(Vec::new())),
        },
        _ => Ok(Text::Some(Vec::new())),
    };
    let (old, new) = match (read(a)?, read(b)?) {
        (Text::Some(old), Text::Some(new)) => (old, new),
        (Text::TooLarge, _) | (_, Text::TooLarge) => return Ok(Patch::TooLarge),
        _ => return Ok(Patch::Binary),
    };
    let name = |prefix: &str, exists: bool| match exists {
        true => quoted(prefix, path),
        false => "/dev/null".to_owned(),
    };
    Ok(Patch::Text(unified(
        (&name("a", a.is_some()), &old),
        (&name("b", b.is_some()), &new),
    )))
}

enum Text {
    Some(Vec<u8>),
    Binary,
    TooLarge,
}

fn text(path: &Path, file: OwnedFd) -> Result<Text> {
    let mut bytes = Vec::new();
    std::fs::File::from(file)
        .take(MAX_SIZE + 1)
        .read_to_end(&mut bytes)
        .map_err(|cause| super::cannot_compare(path, &cause))?;
    Ok(match bytes {
        bytes if bytes[..bytes.len().min(LOOKED_AT)].contains(&0) => Text::Binary,
        bytes if bytes.len() as u64 > MAX_SIZE => Text::TooLarge,
        bytes => Text::Some(bytes),
    })
}

fn unified((name_a, a): (&str, &[u8]), (name_b, b): (&str, &[u8])) -> Vec<u8> {
    // At line feeds only: patch(1) knows no other ends of lines.
    let lines = |text: &'_ [u8]| -> Vec<Vec<u8>> {
        text.split_inclusive(|byte| *byte == b'\n')
            .map(<[u8]>::to_vec)
            .collect()
    };
    let (old, new) = (lines(a), lines(b));
    let old: Vec<&[u8]> = old.iter().map(Vec::as_slice).collect();
    let new: Vec<&[u8]> = new.iter().map(Vec::as_slice).collect();
    let diff = TextDiff::configure()
        .newline_terminated(true)
        .timeout(PATIENCE)
        .diff_slices(&old, &new);
    let mut patch = format!("--- {name_a}\n+++ {name_b}\n").into_bytes();
    // Not by its own writer, which replaces what is not UTF-8, and takes a carriage return
    // for the end of a line. Writing into memory cannot fail.
    for hunk in diff.unified_diff().iter_hunks() {
        let _ = writeln!(patch, "{}", hunk.header());
        for change in hunk.iter_changes() {
            let line = change.value();
            let _ = write!(patch, "{}", change.tag());
            patch.extend_from_slice(line);
            if !line.ends_with(b"\n") {
                patch.extend_from_slice(b"\n\\ No newline at end of file\n");
            }
        }
    }
    patch
}

/// A path as git writes it: in quotes, and bytes in octal, if it has any that would mislead.
fn quoted(prefix: &str, path: &Path) -> String {
    let bytes = path.as_os_str().as_bytes();
    let is_plain = |byte: &u8| matches!(byte, b' '..=b'~') && !matches!(byte, b'"' | b'\\');
    if bytes.iter().all(is_plain) {
        // A tab behind a name with spaces: that is where it ends.
        let end = if bytes.contains(&b' ') { "\t" } else { "" };
        return format!("{prefix}{}{end}", path.display());
    }
    let mut name = format!("\"{prefix}").into_bytes();
    for byte in bytes {
        let _ = match byte {
            b'"' | b'\\' => name.write_all(&[b'\\', *byte]),
            b'\n' => name.write_all(b"\\n"),
            b'\t' => name.write_all(b"\\t"),
            byte if is_plain(byte) => name.write_all(&[*byte]),
            byte => write!(name, "\\{byte:03o}"),
        };
    }
    name.push(b'"');
    String::from_utf8_lossy(&name).into_owned()
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use super::*;

    #[test]
    fn names_are_quoted_as_git_does() {
        let odd = Path::new(OsStr::from_bytes(b"/x/a\"b\\\n\xff\xc3\xa9"));
        assert_eq!(quoted("a", odd), r#""a/x/a\"b\\\n\377\303\251""#);
        assert_eq!(quoted("b", Path::new("/plain")), "b/plain");
        assert_eq!(quoted("b", Path::new("/two words")), "b/two words\t");
    }

    #[test]
    fn a_carriage_return_ends_no_line() {
        let patch = unified(("a/f", b"one\rtwo\nend"), ("b/f", b"one\rtwo\nend\n"));
        assert_eq!(
            String::from_utf8(patch).unwrap(),
            "--- a/f\n+++ b/f\n@@ -1,2 +1,2 @@\n one\rtwo\n-end\n\\ No newline at end of file\n+end\n"
        );
        let patch = unified(("a/f", b"\xff\r"), ("b/f", b""));
        assert_eq!(
            patch,
            b"--- a/f\n+++ b/f\n@@ -1 +0,0 @@\n-\xff\r\n\\ No newline at end of file\n"
        );
    }
}
