//! What the driver's refusals mean: which of them are the GPU's end, and what to do
//! where memory is short.

use std::ffi::CStr;

use cudarc::driver::result::DriverError;
use cudarc::driver::sys::cudaError_enum as Code;

use crate::device::DeviceError;

/// Puts a driver's refusal in the device's terms.
pub fn failed(what: &str, error: DriverError) -> DeviceError {
    let text = error.error_string().map_or_else(|_| "unknown".into(), CStr::to_string_lossy);
    refused(what, error.0, &text)
}

fn refused(what: &str, code: Code, text: &str) -> DeviceError {
    if code == Code::CUDA_ERROR_OUT_OF_MEMORY {
        return DeviceError::OutOfMemory(format!("{what}: the GPU has no room for it; {FOR_STEPS}"));
    }
    let said = format!("{what}: {text} ({code:?})");
    if ends(code) { DeviceError::Lost(said) } else { DeviceError::System(said) }
}

/// After these the context is dead: every call fails from then on, and only another
/// process can use the GPU again.
fn ends(code: Code) -> bool {
    use Code as C;
    matches!(
        code,
        C::CUDA_ERROR_DEINITIALIZED
            | C::CUDA_ERROR_DEVICE_UNAVAILABLE
            | C::CUDA_ERROR_ECC_UNCORRECTABLE
            | C::CUDA_ERROR_NVLINK_UNCORRECTABLE
            | C::CUDA_ERROR_CONTAINED
            | C::CUDA_ERROR_ILLEGAL_ADDRESS
            | C::CUDA_ERROR_LAUNCH_TIMEOUT
            | C::CUDA_ERROR_CONTEXT_IS_DESTROYED
            | C::CUDA_ERROR_ASSERT
            | C::CUDA_ERROR_HARDWARE_STACK_ERROR
            | C::CUDA_ERROR_ILLEGAL_INSTRUCTION
            | C::CUDA_ERROR_MISALIGNED_ADDRESS
            | C::CUDA_ERROR_INVALID_ADDRESS_SPACE
            | C::CUDA_ERROR_INVALID_PC
            | C::CUDA_ERROR_LAUNCH_FAILED
            | C::CUDA_ERROR_TENSOR_MEMORY_LEAK
            | C::CUDA_ERROR_MPS_RPC_FAILURE
            | C::CUDA_ERROR_MPS_CLIENT_TERMINATED
            | C::CUDA_ERROR_EXTERNAL_DEVICE
            | C::CUDA_ERROR_UNKNOWN
    )
}

const FOR_STEPS: &str = "less --kv-memory, fewer --chunk-tokens or --max-sequences, or the memory of another process \
                         on this GPU would make some";
const FOR_WEIGHTS: &str = "a smaller model, another GPU (--device cuda:N), or the memory of another process on this \
                           one would make it fit";
const FOR_THE_POOL: &str =
    "less --kv-memory or fewer --kv-tokens would fit, and without either the pool takes what is left";

/// `asked` bytes of the GPU's memory, for `what`, are not to be had; `free` and
/// total bytes where they are known.
pub fn no_room(asked: usize, what: &str, free: Option<(usize, usize)>) -> DeviceError {
    let free = free.map_or(String::new(), |(free, total)| format!(", {} of {} are free", size(free), size(total)));
    let advice = match what {
        "weights" | "loading weights" => FOR_WEIGHTS,
        "the KV pool" => FOR_THE_POOL,
        _ => FOR_STEPS,
    };
    DeviceError::OutOfMemory(format!("{} of the GPU's memory were asked for, for {what}{free}; {advice}", size(asked)))
}

/// The host locks no more memory.
pub fn no_pinned_room(asked: usize) -> DeviceError {
    DeviceError::OutOfMemory(format!(
        "{} of page-locked host memory were asked for: the host has no room for them, or lets this process lock no \
         more (ulimit -l); less --host-kv-memory, fewer --chunk-tokens or --max-sequences would need less",
        size(asked)
    ))
}

/// What the weights and activations left does not make a pool.
pub fn no_pool(left: usize, reserve: usize, least: usize) -> DeviceError {
    DeviceError::OutOfMemory(format!(
        "weights and activations leave {} of the GPU's memory for the KV, beside a reserve of {}; the smallest pool \
         takes {}; {FOR_WEIGHTS}, and fewer --chunk-tokens or --max-sequences",
        size(left),
        size(reserve),
        size(least)
    ))
}

fn size(bytes: usize) -> String {
    let unit = |shift: u32| bytes as f64 / (1u64 << shift) as f64;
    match bytes {
        0..0x400 => format!("{bytes} bytes"),
        0x400..0x10_0000 => format!("{:.1} KiB", unit(10)),
        0x10_0000..0x4000_0000 => format!("{:.1} MiB", unit(20)),
        _ => format!("{:.2} GiB", unit(30)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_ends_the_context_loses_the_device() {
        let lost = refused("a step on the GPU", Code::CUDA_ERROR_ILLEGAL_ADDRESS, "an illegal memory access");
        assert!(matches!(&lost, DeviceError::Lost(_)));
        assert_eq!(
            lost.to_string(),
            "the device is lost: a step on the GPU: an illegal memory access (CUDA_ERROR_ILLEGAL_ADDRESS)"
        );
        for code in [Code::CUDA_ERROR_ECC_UNCORRECTABLE, Code::CUDA_ERROR_LAUNCH_FAILED, Code::CUDA_ERROR_UNKNOWN] {
            assert!(matches!(refused("it", code, ""), DeviceError::Lost(_)), "{code:?}");
        }
        for code in [Code::CUDA_ERROR_INVALID_VALUE, Code::CUDA_ERROR_NOT_FOUND, Code::CUDA_ERROR_NOT_SUPPORTED] {
            assert!(matches!(refused("it", code, ""), DeviceError::System(_)), "{code:?}");
        }
        assert!(matches!(refused("it", Code::CUDA_ERROR_OUT_OF_MEMORY, ""), DeviceError::OutOfMemory(_)));
    }

    #[test]
    fn who_has_no_room_is_told_what_was_asked_what_is_free_and_what_helps() {
        let free = Some((3 << 20, 143_771 << 20));
        let pool = no_room(500 << 30, "the KV pool", free).to_string();
        assert_eq!(
            pool,
            "out of memory: 500.00 GiB of the GPU's memory were asked for, for the KV pool, 3.0 MiB of 140.40 GiB are \
             free; less --kv-memory or fewer --kv-tokens would fit, and without either the pool takes what is left"
        );
        let weights = no_room(224 << 20, "weights", free).to_string();
        assert!(weights.contains("224.0 MiB") && weights.contains("a smaller model, another GPU (--device cuda:N)"));
        assert!(!weights.contains("--kv-memory"), "the pool comes after the weights: {weights}");
        let activations = no_room(5 << 10, "activations", None).to_string();
        assert!(activations.contains("5.0 KiB") && activations.contains("--chunk-tokens or --max-sequences"));
        let pinned = no_pinned_room(1 << 30).to_string();
        assert!(pinned.contains("1.00 GiB") && pinned.contains("ulimit -l") && !pinned.contains("GPU"), "{pinned}");
        let none = no_pool(100, 719 << 20, 64 << 10).to_string();
        assert!(none.contains("leave 100 bytes") && none.contains("719.0 MiB") && none.contains("64.0 KiB"), "{none}");
    }
}
