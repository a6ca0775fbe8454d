//! Connections of the control plane: dialed when there is something to say to
//! an instance, kept while they are used. Nothing is said to an instance before
//! whoever answered at its address has proved to be that very instance: a
//! message to an earlier life must not reach the next one.

use std::collections::BTreeMap;
use std::time::Duration;

use super::row::LinkRow;
use crate::kv::rblock::InstanceId;

/// A connection over which nothing has passed for this long is closed.
const IDLE: Duration = Duration::from_secs(30);
/// An address that could not be reached is not dialed again for this long.
const REDIAL: Duration = Duration::from_millis(100);
/// Most messages that wait for a connection to one instance.
const MAX_QUEUE: usize = 1024;

/// A connection.
#[derive(Clone, Debug)]
pub struct Link {
    /// The address dialed; `None`: accepted.
    pub dialed: Option<String>,
    /// Whom it was dialed for.
    wanted: Option<InstanceId>,
    /// Who is at its other end, once it said so.
    pub instance: Option<InstanceId>,
    /// When it opened.
    pub opened: Duration,
    /// When anything last came over it.
    pub heard: Duration,
    /// When anything last passed, either way.
    used: Duration,
}

struct Dial {
    instance: InstanceId,
    /// Not before this; `None`: under way.
    again: Option<Duration>,
}

/// All of them.
#[derive(Default)]
pub struct Links {
    links: BTreeMap<u64, Link>,
    /// The connection used for each instance.
    of: BTreeMap<InstanceId, u64>,
    dials: BTreeMap<String, Dial>,
    queues: BTreeMap<InstanceId, Vec<Vec<u8>>>,
    rtt_us: BTreeMap<InstanceId, u32>,
}

/// What a message to an instance needs.
#[derive(Debug, PartialEq, Eq)]
pub enum Route {
    /// Send it here.
    Send(u64),
    /// It waits; connect to its address.
    Connect,
    /// It waits for a connection that is coming.
    Wait,
    /// It was dropped: the instance could not be reached just now.
    Unreachable,
}

/// Why a connection is closed after its Hello.
pub type Rejection = &'static str;

impl Links {
    /// Open connections, by name.
    pub fn open(&self) -> &BTreeMap<u64, Link> {
        &self.links
    }

    /// A connection.
    pub fn get(&self, conn: u64) -> Option<&Link> {
        self.links.get(&conn)
    }

    /// Measured round trips, for the row.
    pub fn rows(&self) -> impl Iterator<Item = LinkRow> + '_ {
        self.rtt_us.iter().map(|(peer, rtt_us)| LinkRow { peer: *peer, rtt_us: *rtt_us, mb_s: 0 })
    }

    /// The measured round trip to an instance.
    pub fn rtt_us(&self, instance: InstanceId) -> Option<u32> {
        self.rtt_us.get(&instance).copied()
    }

    /// How `bytes` get to `instance`, whose address is `address`; keeps them
    /// where they must wait.
    pub fn route(&mut self, now: Duration, instance: InstanceId, address: Option<&str>, bytes: &[u8]) -> Route {
        if let Some(conn) = self.of.get(&instance) {
            if let Some(link) = self.links.get_mut(conn) {
                link.used = now;
            }
            return Route::Send(*conn);
        }
        let queue = self.queues.entry(instance).or_default();
        let coming = self.links.values().any(|l| l.wanted == Some(instance) && l.instance.is_none());
        let Some(address) = address.filter(|_| queue.len() < MAX_QUEUE) else {
            return if coming { Route::Wait } else { Route::Unreachable };
        };
        let dial = self.dials.get(address);
        if dial.is_some_and(|d| d.again.is_some_and(|again| again > now)) {
            return Route::Unreachable;
        }
        queue.push(bytes.to_vec());
        if coming || dial.is_some_and(|d| d.again.is_none() && d.instance == instance) {
            return Route::Wait;
        }
        self.dials.insert(address.to_owned(), Dial { instance, again: None });
        Route::Connect
    }

    /// A dialed connection is open.
    pub fn connected(&mut self, now: Duration, conn: u64, address: &str) {
        let wanted = self.dials.remove(address).map(|dial| dial.instance);
        let dialed = Some(address.to_owned());
        self.links.insert(conn, Link { dialed, wanted, instance: None, opened: now, heard: now, used: now });
    }

    /// A peer connected.
    pub fn accepted(&mut self, now: Duration, conn: u64) {
        let link = Link { dialed: None, wanted: None, instance: None, opened: now, heard: now, used: now };
        self.links.insert(conn, link);
    }

    /// An address could not be reached; what waited for it is dropped.
    pub fn failed(&mut self, now: Duration, address: &str) {
        if let Some(dial) = self.dials.get_mut(address) {
            dial.again = Some(now + REDIAL);
            self.queues.remove(&dial.instance);
        }
    }

    /// Who is at the other end; what waited for it is to be sent now.
    pub fn hello(&mut self, now: Duration, conn: u64, instance: InstanceId) -> Result<Vec<Vec<u8>>, Rejection> {
        let Some(link) = self.links.get_mut(&conn) else { return Ok(Vec::new()) };
        if let Some(wanted) = link.wanted.filter(|wanted| *wanted != instance) {
            self.queues.remove(&wanted);
            return Err("another instance answers at its address");
        }
        link.instance = Some(instance);
        link.heard = now;
        link.used = now;
        self.of.entry(instance).or_insert(conn);
        Ok(self.queues.remove(&instance).unwrap_or_default())
    }

    /// Something came over a connection.
    pub fn heard(&mut self, now: Duration, conn: u64) {
        if let Some(link) = self.links.get_mut(&conn) {
            link.heard = now;
            link.used = now;
        }
    }

    /// A round trip to an instance was measured.
    pub fn measured(&mut self, instance: InstanceId, rtt: Duration) {
        let rtt = u32::try_from(rtt.as_micros()).unwrap_or(u32::MAX).max(1);
        let smooth = self.rtt_us.entry(instance).or_insert(rtt);
        *smooth = ((u64::from(*smooth) * 7 + u64::from(rtt)) / 8).max(1) as u32;
    }

    /// Counts `gap`, in which this instance was not running, for no silence.
    pub fn prolong(&mut self, gap: Duration) {
        for link in self.links.values_mut() {
            link.heard += gap;
            link.opened += gap;
            link.used += gap;
        }
    }

    /// A connection is gone: forgets it.
    pub fn closed(&mut self, conn: u64) {
        let Some(link) = self.links.remove(&conn) else { return };
        if let Some(wanted) = link.wanted.filter(|_| link.instance.is_none()) {
            self.queues.remove(&wanted);
        }
        let Some(instance) = link.instance.filter(|i| self.of.get(i) == Some(&conn)) else { return };
        match self.links.iter().find(|(_, l)| l.instance == Some(instance)) {
            Some((other, _)) => self.of.insert(instance, *other),
            None => self.of.remove(&instance),
        };
    }

    /// An instance is gone: its connections, to be closed.
    pub fn remove(&mut self, instance: InstanceId) -> Vec<u64> {
        self.queues.remove(&instance);
        self.rtt_us.remove(&instance);
        self.dials.retain(|_, dial| dial.instance != instance);
        let its = |l: &Link| l.instance == Some(instance) || l.wanted == Some(instance);
        let conns: Vec<_> = self.links.iter().filter(|(_, l)| its(l)).map(|(conn, _)| *conn).collect();
        conns.iter().for_each(|conn| self.closed(*conn));
        conns
    }

    /// Connections to close: without a Hello for `hello_timeout`; silent for
    /// `lost_after` though heartbeats go over them (`beating`); unused.
    pub fn stale(
        &self,
        now: Duration,
        hello_timeout: Duration,
        lost_after: Duration,
        beating: impl Fn(InstanceId) -> bool,
    ) -> Vec<u64> {
        let over = |link: &Link| now >= self.end(link, hello_timeout, lost_after, &beating);
        self.links.iter().filter(|(_, link)| over(link)).map(|(conn, _)| *conn).collect()
    }

    /// When the next connection will be stale.
    pub fn deadline(
        &self,
        hello_timeout: Duration,
        lost_after: Duration,
        beating: impl Fn(InstanceId) -> bool,
    ) -> Option<Duration> {
        self.links.values().map(|link| self.end(link, hello_timeout, lost_after, &beating)).min()
    }

    fn end(
        &self,
        link: &Link,
        hello_timeout: Duration,
        lost_after: Duration,
        beating: &impl Fn(InstanceId) -> bool,
    ) -> Duration {
        match link.instance {
            None => link.opened + hello_timeout,
            Some(instance) if beating(instance) => link.heard + lost_after,
            Some(_) => link.used + IDLE,
        }
    }
}
