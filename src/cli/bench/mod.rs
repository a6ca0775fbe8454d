//! `distkv bench`: measurements with HDR histograms.

pub mod attention;
pub mod fabric;
pub mod gossip;
mod kv;
pub mod model;
pub mod report;

use clap::Subcommand;

/// Arguments of `distkv bench`.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// MicroAttention over paged KV beside the machine's read bandwidth.
    Attention(attention::Args),
    /// Latency, bandwidth and message rate of the fabric's transports.
    Fabric(fabric::Args),
    /// The ledger's spread, its cost and the detection of deaths, simulated.
    Gossip(gossip::Args),
    /// Prefill and decode of a model by batch and depth beside its memory floor.
    Model(Box<model::Args>),
}

/// Runs the subcommand.
pub fn run(args: Args) -> anyhow::Result<()> {
    match args.what {
        What::Attention(args) => attention::run(args),
        What::Fabric(args) => fabric::run(args),
        What::Gossip(args) => gossip::run(args),
        What::Model(args) => model::run(*args),
    }
}
