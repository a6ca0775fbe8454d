//! One connection: the control channel, the queue pair, and how far they are.
//!
//! 1. The connecting side makes a queue pair and offers it with its hello.
//! 2. The accepting side makes its own, connects it and answers.
//! 3. The connecting side connects its own: *ready*. The accepting side's owner
//!    hears of the connection and may post.
//! 4. *Ready-ack*: the connecting side's owner hears of it, and posts go out.
//!
//! It ends by a *bye*, which says how many posts have gone out before, so that
//! the last of them are still handed over; by the control channel's end; by a
//! failed request; or by the device's word.

use std::time::{Duration, Instant};

use super::link::Link;
use super::queue::{Failed, is_flush};
use super::rail::Rail;
use super::receiver::Receiver;
use super::receives::BUFFER;
use super::sender::Sender;
use super::sys::{
    IBV_WC_RECV, IBV_WC_RECV_RDMA_WITH_IMM, IBV_WC_REM_ACCESS_ERR, IBV_WC_RETRY_EXC_ERR, IBV_WC_SUCCESS,
    IBV_WC_WITH_IMM, ibv_wc,
};
use super::wire::{Control, Endpoint, Noted, Said};
use crate::key::Token;
use crate::regions::Regions;
use crate::{Address, Error, Event, PeerId, RegionId, Result};

/// How long the last posts of a peer that said bye may take.
pub const LAST_POSTS: Duration = Duration::from_secs(2);

/// What may have happened where the peer closed without a word.
const CLOSED: &str = "closed during the handshake: has it another cluster key, or no RDMA port that is up?";

/// What breaks a queue pair from the other side.
const DENIED: &str = "a request that our device refused: a write that its key does not allow, or a malformed one";

/// How far a connection has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// It is being made, until the instant.
    Greeting { until: Instant },
    /// Posts may flow.
    Open,
    /// The peer has ended it; its last posts are awaited until the instant.
    Ending { posts: u64, until: Instant },
}

/// Both ends of a connection and what flows between them.
pub struct Connection {
    pub link: Link,
    pub phase: Phase,
    /// Where we connected to; none if the peer connected to us.
    pub target: Option<Address>,
    /// Which rail it goes over.
    pub rail: usize,
    /// Before the sender: windows go before the queue pair that they are bound
    /// on, whose destruction may wait for them (rxe's does, for a minute).
    pub receiver: Receiver,
    /// There once the queue pair is.
    pub sender: Option<Sender>,
    /// The first packet's number that we told the peer.
    first_psn: u32,
    /// The life of the peer's transport, once it has told it.
    pub incarnation: Option<u64>,
    /// What the peer said of itself.
    hello: Vec<u8>,
    /// The peer's *ready-ack* was read.
    acknowledged: bool,
    /// On the list of those with something to do.
    pub listed: bool,
    /// The control channel may hold something.
    pub ready: bool,
    /// Why it ends, found where it could not be told.
    pub broken: Option<Error>,
    /// The socket is watched for room.
    pub told_writable: bool,
}

/// What a control message was the end of.
enum Became {
    Same,
    Accepted,
    Connected,
}

impl Connection {
    /// A connection of which nothing is exchanged yet; `target` if it is we who
    /// connect.
    pub fn new(link: Link, target: Option<Address>, rail: usize, until: Instant) -> Self {
        Self {
            link,
            phase: Phase::Greeting { until },
            target,
            rail,
            sender: None,
            receiver: Receiver::default(),
            first_psn: 0,
            incarnation: None,
            hello: Vec::new(),
            acknowledged: false,
            listed: true,
            ready: true,
            broken: None,
            told_writable: false,
        }
    }

    /// May the owner of the transport know of it? Not of a stranger.
    pub fn is_known(&self) -> bool {
        self.target.is_some() || !matches!(self.phase, Phase::Greeting { .. })
    }

    /// Makes the queue pair and offers it.
    pub fn offer(&mut self, peer: PeerId, rail: &mut Rail, attempt: u32, hello: &[u8]) -> Result<()> {
        let endpoint = self.make_queue(peer, rail)?;
        self.link.send(&Control::Offer { endpoint, attempt, hello: hello.to_vec() })
    }

    fn make_queue(&mut self, peer: PeerId, rail: &mut Rail) -> Result<Endpoint> {
        self.first_psn = random_psn()?;
        let (sender, endpoint) = rail.sender(self.first_psn)?;
        rail.enter(endpoint.queue_pair, peer);
        self.sender = Some(sender);
        Ok(endpoint)
    }

    /// Gives its part of the rail back.
    pub fn leave(&mut self, rail: &mut Rail) {
        self.receiver.close();
        if let Some(sender) = self.sender.take() {
            rail.leave(sender);
        }
    }

    /// The sending half, to post.
    #[inline]
    pub fn sender(&mut self, peer: PeerId) -> Result<&mut Sender> {
        match &mut self.sender {
            Some(sender) => Ok(sender),
            None => Err(Error::UnknownPeer(peer)),
        }
    }

    /// What a post came to: what the caller can mend is told, all else ends the
    /// connection. Put on the list if there is something to do for it; whatever
    /// else needs attention was listed when it came up.
    #[inline]
    pub fn posted(&mut self, peer: PeerId, outcome: Result<()>, active: &mut Vec<PeerId>) -> Result<()> {
        match outcome {
            Ok(()) => {}
            Err(e @ (Error::Full { .. } | Error::UnknownPeer(_))) => return Err(e),
            Err(e) => drop(self.broken.get_or_insert(e)),
        }
        let attend = self.broken.is_some() || self.sender.as_ref().is_some_and(Sender::needs_attention);
        if attend && !std::mem::replace(&mut self.listed, true) {
            active.push(peer);
        }
        Ok(())
    }

    /// Is there something to do even if nothing arrives?
    #[inline]
    pub fn needs_attention(&self) -> bool {
        let posts = self.sender.as_ref().is_some_and(Sender::needs_attention);
        posts || self.ready || self.broken.is_some() || self.receiver.is_opening() || self.link.has_output()
    }

    /// Would a poll move it along at once?
    pub fn has_moves(&self) -> bool {
        let posts = self.sender.as_ref().is_some_and(|s| !s.asks.is_empty() || !s.bound.is_empty() || s.owed.holds());
        posts || self.ready || self.broken.is_some()
    }

    /// Completions of its posts end a wait; true if there are some already.
    pub fn arm_completions(&mut self) -> Result<bool> {
        let Some(sender) = &mut self.sender else { return Ok(false) };
        if !sender.queue.busy() {
            return Ok(false);
        }
        sender.queue.arm()?;
        let under_way = sender.queue.room();
        // A failure is found again by the next poll.
        let failed = sender.reap()?.is_err();
        Ok(failed || sender.queue.room() != under_way)
    }

    /// Handles a completed receive; the error is why the connection has to be
    /// closed.
    #[inline]
    pub fn receive(
        &mut self,
        peer: PeerId,
        completion: &ibv_wc,
        rail: &Rail,
        regions: &Regions,
        buffer: &mut [u8; BUFFER],
        sink: &mut dyn FnMut(Event<'_>),
    ) -> Result<()> {
        if completion.status != IBV_WC_SUCCESS {
            let text = super::objects::status_text(&rail.context, completion.status);
            return Err(Error::Lost(format!("{}: a receive failed: {text}", rail.name)));
        }
        if self.heard_early()? {
            sink(Event::Connected { peer });
        }
        let immediate = u32::from_be(completion.imm_data);
        match completion.opcode {
            IBV_WC_RECV_RDMA_WITH_IMM => {
                let sender = self.sender.as_mut().ok_or_else(out_of_turn)?;
                self.receiver.notified(peer, Noted::decode(immediate), sender, sink)
            }
            IBV_WC_RECV if completion.wc_flags & IBV_WC_WITH_IMM != 0 => {
                let said = Said::decode(immediate).map_err(|what| Error::Protocol(what.into()))?;
                let payload = rail.receives.read(completion.wr_id, completion.byte_len, buffer);
                let absent = || Error::Lost("the device filled a buffer that there is not".into());
                let sender = self.sender.as_mut().ok_or_else(out_of_turn)?;
                let whose = (sender, regions, &self.hello[..]);
                self.receiver.said(peer, said, payload.ok_or_else(absent)?, whose, sink)
            }
            _ => Err(Error::Protocol("a post that says nothing".into())),
        }
    }

    /// Moves it along; the error is why it has to be closed.
    pub fn advance(
        &mut self,
        peer: PeerId,
        rails: &mut [Rail],
        regions: &Regions,
        sink: &mut dyn FnMut(Event<'_>),
    ) -> Result<()> {
        if let Some(broken) = self.broken.take() {
            return Err(broken);
        }
        if self.ready {
            self.ready = false;
            self.listen(peer, rails, regions, sink)?;
        }
        match self.phase {
            Phase::Ending { posts, .. } if self.receiver.posts >= posts => Err(Error::PeerGone),
            // The peer takes nothing any more.
            Phase::Ending { .. } => Ok(()),
            Phase::Greeting { .. } | Phase::Open => self.move_posts(&rails[self.rail]),
        }
    }

    /// Takes completions, posts what waits, returns credits, binds windows.
    pub fn move_posts(&mut self, rail: &Rail) -> Result<()> {
        let Some(sender) = &mut self.sender else { return self.link.flush() };
        if let Err(failed) = sender.reap()? {
            return Err(cause(failed, rail));
        }
        if sender.has_output() {
            sender.flush()?;
        }
        for (region, token) in sender.asks.drain(..) {
            self.link.send(&Control::Open { region, token: token.0 })?;
        }
        sender.return_credits()?;
        if self.receiver.is_opening() {
            let mut told = Vec::new();
            self.receiver.attend(sender, |message| told.push(message))?;
            for message in told {
                self.link.send(&message)?;
            }
        }
        self.link.flush()
    }

    /// Takes what the control channel has.
    fn listen(
        &mut self,
        peer: PeerId,
        rails: &mut [Rail],
        regions: &Regions,
        sink: &mut dyn FnMut(Event<'_>),
    ) -> Result<()> {
        let mut messages = Vec::new();
        let ended = self.link.receive(&mut messages);
        for message in messages {
            match self.hear(peer, message, rails, regions)? {
                Became::Same => {}
                Became::Accepted => sink(Event::Accepted { peer, hello: &self.hello }),
                Became::Connected => sink(Event::Connected { peer }),
            }
        }
        match ended {
            Ok(more) => {
                self.ready = more;
                Ok(())
            }
            // A bye was the last word: the posts before it are still awaited.
            Err(_) if matches!(self.phase, Phase::Ending { .. }) => Ok(()),
            Err(Error::PeerGone) if self.is_broken_by_peer() => Err(Error::Protocol(DENIED.into())),
            Err(e) => Err(self.gone(e)),
        }
    }

    /// Has the peer closed after its request had broken our queue pair? Not every
    /// device tells of that (rxe does not).
    fn is_broken_by_peer(&mut self) -> bool {
        let Some(sender) = self.sender.as_mut().filter(|_| self.phase == Phase::Open) else { return false };
        matches!(sender.reap(), Ok(Ok(()))) && sender.queue.was_ended_by_peer()
    }

    /// The reason as the owner is to hear it: nobody was reached while the
    /// connection was being made.
    pub fn gone(&self, reason: Error) -> Error {
        match (&self.target, self.phase) {
            (Some(address), Phase::Greeting { .. })
                if !matches!(reason, Error::Protocol(_) | Error::Refused(_) | Error::Os { .. }) =>
            {
                match reason {
                    Error::Unreachable(..) => reason,
                    Error::PeerGone => Error::Unreachable(address.clone(), CLOSED.into()),
                    _ => Error::Unreachable(address.clone(), reason.to_string()),
                }
            }
            _ => reason,
        }
    }

    fn hear(&mut self, peer: PeerId, message: Control, rails: &mut [Rail], regions: &Regions) -> Result<Became> {
        let greeting = matches!(self.phase, Phase::Greeting { .. });
        let connecting = self.target.is_some();
        match message {
            Control::Offer { endpoint, attempt, hello } if greeting && !connecting && self.sender.is_none() => {
                self.rail =
                    choose(rails, attempt).ok_or_else(|| Error::os("accepting a peer", "every RDMA port is down"))?;
                let rail = &mut rails[self.rail];
                let ours = self.make_queue(peer, rail)?;
                if let Some(sender) = &mut self.sender {
                    rail.join(sender, &endpoint, self.first_psn)?;
                }
                self.hello = hello;
                self.incarnation = Some(endpoint.incarnation);
                self.link.send(&Control::Answer(ours))?;
                Ok(Became::Same)
            }
            Control::Answer(endpoint) if greeting && connecting => {
                let Some(sender) = &mut self.sender else { return Err(out_of_turn()) };
                rails[self.rail].join(sender, &endpoint, self.first_psn)?;
                self.incarnation = Some(endpoint.incarnation);
                self.link.send(&Control::Ready)?;
                Ok(Became::Same)
            }
            Control::Ready if greeting && !connecting && self.sender.is_some() => {
                self.link.send(&Control::ReadyAck)?;
                self.start()?;
                Ok(Became::Accepted)
            }
            Control::ReadyAck if connecting && !self.acknowledged => {
                self.acknowledged = true;
                if !greeting {
                    return Ok(Became::Same);
                }
                self.start()?;
                Ok(Became::Connected)
            }
            Control::Open { region, token } if !greeting => {
                let rail = &rails[self.rail];
                let registered = rail.registered(RegionId(region));
                let device = (regions, &rail.pd, rail.windows);
                self.receiver.open(region, Token(token), device, registered)?;
                Ok(Became::Same)
            }
            Control::Opened { region, target } if !greeting => {
                let Some(sender) = &mut self.sender else { return Err(out_of_turn()) };
                sender.opened(region, target).map_err(|what| Error::Protocol(what.into()))?;
                Ok(Became::Same)
            }
            Control::Bye { posts } if self.phase == Phase::Open => {
                self.phase = Phase::Ending { posts, until: Instant::now() + LAST_POSTS };
                Ok(Became::Same)
            }
            _ => Err(out_of_turn()),
        }
    }

    /// Posts may flow.
    fn start(&mut self) -> Result<()> {
        self.phase = Phase::Open;
        self.sender.as_mut().ok_or_else(out_of_turn)?.open = true;
        Ok(())
    }

    /// A post of the peer has come in before its *ready-ack* was read: the peer
    /// posts only when it knows that we are ready.
    #[inline]
    pub fn heard_early(&mut self) -> Result<bool> {
        if !matches!(self.phase, Phase::Greeting { .. }) || self.target.is_none() {
            return Ok(false);
        }
        self.start()?;
        Ok(true)
    }

    /// Says bye: how many posts have gone out. They stay under way.
    pub fn say_bye(&mut self) {
        let Some(sender) = &mut self.sender else { return };
        sender.forget_queued();
        let posts = sender.posts;
        // Whoever cannot be told sees the channel end.
        let _ = sender.queue.settle();
        let _ = self.link.send(&Control::Bye { posts });
        let _ = self.link.flush();
    }

    /// Is something that was posted still under way, to a peer that is there?
    pub fn is_leaving(&mut self) -> bool {
        let mut last_words = Vec::new();
        let ended = self.link.receive(&mut last_words).is_err();
        if ended || last_words.iter().any(|word| matches!(word, Control::Bye { .. })) {
            return false;
        }
        let link = self.link.has_output() && self.link.flush().is_ok() && self.link.has_output();
        let Some(sender) = &mut self.sender else { return false };
        link || (matches!(sender.reap(), Ok(Ok(()))) && sender.queue.settle().is_ok() && sender.queue.busy())
    }
}

fn out_of_turn() -> Error {
    Error::Protocol("a control message out of turn".into())
}

/// The rail for a connection that was tried `attempt` times: the next one at
/// each attempt, of those that work.
pub fn choose(rails: &[Rail], attempt: u32) -> Option<usize> {
    let up: Vec<usize> = (0..rails.len()).filter(|i| !rails[*i].down && !rails[*i].dead).collect();
    (!up.is_empty()).then(|| up[attempt as usize % up.len()])
}

/// A failed request, as the owner is to hear it.
fn cause(failed: Failed, rail: &Rail) -> Error {
    let text = super::objects::status_text(&rail.context, failed.0);
    match failed.0 {
        IBV_WC_RETRY_EXC_ERR => Error::Lost(format!("{}: {text}", rail.name)),
        IBV_WC_REM_ACCESS_ERR => Error::Lost(format!("{}: the peer's device refused a write: {text}", rail.name)),
        _ if is_flush(failed) => Error::Lost(format!("{}: the queue pair was ended", rail.name)),
        _ => Error::Lost(format!("{}: {text}", rail.name)),
    }
}

/// 24 random bits.
fn random_psn() -> Result<u32> {
    let [a, b, c, ..] = Token::random()?.0;
    Ok(u32::from_le_bytes([a, b, c, 0]))
}
