//! `distkv doctor`, run as people run it: without a libibverbs, without RDMA in
//! the kernel, and with a libibverbs of two made-up devices.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

/// A doctor that looks for this library.
fn doctor(library: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_distkv"));
    command.arg("doctor").env("DISTKV_LIBIBVERBS", library);
    command
}

fn text(output: &Output) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{:?}: {stderr}", output.status);
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn json(command: &mut Command) -> Value {
    serde_json::from_str(&text(&command.arg("--json").output().unwrap())).unwrap()
}

/// The line of one transport.
fn transport<'a>(report: &'a Value, name: &str) -> &'a Value {
    report["transports"].as_array().unwrap().iter().find(|line| line["name"] == name).unwrap()
}

/// A libibverbs of two devices that are not there: the fabric's tests have it.
fn made_up(folder: &Path) -> PathBuf {
    let library = folder.join("libfake.so");
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/fabric/tests/fake_verbs.c");
    let mut compiler = Command::new(std::env::var("CC").unwrap_or_else(|_| "cc".into()));
    let compiled = compiler.args(["-shared", "-fPIC", source, "-o"]).arg(&library).output().unwrap();
    let complaint = String::from_utf8_lossy(&compiled.stderr);
    assert!(compiled.status.success(), "libibverbs-dev is needed: run scripts/setup --test\n{complaint}");
    library
}

#[test]
fn without_the_library_tcp_is_next() {
    let missing = Path::new("/nonexistent/libibverbs.so.1");
    let shown = text(&doctor(missing).output().unwrap());
    let line = shown.lines().find(|line| line.trim_start().starts_with("verbs ")).unwrap();
    let words: Vec<&str> = line.split_whitespace().collect();
    assert_eq!(words[1], "no", "{line}");
    assert!(line.contains("/nonexistent/libibverbs.so.1 cannot be opened: "), "{line}");
    assert!(line.contains("No such file") && line.ends_with("; next: tcp"), "{line}");

    let report = json(&mut doctor(missing));
    let verbs = transport(&report, "verbs");
    assert_eq!((&verbs["usable"], &verbs["next"]), (&Value::Bool(false), &Value::from("tcp")));
    for name in ["loopback", "shm", "tcp"] {
        assert_eq!(transport(&report, name)["usable"], true, "{}", transport(&report, name));
    }
    assert!(report["verbs"]["devices"].as_array().unwrap().is_empty());
    assert!(report["machine"]["processor"]["threads"].as_u64().unwrap() > 0);
    assert!(report["machine"]["locked_memory"].get("soft").is_some());
}

#[test]
fn a_kernel_without_rdma_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let library = made_up(folder.path());
    let report = json(doctor(&library).env("FAKE_VERBS_NO_KERNEL", "1"));
    let verbs = transport(&report, "verbs");
    assert_eq!(verbs["because"], "the kernel offers no RDMA: load the module ib_uverbs");
}

#[test]
fn devices_ports_and_rails_are_shown() {
    let folder = tempfile::tempdir().unwrap();
    let library = made_up(folder.path());
    let sysfs = folder.path().join("sys");
    let types = sysfs.join("class/infiniband/fake_1/ports/1/gid_attrs/types");
    std::fs::create_dir_all(&types).unwrap();
    std::fs::write(types.join("0"), "RoCE v2\n").unwrap();
    let look = |more: &[&str]| json(doctor(&library).arg("--sysfs").arg(&sysfs).args(more));

    let report = look(&["--rails", "3"]);
    let verbs = &report["verbs"];
    assert_eq!(verbs["devices"][0]["gpu_direct"], "dmabuf");
    assert_eq!(verbs["devices"][1]["gpu_direct"], "bounce");
    assert_eq!(verbs["devices"][1]["ports"][0]["gid"]["kind"], "RoCE v2, IPv4");
    let rails: Vec<String> = verbs["rails"].as_array().unwrap().iter().map(|rail| rail["device"].to_string()).collect();
    assert_eq!(rails, ["\"fake_0\"", "\"fake_1\""]);
    assert_eq!(verbs["passed_over"][0]["port"], "fake_1:2");
    assert!(transport(&report, "verbs")["because"].as_str().unwrap().contains("fake_0:1, fake_1:1"));

    let none = look(&["--verbs-devices", "mlx5_0"]);
    let because = transport(&none, "verbs")["because"].as_str().unwrap().to_string();
    assert!(because.starts_with("no port can be used: "), "{because}");
    assert!(because.contains("mlx5_0: there is no such device or port"), "{because}");
}

#[test]
fn a_place_that_is_not_there_is_an_error() {
    let output = doctor(Path::new("/nonexistent")).args(["--near", "ffff:ff:1f.7"]).output().unwrap();
    assert!(!output.status.success());
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains("--near: there is no PCI device ffff:ff:1f.7"), "{stderr}");
}

#[test]
fn where_gpu_memory_must_be_reached_nothing_starts_that_cannot() {
    let folder = tempfile::tempdir().unwrap();
    let library = made_up(folder.path());
    // The second device registers no dmabufs.
    let device = |name| ["--require-gpudirect", "--verbs-devices", name];
    let sysfs = folder.path().join("sys");
    let report = json(doctor(&library).arg("--sysfs").arg(&sysfs).args(device("fake_1")));
    let because = transport(&report, "verbs")["because"].as_str().unwrap().to_string();
    assert!(because.contains("fake_1:1: it reaches a GPU's memory by a copy through host memory only"), "{because}");
    assert!(because.contains("the module nvidia_peermem is not loaded"), "{because}");
    let report = json(doctor(&library).arg("--sysfs").arg(&sysfs).args(device("fake_0")));
    assert_eq!(report["verbs"]["rails"][0]["device"], "fake_0", "by dmabuf");

    let refused = |library: &Path| {
        let mut node = Command::new(env!("CARGO_BIN_EXE_distkv"));
        node.args(["serve", "--no-model", "--kv-memory", "1MiB", "--listen", "127.0.0.1:0"]);
        let output = node.args(device("fake_1")).env("DISTKV_LIBIBVERBS", library).output().unwrap();
        assert!(!output.status.success(), "it started");
        String::from_utf8(output.stderr).unwrap()
    };
    let stderr = refused(Path::new("/nonexistent/libibverbs.so.1"));
    assert!(stderr.contains("/nonexistent/libibverbs.so.1 cannot be opened"), "{stderr}");
    // A machine that has the module can do more than is asked here.
    if !["nvidia_peermem", "nv_peer_mem"].iter().any(|module| Path::new("/sys/module").join(module).exists()) {
        let stderr = refused(&library);
        assert!(stderr.contains("the module nvidia_peermem is not loaded"), "{stderr}");
    }
}

#[test]
fn a_host_tier_without_a_gpu_is_refused_before_anything_starts() {
    let serve = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_distkv"));
        command.args(["serve", "--listen", "127.0.0.1:0", "--fabric-listen", "127.0.0.1:0"]).args(arguments);
        let output = command.output().unwrap();
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    // The model is not there: that it is never looked for shows in the message.
    let said = serve(&["--model", "/nonexistent", "--host-kv-memory", "1GiB"]);
    assert!(said.contains("--host-kv-memory is for a model on a GPU"), "{said}");
    let said = serve(&["--model", "/nonexistent", "--device", "tpu:0"]);
    assert!(said.contains("`tpu:0` is no device"), "{said}");
}
