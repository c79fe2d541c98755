//! The coordinator of snapshim: everything behind the `snapshim` command.
//!
//! | module | what it does |
//! |---|---|
//! | [`hold`] | the gate file of a set, closing and draining it, who writes the members |
//! | [`commit`] | at which of the program's own points the gate is shut |
//! | [`capture`] | copying the members under the hold |
//! | [`digest`] | what the bytes of the files were |
//! | [`verify`] | whether a snapshot is what its manifest says, and what a command says of it |
//! | [`restore`] | putting files back as a snapshot has them |
//! | [`store`] | the snapshots on disk: manifest, publication, retention, sweep |
//! | [`checkpoint`] | all of these in order |
//! | `marking` | snapshots built on the one before, by what calls have marked since |
//! | [`diff`] | what differs between snapshots, or from the live files |
//! | [`crash`] | putting files back after a program crashed |
//! | [`hooks`], `held`, `child` | commands of the user's before, after and under the hold |
//! | [`progress`], [`stop`], [`interrupt`] | how far long work is, and that it end early |
//! | `urgency` | that the program does not wait for a processor because of us |
//! | [`cli`] | the commands |

pub mod capture;
pub mod checkpoint;
mod child;
pub mod cli;
pub mod commit;
pub mod crash;
pub mod diff;
pub mod digest;
pub mod error;
mod held;
pub mod hold;
pub mod hooks;
pub mod interrupt;
mod marking;
pub mod progress;
pub mod restore;
pub mod stop;
pub mod store;
pub mod tally;
pub(crate) mod tree;
mod urgency;
pub mod verify;

pub use error::{Error, Exit, Result};
