//! Which bytes around a system call instruction can be replaced by a jump.

use iced_x86::{
    Code, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, Register,
};
use snapshim_gate::sites::{JUMP, MAX_WINDOW, MOVED, NUMBERED};

use super::sweep::Targets;

/// Most instructions on either side.
const MAX_STEPS: usize = 8;

/// A window, as indexes into the block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Its first instruction.
    pub first: usize,
    /// Its last.
    pub last: usize,
    /// [`NUMBERED`] or [`MOVED`].
    pub shape: u8,
}

/// The window for the system call at `site`, not before the address `free`, where
/// the window before it ends.
pub fn window(block: &[Instruction], site: usize, targets: &Targets, free: u64) -> Option<Window> {
    let fits = |first: usize, last: usize| {
        let begin = block[first].ip();
        let len = (block[last].next_ip() - begin) as usize;
        // Any byte but the first, be it inside an instruction.
        let is_entered = || (1..len as u64).any(|at| targets.contains(begin + at));
        begin >= free && (JUMP..=MAX_WINDOW).contains(&len) && !is_entered()
    };
    if let Some(first) = site.checked_sub(1)
        && block[first].code() == Code::Mov_r32_imm32
        && block[first].op0_register() == Register::EAX
        && block[first].len() == 5
        && block[first].immediate32() as i32 >= 0
        && block[first].next_ip() == block[site].ip()
        && fits(first, site)
    {
        return Some(Window {
            first,
            last: site,
            shape: NUMBERED,
        });
    }
    let mut info = InstructionInfoFactory::new();
    let mut can_move = |index: usize| can_move(&block[index], &mut info);
    // How far the instructions on either side can be taken along.
    let mut most_before = 0;
    while most_before < MAX_STEPS
        && site > most_before
        && block[site - most_before - 1].next_ip() == block[site - most_before].ip()
        && can_move(site - most_before - 1)
    {
        most_before += 1;
    }
    let mut most_after = 0;
    while most_after < MAX_STEPS
        && site + most_after + 1 < block.len()
        && block[site + most_after].next_ip() == block[site + most_after + 1].ip()
        && can_move(site + most_after + 1)
    {
        most_after += 1;
    }
    // None after it if possible: then a call's return address is the instruction
    // after the window, where the file's own unwind table holds. Then the shortest.
    for after in 0..=most_after {
        for before in 0..=most_before {
            let (first, last) = (site - before, site + after);
            if fits(first, last) {
                return Some(Window {
                    first,
                    last,
                    shape: MOVED,
                });
            }
        }
    }
    None
}

/// Whether an instruction does elsewhere, on the same stack, exactly what it does here.
fn can_move(instruction: &Instruction, info: &mut InstructionInfoFactory) -> bool {
    let is_plain = instruction.flow_control() == FlowControl::Next
        && !instruction.is_invalid()
        && !instruction.is_privileged()
        && !instruction.is_stack_instruction()
        && !instruction.is_save_restore_instruction()
        && !instruction.is_ip_rel_memory_operand()
        // It marks where indirect branches may come to.
        && !matches!(instruction.mnemonic(), Mnemonic::Endbr64 | Mnemonic::Endbr32);
    is_plain
        && info
            .info(instruction)
            .used_registers()
            .iter()
            // The moved code runs on the same stack, where what is there may be read.
            .all(|used| {
                used.register().full_register() != Register::RSP
                    || matches!(used.access(), OpAccess::Read | OpAccess::CondRead)
            })
}
