//! `distkv serve`: one node of a cluster.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use distkv_fabric::verbs::device::{Near, SYSFS};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

use super::options::{Bytes, EngineOptions, FabricOptions, open_model};
use crate::attention::exchange::Stage;
use crate::control::message::Role;
use crate::control::view::LedgerView;
use crate::device::cuda::driver;
use crate::engine::{EngineHandle, EngineStats};
use crate::ingress::{Identity, Ingress, IngressStats, Keys, Runner};
use crate::model::hf::GenerationDefaults;
use crate::model::load::ModelFiles;
use crate::model::sampler::SamplingParams;
use crate::node::device::DeviceName;
use crate::node::rank::{self, Rank};
use crate::node::{ClusterView, Node, NodeConfig};
use crate::server::{Model, ModelText, ServerState};

/// Arguments of `distkv serve`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  distkv serve --model smollm2.gguf --listen 127.0.0.1:8000 --fabric-listen 127.0.0.1:7946
  distkv serve --no-model --kv-memory 64GiB --listen 127.0.0.1:8001 --join 127.0.0.1:7946
  mpirun -np 3 distkv serve --model DIR      # rank 0 on the fabric port, the others join it

What nodes say to each other is sealed under the cluster's key. Without --cluster-key-file whoever
knows the cluster's name can join.")]
pub struct Args {
    /// Model: a Hugging Face directory or a .gguf file.
    #[arg(long, env = "DISTKV_MODEL", required_unless_present = "no_model", conflicts_with = "no_model")]
    model: Option<PathBuf>,
    /// Run no model: lend memory to the others.
    #[arg(long, env = "DISTKV_NO_MODEL")]
    no_model: bool,
    /// Name under which the model is served; by default its file's.
    #[arg(long, env = "DISTKV_SERVED_MODEL_NAME")]
    served_model_name: Option<String>,
    /// HTTP address. Under a launcher the local rank is added to the port.
    #[arg(long, env = "DISTKV_LISTEN", default_value = "127.0.0.1:8000")]
    listen: SocketAddr,
    /// Where other nodes reach this one. Port 0 takes any free one; under a
    /// launcher rank 0 listens on port 7946 unless told otherwise.
    #[arg(long, env = "DISTKV_FABRIC_LISTEN")]
    fabric_listen: Option<SocketAddr>,
    /// Fabric addresses (host:port) of nodes to join; one is enough.
    #[arg(long, env = "DISTKV_JOIN", value_delimiter = ',')]
    join: Vec<String>,
    /// KV memory, e.g. 8GiB; by default all that the model leaves of a GPU's
    /// memory, else a quarter of what the system has free.
    #[arg(long, env = "DISTKV_KV_MEMORY")]
    kv_memory: Option<Bytes>,
    /// Host memory beside a GPU's, e.g. 64GiB: what a request has no room for on
    /// the GPU lies there, and is attended to there by the host's cores
    /// (--creditor-threads). Other nodes may borrow it too.
    #[arg(long, env = "DISTKV_HOST_KV_MEMORY")]
    host_kv_memory: Option<Bytes>,
    /// KV memory in tokens of the model, instead of --kv-memory.
    #[arg(long, env = "DISTKV_KV_TOKENS", conflicts_with = "kv_memory")]
    kv_tokens: Option<usize>,
    /// Share of the KV memory that may be lent; a node without a model lends all.
    #[arg(long, env = "DISTKV_LEND", value_parser = share)]
    lend: Option<f64>,
    /// Threads that answer queries over lent memory.
    #[arg(long, env = "DISTKV_CREDITOR_THREADS", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    creditor_threads: u16,
    /// Key that clients must send as a bearer token.
    #[arg(long, env = "DISTKV_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// Where requests run: on the instance that the ledger says has room, or
    /// always here. With `local` none is taken in for other nodes either.
    #[arg(long, env = "DISTKV_PLACE", value_enum, default_value_t)]
    place: Placing,
    /// Other members to wait for before the node is ready.
    #[arg(long, env = "DISTKV_MIN_MEMBERS", default_value_t = 0)]
    min_members: usize,
    #[command(flatten)]
    engine: EngineOptions,
    #[command(flatten)]
    fabric: FabricOptions,
}

/// Where requests run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
enum Placing {
    /// Where the ledger says that there is room, here if it is all the same.
    #[default]
    Ledger,
    /// On the node that they were sent to.
    Local,
}

fn share(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|v| (0.0..=1.0).contains(v)).ok_or_else(|| format!("`{text}` is not a number from 0 to 1"))
}

const LAUNCHED_FABRIC_PORT: u16 = 7946;
/// A node that drains waits this long for what is lent to become less.
const DRAIN_PATIENCE: Duration = Duration::from_secs(10);

/// Runs the subcommand until SIGTERM or SIGINT, or until the device is lost, which
/// is an error.
pub fn run(args: Args) -> anyhow::Result<()> {
    if args.host_kv_memory.is_some() && (args.no_model || args.engine.device == DeviceName::Cpu) {
        bail!("--host-kv-memory is for a model on a GPU (--device cuda:0); here all memory is the host's: --kv-memory");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("server")
        .enable_all()
        .build()
        .context("starting the server's threads")?;
    let rank = rank::discover(|name| std::env::var(name).ok()).map_err(|e| anyhow!("rank environment: {e}"))?;
    let mut listen = args.listen;
    if let Some(rank) = &rank
        && listen.port() != 0
    {
        let port = u32::from(listen.port()) + rank.local_rank;
        listen.set_port(
            u16::try_from(port)
                .map_err(|_| anyhow!("--listen {listen}: no port is left for local rank {}", rank.local_rank))?,
        );
    }
    // Taken before the model is loaded: a port in use is found out at once, and
    // /health answers while weights load.
    let listener = runtime.block_on(TcpListener::bind(listen)).with_context(|| format!("--listen {listen}"))?;
    let config = node_config(&args, rank.as_ref(), listener.local_addr()?)?;

    let files = args.model.as_deref().map(open_model).transpose()?;
    let kv_bytes = kv_bytes(&args, files.as_ref())?;
    let node = match &files {
        Some(files) => {
            let local = rank.as_ref().map_or(1, |r| r.local_size as usize);
            Node::engine(&config, args.engine.model_parts(files, kv_bytes, args.engine.threads(local))?)?
        }
        None => Node::lender(&config, kv_bytes.unwrap_or(0))?,
    };
    let host_tier = host_tier(&args, &config, &node)?;
    let ready = Arc::new(AtomicBool::new(false));
    let state = state(&args, files, &node, ready.clone())?;
    eprintln!(
        "distkv: instance {} on {}; http://{} fabric {}",
        node.instance(),
        node.describe(),
        listener.local_addr()?,
        node.control_address()
    );
    for node in [Some(&node), host_tier.as_ref()].into_iter().flatten() {
        if let Some(pages) = node.pages() {
            eprintln!("distkv: KV memory of {} on {pages}", node.instance());
        }
    }
    let (drain, lost) = (node.drainer(), node.lost());
    let wanted = args.min_members.max(rank.as_ref().map_or(0, |r| r.size as usize - 1));
    let wanted = wanted + usize::from(host_tier.is_some());
    let view = node.view().clone();
    runtime.block_on(async {
        let announce = async {
            while view.ledger().instances.iter().filter(|i| !i.me && i.row.is_some()).count() < wanted {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            ready.store(true, Ordering::Release);
            eprintln!("distkv: ready");
            std::future::pending::<()>().await;
        };
        // From the signal on, debtors move what lies here elsewhere, while this
        // node's own requests finish.
        let ending = lost.clone();
        let terminated = async move {
            // The engine has said why, and has failed its requests.
            tokio::select! {
                () = terminated() => {}
                _ = ending.wait() => {}
            }
            eprintln!("distkv: draining");
            drain();
        };
        let serve = crate::server::serve(listener, state, terminated);
        tokio::select! {
            result = serve => result.context("serving HTTP"),
            () = announce => Ok(()),
        }
    })?;
    rehomed(node.view());
    if let Some(host) = &host_tier {
        host.drain();
        rehomed(host.view());
    }
    node.stop();
    if let Some(host) = host_tier {
        host.stop();
    }
    // A launcher is to start another.
    match lost.reason() {
        Some(reason) => bail!("ended because {reason}"),
        None => Ok(()),
    }
}

/// Host memory beside an engine on a GPU: a lender in this process. The engine
/// borrows from it as from any other, and its KV there is attended to by this
/// host's cores, where it lies.
fn host_tier(args: &Args, config: &NodeConfig, node: &Node) -> anyhow::Result<Option<Node>> {
    let Some(bytes) = args.host_kv_memory else { return Ok(None) };
    let config = NodeConfig {
        join: vec![node.control_address().to_owned()],
        fabric_listen: SocketAddr::new(config.fabric_listen.ip(), 0),
        peers: None,
        lend: 1.0,
        ..config.clone()
    };
    Ok(Some(Node::lender(&config, bytes.0)?))
}

/// Waits until nothing is lent or borrowed any more, as long as it becomes less.
/// What is lent still is lost to its debtors, who compute it again.
fn rehomed(view: &ClusterView) {
    let (mut least, mut since) = (u32::MAX, Instant::now());
    while !view.drained() {
        let left = view.with(|ledger| {
            let own = ledger.instances.iter().find(|i| i.me).and_then(|i| i.row.as_ref());
            own.map_or(0, |row| row.lent + row.borrowed)
        });
        if left < least {
            (least, since) = (left, Instant::now());
        }
        if since.elapsed() > DRAIN_PATIENCE {
            tracing::warn!(blocks = left, "leaving although rBlocks are still lent or borrowed");
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

async fn terminated() {
    let (term, int) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()));
    match (term, int) {
        (Ok(mut term), Ok(mut int)) => tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        },
        _ => {
            tracing::error!("signals cannot be watched; end this node with SIGKILL");
            std::future::pending::<()>().await;
        }
    }
}

fn node_config(args: &Args, rank: Option<&Rank>, http: SocketAddr) -> anyhow::Result<NodeConfig> {
    let mut join: Vec<String> = args.join.clone();
    let mut fabric = args.fabric_listen.unwrap_or(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0));
    if let Some(rank) = rank
        && join.is_empty()
        && rank.size > 1
    {
        let master = rank.master.clone().unwrap_or_else(|| "127.0.0.1".into());
        let port = args.fabric_listen.map_or(LAUNCHED_FABRIC_PORT, |a| a.port());
        if rank.rank == 0 {
            fabric.set_port(port);
        } else {
            fabric.set_port(0);
            join.push(format!("{master}:{port}"));
        }
        if args.fabric_listen.is_none() && rank.local_size < rank.size {
            fabric.set_ip(local_ip_towards(&format!("{master}:{port}"))?);
        }
    } else if args.fabric_listen.is_none()
        && let Some(first) = join.first()
    {
        fabric.set_ip(local_ip_towards(first)?);
    }
    if fabric.ip().is_unspecified() {
        bail!("--fabric-listen {fabric}: others are told this address, so name the interface's own");
    }
    let lend = args.lend.unwrap_or(if args.no_model { 1.0 } else { 0.5 });
    let mut config =
        args.fabric.node(fabric, lend, args.creditor_threads.into(), !args.engine.no_pin && rank.is_none())?;
    config.rank = rank.map_or(0, |r| r.rank);
    if let DeviceName::Cuda(ordinal) = args.engine.device
        && !args.no_model
        && args.fabric.rdma.near.is_none()
    {
        config.rdma.near = near_gpu(ordinal);
    }
    config.http = http.to_string();
    config.peers = peer_address(args, http, fabric.ip());
    config.join = join
        .iter()
        .map(|text| {
            let address = text.strip_prefix("tcp://").unwrap_or(text);
            let resolved = address.to_socket_addrs().with_context(|| format!("--join {text}: not a host:port"))?.next();
            resolved.map(|a| format!("tcp://{a}")).ok_or_else(|| anyhow!("--join {text}: the name has no address"))
        })
        .collect::<anyhow::Result<_>>()?;
    Ok(config)
}

/// Where a GPU is, for the choice of RDMA ports. A GPU that cannot be asked, or
/// that the system does not show, is found missing elsewhere or matters not.
fn near_gpu(ordinal: usize) -> Near {
    let near = driver::address(ordinal).map(Near::Pci).unwrap_or_default();
    if near.place(Path::new(SYSFS)).is_ok() { near } else { Near::Anywhere }
}

/// Where other nodes hand requests to this one, if they can.
fn peer_address(args: &Args, http: SocketAddr, fabric: IpAddr) -> Option<SocketAddr> {
    if args.no_model || args.place == Placing::Local {
        return None;
    }
    if http.ip().is_unspecified() {
        return Some(SocketAddr::new(fabric, http.port()));
    }
    if http.ip().is_loopback() && !fabric.is_loopback() {
        eprintln!(
            "distkv: --listen {http} is out of other nodes' reach: this node takes no requests in for them; give \
             --listen an address of the network, or --place local"
        );
        return None;
    }
    Some(http)
}

/// Our address on the interface that leads to `target`. Nothing is sent.
fn local_ip_towards(target: &str) -> anyhow::Result<IpAddr> {
    let address = target.strip_prefix("tcp://").unwrap_or(target);
    let target = address.to_socket_addrs().with_context(|| format!("{target}: not a host:port"))?.next();
    let target = target.ok_or_else(|| anyhow!("{address}: the name has no address"))?;
    let any: IpAddr =
        if target.is_ipv4() { IpAddr::V4(Ipv4Addr::UNSPECIFIED) } else { std::net::Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).context("finding the interface towards the other nodes")?;
    socket.connect(target).with_context(|| format!("no route to {target}"))?;
    Ok(socket.local_addr()?.ip())
}

fn kv_bytes(args: &Args, files: Option<&ModelFiles>) -> anyhow::Result<Option<usize>> {
    if let Some(tokens) = args.kv_tokens {
        let Some(files) = files else { bail!("--kv-tokens needs a model to know a token's size; use --kv-memory") };
        let shape = files.config.kv_shape(args.engine.block_tokens, args.engine.kv_dtype.into());
        return Ok(Some(shape.blocks_for(tokens) * shape.block_bytes()));
    }
    if let Some(bytes) = args.kv_memory {
        return Ok(Some(bytes.0));
    }
    if files.is_some() && args.engine.device != DeviceName::Cpu {
        return Ok(None);
    }
    let meminfo =
        std::fs::read_to_string("/proc/meminfo").context("reading how much memory is free; give --kv-memory")?;
    let available = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = available.and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse::<usize>().ok());
    let kib = kib.ok_or_else(|| anyhow!("the system does not say how much memory is free; give --kv-memory"))?;
    Ok(Some(kib * 1024 / 4))
}

fn state(
    args: &Args,
    files: Option<ModelFiles>,
    node: &Node,
    ready: Arc<AtomicBool>,
) -> anyhow::Result<Arc<ServerState>> {
    let ingress = IngressStats::default();
    let (model, runner) = match files {
        Some(files) => {
            let (model, runner) = served_model(args, files, node, &ingress)?;
            (Some(model), runner)
        }
        None => (None, None),
    };
    let (view, stats, me) = (node.view().clone(), node.stats_source(), node.instance().to_string());
    let name = model.as_ref().map(|m| m.name.clone());
    let exchange = node.exchange().clone();
    let cluster_stats = stats.clone();
    let requests = ingress.clone();
    let cluster = Arc::new(move || {
        let mut cluster = cluster_json(&view, &cluster_stats(), &me, name.as_deref());
        let stages = exchange.histograms();
        let stages = stages.iter().filter(|(_, h)| !h.is_empty());
        let figures = |h: &hdrhistogram::Histogram<u64>| {
            let us = |q: f64| h.value_at_quantile(q) as f64 / 1e3;
            json!({"count": h.len(), "p50": us(0.5), "p99": us(0.99), "max": h.max() as f64 / 1e3})
        };
        let stages: serde_json::Map<String, Value> =
            stages.map(|(s, h)| (Stage::name(*s).into(), figures(h))).collect();
        cluster["exchange_us"] = Value::Object(stages);
        let stats = cluster_stats();
        let control = view.ledger().control;
        cluster["moves"] = json!({
            "sent_blocks": stats.blocks_sent,
            "fetched_blocks": stats.blocks_fetched,
            "planned_for_throughput": control.planned_throughput,
            "planned_for_debt_circles": control.planned_circles,
            "planned_for_short_creditors": control.planned_short,
            "planned_for_leaving_creditors": control.planned_leaves,
        });
        cluster["recovery"] = json!({
            "recoveries": stats.recoveries,
            "recomputed_tokens": stats.recomputed_tokens,
            "unreplicated_blocks": stats.unreplicated_blocks,
            "partials_rejected": stats.partials_rejected,
        });
        cluster["requests"] = requests.json();
        cluster
    });
    let state = ServerState::new(model, stats, cluster, ready).with_api_key(args.api_key.as_deref());
    let state = state.with_runner(runner);
    state.metrics().register(|registry| ingress.register(registry));
    Ok(Arc::new(state))
}

/// The model as clients ask for it, and what runs it for other nodes.
fn served_model(
    args: &Args,
    files: ModelFiles,
    node: &Node,
    stats: &IngressStats,
) -> anyhow::Result<(Model, Option<Arc<Runner>>)> {
    let tokenizer = files.tokenizer.ok_or_else(|| anyhow!("the model has no tokenizer: HTTP clients send text"))?;
    let mut engine = node.handle().cloned().ok_or_else(|| anyhow!("the node runs no model"))?;
    let defaults = defaults(&files.generation);
    defaults.validate().map_err(|e| anyhow!("generation_config: {e}"))?;
    let max_len = args.engine.max_model_len.unwrap_or(files.config.max_positions);
    let mut runner = None;
    if let (Placing::Ledger, Some(model)) = (args.place, node.model()) {
        let identity = Identity {
            instance: node.instance(),
            model,
            vocab: files.config.vocab,
            block_tokens: args.engine.block_tokens,
            max_model_len: max_len,
        };
        let keys = || Keys::new(peer_key(node, args.api_key.as_deref()));
        let directory = Arc::new(node.view().clone());
        let local = engine.clone();
        runner = Some(Arc::new(Runner::new(identity.clone(), local, keys(), directory.clone(), stats.clone())));
        let ingress = Ingress::new(identity, Arc::new(engine), keys(), directory, stats.clone());
        engine = EngineHandle::new(Arc::new(ingress));
    }
    let model = Model {
        engine,
        text: Arc::new(ModelText::new(tokenizer, files.chat)),
        name: args.served_model_name.clone().unwrap_or_else(|| files.name.clone()),
        aliases: if args.served_model_name.is_some() { vec![files.name] } else { Vec::new() },
        max_len,
        vocab: files.config.vocab,
        eos: files.config.eos,
        defaults,
    };
    Ok((model, runner))
}

/// The key between nodes. The API key is part of it, where there is one: a
/// cluster's key that only comes of its name must be no way round it.
fn peer_key(node: &Node, api_key: Option<&str>) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key("distkv key between nodes of one api key v1");
    hasher.update(&node.peer_key()).update(api_key.unwrap_or_default().as_bytes());
    *hasher.finalize().as_bytes()
}

fn defaults(generation: &GenerationDefaults) -> SamplingParams {
    let usual = SamplingParams::default();
    SamplingParams {
        temperature: if generation.do_sample == Some(false) {
            0.0
        } else {
            generation.temperature.unwrap_or(usual.temperature)
        },
        top_p: generation.top_p.unwrap_or(usual.top_p),
        top_k: generation.top_k.unwrap_or(usual.top_k),
        min_p: generation.min_p.unwrap_or(usual.min_p),
        repetition_penalty: generation.repetition_penalty.unwrap_or(usual.repetition_penalty),
        ..usual
    }
}

/// `/cluster`: the ledger as this node knows it.
fn cluster_json(view: &ClusterView, stats: &EngineStats, me: &str, model: Option<&str>) -> Value {
    let ledger: LedgerView = view.ledger();
    let instances: Vec<Value> = ledger
        .instances
        .iter()
        .map(|i| {
            let row = i.row.as_ref();
            let mut entry = json!({
                "id": i.id,
                "rank": row.map(|r| r.rank),
                "role": row.map(|r| r.role),
                "model": match row.map(|r| r.role) {
                    Some(Role::Engine) if i.me => json!(model),
                    Some(Role::Engine) => {
                        json!(row.and_then(|r| r.model.as_ref()).map(|m| format!("#{}", &m[..12.min(m.len())])))
                    }
                    Some(Role::Lender) | None => Value::Null,
                },
                "http": row.map(|r| &r.http),
                "peers": row.and_then(|r| r.peers.as_ref()),
                "life": i.life,
                "row_version": row.map(|r| r.version),
                "state": row.map(|r| r.service),
                "blocks_total": row.map(|r| r.total),
                "blocks_free": row.map(|r| r.free),
                "blocks_lent": row.map(|r| r.lent),
                "blocks_borrowed": row.map(|r| r.borrowed),
                "lend_cap": row.map(|r| r.lend_cap),
                "lendable_bytes": row.map(|r| r.shapeable_bytes),
                "block_tokens": row.and_then(|r| r.shape).map(|s| s.block_tokens),
                "running": row.map(|r| r.running),
                "waiting": row.map(|r| r.waiting),
                "tokens_s": row.map(|r| r.tokens_s),
                "tiers": row.map(|r| &r.tiers),
                "perf": row.and_then(|r| r.perf),
                "links": row.map(|r| &r.links),
                "row_age_ms": i.row_age_ms,
            });
            if i.me {
                entry["blocks_cached"] = json!(stats.blocks_cached);
            }
            entry
        })
        .collect();
    let loans: Vec<Value> = ledger
        .loans
        .iter()
        .map(|l| json!({"id": l.loan, "debtor": l.debtor, "creditor": l.creditor, "request": l.request, "blocks": l.blocks, "epoch": l.epoch}))
        .collect();
    let links: Vec<Value> = ledger
        .links
        .iter()
        .map(|l| json!({"from": l.from, "to": l.to, "transport": "control over tcp", "age_ms": l.age_ms, "rtt_us": l.rtt_us}))
        .collect();
    json!({
        "self": me,
        "instances": instances,
        "loans": loans,
        "debts": ledger.debts,
        "links": links,
        "decisions": ledger.decisions,
        "control": ledger.control,
    })
}
