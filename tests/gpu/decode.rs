//! Decode steps have two ways for rows and for contexts that are few: each beside
//! the way that is for any.

use distkv::device::cuda::{CudaDevice, CudaOptions, Element};
use distkv::device::tensor::{DType, RawTensor};
use distkv::device::{AttentionShape, AttnSeq, Device, Norm, RowSlot, StepInput};
use distkv::kv::pool::KvPool;
use distkv::kv::rblock::{KvDtype, KvRun, KvShape};
use distkv::node::device::DeviceName;
use half::bf16;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::Settings;
use crate::kernels::{ROPE, apart, noise};

const MAX_ROWS: usize = 32;

fn gpu(settings: &Settings, fenced_below: u64) -> Result<CudaDevice, String> {
    let DeviceName::Cuda(ordinal) = settings.device else { return Err("these checks are for a GPU".into()) };
    let options = CudaOptions {
        ordinal,
        element: Element::Bf16,
        max_rows: MAX_ROWS,
        max_seqs: MAX_ROWS,
        graphs: false,
        fenced_below,
    };
    made(CudaDevice::new(options))
}

fn made<T>(result: distkv::device::Result<T>) -> Result<T, String> {
    result.map_err(|e| e.to_string())
}

/// What goes through four products in one launch: output projection, SwiGLU, down
/// projection and the next layer's QKV.
struct Layer {
    /// Hidden width, FFN width, width of attention's output and of QKV.
    widths: [usize; 4],
    rows: usize,
    /// Each [outs, ins].
    weights: [Vec<bf16>; 4],
    /// By turn: attention's output, and the residual stream.
    inputs: Vec<[Vec<f32>; 2]>,
}

impl Layer {
    fn new(widths: [usize; 4], rows: usize, turns: usize, seed: u64) -> Self {
        let random = &mut ChaCha8Rng::seed_from_u64(seed);
        let [hidden, ffn, width, qkv] = widths;
        let weights = [(hidden, width), (2 * ffn, hidden), (hidden, ffn), (qkv, hidden)].map(|(outs, ins)| {
            let values = noise(random, outs * ins, 1.7 / (ins as f32).sqrt());
            values.into_iter().map(bf16::from_f32).collect()
        });
        let inputs = (0..turns).map(|turn| {
            let mut attended: Vec<f32> =
                noise(random, rows * width, 1.0).into_iter().map(|x| bf16::from_f32(x).to_f32()).collect();
            if turn % 5 == 4 {
                attended[turn] = f32::NAN; // which nobody may take for what is not there yet
            }
            [attended, noise(random, rows * hidden, 1.0)]
        });
        Self { widths, rows, weights, inputs: inputs.collect() }
    }

    /// What should come of a turn, rounded to bf16 where it goes from one product to
    /// the next: QKV, and the residual stream.
    fn expected(&self, turn: usize) -> [Vec<f32>; 2] {
        let [hidden, ffn, width, _] = self.widths;
        let [attended, residual] = &self.inputs[turn];
        let times = |x: &[f32], ins: usize, weights: &[bf16]| -> Vec<f32> {
            x.chunks_exact(ins).flat_map(|x| weights.chunks_exact(ins).map(|w| dot(x, w))).collect()
        };
        let rounded = |x: &[f32]| -> Vec<f32> { x.iter().map(|&x| bf16::from_f32(x).to_f32()).collect() };
        let normed = |x: &[f32]| -> Vec<f32> {
            let rows = x.chunks_exact(hidden).flat_map(|row| {
                let scale = 1.0 / (row.iter().map(|x| x * x).sum::<f32>() / hidden as f32 + EPS).sqrt();
                rounded(row).into_iter().map(move |x| x * scale)
            });
            rows.collect()
        };
        let plus = |a: &[f32], b: Vec<f32>| -> Vec<f32> { a.iter().zip(b).map(|(a, b)| a + b).collect() };
        let residual = plus(residual, times(attended, width, &self.weights[0]));
        let gate_up = times(&normed(&residual), hidden, &self.weights[1]);
        let activated: Vec<f32> = gate_up
            .chunks_exact(2 * ffn)
            .flat_map(|row| (0..ffn).map(|i| row[i] / (1.0 + (-row[i]).exp()) * row[ffn + i]))
            .collect();
        let residual = plus(&residual, times(&rounded(&activated), ffn, &self.weights[2]));
        [times(&normed(&residual), hidden, &self.weights[3]), residual]
    }
}

const EPS: f32 = 1e-5;

fn dot(x: &[f32], w: &[bf16]) -> f32 {
    let mut sums = [0.0; 64]; // widths are multiples of it
    for (x, w) in x.chunks_exact(64).zip(w.chunks_exact(64)) {
        for i in 0..64 {
            sums[i] += x[i] * w[i].to_f32();
        }
    }
    sums.iter().sum()
}

/// What a device makes of a layer, by turn: QKV, and the residual stream.
fn chain(device: &mut CudaDevice, pool: &KvPool, layer: &Layer) -> Result<Vec<[Vec<f32>; 2]>, String> {
    let ([hidden, ffn, width, qkv_width], rows) = (layer.widths, layer.rows);
    let mut matrix = |values: &[bf16], outs: usize, ins: usize| {
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        let raw = RawTensor { dtype: DType::Bf16, rows: outs, cols: ins, bytes: &bytes, stored: None, scales: None };
        made(device.load_matrix(&[raw]))
    };
    let [o, gate_up, down, qkv] = &layer.weights;
    let matrices = [
        matrix(o, hidden, width)?,
        matrix(gate_up, 2 * ffn, hidden)?,
        matrix(down, hidden, ffn)?,
        matrix(qkv, qkv_width, hidden)?,
    ];
    let ones: Vec<u8> = (0..hidden).flat_map(|_| bf16::ONE.to_le_bytes()).collect();
    let raw = RawTensor { dtype: DType::Bf16, rows: 1, cols: hidden, bytes: &ones, stored: None, scales: None };
    let weight = made(device.load_vector(&[raw]))?;
    let norm = || Norm { weight: &weight, eps: EPS };
    let tokens = vec![0; rows];
    let slots: Vec<RowSlot> =
        (0..rows as u32).map(|r| RowSlot { position: r, block: r / 16, offset: r % 16 }).collect();
    let seqs = [AttnSeq { row: 0, rows: rows as u32, position: 0, run: 0, runs: 0 }];
    let step = StepInput { tokens: &tokens, slots: &slots, seqs: &seqs, runs: &[], logit_rows: &[] };
    made(device.begin_step(&ROPE(8), &step, pool, false))?;
    let mut residual = made(device.buffer_f32(rows, hidden))?;
    let mut normed = made(device.buffer(rows, hidden))?;
    let mut attended = made(device.buffer(rows, width))?;
    let mut gate_up = made(device.buffer(rows, 2 * ffn))?;
    let mut activated = made(device.buffer(rows, ffn))?;
    let mut qkv = made(device.buffer(rows, qkv_width))?;
    let mut found = Vec::new();
    for [some, stream] in &layer.inputs {
        made(device.upload(&mut attended, some))?;
        made(device.upload(&mut residual, stream))?;
        device.linear_add_norm(&attended, rows, &matrices[0], None, &mut residual, norm(), &mut normed);
        device.linear_swiglu(&normed, rows, &matrices[1], None, &mut gate_up, &mut activated);
        device.linear_add_norm(&activated, rows, &matrices[2], None, &mut residual, norm(), &mut normed);
        device.linear(&normed, rows, &matrices[3], None, &mut qkv);
        let mut results = [vec![0.0; rows * qkv_width], vec![0.0; rows * hidden]];
        made(device.download(&qkv, rows, &mut results[0]))?;
        made(device.download(&residual, rows, &mut results[1]))?;
        found.push(results);
    }
    made(device.end_step())?;
    Ok(found)
}

/// How far a row is from what it should be: not at all where both are NaN.
fn off(x: &[f32], expected: &[f32]) -> f64 {
    if expected.iter().chain(x).all(|x| x.is_nan()) { 0.0 } else { apart(x, expected) }
}

/// What goes from product to product comes to what the CPU makes of it, and few rows
/// without a fence to the same bits as behind one.
pub fn handed(settings: &Settings) -> Result<String, String> {
    const TURNS: usize = 40;
    let kv = KvShape { layers: 1, kv_heads: 1, head_dim: 16, block_tokens: 16, dtype: KvDtype::Bf16 };
    let (mut without, mut behind) = (gpu(settings, 0)?, gpu(settings, u64::MAX)?);
    let (mut count, mut worst) = (0, 0f64);
    let shapes = [
        [64, 128, 64, 192],
        [896, 4864, 896, 1152],
        [1088, 320, 448, 640],
        [2048, 5632, 2048, 3072],
        [320, 8192, 64, 96],
        // Blocks that have one tile of the second product's and none of the third's,
        // while others have two.
        [1024, 16960, 1024, 1536],
    ];
    for (seed, shape) in shapes.into_iter().enumerate() {
        for (rows, turns) in [(1, TURNS), (2, TURNS), (7, 6), (13, 6), (32, 6)] {
            let layer = Layer::new(shape, rows, turns, seed as u64);
            let pools = (made(without.pool(kv, 2))?, made(behind.pool(kv, 2))?);
            let got = chain(&mut without, &pools.0, &layer)?;
            let want = chain(&mut behind, &pools.1, &layer)?;
            let mut wrong = Vec::new();
            for (turn, (got, want)) in got.iter().zip(&want).enumerate() {
                let expected = layer.expected(turn);
                for (i, name) in ["QKV", "the residual stream"].into_iter().enumerate() {
                    let cols = expected[i].len() / rows;
                    for (row, expected) in expected[i].chunks_exact(cols).enumerate() {
                        let [got, want] = [got, want].map(|all| &all[i][row * cols..][..cols]);
                        let differ = got.iter().zip(want).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
                        let [error, behind] = [got, want].map(|x| off(x, expected));
                        if differ > 0 || error > 1e-2 || behind > 1e-2 {
                            wrong.push(format!(
                                "turn {turn}, row {row}: {name}: {differ} of {cols} values differ, \
                                 without a fence {error:.1e} off, behind one {behind:.1e}"
                            ));
                        }
                        worst = worst.max(error);
                    }
                }
            }
            if !wrong.is_empty() {
                return Err(format!("{shape:?}, {rows} rows: {}", wrong.join("; ")));
            }
            count += turns;
        }
    }
    Ok(format!(
        "{count} launches of four products are the same to the bit without fences and with them, within {worst:.1e} of the CPU's"
    ))
}

/// Sequences of a row each with short contexts, some with gaps.
struct Case {
    shape: AttentionShape,
    window: Option<u32>,
    kv: KvShape,
    slots: Vec<RowSlot>,
    seqs: Vec<AttnSeq>,
    runs: Vec<KvRun>,
}

impl Case {
    fn new(random: &mut ChaCha8Rng) -> Self {
        let head_dim = *[64, 128].choose(random).expect("some");
        let (kv_heads, group) = (random.random_range(1..4), random.random_range(1..9));
        let block_tokens = *[16u32, 32, 48, 64, 256].choose(random).expect("some");
        let shape =
            AttentionShape { heads: kv_heads * group, kv_heads, head_dim, scale: 1.0 / (head_dim as f32).sqrt() };
        let kv = KvShape {
            layers: 2,
            kv_heads: kv_heads as u32,
            head_dim: head_dim as u32,
            block_tokens,
            dtype: KvDtype::Bf16,
        };
        let window = random.random_bool(0.3).then(|| random.random_range(1..200));
        let mut case = Self { shape, window, kv, slots: Vec::new(), seqs: Vec::new(), runs: Vec::new() };
        let rows = *[1u32, 2, 3, 8, 20].choose(random).expect("some");
        let mut next = 0;
        // What the kernel is for: with more rows fewer blocks share one.
        let most = match (rows, head_dim, group) {
            (1, 64, ..=4) => 2000,
            (1, 128, ..=4) => 1500,
            (1, ..) => 1100,
            (20, ..) if kv_heads > 2 => 180,
            (20, ..) => 350,
            _ => 750,
        };
        let most = if random.random_bool(0.3) { 60 } else { most };
        for row in 0..rows {
            let own = random.random_range(0..most);
            let own = if random.random_bool(0.1) { 0 } else { own };
            let (run, mut position, sparse) = (case.runs.len() as u32, 0, random.random_bool(0.3));
            while position <= own {
                let last = position + block_tokens > own;
                let tokens = (own + 1 - position).min(block_tokens);
                let tokens = if sparse && !last { random.random_range(1..=tokens) } else { tokens };
                if last || !sparse || random.random_bool(0.7) {
                    case.runs.push(KvRun { block: next, position, tokens });
                }
                if last {
                    case.slots.push(RowSlot { position: own, block: next, offset: own - position });
                }
                next += 1;
                position += block_tokens;
            }
            case.seqs.push(AttnSeq { row, rows: 1, position: own, run, runs: case.runs.len() as u32 - run });
        }
        case
    }
}

/// One layer's embedding of positions, appending and attention in one kernel beside
/// the same in three.
pub fn short(settings: &Settings) -> Result<String, String> {
    const LAYER: usize = 1;
    let mut random = ChaCha8Rng::seed_from_u64(5);
    let mut device = gpu(settings, 0)?;
    let (mut worst, mut worst_lse, mut count) = (0f64, 0f32, 0);
    for turn in 0..80 {
        let case = Case::new(&mut random);
        let (shape, rows) = (case.shape, case.slots.len());
        let blocks = 1 + case.slots.iter().map(|s| s.block).max().expect("a row");
        let pool = made(device.pool(case.kv, blocks as usize))?;
        // What is not there is NaN.
        let elements = case.kv.block_bytes() * blocks as usize / 2;
        let mut before: Vec<u8> = vec![0xff; elements * 2];
        let (heads, tokens) = (case.kv.kv_heads as usize, case.kv.block_tokens as usize);
        for run in &case.runs {
            for (half, head) in (0..2).flat_map(|half| (0..heads).map(move |head| (half, head))) {
                let first = (run.block as usize * 2 + half) * heads + head;
                let at = pool.offset(LAYER, 0) + first * tokens * shape.head_dim * 2;
                let values = noise(&mut random, run.tokens as usize * shape.head_dim, 1.0);
                for (to, x) in before[at..].chunks_exact_mut(2).zip(values) {
                    to.copy_from_slice(&bf16::from_f32(x).to_le_bytes());
                }
            }
        }
        let values = noise(&mut random, rows * shape.qkv_width(), 1.0);
        let weights: Vec<u8> =
            noise(&mut random, shape.head_dim, 1.0).into_iter().flat_map(|x| bf16::from_f32(x).to_le_bytes()).collect();
        let raw = RawTensor {
            dtype: DType::Bf16,
            rows: 1,
            cols: shape.head_dim,
            bytes: &weights,
            stored: None,
            scales: None,
        };
        let norm = made(device.load_vector(&[raw]))?;
        let norms = (turn % 3 == 0).then_some((&norm, &norm, 1e-6));
        let mut rope = ROPE(if turn % 4 < 2 { shape.head_dim / 4 } else { shape.head_dim / 2 });
        rope.interleaved = turn % 2 == 0;
        let ids = vec![0; rows];
        let logit_rows: Vec<u32> = (0..rows as u32).collect();
        let step =
            StepInput { tokens: &ids, slots: &case.slots, seqs: &case.seqs, runs: &case.runs, logit_rows: &logit_rows };
        let mut run = |local: bool| -> Result<_, String> {
            pool.write(0, &before).map_err(|e| e.to_string())?;
            let mut qkv = made(device.buffer(rows, shape.qkv_width()))?;
            let mut o = made(device.buffer(rows, shape.q_width()))?;
            let mut lse = made(device.buffer_f32(rows, shape.heads))?;
            made(device.upload(&mut qkv, &values))?;
            made(device.begin_step(&rope, &step, &pool, local))?;
            if device.is_short() != local {
                return Err(format!("{:?}: is_short is {}", case.seqs, device.is_short()));
            }
            device.rope_append(&shape, norms, LAYER, &pool, &mut qkv);
            device.attention(&shape, case.window, LAYER, &pool, &qkv, &mut o, &mut lse);
            made(device.end_step())?;
            let (mut got, mut got_lse) = (vec![0.0; rows * shape.q_width()], vec![0.0; rows * shape.heads]);
            made(device.download(&o, rows, &mut got))?;
            made(device.download(&lse, rows, &mut got_lse))?;
            let mut after = vec![0; before.len()];
            pool.on_accelerator().expect("a GPU's pool").read(0, &mut after)?;
            let kv: Vec<f32> = after.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect();
            Ok((got, got_lse, kv))
        };
        // The first makes the pool known, which the second needs.
        let (want, want_lse, want_kv) = run(false)?;
        let (got, got_lse, got_kv) = run(true)?;
        let same = |(a, b): (&f32, &f32)| (a - b).abs() <= 0.01 * b.abs() + 1e-5 || (a.is_nan() && b.is_nan());
        if let Some(at) = got_kv.iter().zip(&want_kv).position(|pair| !same(pair)) {
            return Err(format!("{shape:?}: element {at} of the pool is {}, not {}", got_kv[at], want_kv[at]));
        }
        let error = apart(&got, &want);
        let lse_error = got_lse.iter().zip(&want_lse).map(|(a, b)| (a - b).abs() / (1.0 + b.abs())).fold(0.0, f32::max);
        if !(error < 1e-2 && lse_error < 2e-3) {
            let Case { window, kv, seqs, .. } = &case;
            return Err(format!(
                "{shape:?}, {kv:?}, window {window:?}, {seqs:?}: o differs by {error}, lse by {lse_error}"
            ));
        }
        (worst, worst_lse, count) = (worst.max(error), worst_lse.max(lse_error), count + 1);
    }
    Ok(format!("{count} random layers, o within {worst:.1e} of three kernels' way, lse within {worst_lse:.1e}"))
}
