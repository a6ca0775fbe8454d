//! Putting a node together and taking it apart.

use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use distkv_fabric::secure::Security;
use distkv_fabric::select::Options;
use distkv_fabric::tcp::{TcpConfig, TcpTransport};
use distkv_fabric::verbs::device::VerbsConfig;
use distkv_fabric::{Memory, Pages, Transport, Waker};

use super::control_loop::{ClusterView, ControlLoop, NodeCommand, NodeLink};
use super::datagrams::Datagrams;
use super::device::{DeviceName, EngineDevice};
use super::transports::{self, FabricChoice, Transports};
use crate::attention::creditor::{Creditor, CreditorStats};
use crate::attention::debtor::{Debtor, DebtorConfig};
use crate::attention::exchange::ExchangeStats;
use crate::control::controller::{Config, ConfigError, Controller, LocalStats};
use crate::control::message::Role;
use crate::control::perf::PerfModel;
use crate::control::rmanager::{PoolSource, RManager};
use crate::control::row::{Profile, Tier};
use crate::control::seal::KEY_BYTES;
use crate::device::cpu::{CpuDevice, CpuHolder, CpuOptions, Math};
use crate::device::cuda::CudaDevice;
use crate::device::disk::Stored;
use crate::device::{DeviceError, HolderKernel, nvtx};
use crate::engine::{Command, Engine, EngineConfig, EngineHandle, EngineStats, LogitTap, Lost, Parts, Running};
use crate::kv::pool::KvPool;
use crate::kv::prefix::PrefixCache;
use crate::kv::rblock::{InstanceId, KvDtype, KvShape};
use crate::model::config::ModelConfig;
use crate::model::transformer::{LoadError, Transformer};
use crate::model::weights::{LayerParam, Param, WeightSource};
use crate::schedule::scheduler::SchedulerConfig;

/// Times that rarely need a change.
#[derive(Clone, Copy, Debug)]
pub struct Tuning {
    /// A loan that is not renewed for this long ends.
    pub lease: Duration,
    /// Time between heartbeats.
    pub heartbeat: Duration,
    /// A connection to a creditor that is silent for this long is closed.
    pub lost_after: Duration,
    /// A creditor that does not answer a query for this long is lost.
    pub deadline: Duration,
    /// How long a thread spins for an answer before it sleeps.
    pub spin: Duration,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            lease: Duration::from_secs(10),
            heartbeat: Duration::from_millis(200),
            lost_after: Duration::from_secs(2),
            deadline: Duration::from_secs(5),
            spin: Duration::from_micros(50),
        }
    }
}

/// What every node is told.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// Names the cluster: members of another are not heard.
    pub cluster: String,
    /// The cluster's key: who has another is not heard. `None`: one derived from
    /// the cluster's name, which keeps nobody out who knows the name.
    pub key: Option<[u8; KEY_BYTES]>,
    /// The fabric's connections are neither encrypted nor authenticated:
    /// trusted networks only, and all nodes alike.
    pub insecure_fabric: bool,
    /// RDMA ports to use.
    pub rdma: VerbsConfig,
    /// Start only where RDMA can be used.
    pub require_rdma: bool,
    /// Rank under a launcher.
    pub rank: u32,
    /// Control addresses (`tcp://ip:port`) to join at.
    pub join: Vec<String>,
    /// Where the control plane and the tcp lanes listen.
    pub fabric_listen: SocketAddr,
    /// `host:port` of the HTTP server, for others to show.
    pub http: String,
    /// `ip:port` at which other nodes hand it requests, if it takes any in.
    pub peers: Option<SocketAddr>,
    /// Transports of the lanes.
    pub fabric: FabricChoice,
    /// Share of the pool that may be lent, 0 ..= 1.
    pub lend: f64,
    /// Threads that answer queries over lent memory.
    pub creditor_threads: usize,
    /// Keep threads on their cores.
    pub pin: bool,
    /// Times.
    pub tuning: Tuning,
}

/// What a node that runs a model is told of it.
pub struct ModelParts {
    /// The configuration.
    pub config: ModelConfig,
    /// The weights.
    pub weights: Arc<dyn WeightSource>,
    /// Element type of the KV.
    pub kv_dtype: KvDtype,
    /// Tokens an rBlock.
    pub block_tokens: usize,
    /// What it runs on.
    pub device: DeviceName,
    /// Bytes of local KV memory; `None`: all that is left of a GPU's.
    pub kv_bytes: Option<usize>,
    /// Device threads.
    pub threads: usize,
    /// Precision of activations inside products.
    pub math: Math,
    /// Limits of a step.
    pub schedule: SchedulerConfig,
    /// Longest context.
    pub max_model_len: usize,
    /// Most requests in the queue.
    pub max_waiting: usize,
    /// Sees all logits, where given.
    pub tap: Option<LogitTap>,
    /// Called with the bytes of weights loaded so far.
    pub progress: Box<dyn FnMut(u64) + Send>,
}

/// Why a node did not start.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The fabric refused.
    #[error(transparent)]
    Fabric(#[from] distkv_fabric::Error),
    /// The device refused.
    #[error("device: {0}")]
    Device(#[from] DeviceError),
    /// The model could not be loaded.
    #[error("model: {0}")]
    Model(#[from] LoadError),
    /// The socket of its datagrams could not be had.
    #[error("listening for gossip at udp {0}: {1}; both the tcp and the udp port are needed")]
    Gossip(SocketAddr, std::io::Error),
    /// An address that is none.
    #[error("{0}: not an address of the form tcp://ip:port")]
    Address(String),
    /// The control plane refused its configuration.
    #[error("control: {0}")]
    Control(#[from] ConfigError),
    /// A thread could not be started.
    #[error("starting a thread: {0}")]
    Thread(#[from] std::io::Error),
    /// The memory given is too small.
    #[error("{given} bytes of KV memory hold {blocks} rBlocks of {block} bytes; give at least {least} bytes")]
    Memory {
        /// Bytes given.
        given: usize,
        /// Blocks that makes.
        blocks: usize,
        /// Bytes of a block.
        block: usize,
        /// Bytes of the fewest that make sense.
        least: usize,
    },
}

/// A running node.
pub struct Node {
    instance: InstanceId,
    control_address: String,
    engine: Option<Running>,
    pool: Option<Arc<KvPool>>,
    rmanager_pool: Arc<crate::control::rmanager::LentPool>,
    exchange: Arc<ExchangeStats>,
    creditor_stats: Arc<CreditorStats>,
    view: ClusterView,
    link: NodeLink,
    stop: Arc<AtomicBool>,
    wakers: Vec<Waker>,
    threads: Vec<JoinHandle<()>>,
    describe: String,
    pages: Option<Pages>,
    model: Option<[u8; 32]>,
    peer_key: [u8; KEY_BYTES],
}

impl ModelParts {
    /// Shape of the model's KV.
    pub fn kv_shape(&self) -> KvShape {
        self.config.kv_shape(self.block_tokens, self.kv_dtype)
    }
}

impl Node {
    /// Starts a node that runs a model: loads the weights, allocates the pool,
    /// starts all threads.
    pub fn engine(config: &NodeConfig, model: ModelParts) -> Result<Self, NodeError> {
        match model.device {
            DeviceName::Cpu => Self::engine_on::<CpuDevice>(config, model),
            DeviceName::Cuda(_) => Self::engine_on::<CudaDevice>(config, model),
        }
    }

    /// As [`engine`](Self::engine), on a device of a given kind, whatever the model's
    /// parts name.
    pub fn engine_on<D: EngineDevice>(config: &NodeConfig, mut model: ModelParts) -> Result<Self, NodeError> {
        let shape = model.kv_shape();
        nvtx::open();
        let mut device = D::make(config.pin, &model)?;
        let fingerprint = fingerprint(&model)?;
        let transformer = Transformer::load(
            &mut device,
            &model.config,
            model.weights.as_ref(),
            model.schedule.max_rows,
            model.schedule.max_logits,
            &mut model.progress,
        )?;
        let pool = Arc::new(device.pool(shape, model.kv_bytes)?);
        let pages = pool.on_host().map(|memory| memory.pages().clone());
        let prefix = Arc::new(Mutex::new(PrefixCache::new(&fingerprint, model.block_tokens)));
        let source = PoolSource::Pool { pool: pool.clone(), prefix: Some(prefix.clone()) };
        // A GPU's memory is not lent: no debtor's write reaches it. What such a
        // node lends is host memory, as a lender beside its engine.
        let lend = if pool.on_host().is_some() { config.lend } else { 0.0 };
        let mut assembly = Assembly::new(&NodeConfig { lend, ..config.clone() }, source, Role::Engine)?;
        assembly.config.profile.model = Some(fingerprint);
        assembly.config.shape = Some(shape);
        if pool.on_host().is_none() {
            assembly.config.tier = Tier::Device;
        }

        let exchange = Arc::new(ExchangeStats::default());
        let windows = if model.config.windows.iter().all(Option::is_none) {
            Vec::new()
        } else {
            (0..model.config.layers).map(|l| model.config.window(l).unwrap_or(0)).collect()
        };
        let debtor = Debtor::new(
            DebtorConfig {
                instance: assembly.config.instance,
                attention: model.config.attention,
                windows,
                max_rows: model.schedule.max_rows,
                deadline: config.tuning.deadline,
                spin: config.tuning.spin,
            },
            pool.clone(),
            assembly.transports(config)?,
            exchange.clone(),
        )?;
        let inbox = Engine::<D>::inbox();
        let engine_config = EngineConfig {
            schedule: model.schedule,
            max_model_len: model.max_model_len,
            max_waiting: model.max_waiting,
        };
        let describe = device.describe();
        let parts = Parts {
            device,
            model: transformer,
            pool: pool.clone(),
            prefix,
            debtor,
            exchange: exchange.clone(),
            treasury: Box::new(assembly.link.clone()),
            tap: model.tap,
        };
        let running = Engine::start(engine_config, parts, inbox)?;
        Ok(Self { pages, ..assembly.finish(config, Some(running), Some(pool), exchange, describe)? })
    }

    /// Starts a node that only lends `bytes` of memory.
    pub fn lender(config: &NodeConfig, bytes: usize) -> Result<Self, NodeError> {
        // Here, not when the first debtor comes: a large page that is missing is
        // found out at start, and the control plane's thread waits for none.
        let memory = Memory::new(bytes)?;
        let pages = memory.pages().clone();
        let assembly = Assembly::new(config, PoolSource::Memory(memory, bytes), Role::Lender)?;
        let describe = format!("memory lender, {} threads", config.creditor_threads);
        Ok(Self { pages: Some(pages), ..assembly.finish(config, None, None, Arc::default(), describe)? })
    }

    /// This instance.
    pub fn instance(&self) -> InstanceId {
        self.instance
    }

    /// Where others join it.
    pub fn control_address(&self) -> &str {
        &self.control_address
    }

    /// Takes requests, where the node runs a model.
    pub fn handle(&self) -> Option<&EngineHandle> {
        self.engine.as_ref().map(|e| &e.handle)
    }

    /// The engine's figures; a lender's are those of its memory.
    pub fn stats(&self) -> EngineStats {
        self.stats_source()()
    }

    /// As [`stats`](Self::stats), to be called without the node.
    pub fn stats_source(&self) -> Arc<dyn Fn() -> EngineStats + Send + Sync> {
        if let Some(handle) = self.handle().cloned() {
            return Arc::new(move || handle.stats());
        }
        let lent = self.rmanager_pool.clone();
        Arc::new(move || {
            let counts = lent.current().map(|p| p.table().counts()).unwrap_or_default();
            EngineStats {
                blocks_total: counts.total as usize,
                blocks_free: counts.free as usize,
                blocks_lent: (counts.lent + counts.reserved) as usize,
                ..EngineStats::default()
            }
        })
    }

    /// What the control plane knows.
    pub fn view(&self) -> &ClusterView {
        &self.view
    }

    /// The local pool, where the node runs a model.
    pub fn pool(&self) -> Option<&Arc<KvPool>> {
        self.pool.as_ref()
    }

    /// The pool that is lent from.
    pub fn lent_pool(&self) -> Option<Arc<KvPool>> {
        self.rmanager_pool.current()
    }

    /// Costs of remote exchanges as a debtor.
    pub fn exchange(&self) -> &Arc<ExchangeStats> {
        &self.exchange
    }

    /// Figures as a creditor.
    pub fn creditor_stats(&self) -> &Arc<CreditorStats> {
        &self.creditor_stats
    }

    /// Fingerprint of the model, where the node runs one.
    pub fn model(&self) -> Option<[u8; 32]> {
        self.model
    }

    /// A key for what nodes of this cluster say to each other of requests.
    pub fn peer_key(&self) -> [u8; KEY_BYTES] {
        self.peer_key
    }

    /// The pages that its KV memory lies on, where that is the host's.
    pub fn pages(&self) -> Option<&Pages> {
        self.pages.as_ref()
    }

    /// For people: what it runs on.
    pub fn describe(&self) -> &str {
        &self.describe
    }

    /// Takes no new requests or loans from now on; what runs goes on, and debtors
    /// move what lies here elsewhere.
    pub fn drain(&self) {
        self.drainer()();
    }

    /// [`drain`](Self::drain), to be called from anywhere.
    pub fn drainer(&self) -> impl Fn() + Send + 'static + use<> {
        let engine = self.engine.as_ref().map(|engine| engine.draining.clone());
        let link = self.link.clone();
        move || {
            if let Some(draining) = &engine {
                draining.store(true, Ordering::Release);
            }
            link.tell(NodeCommand::Drain);
        }
    }

    /// Says when the engine's device was lost: nothing can be computed any more, and
    /// the node is to end. A lender's never is.
    pub fn lost(&self) -> Lost {
        self.engine.as_ref().map(|engine| engine.lost.clone()).unwrap_or_default()
    }

    /// Ends the node: the engine first (requests that still run fail), then it
    /// leaves the cluster.
    pub fn stop(self) {
        self.end(NodeCommand::Leave);
    }

    /// Ends the node as a crash would, as far as others can tell: its
    /// connections close and nobody is told why. What it lent is gone.
    pub fn vanish(self) {
        self.end(NodeCommand::Vanish);
    }

    fn end(mut self, last: NodeCommand) {
        if let Some(engine) = self.engine.take() {
            // If the engine has ended by itself there is nothing to tell it.
            let _ = engine.commands.send(Command::Stop);
            if engine.thread.join().is_err() {
                tracing::error!("the engine's thread panicked");
            }
        }
        self.link.tell(last);
        self.stop.store(true, Ordering::Release);
        self.wakers.iter().for_each(Waker::wake);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a fabric thread panicked");
            }
        }
    }
}

/// What all kinds of node have in common while they are put together.
struct Assembly {
    control: Box<dyn Transport>,
    /// Of every transport of this node.
    security: Security,
    gossip: UdpSocket,
    creditors: Vec<Box<dyn Transport>>,
    rmanager: RManager,
    config: Config,
    link: NodeLink,
    inbox: mpsc::Receiver<NodeCommand>,
}

impl Assembly {
    fn new(config: &NodeConfig, source: PoolSource, role: Role) -> Result<Self, NodeError> {
        let cluster = derive("distkv cluster id v1", &config.cluster);
        let key = config.key.unwrap_or_else(|| derive("distkv cluster key from its name v1", &config.cluster));
        let security = transports::security(&key, &cluster, config.insecure_fabric);
        let (control, gossip) = listen(config.fabric_listen, &security)?;
        let options = Options { security: security.clone(), rdma: config.rdma.clone() };
        let (creditors, left_out) = config.fabric.open(config.fabric_listen.ip(), &options, config.require_rdma)?;
        for error in left_out {
            tracing::info!(%error, "this transport is left out; distkv doctor says more");
        }
        let (commands, inbox) = mpsc::channel();
        let started = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64);
        let profile = Profile {
            role,
            model: None,
            host: host_id(),
            rank: config.rank,
            control: vec![control.address().0],
            creditor: creditors.iter().map(|t| t.address().0).collect(),
            http: config.http.clone(),
            peers: config.peers.map(|address| address.to_string()),
        };
        let join = config.join.iter().map(|address| parse(address)).collect::<Result<_, _>>()?;
        let address = gossip.local_addr()?;
        let control_config = Config {
            started,
            key,
            join,
            heartbeat: config.tuning.heartbeat,
            lost_after: config.tuning.lost_after,
            ..Config::new(InstanceId(rand::random()), cluster, profile, address)
        };
        let link = NodeLink { commands, waker: control.waker() };
        let rmanager = RManager::new(source, config.lend, config.tuning.lease);
        let (control, config) = (Box::new(control), control_config);
        Ok(Self { control, security, gossip, creditors, rmanager, config, link, inbox })
    }

    /// The engine's transports: as the creditors' are.
    fn transports(&self, config: &NodeConfig) -> Result<Transports, NodeError> {
        let options = Options { security: self.security.clone(), rdma: config.rdma.clone() };
        Ok(config.fabric.open(config.fabric_listen.ip(), &options, config.require_rdma)?.0)
    }

    fn finish(
        self,
        config: &NodeConfig,
        engine: Option<Running>,
        pool: Option<Arc<KvPool>>,
        exchange: Arc<ExchangeStats>,
        describe: String,
    ) -> Result<Node, NodeError> {
        let lent = self.rmanager.lent_pool().clone();
        let stop = Arc::new(AtomicBool::new(false));
        let creditor_stats = Arc::new(CreditorStats::default());
        let (mut threads, mut wakers) = (Vec::new(), Vec::new());
        for transport in self.creditors {
            wakers.push(transport.waker());
            let options = CpuOptions { threads: config.creditor_threads, pin: config.pin, ..CpuOptions::default() };
            let kernel: Box<dyn HolderKernel> = Box::new(CpuHolder::new(options)?);
            let name = format!("creditor-{}", transport.name());
            let creditor = Creditor::new(transport, lent.clone(), kernel, creditor_stats.clone());
            let (stop, spin) = (stop.clone(), config.tuning.spin);
            threads.push(std::thread::Builder::new().name(name).spawn(move || creditor.run(&stop, spin))?);
        }
        let (instance, model) = (self.config.instance, self.config.profile.model);
        let mut peer_key = blake3::Hasher::new_derive_key("distkv key between ingress and runner v1");
        peer_key.update(&self.config.key).update(&self.config.cluster);
        let peer_key = *peer_key.finalize().as_bytes();
        let control_address = self.config.profile.control[0].clone();
        let (shape, host) = (self.config.shape, self.config.profile.host);
        let controller = Controller::new(self.config, self.rmanager, rand::random())?;
        let (datagrams, thread) = Datagrams::start(self.gossip, self.control.waker(), stop.clone())?;
        threads.push(thread);
        let view = ClusterView::default();
        let commands: Option<SyncSender<Command>> = engine.as_ref().map(|e| e.commands.clone());
        let handle = engine.as_ref().map(|e| e.handle.clone());
        let mut rate = Rate::default();
        let figures = Box::new(move || {
            let stats = handle.as_ref().map(EngineHandle::stats).unwrap_or_default();
            LocalStats {
                running: stats.running as u32,
                waiting: stats.waiting as u32,
                wanted: stats.wanted as u32,
                tokens_s: rate.of(Instant::now(), stats.generated_tokens),
                perf: stats.perf.map(PerfModel::rounded),
            }
        });
        let control = ControlLoop {
            transport: self.control,
            datagrams,
            controller,
            inbox: self.inbox,
            engine: commands,
            figures,
            shape,
            host,
            view: view.clone(),
        };
        threads.push(std::thread::Builder::new().name("fabric".into()).spawn(move || control.run())?);
        Ok(Node {
            instance,
            control_address,
            engine,
            pool,
            rmanager_pool: lent,
            exchange,
            creditor_stats,
            view,
            link: self.link,
            stop,
            wakers,
            threads,
            describe,
            pages: None,
            model,
            peer_key,
        })
    }
}

/// Tokens a second out of a count of tokens, over spans of at least
/// [`Rate::SPAN`], each as heavy as all before it.
#[derive(Default)]
struct Rate {
    last: Option<(Instant, u64)>,
    smooth: f64,
}

impl Rate {
    const SPAN: Duration = Duration::from_millis(500);

    fn of(&mut self, now: Instant, count: u64) -> u32 {
        let (at, before) = *self.last.get_or_insert((now, count));
        let span = now - at;
        if span >= Self::SPAN {
            self.smooth = (self.smooth + (count - before) as f64 / span.as_secs_f64()) / 2.0;
            self.last = Some((now, count));
        }
        self.smooth.round() as u32
    }
}

/// Names this host: equal for processes that can share memory. Where the system
/// does not say, every process is a host of its own and shared memory unused.
fn host_id() -> u64 {
    let Some(token) = distkv_fabric::select::host_token() else { return rand::random() };
    let mut id = [0; 8];
    id.copy_from_slice(&blake3::derive_key("distkv host id v1", token.as_bytes())[..8]);
    u64::from_le_bytes(id)
}

/// `N` bytes out of the cluster's name, for one purpose.
fn derive<const N: usize>(purpose: &str, name: &str) -> [u8; N] {
    let mut bytes = [0; N];
    blake3::Hasher::new_derive_key(purpose).update(name.as_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

fn parse(address: &str) -> Result<SocketAddr, NodeError> {
    let bare = address.strip_prefix("tcp://").unwrap_or(address);
    bare.parse().map_err(|_| NodeError::Address(address.to_owned()))
}

/// The control plane's listener, and the socket of its datagrams at the same
/// address and port. Where any port will do, one is looked for that is free for
/// both.
fn listen(address: SocketAddr, security: &Security) -> Result<(TcpTransport, UdpSocket), NodeError> {
    let mut tries = if address.port() == 0 { 16 } else { 1 };
    loop {
        tries -= 1;
        let control = TcpTransport::bind(address, TcpConfig::new(security.clone()))?;
        let told = parse(&control.address().0)?;
        match UdpSocket::bind(told) {
            Ok(gossip) => return Ok((control, gossip)),
            Err(error) if tries == 0 => return Err(NodeError::Gossip(told, error)),
            Err(_) => {}
        }
    }
}

/// Names everything that changes the KV of the same tokens: configuration,
/// element types, arithmetic, and a sample of every weight. The same in every
/// process.
fn fingerprint(model: &ModelParts) -> Result<[u8; 32], DeviceError> {
    const SAMPLE: usize = 4096;
    let (config, weights, dtype) = (&model.config, model.weights.as_ref(), model.kv_dtype);
    let math = match model.device {
        DeviceName::Cpu => format!("{:?}", model.math),
        DeviceName::Cuda(_) => "cuda".into(),
    };
    let mut hasher = blake3::Hasher::new_derive_key("distkv model fingerprint v1");
    hasher.update(format!("{config:?} {dtype:?} {math}").as_bytes());
    let mut add = |param: Param| {
        let Some(tensor) = weights.get(param) else { return Ok(()) };
        hasher.update(format!("{param:?} {} {}x{}", tensor.dtype, tensor.rows, tensor.cols).as_bytes());
        let len = tensor.bytes.len().min(SAMPLE);
        match tensor.stored {
            // Not by the mapping: that would bring much more of the file, and a file
            // cut short would end the process.
            Some(Stored { file, offset }) => {
                let mut sample = [0; SAMPLE];
                file.read(&mut sample[..len], offset).map_err(DeviceError::System)?;
                hasher.update(&sample[..len]);
            }
            None => drop(hasher.update(&tensor.bytes[..len])),
        }
        if let Some(scales) = tensor.scales {
            hasher.update(format!("{:?}", scales.block).as_bytes());
            for scale in scales.values.iter().take(SAMPLE) {
                hasher.update(&scale.to_le_bytes());
            }
        }
        Ok(())
    };
    add(Param::Embedding)?;
    for layer in 0..config.layers {
        use LayerParam as P;
        for param in [P::AttentionNorm, P::Q, P::K, P::V, P::O, P::MlpNorm, P::Gate, P::Up, P::Down] {
            add(Param::Layer(layer, param))?;
        }
    }
    add(Param::FinalNorm)?;
    add(Param::LmHead)?;
    Ok(*hasher.finalize().as_bytes())
}
