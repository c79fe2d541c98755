//! The coordinator of snapshim: everything behind the `snapshim` command.
//!
//! | module | what it does |
//! |---|---|
//! | [`hold`] | the gate file of a set, closing and draining it, who writes the members |
//! | [`commit`] | at which of the program's own points the gate is shut |
//! | [`capture`] | copying the members under the hold |
//! | [`store`] | the snapshots on disk: manifest, publication, retention, sweep |
//! | [`checkpoint`] | all of these in order |
//! | [`progress`] | how far long work is |
//! | [`cli`] | the commands |

pub mod capture;
pub mod checkpoint;
pub mod cli;
pub mod commit;
pub mod error;
pub mod hold;
pub mod progress;
pub mod store;

pub use error::{Error, Exit, Result};
