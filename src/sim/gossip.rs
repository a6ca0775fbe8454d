//! Membership and the ledger alone, at sizes where nothing else can be
//! simulated: how long a row takes to reach every node, what that costs, how
//! soon a dead node is known as such. The same [`Controller`] as in a node, on a
//! network with delay and loss.

use core::net::SocketAddr;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use hdrhistogram::Histogram;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::control::controller::{Config, Controller, Input, LocalStats, Output};
use crate::control::message::Role;
use crate::control::rmanager::{PoolSource, RManager};
use crate::control::row::Profile;
use crate::kv::rblock::InstanceId;

/// Instances whose rows are followed.
const FOLLOWED: usize = 8;
/// Longest time for the nodes to find each other.
const JOIN: Duration = Duration::from_secs(120);
/// From the nodes' having found each other until they are looked at.
const SETTLE: Duration = Duration::from_secs(20);

/// What to simulate.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// Nodes.
    pub instances: usize,
    /// Seed of everything.
    pub seed: u64,
    /// How long to look at, once all know all.
    pub time: Duration,
    /// Longest delay of a datagram; the shortest is a tenth.
    pub delay: Duration,
    /// Share of the datagrams that are lost.
    pub loss: f64,
}

/// What was seen. Times are virtual.
pub struct Figures {
    /// From the first start until every node knew every other and its row;
    /// `None`: not within two minutes.
    pub joined: Option<Duration>,
    /// From the making of a row until one other node had it, or a newer one, ns.
    pub one: Histogram<u64>,
    /// Until all had, ns.
    pub all: Histogram<u64>,
    /// Bytes of datagrams sent a second, by node.
    pub bytes_s: Vec<f64>,
    /// Rows made a second, by the followed.
    pub rows_s: f64,
    /// From a node's death until another node knew of it, ns.
    pub death: Histogram<u64>,
    /// Nodes taken for dead that were not.
    pub mistaken: u64,
}

struct Node {
    controller: Controller,
    address: SocketAddr,
    alive: bool,
    counter: u32,
}

/// A row on its way.
struct Made {
    at: Duration,
    version: u32,
    lacking: BTreeSet<usize>,
}

struct World {
    setup: Setup,
    now: Duration,
    rng: ChaCha8Rng,
    nodes: Vec<Node>,
    queue: BTreeMap<(Duration, u64), (usize, SocketAddr, Vec<u8>)>,
    timers: BTreeSet<(Duration, usize)>,
    armed: Vec<Option<Duration>>,
    count: u64,
    /// By followed node: rows not everywhere yet.
    made: Vec<Vec<Made>>,
    following: bool,
    dead: Option<(usize, Duration)>,
    knows: BTreeSet<usize>,
    figures: Figures,
}

fn address(i: usize) -> SocketAddr {
    SocketAddr::from(([10, 0, (i >> 8) as u8, i as u8], 7946))
}

/// The node at an address of [`address`].
fn index(address: SocketAddr) -> Option<usize> {
    match address {
        SocketAddr::V4(v4) => Some(v4.ip().octets()[2..].iter().fold(0, |i, octet| i << 8 | usize::from(*octet))),
        SocketAddr::V6(_) => None,
    }
}

fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 3_600_000_000_000, 3).unwrap_or_else(|_| unreachable!("constant bounds"))
}

/// Simulates; the same setup gives the same figures.
pub fn run(setup: Setup) -> Figures {
    let mut world = World::new(setup);
    world.join();
    world.watch();
    world.kill();
    world.figures
}

impl World {
    fn new(setup: Setup) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(setup.seed);
        let n = setup.instances;
        let nodes = (0..n).map(|i| {
            let profile = Profile {
                role: Role::Lender,
                model: None,
                host: i as u64,
                rank: i as u32,
                control: vec![format!("tcp://{}", address(i))],
                creditor: vec![format!("tcp://10.0.0.{i}:40000")],
                http: format!("10.0.0.{i}:8000"),
                peers: None,
            };
            let config = Config {
                join: vec![address(0), address(n / 2)],
                ..Config::new(InstanceId(rng.random()), [1; 16], profile, address(i))
            };
            let rmanager = RManager::new(PoolSource::Bytes(1 << 30), 1.0, Duration::from_secs(10));
            let controller = Controller::new(config, rmanager, rng.random());
            let controller = controller.unwrap_or_else(|error| unreachable!("a fixed configuration: {error}"));
            Node { controller, address: address(i), alive: true, counter: 0 }
        });
        let nodes: Vec<_> = nodes.collect();
        let figures = Figures {
            joined: None,
            one: histogram(),
            all: histogram(),
            bytes_s: Vec::new(),
            rows_s: 0.0,
            death: histogram(),
            mistaken: 0,
        };
        Self {
            setup,
            now: Duration::ZERO,
            rng,
            armed: vec![None; nodes.len()],
            nodes,
            queue: BTreeMap::new(),
            timers: BTreeSet::new(),
            count: 0,
            made: (0..FOLLOWED.min(n)).map(|_| Vec::new()).collect(),
            following: false,
            dead: None,
            knows: BTreeSet::new(),
            figures,
        }
    }

    fn join(&mut self) {
        for i in 0..self.nodes.len() {
            self.input(i, None);
        }
        let whole = |w: &Self| {
            let known = |n: &Node| n.controller.members() + 1 == w.nodes.len();
            let rows = |n: &Node| n.controller.ledger().len() == w.nodes.len();
            w.nodes.iter().all(|n| known(n) && rows(n))
        };
        while self.now < JOIN && !whole(self) {
            self.run_until(self.now + Duration::from_millis(100));
        }
        self.figures.joined = whole(self).then_some(self.now);
    }

    fn watch(&mut self) {
        // What the start has stirred up goes first: each row is new everywhere.
        self.run_until(self.now + SETTLE);
        let sent = |w: &Self| w.nodes.iter().map(|n| n.controller.stats().datagram_bytes).collect::<Vec<_>>();
        let before = sent(self);
        self.following = true;
        let begun = self.now;
        self.run_until(begun + self.setup.time);
        let seconds = self.setup.time.as_secs_f64();
        self.figures.bytes_s =
            sent(self).iter().zip(before).map(|(after, before)| (after - before) as f64 / seconds).collect();
        let made = self.figures.all.len() as usize + self.made.iter().map(Vec::len).sum::<usize>();
        self.figures.rows_s = made as f64 / seconds / self.made.len() as f64;
        self.following = false;
    }

    fn kill(&mut self) {
        let victim = self.nodes.len() - 1;
        self.nodes[victim].alive = false;
        self.dead = Some((victim, self.now));
        self.run_until(self.now + Duration::from_secs(10));
    }

    fn run_until(&mut self, until: Duration) {
        loop {
            let datagram = self.queue.keys().next().map(|(at, _)| *at);
            let timer = self.timers.first().map(|(at, _)| *at);
            let Some(at) = datagram.into_iter().chain(timer).min().filter(|at| *at <= until) else { break };
            self.now = self.now.max(at);
            if datagram.is_some_and(|d| timer.is_none_or(|t| d <= t)) {
                if let Some((_, (to, from, bytes))) = self.queue.pop_first() {
                    self.input(to, Some((from, bytes)));
                }
            } else if let Some((_, node)) = self.timers.pop_first() {
                self.armed[node] = None;
                self.input(node, None);
            }
        }
        self.now = until;
    }

    fn input(&mut self, i: usize, datagram: Option<(SocketAddr, Vec<u8>)>) {
        let now = self.now;
        let node = &mut self.nodes[i];
        if !node.alive {
            return;
        }
        match datagram {
            Some((from, bytes)) => node.controller.handle(now, Input::Datagram { from, bytes: &bytes }),
            None => {
                // Every row changes whenever it may: the most that can happen.
                node.counter += 1;
                node.controller
                    .handle(now, Input::LocalRow(LocalStats { waiting: node.counter, ..Default::default() }));
                node.controller.handle(now, Input::Tick);
            }
        }
        let from = node.address;
        let mut posts = Vec::new();
        while let Some(output) = node.controller.poll_output() {
            match output {
                Output::Datagram { to, bytes } => posts.push((to, bytes)),
                Output::Note(crate::control::controller::Note::Renewed(_)) => self.figures.mistaken += 1,
                _ => {}
            }
        }
        for (to, bytes) in posts {
            let target = index(to).filter(|target| *target < self.nodes.len());
            let delay = self.setup.delay.mul_f64(self.rng.random_range(0.1..=1.0));
            let lost = self.rng.random_bool(self.setup.loss);
            if let Some(target) = target.filter(|_| !lost) {
                self.count += 1;
                self.queue.insert((now + delay, self.count), (target, from, bytes));
            }
        }
        let due = self.nodes[i].controller.deadline();
        if self.armed[i] != due {
            if let Some(at) = self.armed[i].take() {
                self.timers.remove(&(at, i));
            }
            self.armed[i] = due;
            self.timers.extend(due.map(|at| (at, i)));
        }
        self.look(i);
    }

    /// What node `i` has of the followed rows by now.
    fn look(&mut self, i: usize) {
        let ns = |since: Duration| ((self.now - since).as_nanos() as u64).max(1);
        let id = |w: &Self, i: usize| w.nodes[i].controller.own();
        if let Some((victim, died)) = self.dead {
            if !self.knows.contains(&i) && self.nodes[i].controller.ledger().get(id(self, victim)).is_none() {
                self.knows.insert(i);
                let after = ns(died);
                self.figures.death.saturating_record(after);
            }
            return;
        }
        if !self.following {
            return;
        }
        for subject in 0..self.made.len() {
            let instance = id(self, subject);
            let Some(version) = self.nodes[i].controller.ledger().get(instance).map(|row| row.stamp.version) else {
                continue;
            };
            if subject == i {
                if self.made[i].last().is_none_or(|last| last.version < version) {
                    let lacking = (0..self.nodes.len()).filter(|n| *n != i).collect();
                    self.made[i].push(Made { at: self.now, version, lacking });
                }
                continue;
            }
            for made in self.made[subject].iter_mut().filter(|made| made.version <= version) {
                if made.lacking.remove(&i) {
                    let after = ((self.now - made.at).as_nanos() as u64).max(1);
                    self.figures.one.saturating_record(after);
                    if made.lacking.is_empty() {
                        self.figures.all.saturating_record(after);
                    }
                }
            }
            // The newest stays, to tell the next one from it.
            let newest = self.made[subject].last().map_or(0, |made| made.version);
            self.made[subject].retain(|made| !made.lacking.is_empty() || made.version == newest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_reaches_every_node_and_a_death_is_known_within_two_seconds() {
        let ms = Duration::from_millis;
        let setup = Setup { instances: 24, seed: 3, time: ms(6000), delay: ms(2), loss: 0.01 };
        let figures = run(setup);
        assert!(figures.joined.is_some_and(|time| time < ms(5000)), "{:?}", figures.joined);
        assert!(figures.all.len() > 50 && figures.mistaken == 0);
        assert!(figures.all.max() < 3_000_000_000, "the slowest row took {} ms", figures.all.max() / 1_000_000);
        assert_eq!(figures.death.len(), 23, "all know");
        assert!(figures.death.max() < 2_500_000_000, "{} ms", figures.death.max() / 1_000_000);
        let again = run(setup);
        assert_eq!((figures.one.len(), figures.one.max()), (again.one.len(), again.one.max()), "one seed, one run");
        assert_eq!(figures.bytes_s, again.bytes_s);
    }
}
