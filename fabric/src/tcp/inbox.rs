//! What one connection receives: frames, from runs of bytes cut anywhere.

use crate::frame::{self, Frame};
use crate::regions::Regions;
use crate::{Error, Event, Notify, PeerId, Result};

/// The payload that is being received.
#[derive(Default)]
enum Body {
    #[default]
    None,
    Message {
        len: usize,
        got: Vec<u8>,
    },
    Write {
        region: u32,
        at: u64,
        left: u64,
        notify: Option<Notify>,
    },
}

#[derive(Default)]
pub(super) struct Inbox {
    body: Body,
    /// What the peer said when it connected: its name to the regions' guards.
    pub hello: Vec<u8>,
}

impl Inbox {
    /// Where the next bytes belong if they are a write's: (region, offset,
    /// bytes).
    pub fn target(&self) -> Option<(u32, u64, u64)> {
        match self.body {
            Body::Write { region, at, left, .. } => Some((region, at, left)),
            _ => None,
        }
    }

    /// `n` bytes went straight to the [`target`](Self::target).
    pub fn landed(&mut self, n: usize) {
        if let Body::Write { at, left, .. } = &mut self.body {
            *at += n as u64;
            *left -= n as u64;
        }
    }

    /// Works through bytes until what is left is an incomplete header. Returns
    /// how many it took.
    pub fn take(
        &mut self,
        peer: PeerId,
        regions: &Regions,
        bytes: &[u8],
        sink: &mut dyn FnMut(Event<'_>),
    ) -> Result<usize> {
        let mut start = 0;
        loop {
            let rest = &bytes[start..];
            match &mut self.body {
                Body::None => match frame::decode(rest) {
                    Ok(None) => return Ok(start),
                    Ok(Some((frame, header))) => {
                        start += header;
                        self.body = self.open(frame, regions)?;
                    }
                    Err(what) => return Err(Error::Protocol(what.into())),
                },
                Body::Message { len, got } => {
                    let n = rest.len().min(*len - got.len());
                    let whole = got.is_empty() && n == *len;
                    if whole {
                        sink(Event::Message { peer, payload: &rest[..n] });
                    } else {
                        got.extend(&rest[..n]);
                        if got.len() == *len {
                            sink(Event::Message { peer, payload: got });
                        }
                    }
                    start += n;
                    if !whole && got.len() < *len {
                        return Ok(start);
                    }
                    self.body = Body::None;
                }
                Body::Write { region, at, left, notify } => {
                    let n = (rest.len() as u64).min(*left);
                    regions.still(*region)?.write(*at as usize, &rest[..n as usize])?;
                    start += n as usize;
                    *at += n;
                    *left -= n;
                    if *left > 0 {
                        return Ok(start);
                    }
                    if let Some(notify) = *notify {
                        sink(Event::Notified { peer, notify });
                    }
                    self.body = Body::None;
                }
            }
        }
    }

    /// What follows a header, if the header may stand.
    fn open(&self, frame: Frame, regions: &Regions) -> Result<Body> {
        match frame {
            Frame::Message { len } => Ok(Body::Message { len, got: Vec::new() }),
            Frame::Write(write) => {
                regions.target(write.region, &write.token, write.offset, write.len, &self.hello)?;
                Ok(Body::Write { region: write.region, at: write.offset, left: write.len, notify: write.notify })
            }
        }
    }
}
