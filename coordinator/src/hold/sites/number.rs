//! The number of a system call, as far as the code before it says.

use iced_x86::{
    Code, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register,
};

use super::sweep::{Targets, goes_on, is_syscall};

/// Most steps backwards for one site.
const MAX_STEPS: usize = 400;

/// What a register holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Value {
    Known(i32),
    Unknown,
    /// Nobody comes that way, or whoever does came through where the question was
    /// asked already.
    Circle,
}

/// The number that is in eax when the instruction at `index` is reached; `None` if
/// it is not the same, or not known, on every way there.
pub fn number(block: &[Instruction], index: usize, targets: &Targets) -> Option<i32> {
    let mut search = Search {
        block,
        targets,
        info: InstructionInfoFactory::new(),
        asked: Vec::new(),
        steps: 0,
    };
    match search.before(Register::RAX, index) {
        Value::Known(number) => Some(number),
        Value::Unknown | Value::Circle => None,
    }
}

struct Search<'a> {
    block: &'a [Instruction],
    targets: &'a Targets,
    info: InstructionInfoFactory,
    asked: Vec<(Register, usize)>,
    steps: usize,
}

impl Search<'_> {
    /// What `register` (in its 64-bit form) holds when the instruction at `index` begins.
    fn before(&mut self, mut register: Register, mut index: usize) -> Value {
        loop {
            self.steps += 1;
            if self.steps > MAX_STEPS || register == Register::None {
                return Value::Unknown;
            }
            let here = self.block[index].ip();
            if self.targets.is_entry(here) {
                return Value::Unknown;
            }
            if self.targets.branches_to(here).next().is_some() {
                return self.joined(register, index);
            }
            let Some(previous) = self.falls_into(index) else {
                // Padding after a jump: nobody comes this way.
                let is_padding = index > 0 && self.block[index].mnemonic() == Mnemonic::Nop;
                return match is_padding {
                    true => Value::Circle,
                    false => Value::Unknown,
                };
            };
            match self.effect(register, previous) {
                Effect::None => index = previous,
                Effect::Sets(value) => return value,
                Effect::Copies(from) => (register, index) = (from, previous),
            }
        }
    }

    /// The same where several ways meet: all must agree.
    fn joined(&mut self, register: Register, index: usize) -> Value {
        if self.asked.contains(&(register, index)) {
            return Value::Circle;
        }
        self.asked.push((register, index));
        let mut all = Value::Circle;
        let mut add = |value| match (all, value) {
            (Value::Circle, value) => all = value,
            (_, Value::Circle) => {}
            (a, b) if a == b => {}
            _ => all = Value::Unknown,
        };
        let targets = self.targets;
        for from in targets.branches_to(self.block[index].ip()) {
            // A branch changes no register.
            add(
                match self.block.binary_search_by_key(&from, Instruction::ip) {
                    Ok(source) => self.before(register, source),
                    Err(_) => Value::Unknown,
                },
            );
        }
        if let Some(previous) = self.falls_into(index) {
            add(match self.effect(register, previous) {
                Effect::None => self.before(register, previous),
                Effect::Sets(value) => value,
                Effect::Copies(from) => self.before(from, previous),
            });
        } else if index == 0 {
            add(Value::Unknown);
        }
        all
    }

    /// The instruction before, if it goes on to this one.
    fn falls_into(&self, index: usize) -> Option<usize> {
        let previous = index.checked_sub(1)?;
        let instruction = &self.block[previous];
        (goes_on(instruction) && instruction.next_ip() == self.block[index].ip())
            .then_some(previous)
    }

    /// What an instruction does to a register.
    fn effect(&mut self, register: Register, index: usize) -> Effect {
        let instruction = &self.block[index];
        if is_syscall(instruction) {
            let lost = [Register::RAX, Register::RCX, Register::R11].contains(&register);
            return if lost { Effect::UNKNOWN } else { Effect::None };
        }
        if instruction.flow_control() == FlowControl::Call
            || instruction.flow_control() == FlowControl::IndirectCall
        {
            // What a function leaves alone (psABI).
            use Register::{R12, R13, R14, R15, RBP, RBX};
            let kept = [RBX, RBP, R12, R13, R14, R15].contains(&register);
            return if kept { Effect::None } else { Effect::UNKNOWN };
        }
        let writes = |access| {
            !matches!(
                access,
                OpAccess::None | OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess
            )
        };
        let used = self.info.info(instruction).used_registers();
        if !used
            .iter()
            .any(|u| u.register().full_register() == register && writes(u.access()))
        {
            return Effect::None;
        }
        let is_wide = |r: Register| (r.is_gpr32() || r.is_gpr64()) && r.full_register() == register;
        if !is_wide(instruction.op0_register()) || instruction.op0_kind() != OpKind::Register {
            return Effect::UNKNOWN;
        }
        match instruction.code() {
            Code::Mov_r32_imm32 | Code::Mov_rm32_imm32 => known(instruction.immediate32() as i32),
            Code::Mov_r64_imm64 => known(instruction.immediate64() as i32),
            Code::Mov_rm64_imm32 => known(instruction.immediate32to64() as i32),
            Code::Xor_r32_rm32
            | Code::Xor_rm32_r32
            | Code::Xor_r64_rm64
            | Code::Xor_rm64_r64
            | Code::Sub_r32_rm32
            | Code::Sub_rm32_r32
            | Code::Sub_r64_rm64
            | Code::Sub_rm64_r64
                if instruction.op1_kind() == OpKind::Register
                    && instruction.op0_register() == instruction.op1_register() =>
            {
                known(0)
            }
            Code::Mov_r32_rm32 | Code::Mov_rm32_r32 | Code::Mov_r64_rm64 | Code::Mov_rm64_r64
                if instruction.op1_kind() == OpKind::Register =>
            {
                Effect::Copies(instruction.op1_register().full_register())
            }
            _ => Effect::UNKNOWN,
        }
    }
}

/// What an instruction does to a register.
enum Effect {
    None,
    Sets(Value),
    Copies(Register),
}

impl Effect {
    const UNKNOWN: Effect = Effect::Sets(Value::Unknown);
}

fn known(value: i32) -> Effect {
    Effect::Sets(Value::Known(value))
}
