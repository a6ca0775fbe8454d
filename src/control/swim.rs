//! Who is alive: SWIM by the crate `foca`, driven by our time and our seed.
//!
//! Every member probes another every [`PROBE_PERIOD`], directly and then
//! through others; one that does not answer is suspected, and after
//! [`SUSPICION`] without refutation it is down. A member that was taken for
//! dead and was not hears so and returns under a new life.

use std::collections::{BTreeMap, VecDeque};
use std::num::{NonZeroU8, NonZeroUsize};
use std::time::Duration;

use core::net::SocketAddr;

use foca::{Foca, Identity, NoCustomBroadcast, Notification, PeriodicParams, PostcardCodec, Runtime, Timer};
use rand_chacha_next::ChaCha8Rng;
use rand_chacha_next::rand_core::SeedableRng;
use serde::{Deserialize, Serialize};

use crate::kv::rblock::InstanceId;

/// Time between two probes by one member. Its own answer is waited for
/// [`PROBE_RTT`], then others are asked.
pub const PROBE_PERIOD: Duration = Duration::from_millis(200);
/// Longest round trip of a direct probe.
pub const PROBE_RTT: Duration = Duration::from_millis(80);
/// How long a suspected member may take to refute.
pub const SUSPICION: Duration = Duration::from_millis(1000);
/// Longest SWIM message, before sealing.
pub const MAX_PACKET: usize = 1200;

const fn some(n: usize) -> NonZeroUsize {
    NonZeroUsize::new(n).expect("not 0")
}

/// A member, as all others know it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Where its datagrams go.
    pub address: SocketAddr,
    /// The instance there: one process life.
    pub instance: InstanceId,
    /// When that life began, milliseconds since 1970: of two processes at one
    /// address the later is real.
    pub started: u64,
    /// Raised each time it was taken for dead and returned.
    pub life: u32,
}

impl Identity for Member {
    type Addr = SocketAddr;

    fn renew(&self) -> Option<Self> {
        Some(Self { life: self.life.checked_add(1)?, ..self.clone() })
    }

    fn addr(&self) -> SocketAddr {
        self.address
    }

    fn win_addr_conflict(&self, adversary: &Self) -> bool {
        (self.started, self.instance, self.life) > (adversary.started, adversary.instance, adversary.life)
    }
}

/// A change of who is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// It is up.
    Up(Member),
    /// It is down: dead, cut off, or gone by its own wish.
    Down(Member),
    /// It is dead for certain: another process answers at its address.
    Replaced(Member),
    /// The others had taken this instance for dead; it goes on in a new life.
    Renewed(Member),
}

/// Membership of one instance.
pub struct Swim {
    foca: Foca<Member, PostcardCodec, ChaCha8Rng, NoCustomBroadcast>,
    io: Io,
    up: BTreeMap<InstanceId, Member>,
    size: usize,
    refused: u64,
}

/// What foca hands out, until it is collected.
#[derive(Default)]
struct Io {
    now: Duration,
    datagrams: VecDeque<(SocketAddr, Vec<u8>)>,
    timers: BTreeMap<(Duration, u64), Timer<Member>>,
    timer_count: u64,
    heard: Vec<Heard>,
}

enum Heard {
    Up(Member),
    Down(Member),
    Rename(Member, Member),
    Renewed(Member),
}

impl Runtime<Member> for &mut Io {
    fn notify(&mut self, notification: Notification<'_, Member>) {
        self.heard.push(match notification {
            Notification::MemberUp(member) => Heard::Up(member.clone()),
            Notification::MemberDown(member) => Heard::Down(member.clone()),
            Notification::Rename(before, after) => Heard::Rename(before.clone(), after.clone()),
            Notification::Rejoin(me) => Heard::Renewed(me.clone()),
            // Told by the counts of members, and by `Rejoin`.
            Notification::Active | Notification::Idle | Notification::Defunct => return,
        });
    }

    fn send_to(&mut self, to: Member, data: &[u8]) {
        self.datagrams.push_back((to.address, data.to_vec()));
    }

    fn submit_after(&mut self, event: Timer<Member>, after: Duration) {
        self.timer_count += 1;
        self.timers.insert((self.now + after, self.timer_count), event);
    }
}

impl Swim {
    /// Alone until it hears of others.
    pub fn new(me: Member, seed: u64) -> Self {
        let foca = Foca::new(me, config(2), ChaCha8Rng::seed_from_u64(seed), PostcardCodec);
        Self { foca, io: Io::default(), up: BTreeMap::new(), size: 2, refused: 0 }
    }

    /// This instance, in its present life.
    pub fn me(&self) -> &Member {
        self.foca.identity()
    }

    /// Others that are up.
    pub fn up(&self) -> &BTreeMap<InstanceId, Member> {
        &self.up
    }

    /// Messages that made no sense.
    pub fn refused(&self) -> u64 {
        self.refused
    }

    /// Asks whoever is at `address` to be let in.
    pub fn announce(&mut self, now: Duration, address: SocketAddr) {
        self.io.now = now;
        // Whoever has the address takes it for meant: the rest is unknown here.
        let seed = Member { address, instance: InstanceId(0), started: 0, life: 0 };
        if address != self.me().address {
            let done = self.foca.announce(seed, &mut self.io);
            self.count(done);
        }
    }

    /// Takes in a SWIM message, as it was before sealing.
    pub fn receive(&mut self, now: Duration, bytes: &[u8], changes: &mut Vec<Change>) {
        self.io.now = now;
        let done = self.foca.handle_data(bytes, &mut self.io);
        self.count(done);
        self.collect(changes);
    }

    /// Does what is due.
    pub fn tick(&mut self, now: Duration, changes: &mut Vec<Change>) {
        self.io.now = now;
        while let Some(entry) = self.io.timers.first_entry().filter(|entry| entry.key().0 <= now) {
            let timer = entry.remove();
            if self.is_refuted(&timer) {
                continue;
            }
            let done = self.foca.handle_timer(timer, &mut self.io);
            self.count(done);
        }
        self.collect(changes);
    }

    /// Says goodbye.
    pub fn leave(&mut self, now: Duration) {
        self.io.now = now;
        let done = self.foca.leave_cluster(&mut self.io);
        self.count(done);
        self.io.timers.clear();
        self.io.heard.clear();
    }

    /// When [`tick`](Self::tick) is due.
    pub fn deadline(&self) -> Option<Duration> {
        self.io.timers.keys().next().map(|(at, _)| *at)
    }

    /// The next message to be sealed and sent.
    pub fn next_datagram(&mut self) -> Option<(SocketAddr, Vec<u8>)> {
        self.io.datagrams.pop_front()
    }

    /// Is this the end of a suspicion that has been refuted since? foca (2.0.0)
    /// changes nothing at such an end, but tells the member that it is down.
    fn is_refuted(&self, timer: &Timer<Member>) -> bool {
        let Timer::ChangeSuspectToDown { member_id, incarnation, .. } = timer else { return false };
        let mut members = self.foca.iter_membership_state();
        !members.any(|m| m.id() == member_id && m.state() == foca::State::Suspect && m.incarnation() == *incarnation)
    }

    fn count(&mut self, done: Result<(), foca::Error>) {
        // foca leaves its state as it was where it refuses a message.
        self.refused += u64::from(done.is_err());
    }

    fn collect(&mut self, changes: &mut Vec<Change>) {
        for heard in self.io.heard.drain(..) {
            match heard {
                Heard::Up(member) => {
                    self.up.insert(member.instance, member.clone());
                    changes.push(Change::Up(member));
                }
                Heard::Down(member) => {
                    if self.up.remove(&member.instance).is_some() {
                        changes.push(Change::Down(member));
                    }
                }
                // Another process, or another life, at the same address. If the
                // one before was up, so is this one, and nothing else is said.
                Heard::Rename(before, after) => {
                    let was_up = self.up.remove(&before.instance).is_some();
                    if before.instance != after.instance {
                        changes.push(Change::Replaced(before));
                    } else if was_up {
                        changes.push(Change::Down(before));
                    }
                    if was_up {
                        self.up.insert(after.instance, after.clone());
                        changes.push(Change::Up(after));
                    }
                }
                Heard::Renewed(me) => changes.push(Change::Renewed(me)),
            }
        }
        let size = (self.up.len() + 1).next_power_of_two().max(2);
        if size != self.size {
            self.size = size;
            // The periods stay, so the change is one that foca allows.
            let done = self.foca.set_config(config(size));
            self.count(done);
        }
    }
}

/// For a cluster of about `size` members: news is passed on often enough to
/// reach all of them.
fn config(size: usize) -> foca::Config {
    // Whoever knows passes on, so a member hears each piece about this many
    // times, and of `size`² pairs all are to have heard: 4 log₁₀ left 1 in 2000
    // pairs at 256 members to chance, which took tens of seconds.
    // The least is for small clusters: a suspicion that is lost each time it is
    // sent cannot be refuted.
    let transmissions = (6.0 * ((size + 1) as f64).log10()).max(6.0);
    let every = |ms, members| Some(PeriodicParams { frequency: Duration::from_millis(ms), num_members: some(members) });
    foca::Config {
        probe_period: PROBE_PERIOD,
        probe_rtt: PROBE_RTT,
        num_indirect_probes: some(3),
        max_transmissions: NonZeroU8::new(transmissions.ceil() as u8).unwrap_or(NonZeroU8::MIN),
        suspect_to_down_after: SUSPICION,
        max_packet_size: some(MAX_PACKET),
        notify_down_members: true,
        periodic_announce: every(2000, 1),
        periodic_announce_to_down_members: every(2000, 2),
        periodic_gossip: every(100, 3),
        ..foca::Config::simple()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    /// Members on a network without delay; `dead` ones neither hear nor speak.
    struct World {
        members: Vec<Swim>,
        dead: Vec<bool>,
        now: Duration,
        changes: Vec<Vec<(Duration, Change)>>,
    }

    impl World {
        fn new(n: u16) -> Self {
            let member = |i: u16| Member {
                address: SocketAddr::from(([10, 0, 0, 1], 1000 + i)),
                instance: InstanceId(u64::from(i) + 1),
                started: 1,
                life: 0,
            };
            let mut members: Vec<_> = (0..n).map(|i| Swim::new(member(i), u64::from(i))).collect();
            let seed = members[0].me().address;
            members.iter_mut().for_each(|m| m.announce(Duration::ZERO, seed));
            let n = n as usize;
            Self { members, dead: vec![false; n], now: Duration::ZERO, changes: vec![Vec::new(); n] }
        }

        fn run(&mut self, time: Duration) {
            let until = self.now + time;
            while self.now < until {
                self.now += ms(5);
                let mut changes = Vec::new();
                for i in 0..self.members.len() {
                    if !self.dead[i] {
                        self.members[i].tick(self.now, &mut changes);
                        self.changes[i].extend(changes.drain(..).map(|c| (self.now, c)));
                    }
                    while let Some((to, bytes)) = self.members[i].next_datagram() {
                        let target = self.members.iter().position(|m| m.me().address == to);
                        if let Some(j) = target.filter(|&j| !self.dead[j] && !self.dead[i]) {
                            self.members[j].receive(self.now, &bytes, &mut changes);
                            self.changes[j].extend(changes.drain(..).map(|c| (self.now, c)));
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn all_find_each_other_through_one_and_a_dead_one_is_known_within_two_seconds() {
        let mut world = World::new(12);
        world.run(ms(3000));
        assert!(world.members.iter().all(|m| m.up().len() == 11));
        world.dead[5] = true;
        let died = world.now;
        world.run(ms(4000));
        for (i, changes) in world.changes.iter().enumerate().filter(|(i, _)| *i != 5) {
            let found = changes.iter().find(|(_, c)| matches!(c, Change::Down(m) if m.instance == InstanceId(6)));
            let after = found.expect("noticed").0 - died;
            assert!(after <= ms(2000), "member {i} knew after {after:?}");
            assert_eq!(changes.iter().filter(|(_, c)| matches!(c, Change::Down(_))).count(), 1, "and nobody else");
        }
    }

    #[test]
    fn one_that_was_only_away_returns_in_a_new_life() {
        let mut world = World::new(5);
        world.run(ms(2000));
        world.dead[2] = true;
        world.run(ms(4000));
        assert!(world.members[0].up().len() == 3);
        world.dead[2] = false;
        world.run(ms(6000));
        assert!(world.members.iter().all(|m| m.up().len() == 4), "all are back");
        assert!(world.members[2].me().life > 0);
        assert!(world.changes[2].iter().any(|(_, c)| matches!(c, Change::Renewed(_))));
    }

    #[test]
    fn a_restarted_process_replaces_the_one_before_it() {
        let mut world = World::new(4);
        world.run(ms(2000));
        let (old, seed) = (world.members[3].me().clone(), world.members[0].me().address);
        world.members[3] = Swim::new(Member { instance: InstanceId(99), started: 2, ..old.clone() }, 9);
        let now = world.now;
        world.members[3].announce(now, seed);
        world.run(ms(3000));
        for member in &world.members[..3] {
            assert!(member.up().contains_key(&InstanceId(99)) && !member.up().contains_key(&old.instance));
        }
        world.members[3].leave(world.now);
        world.run(ms(1000));
        assert!(world.members[0].up().len() == 2, "who leaves is gone at once");
    }

    #[test]
    fn rubbish_changes_nothing() {
        let mut world = World::new(3);
        world.run(ms(1000));
        let mut changes = Vec::new();
        for n in 0..200usize {
            let bytes: Vec<u8> = (0..n * 8).map(|i| (i * 37 + n * 11) as u8).collect();
            world.members[0].receive(world.now, &bytes, &mut changes);
        }
        assert!(changes.is_empty() && world.members[0].refused() > 0);
        assert_eq!(world.members[0].up().len(), 2);
    }
}
