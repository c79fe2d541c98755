//! What happens at a patched system call instruction.

use core::mem::MaybeUninit;

use snapshim_gate::calls::{self, Action};
use snapshim_gate::slot::Seen;
use snapshim_gate::sys::syscall6;

use crate::attach;
use crate::guard::{self, Frame, seen};
use crate::hooks::on_call;
use crate::hooks::raw::{gate_action, sandboxes};
use crate::sys::ENOSYS;
use crate::vectors::preserving;

/// A system call as the program made it.
#[repr(C)]
pub(super) struct Call {
    /// Its number; in the end, the result of a call that has been made.
    number: isize,
    args: [usize; 6],
}

/// What a stub keeps while its system call is made.
#[repr(C, align(8))]
pub(super) struct Kept(Frame);

const _: () = assert!(size_of::<Kept>() == 16 && size_of::<Frame>() == 16);

/// Before the system call. `true`: it has been made.
///
/// At a system call instruction the vector registers are the program's: nothing on
/// this way may use them, but for what is called by way of [`preserving`]. A test
/// reads the machine code.
pub(super) unsafe extern "C" fn enter(call: &mut Call, kept: &mut MaybeUninit<Kept>) -> bool {
    // The kernel looks at 32 bits.
    let number = call.number as u32 as usize;
    let frame = match calls::action(number) {
        // What programs do most.
        Some(Action::File(class, arg)) => on_call(class, arg, number, &call.args),
        Some(action) => match other(call, number, action) {
            Some(frame) => frame,
            None => return true,
        },
        None => Frame::NONE,
    };
    kept.write(Kept(frame));
    false
}

/// After the system call.
pub(super) unsafe extern "C" fn leave(kept: &Kept, result: isize) {
    guard::leave(kept.0, result);
}

/// `None`: the call has been made.
#[inline(never)]
fn other(call: &mut Call, number: usize, action: Action) -> Option<Frame> {
    let Call {
        number: result,
        args,
    } = call;
    // SAFETY: the program's own call, made in its place.
    let make = || unsafe { syscall6(number, *args) };
    *result = match action {
        // Nothing that is shared with its file, or that the program writes to itself.
        Action::Map
            if args[2] & (PROT_EXEC | PROT_WRITE) == PROT_EXEC
                && args[3] & MAP_TYPE == MAP_PRIVATE =>
        {
            let at = make();
            if !(-4095..0).contains(&at) {
                let mut mapped = || super::mapped(at as usize, args[1], args[4] as i32, args[5]);
                preserving(&mut mapped);
            }
            at
        }
        Action::Prctl | Action::Seccomp if sandboxes(number, args[0]) => {
            seen(Seen::Sandbox);
            attach::sandboxing(make)
        }
        Action::Ring if attach::refuses_rings() => -ENOSYS,
        _ => return Some(gate_action(number, action, args)),
    };
    None
}

const PROT_WRITE: usize = 2;
const PROT_EXEC: usize = 4;
const MAP_TYPE: usize = 0xf;
const MAP_PRIVATE: usize = 2;
