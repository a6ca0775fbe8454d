//! What a step's kernels share: tokens, slots, attention lists, cos and sin.

use crate::device::{AttnSeq, DeviceError, Result, Rope, RowSlot, StepInput};
use crate::kv::rblock::KvRun;

/// The device's copy of a [`StepInput`], in memory that is reused.
#[derive(Default)]
pub(super) struct Step {
    pub tokens: Vec<u32>,
    pub slots: Vec<RowSlot>,
    pub seqs: Vec<AttnSeq>,
    pub runs: Vec<KvRun>,
    /// `[rows, pairs]`.
    pub cos: Vec<f32>,
    /// `[rows, pairs]`.
    pub sin: Vec<f32>,
    pub pairs: usize,
    pub interleaved: bool,
}

impl Step {
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// Makes room for steps of `rows` rows.
    pub fn reserve(&mut self, rows: usize) {
        self.tokens.reserve(rows);
        self.slots.reserve(rows);
        self.seqs.reserve(rows);
    }

    /// Takes in a step, refusing one that contradicts itself.
    pub fn begin(&mut self, rope: &Rope, step: &StepInput<'_>, max_rows: usize) -> Result<()> {
        let rows = step.tokens.len();
        let bad = |what: String| Err(DeviceError::Unsupported(what));
        if rows > max_rows {
            return bad(format!("a step of {rows} rows on a device made for {max_rows}"));
        }
        if step.slots.len() != rows {
            return bad(format!("a step of {rows} rows with {} slots", step.slots.len()));
        }
        let mut row = 0;
        for seq in step.seqs {
            if seq.row as usize != row {
                return bad(format!("a sequence begins at row {} of the step, not {row}", seq.row));
            }
            row += seq.rows as usize;
            if seq.runs > 0 && seq.run as usize + seq.runs as usize > step.runs.len() {
                return bad(format!(
                    "a sequence names {} KV runs from {} on, of {}",
                    seq.runs,
                    seq.run,
                    step.runs.len()
                ));
            }
        }
        if row != rows {
            return bad(format!("the step's sequences hold {row} of its {rows} rows"));
        }
        refill(&mut self.tokens, step.tokens);
        refill(&mut self.slots, step.slots);
        refill(&mut self.seqs, step.seqs);
        refill(&mut self.runs, step.runs);
        self.pairs = rope.inv_freq.len();
        self.interleaved = rope.interleaved;
        self.cos.clear();
        self.sin.clear();
        for slot in step.slots {
            for &f in &rope.inv_freq {
                // The angle in f32, as the models were trained.
                let angle = slot.position as f32 * f;
                let (sin, cos) = angle.sin_cos();
                self.cos.push(cos * rope.magnitude);
                self.sin.push(sin * rope.magnitude);
            }
        }
        Ok(())
    }

    /// cos and sin of a row's position.
    pub fn angles(&self, row: usize) -> (&[f32], &[f32]) {
        let range = row * self.pairs..(row + 1) * self.pairs;
        (&self.cos[range.clone()], &self.sin[range])
    }
}

fn refill<T: Copy>(to: &mut Vec<T>, from: &[T]) {
    to.clear();
    to.extend_from_slice(from);
}
