//! Each example does what it says, by its own script, which ends non-zero if it does not.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use snapshim_tests::process::{self, Ended};
use snapshim_tests::{Fs, Lab, product, rounds};

/// The examples, and how many snapshots are taken in the short form of the test.
const EXAMPLES: [(&str, usize); 6] = [
    ("container", 3),
    ("counter", 5),
    ("pipeline", 3),
    ("restic", 1),
    ("sqlite", 3),
    ("systemd", 1),
];

/// Runs an example; `snapshim` is the program it takes for snapshim.
fn run(lab: &Lab, name: &str, count: usize, snapshim: &Path) -> Ended {
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
    let mut command = lab.command(example.join(name).join("run.sh"));
    command
        .arg(lab.data())
        .arg(count.to_string())
        .env("SNAPSHIM_BIN", snapshim);
    process::run(command, Duration::from_secs(120))
}

#[test]
fn they_do_what_they_say() {
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
    let mut found: Vec<String> = fs::read_dir(examples)
        .unwrap()
        .flatten()
        .filter(|entry| entry.path().is_dir())
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect();
    found.sort();
    assert_eq!(found, EXAMPLES.map(|(name, _)| name));
    for (name, short) in EXAMPLES {
        let Some(lab) = Lab::new(
            &format!("example-{name}"),
            Fs::Xfs,
            Duration::from_secs(200),
        ) else {
            return;
        };
        let ended = run(&lab, name, rounds(4 * short, short), product::snapshim());
        println!("{name}: {:?}\n{}", ended.wall, ended.out());
        ended.ok(name);
        let left: Vec<_> = fs::read_dir(lab.data()).unwrap().flatten().collect();
        assert!(left.is_empty(), "{name} leaves {left:?}");
        let is_tidy = process::wait_until(Duration::from_secs(5), || lab.processes().is_empty());
        assert!(is_tidy, "{name} leaves processes behind");
    }
}

/// The control: a snapshim that runs programs without the gate, and stops none of them.
#[test]
fn they_fail_without_a_gate() {
    let Some(lab) = Lab::new("examples-ungated", Fs::Xfs, Duration::from_secs(200)) else {
        return;
    };
    let sham = lab.beside("snapshim");
    let script = format!(
        "#!/bin/bash\nreal={}\n{}",
        product::snapshim().display(),
        r#"
case $1 in
run)
    options=()
    shift
    while [[ $1 != -- ]]; do options+=("$1"); shift; done
    shift
    "$real" env "${options[@]}" >/dev/null
    exec "$@" ;;
checkpoint) exec "$real" "$@" --outside none ;;
*) exec "$real" "$@" ;;
esac
"#
    );
    fs::write(&sham, script).unwrap();
    fs::set_permissions(&sham, fs::Permissions::from_mode(0o755)).unwrap();
    for name in ["counter", "pipeline", "sqlite"] {
        let ended = run(&lab, name, 2, &sham);
        let said = format!("{}{}", ended.out(), ended.err());
        assert_eq!(ended.code(), 1, "{name}: {said}");
        assert!(said.contains("not verified: "), "{name}: {said}");
    }
}
