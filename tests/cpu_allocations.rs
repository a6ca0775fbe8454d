//! A decode step on the CPU allocates nothing once one like it has run.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use distkv::device::cpu::{CpuDevice, CpuOptions, Math};
use distkv::device::tensor::{DType, RawTensor};
use distkv::device::{AttentionShape, AttnSeq, Device, Norm, Rope, RowSlot, StepInput};
use distkv::kv::pool::KvPool;
use distkv::kv::rblock::{KvDtype, KvRun, KvShape};

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: the system's allocator does the work.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::SeqCst);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn a_decode_step_allocates_nothing() {
    for math in [Math::Exact, Math::Fast] {
        allocates_nothing(math);
    }
}

fn allocates_nothing(math: Math) {
    let shape = AttentionShape { heads: 4, kv_heads: 2, head_dim: 64, scale: 0.125 };
    let hidden = shape.q_width();
    let kv = KvShape { layers: 1, kv_heads: 2, head_dim: 64, block_tokens: 16, dtype: KvDtype::Bf16 };
    let pool = KvPool::new(kv, 64).unwrap();
    let options = CpuOptions { threads: 2, pin: false, math, max_rows: 4, ..CpuOptions::default() };
    let mut device = CpuDevice::new(options).unwrap();
    let bytes = vec![0x3cu8; 4 * hidden * 256 * 34 / 32];
    let dtype = DType::Q8_0;
    let mut matrix = |rows, cols: usize| {
        let bytes = &bytes[..dtype.bytes(rows * cols).unwrap()];
        device.load_matrix(&[RawTensor { dtype, rows, cols, bytes, stored: None, scales: None }]).unwrap()
    };
    let (qkv_weight, o_weight) = (matrix(shape.qkv_width(), hidden), matrix(hidden, hidden));
    let (up_weight, down_weight) = (matrix(2 * hidden, hidden), matrix(hidden, hidden));
    let ones: Vec<u8> = (0..hidden).flat_map(|_| 1f32.to_le_bytes()).collect();
    let norm = RawTensor { dtype: DType::F32, rows: 1, cols: hidden, bytes: &ones, stored: None, scales: None };
    let norm = device.load_vector(&[norm]).unwrap();
    let mut buffer = |cols| device.buffer(4, cols).unwrap();
    let (mut x, mut h, mut qkv) = (buffer(hidden), buffer(hidden), buffer(shape.qkv_width()));
    let (mut o, mut lse, mut up, mut act) = (buffer(hidden), buffer(4), buffer(2 * hidden), buffer(hidden));
    let rope = Rope { inv_freq: vec![0.01; 32], magnitude: 1.0, interleaved: false };
    let runs: Vec<KvRun> = (0..64).map(|b| KvRun { block: b, position: b * 16, tokens: 16 }).collect();
    let seqs = [AttnSeq { row: 0, rows: 1, position: 1023, run: 0, runs: 64 }];
    let slots = [RowSlot { position: 1023, block: 63, offset: 15 }];
    let step = StepInput { tokens: &[3], slots: &slots, seqs: &seqs, runs: &runs, logit_rows: &[] };
    let mut host = vec![0.0; hidden];
    let mut counts = Vec::new();
    for _ in 0..3 {
        let before = ALLOCATIONS.load(Ordering::SeqCst);
        device.begin_step(&rope, &step, &pool, true).unwrap();
        device.embed(&o_weight, &mut x);
        device.rms_norm(&x, 1, Norm { weight: &norm, eps: 1e-5 }, &mut h);
        device.linear(&h, 1, &qkv_weight, None, &mut qkv);
        device.rope_append(&shape, None, 0, &pool, &mut qkv);
        device.attention(&shape, None, 0, &pool, &qkv, &mut o, &mut lse);
        device.linear_add(&o, 1, &o_weight, None, &mut x);
        device.rms_norm(&x, 1, Norm { weight: &norm, eps: 1e-5 }, &mut h);
        device.linear(&h, 1, &up_weight, None, &mut up);
        device.swiglu(&up, 1, &mut act);
        device.linear_add(&act, 1, &down_weight, None, &mut x);
        device.download(&x, 1, &mut host).unwrap();
        counts.push(ALLOCATIONS.load(Ordering::SeqCst) - before);
    }
    assert!(host.iter().all(|x| x.is_finite()));
    assert_eq!(counts[1..], [0, 0], "{math:?}: allocations of each step: {counts:?}");
}
