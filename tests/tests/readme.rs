//! What the documents tell people to type works as printed: the `sh` blocks of each are run
//! in order, by one shell that stops at the first failure.
//!
//! Two lines of README.md are not run, but replaced by name ([`SUBSTITUTED`]): they would
//! build the product anew, and run these tests in themselves.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use snapshim_tests::process::{self, Ended};
use snapshim_tests::{Fs, Lab, product};

const LIMIT: Duration = Duration::from_secs(120);

/// Lines that are replaced where they stand alone, and by what.
const SUBSTITUTED: [(&str, &str); 2] = [
    // The binary under test is first in PATH already.
    (
        "cargo install --path coordinator",
        "test -f coordinator/Cargo.toml && snapshim --version",
    ),
    // The block before has left the sources.
    ("tests/run.sh", "bash -n \"$SOURCES\"/tests/run.sh"),
];

fn sources() -> PathBuf {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    dir.canonicalize().expect("the sources")
}

/// The fenced blocks of a document: language and text. It is an error if a block has no
/// language, or is only indented: then nobody knows whether it is to be typed.
fn blocks(text: &str) -> Result<Vec<(String, String)>, String> {
    let mut found = Vec::new();
    let mut open: Option<(String, String)> = None;
    let mut after_blank = true;
    for (number, line) in text.lines().enumerate() {
        let wrong = |what: &str| Err(format!("line {}: {what}", number + 1));
        match (&mut open, line.strip_prefix("```")) {
            (None, Some("")) => return wrong("a block without a language"),
            (None, Some(language)) => open = Some((language.to_owned(), String::new())),
            (Some(_), Some("")) => found.extend(open.take()),
            (Some((_, block)), _) => {
                block.push_str(line);
                block.push('\n');
            }
            (None, None) if after_blank && line.starts_with("    ") => {
                return wrong("an indented block; say ```sh or ```text");
            }
            (None, None) => {}
        }
        after_blank = line.trim().is_empty();
    }
    match open {
        None => Ok(found),
        Some(_) => Err("a block without an end".into()),
    }
}

/// The blocks of a document of the sources.
#[track_caller]
fn read(document: &str) -> Vec<(String, String)> {
    let text = fs::read_to_string(sources().join(document)).unwrap();
    blocks(&text).unwrap_or_else(|cause| panic!("{document}, {cause}"))
}

/// The script that a document is.
fn script(blocks: &[(String, String)]) -> String {
    let mut script = String::new();
    for (number, (_, block)) in blocks.iter().filter(|(l, _)| l == "sh").enumerate() {
        script.push_str(&format!("echo '== block {}' >&2\n", number + 1));
        for line in block.lines() {
            let substitute = SUBSTITUTED.iter().find(|(from, _)| *from == line);
            script.push_str(substitute.map_or(line, |(_, to)| to));
            script.push('\n');
        }
    }
    script
}

/// Runs a script where somebody would who has just unpacked the sources.
#[track_caller]
fn run(lab: &Lab, script: &str) -> Ended {
    let (bin, copy, home) = (lab.beside("bin"), lab.beside("sources"), lab.beside("home"));
    let _ = fs::remove_dir_all(&copy);
    for dir in [&bin, &home] {
        fs::create_dir_all(dir).unwrap();
    }
    let _ = symlink(product::snapshim(), bin.join("snapshim"));
    let from = format!("{}/", sources().display());
    let to = copy.to_str().unwrap();
    process::tool(
        "rsync",
        &["-a", "--exclude=/target", "--exclude=.git", &from, to],
    );
    let path = std::env::var("PATH").unwrap();
    let file = lab.beside("script");
    fs::write(&file, script).unwrap();
    let mut command = lab.command("bash");
    command
        .args(["-euo", "pipefail"])
        .arg(&file)
        .current_dir(&copy)
        .env("PATH", format!("{}:{path}", bin.display()))
        .env("HOME", &home)
        .env("TMPDIR", lab.beside("home"))
        .env("SOURCES", &copy)
        .env("SNAPSHIM_BIN", product::snapshim());
    process::run(command, LIMIT)
}

/// Runs all of a document; returns how many blocks that were.
#[track_caller]
fn works(lab: &Lab, document: &str) -> usize {
    let blocks = read(document);
    let count = blocks
        .iter()
        .filter(|(language, _)| language == "sh")
        .count();
    let ended = run(lab, &script(&blocks));
    println!("{document}: {count} blocks, {:?}", ended.wall);
    ended.ok(document);
    let is_tidy = process::wait_until(Duration::from_secs(5), || lab.processes().is_empty());
    assert!(is_tidy, "{document} leaves processes behind");
    count
}

/// XFS, so that files are cloned as on any machine that snapshim is meant for.
fn lab(name: &str) -> Option<Lab> {
    Lab::new(name, Fs::Xfs, Duration::from_secs(300))
}

#[test]
fn readme() {
    let Some(lab) = lab("readme") else { return };
    assert!(works(&lab, "README.md") >= 5);
    let text = fs::read_to_string(sources().join("README.md")).unwrap();
    for (from, _) in SUBSTITUTED {
        let times = text.lines().filter(|line| *line == from).count();
        assert_eq!(times, 1, "{from}");
    }
}

#[test]
fn recipes() {
    let Some(lab) = lab("recipes") else { return };
    assert!(works(&lab, "docs/recipes.md") >= 4);
}

/// Each example has a README, and it names the script that `examples.rs` runs as well.
#[test]
fn readmes_of_examples() {
    let Some(lab) = lab("example-readmes") else {
        return;
    };
    let mut count = 0;
    for entry in fs::read_dir(sources().join("examples")).unwrap().flatten() {
        if !entry.path().is_dir() {
            continue;
        }
        let name = entry.file_name().into_string().unwrap();
        let document = format!("examples/{name}/README.md");
        let script = script(&read(&document));
        assert!(
            script.contains(&format!("examples/{name}/run.sh")),
            "{script}"
        );
        count += works(&lab, &document);
    }
    assert!(count >= 6, "{count}");
}

/// The control: what is wrong in a document is found.
#[test]
fn a_broken_block_fails() {
    let Some(lab) = lab("broken-blocks") else {
        return;
    };
    let good =
        "Text\n\n```text\nfalse\n```\n\n```sh\ncd \"$(mktemp -d)\"\necho one > file\n```\n\n";
    let next = |block: &str| format!("{good}```sh\n{block}\n```\n\n```sh\ntrue\n```\n");
    let code = |text: &str| run(&lab, &script(&blocks(text).unwrap())).code();
    assert_eq!(code(&next("grep -q one file")), 0);
    for broken in [
        "grep -q two file",
        "cat nothing | wc -l",
        "echo $UNSET_VARIABLE",
        "snapshim checkpoint no-such-set",
        "snapshim no-such-command",
        "if true; then",
    ] {
        assert_ne!(code(&next(broken)), 0, "{broken}");
    }
    for wrong in [
        "```\nsnapshim\n```\n",
        "Text:\n\n    snapshim list\n",
        "```sh\nsnapshim\n",
    ] {
        assert!(blocks(wrong).is_err(), "{wrong}");
    }
}
