//! Models with random weights, for tests and benchmarks: the same
//! configuration, seed and element type give the same bytes everywhere.
//!
//! Every weight is computed from its own place alone. For a tensor named `t`
//! (Hugging Face's name), `key = splitmix64(seed ^ fnv1a64(t))`, and element
//! `i` (row-major) has `u = (splitmix64(key + i) >> 40) · 2⁻²³ − 1`, uniform in
//! [−1, 1). Its value, in f32 arithmetic and then rounded to the element type,
//! is
//! - `1 + 0.5·u` in the weights of a norm,
//! - `0.2·u` in a bias,
//! - `0.5·u` in the token embedding,
//! - `a·u`, `a = √(3·g / in)` in every other matrix, which has a standard
//!   deviation of `√(g / in)`: `g` is 4 in Q and K, so that attention is
//!   selective, and 1 elsewhere.
//!
//! `scripts/goldens.py` does the same in numpy.
//!
//! In FP8 the matrices of the layers are codes with scales, all else is bf16.
//! Scale `j` is `a/448`, times 1, 1.25, 1.5 or 1.75 by the top bits of
//! `splitmix64(key ^ j)`, rounded up to bf16, so that no value is too large and no
//! two neighbours need have the same; an element's code is that nearest to value
//! over scale.

mod fp8;
mod shapes;
mod text;

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::device::tensor::DType;
use crate::model::error::{ModelError, Result};
use crate::model::hf;
use crate::model::safetensors::tensor_name;
use crate::model::weights::{LayerParam, Param};

pub use fp8::Scaling;
pub use shapes::{SHAPES, shape};
pub use text::{TOY_SPECIALS, write_tokenizer};

/// Most bytes of tensors in one file.
const SHARD_BYTES: u64 = 4_000_000_000;
/// Elements that one thread generates at a time.
const CHUNK: usize = 1 << 19;

/// splitmix64's output function on `x` plus its increment.
fn splitmix64(x: u64) -> u64 {
    let mut z = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn fnv1a64(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// `base + amplitude · u` for every element of one tensor.
#[derive(Clone, Copy, Debug)]
struct Generator {
    key: u64,
    base: f32,
    amplitude: f32,
}

impl Generator {
    fn new(seed: u64, param: Param, cols: usize) -> Self {
        let (base, amplitude) = match param {
            Param::Embedding => (0.0, 0.5),
            Param::FinalNorm => (1.0, 0.5),
            Param::LmHead => (0.0, spread(1.0, cols)),
            Param::Layer(_, param) => match param {
                LayerParam::AttentionNorm | LayerParam::MlpNorm | LayerParam::QNorm | LayerParam::KNorm => (1.0, 0.5),
                LayerParam::QBias
                | LayerParam::KBias
                | LayerParam::VBias
                | LayerParam::OBias
                | LayerParam::GateBias
                | LayerParam::UpBias
                | LayerParam::DownBias => (0.0, 0.2),
                LayerParam::Q | LayerParam::K => (0.0, spread(4.0, cols)),
                LayerParam::V | LayerParam::O | LayerParam::Gate | LayerParam::Up | LayerParam::Down => {
                    (0.0, spread(1.0, cols))
                }
            },
        };
        Self { key: splitmix64(seed ^ fnv1a64(&tensor_name(param))), base, amplitude }
    }

    fn at(&self, index: u64) -> f32 {
        let bits = splitmix64(self.key.wrapping_add(index)) >> 40;
        let u = bits as f32 * (1.0 / 8_388_608.0) - 1.0;
        self.base + self.amplitude * u
    }

    /// Elements from `first` on, little-endian, until `out` is full.
    fn fill(&self, dtype: DType, first: u64, out: &mut [u8]) {
        match dtype {
            DType::F16 => self.fill_as(first, out, |x| half::f16::from_f32(x).to_le_bytes()),
            DType::Bf16 => self.fill_as(first, out, |x| half::bf16::from_f32(x).to_le_bytes()),
            _ => self.fill_as(first, out, f32::to_le_bytes),
        }
    }

    fn fill_as<const N: usize>(&self, first: u64, out: &mut [u8], bytes: impl Fn(f32) -> [u8; N]) {
        for (element, index) in out.as_chunks_mut::<N>().0.iter_mut().zip(first..) {
            *element = bytes(self.at(index));
        }
    }
}

/// Half the width of a uniform distribution of variance `gain / cols`.
fn spread(gain: f64, cols: usize) -> f32 {
    (3.0 * gain / cols as f64).sqrt() as f32
}

/// What a tensor's elements are.
enum Content {
    Plain(DType, Generator),
    Codes(fp8::Codes),
    Scales(fp8::Codes),
}

impl Content {
    /// As safetensors names the type, and bytes an element.
    fn stored(&self) -> (&'static str, usize) {
        match self {
            Self::Plain(DType::F16, _) => ("F16", 2),
            Self::Plain(DType::Bf16, _) => ("BF16", 2),
            Self::Plain(..) => ("F32", 4),
            Self::Codes(_) => ("F8_E4M3", 1),
            Self::Scales(codes) => codes.scales_stored(),
        }
    }

    /// Elements from `first` on, little-endian, until `out` is full.
    fn fill(&self, first: u64, out: &mut [u8]) {
        match self {
            Self::Plain(dtype, generator) => generator.fill(*dtype, first, out),
            Self::Codes(codes) => codes.fill(first, out),
            Self::Scales(codes) => codes.fill_scales(first, out),
        }
    }
}

/// One tensor to write.
struct Planned {
    name: String,
    shape: Vec<usize>,
    content: Content,
}

impl Planned {
    fn elements(&self) -> u64 {
        self.shape.iter().map(|n| *n as u64).product()
    }

    fn bytes(&self) -> u64 {
        self.elements() * self.content.stored().1 as u64
    }
}

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Synthesized {
    /// Parameters.
    pub parameters: u64,
    /// Bytes of weights, without scales.
    pub bytes: u64,
    /// Safetensors files.
    pub files: usize,
}

/// Writes a model of random weights into `dir` (made where it is missing):
/// `config.json` as given, but for what it says of quantised weights, and the
/// weights, sharded where they are large. `dtype` is f32, bf16 or f16.
pub fn synth_to(dir: &Path, config_json: &Value, seed: u64, dtype: DType) -> Result<Synthesized> {
    if !matches!(dtype, DType::F32 | DType::F16 | DType::Bf16) {
        return Err(ModelError::file(&dir.display().to_string(), format!("cannot write {dtype}; f32, bf16, f16 can")));
    }
    write_model(dir, config_json, seed, dtype, None)
}

/// The same with linear layers in FP8 and scales of this kind, as tools write them
/// that quantise models (`config.json` then says so).
pub fn synth_fp8_to(dir: &Path, config_json: &Value, seed: u64, scaling: Scaling) -> Result<Synthesized> {
    write_model(dir, config_json, seed, DType::Bf16, Some(scaling))
}

fn write_model(dir: &Path, config_json: &Value, seed: u64, dtype: DType, fp8: Option<Scaling>) -> Result<Synthesized> {
    let mut config_json = config_json.clone();
    if let Some(fields) = config_json.as_object_mut() {
        fields.remove("quantization_config");
        fields.extend(fp8.map(|scaling| ("quantization_config".to_owned(), scaling.config())));
    }
    let config = hf::parse(&config_json, None)?;
    std::fs::create_dir_all(dir).map_err(|e| ModelError::io(dir, e))?;
    let mut shards: Vec<Vec<Planned>> = vec![Vec::new()];
    let (mut filled, mut total) = (0u64, 0u64);
    let mut written = Synthesized { parameters: 0, bytes: 0, files: 0 };
    for (param, (rows, cols)) in config.params.all(&config.model) {
        let vector = matches!(param, Param::FinalNorm) || is_vector(param);
        let shape = if vector { vec![cols] } else { vec![rows, cols] };
        let (name, generator) = (tensor_name(param), Generator::new(seed, param, cols));
        // Such files mostly leave the output projection as it was.
        let scaling = fp8.filter(|_| param.is_linear() && param != Param::LmHead);
        let tensors = match scaling.map(|scaling| fp8::Codes::new(generator, scaling, rows, cols)) {
            None => vec![Planned { name, shape, content: Content::Plain(dtype, generator) }],
            Some(codes) => {
                let scales = Planned {
                    name: format!("{name}{}", codes.scales_name()),
                    shape: codes.scales_shape(),
                    content: Content::Scales(codes.clone()),
                };
                vec![Planned { name, shape, content: Content::Codes(codes) }, scales]
            }
        };
        written.parameters += tensors[0].elements();
        written.bytes += tensors[0].bytes();
        for tensor in tensors {
            if filled > 0 && filled + tensor.bytes() > SHARD_BYTES {
                shards.push(Vec::new());
                filled = 0;
            }
            filled += tensor.bytes();
            total += tensor.bytes();
            if let Some(shard) = shards.last_mut() {
                shard.push(tensor);
            }
        }
    }

    write_json(&dir.join("config.json"), &config_json)?;
    let mut weight_map = Map::new();
    for (i, shard) in shards.iter().enumerate() {
        let file = match shards.len() {
            1 => "model.safetensors".to_owned(),
            n => format!("model-{:05}-of-{n:05}.safetensors", i + 1),
        };
        write_shard(&dir.join(&file), shard)?;
        weight_map.extend(shard.iter().map(|t| (t.name.clone(), Value::String(file.clone()))));
    }
    if shards.len() > 1 {
        let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
        write_json(&dir.join("model.safetensors.index.json"), &index)?;
    }
    Ok(Synthesized { files: shards.len(), ..written })
}

fn is_vector(param: Param) -> bool {
    use LayerParam as P;
    let Param::Layer(_, param) = param else { return false };
    !matches!(param, P::Q | P::K | P::V | P::O | P::Gate | P::Up | P::Down)
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    std::fs::write(path, format!("{value:#}\n")).map_err(|e| ModelError::io(path, e))
}

fn write_shard(path: &Path, tensors: &[Planned]) -> Result<()> {
    let io = |e| ModelError::io(path, e);
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut offset = 0u64;
    for tensor in tensors {
        let end = offset + tensor.bytes();
        let entry = json!({"dtype": tensor.content.stored().0, "shape": tensor.shape, "data_offsets": [offset, end]});
        header.insert(tensor.name.clone(), entry);
        offset = end;
    }
    // The data begin at a multiple of 8.
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');

    let mut out = BufWriter::with_capacity(1 << 20, File::create(path).map_err(io)?);
    out.write_all(&(header.len() as u64).to_le_bytes()).map_err(io)?;
    out.write_all(&header).map_err(io)?;
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut batch = Vec::new();
    for tensor in tensors {
        let (elements, size) = (tensor.elements(), tensor.content.stored().1);
        let mut index = 0;
        while index < elements {
            let now = (elements - index).min((threads * CHUNK) as u64);
            batch.resize(now as usize * size, 0u8);
            let content = &tensor.content;
            std::thread::scope(|scope| {
                let mut parts = batch.chunks_mut(CHUNK * size).zip((index..).step_by(CHUNK));
                let own = parts.next();
                for (part, first) in parts {
                    scope.spawn(move || content.fill(first, part));
                }
                if let Some((part, first)) = own {
                    content.fill(first, part);
                }
            });
            out.write_all(&batch).map_err(io)?;
            index += now;
        }
    }
    out.flush().map_err(io)
}

#[cfg(test)]
mod tests;
