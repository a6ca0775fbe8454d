//! Who belongs to the cluster, and by which connection they are reached.
//!
//! Simple: everybody connects to everybody. The addresses come from the
//! configuration and from [`Message::Peers`]; a member is up from its Hello
//! until its last connection closes, it says Goodbye, or it is silent for too
//! long.
//!
//! [`Message::Peers`]: super::message::Message::Peers

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use rand::Rng;
use rand_chacha::ChaCha8Rng;

use super::message::{Hello, LedgerRow};
use crate::kv::rblock::InstanceId;

/// How long a connection that lost against another to the same member stays
/// open, so that nothing that is under way on it is lost.
const RETIRE_AFTER: Duration = Duration::from_secs(1);
/// Failures in a row after which an address that nobody configured is
/// forgotten.
const FORGET_AFTER: u32 = 20;
/// Most addresses learned from others.
const MAX_TARGETS: usize = 4096;

/// Times that govern membership.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// A member silent for this long is lost.
    pub lost_after: Duration,
    /// A connection without a Hello after this long is closed.
    pub hello_timeout: Duration,
    /// First wait before dialing again.
    pub redial_min: Duration,
    /// Longest such wait.
    pub redial_max: Duration,
}

/// A member that is up.
#[derive(Clone, Debug)]
pub struct Member {
    /// Who it is.
    pub hello: Hello,
    /// Its newest row, corrected by what was granted since.
    pub row: Option<LedgerRow>,
    /// Number of that row.
    pub seq: u64,
    /// The connection to use.
    pub conn: u64,
}

/// A connection.
#[derive(Clone, Debug)]
pub struct Link {
    /// The address dialed; `None`: accepted.
    pub dialed: Option<String>,
    /// When it opened.
    pub opened: Duration,
    /// When anything last came over it.
    pub heard: Duration,
    /// Who is at its other end, once it said so.
    pub instance: Option<InstanceId>,
    /// Another one is preferred: close it then.
    retire: Option<Duration>,
}

struct Target {
    configured: bool,
    dialing: bool,
    next: Duration,
    failures: u32,
    /// Who answered there last.
    instance: Option<InstanceId>,
}

/// What a Hello means.
#[derive(Debug, PartialEq, Eq)]
pub enum Greeting {
    /// A member, on a good connection.
    Welcome {
        /// It was not up before.
        new: bool,
        /// Earlier lives at the same address: they are gone.
        replaced: Vec<InstanceId>,
    },
    /// Close the connection.
    Reject(Rejection),
}

/// Why a connection is closed after its Hello.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rejection {
    /// This instance itself.
    Myself,
    /// Another cluster.
    ForeignCluster,
    /// A later life is known at the same address.
    OlderLife,
}

/// Members, connections and the addresses to dial.
pub struct Membership {
    me: InstanceId,
    cluster: [u8; 16],
    timing: Timing,
    rng: ChaCha8Rng,
    members: BTreeMap<InstanceId, Member>,
    links: BTreeMap<u64, Link>,
    targets: BTreeMap<String, Target>,
    /// Addresses that turned out to be this instance's own.
    own: BTreeSet<String>,
}

impl Membership {
    /// Knows nobody; will dial `join`.
    pub fn new(hello: &Hello, join: &[String], timing: Timing, rng: ChaCha8Rng) -> Self {
        let own = hello.control.iter().cloned().collect();
        let mut this = Self {
            me: hello.instance,
            cluster: hello.cluster,
            timing,
            rng,
            members: BTreeMap::new(),
            links: BTreeMap::new(),
            targets: BTreeMap::new(),
            own,
        };
        join.iter().for_each(|address| this.add_target(address, true, None));
        this
    }

    /// Members that are up.
    pub fn members(&self) -> &BTreeMap<InstanceId, Member> {
        &self.members
    }

    /// One of them.
    pub fn member_mut(&mut self, instance: InstanceId) -> Option<&mut Member> {
        self.members.get_mut(&instance)
    }

    /// Open connections.
    pub fn links(&self) -> &BTreeMap<u64, Link> {
        &self.links
    }

    /// Hears of a member at `address`.
    pub fn introduce(&mut self, instance: InstanceId, address: &str) {
        if instance != self.me && !self.members.contains_key(&instance) && self.targets.len() < MAX_TARGETS {
            self.add_target(address, false, Some(instance));
        }
    }

    /// Addresses to dial now; each ends in [`connected`](Self::connected) or
    /// [`failed`](Self::failed).
    pub fn dial(&mut self, now: Duration) -> Vec<String> {
        let due: Vec<_> = self.idle_targets().filter(|(_, t)| t.next <= now).map(|(a, _)| a.clone()).collect();
        for address in &due {
            if let Some(target) = self.targets.get_mut(address) {
                target.dialing = true;
            }
        }
        due
    }

    /// A dialed connection is open.
    pub fn connected(&mut self, now: Duration, conn: u64, address: &str) {
        if let Some(target) = self.targets.get_mut(address) {
            target.dialing = false;
        }
        let dialed = Some(address.to_owned());
        self.links.insert(conn, Link { dialed, opened: now, heard: now, instance: None, retire: None });
    }

    /// A peer's connection is open.
    pub fn accepted(&mut self, now: Duration, conn: u64) {
        self.links.insert(conn, Link { dialed: None, opened: now, heard: now, instance: None, retire: None });
    }

    /// `address` could not be reached, or what is there is of no use: tries
    /// again later, and later each time.
    pub fn failed(&mut self, now: Duration, address: &str) {
        let Timing { redial_min, redial_max, .. } = self.timing;
        let Some(target) = self.targets.get_mut(address) else { return };
        target.dialing = false;
        target.failures += 1;
        if target.failures >= FORGET_AFTER && !target.configured {
            self.targets.remove(address);
            return;
        }
        let wait = redial_min.saturating_mul(1 << target.failures.min(16)).min(redial_max);
        target.next = now + wait.mul_f64(self.rng.random_range(0.5..1.0));
    }

    /// Takes in a Hello.
    pub fn hello(&mut self, now: Duration, conn: u64, hello: Hello) -> Greeting {
        let instance = hello.instance;
        let dialed = self.links.get(&conn).and_then(|link| link.dialed.clone());
        if instance == self.me {
            if let Some(address) = dialed {
                self.targets.remove(&address);
                self.own.insert(address);
            }
            return Greeting::Reject(Rejection::Myself);
        }
        if hello.cluster != self.cluster {
            return Greeting::Reject(Rejection::ForeignCluster);
        }
        let same_place = |other: &Hello| {
            other.host == hello.host && other.control.iter().any(|address| hello.control.contains(address))
        };
        let others = self.members.values().map(|m| &m.hello);
        let rivals: Vec<_> = others.filter(|h| h.instance != instance && same_place(h)).collect();
        if rivals.iter().any(|rival| (rival.started, rival.instance) > (hello.started, instance)) {
            return Greeting::Reject(Rejection::OlderLife);
        }
        let replaced = rivals.iter().map(|rival| rival.instance).collect();
        if let Some(target) = dialed.as_ref().and_then(|address| self.targets.get_mut(address)) {
            target.instance = Some(instance);
            target.failures = 0;
        }
        if let Some(address) = hello.control.first() {
            self.add_target(address, false, Some(instance));
        }
        if let Some(link) = self.links.get_mut(&conn) {
            link.instance = Some(instance);
            link.heard = now;
        }
        let new = match self.members.get(&instance).map(|member| member.conn) {
            None => {
                self.members.insert(instance, Member { hello, row: None, seq: 0, conn });
                true
            }
            Some(before) => {
                self.prefer(now, instance, before, conn);
                false
            }
        };
        Greeting::Welcome { new, replaced }
    }

    /// Something came over a connection.
    pub fn heard(&mut self, now: Duration, conn: u64) {
        if let Some(link) = self.links.get_mut(&conn) {
            link.heard = now;
        }
    }

    /// Counts `gap`, in which this instance was not running, for no silence.
    pub fn prolong(&mut self, gap: Duration) {
        for link in self.links.values_mut() {
            link.heard += gap;
            link.opened += gap;
        }
    }

    /// A connection is gone, or is being closed: forgets it. Says whether its
    /// member was only reached by it, and so is down.
    pub fn closed(&mut self, now: Duration, conn: u64) -> Option<InstanceId> {
        let link = self.links.remove(&conn)?;
        if let Some(address) = &link.dialed {
            self.failed(now, address);
        }
        let instance = link.instance?;
        let member = self.members.get_mut(&instance)?;
        if member.conn != conn {
            return None;
        }
        let other = self.links.iter_mut().rev().find(|(_, l)| l.instance == Some(instance));
        match other {
            Some((other, link)) => {
                link.retire = None;
                member.conn = *other;
                None
            }
            None => self.members.remove(&instance).map(|_| instance),
        }
    }

    /// Takes a member out; returns its connections, to be closed. `forget`:
    /// nor is it dialed again, unless configured.
    pub fn remove(&mut self, now: Duration, instance: InstanceId, forget: bool) -> Vec<u64> {
        self.members.remove(&instance);
        if forget {
            self.targets.retain(|_, target| target.configured || target.instance != Some(instance));
        }
        let conns: Vec<_> = self.links.iter().filter(|(_, l)| l.instance == Some(instance)).map(|(c, _)| *c).collect();
        for conn in &conns {
            if let Some(address) = self.links.remove(conn).and_then(|link| link.dialed) {
                self.failed(now, &address);
            }
        }
        conns
    }

    /// Connections to close: silent or without a Hello for too long, or
    /// superseded. Each is judged by itself, so that a member who is heard on
    /// one connection is not believed to be reached by another that is dead.
    pub fn stale_links(&self, now: Duration) -> Vec<u64> {
        self.links.iter().filter(|(_, l)| self.link_end(l) <= now).map(|(c, _)| *c).collect()
    }

    /// When there is next something to do.
    pub fn deadline(&self) -> Option<Duration> {
        let stale = self.links.values().map(|l| self.link_end(l));
        let dial = self.idle_targets().map(|(_, t)| t.next);
        stale.chain(dial).min()
    }

    fn link_end(&self, link: &Link) -> Duration {
        match link.instance {
            None => link.opened + self.timing.hello_timeout,
            Some(_) => link.retire.unwrap_or(Duration::MAX).min(link.heard + self.timing.lost_after),
        }
    }

    /// Of two connections to one member keeps the one that the member of lower
    /// id dialed, so that both ends choose the same. Of two dialed by one end it
    /// is that end who chooses (the newer) and closes the other.
    fn prefer(&mut self, now: Duration, instance: InstanceId, before: u64, conn: u64) {
        if before == conn {
            return;
        }
        let lower_dials = self.me < instance;
        let by_me = |conn: &u64| self.links.get(conn).is_some_and(|link| link.dialed.is_some());
        let same_end = by_me(&before) == by_me(&conn);
        let keep = if same_end || by_me(&conn) == lower_dials { conn } else { before };
        let drop = if keep == conn { before } else { conn };
        let mine_to_close = !same_end || by_me(&conn);
        if let Some(member) = self.members.get_mut(&instance) {
            member.conn = keep;
        }
        if let Some(link) = self.links.get_mut(&drop).filter(|_| mine_to_close) {
            link.retire = Some(now + RETIRE_AFTER);
        }
    }

    fn add_target(&mut self, address: &str, configured: bool, instance: Option<InstanceId>) {
        if self.own.contains(address) || address.is_empty() {
            return;
        }
        let target = self.targets.entry(address.to_owned()).or_insert(Target {
            configured: false,
            dialing: false,
            next: Duration::ZERO,
            failures: 0,
            instance,
        });
        target.configured |= configured;
        if instance.is_some() {
            target.instance = instance;
        }
    }

    /// Addresses behind which nobody is known to be up, and that are not being
    /// dialed.
    fn idle_targets(&self) -> impl Iterator<Item = (&String, &Target)> {
        self.targets.iter().filter(|(address, target)| {
            let up = target.instance.is_some_and(|instance| self.members.contains_key(&instance));
            let open = || self.links.values().any(|link| link.dialed.as_ref() == Some(*address));
            !target.dialing && !up && !open()
        })
    }
}
