//! The application matrix: real programs under load, snapshots of them restored elsewhere,
//! opened by the program itself, and checked by its own checker and by invariants of ours.
//!
//! Each application is a script in `programs/apps` that makes the load and checks a copy; see
//! `programs/apps/common.py`. Here is what is the same for all of them.
//!
//! | module | what it does |
//! |---|---|
//! | [`table`] | the applications |
//! | [`mod@bench`] | one of them at work: snapshots, copies without the gate, checks |
//! | [`row`] | what was found, and how it is kept |
//! | [`page`] | `docs/applications.md` |

pub mod bench;
pub mod page;
pub mod row;
pub mod table;

pub use bench::Bench;
pub use row::Row;
pub use table::Application;
