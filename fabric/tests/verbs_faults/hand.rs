//! A peer made by hand: it speaks the control channel and has a queue pair of
//! its own, and keeps to no rule but the test's.

use std::net::TcpStream;
use std::time::{Duration, Instant};

use distkv_fabric::verbs::link::Link;
use distkv_fabric::verbs::sys::IBV_WR_RDMA_WRITE_WITH_IMM;
use distkv_fabric::verbs::wire::{Control, Endpoint, Landed, Said, Target};
use distkv_fabric::{PeerId, RemoteKey, Transport};

use crate::rig::{End, SHAPE, Shape, Wr, gid};
use crate::world::{Verbs, secret};

/// Requests under way at most.
const DEPTH: u32 = 64;
/// Where in its memory the bytes are that it posts; before them are its receives.
const SOURCE: usize = 2048;

pub struct Hand {
    pub link: Link,
    pub end: End,
    /// How the host names it.
    pub peer: PeerId,
    heard: Vec<Control>,
    posted: u64,
}

impl Hand {
    /// Knocks and says nothing yet.
    pub fn knock(host: &Verbs) -> Self {
        let address = host.transport.address();
        let stream = TcpStream::connect(address.0.strip_prefix("verbs://").unwrap()).unwrap();
        stream.set_nonblocking(true).unwrap();
        stream.set_nodelay(true).unwrap();
        let link = Link::connect(stream.into(), address, &secret()).unwrap();
        let end = End::new(Shape { depth: DEPTH, cq: 256, receives: 8, ..SHAPE });
        assert_eq!(end.receive_of((0..8).map(|i| i * 4), 256), 0);
        Self { link, end, peer: PeerId(u64::MAX), heard: Vec::new(), posted: 0 }
    }

    /// Its end, as it tells of it.
    pub fn endpoint(&self) -> Endpoint {
        Endpoint {
            ethernet: true,
            gid: gid(0).raw,
            lid: 0,
            queue_pair: self.end.number(),
            first_psn: SHAPE.psn,
            mtu: 4096,
            credits: 8,
            buffer: 256,
            incarnation: 1,
        }
    }

    pub fn offer(&self, hello: &[u8]) -> Control {
        Control::Offer { endpoint: self.endpoint(), attempt: 0, hello: hello.to_vec() }
    }

    /// Through the whole handshake, as it should be.
    pub fn join(host: &mut Verbs, hello: &[u8]) -> Self {
        let mut hand = Self::knock(host);
        let before = host.accepted().len();
        hand.says(&hand.offer(hello));
        let theirs = hand.hears(host, |m| if let Control::Answer(theirs) = m { Some(*theirs) } else { None });
        hand.end.connect(hand.end.qp, &Shape { psn: theirs.first_psn, ..SHAPE }, theirs.queue_pair);
        hand.says(&Control::Ready);
        hand.hears(host, |m| (*m == Control::ReadyAck).then_some(()));
        assert_eq!(host.accepted().len(), before + 1);
        hand.peer = host.accepted()[before];
        hand
    }

    pub fn says(&mut self, message: &Control) {
        self.link.send(message).unwrap();
        self.link.flush().unwrap();
    }

    /// Waits for a control message, while the host polls.
    pub fn hears<T>(&mut self, host: &mut Verbs, wanted: impl Fn(&Control) -> Option<T>) -> T {
        let start = Instant::now();
        loop {
            host.poll();
            self.link.flush().unwrap();
            let open = self.link.receive(&mut self.heard);
            if let Some((at, found)) = self.heard.iter().enumerate().find_map(|(i, m)| Some((i, wanted(m)?))) {
                self.heard.remove(at);
                return found;
            }
            assert!(open.is_ok() && start.elapsed() < Duration::from_secs(20), "{open:?}, heard only {:?}", self.heard);
        }
    }

    /// Shows the host one of its keys; where it may write then.
    pub fn opens(&mut self, host: &mut Verbs, key: &RemoteKey) -> Target {
        let region = region(key);
        self.says(&Control::Open { region, token: key.0[14..].try_into().unwrap() });
        self.hears(host, |m| match m {
            Control::Opened { region: of, target } if *of == region => Some(*target),
            _ => None,
        })
    }

    /// Posts, and waits for what becomes of it.
    fn post(&mut self, payload: &[u8], make: impl FnOnce(u64, (usize, u32)) -> Wr) {
        self.end.fill(SOURCE, payload);
        self.end.post(&[make(self.posted, (SOURCE, payload.len() as u32))]).unwrap();
        self.posted += 1;
        self.end.sent(1);
    }

    /// A SEND with any immediate.
    pub fn sends(&mut self, immediate: u32, payload: &[u8]) {
        self.post(payload, |id, from| Wr::send(id, from, immediate.to_be()));
    }

    pub fn says_by_send(&mut self, said: Said, payload: &[u8]) {
        self.sends(said.encode(), payload);
    }

    /// A SEND without an immediate.
    pub fn sends_plainly(&mut self, payload: &[u8]) {
        self.post(payload, |id, from| Wr::new(id, distkv_fabric::verbs::sys::IBV_WR_SEND, from));
    }

    /// Bytes to an address under a key.
    pub fn writes(&mut self, to: (u64, u32), payload: &[u8]) {
        self.post(payload, |id, from| Wr::write(id, from, to));
    }

    /// A write of nothing that notifies.
    pub fn notifies(&mut self, immediate: u32) {
        self.post(b"", |id, from| Wr {
            opcode: IBV_WR_RDMA_WRITE_WITH_IMM,
            immediate: immediate.to_be(),
            ..Wr::write(id, from, (0, 0))
        });
    }

    /// Tells of bytes in its landing zone.
    pub fn tells(&mut self, landed: Landed) {
        self.says_by_send(Said::Landed { receives: 0 }, &landed.encode());
    }

    /// Fills receives of the host, which does not poll, until there is none; how
    /// many there were.
    pub fn fill_every_receive(&mut self) -> usize {
        for filled in 0.. {
            self.end.post(&[Wr::send(self.posted, (SOURCE, 0), 0)]).unwrap();
            self.posted += 1;
            let until = Instant::now() + Duration::from_millis(100);
            while self.end.poll(self.end.send_cq, 1).is_empty() {
                if Instant::now() > until {
                    return filled;
                }
            }
        }
        unreachable!("receives are not without end")
    }
}

/// The region that a key is for.
pub fn region(key: &RemoteKey) -> u32 {
    u32::from_le_bytes(key.0[2..6].try_into().unwrap())
}
