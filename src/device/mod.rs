//! What runs on the hardware. A [`Device`] offers the kernels of a transformer
//! step over its own matrices, vectors and activation buffers; everything above
//! is written once for all devices.
//!
//! A step is: [`Device::begin_step`] with the step's metadata, then kernels in
//! order, then [`Device::end_step`], then [`Device::choose`] or
//! [`Device::download`]. Kernels are asynchronous where the hardware is; those
//! two wait. Nothing in a step allocates.

mod choice;
pub mod cpu;
pub mod cuda;
pub mod disk;
pub mod fp8;
pub mod nvtx;
pub mod tensor;

use std::ops::Range;
use std::sync::Arc;

use crate::kv::pool::KvPool;
use crate::kv::rblock::KvRun;
pub use crate::kv::step::{AttnSeq, RowSlot, StepInput};
pub use choice::{Choice, Chosen, Logprobs};
use tensor::RawTensor;

/// A device refused something.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The weights are of a kind or shape that this device cannot hold.
    #[error("unsupported: {0}")]
    Unsupported(String),
    /// Memory is short.
    #[error("out of memory: {0}")]
    OutOfMemory(String),
    /// The system refused.
    #[error("{0}")]
    System(String),
    /// The device broke down: nothing can be done with it any more, in this process.
    #[error("the device is lost: {0}")]
    Lost(String),
}

/// Result of a device call.
pub type Result<T> = std::result::Result<T, DeviceError>;

/// How the heads lie in a fused QKV row: `heads` query heads, then `kv_heads`
/// key heads, then `kv_heads` value heads, each of `head_dim` elements.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Elements a head.
    pub head_dim: usize,
    /// Factor on the scores, usually 1/sqrt(head_dim).
    pub scale: f32,
}

impl AttentionShape {
    /// Elements of all query heads of one row.
    pub const fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Elements of all key (or value) heads of one row.
    pub const fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Elements of a fused QKV row.
    pub const fn qkv_width(&self) -> usize {
        self.q_width() + 2 * self.kv_width()
    }
}

/// Rotary embedding, resolved from the model's configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Angle a position, for each of the `head_dim / 2` pairs.
    pub inv_freq: Vec<f32>,
    /// Factor on cos and sin (yarn's attention factor; 1 otherwise).
    pub magnitude: f32,
    /// Pairs are (2i, 2i+1) as in GGUF's llama tensors; otherwise (i, i + d/2).
    pub interleaved: bool,
}

/// What is to be done for a step that a device has taken in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// Call its kernels, for this many rows and rows of logits: those of the step,
    /// or more where the device pads it.
    Run {
        /// Rows.
        rows: usize,
        /// Rows of logits.
        logits: usize,
    },
    /// The device repeats kernels that it has recorded: call none.
    Replayed,
}

/// An RMS norm.
#[derive(Debug)]
pub struct Norm<'a, V> {
    /// Its weights.
    pub weight: &'a V,
    /// What is added to the mean square.
    pub eps: f32,
}

// Derived, they would ask the same of the vector.
impl<V> Clone for Norm<'_, V> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<V> Copy for Norm<'_, V> {}

/// The kernels of a transformer step.
pub trait Device: Send {
    /// A linear layer's weights `[out, in]`, in the device's own packing.
    type Matrix: Send + Sync;
    /// A norm's weights or a bias, f32.
    type Vector: Send + Sync;
    /// Activations `[rows, cols]`.
    type Buffer: Send;

    /// For people: `cpu (AVX-512 VNNI, 2 threads)`.
    fn describe(&self) -> String;

    /// Loads weights, stacking `parts` along the output features (so Q, K and
    /// V, or gate and up, become one product). Parts may differ in dtype.
    fn load_matrix(&mut self, parts: &[RawTensor<'_>]) -> Result<Self::Matrix>;

    /// Loads one vector, or several end to end, as f32.
    fn load_vector(&mut self, parts: &[RawTensor<'_>]) -> Result<Self::Vector>;

    /// Allocates activations for up to `rows` rows.
    fn buffer(&mut self, rows: usize, cols: usize) -> Result<Self::Buffer>;

    /// As [`buffer`](Self::buffer), in single precision whatever precision the
    /// device computes in: the residual stream, logits, lse.
    fn buffer_f32(&mut self, rows: usize, cols: usize) -> Result<Self::Buffer> {
        self.buffer(rows, cols)
    }

    /// Takes in a step's metadata: positions, KV slots, attention lists, and the
    /// pool of its KV. `local`: all keys lie here, so that nothing will happen
    /// between its kernels.
    fn begin_step(&mut self, rope: &Rope, step: &StepInput<'_>, pool: &KvPool, local: bool) -> Result<Pass>;

    /// All kernels of the step were called. An error of any of them comes out
    /// here, at the latest with what waits for them.
    fn end_step(&mut self) -> Result<()> {
        Ok(())
    }

    /// `out[r] = table[tokens[r]]` for the step's tokens.
    fn embed(&mut self, table: &Self::Matrix, out: &mut Self::Buffer);

    /// `out[r] = x[r] / rms(x[r]) · weight` for `rows` rows.
    fn rms_norm(&mut self, x: &Self::Buffer, rows: usize, norm: Norm<'_, Self::Vector>, out: &mut Self::Buffer);

    /// `out[r] = x[r] · Wᵀ (+ bias)`.
    fn linear(
        &mut self,
        x: &Self::Buffer,
        rows: usize,
        weight: &Self::Matrix,
        bias: Option<&Self::Vector>,
        out: &mut Self::Buffer,
    );

    /// `out[r] += x[r] · Wᵀ (+ bias)`: a projection into the residual stream.
    fn linear_add(
        &mut self,
        x: &Self::Buffer,
        rows: usize,
        weight: &Self::Matrix,
        bias: Option<&Self::Vector>,
        out: &mut Self::Buffer,
    );

    /// A linear layer of stacked gate and up features, and SwiGLU of them;
    /// `gate_up` is scratch for what lies between.
    fn linear_swiglu(
        &mut self,
        x: &Self::Buffer,
        rows: usize,
        weight: &Self::Matrix,
        bias: Option<&Self::Vector>,
        gate_up: &mut Self::Buffer,
        out: &mut Self::Buffer,
    ) {
        self.linear(x, rows, weight, bias, gate_up);
        self.swiglu(gate_up, rows, out);
    }

    /// As [`linear_add`](Self::linear_add) into `out`, and the norm of the sum
    /// into `normed`, for the linear layer that comes next.
    fn linear_add_norm(
        &mut self,
        x: &Self::Buffer,
        rows: usize,
        weight: &Self::Matrix,
        bias: Option<&Self::Vector>,
        out: &mut Self::Buffer,
        norm: Norm<'_, Self::Vector>,
        normed: &mut Self::Buffer,
    ) {
        self.linear_add(x, rows, weight, bias, out);
        self.rms_norm(out, rows, norm, normed);
    }

    /// On the step's fused QKV rows: RMS-norm of each Q and K head where
    /// weights are given (`(q_norm, k_norm, eps)`), rotary embedding of Q and K
    /// in place, then K and V of every row into `pool` at its slot of `layer`.
    fn rope_append(
        &mut self,
        shape: &AttentionShape,
        qk_norm: Option<(&Self::Vector, &Self::Vector, f32)>,
        layer: usize,
        pool: &KvPool,
        qkv: &mut Self::Buffer,
    );

    /// MicroAttention of the step's rows over their local KV in `layer`:
    /// causal, and limited to the last `window` positions where given. Rows
    /// `[heads · head_dim]` of `o`, natural-log `lse` `[heads]`; (0, −∞) for a
    /// row that sees no key.
    fn attention(
        &mut self,
        shape: &AttentionShape,
        window: Option<u32>,
        layer: usize,
        pool: &KvPool,
        qkv: &Self::Buffer,
        o: &mut Self::Buffer,
        lse: &mut Self::Buffer,
    );

    /// Copies the query heads (after rotary embedding) of `rows` to `dst`,
    /// `[Σ rows, heads · head_dim]` f32 in host memory, in order.
    fn export_queries(&mut self, shape: &AttentionShape, qkv: &Self::Buffer, rows: &[Range<u32>], dst: &mut [f32]);

    /// Merges a peer's partials, `[Σ rows, heads · head_dim]` and
    /// `[Σ rows, heads]` f32 in host memory, into `o` and `lse` of `rows`.
    fn merge(
        &mut self,
        shape: &AttentionShape,
        rows: &[Range<u32>],
        remote_o: &[f32],
        remote_lse: &[f32],
        o: &mut Self::Buffer,
        lse: &mut Self::Buffer,
    );

    /// `out[r] = silu(x[r][..n]) · x[r][n..]` with n = half of x's columns.
    fn swiglu(&mut self, gate_up: &Self::Buffer, rows: usize, out: &mut Self::Buffer);

    /// `out[i] = x[rows[i]]`, for the step's logit rows.
    fn gather(&mut self, x: &Self::Buffer, rows: &[u32], out: &mut Self::Buffer);

    /// Waits for everything before it and copies `rows` rows to the host.
    fn download(&mut self, x: &Self::Buffer, rows: usize, dst: &mut [f32]) -> Result<()>;

    /// Whether [`choose`](Self::choose) does.
    const CHOOSES: bool = false;

    /// Waits for everything before it and chooses a token by each of `choices`
    /// from its row of `logits`, which may be changed, into `chosen`, which is
    /// empty before. False where this device leaves that to the host.
    fn choose(&mut self, logits: &mut Self::Buffer, choices: &[Choice<'_>], chosen: &mut Vec<Chosen>) -> Result<bool> {
        let _ = (logits, choices, chosen);
        Ok(false)
    }
}

/// MicroAttention over lent rBlocks, for a creditor: the same mathematics as
/// [`Device::attention`], over queries that came from a peer.
pub trait HolderKernel: Send {
    /// `q` is `[rows, heads · head_dim]` f32, `o` alike, `lse` `[rows, heads]`;
    /// all of `seqs` lie inside those rows and all `runs` inside the pool (the
    /// caller has checked).
    #[allow(clippy::too_many_arguments)]
    fn micro_attention(
        &mut self,
        shape: &AttentionShape,
        window: Option<u32>,
        layer: usize,
        pool: &Arc<KvPool>,
        q: &[f32],
        seqs: &[AttnSeq],
        runs: &[KvRun],
        o: &mut [f32],
        lse: &mut [f32],
    );
}
