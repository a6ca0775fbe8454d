//! `distkv bench model`: prefill and decode of a model by batch and depth,
//! beside the floor that the machine's read bandwidth sets in the same run.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{anyhow, ensure};

use super::kv::fill;
use super::report::{Output, Report, histogram};
use crate::attention::LocalOnly;
use crate::cli::options::{EngineOptions, open_model};
use crate::device::cpu::bandwidth::ReadSweep;
use crate::device::cpu::{CpuDevice, Math};
use crate::device::cuda::CudaDevice;
use crate::device::{AttnSeq, Choice, Chosen, Device, RowSlot, StepInput, nvtx};
use crate::kv::pool::KvPool;
use crate::kv::rblock::KvRun;
use crate::model::config::ModelConfig;
use crate::model::sampler::{Sampler, SamplingParams};
use crate::model::transformer::Transformer;
use crate::model::weights::Param;
use crate::node::device::{DeviceName, EngineDevice};

/// What to measure.
#[derive(clap::Args)]
#[command(after_help = "Example:
  distkv model synth --shape bench-125m --dtype bf16 --seed 1 --out m && distkv bench model --model m --depth 0,8192")]
pub struct Args {
    /// Model: a Hugging Face directory or a .gguf file.
    #[arg(long, env = "DISTKV_MODEL")]
    model: PathBuf,
    /// Prompt tokens of the prefill measurements; 0 leaves it out.
    #[arg(long, value_delimiter = ',', default_value = "512")]
    prefill: Vec<usize>,
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

struct Bench<D: Device> {
    device: D,
    model: Transformer<D>,
    pool: KvPool,
    logits: Vec<f32>,
    chosen: Vec<Chosen>,
    blocks_a_sequence: usize,
}

/// Runs the benchmark.
pub fn run(args: Args) -> anyhow::Result<()> {
    match args.engine.device {
        DeviceName::Cpu => {
            let mut sweep = ReadSweep::new(args.engine.threads(1))?;
            run_on::<CpuDevice>(&args, move |_| Ok(sweep.sweep()))
        }
        DeviceName::Cuda(_) => run_on::<CudaDevice>(&args, |device| Ok(device.read_bandwidth()?)),
    }
}

/// Runs it on one kind of device; `sweep` measures the bytes a second that the
/// device reads.
fn run_on<D: EngineDevice>(args: &Args, mut sweep: impl FnMut(&mut D) -> anyhow::Result<f64>) -> anyhow::Result<()>
where
    D::Matrix: 'static,
    D::Vector: 'static,
    D::Buffer: 'static,
{
    let files = open_model(&args.model)?;
    let config = files.config.clone();
    let deepest = args.depth.iter().copied().max().unwrap_or(0);
    let batch = args.batch.iter().copied().max().unwrap_or(1);
    ensure!(batch > 0 && args.steps > 0, "--batch and --steps must be at least 1");
    ensure!(files.weights.total_bytes() > 0, "the model has no weights");
    let longest = args.prefill.iter().copied().max().unwrap_or(0);
    let threads = args.engine.threads(1);
    let mut parts = args.engine.model_parts(&files, None, threads)?;
    let shape = parts.kv_shape();
    // One prompt is prefilled at a time: its KV may lie where sequences' will.
    let blocks_a_sequence = shape.blocks_for(deepest + args.steps);
    let blocks = (blocks_a_sequence * batch).max(shape.blocks_for(longest)).max(4);
    parts.kv_bytes = Some(blocks * shape.block_bytes());
    (parts.schedule.max_rows, parts.schedule.max_sequences) = (longest.max(batch).max(1), batch);
    let rows = parts.schedule.max_rows;
    nvtx::open();
    let mut device = D::make(!args.engine.no_pin, &parts)?;
    let started = Instant::now();
    let model = Transformer::load(&mut device, &config, files.weights.as_ref(), rows, batch, &mut parts.progress)?;
    let pool = device.pool(shape, parts.kv_bytes)?;
    let loading = started.elapsed();
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
    report.figure("weights loaded", files.weights.total_bytes() as f64 / loading.as_secs_f64() / 1e9, "GB/s");
    // Of an embedding that is no output projection a step reads a row a sequence.
    let embedding = files.weights.get(Param::Embedding).filter(|_| !config.tied_embeddings);
    let read_a_step = files.weights.total_bytes() - embedding.map_or(0, |table| table.bytes.len() as u64);
    let mut bench =
        Bench { device, model, pool, logits: vec![0.0; batch * config.vocab], chosen: Vec::new(), blocks_a_sequence };

    for &prefill in args.prefill.iter().filter(|&&tokens| tokens > 0) {
        let repeats = args.steps.clamp(1, 8);
        let (mut times, mut best) = (histogram(), Duration::MAX);
        bench.prefill(prefill, config.vocab)?;
        for _ in 0..repeats {
            let took = bench.prefill(prefill, config.vocab)?;
            times.saturating_record(took.as_nanos() as u64);
            best = best.min(took);
        }
        let median = times.value_at_quantile(0.5) as f64 / 1e9;
        report.latency(format!("prefill {prefill}"), times);
        report.figure(format!("prefill {prefill} median"), prefill as f64 / median, "tokens/s");
        report.figure(format!("prefill {prefill} best"), prefill as f64 / best.as_secs_f64(), "tokens/s");
        report.figure(format!("prefill {prefill}"), flops(&config, prefill) / median / 1e12, "TFLOP/s");
    }
    let mut best = sweep(&mut bench.device)?;
    for &depth in &args.depth {
        for &batch in &args.batch {
            // The floor is measured before and after, since the machine drifts.
            let mut bandwidth = sweep(&mut bench.device)?;
            let mut times = histogram();
            bench.decode(batch, depth, 0, config.vocab)?;
            for step in 0..args.steps {
                let took = bench.decode(batch, depth, step, config.vocab)?;
                times.saturating_record(took.as_nanos() as u64);
            }
            bandwidth = bandwidth.max(sweep(&mut bench.device)?);
            best = best.max(bandwidth);
            let median = times.value_at_quantile(0.5) as f64 / 1e9;
            let kv = (batch * (depth + args.steps / 2) * shape.token_bytes()) as f64;
            let bytes = read_a_step as f64 + kv;
            let name = format!("decode batch {batch} depth {depth}");
            report.latency(name.clone(), times);
            report.figure(format!("{name} median"), batch as f64 / median, "tokens/s");
            report.figure(format!("{name} bytes read"), bytes / median / 1e9, "GB/s");
            report.figure(format!("{name} of read bandwidth"), bytes / median / bandwidth, "");
        }
    }
    report.figure("read bandwidth", best / 1e9, "GB/s");
    report.figure("threads", threads as f64, "");
    report.figure("exact f32 activations", f64::from(u8::from(matches!(parts.math, Math::Exact))), "");
    report.emit(&args.output)
}

/// Operations of a prefill of `tokens` tokens: two a weight and token in the
/// linear layers, and those of the pairs of positions that attend to each other.
fn flops(config: &ModelConfig, tokens: usize) -> f64 {
    let shape = &config.attention;
    let weights = config.hidden * (shape.qkv_width() + shape.q_width() + 3 * config.ffn);
    let pairs = tokens as f64 * (tokens as f64 + 1.0) / 2.0;
    config.layers as f64 * (2.0 * weights as f64 * tokens as f64 + 4.0 * shape.q_width() as f64 * pairs)
}

impl<D: Device> Bench<D> {
    fn slot(&self, sequence: usize, position: usize) -> RowSlot {
        let size = self.pool.shape().block_tokens as usize;
        // The one sequence of a prefill may be longer than one of many.
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
        let logit_rows = &[tokens as u32 - 1];
        self.step(&StepInput { tokens: &ids, slots: &slots, seqs: &seqs, runs: &runs, logit_rows }, vocab)
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
        let logit_rows = &wanted;
        self.step(&StepInput { tokens: &ids, slots: &slots, seqs: &seqs, runs: &runs, logit_rows }, vocab)
    }

    /// A step up to the likeliest tokens, or up to the logits where the device
    /// leaves the choice to the host.
    fn step(&mut self, input: &StepInput<'_>, vocab: usize) -> anyhow::Result<Duration> {
        let rows = input.logit_rows.len();
        let mut sampler = Sampler::new(&SamplingParams { temperature: 0.0, ..SamplingParams::default() }, &[], 0);
        let likeliest = Choice { ..sampler.choice(0, vocab) };
        let choices: Vec<Choice<'_>> = (0..rows as u32).map(|row| Choice { row, ..likeliest }).collect();
        let (logits, chosen) = (&mut self.logits[..rows * vocab], &mut self.chosen);
        let started = Instant::now();
        self.model.forward(&mut self.device, &self.pool, input, &mut LocalOnly)?;
        let there = self.model.choose(&mut self.device, &choices, chosen)?;
        if !there {
            self.model.logits(&mut self.device, rows, logits)?;
        }
        let took = started.elapsed();
        let finite = match there {
            true => chosen.len() == rows && chosen.iter().all(|c| c.token.is_some()),
            false => logits.iter().all(|l| l.is_finite()),
        };
        if finite { Ok(took) } else { Err(anyhow!("the model computed no finite logits")) }
    }
}
