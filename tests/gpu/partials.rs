//! Queries to peers and their partials back, beside the plain CPU ones.

use std::ops::Range;

use distkv::device::cpu::reference;
use distkv::device::cuda::Element;
use distkv::device::{AttentionShape, Device};
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::Settings;
use crate::kernels::{apart, gpu, noise};

/// Some of the rows, with gaps.
fn some_of(random: &mut ChaCha8Rng, rows: usize) -> Vec<Range<u32>> {
    let mut ranges = Vec::new();
    let mut at = 0;
    while at < rows {
        let begin = at + random.random_range(0..3);
        let end = (begin + random.random_range(1..=1 + rows / 3)).min(rows);
        if begin < end {
            ranges.push(begin as u32..end as u32);
        }
        at = end + usize::from(random.random_bool(0.3));
    }
    ranges
}

/// Natural logarithms, some of them far apart, some of a part without a key.
fn lse_of(random: &mut ChaCha8Rng, len: usize) -> Vec<f32> {
    let mut one = || match random.random_range(0..4) {
        0 => f32::NEG_INFINITY,
        _ => random.random_range(-1.0..1.0) * *[1.0, 30.0, 2000.0].choose(random).expect("some"),
    };
    (0..len).map(|_| one()).collect()
}

/// Queries as they lie in the rows; partials of several peers merged one behind the
/// other, no part and any lse among them. What has nothing to be merged with stays as
/// it is; parts without a key are NaN, and not read.
pub fn partials(settings: &Settings) -> Result<String, String> {
    let mut random = ChaCha8Rng::seed_from_u64(7);
    let (mut worst, mut merges) = (0f64, 0);
    for element in [Element::Bf16, Element::F16] {
        let mut device = gpu(settings, element)?;
        let failed = |e: distkv::device::DeviceError| e.to_string();
        for case in 0..60 {
            let (kv_heads, group) = (random.random_range(1..9), random.random_range(1..5));
            let head_dim = *[64, 80, 96, 128, 192, 256].choose(&mut random).expect("some");
            let shape = AttentionShape { heads: kv_heads * group, kv_heads, head_dim, scale: 1.0 };
            let rows = *[1, 2, 7, 32, 33, 200, 700].choose(&mut random).expect("some");
            let (width, heads) = (shape.q_width(), shape.heads);
            let told = |what: &str| format!("{what}; {}, case {case}: {rows} rows, {shape:?}", element.suffix());

            let mut qkv = device.buffer(rows, shape.qkv_width()).map_err(failed)?;
            let mut o = device.buffer(rows, width).map_err(failed)?;
            let mut lse = device.buffer_f32(rows, heads).map_err(failed)?;
            device.upload(&mut qkv, &noise(&mut random, rows * shape.qkv_width(), 1.0)).map_err(failed)?;
            let mut fused = vec![0.0; rows * shape.qkv_width()];
            device.download(&qkv, rows, &mut fused).map_err(failed)?;
            let mut want_lse = lse_of(&mut random, rows * heads);
            let mut own = noise(&mut random, rows * width, 1.0);
            for (head, _) in own.chunks_exact_mut(head_dim).zip(&want_lse).filter(|(_, l)| **l == f32::NEG_INFINITY) {
                head.fill(f32::NAN);
            }
            device.upload(&mut o, &own).map_err(failed)?;
            device.upload(&mut lse, &want_lse).map_err(failed)?;
            let mut want = vec![0.0; rows * width];
            device.download(&o, rows, &mut want).map_err(failed)?;
            let before = want.clone();

            // Nothing waits in between.
            let mut merged = vec![false; rows * heads];
            for _ in 0..random.random_range(1..5) {
                let ranges = some_of(&mut random, rows);
                let index: Vec<usize> = ranges.iter().flat_map(|r| r.start as usize..r.end as usize).collect();
                let mut queries = vec![f32::NAN; index.len() * width];
                device.export_queries(&shape, &qkv, &ranges, &mut queries);
                for (row, got) in index.iter().zip(queries.chunks_exact(width)) {
                    if got != &fused[row * shape.qkv_width()..][..width] {
                        return Err(told(&format!("the queries of row {row} are not its queries")));
                    }
                }
                let mut remote = noise(&mut random, index.len() * width, 1.0);
                let remote_lse = lse_of(&mut random, index.len() * heads);
                for (i, theirs) in remote_lse.iter().enumerate() {
                    let part = &mut remote[i * head_dim..][..head_dim];
                    let at = index[i / heads] * heads + i % heads;
                    match *theirs == f32::NEG_INFINITY {
                        true => part.fill(f32::NAN),
                        false => {
                            merged[at] = true;
                            reference::merge(&mut want[at * head_dim..][..head_dim], &mut want_lse[at], part, *theirs);
                        }
                    }
                }
                device.merge(&shape, &ranges, &remote, &remote_lse, &mut o, &mut lse);
                merges += 1;
            }
            device.end_step().map_err(failed)?;

            let (mut got, mut got_lse) = (vec![0.0; want.len()], vec![0.0; want_lse.len()]);
            device.download(&o, rows, &mut got).map_err(failed)?;
            device.download(&lse, rows, &mut got_lse).map_err(failed)?;
            let close = |got: f32, want: f32| got == want || (got - want).abs() <= 1e-5 * (1.0 + want.abs());
            if let Some(i) = (0..want_lse.len()).find(|&i| !close(got_lse[i], want_lse[i])) {
                return Err(told(&format!("lse {i} is {}, not {}", got_lse[i], want_lse[i])));
            }
            for (i, merged) in merged.into_iter().enumerate() {
                let head = |all: &[f32]| -> Vec<f32> { all[i * head_dim..][..head_dim].to_vec() };
                if !merged {
                    let bits = |all: &[f32]| -> Vec<u32> { head(all).iter().map(|x| x.to_bits()).collect() };
                    if bits(&got) != bits(&before) {
                        return Err(told(&format!("head {i} changed, and nothing was merged with it")));
                    }
                    continue;
                }
                let error = apart(&head(&got), &head(&want));
                let close = error < 1e-2;
                if !close {
                    return Err(told(&format!("head {i} differs by {error}")));
                }
                worst = worst.max(error);
            }
        }
    }
    Ok(format!("120 random cases, {merges} merges, a head within {worst:.1e}"))
}
