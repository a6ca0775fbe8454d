//! A step's metadata on the GPU. Where a graph reads it, it stays at the same
//! addresses from one replay to the next.

use std::sync::Arc;

use super::api;
use super::driver::{Context, Event, Stream};
use super::memory::{GpuMemory, Pinned};
use crate::device::nvtx::range;
use crate::device::{AttnSeq, DeviceError, Result, RowSlot, StepInput};
use crate::kv::rblock::KvRun;

/// Steps whose metadata may be on its way while the next is written.
const IN_FLIGHT: usize = 2;

/// The most that a step may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Rows.
    pub rows: usize,
    /// Sequences.
    pub seqs: usize,
    /// Rows of logits.
    pub logits: usize,
    /// KV pages of all sequences together.
    pub pages: usize,
}

/// Where the parts of a step lie, in bytes from its beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Layout {
    capacity: Capacity,
    tokens: usize,
    slots: usize,
    seqs: usize,
    logit_rows: usize,
    pages: usize,
    end: usize,
}

impl Layout {
    fn new(capacity: Capacity) -> Self {
        let align = |at: usize| at.next_multiple_of(16);
        let tokens = size_of::<api::Step>();
        let slots = align(tokens + 4 * capacity.rows);
        let seqs = align(slots + size_of::<api::Slot>() * capacity.rows);
        let logit_rows = align(seqs + size_of::<api::Seq>() * capacity.seqs);
        let pages = align(logit_rows + 4 * capacity.logits);
        let end = align(pages + size_of::<api::Page>() * capacity.pages);
        Self { capacity, tokens, slots, seqs, logit_rows, pages, end }
    }
}

/// Addresses of a step's metadata on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// [`api::Step`].
    pub step: u64,
    /// u32 `[rows]`.
    pub tokens: u64,
    /// [`api::Slot`] `[rows]`.
    pub slots: u64,
    /// [`api::Seq`] `[seqs]`.
    pub seqs: u64,
    /// u32 `[logits]`.
    pub logit_rows: u64,
    /// [`api::Page`], of all sequences.
    pub pages: u64,
}

/// What the host remembers of the step that the device was given last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Taken {
    /// Rows.
    pub rows: usize,
    /// Sequences.
    pub seqs: usize,
    /// Rows of logits.
    pub logits: usize,
    /// Rows of the sequence that has the fewest.
    pub fewest: usize,
    /// Rows of the sequence that has the most.
    pub most: usize,
    /// Position of the first row of the sequence that is the longest.
    pub deepest: usize,
    /// Where the pages of sequences of more than one row begin and end.
    pub long_pages: (usize, usize),
    /// Every sequence has one row, and one row of logits.
    pub plain_decode: bool,
}

/// A device's copy of a [`StepInput`], and the way there.
pub struct StepMemory {
    context: Arc<Context>,
    /// For steps of few rows, and for all.
    layouts: [Layout; 2],
    device: GpuMemory,
    staging: Vec<(Pinned, Event)>,
    next: usize,
    pages: usize,
}

impl StepMemory {
    /// Memory for steps of up to `most`; those of up to `few` rows are kept
    /// closer together, so that less is copied for them.
    pub fn new(context: &Arc<Context>, most: Capacity, few: usize) -> Result<Self> {
        let small = Capacity { rows: few.min(most.rows), seqs: few.min(most.seqs), ..most };
        let layouts = [Layout::new(small), Layout::new(most)];
        let bytes = layouts[1].end.max(layouts[0].end);
        let device = GpuMemory::new(context, bytes, "a step's metadata")?;
        let staging = (0..IN_FLIGHT)
            .map(|_| Ok((Pinned::new(context, bytes)?, Event::new(context, false)?)))
            .collect::<Result<_>>()?;
        Ok(Self { context: context.clone(), layouts, device, staging, next: 0, pages: most.pages })
    }

    /// Makes room for `pages` pages. True where that moved everything: what was
    /// recorded with the old addresses is of no use any more.
    pub fn reserve(&mut self, pages: usize, stream: &Stream) -> Result<bool> {
        if pages <= self.pages {
            return Ok(false);
        }
        stream.synchronize()?;
        let most = Capacity { pages: pages.next_power_of_two(), ..self.layouts[1].capacity };
        *self = Self::new(&self.context, most, self.layouts[0].capacity.rows)?;
        Ok(true)
    }

    /// Copies a step over a pool of `blocks` rBlocks of `block_tokens` tokens to the
    /// device, behind what the stream was given; refuses one that contradicts itself.
    pub fn upload(&mut self, stream: &Stream, step: &StepInput<'_>, blocks: u32, block_tokens: u32) -> Result<Taken> {
        let _metadata = range(c"metadata");
        let taken = check(step, &self.layouts[1].capacity, blocks, block_tokens)?;
        let layout = self.layout(taken.rows, taken.seqs);
        let (staging, event) = &mut self.staging[self.next];
        self.next = (self.next + 1) % IN_FLIGHT;
        // The copy before last has long been made; this only makes sure.
        event.synchronize()?;
        let bytes = staging.bytes_mut();
        let header =
            api::Step { rows: taken.rows as u32, seqs: taken.seqs as u32, logits: taken.logits as u32, reserved: 0 };
        bytes[..size_of::<api::Step>()].copy_from_slice(bytemuck::bytes_of(&header));
        put(bytes, layout.tokens, step.tokens.iter().copied());
        let slot = |s: &RowSlot| api::Slot { position: s.position, block: s.block, offset: s.offset };
        put(bytes, layout.slots, step.slots.iter().map(slot));
        let seq = |s: &AttnSeq| api::Seq { row: s.row, rows: s.rows, position: s.position, page: s.run, pages: s.runs };
        put(bytes, layout.seqs, step.seqs.iter().map(seq));
        put(bytes, layout.logit_rows, step.logit_rows.iter().copied());
        let page = |r: &KvRun| api::Page { block: r.block, position: r.position, tokens: r.tokens };
        put(bytes, layout.pages, step.runs.iter().map(page));
        let end = layout.pages + size_of::<api::Page>() * step.runs.len();
        self.device.upload(stream, 0, staging, 0..end)?;
        event.record(stream)?;
        Ok(taken)
    }

    /// Where a step of so many rows and sequences lies.
    pub fn addresses(&self, rows: usize, seqs: usize) -> Addresses {
        let layout = self.layout(rows, seqs);
        let at = |offset: usize| self.device.address() + offset as u64;
        Addresses {
            step: at(0),
            tokens: at(layout.tokens),
            slots: at(layout.slots),
            seqs: at(layout.seqs),
            logit_rows: at(layout.logit_rows),
            pages: at(layout.pages),
        }
    }

    fn layout(&self, rows: usize, seqs: usize) -> Layout {
        let small = self.layouts[0].capacity;
        self.layouts[usize::from(rows > small.rows || seqs > small.seqs)]
    }
}

fn put<T: bytemuck::Pod>(bytes: &mut [u8], at: usize, values: impl ExactSizeIterator<Item = T>) {
    let to = &mut bytes[at..at + size_of::<T>() * values.len()];
    for (to, value) in to.chunks_exact_mut(size_of::<T>()).zip(values) {
        to.copy_from_slice(bytemuck::bytes_of(&value));
    }
}

/// Looks a step over: the kernels trust it.
fn check(step: &StepInput<'_>, most: &Capacity, blocks: u32, block_tokens: u32) -> Result<Taken> {
    let bad = |what: String| Err(DeviceError::Unsupported(format!("a step that contradicts itself: {what}")));
    let (rows, seqs, logits) = (step.tokens.len(), step.seqs.len(), step.logit_rows.len());
    if rows > most.rows || seqs > most.seqs || logits > most.logits {
        return bad(format!("{rows} rows, {seqs} sequences, {logits} rows of logits on a device made for {most:?}"));
    }
    if step.slots.len() != rows {
        return bad(format!("{rows} rows with {} slots", step.slots.len()));
    }
    let is_slot = |s: &RowSlot| s.block < blocks && s.offset < block_tokens;
    let is_run = |r: &KvRun| r.block < blocks && r.tokens <= block_tokens;
    if !step.slots.iter().all(is_slot) || !step.runs.iter().all(is_run) {
        return bad(format!("a token outside a pool of {blocks} blocks of {block_tokens}"));
    }
    if step.logit_rows.iter().any(|&row| row as usize >= rows) {
        return bad(format!("logits of a row outside of {rows}"));
    }
    let mut row = 0;
    let mut taken = Taken { rows, seqs, logits, plain_decode: seqs == rows && logits == rows, ..Taken::default() };
    for seq in step.seqs {
        if seq.row as usize != row || seq.rows == 0 {
            return bad(format!("a sequence of {} rows from row {}, not {row}", seq.rows, seq.row));
        }
        row += seq.rows as usize;
        if u64::from(seq.run) + u64::from(seq.runs) > step.runs.len() as u64 {
            return bad(format!("a sequence of {} pages from {} on, of {}", seq.runs, seq.run, step.runs.len()));
        }
        let rows = seq.rows as usize;
        taken.fewest = if taken.fewest == 0 { rows } else { taken.fewest.min(rows) };
        taken.most = taken.most.max(rows);
        taken.deepest = taken.deepest.max(seq.position as usize);
        if rows > 1 && seq.runs > 0 {
            let (first, end) = taken.long_pages;
            let begin = seq.run as usize;
            let first = if end == 0 { begin } else { first.min(begin) };
            taken.long_pages = (first, end.max(begin + seq.runs as usize));
        }
    }
    if row != rows {
        return bad(format!("sequences of {row} rows, of {rows}"));
    }
    Ok(taken)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOST: Capacity = Capacity { rows: 8, seqs: 4, logits: 4, pages: 8 };

    /// Two sequences, of two rows and of one, in a pool of three blocks of 16.
    struct Step {
        tokens: Vec<u32>,
        slots: Vec<RowSlot>,
        seqs: Vec<AttnSeq>,
        runs: Vec<KvRun>,
        logit_rows: Vec<u32>,
    }

    impl Step {
        fn new() -> Self {
            Self {
                tokens: vec![1, 2, 3],
                slots: [(16, 1, 0), (17, 1, 1), (4, 2, 4)]
                    .map(|(position, block, offset)| RowSlot { position, block, offset })
                    .to_vec(),
                seqs: vec![
                    AttnSeq { row: 0, rows: 2, position: 16, run: 0, runs: 2 },
                    AttnSeq { row: 2, rows: 1, position: 4, run: 2, runs: 1 },
                ],
                runs: [(0, 0, 16), (1, 16, 2), (2, 0, 5)]
                    .map(|(block, position, tokens)| KvRun { block, position, tokens })
                    .to_vec(),
                logit_rows: vec![1, 2],
            }
        }

        fn checked(&self) -> Result<Taken> {
            let Self { tokens, slots, seqs, runs, logit_rows } = self;
            check(&StepInput { tokens, slots, seqs, runs, logit_rows }, &MOST, 3, 16)
        }
    }

    #[test]
    fn what_a_step_holds_is_remembered() {
        let taken = Step::new().checked().unwrap();
        let expected = Taken {
            rows: 3,
            seqs: 2,
            logits: 2,
            fewest: 1,
            most: 2,
            deepest: 16,
            long_pages: (0, 2),
            plain_decode: false,
        };
        assert_eq!(taken, expected);
    }

    #[test]
    fn a_step_that_contradicts_itself_is_refused() {
        const OUTSIDE: &str = "a token outside a pool of 3 blocks of 16";
        type Spoil = fn(&mut Step);
        let spoilt: [(&str, Spoil); 10] = [
            ("9 rows", |s| s.tokens = vec![0; 9]),
            ("3 rows with 2 slots", |s| s.slots.truncate(2)),
            (OUTSIDE, |s| s.slots[0].block = 3),
            (OUTSIDE, |s| s.slots[2].offset = 16),
            (OUTSIDE, |s| s.runs[2].block = 3),
            (OUTSIDE, |s| s.runs[0].tokens = 17),
            ("logits of a row outside of 3", |s| s.logit_rows[0] = 3),
            ("a sequence of 1 rows from row 1, not 2", |s| s.seqs[1].row = 1),
            ("a sequence of 2 pages from 2 on, of 3", |s| s.seqs[1].runs = 2),
            ("sequences of 2 rows, of 3", |s| s.seqs.truncate(1)),
        ];
        for (what, spoil) in spoilt {
            let mut step = Step::new();
            spoil(&mut step);
            let error = step.checked().unwrap_err().to_string();
            assert!(error.contains(what), "{error:?} does not say {what:?}");
        }
    }
}
