//! `distkv bench gossip`: how the global debt ledger spreads, in virtual time:
//! the control plane's own code on a simulated network.

use std::time::Duration;

use anyhow::ensure;

use super::report::{Output, Report};
use crate::sim::gossip::{Setup, run as simulate};

/// What to measure.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:\n  distkv bench gossip --instances 16,128\n  \
                        distkv bench gossip --instances 1024 --seconds 30 --plot gossip.svg")]
pub struct Args {
    /// Cluster sizes, one simulation each.
    #[arg(long, value_delimiter = ',', default_value = "16,128,1024")]
    pub instances: Vec<usize>,
    /// Virtual seconds to look at once all know all.
    #[arg(long, default_value_t = 30)]
    pub seconds: u64,
    /// Longest delay of a datagram, microseconds.
    #[arg(long, default_value_t = 500)]
    pub delay_us: u64,
    /// Share of the datagrams that are lost.
    #[arg(long, default_value_t = 0.001)]
    pub loss: f64,
    /// Same seed, same figures.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Where the results go.
    #[command(flatten)]
    pub output: Output,
}

/// Runs them one after the other.
pub fn run(args: Args) -> anyhow::Result<()> {
    ensure!((0.0..1.0).contains(&args.loss), "--loss {}: give a share from 0 to below 1", args.loss);
    ensure!(
        args.instances.iter().all(|n| (2..=65_536).contains(n)),
        "--instances: each size must be 2 to 65536, as a simulated node is one address of 10.0/16"
    );
    let mut report = Report::new(format!(
        "gossip: every row changes whenever it may; datagrams take up to {} us, {} % are lost; virtual time",
        args.delay_us,
        args.loss * 100.0
    ));
    for &instances in &args.instances {
        let figures = simulate(Setup {
            instances,
            seed: args.seed,
            time: Duration::from_secs(args.seconds),
            delay: Duration::from_micros(args.delay_us),
            loss: args.loss,
        });
        let kib = |bytes: f64| bytes / 1024.0;
        let mean = figures.bytes_s.iter().sum::<f64>() / instances as f64;
        let most = figures.bytes_s.iter().copied().fold(0.0, f64::max);
        let joined = figures.joined.map_or(f64::NAN, |time| time.as_secs_f64());
        report.latency(format!("{instances}: a row to one node"), figures.one);
        report.latency(format!("{instances}: a row to all nodes"), figures.all);
        report.latency(format!("{instances}: a death to one node"), figures.death);
        report.figure(format!("{instances}: until all know all"), joined, "s");
        report.figure(format!("{instances}: rows made by a node"), figures.rows_s, "1/s");
        report.figure(format!("{instances}: sent by a node, mean"), kib(mean), "KiB/s");
        report.figure(format!("{instances}: sent by a node, most"), kib(most), "KiB/s");
        report.figure(format!("{instances}: taken for dead and were not"), figures.mistaken as f64, "");
    }
    report.emit(&args.output)
}
