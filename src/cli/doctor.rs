//! `distkv doctor`: what of this machine can be used, and why the rest cannot.

mod gpu;
mod machine;
mod rdma;

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::PathBuf;

use anyhow::{Context, anyhow, bail};
use distkv_fabric::secure::Security;
use distkv_fabric::select::Kind;
use distkv_fabric::tcp;
use distkv_fabric::verbs::device::SYSFS;

use super::options::RdmaOptions;
use serde::Serialize;

/// Look at this machine: fabric transports, RDMA devices, limits, processor.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Ends with exit code 0 if nodes on this machine can be reached by any transport.\n\n\
                        Examples:\n  distkv doctor\n  distkv doctor --near 0000:17:00.0 --rails 2\n  \
                        distkv doctor --json | jq .verbs")]
pub struct Args {
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    /// RDMA ports.
    pub rdma: RdmaOptions,
    /// Where the kernel shows its devices.
    #[arg(long, hide = true, default_value = SYSFS)]
    pub sysfs: PathBuf,
}

/// All that was found.
#[derive(Serialize)]
struct Report {
    version: &'static str,
    transports: Vec<TransportLine>,
    verbs: rdma::Verbs,
    gpus: gpu::Gpus,
    machine: machine::Machine,
}

/// Can a transport be used here?
#[derive(Serialize)]
struct TransportLine {
    name: &'static str,
    usable: bool,
    /// What it joins and how; or why it cannot.
    because: String,
    /// What is used in its place.
    next: Option<&'static str>,
}

/// Prints what was found on stdout. An error where nothing joins two processes.
pub fn run(args: Args) -> anyhow::Result<()> {
    let config = args.rdma.config()?;
    let place = config.near.place(&args.sysfs).map_err(|fault| anyhow!("--near: {fault}"))?;
    let verbs = rdma::look(&args.sysfs, &place, &config);
    let mut transports: Vec<TransportLine> =
        Kind::ALL.into_iter().filter(|kind| *kind != Kind::Verbs).map(probe).collect();
    transports.push(verbs_line(&verbs));
    let usable = transports.iter().any(|line| line.usable && line.name != Kind::Loopback.name());
    let machine = machine::look(&args.sysfs, verbs.needs_locked_memory());
    let gpus = gpu::look(&verbs.found);
    let report = Report { version: env!("CARGO_PKG_VERSION"), transports, verbs, gpus, machine };
    let text = if args.json { serde_json::to_string_pretty(&report)? + "\n" } else { render(&report) };
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        // `doctor | head` is done when head is.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {}
        written => written.context("cannot write the report")?,
    }
    if !usable {
        bail!("no transport joins two processes here; the lines above say why");
    }
    Ok(())
}

/// Tries a transport by making one.
fn probe(kind: Kind) -> TransportLine {
    let nowhere = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
    let made = kind.bind(nowhere, &Security::Insecure.into());
    let because = match (&made, kind) {
        (Err(error), _) => error.to_string(),
        (Ok(_), Kind::Tcp) if tcp::batches() => "any two hosts; many receives in one call, by io_uring".into(),
        (Ok(_), Kind::Tcp) => "any two hosts; a call for each receive, as this system allows no io_uring".into(),
        (Ok(_), Kind::Shm) => "processes of one user on one host".into(),
        (Ok(_), Kind::Loopback) => "nodes in one process".into(),
        (Ok(_), Kind::Verbs) => "hosts that an RDMA network joins".into(),
    };
    let next = match kind {
        Kind::Shm if made.is_err() => Some(Kind::Tcp.name()),
        _ => None,
    };
    TransportLine { name: kind.name(), usable: made.is_ok(), because, next }
}

/// Usable where this machine has a port for it.
fn verbs_line(verbs: &rdma::Verbs) -> TransportLine {
    let (usable, because) = match verbs.ports() {
        Ok(ports) => (true, format!("RDMA between hosts, over {ports}")),
        Err(because) => (false, because),
    };
    TransportLine { name: rdma::NAME, usable, because, next: (!usable).then_some(Kind::Tcp.name()) }
}

/// What people read.
fn render(report: &Report) -> String {
    let mut out = format!("distkv {}\n\nFABRIC\n", report.version);
    for line in &report.transports {
        let (mark, next) = (if line.usable { "yes" } else { "no" }, line.next);
        let next = next.map_or(String::new(), |next| format!("; next: {next}"));
        let _ = writeln!(out, "  {:<10}{mark:<5}{}{next}", line.name, line.because);
    }
    out += "\nRDMA\n";
    report.verbs.render(&mut out);
    out += "\nGPU\n";
    report.gpus.render(&mut out);
    out += "\nMACHINE\n";
    report.machine.render(&mut out);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_alone_makes_no_transport() {
        let line = verbs_line(&rdma::Verbs::failed("no library".into()));
        assert!(!line.usable);
        assert_eq!((line.because.as_str(), line.next), ("no library", Some("tcp")));
    }
}
