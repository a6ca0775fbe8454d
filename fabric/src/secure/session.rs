//! A session: the Noise handshake, then its two keys.

use super::record::{Kind, Opened, Opener, Sealer};
use super::{MAGIC, Purpose, Refused, SEALED, Secret, VERSION};

const PATTERN: &str = "Noise_NNpsk0_25519_AESGCM_SHA256";

/// Bytes in the clear before a handshake message.
const PREFACE: usize = 12;
/// Bytes of either handshake message: an ephemeral key and a tag.
const NOISE: usize = 32 + 16;
/// Bytes of the preface and the message.
pub(super) const MESSAGE: usize = PREFACE + NOISE;

/// One side of a session.
pub struct Session {
    purpose: Purpose,
    state: State,
    /// The peer's handshake message as far as it has come.
    got: Vec<u8>,
    /// Handshake bytes that are to be sent.
    out: Vec<u8>,
}

enum State {
    /// We have spoken; the answer is to come.
    Connecting(Box<snow::HandshakeState>),
    /// The peer has to speak. Nothing is computed before it has.
    Accepting(Secret),
    Established(Box<(Sealer, Opener)>),
    Over,
}

impl Session {
    /// The side that speaks first.
    pub fn connect(secret: &Secret, purpose: Purpose) -> Result<Self, Refused> {
        let preface = preface(purpose);
        let mut noise = builder(secret, &preface)?.build_initiator().map_err(ours)?;
        let mut out = vec![0; MESSAGE];
        out[..PREFACE].copy_from_slice(&preface);
        noise.write_message(&[], &mut out[PREFACE..]).map_err(ours)?;
        Ok(Self { purpose, state: State::Connecting(Box::new(noise)), got: Vec::new(), out })
    }

    /// The side that is spoken to.
    pub fn accept(secret: &Secret, purpose: Purpose) -> Self {
        Self { purpose, state: State::Accepting(secret.clone()), got: Vec::new(), out: Vec::new() }
    }

    /// Takes from the front of `bytes` what belongs to the handshake; returns
    /// how many bytes that were. What follows are records. The first error is
    /// the last word.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<usize, Refused> {
        match self.state {
            State::Over => return Err(Refused::Over),
            State::Established(_) => return Ok(0),
            State::Connecting(_) | State::Accepting(_) => {}
        }
        let taken = bytes.len().min(MESSAGE - self.got.len());
        self.got.extend_from_slice(&bytes[..taken]);
        match self.advance() {
            Ok(()) => Ok(taken),
            Err(refused) => {
                self.state = State::Over;
                Err(refused)
            }
        }
    }

    fn advance(&mut self) -> Result<(), Refused> {
        let preface = preface(self.purpose);
        check_preface(&self.got, &preface)?;
        let Some(message) = self.got.get(PREFACE..MESSAGE) else { return Ok(()) };
        let mut noise = match std::mem::replace(&mut self.state, State::Over) {
            State::Connecting(mut noise) => {
                noise.read_message(message, &mut []).map_err(theirs)?;
                noise
            }
            State::Accepting(secret) => {
                let mut noise = builder(&secret, &preface)?.build_responder().map_err(ours)?;
                noise.read_message(message, &mut []).map_err(theirs)?;
                self.out.resize(MESSAGE, 0);
                self.out[..PREFACE].copy_from_slice(&preface);
                let written = noise.write_message(&[], &mut self.out[PREFACE..]);
                if let Err(e) = written {
                    self.out.clear();
                    return Err(theirs(e));
                }
                Box::new(noise)
            }
            State::Established(_) | State::Over => return Err(Refused::Over),
        };
        let (first, second) = noise.dangerously_get_raw_split();
        let (sealing, opening) = if noise.is_initiator() { (first, second) } else { (second, first) };
        self.state = State::Established(Box::new((Sealer::new(sealing)?, Opener::new(opening)?)));
        self.got = Vec::new();
        Ok(())
    }

    /// Handshake bytes to be sent; [`sent`](Self::sent) takes them away.
    pub fn output(&self) -> &[u8] {
        &self.out
    }

    /// `n` bytes of the output are on their way.
    pub fn sent(&mut self, n: usize) {
        self.out.drain(..n.min(self.out.len()));
    }

    /// Are the session's keys there? Then records may be sealed. That the
    /// *other* side lives is known to the side that connected at this point,
    /// and to the side that accepted with the first record that opens.
    pub fn is_established(&self) -> bool {
        matches!(self.state, State::Established(_))
    }

    /// Appends a record to `out`: see [`Sealer::seal`].
    pub fn seal(&mut self, kind: Kind, parts: &[&[u8]], out: &mut Vec<u8>) -> Result<(), Refused> {
        match &mut self.state {
            State::Established(keys) => keys.0.seal(kind, parts, out),
            State::Over => Err(Refused::Over),
            _ => Err(Refused::Protocol("a record before the handshake")),
        }
    }

    /// Opens a record: see [`Opener::open`].
    pub fn open(&mut self, bytes: &mut [u8]) -> Result<Option<Opened>, Refused> {
        let State::Established(keys) = &mut self.state else { return Err(Refused::Over) };
        let opened = keys.1.open(bytes);
        if opened.is_err() {
            self.state = State::Over;
        }
        opened
    }

    /// How long the record is that `bytes` begin with: see [`Opener::length`].
    pub fn length(&mut self, bytes: &[u8]) -> Result<Option<usize>, Refused> {
        let State::Established(keys) = &mut self.state else { return Err(Refused::Over) };
        let length = keys.1.length(bytes);
        if length.is_err() {
            self.state = State::Over;
        }
        length
    }

    /// Ends the session for good.
    pub(super) fn end(&mut self) {
        self.state = State::Over;
    }

    /// The two halves, to be used apart; none before the session is
    /// established, or when it is over.
    pub fn split(self) -> Option<(Sealer, Opener)> {
        match self.state {
            State::Established(keys) => Some(*keys),
            _ => None,
        }
    }
}

fn preface(purpose: Purpose) -> [u8; PREFACE] {
    let mut bytes = [0; PREFACE];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..10].copy_from_slice(&VERSION.to_le_bytes());
    bytes[10] = SEALED;
    bytes[11] = purpose as u8;
    bytes
}

/// Says what is wrong with a preface as soon as one byte of it shows it.
fn check_preface(got: &[u8], wanted: &[u8; PREFACE]) -> Result<(), Refused> {
    let Some(at) = got.iter().zip(wanted).position(|(got, wanted)| got != wanted) else { return Ok(()) };
    Err(match at {
        0..8 => Refused::Foreign,
        8..10 => Refused::Version,
        10 if got[10] == 0 => Refused::Insecure,
        10 => Refused::Foreign,
        _ => Refused::Purpose,
    })
}

fn builder<'a>(secret: &'a Secret, preface: &'a [u8]) -> Result<snow::Builder<'a>, Refused> {
    let pattern = PATTERN.parse().map_err(ours)?;
    snow::Builder::new(pattern).psk(0, &secret.0).and_then(|b| b.prologue(preface)).map_err(ours)
}

/// An error of our own side. The pattern and the lengths are constants, so
/// chance is the one thing that can be missing.
fn ours(_: snow::Error) -> Refused {
    Refused::Random
}

/// An error with a message of the peer.
fn theirs(error: snow::Error) -> Refused {
    match error {
        snow::Error::Rng => Refused::Random,
        _ => Refused::Key,
    }
}
