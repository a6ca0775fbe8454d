//! The bootstrap: what two transports tell each other before data flows.

use super::record::{HEADER, Kind, MAX_PLAIN, Opener, Sealer};
use super::session::Session;
use super::{Purpose, Refused, Secret};
use crate::MAX_SEND;

/// Bytes of a greeting before the hello.
const HEAD: usize = 12;

/// What a side says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Greeting {
    /// One life of the transport that speaks.
    pub incarnation: u64,
    /// For the owner of the other transport; at most [`MAX_SEND`] bytes.
    pub hello: Vec<u8>,
}

/// What the peer was heard to say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Heard {
    /// Its greeting. It has the secret and is alive: this came under the keys
    /// of this session. A side that accepted now [answers](Bootstrap::answer).
    Greeting(Greeting),
    /// It can be sent data.
    Ready,
}

/// One side of a bootstrap.
pub struct Bootstrap {
    session: Session,
    /// A greeting that waits for the session.
    greeting: Option<Greeting>,
    /// `ready` was called before the greeting was said.
    ready: bool,
    said_ready: bool,
    said_greeting: bool,
    heard_greeting: bool,
    heard_ready: bool,
    /// The record that is coming in.
    record: Vec<u8>,
    /// The peer's greeting that is coming in.
    got: Vec<u8>,
    /// Records to be sent, after the session's output.
    out: Vec<u8>,
    over: bool,
}

impl Bootstrap {
    /// The side that connects. A hello over the limit is the caller's mistake
    /// and refused as such.
    pub fn connect(secret: &Secret, purpose: Purpose, greeting: Greeting) -> Result<Self, Refused> {
        check(&greeting)?;
        Ok(Self::new(Session::connect(secret, purpose)?, Some(greeting)))
    }

    /// The side that is connected to.
    pub fn accept(secret: &Secret, purpose: Purpose) -> Self {
        Self::new(Session::accept(secret, purpose), None)
    }

    fn new(session: Session, greeting: Option<Greeting>) -> Self {
        Self {
            session,
            greeting,
            ready: false,
            said_ready: false,
            said_greeting: false,
            heard_greeting: false,
            heard_ready: false,
            record: Vec::new(),
            got: Vec::new(),
            out: Vec::new(),
            over: false,
        }
    }

    /// Takes from the front of `bytes` what belongs to the bootstrap, up to the
    /// first thing heard. Returns how many bytes that were; they are all unless
    /// something was heard or the bootstrap is complete. The first error is the
    /// last word.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<(usize, Option<Heard>), Refused> {
        if self.over {
            return Err(Refused::Over);
        }
        let fed = self.try_feed(bytes);
        if fed.is_err() {
            self.over = true;
            self.session.end();
            self.record = Vec::new();
            self.got = Vec::new();
        }
        fed
    }

    fn try_feed(&mut self, bytes: &[u8]) -> Result<(usize, Option<Heard>), Refused> {
        let mut taken = 0;
        if !self.session.is_established() {
            taken = self.session.feed(bytes)?;
            if !self.session.is_established() {
                return Ok((taken, None));
            }
            self.say()?;
        }
        while taken < bytes.len() && !self.heard_ready {
            let wanted = self.session.length(&self.record)?.unwrap_or(HEADER);
            let n = (wanted - self.record.len()).min(bytes.len() - taken);
            self.record.extend_from_slice(&bytes[taken..taken + n]);
            taken += n;
            if let Some(opened) = self.session.open(&mut self.record)? {
                let heard = self.hear(opened.kind, opened.content)?;
                self.record.clear();
                if heard.is_some() {
                    return Ok((taken, heard));
                }
            }
        }
        Ok((taken, None))
    }

    fn hear(&mut self, kind: Kind, content: std::ops::Range<usize>) -> Result<Option<Heard>, Refused> {
        match kind {
            Kind::Greeting if !self.heard_greeting => self.got.extend_from_slice(&self.record[content]),
            Kind::Ready if self.heard_greeting => {
                self.heard_ready = true;
                return Ok(Some(Heard::Ready));
            }
            Kind::Ready => return Err(Refused::Protocol("ready before the greeting")),
            Kind::Greeting => return Err(Refused::Protocol("a second greeting")),
            Kind::Data => return Err(Refused::Protocol("data before ready")),
        }
        let Some((head, hello)) = self.got.split_first_chunk::<HEAD>() else {
            return Err(Refused::Protocol("a greeting that is cut in its head"));
        };
        let [i0, i1, i2, i3, i4, i5, i6, i7, l0, l1, l2, l3] = *head;
        let len = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
        if len > MAX_SEND {
            return Err(Refused::Protocol("a hello over the limit"));
        }
        if hello.len() > len {
            return Err(Refused::Protocol("a greeting that is longer than it says"));
        }
        if hello.len() < len {
            return Ok(None);
        }
        self.heard_greeting = true;
        let incarnation = u64::from_le_bytes([i0, i1, i2, i3, i4, i5, i6, i7]);
        let hello = self.got.split_off(HEAD);
        self.got = Vec::new();
        Ok(Some(Heard::Greeting(Greeting { incarnation, hello })))
    }

    /// The greeting of the side that accepted, once it has heard the peer's.
    pub fn answer(&mut self, greeting: Greeting) -> Result<(), Refused> {
        check(&greeting)?;
        if !self.heard_greeting || self.said_greeting {
            return Err(Refused::Protocol("an answer out of turn"));
        }
        self.greeting = Some(greeting);
        self.say()
    }

    /// We can be sent data: told to the peer behind our greeting.
    pub fn ready(&mut self) -> Result<(), Refused> {
        self.ready = true;
        self.say()
    }

    /// Seals what can be said now.
    fn say(&mut self) -> Result<(), Refused> {
        if !self.session.is_established() {
            return Ok(());
        }
        if let Some(greeting) = self.greeting.take() {
            let mut head = [0; HEAD];
            head[..8].copy_from_slice(&greeting.incarnation.to_le_bytes());
            head[8..].copy_from_slice(&(greeting.hello.len() as u32).to_le_bytes());
            let (first, rest) = greeting.hello.split_at(greeting.hello.len().min(MAX_PLAIN - HEAD));
            self.session.seal(Kind::Greeting, &[&head, first], &mut self.out)?;
            for piece in rest.chunks(MAX_PLAIN) {
                self.session.seal(Kind::Greeting, &[piece], &mut self.out)?;
            }
            self.said_greeting = true;
        }
        if self.ready && self.said_greeting && !self.said_ready {
            self.said_ready = true;
            self.session.seal(Kind::Ready, &[], &mut self.out)?;
        }
        Ok(())
    }

    /// Bytes to be sent; [`sent`](Self::sent) takes them away. More may follow
    /// behind them.
    pub fn output(&self) -> &[u8] {
        if self.session.output().is_empty() { &self.out } else { self.session.output() }
    }

    /// `n` bytes of the output are on their way.
    pub fn sent(&mut self, n: usize) {
        if self.session.output().is_empty() {
            self.out.drain(..n.min(self.out.len()));
        } else {
            self.session.sent(n);
        }
    }

    /// Has each side told the other that it is ready? There may be output left.
    pub fn is_complete(&self) -> bool {
        !self.over && self.said_ready && self.heard_ready
    }

    /// The keys, for the data. None before the bootstrap is complete, or while
    /// its output is not taken.
    pub fn finish(self) -> Option<(Sealer, Opener)> {
        (self.is_complete() && self.output().is_empty()).then_some(self.session)?.split()
    }
}

fn check(greeting: &Greeting) -> Result<(), Refused> {
    if greeting.hello.len() > MAX_SEND { Err(Refused::Protocol("a hello over the limit")) } else { Ok(()) }
}
