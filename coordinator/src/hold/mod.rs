//! The gate of a set, from the coordinator's side.
//!
//! | module | what it does |
//! |---|---|
//! | [`set`], [`gate_file`] | a set's directory, settings, lock and gate file |
//! | [`shim_file`], [`elf`] | the shared library, and which programs it can enter |
//! | [`cut`] | shutting, draining and opening the gate |
//! | [`armed`] | waiting for the call that shuts it at a commit point |
//! | [`evidence`] | who can change the members, and what proves that nobody did |
//! | [`sites`] | where system calls are in ELF files, and whether they are patched |
//! | [`inspect`] | what `doctor` says of the machine and of processes |
//! | [`outside`], [`clock`] | stopping processes that no gate holds |
//! | [`rebuilt`] | files whose bytes say nothing |
//! | [`locate`], [`sight`] | the processes behind slots, containers' too; what is out of sight |
//! | [`witness`] | the program whose files are put back when it crashes |
//! | [`process`], [`calls`] | what `/proc` and the system call numbers say |

pub mod armed;
pub mod calls;
pub mod clock;
pub mod cut;
pub mod elf;
pub mod evidence;
pub mod gate_file;
pub mod inspect;
pub mod locate;
#[cfg(test)]
pub(crate) mod memory_gate;
pub mod outside;
pub mod process;
pub mod rebuilt;
pub mod set;
pub mod shim_file;
pub mod sight;
pub mod sites;
pub mod witness;
