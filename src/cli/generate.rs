//! `distkv generate`: a completion on the terminal, by one node or by a small
//! cluster inside this process.

use std::io::{IsTerminal, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use hdrhistogram::Histogram;
use serde_json::json;

use super::bench::report::Report;
use super::options::{EngineOptions, FabricOptions, open_model};
use crate::attention::exchange::Stage;
use crate::engine::{FinishReason, Output, Request};
use crate::model::sampler::SamplingParams;
use crate::node::Node;

/// Arguments of `distkv generate`.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  distkv generate --model smollm2.gguf --prompt 'The capital of France is'
  distkv generate --model DIR --chat --prompt-file book.txt --nodes 4 --kv-tokens-per-node 2048")]
pub struct Args {
    /// Model: a Hugging Face directory or a .gguf file.
    #[arg(long, env = "DISTKV_MODEL")]
    model: PathBuf,
    /// The prompt.
    #[arg(long, conflicts_with = "prompt_file")]
    prompt: Option<String>,
    /// A file with the prompt; without both, stdin.
    #[arg(long)]
    prompt_file: Option<PathBuf>,
    /// Put the prompt through the model's chat template.
    #[arg(long)]
    chat: bool,
    /// Most tokens to generate.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens: u32,
    /// 0 is greedy.
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,
    /// Nucleus.
    #[arg(long, default_value_t = 1.0)]
    top_p: f32,
    /// Same seed, same text.
    #[arg(long)]
    seed: Option<u64>,
    /// Go on after the model's end-of-text token.
    #[arg(long)]
    ignore_eos: bool,
    /// Nodes of the cluster that runs it: the first runs the model, the others lend memory.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    nodes: u32,
    /// KV memory of each node, in tokens; by default the model's longest context.
    #[arg(long)]
    kv_tokens_per_node: Option<usize>,
    /// Show what remote exchanges cost by stage.
    #[arg(long)]
    stages: bool,
    /// One JSON object instead of text.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    engine: EngineOptions,
    #[command(flatten)]
    fabric: FabricOptions,
}

/// Runs the subcommand.
pub fn run(args: Args) -> anyhow::Result<()> {
    let files = open_model(&args.model)?;
    let tokenizer = files.tokenizer.as_ref().ok_or_else(|| anyhow!("the model has no tokenizer"))?;
    let text = prompt_text(&args)?;
    let prompt = if args.chat {
        let message = json!({"role": "user", "content": text});
        tokenizer.encode(&files.chat()?.render(&[message], None, true)?, false)?
    } else {
        tokenizer.encode(&text, true)?
    };
    if prompt.is_empty() {
        bail!("the prompt is empty: give --prompt, --prompt-file or text on stdin");
    }
    let sampling = SamplingParams {
        temperature: args.temperature,
        top_p: args.top_p,
        seed: args.seed,
        ..SamplingParams::default()
    };
    sampling.validate().map_err(|e| anyhow!(e))?;

    let shape = files.config.kv_shape(args.engine.block_tokens, args.engine.kv_dtype.into());
    let tokens = args.kv_tokens_per_node.unwrap_or(files.config.max_positions);
    let kv_bytes = shape.blocks_for(tokens) * shape.block_bytes();
    let threads = args.engine.threads(1);
    let anywhere = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
    let mut config = args.fabric.node(anywhere, 1.0, 1, false)?;
    // A cluster of its own: no other process's node may wander in.
    config.cluster = format!("generate-{:016x}", rand::random::<u64>());

    let mut lenders = Vec::new();
    for _ in 1..args.nodes {
        lenders.push(Node::lender(&config, kv_bytes)?);
    }
    config.join = lenders.iter().map(|n| n.control_address().to_string()).collect();
    config.lend = 0.0;
    let loading = Instant::now();
    let node = Node::engine(&config, args.engine.model_parts(&files, Some(kv_bytes), threads)?)?;
    let load_time = loading.elapsed();
    await_members(&node, lenders.len())?;

    let mut stop_tokens = files.config.eos.clone();
    if args.ignore_eos {
        stop_tokens.clear();
    }
    let prompt_len = prompt.len();
    let request = Request {
        prompt,
        sampling,
        max_tokens: args.max_tokens as usize,
        stop_tokens,
        prompt_logprobs: false,
        resume: Vec::new(),
    };
    let handle = node.handle().ok_or_else(|| anyhow!("the node runs no model"))?;
    let started = Instant::now();
    let mut stream = handle.submit(request).map_err(|e| anyhow!(e))?;
    let mut decoder = tokenizer.stream();
    let (mut ids, mut out) = (Vec::new(), String::new());
    let mut first = None;
    let finish = loop {
        match stream.blocking_next() {
            Some(Output::Token { id, .. }) => {
                first.get_or_insert_with(|| started.elapsed());
                ids.push(id);
                if let Some(piece) = decoder.push(id)? {
                    emit(&args, &piece)?;
                    out.push_str(&piece);
                }
            }
            Some(Output::Finished { reason }) => break reason,
            Some(Output::Failed { message }) => bail!("generation failed: {message}"),
            Some(_) => {}
            None => bail!("generation failed: the engine ended"),
        }
    };
    let total = started.elapsed();
    let rest = decoder.finish();
    emit(&args, &rest)?;
    out.push_str(&rest);
    let stats = node.stats();
    let exchange = node.exchange().histograms();
    node.stop();
    lenders.into_iter().for_each(Node::stop);

    let first = first.unwrap_or(total);
    let decode = ids.len().saturating_sub(1) as f64 / (total - first).as_secs_f64().max(1e-9);
    if args.json {
        let finish = match finish {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
        };
        let timings = json!({
            "load_s": load_time.as_secs_f64(),
            "prefill_s": first.as_secs_f64(),
            "prefill_tokens_per_s": prompt_len as f64 / first.as_secs_f64(),
            "decode_tokens_per_s": decode,
            "total_s": total.as_secs_f64(),
        });
        let object = json!({
            "prompt_tokens": prompt_len,
            "tokens": ids,
            "text": out,
            "finish_reason": finish,
            "timings": timings,
            "exchange": stages_json(&exchange),
        });
        println!("{object}");
    } else {
        println!();
        eprintln!(
            "{prompt_len} prompt tokens in {:.2} s ({:.0}/s), {} generated ({decode:.1}/s), {} local rBlocks of {} tokens, {} node(s)",
            first.as_secs_f64(),
            prompt_len as f64 / first.as_secs_f64(),
            ids.len(),
            stats.blocks_total,
            shape.block_tokens,
            args.nodes,
        );
        if args.stages {
            let mut report = Report::new("cost of a remote exchange (a layer and creditor) by stage");
            exchange.into_iter().for_each(|(stage, times)| report.latency(stage.name(), times));
            eprint!("{}", report.table());
        }
    }
    Ok(())
}

fn stages_json(stages: &[(Stage, Histogram<u64>)]) -> serde_json::Value {
    let us = |ns: u64| ns as f64 / 1e3;
    stages
        .iter()
        .filter(|(_, h)| !h.is_empty())
        .map(|(stage, h)| {
            let figures = json!({
                "count": h.len(),
                "p50_us": us(h.value_at_quantile(0.5)),
                "p99_us": us(h.value_at_quantile(0.99)),
                "min_us": us(h.min()),
            });
            (stage.name().to_string(), figures)
        })
        .collect::<serde_json::Map<_, _>>()
        .into()
}

fn prompt_text(args: &Args) -> anyhow::Result<String> {
    if let Some(prompt) = &args.prompt {
        return Ok(prompt.clone());
    }
    if let Some(path) = &args.prompt_file {
        return std::fs::read_to_string(path).with_context(|| format!("--prompt-file {}", path.display()));
    }
    if std::io::stdin().is_terminal() {
        eprintln!("reading the prompt from the terminal; end it with Ctrl-D");
    }
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text).context("reading the prompt from stdin")?;
    Ok(text)
}

fn emit(args: &Args, piece: &str) -> anyhow::Result<()> {
    if args.json {
        return Ok(());
    }
    let mut out = std::io::stdout().lock();
    out.write_all(piece.as_bytes())?;
    Ok(out.flush()?)
}

/// Waits until `count` other members can be borrowed from.
fn await_members(node: &Node, count: usize) -> anyhow::Result<()> {
    let deadline = Instant::now() + Duration::from_secs(10);
    while node.view().ledger().instances.iter().filter(|i| !i.me && i.row.is_some()).count() < count {
        if Instant::now() > deadline {
            bail!("the cluster's {count} other node(s) did not join within 10 s");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
