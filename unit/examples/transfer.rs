//! Two accounts, in a file each, between which money is moved: their sum is always the
//! same, except in the middle of a transfer.
//!
//! ```text
//! cargo build --release -p snapshim-unit --example transfer
//! mkdir accounts
//! snapshim run --name bank --watch accounts -- target/release/examples/transfer accounts &
//! sleep 1
//! snapshim checkpoint bank --at unit
//! cat .snapshim/bank/latest/tree"$PWD"/accounts/*
//! ```
//!
//! With `--at write` some snapshots are of such a moment. The second argument is how many
//! transfers are made; without it, it goes on until it is ended.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

const ALL: u64 = 1_000_000;
const PAUSE: Duration = Duration::from_micros(300);

/// An account is one number, of eleven digits and a newline.
fn set(account: &File, amount: u64) -> io::Result<()> {
    account.write_all_at(format!("{amount:011}\n").as_bytes(), 0)
}

fn main() -> io::Result<()> {
    let mut args = std::env::args_os().skip(1);
    let Some(dir) = args.next() else {
        eprintln!("usage: transfer DIR [TRANSFERS]");
        std::process::exit(2);
    };
    let count = args.next().and_then(|n| n.to_str()?.parse().ok());
    let open = |name: &str| {
        let mut options = File::options();
        options.write(true).create(true).truncate(false);
        options.open(Path::new(&dir).join(name))
    };
    let (mine, yours) = (open("mine")?, open("yours")?);
    for transfer in 0..count.unwrap_or(u64::MAX) {
        let left = ALL - transfer % ALL;
        snapshim_unit::unit(|| {
            set(&mine, left)?;
            sleep(PAUSE);
            set(&yours, ALL - left)
        })?;
        sleep(PAUSE / 3);
    }
    let watched = if snapshim_unit::is_watched() {
        "watched"
    } else {
        "alone"
    };
    println!("{watched}");
    Ok(())
}
