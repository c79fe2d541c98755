//! hold
pub mod gate_file;
pub mod set;
pub mod elf;
pub mod shim_file;
pub mod calls;
pub mod cut;
pub mod evidence;
pub mod process;
