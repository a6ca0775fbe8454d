//! The doctor's look at what is not network: memory limits, large pages, the
//! processor.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use distkv_fabric::Memory;
use rustix::process::{Resource, getrlimit};
use serde::Serialize;

use crate::device::Device;
use crate::device::cpu::{CpuDevice, CpuOptions, Isa, Math};

/// Less locked memory than this, bytes, is too little for a pool of KV.
const LOCKED_ENOUGH: u64 = 64 << 30;

/// What was found.
#[derive(Serialize)]
pub struct Machine {
    processor: Processor,
    locked_memory: Locked,
    large_pages: LargePages,
    io_uring: bool,
}

#[derive(Serialize)]
struct Processor {
    model: Option<String>,
    /// That this process may use at once.
    threads: usize,
    numa_nodes: Option<usize>,
    /// The instruction set of the kernels.
    kernels: Option<String>,
    /// The device with `--math fast`.
    fast: Option<String>,
    /// Why there are no kernels.
    kernels_error: Option<String>,
}

#[derive(Serialize)]
struct Locked {
    /// Bytes; `None`: no limit.
    soft: Option<u64>,
    hard: Option<u64>,
    /// May this process lock more than the limit says?
    privileged: bool,
    advice: Option<String>,
}

#[derive(Serialize)]
struct LargePages {
    /// For the memory of one process: weights and activations.
    private: Option<String>,
    /// For memory that is registered and shared: the KV pool and mailboxes.
    shared: Option<String>,
    /// Pages of 2 MiB that are reserved for such memory, and how many are free.
    reserved: Option<Reserved>,
    /// What such memory gets here, tried.
    got: String,
    advice: Option<String>,
}

#[derive(Serialize)]
struct Reserved {
    pages: usize,
    free: usize,
}

/// Bytes of memory that are made to see on which pages they come to lie.
const TRIED: usize = 4 << 20;

/// Looks. `registers`: is there a device that pins memory?
pub fn look(sysfs: &Path, registers: bool) -> Machine {
    let limit = getrlimit(Resource::Memlock);
    let privileged = may_lock(&fs::read_to_string("/proc/self/status").unwrap_or_default());
    Machine {
        processor: processor(sysfs),
        locked_memory: Locked {
            soft: limit.current,
            hard: limit.maximum,
            privileged,
            advice: locked_advice(limit.current, privileged, registers),
        },
        large_pages: large_pages(sysfs),
        io_uring: distkv_fabric::tcp::batches(),
    }
}

fn processor(sysfs: &Path) -> Processor {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    let nodes = fs::read_dir(sysfs.join("devices/system/node")).ok().map(|entries| {
        let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
        names.filter(|name| name.strip_prefix("node").is_some_and(|rest| rest.parse::<u32>().is_ok())).count()
    });
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let options = CpuOptions { threads, pin: false, math: Math::Fast, max_rows: 1, isa: None };
    let (isa, device) = (Isa::detect(), CpuDevice::new(options).map_err(|error| error.to_string()));
    Processor {
        model: model.map(|(_, name)| name.trim().to_string()),
        threads,
        numa_nodes: nodes,
        kernels: isa.as_ref().ok().map(|isa| format!("{isa:?}")),
        kernels_error: isa.err().map(|error| error.to_string()).or_else(|| device.as_ref().err().cloned()),
        fast: device.ok().map(|device| device.describe()),
    }
}

/// Does `/proc/self/status` show the capability to lock any amount of memory?
fn may_lock(status: &str) -> bool {
    const IPC_LOCK: u32 = 14;
    let bits = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    bits.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok()).is_some_and(|bits| bits >> IPC_LOCK & 1 == 1)
}

fn locked_advice(soft: Option<u64>, privileged: bool, registers: bool) -> Option<String> {
    let little = soft.is_some_and(|bytes| bytes < LOCKED_ENOUGH);
    (registers && little && !privileged).then(|| {
        "RDMA locks the memory that it reads and writes: `ulimit -l unlimited`, LimitMEMLOCK=infinity in a systemd \
         unit, --ulimit memlock=-1 for a container"
            .into()
    })
}

/// The word in brackets: `always [madvise] never`.
fn selected(text: &str) -> Option<String> {
    let (_, rest) = text.split_once('[')?;
    rest.split_once(']').map(|(word, _)| word.to_string())
}

fn large_pages(sysfs: &Path) -> LargePages {
    let folder = sysfs.join("kernel/mm/transparent_hugepage");
    let read = |name: &str| fs::read_to_string(folder.join(name)).ok().and_then(|text| selected(&text));
    let (private, shared) = (read("enabled"), read("shmem_enabled"));
    let mut advice = Vec::new();
    if private.as_deref() == Some("never") {
        advice.push(format!("echo madvise > {}", folder.join("enabled").display()));
    }
    if matches!(shared.as_deref(), Some("never" | "deny")) {
        advice.push(format!("echo advise > {}", folder.join("shmem_enabled").display()));
    }
    let count = |name: &str| {
        let path = sysfs.join("kernel/mm/hugepages/hugepages-2048kB").join(name);
        fs::read_to_string(path).ok()?.trim().parse().ok()
    };
    let reserved = count("nr_hugepages").and_then(|pages| Some(Reserved { pages, free: count("free_hugepages")? }));
    if reserved.as_ref().is_some_and(|reserved| reserved.pages == 0) {
        advice.push("for the KV pool, sysctl vm.nr_hugepages=N, as many of 2 MiB as it takes".to_string());
    }
    let advice = (!advice.is_empty()).then(|| format!("as root, for faster memory: {}", advice.join("; ")));
    let got = Memory::new(TRIED).map_or_else(|error| error.to_string(), |memory| memory.pages().to_string());
    LargePages { private, shared, reserved, got, advice }
}

/// Bytes for people; no limit where there is none.
fn limit(bytes: Option<u64>) -> String {
    match bytes {
        None => "unlimited".into(),
        Some(bytes) if bytes >= 1 << 30 => format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30)),
        Some(bytes) if bytes >= 1 << 20 => format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20)),
        Some(bytes) => format!("{} KiB", bytes >> 10),
    }
}

impl Machine {
    /// Lines for people.
    pub fn render(&self, out: &mut String) {
        let cpu = &self.processor;
        let model = cpu.model.as_deref().unwrap_or("unknown");
        let nodes = cpu.numa_nodes.map_or(String::new(), |nodes| format!(", {nodes} NUMA node(s)"));
        let _ = writeln!(out, "  processor      {model}, {} thread(s){nodes}", cpu.threads);
        let _ = match (&cpu.kernels, &cpu.fast, &cpu.kernels_error) {
            (Some(kernels), Some(fast), _) => writeln!(out, "  kernels        {kernels}; with --math fast: {fast}"),
            (.., error) => writeln!(out, "  kernels        none: {}", error.as_deref().unwrap_or("no reason given")),
        };
        let locked = &self.locked_memory;
        let privileged = if locked.privileged { ", not applied to this process (CAP_IPC_LOCK)" } else { "" };
        let (soft, hard) = (limit(locked.soft), limit(locked.hard));
        let _ = writeln!(out, "  locked memory  limit {soft} (hard {hard}){privileged}");
        let word = |word: &Option<String>| word.clone().unwrap_or_else(|| "not offered".into());
        let pages = &self.large_pages;
        let reserved = match &pages.reserved {
            Some(Reserved { pages, free }) => format!("{free} of {pages} reserved ones free"),
            None => "none can be reserved".into(),
        };
        let (private, shared) = (word(&pages.private), word(&pages.shared));
        let _ = writeln!(out, "  large pages    private {private}, shared {shared}, {reserved}");
        let _ = writeln!(out, "                 the KV pool would lie on {}", pages.got);
        let _ =
            writeln!(out, "  io_uring       {}", if self.io_uring { "yes" } else { "no: not offered or forbidden" });
        for advice in [&locked.advice, &pages.advice].into_iter().flatten() {
            let _ = writeln!(out, "  advice: {advice}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_capability_is_read_from_the_status() {
        assert!(may_lock("Name:\tx\nCapEff:\t0000000000004000\n"));
        assert!(may_lock("CapEff:\t000001ffffffffff\n"));
        assert!(!may_lock("CapEff:\t00000000a80405fb\nCapBnd:\t000001ffffffffff\n"));
        assert!(!may_lock(""));
    }

    #[test]
    fn advice_is_given_where_rdma_would_meet_the_limit() {
        assert!(locked_advice(Some(8 << 20), false, true).is_some());
        assert!(locked_advice(Some(8 << 20), true, true).is_none());
        assert!(locked_advice(Some(8 << 20), false, false).is_none());
        assert!(locked_advice(Some(128 << 30), false, true).is_none());
        assert!(locked_advice(None, false, true).is_none());
    }

    #[test]
    fn large_pages_as_sysfs_shows_them() {
        let sysfs = tempfile::tempdir().unwrap();
        let folder = sysfs.path().join("kernel/mm/transparent_hugepage");
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("enabled"), "always [madvise] never\n").unwrap();
        fs::write(folder.join("shmem_enabled"), "always within_size advise [never] deny force\n").unwrap();
        let pages = large_pages(sysfs.path());
        assert_eq!((pages.private.as_deref(), pages.shared.as_deref()), (Some("madvise"), Some("never")));
        let advice = pages.advice.unwrap();
        assert!(advice.contains("echo advise > ") && !advice.contains("echo madvise"), "{advice}");
        assert!(pages.reserved.is_none() && !advice.contains("nr_hugepages"), "{advice}");
        assert!(pages.got.contains("2 MiB"), "of this machine, larger ones or why not: {}", pages.got);
        let folder = sysfs.path().join("kernel/mm/hugepages/hugepages-2048kB");
        fs::create_dir_all(&folder).unwrap();
        for (reserved, free, advised) in [(0, 0, true), (64, 62, false)] {
            fs::write(folder.join("nr_hugepages"), format!("{reserved}\n")).unwrap();
            fs::write(folder.join("free_hugepages"), format!("{free}\n")).unwrap();
            let pages = large_pages(sysfs.path());
            assert_eq!(pages.reserved.map(|r| (r.pages, r.free)), Some((reserved, free)));
            assert_eq!(pages.advice.unwrap().contains("vm.nr_hugepages=N"), advised);
        }
        assert_eq!(limit(Some(8 << 20)), "8.0 MiB");
    }
}
