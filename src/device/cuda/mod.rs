//! The CUDA device: one GPU.
//!
//! A step's metadata is copied to fixed places in the GPU's memory; its kernels
//! read there how many rows and sequences it has and where their KV lies. So the
//! kernels of a decode step can be recorded once for each of a few numbers of
//! rows and replayed as one graph: the host then gives the GPU one copy and one
//! launch a step.
//!
//! Activations, weights and KV are of one [`Element`]; the residual stream,
//! sums, lse and logits are f32.

pub mod api;
mod attend;
mod bandwidth;
mod blas;
mod buffer;
mod chain;
mod choose;
pub mod driver;
mod element;
mod fp8;
pub mod images;
mod kernels;
mod linear;
mod load;
mod memory;
mod partials;
mod recorded;
mod refusal;
mod rows;
mod short;
mod step;
mod symbols;
mod tiles;
mod widen;

use std::ops::Range;
use std::sync::Arc;

pub use blas::present as matrix_library;
pub use buffer::{Buffer, Matrix, Vector};
pub use chain::FENCED_BELOW;
pub use element::Element;
pub use memory::KvMemory;

use attend::Attention;
use buffer::Counted;
use choose::Chooser;
use driver::{Context, Stream};
use kernels::Kernels;
use linear::Linears;
use load::Loader;
use memory::GpuMemory;
use partials::Partials;
use recorded::{Kind, MAX_RECORDED, Recorded};
use rows::Rows;
use short::{HeadNorms, ShortStep};
use step::{Addresses, Capacity, StepMemory, Taken};
use widen::Widened;

use super::tensor::{DType, RawTensor};
use super::{AttentionShape, Choice, Chosen, Device, DeviceError, Norm, Pass, Result, Rope, StepInput};
use crate::kv::pool::KvPool;
use crate::kv::rblock::{KvDtype, KvShape};

/// Query heads and rows that one tile of the decode kernel takes: a sequence of
/// at most so many is decoded, any other prefilled (`cuda/paged_kv.cuh`).
const DECODE_TILE: usize = 16;
/// Pages of a step there is room for at first.
const FIRST_PAGES: usize = 1 << 16;
/// Share of the memory that is left, beside the KV pool, for what the driver and
/// the matrix library allocate as they go, and its least.
const RESERVE_SHARE: usize = 200;
const RESERVE_LEAST: usize = 256 << 20;

/// How to make a CUDA device.
#[derive(Clone, Copy, Debug)]
pub struct CudaOptions {
    /// Which GPU, from 0 on.
    pub ordinal: usize,
    /// Type of activations, weights and KV.
    pub element: Element,
    /// Most rows of a step.
    pub max_rows: usize,
    /// Most sequences, and rows of logits, of a step.
    pub max_seqs: usize,
    /// Record decode steps and replay them. Off for comparisons.
    pub graphs: bool,
    /// Launches of linear layers with fewer bytes of weights hand rows on behind a
    /// fence: [`FENCED_BELOW`], or others for comparisons.
    pub fenced_below: u64,
}

/// A GPU as a [`Device`].
pub struct CudaDevice {
    // Waits for the GPU before anything is freed: fields go in order.
    _drain: Drain,
    recorded: Recorded,
    options: CudaOptions,
    kernels: Kernels,
    rows: Rows,
    linears: Linears,
    attention: Attention,
    partials: Partials,
    chooser: Option<Chooser>,
    loader: Option<Loader>,
    step: StepMemory,
    at: Addresses,
    taken: Taken,
    /// The step's contexts are short: a layer's attention turns and appends too, and
    /// this is what it will need for that.
    short: Option<ShortStep>,
    /// What a kernel of the step was refused for.
    failed: Option<DeviceError>,
    stream: Arc<Stream>,
    context: Arc<Context>,
}

struct Drain(Arc<Context>);

impl Drop for Drain {
    fn drop(&mut self) {
        // An error was reported by the step that it belongs to.
        let _ = self.0.synchronize();
    }
}

impl CudaDevice {
    /// Opens the GPU and loads the kernels.
    pub fn new(options: CudaOptions) -> Result<Self> {
        let context = Context::open(options.ordinal)?;
        let stream = Arc::new(Stream::new(&context, false)?);
        let kernels = Kernels::load(&context, options.element)?;
        let padded = Linears::padded(options.max_rows);
        let most = Capacity {
            rows: padded,
            seqs: options.max_seqs.max(1),
            logits: options.max_seqs.max(1),
            pages: FIRST_PAGES,
        };
        let step = StepMemory::new(&context, most, MAX_RECORDED)?;
        let at = step.addresses(0, 0);
        Ok(Self {
            _drain: Drain(context.clone()),
            recorded: Recorded::default(),
            rows: Rows::new(&context, &kernels, options.element, padded)?,
            linears: Linears::new(&context, &kernels, &stream, &options)?,
            attention: Attention::new(&context, &kernels, options.element, padded, most.seqs)?,
            partials: Partials::new(&context, &kernels)?,
            chooser: None,
            loader: None,
            kernels,
            options,
            step,
            at,
            taken: Taken::default(),
            short: None,
            failed: None,
            stream,
            context,
        })
    }

    /// Whether the step that was begun last is of short contexts only, which a kernel
    /// of their own attends to.
    pub fn is_short(&self) -> bool {
        self.short.is_some()
    }

    /// What the GPU is.
    pub fn properties(&self) -> &driver::Properties {
        self.context.properties()
    }

    /// The stream of its steps.
    pub fn stream(&self) -> &Arc<Stream> {
        &self.stream
    }

    /// Bytes that a KV pool of this element may take: what is free, but for a reserve
    /// of half a percent, and what attention to it will allocate.
    pub fn room(&self, kv: KvDtype) -> Result<usize> {
        let free = self.context.free_memory()?;
        let widened = if Widened::is_needed(self.properties(), kv) { widen::ROOM } else { 0 };
        Ok(free.saturating_sub(self.reserve() + widened))
    }

    /// Bytes that a KV pool which takes all that is left leaves: for what the driver
    /// and the matrix library allocate as they go.
    pub fn reserve(&self) -> usize {
        (self.properties().memory / RESERVE_SHARE).max(RESERVE_LEAST)
    }

    /// The refusal of a pool whose `least` bytes are more than the `left` ones.
    pub fn no_pool(&self, left: usize, least: usize) -> DeviceError {
        refusal::no_pool(left, self.reserve(), least)
    }

    /// A pool of `blocks` rBlocks in its memory.
    pub fn pool(&self, shape: KvShape, blocks: usize) -> Result<KvPool> {
        Element::of_kv(shape.dtype)?;
        let memory = KvMemory::new(&self.stream, shape.block_bytes() * blocks)?;
        Ok(KvPool::on_device(shape, Arc::new(memory)))
    }

    /// Bytes a second that the GPU reads from its memory, now.
    pub fn read_bandwidth(&mut self) -> Result<f64> {
        self.context.bind()?;
        bandwidth::read(&self.stream, &self.kernels)
    }

    /// Copies rows from the host to the beginning of `x`: for tests and benches.
    pub fn upload(&mut self, x: &mut Buffer, values: &[f32]) -> Result<()> {
        self.context.bind()?;
        self.settle()?;
        self.linears.flush(&self.stream)?;
        (x.counted, x.unscaled) = (Counted::Rows, None);
        self.rows.upload(&self.stream, x, values)
    }

    /// Merges the partials that were merged last once more: for benches.
    pub fn merge_again(&mut self, o: &mut Buffer, lse: &mut Buffer) {
        self.attempt(|d| d.partials.merge(&d.stream, o, lse));
    }

    /// Waits until all weights are there; what loading needed is given back.
    pub fn loaded(&mut self) -> Result<()> {
        self.context.bind()?;
        match self.loader.take() {
            Some(loader) => loader.finish(&self.stream)?,
            None => self.stream.synchronize()?,
        }
        self.linears.fp8().check(&self.stream)
    }

    /// Weights come in the background: gives the stream all that is on its way, so
    /// that what it is given next finds them. For whatever reads weights.
    fn settle(&mut self) -> Result<()> {
        let Some(loader) = self.loader.as_mut().filter(|loader| loader.is_busy()) else { return Ok(()) };
        let settled = loader.settle(&self.stream);
        if settled.is_err() {
            self.loader = None;
        }
        settled
    }

    /// Address of the number of rows of a buffer in use.
    fn counts(&self, counted: Counted) -> u64 {
        self.at.step
            + match counted {
                Counted::Rows => 0,
                Counted::Logits => std::mem::offset_of!(api::Step, logits) as u64,
            }
    }

    /// Does `launch`, behind the linear layers that are queued, unless a kernel of
    /// the step was refused already.
    fn attempt<T: Default>(&mut self, launch: impl FnOnce(&mut Self) -> Result<T>) -> T {
        self.queue(|d| {
            d.linears.flush(&d.stream)?;
            launch(d)
        })
    }

    /// As [`attempt`](Self::attempt), for linear layers, which queue themselves.
    fn queue<T: Default>(&mut self, launch: impl FnOnce(&mut Self) -> Result<T>) -> T {
        if self.failed.is_some() {
            return T::default();
        }
        launch(self).unwrap_or_else(|error| {
            self.failed = Some(error);
            T::default()
        })
    }

    /// The address of a layer of the pool.
    fn layer(pool: &KvPool, layer: usize) -> Result<u64> {
        let base = pool.device_address().ok_or_else(|| {
            DeviceError::Unsupported("CUDA: KV in the host's memory; its pool lies on the GPU".into())
        })?;
        Ok(base + pool.offset(layer, 0) as u64)
    }

    /// Begins to load a matrix that is all FP8; else as [`load_parts`](Self::load_parts).
    fn load_fp8(&mut self, parts: &[RawTensor<'_>]) -> Result<Matrix> {
        self.context.bind()?;
        if self.loader.is_none() {
            self.loader = Some(Loader::new(&self.context)?);
        }
        let Self { loader: Some(loader), kernels, stream, linears, .. } = self else { unreachable!("made above") };
        let matrix = linears.fp8().load(loader, stream, kernels, parts);
        if matrix.is_err() {
            self.loader = None;
        }
        matrix
    }

    /// Begins to load `parts`, one behind the other; elements of all. They are there
    /// for whatever comes after [`settle`](Self::settle).
    fn load_parts(
        &mut self,
        parts: &[RawTensor<'_>],
        to: &str,
        size: usize,
        what: &str,
    ) -> Result<(Arc<GpuMemory>, usize)> {
        self.context.bind()?;
        if self.loader.is_none() {
            self.loader = Some(Loader::new(&self.context)?);
        }
        let Self { loader: Some(loader), kernels, stream, context, linears, .. } = self else {
            unreachable!("made above")
        };
        let elements = parts.iter().map(|p| p.rows * p.cols).sum::<usize>();
        let memory = Arc::new(GpuMemory::new(context, elements * size, what)?);
        let mut at = 0;
        for part in parts {
            let begun = match fp8::is_fp8(part) {
                true => linears.fp8().load_widened(loader, stream, kernels, part, &memory, at),
                false => loader.load(stream, kernels, part, to, size, &memory, at),
            };
            if let Err(error) = begun {
                // What was loaded so far lacks something: nobody may go on with it.
                self.loader = None;
                return Err(error);
            }
            at += part.rows * part.cols;
        }
        Ok((memory, elements))
    }
}

impl Device for CudaDevice {
    type Matrix = Matrix;
    type Vector = Vector;
    type Buffer = Buffer;

    fn describe(&self) -> String {
        let p = self.properties();
        format!(
            "cuda:{} ({}, {} multiprocessors, {:.0} GiB, {})",
            self.options.ordinal,
            p.name,
            p.multiprocessors,
            p.memory as f64 / (1u64 << 30) as f64,
            self.options.element.suffix()
        )
    }

    fn load_matrix(&mut self, parts: &[RawTensor<'_>]) -> Result<Matrix> {
        let cols = parts.first().map_or(0, |p| p.cols);
        if parts.iter().any(|p| p.cols != cols) {
            return Err(DeviceError::Unsupported("stacked weights of different widths".into()));
        }
        let element = self.options.element;
        if parts.iter().all(fp8::is_fp8) && !parts.is_empty() {
            return self.load_fp8(parts);
        }
        let (memory, elements) = self.load_parts(parts, element.suffix(), element.size(), "weights")?;
        let outs = elements / cols.max(1);
        Ok(Matrix::new(memory, outs, cols))
    }

    fn load_vector(&mut self, parts: &[RawTensor<'_>]) -> Result<Vector> {
        if parts.iter().any(fp8::is_fp8) {
            return Err(DeviceError::Unsupported("CUDA: a vector in FP8".into()));
        }
        let (memory, elements) = self.load_parts(parts, DType::F32.to_string().as_str(), 4, "weights")?;
        Ok(Vector::new(memory, elements))
    }

    fn buffer(&mut self, rows: usize, cols: usize) -> Result<Buffer> {
        let buffer = Buffer::new(&self.context, self.options.element, Linears::room(rows), cols, false)?;
        buffer.memory().fill(&self.stream, 0xff)?;
        Ok(buffer)
    }

    fn buffer_f32(&mut self, rows: usize, cols: usize) -> Result<Buffer> {
        let buffer = Buffer::new(&self.context, self.options.element, Linears::room(rows), cols, true)?;
        buffer.memory().fill(&self.stream, 0xff)?;
        Ok(buffer)
    }

    fn begin_step(&mut self, rope: &Rope, step: &StepInput<'_>, pool: &KvPool, local: bool) -> Result<Pass> {
        self.context.bind()?;
        self.settle()?;
        self.failed = None;
        self.attention.begin();
        let moved = self.step.reserve(step.runs.len(), &self.stream)?;
        let turned = self.rows.fit(&self.stream, rope)?;
        if moved | turned {
            self.recorded.clear();
        }
        self.taken = self.step.upload(&self.stream, step, pool.blocks(), pool.shape().block_tokens)?;
        self.at = self.step.addresses(self.taken.rows, self.taken.seqs);
        let (mut rows, mut logits) = (self.taken.rows, self.taken.logits);
        let padded = recorded::padded(rows);
        let fits = local && self.attention.is_fit(pool);
        let shares = self.attention.shares(padded, &self.taken).filter(|_| fits);
        self.short = shares.map(|shares| ShortStep { shares, norms: HeadNorms::default() });
        let few = padded <= MAX_RECORDED.min(self.options.max_seqs);
        if self.options.graphs && fits && self.taken.plain_decode && few {
            if self.recorded.begin(&self.stream, Kind { rows: padded, shares })? {
                return Ok(Pass::Replayed);
            }
            (rows, logits) = (padded, padded);
        }
        self.attempt(|d| d.rows.turn(&d.stream, &d.at, rows));
        Ok(Pass::Run { rows, logits })
    }

    fn end_step(&mut self) -> Result<()> {
        self.attempt(|_| Ok(()));
        self.recorded.end(&self.stream, self.failed.take())
    }

    fn embed(&mut self, table: &Matrix, out: &mut Buffer) {
        (out.counted, out.unscaled) = (Counted::Rows, None);
        let rows = self.recorded.rows().unwrap_or(self.taken.rows);
        self.attempt(|d| d.rows.embed(&d.stream, &d.at, rows, table, out));
    }

    fn rms_norm(&mut self, x: &Buffer, rows: usize, norm: Norm<'_, Vector>, out: &mut Buffer) {
        (out.counted, out.unscaled) = (x.counted, None);
        self.attempt(|d| d.rows.norm(&d.stream, d.counts(x.counted), rows, x, norm, out));
    }

    fn linear(&mut self, x: &Buffer, rows: usize, weight: &Matrix, bias: Option<&Vector>, out: &mut Buffer) {
        (out.counted, out.unscaled) = (x.counted, None);
        self.queue(|d| {
            let counts = d.counts(x.counted);
            d.linears.plain(&d.stream, counts, x, rows, weight, bias, out)
        });
    }

    fn linear_add(&mut self, x: &Buffer, rows: usize, weight: &Matrix, bias: Option<&Vector>, out: &mut Buffer) {
        self.queue(|d| {
            let counts = d.counts(x.counted);
            d.linears.add(&d.stream, counts, x, rows, weight, bias, out, None).map(drop)
        });
    }

    fn linear_swiglu(
        &mut self,
        x: &Buffer,
        rows: usize,
        weight: &Matrix,
        bias: Option<&Vector>,
        gate_up: &mut Buffer,
        out: &mut Buffer,
    ) {
        (out.counted, out.unscaled) = (x.counted, None);
        self.queue(|d| {
            let counts = d.counts(x.counted);
            d.linears.swiglu(&d.stream, counts, x, rows, weight, bias, gate_up, out)
        });
    }

    fn linear_add_norm(
        &mut self,
        x: &Buffer,
        rows: usize,
        weight: &Matrix,
        bias: Option<&Vector>,
        out: &mut Buffer,
        norm: Norm<'_, Vector>,
        normed: &mut Buffer,
    ) {
        let fused = self.queue(|d| {
            let counts = d.counts(x.counted);
            d.linears.add(&d.stream, counts, x, rows, weight, bias, out, Some((norm, normed)))
        });
        (normed.counted, normed.unscaled) = (x.counted, fused.then_some(norm.eps));
        if !fused {
            self.rms_norm(out, rows, norm, normed);
        }
    }

    fn rope_append(
        &mut self,
        shape: &AttentionShape,
        qk_norm: Option<(&Vector, &Vector, f32)>,
        layer: usize,
        pool: &KvPool,
        qkv: &mut Buffer,
    ) {
        let rows = self.recorded.rows().unwrap_or(self.taken.rows);
        self.attempt(|d| {
            if d.attention.fit(&d.kernels, &d.stream, shape, pool)? {
                d.recorded.clear();
                d.short = None; // it was for others
            }
            if let Some(step) = &mut d.short {
                step.norms = HeadNorms::new(shape, qk_norm);
                return Ok(());
            }
            let kv = Self::layer(pool, layer)?;
            d.rows.rope_append(&d.stream, &d.at, rows, shape, qk_norm, kv, pool.shape(), qkv)
        });
    }

    fn attention(
        &mut self,
        shape: &AttentionShape,
        window: Option<u32>,
        layer: usize,
        pool: &KvPool,
        qkv: &Buffer,
        o: &mut Buffer,
        lse: &mut Buffer,
    ) {
        (o.counted, o.unscaled) = (Counted::Rows, None);
        let rows = self.recorded.rows().unwrap_or(self.taken.rows);
        self.attempt(|d| {
            if d.attention.fit(&d.kernels, &d.stream, shape, pool)? {
                d.recorded.clear();
            }
            match d.short {
                Some(step) => {
                    let turned = d.rows.turned()?;
                    d.attention.run_short(&d.stream, &d.at, rows, window, layer, step, turned, qkv, o, lse)
                }
                None => d.attention.run(&d.stream, &d.at, &d.taken, window, layer, qkv, o, lse),
            }
        });
    }

    fn export_queries(&mut self, shape: &AttentionShape, qkv: &Buffer, rows: &[Range<u32>], dst: &mut [f32]) {
        self.attempt(|d| d.rows.export(&d.stream, shape, qkv, rows, dst));
    }

    fn merge(
        &mut self,
        shape: &AttentionShape,
        rows: &[Range<u32>],
        remote_o: &[f32],
        remote_lse: &[f32],
        o: &mut Buffer,
        lse: &mut Buffer,
    ) {
        self.attempt(|d| {
            d.partials.stage(&d.stream, shape, rows, remote_o, remote_lse)?;
            d.partials.merge(&d.stream, o, lse)
        });
    }

    fn swiglu(&mut self, gate_up: &Buffer, rows: usize, out: &mut Buffer) {
        (out.counted, out.unscaled) = (gate_up.counted, None);
        self.attempt(|d| d.linears.activate(&d.stream, d.counts(gate_up.counted), gate_up, rows, None, out));
    }

    fn gather(&mut self, x: &Buffer, rows: &[u32], out: &mut Buffer) {
        (out.counted, out.unscaled) = (Counted::Logits, None);
        let rows = self.recorded.rows().unwrap_or(rows.len());
        self.attempt(|d| d.rows.gather(&d.stream, &d.at, d.counts(Counted::Logits), rows, x, out));
    }

    fn download(&mut self, x: &Buffer, rows: usize, dst: &mut [f32]) -> Result<()> {
        self.context.bind()?;
        self.linears.flush(&self.stream)?;
        self.rows.download(&self.stream, x, rows, dst)
    }

    const CHOOSES: bool = true;

    fn choose(&mut self, logits: &mut Buffer, choices: &[Choice<'_>], chosen: &mut Vec<Chosen>) -> Result<bool> {
        self.context.bind()?;
        let rows = self.taken.logits;
        if !self.chooser.as_ref().is_some_and(|c| c.fits(rows, logits.cols())) {
            let most = self.options.max_seqs.max(rows);
            self.chooser = Some(Chooser::new(&self.context, &self.kernels, most, logits.cols())?);
        }
        let counts = self.counts(Counted::Logits);
        let Self { chooser: Some(chooser), stream, .. } = self else { unreachable!("made above") };
        chooser.run(stream, counts, logits, rows, choices, chosen)?;
        Ok(true)
    }
}
