//! What happens around a GPU, with libraries that only pretend to be NVIDIA's
//! (`fake_cuda.c`): an old driver, and a GPU that breaks down under a server.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use distkv::model::load;
use distkv::model::weights::{LayerParam, Param};
use serde_json::{Value, json};

/// Long enough that only a hang reaches it.
const PATIENCE: Duration = Duration::from_secs(60);

/// Compiles a library out of a source beside this file.
fn compile(source: &str, defined: &[String], library: &Path) {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(source);
    let mut compiler = Command::new(std::env::var("CC").unwrap_or_else(|_| "cc".into()));
    compiler.args(defined.iter().map(|name| format!("-D{name}"))).args(["-shared", "-fPIC"]);
    let compiled = compiler.arg(source).arg("-o").arg(library).output().unwrap();
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
}

/// A folder with a driver and a matrix library; `without`: functions they lack.
fn libraries(folder: &Path, without: &[&str]) -> PathBuf {
    let to = folder.join(format!("libraries-{}", without.concat()));
    std::fs::create_dir_all(&to).unwrap();
    for (part, name) in [("DRIVER", "libcuda.so.1"), ("MATRICES", "libcublasLt.so.13")] {
        let lacks = without.iter().map(|function| format!("{function}=gone_{function}"));
        let defined: Vec<String> = lacks.chain([part.to_owned()]).collect();
        compile("fake_cuda.c", &defined, &to.join(name));
    }
    to
}

fn distkv(libraries: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_distkv"));
    command.args(arguments).env("LD_LIBRARY_PATH", libraries);
    command
}

/// Runs it to its end, which must come.
fn run(command: &mut Command) -> Output {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let begun = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if begun.elapsed() > PATIENCE {
            child.kill().unwrap();
            panic!("it does not end: {}", text(&child.wait_with_output().unwrap()).1);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    child.wait_with_output().unwrap()
}

fn text(output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (text(&output.stdout), text(&output.stderr))
}

/// A small model of 3 layers; as [`model_of`].
fn model(folder: &Path, libraries: &Path) -> Option<String> {
    model_of(folder, libraries, 128, 320)
}

/// A model of 3 layers; `None` where this program has no kernels, and none of its
/// GPU's steps can be begun.
fn model_of(folder: &Path, libraries: &Path, hidden: usize, vocab: usize) -> Option<String> {
    let report = run(&mut distkv(libraries, &["doctor", "--json"]));
    let report: Value = serde_json::from_slice(&report.stdout).unwrap();
    if report["gpus"]["kernels"] == 0 {
        println!("SKIPPED: this program was built without CUDA kernels");
        return None;
    }
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": 3, "num_attention_heads": hidden / 64,
        "num_key_value_heads": 1, "head_dim": 64, "vocab_size": vocab, "max_position_embeddings": 2048,
        "rope_theta": 10000.0, "tie_word_embeddings": false, "attention_bias": false, "mlp_bias": false
    });
    let (file, out) = (folder.join("config.json"), folder.join("model"));
    std::fs::write(&file, config.to_string()).unwrap();
    let mut synth = distkv(libraries, &["model", "synth", "--config"]);
    let made = run(synth.arg(&file).arg("--out").arg(&out));
    assert!(made.status.success(), "{}", text(&made).1);
    Some(out.to_str().unwrap().to_owned())
}

#[test]
fn a_driver_that_lacks_a_function_is_told_to_be_too_old() {
    let folder = tempfile::tempdir().unwrap();
    let whole = libraries(folder.path(), &[]);
    let shown = text(&run(&mut distkv(&whole, &["doctor"]))).0;
    assert!(shown.contains("cuda:0    Fake Hopper, 1 GiB, 4 multiprocessors, compute capability 9.0"), "{shown}");

    let old = libraries(folder.path(), &["cuGraphLaunch", "cuLaunchKernelEx"]);
    let output = run(&mut distkv(&old, &["doctor"]));
    let (shown, stderr) = text(&output);
    assert!(output.status.success(), "{stderr}");
    let told = "CUDA: the driver, made for CUDA 13.0, is too old: it lacks cuGraphLaunch and cuLaunchKernelEx";
    assert!(shown.contains(told), "{shown}");
    assert!(!shown.contains("cuda:0"), "{shown}");

    let old_library = libraries(folder.path(), &["cublasLtMatmul"]);
    let (shown, _) = text(&run(&mut distkv(&old_library, &["doctor"])));
    assert!(shown.contains("cuda:0    Fake Hopper"), "{shown}");
    assert!(shown.contains("libcublasLt is too old: it lacks cublasLtMatmul;"), "{shown}");

    let Some(model) = model(folder.path(), &whole) else { return };
    for (library, told) in [(&old, told), (&old_library, "libcublasLt is too old: it lacks cublasLtMatmul;")] {
        let generate = ["generate", "--model", &model, "--device", "cuda:0", "--prompt", "a", "--max-tokens", "2"];
        let output = run(&mut distkv(library, &generate));
        let (_, stderr) = text(&output);
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        assert!(stderr.contains(told) && !stderr.contains("panicked"), "{stderr}");
    }
}

#[test]
fn what_has_no_room_on_the_gpu_is_refused_with_advice() {
    let folder = tempfile::tempdir().unwrap();
    let libraries = libraries(folder.path(), &[]);
    let Some(model) = model(folder.path(), &libraries) else { return };
    let serve = |mib: &str, more: &[&str]| {
        let mut command = distkv(&libraries, &["serve", "--model", &model, "--device", "cuda:0"]);
        command.args(["--listen", "127.0.0.1:0", "--fabric-listen", "127.0.0.1:0", "--chunk-tokens", "256"]);
        let output = run(command.args(more).env("FAKE_CUDA_MIB", mib));
        let (_, stderr) = text(&output);
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        stderr
    };
    let stderr = serve("1024", &["--kv-memory", "2GiB"]);
    assert!(stderr.contains("2.00 GiB of the GPU's memory were asked for, for the KV pool, "), "{stderr}");
    assert!(stderr.contains(" of 1.00 GiB are free; less --kv-memory"), "{stderr}");
    let stderr = serve("260", &[]);
    assert!(stderr.contains("weights and activations leave 0 bytes of the GPU's memory for the KV"), "{stderr}");
    assert!(stderr.contains("beside a reserve of 256.0 MiB"), "{stderr}");
    let stderr = serve("100", &[]);
    assert!(stderr.contains("128.0 MiB of the GPU's memory were asked for, for loading weights, "), "{stderr}");
    assert!(stderr.contains(" of 100.0 MiB are free; a smaller model"), "{stderr}");
}

#[test]
fn all_weights_reach_the_gpu_in_order_from_the_disk_and_from_the_cache() {
    let folder = tempfile::tempdir().unwrap();
    let libraries = libraries(folder.path(), &[]);
    // More than the memory that they go through holds at once.
    let Some(model) = model_of(folder.path(), &libraries, 1024, 32_000) else { return };
    let path = Path::new(&model).join("model.safetensors");
    let file = std::fs::File::open(&path).unwrap();
    file.sync_all().unwrap();
    // The first third of the file is in the cache, if the filesystem forgets at all.
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    let mut third = vec![0; file.metadata().unwrap().len() as usize / 3];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut third, 0).unwrap();

    let (log, arguments) = (folder.path().join("loaded"), ["--device", "cuda:0", "--max-tokens", "1", "--log", "info"]);
    let mut command =
        distkv(&libraries, &["generate", "--model", &model, "--prompt", "a", "--kv-tokens-per-node", "64"]);
    let output = run(command.args(arguments).env("FAKE_CUDA_LOADED", &log));
    let (_, stderr) = text(&output);
    assert!(output.status.success(), "{stderr}");
    let line = stderr.lines().find(|line| line.contains("weights: 0.1")).unwrap_or_else(|| panic!("{stderr}"));
    println!("{line}");

    let files = load::open(Path::new(&model)).unwrap();
    let mut expected = Vec::new();
    let mut add = |param| expected.extend_from_slice(files.weights.get(param).unwrap().bytes);
    [Param::Embedding, Param::LmHead].into_iter().for_each(&mut add);
    for layer in 0..3 {
        use LayerParam as P;
        let params = [P::AttentionNorm, P::Q, P::K, P::V, P::O, P::MlpNorm, P::Gate, P::Up, P::Down];
        params.into_iter().for_each(|param| add(Param::Layer(layer, param)));
    }
    add(Param::FinalNorm);
    let loaded = std::fs::read(log).unwrap();
    assert_eq!(loaded.len(), expected.len());
    let wrong = loaded.iter().zip(&expected).position(|(a, b)| a != b);
    assert_eq!(wrong, None, "the first byte that is not the file's");
}

/// What the fake NVTX counted in a run: ranges by name, and `open`.
fn ranges(libraries: &Path, arguments: &[&str]) -> std::collections::BTreeMap<String, i64> {
    let log = libraries.join("ranges");
    let output = run(distkv(libraries, arguments).env("FAKE_NVTX", &log));
    assert!(output.status.success(), "{}", text(&output).1);
    let counted = std::fs::read_to_string(log).unwrap();
    let line = |line: &str| line.rsplit_once(' ').map(|(name, count)| (name.to_owned(), count.parse().unwrap()));
    counted.lines().map(|l| line(l).unwrap()).collect()
}

#[test]
fn ranges_of_time_are_shown_where_there_is_a_library_for_them() {
    let folder = tempfile::tempdir().unwrap();
    let gpu = libraries(folder.path(), &[]);
    let Some(model) = model(folder.path(), &gpu) else { return };
    let generate = ["generate", "--model", &model, "--prompt", "a b c d", "--max-tokens", "8", "--temperature", "0"];
    for (name, device) in [("libnvtx3interop.so", "cuda:0"), ("libnvToolsExt.so.1", "cpu")] {
        let library = gpu.join(name);
        compile("fake_nvtx.c", &[], &library);
        let mut arguments = generate.to_vec();
        arguments.extend(["--device", device]);
        let counted = ranges(&gpu, &arguments);
        let of = |name: &str| counted.get(name).copied().unwrap_or(0);
        assert_eq!((of("load"), of("open")), (1, 0), "{counted:?}");
        assert_eq!(of("step"), of("prefill") + of("decode"), "{counted:?}");
        assert!(of("prefill") > 0 && of("choose") == of("step") && of("exchange") == 0, "{counted:?}");
        // Three layers a step, but where a recorded one is replayed.
        assert!(of("layer") > 0 && of("layer") % 3 == 0 && of("layer") <= 3 * of("step"), "{counted:?}");
        assert_eq!(of("layer"), of("attention"), "{counted:?}");
        assert_eq!(of("metadata"), if device == "cpu" { 0 } else { of("step") }, "{counted:?}");
        std::fs::remove_file(library).unwrap();
    }
    // Elsewhere: keys with lenders of the same process.
    compile("fake_nvtx.c", &[], &gpu.join("libnvtx3interop.so"));
    let mut arguments = generate.to_vec();
    let prompt = "a b c d e f g h ".repeat(20);
    (arguments[4], arguments[6]) = (&prompt, "4");
    arguments.extend(["--nodes", "3", "--kv-tokens-per-node", "128"]);
    let counted = ranges(&gpu, &arguments);
    assert!(counted["exchange"] > 0 && counted["open"] == 0, "{counted:?}");
}

/// A server that is killed when the test is over, and what it writes to stderr.
struct Server {
    child: Child,
    stderr: BufReader<std::process::ChildStderr>,
    url: String,
    said: String,
}

impl Server {
    fn start(mut command: Command) -> Self {
        let mut child = command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let mut server = Self { child, stderr, url: String::new(), said: String::new() };
        while !server.said.contains("distkv: ready") {
            let mut line = String::new();
            assert!(server.stderr.read_line(&mut line).unwrap() > 0, "it ended: {}", server.said);
            if let Some((_, rest)) = line.split_once("; http://") {
                server.url = format!("http://{}", rest.split(' ').next().unwrap());
            }
            server.said += &line;
        }
        server
    }

    /// Waits until it ends by itself: its exit code.
    fn end(&mut self) -> Option<i32> {
        let begun = Instant::now();
        let status = loop {
            match self.child.try_wait().unwrap() {
                Some(status) => break status,
                None => assert!(begun.elapsed() < PATIENCE, "it does not end"),
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        self.stderr.read_to_string(&mut self.said).unwrap();
        status.code()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_gpu_that_breaks_down_ends_the_server_with_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let libraries = libraries(folder.path(), &[]);
    let Some(model) = model(folder.path(), &libraries) else { return };
    let mut command = distkv(&libraries, &["serve", "--model", &model, "--device", "cuda:0", "--log", "info"]);
    command.args(["--listen", "127.0.0.1:0", "--fabric-listen", "127.0.0.1:0", "--kv-tokens", "2048"]);
    command.args(["--chunk-tokens", "256", "--max-sequences", "8"]);
    let mut server = Server::start({
        command.env("FAKE_CUDA_BREAKS", "600");
        command
    });
    // How the weights came.
    assert!(
        server.said.contains("weights: 0.00") && server.said.contains(" directly from the disk, "),
        "{}",
        server.said
    );
    let agent: ureq::Agent =
        ureq::Agent::config_builder().http_status_as_error(false).timeout_global(Some(PATIENCE)).build().into();
    assert_eq!(agent.get(format!("{}/health", server.url)).call().unwrap().status(), 200);
    let body = json!({"prompt": "a b c", "max_tokens": 8, "temperature": 0, "ignore_eos": true}).to_string();
    let url = format!("{}/v1/completions", server.url);
    let mut answered = 0;
    // Some requests are answered; the one whose step breaks down is told so.
    let failed = loop {
        let mut answer = agent.post(&url).header("content-type", "application/json").send(&body).unwrap();
        let text = answer.body_mut().read_to_string().unwrap();
        match answer.status().as_u16() {
            200 => answered += 1,
            _ => break text,
        }
        assert!(answered < 1000, "it never breaks down");
    };
    assert!(answered > 0, "{failed}");
    assert!(failed.contains("the device is lost: ") && failed.contains("an illegal memory access"), "{failed}");
    assert_eq!(server.end(), Some(1), "{}", server.said);
    let said = &server.said;
    assert!(said.contains("the engine ends") && said.contains("distkv: draining"), "{said}");
    assert!(said.contains("distkv: ended because the device is lost: "), "{said}");
    assert!(!said.contains("panicked"), "{said}");
}
