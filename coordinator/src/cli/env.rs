//! `snapshim env`: what brings a program into a set without `snapshim run`.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::process::ExitCode;

use serde::Serialize;

use crate::Result;
use crate::hold::set::{self, Set};
use crate::hold::shim_file;
use crate::store::manifest::{PathName, VERSION};

use super::args::EnvArgs;
use super::{output, preload, usage};

#[derive(Serialize)]
struct Report<'a> {
    version: u32,
    set: &'a str,
    #[serde(serialize_with = "output::plain")]
    gate: PathName,
    environment: BTreeMap<&'static str, String>,
    /// The variables whose values are not UTF-8, as hexadecimal digits.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    environment_hex: BTreeMap<&'static str, String>,
}

/// Runs the command.
pub fn run(args: &EnvArgs) -> Result<ExitCode> {
    let Some(first) = args.set.watch.first() else {
        return Err(usage(
            "nothing is watched",
            "name files or directories with --watch",
        ));
    };
    let name = match &args.set.name {
        Some(name) => name.clone(),
        None => set::name_from(&set::resolve(first)?),
    };
    let set = Set::create_or_open(&name, &args.set.wanted()?)?;
    let shim = shim_file::unpack(set.place())?;
    let variables = preload::environment(&set, &shim, None);
    if args.output.json {
        let lossy = |value: &OsStr| value.to_string_lossy().into_owned();
        let hex = |value: &OsStr| {
            value
                .as_bytes()
                .iter()
                .map(|b| format!("{b:02x}"))
                .collect()
        };
        output::json(&Report {
            version: VERSION,
            set: &set.name,
            gate: PathName(set.gate_path.clone()),
            environment: variables
                .iter()
                .map(|(name, value)| (*name, lossy(value)))
                .collect(),
            environment_hex: variables
                .iter()
                .filter(|(_, value)| value.to_str().is_none())
                .map(|(name, value)| (*name, hex(value)))
                .collect(),
        })?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut script = Vec::new();
    for (name, value) in &variables {
        script.extend_from_slice(b"export ");
        script.extend_from_slice(name.as_bytes());
        script.push(b'=');
        script.extend_from_slice(&quote(value.as_bytes()));
        script.push(b'\n');
    }
    output::bytes(&script)?;
    Ok(ExitCode::SUCCESS)
}

/// A word that every POSIX shell takes as exactly these bytes.
fn quote(text: &[u8]) -> Vec<u8> {
    let plain = |b: &u8| b.is_ascii_alphanumeric() || b"/._-:,+=@%".contains(b);
    if !text.is_empty() && text.iter().all(plain) {
        return text.to_vec();
    }
    let mut quoted = vec![b'\''];
    for byte in text {
        match byte {
            b'\'' => quoted.extend_from_slice(br"'\''"),
            other => quoted.push(*other),
        }
    }
    quoted.push(b'\'');
    quoted
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_shell_reads_back_what_was_quoted() {
        for text in [
            &b"plain/path-1.so:/b"[..],
            b"",
            b"it's",
            b"'",
            b"''a''",
            b"$HOME `id` \"x\" \\ * ? ~ # ; & | <> () {} !",
            b"~root",
            b"two\nlines\n.",
            b"\xff\xfe not text",
            b"-n",
        ] {
            let mut script = b"x=".to_vec();
            script.extend_from_slice(&quote(text));
            script.extend_from_slice(b"; printf '%s|' \"$x\"");
            let output = Command::new("/bin/sh")
                .arg("-c")
                .arg(OsStr::from_bytes(&script))
                .output()
                .expect("a shell");
            let mut expected = text.to_vec();
            expected.push(b'|');
            assert_eq!(
                output.stdout,
                expected,
                "{:?}",
                String::from_utf8_lossy(text)
            );
        }
    }
}
