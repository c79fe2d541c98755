//! What happens at a patched system call instruction.

use snapshim_gate::calls::{self, Action};
use snapshim_gate::slot::Seen;
use snapshim_gate::sys::syscall6;

use crate::attach;
use crate::guard::{leave, seen};
use crate::hooks::raw::{gate_action, sandboxes};
use crate::sys::ENOSYS;

/// A system call as the program made it.
#[repr(C)]
pub(super) struct Call {
    number: usize,
    args: [usize; 6],
}

/// Makes the call, at the gate.
pub(super) unsafe extern "C" fn call(call: &Call) -> isize {
    let Call { number, args } = *call;
    // SAFETY: the program's own call, made in its place.
    let make = || unsafe { syscall6(number, args) };
    // The kernel looks at 32 bits.
    let number = number as u32 as usize;
    let Some(action) = calls::action(number) else {
        return make();
    };
    match action {
        Action::Map if args[2] & PROT_EXEC != 0 => {
            let at = make();
            if (-4095..0).contains(&at) {
                return at;
            }
            super::mapped(at as usize, args[1], args[4] as i32, args[5]);
            at
        }
        Action::Prctl | Action::Seccomp => {
            if !sandboxes(number, args[0]) {
                return make();
            }
            seen(Seen::Sandbox);
            attach::sandboxing(make)
        }
        Action::Ring if attach::refuses_rings() => -ENOSYS,
        _ => {
            let frame = gate_action(action, args);
            let result = make();
            leave(frame);
            result
        }
    }
}

const PROT_EXEC: usize = 4;
