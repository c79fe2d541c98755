//! The command line: every flag is defined here, once.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum, ValueHint};
use clap_complete::Shell;
use nix::unistd::{Group, User};

use snapshim_gate::abi::{DEFAULT_HOLD_BOUND_MS, MAX_HOLD_BOUND_MS};

use crate::Result;
use crate::capture::Method;
use crate::checkpoint::Options;
use crate::commit::{CommitPoint, Otherwise};
use crate::hold::gate_file::Sharing;
use crate::hold::outside::Methods;
use crate::hold::set::{Asks, Config, Set, Wanted};
use crate::hooks::{self, Hooks};
use crate::store::policy::{Count, Policy, Room, Within};

use crate::stop::Stop;
use crate::tally::Tally;
use crate::verify::command::{self, Verify};

use super::{help, usage};

/// Consistent snapshots of the files of running, unmodified programs
#[derive(Debug, Parser)]
#[command(
    name = "snapshim",
    version,
    propagate_version = true,
    after_help = help::MAIN
)]
pub struct Cli {
    /// What every command takes.
    #[command(flatten)]
    pub global: GlobalArgs,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The flags of every command, before or behind its name.
#[derive(Clone, Debug, Args)]
pub struct GlobalArgs {
    /// Print errors and what was asked for, and nothing else
    #[arg(short, long, global = true, help_heading = GLOBAL)]
    pub quiet: bool,
    /// Say each step and how long it took
    #[arg(short, long, global = true, conflicts_with = "quiet", help_heading = GLOBAL)]
    pub verbose: bool,
    /// When to print in colour; auto: on a terminal, unless NO_COLOR is set
    #[arg(
        long,
        global = true,
        value_name = "WHEN",
        default_value = "auto",
        help_heading = GLOBAL
    )]
    pub color: clap::ColorChoice,
}

/// The heading they have in the help.
const GLOBAL: &str = "Global options";

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a program so that its files can be checkpointed
    #[command(after_help = help::RUN)]
    Run(RunArgs),
    /// Take a snapshot of the files of a running set
    #[command(after_help = help::CHECKPOINT)]
    Checkpoint(CheckpointArgs),
    /// Take a snapshot of files whatever programs have them open, none of them in a set
    #[command(after_help = help::SNAP)]
    Snap(SnapArgs),
    /// Run any command while the programs of a set are held
    #[command(after_help = help::HOLD)]
    Hold(HoldArgs),
    /// List the snapshots of a set
    #[command(after_help = help::LIST)]
    List(ListArgs),
    /// Show one snapshot, or a file or directory in it
    #[command(after_help = help::SHOW)]
    Show(ShowArgs),
    /// Check that the files of snapshots are what they were
    #[command(after_help = help::VERIFY)]
    Verify(VerifyArgs),
    /// Show what differs between two snapshots, or between one and the live files
    #[command(after_help = help::DIFF)]
    Diff(DiffArgs),
    /// Remove the snapshots that a policy does not keep
    #[command(after_help = help::PRUNE)]
    Prune(PruneArgs),
    /// Remove one snapshot
    #[command(after_help = help::DELETE)]
    Delete(DeleteArgs),
    /// Pin a snapshot: it stays until it is unpinned, whatever a policy says
    #[command(after_help = help::PIN)]
    Pin(PinOneArgs),
    /// Undo a pin
    #[command(after_help = help::UNPIN)]
    Unpin(UnpinArgs),
    /// Put files back as a snapshot has them
    #[command(after_help = help::RESTORE)]
    Restore(RestoreArgs),
    /// Show a set: its gate, its programs, what it watches
    #[command(after_help = help::STATUS)]
    Status(StatusArgs),
    /// Print the environment that brings programs into a set, for a shell to eval
    #[command(after_help = help::ENV)]
    Env(EnvArgs),
    /// Say what will hold a program or a process, and what would make it better
    #[command(after_help = help::DOCTOR)]
    Doctor(DoctorArgs),
    /// Print what makes a shell complete our commands and flags
    #[command(after_help = help::COMPLETIONS)]
    Completions(CompletionsArgs),
    /// Print the manual, or write the page of every command
    #[command(after_help = help::MAN)]
    Man(ManArgs),
}

/// What a set is; for the commands that start one.
#[derive(Debug, Args)]
pub struct SetArgs {
    /// Name of the set
    #[arg(long, value_name = "N")]
    pub name: Option<String>,
    /// A file or directory to take snapshots of; may be given several times, need not exist yet
    #[arg(long, value_name = "PATH")]
    pub watch: Vec<PathBuf>,
    /// Where the snapshots go [default: .snapshim beside what is watched]
    #[arg(long, value_name = "DIR")]
    pub store: Option<PathBuf>,
    /// A file or directory to leave out; may be given several times
    #[arg(long, value_name = "PATH")]
    pub exclude: Vec<PathBuf>,
    /// Give the gate to this user (name or id)
    #[arg(long, value_name = "USER")]
    pub gate_owner: Option<String>,
    /// Let this group (name or id) use the gate
    #[arg(long, value_name = "GROUP")]
    pub gate_group: Option<String>,
    /// Flush what a stdio call printed whenever it made libc write, so that files end with whole calls
    #[arg(long)]
    pub stdio_records: bool,
    /// What becomes of io_uring
    #[arg(long, value_name = "HOW", default_value = "hold")]
    pub io_uring: Rings,
    /// Have the programs mark which blocks of files they change, so that with --capture
    /// copy-before-write only those are captured, and the rest comes from the snapshot before
    #[arg(long)]
    pub mark_blocks: bool,
    /// The limits of a checkpoint of the set.
    #[command(flatten)]
    pub limits: LimitArgs,
}

impl SetArgs {
    /// What these ask of the set.
    pub fn wanted(&self) -> Result<Wanted> {
        Ok(Wanted {
            roots: self.watch.clone(),
            excludes: self.exclude.clone(),
            store: self.store.clone(),
            max_hold_ms: self.limits.max_hold.map(|d| d.as_millis() as u32),
            policy: self.limits.keep.policy(),
            verify: self.limits.check.verify.wanted(),
            no_digest: self.limits.check.no_digest,
            asks: Asks {
                stdio_records: self.stdio_records,
                refuse_rings: self.io_uring == Rings::Refuse,
                mark_blocks: self.mark_blocks,
            },
            sharing: Sharing {
                owner: self.gate_owner.as_deref().map(user_id).transpose()?,
                group: self.gate_group.as_deref().map(group_id).transpose()?,
            },
        })
    }
}

/// What becomes of io_uring in the programs of a set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Rings {
    /// Submissions wait at the gate; what was submitted before is looked for at the cut
    Hold,
    /// Rings cannot be made (ENOSYS), so that programs use other calls
    Refuse,
}

/// Limits of one checkpoint, or of all of a set that do not say otherwise.
#[derive(Debug, Args)]
pub struct LimitArgs {
    /// Hold no call of a program for longer than this; at most 10s [default: 1s]
    #[arg(long, value_name = "DUR", value_parser = parse_max_hold)]
    pub max_hold: Option<Duration>,
    /// Which snapshots stay.
    #[command(flatten)]
    pub keep: KeepArgs,
    /// What is done with a snapshot before it is published.
    #[command(flatten)]
    pub check: CheckArgs,
}

/// Which snapshots stay; all, unless one of these is given.
#[derive(Debug, Args)]
pub struct KeepArgs {
    /// Keep the last N snapshots (or all); what no --keep flag keeps is removed
    #[arg(long, value_name = "N", help_heading = KEEP)]
    pub keep_last: Option<Count>,
    /// Keep the newest snapshot of each of the last N hours that have one
    #[arg(long, value_name = "N", help_heading = KEEP)]
    pub keep_hourly: Option<Count>,
    /// The same for days
    #[arg(long, value_name = "N", help_heading = KEEP)]
    pub keep_daily: Option<Count>,
    /// The same for weeks
    #[arg(long, value_name = "N", help_heading = KEEP)]
    pub keep_weekly: Option<Count>,
    /// The same for months
    #[arg(long, value_name = "N", help_heading = KEEP)]
    pub keep_monthly: Option<Count>,
    /// The same for years
    #[arg(long, value_name = "N", help_heading = KEEP)]
    pub keep_yearly: Option<Count>,
    /// Keep those at most this much older than the newest: 7d, 1y6mo (units y mo w d h min s)
    #[arg(long, value_name = "SPAN", help_heading = KEEP)]
    pub keep_within: Option<Within>,
    /// Remove old snapshots while less than this is free on the store's file system: 10GiB, 5%
    #[arg(long, value_name = "SIZE", help_heading = KEEP)]
    pub min_free: Option<Room>,
}

/// The heading of [`KeepArgs`] in the help.
const KEEP: &str = "Which snapshots stay";

impl KeepArgs {
    /// The policy these describe.
    pub fn policy(&self) -> Policy {
        Policy {
            last: self.keep_last,
            hourly: self.keep_hourly,
            daily: self.keep_daily,
            weekly: self.keep_weekly,
            monthly: self.keep_monthly,
            yearly: self.keep_yearly,
            within: self.keep_within,
            min_free: self.min_free,
        }
    }
}

/// How a checkpoint is made.
#[derive(Debug, Args)]
pub struct HowArgs {
    /// The point of the program's own work to take the snapshot at: write (between complete
    /// calls), sync, lock, close, rename, idle:200ms, or auto [default: write]
    #[arg(long, value_name = "POINT", value_parser = parse_point)]
    pub at: Option<CommitPoint>,
    /// What to do if that is not reached in time: another point, or fail [default: fail; with
    /// --at auto: write]
    #[arg(long = "else", value_name = "POINT", value_parser = parse_otherwise)]
    pub otherwise: Option<Otherwise>,
    /// By what means.
    #[command(flatten)]
    pub means: MeansArgs,
}

/// By what means a snapshot is made.
#[derive(Debug, Args)]
pub struct MeansArgs {
    /// How the files are captured [default: auto]
    #[arg(long, value_name = "METHOD")]
    pub capture: Option<Capture>,
    /// Capture every file; else one that has not changed since the previous snapshot shares its
    /// copy there (hard link), unless --verify is to run in place
    #[arg(long)]
    pub full: bool,
    /// How programs that the shim cannot hold are stopped meanwhile: ptrace, freezer, sigstop,
    /// several of them to be tried in order (ptrace,freezer), or none [default: ptrace]
    #[arg(long, value_name = "HOW")]
    pub outside: Option<Methods>,
    /// Run this (a line for the shell) before the cut; if it fails, there is none
    #[arg(long, value_name = "CMD")]
    pub before_cut: Option<String>,
    /// Run this after the cut, whatever came of it
    #[arg(long, value_name = "CMD")]
    pub after_cut: Option<String>,
    /// End either of them after this time, as failed [default: 30s]
    #[arg(long, value_name = "DUR", value_parser = parse_interval)]
    pub hook_timeout: Option<Duration>,
}

/// What is known and checked of a snapshot before it is published.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// Leave the files' digests out of the manifest: published sooner, but `snapshim verify`
    /// cannot tell whether the bytes are still the same
    #[arg(long)]
    pub no_digest: bool,
    /// The command the snapshot has to pass.
    #[command(flatten)]
    pub verify: VerifyCommandArgs,
}

/// A command that a snapshot has to pass.
#[derive(Debug, Args)]
pub struct VerifyCommandArgs {
    /// Run this on the snapshot: a program, or a line for the shell with the directory of the
    /// files in $1 and $SNAPSHIM_PATH. If it fails, the snapshot is not verified. "" for none
    #[arg(long, value_name = "CMD")]
    pub verify: Option<String>,
    /// End it after this time, as failed [default: 10m]
    #[arg(long, value_name = "DUR", value_parser = parse_interval, requires = "verify")]
    pub verify_timeout: Option<Duration>,
    /// Run it on a copy of the files, which it may change
    #[arg(long, requires = "verify")]
    pub writable: bool,
}

impl VerifyCommandArgs {
    /// The command and how it is run, if there is one.
    pub fn wanted(&self) -> Option<Verify> {
        let timeout = self.verify_timeout.unwrap_or(command::TIMEOUT);
        let text = self.verify.as_deref().filter(|text| !text.is_empty());
        text.map(|text| Verify {
            command: command::absolute(text),
            timeout_ms: u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX),
            writable: self.writable,
        })
    }
}

impl MeansArgs {
    fn hooks(&self) -> Hooks {
        Hooks {
            before: self.before_cut.clone(),
            after: self.after_cut.clone(),
            timeout: self.hook_timeout.unwrap_or(hooks::TIMEOUT),
        }
    }

    fn method(&self) -> Method {
        match self.capture.unwrap_or_default() {
            Capture::Auto => Method::Auto,
            Capture::Reflink => Method::Reflink,
            Capture::Copy => Method::Copy,
            Capture::CopyBeforeWrite => Method::CopyBeforeWrite,
            Capture::Subvolume => Method::Subvolume,
        }
    }
}

/// A way to capture that can be asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Capture {
    /// Whatever holds programs for the shortest time: reflink where the file system can and it
    /// is quick, of very many files on btrfs a snapshot of the subvolume, else after the cut
    #[default]
    Auto,
    /// Reflink, or fail
    Reflink,
    /// Copy while the program is held
    Copy,
    /// Copy after the cut, while the program goes on; what it is about to change comes first
    CopyBeforeWrite,
    /// A snapshot of the btrfs subvolume while the program is held, and clones of that after it,
    /// or fail
    Subvolume,
}

impl HowArgs {
    /// The flag that was given, if any.
    pub fn given(&self) -> Option<&'static str> {
        let means = &self.means;
        let given = [
            (self.at.is_some(), "--at"),
            (self.otherwise.is_some(), "--else"),
            (means.capture.is_some(), "--capture"),
            (means.full, "--full"),
            (means.outside.is_some(), "--outside"),
            (means.before_cut.is_some(), "--before-cut"),
            (means.after_cut.is_some(), "--after-cut"),
        ];
        given
            .iter()
            .find_map(|(given, flag)| given.then_some(*flag))
    }

    /// What a checkpoint of `set` is asked to do.
    pub fn options(&self, set: &Set, limits: &LimitArgs, wait: Duration) -> Options {
        let usual = Duration::from_millis(set.config.max_hold_ms.into());
        Options {
            at: self.at.unwrap_or(CommitPoint::Write),
            otherwise: self.otherwise.unwrap_or(match self.at {
                Some(CommitPoint::Auto) => Otherwise::At(CommitPoint::Write),
                _ => Otherwise::Fail,
            }),
            wait,
            max_hold: limits.max_hold.unwrap_or(usual),
            capture: self.means.method(),
            outside: self.means.outside.clone().unwrap_or_default(),
            policy: limits.keep.policy().or(&set.config.policy),
            pin: None,
            only: None,
            share: !self.means.full,
            digest: !(limits.check.no_digest || set.config.no_digest),
            verify: match &limits.check.verify.verify {
                Some(_) => limits.check.verify.wanted(),
                None => set.config.verify.clone(),
            },
            hooks: self.means.hooks(),
            doubt: None,
            stop: Stop::default(),
            tally: Tally::default(),
        }
    }
}

/// `--json`.
#[derive(Debug, Args)]
pub struct JsonArgs {
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// `snapshim run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// The set; watches the current directory and is named after the program by default.
    #[command(flatten)]
    pub set: SetArgs,
    /// Take a snapshot this often while the program runs (such as 10s, 5m)
    #[arg(long, value_name = "DUR", value_parser = parse_interval)]
    pub every: Option<Duration>,
    /// How those snapshots are made.
    #[command(flatten)]
    pub how: HowArgs,
    /// What becomes of it if it crashes.
    #[command(flatten)]
    pub crash: CrashArgs,
    /// The program and its arguments
    #[arg(
        required = true,
        trailing_var_arg = true,
        value_names = ["APP", "ARGS"],
        value_hint = ValueHint::CommandWithArguments
    )]
    pub command: Vec<OsString>,
}

/// What becomes of a program that crashes.
#[derive(Debug, Args)]
pub struct CrashArgs {
    /// If the program crashes, put the newest verified snapshot back; what the crash left is
    /// kept as a snapshot. One is taken before the program starts
    #[arg(long)]
    pub restore_on_crash: bool,
    /// If it crashes, start it again; at most N times in a row without a new verified
    /// snapshot [default: 5]
    #[arg(long, value_name = "N", num_args = 0..=1, require_equals = true, default_missing_value = "5")]
    pub restart: Option<u32>,
    /// An exit status that counts as a crash, as an end by a signal does; may be given several times
    #[arg(long, value_name = "STATUS")]
    pub crash_status: Vec<i32>,
}

/// `snapshim checkpoint`.
#[derive(Debug, Args)]
pub struct CheckpointArgs {
    /// The set; may be left out if there is only one
    #[arg(value_name = "N")]
    pub name: Option<String>,
    /// How it is made.
    #[command(flatten)]
    pub how: HowArgs,
    /// Wait this long for another checkpoint of the set, and for the commit point
    #[arg(long, value_name = "DUR", value_parser = parse_duration, default_value = "10s")]
    pub wait: Duration,
    /// Its limits; those of the set by default.
    #[command(flatten)]
    pub limits: LimitArgs,
    /// Take a snapshot of this one file only, and hold no other; it is never `latest`
    #[arg(long, value_name = "PATH")]
    pub only: Option<PathBuf>,
    /// Whether it stays.
    #[command(flatten)]
    pub pin: PinArgs,
    /// Whether for programs.
    #[command(flatten)]
    pub output: JsonArgs,
}

/// `--pin`.
#[derive(Debug, Args)]
pub struct PinArgs {
    /// Pin the snapshot: it stays until it is unpinned, whatever a policy says
    #[arg(
        long = "pin",
        value_name = "NOTE",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = ""
    )]
    pub note: Option<String>,
}

/// `snapshim hold`.
#[derive(Debug, Args)]
#[command(override_usage = "snapshim hold [OPTIONS] [N] -- <CMD> [ARGS]…")]
pub struct HoldArgs {
    /// The set; may be left out if there is only one
    #[arg(value_name = "N")]
    pub name: Option<String>,
    /// How it is held; nothing is captured.
    #[command(flatten)]
    pub how: HowArgs,
    /// Wait this long for another checkpoint of the set, and for the commit point
    #[arg(long, value_name = "DUR", value_parser = parse_duration, default_value = "10s")]
    pub wait: Duration,
    /// Its limits; those of the set by default.
    #[command(flatten)]
    pub limits: LimitArgs,
    /// Whether for programs.
    #[command(flatten)]
    pub output: JsonArgs,
    /// The command, and its arguments
    #[arg(last = true, required = true, value_names = ["CMD", "ARGS"])]
    pub command: Vec<OsString>,
}

/// `snapshim snap`.
#[derive(Debug, Args)]
pub struct SnapArgs {
    /// The files and directories to take a snapshot of
    #[arg(value_name = "PATH", required = true)]
    pub paths: Vec<PathBuf>,
    /// Name the snapshots are kept under [default: the name of the first path]
    #[arg(long, value_name = "N")]
    pub name: Option<String>,
    /// Where the snapshots go [default: .snapshim beside the first path]
    #[arg(long, value_name = "DIR")]
    pub store: Option<PathBuf>,
    /// A file or directory to leave out; may be given several times
    #[arg(long, value_name = "PATH")]
    pub exclude: Vec<PathBuf>,
    /// By what means.
    #[command(flatten)]
    pub means: MeansArgs,
    /// Wait this long for another snapshot of the same name
    #[arg(long, value_name = "DUR", value_parser = parse_duration, default_value = "10s")]
    pub wait: Duration,
    /// Its limits.
    #[command(flatten)]
    pub limits: LimitArgs,
    /// Whether it stays.
    #[command(flatten)]
    pub pin: PinArgs,
    /// Whether for programs.
    #[command(flatten)]
    pub output: JsonArgs,
}

impl SnapArgs {
    /// What these ask for, as of a set.
    pub fn wanted(&self) -> Wanted {
        Wanted {
            roots: self.paths.clone(),
            excludes: self.exclude.clone(),
            store: self.store.clone(),
            max_hold_ms: self.limits.max_hold.map(|d| d.as_millis() as u32),
            policy: self.limits.keep.policy(),
            verify: self.limits.check.verify.wanted(),
            no_digest: self.limits.check.no_digest,
            asks: Asks::default(),
            sharing: Sharing::default(),
        }
    }

    /// How the snapshot is to be made.
    pub fn options(&self, config: &Config) -> Options {
        Options {
            at: CommitPoint::Write,
            otherwise: Otherwise::Fail,
            wait: self.wait,
            max_hold: Duration::from_millis(config.max_hold_ms.into()),
            capture: self.means.method(),
            outside: self.means.outside.clone().unwrap_or_default(),
            policy: config.policy.clone(),
            pin: self.pin.note.clone(),
            only: None,
            share: !self.means.full,
            digest: !config.no_digest,
            verify: config.verify.clone(),
            hooks: self.means.hooks(),
            doubt: None,
            stop: Stop::default(),
            tally: Tally::default(),
        }
    }
}

/// `snapshim list`.
#[derive(Debug, Args)]
pub struct ListArgs {
    /// The set; may be left out if there is only one
    #[arg(value_name = "N")]
    pub name: Option<String>,
    /// Where its snapshots are, if the set is no longer known
    #[arg(long, value_name = "DIR")]
    pub store: Option<PathBuf>,
    /// Whether for programs.
    #[command(flatten)]
    pub output: JsonArgs,
}

/// `snapshim show`.
#[derive(Debug, Args)]
#[command(override_usage = "snapshim show [OPTIONS] [N] <ID>[:<PATH>]")]
pub struct ShowArgs {
    /// The set, which may be left out if there is only one, and the snapshot: its id, the
    /// beginning of it, or latest; ~1 behind it is the one before. With :PATH the file or
    /// directory that had this path: a file's bytes, a directory's entries, a link's target
    #[arg(value_name = "[N] ID[:PATH]", required = true, num_args = 1..=2)]
    pub names: Vec<OsString>,
    /// Where the snapshots of the set are, if the set is no longer known
    #[arg(long, value_name = "DIR")]
    pub store: Option<PathBuf>,
    /// Whether for programs.
    #[command(flatten)]
    pub output: JsonArgs,
}

/// `snapshim diff`.
#[derive(Debug, Args)]
#[command(override_usage = "snapshim diff [OPTIONS] [N] <A>[:<PATH>] [<B>]")]
pub struct DiffArgs {
    /// The set, which may be left out if there is only one, and one or two of its snapshots,
    /// as in show. Without B, A is compared with the live files. Of two names the first is A
    /// if it is a snapshot, else the set
    #[arg(value_name = "[N] A[:PATH] [B]", required = true, num_args = 1..=3)]
    pub names: Vec<OsString>,
    /// Compare with the live files: the last name is A
    #[arg(long)]
    pub live: bool,
    /// Compare only this file or directory; may be given several times
    #[arg(long, value_name = "PATH")]
    pub path: Vec<PathBuf>,
    /// Print where the bytes of changed files differ, as offset+length
    #[arg(long)]
    pub ranges: bool,
    /// Print changed text files as a patch
    #[arg(short = 'u', long, conflicts_with_all = ["json", "ranges"])]
    pub patch: bool,
    /// End with 1 if anything differs
    #[arg(long)]
    pub exit_code: bool,
    /// Where the snapshots of the set are, if the set is no longer known
    #[arg(long, value_name = "DIR")]
    pub store: Option<PathBuf>,
    /// Whether for programs.
    #[command(flatten)]
    pub output: JsonArgs,
}

/// One snapshot.
#[derive(Debug, Args)]
pub struct TargetArgs {
    /// The set, which may be left out if there is only one, and the snapshot: its id, the
    /// beginning of it, or latest; ~1 behind it is the one before
    #[arg(value_name = "[N] ID", required = true, num_args = 1..=2)]
    pub names: Vec<String>,
    /// Where the snapshots of the set are, if the set is no longer known
    #[arg(long, value_name = "DIR")]
    pub store: Option<PathBuf>,
}

impl TargetArgs {
    /// The set's name, if given, and the snapshot's id.
    pub fn set_and_id(&self) -> (Option<&str>, &str) {
        match self.names.as_slice() {
            [name, id, ..] => (Some(name), id),
            [id] => (None, id),
            [] => (None, ""),
        }
    }
}

/// `snapshim verify`.
#[derive(Debug, Args)]
#[command(override_usage = "snapshim verify [OPTIONS] [N] [ID]")]
pub struct VerifyArgs {
    /// The set, which may be left out if there is only one, and the snapshot: its id, the
    /// beginning of it, or latest [default: latest]. A single word of digits is an id
    #[arg(value_name = "[N] [ID]", num_args = 0..=2)]
    pub names: Vec<String>,
    /// Where the snapshots of the set are, if the set is no longer known
    #[arg(long, value_name = "DIR")]
    pub store: Option<PathBuf>,
    /// Check every snapshot of the set, at low I/O priority
    #[arg(long)]
    pub all: bool,
    /// Compare everything but the files' bytes
    #[arg(long)]
    pub quick: bool,
    /// A command they have to pass as well.
    #[command(flatten)]
    pub command: VerifyCommandArgs,
    /// Whether for programs.
    #[command(flatten)]
    pub output: JsonArgs,
}

impl VerifyArgs {
    /// The set's name and the snapshot's id, as far as given.
    pub fn set_and_id(&self) -> (Option<&str>, Option<&str>) {
        let is_id = |word: &str| {
            word == "latest"
                || word
                    .bytes()
                    .all(|b| b.is_ascii_digit() || b"T.Z".contains(&b))
        };
        match self.names.as_slice() {
            [name, id, ..] => (Some(name), Some(id)),
            [id] if is_id(id) && !self.all => (None, Some(id)),
            [name] => (Some(name), None),
            [] => (None, None),
        }
    }
}

/// `snapshim prune`.
#[derive(Debug, Args)]
pub struct PruneArgs {
    /// The set; may be left out if there is only one
    #[arg(value_name = "N")]
    pub name: Option<String>,
    /// Where its snapshots are, if the set is no longer known
    #[arg(long, value_name = "DIR")]
    pub store: Option<PathBuf>,
    /// The policy; that of the set by default.
    #[command(flatten)]
    pub keep: KeepArgs,
    /// Remove nothing, only say what would be
    #[arg(short = 'n', long)]
    pub dry_run: bool,
    /// Whether for programs.
    #[command(flatten)]
    pub output: JsonArgs,
}

/// `snapshim delete`.
#[derive(Debug, Args)]
#[command(override_usage = "snapshim delete [OPTIONS] [N] <ID>")]
pub struct DeleteArgs {
    /// Which one.
    #[command(flatten)]
    pub target: TargetArgs,
    /// Whether for programs.
    #[command(flatten)]
    pub output: JsonArgs,
}

/// `snapshim pin`.
#[derive(Debug, Args)]
#[command(override_usage = "snapshim pin [OPTIONS] [N] <ID>")]
pub struct PinOneArgs {
    /// Which one.
    #[command(flatten)]
    pub target: TargetArgs,
    /// Why, in your words
    #[arg(
        long,
        value_name = "TEXT",
        default_value = "",
        hide_default_value = true
    )]
    pub note: String,
    /// Whether for programs.
    #[command(flatten)]
    pub output: JsonArgs,
}

/// `snapshim unpin`.
#[derive(Debug, Args)]
#[command(override_usage = "snapshim unpin [OPTIONS] [N] <ID>")]
pub struct UnpinArgs {
    /// Which one.
    #[command(flatten)]
    pub target: TargetArgs,
    /// Whether for programs.
    #[command(flatten)]
    pub output: JsonArgs,
}

/// `snapshim restore`.
#[derive(Debug, Args)]
#[command(
    override_usage = "snapshim restore [OPTIONS] [N] <ID[:PATH]> <--to <DIR>|--in-place>\n       \
                      snapshim restore --undo [OPTIONS] [N]",
    group = ArgGroup::new("where").required(true).args(["to", "in_place", "undo"])
)]
pub struct RestoreArgs {
    /// The set, which may be left out if there is only one, and the snapshot: its id, the
    /// beginning of it, or latest; with :PATH, only that file or directory of it
    #[arg(value_name = "[N] ID[:PATH]", required_unless_present = "undo", num_args = 1..=2)]
    pub names: Vec<OsString>,
    /// Restore into this directory, which is made if absent: files with their absolute paths,
    /// or, with ID:PATH, what is in PATH directly
    #[arg(long, value_name = "DIR")]
    pub to: Option<PathBuf>,
    /// Restore where the files were, exactly: what is not in the snapshot is removed
    #[arg(long)]
    pub in_place: bool,
    /// Put back what a restore replaced that was interrupted, or run with --keep-replaced
    #[arg(long, conflicts_with_all = ["overwrite", "keep_replaced"])]
    pub undo: bool,
    /// Only this file or directory; may be given several times. With --undo, what was restored
    #[arg(long, value_name = "PATH")]
    pub path: Vec<PathBuf>,
    /// Say what would be done, and change nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Also if a process has files open for writing that are replaced
    #[arg(long)]
    pub force: bool,
    /// With --to: into a directory that is not empty, too; what is in the way is replaced
    #[arg(long, requires = "to")]
    pub overwrite: bool,
    /// Keep what is replaced, so that --undo can put it back
    #[arg(long)]
    pub keep_replaced: bool,
    /// Where the snapshots of the set are, if the set is no longer known
    #[arg(long, value_name = "DIR")]
    pub store: Option<PathBuf>,
    /// Whether for programs.
    #[command(flatten)]
    pub output: JsonArgs,
}

/// `snapshim status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// The set; may be left out if there is only one
    #[arg(value_name = "N")]
    pub name: Option<String>,
    /// Whether for programs.
    #[command(flatten)]
    pub output: JsonArgs,
}

/// `snapshim env`.
#[derive(Debug, Args)]
pub struct EnvArgs {
    /// The set; named after the first path it watches by default.
    #[command(flatten)]
    pub set: SetArgs,
    /// Whether for programs.
    #[command(flatten)]
    pub output: JsonArgs,
}

/// `snapshim doctor`.
#[derive(Debug, Args)]
#[command(override_usage = "snapshim doctor [OPTIONS] (<PID>… | -- <APP> [ARGS]…)")]
pub struct DoctorArgs {
    /// Processes to look at
    #[arg(value_name = "PID")]
    pub pids: Vec<u32>,
    /// Say also what the file system of this path offers; may be given several times
    #[arg(long, value_name = "PATH")]
    pub watch: Vec<PathBuf>,
    /// Whether for programs.
    #[command(flatten)]
    pub output: JsonArgs,
    /// The program to look at, and its arguments
    #[arg(last = true, value_names = ["APP", "ARGS"])]
    pub command: Vec<OsString>,
}

/// `snapshim completions`.
#[derive(Debug, Args)]
pub struct CompletionsArgs {
    /// The shell
    #[arg(value_name = "SHELL")]
    pub shell: Shell,
}

/// `snapshim man`.
#[derive(Debug, Args)]
pub struct ManArgs {
    /// Write a page for each command into this directory, which is made if it is not there
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
}

/// Parses a duration: numbers with units, such as `200ms`, `1.5s`, `1m30s`.
pub fn parse_duration(text: &str) -> std::result::Result<Duration, String> {
    const UNITS: [(&str, f64); 6] = [
        ("us", 1e-6),
        ("ms", 1e-3),
        ("s", 1.0),
        ("m", 60.0),
        ("h", 3600.0),
        ("d", 86400.0),
    ];
    let wrong = || "say a number and a unit: 200ms, 5s, 2m, 1h".to_owned();
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    let mut seconds = 0.0;
    let mut rest = text;
    loop {
        let digits = rest
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .ok_or_else(wrong)?;
        let (number, after) = rest.split_at(digits);
        let letters = after
            .find(|c: char| !c.is_ascii_alphabetic())
            .unwrap_or(after.len());
        let (unit, after) = after.split_at(letters);
        let number: f64 = number.parse().map_err(|_| wrong())?;
        let (_, scale) = UNITS
            .iter()
            .find(|(name, _)| *name == unit)
            .ok_or_else(wrong)?;
        seconds += number * scale;
        if after.is_empty() {
            break;
        }
        rest = after;
    }
    // Longer than anybody waits; keeps later sums in range.
    const LONGEST: f64 = 366.0 * 86400.0;
    if !(0.0..=LONGEST).contains(&seconds) {
        return Err("that is more than a year".into());
    }
    Duration::try_from_secs_f64(seconds).map_err(|_| wrong())
}

fn parse_max_hold(text: &str) -> std::result::Result<Duration, String> {
    let duration = parse_duration(text)?;
    let most = Duration::from_millis(MAX_HOLD_BOUND_MS.into());
    if duration > most {
        return Err(format!(
            "no program is held for longer than {}s",
            most.as_secs()
        ));
    }
    if duration < Duration::from_millis(1) {
        let usual = DEFAULT_HOLD_BOUND_MS;
        return Err(format!(
            "it must be at least 1ms (the default is {usual}ms)"
        ));
    }
    Ok(duration)
}

fn parse_interval(text: &str) -> std::result::Result<Duration, String> {
    match parse_duration(text)? {
        short if short < Duration::from_millis(1) => Err("it must be at least 1ms".into()),
        interval => Ok(interval),
    }
}

fn parse_point(text: &str) -> std::result::Result<CommitPoint, String> {
    text.parse()
}

fn parse_otherwise(text: &str) -> std::result::Result<Otherwise, String> {
    text.parse()
}

/// The id of a user given by name or id.
fn user_id(text: &str) -> Result<u32> {
    match text.parse() {
        Ok(id) => Ok(id),
        Err(_) => match User::from_name(text) {
            Ok(Some(user)) => Ok(user.uid.as_raw()),
            _ => Err(usage(
                format!("there is no user {text:?}"),
                "give --gate-owner a user's name or id",
            )),
        },
    }
}

/// The id of a group given by name or id.
fn group_id(text: &str) -> Result<u32> {
    match text.parse() {
        Ok(id) => Ok(id),
        Err(_) => match Group::from_name(text) {
            Ok(Some(group)) => Ok(group.gid.as_raw()),
            _ => Err(usage(
                format!("there is no group {text:?}"),
                "give --gate-group a group's name or id",
            )),
        },
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    /// The words of a command, as a shell takes them; up to what explains it, or what only a
    /// shell takes.
    fn words(line: &str) -> Vec<String> {
        let (mut words, mut word, mut is_quoted) = (Vec::new(), String::new(), false);
        for c in line.chars() {
            match c {
                '\'' => is_quoted = !is_quoted,
                ' ' if !is_quoted => words.extend(Some(std::mem::take(&mut word))),
                '#' | '|' | '>' | ')' if !is_quoted => break,
                c => word.push(c),
            }
        }
        words.extend(Some(word));
        words.retain(|word| !word.is_empty());
        words
    }

    #[test]
    fn every_command_has_an_example_that_parses() {
        let mut command = Cli::command();
        command.build();
        for command in command.get_subcommands().filter(|c| c.get_name() != "help") {
            let name = command.get_name();
            let help = command.get_after_help().map(ToString::to_string);
            let help = help.unwrap_or_else(|| panic!("{name} has no example"));
            let mut examples = 0;
            for line in help.lines() {
                let Some(start) = line.find("snapshim ") else {
                    continue;
                };
                let words = words(&line[start..]);
                Cli::try_parse_from(words).unwrap_or_else(|e| panic!("{line}: {e}"));
                examples += 1;
            }
            assert!(examples > 0, "{name} has no example");
        }
    }

    #[test]
    fn every_argument_says_what_it_is_for() {
        let mut command = Cli::command();
        command.build();
        for command in command.get_subcommands().filter(|c| c.get_name() != "help") {
            for argument in command.get_arguments() {
                let name = command.get_name();
                assert!(argument.get_help().is_some(), "{name} {argument}");
            }
        }
    }

    #[test]
    fn durations() {
        let ms = |n| Ok(Duration::from_millis(n));
        for (text, expected) in [
            ("5s", ms(5_000)),
            ("200ms", ms(200)),
            ("2m", ms(120_000)),
            ("1m30s", ms(90_000)),
            ("1.5s", ms(1_500)),
            ("0", ms(0)),
            ("250us", Ok(Duration::from_micros(250))),
        ] {
            assert_eq!(parse_duration(text), expected, "{text}");
        }
        for text in [
            "", "5", "s", "5 s", "-1s", "1e3s", "5x", "..s", "1m30", "9999999d", "NaNs", "5s ",
        ] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
        assert!(parse_max_hold("10s").is_ok());
        assert!(parse_max_hold("10.001s").is_err());
        assert!(parse_max_hold("0").is_err());
    }

    fn command_of(arguments: &[&str]) -> Vec<OsString> {
        match Cli::try_parse_from(arguments).map(|cli| cli.command) {
            Ok(Command::Run(run)) => run.command,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn global_flags_stand_before_and_behind_the_command() {
        for arguments in [
            &["snapshim", "-q", "--color", "never", "list"][..],
            &["snapshim", "list", "--quiet", "--color=never"],
            &["snapshim", "-q", "list", "--color=never", "set"],
        ] {
            let global = Cli::try_parse_from(arguments).unwrap().global;
            assert!(global.quiet && !global.verbose, "{arguments:?}");
            assert_eq!(global.color, clap::ColorChoice::Never, "{arguments:?}");
        }
        for arguments in [
            &["snapshim", "-q", "-v", "list"][..],
            &["snapshim", "list", "-qv"],
            &["snapshim", "list", "--color", "sometimes"],
        ] {
            assert!(Cli::try_parse_from(arguments).is_err(), "{arguments:?}");
        }
    }

    #[test]
    fn global_flags_behind_the_program_are_the_programs() {
        let arguments = [
            "snapshim", "run", "-v", "app", "-q", "--color", "always", "-v",
        ];
        let cli = Cli::try_parse_from(arguments).unwrap();
        assert!(cli.global.verbose && !cli.global.quiet);
        assert_eq!(cli.global.color, clap::ColorChoice::Auto);
        assert_eq!(
            command_of(&arguments),
            ["app", "-q", "--color", "always", "-v"]
        );
        let doctor = ["snapshim", "doctor", "--", "app", "-q"];
        assert!(!Cli::try_parse_from(doctor).unwrap().global.quiet);
    }

    #[test]
    fn what_follows_the_program_is_the_programs() {
        for arguments in [
            &["snapshim", "run", "--", "app", "--watch", "x", "--", "-y"][..],
            &["snapshim", "run", "app", "--watch", "x", "--", "-y"],
        ] {
            assert_eq!(command_of(arguments), ["app", "--watch", "x", "--", "-y"]);
        }
        assert_eq!(command_of(&["snapshim", "run", "--", "--odd"]), ["--odd"]);
        assert!(Cli::try_parse_from(["snapshim", "run", "--wach", "x", "app"]).is_err());
        assert!(Cli::try_parse_from(["snapshim", "run"]).is_err());
    }
}
