//! A small cluster inside the test's process: node 0 runs a model, the others
//! lend memory to it.
#![allow(dead_code, reason = "each test file uses its part")]

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use distkv::device::cpu::Math;
use distkv::device::tensor::DType;
use distkv::engine::{FinishReason, LogitTap, Output, Request, Stream};
use distkv::kv::rblock::KvDtype;
use distkv::model::load::{self, ModelFiles};
use distkv::model::sampler::SamplingParams;
use distkv::model::synth::synth_to;
use distkv::node::device::DeviceName;
use distkv::node::transports::FabricChoice;
use distkv::node::{ModelParts, Node, NodeConfig, NodeError, Tuning};
use distkv::schedule::scheduler::SchedulerConfig;
use serde_json::{Value, json};

/// A small llama with a long context. `changes` replace fields of its
/// configuration.
pub fn model(dir: &Path, changes: Value) -> ModelFiles {
    model_of(dir, changes, DType::F32)
}

/// The same with weights of another type.
pub fn model_of(dir: &Path, changes: Value, dtype: DType) -> ModelFiles {
    let mut config = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 320,
        "max_position_embeddings": 16384,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": true,
        "torch_dtype": "float32"
    });
    for (name, value) in changes.as_object().unwrap() {
        config[name] = value.clone();
    }
    synth_to(dir, &config, 7, dtype).unwrap();
    load::open(dir).unwrap()
}

/// Every row of logits of a run, by position.
pub type Logits = Arc<Mutex<Vec<(usize, Vec<f32>)>>>;

pub struct Cluster {
    /// As other processes join it.
    pub name: String,
    pub node: Node,
    pub lenders: Vec<Node>,
    pub logits: Logits,
}

/// How a cluster is made.
#[derive(Clone)]
pub struct Setup {
    pub device: DeviceName,
    pub fabric: FabricChoice,
    pub kv_dtype: KvDtype,
    /// KV tokens of node 0, then of each lender.
    pub tokens: Vec<usize>,
    pub chunk: usize,
    /// Most sequences of a step.
    pub sequences: usize,
    /// All logits are seen (`Cluster::logits`).
    pub taps: bool,
    pub threads: usize,
    pub math: Math,
    pub tuning: Tuning,
    pub replicas: usize,
    /// Most rBlocks that planned moves take in a step.
    pub move_blocks: usize,
    /// Node 0's pool is as large as its device has room for, whatever `tokens` say.
    pub whole_device: bool,
}

impl Setup {
    pub fn new(fabric: FabricChoice, kv_dtype: KvDtype, tokens: &[usize]) -> Self {
        Self {
            device: DeviceName::Cpu,
            fabric,
            kv_dtype,
            tokens: tokens.to_vec(),
            chunk: 128,
            sequences: 64,
            taps: true,
            threads: 1,
            math: Math::Exact,
            tuning: Tuning::default(),
            replicas: 1,
            move_blocks: 4,
            whole_device: false,
        }
    }

    pub fn start(&self, files: &ModelFiles) -> Cluster {
        self.start_by(files, Node::engine).unwrap()
    }

    /// As [`start`](Self::start), with node 0 made by `engine`.
    pub fn start_by(
        &self,
        files: &ModelFiles,
        engine: impl FnOnce(&NodeConfig, ModelParts) -> Result<Node, NodeError>,
    ) -> Result<Cluster, NodeError> {
        let logits = Logits::default();
        let seen = logits.clone();
        let config = NodeConfig {
            cluster: format!("test-{}", rand_name()),
            key: None,
            insecure_fabric: false,
            rdma: Default::default(),
            require_rdma: false,
            rank: 0,
            join: Vec::new(),
            fabric_listen: SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0),
            http: String::new(),
            peers: None,
            fabric: self.fabric,
            lend: 1.0,
            creditor_threads: 1,
            pin: false,
            tuning: self.tuning,
        };
        let shape = files.config.kv_shape(16, self.kv_dtype);
        let bytes = |tokens: usize| shape.blocks_for(tokens) * shape.block_bytes();
        let lenders: Vec<Node> = self.tokens[1..].iter().map(|&t| Node::lender(&config, bytes(t)).unwrap()).collect();
        let join = lenders.iter().map(|l| l.control_address().to_string()).collect();
        let max_sequences = self.sequences;
        let parts = ModelParts {
            config: files.config.clone(),
            weights: files.weights.clone(),
            kv_dtype: self.kv_dtype,
            block_tokens: 16,
            device: self.device,
            kv_bytes: (!self.whole_device).then(|| bytes(self.tokens[0])),
            threads: self.threads,
            math: self.math,
            schedule: SchedulerConfig {
                max_rows: self.chunk + max_sequences,
                chunk_rows: self.chunk,
                max_logits: max_sequences,
                max_sequences,
                replicas: self.replicas,
                move_blocks: self.move_blocks,
            },
            max_model_len: files.config.max_positions,
            max_waiting: 1024,
            tap: self.taps.then(|| -> LogitTap {
                Box::new(move |_, position, row| seen.lock().unwrap().push((position, row.to_vec())))
            }),
            progress: Box::new(|_| {}),
        };
        let name = config.cluster.clone();
        let node = engine(&NodeConfig { join, ..config }, parts)?;
        let cluster = Cluster { name, node, lenders, logits };
        let members = cluster.lenders.len();
        until("all members to be seen", || {
            cluster.node.view().ledger().instances.iter().filter(|i| !i.me && i.row.is_some()).count() == members
        });
        // The engine hears of what they lend a moment later.
        let reach: usize = self.tokens.iter().sum();
        until("all memory to be in reach", || cluster.node.stats().reach_tokens >= reach);
        Ok(cluster)
    }
}

impl Cluster {
    pub fn submit(&self, prompt: Vec<u32>, max_tokens: usize, prompt_logprobs: bool) -> Stream {
        let sampling = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
        let request =
            Request { prompt, sampling, max_tokens, stop_tokens: Vec::new(), prompt_logprobs, resume: Vec::new() };
        self.node.handle().unwrap().submit(request).unwrap()
    }

    /// Checks that every block everywhere is free again, and the tables whole.
    pub fn assert_all_returned(&self) {
        until("all memory to be returned", || {
            let stats = self.node.stats();
            let lent = self.lenders.iter().filter_map(Node::lent_pool).all(|p| p.table().counts().free == p.blocks());
            lent && stats.running == 0 && stats.blocks_free + stats.blocks_cached == stats.blocks_total
        });
        for pool in self.lenders.iter().filter_map(Node::lent_pool).chain(self.node.pool().cloned()) {
            pool.table().check_invariants().unwrap();
        }
    }

    pub fn stop(self) {
        self.node.stop();
        self.lenders.into_iter().for_each(Node::stop);
    }
}

/// The tokens of a stream that must end well.
pub fn tokens(stream: Stream) -> Vec<u32> {
    outcome(stream).unwrap()
}

/// The tokens of a stream, or the message it failed with.
pub fn outcome(mut stream: Stream) -> Result<Vec<u32>, String> {
    let mut tokens = Vec::new();
    loop {
        match stream.blocking_next() {
            Some(Output::Token { id, .. }) => tokens.push(id),
            Some(Output::Finished { reason }) => {
                assert!(matches!(reason, FinishReason::Length | FinishReason::Stop));
                return Ok(tokens);
            }
            Some(Output::Failed { message }) => return Err(message),
            Some(Output::Started { .. } | Output::PromptLogprobs(_)) => {}
            None => return Err("the stream ended without a last word".into()),
        }
    }
}

/// Waits for something that other threads bring about.
pub fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(Instant::now() < deadline, "waited 60 s for {what}");
        std::thread::yield_now();
        std::thread::park_timeout(Duration::from_millis(2));
    }
}

/// Tokens that repeat nowhere in an obvious way: a linear congruential walk.
pub fn prompt(seed: u64, len: usize) -> Vec<u32> {
    let mut state = seed.wrapping_mul(2_862_933_555_777_941_757).wrapping_add(3_037_000_493);
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as u32 % 320
        })
        .collect()
}

fn rand_name() -> String {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}
