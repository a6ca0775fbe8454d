//! `distkv bench fabric`: what the fabric's transports do to latency and
//! bandwidth, beside a bare socket's in the same run.
//!
//! Two sides, by default two processes, spin. A ping-pong posts a write with
//! notification and waits for the peer's; a stream posts writes as fast as a
//! window of unacknowledged ones allows. The floor beside tcp is the least that
//! a socket can do: `send` and spinning `recv` of as many bytes, nothing else.
//! tcp is measured sealed, as nodes use it, and insecure.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use distkv_fabric::secure::{Secret, Security};
use distkv_fabric::select::{Kind, Options};
use distkv_fabric::{Access, Address, Error, Event, Memory, Notify, PeerId, RegionId, RemoteKey, Transport, Write};
use hdrhistogram::Histogram;

use crate::cli::options::RdmaOptions;

use super::report::{Output, Report, histogram};

/// Measures latency, bandwidth and message rate of the fabric's transports.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:\n  distkv bench fabric\n  distkv bench fabric --transport shm --size 64,4096 \
                        --plot shm.svg\n  distkv bench fabric --json - --seconds 1")]
pub struct Args {
    /// Transports to measure.
    #[arg(
        long,
        env = "DISTKV_BENCH_TRANSPORT",
        value_delimiter = ',',
        default_value = "loopback,shm,tcp,tcp-insecure"
    )]
    pub transport: Vec<Subject>,
    /// Sizes of a write, bytes.
    #[arg(long, env = "DISTKV_BENCH_SIZE", value_delimiter = ',', default_value = "8,64,512,4096,65536,1048576")]
    pub size: Vec<usize>,
    /// Time for each measurement, seconds.
    #[arg(long, env = "DISTKV_BENCH_SECONDS", default_value_t = 0.5)]
    pub seconds: f64,
    /// Run both sides as threads of one process (loopback always does).
    #[arg(long, env = "DISTKV_BENCH_THREADS")]
    pub threads: bool,
    /// RDMA ports. Of two devices each side of verbs takes one.
    #[command(flatten)]
    pub rdma: RdmaOptions,
    #[command(flatten)]
    /// Where the results go.
    pub output: Output,
    /// The second process: the address to connect to.
    #[arg(long, hide = true, requires = "subject")]
    pub peer: Option<String>,
    /// The second process: what is measured.
    #[arg(long, hide = true)]
    pub subject: Option<Subject>,
}

/// A transport as it is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subject {
    kind: Kind,
    insecure: bool,
}

impl Subject {
    fn bind(self, rdma: &RdmaOptions, first: bool) -> Result<Box<dyn Transport>> {
        // It guards noughts and ones for the time of a measurement.
        let secret = Secret::new(*b"the same at both sides of a test");
        let security = if self.insecure { Security::Insecure } else { Security::Sealed(secret) };
        let mut rdma = rdma.config()?;
        if let [one, other] = &rdma.devices[..] {
            rdma.devices = vec![if first { one.clone() } else { other.clone() }];
        }
        Ok(self.kind.bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), &Options { security, rdma })?)
    }
}

impl std::str::FromStr for Subject {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "tcp-insecure" => Ok(Self { kind: Kind::Tcp, insecure: true }),
            name => Ok(Self { kind: name.parse()?, insecure: false }),
        }
    }
}

impl std::fmt::Display for Subject {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}{}", self.kind, if self.insecure { "-insecure" } else { "" })
    }
}

/// Bytes of each side's landing region; writes rotate through a part of it.
const REGION: usize = 64 << 20;
/// Places a ping-pong rotates through: a mailbox's slots.
const SLOTS: usize = 8;
/// Unacknowledged writes of a stream, and how many one acknowledgement covers.
const WINDOW: u64 = 256;
const ACK: u64 = 32;
/// Round trips in a turn, and the fewest turns. Transport and floor take turns
/// this short so that a disturbance hits both.
const TURN: u32 = 200;
const MIN_TURNS: u32 = 5;
/// A spinner lets others have its core after this time, and sleeps after a
/// hundred times as long.
const PATIENCE: Duration = Duration::from_micros(10);
/// Round trips that are not counted.
const WARM: u32 = 200;

/// Runs the benchmark.
pub fn run(args: Args) -> Result<()> {
    if let (Some(address), Some(subject)) = (&args.peer, args.subject) {
        return serve(subject, &args.rdma, Address(address.clone()));
    }
    let largest = args.size.iter().copied().max().unwrap_or(0);
    ensure!(args.size.iter().all(|s| *s > 0), "--size must be at least 1 byte");
    ensure!(largest <= REGION / SLOTS, "--size must be at most {} bytes", REGION / SLOTS);
    ensure!(args.seconds > 0.0 && args.seconds <= 600.0, "--seconds must be between 0 and 600");
    let mut report = Report::new(format!(
        "fabric: write with notification there and back; two spinning {}, {} cores",
        if args.threads { "threads" } else { "processes" },
        std::thread::available_parallelism().map_or(1, usize::from),
    ));
    for subject in &args.transport {
        measure(*subject, &args, &mut report).with_context(|| format!("measuring {subject}"))?;
    }
    report.emit(&args.output)
}

/// The other side: a process or a thread, ended with this value.
enum Other {
    Process(Child),
    Thread(Option<std::thread::JoinHandle<Result<()>>>),
}

impl Other {
    fn start(subject: Subject, address: &Address, args: &Args) -> Result<Self> {
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
        Ok(Self::Process(command.spawn().context("cannot start the second process")?))
    }

    /// Waits for its end after it was told to quit.
    fn join(mut self) -> Result<()> {
        match &mut self {
            Self::Process(child) => {
                let status = child.wait()?;
                ensure!(status.success(), "the second process failed: {status}");
                Ok(())
            }
            Self::Thread(thread) => match thread.take().map(std::thread::JoinHandle::join) {
                Some(Ok(result)) => result,
                _ => Err(anyhow!("the second thread failed")),
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

fn measure(subject: Subject, args: &Args, report: &mut Report) -> Result<()> {
    let mut side = Side::new(subject, &args.rdma, true)?;
    let other = Other::start(subject, &side.transport.address(), args)?;
    side.meet()?;
    let budget = Duration::from_secs_f64(args.seconds);
    let mut floor = if subject.kind == Kind::Tcp { Some(side.open_floor()?) } else { None };
    for &size in &args.size {
        eprintln!("{subject}: {size} B");
        side.ping(size, WARM, &mut histogram())?;
        let (mut own, mut bare) = (histogram(), histogram());
        // By time and not by count: on a busy machine a spinner gets its core
        // only now and then.
        let rounds = if size > 64 << 10 { TURN / 10 } else { TURN };
        let (start, mut turns) = (Instant::now(), 0);
        while turns < MIN_TURNS || start.elapsed() < budget {
            turns += 1;
            side.ping(size, rounds, &mut own)?;
            if let Some(stream) = &mut floor {
                side.ping_floor(stream, size, rounds, &mut bare)?;
            }
        }
        if floor.is_some() {
            let ratio = |q: f64| own.value_at_quantile(q) as f64 / bare.value_at_quantile(q).max(1) as f64;
            report.figure(format!("{subject} {} / bare socket, min", human(size)), ratio(0.0), "×");
            report.figure(format!("{subject} {} / bare socket, p50", human(size)), ratio(0.5), "×");
        }
        report.latency(format!("{subject} {}", human(size)), own);
        if floor.is_some() {
            report.latency(format!("bare socket beside {subject} {}", human(size)), bare);
        }
        let (writes, seconds) = side.stream(size, budget)?;
        let rate = writes as f64 / seconds;
        report.figure(format!("{subject} {} stream", human(size)), rate * size as f64 / 1e9, "GB/s");
        report.figure(format!("{subject} {} stream", human(size)), rate / 1e6, "M writes/s");
    }
    side.tell("quit")?;
    other.join()
}

fn human(bytes: usize) -> String {
    match bytes {
        b if b >= 1 << 20 && b.is_multiple_of(1 << 20) => format!("{} MiB", b >> 20),
        b if b >= 1 << 10 && b.is_multiple_of(1 << 10) => format!("{} KiB", b >> 10),
        b => format!("{b} B"),
    }
}

/// The second side: does what it is told until it is told to quit.
fn serve(subject: Subject, rdma: &RdmaOptions, address: Address) -> Result<()> {
    let mut side = Side::new(subject, rdma, false)?;
    side.peer = Some(side.transport.connect(&address, b"bench")?);
    side.exchange_keys()?;
    let mut floor = None;
    loop {
        let order = String::from_utf8(side.hear()?).context("an order that is no text")?;
        let words: Vec<_> = order.split_whitespace().collect();
        match words[..] {
            ["ping", size, rounds] => side.pong(size.parse()?, rounds.parse()?)?,
            ["stream", writes] => side.drain(writes.parse()?)?,
            ["floor", port] => floor = Some(bare(TcpStream::connect((Ipv4Addr::LOCALHOST, port.parse()?))?)?),
            ["floor-ping", size, rounds] => {
                let stream = floor.as_mut().context("a floor that was not opened")?;
                pong_floor(stream, size.parse()?, rounds.parse()?)?;
            }
            ["quit"] => return Ok(()),
            _ => bail!("an order not known: {order}"),
        }
    }
}

/// One side of the benchmark.
struct Side {
    transport: Box<dyn Transport>,
    peer: Option<PeerId>,
    /// Source of our writes.
    local: RegionId,
    /// Our landing region and the peer's.
    landing: RegionId,
    remote: RemoteKey,
    heard: VecDeque<Vec<u8>>,
    /// Notifications seen, and those of them that were waited for.
    notified: u64,
    awaited: u64,
    closed: Option<Error>,
    _memory: [Arc<Memory>; 2],
}

impl Side {
    fn new(subject: Subject, rdma: &RdmaOptions, first: bool) -> Result<Self> {
        let mut transport = subject.bind(rdma, first)?;
        let (source, target) = (Memory::new(REGION)?, Memory::new(REGION)?);
        // Touched now, so that no page fault is measured.
        for memory in [&source, &target] {
            (0..REGION).step_by(4096).try_for_each(|at| memory.write(at, &[1]))?;
        }
        let local = transport.register(&source, Access::LocalOnly)?;
        let landing = transport.register(&target, Access::RemoteWrite)?;
        Ok(Self {
            transport,
            peer: None,
            local,
            landing,
            remote: RemoteKey(Vec::new()),
            heard: VecDeque::new(),
            notified: 0,
            awaited: 0,
            closed: None,
            _memory: [source, target],
        })
    }

    fn poll(&mut self) -> Result<()> {
        let Self { transport, peer, heard, notified, closed, .. } = self;
        transport.poll(&mut |event| match event {
            Event::Notified { .. } => *notified += 1,
            Event::Message { payload, .. } => heard.push_back(payload.to_vec()),
            Event::Accepted { peer: new, .. } => *peer = Some(new),
            Event::Connected { .. } => {}
            Event::Closed { reason, .. } => *closed = Some(reason),
        })?;
        match self.closed.take() {
            Some(reason) => Err(reason).context("the other side is gone"),
            None => Ok(()),
        }
    }

    fn peer(&self) -> Result<PeerId> {
        self.peer.context("no peer yet")
    }

    /// Waits for the other side to connect.
    fn meet(&mut self) -> Result<()> {
        let start = Instant::now();
        while self.peer.is_none() {
            ensure!(start.elapsed() < Duration::from_secs(20), "the second side did not connect");
            self.transport.wait(Duration::from_millis(50))?;
            self.poll()?;
        }
        self.exchange_keys()
    }

    fn exchange_keys(&mut self) -> Result<()> {
        let key = self.transport.remote_key(self.landing)?;
        let peer = self.peer()?;
        self.transport.send(peer, &key.0)?;
        self.remote = RemoteKey(self.hear()?);
        Ok(())
    }

    fn tell(&mut self, order: &str) -> Result<()> {
        let peer = self.peer()?;
        Ok(self.transport.send(peer, order.as_bytes())?)
    }

    fn hear(&mut self) -> Result<Vec<u8>> {
        loop {
            if let Some(payload) = self.heard.pop_front() {
                return Ok(payload);
            }
            self.transport.wait(Duration::from_secs(1))?;
            self.poll()?;
        }
    }

    /// Spins until one more notification has come.
    fn await_notified(&mut self) -> Result<()> {
        self.awaited += 1;
        let start = Instant::now();
        let mut polls = 0u32;
        while self.notified < self.awaited {
            self.poll()?;
            polls = polls.wrapping_add(1);
            // Where cores are short the other side, or the kernel's own work for
            // a transport, may be waiting for this one.
            if polls.is_multiple_of(16) {
                match start.elapsed() {
                    idle if idle > 100 * PATIENCE => self.transport.wait(Duration::from_millis(50))?,
                    idle if idle > PATIENCE => std::thread::yield_now(),
                    _ => {}
                }
            }
        }
        Ok(())
    }

    fn write(&mut self, peer: PeerId, at: usize, size: usize) -> Result<()> {
        let write = Write {
            local: self.local,
            local_offset: at as u64,
            len: size as u64,
            remote: &self.remote,
            remote_offset: at as u64,
            notify: Some(Notify(size as u32)),
        };
        loop {
            match self.transport.write(peer, write) {
                Err(Error::Full { .. }) => {}
                posted => return Ok(posted?),
            }
            // Not by `poll`, which wants the whole of `self`.
            let Self { transport, notified, closed, .. } = self;
            transport.poll(&mut |event| match event {
                Event::Notified { .. } => *notified += 1,
                Event::Closed { reason, .. } => *closed = Some(reason),
                _ => {}
            })?;
            if let Some(reason) = self.closed.take() {
                return Err(reason).context("the other side is gone");
            }
        }
    }

    fn ping(&mut self, size: usize, rounds: u32, into: &mut Histogram<u64>) -> Result<()> {
        self.tell(&format!("ping {size} {rounds}"))?;
        let peer = self.peer()?;
        for i in 0..rounds as usize {
            let start = Instant::now();
            self.write(peer, i % SLOTS * size, size)?;
            self.await_notified()?;
            record(into, start.elapsed());
        }
        Ok(())
    }

    fn pong(&mut self, size: usize, rounds: u32) -> Result<()> {
        let peer = self.peer()?;
        for i in 0..rounds as usize {
            self.await_notified()?;
            self.write(peer, i % SLOTS * size, size)?;
        }
        Ok(())
    }

    /// Posts writes for `budget`; returns how many, and the seconds until the
    /// last was acknowledged.
    fn stream(&mut self, size: usize, budget: Duration) -> Result<(u64, f64)> {
        let peer = self.peer()?;
        // How many writes fill the time is found by doubling.
        let mut writes = ACK * 8;
        loop {
            self.tell(&format!("stream {writes}"))?;
            let start = Instant::now();
            let (places, mut posted, mut acknowledged) = ((REGION / size) as u64, 0, 0);
            while acknowledged < writes {
                if posted < writes && posted < acknowledged + WINDOW {
                    self.write(peer, (posted % places) as usize * size, size)?;
                    posted += 1;
                    continue;
                }
                self.await_notified()?;
                acknowledged += ACK;
            }
            let took = start.elapsed();
            if took >= budget / 2 {
                return Ok((writes, took.as_secs_f64()));
            }
            let grow = budget.as_secs_f64() / took.as_secs_f64().max(1e-9);
            writes = (writes as f64 * grow.clamp(2.0, 100.0)) as u64 / ACK * ACK;
        }
    }

    /// Acknowledges every [`ACK`] of the other side's writes.
    fn drain(&mut self, writes: u64) -> Result<()> {
        let peer = self.peer()?;
        for i in 1..=writes {
            self.await_notified()?;
            if i.is_multiple_of(ACK) {
                self.write(peer, 0, 8)?;
            }
        }
        Ok(())
    }

    fn open_floor(&mut self) -> Result<TcpStream> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        self.tell(&format!("floor {}", listener.local_addr()?.port()))?;
        bare(listener.accept()?.0)
    }

    fn ping_floor(
        &mut self,
        stream: &mut TcpStream,
        size: usize,
        rounds: u32,
        into: &mut Histogram<u64>,
    ) -> Result<()> {
        self.tell(&format!("floor-ping {size} {rounds}"))?;
        // As much memory as the transport's slots: the cache helps both alike.
        let (source, mut target) = (vec![1; size * SLOTS], vec![1; size * SLOTS]);
        // The order takes its time to arrive; the first round trip waits for it.
        for i in 0..=rounds {
            let at = i as usize % SLOTS * size;
            let start = Instant::now();
            send_all(stream, &source[at..at + size])?;
            receive_all(stream, &mut target[at..at + size])?;
            if i > 0 {
                record(into, start.elapsed());
            }
        }
        Ok(())
    }
}

fn record(into: &mut Histogram<u64>, took: Duration) {
    into.saturating_record(took.as_nanos() as u64);
}

fn bare(stream: TcpStream) -> Result<TcpStream> {
    stream.set_nodelay(true)?;
    stream.set_nonblocking(true)?;
    Ok(stream)
}

fn pong_floor(stream: &mut TcpStream, size: usize, rounds: u32) -> Result<()> {
    let (source, mut target) = (vec![1; size * SLOTS], vec![1; size * SLOTS]);
    for i in 0..=rounds {
        let at = i as usize % SLOTS * size;
        receive_all(stream, &mut target[at..at + size])?;
        send_all(stream, &source[at..at + size])?;
    }
    Ok(())
}

fn send_all(stream: &mut TcpStream, mut bytes: &[u8]) -> Result<()> {
    while !bytes.is_empty() {
        match stream.write(bytes) {
            Ok(sent) => bytes = &bytes[sent..],
            Err(e) if e.kind() == ErrorKind::WouldBlock => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

fn receive_all(stream: &mut TcpStream, bytes: &mut [u8]) -> Result<()> {
    let mut got = 0;
    while got < bytes.len() {
        match stream.read(&mut bytes[got..]) {
            Ok(0) => bail!("the other side is gone"),
            Ok(n) => got += n,
            Err(e) if e.kind() == ErrorKind::WouldBlock => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_transport_is_measured_in_one_process() {
        let subjects = ["loopback", "shm", "tcp", "tcp-insecure"].map(|name| name.parse::<Subject>().unwrap());
        let args = Args {
            transport: subjects.to_vec(),
            size: vec![8, 4096],
            seconds: 0.002,
            threads: true,
            rdma: RdmaOptions::default(),
            output: Output::default(),
            peer: None,
            subject: None,
        };
        let mut report = Report::new("test");
        for subject in subjects {
            assert_eq!(subject.to_string().parse(), Ok(subject));
            measure(subject, &args, &mut report).unwrap();
        }
        let table = report.table();
        for line in [
            "loopback 4 KiB",
            "shm 8 B",
            "tcp 4 KiB",
            "bare socket beside tcp-insecure 8 B",
            "tcp 8 B / bare socket, min",
        ] {
            assert!(table.contains(line), "{line} is missing in\n{table}");
        }
    }
}
