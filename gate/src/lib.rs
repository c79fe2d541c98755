//! The gate: the one piece of memory that the shim, in every program of a set,
//! and the coordinator share, and the protocol both speak over it.
//!
//! Nothing else knows the layout ([`abi`]) or the order of the loads and stores
//! ([`word`], [`slot`], [`passage`], [`armed`], [`hold`], [`guard`], [`marks`], [`reap`]). The protocol is written
//! once, generic over [`memory::Memory`], so that the code the model checker
//! explores (`tests/model.rs`) is the code that runs.
//!
//! The crate allocates nothing, takes no lock, and touches no `errno`: it is
//! linked into the shim, which lives in processes that are not ours.
#![no_std]

pub mod abi;
pub mod armed;
pub mod calls;
pub mod guard;
pub mod hold;
mod lookup;
pub mod marks;
pub mod memory;
pub mod nr;
pub mod passage;
pub mod reap;
pub mod sites;
pub mod slot;
pub mod sys;
pub mod table;
pub mod watch;
pub mod word;

pub use memory::{Memory, Mutation, Shared};
