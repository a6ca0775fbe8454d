//! Compiles the CUDA kernels where an nvcc is found and embeds them; writes the
//! structs of `cuda/api.h` in Rust. Without nvcc the build succeeds, and the
//! program says what it lacks.
//!
//! `DISTKV_NVCC` names the compiler, or is `none`. Otherwise: `CUDA_HOME`, the
//! one that `scripts/setup --cuda` brought, `PATH`, `/usr/local/cuda`.

use std::collections::hash_map::DefaultHasher;
use std::fmt::Write as _;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

/// Machine code for A100 and H100/H200 (`a`: with wgmma); what is newer compiles
/// the PTX when the program starts.
const TARGETS: &[&str] =
    &["arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a", "arch=compute_80,code=compute_80"];

fn main() {
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo names the package"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo names the output"));
    println!("cargo::rerun-if-changed=cuda");
    println!("cargo::rerun-if-changed=build.rs");
    for name in ["DISTKV_NVCC", "CUDA_HOME"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    let header = fs::read_to_string(root.join("cuda/api.h")).expect("cuda/api.h is part of the tree");
    fs::write(out.join("cuda_api.rs"), structs(&header)).expect("the output folder can be written");

    let mut images = String::new();
    let missing = match nvcc(&root) {
        Ok(nvcc) => {
            let built = compile(&nvcc, &root, &out);
            for (name, image, report) in built {
                writeln!(
                    images,
                    "    Image {{ name: {name:?}, code: include_bytes!({image:?}), report: include_str!({report:?}) }},"
                )
                .expect("a string");
            }
            String::new()
        }
        Err(reason) => reason,
    };
    let text = format!(
        "/// Why no kernels are embedded; empty where they are.\npub const WITHOUT_KERNELS: &str = {missing:?};\n\n\
         /// The kernels, one image a file.\npub static IMAGES: &[Image] = &[\n{images}];\n"
    );
    fs::write(out.join("cuda_images.rs"), text).expect("the output folder can be written");
}

/// The compiler, or why there is none.
fn nvcc(root: &Path) -> Result<PathBuf, String> {
    let tried =
        |path: PathBuf| Command::new(&path).arg("--version").output().is_ok_and(|o| o.status.success()).then_some(path);
    match env::var("DISTKV_NVCC").ok().filter(|v| !v.is_empty()) {
        Some(none) if none == "none" => return Err("it was built with DISTKV_NVCC=none".into()),
        Some(path) => return tried(path.clone().into()).ok_or_else(|| panic!("DISTKV_NVCC={path} does not run")),
        None => {}
    }
    let home = env::var_os("CUDA_HOME").map(|home| PathBuf::from(home).join("bin/nvcc"));
    let wheels = fs::read_dir(root.join(".cache/cuda/lib")).into_iter().flatten().flatten();
    let wheels = wheels.map(|python| python.path().join("site-packages/nvidia/cu13/bin/nvcc"));
    let candidates = home.into_iter().chain(wheels).chain(["nvcc".into(), "/usr/local/cuda/bin/nvcc".into()]);
    candidates
        .filter(|path| path.components().count() == 1 || path.exists())
        .find_map(tried)
        .ok_or_else(|| "no nvcc was found when it was built (scripts/setup --cuda brings one)".into())
}

/// Compiles every `cuda/*.cu`: name, image, the assembler's report.
fn compile(nvcc: &Path, root: &Path, out: &Path) -> Vec<(String, PathBuf, PathBuf)> {
    let version = Command::new(nvcc).arg("--version").output().expect("it ran before").stdout;
    let mut files: Vec<_> = fs::read_dir(root.join("cuda")).expect("cuda/ is part of the tree").flatten().collect();
    files.sort_by_key(|file| file.path());
    let text = |path: &Path| fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut headers = DefaultHasher::new();
    (version, TARGETS).hash(&mut headers);
    for file in files.iter().filter(|f| f.path().extension().is_some_and(|e| e == "h" || e == "cuh")) {
        text(&file.path()).hash(&mut headers);
    }
    let sources: Vec<PathBuf> =
        files.iter().map(|f| f.path()).filter(|p| p.extension().is_some_and(|e| e == "cu")).collect();
    // Debug, release, tests and lints have output folders of their own; the
    // kernels are the same in all of them.
    let shared = root.join(".cache").is_dir().then(|| root.join(".cache/kernels"));
    let jobs = env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1usize).clamp(1, sources.len().max(1));
    let next = std::sync::atomic::AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                while let Some(source) = sources.get(next.fetch_add(1, std::sync::atomic::Ordering::Relaxed)) {
                    let mut hasher = headers.clone();
                    text(source).hash(&mut hasher);
                    one(nvcc, source, hasher.finish(), out, shared.as_deref());
                }
            });
        }
    });
    sources
        .iter()
        .map(|source| {
            let name = source.file_stem().expect("a file").to_str().expect("an ASCII name").to_owned();
            let image = out.join(&name).with_extension("fatbin");
            (name, image.clone(), image.with_extension("txt"))
        })
        .collect()
}

fn one(nvcc: &Path, source: &Path, hash: u64, out: &Path, shared: Option<&Path>) {
    let name = source.file_stem().expect("a file").to_str().expect("an ASCII name");
    let image = out.join(name).with_extension("fatbin");
    let report = image.with_extension("txt");
    let kept = shared.map(|folder| folder.join(format!("{name}-{hash:016x}.fatbin")));
    if let Some(kept) = &kept
        && fs::copy(kept.with_extension("txt"), &report).is_ok()
        && fs::copy(kept, &image).is_ok()
    {
        return;
    }
    let mut command = Command::new(nvcc);
    command.args(["-fatbin", "-std=c++17", "-O3", "--compress-mode=size", "-Xptxas", "-v", "-Werror", "all-warnings"]);
    for target in TARGETS {
        command.arg("-gencode").arg(target);
    }
    command.arg("-o").arg(&image).arg(source);
    let done = command.output().unwrap_or_else(|e| panic!("{}: {e}", nvcc.display()));
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{} failed:\n{}{said}", source.display(), String::from_utf8_lossy(&done.stdout));
    fs::write(&report, said.as_bytes()).expect("the output folder can be written");
    if let Some(kept) = kept {
        // Another build may write the same file: whole, or not at all. What
        // cannot be kept is compiled again.
        let folder = kept.parent().expect("a folder");
        let _ = fs::create_dir_all(folder);
        let part = folder.join(format!("{name}-{}.part", std::process::id()));
        for (from, to) in [(&report, kept.with_extension("txt")), (&image, kept.clone())] {
            if fs::copy(from, &part).is_ok() {
                let _ = fs::rename(&part, to);
            }
        }
    }
}

/// The structs of the header, in Rust. See the header for what it may hold.
fn structs(header: &str) -> String {
    let mut text = String::new();
    let mut docs: Vec<String> = Vec::new();
    let mut inside = false;
    for line in header.lines() {
        let line = line.trim();
        let fail = || -> ! { panic!("cuda/api.h: {line:?} is not understood") };
        if let Some(comment) = line.strip_prefix("//") {
            docs.push(comment.trim().to_owned());
        } else if let Some(rest) = line.strip_prefix("struct ") {
            let Some(name) = rest.strip_suffix('{').map(str::trim) else { fail() };
            for doc in docs.drain(..) {
                writeln!(text, "/// {doc}").expect("a string");
            }
            writeln!(
                text,
                "#[repr(C)]\n#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]\npub struct {name} {{"
            )
            .expect("a string");
            inside = true;
        } else if let Some(rest) = line.strip_prefix("constexpr uint32_t ") {
            let Some((value, comment)) = rest.split_once(';') else { fail() };
            writeln!(
                text,
                "/// {}\npub const {};\n",
                comment.trim().trim_start_matches("//").trim(),
                value.replacen(" =", ": u32 =", 1)
            )
            .expect("a string");
            docs.clear();
        } else if line == "};" && inside {
            text.push_str("}\n\n");
            docs.clear();
            inside = false;
        } else if inside && !line.is_empty() {
            let (field, comment) = line.split_once("//").unwrap_or((line, ""));
            let Some(field) = field.trim().strip_suffix(';') else { fail() };
            let Some(at) = field.rfind([' ', '*']) else { fail() };
            let (kind, name) = (field[..=at].trim(), field[at + 1..].trim());
            let kind = match kind.strip_prefix("const ").unwrap_or(kind) {
                pointer if pointer.ends_with('*') => "u64",
                "uint32_t" => "u32",
                "int32_t" => "i32",
                "uint64_t" => "u64",
                "float" => "f32",
                "double" => "f64",
                _ => fail(),
            };
            // A name that says all has no comment.
            let comment = if comment.trim().is_empty() { name } else { comment.trim() };
            for doc in docs.drain(..).chain([comment.to_owned()]) {
                writeln!(text, "    /// {doc}").expect("a string");
            }
            writeln!(text, "    pub {name}: {kind},").expect("a string");
        } else {
            docs.clear();
        }
    }
    text
}
