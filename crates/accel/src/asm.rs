//! Assembler and disassembler.
//!
//! One instruction a line; `;` and `#` begin comments; names and registers in any case, numbers decimal or
//! `0x…`, with `_` between digits. Operands are those of [`Opcode::operands`], separated by commas:
//!
//! ```text
//! load    v96, a1+, 384       ; the weight of the norm
//! rmsnorm v48, v0, v96, 384, 268
//! ```

use std::collections::HashMap;
use std::sync::Arc;

use miette::{Diagnostic, LabeledSpan, NamedSource, SourceSpan};

use crate::isa::{Field, Instruction, Kind, LOOP_DEPTH, Opcode, Operand, PROGRAM_LIMIT};

/// A program text that is wrong somewhere. As a [`Diagnostic`] it points at every place.
#[derive(Debug, thiserror::Error)]
#[error("{}", summary(problems, file, &text.inner()[..]))]
pub struct AssemblyError {
    file: String,
    text: Arc<NamedSource<String>>,
    problems: Vec<Problem>,
}

/// One wrong place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Bytes of the text.
    pub span: std::ops::Range<usize>,
    /// What was expected and what was found.
    pub message: String,
}

impl AssemblyError {
    /// The wrong places, first to last.
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }
}

impl Diagnostic for AssemblyError {
    fn source_code(&self) -> Option<&dyn miette::SourceCode> {
        Some(&*self.text)
    }

    fn labels(&self) -> Option<Box<dyn Iterator<Item = LabeledSpan> + '_>> {
        Some(Box::new(self.problems.iter().map(|problem| {
            let span = SourceSpan::from((problem.span.start, problem.span.len()));
            LabeledSpan::new_with_span(Some(problem.message.clone()), span)
        })))
    }

    fn help<'a>(&'a self) -> Option<Box<dyn std::fmt::Display + 'a>> {
        Some(Box::new("docs/isa.md lists the instructions and their operands"))
    }
}

/// `file:line:column: message` of the first problem, and how many more there are.
fn summary(problems: &[Problem], file: &str, text: &str) -> String {
    let Some(first) = problems.first() else { return file.to_owned() };
    let (line, column) = position(text, first.span.start);
    let more = match problems.len() - 1 {
        0 => String::new(),
        1 => " (and one more error)".to_owned(),
        more => format!(" (and {more} more errors)"),
    };
    format!("{file}:{line}:{column}: {}{more}", first.message)
}

/// Line and column of a byte, from 1; columns are characters.
pub fn position(text: &str, offset: usize) -> (usize, usize) {
    let before = &text[..offset.min(text.len())];
    let start = before.rfind('\n').map_or(0, |newline| newline + 1);
    (before.matches('\n').count() + 1, before[start..].chars().count() + 1)
}

/// Translates a program text.
///
/// # Errors
/// [`AssemblyError`] with every wrong place.
pub fn assemble(file: &str, text: &str) -> Result<Vec<Instruction>, Box<AssemblyError>> {
    let mnemonics: HashMap<_, _> = Opcode::ALL.iter().map(|op| (op.mnemonic(), *op)).collect();
    let mut program = Vec::new();
    let mut problems = Vec::new();
    let mut open_loops: Vec<std::ops::Range<usize>> = Vec::new();
    let mut offset = 0;
    for line in text.split_inclusive('\n') {
        let code = &line[..line.find([';', '#', '\n']).unwrap_or(line.len())];
        let start = offset + (code.len() - code.trim_start().len());
        offset += line.len();
        let code = code.trim();
        if code.is_empty() {
            continue;
        }
        let mnemonic = code.split(char::is_whitespace).next().unwrap_or(code);
        let span = start..start + mnemonic.len();
        let Some(&opcode) = mnemonics.get(&mnemonic.to_ascii_lowercase()[..]) else {
            problems
                .push(Problem { span, message: format!("there is no instruction {mnemonic:?}") });
            continue;
        };
        match opcode {
            Opcode::Loop if open_loops.len() == LOOP_DEPTH => problems.push(Problem {
                span: span.clone(),
                message: format!("more than {LOOP_DEPTH} loops inside one another"),
            }),
            Opcode::End if open_loops.is_empty() => {
                problems.push(Problem {
                    span: span.clone(),
                    message: "no loop is open here".to_owned(),
                });
            }
            _ => {}
        }
        if opcode == Opcode::Loop {
            open_loops.push(span.clone());
        } else if opcode == Opcode::End {
            open_loops.pop();
        }
        if program.len() == PROGRAM_LIMIT {
            problems
                .push(Problem { span, message: format!("more than {PROGRAM_LIMIT} instructions") });
            break;
        }
        let operands = start + mnemonic.len()..start + code.len();
        program.push(parse_operands(opcode, text, operands, &mut problems));
    }
    problems.extend(
        open_loops
            .into_iter()
            .map(|span| Problem { span, message: "this loop has no end".to_owned() }),
    );
    if problems.is_empty() {
        return Ok(program);
    }
    problems.sort_by_key(|problem| problem.span.start);
    let text = Arc::new(NamedSource::new(file, text.to_owned()));
    Err(Box::new(AssemblyError { file: file.to_owned(), text, problems }))
}

fn parse_operands(
    opcode: Opcode,
    text: &str,
    range: std::ops::Range<usize>,
    problems: &mut Vec<Problem>,
) -> Instruction {
    let mut instruction = Instruction::new(opcode);
    let expected = opcode.operands();
    let source = &text[range.clone()];
    let parts: Vec<&str> =
        if source.trim().is_empty() { Vec::new() } else { source.split(',').collect() };
    if parts.len() != expected.len() {
        let names: Vec<_> = expected.iter().map(|operand| operand.name).collect();
        let message = format!(
            "{} takes {} operands ({}), found {}",
            opcode.mnemonic(),
            expected.len(),
            names.join(", "),
            parts.len()
        );
        let start = range.start + (source.len() - source.trim_start().len());
        // Without operands there is nothing to point at but the name.
        let span = if source.trim().is_empty() {
            range.start - opcode.mnemonic().len()..range.start
        } else {
            start..range.end
        };
        problems.push(Problem { span, message });
        return instruction;
    }
    let mut start = range.start;
    for (part, operand) in parts.iter().zip(expected) {
        let trimmed = part.trim();
        let at = start + (part.len() - part.trim_start().len());
        start += part.len() + 1;
        if let Err(message) = parse_operand(trimmed, operand, &mut instruction) {
            problems.push(Problem { span: at..at + trimmed.len().max(1), message });
        }
    }
    instruction
}

fn parse_operand(
    text: &str,
    operand: &Operand,
    instruction: &mut Instruction,
) -> Result<(), String> {
    let lower = text.to_ascii_lowercase();
    let expected = |form: &str| format!("{} must be {form}, found {text:?}", operand.name);
    let register = |text: &str, letter: char, form: &str| {
        text.strip_prefix(letter).and_then(number).ok_or_else(|| expected(form))
    };
    let (value, flag) = match operand.kind {
        Kind::Destination => {
            let (name, indexed) = match lower.strip_suffix("+o") {
                Some(name) => (name, true),
                None => (&lower[..], false),
            };
            instruction.indexed = indexed;
            (register(name, 'v', "a vector, v0 to v65535, maybe with +o behind")?, false)
        }
        Kind::Source => (register(&lower, 'v', "a vector, v0 to v65535")?, false),
        Kind::Scalar => (register(&lower, 's', "a scalar register, s0 to s15")?, false),
        Kind::Address => (register(&lower, 'a', "an address register, a0 to a7")?, false),
        Kind::AddressPost => {
            let name = lower.strip_suffix('+');
            let form = "an address register, a0 to a7, maybe with + behind";
            (register(name.unwrap_or(&lower), 'a', form)?, name.is_some())
        }
        Kind::Packing => match &lower[..] {
            "t2" => (0, false),
            "t5" => (1, false),
            _ => return Err(expected("t2 or t5")),
        },
        Kind::Number => (number(&lower).ok_or_else(|| expected("a number"))?, false),
    };
    let limit = Instruction::field_limit(instruction.opcode, operand.field).unwrap_or(0);
    if value > u64::from(limit) {
        return Err(format!("{} is {value}, the largest possible is {limit}", operand.name));
    }
    instruction.set(operand.field, value as u32);
    if operand.kind == Kind::AddressPost {
        instruction.set(Field::Sd, flag.into());
    }
    Ok(())
}

/// A decimal or hexadecimal number.
fn number(text: &str) -> Option<u64> {
    let digits = text.replace('_', "");
    if !digits.starts_with(|c: char| c.is_ascii_digit()) {
        return None;
    }
    match digits.strip_prefix("0x") {
        Some(hex) if !hex.starts_with('+') => u64::from_str_radix(hex, 16).ok(),
        Some(_) => None,
        None => digits.parse().ok(),
    }
}

/// An instruction as text that [`assemble`] reads.
pub fn disassemble(instruction: &Instruction) -> String {
    let operands: Vec<_> = instruction
        .opcode
        .operands()
        .iter()
        .map(|operand| {
            let value = instruction.get(operand.field);
            match operand.kind {
                Kind::Destination => {
                    format!("v{value}{}", if instruction.indexed { "+o" } else { "" })
                }
                Kind::Source => format!("v{value}"),
                Kind::Scalar => format!("s{value}"),
                Kind::Address => format!("a{value}"),
                Kind::AddressPost => {
                    format!("a{value}{}", if instruction.sd & 1 != 0 { "+" } else { "" })
                }
                Kind::Packing => (if value & 1 != 0 { "t5" } else { "t2" }).to_owned(),
                Kind::Number => value.to_string(),
            }
        })
        .collect();
    format!("{:<8}{}", instruction.opcode.mnemonic(), operands.join(", ")).trim_end().to_owned()
}

/// A program as text: loops indented.
pub fn listing(program: &[Instruction]) -> String {
    let mut text = String::new();
    let mut depth = 0usize;
    for instruction in program {
        if instruction.opcode == Opcode::End {
            depth = depth.saturating_sub(1);
        }
        text += &"    ".repeat(depth);
        text += &disassemble(instruction);
        text.push('\n');
        if instruction.opcode == Opcode::Loop {
            depth += 1;
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Any instruction: each field that its opcode uses is filled at random.
    fn instruction() -> impl Strategy<Value = Instruction> {
        (0..Opcode::ALL.len(), any::<[u32; 10]>()).prop_map(|(opcode, values)| {
            let mut instruction = Instruction::new(Opcode::ALL[opcode]);
            for (&field, value) in Field::ALL.iter().zip(values).skip(1) {
                if let Some(limit) = Instruction::field_limit(instruction.opcode, field) {
                    instruction
                        .set(field, if limit == u32::MAX { value } else { value % (limit + 1) });
                }
            }
            instruction
        })
    }

    proptest! {
        #[test]
        fn every_instruction_round_trips_through_bytes_and_text(instruction in instruction()) {
            prop_assert_eq!(Instruction::decode(instruction.encode()), Ok(instruction));
            let text = disassemble(&instruction);
            let balanced = match instruction.opcode {
                Opcode::Loop => format!("{text}\nend"),
                Opcode::End => format!("loop 1\n{text}"),
                _ => text,
            };
            let program = assemble("round trip", &balanced).unwrap();
            prop_assert!(program.contains(&instruction), "{balanced}");
        }

        #[test]
        fn any_text_is_read_or_refused(text in "\\PC{0,80}") {
            if let Err(error) = assemble("x", &text) {
                let _ = (error.to_string(), format!("{:?}", miette::Report::new(*error)));
            }
        }

        #[test]
        fn decoding_refuses_what_encoding_cannot_write(bytes in any::<[u8; 16]>()) {
            if let Ok(instruction) = Instruction::decode(bytes) {
                prop_assert_eq!(instruction.encode(), bytes);
            }
        }
    }

    #[test]
    fn errors_point_at_line_and_column() {
        let text = "halt\n  load v1, a9+, 3 ; comment\nlod v1\n\tadd v1, v2\nend\nloop 0x10\nsilu w1, v2, 70_000";
        let error = *assemble("p.s", text).unwrap_err();
        let found: Vec<_> = error
            .problems()
            .iter()
            .map(|problem| {
                (
                    position(text, problem.span.start),
                    &text[problem.span.clone()],
                    &problem.message[..],
                )
            })
            .collect();
        let expected = [
            ((2, 12), "a9+", "address is 9, the largest possible is 7"),
            ((3, 1), "lod", "there is no instruction \"lod\""),
            ((4, 6), "v1, v2", "add takes 4 operands (vd, va, vb, n), found 2"),
            ((5, 1), "end", "no loop is open here"),
            ((6, 1), "loop", "this loop has no end"),
            ((7, 6), "w1", "vd must be a vector, v0 to v65535, maybe with +o behind, found \"w1\""),
            ((7, 14), "70_000", "n is 70000, the largest possible is 65535"),
        ];
        assert_eq!(found, expected);
        assert!(error.to_string().starts_with("p.s:2:12: address is 9"), "{error}");
        assert!(error.to_string().ends_with("(and 6 more errors)"), "{error}");
        let report = format!("{:?}", miette::Report::new(error));
        assert!(report.contains("p.s:2:12") && report.contains("load v1, a9+, 3"), "{report}");
    }
}
