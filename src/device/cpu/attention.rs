//! Paged MicroAttention: how a step's rows are cut into items that threads
//! claim, and how the parts of one row are joined.
//!
//! A sequence's runs are split where one thread would otherwise walk a long
//! context alone; each part leaves its unnormalised output, maximum and sum.
#![allow(unsafe_code)]

use super::attention_few::Few;
use super::attention_many::{LANES, Many};
use super::buffer::{Aligned, Shared};
use super::kv_view::KvView;
use super::product::SendPtr;
use super::simd::{Isa, dispatch};
use super::threads::ThreadPool;
use crate::device::{AttentionShape, AttnSeq};
use crate::kv::pool::KvPool;
use crate::kv::rblock::KvRun;

/// Query vectors that share a KV head, from which on they are worth a lane each.
const MANY: usize = 16;
/// Tokens that are worth a part of their own.
const PART_TOKENS: usize = 256;
/// Rows of a head are padded to this many elements, on every instruction set.
pub(super) const PAD: usize = 16;

/// Attention of all rows of `seqs`.
pub(super) struct Attend<'a> {
    pub shape: &'a AttentionShape,
    pub window: Option<u32>,
    pub layer: usize,
    pub pool: &'a KvPool,
    /// Rows of `q_stride`, query heads first.
    pub q: &'a [f32],
    pub q_stride: usize,
    pub seqs: &'a [AttnSeq],
    pub runs: &'a [KvRun],
    /// Rows of `o_stride`.
    pub o: &'a mut [f32],
    pub o_stride: usize,
    /// Rows of `lse_stride`.
    pub lse: &'a mut [f32],
    pub lse_stride: usize,
}

/// A sequence's parts: part `p` of row `r` and head `h` is partial
/// `first + (p · rows + r) · heads + h`.
#[derive(Clone, Copy)]
struct Plan {
    parts: u32,
    first: u32,
}

/// What a thread claims.
#[derive(Clone, Copy)]
struct Item {
    seq: u32,
    part: u32,
    /// The KV head, and the first of its query vectors; `None`: all of them.
    head: Option<(u32, u32)>,
}

/// Where a kernel leaves a query vector's result.
#[derive(Clone, Copy)]
pub(super) struct Partials {
    /// `[partials, padded head_dim]`, unnormalised.
    pub o: *mut f32,
    /// `[partials, 2]`: maximum (of scores in units of ln 2) and sum.
    pub stats: *mut f32,
}

// SAFETY: items write disjoint partials.
unsafe impl Send for Partials {}
// SAFETY: as above.
unsafe impl Sync for Partials {}

/// Memory that attention works in.
pub(super) struct Attention {
    isa: Isa,
    plans: Vec<Plan>,
    items: Vec<Item>,
    partials: Aligned,
    scratch: Vec<Aligned>,
}

impl Attention {
    pub fn new(isa: Isa, threads: usize) -> Self {
        let scratch = (0..threads).map(|_| Aligned::default()).collect();
        Self { isa, plans: Vec::new(), items: Vec::new(), partials: Aligned::default(), scratch }
    }

    pub fn run(&mut self, threads: &mut ThreadPool, job: Attend<'_>) {
        let Attend { shape, window, q, q_stride, seqs, runs, o_stride, lse_stride, .. } = job;
        let kv = KvView::new(job.pool, job.layer);
        let (d, heads) = (shape.head_dim, shape.heads);
        assert!(kv.kv_heads == shape.kv_heads && kv.head_dim == d && heads % shape.kv_heads == 0);
        assert!(q_stride >= shape.q_width() && o_stride >= shape.q_width() && lse_stride >= heads);
        for seq in seqs {
            let end = (seq.row + seq.rows) as usize;
            assert!(end * q_stride <= q.len() && end * o_stride <= job.o.len() && end * lse_stride <= job.lse.len());
            assert!(of(seq, runs).iter().all(|run| kv.holds(run)), "a run out of pool");
        }
        let partials = self.plan(shape, seqs, runs, threads.threads());
        let padded = d.next_multiple_of(PAD);
        let group = heads / shape.kv_heads;
        let few = Few::scratch(shape.kv_heads, MANY, padded, kv.block_tokens);
        for scratch in &mut self.scratch {
            room(scratch, few.max(Many::scratch(padded)));
        }
        room(&mut self.partials, partials * (padded + 2));
        let (isa, plans, items) = (self.isa, &self.plans, &self.items);
        let base = self.partials.f32s_mut().as_mut_ptr();
        let partials = Partials { o: base, stats: base.wrapping_add(partials * padded) };
        let scratch = Shared::new(&mut self.scratch);
        let q = SendPtr(q.as_ptr());
        threads.run(items.len(), 1, &|thread, range| {
            // SAFETY: each thread of a fork has its own index.
            let scratch = unsafe { &mut scratch.range(thread..thread + 1)[0] };
            let scratch = scratch.f32s_mut().as_mut_ptr();
            for item in &items[range] {
                let seq = &seqs[item.seq as usize];
                let plan = plans[item.seq as usize];
                let all = of(seq, runs);
                let cut = |part: u32| all.len() * part as usize / plan.parts as usize;
                let first = plan.first as usize + (item.part * seq.rows) as usize * heads;
                let runs = &all[cut(item.part)..cut(item.part + 1)];
                let q = q.get().wrapping_add(seq.row as usize * q_stride);
                let scale = shape.scale * std::f32::consts::LOG2_E;
                let (rows, position) = (seq.rows as usize, seq.position);
                match item.head {
                    None => {
                        let kernel = Few {
                            kv,
                            q,
                            q_stride,
                            rows,
                            position,
                            group,
                            scale,
                            window,
                            runs,
                            scratch,
                            partials,
                            first,
                        };
                        // SAFETY: the rows and runs were checked above, scratch
                        // and partials were sized for them, and no other item
                        // has this sequence's part.
                        unsafe { dispatch(isa, kernel) };
                    }
                    Some((head, lane)) => {
                        let (head, lane) = (head as usize, lane as usize);
                        let lanes = LANES.min(rows * group - lane);
                        let kernel = Many {
                            kv,
                            q,
                            q_stride,
                            head,
                            lane,
                            lanes,
                            position,
                            group,
                            scale,
                            window,
                            runs,
                            scratch,
                            partials,
                            first,
                            heads,
                        };
                        // SAFETY: as above; other items have other lanes.
                        unsafe { dispatch(isa, kernel) };
                    }
                }
            }
        });
        let o = Shared::new(job.o);
        let lse = Shared::new(job.lse);
        let rows = seqs.iter().map(|s| s.rows as usize).sum::<usize>();
        // Joining is short: fork only where there is much of it.
        let grain = (65536 / (heads * padded)).max(1);
        threads.run(rows, grain, &|_, range| {
            let mut before = 0;
            for (seq, plan) in seqs.iter().zip(plans) {
                let start = range.start.clamp(before, before + seq.rows as usize) - before;
                let end = range.end.clamp(before, before + seq.rows as usize) - before;
                before += seq.rows as usize;
                for r in start..end {
                    let row = seq.row as usize + r;
                    for h in 0..heads {
                        let index = |part| plan.first as usize + (part * seq.rows as usize + r) * heads + h;
                        // SAFETY: row `row` is this chunk's.
                        let (o, lse) = unsafe {
                            let o = o.range(row * o_stride + h * d..row * o_stride + (h + 1) * d);
                            (o, lse.range(row * lse_stride + h..row * lse_stride + h + 1))
                        };
                        // SAFETY: all partials were written by the fork before.
                        lse[0] = unsafe { join(partials, padded, plan.parts as usize, index, o) };
                    }
                }
            }
        });
    }

    /// Cuts the work; returns the partials needed.
    fn plan(&mut self, shape: &AttentionShape, seqs: &[AttnSeq], runs: &[KvRun], threads: usize) -> usize {
        self.plans.clear();
        self.items.clear();
        let group = shape.heads / shape.kv_heads;
        let tokens = |seq: &AttnSeq| of(seq, runs).iter().map(|run| run.tokens as usize).sum::<usize>();
        // In units of a query row over a token, so that long prompts weigh.
        let total: usize = seqs.iter().map(|s| tokens(s) * s.rows as usize).sum();
        let share = if threads == 1 { usize::MAX } else { (total / (threads * 4)).max(1) };
        let mut partials = 0;
        for (index, seq) in seqs.iter().enumerate() {
            let vectors = seq.rows as usize * group;
            let tokens = tokens(seq);
            let tiles = if vectors < MANY { 1 } else { vectors.div_ceil(LANES) * shape.kv_heads };
            let wanted = (tokens * seq.rows as usize).div_ceil(share).div_ceil(tiles);
            let most = (tokens / PART_TOKENS).min(seq.runs as usize);
            let parts = wanted.min(most).max(1) as u32;
            self.plans.push(Plan { parts, first: partials as u32 });
            partials += parts as usize * seq.rows as usize * shape.heads;
            for part in 0..parts {
                if vectors < MANY {
                    self.items.push(Item { seq: index as u32, part, head: None });
                } else {
                    for head in 0..shape.kv_heads as u32 {
                        for lane in (0..vectors).step_by(LANES) {
                            self.items.push(Item { seq: index as u32, part, head: Some((head, lane as u32)) });
                        }
                    }
                }
            }
        }
        partials
    }
}

/// A sequence's runs.
fn of<'a>(seq: &AttnSeq, runs: &'a [KvRun]) -> &'a [KvRun] {
    if seq.runs == 0 { &[] } else { &runs[seq.run as usize..][..seq.runs as usize] }
}

/// Makes room for `len` f32. Contexts grow a token at a time and room doubles, so
/// this is rare; where the system has no more memory there is no going on, as
/// with any other allocation.
fn room(memory: &mut Aligned, len: usize) {
    memory.grow(len * 4).unwrap_or_else(|error| panic!("attention: {error}"));
}

/// Joins one row and head's partials into `o`; returns the lse.
///
/// # Safety
/// Partials `index(0..parts)` are written.
unsafe fn join(partials: Partials, padded: usize, parts: usize, index: impl Fn(usize) -> usize, o: &mut [f32]) -> f32 {
    // SAFETY: as promised.
    let stats = |part| unsafe { partials.stats.add(2 * index(part)).cast::<[f32; 2]>().read() };
    let max = (0..parts).map(|part| stats(part)[0]).fold(f32::NEG_INFINITY, f32::max);
    o.fill(0.0);
    if max == f32::NEG_INFINITY {
        return f32::NEG_INFINITY;
    }
    let weight = |part| (stats(part)[0] - max).exp2();
    let sum: f32 = (0..parts).map(|part| stats(part)[1] * weight(part)).sum();
    for part in 0..parts {
        let factor = weight(part) / sum;
        // SAFETY: as promised.
        let from = unsafe { std::slice::from_raw_parts(partials.o.add(index(part) * padded), o.len()) };
        if factor > 0.0 {
            for (o, x) in o.iter_mut().zip(from) {
                *o += x * factor;
            }
        }
    }
    (max + sum.log2()) * std::f32::consts::LN_2
}
