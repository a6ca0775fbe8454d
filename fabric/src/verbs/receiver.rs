//! What a connection receives: pieces of messages, notifications, bytes in the
//! landing zone; and what the peer may write.

use std::sync::Arc;

use super::device::{Mr, Pd};
use super::landing::Landing;
use super::objects::Window;
use super::sender::Sender;
use super::wire::{Control, Landed, Noted, Said, Target};
use crate::key::Token;
use crate::regions::Regions;
use crate::{Error, Event, MAX_SEND, Notify, PeerId, Result};

/// A region that the peer may write, directly or through its landing zone.
struct Grant {
    region: u32,
    token: Token,
    /// The region's guard is asked: the way is through the landing zone.
    guarded: bool,
    /// Its key, where the device has windows.
    window: Option<Window>,
    target: Target,
    bound: Bound,
    /// The peer knows the target.
    told: bool,
    /// The region is no more. The grant stays until its window's bind is done:
    /// a bind of a window that is gone ends the queue pair.
    revoked: bool,
}

/// How far a window has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bound {
    /// It waits for room in the send queue.
    No,
    /// The request is under way.
    Underway,
    /// The peer may use it; or there is no window to bind.
    Yes,
}

/// Names the landing zone's window among those of regions.
const ZONE: u32 = u32::MAX;

/// The receiving half of a connection.
#[derive(Default)]
pub struct Receiver {
    message: Vec<u8>,
    /// Bytes of the message that are to come.
    rest: usize,
    grants: Vec<Grant>,
    landing: Option<Landing>,
    /// SENDs and notifying writes that arrived.
    pub posts: u64,
}

fn violation(what: &'static str) -> Error {
    Error::Protocol(what.into())
}

impl Receiver {
    /// A write with notification has landed.
    #[inline]
    pub fn notified(
        &mut self,
        peer: PeerId,
        noted: Noted,
        sender: &mut Sender,
        sink: &mut dyn FnMut(Event<'_>),
    ) -> Result<()> {
        self.consumed(sender, noted.receives)?;
        self.notify(peer, noted.notify, sink)
    }

    #[inline]
    fn notify(&mut self, peer: PeerId, notify: u32, sink: &mut dyn FnMut(Event<'_>)) -> Result<()> {
        if self.rest > 0 {
            return Err(violation("a notification within a message"));
        }
        sink(Event::Notified { peer, notify: Notify(notify) });
        Ok(())
    }

    /// A SEND has arrived. `hello` is the peer's.
    pub fn said(
        &mut self,
        peer: PeerId,
        said: Said,
        payload: &[u8],
        (sender, regions, hello): (&mut Sender, &Regions, &[u8]),
        sink: &mut dyn FnMut(Event<'_>),
    ) -> Result<()> {
        match said {
            Said::Credits { receives, slots } => {
                self.posts += 1;
                if !payload.is_empty() {
                    return Err(violation("credits with a payload"));
                }
                // Each is worth something, or there would be no end to them.
                if (receives, slots) == (0, 0) {
                    return Err(violation("credits that return nothing"));
                }
                sender.give_back(receives, slots).map_err(violation)
            }
            Said::Piece { rest, receives } => {
                self.consumed(sender, receives)?;
                self.piece(peer, rest as usize, payload, sink)
            }
            Said::Landed { receives } => {
                self.consumed(sender, receives)?;
                let landed = Landed::decode(payload).map_err(violation)?;
                self.landed(&landed, regions, hello)?;
                sender.owed.slot();
                if let Some(notify) = landed.notify {
                    sink(Event::Notified { peer, notify: Notify(notify) });
                }
                Ok(())
            }
            Said::Notified { receives } => {
                self.consumed(sender, receives)?;
                let notify = payload.try_into().map_err(|_| violation("a notification of another length"))?;
                self.notify(peer, u32::from_le_bytes(notify), sink)
            }
        }
    }

    /// One of the peer's receives is used up; on what filled it rode others that
    /// were ours to fill.
    #[inline]
    fn consumed(&mut self, sender: &mut Sender, riding: u16) -> Result<()> {
        self.posts += 1;
        sender.owed.receive().map_err(violation)?;
        if riding > 0 {
            sender.give_back(riding, 0).map_err(violation)?;
        }
        Ok(())
    }

    fn piece(&mut self, peer: PeerId, rest: usize, bytes: &[u8], sink: &mut dyn FnMut(Event<'_>)) -> Result<()> {
        if self.rest == 0 && rest == 0 {
            sink(Event::Message { peer, payload: bytes });
            return Ok(());
        }
        if self.rest == 0 && bytes.len() + rest > MAX_SEND {
            return Err(violation("a message over the limit"));
        }
        // An empty piece would let a message go on for ever.
        if bytes.is_empty() || (self.rest > 0 && bytes.len() + rest != self.rest) {
            return Err(violation("pieces that do not make a message"));
        }
        self.message.extend(bytes);
        self.rest = rest;
        if rest == 0 {
            sink(Event::Message { peer, payload: &self.message });
            self.message.clear();
            // One long message must not keep its memory for ever.
            self.message.shrink_to(MAX_SEND / 16);
        }
        Ok(())
    }

    fn landed(&mut self, landed: &Landed, regions: &Regions, hello: &[u8]) -> Result<()> {
        if self.rest > 0 {
            return Err(violation("a write within a message"));
        }
        let Some(landing) = &mut self.landing else {
            return Err(violation("a write to a landing zone that there is not"));
        };
        if landed.len > super::landing::SLOT {
            return Err(violation("a write longer than its slot"));
        }
        let grant = self.grants.iter().find(|g| g.region == landed.region && g.guarded && !g.revoked);
        let grant = grant.ok_or_else(|| violation("write to a region that is not, or no longer, open"))?;
        let from = landing.take();
        let into = regions.target(grant.region, &grant.token, landed.offset, u64::from(landed.len), hello)?;
        landing.memory.copy_to(from, into, landed.offset as usize, landed.len as usize)?;
        Ok(())
    }

    /// The peer shows a region's key. What it may do with it is told by
    /// [`attend`](Self::attend), when a window is bound.
    pub fn open(
        &mut self,
        region: u32,
        token: Token,
        (regions, pd, windows): (&Regions, &Arc<Pd>, bool),
        registered: Option<&Arc<Mr>>,
    ) -> Result<()> {
        let memory = regions.exported(region, &token)?;
        if self.grants.iter().any(|g| g.region == region) {
            return Err(violation("a region that was opened before"));
        }
        let guarded = regions.is_guarded(region);
        let (window, target) = if guarded {
            let landing = match &mut self.landing {
                Some(landing) => landing,
                empty => empty.insert(Landing::new(pd, windows)?),
            };
            (None, landing.target())
        } else {
            let mr = registered.ok_or_else(|| violation("write to a region that this device does not know"))?;
            let window = if windows { Some(Window::new(mr)?) } else { None };
            let rkey = window.as_ref().map_or(mr.rkey(), Window::rkey);
            (window, Target::Region { address: mr.address(), rkey, size: memory.len() as u64 })
        };
        let bound = if window.is_some() { Bound::No } else { Bound::Yes };
        self.grants.push(Grant { region, token, guarded, window, target, bound, told: false, revoked: false });
        Ok(())
    }

    /// Binds windows and tells the peer of those that are bound.
    pub fn attend(&mut self, sender: &mut Sender, mut tell: impl FnMut(Control)) -> Result<()> {
        for region in std::mem::take(&mut sender.bound) {
            let grant = self.grants.iter_mut().find(|g| g.region == region);
            match grant {
                Some(grant) => grant.bound = Bound::Yes,
                // Of the landing zone, if of anything.
                None => {
                    if let (ZONE, Some(landing)) = (region, &mut self.landing) {
                        landing.bound = Bound::Yes;
                    }
                }
            }
        }
        if let Some(landing) = &mut self.landing
            && landing.bound == Bound::No
            && let Some(window) = &landing.window
            && sender.bind(window, ZONE)?
        {
            landing.bound = Bound::Underway;
        }
        self.grants.retain(|g| !g.revoked || g.bound == Bound::Underway);
        let zone = self.landing.as_ref().is_some_and(|landing| landing.bound == Bound::Yes);
        for grant in self.grants.iter_mut().filter(|g| !g.told && !g.revoked) {
            if grant.bound == Bound::No
                && let Some(window) = &grant.window
                && sender.bind(window, grant.region)?
            {
                grant.bound = Bound::Underway;
            }
            if grant.bound == Bound::Yes && (zone || !grant.guarded) {
                tell(Control::Opened { region: grant.region, target: grant.target });
                grant.told = true;
            }
        }
        Ok(())
    }

    /// Is a region asked for and not yet told?
    pub fn is_opening(&self) -> bool {
        self.grants.iter().any(|g| !g.told)
    }

    /// The peer may write nothing any more.
    pub fn close(&mut self) {
        self.grants.clear();
        self.landing = None;
    }

    /// The region is no more: its key is void from now on.
    pub fn revoke(&mut self, region: u32) {
        self.grants.retain_mut(|g| {
            g.revoked |= g.region == region;
            !g.revoked || g.bound == Bound::Underway
        });
    }
}
