//! FP8 weights: the GPU's kernels beside plain arithmetic, and whole models beside
//! the CPU device.

use distkv::device::cuda::{Buffer, CudaDevice, Element, Matrix, Vector};
use distkv::device::tensor::{DType, RawTensor, Scales};
use distkv::device::{AttnSeq, Device, RowSlot, StepInput};
use distkv::e4m3;
use distkv::kv::pool::KvPool;
use distkv::kv::rblock::{KvDtype, KvShape};
use distkv::model::load;
use distkv::model::synth::{Scaling, synth_fp8_to};
use half::{bf16, f16};
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::Settings;
use crate::golden::GoldenModel;
use crate::goldens;
use crate::kernels::{ROPE, apart, gpu};

/// FP8 weights `[rows, cols]` with their scales.
struct Part {
    rows: usize,
    cols: usize,
    codes: Vec<u8>,
    block: (usize, usize),
    scales: Vec<f32>,
}

impl Part {
    fn new(random: &mut ChaCha8Rng, rows: usize, cols: usize) -> Self {
        let block = *[(rows, cols), (1, cols), (128, 128)].choose(random).expect("some");
        let scales = rows.div_ceil(block.0) * cols.div_ceil(block.1);
        let large = random.random_bool(0.3);
        let mut codes: Vec<u8> = (0..rows * cols)
            .map(|_| match random.random::<u8>() {
                code if code & 0x7f == 0x7f => code ^ 1,
                // Mostly without the few largest, beside which all else is nothing.
                code if !large && code & 0x78 > 0x48 => code & 0xbf,
                code => code,
            })
            .collect();
        // A row of zeros, one of the smallest and one of the largest.
        for code in [0x00, 0x81, 0x7e] {
            let row = random.random_range(0..rows);
            codes[row * cols..(row + 1) * cols].fill(code);
        }
        let scales = (0..scales).map(|_| random.random_range(0.5f32..2.0) / 64.0 / (cols as f32).sqrt()).collect();
        Self { rows, cols, codes, block, scales }
    }

    fn raw(&self) -> RawTensor<'_> {
        let scales = Some(Scales { block: self.block, values: &self.scales });
        RawTensor { dtype: DType::F8E4m3, rows: self.rows, cols: self.cols, bytes: &self.codes, stored: None, scales }
    }

    fn values(&self) -> Vec<f64> {
        let wide = self.cols.div_ceil(self.block.1);
        let value = |i: usize| {
            let (row, col) = (i / self.cols, i % self.cols);
            let scale = self.scales[row / self.block.0 * wide + col / self.block.1];
            f64::from(e4m3::to_f32(self.codes[i])) * f64::from(scale)
        };
        (0..self.codes.len()).map(value).collect()
    }
}

/// `x · Wᵀ + bias`, in f64.
fn product(x: &[f32], w: &[f64], cols: usize, bias: Option<&[f32]>) -> Vec<f32> {
    let row = |x: &[f32]| -> Vec<f32> {
        let sum = |w: &[f64]| x.iter().zip(w).map(|(a, b)| f64::from(*a) * b).sum::<f64>();
        w.chunks_exact(cols).enumerate().map(|(i, w)| (sum(w) + f64::from(bias.map_or(0.0, |b| b[i]))) as f32).collect()
    };
    let rows: Vec<&[f32]> = x.chunks_exact(cols).collect();
    let mut out = vec![Vec::new(); rows.len()];
    std::thread::scope(|scope| {
        for (out, x) in out.iter_mut().zip(rows) {
            scope.spawn(|| *out = row(x));
        }
    });
    out.concat()
}

struct Bench {
    device: CudaDevice,
    element: Element,
    pool: KvPool,
    /// Largest distance so far, of sums and of what was rounded.
    worst: (f64, f64),
}

impl Bench {
    fn buffer(&mut self, rows: usize, cols: usize, single: bool, values: Option<&[f32]>) -> Result<Buffer, String> {
        let made = if single { self.device.buffer_f32(rows, cols) } else { self.device.buffer(rows, cols) };
        let mut buffer = made.map_err(|e| e.to_string())?;
        if let Some(values) = values {
            self.device.upload(&mut buffer, values).map_err(|e| e.to_string())?;
        }
        Ok(buffer)
    }

    /// What is in a buffer, beside what should be.
    fn compare(&mut self, what: &str, buffer: &Buffer, rows: usize, want: &[f32], limit: f64) -> Result<f64, String> {
        let mut got = vec![0.0; want.len()];
        self.device.download(buffer, rows, &mut got).map_err(|e| e.to_string())?;
        let error = apart(&got, want);
        let close = error < limit;
        if close { Ok(error) } else { Err(format!("{what}: differs by {error}")) }
    }

    /// Every end of a product of `rows` rows.
    fn case(&mut self, random: &mut ChaCha8Rng, rows: usize, cols: usize, parts: &[Part]) -> Result<(), String> {
        let outs: usize = parts.iter().map(|p| p.rows).sum();
        let what = format!(
            "{:?}, {rows} rows, {cols} in, parts {:?}",
            self.element,
            parts.iter().map(|p| (p.rows, p.block)).collect::<Vec<_>>()
        );
        let raw: Vec<RawTensor<'_>> = parts.iter().map(Part::raw).collect();
        let matrix: Matrix = self.device.load_matrix(&raw).map_err(|e| e.to_string())?;
        let w: Vec<f64> = parts.iter().flat_map(Part::values).collect();
        let round = |x: f32| match self.element {
            Element::Bf16 => bf16::from_f32(x).to_f32(),
            Element::F16 => f16::from_f32(x).to_f32(),
        };
        let x: Vec<f32> = (0..rows * cols).map(|_| round(random.random_range(-1.0..1.0))).collect();
        let before: Vec<f32> = (0..rows * outs).map(|_| random.random_range(-1.0..1.0)).collect();
        let bias: Option<Vec<f32>> =
            random.random_bool(0.5).then(|| (0..outs).map(|_| random.random_range(-1.0..1.0)).collect());
        let bytes: Option<Vec<u8>> = bias.as_ref().map(|b| b.iter().flat_map(|v| v.to_le_bytes()).collect());
        let vector: Option<Vector> = match &bytes {
            None => None,
            Some(bytes) => {
                let raw = RawTensor { dtype: DType::F32, rows: 1, cols: outs, bytes, stored: None, scales: None };
                Some(self.device.load_vector(&[raw]).map_err(|e| e.to_string())?)
            }
        };
        let tokens = vec![0; rows];
        let slots: Vec<RowSlot> = (0..rows as u32).map(|r| RowSlot { position: r, block: 0, offset: 0 }).collect();
        let seqs = [AttnSeq { row: 0, rows: rows as u32, position: 0, run: 0, runs: 0 }];
        let step = StepInput { tokens: &tokens, slots: &slots, seqs: &seqs, runs: &[], logit_rows: &[] };
        self.device.begin_step(&ROPE(8), &step, &self.pool, false).map_err(|e| e.to_string())?;

        // Weights are rounded where a matrix is widened for many rows; what is stored
        // in 16 bits is rounded anyway.
        let (sums, stored) = match (self.element, rows > 96) {
            (Element::Bf16, true) => (4e-3, 6e-3),
            (Element::Bf16, false) => (1e-5, 4e-3),
            (Element::F16, true) => (1e-3, 1e-3),
            (Element::F16, false) => (1e-5, 6e-4),
        };
        let input = self.buffer(rows, cols, false, Some(&x))?;
        let want = product(&x, &w, cols, bias.as_deref());
        let mut out = self.buffer(rows, outs, false, None)?;
        self.device.linear(&input, rows, &matrix, vector.as_ref(), &mut out);
        let error = self.compare(&format!("linear: {what}"), &out, rows, &want, stored)?;
        self.worst.1 = self.worst.1.max(error);
        let plain = product(&x, &w, cols, None);
        let mut logits = self.buffer(rows, outs, true, None)?;
        self.device.linear(&input, rows, &matrix, None, &mut logits);
        self.compare(&format!("logits: {what}"), &logits, rows, &plain, sums)?;
        let mut residual = self.buffer(rows, outs, true, Some(&before))?;
        self.device.linear_add(&input, rows, &matrix, vector.as_ref(), &mut residual);
        let added: Vec<f32> = want.iter().zip(&before).map(|(a, b)| a + b).collect();
        // With a bias and many rows the product is rounded before it is added.
        let limit = if bias.is_some() && rows > 96 { stored } else { sums };
        let error = self.compare(&format!("linear_add: {what}"), &residual, rows, &added, limit)?;
        if rows <= 96 {
            self.worst.0 = self.worst.0.max(error);
        }
        if outs.is_multiple_of(2) {
            let half = outs / 2;
            let mut gate_up = self.buffer(rows, outs, false, None)?;
            let mut activated = self.buffer(rows, half, false, None)?;
            self.device.linear_swiglu(&input, rows, &matrix, vector.as_ref(), &mut gate_up, &mut activated);
            let silu = |g: f32| g / (1.0 + (-g).exp());
            let gated: Vec<f32> = want
                .chunks_exact(outs)
                .flat_map(|row| row[..half].iter().zip(&row[half..]).map(|(g, u)| silu(*g) * u).collect::<Vec<_>>())
                .collect();
            self.compare(&format!("linear_swiglu: {what}"), &activated, rows, &gated, 4.0 * stored)?;
        }
        self.device.end_step().map_err(|e| e.to_string())
    }
}

fn kernels(settings: &Settings) -> Result<String, String> {
    let mut random = ChaCha8Rng::seed_from_u64(8);
    let (mut count, mut worst) = (0, (0f64, 0f64));
    for element in [Element::Bf16, Element::F16] {
        let dtype = if element == Element::Bf16 { KvDtype::Bf16 } else { KvDtype::F16 };
        let kv = KvShape { layers: 1, kv_heads: 1, head_dim: 16, block_tokens: 16, dtype };
        let device = gpu(settings, element)?;
        let pool = device.pool(kv, 4).map_err(|e| e.to_string())?;
        let mut bench = Bench { device, element, pool, worst: (0.0, 0.0) };
        let rows = [1, 2, 5, 8, 9, 13, 16, 17, 24, 32, 33, 40, 64, 96, 97, 200];
        for rows in rows.into_iter().cycle().take(48) {
            let cols = *[16, 64, 80, 128, 144, 256, 1040, 2048].choose(&mut random).expect("some");
            let parts: Vec<Part> = (0..random.random_range(1..4))
                .map(|_| {
                    let outs = *[1, 7, 32, 50, 64, 128, 200, 512].choose(&mut random).expect("some");
                    Part::new(&mut random, outs, cols)
                })
                .collect();
            bench.case(&mut random, rows, cols, &parts)?;
            // As gate and up are: halves of whole bricks.
            let outs = *[16, 48, 64, 144, 256].choose(&mut random).expect("some");
            let parts = [Part::new(&mut random, outs, cols), Part::new(&mut random, outs, cols)];
            bench.case(&mut random, rows, cols, &parts)?;
            count += 2;
        }
        worst = (worst.0.max(bench.worst.0), worst.1.max(bench.worst.1));
    }
    Ok(format!("{count} random products, sums within {:.1e}, stored within {:.1e}", worst.0, worst.1))
}

/// Kernels, and whole models on the GPU beside the CPU device.
pub fn fp8(settings: &Settings) -> Result<String, String> {
    let kernels = kernels(settings)?;
    let (mut worst, mut count) = (0f32, 0);
    for model in GoldenModel::all().iter().filter(|m| ["llama-biases", "qwen2", "qwen3"].contains(&m.name.as_str())) {
        for scaling in [Scaling::Tensor, Scaling::Channel, Scaling::Block] {
            let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
            synth_fp8_to(dir.path(), &model.config, model.seed, scaling).map_err(|e| e.to_string())?;
            let files = load::open(dir.path()).map_err(|e| e.to_string())?;
            worst = worst.max(goldens::compare_files(settings, model, &files)?);
            count += 1;
        }
    }
    if count != 9 {
        return Err(format!("{count} golden models; some are missing"));
    }
    Ok(format!("{kernels}; {count} models' logits differ by {worst:.4} of their spread at most"))
}
