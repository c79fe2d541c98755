//! What people see and what scripts read: colours only where somebody looks, tables that
//! can be cut apart elsewhere, progress that is in nobody's way; completions and manual.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use snapshim_tests::process::{Ended, run};
use snapshim_tests::{Fs, Lab, product};

const LIMIT: Duration = Duration::from_secs(60);
const ESCAPE: char = '\u{1b}';

/// What may say how to print is not inherited from whoever runs the tests.
fn plain(mut command: Command) -> Command {
    for name in ["NO_COLOR", "CLICOLOR", "CLICOLOR_FORCE", "CI", "COLUMNS"] {
        command.env_remove(name);
    }
    command.env("TERM", "xterm");
    command
}

/// A set whose store has two snapshots that differ, the second not the latest.
fn lab(name: &str) -> Option<Lab> {
    let lab = Lab::new(name, Fs::Ext4, Duration::from_secs(240))?;
    lab.env(&[]);
    fs::write(lab.data().join("file"), "one\n").unwrap();
    lab.checkpoint(&[]).verified();
    fs::write(lab.data().join("file"), "two\n").unwrap();
    lab.checkpoint(&[]).verified();
    Some(lab)
}

/// `snapshim` with standard output and error in pipes.
fn piped(lab: &Lab, environment: &[(&str, &str)], args: &[&str]) -> Ended {
    let mut command = plain(lab.snapshim(args));
    command.envs(environment.iter().copied());
    run(command, LIMIT)
}

/// `snapshim` on a terminal: what it shows, both outputs together. `before` goes in front
/// of the command.
fn on_terminal(lab: &Lab, environment: &[(&str, &str)], before: &str, args: &[&str]) -> String {
    let command = format!(
        "stty cols 100; {before} {} {}",
        product::snapshim().display(),
        args.join(" ")
    );
    let mut script = plain(lab.command_with("script", &["-qec", &command, "/dev/null"]));
    script.envs(environment.iter().copied());
    run(script, LIMIT).ok("script").out()
}

#[test]
fn colours_are_for_terminals() {
    let Some(lab) = lab("output-colours") else {
        return;
    };
    let list = ["list", "output-colours"];
    let never = ["list", "output-colours", "--color", "never"];
    let always = ["--color=always", "list", "output-colours"];
    for (environment, args, is_colored) in [
        (&[][..], &list[..], true),
        (&[], &never, false),
        (&[("NO_COLOR", "1")], &list, false),
        (&[("NO_COLOR", "1")], &always, true),
        (&[("TERM", "dumb")], &list, false),
        (&[("CLICOLOR", "0")], &list, false),
    ] {
        let shown = on_terminal(&lab, environment, "", args);
        assert!(shown.contains("verified"), "{shown}");
        assert_eq!(
            shown.contains(ESCAPE),
            is_colored,
            "{environment:?} {args:?}: {shown}"
        );
    }
    for (environment, args, is_colored) in [
        (&[][..], &list[..], false),
        (&[], &always, true),
        (&[("CLICOLOR_FORCE", "1")], &list, true),
        (&[("CLICOLOR_FORCE", "1"), ("NO_COLOR", "1")], &list, false),
        (&[("CLICOLOR_FORCE", "1")], &never, false),
    ] {
        let shown = piped(&lab, environment, args).ok("list").out();
        assert!(shown.contains("verified"), "{shown}");
        assert_eq!(
            shown.contains(ESCAPE),
            is_colored,
            "{environment:?} {args:?}: {shown}"
        );
    }
    let green = format!("{ESCAPE}[32mverified{ESCAPE}[0m");
    assert!(on_terminal(&lab, &[], "", &list).contains(&green));
    // An object and a file's bytes are what they are.
    for args in [
        &["list", "--json"][..],
        &["show", "latest:data/file"],
        &["show", "--json", "latest"],
    ] {
        let mut command = plain(lab.snapshim(&["--color", "always"]));
        command.args(args).current_dir(lab.data().parent().unwrap());
        let shown = run(command, LIMIT).ok("plain");
        assert!(
            !shown.out().contains(ESCAPE) && !shown.stdout.is_empty(),
            "{args:?}"
        );
    }
    // Errors, too, and help.
    let red = format!("{ESCAPE}[31msnapshim:{ESCAPE}[0m there is no snapshot");
    let error = on_terminal(&lab, &[], "! ", &["show", "1999"]);
    assert!(error.contains(&red), "{error:?}");
    assert!(
        piped(&lab, &[], &["show", "1999"])
            .err()
            .starts_with("snapshim: there is no")
    );
    assert!(!piped(&lab, &[], &["list", "--help"]).out().contains(ESCAPE));
}

#[test]
fn tables_are_for_people_or_for_programs() {
    let Some(lab) = lab("output-tables") else {
        return;
    };
    let shown = on_terminal(&lab, &[("NO_COLOR", "1")], "", &["list"]);
    let lines: Vec<&str> = shown.lines().collect();
    assert!(lines[0].starts_with("ID ") && lines.len() == 3, "{shown}");
    let column = lines[0].find("STATE").unwrap();
    assert!(
        lines[1..]
            .iter()
            .all(|line| line[column..].starts_with("verified")),
        "{shown}"
    );
    assert!(
        lines[1].contains("4 B") && lines[2].ends_with("latest"),
        "{shown}"
    );

    let lines = piped(&lab, &[], &["list"]).ok("list").out();
    let rows: Vec<Vec<&str>> = lines
        .lines()
        .map(|line| line.split('\t').collect())
        .collect();
    let object: Value =
        serde_json::from_slice(&piped(&lab, &[], &["list", "--json"]).stdout).unwrap();
    assert_eq!(rows.len(), 2);
    for (i, row) in rows.iter().enumerate() {
        let snapshot = &object["snapshots"][i];
        let expected = [
            snapshot["id"].as_str().unwrap().to_owned(),
            "verified".into(),
            snapshot["files"].to_string(),
            snapshot["bytes"].to_string(),
            snapshot["hold_us"].to_string(),
            snapshot["capture"].as_str().unwrap().to_owned(),
            if i == 1 {
                "latest".into()
            } else {
                String::new()
            },
        ];
        // Columns may be added behind these.
        assert_eq!(row[..7], expected);
    }
    // As a script would.
    let script = "\"$0\" list | while IFS=$'\\t' read -r id state files bytes rest; do echo \"$id $bytes\"; done";
    let mut shell = lab.command_with("bash", &["-c", script]);
    shell.arg(product::snapshim());
    let read = run(shell, LIMIT).ok("bash").out();
    assert_eq!(
        read,
        rows.iter()
            .map(|row| format!("{} {}\n", row[0], row[3]))
            .collect::<String>()
    );

    // A name cannot make two lines or two columns of one.
    fs::write(lab.data().join("a\tb\nc"), "").unwrap();
    let lines = piped(&lab, &[], &["diff", "latest"]).ok("diff").out();
    assert_eq!(lines.lines().count(), 1, "{lines}");
    let row: Vec<&str> = lines.trim_end_matches('\n').split('\t').collect();
    assert_eq!((row.len(), row[0]), (9, "+"));
    assert!(row[1].ends_with("a\\tb\\nc"));
    let shown = on_terminal(&lab, &[], "", &["diff", "latest"]);
    assert!(shown.contains("1 added, 0 removed"), "{shown}");
}

#[test]
fn quiet_and_verbose_are_about_the_rest() {
    let Some(lab) = lab("output-levels") else {
        return;
    };
    let checkpoint = |flag: &[&str]| {
        let ended = piped(&lab, &[], &[&["checkpoint", lab.set()], flag].concat()).ok("checkpoint");
        let out = ended.out();
        assert!(
            out.contains("verified") && out.lines().count() == 2,
            "{out}"
        );
        ended.err()
    };
    assert_eq!(checkpoint(&[]), "");
    assert_eq!(checkpoint(&["--quiet"]), "");
    let steps = checkpoint(&["--verbose"]);
    for step in [
        "got ready",
        "held",
        "drained",
        "captured",
        "durable",
        "published",
    ] {
        assert!(steps.contains(step), "{step}: {steps}");
    }
    assert!(
        steps.lines().all(|line| line.starts_with("snapshim: ")),
        "{steps}"
    );
    // A note is silenced, an error is not.
    let same = ["diff", "latest", "latest"];
    assert!(piped(&lab, &[], &same).err().contains("are the same"));
    assert_eq!(piped(&lab, &[], &[&same[..], &["-q"]].concat()).err(), "");
    assert!(
        piped(&lab, &[], &["-q", "show", "1999"])
            .err()
            .contains("there is no snapshot")
    );
}

/// Makes every read of file contents slow, so that comparing takes its time.
fn slowly(us: u32) -> String {
    format!(
        "strace -qq -e signal=none -e trace=pread64 -e inject=pread64:delay_enter={us} -o /dev/null"
    )
}

#[test]
fn progress_is_shown_only_to_whom_it_serves() {
    let Some(lab) = Lab::new("output-progress", Fs::Ext4, Duration::from_secs(240)) else {
        return;
    };
    lab.env(&[]);
    let large = lab.data().join("large");
    fs::write(&large, vec![1; 24 << 20]).unwrap();
    fs::write(lab.data().join("way"), "").unwrap();
    lab.checkpoint(&["--max-hold", "10s"]).certificate();
    let file = fs::OpenOptions::new().write(true).open(&large).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[2], 5).unwrap();

    // Two reads for each MiB: 48 of them.
    let shown = on_terminal(&lab, &[], &slowly(40_000), &["diff", "latest"]);
    assert!(
        shown.contains("comparing ") && shown.contains(" of 24.00 MiB [="),
        "{shown:?}"
    );
    assert!(
        shown.contains("/s, ") && shown.contains(" left"),
        "{shown:?}"
    );
    assert!(shown.contains("1 range, 4.0 KiB of 24.0 MiB"), "{shown:?}");
    // It is gone when the answer comes: the last that was drawn was wiped away.
    let (before, answer) = shown.split_once("1 range").unwrap();
    assert!(before.rfind("\u{1b}[2K").unwrap() > before.rfind("comparing ").unwrap());
    assert!(!answer.contains("comparing"));

    let without = [
        // Over before half a second has passed.
        on_terminal(&lab, &[], "", &["diff", "latest"]),
        on_terminal(&lab, &[], &slowly(40_000), &["diff", "latest", "--quiet"]),
        on_terminal(
            &lab,
            &[("TERM", "dumb")],
            &slowly(40_000),
            &["diff", "latest"],
        ),
    ];
    for shown in without {
        assert!(
            !shown.contains("comparing") && shown.contains("1 range"),
            "{shown:?}"
        );
    }

    // Where there is no terminal, a line every ten seconds; with `--json`, an event every second.
    let mut words: Vec<String> = slowly(300_000).split(' ').map(str::to_owned).collect();
    words.push(product::snapshim().display().to_string());
    let slow = |args: &[&str]| {
        let mut command = plain(lab.command(&words[0]));
        command.args(&words[1..]).args(args);
        run(command, LIMIT).ok("strace")
    };
    let ended = slow(&["diff", "latest", "--json"]);
    let lines = ended.err();
    let seconds = ended.wall.as_secs();
    let events = lines.lines().map(serde_json::from_str::<Value>);
    let events: Vec<Value> = events.collect::<Result<_, _>>().expect("events");
    assert!((5..=seconds).contains(&(events.len() as u64)), "{lines}");
    assert!(
        events
            .iter()
            .all(|event| event["event"] == "progress" && event["step"] == "comparing"),
        "{lines}"
    );
    serde_json::from_slice::<Value>(&ended.stdout).expect("nothing but the object");

    let ended = slow(&["diff", "latest"]);
    let lines = ended.err();
    let seconds = ended.wall.as_secs();
    assert!((12..40).contains(&seconds), "{seconds} s");
    assert!(
        lines.starts_with("snapshim: comparing: ") && lines.contains(" of 24.0 MiB ("),
        "{lines}"
    );
    assert!(lines.lines().count() as u64 <= seconds / 10, "{lines}");
    assert!(!lines.contains(ESCAPE) && !lines.contains('\r'));
}

#[test]
fn notes_stand_above_the_bar_whole() {
    let Some(lab) = Lab::new("output-notes", Fs::Ext4, Duration::from_secs(240)) else {
        return;
    };
    lab.env(&[]);
    let names: Vec<String> = (0..8).map(|i| format!("file-{i}")).collect();
    for name in &names {
        fs::write(lab.data().join(name), vec![1; 2 << 20]).unwrap();
    }
    let certificate = lab.checkpoint(&["--max-hold", "10s"]).certificate().clone();
    // Every second one cannot be compared, which is told while the bar is there.
    for (i, name) in names.iter().enumerate() {
        let copy = certificate.copy_of(&lab.data().join(name));
        if i % 2 == 1 {
            fs::remove_file(&copy).unwrap();
        }
    }
    let shown = on_terminal(
        &lab,
        &[("NO_COLOR", "1")],
        &format!("! {}", slowly(120_000)),
        &["diff", "latest"],
    );
    assert!(
        shown.contains(" of 16.00 MiB ["),
        "there was no bar: {shown:?}"
    );
    // Each error begins at the start of a line and is followed by its end.
    for (i, name) in names.iter().enumerate().filter(|(i, _)| i % 2 == 1) {
        let line = format!(
            "snapshim: cannot open {}",
            certificate.copy_of(&lab.data().join(name)).display()
        );
        let at = shown
            .find(&line)
            .unwrap_or_else(|| panic!("{i}: {shown:?}"));
        assert!(
            at == 0 || shown[..at].ends_with(['\n', '\r', 'K']),
            "{:?}",
            &shown[at.saturating_sub(50)..at]
        );
        let rest = &shown[at + line.len()..];
        assert!(rest.starts_with(": No such file or directory"), "{rest:?}");
        let end = rest.find(['\r', '\n']).unwrap();
        assert!(!rest[..end].contains(ESCAPE), "{:?}", &rest[..end]);
    }
}

fn completes(lab: &Lab, words: &[&str]) -> Vec<String> {
    let script = r#"source <("$0" completions bash) || exit
        COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
        _snapshim "$1" "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
        printf '%s\n' "${COMPREPLY[@]}""#;
    let mut shell = lab.command_with("bash", &["-c", script]);
    shell.arg(product::snapshim()).args(words);
    let out = run(shell, LIMIT).ok("bash").out();
    out.lines().map(str::to_owned).collect()
}

#[test]
fn shells_complete() {
    let Some(lab) = Lab::new("output-shells", Fs::Tmpfs, Duration::from_secs(120)) else {
        return;
    };
    assert_eq!(completes(&lab, &["snapshim", "che"]), ["checkpoint"]);
    assert_eq!(
        completes(&lab, &["snapshim", "diff", "--exi"]),
        ["--exit-code"]
    );
    assert_eq!(
        completes(&lab, &["snapshim", "list", "--color", "a"]),
        ["auto", "always"]
    );
    assert_eq!(
        completes(&lab, &["snapshim", "checkpoint", "--capture", "re"]),
        ["reflink"]
    );

    let script = |shell: &str| {
        let path = lab.beside(&format!("script.{shell}"));
        let ended = run(lab.snapshim(&["completions", shell]), LIMIT).ok(shell);
        assert!(ended.stdout.len() > 1000);
        fs::write(&path, ended.stdout).unwrap();
        path
    };
    run(with(&lab, "zsh", &["-f", "-n"], &script("zsh")), LIMIT).ok("zsh -n");
    let load = "autoload -Uz compinit; compinit -u -D; source $1; print $_comps[snapshim]";
    let ended = run(
        with(&lab, "zsh", &["-f", "-c", load, "zsh"], &script("zsh")),
        LIMIT,
    )
    .ok("zsh");
    assert_eq!(ended.out().trim(), "_snapshim");
    let load = "source $argv[1]; complete -C 'snapshim checkp'; complete -C 'snapshim diff --pat'";
    let ended = run(
        with(&lab, "fish", &["--no-config", "-c", load], &script("fish")),
        LIMIT,
    )
    .ok("fish");
    let found: Vec<String> = ended
        .out()
        .lines()
        .map(|l| l.split('\t').next().unwrap().to_owned())
        .collect();
    assert_eq!(found, ["checkpoint", "--patch", "--path"]);
    // No interpreter of these is a Debian package: that they name every command.
    for shell in ["elvish", "powershell"] {
        let text = fs::read_to_string(script(shell)).unwrap();
        for command in commands(&lab) {
            assert!(
                text.contains(&format!("snapshim;{command}")),
                "{shell}: {command}"
            );
        }
    }
}

fn with(lab: &Lab, program: &str, args: &[&str], path: &Path) -> Command {
    let mut command = lab.command_with(program, args);
    command
        .arg(path)
        .env("HOME", lab.data())
        .env("TERM", "xterm");
    command
}

/// The commands that the help lists.
fn commands(lab: &Lab) -> Vec<String> {
    let help = run(lab.snapshim(&["--help"]), LIMIT).ok("help").out();
    let (_, rest) = help.split_once("Commands:\n").unwrap();
    let (list, _) = rest.split_once("\n\n").unwrap();
    list.lines()
        .filter(|line| !line.starts_with("    "))
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| *name != "help")
        .map(str::to_owned)
        .collect()
}

#[test]
fn the_manual_has_a_page_for_each_command() {
    let Some(lab) = Lab::new("output-manual", Fs::Tmpfs, Duration::from_secs(120)) else {
        return;
    };
    let dir = lab.beside("man/man1");
    run(
        lab.snapshim(&["man", "--dir", dir.to_str().unwrap()]),
        LIMIT,
    )
    .ok("man --dir");
    let mut expected: Vec<String> = commands(&lab)
        .iter()
        .map(|name| format!("snapshim-{name}.1"))
        .collect();
    assert!(expected.len() >= 11, "{expected:?}");
    expected.push("snapshim.1".into());
    expected.sort();
    let mut names: Vec<String> = fs::read_dir(&dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, expected);
    for name in names {
        // -ww: every warning there is; -k: the input is UTF-8.
        let args = ["-k", "-ww", "-z", "-man", "-Tutf8"];
        let ended = run(with(&lab, "groff", &args, &dir.join(&name)), LIMIT).ok("groff");
        assert_eq!(ended.err(), "", "{name}");
        let mut command = with(&lab, "man", &["-l"], &dir.join(&name));
        command.env("MANWIDTH", "80").env("MAN_KEEP_FORMATTING", "");
        let page = run(command, LIMIT).ok("man").out();
        let title = name.trim_end_matches(".1");
        assert!(page.starts_with(&format!("{title}(1)")), "{page}");
        for part in [
            "NAME",
            "SYNOPSIS",
            "OPTIONS",
            "GLOBAL OPTIONS",
            "Examples:",
            "--quiet",
        ] {
            assert!(page.contains(part), "{name} has no {part}");
        }
    }
    // The check of warnings finds something to warn of.
    let broken = dir.join("broken.1");
    fs::write(&broken, ".TH broken 1\n.nosuchmacro\n").unwrap();
    let args = ["-k", "-ww", "-z", "-man", "-Tutf8"];
    assert!(
        run(with(&lab, "groff", &args, &broken), LIMIT)
            .err()
            .contains("nosuchmacro")
    );
    let main = run(lab.snapshim(&["man"]), LIMIT).ok("man");
    assert_eq!(main.stdout, fs::read(dir.join("snapshim.1")).unwrap());
}
