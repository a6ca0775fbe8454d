//! `distkv bench model`: prefill and decode of a model by batch and depth,
//! beside the floor that the machine's read bandwidth sets in the same run.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{anyhow, ensure};
use half::bf16;

use super::report::{Output, Report, histogram};
use crate::attention::LocalOnly;
use crate::cli::options::{EngineOptions, open_model};
use crate::device::cpu::bandwidth::ReadSweep;
use crate::device::cpu::{CpuDevice, CpuOptions, Math};
use crate::device::{AttnSeq, Device, RowSlot, StepInput};
use crate::kv::pool::KvPool;
use crate::kv::rblock::{KvDtype, KvRun};
use crate::model::transformer::Transformer;

/// What to measure.
#[derive(clap::Args)]
#[command(after_help = "Example:
  distkv model synth --shape bench-125m --dtype bf16 --seed 1 --out m && distkv bench model --model m --depth 0,8192")]
pub struct Args {
    /// Model: a Hugging Face directory or a .gguf file.
    #[arg(long, env = "DISTKV_MODEL")]
    model: PathBuf,
    /// Prompt tokens of the prefill measurement; 0 leaves it out.
    #[arg(long, default_value_t = 512)]
    prefill: usize,
    /// Tokens already in the KV cache when a decode measurement begins.
    #[arg(long, value_delimiter = ',', default_value = "0,8192")]
    depth: Vec<usize>,
    /// Sequences decoded together.
    #[arg(long, value_delimiter = ',', default_value = "1")]
    batch: Vec<usize>,
    /// Decode steps, or prefills, of each measurement.
    #[arg(long, default_value_t = 64)]
    steps: usize,
    #[command(flatten)]
    engine: EngineOptions,
    #[command(flatten)]
    output: Output,
}

struct Bench {
    device: CpuDevice,
    model: Transformer<CpuDevice>,
    pool: KvPool,
    logits: Vec<f32>,
    blocks_a_sequence: usize,
}

/// Runs the benchmark.
pub fn run(args: Args) -> anyhow::Result<()> {
    let files = open_model(&args.model)?;
    let config = files.config.clone();
    let deepest = args.depth.iter().copied().max().unwrap_or(0);
    let batch = args.batch.iter().copied().max().unwrap_or(1);
    ensure!(batch > 0 && args.steps > 0, "--batch and --steps must be at least 1");
    ensure!(files.weights.total_bytes() > 0, "the model has no weights");
    let threads = args.engine.threads(1);
    let parts = args.engine.model_parts(&files, 0, threads)?;
    let rows = args.prefill.max(batch).max(1);
    let shape = config.kv_shape(args.engine.block_tokens, parts.kv_dtype);
    let blocks_a_sequence = shape.blocks_for((deepest + args.steps).max(args.prefill));
    let mut device =
        CpuDevice::new(CpuOptions { threads, pin: !args.engine.no_pin, math: parts.math, max_rows: rows, isa: None })?;
    let mut progress = parts.progress;
    let model = Transformer::load(&mut device, &config, files.weights.as_ref(), rows, batch, &mut progress)?;
    let pool = KvPool::new(shape, (blocks_a_sequence * batch) as u32)?;
    fill(&pool)?;
    let mut report = Report::new(format!(
        "{} on {}: {} layers, hidden {}, {:.1} MB of weights, KV {:?}",
        files.name,
        device.describe(),
        config.layers,
        config.hidden,
        files.weights.total_bytes() as f64 / 1e6,
        parts.kv_dtype,
    ));
    let mut sweep = ReadSweep::new(threads)?;
    let mut bench = Bench { device, model, pool, logits: vec![0.0; batch * config.vocab], blocks_a_sequence };

    if args.prefill > 0 {
        let repeats = args.steps.clamp(1, 8);
        let (mut times, mut best) = (histogram(), Duration::MAX);
        bench.prefill(args.prefill, config.vocab)?;
        for _ in 0..repeats {
            let took = bench.prefill(args.prefill, config.vocab)?;
            times.saturating_record(took.as_nanos() as u64);
            best = best.min(took);
        }
        let median = times.value_at_quantile(0.5) as f64 / 1e9;
        report.latency(format!("prefill {}", args.prefill), times);
        report.figure(format!("prefill {} median", args.prefill), args.prefill as f64 / median, "tokens/s");
        report.figure(format!("prefill {} best", args.prefill), args.prefill as f64 / best.as_secs_f64(), "tokens/s");
    }
    for &depth in &args.depth {
        for &batch in &args.batch {
            // The floor is measured before and after, since the machine drifts.
            let mut bandwidth = sweep.sweep();
            let mut times = histogram();
            bench.decode(batch, depth, 0, config.vocab)?;
            for step in 0..args.steps {
                let took = bench.decode(batch, depth, step, config.vocab)?;
                times.saturating_record(took.as_nanos() as u64);
            }
            bandwidth = bandwidth.max(sweep.sweep());
            let median = times.value_at_quantile(0.5) as f64 / 1e9;
            let kv = (batch * (depth + args.steps / 2) * shape.token_bytes()) as f64;
            let bytes = files.weights.total_bytes() as f64 + kv;
            let name = format!("decode batch {batch} depth {depth}");
            report.latency(name.clone(), times);
            report.figure(format!("{name} median"), batch as f64 / median, "tokens/s");
            report.figure(format!("{name} bytes read"), bytes / median / 1e9, "GB/s");
            report.figure(format!("{name} of read bandwidth"), bytes / median / bandwidth, "");
        }
    }
    report.figure("read bandwidth", sweep.sweep() / 1e9, "GB/s");
    report.figure("threads", threads as f64, "");
    report.figure("exact f32 activations", f64::from(u8::from(matches!(parts.math, Math::Exact))), "");
    report.emit(&args.output)
}

/// Fills the KV with small numbers of both signs: zeros would flatter.
fn fill(pool: &KvPool) -> anyhow::Result<()> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut chunk = vec![0u8; 1 << 20];
    let len = pool.shape().block_bytes() * pool.blocks() as usize;
    for start in (0..len).step_by(chunk.len()) {
        let size = pool.shape().dtype.size();
        for element in chunk.chunks_exact_mut(size) {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let value = (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5;
            match pool.shape().dtype {
                KvDtype::Bf16 => element.copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
                KvDtype::F16 => element.copy_from_slice(&half::f16::from_f32(value).to_le_bytes()),
                KvDtype::F32 => element.copy_from_slice(&value.to_le_bytes()),
            }
        }
        pool.memory().write(start, &chunk[..chunk.len().min(len - start)])?;
    }
    Ok(())
}

impl Bench {
    fn slot(&self, sequence: usize, position: usize) -> RowSlot {
        let size = self.pool.shape().block_tokens as usize;
        let block = (sequence * self.blocks_a_sequence + position / size) as u32;
        RowSlot { position: position as u32, block, offset: (position % size) as u32 }
    }

    fn runs(&self, sequence: usize, tokens: usize, runs: &mut Vec<KvRun>) -> (u32, u32) {
        let size = self.pool.shape().block_tokens as usize;
        let first = runs.len() as u32;
        for start in (0..tokens).step_by(size) {
            let RowSlot { block, position, .. } = self.slot(sequence, start);
            runs.push(KvRun { block, position, tokens: (tokens - start).min(size) as u32 });
        }
        (first, runs.len() as u32 - first)
    }

    fn prefill(&mut self, tokens: usize, vocab: usize) -> anyhow::Result<Duration> {
        let ids: Vec<u32> = (0..tokens).map(|i| (i * 7919 % vocab) as u32).collect();
        let slots: Vec<_> = (0..tokens).map(|p| self.slot(0, p)).collect();
        let mut runs = Vec::new();
        let (run, count) = self.runs(0, tokens, &mut runs);
        let seqs = [AttnSeq { row: 0, rows: tokens as u32, position: 0, run, runs: count }];
        self.step(&StepInput { tokens: &ids, slots: &slots, seqs: &seqs, runs: &runs }, &[tokens as u32 - 1], vocab)
    }

    fn decode(&mut self, batch: usize, depth: usize, step: usize, vocab: usize) -> anyhow::Result<Duration> {
        let ids: Vec<u32> = (0..batch).map(|i| ((i * 7919 + step * 31) % vocab) as u32).collect();
        let slots: Vec<_> = (0..batch).map(|s| self.slot(s, depth + step)).collect();
        let mut runs = Vec::new();
        let seqs: Vec<_> = (0..batch)
            .map(|s| {
                let (run, count) = self.runs(s, depth + step + 1, &mut runs);
                AttnSeq { row: s as u32, rows: 1, position: (depth + step) as u32, run, runs: count }
            })
            .collect();
        let wanted: Vec<u32> = (0..batch as u32).collect();
        self.step(&StepInput { tokens: &ids, slots: &slots, seqs: &seqs, runs: &runs }, &wanted, vocab)
    }

    fn step(&mut self, input: &StepInput<'_>, wanted: &[u32], vocab: usize) -> anyhow::Result<Duration> {
        let logits = &mut self.logits[..wanted.len() * vocab];
        let started = Instant::now();
        self.model.forward(&mut self.device, &self.pool, input, wanted, &mut LocalOnly, logits)?;
        let took = started.elapsed();
        if logits.iter().all(|l| l.is_finite()) {
            Ok(took)
        } else {
            Err(anyhow!("the model computed no finite logits"))
        }
    }
}
