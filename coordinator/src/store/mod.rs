//! store
pub mod manifest;
