//! The gate of a set, from the coordinator's side.
//!
//! | module | what it does |
//! |---|---|
//! | [`set`], [`gate_file`] | a set's directory, settings, lock and gate file |
//! | [`shim_file`], [`elf`] | the shared library, and which programs it can enter |
//! | [`cut`] | shutting, draining and opening the gate |
//! | [`evidence`] | who can change the members, and what proves that nobody did |
//! | [`outside`], [`clock`] | stopping processes that no gate holds |
//! | [`process`], [`calls`] | what `/proc` and the system call numbers say |

pub mod calls;
pub mod clock;
pub mod cut;
pub mod elf;
pub mod evidence;
pub mod gate_file;
pub mod outside;
pub mod process;
pub mod set;
pub mod shim_file;
