//! `distkv bench fabric`: what the fabric's transports do to latency,
//! bandwidth and message rate, beside a bare socket's latency in the same run.
//!
//! Sides, by default processes, spin. A ping-pong posts a write with
//! notification, or a message, and waits for the peer's; a stream posts as fast
//! as a window of unacknowledged ones allows. With several peers the one side
//! pings them in turns and streams to all of them at once. tcp is measured
//! sealed, as nodes use it, and insecure.

mod floor;
mod other;
mod patience;
mod side;
mod stream;
mod subject;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use distkv_fabric::Address;
use distkv_fabric::select::Kind;
use hdrhistogram::Histogram;

use crate::cli::options::RdmaOptions;

use super::report::{Output, Report, histogram};
use floor::Floor;
use other::{Other, serve};
use side::Side;
use stream::stream;
use subject::{Subject, Verb};

/// Measures latency, bandwidth and message rate of the fabric's transports.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:\n  distkv bench fabric\n  distkv bench fabric --transport shm --size 64,4096 \
                        --plot shm.svg\n  distkv bench fabric --transport tcp --verb send --peers 4\n  \
                        distkv bench fabric --json - --seconds 1")]
pub struct Args {
    /// Transports to measure.
    #[arg(
        long,
        env = "DISTKV_BENCH_TRANSPORT",
        value_delimiter = ',',
        default_value = "loopback,shm,tcp,tcp-insecure"
    )]
    pub transport: Vec<Subject>,
    /// What is posted: writes with notification, or messages, which are 1 MiB
    /// at most.
    #[arg(long, env = "DISTKV_BENCH_VERB", value_enum, value_delimiter = ',', default_value = "write,send")]
    pub verb: Vec<Verb>,
    /// Sizes of a write or a message, bytes, to 16 MiB.
    #[arg(
        long,
        env = "DISTKV_BENCH_SIZE",
        value_delimiter = ',',
        default_value = "8,64,512,4096,65536,1048576,16777216"
    )]
    pub size: Vec<usize>,
    /// Peers of the measuring side.
    #[arg(long, env = "DISTKV_BENCH_PEERS", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=8))]
    pub peers: u8,
    /// Time for each measurement, seconds.
    #[arg(long, env = "DISTKV_BENCH_SECONDS", default_value_t = 0.5)]
    pub seconds: f64,
    /// Places that the writes of a stream rotate through; usually all that 64 MiB
    /// hold. perftest has one, which stays in the caches.
    #[arg(long, env = "DISTKV_BENCH_PLACES", value_parser = clap::value_parser!(u32).range(1..))]
    pub places: Option<u32>,
    /// Run all sides as threads of one process (loopback always does).
    #[arg(long, env = "DISTKV_BENCH_THREADS")]
    pub threads: bool,
    /// RDMA ports. Of two devices each side of verbs takes one.
    #[command(flatten)]
    pub rdma: RdmaOptions,
    #[command(flatten)]
    /// Where the results go.
    pub output: Output,
    /// A second process: the address to connect to.
    #[arg(long, hide = true, requires = "subject")]
    pub peer: Option<String>,
    /// A second process: what is measured.
    #[arg(long, hide = true)]
    pub subject: Option<Subject>,
}

/// Bytes of each side's landing region; writes rotate through it.
const REGION: usize = 64 << 20;
/// Largest size, so that there are places to rotate through.
const MAX_SIZE: usize = 16 << 20;
/// Places a ping-pong rotates through: a mailbox's slots.
const SLOTS: usize = 8;
/// Round trips in a turn, and the fewest turns. Transport and floor take turns
/// this short so that a disturbance hits both.
const TURN: u32 = 200;
const MIN_TURNS: u32 = 5;
/// Round trips that are not counted.
const WARM: u32 = 200;

/// Runs the benchmark.
pub fn run(args: Args) -> Result<()> {
    if let (Some(address), Some(subject)) = (&args.peer, args.subject) {
        return serve(subject, &args.rdma, Address(address.clone()));
    }
    ensure!(args.size.iter().all(|s| *s > 0), "--size must be at least 1 byte");
    ensure!(args.size.iter().all(|s| *s <= MAX_SIZE), "--size must be at most {MAX_SIZE} bytes");
    ensure!(args.seconds > 0.0 && args.seconds <= 600.0, "--seconds must be between 0 and 600");
    let mut report = Report::new(format!(
        "fabric: there and back; {} spinning {}, {} cores",
        args.peers + 1,
        if args.threads { "threads" } else { "processes" },
        std::thread::available_parallelism().map_or(1, usize::from),
    ));
    if let Some(places) = args.places {
        report.note(format!("a stream's writes rotate through {places} places at most"));
    }
    for subject in &args.transport {
        measure(*subject, &args, &mut report).with_context(|| format!("measuring {subject}"))?;
    }
    report.emit(&args.output)
}

fn measure(subject: Subject, args: &Args, report: &mut Report) -> Result<()> {
    let mut side = Side::new(subject, &args.rdma, true)?;
    let peers = usize::from(args.peers);
    let others: Vec<_> = (0..peers).map(|_| Other::start(subject, &side.address(), args)).collect::<Result<_>>()?;
    side.meet(peers)?;
    let mut floors = Vec::new();
    if subject.kind == Kind::Tcp {
        for link in 0..peers {
            floors.push(Floor::open(|port| side.tell(link, &format!("floor {port}")))?);
        }
    }
    for verb in &args.verb {
        for &size in &args.size {
            let name = format!("{subject} {} {}", verb.name(), human(size));
            match verb.limit() {
                Some(limit) if size > limit => {
                    report.note(format!("{name}: not measured, a {} carries at most {}", verb.name(), human(limit)));
                }
                _ => measure_size(&mut side, &mut floors, &name, *verb, size, args, report)?,
            }
        }
    }
    (0..peers).try_for_each(|link| side.tell(link, "quit"))?;
    others.into_iter().try_for_each(Other::join)
}

fn measure_size(
    side: &mut Side,
    floors: &mut [Floor],
    name: &str,
    verb: Verb,
    size: usize,
    args: &Args,
    report: &mut Report,
) -> Result<()> {
    eprintln!("{name}");
    let budget = Duration::from_secs_f64(args.seconds);
    let peers = side.links.len();
    let rounds = match size {
        0..=0x1_0000 => TURN,
        0x1_0001..=0x10_0000 => TURN / 10,
        _ => TURN / 100,
    };
    side.prepare(verb, size);
    for link in 0..peers {
        side.ping(link, verb, size, WARM.min(rounds * 2), &mut histogram())?;
    }
    let (mut own, mut bare) = (histogram(), histogram());
    // By time and not by count: on a busy machine a spinner gets its core only
    // now and then.
    let (start, mut turns) = (Instant::now(), 0);
    while turns < MIN_TURNS.max(args.peers.into()) || start.elapsed() < budget {
        let link = turns as usize % peers;
        turns += 1;
        side.ping(link, verb, size, rounds, &mut own)?;
        if let Some(floor) = floors.get_mut(link) {
            side.tell(link, &format!("floor-ping {size} {rounds}"))?;
            floor.ping(size, rounds, &mut bare)?;
        }
    }
    if !floors.is_empty() {
        let ratio = |q: f64| own.value_at_quantile(q) as f64 / bare.value_at_quantile(q).max(1) as f64;
        report.figure(format!("{name} / bare socket, min"), ratio(0.0), "×");
        report.figure(format!("{name} / bare socket, p50"), ratio(0.5), "×");
        report.latency(format!("bare socket beside {name}"), bare);
    }
    report.latency(name, own);
    // What is not warm yet is not measured.
    let places = args.places.map_or(REGION / size, |places| (REGION / size).min(places as usize));
    stream(side, verb, size, places, budget / 10)?;
    let flow = stream(side, verb, size, places, budget)?;
    let to = if peers > 1 { format!(" to {peers}") } else { String::new() };
    report.figure(format!("{name} stream{to}"), flow.rate() * size as f64 / 1e9, "GB/s");
    report.figure(format!("{name} stream{to}"), flow.rate(), format!("{}s/s", verb.name()));
    if peers > 1 {
        let (slowest, fastest) = flow.extremes();
        report.figure(format!("{name} stream{to}, slowest peer"), slowest * size as f64 / 1e9, "GB/s");
        report.figure(format!("{name} stream{to}, fastest peer"), fastest * size as f64 / 1e9, "GB/s");
        report.figure(format!("{name} stream{to}, slowest / fastest"), slowest / fastest.max(1.0), "×");
    }
    Ok(())
}

/// Places a ping-pong rotates through: a mailbox's slots, or what has room.
fn slots(size: usize) -> usize {
    SLOTS.min(REGION / size)
}

fn human(bytes: usize) -> String {
    match bytes {
        b if b >= 1 << 20 && b.is_multiple_of(1 << 20) => format!("{} MiB", b >> 20),
        b if b >= 1 << 10 && b.is_multiple_of(1 << 10) => format!("{} KiB", b >> 10),
        b => format!("{b} B"),
    }
}

/// Round trips that follow one another.
struct Lap {
    start: Instant,
    /// Of one that has ended and is not noted.
    took: Option<Duration>,
}

impl Lap {
    /// The first begins now.
    fn new() -> Self {
        Self { start: Instant::now(), took: None }
    }

    /// One ends, the next begins.
    fn end(&mut self) {
        let now = Instant::now();
        self.took = Some(now - self.start);
        self.start = now;
    }

    /// Notes what has ended.
    fn note(&mut self, into: &mut Histogram<u64>) {
        if let Some(took) = self.took.take() {
            into.saturating_record(took.as_nanos() as u64);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(peers: u8) -> Args {
        Args {
            transport: Vec::new(),
            verb: vec![Verb::Write, Verb::Send],
            size: vec![8, 4096],
            peers,
            seconds: 0.002,
            places: None,
            threads: true,
            rdma: RdmaOptions::default(),
            output: Output::default(),
            peer: None,
            subject: None,
        }
    }

    fn table(subjects: &[&str], args: &Args) -> String {
        let mut report = Report::new("test");
        for name in subjects {
            let subject: Subject = name.parse().unwrap();
            assert_eq!(subject.to_string().parse(), Ok(subject));
            measure(subject, args, &mut report).unwrap();
        }
        report.table()
    }

    fn must_have(table: &str, lines: &[&str]) {
        for line in lines {
            assert!(table.contains(line), "{line} is missing in\n{table}");
        }
    }

    #[test]
    fn every_transport_is_measured_in_one_process() {
        let table = table(&["loopback", "shm", "tcp", "tcp-insecure"], &args(1));
        must_have(
            &table,
            &[
                "loopback write 4 KiB",
                "shm send 8 B",
                "tcp write 4 KiB",
                "bare socket beside tcp-insecure send 8 B",
                "tcp write 8 B / bare socket, min",
                " sends/s",
                " writes/s",
            ],
        );
        assert!(!table.contains("slowest"), "of one peer nobody is slowest:\n{table}");
    }

    #[test]
    fn several_peers_are_streamed_to_at_once() {
        let table = table(&["loopback", "shm", "tcp"], &args(3));
        must_have(
            &table,
            &[
                "loopback write 8 B stream to 3, slowest / fastest",
                "shm send 4 KiB stream to 3, slowest peer",
                "tcp send 4 KiB stream to 3",
            ],
        );
    }

    #[test]
    fn a_round_trip_is_noted_once_when_it_has_ended() {
        let (mut lap, mut into) = (Lap::new(), histogram());
        lap.note(&mut into);
        assert_eq!(into.len(), 0);
        lap.end();
        lap.note(&mut into);
        lap.note(&mut into);
        assert_eq!(into.len(), 1);
    }

    #[test]
    fn what_a_send_cannot_carry_is_said_and_a_write_does() {
        let args = Args { size: vec![MAX_SIZE], places: Some(1), ..args(1) };
        let table = table(&["shm"], &args);
        must_have(&table, &["shm send 16 MiB: not measured, a send carries at most 1 MiB", "shm write 16 MiB stream"]);
        assert!(!table.contains(" sends/s"), "{table}");
    }
}
