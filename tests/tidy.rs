//! The tree's rules, held by reading it as text: who may import whom, what the
//! control plane may not touch, where unsafe code lives, how long a file is.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// The files that may contain unsafe code. A new one needs a reason.
const UNSAFE: &[&str] = &[
    "fabric/src/gpu.rs",                    // who promises that a range of a GPU's memory stays
    "fabric/src/memory.rs",                 // mapping shared memory
    "fabric/src/shm/ring.rs",               // atomics in memory that two processes map
    "fabric/src/tcp/batch.rs",              // io_uring submissions point into registered regions
    "fabric/src/tcp/io.rs",                 // sending from and receiving into registered regions
    "fabric/src/verbs/device/open.rs",      // calls of libibverbs, freed in order
    "fabric/src/verbs/device/reach.rs",     // registers what it was promised to stay
    "fabric/src/verbs/objects.rs",          // calls of libibverbs; chains of requests on the stack
    "fabric/src/verbs/request.rs",          // requests as the library takes them, written in place
    "fabric/src/verbs/sys.rs",              // libibverbs, opened at run time
    "fabric/src/verbs/sys/types.rs",        // pointers to functions of libibverbs and its drivers
    "fabric/tests/software_hca.rs",         // calls the software HCA as C programs do
    "fabric/tests/software_hca/rig.rs",     // as above
    "fabric/tests/verbs_device.rs",         // a range that stands for a GPU's
    "fabric/tests/verbs_faults/gpu.rs",     // host memory that stands for a GPU's
    "fabric/tests/verbs_hot_path/rig.rs",   // functions that callgrind finds by name
    "tests/dist/main.rs",                   // names libibverbs for the process, before it has threads
    "fabric/tests/verbs_hot_path/quiet.rs", // a seccomp filter that counts system calls
    "src/attention/mailbox.rs",             // slots as f32 while the peer does not write them
    "src/device/cpu/amx.rs",                // tile instructions; asking the kernel for them
    "src/device/cpu/attention.rs",          // threads write disjoint rows; instruction sets
    "src/device/cpu/attention_few.rs",      // instruction sets
    "src/device/cpu/attention_many.rs",     // instruction sets
    "src/device/cpu/bandwidth.rs",          // instruction sets
    "src/device/cpu/buffer.rs",             // aligned memory that threads share by rows
    "src/device/cpu/dot.rs",                // instruction sets
    "src/device/cpu/dot_tests.rs",          // instruction sets
    "src/device/cpu/format.rs",             // instruction sets
    "src/device/cpu/format_blocks.rs",      // instruction sets
    "src/device/cpu/format_dots.rs",        // instruction sets
    "src/device/cpu/gemm.rs",               // instruction sets; threads write disjoint columns
    "src/device/cpu/gemv.rs",               // instruction sets; threads write disjoint columns
    "src/device/cpu/gemv_dots.rs",          // instruction sets; threads write disjoint columns
    "src/device/cpu/kv_view.rs",            // the pool's bytes as keys and values
    "src/device/cpu/matrix.rs",             // threads pack disjoint panels
    "src/device/cpu/product.rs",            // instruction sets; threads write disjoint columns
    "src/device/cpu/reference.rs",          // the pool's bytes as keys and values
    "src/device/cpu/row_kernels.rs",        // instruction sets
    "src/device/cpu/rows.rs",               // threads write disjoint rows
    "src/device/cpu/simd.rs",               // instruction sets
    "src/device/cpu/threads.rs",            // a loop's closure lent to the workers while its caller waits
    "src/device/cuda/attend.rs",            // launches of kernels over addresses
    "src/device/cuda/bandwidth.rs",         // as above
    "src/device/cuda/blas.rs",              // calls of cuBLASLt
    "src/device/cuda/chain.rs",             // launches of kernels over addresses
    "src/device/cuda/choose.rs",            // as above
    "src/device/cuda/driver.rs",            // calls of the CUDA driver
    "src/device/cuda/fp8.rs",               // launches of kernels over addresses
    "src/device/cuda/kernels.rs",           // launches of kernels; tensor maps
    "src/device/cuda/linear.rs",            // launches of kernels over addresses
    "src/device/cuda/load.rs",              // as above
    "src/device/cuda/memory.rs",            // the GPU's memory, and the host's that it reaches
    "src/device/cuda/partials.rs",          // launches of a kernel over addresses
    "src/device/cuda/rows.rs",              // launches of kernels over addresses
    "src/device/cuda/short.rs",             // launches of kernels over addresses
    "src/device/cuda/symbols.rs",           // looks functions of libraries up
    "src/device/cuda/widen.rs",             // launches of kernels over addresses
    "src/device/disk/block.rs",             // threads and the kernel write to disjoint memory
    "src/device/disk/cached.rs",            // a system call that no crate has
    "src/device/disk/reader.rs",            // a ring of memory that is read into
    "src/device/disk/tests.rs",             // memory to read into
    "src/device/disk/uring.rs",             // reads that io_uring is given
    "src/device/nvtx.rs",                   // a library for profilers, opened at run time
    "src/model/mapping.rs",                 // mapping files of weights
    "tests/cpu_allocations.rs",             // an allocator that counts
];

/// For each module of the library: the modules it may import. `main` and `lib`
/// may import anything.
const IMPORTS: &[(&str, &[&str])] = &[
    ("codec", &[]),
    ("e4m3", &[]),
    ("kv", &["e4m3"]),
    ("control", &["kv"]),
    ("schedule", &["kv"]),
    ("sim", &["kv", "control", "schedule"]),
    ("device", &["e4m3", "kv"]),
    ("attention", &["codec", "kv", "control", "schedule", "device"]),
    ("model", &["e4m3", "kv", "device", "attention"]),
    ("engine", &["kv", "control", "schedule", "device", "attention", "model"]),
    ("node", &["kv", "control", "schedule", "device", "attention", "model", "engine"]),
    ("ingress", &["codec", "kv", "control", "model", "engine", "node"]),
    ("server", &["kv", "control", "schedule", "device", "attention", "model", "engine", "node", "ingress"]),
    (
        "cli",
        &[
            "e4m3",
            "kv",
            "control",
            "schedule",
            "sim",
            "device",
            "attention",
            "model",
            "engine",
            "node",
            "ingress",
            "server",
        ],
    ),
];

/// Modules that may import the fabric.
const ON_THE_FABRIC: &[&str] = &["attention", "engine", "node", "server", "cli"];
/// What `kv` and `device` may know of it: memory to register, and its errors.
const MEMORY_ONLY: &[&str] = &[
    "distkv_fabric::Memory",
    "distkv_fabric::GpuRange",
    "distkv_fabric::Dmabuf",
    "distkv_fabric::Result",
    "distkv_fabric::Error",
];

/// Words that would make the control plane impure, beside what they mean.
const IMPURE: &[(&str, &str)] = &[
    ("std::net", "a socket"),
    ("std::os::", "the system"),
    ("std::fs", "the file system"),
    ("std::io", "input or output"),
    ("std::env", "the environment"),
    ("std::thread", "a thread"),
    ("std::process", "a process"),
    ("tokio", "a runtime"),
    ("rustix", "the system"),
    ("libc", "the system"),
    ("Instant", "a clock"),
    ("SystemTime", "a clock"),
    ("HashMap", "iteration in an order of chance"),
    ("HashSet", "iteration in an order of chance"),
    ("RandomState", "chance without a seed"),
    ("thread_rng", "chance without a seed"),
    ("rand::rng(", "chance without a seed"),
    ("rand::random", "chance without a seed"),
    ("from_os_rng", "chance without a seed"),
    ("from_entropy", "chance without a seed"),
    ("OsRng", "chance without a seed"),
];

const MAX_LINES: usize = 700;

struct File {
    path: String,
    /// As it stands.
    text: String,
    /// Without comments.
    code: String,
}

fn tree() -> Vec<File> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut paths = Vec::new();
    for folder in ["src", "fabric/src", "fabric/tests", "tests", "benches", "fuzz/fuzz_targets"] {
        collect(&root.join(folder), &mut paths);
    }
    paths.sort();
    assert!(paths.len() > 20, "the tree is here");
    let file = |path: &PathBuf| {
        let text = fs::read_to_string(path).unwrap();
        let path = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
        File { path, code: without_comments(&text), text }
    };
    paths.iter().map(file).collect()
}

fn collect(folder: &Path, into: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, into);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            into.push(path);
        }
    }
}

fn without_comments(text: &str) -> String {
    let code = |line: &str| line.find("//").map_or(line, |at| &line[..at]).to_owned() + "\n";
    // `//` inside a string (an address) cuts the rest of a line off, which may
    // hide a fault but invents none.
    text.lines().map(code).collect()
}

/// The library module a file of `src/` belongs to.
fn module(path: &str) -> Option<&str> {
    let rest = path.strip_prefix("src/")?;
    let name = rest.split(['/', '.']).next()?;
    (!["main", "lib"].contains(&name)).then_some(name)
}

/// Is `word` in `text` as a whole word at its two ends?
fn has(text: &str, word: &str) -> bool {
    let part = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
    text.match_indices(word).any(|(at, _)| {
        let ends_open = word.ends_with(|c: char| !(c.is_alphanumeric() || c == '_'));
        let before = part(text[..at].chars().next_back()) && word.starts_with(|c: char| c.is_alphanumeric());
        let after = !ends_open && part(text[at + word.len()..].chars().next());
        !before && !after
    })
}

/// Paths that begin with `crate::` in `code`, groups at the first level
/// resolved: `crate::{kv::x, control}` gives `kv` and `control`.
fn imported(code: &str) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for (at, _) in code.match_indices("crate::") {
        let rest = &code[at + "crate::".len()..];
        match rest.strip_prefix('{') {
            None => names.extend(first_name(rest)),
            Some(group) => {
                let mut depth = 0;
                let mut start = 0;
                for (i, c) in group.char_indices() {
                    match c {
                        '{' => depth += 1,
                        '}' if depth == 0 => {
                            names.extend(first_name(&group[start..i]));
                            break;
                        }
                        '}' => depth -= 1,
                        ',' if depth == 0 => {
                            names.extend(first_name(&group[start..i]));
                            start = i + 1;
                        }
                        _ => {}
                    }
                }
            }
        }
    }
    names
}

fn first_name(path: &str) -> Option<String> {
    let name: String = path.trim_start().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
    (!name.is_empty()).then_some(name)
}

fn report(faults: Vec<String>) {
    assert!(faults.is_empty(), "\n{}\n", faults.join("\n"));
}

#[test]
fn modules_import_downwards_only() {
    let mut faults = Vec::new();
    for file in tree() {
        if let Some(module) = module(&file.path) {
            let Some((_, allowed)) = IMPORTS.iter().find(|(name, _)| *name == module) else {
                faults.push(format!("{}: the module {module} has no line in IMPORTS", file.path));
                continue;
            };
            for name in imported(&file.code) {
                let known = IMPORTS.iter().any(|(module, _)| *module == name);
                if known && name != module && !allowed.contains(&name.as_str()) {
                    faults.push(format!("{}: {module} imports {name}, which lies above it or beside it", file.path));
                }
            }
            if !ON_THE_FABRIC.contains(&module) {
                let mut rest = file.code.clone();
                MEMORY_ONLY.iter().for_each(|memory| rest = rest.replace(memory, ""));
                let tests = file.path.contains("tests");
                if rest.contains("distkv_fabric") && !tests {
                    faults.push(format!("{}: {module} knows of the fabric more than its memory", file.path));
                }
            }
        } else if file.path.starts_with("fabric/") && has(&file.code, "distkv::") {
            faults.push(format!("{}: the fabric knows nothing of the engine", file.path));
        }
    }
    report(faults);
}

#[test]
fn the_control_plane_and_its_simulation_are_pure() {
    let mut faults = Vec::new();
    // Its tests drive it from outside and may read the environment.
    let pure = |path: &str| ["src/control/", "src/sim/"].iter().any(|folder| path.starts_with(folder));
    for file in tree().iter().filter(|f| pure(&f.path) && !f.path.contains("/tests/")) {
        for (word, meaning) in IMPURE {
            if has(&file.code, word) {
                faults.push(format!("{}: {word} ({meaning})", file.path));
            }
        }
    }
    report(faults);
}

#[test]
fn unsafe_code_lives_where_it_is_named() {
    let mut faults = Vec::new();
    let mut found = BTreeSet::new();
    for file in tree().iter().filter(|f| f.path != "tests/tidy.rs") {
        let uses =
            ["unsafe {", "unsafe fn", "unsafe impl", "unsafe extern", "unsafe trait", "unsafe(", "allow(unsafe_code)"];
        if uses.iter().any(|word| file.code.contains(word)) {
            found.insert(file.path.clone());
            if !UNSAFE.contains(&file.path.as_str()) {
                faults.push(format!("{}: unsafe code outside the list in tests/tidy.rs", file.path));
            }
        }
    }
    let unused = UNSAFE.iter().filter(|path| !found.contains(**path));
    faults.extend(unused.map(|path| format!("{path}: listed in tests/tidy.rs, without unsafe code")));
    report(faults);
}

#[test]
fn a_file_is_about_one_noun() {
    let long = tree().into_iter().map(|f| (f.text.lines().count(), f.path)).filter(|(lines, _)| *lines > MAX_LINES);
    report(long.map(|(lines, path)| format!("{path}: {lines} lines, at most {MAX_LINES}")).collect());
}

#[test]
fn nothing_is_left_undone() {
    let mut faults = Vec::new();
    for file in tree().iter().filter(|f| f.path != "tests/tidy.rs") {
        for word in ["todo!", "unimplemented!", "dbg!"] {
            if has(&file.code, word) {
                faults.push(format!("{}: {word}", file.path));
            }
        }
        for word in ["TODO", "FIXME", "XXX", "HACK"] {
            if has(&file.text, word) {
                faults.push(format!("{}: {word}", file.path));
            }
        }
    }
    report(faults);
}

/// A test that binds a port which it did not ask the system for fails beside
/// another of its kind.
#[test]
fn tests_use_ephemeral_ports() {
    let mut faults = Vec::new();
    for file in tree().iter().filter(|f| f.path != "tests/tidy.rs") {
        // Unit tests stand at the end of their files.
        let tests = if file.path.contains("tests") { 0 } else { file.text.find("#[cfg(test)]").unwrap_or(usize::MAX) };
        let Some(text) = file.text.get(tests..) else { continue };
        for host in ["127.0.0.1:", "localhost:", "0.0.0.0:", "[::1]:"] {
            for (at, _) in text.match_indices(host) {
                let port: String = text[at + host.len()..].chars().take_while(char::is_ascii_digit).collect();
                let bound = text[..at].lines().last().is_some_and(|line| {
                    ["bind", "listen", "tcp://"].iter().any(|word| line.to_lowercase().contains(word))
                });
                if bound && !["", "0", "1"].contains(&port.as_str()) {
                    faults.push(format!("{}: a fixed port, {host}{port}", file.path));
                }
            }
        }
    }
    report(faults);
}

#[test]
fn the_rules_are_read_as_meant() {
    let code = "use crate::{kv::{pool, table}, control::x};\nuse crate::engine; crate::device::cpu::f()";
    assert_eq!(imported(code).into_iter().collect::<Vec<_>>(), ["control", "device", "engine", "kv"]);
    assert_eq!(module("src/kv/table.rs"), Some("kv"));
    assert_eq!(module("src/engine.rs"), Some("engine"));
    assert_eq!(module("src/lib.rs"), None);
    assert!(has("use std::time::Instant;", "Instant") && !has("InstantX", "Instant") && !has("MyInstant", "Instant"));
    assert!(has("let x = rand::rng();", "rand::rng(") && !has("unhappy_tokio_ish", "tokio"));
    assert_eq!(without_comments("a // HashMap\nb"), "a \nb\n");
}
