//! Every attention kernel against the plain one.

use proptest::prelude::*;

use super::attention::{Attend, Attention};
use super::product_tests::noise;
use super::simd::tests::isas;
use super::threads::ThreadPool;
use super::*;
use crate::kv::rblock::{KvDtype, KvShape};

/// Sequences with their KV in a pool whose every other element is NaN.
struct Case {
    shape: AttentionShape,
    window: Option<u32>,
    pool: Arc<KvPool>,
    q: Vec<f32>,
    seqs: Vec<AttnSeq>,
    runs: Vec<KvRun>,
    rows: usize,
}

#[derive(Clone, Debug)]
struct Spec {
    kv_heads: usize,
    group: usize,
    head_dim: usize,
    block_tokens: usize,
    dtype: KvDtype,
    window: Option<u32>,
    /// Rows, context before them, and whether every third run is elsewhere.
    seqs: Vec<(u32, u32, bool)>,
    /// Size of the largest scores.
    extreme: f32,
    seed: u64,
}

const LAYERS: u32 = 2;
const LAYER: usize = 1;

fn specs() -> impl Strategy<Value = Spec> {
    let head = prop::sample::select(vec![2usize, 8, 10, 48, 64, 80, 96, 128, 256]);
    let dtype = prop::sample::select(vec![KvDtype::Bf16, KvDtype::F16, KvDtype::F32, KvDtype::Fp8]);
    let seqs = prop::collection::vec((1u32..41, 0u32..300, any::<bool>()), 1..4);
    let decode = prop::collection::vec((1u32..2, 0u32..900, any::<bool>()), 1..4);
    let seqs = prop_oneof![seqs, decode];
    let block = prop::sample::select(vec![16usize, 32, 256, 24]);
    let window = prop::option::of(1u32..200);
    let extreme = prop::sample::select(vec![1.0f32, 80.0]);
    (1usize..4, 1usize..17, head, block, dtype, window, seqs, extreme, 0u64..1 << 40).prop_map(
        |(kv_heads, group, head_dim, block_tokens, dtype, window, seqs, extreme, seed)| Spec {
            kv_heads,
            group,
            head_dim,
            block_tokens,
            dtype,
            window,
            seqs,
            extreme,
            seed,
        },
    )
}

impl Spec {
    fn case(&self) -> Case {
        let heads = self.kv_heads * self.group;
        let shape = AttentionShape {
            heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            scale: self.extreme * 3.0 / (self.head_dim as f32).sqrt(),
        };
        let kv = KvShape {
            layers: LAYERS,
            kv_heads: self.kv_heads as u32,
            head_dim: self.head_dim as u32,
            block_tokens: self.block_tokens as u32,
            dtype: self.dtype,
        };
        let needed: usize = self.seqs.iter().map(|s| kv.blocks_for((s.0 + s.1) as usize)).sum();
        let blocks = needed as u32 + 3;
        let pool = Arc::new(KvPool::new(kv, blocks).unwrap());
        pool.memory().write(0, &vec![0xff; pool.memory().len()]).unwrap();
        let mut seqs = Vec::new();
        let mut runs = Vec::new();
        let mut row = 0;
        // Physical blocks in a scattered order.
        let mut free: Vec<u32> = (0..blocks).collect();
        free.sort_by_key(|b| u64::from(*b).wrapping_mul(self.seed | 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20);
        let mut values = noise(self.seed, 1 << 16).into_iter().cycle();
        for &(rows, context, sparse) in &self.seqs {
            let first = runs.len();
            let mut left = rows + context;
            let mut position = 0;
            while left > 0 {
                let tokens = left.min(self.block_tokens as u32);
                let block = free.pop().unwrap();
                if !sparse || (position / self.block_tokens as u32) % 3 != 1 {
                    for v in [false, true] {
                        for head in 0..self.kv_heads {
                            for token in 0..tokens as usize {
                                let row: Vec<f32> = values.by_ref().take(self.head_dim).collect();
                                reference::write_kv(&pool, LAYER, block, v, head, token, &row);
                            }
                        }
                    }
                    runs.push(KvRun { block, position, tokens });
                }
                position += tokens;
                left -= tokens;
            }
            seqs.push(AttnSeq { row, rows, position: context, run: first as u32, runs: (runs.len() - first) as u32 });
            row += rows;
        }
        let rows = row as usize;
        let q = noise(self.seed + 1, rows * shape.q_width());
        Case { shape, window: self.window, pool, q, seqs, runs, rows }
    }
}

impl Case {
    fn run(&self, isa: Isa, threads: usize, seqs: &[AttnSeq], runs: &[KvRun]) -> (Vec<f32>, Vec<f32>) {
        let mut pool = ThreadPool::new(threads, false).unwrap();
        let mut attention = Attention::new(isa, threads);
        let mut o = vec![f32::NAN; self.rows * self.shape.q_width()];
        let mut lse = vec![f32::NAN; self.rows * self.shape.heads];
        let job = Attend {
            shape: &self.shape,
            window: self.window,
            layer: LAYER,
            pool: &self.pool,
            q: &self.q,
            q_stride: self.shape.q_width(),
            seqs,
            runs,
            o: &mut o,
            o_stride: self.shape.q_width(),
            lse: &mut lse,
            lse_stride: self.shape.heads,
        };
        attention.run(&mut pool, job);
        (o, lse)
    }

    fn reference(&self) -> (Vec<f32>, Vec<f32>) {
        let mut o = vec![f32::NAN; self.rows * self.shape.q_width()];
        let mut lse = vec![f32::NAN; self.rows * self.shape.heads];
        reference::attention(
            &self.shape,
            self.window,
            LAYER,
            &self.pool,
            &self.q,
            self.shape.q_width(),
            &self.seqs,
            &self.runs,
            &mut o,
            &mut lse,
        );
        (o, lse)
    }

    /// Asserts that two results agree; `room` is the error allowed in a score.
    fn same(&self, got: &(Vec<f32>, Vec<f32>), want: &(Vec<f32>, Vec<f32>), room: f32, what: &str) {
        for (i, (g, w)) in got.1.iter().zip(&want.1).enumerate() {
            if *w == f32::NEG_INFINITY {
                assert_eq!(*g, f32::NEG_INFINITY, "{what}: lse {i}");
            } else {
                assert!((g - w).abs() <= room * (1.0 + w.abs()), "{what}: lse {i} is {g}, not {w}");
            }
        }
        for (i, (g, w)) in got.0.iter().zip(&want.0).enumerate() {
            assert!((g - w).abs() <= room, "{what}: o {i} is {g}, not {w}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(80) })]

    #[test]
    fn attention_is_the_reference(spec in specs(), threads in 1usize..4) {
        let case = spec.case();
        let want = case.reference();
        // A score of 80 has a rounding error of some 1e-5.
        let room = 4e-6 * (1.0 + spec.extreme);
        for isa in isas() {
            let got = case.run(isa, threads, &case.seqs, &case.runs);
            case.same(&got, &want, room, &format!("{isa:?}"));
        }
    }

    #[test]
    fn parts_merged_are_the_whole(spec in specs(), cuts in prop::collection::vec(0usize..4, 64)) {
        let spec = Spec { dtype: KvDtype::F32, ..spec };
        let case = spec.case();
        for isa in isas() {
            let whole = case.run(isa, 2, &case.seqs, &case.runs);
            // Every run goes to one of four parts, as to four instances.
            let mut merged: Option<(Vec<f32>, Vec<f32>)> = None;
            for part in 0..4 {
                let mut seqs = Vec::new();
                let mut runs = Vec::new();
                for seq in &case.seqs {
                    let first = runs.len() as u32;
                    let all = &case.runs[seq.run as usize..][..seq.runs as usize];
                    let mine = all.iter().enumerate().filter(|(i, _)| cuts[i % cuts.len()] == part);
                    runs.extend(mine.map(|(_, run)| *run));
                    seqs.push(AttnSeq { run: first, runs: runs.len() as u32 - first, ..*seq });
                }
                let partial = case.run(isa, 2, &seqs, &runs);
                match &mut merged {
                    None => merged = Some(partial),
                    Some((o, lse)) => {
                        let d = case.shape.head_dim;
                        for (i, lse) in lse.iter_mut().enumerate() {
                            reference::merge(&mut o[i * d..][..d], lse, &partial.0[i * d..][..d], partial.1[i]);
                        }
                    }
                }
            }
            case.same(&merged.unwrap(), &whole, 1e-5 * spec.extreme.max(1.0).sqrt(), &format!("{isa:?}"));
        }
    }
}

#[test]
fn a_row_without_keys_is_empty() {
    let spec = Spec {
        kv_heads: 2,
        group: 3,
        head_dim: 64,
        block_tokens: 16,
        dtype: KvDtype::Bf16,
        window: None,
        seqs: vec![(1, 5, false), (20, 3, false)],
        extreme: 1.0,
        seed: 5,
    };
    let case = spec.case();
    for isa in isas() {
        let none: Vec<AttnSeq> = case.seqs.iter().map(|s| AttnSeq { runs: 0, ..*s }).collect();
        let (o, lse) = case.run(isa, 2, &none, &[]);
        assert!(o.iter().all(|o| *o == 0.0) && lse.iter().all(|l| *l == f32::NEG_INFINITY));
        // Keys that all lie behind the rows.
        let later: Vec<KvRun> = case.runs.iter().map(|r| KvRun { position: r.position + 1000, ..*r }).collect();
        let (o, lse) = case.run(isa, 2, &case.seqs, &later);
        assert!(o.iter().all(|o| *o == 0.0) && lse.iter().all(|l| *l == f32::NEG_INFINITY));
    }
}
