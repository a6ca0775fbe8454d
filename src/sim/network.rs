//! The network between simulated instances: datagrams that are delayed, lost,
//! doubled and overtake each other; connections that are ordered and reliable
//! until a partition breaks them. Times are virtual, chance is seeded.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use rand::Rng;
use rand_chacha::ChaCha8Rng;

/// An instance's place in the world: keeps its address through restarts.
pub type Slot = usize;

/// What a connection carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Port {
    /// Control plane.
    Control,
    /// A debtor's lane to a creditor.
    Lane,
}

/// Delays and accidents.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Weather {
    /// Least delay of a control message.
    pub delay: Duration,
    /// Most that chance adds to it.
    pub jitter: Duration,
    /// Slots of one host, neighbours.
    pub host_slots: usize,
    /// Delay of a message on a lane: between hosts, within one.
    pub lane_delay: [Duration; 2],
    /// Bandwidth of a slot, each way, bytes a second: to other hosts, within
    /// its own.
    pub bytes_s: [f64; 2],
    /// Share of datagrams lost.
    pub loss: f64,
    /// Share of datagrams that arrive twice.
    pub doubled: f64,
}

/// Something arrives at a slot. `M` is a message on a connection.
#[derive(Clone, Debug)]
pub enum Arrival<M> {
    /// A connection asked for is open.
    Connected {
        /// Its name at this end.
        conn: u64,
        /// The ask.
        ask: u64,
    },
    /// It did not come about.
    ConnectFailed {
        /// The ask.
        ask: u64,
    },
    /// A peer connected.
    Accepted {
        /// The connection's name at this end.
        conn: u64,
        /// To what.
        port: Port,
    },
    /// A message.
    Message {
        /// Over which connection.
        conn: u64,
        /// What.
        message: M,
    },
    /// A connection is gone.
    Closed {
        /// Which.
        conn: u64,
    },
    /// A datagram.
    Datagram {
        /// From whom.
        from: Slot,
        /// What.
        bytes: Vec<u8>,
    },
}

struct End {
    slot: Slot,
    peer: u64,
    port: Port,
    open: bool,
    /// Cut: nothing passes any more; both ends hear of it later.
    dead: bool,
    /// Nothing arrives here before this.
    last: Duration,
}

/// Figures of a network.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Messages of the control plane, datagrams included.
    pub control_messages: u64,
    /// Their bytes.
    pub control_bytes: u64,
    /// Bytes on lanes.
    pub lane_bytes: u64,
}

/// The network. What it returns is to be delivered at the time given with it.
pub struct Network<M> {
    weather: Weather,
    ends: BTreeMap<u64, End>,
    /// Ordered pairs between which nothing passes.
    cuts: BTreeMap<(Slot, Slot), u32>,
    /// Until when a slot's ways out of and into its host and within it are busy:
    /// slot, near, out.
    busy: BTreeMap<(Slot, bool, bool), Duration>,
    names: u64,
    posts: Vec<(Duration, Slot, Arrival<M>)>,
    /// Figures since the start.
    pub traffic: Traffic,
}

impl<M> Network<M> {
    /// A network without connections.
    pub fn new(weather: Weather) -> Self {
        Self {
            weather,
            ends: BTreeMap::new(),
            cuts: BTreeMap::new(),
            busy: BTreeMap::new(),
            names: 0,
            posts: Vec::new(),
            traffic: Traffic::default(),
        }
    }

    /// What is on its way since the last call: when, to whom, what.
    pub fn take(&mut self) -> Vec<(Duration, Slot, Arrival<M>)> {
        std::mem::take(&mut self.posts)
    }

    /// Is `arrival` still to be delivered? What is for a connection that was
    /// closed meanwhile is not.
    pub fn admits(&mut self, arrival: &Arrival<M>) -> bool {
        match arrival {
            Arrival::Connected { conn, .. } | Arrival::Accepted { conn, .. } => {
                self.ends.get(conn).is_some_and(|end| end.open)
            }
            Arrival::Message { conn, .. } => self.ends.get(conn).is_some_and(|end| end.open && !end.dead),
            Arrival::Closed { conn } => {
                let open = self.ends.get_mut(conn).is_some_and(|end| std::mem::replace(&mut end.open, false));
                self.forget(*conn);
                open
            }
            Arrival::ConnectFailed { .. } | Arrival::Datagram { .. } => true,
        }
    }

    /// Asks for a connection from one slot to another (`None`: nobody has the
    /// address). Ends in `Connected` or `ConnectFailed` with `ask`.
    pub fn dial(&mut self, now: Duration, rng: &mut ChaCha8Rng, from: Slot, to: Option<Slot>, port: Port, ask: u64) {
        let delay = self.delay(rng, port, from, to.unwrap_or(from));
        let Some(to) = to.filter(|to| !self.is_cut(from, *to)) else {
            return self.posts.push((now + delay * 2, from, Arrival::ConnectFailed { ask }));
        };
        self.names += 2;
        let (here, there) = (self.names - 1, self.names);
        let end = |slot, peer| End { slot, peer, port, open: true, dead: false, last: now };
        self.ends.insert(here, end(from, there));
        self.ends.insert(there, end(to, here));
        self.post(now + delay, there, Arrival::Accepted { conn: there, port });
        self.post(now + delay * 2, here, Arrival::Connected { conn: here, ask });
    }

    /// Sends a message of `bytes` bytes, after all before it. Its bytes began to
    /// leave at `since`, where they were made bit by bit before now.
    pub fn send(&mut self, now: Duration, since: Duration, rng: &mut ChaCha8Rng, conn: u64, bytes: u64, message: M) {
        let Some(end) = self.ends.get(&conn).filter(|end| end.open && !end.dead) else { return };
        let (from, port, peer) = (end.slot, end.port, end.peer);
        let Some(to) = self.ends.get(&peer).map(|end| end.slot) else { return };
        let mut start = now;
        match port {
            Port::Control => {
                self.traffic.control_messages += 1;
                self.traffic.control_bytes += bytes;
            }
            Port::Lane => {
                self.traffic.lane_bytes += bytes;
                let near = self.near(from, to);
                let time = Duration::from_secs_f64(bytes as f64 / self.weather.bytes_s[usize::from(near)]);
                for end in [(from, near, true), (to, near, false)] {
                    let busy = self.busy.entry(end).or_default();
                    *busy = (*busy).max(since) + time;
                    start = start.max(*busy);
                }
            }
        }
        let at = start + self.delay(rng, port, from, to);
        self.post(at, peer, Arrival::Message { conn: peer, message });
    }

    /// Sends a datagram: it may be lost, arrive twice, or after a later one.
    pub fn datagram(&mut self, now: Duration, rng: &mut ChaCha8Rng, from: Slot, to: Slot, bytes: Vec<u8>) {
        self.traffic.control_messages += 1;
        self.traffic.control_bytes += bytes.len() as u64;
        let copies = 1 + u32::from(rng.random_bool(self.weather.doubled));
        for _ in 0..copies {
            let at = now + self.delay(rng, Port::Control, from, to);
            if !rng.random_bool(self.weather.loss) && !self.is_cut(from, to) {
                self.posts.push((at, to, Arrival::Datagram { from, bytes: bytes.clone() }));
            }
        }
    }

    /// Closes this end; the other hears of it after all that was sent.
    pub fn close(&mut self, now: Duration, rng: &mut ChaCha8Rng, conn: u64) {
        let Some(end) = self.ends.get_mut(&conn) else { return };
        let (slot, peer, port, dead) = (end.slot, end.peer, end.port, end.dead);
        if std::mem::replace(&mut end.open, false) && !dead {
            let to = self.ends.get(&peer).map_or(slot, |end| end.slot);
            let at = now + self.delay(rng, port, slot, to);
            self.post(at, peer, Arrival::Closed { conn: peer });
        }
        self.forget(conn);
    }

    /// A process is gone: the system closes what it had.
    pub fn crash(&mut self, now: Duration, rng: &mut ChaCha8Rng, slot: Slot) {
        let its: Vec<_> = self.ends.iter().filter(|(_, e)| e.slot == slot && e.open).map(|(conn, _)| *conn).collect();
        its.into_iter().for_each(|conn| self.close(now, rng, conn));
    }

    /// Cuts two slots off from each other. Connections between them carry
    /// nothing from now on, and break somewhat later.
    pub fn cut(&mut self, now: Duration, rng: &mut ChaCha8Rng, a: Slot, b: Slot) {
        *self.cuts.entry((a, b)).or_default() += 1;
        *self.cuts.entry((b, a)).or_default() += 1;
        let slots = BTreeSet::from([a, b]);
        let across = |end: &End| {
            let peer = self.ends.get(&end.peer).map(|peer| peer.slot);
            !end.dead && slots.contains(&end.slot) && peer.is_some_and(|p| p != end.slot && slots.contains(&p))
        };
        let broken: Vec<_> = self.ends.iter().filter(|(_, end)| across(end)).map(|(conn, _)| *conn).collect();
        for conn in broken {
            if let Some(end) = self.ends.get_mut(&conn) {
                end.dead = true;
            }
            let at = now + Duration::from_millis(rng.random_range(50..4000));
            self.post(at, conn, Arrival::Closed { conn });
        }
    }

    /// Ends one cut between two slots.
    pub fn heal(&mut self, a: Slot, b: Slot) {
        for pair in [(a, b), (b, a)] {
            match self.cuts.get_mut(&pair) {
                Some(count) if *count > 1 => *count -= 1,
                _ => drop(self.cuts.remove(&pair)),
            }
        }
    }

    /// Does nothing pass between them?
    pub fn is_cut(&self, a: Slot, b: Slot) -> bool {
        self.cuts.contains_key(&(a, b))
    }

    /// The slot at the other end.
    pub fn peer(&self, conn: u64) -> Option<Slot> {
        self.ends.get(&self.ends.get(&conn)?.peer).map(|end| end.slot)
    }

    /// Are both on one host?
    fn near(&self, a: Slot, b: Slot) -> bool {
        a / self.weather.host_slots == b / self.weather.host_slots
    }

    fn delay(&self, rng: &mut ChaCha8Rng, port: Port, from: Slot, to: Slot) -> Duration {
        match port {
            Port::Lane => self.weather.lane_delay[usize::from(self.near(from, to))],
            Port::Control => {
                let jitter = self.weather.jitter.as_nanos() as u64;
                self.weather.delay + Duration::from_nanos(rng.random_range(0..=jitter))
            }
        }
    }

    fn post(&mut self, at: Duration, conn: u64, arrival: Arrival<M>) {
        let Some(end) = self.ends.get_mut(&conn) else { return };
        end.last = end.last.max(at);
        self.posts.push((end.last, end.slot, arrival));
    }

    /// Forgets a connection once both its ends are closed.
    fn forget(&mut self, conn: u64) {
        let closed = |end: &End| !end.open;
        let Some(peer) = self.ends.get(&conn).filter(|end| closed(end)).map(|end| end.peer) else { return };
        if self.ends.get(&peer).is_none_or(closed) {
            self.ends.remove(&conn);
            self.ends.remove(&peer);
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    fn network(loss: f64) -> (Network<u32>, ChaCha8Rng) {
        let ms = Duration::from_millis;
        let (lane_delay, bytes_s) = ([ms(1); 2], [1e6, 4e6]);
        let weather = Weather { delay: ms(1), jitter: ms(30), host_slots: 2, lane_delay, bytes_s, loss, doubled: loss };
        (Network::new(weather), ChaCha8Rng::seed_from_u64(1))
    }

    #[test]
    fn a_connection_is_ordered_and_a_cut_breaks_it() {
        let (mut net, mut rng) = network(0.0);
        let zero = Duration::ZERO;
        net.dial(zero, &mut rng, 0, Some(1), Port::Control, 9);
        let opened = net.take();
        let Arrival::Connected { conn, ask: 9 } = opened[1].2 else { panic!("{opened:?}") };
        (0..100).for_each(|i| net.send(zero, zero, &mut rng, conn, 10, i));
        let sent = net.take();
        assert!(sent.windows(2).all(|w| w[0].0 <= w[1].0), "delays never reorder");
        net.cut(zero, &mut rng, 0, 1);
        assert!(sent.iter().all(|(_, _, arrival)| !net.admits(arrival)), "what was on its way is lost");
        let closed = net.take();
        assert_eq!(closed.len(), 2, "both ends hear of it");
        assert!(closed.iter().all(|(_, _, arrival)| net.admits(arrival)));
        net.dial(zero, &mut rng, 0, Some(1), Port::Control, 10);
        assert!(matches!(net.take()[0].2, Arrival::ConnectFailed { ask: 10 }));
        net.heal(0, 1);
        net.dial(zero, &mut rng, 0, Some(1), Port::Control, 11);
        assert!(matches!(net.take()[1].2, Arrival::Connected { ask: 11, .. }));
    }

    #[test]
    fn datagrams_are_lost_doubled_and_reordered() {
        let (mut net, mut rng) = network(0.2);
        for i in 0..1000u32 {
            net.datagram(Duration::from_millis(u64::from(i)), &mut rng, 0, 1, i.to_le_bytes().to_vec());
        }
        let mut posts = net.take();
        assert!((700..1200).contains(&posts.len()), "{}", posts.len());
        posts.sort_by_key(|post| post.0);
        let bytes = |post: &(Duration, Slot, Arrival<u32>)| match &post.2 {
            Arrival::Datagram { bytes, .. } => u32::from_le_bytes(bytes[..].try_into().unwrap()),
            other => panic!("{other:?}"),
        };
        let order: Vec<_> = posts.iter().map(bytes).collect();
        assert!(order.windows(2).any(|w| w[0] > w[1]) && order.windows(2).any(|w| w[0] == w[1]));
    }

    #[test]
    fn a_lane_takes_its_bytes_time() {
        let (mut net, mut rng) = network(0.0);
        net.dial(Duration::ZERO, &mut rng, 0, Some(2), Port::Lane, 1);
        let Arrival::Connected { conn, .. } = net.take()[1].2 else { panic!() };
        net.dial(Duration::ZERO, &mut rng, 2, Some(3), Port::Lane, 2);
        let Arrival::Connected { conn: within, .. } = net.take()[1].2 else { panic!() };
        let second = Duration::from_secs(1);
        net.send(Duration::ZERO, Duration::ZERO, &mut rng, conn, 1_000_000, 1);
        net.send(Duration::ZERO, Duration::ZERO, &mut rng, conn, 1_000_000, 2);
        net.send(second * 4, second * 3, &mut rng, conn, 500_000, 3);
        let at: Vec<_> = net.take().iter().map(|post| post.0.as_millis()).collect();
        assert_eq!(at, [1001, 2001, 4001], "the third left while it was made");
        assert_eq!(net.traffic.lane_bytes, 2_500_000);
        net.send(second * 5, second * 5, &mut rng, within, 1_000_000, 4);
        net.send(second * 5, second * 5, &mut rng, within, 1_000_000, 5);
        let at: Vec<_> = net.take().iter().map(|post| post.0.as_millis()).collect();
        assert_eq!(at, [5251, 5501], "within a host the way is another");
    }
}
