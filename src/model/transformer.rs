//! The transformer: weights on a device and the forward pass of one step,
//! written once for every family and device.

use crate::attention::LayerHook;
use crate::device::nvtx::range;
use crate::device::{self, Choice, Chosen, Device, Norm, Pass, StepInput};
use crate::kv::pool::KvPool;

use super::config::ModelConfig;
use super::weights::{LayerParam, Param, WeightSource};

/// Why a model could not be put on a device.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The files lack a parameter that the configuration requires.
    #[error("the weights lack {0:?}")]
    Missing(Param),
    /// The device refused.
    #[error("loading {param:?}: {source}")]
    Device {
        /// What was being loaded.
        param: Param,
        /// The device's reason.
        source: device::DeviceError,
    },
    /// The device refused activation buffers.
    #[error("allocating activations: {0}")]
    Activations(#[from] device::DeviceError),
}

struct Layer<D: Device> {
    attention_norm: D::Vector,
    qkv: D::Matrix,
    qkv_bias: Option<D::Vector>,
    qk_norm: Option<(D::Vector, D::Vector)>,
    output: D::Matrix,
    output_bias: Option<D::Vector>,
    mlp_norm: D::Vector,
    gate_up: D::Matrix,
    gate_up_bias: Option<D::Vector>,
    down: D::Matrix,
    down_bias: Option<D::Vector>,
}

/// Activations of one step, allocated once for the largest step.
struct Scratch<D: Device> {
    residual: D::Buffer,
    normed: D::Buffer,
    qkv: D::Buffer,
    attended: D::Buffer,
    lse: D::Buffer,
    gate_up: D::Buffer,
    activated: D::Buffer,
    selected: D::Buffer,
    logits: D::Buffer,
}

/// A model on a device.
pub struct Transformer<D: Device> {
    config: ModelConfig,
    embedding: D::Matrix,
    layers: Vec<Layer<D>>,
    final_norm: D::Vector,
    lm_head: Option<D::Matrix>,
    scratch: Scratch<D>,
    max_rows: usize,
    max_logits: usize,
}

impl<D: Device> Transformer<D> {
    /// Loads all weights, releasing each parameter's pages as it is packed, so
    /// that the weights are never held twice; then allocates activations for
    /// steps of up to `max_rows` rows and `max_logits` rows of logits.
    /// `progress` is called with the bytes loaded so far.
    pub fn load(
        device: &mut D,
        config: &ModelConfig,
        source: &dyn WeightSource,
        max_rows: usize,
        max_logits: usize,
        mut progress: impl FnMut(u64),
    ) -> Result<Self, LoadError> {
        let _load = range(c"load");
        let mut loader = Loader { device, source, loaded: 0, progress: &mut progress };
        // The largest first: while a tensor is packed it is in memory twice, and
        // that must not come on top of everything else.
        let embedding = loader.matrix(&[Param::Embedding])?;
        let lm_head = if config.tied_embeddings { None } else { Some(loader.matrix(&[Param::LmHead])?) };
        let layers = (0..config.layers).map(|layer| loader.layer(layer)).collect::<Result<Vec<_>, _>>()?;
        let final_norm = loader.vector(&[Param::FinalNorm])?;

        let shape = &config.attention;
        let scratch = Scratch {
            residual: device.buffer_f32(max_rows, config.hidden)?,
            normed: device.buffer(max_rows, config.hidden)?,
            qkv: device.buffer(max_rows, shape.qkv_width())?,
            attended: device.buffer(max_rows, shape.q_width())?,
            lse: device.buffer_f32(max_rows, shape.heads)?,
            gate_up: device.buffer(max_rows, 2 * config.ffn)?,
            activated: device.buffer(max_rows, config.ffn)?,
            selected: device.buffer_f32(max_logits, config.hidden)?,
            logits: device.buffer_f32(max_logits, config.vocab)?,
        };
        Ok(Self { config: config.clone(), embedding, layers, final_norm, lm_head, scratch, max_rows, max_logits })
    }

    /// The configuration it was loaded with.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Most rows of a step.
    pub fn max_rows(&self) -> usize {
        self.max_rows
    }

    /// Most rows of logits of a step.
    pub fn max_logits(&self) -> usize {
        self.max_logits
    }

    /// Computes one step: appends the KV of every row to `pool` and leaves the
    /// logits of the step's logit rows on the device, for
    /// [`logits`](Self::logits) or [`choose`](Self::choose), which wait for them.
    pub fn forward(
        &mut self,
        device: &mut D,
        pool: &KvPool,
        step: &StepInput<'_>,
        hook: &mut impl LayerHook<D>,
    ) -> device::Result<()> {
        let wanted = step.logit_rows.len();
        assert!(step.tokens.len() <= self.max_rows && wanted <= self.max_logits, "the scheduler keeps to the limits");
        let Self { config, scratch: s, .. } = self;
        let shape = &config.attention;
        let norm = |weight| Norm { weight, eps: config.norm_eps };

        let local = hook.is_idle();
        let Pass::Run { rows, logits } = device.begin_step(&config.rope, step, pool, local)? else {
            return Ok(());
        };
        let exchange = || (!local).then(|| range(c"exchange"));
        device.embed(&self.embedding, &mut s.residual);
        if let Some(first) = self.layers.first() {
            device.rms_norm(&s.residual, rows, norm(&first.attention_norm), &mut s.normed);
        }
        for (index, layer) in self.layers.iter().enumerate() {
            let _layer = range(c"layer");
            device.linear(&s.normed, rows, &layer.qkv, layer.qkv_bias.as_ref(), &mut s.qkv);
            let qk_norm = layer.qk_norm.as_ref().map(|(q, k)| (q, k, config.norm_eps));
            device.rope_append(shape, qk_norm, index, pool, &mut s.qkv);
            let sending = exchange();
            hook.queries_ready(index, device, &s.qkv);
            drop(sending);
            let attention = range(c"attention");
            device.attention(shape, config.window(index), index, pool, &s.qkv, &mut s.attended, &mut s.lse);
            drop(attention);
            let merging = exchange();
            hook.local_done(index, device, &mut s.attended, &mut s.lse);
            drop(merging);
            let (bias, next) = (layer.output_bias.as_ref(), norm(&layer.mlp_norm));
            device.linear_add_norm(&s.attended, rows, &layer.output, bias, &mut s.residual, next, &mut s.normed);

            let bias = layer.gate_up_bias.as_ref();
            device.linear_swiglu(&s.normed, rows, &layer.gate_up, bias, &mut s.gate_up, &mut s.activated);
            let (x, bias) = (&s.activated, layer.down_bias.as_ref());
            match self.layers.get(index + 1) {
                Some(next) => {
                    let next = norm(&next.attention_norm);
                    device.linear_add_norm(x, rows, &layer.down, bias, &mut s.residual, next, &mut s.normed);
                }
                None => device.linear_add(x, rows, &layer.down, bias, &mut s.residual),
            }
        }
        if logits > 0 {
            let _head = range(c"logits");
            device.gather(&s.residual, step.logit_rows, &mut s.selected);
            device.rms_norm(&s.selected, logits, norm(&self.final_norm), &mut s.normed);
            let head = self.lm_head.as_ref().unwrap_or(&self.embedding);
            device.linear(&s.normed, logits, head, None, &mut s.logits);
        }
        device.end_step()
    }

    /// Copies the first `rows` rows of the last step's logits to `logits`,
    /// `[rows, vocab]`.
    pub fn logits(&mut self, device: &mut D, rows: usize, logits: &mut [f32]) -> device::Result<()> {
        device.download(&self.scratch.logits, rows, logits)
    }

    /// Chooses tokens from the last step's logits, where they lie; false where
    /// the device leaves that to the host.
    pub fn choose(&mut self, device: &mut D, choices: &[Choice<'_>], chosen: &mut Vec<Chosen>) -> device::Result<bool> {
        chosen.clear();
        device.choose(&mut self.scratch.logits, choices, chosen)
    }
}

struct Loader<'a, D: Device> {
    device: &'a mut D,
    source: &'a dyn WeightSource,
    loaded: u64,
    progress: &'a mut dyn FnMut(u64),
}

impl<D: Device> Loader<'_, D> {
    fn layer(&mut self, index: usize) -> Result<Layer<D>, LoadError> {
        use LayerParam as P;
        let at = |p| Param::Layer(index, p);
        let qk_norm = match self.optional(&[at(P::QNorm)])? {
            Some(q) => Some((q, self.vector(&[at(P::KNorm)])?)),
            None => None,
        };
        Ok(Layer {
            attention_norm: self.vector(&[at(P::AttentionNorm)])?,
            qkv: self.matrix(&[at(P::Q), at(P::K), at(P::V)])?,
            qkv_bias: self.optional(&[at(P::QBias), at(P::KBias), at(P::VBias)])?,
            qk_norm,
            output: self.matrix(&[at(P::O)])?,
            output_bias: self.optional(&[at(P::OBias)])?,
            mlp_norm: self.vector(&[at(P::MlpNorm)])?,
            gate_up: self.matrix(&[at(P::Gate), at(P::Up)])?,
            gate_up_bias: self.optional(&[at(P::GateBias), at(P::UpBias)])?,
            down: self.matrix(&[at(P::Down)])?,
            down_bias: self.optional(&[at(P::DownBias)])?,
        })
    }

    fn matrix(&mut self, params: &[Param]) -> Result<D::Matrix, LoadError> {
        self.load(params, D::load_matrix)
    }

    fn vector(&mut self, params: &[Param]) -> Result<D::Vector, LoadError> {
        self.load(params, D::load_vector)
    }

    /// Loads a vector whose first part is there; then all must be.
    fn optional(&mut self, params: &[Param]) -> Result<Option<D::Vector>, LoadError> {
        if self.source.get(params[0]).is_none() {
            return Ok(None);
        }
        self.vector(params).map(Some)
    }

    fn load<T>(
        &mut self,
        params: &[Param],
        load: impl FnOnce(&mut D, &[device::tensor::RawTensor<'_>]) -> device::Result<T>,
    ) -> Result<T, LoadError> {
        let parts =
            params.iter().map(|&p| self.source.get(p).ok_or(LoadError::Missing(p))).collect::<Result<Vec<_>, _>>()?;
        let loaded = load(self.device, &parts).map_err(|source| LoadError::Device { param: params[0], source })?;
        self.loaded += parts.iter().map(|p| p.bytes.len() as u64).sum::<u64>();
        for &param in params {
            self.source.release(param);
        }
        (self.progress)(self.loaded);
        Ok(loaded)
    }
}
