//! The control channel of a connection: control messages in the records of a
//! [`Session`] over a tcp socket.
//!
//! A message is its length, u32 little-endian, and its bytes; a long one spans
//! records, a record may carry several.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

use super::wire::Control;
use crate::secure::{Kind, MAX_PLAIN, Purpose, Refused, Secret, Session};
use crate::{Address, Error, MAX_SEND, Result};

/// Longest message: an offer with the longest hello.
const LONGEST: usize = MAX_SEND + 256;

/// Bytes taken from the socket with one call.
const WINDOW: usize = 64 << 10;

/// Bytes taken in one go: a member that floods its channel shall not have all
/// of the owner's time.
const BUDGET: usize = 2 << 20;

/// A control channel.
pub struct Link {
    socket: OwnedFd,
    session: Session,
    /// Where we connect to; none if the peer connected to us.
    target: Option<Address>,
    /// Messages made before the session's keys were there.
    early: Vec<u8>,
    out: Vec<u8>,
    /// Received, not opened yet.
    sealed: Vec<u8>,
    /// Opened, not a whole message yet.
    plain: Vec<u8>,
}

impl Link {
    /// Over a socket that connects to `target`.
    pub fn connect(socket: OwnedFd, target: Address, secret: &Secret) -> Result<Self> {
        let session = Session::connect(secret, Purpose::Verbs).map_err(refused)?;
        Ok(Self::new(socket, session, Some(target)))
    }

    /// Over a socket that was accepted.
    pub fn accept(socket: OwnedFd, secret: &Secret) -> Self {
        Self::new(socket, Session::accept(secret, Purpose::Verbs), None)
    }

    fn new(socket: OwnedFd, session: Session, target: Option<Address>) -> Self {
        let (early, out, sealed, plain) = Default::default();
        Self { socket, session, target, early, out, sealed, plain }
    }

    /// To be watched.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Is there something that the socket has not taken?
    pub fn has_output(&self) -> bool {
        !self.out.is_empty() || !self.session.output().is_empty()
    }

    /// Says a message; what cannot go now goes with a later
    /// [`flush`](Self::flush).
    pub fn send(&mut self, message: &Control) -> Result<()> {
        let bytes = message.encode();
        self.early.extend((bytes.len() as u32).to_le_bytes());
        self.early.extend(bytes);
        self.seal()
    }

    /// Seals what was said, once there are keys.
    fn seal(&mut self) -> Result<()> {
        if self.session.is_established() {
            for piece in self.early.chunks(MAX_PLAIN) {
                self.session.seal(Kind::Data, &[piece], &mut self.out).map_err(refused)?;
            }
            self.early.clear();
        }
        Ok(())
    }

    /// Hands the socket what it takes.
    pub fn flush(&mut self) -> Result<()> {
        while !self.session.output().is_empty() {
            match send(self.socket.as_fd(), self.session.output()) {
                Ok(sent) => self.session.sent(sent),
                Err(Errno::AGAIN) => return Ok(()),
                Err(e) => return Err(self.gone(e)),
            }
        }
        while !self.out.is_empty() {
            match send(self.socket.as_fd(), &self.out) {
                Ok(sent) => drop(self.out.drain(..sent)),
                Err(Errno::AGAIN) => return Ok(()),
                Err(e) => return Err(self.gone(e)),
            }
        }
        Ok(())
    }

    fn gone(&self, errno: Errno) -> Error {
        match (&self.target, self.session.is_established()) {
            (Some(target), false) => Error::Unreachable(target.clone(), io::Error::from(errno).to_string()),
            _ => Error::PeerGone,
        }
    }

    /// Takes what has arrived, up to about [`BUDGET`] bytes, and adds whole
    /// messages to `into`. True if there may be more. The error, the channel's
    /// end among them, comes after the messages before it.
    pub fn receive(&mut self, into: &mut Vec<Control>) -> Result<bool> {
        for _ in 0..BUDGET / WINDOW {
            let at = self.sealed.len();
            self.sealed.resize(at + WINDOW, 0);
            let got = rustix::net::recv(&self.socket, &mut self.sealed[at..], RecvFlags::DONTWAIT);
            let got = match got {
                Ok((got, _)) => got,
                Err(Errno::INTR) => {
                    self.sealed.truncate(at);
                    continue;
                }
                Err(Errno::AGAIN) => {
                    self.sealed.truncate(at);
                    return Ok(false);
                }
                // A connect that is still under way has nothing to receive.
                Err(Errno::NOTCONN) if self.target.is_some() => {
                    self.sealed.truncate(at);
                    return Ok(false);
                }
                Err(e) => {
                    self.sealed.truncate(at);
                    return Err(self.gone(e));
                }
            };
            self.sealed.truncate(at + got);
            self.open(into)?;
            if got == 0 {
                return Err(Error::PeerGone);
            }
        }
        Ok(true)
    }

    fn open(&mut self, into: &mut Vec<Control>) -> Result<()> {
        let taken = self.session.feed(&self.sealed).map_err(refused)?;
        self.sealed.drain(..taken);
        if !self.session.is_established() {
            return Ok(());
        }
        self.seal()?;
        let mut at = 0;
        while let Some(opened) = self.session.open(&mut self.sealed[at..]).map_err(refused)? {
            if opened.kind != Kind::Data {
                return Err(Error::Protocol("a record of another kind than data".into()));
            }
            self.plain.extend_from_slice(&self.sealed[at..][opened.content]);
            at += opened.taken;
            self.messages(into)?;
        }
        self.sealed.drain(..at);
        Ok(())
    }

    fn messages(&mut self, into: &mut Vec<Control>) -> Result<()> {
        let mut at = 0;
        while let Some(len) = self.plain[at..].first_chunk::<4>() {
            let len = u32::from_le_bytes(*len) as usize;
            if len > LONGEST {
                return Err(Error::Protocol("a control message over the limit".into()));
            }
            let Some(bytes) = self.plain[at + 4..].get(..len) else { break };
            into.push(Control::decode(bytes).map_err(|what| Error::Protocol(what.into()))?);
            at += 4 + len;
        }
        self.plain.drain(..at);
        Ok(())
    }
}

fn send(socket: BorrowedFd<'_>, bytes: &[u8]) -> std::result::Result<usize, Errno> {
    match rustix::net::send(socket, bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
        // A connect that is still under way.
        Err(Errno::NOTCONN | Errno::INTR) => Err(Errno::AGAIN),
        outcome => outcome,
    }
}

/// What the session refused, as the transport counts it.
fn refused(refused: Refused) -> Error {
    Error::Refused(refused)
}
