//! A second side: a process or a thread that does what it is told.

use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;

use anyhow::{Context, Result, anyhow, bail, ensure};
use distkv_fabric::Address;
use distkv_fabric::select::Kind;

use crate::cli::options::RdmaOptions;

use super::Args;
use super::floor::Floor;
use super::side::Side;
use super::subject::Subject;

/// A second side, ended with this value.
pub(super) enum Other {
    Process(Child),
    Thread(Option<JoinHandle<Result<()>>>),
}

impl Other {
    pub fn start(subject: Subject, address: &Address, args: &Args) -> Result<Self> {
        if args.threads || subject.kind == Kind::Loopback {
            let (address, rdma) = (address.clone(), args.rdma.clone());
            return Ok(Self::Thread(Some(std::thread::spawn(move || serve(subject, &rdma, address)))));
        }
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["bench", "fabric", "--peer", &address.0, "--subject", &subject.to_string()]);
        if !args.rdma.verbs_devices.is_empty() {
            command.args(["--verbs-devices", &args.rdma.verbs_devices.join(",")]);
        }
        if let Some(index) = args.rdma.verbs_gid_index {
            command.args(["--verbs-gid-index", &index.to_string()]);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null());
        Ok(Self::Process(command.spawn().context("cannot start a second process")?))
    }

    /// Waits for its end after it was told to quit.
    pub fn join(mut self) -> Result<()> {
        match &mut self {
            Self::Process(child) => {
                let status = child.wait()?;
                ensure!(status.success(), "a second process failed: {status}");
                Ok(())
            }
            Self::Thread(thread) => match thread.take().map(JoinHandle::join) {
                Some(Ok(result)) => result,
                _ => Err(anyhow!("a second thread failed")),
            },
        }
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        // After `join` both do nothing.
        if let Self::Process(child) = self {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A second side's life: does what it is told until it is told to quit.
pub(super) fn serve(subject: Subject, rdma: &RdmaOptions, address: Address) -> Result<()> {
    let mut side = Side::new(subject, rdma, false)?;
    side.join(&address)?;
    let mut floor = None;
    loop {
        let order = side.hear(0)?;
        let words: Vec<_> = order.split_whitespace().collect();
        match words[..] {
            ["ping", verb, size, rounds] => {
                side.pong(verb.parse().map_err(anyhow::Error::msg)?, size.parse()?, rounds.parse()?)?;
            }
            ["drain", acknowledge] => side.drain(acknowledge.parse()?)?,
            ["floor", port] => floor = Some(Floor::connect(port.parse()?)?),
            ["floor-ping", size, rounds] => {
                floor.as_mut().context("a floor that was not opened")?.pong(size.parse()?, rounds.parse()?)?;
            }
            ["quit"] => return Ok(()),
            _ => bail!("an order not known: {order}"),
        }
    }
}
