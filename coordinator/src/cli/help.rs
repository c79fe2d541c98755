//! The examples in the help of each command, and in its manual page.

/// Of the whole program.
pub const MAIN: &str = "\
Exit codes:
  0  done; a snapshot, if one was made, is verified
  1  it failed
  2  the command line or a setting is wrong
  3  the commit point asked for was not reached
  4  the hold bound was hit; nothing was published
  5  captured and published, but not verified: the reasons are printed
`run` ends as its program does.

Examples:
  snapshim run --name db --watch data -- ./app
  snapshim checkpoint db
  snapshim list db";

/// Of `run`.
pub const RUN: &str = "\
Examples:
  snapshim run --name db --watch data -- ./app --port 80
  snapshim run --every 5m --keep-last 10 ./app
  snapshim run --every 5s --at auto --restore-on-crash --restart -- ./app";

/// Of `checkpoint`.
pub const CHECKPOINT: &str = "\
Examples:
  snapshim checkpoint db
  snapshim checkpoint db --at lock --wait 5s --else write
  snapshim checkpoint db --max-hold 200ms --json";

/// Of `snap`.
pub const SNAP: &str = "\
Examples:
  snapshim snap /srv/store
  snapshim snap --name web --exclude /srv/web/cache /srv/web /etc/web.conf";

/// Of `hold`.
pub const HOLD: &str = "\
What the command makes is a snapshot as good as the certificate says: 0 if it is verified, 5 if not, 1
if the command failed, 4 if it did not end within the hold bound.

Examples:
  snapshim hold db --at lock -- lvcreate -s -n db-snap /dev/vg/db
  snapshim hold db --max-hold 5s -- btrfs subvolume snapshot -r /srv/db /srv/.snapshots/db";

/// Of `list`.
pub const LIST: &str = "\
Examples:
  snapshim list db
  snapshim list db | cut -f1  # the ids, oldest first";

/// Of `show`.
pub const SHOW: &str = "\
Examples:
  snapshim show db latest
  snapshim show latest~1:/srv/data/app.conf > app.conf.before";

/// Of `diff`.
pub const DIFF: &str = "\
A, B:
  an id, the beginning of one, or latest; behind it ~N, the N-th older snapshot
What is printed:
  +  added
  -  removed
  M  another content: sizes, how many ranges of bytes differ and how long they are
  U  only other metadata: mode, owner, mtime, xattrs, links (names of the same file)
  T  of another type
A file that was renamed is one removed and one added.

Examples:
  snapshim diff latest  # what changed since
  snapshim diff db latest~1 latest
  snapshim diff -u latest:/srv/data/app.conf";

/// Of `prune`.
pub const PRUNE: &str = "\
Examples:
  snapshim prune db --keep-hourly 24 --keep-daily 7 --dry-run
  snapshim prune db --min-free 10%";

/// Of `delete`.
pub const DELETE: &str = "\
Examples:
  snapshim delete db latest~3";

/// Of `pin`.
pub const PIN: &str = "\
Examples:
  snapshim pin db latest --note release-1.4";

/// Of `unpin`.
pub const UNPIN: &str = "\
Examples:
  snapshim unpin db 20261120T231700.123456Z";

/// Of `status`.
pub const STATUS: &str = "\
Examples:
  snapshim status db
  snapshim status db --json";

/// Of `env`.
pub const ENV: &str = "\
Examples:
  eval \"$(snapshim env --name db --watch /data)\"; ./app";

/// Of `doctor`.
pub const DOCTOR: &str = "\
Examples:
  snapshim doctor 4711
  snapshim doctor --watch /srv/data -- ./app --port 80";

/// Of `completions`.
pub const COMPLETIONS: &str = "\
Examples:
  snapshim completions bash > ~/.local/share/bash-completion/completions/snapshim
  snapshim completions fish > ~/.config/fish/completions/snapshim.fish";

/// Of `man`.
pub const MAN: &str = "\
Examples:
  snapshim man | man -l -
  snapshim man --dir ~/.local/share/man/man1";

/// Of `verify`.
pub const VERIFY: &str = "\
Examples:
  snapshim verify db
  snapshim verify db --all --quick
  snapshim verify db latest --writable --verify 'sqlite3 \"$SNAPSHIM_ROOT/app.db\" \"pragma integrity_check\" | grep -qx ok'";

/// Of `restore`.
pub const RESTORE: &str = "\
Examples:
  snapshim restore db latest --in-place --dry-run
  snapshim restore db latest:/srv/db/users.sqlite --to /tmp/look
  snapshim restore db 20261120 --in-place --keep-replaced
  snapshim restore --undo db";
