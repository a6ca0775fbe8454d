//! Checks of the CUDA device that need a GPU; `scripts/gpu-check` runs them all.
//!
//!     gpu_check [--device cuda:0] [--seconds 60] [NAME...]
//!
//! Each check prints what it found; the exit code is 0 only if all held.

#[path = "../common/cluster.rs"]
mod cluster;
#[allow(dead_code)] // each program uses its own part
#[path = "../common/golden.rs"]
mod golden;
#[allow(dead_code)] // as above
#[path = "../common/smollm2.rs"]
mod smollm2;

mod decode;
mod export;
mod fp8;
mod goldens;
mod kernels;
mod memory;
mod partials;
mod soak;

use std::time::Instant;

use distkv::node::device::DeviceName;

/// What a check is told.
pub struct Settings {
    /// The GPU.
    pub device: DeviceName,
    /// How long a check that goes on may go on.
    pub seconds: u64,
}

type Check = fn(&Settings) -> Result<String, String>;

const CHECKS: &[(&str, Check)] = &[
    ("attention", kernels::attention),
    ("rows", kernels::rows),
    ("partials", partials::partials),
    ("fp8", fp8::fp8),
    ("handed", decode::handed),
    ("short", decode::short),
    ("choices", kernels::choices),
    ("goldens", goldens::all_local),
    ("borrowed", goldens::most_elsewhere),
    ("f16", goldens::half_precision),
    ("fp8_kv", goldens::fp8_kv),
    ("repeat", goldens::repeats),
    ("smollm2", goldens::smollm2_answers),
    ("dmabuf", export::memory_for_a_nic),
    ("memory", memory::is_taken),
    ("soak", soak::many_requests),
];

fn main() {
    let mut settings = Settings { device: DeviceName::Cuda(0), seconds: 60 };
    let mut wanted = Vec::new();
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--device" => settings.device = arguments.next().and_then(|v| v.parse().ok()).expect("--device cuda:N"),
            "--seconds" => settings.seconds = arguments.next().and_then(|v| v.parse().ok()).expect("--seconds N"),
            name if CHECKS.iter().any(|(n, _)| *n == name) => wanted.push(name.to_owned()),
            name => panic!("no check is called {name:?}"),
        }
    }
    let (mut passed, mut failed) = (0, 0);
    for (name, check) in CHECKS.iter().filter(|(name, _)| wanted.is_empty() || wanted.iter().any(|w| w == name)) {
        let started = Instant::now();
        let outcome = std::panic::catch_unwind(|| check(&settings)).unwrap_or_else(|_| Err("it panicked".into()));
        let seconds = started.elapsed().as_secs_f64();
        match outcome {
            Ok(found) => {
                passed += 1;
                println!("{name}: holds ({seconds:.1} s): {found}");
            }
            Err(found) => {
                failed += 1;
                println!("{name}: FAILED ({seconds:.1} s): {found}");
            }
        }
    }
    println!("{passed} passed, {failed} failed, 0 skipped");
    std::process::exit(i32::from(failed > 0));
}
