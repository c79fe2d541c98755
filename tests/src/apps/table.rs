//! The applications.

use std::path::Path;

use crate::Fs;
use crate::process::installed;

/// One row of the matrix.
#[derive(Clone, Copy, Debug)]
pub struct Application {
    /// By which it is asked for.
    pub name: &'static str,
    /// For readers.
    pub title: &'static str,
    /// Whether a snapshot that fails is a bug of ours; else it is reported as found.
    pub is_bar: bool,
    /// The script in `programs/apps`, and its mode.
    pub script: (&'static str, &'static str),
    /// What the load does.
    pub load: &'static str,
    /// What checks a copy besides the invariants: the program's own checker.
    pub checker: &'static str,
    /// Snapshots in the full run.
    pub full: usize,
    /// Who runs it, if it refuses to be root.
    pub user: Option<&'static str>,
    /// What must be installed: a program or a file, and the Debian package it is in.
    pub needs: &'static [(&'static str, &'static str)],
    /// Asks for its version.
    pub version: &'static str,
    /// Where.
    pub fs: Fs,
}

/// What a row has unless it says otherwise.
const PLAIN: Application = Application {
    name: "",
    title: "",
    is_bar: false,
    script: ("", ""),
    load: "",
    checker: "",
    full: 100,
    user: None,
    needs: &[],
    version: "",
    fs: Fs::Xfs,
};

const SQLITE: Application = Application {
    is_bar: true,
    load: "4 processes, transfers between accounts in transactions of six statements",
    checker: "`pragma integrity_check`",
    full: 1000,
    needs: &[("/usr/lib/python3.11/sqlite3", "python3")],
    version: "/usr/bin/python3 -c 'import sqlite3; print(\"SQLite\", sqlite3.sqlite_version)'",
    ..PLAIN
};

const LMDB: Application = Application {
    load: "3 processes, transfers over three databases",
    checker: "`mdb_stat -ef -a`, `mdb_dump -a`",
    needs: &[
        ("/usr/lib/python3/dist-packages/lmdb", "python3-lmdb"),
        ("mdb_stat", "lmdb-utils"),
    ],
    version: "/usr/bin/python3 -c 'import lmdb; print(\"LMDB %d.%d.%d\" % lmdb.version())'",
    ..PLAIN
};

const GDBM: Application = Application {
    checker: "`gdbm_avail_verify`, `gdbm_count` and all keys",
    needs: &[("/usr/lib/x86_64-linux-gnu/libgdbm.so.6", "libgdbm6")],
    version: "dpkg-query -W -f 'gdbm ${Version}' libgdbm6",
    ..PLAIN
};

const REDIS: Application = Application {
    is_bar: true,
    needs: &[("redis-server", "redis-server")],
    version: "redis-server --version | sed 's/.*v=\\([^ ]*\\).*/Redis \\1/'",
    ..PLAIN
};

const MAIL: Application = Application {
    checker: "Python's `mailbox`, a digest in each message",
    version: "/usr/bin/python3 --version",
    ..PLAIN
};

const JSON: Application = Application {
    load: "a document of 50 KB, saved after each update",
    checker: "Python's `json`",
    version: "/usr/bin/python3 --version",
    ..PLAIN
};

/// All of them, in the order of the table.
pub const ALL: &[Application] = &[
    Application {
        name: "sqlite-rollback",
        title: "SQLite, rollback journal",
        script: ("sqlite", "rollback"),
        ..SQLITE
    },
    Application {
        name: "sqlite-wal",
        title: "SQLite, WAL",
        script: ("sqlite", "wal"),
        ..SQLITE
    },
    Application {
        name: "lmdb",
        title: "LMDB",
        is_bar: true,
        script: ("lmdb_", ""),
        ..LMDB
    },
    Application {
        name: "gdbm",
        title: "gdbm, opened for each update",
        is_bar: true,
        script: ("gdbm", "turns"),
        load: "3 processes in turn: open, an update of seven keys, close",
        ..GDBM
    },
    Application {
        name: "gdbm-nommap",
        title: "gdbm, kept open, GDBM_NOMMAP",
        is_bar: true,
        script: ("gdbm", "nommap"),
        load: "an update of seven keys, `gdbm_sync`",
        ..GDBM
    },
    Application {
        name: "redis-aof",
        title: "Redis, AOF, `appendfsync always`",
        script: ("redis", "aof"),
        load: "3 clients, MULTI … EXEC of six commands; rewrites of the AOF meanwhile",
        checker: "`redis-check-aof`, a start",
        ..REDIS
    },
    Application {
        name: "redis-everysec",
        title: "Redis, AOF, `everysec`",
        script: ("redis", "everysec"),
        load: "3 clients, MULTI … EXEC of six commands; rewrites of the AOF meanwhile",
        checker: "`redis-check-aof`, a start",
        ..REDIS
    },
    Application {
        name: "redis-rdb",
        title: "Redis, RDB",
        script: ("redis", "rdb"),
        load: "3 clients, MULTI … EXEC of six commands; a dump each second",
        checker: "`redis-check-rdb`, a start",
        ..REDIS
    },
    Application {
        name: "postgresql",
        title: "PostgreSQL",
        is_bar: true,
        script: ("postgresql", ""),
        load: "pgbench, 4 clients, 150 transactions a second; a checkpoint every 30 s or 64 MB",
        checker: "recovery, `pg_amcheck --heapallindexed`, page checksums",
        user: Some("postgres"),
        needs: &[("psql", "postgresql")],
        version: "psql --version | sed 's/psql (PostgreSQL)/PostgreSQL/; s/ (.*//'",
        ..PLAIN
    },
    Application {
        name: "sqlite-mmap",
        title: "SQLite, WAL, `mmap_size`",
        is_bar: false,
        script: ("sqlite", "mmap"),
        ..SQLITE
    },
    Application {
        name: "lmdb-writemap",
        title: "LMDB, WRITEMAP",
        script: ("lmdb_", "writemap"),
        ..LMDB
    },
    Application {
        name: "gdbm-mmap",
        title: "gdbm, kept open, as it comes",
        script: ("gdbm", "mmap"),
        load: "an update of seven keys, `gdbm_sync`",
        ..GDBM
    },
    Application {
        name: "berkeley-db",
        title: "Berkeley DB, transactions",
        script: ("berkeley", ""),
        load: "3 processes, transfers over three tables, a checkpoint every 200",
        checker: "recovery, `db_verify`",
        needs: &[
            ("/usr/lib/python3/dist-packages/bsddb3", "python3-bsddb3"),
            ("db5.3_verify", "db5.3-util"),
        ],
        version: "/usr/bin/python3 -c 'from bsddb3 import db; print(\"Berkeley DB %d.%d.%d\" % db.version())'",
        ..PLAIN
    },
    Application {
        name: "mariadb",
        title: "MariaDB, InnoDB",
        script: ("mariadb", ""),
        load: "3 connections, transfers in transactions of four statements",
        checker: "recovery, `mariadb-check --extended`, `check table … extended`",
        needs: &[("mariadbd", "mariadb-server")],
        version: "mariadbd --version | sed 's/.*Ver \\([0-9.]*\\).*/MariaDB \\1/'",
        ..PLAIN
    },
    Application {
        name: "rocksdb",
        title: "RocksDB",
        script: ("rocksdb", ""),
        load: "2 threads, batches of six, synced; tables written and merged meanwhile",
        checker: "`ldb checkconsistency`, `sst_dump --command=verify`, all keys",
        needs: &[("ldb", "rocksdb-tools")],
        version: "dpkg-query -W -f 'RocksDB ${Version}' rocksdb-tools",
        ..PLAIN
    },
    Application {
        name: "h2",
        title: "H2 on OpenJDK",
        script: ("h2", ""),
        load: "2 connections, transfers in transactions of four statements",
        checker: "opening it, `SCRIPT` of everything",
        needs: &[
            ("javac", "openjdk-17-jdk-headless"),
            ("/usr/share/java/h2.jar", "libh2-java"),
        ],
        version: "dpkg-query -W -f 'H2 ${Version}' libh2-java; dpkg-query -W -f ', OpenJDK ${Version}' openjdk-17-jdk-headless",
        ..PLAIN
    },
    Application {
        name: "mbox",
        title: "mbox",
        script: ("mail", "mbox"),
        load: "3 processes deliver, each under `lockf` and a dot lock",
        ..MAIL
    },
    Application {
        name: "maildir",
        title: "maildir",
        script: ("mail", "maildir"),
        load: "3 processes deliver",
        ..MAIL
    },
    Application {
        name: "json-over",
        title: "JSON, each save over the old file",
        script: ("json_", "over"),
        ..JSON
    },
    Application {
        name: "json-replace",
        title: "JSON, each save put in place",
        script: ("json_", "replace"),
        ..JSON
    },
    Application {
        name: "git",
        title: "git",
        script: ("git", ""),
        load: "a commit of five files after the other, `gc` every 40",
        checker: "`git fsck --full --strict`, a further commit",
        needs: &[("git", "git")],
        version: "git --version | sed 's/version //'",
        ..PLAIN
    },
];

impl Application {
    /// The package that is missing, if one is.
    pub fn missing(&self) -> Option<&'static str> {
        let is_there = |what: &str| installed(what) || Path::new(what).exists();
        let missing = self.needs.iter().find(|(what, _)| !is_there(what));
        missing.map(|(_, package)| *package)
    }

    /// Panics if something it needs is not installed.
    #[track_caller]
    pub fn must_be_there(&self) {
        if let Some(package) = self.missing() {
            panic!("{} needs {package}: apt-get install {package}", self.name);
        }
    }
}

/// The application `name`.
#[track_caller]
pub fn named(name: &str) -> &'static Application {
    let found = ALL.iter().find(|app| app.name == name);
    found.unwrap_or_else(|| panic!("there is no application {name}"))
}
