//! The `snapshim` command. All of it is in the library: see `cli`.

use std::process::ExitCode;

use snapshim_coordinator::cli;

/// Before the runtime changes any of it, notes what programs are to inherit.
#[used]
#[unsafe(link_section = ".init_array")]
static RECORD: extern "C" fn() = record;

extern "C" fn record() {
    cli::inherited::record();
}

fn main() -> ExitCode {
    cli::main()
}
