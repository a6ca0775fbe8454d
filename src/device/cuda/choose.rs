//! Tokens chosen where the logits lie: only their numbers come to the host.

#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::sync::Arc;

use super::api;
use super::buffer::Buffer;
use super::driver::{Context, Stream};
use super::kernels::{Grid, Kernel, Kernels};
use super::memory::{GpuMemory, Pinned};
use crate::device::{Choice, Chosen, DeviceError, Logprobs, Result};

/// Most alternatives of a row of logprobs.
const TOP: usize = 20;
/// Largest vocabulary of the kernel.
const MAX_VOCAB: usize = 1 << 18;
/// No logprobs for this row.
const NONE: u32 = u32::MAX;
/// Blocks that share a row.
const CLUSTER: u32 = 8;

/// Results of a row: token, flag, logprob of the token, `TOP` tokens, `TOP`
/// logprobs; arrays of rows each.
const WORDS: usize = 3 + 2 * TOP;

/// The kernels and their memory.
pub struct Chooser {
    context: Arc<Context>,
    argmax: Kernel,
    sample: Option<Kernel>,
    sample_global: Kernel,
    logprobs: Kernel,
    max_rows: usize,
    vocab: usize,
    clusters: bool,
    /// Parameters of the rows, counts of logprobs, entries: on the device and on
    /// their way there.
    parameters: (GpuMemory, Pinned),
    /// In the host's memory, where the kernels write them: a copy takes longer.
    results: Pinned,
    /// Weights of rows that do not fit shared memory.
    weights: Option<GpuMemory>,
}

impl Chooser {
    /// For up to `max_rows` rows of `vocab` logits.
    pub fn new(context: &Arc<Context>, kernels: &Kernels, max_rows: usize, vocab: usize) -> Result<Self> {
        if vocab > MAX_VOCAB {
            return Err(DeviceError::Unsupported(format!(
                "CUDA: choosing from a vocabulary of {vocab}; the kernel takes {MAX_VOCAB}"
            )));
        }
        let properties = context.properties();
        let clusters = properties.capability.0 >= 9;
        let shared = vocab.div_ceil(CLUSTER as usize).div_ceil(4) * 16;
        let fits = clusters && shared + (8 << 10) <= properties.shared_memory as usize;
        let weights = match fits {
            true => None,
            false => Some(GpuMemory::new(context, max_rows * vocab.next_multiple_of(4) * 4, "choosing tokens")?),
        };
        let bytes = parameter_bytes(max_rows, max_rows * 64);
        Ok(Self {
            context: context.clone(),
            argmax: kernels.plain("argmax", 0)?,
            sample: fits.then(|| kernels.plain("sample", shared as u32)).transpose()?,
            sample_global: kernels.plain("sample_global", 0)?,
            logprobs: kernels.plain("logprobs", 0)?,
            max_rows,
            vocab,
            clusters,
            parameters: (GpuMemory::new(context, bytes, "choosing tokens")?, Pinned::new(context, bytes)?),
            results: Pinned::new(context, max_rows * WORDS * 4)?,
            weights,
        })
    }

    /// Rows and vocabulary that it was made for.
    pub fn fits(&self, rows: usize, vocab: usize) -> bool {
        rows <= self.max_rows && vocab == self.vocab
    }

    /// See [`Device::choose`](crate::device::Device::choose). `counts` is the
    /// address of the number of rows in use.
    pub fn run(
        &mut self,
        stream: &Stream,
        counts: u64,
        logits: &Buffer,
        rows: usize,
        choices: &[Choice<'_>],
        chosen: &mut Vec<Chosen>,
    ) -> Result<()> {
        let vocab = self.vocab;
        assert!(
            logits.is_single() && logits.cols() == vocab && rows <= logits.rows() && rows <= self.max_rows,
            "logits"
        );
        assert!(choices.iter().all(|c| (c.row as usize) < rows), "a choice outside the logits");
        let greedy = choices.iter().all(|c| c.temperature == 0.0 && c.bias.is_empty() && c.seen.is_empty());
        let logprobs = choices.iter().any(|c| c.logprobs.is_some());
        if !greedy || logprobs {
            self.upload(stream, rows, choices)?;
        }
        let at = |word: usize| self.results.address() + (word * self.max_rows * 4) as u64;
        if greedy {
            let (cluster, threads) = match rows {
                _ if !self.clusters => (1, 1024),
                0..=16 => (8, 1024),
                17..=64 => (8, 512),
                _ => (1, 1024),
            };
            let arguments = api::Argmax {
                logits: logits.address(),
                tokens: at(0),
                flags: at(1),
                rows: counts,
                vocab: vocab as u32,
                stride: vocab as u32,
            };
            let grid = Grid { blocks: (cluster, rows.max(1) as u32, 1), threads, cluster };
            // SAFETY: the logits hold `rows` rows and the results have room for
            // them, as checked.
            unsafe { self.argmax.overlap(stream, grid, &arguments)? };
        } else {
            let arguments = api::Sample {
                logits: logits.address(),
                weights: self.weights.as_ref().map_or(0, GpuMemory::address),
                params: self.parameters.0.address(),
                entries: self.parameters.0.address() + entries_at(self.max_rows) as u64,
                tokens: at(0),
                flags: at(1),
                rows: counts,
                vocab: vocab as u32,
                stride: vocab as u32,
            };
            let (kernel, cluster) = self.sample.map_or((self.sample_global, 1), |kernel| (kernel, CLUSTER));
            let threads = if rows < 32 { 1024 } else { 512 };
            let grid = Grid { blocks: (cluster, rows.max(1) as u32, 1), threads, cluster };
            // SAFETY: as above; parameters and entries were uploaded for `rows`
            // rows, and name tokens of the vocabulary.
            unsafe { kernel.overlap(stream, grid, &arguments)? };
        }
        if logprobs {
            let arguments = api::Logprobs {
                logits: logits.address(),
                tokens: at(0),
                counts: self.parameters.0.address() + counts_at(self.max_rows) as u64,
                chosen: at(2),
                top_tokens: at(3),
                top: at(3 + TOP),
                rows: counts,
                vocab: vocab as u32,
                stride: vocab as u32,
            };
            let cluster = if self.clusters { CLUSTER } else { 1 };
            let grid = Grid { blocks: (cluster, rows.max(1) as u32, 1), threads: 1024, cluster };
            // SAFETY: as above.
            unsafe { self.logprobs.overlap(stream, grid, &arguments)? };
        }
        stream.synchronize()?;
        self.read(choices, chosen);
        Ok(())
    }

    fn upload(&mut self, stream: &Stream, rows: usize, choices: &[Choice<'_>]) -> Result<()> {
        // The stream has come by since the last upload: results were waited for.
        let mut entries: Vec<api::SampleEntry> = Vec::new();
        let none = api::SampleRow {
            unit: 0,
            entry: 0,
            entries: 0,
            temperature: 0.0,
            top_p: 1.0,
            min_p: 0.0,
            top_k: 0,
            repetition: 1.0,
            presence: 0.0,
            frequency: 0.0,
            reserved: 0,
        };
        let mut params = vec![none; rows];
        let mut counts = vec![NONE; rows];
        for choice in choices {
            let first = entries.len();
            fold(choice, &mut entries);
            let row = choice.row as usize;
            params[row] = api::SampleRow {
                // Exact: a multiple of 2⁻⁵³.
                unit: (choice.unit * (1u64 << 53) as f64) as u64,
                entry: first as u32,
                entries: (entries.len() - first) as u32,
                temperature: choice.temperature,
                top_p: choice.top_p,
                min_p: choice.min_p,
                top_k: choice.top_k,
                repetition: choice.repetition,
                presence: choice.presence,
                frequency: choice.frequency,
                reserved: 0,
            };
            counts[row] = choice.logprobs.map_or(NONE, |n| n.min(TOP as u32).min(self.vocab as u32));
        }
        let needed = parameter_bytes(self.max_rows, entries.len());
        if needed > self.parameters.0.len() {
            let bytes = needed.next_power_of_two();
            self.parameters =
                (GpuMemory::new(&self.context, bytes, "choosing tokens")?, Pinned::new(&self.context, bytes)?);
        }
        let (device, host) = &mut self.parameters;
        let mut put = |at: usize, bytes: &[u8]| {
            host.bytes_mut()[at..at + bytes.len()].copy_from_slice(bytes);
            device.upload(stream, at, host, at..at + bytes.len())
        };
        put(0, bytemuck::cast_slice(&params))?;
        put(counts_at(self.max_rows), bytemuck::cast_slice(&counts))?;
        put(entries_at(self.max_rows), bytemuck::cast_slice(&entries))
    }

    /// What the kernels have written.
    fn read(&self, choices: &[Choice<'_>], chosen: &mut Vec<Chosen>) {
        let words: &[u32] = bytemuck::cast_slice(self.results.bytes());
        let max_rows = self.max_rows;
        for choice in choices {
            let row = choice.row as usize;
            let (token, flag) = (words[row], words[max_rows + row]);
            let top = |n: u32| {
                let tokens = &words[3 * max_rows + row * TOP..][..n as usize];
                let values = &words[(3 + TOP) * max_rows + row * TOP..][..n as usize];
                tokens.iter().zip(values).map(|(&token, &bits)| (token, f32::from_bits(bits))).collect()
            };
            chosen.push(Chosen {
                token: (flag == 0).then_some(token),
                logprobs: choice.logprobs.map(|n| Logprobs {
                    chosen: f32::from_bits(words[2 * max_rows + row]),
                    top: top(n.min(TOP as u32).min(self.vocab as u32)),
                }),
            });
        }
    }
}

/// Bias and penalties of a choice, a token once.
fn fold(choice: &Choice<'_>, entries: &mut Vec<api::SampleEntry>) {
    let mut by_token: BTreeMap<u32, api::SampleEntry> = BTreeMap::new();
    let empty = |token| api::SampleEntry { token, generated: 0, seen: 0, bias: 0.0 };
    for &(token, bias) in choice.bias {
        by_token.entry(token).or_insert(empty(token)).bias += bias;
    }
    for &(token, generated) in choice.seen {
        let entry = by_token.entry(token).or_insert(empty(token));
        (entry.generated, entry.seen) = (generated, 1);
    }
    entries.extend(by_token.into_values());
}

const fn counts_at(rows: usize) -> usize {
    rows * size_of::<api::SampleRow>()
}

const fn entries_at(rows: usize) -> usize {
    (counts_at(rows) + rows * 4).next_multiple_of(16)
}

const fn parameter_bytes(rows: usize, entries: usize) -> usize {
    entries_at(rows) + entries * size_of::<api::SampleEntry>()
}
