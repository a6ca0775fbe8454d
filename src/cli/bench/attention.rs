//! `distkv bench attention`: MicroAttention over paged KV, beside the read
//! bandwidth that the same threads, or the same GPU, reach in the same run.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use hdrhistogram::Histogram;

use super::kv::fill;
use super::report::{Output, Report};
use crate::device::cpu::bandwidth::ReadSweep;
use crate::device::cpu::{CpuHolder, CpuOptions};
use crate::device::cuda::driver::{Event, Graph, Stream};
use crate::device::cuda::{CudaDevice, CudaOptions, Element, FENCED_BELOW};
use crate::device::{AttentionShape, AttnSeq, Device, DeviceError, HolderKernel, Rope, RowSlot, StepInput};
use crate::kv::pool::KvPool;
use crate::kv::rblock::{KvDtype, KvRun, KvShape};
use crate::node::device::DeviceName;

/// The floor is measured again before each of these rounds.
const ROUNDS: u32 = 8;
/// Launches on a GPU that are timed together, at least: in one graph, as the layers of a
/// step are, where one begins while the one before ends.
const LAUNCHES: usize = 8;

/// What to measure.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Query heads.
    #[arg(long, default_value_t = 32)]
    pub heads: usize,
    /// Key/value heads; divides the query heads.
    #[arg(long, default_value_t = 8)]
    pub kv_heads: usize,
    /// Elements a head.
    #[arg(long, default_value_t = 128)]
    pub head_dim: usize,
    /// Tokens in each sequence's KV.
    #[arg(long, default_value_t = 8192)]
    pub depth: usize,
    /// Sequences.
    #[arg(long, default_value_t = 1)]
    pub batch: usize,
    /// Query rows of each sequence: 1 is decode, more a chunk of a prompt.
    #[arg(long, default_value_t = 1)]
    pub rows: usize,
    /// Element type of the KV: bf16, f16, f32 or fp8.
    #[arg(long, default_value = "bf16", value_parser = kv_dtype)]
    pub kv_dtype: KvDtype,
    /// Tokens of an rBlock.
    #[arg(long, default_value_t = crate::kv::rblock::DEFAULT_BLOCK_TOKENS)]
    pub block_tokens: usize,
    /// `cpu`, or a GPU, `cuda:0`.
    #[arg(long, env = "DISTKV_DEVICE", default_value_t)]
    pub device: DeviceName,
    /// Threads; as many as there are cores unless given.
    #[arg(long)]
    pub threads: Option<usize>,
    /// KV that the iterations rotate over, at least, in MiB: less than a few times
    /// the last-level cache lets the cache answer.
    #[arg(long, default_value_t = 1024)]
    pub rotation: usize,
    /// How long to measure, in seconds.
    #[arg(long, default_value_t = 5.0)]
    pub seconds: f64,
    /// Where the results go.
    #[command(flatten)]
    pub output: Output,
}

fn kv_dtype(name: &str) -> Result<KvDtype, String> {
    match name {
        "bf16" => Ok(KvDtype::Bf16),
        "f16" => Ok(KvDtype::F16),
        "f32" => Ok(KvDtype::F32),
        "fp8" => Ok(KvDtype::Fp8),
        _ => Err("it may be bf16, f16, f32 or fp8".into()),
    }
}

/// What was measured: times in nanoseconds, and figures (name, value, unit).
pub struct Figures {
    /// One value an iteration; on a GPU, an iteration's share of a round of them.
    pub histograms: Vec<(String, Histogram<u64>)>,
    /// Derived from the medians.
    pub values: Vec<(String, f64, &'static str)>,
}

/// Measures and reports.
pub fn run(args: Args) -> anyhow::Result<()> {
    let figures = measure(&args)?;
    let mut report = Report::new(format!(
        "MicroAttention: {} query heads, {} kv heads, head_dim {}, depth {}, batch {}, rows {}, {:?} KV",
        args.heads, args.kv_heads, args.head_dim, args.depth, args.batch, args.rows, args.kv_dtype
    ));
    figures.histograms.into_iter().for_each(|(name, times)| report.latency(name, times));
    figures.values.into_iter().for_each(|(name, value, unit)| report.figure(name, value, unit));
    report.emit(&args.output)
}

/// Measures.
pub fn measure(args: &Args) -> anyhow::Result<Figures> {
    ensure!(args.kv_heads > 0 && args.heads.is_multiple_of(args.kv_heads), "--kv-heads must divide --heads");
    ensure!(args.head_dim > 0 && args.head_dim.is_multiple_of(2), "--head-dim must be even");
    ensure!(
        args.batch > 0 && args.rows > 0 && args.block_tokens > 0,
        "--batch, --rows and --block-tokens must be over 0"
    );
    ensure!(args.depth >= args.rows, "--depth must be at least --rows");
    let shape = AttentionShape {
        heads: args.heads,
        kv_heads: args.kv_heads,
        head_dim: args.head_dim,
        scale: 1.0 / (args.head_dim as f32).sqrt(),
    };
    let mut kv = KvShape {
        layers: 1,
        kv_heads: u32::try_from(args.kv_heads)?,
        head_dim: u32::try_from(args.head_dim)?,
        block_tokens: u32::try_from(args.block_tokens)?,
        dtype: args.kv_dtype,
    };
    let blocks = args.batch * kv.blocks_for(args.depth);
    // Layers are what rotates.
    kv.layers = u32::try_from((args.rotation << 20).div_ceil(blocks * kv.layer_bytes()).max(1))?;
    let work = Work { shape, kv, blocks, layout: layout(args, blocks) };
    match args.device {
        DeviceName::Cpu => on_cpu(args, &work),
        DeviceName::Cuda(ordinal) => on_gpu(args, &work, ordinal),
    }
}

/// What is to be attended to.
struct Work {
    shape: AttentionShape,
    kv: KvShape,
    blocks: usize,
    layout: (Vec<AttnSeq>, Vec<KvRun>),
}

impl Work {
    /// `[rows, width]` of values in −1 up to 1.
    fn queries(&self, rows: usize, width: usize) -> Vec<f32> {
        (0..rows * width).map(|i| (i * 37 % 101) as f32 / 50.0 - 1.0).collect()
    }
}

fn on_cpu(args: &Args, work: &Work) -> anyhow::Result<Figures> {
    let Work { shape, kv, blocks, layout: (seqs, runs) } = work;
    let options = CpuOptions::default();
    let threads = args.threads.unwrap_or(options.threads);
    let pool = Arc::new(KvPool::new(*kv, u32::try_from(*blocks)?).context("allocating the KV")?);
    fill(&pool)?;
    let rows = args.batch * args.rows;
    let q = work.queries(rows, shape.q_width());
    let mut o = vec![0.0; q.len()];
    let mut lse = vec![0.0; rows * shape.heads];
    let mut device = CpuHolder::new(CpuOptions { threads, ..options })?;
    let mut sweep = ReadSweep::new(threads)?;
    let mut layers = (0..kv.layers as usize).cycle();
    let attend = |_: &mut ()| {
        let layer = layers.next().unwrap_or(0);
        let start = Instant::now();
        device.micro_attention(shape, None, layer, &pool, &q, seqs, runs, &mut o, &mut lse);
        Ok(start.elapsed())
    };
    let mut figures = measured(args, work, &mut (), attend, |_| Ok(sweep.sweep()))?;
    figures.values.insert(0, ("threads".into(), threads as f64, ""));
    Ok(figures)
}

fn on_gpu(args: &Args, work: &Work, ordinal: usize) -> anyhow::Result<Figures> {
    let Work { shape, kv, blocks, layout: (seqs, runs) } = work;
    let rows = args.batch * args.rows;
    let options = CudaOptions {
        ordinal,
        element: Element::of_kv(args.kv_dtype)?,
        max_rows: rows,
        max_seqs: args.batch,
        graphs: false,
        fenced_below: FENCED_BELOW,
    };
    let mut device = CudaDevice::new(options)?;
    let pool = device.pool(*kv, *blocks)?;
    fill(&pool)?;
    let mut qkv = device.buffer(rows, shape.qkv_width())?;
    let mut o = device.buffer(rows, shape.q_width())?;
    let mut lse = device.buffer_f32(rows, shape.heads)?;
    device.upload(&mut qkv, &work.queries(rows, shape.qkv_width()))?;
    let tokens = vec![0; rows];
    let slots = vec![RowSlot { position: 0, block: 0, offset: 0 }; rows];
    let step = StepInput { tokens: &tokens, slots: &slots, seqs, runs, logit_rows: &[] };
    let rope = Rope { inv_freq: vec![1.0; shape.head_dim / 2], magnitude: 1.0, interleaved: false };
    device.begin_step(&rope, &step, &pool, false)?;
    // What is prepared at first use is none of the recording's.
    device.attention(shape, None, 0, &pool, &qkv, &mut o, &mut lse);
    device.end_step()?;
    let launches = LAUNCHES.next_multiple_of(kv.layers as usize);
    let attentions = Row::of(&mut device, launches, |device, i| {
        device.attention(shape, None, i % kv.layers as usize, &pool, &qkv, &mut o, &mut lse);
    })?;
    let attend = |_: &mut CudaDevice| attentions.time();
    let mut figures = measured(args, work, &mut device, attend, |device| Ok(device.read_bandwidth()?))?;
    figures.values.insert(0, ("launches timed together".into(), launches as f64, ""));

    // A partial of each row, as a peer's answer to each of its queries.
    let (remote_o, remote_lse) = (work.queries(rows, shape.q_width()), work.queries(rows, shape.heads));
    let all = 0..rows as u32;
    device.merge(shape, std::slice::from_ref(&all), &remote_o, &remote_lse, &mut o, &mut lse);
    match device.end_step() {
        Err(DeviceError::Unsupported(why)) => {
            tracing::warn!("merging is not measured: {why}");
            return Ok(figures);
        }
        merged => merged?,
    }
    let merges = Row::of(&mut device, LAUNCHES, |device, _| device.merge_again(&mut o, &mut lse))?;
    let mut times = Histogram::<u64>::new(3)?;
    let end = Instant::now() + Duration::from_secs_f64(args.seconds / f64::from(ROUNDS));
    while Instant::now() < end {
        times.record(merges.time()?.as_nanos().try_into()?)?;
    }
    figures.histograms.push(("merge of a partial".into(), times));
    Ok(figures)
}

/// Launches one behind the other, as a step's graph has them.
struct Row {
    launches: usize,
    graph: Graph,
    marks: [Event; 2],
    stream: Arc<Stream>,
}

impl Row {
    /// What `launch` does so many times, told which it is.
    fn of(
        device: &mut CudaDevice,
        launches: usize,
        mut launch: impl FnMut(&mut CudaDevice, usize),
    ) -> anyhow::Result<Self> {
        let stream = device.stream().clone();
        stream.synchronize()?;
        stream.begin_capture()?;
        (0..launches).for_each(|i| launch(device, i));
        let graph = stream.end_capture();
        device.end_step()?;
        let marks = [Event::new(stream.context(), true)?, Event::new(stream.context(), true)?];
        Ok(Self { launches, graph: graph?, marks, stream })
    }

    /// Does them all: one's share of the time.
    fn time(&self) -> anyhow::Result<Duration> {
        let [begin, end] = &self.marks;
        begin.record(&self.stream)?;
        self.stream.launch(&self.graph)?;
        end.record(&self.stream)?;
        end.synchronize()?;
        Ok(Duration::from_secs_f64(f64::from(end.since(begin)?) / 1e3 / self.launches as f64))
    }
}

/// Times `attend`, which takes one layer after the other, beside the bytes a second
/// that `sweep` reads.
fn measured<D>(
    args: &Args,
    work: &Work,
    device: &mut D,
    mut attend: impl FnMut(&mut D) -> anyhow::Result<Duration>,
    mut sweep: impl FnMut(&mut D) -> anyhow::Result<f64>,
) -> anyhow::Result<Figures> {
    let kv = &work.kv;
    let mut times = Histogram::<u64>::new(3)?;
    let mut floors = Vec::new();
    // Not counted: what is prepared at first use.
    for _ in 0..2 {
        attend(device)?;
    }
    for _ in 0..ROUNDS {
        floors.push(sweep(device)?);
        let end = Instant::now() + Duration::from_secs_f64(args.seconds / f64::from(ROUNDS));
        while Instant::now() < end {
            times.record(attend(device)?.as_nanos().try_into()?)?;
        }
    }
    floors.sort_by(f64::total_cmp);
    let floor = floors[floors.len() / 2];
    let bytes = (args.batch * args.depth * kv.token_bytes() / kv.layers as usize) as f64;
    let seconds = times.value_at_quantile(0.5) as f64 / 1e9;
    // Pairs of a row and a key it sees; each costs a product with K and with V.
    let seen = args.rows * (args.depth - args.rows) + args.rows * (args.rows + 1) / 2;
    let flops = (4 * args.batch * seen * args.heads * args.head_dim) as f64;
    Ok(Figures {
        histograms: vec![("attention".into(), times)],
        values: vec![
            ("kv bytes".into(), bytes / 1e6, "MB"),
            ("rotation".into(), bytes * f64::from(kv.layers) / 1e9, "GB"),
            ("kv read".into(), bytes / seconds / 1e9, "GB/s"),
            ("read bandwidth".into(), floor / 1e9, "GB/s"),
            ("share of bandwidth".into(), bytes / seconds / floor, ""),
            ("arithmetic".into(), flops / seconds / 1e9, "GFLOP/s"),
        ],
    })
}

/// Each sequence's blocks, scattered over the pool as a pool in use has them.
fn layout(args: &Args, blocks: usize) -> (Vec<AttnSeq>, Vec<KvRun>) {
    let each = blocks / args.batch;
    let mut order: Vec<u32> = (0..blocks as u32).collect();
    order.sort_by_key(|block| u64::from(*block).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 24);
    let runs = order
        .iter()
        .enumerate()
        .map(|(i, &block)| {
            let position = i % each * args.block_tokens;
            let tokens = (args.depth - position).min(args.block_tokens);
            KvRun { block, position: position as u32, tokens: tokens as u32 }
        })
        .collect();
    let seqs = (0..args.batch)
        .map(|i| AttnSeq {
            row: (i * args.rows) as u32,
            rows: args.rows as u32,
            position: (args.depth - args.rows) as u32,
            run: (i * each) as u32,
            runs: each as u32,
        })
        .collect();
    (seqs, runs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_of_every_sequence_has_its_place() {
        let args = Args {
            heads: 4,
            kv_heads: 2,
            head_dim: 8,
            depth: 50,
            batch: 3,
            rows: 2,
            kv_dtype: KvDtype::F32,
            block_tokens: 16,
            threads: Some(1),
            device: DeviceName::Cpu,
            rotation: 1,
            seconds: 0.1,
            output: Output::default(),
        };
        let (seqs, runs) = layout(&args, 12);
        let mut blocks: Vec<u32> = runs.iter().map(|r| r.block).collect();
        blocks.sort_unstable();
        assert_eq!(blocks, (0..12).collect::<Vec<_>>());
        for seq in &seqs {
            let runs = &runs[seq.run as usize..][..seq.runs as usize];
            assert_eq!(runs.iter().map(|r| r.tokens).sum::<u32>(), 50);
            assert!(runs.windows(2).all(|w| w[0].position + w[0].tokens == w[1].position));
            assert_eq!(seq.position + seq.rows, 50);
        }
    }
}
