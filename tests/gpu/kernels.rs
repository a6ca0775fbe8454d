//! Kernels of the GPU beside the plain CPU ones, over random shapes.

use std::sync::Arc;

use distkv::device::cpu::reference;
use distkv::device::cpu::{CpuDevice, CpuOptions, Math};
use distkv::device::cuda::{CudaDevice, CudaOptions, Element, FENCED_BELOW};
use distkv::device::tensor::{DType, RawTensor};
use distkv::device::{AttentionShape, AttnSeq, Choice, Device, Norm, Pass, Rope, RowSlot, StepInput};
use distkv::kv::pool::KvPool;
use distkv::kv::rblock::{KvDtype, KvRun, KvShape};
use distkv::model::sampler::{Sampler, SamplingParams};
use distkv::node::device::DeviceName;
use half::bf16;
use rand::seq::{IndexedRandom, SliceRandom};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::Settings;

const MAX_ROWS: usize = 1024;

pub fn gpu(settings: &Settings, element: Element) -> Result<CudaDevice, String> {
    let DeviceName::Cuda(ordinal) = settings.device else { return Err("these checks are for a GPU".into()) };
    let options =
        CudaOptions { ordinal, element, max_rows: MAX_ROWS, max_seqs: 256, graphs: true, fenced_below: FENCED_BELOW };
    CudaDevice::new(options).map_err(|e| e.to_string())
}

pub fn noise(random: &mut ChaCha8Rng, len: usize, size: f32) -> Vec<f32> {
    (0..len).map(|_| bf16::from_f32(random.random_range(-size..size)).to_f32()).collect()
}

/// ‖a − b‖ / ‖b‖; infinite where a value is no number.
pub fn apart(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let square = |x: f32| f64::from(x) * f64::from(x);
    let difference: f64 = a.iter().zip(b).map(|(a, b)| square(a - b)).sum();
    let norm: f64 = b.iter().copied().map(square).sum();
    if a.iter().all(|x| x.is_finite()) { (difference / norm.max(1e-30)).sqrt() } else { f64::INFINITY }
}

pub const ROPE: fn(usize) -> Rope = |pairs| Rope {
    inv_freq: (0..pairs).map(|i| 1e4f32.powf(-(i as f32) / pairs as f32)).collect(),
    magnitude: 1.0,
    interleaved: false,
};

struct Case {
    shape: AttentionShape,
    window: Option<u32>,
    kv: KvShape,
    blocks: u32,
    slots: Vec<RowSlot>,
    seqs: Vec<AttnSeq>,
    runs: Vec<KvRun>,
}

impl Case {
    fn new(random: &mut ChaCha8Rng, dtype: KvDtype) -> Self {
        let head_dim = *[16, 48, 64, 80, 96, 128, 256].choose(random).expect("some");
        let (kv_heads, group) = (random.random_range(1..4), random.random_range(1..17));
        let block_tokens = *[16u32, 32, 48, 64, 256].choose(random).expect("some");
        let extreme = if random.random_bool(0.2) { 80.0 } else { 1.0 };
        let shape = AttentionShape {
            heads: kv_heads * group,
            kv_heads,
            head_dim,
            scale: extreme * 3.0 / (head_dim as f32).sqrt(),
        };
        let kv = KvShape { layers: 2, kv_heads: kv_heads as u32, head_dim: head_dim as u32, block_tokens, dtype };
        let mut case = Self {
            shape,
            window: random.random_bool(0.3).then(|| random.random_range(1..200)),
            kv,
            blocks: 0,
            slots: Vec::new(),
            seqs: Vec::new(),
            runs: Vec::new(),
        };
        let only_decode = random.random_bool(0.4);
        let mut next = 0;
        for _ in 0..random.random_range(1..6) {
            let rows = if only_decode { 1 } else { *[1u32, 2, 5, 16, 40, 130].choose(random).expect("some") };
            let context = if random.random_bool(0.1) { 0 } else { random.random_range(0..700) };
            let (row, sparse) = (case.slots.len() as u32, random.random_bool(0.3));
            let empty = random.random_bool(0.05);
            let (first, mut position) = (case.runs.len() as u32, 0);
            while position < context + rows {
                let tokens = (context + rows - position).min(block_tokens);
                // In a gap, and in the middle, a block may be half full.
                let tokens = if sparse && random.random_bool(0.2) { random.random_range(1..=tokens) } else { tokens };
                let elsewhere = empty || (sparse && random.random_bool(0.3));
                if !elsewhere {
                    case.runs.push(KvRun { block: next, position, tokens });
                }
                next += 1;
                position += block_tokens;
            }
            let runs = case.runs.len() as u32 - first;
            case.seqs.push(AttnSeq { row, rows, position: context, run: first, runs });
            case.slots.extend((0..rows).map(|r| RowSlot { position: context + r, block: 0, offset: 0 }));
        }
        case.blocks = next + 2;
        let mut order: Vec<u32> = (0..case.blocks).collect();
        order.shuffle(random);
        case.runs.iter_mut().for_each(|run| run.block = order[run.block as usize]);
        case
    }
}

/// MicroAttention: ragged lengths, gaps, empty parts, windows, extreme scores;
/// what must not be read is NaN, as are results that were not written.
pub fn attention(settings: &Settings) -> Result<String, String> {
    const LAYER: usize = 1;
    let mut random = ChaCha8Rng::seed_from_u64(1);
    let (mut worst, mut worst_lse, mut count) = (0f64, 0f32, 0);
    let kinds = [(Element::Bf16, KvDtype::Bf16), (Element::F16, KvDtype::F16), (Element::Bf16, KvDtype::Fp8)];
    for (element, dtype) in kinds {
        let mut device = gpu(settings, element)?;
        for _ in 0..60 {
            let case = Case::new(&mut random, dtype);
            let rows = case.slots.len();
            let shape = case.shape;
            let host = KvPool::new(case.kv, case.blocks).map_err(|e| e.to_string())?;
            host.memory().write(0, &vec![0xff; host.memory().len()]).map_err(|e| e.to_string())?;
            for run in &case.runs {
                for (v, head, token) in (0..run.tokens as usize)
                    .flat_map(|t| (0..shape.kv_heads).flat_map(move |h| [(false, h, t), (true, h, t)]))
                {
                    let values = noise(&mut random, shape.head_dim, 1.0);
                    reference::write_kv(&host, LAYER, run.block, v, head, token, &values);
                }
            }
            let pool = device.pool(case.kv, case.blocks as usize).map_err(|e| e.to_string())?;
            let mut bytes = vec![0; case.kv.block_bytes() * case.blocks as usize];
            host.memory().read(0, &mut bytes).map_err(|e| e.to_string())?;
            pool.write(0, &bytes).map_err(|e| e.to_string())?;

            let q = noise(&mut random, rows * shape.qkv_width(), 1.0);
            let made = |r: distkv::device::Result<_>| r.map_err(|e| e.to_string());
            let mut qkv = made(device.buffer(rows, shape.qkv_width()))?;
            let mut o = made(device.buffer(rows, shape.q_width()))?;
            let mut lse = made(device.buffer_f32(rows, shape.heads))?;
            device.upload(&mut qkv, &q).map_err(|e| e.to_string())?;
            let tokens = vec![0; rows];
            let step =
                StepInput { tokens: &tokens, slots: &case.slots, seqs: &case.seqs, runs: &case.runs, logit_rows: &[] };
            let begun = device.begin_step(&ROPE(shape.head_dim / 2), &step, &pool, false);
            assert!(matches!(begun.map_err(|e| e.to_string())?, Pass::Run { .. }));
            device.attention(&shape, case.window, LAYER, &pool, &qkv, &mut o, &mut lse);
            device.end_step().map_err(|e| e.to_string())?;
            let (mut got, mut got_lse) = (vec![0.0; rows * shape.q_width()], vec![0.0; rows * shape.heads]);
            device.download(&o, rows, &mut got).map_err(|e| e.to_string())?;
            device.download(&lse, rows, &mut got_lse).map_err(|e| e.to_string())?;

            let (mut want, mut want_lse) = (vec![0.0; got.len()], vec![0.0; got_lse.len()]);
            let (stride, seqs, runs) = (shape.qkv_width(), &case.seqs, &case.runs);
            // A thread a few rows: the plain one takes its time.
            let (width, heads, window) = (shape.q_width(), shape.heads, case.window);
            std::thread::scope(|scope| {
                let rows = want.chunks_mut(4 * width).zip(want_lse.chunks_mut(4 * heads)).zip(q.chunks(4 * stride));
                for (part, ((want, want_lse), q)) in rows.enumerate() {
                    let host = &host;
                    scope.spawn(move || {
                        let first = 4 * part as u32;
                        let here: Vec<AttnSeq> = seqs
                            .iter()
                            .filter_map(|seq| {
                                let begin = seq.row.max(first);
                                let end = (seq.row + seq.rows).min(first + 4);
                                let position = seq.position + (begin - seq.row.min(begin));
                                (begin < end).then(|| AttnSeq {
                                    row: begin - first,
                                    rows: end - begin,
                                    position,
                                    ..*seq
                                })
                            })
                            .collect();
                        reference::attention(&shape, window, LAYER, host, q, stride, &here, runs, want, want_lse);
                    });
                }
            });
            let error = apart(&got, &want);
            let lse_error = got_lse
                .iter()
                .zip(&want_lse)
                .map(|(a, b)| if a == b { 0.0 } else { (a - b).abs() / (1.0 + b.abs()) })
                .fold(0.0, f32::max);
            let close = error < 1e-2 && lse_error < 1e-3;
            if !close {
                return Err(format!(
                    "{element:?}, {shape:?}, {:?}, window {:?}, {:?}: o differs by {error}, lse by {lse_error}",
                    case.kv, case.window, case.seqs
                ));
            }
            (worst, worst_lse, count) = (worst.max(error), worst_lse.max(lse_error), count + 1);
        }
    }
    Ok(format!("{count} random cases, o within {worst:.1e}, lse within {worst_lse:.1e}"))
}

/// A buffer's rows on either device.
trait Host: Device {
    fn put(&mut self, x: &mut Self::Buffer, values: &[f32]);
    fn get(&mut self, x: &Self::Buffer, rows: usize, cols: usize) -> Vec<f32> {
        let mut values = vec![0.0; rows * cols];
        self.download(x, rows, &mut values).expect("rows come down");
        values
    }
}

impl Host for CpuDevice {
    fn put(&mut self, x: &mut Self::Buffer, values: &[f32]) {
        x.as_mut_slice()[..values.len()].copy_from_slice(values);
    }
}

impl Host for CudaDevice {
    fn put(&mut self, x: &mut Self::Buffer, values: &[f32]) {
        self.upload(x, values).expect("rows go up");
    }
}

struct RowsCase {
    rows: usize,
    hidden: usize,
    ffn: usize,
    shape: AttentionShape,
    biased: bool,
    normed: bool,
    seed: u64,
}

/// One layer's kernels but for attention, on random weights; named results.
fn layer<D: Host>(device: &mut D, pool: &KvPool, case: &RowsCase) -> Vec<(&'static str, Vec<f32>)> {
    let mut random = ChaCha8Rng::seed_from_u64(case.seed);
    let RowsCase { rows, hidden, ffn, shape, .. } = *case;
    let mut bytes = |count: usize, size: f32| -> Vec<u8> {
        noise(&mut random, count, size).into_iter().flat_map(|x| bf16::from_f32(x).to_le_bytes()).collect()
    };
    let vocab = 50;
    let sizes =
        [(vocab, hidden), (shape.qkv_width(), hidden), (hidden, shape.q_width()), (2 * ffn, hidden), (hidden, ffn)];
    let weights: Vec<Vec<u8>> = sizes.map(|(outs, ins)| bytes(outs * ins, 1.7 / (ins as f32).sqrt())).into();
    let mut vector = |len: usize| bytes(len, 1.0);
    let vectors = [hidden, hidden, shape.head_dim, shape.head_dim, shape.qkv_width(), hidden].map(&mut vector);
    let raw = |bytes, rows, cols| RawTensor { dtype: DType::Bf16, rows, cols, bytes, stored: None, scales: None };
    let matrices: Vec<D::Matrix> = weights
        .iter()
        .zip(sizes)
        .map(|(bytes, (outs, ins))| device.load_matrix(&[raw(bytes, outs, ins)]).expect("weights"))
        .collect();
    let vectors: Vec<D::Vector> =
        vectors.iter().map(|bytes| device.load_vector(&[raw(bytes, 1, bytes.len() / 2)]).expect("a vector")).collect();
    let tokens: Vec<u32> = (0..rows).map(|_| random.random_range(0..vocab as u32)).collect();
    let tokens_a_block = pool.shape().block_tokens;
    let slots: Vec<RowSlot> = (0..rows as u32)
        .map(|r| RowSlot { position: 1000 + r, block: r / tokens_a_block, offset: r % tokens_a_block })
        .collect();
    let seqs = [AttnSeq { row: 0, rows: rows as u32, position: 1000, run: 0, runs: 0 }];
    let logit_rows: Vec<u32> = (0..rows as u32).step_by(3).take(256).collect();
    let step = StepInput { tokens: &tokens, slots: &slots, seqs: &seqs, runs: &[], logit_rows: &logit_rows };
    let rope = Rope { interleaved: case.seed.is_multiple_of(2), ..ROPE(shape.head_dim / 2) };
    device.begin_step(&rope, &step, pool, false).expect("a step");

    let mut residual = device.buffer_f32(rows, hidden).expect("room");
    let mut normed = device.buffer(rows, hidden).expect("room");
    let mut qkv = device.buffer(rows, shape.qkv_width()).expect("room");
    let mut attended = device.buffer(rows, shape.q_width()).expect("room");
    let mut gate_up = device.buffer(rows, 2 * ffn).expect("room");
    let mut activated = device.buffer(rows, ffn).expect("room");
    let mut selected = device.buffer_f32(logit_rows.len(), hidden).expect("room");
    let mut logits = device.buffer_f32(logit_rows.len(), vocab).expect("room");
    let norm = |i: usize| Norm { weight: &vectors[i], eps: 1e-5 };
    let mut found = Vec::new();
    device.embed(&matrices[0], &mut residual);
    found.push(("embed", device.get(&residual, rows, hidden)));
    device.rms_norm(&residual, rows, norm(0), &mut normed);
    found.push(("rms_norm", device.get(&normed, rows, hidden)));
    device.linear(&normed, rows, &matrices[1], case.biased.then_some(&vectors[4]), &mut qkv);
    found.push(("linear", device.get(&qkv, rows, shape.qkv_width())));
    let heads = case.normed.then_some((&vectors[2], &vectors[3], 1e-6));
    device.rope_append(&shape, heads, 0, pool, &mut qkv);
    let queries: Vec<f32> = device
        .get(&qkv, rows, shape.qkv_width())
        .chunks_exact(shape.qkv_width())
        .flat_map(|row| row[..shape.q_width()].to_vec())
        .collect();
    found.push(("queries", queries));
    let some: Vec<f32> = noise(&mut random, rows * shape.q_width(), 1.0);
    device.put(&mut attended, &some);
    let bias = case.biased.then_some(&vectors[5]);
    device.linear_add_norm(&attended, rows, &matrices[2], bias, &mut residual, norm(1), &mut normed);
    found.push(("linear_add", device.get(&residual, rows, hidden)));
    device.linear_swiglu(&normed, rows, &matrices[3], None, &mut gate_up, &mut activated);
    found.push(("linear_swiglu", device.get(&activated, rows, ffn)));
    device.linear_add(&activated, rows, &matrices[4], None, &mut residual);
    found.push(("linear_add, second", device.get(&residual, rows, hidden)));
    device.gather(&residual, &logit_rows, &mut selected);
    found.push(("gather", device.get(&selected, logit_rows.len(), hidden)));
    device.rms_norm(&selected, logit_rows.len(), norm(0), &mut normed);
    device.linear(&normed, logit_rows.len(), &matrices[0], None, &mut logits);
    found.push(("logits", device.get(&logits, logit_rows.len(), vocab)));
    device.end_step().expect("a step");
    found
}

/// Embedding, norms, linear layers, rotary embedding, SwiGLU, gathering.
pub fn rows(settings: &Settings) -> Result<String, String> {
    let mut random = ChaCha8Rng::seed_from_u64(2);
    let mut device = gpu(settings, Element::Bf16)?;
    let mut worst = (0f64, "");
    let all = [1, 2, 7, 8, 9, 16, 31, 33, 64, 65, 100, 200, 513, 1000];
    for (i, &rows) in all.iter().cycle().take(42).enumerate() {
        let (kv_heads, group) = (random.random_range(1..4), random.random_range(1..5));
        let head_dim = *[16, 64, 80, 128].choose(&mut random).expect("some");
        let shape = AttentionShape { heads: kv_heads * group, kv_heads, head_dim, scale: 1.0 };
        let case = RowsCase {
            rows,
            hidden: *[64, 96, 576, 1024].choose(&mut random).expect("some"),
            ffn: *[64, 160, 1536, 2048].choose(&mut random).expect("some"),
            shape,
            biased: random.random(),
            normed: random.random(),
            seed: i as u64,
        };
        let kv = KvShape {
            layers: 1,
            kv_heads: kv_heads as u32,
            head_dim: head_dim as u32,
            block_tokens: 16,
            dtype: KvDtype::Bf16,
        };
        let options = CpuOptions { pin: false, math: Math::Exact, max_rows: MAX_ROWS, ..CpuOptions::default() };
        let mut cpu = CpuDevice::new(options).map_err(|e| e.to_string())?;
        let blocks = MAX_ROWS.div_ceil(16) as u32;
        let host = Arc::new(KvPool::new(kv, blocks).map_err(|e| e.to_string())?);
        let there = device.pool(kv, blocks as usize).map_err(|e| e.to_string())?;
        let want = layer(&mut cpu, &host, &case);
        let got = layer(&mut device, &there, &case);
        for ((name, got), (_, want)) in got.iter().zip(&want) {
            let error = apart(got, want);
            let close = error < 2e-2;
            if !close {
                return Err(format!(
                    "{name}: differs by {error}; {rows} rows, hidden {}, ffn {}, {shape:?}, bias {}, norms {}",
                    case.hidden, case.ffn, case.biased, case.normed
                ));
            }
            if error > worst.0 {
                worst = (error, name);
            }
        }
        // K and V as they were appended.
        let landing = distkv_fabric::Memory::new(kv.layer_bytes()).map_err(|e| e.to_string())?;
        let mut bytes = vec![0; kv.layer_bytes()];
        for block in 0..(rows / 16) as u32 {
            there.copy_layer_to(0, block, &landing, 0).map_err(|e| e.to_string())?;
            landing.read(0, &mut bytes).map_err(|e| e.to_string())?;
            let values = |bytes: &[u8]| -> Vec<f32> {
                bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
            };
            let got = values(&bytes);
            host.memory().read(host.offset(0, block), &mut bytes).map_err(|e| e.to_string())?;
            let error = apart(&got, &values(&bytes));
            let close = error < 2e-2;
            if !close {
                return Err(format!("K and V of block {block} differ by {error}; {rows} rows, {shape:?}"));
            }
        }
    }
    Ok(format!("42 random layers, within {:.1e} of the CPU's ({})", worst.0, worst.1))
}

/// Tokens chosen there and here from the same logits with the same seed.
pub fn choices(settings: &Settings) -> Result<String, String> {
    let mut random = ChaCha8Rng::seed_from_u64(3);
    let mut device = gpu(settings, Element::Bf16)?;
    let kv = KvShape { layers: 1, kv_heads: 1, head_dim: 64, block_tokens: 16, dtype: KvDtype::Bf16 };
    let pool = device.pool(kv, 16).map_err(|e| e.to_string())?;
    let (mut all, mut same) = (0, 0);
    for round in 0..60 {
        let vocab = *[33usize, 320, 32000, 128_256].choose(&mut random).expect("some");
        let rows = random.random_range(1..20usize);
        let size = *[0.5f32, 8.0].choose(&mut random).expect("some");
        let mut logits: Vec<f32> = (0..rows * vocab).map(|_| random.random_range(-size..size)).collect();
        let broken = (round % 10 == 3).then(|| random.random_range(0..rows));
        if let Some(row) = broken {
            logits[row * vocab + vocab / 2] = f32::NAN;
        }
        let params: Vec<SamplingParams> = (0..rows)
            .map(|_| SamplingParams {
                temperature: *[0.0, 0.3, 1.0, 1.7].choose(&mut random).expect("some"),
                top_p: *[1.0, 0.9, 0.3].choose(&mut random).expect("some"),
                top_k: *[0, 1, 40, 1000].choose(&mut random).expect("some"),
                min_p: *[0.0, 0.0, 0.05].choose(&mut random).expect("some"),
                seed: Some(random.random()),
                repetition_penalty: *[1.0, 1.2].choose(&mut random).expect("some"),
                presence_penalty: *[0.0, 0.5].choose(&mut random).expect("some"),
                frequency_penalty: *[0.0, 0.1].choose(&mut random).expect("some"),
                logit_bias: if random.random_bool(0.2) { vec![(3, 5.0), (7, -100.0)] } else { Vec::new() },
                logprobs: if random.random_bool(0.3) { Some(random.random_range(0..21)) } else { None },
            })
            .collect();
        let prompt: Vec<u32> = (0..50).map(|_| random.random_range(0..vocab as u32)).collect();
        let tokens = vec![0; rows];
        let slots: Vec<RowSlot> = (0..rows as u32).map(|r| RowSlot { position: r, block: 0, offset: 0 }).collect();
        let seqs = [AttnSeq { row: 0, rows: rows as u32, position: 0, run: 0, runs: 0 }];
        let logit_rows: Vec<u32> = (0..rows as u32).collect();
        let step = StepInput { tokens: &tokens, slots: &slots, seqs: &seqs, runs: &[], logit_rows: &logit_rows };
        device.begin_step(&ROPE(32), &step, &pool, false).map_err(|e| e.to_string())?;
        device.end_step().map_err(|e| e.to_string())?;
        let mut buffer = device.buffer_f32(rows, vocab).map_err(|e| e.to_string())?;
        device.upload(&mut buffer, &logits).map_err(|e| e.to_string())?;
        let mut there: Vec<Sampler> = params.iter().map(|p| Sampler::new(p, &prompt, 0)).collect();
        let asked: Vec<Choice<'_>> =
            there.iter_mut().enumerate().map(|(row, sampler)| sampler.choice(row as u32, vocab)).collect();
        let mut chosen = Vec::new();
        device.choose(&mut buffer, &asked, &mut chosen).map_err(|e| e.to_string())?;
        for ((row, params), chosen) in params.iter().enumerate().zip(chosen) {
            let mut here = Sampler::new(params, &prompt, 0);
            let want = here.sample(&mut logits[row * vocab..][..vocab]);
            let got = there[row].accept(chosen);
            match (want, got) {
                (Err(want), Err(got)) if want == got && broken == Some(row) => {}
                (Ok((want, theirs)), Ok((got, ours))) => {
                    all += 1;
                    same += usize::from(want == got);
                    let Some((theirs, ours)) = theirs.zip(ours) else { continue };
                    let close = |a: f32, b: f32| (a - b).abs() < 1e-3;
                    let tops = theirs.top.iter().zip(&ours.top).all(|(a, b)| a.0 == b.0 && close(a.1, b.1));
                    let right = theirs.top.len() == ours.top.len() && tops;
                    if !right || (want == got && !close(theirs.chosen, ours.chosen)) {
                        return Err(format!("logprobs {ours:?}, not {theirs:?}"));
                    }
                }
                (want, got) => return Err(format!("{got:?}, not {want:?}, of {params:?}")),
            }
        }
    }
    // The rest are draws at the very edge between two tokens.
    if same * 1000 < all * 995 {
        return Err(format!("{same} of {all} choices are the CPU's"));
    }
    Ok(format!("{same} of {all} choices are the CPU's"))
}
