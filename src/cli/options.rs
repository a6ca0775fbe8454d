//! Options that several subcommands share.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use clap::ValueEnum;
use distkv_fabric::verbs::device::{Near, VerbsConfig};
use indicatif::{ProgressBar, ProgressStyle};

use crate::device::cpu::Math;
use crate::kv::rblock::{DEFAULT_BLOCK_TOKENS, KvDtype};
use crate::model::load::ModelFiles;
use crate::node::device::DeviceName;
use crate::node::rank::{self, Rank};
use crate::node::transports::FabricChoice;
use crate::node::{ModelParts, NodeConfig, Tuning};
use crate::schedule::scheduler::SchedulerConfig;

/// A number of bytes: `8GiB`, `512MiB`, `1.5G`, `4096`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bytes(pub usize);

impl std::str::FromStr for Bytes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let unit_at = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = text.split_at(unit_at);
        let number: f64 = number.parse().map_err(|_| format!("`{text}` does not begin with a number"))?;
        let factor: f64 = match unit.trim() {
            "" | "B" => 1.0,
            "K" | "KB" => 1e3,
            "M" | "MB" => 1e6,
            "G" | "GB" => 1e9,
            "T" | "TB" => 1e12,
            "Ki" | "KiB" => 1024.0,
            "Mi" | "MiB" => 1024.0 * 1024.0,
            "Gi" | "GiB" => 1024.0 * 1024.0 * 1024.0,
            "Ti" | "TiB" => 1024.0 * 1024.0 * 1024.0 * 1024.0,
            unit => return Err(format!("`{unit}` is no unit of bytes; use KiB, MiB, GiB or TiB")),
        };
        Ok(Self((number * factor) as usize))
    }
}

/// Element type of keys and values.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
pub enum KvDtypeArg {
    /// bfloat16.
    #[default]
    Bf16,
    /// IEEE half precision.
    F16,
    /// IEEE single precision.
    F32,
    /// 8-bit float (E4M3): half of bf16's memory, less precise.
    Fp8,
}

impl From<KvDtypeArg> for KvDtype {
    fn from(arg: KvDtypeArg) -> Self {
        match arg {
            KvDtypeArg::Bf16 => Self::Bf16,
            KvDtypeArg::F16 => Self::F16,
            KvDtypeArg::F32 => Self::F32,
            KvDtypeArg::Fp8 => Self::Fp8,
        }
    }
}

/// Precision of activations inside matrix products.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
pub enum MathArg {
    /// f32 throughout.
    Exact,
    /// bf16 or int8 where they are faster.
    #[default]
    Fast,
}

/// How a model runs.
#[derive(Clone, Debug, clap::Args)]
pub struct EngineOptions {
    /// Device of the model: `cpu`, or a GPU, `cuda:0`.
    #[arg(long, env = "DISTKV_DEVICE", default_value_t)]
    pub device: DeviceName,
    /// Device threads; by default this process's share of the cores.
    #[arg(long, env = "DISTKV_THREADS")]
    pub threads: Option<usize>,
    /// Let the system move threads between cores.
    #[arg(long, env = "DISTKV_NO_PIN")]
    pub no_pin: bool,
    /// Precision of activations inside matrix products.
    #[arg(long, env = "DISTKV_MATH", value_enum, default_value_t)]
    pub math: MathArg,
    /// Element type of keys and values. A GPU computes in it, and keeps its weights
    /// in it: bf16 or f16; files of another type are converted as they are loaded.
    #[arg(long, env = "DISTKV_KV_DTYPE", value_enum, default_value_t)]
    pub kv_dtype: KvDtypeArg,
    /// Tokens an rBlock, 16 to 256.
    #[arg(long, env = "DISTKV_BLOCK_TOKENS", default_value_t = DEFAULT_BLOCK_TOKENS, value_parser = block_tokens)]
    pub block_tokens: usize,
    /// Longest context in tokens; by default the model's own.
    #[arg(long, env = "DISTKV_MAX_MODEL_LEN")]
    pub max_model_len: Option<usize>,
    /// Most prompt tokens computed in one step: 256, on a GPU 4096, unless given.
    #[arg(long, env = "DISTKV_CHUNK_TOKENS", value_parser = clap::value_parser!(u32).range(1..=32768))]
    pub chunk_tokens: Option<u32>,
    /// Most sequences in one step: 64, on a GPU 256, unless given.
    #[arg(long, env = "DISTKV_MAX_SEQUENCES", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub max_sequences: Option<u32>,
    /// Creditors that each lent rBlock is written to, 1 or 2. With 2 a creditor
    /// may be lost without anything being computed again.
    #[arg(long, env = "DISTKV_KV_REPLICAS", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=2))]
    pub kv_replicas: u8,
    /// Most tokens of KV that planned moves take to creditors or home in one
    /// step; fewer where steps take longer for it. 0: nothing is moved by plan.
    #[arg(long, env = "DISTKV_MOVE_TOKENS", default_value_t = 64, value_parser = clap::value_parser!(u32).range(0..=4096))]
    pub move_tokens: u32,
    /// Most requests in the queue; more are answered 429.
    #[arg(long, env = "DISTKV_MAX_WAITING", default_value_t = 1024)]
    pub max_waiting: usize,
}

fn block_tokens(text: &str) -> Result<usize, String> {
    let tokens: usize = text.parse().map_err(|_| format!("`{text}` is not a number"))?;
    if (16..=256).contains(&tokens) && tokens.is_multiple_of(16) {
        Ok(tokens)
    } else {
        Err("must be a multiple of 16 from 16 to 256".into())
    }
}

impl EngineOptions {
    /// Device threads of one of `share` processes of this host.
    pub fn threads(&self, share: usize) -> usize {
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        self.threads.unwrap_or((cores / share.max(1)).max(1))
    }

    /// What a node is told of a model.
    pub fn model_parts(
        &self,
        files: &ModelFiles,
        kv_bytes: Option<usize>,
        threads: usize,
    ) -> anyhow::Result<ModelParts> {
        let max_model_len = self.max_model_len.unwrap_or(files.config.max_positions);
        if max_model_len > files.config.max_positions {
            bail!(
                "--max-model-len {max_model_len} is over what the model was made for, {} tokens",
                files.config.max_positions
            );
        }
        let (chunk, sequences) = if self.device == DeviceName::Cpu { (256, 64) } else { (4096, 256) };
        let chunk_rows = self.chunk_tokens.unwrap_or(chunk) as usize;
        let max_sequences = self.max_sequences.unwrap_or(sequences) as usize;
        let schedule = SchedulerConfig {
            max_rows: chunk_rows + max_sequences,
            chunk_rows,
            max_logits: max_sequences,
            max_sequences,
            replicas: self.kv_replicas as usize,
            move_blocks: (self.move_tokens as usize).div_ceil(self.block_tokens),
        };
        let bar = progress_bar(files.weights.total_bytes());
        let total = files.weights.total_bytes();
        Ok(ModelParts {
            config: files.config.clone(),
            weights: Arc::clone(&files.weights),
            kv_dtype: self.kv_dtype.into(),
            block_tokens: self.block_tokens,
            device: self.device,
            kv_bytes,
            threads,
            math: match self.math {
                MathArg::Exact => Math::Exact,
                MathArg::Fast => Math::Fast,
            },
            schedule,
            max_model_len,
            max_waiting: self.max_waiting,
            tap: None,
            progress: Box::new(move |done| {
                bar.set_position(done);
                if done >= total {
                    bar.finish_and_clear();
                }
            }),
        })
    }
}

fn progress_bar(bytes: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("loading weights {bar:30} {bytes}/{total_bytes} {bytes_per_sec}");
    let bar = ProgressBar::new(bytes);
    match style {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

/// How a node takes part in a cluster.
#[derive(Clone, Debug, clap::Args)]
pub struct FabricOptions {
    /// Name of the cluster; members of another are not heard.
    #[arg(long, env = "DISTKV_CLUSTER", default_value = "default")]
    pub cluster: String,
    /// File with the cluster's key, any secret of 16 bytes or more: nodes with another are not heard.
    /// Without one, whoever knows the cluster's name can join.
    #[arg(long, env = "DISTKV_CLUSTER_KEY_FILE")]
    pub cluster_key_file: Option<PathBuf>,
    /// Leave the connections between nodes in the clear and open to whoever reaches the fabric's port:
    /// trusted networks only. All nodes of a cluster have it or none.
    #[arg(long, env = "DISTKV_INSECURE_FABRIC")]
    pub insecure_fabric: bool,
    /// Transport between nodes.
    #[arg(long, env = "DISTKV_FABRIC", value_enum, default_value_t)]
    pub fabric: FabricChoice,
    /// Start only where RDMA can be used.
    #[arg(long, env = "DISTKV_REQUIRE_RDMA")]
    pub require_rdma: bool,
    #[command(flatten)]
    /// RDMA ports.
    pub rdma: RdmaOptions,
    /// Longest wait for a creditor's answer before it counts as lost, milliseconds.
    #[arg(long, env = "DISTKV_EXCHANGE_DEADLINE_MS", default_value_t = 5000)]
    pub exchange_deadline_ms: u64,
    /// A control connection to a creditor that is silent for this long is closed, milliseconds.
    #[arg(long, env = "DISTKV_LOST_AFTER_MS", default_value_t = 2000)]
    pub lost_after_ms: u64,
}

impl FabricOptions {
    /// A node's configuration, before what is particular to it.
    pub fn node(
        &self,
        fabric_listen: SocketAddr,
        lend: f64,
        creditor_threads: usize,
        pin: bool,
    ) -> anyhow::Result<NodeConfig> {
        let key = self.cluster_key_file.as_deref().map(cluster_key).transpose()?;
        Ok(NodeConfig {
            cluster: self.cluster.clone(),
            key,
            insecure_fabric: self.insecure_fabric,
            rdma: self.rdma.config()?,
            require_rdma: self.require_rdma || self.rdma.require_gpudirect,
            rank: 0,
            join: Vec::new(),
            fabric_listen,
            http: String::new(),
            peers: None,
            fabric: self.fabric,
            lend,
            creditor_threads,
            pin,
            tuning: Tuning {
                deadline: Duration::from_millis(self.exchange_deadline_ms),
                lost_after: Duration::from_millis(self.lost_after_ms),
                ..Tuning::default()
            },
        })
    }
}

/// Which RDMA ports are used, and how.
#[derive(Clone, Debug, clap::Args)]
pub struct RdmaOptions {
    /// RDMA devices to use, `mlx5_0` or `mlx5_0:1` for one port; any by default.
    #[arg(long, env = "DISTKV_VERBS_DEVICES", value_delimiter = ',')]
    pub verbs_devices: Vec<String>,
    /// RDMA ports to use at most: a connection goes over one, and over the next when that has failed.
    #[arg(long, env = "DISTKV_RAILS", default_value_t = 1)]
    pub rails: usize,
    /// Order RDMA ports by closeness to this: a PCI address (of a GPU, say) or `node:N`, a NUMA node; `serve` takes
    /// the GPU that its model runs on. Of ports as close and as fast, engines of one host that a launcher has
    /// started begin with different ones, by their rank on the host.
    #[arg(long, env = "DISTKV_NEAR", value_parser = near)]
    pub near: Option<Near>,
    /// Index of the GID to use, where the automatic choice (RoCE v2 over IPv4 first) is not right.
    #[arg(long, env = "DISTKV_VERBS_GID_INDEX")]
    pub verbs_gid_index: Option<u8>,
    /// IP traffic class of RDMA packets; on RoCE its upper six bits are the DSCP.
    #[arg(long, env = "DISTKV_VERBS_TRAFFIC_CLASS", default_value_t = 0)]
    pub verbs_traffic_class: u8,
    /// InfiniBand service level, 0 to 15.
    #[arg(long, env = "DISTKV_VERBS_SERVICE_LEVEL", default_value_t = 0)]
    pub verbs_service_level: u8,
    /// Start only where RDMA can be used and reaches a GPU's memory without a copy through the host's.
    #[arg(long, env = "DISTKV_REQUIRE_GPUDIRECT")]
    pub require_gpudirect: bool,
}

impl Default for RdmaOptions {
    fn default() -> Self {
        Self {
            verbs_devices: Vec::new(),
            rails: 1,
            near: None,
            verbs_gid_index: None,
            verbs_traffic_class: 0,
            verbs_service_level: 0,
            require_gpudirect: false,
        }
    }
}

impl RdmaOptions {
    /// As the fabric takes them, in the process that a launcher may have started.
    pub fn config(&self) -> anyhow::Result<VerbsConfig> {
        let rank = rank::discover(|name| std::env::var(name).ok()).map_err(|e| anyhow!("rank environment: {e}"))?;
        self.config_of(rank.as_ref())
    }

    fn config_of(&self, rank: Option<&Rank>) -> anyhow::Result<VerbsConfig> {
        let config = VerbsConfig {
            devices: self.verbs_devices.clone(),
            max_rails: self.rails,
            near: self.near.clone().unwrap_or_default(),
            local_rank: rank.map_or(0, |rank| rank.local_rank),
            gid_index: self.verbs_gid_index,
            traffic_class: self.verbs_traffic_class,
            service_level: self.verbs_service_level,
            require_gpu_direct: self.require_gpudirect,
            ..VerbsConfig::default()
        };
        config.check()?;
        Ok(config)
    }
}

fn near(text: &str) -> Result<Near, String> {
    match text.strip_prefix("node:") {
        Some(node) => node.parse().map(Near::Node).map_err(|_| format!("{node} is no NUMA node's number")),
        None if text.contains(':') => Ok(Near::Pci(text.to_string())),
        None => Err("neither a PCI address (0000:17:00.0) nor node:N".into()),
    }
}

/// The key that a file's bytes give; a last line end does not count.
fn cluster_key(path: &Path) -> anyhow::Result<[u8; 32]> {
    let bytes = std::fs::read(path).with_context(|| format!("--cluster-key-file {}", path.display()))?;
    let secret = bytes.trim_ascii_end();
    if secret.len() < 16 {
        bail!(
            "--cluster-key-file {}: {} bytes are too short for a secret; write 16 or more, e.g. with: openssl rand -hex 32",
            path.display(),
            secret.len()
        );
    }
    Ok(blake3::derive_key("distkv cluster key v1", secret))
}

/// Opens a model, with its path in the error.
pub fn open_model(path: &Path) -> anyhow::Result<ModelFiles> {
    crate::model::load::open(path).with_context(|| format!("--model {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_read_with_every_unit() {
        let parse = |text: &str| text.parse::<Bytes>().map(|b| b.0);
        assert_eq!(parse("4096"), Ok(4096));
        assert_eq!(parse("8GiB"), Ok(8 << 30));
        assert_eq!(parse("1.5KiB"), Ok(1536));
        assert_eq!(parse("2M"), Ok(2_000_000));
        assert!(parse("8 parsecs").is_err_and(|e| e.contains("parsecs")));
        assert!(parse("GiB").is_err());
    }

    #[test]
    fn engines_of_one_host_ask_for_different_rails() {
        let rank = |local_rank| Rank { rank: 9, size: 16, local_rank, local_size: 8, master: None };
        let asked = |rank: Option<&Rank>| RdmaOptions::default().config_of(rank).unwrap().local_rank;
        assert_eq!((asked(None), asked(Some(&rank(1))), asked(Some(&rank(7)))), (0, 1, 7));
    }
}
