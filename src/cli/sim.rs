//! `distkv sim`: the control plane and the schedulers on a simulated cluster.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, anyhow, bail, ensure};
use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressStyle};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde_json::json;

use crate::schedule::scheduler::SchedulerConfig;
use crate::sim::cost::CostModel;
use crate::sim::fault::{self, Timed};
use crate::sim::instance::Setup;
use crate::sim::lender::Sabotage;
use crate::sim::report::Report;
use crate::sim::workload::{self, Format, Job, Synthetic};
use crate::sim::world::{Config, World};

/// Longest span of faults by chance.
const FAULT_SPAN: Duration = Duration::from_secs(120);

/// A range of token counts: `1000-60000`, or one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tokens(u32, u32);

impl std::str::FromStr for Tokens {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| {
            let (digits, factor) = match text.strip_suffix(['k', 'K']) {
                Some(digits) => (digits, 1000),
                None => text.strip_suffix(['m', 'M']).map_or((text, 1), |digits| (digits, 1_000_000)),
            };
            let number = digits.parse::<u32>().ok().and_then(|n| n.checked_mul(factor));
            number.filter(|n| *n > 0).ok_or(format!("`{text}` is no number of tokens; write 4000, 4K or 1K-2M"))
        };
        let (least, most) = text.split_once('-').unwrap_or((text, text));
        let range = Self(number(least)?, number(most)?);
        if range.0 > range.1 { Err(format!("`{text}` begins above its end")) } else { Ok(range) }
    }
}

/// What the pooled cluster is compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Baseline {
    /// The same instances, none lending to another.
    Isolated,
    /// All instances as one tensor-parallel whole.
    Static,
}

/// Formats of traces.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TraceFormat {
    /// TIMESTAMP,ContextTokens,GeneratedTokens
    Azure,
    /// JSON lines: timestamp, input_length, output_length, hash_ids
    Mooncake,
    /// Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
    Burstgpt,
}

/// Simulate a cluster: the real control plane and schedulers under virtual
/// time, every token checked.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:\n  distkv sim --small --seeds 100\n  \
                        distkv sim --instances 8 --trace conversation.jsonl --cost a100 --baseline isolated\n  \
                        distkv sim --instances 32 --requests 500 --prompt 1K-60K --long 60K-2M --long-share 0.02 \\\n      \
                        --baseline static --json\n  \
                        distkv sim --instances 32 --cost a100 --longest")]
pub struct Args {
    /// Instances.
    #[arg(long, env = "DISTKV_SIM_INSTANCES", default_value_t = 8)]
    instances: usize,
    /// Seed of everything that is left to chance.
    #[arg(long, env = "DISTKV_SIM_SEED", default_value_t = 1)]
    seed: u64,
    /// Worlds to run, with this many seeds from --seed on.
    #[arg(long, value_name = "COUNT", default_value_t = 1)]
    seeds: u64,
    /// Small worlds in which much goes wrong; the seed says the rest.
    #[arg(long)]
    small: bool,
    /// What breaks: `default` (by chance), `none`, or a JSON file
    /// [{"at_ms": 5000, "fault": {"crash": {"node": 1, "back_ms": 3000}}}].
    #[arg(long, value_name = "default|none|FILE", default_value = "none")]
    faults: String,
    /// A trace of requests; without one they are made from the seed.
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Its format; told by its first line unless given.
    #[arg(long)]
    format: Option<TraceFormat>,
    /// Most requests.
    #[arg(long)]
    requests: Option<usize>,
    /// Requests a second of those made from the seed; a trace's times are kept.
    #[arg(long, default_value_t = 1.0)]
    rate: f64,
    /// A trace runs this many times as fast.
    #[arg(long, default_value_t = 1.0)]
    speed: f64,
    /// Tokens of a prompt made from the seed.
    #[arg(long, value_name = "A-B", default_value = "1K-60K")]
    prompt: Tokens,
    /// Tokens of its answer.
    #[arg(long, value_name = "A-B", default_value = "50-500")]
    answer: Tokens,
    /// Share of requests, also of a trace, that are long instead.
    #[arg(long, default_value_t = 0.0)]
    long_share: f64,
    /// Tokens of a long prompt.
    #[arg(long, value_name = "A-B", default_value = "200K-1M")]
    long: Tokens,
    /// How long things take: a100 (7B), a100-13b, h200 (8B), or a JSON file.
    #[arg(long, value_name = "NAME|FILE", default_value = "a100")]
    cost: String,
    /// Share of its memory that each instance lends.
    #[arg(long, default_value_t = 0.9)]
    lend: f64,
    /// Most prompt tokens of a step.
    #[arg(long, default_value_t = 2048)]
    chunk: usize,
    /// Most sequences of a step.
    #[arg(long, default_value_t = 256)]
    sequences: usize,
    /// Also run the same requests on this, and compare.
    #[arg(long)]
    baseline: Option<Baseline>,
    /// Instead: find the longest context that one instance and all together
    /// can answer.
    #[arg(long)]
    longest: bool,
    /// Write the first world's log to FILE.
    #[arg(long, value_name = "FILE")]
    world_log: Option<PathBuf>,
    /// Print the figures as JSON; the same seed gives the same bytes.
    #[arg(long)]
    json: bool,
}

/// Runs the worlds and prints what was seen. An error if an invariant broke.
pub fn run(args: Args) -> anyhow::Result<()> {
    ensure!(args.instances > 0 && args.instances <= 256, "--instances from 1 to 256");
    ensure!((0.0..=1.0).contains(&args.lend) && (0.0..=1.0).contains(&args.long_share), "shares are from 0 to 1");
    ensure!(args.speed > 0.0 && args.rate > 0.0, "--speed and --rate are above 0");
    ensure!(args.chunk > 0 && args.sequences > 0, "--chunk and --sequences are above 0");
    let cost = cost(&args.cost)?;
    if args.longest {
        return longest(&args, &cost);
    }
    let trace = args.trace.as_deref().map(|path| trace(&args, path)).transpose()?;
    let mut reports = Vec::new();
    let mut log = args.world_log.clone();
    for seed in args.seed..args.seed.saturating_add(args.seeds) {
        let config = match args.small {
            true => Config::small(seed, Sabotage::None),
            false => config(&args, &cost, seed, trace.as_deref())?,
        };
        let baseline = args.baseline.map(|baseline| against(&config, baseline));
        for config in [Some(config), baseline].into_iter().flatten() {
            let config = Config { keep_log: log.is_some(), ..config };
            let outcome = watched(config);
            if let Some(path) = log.take() {
                std::fs::write(&path, outcome.log).with_context(|| format!("--world-log {}", path.display()))?;
            }
            reports.push(outcome.report);
        }
    }
    let ratio = args.baseline.map(|_| compare(&reports));
    if args.json {
        let cost = if args.small { None } else { Some(&cost) };
        println!("{:#}", json!({ "cost": cost, "runs": reports, "throughput_ratio": ratio }));
    } else if reports.len() <= 4 {
        reports.iter().for_each(print);
        if let Some(ratio) = ratio {
            println!("throughput of the pooled over the other: {ratio:.3}");
        }
    } else {
        summary(&reports);
    }
    verdict(&reports)
}

fn verdict(reports: &[Report]) -> anyhow::Result<()> {
    match reports.iter().find_map(|report| report.violation.as_ref()) {
        None => Ok(()),
        Some(v) => {
            let ms = v.at_ns as f64 / 1e6;
            bail!("an invariant broke: seed {}, event {} at {ms:.3} ms ({}): {}", v.seed, v.event, v.what, v.broken)
        }
    }
}

fn cost(name: &str) -> anyhow::Result<CostModel> {
    if let Some(cost) = CostModel::preset(name) {
        return Ok(cost);
    }
    let text = std::fs::read_to_string(name)
        .with_context(|| format!("--cost {name} is neither a100, a100-13b or h200, nor a file that can be read"))?;
    let cost: CostModel = serde_json::from_str(&text).with_context(|| format!("--cost {name}"))?;
    cost.check().map_err(|error| anyhow!("--cost {name}: {error}"))?;
    Ok(cost)
}

fn trace(args: &Args, path: &Path) -> anyhow::Result<Vec<Job>> {
    let shown = path.display();
    let text = std::fs::read_to_string(path).with_context(|| format!("--trace {shown}"))?;
    let first = text.lines().next().unwrap_or_default();
    let format = match args.format {
        Some(TraceFormat::Azure) => Format::Azure,
        Some(TraceFormat::Mooncake) => Format::Mooncake,
        Some(TraceFormat::Burstgpt) => Format::BurstGpt,
        None if first.trim_start().starts_with('{') => Format::Mooncake,
        None if first.contains("ContextTokens") => Format::Azure,
        None if first.contains("Request tokens") => Format::BurstGpt,
        None => bail!("--trace {shown}: its first line tells no format; name one with --format"),
    };
    let jobs = workload::read(format, &text, args.requests.unwrap_or(usize::MAX));
    let mut jobs = jobs.map_err(|error| anyhow!("--trace {shown}: {error}"))?;
    jobs.iter_mut().for_each(|job| job.at = job.at.div_f64(args.speed));
    Ok(jobs)
}

fn config(args: &Args, cost: &CostModel, seed: u64, trace: Option<&[Job]>) -> anyhow::Result<Config> {
    let synthetic = Synthetic {
        requests: args.requests.unwrap_or(200),
        rate: args.rate,
        prompt: (args.prompt.0, args.prompt.1),
        answer: (args.answer.0, args.answer.1),
        long_share: args.long_share,
        long: (args.long.0, args.long.1),
    };
    let jobs = match trace {
        None => synthetic.jobs(seed),
        Some(trace) => {
            let mut jobs = trace.to_vec();
            synthetic.lengthen(&mut jobs, seed);
            jobs
        }
    };
    let span = jobs.last().map_or(Duration::ZERO, |job| job.at).min(FAULT_SPAN);
    let faults: Vec<Timed> = match args.faults.as_str() {
        "none" => Vec::new(),
        "default" => fault::chance(&mut ChaCha8Rng::seed_from_u64(seed ^ 0xfa17), args.instances, span),
        file => {
            let text = std::fs::read_to_string(file)
                .with_context(|| format!("--faults {file} is neither default or none, nor a file that can be read"))?;
            fault::read(&text, args.instances).map_err(|error| anyhow!("--faults {file}: {error}"))?
        }
    };
    let schedule = SchedulerConfig {
        max_rows: args.chunk + args.sequences,
        chunk_rows: args.chunk,
        max_logits: args.sequences,
        max_sequences: args.sequences,
        replicas: 1,
        move_blocks: 8,
    };
    let lease = Duration::from_secs(10);
    let setup = Setup { cost: cost.clone(), lend: args.lend, lease, schedule, sabotage: Sabotage::None };
    Ok(Config {
        mode: "pooled".into(),
        seed,
        instances: args.instances,
        every_event: cost.blocks <= 512,
        setup,
        jobs,
        faults,
        keep_log: false,
        patience: Duration::from_secs(6 * 3600),
        give_up: false,
    })
}

/// The same requests on what the pooled cluster is compared with.
fn against(pooled: &Config, baseline: Baseline) -> Config {
    let mut config = pooled.clone();
    config.setup.lend = 0.0;
    match baseline {
        Baseline::Isolated => config.mode = "isolated".into(),
        Baseline::Static => {
            config.mode = "static".into();
            config.setup.cost = config.setup.cost.whole(config.instances as u32);
            let schedule = &mut config.setup.schedule;
            let sequences = schedule.max_sequences * config.instances;
            schedule.max_rows = schedule.chunk_rows + sequences;
            (schedule.max_sequences, schedule.max_logits) = (sequences, sequences);
            config.instances = 1;
            // Whatever broke one broke the whole.
            config.faults.clear();
        }
    }
    config
}

/// Pooled over baseline, the mean over all seeds.
fn compare(reports: &[Report]) -> f64 {
    let ratios: Vec<_> = reports.chunks_exact(2).map(|pair| pair[0].tokens_s / pair[1].tokens_s).collect();
    ratios.iter().sum::<f64>() / ratios.len().max(1) as f64
}

fn watched(config: Config) -> crate::sim::world::Outcome {
    let count = config.jobs.len();
    let bar = ProgressBar::new(count as u64);
    if let Ok(style) = ProgressStyle::with_template("{prefix} {bar:30} {pos}/{len} requests, {elapsed}") {
        bar.set_style(style);
    }
    bar.set_prefix(format!("seed {} {}", config.seed, config.mode));
    let outcome = World::new(config).run_with(|open| bar.set_position((count - open) as u64));
    bar.finish_and_clear();
    outcome
}

/// Finds the longest context of one instance and of all.
fn longest(args: &Args, cost: &CostModel) -> anyhow::Result<()> {
    let block = cost.block_tokens;
    let alone = cost.blocks * block;
    let answers = |instances: usize, tokens: u32| -> anyhow::Result<bool> {
        let job = Job { at: Duration::ZERO, prompt: tokens - 16, answer: 16, shared: Vec::new(), shared_tokens: 0 };
        let args = Args { instances, faults: "none".into(), long_share: 0.0, ..args.clone() };
        let config = config(&args, cost, args.seed, Some(&[job]))?;
        let report = watched(Config { give_up: true, ..config }).report;
        verdict(std::slice::from_ref(&report))?;
        Ok(report.finished == 1)
    };
    let find = |instances: usize| -> anyhow::Result<u32> {
        let (mut good, mut bad) = (32, alone.saturating_mul(instances as u32) + 1);
        // A step of the search is a world, and a large one where the context is
        // long: so it begins near what the memory would hold.
        let fine = block.max(alone / 512);
        let mut below = 2 * fine;
        while bad - good > below {
            let guess = bad - below;
            if answers(instances, guess)? {
                good = guess;
                break;
            }
            bad = guess;
            below *= 4;
        }
        while bad - good > fine {
            let middle = good + (bad - good) / 2;
            if answers(instances, middle)? { good = middle } else { bad = middle }
        }
        Ok(good)
    };
    let (one, all) = (find(1)?, find(args.instances)?);
    let ratio = f64::from(all) / f64::from(one);
    if args.json {
        println!("{:#}", json!({ "instances": args.instances, "alone": one, "pooled": all, "ratio": ratio }));
    } else {
        let n = args.instances;
        println!("one instance {one} tokens, {n} pooled {all}: {ratio:.2} times ({:.3} of {n})", ratio / n as f64);
    }
    Ok(())
}

fn print(r: &Report) {
    println!("{} of {} instances, seed {}", r.mode, r.instances, r.seed);
    println!("  requests     {} answered, {} too long, {} tried again", r.finished, r.too_long, r.retries);
    println!("  throughput   {:.1} tokens/s ({:.1} generated) over {:.1} s", r.tokens_s, r.generated_s, r.seconds);
    println!("  context      {} tokens the longest", r.longest);
    for (name, t) in [("first token", r.first_token_ms), ("whole", r.whole_ms), ("between", r.between_ms)] {
        println!("  {name:<12} p50 {:.1}  p90 {:.1}  p99 {:.1}  max {:.1} ms", t.p50, t.p90, t.p99, t.max);
    }
    println!("  loans        {} given, {} refused, {} lapsed, {} lost", r.loans, r.refused, r.lapsed, r.lost);
    println!("  data         {} rBlocks moved, {} exchanges, {} bytes", r.moves, r.exchanges, r.lane_bytes);
    println!("  control      {} messages, {} bytes", r.control_messages, r.control_bytes);
    println!(
        "  recovery     {} sequences, {} tokens computed again, {} preempted",
        r.recoveries, r.recomputed, r.preemptions
    );
    println!("  world        {} events, {} faults, log {}", r.events, r.faults, r.log_hash);
}

fn summary(reports: &[Report]) {
    let sum = |of: fn(&Report) -> u64| reports.iter().map(of).sum::<u64>();
    let broken = reports.iter().filter(|r| r.violation.is_some()).count();
    println!("{} worlds, {broken} with a broken invariant, {} events", reports.len(), sum(|r| r.events));
    println!("  requests     {} answered, {} too long", sum(|r| r.finished as u64), sum(|r| r.too_long as u64));
    println!("  loans        {} given, {} lapsed, {} lost", sum(|r| r.loans), sum(|r| r.lapsed), sum(|r| r.lost));
    println!("  data         {} rBlocks moved, {} exchanges", sum(|r| r.moves), sum(|r| r.exchanges));
    println!("  failed       {} times closed, {} recoveries", sum(|r| r.failed_closed), sum(|r| r.recoveries));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_ranges_read() {
        assert_eq!("1K-2M".parse(), Ok(Tokens(1000, 2_000_000)));
        assert_eq!("50".parse(), Ok(Tokens(50, 50)));
        assert!("9-1".parse::<Tokens>().is_err() && "0".parse::<Tokens>().is_err() && "x".parse::<Tokens>().is_err());
    }
}
