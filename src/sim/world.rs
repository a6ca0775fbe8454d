//! The world: virtual time, one queue of events ordered by (time, number), one
//! seed. Routes requests to instances, carries out what they want, breaks
//! things as the faults say, and checks.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use hdrhistogram::Histogram;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::checker;
use super::cost::CostModel;
use super::fault::{self, Fault, Timed};
use super::instance::{Effect, Instance, Payload, Setup, Wake};
use super::lender::Sabotage;
use super::network::{Arrival, Network, Slot, Weather};
use super::report::{Report, Times, Violation};
use super::toy;
use super::workload::{Job, Synthetic};
use crate::control::row::Stamp;
use crate::kv::rblock::InstanceId;
use crate::schedule::scheduler::SchedulerConfig;

/// A client tries again this long after an error.
const RETRY: Duration = Duration::from_millis(500);
/// Within this time a member that was taken for dead is back in all ledgers.
const RETURN: Duration = Duration::from_secs(20);
/// Events between two audits where not every event is audited.
const SELDOM: u64 = 2000;

/// How a world is made.
#[derive(Clone, Debug)]
pub struct Config {
    /// For people: `pooled`, `isolated` or `static`.
    pub mode: String,
    /// Chance.
    pub seed: u64,
    /// Instances.
    pub instances: usize,
    /// What each is made of.
    pub setup: Setup,
    /// Requests, by time.
    pub jobs: Vec<Job>,
    /// Faults, by time.
    pub faults: Vec<Timed>,
    /// Audit instances after every event, or now and then.
    pub every_event: bool,
    /// Keep the log's text, beside its hash.
    pub keep_log: bool,
    /// Longest virtual time without an answer, once nothing is broken, that
    /// still counts as progress.
    pub patience: Duration,
    /// A request that an instance fails is counted as too long, and not tried
    /// again.
    pub give_up: bool,
}

impl Config {
    /// A small world of `seed` in which much goes wrong: a few instances of a
    /// few dozen rBlocks, requests that outgrow them, faults by chance.
    pub fn small(seed: u64, sabotage: Sabotage) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed ^ 0x5eed);
        let instances = rng.random_range(2..=5);
        let blocks = rng.random_range(16..48);
        let cost = CostModel { fixed_ns: 2e7, ..CostModel::small(blocks) };
        let tokens = blocks * cost.block_tokens;
        let synthetic = Synthetic {
            requests: 24,
            rate: 1.5,
            prompt: (4, tokens / 3),
            answer: (4, tokens / 2),
            long_share: 0.25,
            long: (tokens / 2, tokens * 5 / 4),
        };
        let setup = Setup {
            cost,
            lend: 0.6,
            // Some of the faults last longer, so that leases end on the living.
            lease: Duration::from_secs(3),
            schedule: SchedulerConfig {
                max_rows: 48,
                chunk_rows: 24,
                max_logits: 16,
                max_sequences: 8,
                replicas: 1,
                move_blocks: 4,
            },
            sabotage,
        };
        let faults = fault::chance(&mut rng, instances, Duration::from_secs(25));
        Self {
            mode: "pooled".into(),
            seed,
            instances,
            setup,
            jobs: synthetic.jobs(seed),
            faults,
            every_event: true,
            keep_log: false,
            patience: Duration::from_secs(600),
            give_up: false,
        }
    }
}

/// What became of a world.
pub struct Outcome {
    /// Figures.
    pub report: Report,
    /// The log, if it was kept.
    pub log: String,
}

enum Event {
    Job(usize),
    Retry(usize),
    Fault(usize),
    Restart(Slot),
    Resume(Slot),
    Heal(Slot, Slot),
    Tick(Slot),
    Net(Slot, Arrival<Payload>),
    Wake(Slot, u64, Wake),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Outside,
    At(Slot),
    Done,
    TooLong,
}

struct Request {
    state: State,
    arrived: Duration,
    first: Option<Duration>,
}

struct Place {
    life: u64,
    instance: Option<Instance>,
    /// Stands still until then.
    paused: Option<Duration>,
    /// When its next tick is queued for.
    tick: Option<Duration>,
    /// Tokens of its requests.
    load: u64,
    /// The rows its ledger had when it was audited last.
    seen: BTreeMap<InstanceId, Stamp>,
}

/// The world. See the module's page.
pub struct World {
    config: Config,
    now: Duration,
    rng: ChaCha8Rng,
    places: Vec<Place>,
    network: Network<Payload>,
    events: BTreeMap<(Duration, u64), Event>,
    queued: u64,
    done: u64,
    requests: Vec<Request>,
    open: usize,
    heals: Duration,
    /// When something was answered last, or came.
    progress: Duration,
    hasher: blake3::Hasher,
    log: String,
    report: Report,
    first: Histogram<u64>,
    whole: Histogram<u64>,
    between: Histogram<u64>,
    tokens: u64,
    generated: u64,
    last_answer: Duration,
}

fn histogram() -> Histogram<u64> {
    // Up to 30 days of microseconds; the bounds are constants that suit.
    Histogram::new_with_bounds(1, 2_600_000_000_000, 3).unwrap_or_else(|e| unreachable!("histogram bounds: {e}"))
}

impl World {
    /// A world in which nothing has happened.
    pub fn new(config: Config) -> Self {
        let cost = &config.setup.cost;
        let ns = |ns: f64| Duration::from_nanos(ns as u64);
        let weather = Weather {
            delay: ns(cost.control_ns),
            jitter: ns(cost.control_ns * 4.0),
            // The exchanges of all layers are in the creditor's answer.
            lane_delay: [ns(cost.layer_rtt_ns / 2.0), ns(cost.host_layer_rtt_ns / 2.0)],
            host_slots: cost.host_instances as usize,
            bytes_s: [cost.link_bytes_s, cost.host_link_bytes_s],
            loss: 0.01,
            doubled: 0.01,
        };
        let place = |_| Place { life: 0, instance: None, paused: None, tick: None, load: 0, seen: BTreeMap::new() };
        let mut world = Self {
            now: Duration::ZERO,
            rng: ChaCha8Rng::seed_from_u64(config.seed),
            places: (0..config.instances).map(place).collect(),
            network: Network::new(weather),
            events: BTreeMap::new(),
            queued: 0,
            done: 0,
            requests: Vec::new(),
            open: 0,
            heals: config.faults.iter().map(Timed::heals).max().unwrap_or_default(),
            progress: Duration::ZERO,
            hasher: blake3::Hasher::new(),
            log: String::new(),
            report: Report {
                seed: config.seed,
                instances: config.instances,
                mode: config.mode.clone(),
                ..Report::default()
            },
            first: histogram(),
            whole: histogram(),
            between: histogram(),
            tokens: 0,
            generated: 0,
            last_answer: Duration::ZERO,
            config,
        };
        // Instances come up one after the other, before the first request.
        for slot in 0..world.places.len() {
            world.push(Duration::from_millis(10) * slot as u32, Event::Restart(slot));
        }
        let start = Duration::from_millis(10) * world.places.len() as u32 + Duration::from_secs(1);
        for index in 0..world.config.jobs.len() {
            let arrived = start + world.config.jobs[index].at;
            world.requests.push(Request { state: State::Outside, arrived, first: None });
            world.push(arrived, Event::Job(index));
        }
        for index in 0..world.config.faults.len() {
            world.push(start + Duration::from_millis(world.config.faults[index].at_ms), Event::Fault(index));
        }
        world.heals += start;
        world.open = world.requests.len();
        world
    }

    /// Runs until every request is answered and everything has settled, or an
    /// invariant breaks.
    pub fn run(self) -> Outcome {
        self.run_with(|_| {})
    }

    /// As [`run`](Self::run); `progress` is told now and then how many requests
    /// are left.
    pub fn run_with(mut self, mut progress: impl FnMut(usize)) -> Outcome {
        let broken = self.run_to_end(&mut progress);
        self.report.violation = broken;
        self.finish()
    }

    fn run_to_end(&mut self, progress: &mut impl FnMut(usize)) -> Option<Violation> {
        while self.open > 0 || self.now < self.heals {
            if self.done.is_multiple_of(SELDOM) {
                progress(self.open);
            }
            if let Err(violation) = self.step() {
                return Some(violation);
            }
            let since = self.progress.max(self.heals);
            if self.now > since + self.config.patience {
                let open: Vec<_> = (0..self.requests.len())
                    .filter(|i| !matches!(self.requests[*i].state, State::Done | State::TooLong))
                    .take(8)
                    .collect();
                return Some(self.violation("waiting", format!("{} requests are not answered: {open:?} …", self.open)));
            }
        }
        // Leases end, repayments arrive.
        let quiet = self.now + self.config.setup.lease + Duration::from_secs(5);
        while self.now < quiet {
            if let Err(violation) = self.step() {
                return Some(violation);
            }
        }
        let alive = |world: &Self, check: fn(&[&Instance]) -> Result<(), String>| {
            check(&world.places.iter().filter_map(|place| place.instance.as_ref()).collect::<Vec<_>>())
        };
        if let Err(broken) = alive(self, checker::settled) {
            return Some(self.violation("settled", broken));
        }
        // Datagrams are lost at any time, so that somebody may be taken for dead
        // just now: then the ledgers agree once it is back.
        let patience = self.now + RETURN;
        while let Err(broken) = alive(self, checker::ledgers) {
            if self.now > patience {
                return Some(self.violation("ledgers", broken));
            }
            if let Err(violation) = self.step() {
                return Some(violation);
            }
        }
        let over =
            self.places.iter_mut().filter_map(|place| place.instance.as_mut()).find_map(|it| checker::over(it).err());
        over.map(|broken| self.violation("the end", broken))
    }

    fn violation(&self, what: &str, broken: String) -> Violation {
        let at_ns = self.now.as_nanos() as u64;
        Violation { seed: self.config.seed, event: self.done, at_ns, what: what.to_string(), broken }
    }

    fn push(&mut self, at: Duration, event: Event) {
        self.queued += 1;
        self.events.insert((at.max(self.now), self.queued), event);
    }

    fn note(&mut self, line: std::fmt::Arguments<'_>) {
        let start = self.log.len();
        // Writing to a string does not fail.
        let _ = writeln!(self.log, "{:?} {line}", self.now);
        self.hasher.update(&self.log.as_bytes()[start..]);
        if !self.config.keep_log {
            self.log.clear();
        }
    }

    /// One event.
    fn step(&mut self) -> Result<(), Violation> {
        let Some(((at, _), event)) = self.events.pop_first() else {
            return Err(self.violation("nothing", "no event is left, and requests are".into()));
        };
        self.now = at;
        let slot = match &event {
            Event::Tick(slot) | Event::Net(slot, _) | Event::Wake(slot, ..) => Some(*slot),
            _ => None,
        };
        // Whoever stands still is reached later, in the same order.
        if let Some(until) = slot.and_then(|slot| self.places[slot].paused) {
            self.push(until, event);
            return Ok(());
        }
        self.done += 1;
        let name = match &event {
            Event::Job(index) => format!("request {index}"),
            Event::Retry(index) => format!("request {index} again"),
            Event::Fault(index) => format!("{:?}", self.config.faults[*index].fault),
            Event::Restart(slot) => format!("start {slot}"),
            Event::Resume(slot) => format!("resume {slot}"),
            Event::Heal(a, b) => format!("heal {a} {b}"),
            Event::Tick(slot) => format!("tick {slot}"),
            Event::Net(slot, arrival) => describe(*slot, arrival),
            Event::Wake(slot, _, what) => format!("wake {slot} {what:?}"),
        };
        self.note(format_args!("{name}"));
        self.apply(event).map_err(|broken| self.violation(&name, broken))?;
        let audited: Vec<Slot> = match slot {
            Some(slot) if self.config.every_event => vec![slot],
            _ if self.done.is_multiple_of(SELDOM) => (0..self.places.len()).collect(),
            _ => Vec::new(),
        };
        for slot in audited {
            self.audit(slot).map_err(|broken| self.violation(&name, format!("instance {slot}: {broken}")))?;
        }
        Ok(())
    }

    fn audit(&mut self, slot: Slot) -> Result<(), String> {
        let mut seen = std::mem::take(&mut self.places[slot].seen);
        if let Some(it) = &self.places[slot].instance {
            checker::instance(it)?;
            // Between two audits far apart a row may have gone and come again.
            if self.config.every_event {
                let all: Vec<_> = self.places.iter().filter_map(|place| place.instance.as_ref()).collect();
                checker::ledger(it, &all, &mut seen)?;
            }
        }
        self.places[slot].seen = seen;
        Ok(())
    }

    fn apply(&mut self, event: Event) -> Result<(), String> {
        match event {
            Event::Job(index) => {
                self.progress = self.now;
                self.route(index)
            }
            Event::Retry(index) => self.route(index),
            Event::Fault(index) => {
                let fault = self.config.faults[index].fault.clone();
                self.report.faults += 1;
                self.fault(fault);
                Ok(())
            }
            Event::Restart(slot) => self.restart(slot),
            Event::Resume(slot) => {
                if self.places[slot].paused.is_some_and(|until| until <= self.now) {
                    self.places[slot].paused = None;
                }
                Ok(())
            }
            Event::Heal(a, b) => {
                self.network.heal(a, b);
                Ok(())
            }
            Event::Tick(slot) => {
                self.places[slot].tick = None;
                self.touch(slot, |it, now| match it.control.deadline() {
                    Some(deadline) if deadline <= now => it.tick(now),
                    _ => {}
                })
            }
            Event::Net(slot, arrival) => match self.network.admits(&arrival) {
                true => self.touch(slot, |it, now| it.arrived(now, arrival)),
                false => Ok(()),
            },
            Event::Wake(slot, life, what) if self.places[slot].life == life => {
                self.touch(slot, |it, now| it.woken(now, what))
            }
            Event::Wake(..) => Ok(()),
        }
    }

    /// Gives an instance something to do, then does what it wants.
    fn touch(&mut self, slot: Slot, act: impl FnOnce(&mut Instance, Duration)) -> Result<(), String> {
        let Some(it) = self.places[slot].instance.as_mut() else { return Ok(()) };
        act(it, self.now);
        let effects = it.take_effects();
        let deadline = it.control.deadline();
        for effect in effects {
            self.carry_out(slot, effect)?;
        }
        for (at, to, arrival) in self.network.take() {
            self.push(at, Event::Net(to, arrival));
        }
        if let Some(at) = deadline.filter(|at| self.places[slot].tick.is_none_or(|tick| *at < tick)) {
            self.places[slot].tick = Some(at);
            self.push(at, Event::Tick(slot));
        }
        Ok(())
    }

    fn carry_out(&mut self, slot: Slot, effect: Effect) -> Result<(), String> {
        let (now, rng) = (self.now, &mut self.rng);
        match effect {
            Effect::Dial { to, port, ask } => {
                let there = to.filter(|to| self.places.get(*to).is_some_and(|place| place.instance.is_some()));
                self.network.dial(now, rng, slot, there, port, ask);
            }
            Effect::Send { conn, bytes, since, payload } => {
                self.network.send(now, since.unwrap_or(now), rng, conn, bytes, payload);
            }
            Effect::Datagram { to, bytes } => self.network.datagram(now, rng, slot, to, bytes),
            Effect::Close { conn } => self.network.close(now, rng, conn),
            Effect::Wake { at, what } => {
                let life = self.places[slot].life;
                self.push(at, Event::Wake(slot, life, what));
            }
            Effect::Started { request } => {
                let request = &mut self.requests[request as usize];
                request.first.get_or_insert(now);
            }
            Effect::Finished { request, answer } => return self.answered(slot, request as usize, &answer),
            Effect::Failed { request, reason } => {
                self.note(format_args!("request {request} failed at {slot}: {reason}"));
                let index = request as usize;
                if self.config.give_up {
                    self.unload(slot, index);
                    self.too_long(index);
                } else {
                    self.leave(index);
                }
            }
            Effect::Log(line) => self.note(format_args!("{slot}: {line}")),
        }
        Ok(())
    }

    // ---- requests -----------------------------------------------------------------

    fn route(&mut self, index: usize) -> Result<(), String> {
        if self.requests[index].state != State::Outside {
            return Ok(());
        }
        let job = &self.config.jobs[index];
        let (tokens, want) = (u64::from(job.prompt) + u64::from(job.answer), job.answer as usize);
        if !self.fits(tokens) {
            self.too_long(index);
            self.note(format_args!("request {index} is too long: {tokens} tokens"));
            return Ok(());
        }
        let up = self.places.iter().enumerate().filter(|(_, place)| place.instance.is_some());
        let Some((slot, _)) = up.min_by_key(|(slot, place)| (place.load, *slot)) else {
            self.push(self.now + RETRY, Event::Retry(index));
            return Ok(());
        };
        let prompt = job.tokens(index as u64);
        self.requests[index].state = State::At(slot);
        self.places[slot].load += tokens;
        self.note(format_args!("request {index} to {slot}: {tokens} tokens"));
        if let Some(until) = self.places[slot].paused {
            // Its socket takes the request; the process does not.
            self.push(until, Event::Retry(index));
            self.requests[index].state = State::Outside;
            self.places[slot].load -= tokens;
            return Ok(());
        }
        self.touch(slot, |it, now| it.submit(now, index as u64, prompt, want))
    }

    /// Can the memory here hold so many tokens at all?
    fn fits(&self, tokens: u64) -> bool {
        let setup = &self.config.setup;
        let lent = (f64::from(setup.cost.blocks) * setup.lend) as u64;
        let reach = u64::from(setup.cost.blocks) + lent * (self.config.instances as u64 - 1);
        tokens.div_ceil(u64::from(setup.cost.block_tokens)) <= reach
    }

    fn too_long(&mut self, index: usize) {
        self.requests[index].state = State::TooLong;
        self.report.too_long += 1;
        self.open -= 1;
    }

    /// A request is without an instance again; its client tries once more.
    fn leave(&mut self, index: usize) {
        if let State::At(slot) = self.requests[index].state {
            self.unload(slot, index);
            self.requests[index].state = State::Outside;
            self.report.retries += 1;
            self.push(self.now + RETRY, Event::Retry(index));
        }
    }

    fn unload(&mut self, slot: Slot, index: usize) {
        let job = &self.config.jobs[index];
        let place = &mut self.places[slot];
        place.load = place.load.saturating_sub(u64::from(job.prompt) + u64::from(job.answer));
    }

    fn answered(&mut self, slot: Slot, index: usize, answer: &[u32]) -> Result<(), String> {
        self.unload(slot, index);
        let job = &self.config.jobs[index];
        let expected = toy::reference(&job.tokens(index as u64), job.answer as usize);
        if let Some(at) = answer.iter().zip(&expected).position(|(a, b)| a != b) {
            return Err(format!(
                "request {index}: token {at} of {} is not what one instance alone gives",
                expected.len()
            ));
        }
        if answer.len() != expected.len() {
            return Err(format!("request {index}: {} tokens of {}", answer.len(), expected.len()));
        }
        let (tokens, count) = (job.prompt as usize + job.answer as usize, answer.len() as u64);
        let request = &mut self.requests[index];
        request.state = State::Done;
        let us = |from: Duration, to: Duration| to.saturating_sub(from).as_micros() as u64;
        let first = request.first.unwrap_or(self.now);
        self.first.saturating_record(us(request.arrived, first).max(1));
        self.whole.saturating_record(us(request.arrived, self.now).max(1));
        if count > 1 {
            self.between.saturating_record((us(first, self.now) / (count - 1)).max(1));
        }
        self.open -= 1;
        self.progress = self.now;
        self.last_answer = self.now;
        self.report.finished += 1;
        self.report.longest = self.report.longest.max(tokens);
        self.tokens += tokens as u64;
        self.generated += count;
        self.note(format_args!("request {index} answered by {slot}"));
        Ok(())
    }

    // ---- faults -------------------------------------------------------------------

    fn fault(&mut self, fault: Fault) {
        let ms = Duration::from_millis;
        match fault {
            Fault::Crash { node, back_ms } => {
                let Some(it) = self.places[node].instance.take() else { return };
                self.count(&it);
                self.places[node].paused = None;
                self.network.crash(self.now, &mut self.rng, node);
                for index in 0..self.requests.len() {
                    if self.requests[index].state == State::At(node) {
                        self.leave(index);
                    }
                }
                self.push(self.now + ms(back_ms), Event::Restart(node));
            }
            Fault::Pause { node, ms: length } => {
                let until = self.now + ms(length);
                let place = &mut self.places[node];
                if place.instance.is_some() {
                    place.paused = Some(place.paused.map_or(until, |other| other.max(until)));
                    self.push(until, Event::Resume(node));
                }
            }
            Fault::Cut { a, b, ms: length } => self.cut(a, b, ms(length)),
            Fault::Isolate { node, ms: length } => {
                (0..self.places.len())
                    .filter(|other| *other != node)
                    .for_each(|other| self.cut(node, other, ms(length)));
            }
        }
        for (at, to, arrival) in self.network.take() {
            self.push(at, Event::Net(to, arrival));
        }
    }

    fn cut(&mut self, a: Slot, b: Slot, length: Duration) {
        if a != b {
            self.network.cut(self.now, &mut self.rng, a, b);
            self.push(self.now + length, Event::Heal(a, b));
        }
    }

    fn restart(&mut self, slot: Slot) -> Result<(), String> {
        if self.places[slot].instance.is_some() {
            return Ok(());
        }
        let seed = self.rng.random();
        let place = &mut self.places[slot];
        place.life += 1;
        place.tick = None;
        place.load = 0;
        place.seen.clear();
        let setup = self.config.setup.clone();
        place.instance = Some(Instance::new(setup, slot, place.life, self.config.instances, seed));
        self.touch(slot, |it, now| it.tick(now))
    }

    // ---- figures ------------------------------------------------------------------

    fn count(&mut self, it: &Instance) {
        let control = it.control.controller().stats();
        let (answered, refused, rejected) = it.exchanges();
        let report = &mut self.report;
        report.steps += it.figures.steps;
        report.loans += control.granted;
        report.refused += control.refused;
        report.lapsed += control.lapsed;
        report.lost += control.lost;
        report.moves += it.figures.moves;
        report.exchanges += answered;
        report.failed_closed += refused + rejected;
        report.preemptions += it.scheduler.preemptions();
        let (recoveries, recomputed) = it.recovered();
        report.recoveries += recoveries;
        report.recomputed += recomputed;
        report.cached_tokens += it.scheduler.cached_tokens();
    }

    fn finish(mut self) -> Outcome {
        for slot in 0..self.places.len() {
            if let Some(it) = self.places[slot].instance.take() {
                self.count(&it);
            }
        }
        let begun = self.requests.iter().map(|request| request.arrived).min().unwrap_or_default();
        let seconds = self.last_answer.saturating_sub(begun).as_secs_f64();
        let rate = |count: u64| if seconds > 0.0 { count as f64 / seconds } else { 0.0 };
        let report = &mut self.report;
        report.seconds = seconds;
        report.tokens_s = rate(self.tokens);
        report.generated_s = rate(self.generated);
        report.first_token_ms = Times::of(&self.first);
        report.whole_ms = Times::of(&self.whole);
        report.between_ms = Times::of(&self.between);
        report.lane_bytes = self.network.traffic.lane_bytes;
        report.control_messages = self.network.traffic.control_messages;
        report.control_bytes = self.network.traffic.control_bytes;
        report.events = self.done;
        report.log_hash = self.hasher.finalize().to_hex()[..16].to_string();
        Outcome { report: self.report, log: self.log }
    }
}

fn describe(slot: Slot, arrival: &Arrival<Payload>) -> String {
    match arrival {
        Arrival::Message { conn, message: Payload::Control(bytes) } => {
            format!("{slot} < {conn}: {} bytes {:?}", bytes.len(), blake3::hash(bytes).to_hex().get(..8))
        }
        Arrival::Message { conn, message: Payload::Lane(message) } => format!("{slot} < {conn}: {message}"),
        other => format!("{slot} < {other:?}"),
    }
}
