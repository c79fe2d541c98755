//! The programs whose files are copied, and their files.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::check::{self, BLOCK};
use super::control::Control;
use super::disk;
use super::pgbench;
use crate::{Fs, Lab, Proc, Random, process, product};

/// What is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Workload {
    /// Random blocks of 4 KiB of one file.
    Pages,
    /// Records in 16 files, one after the other.
    Ordered,
    /// The same in 10 of 10,000 small files.
    Many,
    /// The same in 10 files, which are all there are.
    Few,
    /// A log and its index.
    Log,
    /// Transactions of SQLite, with a rollback journal.
    Sqlite,
    /// pgbench on PostgreSQL.
    Pgbench,
}

/// All of them.
pub const ALL: [Workload; 7] = [
    Workload::Pages,
    Workload::Ordered,
    Workload::Many,
    Workload::Few,
    Workload::Log,
    Workload::Sqlite,
    Workload::Pgbench,
];

/// Files of [`Workload::Many`] that do not change, in directories of a hundred.
const STILL: usize = 9_990;

/// What the file is like when it is copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// In one piece, and on the device.
    Clean,
    /// In one piece, an eighth of its blocks changed since they were on the device.
    Dirty,
    /// The same, in pieces of 64 KiB.
    Fragmented,
}

impl State {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            State::Clean => "clean",
            State::Dirty => "dirty",
            State::Fragmented => "dirty and fragmented",
        }
    }
}

impl Workload {
    /// Its name on the command line and in tables.
    pub fn name(self) -> &'static str {
        match self {
            Workload::Pages => "pages",
            Workload::Ordered => "ordered",
            Workload::Many => "many",
            Workload::Few => "few",
            Workload::Log => "log",
            Workload::Sqlite => "sqlite",
            Workload::Pgbench => "pgbench",
        }
    }

    /// What it is, for the report.
    pub fn describe(self) -> &'static str {
        match self {
            Workload::Pages => "random blocks of 4 KiB of one file",
            Workload::Ordered => {
                "records of 4 KiB in 16 files of 1 MiB, each in one file after the other"
            }
            Workload::Many => "the same in 10 of 10,000 files of 4 KiB",
            Workload::Few => "the same in 10 files, which are all there are",
            Workload::Log => "a log of records, and an index of them",
            Workload::Sqlite => "SQLite with a rollback journal, a transaction a call",
            Workload::Pgbench => "PostgreSQL under pgbench, 2 clients, a transaction a call",
        }
    }

    /// Calls a second.
    pub fn rate(self) -> u64 {
        match self {
            Workload::Pages => 3_000,
            // Faster than a copy goes from file to file.
            Workload::Ordered | Workload::Many | Workload::Few => 20_000,
            Workload::Log => 10_000,
            Workload::Sqlite => 100,
            Workload::Pgbench => 200,
        }
    }

    /// Files that records go to, and records in each: the copy of a MiB gives the writer time
    /// to be elsewhere.
    fn files(self) -> (usize, usize) {
        if self == Workload::Ordered {
            (16, 256)
        } else {
            (10, 1)
        }
    }

    /// Whether it can run here; if not, why.
    pub fn missing(self) -> Option<String> {
        let needs: &[&str] = match self {
            Workload::Sqlite => &["python3", "sqlite3"],
            Workload::Pgbench => &["initdb", "pg_ctl", "pgbench", "psql", "runuser"],
            _ => &[],
        };
        let absent = |name: &&&str| !process::installed(name) && !pgbench::has(name);
        needs
            .iter()
            .find(absent)
            .map(|name| format!("no {name} is installed"))
    }

    /// Whether `dir`, a copy of the directory of data, could be of one instant.
    pub fn is_consistent(self, lab: &Lab, dir: &Path) -> bool {
        match self {
            Workload::Pages => check::pages(&dir.join("pages"), SEED),
            Workload::Ordered | Workload::Many | Workload::Few => {
                check::ordered(dir, self.files().0, self.files().1)
            }
            Workload::Log => check::log(dir),
            Workload::Sqlite => check::sqlite(dir, &lab.shm().join("opened")),
            Workload::Pgbench => pgbench::check(lab, dir),
        }
    }

    /// Makes what the writer expects to be there.
    fn prepare(self, lab: &Lab, dir: &Path, state: State, mib: u64) {
        match self {
            Workload::Pages => lay_out(&dir.join("pages"), mib << 20, state),
            Workload::Many => {
                for index in 0..STILL {
                    let parent = dir.join(format!("d{:03}", index / 100));
                    if index % 100 == 0 {
                        fs::create_dir(&parent).expect("a directory");
                    }
                    let byte = index as u8;
                    fs::write(parent.join(format!("s{index:05}")), vec![byte; 4096])
                        .expect("a small file");
                }
            }
            Workload::Pgbench => pgbench::prepare(lab, dir),
            _ => {}
        }
    }

    fn command(self, control: &Path, dir: &Path) -> (PathBuf, Vec<String>) {
        let text = |path: &Path| path.to_str().expect("UTF-8 path").to_owned();
        let with = |mode: &str, at: &Path, last: &[String]| {
            let mut args = vec![text(control), mode.to_owned(), text(at)];
            args.extend_from_slice(last);
            (product::program("paced"), args)
        };
        match self {
            Workload::Pages => with("pages", &dir.join("pages"), &[SEED.to_string()]),
            Workload::Ordered | Workload::Many | Workload::Few => {
                let (files, lanes) = self.files();
                with("ordered", dir, &[files.to_string(), lanes.to_string()])
            }
            Workload::Log => with("log", dir, &[]),
            Workload::Sqlite => {
                let script = text(&product::sources().join("paced.py"));
                let args = vec![script, text(control), text(&dir.join("app.db"))];
                ("/usr/bin/python3".into(), args)
            }
            Workload::Pgbench => pgbench::server(dir),
        }
    }
}

/// Of the order in which [`Workload::Pages`] writes its blocks.
const SEED: u64 = 12_345;

/// A file of blocks that were never written to, in one piece or in pieces of 64 KiB.
fn lay_out(path: &Path, bytes: u64, state: State) {
    const PIECE: u64 = 64 << 10;
    let file = File::create(path).expect("the file of blocks");
    file.set_len(bytes).expect("its size");
    let mut order: Vec<u64> = (0..bytes / PIECE).collect();
    let fragmented = state == State::Fragmented;
    if fragmented {
        let mut random = Random(1);
        for index in (1..order.len()).rev() {
            order.swap(index, random.below(index as u64 + 1) as usize);
        }
    }
    let mut piece = Vec::with_capacity(PIECE as usize);
    for (count, index) in order.into_iter().enumerate() {
        piece.clear();
        let first = index * PIECE / BLOCK as u64;
        for page in first..first + PIECE / BLOCK as u64 {
            piece.extend((0..BLOCK / 8).flat_map(|i| check::untouched(page, i).to_le_bytes()));
        }
        file.write_all_at(&piece, index * PIECE).expect("a piece");
        // What is allocated together lies together; so these are allocated apart.
        if fragmented && count % 16 == 15 {
            file.sync_data().expect("fdatasync");
        }
    }
    file.sync_all().expect("fsync");
}

/// A running writer, which pauses when nothing is measured.
#[derive(Debug)]
pub struct Session {
    /// What it writes.
    pub workload: Workload,
    /// Its directory of data.
    pub data: PathBuf,
    /// Whether it runs under `snapshim run`.
    pub gated: bool,
    /// Where its figures are.
    pub control: Control,
    clients: Option<pgbench::Clients>,
    proc: Proc,
}

impl Session {
    /// Starts one with files of its own, under `snapshim run` or not.
    pub fn start(
        lab: &Lab,
        fs: Fs,
        workload: Workload,
        gated: bool,
        state: State,
        mib: u64,
    ) -> Session {
        let data = if gated {
            lab.data()
        } else {
            lab.beside("plain")
        };
        let _ = fs::remove_dir_all(&data);
        if fs == Fs::Btrfs {
            // What `btrfs subvolume snapshot` can take.
            process::tool(
                "btrfs",
                &["-q", "subvolume", "create", data.to_str().expect("UTF-8")],
            );
        } else {
            fs::create_dir_all(&data).expect("a directory of data");
        }
        workload.prepare(lab, &data, state, mib);
        let control = Control::create(&lab.shm().join(if gated { "gated" } else { "plain" }));
        let (program, args) = workload.command(control.path(), &data);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let mut proc = if gated {
            let mut options = Vec::new();
            if workload == Workload::Pgbench {
                options.extend(["--gate-owner", pgbench::USER]);
            }
            lab.run(&options, &program, &args)
        } else {
            let mut command: Command = lab.command(&program);
            command.args(&args);
            Proc::piped(command)
        };
        let clients = (workload == Workload::Pgbench).then(|| pgbench::Clients::new(lab, &data));
        let limit = Duration::from_secs(60);
        let ready = process::wait_until(limit, || {
            !proc.is_running()
                || clients
                    .as_ref()
                    .map_or_else(|| control.writer().is_some(), pgbench::Clients::is_up)
        });
        if !ready || !proc.is_running() {
            let ended = proc.wait(Duration::from_secs(1));
            panic!("the writer does not start: {}{}", ended.out(), ended.err());
        }
        Session {
            workload,
            data,
            gated,
            control,
            clients,
            proc,
        }
    }

    /// The processes that write, for whoever stops them.
    pub fn writers(&self) -> Vec<i32> {
        match self.workload {
            Workload::Pgbench => {
                let mut pids = process::descendants(self.proc.pid());
                pids.push(self.proc.pid());
                pids.retain(|pid| process::name(*pid) == "postgres");
                pids
            }
            _ => self.control.writer().into_iter().collect(),
        }
    }

    /// Puts the files in the state they are to be copied in; the writer is paused.
    pub fn bring_to(&self, state: State) {
        if self.workload == Workload::Pages && state != State::Clean {
            let blocks = disk::size(&self.data.join("pages")) / BLOCK as u64;
            let done = self.control.burst(blocks / 8, Duration::from_secs(60));
            assert!(done, "the writer does not write");
        } else {
            disk::sync(&self.data);
        }
    }

    /// Lets it write, `rate` calls a second, or as many as it can for 0.
    pub fn go(&mut self, rate: u64) {
        match &mut self.clients {
            Some(clients) => clients.start(rate),
            None => self.control.go(rate),
        }
    }

    /// Waits for all calls that were due before `ns`, and pauses it.
    pub fn pause(&mut self, ns: u64) {
        // A machine that keeps a writer from one call for that long is broken.
        let limit = Duration::from_secs(60);
        let done = match &mut self.clients {
            Some(clients) => clients.end(&self.control),
            None => self.control.wait_for(ns, limit) && self.control.pause(limit),
        };
        assert!(
            done,
            "the writer of {} makes no calls (running: {})\n{}",
            self.workload.name(),
            self.proc.is_running(),
            process::describe(self.proc.pid())
        );
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.control.end();
        if let Some(clients) = &mut self.clients {
            clients.stop_server();
        }
        let limit = Duration::from_secs(10);
        process::wait_until(limit, || !self.proc.is_running());
        self.proc.end();
    }
}
