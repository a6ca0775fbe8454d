//! The command line: one file a subcommand.

pub mod bench;
pub mod doctor;
pub mod generate;
pub mod model;
pub mod options;
pub mod serve;
pub mod sim;
pub mod status;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

/// RDMA-first LLM serving: the KV cache of all nodes is one pool.
#[derive(Parser)]
#[command(name = "distkv", version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// What to log to stderr, e.g. `info` or `distkv::attention=debug`.
    #[arg(long, global = true, env = "DISTKV_LOG", default_value = "warn")]
    log: String,
}

#[derive(Subcommand)]
enum Command {
    /// Run one engine node: OpenAI-compatible HTTP, and its share of the cluster.
    Serve(Box<serve::Args>),
    /// Complete a prompt and stream the text, on one node or a cluster on this machine.
    Generate(Box<generate::Args>),
    /// Look into a model's files, or make one with random weights.
    Model(model::Args),
    /// Measure: latencies as histograms, and the share of what the machine can do.
    Bench(Box<bench::Args>),
    /// Simulate a cluster: the real control plane under virtual time, with faults.
    Sim(Box<sim::Args>),
    /// Show the cluster as any node sees it.
    Status(status::Args),
    /// Say what of this machine can be used, and why the rest cannot.
    Doctor(doctor::Args),
}

/// Parses the arguments and runs. An error is one line on stderr that says what
/// to do, and a non-zero exit code.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let filter = match EnvFilter::try_new(&cli.log) {
        Ok(filter) => filter,
        Err(error) => return fail(&anyhow::anyhow!("--log {}: {error}", cli.log)),
    };
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false).init();
    let result = match cli.command {
        Command::Serve(args) => serve::run(*args),
        Command::Bench(args) => bench::run(*args),
        Command::Model(args) => model::run(args),
        Command::Generate(args) => generate::run(*args),
        Command::Sim(args) => sim::run(*args),
        Command::Status(args) => status::run(args),
        Command::Doctor(args) => doctor::run(args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

fn fail(error: &anyhow::Error) -> ExitCode {
    // Causes joined, so that the line says what was tried and what stopped it.
    eprintln!("distkv: {error:#}");
    ExitCode::FAILURE
}
