//! Kernels of the GPU with their threads run by the CPU (`cuda_on_cpu/`): one by threads,
//! addresses and alignments checked, others by fibers in an order drawn from a seed.

use std::fs;
use std::path::Path;
use std::process::Command;

/// What stands between two marks, which are left.
fn between<'a>(text: &'a str, from: &str, to: &str) -> &'a str {
    let begin = text.find(from).unwrap_or_else(|| panic!("{from:?} is gone")) + from.len();
    let end = text[begin..].find(to).unwrap_or_else(|| panic!("{to:?} is gone"));
    &text[begin..begin + end]
}

fn replace(text: &str, from: &str, to: &str) -> String {
    assert_eq!(text.matches(from).count(), 1, "{from:?}");
    text.replacen(from, to, 1)
}

/// The kernel as a C++ compiler takes it: without headers, entry points and what
/// only a GPU's assembler knows.
fn kernel(source: &str) -> String {
    let text: String = source.lines().filter(|line| !line.starts_with("#include")).map(|l| format!("{l}\n")).collect();
    let text = replace(
        &text,
        "__shared__ __align__(16) Shared<D, G> shared;",
        "Shared<D, G> &shared = *static_cast<Shared<D, G> *>(shared_memory());",
    );
    let text = replace(
        &text,
        "extern __shared__ __align__(16) float dynamic[];",
        "float *const dynamic = static_cast<float *>(dynamic_memory());",
    );
    let prefetch = between(&text, "asm volatile(\"prefetch", ";\n").to_owned();
    let text = replace(&text, &format!("asm volatile(\"prefetch{prefetch};"), "(void)row;");
    text[..text.find("#define SHORT(").expect("entry points")].to_owned()
}

/// Compiles a program of `cuda_on_cpu/` beside what is in the folder, and runs so many
/// cases, others with `DISTKV_CASES`.
fn holds(name: &str, folder: &Path, options: &[&str], cases: &str) {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cuda_on_cpu");
    let program = folder.join(name);
    let compiled = Command::new(std::env::var("CXX").unwrap_or_else(|_| "c++".into()))
        .args(["-std=c++17", "-O1", "-g", "-w", "-Wno-psabi", "-fno-sanitize-recover=all", "-pthread"])
        .args(options)
        .arg("-I")
        .arg(folder)
        .arg("-I")
        .arg(&sources)
        .arg(sources.join(name).with_extension("cpp"))
        .arg("-o")
        .arg(&program)
        .output()
        .unwrap();
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    let cases = std::env::var("DISTKV_CASES").unwrap_or_else(|_| cases.into());
    let ran = Command::new(&program).arg(cases).output().unwrap();
    let said = String::from_utf8_lossy(&ran.stdout);
    print!("{said}");
    assert!(ran.status.success(), "{said}{}", String::from_utf8_lossy(&ran.stderr));
}

fn read(path: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

#[test]
fn attention_to_short_contexts_is_attention() {
    let folder = tempfile::tempdir().unwrap();
    let header = read("cuda/api.h");
    let structs: String = ["Step", "Slot", "Seq", "Page", "DecodeShort"]
        .map(|name| format!("struct {name} {{{}\n}};\n", between(&header, &format!("struct {name} {{"), "\n};")))
        .concat();
    fs::write(folder.path().join("structs.inc"), format!("namespace distkv {{\n{structs}}}\n")).unwrap();
    fs::write(folder.path().join("kernel.inc"), kernel(&read("cuda/decode_short.cu"))).unwrap();
    holds("short", folder.path(), &["-fsanitize=address,undefined"], "10");
}

/// Kernels' files as they are, beside headers in whose place another stands.
fn copy(folder: &Path, files: &[&str], told: &[&str], by: &str) {
    for name in files {
        fs::write(folder.join(name), read(&format!("cuda/{name}"))).unwrap();
    }
    for name in told {
        fs::write(folder.join(name), format!("#include \"{by}\"\n")).unwrap();
    }
}

/// What a program of fibers is compiled with, and more. They jump from stack to stack,
/// which fortified jumps take for an error.
fn fibers<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [&["-O2", "-U_FORTIFY_SOURCE", "-fsanitize=undefined", "-include", "gpu.h"], more].concat()
}

/// Where a block's shared memory begins.
const DYNAMIC: &str = "gpu::my_block().shared.data() + gpu::SHARED_BASE;";

/// As they are but for the headers that say how a GPU is told, in whose place `gpu.h`
/// stands.
#[test]
fn linear_layers_wait_for_what_they_read() {
    let folder = tempfile::tempdir().unwrap();
    let files = ["linear.cu", "linear.cuh", "linear_tile.cuh", "linear_finish.cuh", "linear_relay.cuh", "api.h"];
    let told =
        ["barrier.cuh", "cluster.cuh", "copies.cuh", "wgmma.cuh", "words.cuh", "rows.cuh", "cuda.h", "cuda_runtime.h"];
    copy(folder.path(), &files, &told, "gpu.h");
    holds("linear", folder.path(), &fibers(&[]), "80");
}

/// A kernel's text up to its entry points, with its memory where a block's is.
fn body(path: &str, until: &str, memory: &[(&str, &str)]) -> String {
    let mut text = read(path);
    for (declared, here) in memory {
        text = replace(&text, declared, here);
    }
    text[..text.find(until).expect("entry points")].to_owned()
}

/// A kernel that is run a block at a time.
fn in_turn(text: &str) -> String {
    text.replace("    __shared__ ", "    static ")
}

/// The same, but for entry points and where a block's shared memory is; on Hopper, and
/// on GPUs before it.
#[test]
fn decode_attention_is_attention() {
    let folder = tempfile::tempdir().unwrap();
    let files = ["decode.cuh", "paged_kv.cuh", "state.cuh", "api.h"];
    let told = ["barrier.cuh", "copies.cuh", "matrix.cuh", "e4m3.cuh", "cuda.h", "cuda_runtime.h"];
    copy(folder.path(), &files, &told, "matrix.h");
    let here = format!("uint8_t *const dynamic = {DYNAMIC}");
    let shared = [("extern __shared__ __align__(1024) uint8_t dynamic[];", &*here)];
    let decode = body("cuda/attention_decode.cu", "// The narrow ones leave", &shared);
    let join = in_turn(&body("cuda/decode_join.cu", "extern \"C\"", &[]));
    let plan = in_turn(&read("cuda/decode_plan.cu"));
    for (name, text) in [("attention_decode.cu", decode), ("decode_plan.cu", plan), ("decode_join.cu", join)] {
        fs::write(folder.path().join(name), text).unwrap();
    }
    for architecture in ["-D__CUDA_ARCH__=900", "-D__CUDA_ARCH__=800"] {
        holds("decode", folder.path(), &fibers(&[architecture]), "60");
    }
}

/// Likewise, by both kernels.
#[test]
fn prefill_attention_is_attention() {
    let folder = tempfile::tempdir().unwrap();
    let files = ["prefill_plan.cuh", "prefill_feed.cuh", "paged_kv.cuh", "state.cuh", "api.h"];
    let told =
        ["barrier.cuh", "copies.cuh", "matrix.cuh", "e4m3.cuh", "wgmma.cuh", "shared.cuh", "cuda.h", "cuda_runtime.h"];
    copy(folder.path(), &files, &told, "matrix.h");
    let here = format!("uint8_t *const memory = {DYNAMIC}");
    let hopper = [
        ("extern __shared__ uint8_t memory[];", &*here),
        ("__shared__ Control<D> control;", "Control<D> &control = *(Control<D> *)(memory + control_at<D>());"),
        (
            "template <class T, uint32_t D> __device__ __forceinline__ void prefill(",
            "template <uint32_t D> constexpr uint32_t control_at() {\n    \
             return Shape<D>::QUERIES * Shape<D>::QUERY_BYTES + 2 * Shape<D>::STAGES * Shape<D>::KEY_BYTES;\n}\n\
             template <class T, uint32_t D> void prefill(",
        ),
    ];
    let any = [
        ("extern __shared__ __align__(16) uint8_t memory[];", &*here),
        (
            "__shared__ Lookup<KEYS> lookup;",
            "Lookup<KEYS> &lookup = *(Lookup<KEYS> *)(memory + ROWS * S::STRIDE * 2 + 4 * KEYS * S::PITCH);",
        ),
        ("__shared__ uint32_t drawn;", "uint32_t &drawn = *(uint32_t *)(&lookup + 1);"),
    ];
    let entries = "#ifdef __CUDA_ARCH_FEAT_SM90_ALL\n#define BODY";
    let hopper = body("cuda/attention_prefill_sm90.cu", entries, &hopper) + "}\n";
    let any = body("cuda/attention_prefill.cu", "#define PREFILL(", &any) + "}\n";
    // Both call their threads so.
    let plan = in_turn(&read("cuda/prefill_plan.cu")).replace("THREADS", "PLAN_THREADS");
    for (name, text) in
        [("attention_prefill_sm90.cu", hopper), ("attention_prefill.cu", any), ("prefill_plan.cu", plan)]
    {
        fs::write(folder.path().join(name), text).unwrap();
    }
    holds("prefill", folder.path(), &fibers(&["-DHOPPER", "-D__CUDA_ARCH_FEAT_SM90_ALL"]), "100");
    holds("prefill", folder.path(), &fibers(&[]), "60");
}

/// Likewise.
#[test]
fn partials_of_peers_are_merged() {
    let folder = tempfile::tempdir().unwrap();
    copy(folder.path(), &["state.cuh", "api.h"], &["rows.cuh", "cuda.h", "cuda_runtime.h"], "gpu.h");
    fs::write(folder.path().join("merge.cu"), body("cuda/merge.cu", "DISTKV_KERNELS(", &[])).unwrap();
    holds("merge", folder.path(), &fibers(&[]), "200");
}
