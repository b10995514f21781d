//! One unit of `hw/dv/mmfree_units_tb.sv`, clocked from here, a line for each cycle.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// Bits of the bench's input and output.
const BITS: usize = 512;

/// A running bench.
pub struct Bench {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    unit: u8,
    line: String,
}

impl Bench {
    /// Starts the program with a mutation (0 for none) and resets a unit.
    pub fn start(program: &Path, unit: u8, mutation: usize) -> Self {
        let mut child = Command::new(program)
            .arg(format!("+mutation={mutation}"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let input = child.stdin.take().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let mut bench = Self { child, input, output, unit, line: String::new() };
        for _ in 0..3 {
            let _ = bench.exchange(1, &"0".repeat(BITS / 4));
        }
        bench
    }

    /// `Err` if the program ended: an assertion of the RTL failed.
    fn exchange(&mut self, reset: u8, digits: &str) -> Result<(), String> {
        let failed = |_| "an assertion of the RTL failed".to_owned();
        writeln!(self.input, "{reset} {} {digits}", self.unit).map_err(failed)?;
        self.input.flush().map_err(failed)?;
        self.line.clear();
        self.output.read_line(&mut self.line).map_err(failed)?;
        if self.line.trim_end().len() == BITS / 4 {
            Ok(())
        } else {
            Err(format!("an assertion of the RTL failed: {}", self.line.trim_end()))
        }
    }

    /// One cycle: fields of the input with their widths, first highest; widths of the outputs likewise. The
    /// outputs are those of this cycle, before the clock's edge.
    pub fn cycle<const N: usize>(
        &mut self,
        fields: &[(u128, u32)],
        widths: [u32; N],
    ) -> Result<[u128; N], String> {
        let mut bits = vec![false; BITS];
        let mut at = BITS - fields.iter().map(|&(_, width)| width as usize).sum::<usize>();
        for &(value, width) in fields {
            for bit in (0..width).rev() {
                bits[at] = value.checked_shr(bit).unwrap_or(0) & 1 != 0;
                at += 1;
            }
        }
        let digits: String = bits
            .chunks(4)
            .map(|four| {
                let digit = four.iter().fold(0, |digit, &bit| digit << 1 | u32::from(bit));
                char::from_digit(digit, 16).unwrap()
            })
            .collect();
        self.exchange(0, &digits)?;
        let out: Vec<bool> = self
            .line
            .trim_end()
            .chars()
            .flat_map(|c| {
                let digit = c.to_digit(16).unwrap_or(0);
                (0..4).rev().map(move |bit| digit >> bit & 1 != 0)
            })
            .collect();
        let mut at = BITS - widths.iter().sum::<u32>() as usize;
        Ok(widths.map(|width| {
            let field = &out[at..at + width as usize];
            at += width as usize;
            field.iter().fold(0, |value, &bit| value << 1 | u128::from(bit))
        }))
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        // It waits for a line that will not come.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
