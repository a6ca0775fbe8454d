//! The functions of NVIDIA's libraries that this program calls, asked for before
//! the first call: an older library lacks some, and a call would end the process.

#![allow(unsafe_code)]

use std::ffi::{c_int, c_void};

use crate::device::{DeviceError, Result};

/// Functions of libcuda.so.1.
pub const DRIVER: &[&str] = &[
    "cuCtxGetStreamPriorityRange",
    "cuCtxSetCurrent",
    "cuCtxSynchronize",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDeviceGetCount",
    "cuDeviceGetName",
    "cuDevicePrimaryCtxRelease_v2",
    "cuDevicePrimaryCtxRetain",
    "cuDeviceTotalMem_v2",
    "cuDriverGetVersion",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventElapsedTime_v2",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuFuncSetAttribute",
    "cuGetErrorString",
    "cuGraphDestroy",
    "cuGraphExecDestroy",
    "cuGraphInstantiateWithFlags",
    "cuGraphLaunch",
    "cuInit",
    "cuLaunchKernelEx",
    "cuMemAlloc_v2",
    "cuMemFreeHost",
    "cuMemFree_v2",
    "cuMemGetHandleForAddressRange",
    "cuMemGetInfo_v2",
    "cuMemHostAlloc",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuMemsetD8Async",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuOccupancyMaxActiveBlocksPerMultiprocessor",
    "cuOccupancyMaxActiveClusters",
    "cuPointerSetAttribute",
    "cuStreamBeginCapture_v2",
    "cuStreamCreateWithPriority",
    "cuStreamDestroy_v2",
    "cuStreamEndCapture",
    "cuStreamSynchronize",
    "cuTensorMapEncodeTiled",
];

/// Functions of libcublasLt.so.13.
pub const MATRICES: &[&str] = &[
    "cublasLtCreate",
    "cublasLtDestroy",
    "cublasLtMatmul",
    "cublasLtMatmulAlgoGetHeuristic",
    "cublasLtMatmulDescCreate",
    "cublasLtMatmulDescDestroy",
    "cublasLtMatmulDescSetAttribute",
    "cublasLtMatmulPreferenceCreate",
    "cublasLtMatmulPreferenceDestroy",
    "cublasLtMatmulPreferenceSetAttribute",
    "cublasLtMatrixLayoutCreate",
    "cublasLtMatrixLayoutDestroy",
];

/// That the driver's library, which is there, has what this program calls.
pub fn driver() -> Result<()> {
    // SAFETY: the library was found before; symbols are looked up by name.
    let library = unsafe { cudarc::driver::sys::culib() };
    // SAFETY: as above; nothing is called.
    let missing = missing(DRIVER, |name| unsafe { library.get::<*const c_void>(name).is_ok() });
    if missing.is_empty() {
        return Ok(());
    }
    let mut version: c_int = 0;
    // SAFETY: the driver's own function, in its own form since the first version;
    // it writes one number.
    unsafe {
        if let Ok(ask) = library.get::<unsafe extern "C" fn(*mut c_int) -> c_int>(b"cuDriverGetVersion\0") {
            ask(&mut version);
        }
    }
    Err(too_old(&missing, version))
}

fn too_old(missing: &[&str], version: c_int) -> DeviceError {
    let made_for = match version {
        1.. => format!(", made for CUDA {}.{},", version / 1000, version % 1000 / 10),
        _ => String::new(),
    };
    DeviceError::Unsupported(format!(
        "CUDA: the driver{made_for} is too old: it lacks {}; one for CUDA 13 (580 or newer) has all that is called",
        listed(missing)
    ))
}

/// The same for the matrix library.
pub fn matrices() -> Result<()> {
    // SAFETY: the library was found before; symbols are looked up by name.
    let library = unsafe { cudarc::cublaslt::sys::culib() };
    // SAFETY: as above; nothing is called.
    let missing = missing(MATRICES, |name| unsafe { library.get::<*const c_void>(name).is_ok() });
    if missing.is_empty() {
        return Ok(());
    }
    Err(DeviceError::Unsupported(format!(
        "CUDA: libcublasLt is too old: it lacks {}; that of CUDA 13 has all that is called",
        listed(&missing)
    )))
}

fn missing<'a>(names: &[&'a str], has: impl Fn(&[u8]) -> bool) -> Vec<&'a str> {
    names.iter().copied().filter(|name| !has(format!("{name}\0").as_bytes())).collect()
}

/// A few of the names.
fn listed(names: &[&str]) -> String {
    match names {
        [] => String::new(),
        [one] => (*one).to_owned(),
        [first, second] => format!("{first} and {second}"),
        [first, second, rest @ ..] => format!("{first}, {second} and {} more", rest.len()),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use super::*;

    /// cudarc's functions that are called, and what each calls.
    const BY_WAY_OF: &[(&str, &[&str])] = &[
        ("ctx::set_current", &["cuCtxSetCurrent"]),
        ("ctx::synchronize", &["cuCtxSynchronize"]),
        ("device::get", &["cuDeviceGet"]),
        ("device::get_attribute", &["cuDeviceGetAttribute"]),
        ("device::get_count", &["cuDeviceGetCount"]),
        ("device::get_name", &["cuDeviceGetName"]),
        ("device::total_mem", &["cuDeviceTotalMem_v2"]),
        ("event::create", &["cuEventCreate"]),
        ("event::destroy", &["cuEventDestroy_v2"]),
        ("event::elapsed", &["cuEventElapsedTime_v2"]),
        ("event::record", &["cuEventRecord"]),
        ("event::synchronize", &["cuEventSynchronize"]),
        ("function::set_function_attribute", &["cuFuncSetAttribute"]),
        ("graph::destroy", &["cuGraphDestroy"]),
        ("graph::exec_destroy", &["cuGraphExecDestroy"]),
        ("graph::instantiate", &["cuGraphInstantiateWithFlags"]),
        ("graph::launch", &["cuGraphLaunch"]),
        ("module::get_function", &["cuModuleGetFunction"]),
        ("module::load_data", &["cuModuleLoadData"]),
        ("occupancy::max_active_block_per_multiprocessor", &["cuOccupancyMaxActiveBlocksPerMultiprocessor"]),
        ("primary_ctx::release", &["cuDevicePrimaryCtxRelease_v2"]),
        ("primary_ctx::retain", &["cuDevicePrimaryCtxRetain"]),
        ("stream::begin_capture", &["cuStreamBeginCapture_v2"]),
        ("stream::create_with_priority", &["cuStreamCreateWithPriority"]),
        ("stream::destroy", &["cuStreamDestroy_v2"]),
        ("stream::end_capture", &["cuStreamEndCapture"]),
        ("stream::get_priority_range", &["cuCtxGetStreamPriorityRange"]),
        ("stream::synchronize", &["cuStreamSynchronize"]),
        ("free_host", &["cuMemFreeHost"]),
        ("free_sync", &["cuMemFree_v2"]),
        ("init", &["cuInit"]),
        ("malloc_host", &["cuMemHostAlloc"]),
        ("malloc_sync", &["cuMemAlloc_v2"]),
        ("mem_get_info", &["cuMemGetInfo_v2"]),
        ("memcpy_dtoh_async", &["cuMemcpyDtoHAsync_v2"]),
        ("memcpy_htod_async", &["cuMemcpyHtoDAsync_v2"]),
        ("memset_d8_async", &["cuMemsetD8Async"]),
        ("create_handle", &["cublasLtCreate"]),
        ("create_matmul_desc", &["cublasLtMatmulDescCreate"]),
        ("create_matmul_pref", &["cublasLtMatmulPreferenceCreate"]),
        ("create_matrix_layout", &["cublasLtMatrixLayoutCreate"]),
        ("destroy_handle", &["cublasLtDestroy"]),
        ("destroy_matmul_desc", &["cublasLtMatmulDescDestroy"]),
        ("destroy_matmul_pref", &["cublasLtMatmulPreferenceDestroy"]),
        ("destroy_matrix_layout", &["cublasLtMatrixLayoutDestroy"]),
        ("matmul", &["cublasLtMatmul"]),
        ("set_matmul_desc_attribute", &["cublasLtMatmulDescSetAttribute"]),
        ("set_matmul_pref_attribute", &["cublasLtMatmulPreferenceSetAttribute"]),
    ];

    /// The path behind `word`, and what comes after it, wherever the code has it.
    fn paths<'a>(code: &'a str, word: &str) -> Vec<(&'a str, &'a str)> {
        let part = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
        let found = code.match_indices(word).map(|(at, _)| &code[at + word.len()..]);
        found.map(|rest| rest.split_at(rest.find(|c| !part(c)).unwrap_or(rest.len()))).collect()
    }

    #[test]
    fn all_that_is_called_is_asked_for() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/device/cuda");
        let mut called = BTreeSet::new();
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.ends_with("symbols.rs") {
                continue;
            }
            let text = std::fs::read_to_string(&path).unwrap();
            let code: Vec<&str> = text.lines().filter(|line| !line.trim_start().starts_with("use ")).collect();
            let code = code.join("\n");
            let direct = paths(&code, "sys::").into_iter().filter(|(_, rest)| rest.starts_with('('));
            called.extend(direct.map(|(name, _)| name).filter(|name| name.starts_with("cu")).map(str::to_owned));
            for (path, _) in paths(&code, "result::") {
                // Types are no functions.
                if path.starts_with("stream::StreamKind") || path.starts_with(|c: char| c.is_ascii_uppercase()) {
                    continue;
                }
                let way = BY_WAY_OF.iter().find(|(way, _)| *way == path);
                let (_, names) = way.unwrap_or_else(|| panic!("{path}: say here which functions it calls"));
                called.extend(names.iter().map(|name| (*name).to_owned()));
            }
        }
        called.insert("cuGetErrorString".into());
        let asked: BTreeSet<String> = DRIVER.iter().chain(MATRICES).map(|name| (*name).to_owned()).collect();
        assert_eq!(called, asked);
    }

    #[test]
    fn who_has_an_old_driver_is_told_what_it_lacks() {
        let has = |name: &[u8]| name != b"cuGraphLaunch\0" && name != b"cuInit\0";
        let missing = missing(DRIVER, has);
        assert_eq!(missing, ["cuGraphLaunch", "cuInit"]);
        assert_eq!(
            too_old(&missing, 12_040).to_string(),
            "unsupported: CUDA: the driver, made for CUDA 12.4, is too old: it lacks cuGraphLaunch and cuInit; one for \
             CUDA 13 (580 or newer) has all that is called"
        );
        assert!(too_old(&DRIVER[..5], 0).to_string().contains("the driver is too old"));
        assert_eq!(listed(&["a"]), "a");
        assert_eq!(listed(&["a", "b", "c", "d"]), "a, b and 2 more");
    }
}
