//! What a connection sends: messages and writes, as far as the peer's receives,
//! the peer's landing zone and the send queue have room; the rest waits, in
//! order.

use std::collections::VecDeque;
use std::sync::Arc;

use super::credit::Owed;
use super::device::{Mr, MrAccess, Pd};
use super::landing::Zone;
use super::objects::CHAIN;
use super::queue::{Batch, Failed, Holds, SendQueue};
use super::receives::BUFFER;
use super::request::{Source, Work};
use super::wire::{Landed, MAX_NOTED, Noted, Said, Target};
use crate::key::{self, Key, Maker, Token};
use crate::{Error, Memory, Notify, PeerId, QUEUE_LIMIT, Result, Write};

/// Pieces of messages that can be under way: slots of the send ring.
const RING: usize = 32;

/// Requests that posts leave free in the send queue, for the return of credits
/// and the binding of windows.
const KEPT: usize = 8;

/// Longest request of a write: a long one lets others take turns.
const LONGEST: u64 = 1 << 20;

/// What a queued post costs beside its payload.
const COST: usize = 64;

/// A write, checked as far as the writer can.
#[derive(Clone, Copy)]
pub struct Outgoing {
    pub offset: u64,
    pub len: u64,
    pub region: u32,
    pub token: Token,
    /// As its key tells it.
    pub region_size: u64,
    pub remote_offset: u64,
    pub notify: Option<Notify>,
}

enum Post {
    Message { payload: Vec<u8>, sent: usize },
    Write { source: Arc<Mr>, write: Outgoing, sent: u64 },
}

/// How far a post got.
enum Progress<N> {
    Done,
    /// It has to go on from here.
    At(N),
}

/// A region of the peer's, as far as it was opened.
struct Opening {
    /// Its key, as the peer exported it.
    key: [u8; key::LEN],
    region: u32,
    token: Token,
    target: Option<Place>,
}

#[derive(Clone, Copy)]
enum Place {
    Region { address: u64, rkey: u32, size: u64 },
    Landing,
}

/// The sending half of a connection.
pub struct Sender {
    pub queue: SendQueue,
    ring: Arc<Memory>,
    ring_mr: Mr,
    ring_next: usize,
    ring_used: usize,
    /// Receives of the peer that may be filled.
    credits: u32,
    /// All that the peer has for us.
    most_credits: u32,
    /// Bytes of each.
    buffer: usize,
    /// What goes back to the peer.
    pub owed: Owed,
    longest: u64,
    openings: Vec<Opening>,
    zone: Option<Zone>,
    outbox: VecDeque<Post>,
    /// What the outbox costs.
    bytes: usize,
    queued_writes: usize,
    flying_writes: usize,
    /// Receives of the peer that were filled.
    pub posts: u64,
    /// Posts may go out: the peer is ready.
    pub open: bool,
    /// Regions to ask the peer for.
    pub asks: Vec<(u32, Token)>,
    /// Regions whose windows were bound.
    pub bound: Vec<u32>,
}

impl Sender {
    /// A sender that waits for its peer.
    pub fn new(queue: SendQueue, pd: &Arc<Pd>, max_message: u64) -> Result<Self> {
        let ring = Memory::new(RING * BUFFER)?;
        let ring_mr = Mr::register(pd, &ring, MrAccess::Local)?;
        Ok(Self {
            queue,
            ring,
            ring_mr,
            ring_next: 0,
            ring_used: 0,
            credits: 0,
            most_credits: 0,
            buffer: 0,
            owed: Owed::default(),
            longest: LONGEST.min(max_message.max(4096)),
            openings: Vec::new(),
            zone: None,
            outbox: VecDeque::new(),
            bytes: 0,
            queued_writes: 0,
            flying_writes: 0,
            posts: 0,
            open: false,
            asks: Vec::new(),
            bound: Vec::new(),
        })
    }

    /// The peer has receives.
    pub fn grant(&mut self, credits: u16, buffer: u32) {
        self.credits = u32::from(credits);
        self.most_credits = self.credits;
        self.buffer = (buffer as usize).min(BUFFER);
    }

    /// The peer has receives and slots free again.
    #[inline]
    pub fn give_back(&mut self, receives: u16, slots: u16) -> std::result::Result<(), &'static str> {
        self.credits += u32::from(receives);
        if self.credits > self.most_credits {
            return Err("receives returned that were not filled");
        }
        match &mut self.zone {
            Some(zone) => zone.give_back(slots),
            None if slots == 0 => Ok(()),
            None => Err("slots of a landing zone that there is not"),
        }
    }

    /// The peer has opened a region.
    pub fn opened(&mut self, region: u32, target: Target) -> std::result::Result<(), &'static str> {
        let place = match target {
            Target::Region { address, rkey, size } => Place::Region { address, rkey, size },
            Target::Landing { address, rkey, slot, slots } => {
                self.zone.get_or_insert_with(|| Zone::new(address, rkey, slot, slots));
                Place::Landing
            }
        };
        // The oldest question about this region is the one that is answered.
        let asked = self.openings.iter_mut().find(|o| o.region == region && o.target.is_none());
        asked.ok_or("an answer that was not asked for")?.target = Some(place);
        Ok(())
    }

    /// Writes whose source bytes are still needed.
    pub fn pending(&self) -> usize {
        self.queued_writes + self.flying_writes
    }

    /// Is there something that could not be posted?
    #[inline]
    pub fn has_output(&self) -> bool {
        !self.outbox.is_empty()
    }

    /// Drops what could not be posted: the owner has ended the connection.
    pub fn forget_queued(&mut self) {
        self.outbox.clear();
        (self.bytes, self.queued_writes) = (0, 0);
    }

    /// Takes completions.
    pub fn reap(&mut self) -> Result<std::result::Result<(), Failed>> {
        let (flying, used, bound) = (&mut self.flying_writes, &mut self.ring_used, &mut self.bound);
        self.queue.reap(|holds| {
            *flying -= usize::from(holds.write);
            *used -= usize::from(holds.slot);
            bound.extend(holds.window);
        })
    }

    /// Room for `cost` more?
    fn reserve(&mut self, peer: PeerId, cost: usize) -> Result<()> {
        if self.outbox.is_empty() || self.bytes + cost <= QUEUE_LIMIT {
            return Ok(());
        }
        self.flush()?;
        match self.bytes {
            queued if !self.outbox.is_empty() && queued + cost > QUEUE_LIMIT => Err(Error::Full { peer, queued }),
            _ => Ok(()),
        }
    }

    /// Posts a message, or queues what there is no room for.
    pub fn send(&mut self, peer: PeerId, payload: &[u8]) -> Result<()> {
        let mut from = 0;
        if self.open && self.outbox.is_empty() {
            match self.post_message(payload, 0)? {
                Progress::Done => return Ok(()),
                Progress::At(sent) => from = sent,
            }
        }
        self.reserve(peer, COST + payload.len() - from)?;
        self.bytes += COST + payload.len() - from;
        self.outbox.push_back(Post::Message { payload: payload[from..].to_vec(), sent: 0 });
        Ok(())
    }

    /// Posts a write in one request, if the peer's region is open and there is
    /// room. False: it has not done anything, and [`write`](Self::write) has to.
    #[inline]
    pub fn write_at_once(&mut self, mr: &Mr, write: &Write<'_>) -> Result<bool> {
        let Ok(key) = <&[u8; key::LEN]>::try_from(&write.remote.0[..]) else { return Ok(false) };
        let Some(opening) = self.openings.iter().find(|o| o.key == *key) else { return Ok(false) };
        let Some(Place::Region { address, rkey, size }) = opening.target else { return Ok(false) };
        let (len, credits) = (write.len, u32::from(write.notify.is_some()));
        let fits = write.remote_offset.checked_add(len).is_some_and(|end| end <= size) && len <= self.longest;
        let says = len > 0 || credits > 0;
        if !fits || !says || !self.open || !self.outbox.is_empty() || self.credits < credits || self.room() == 0 {
            return Ok(false);
        }
        let immediate = match write.notify {
            Some(Notify(notify)) if notify <= MAX_NOTED => Some(self.note(notify)),
            Some(_) => return Ok(false),
            None => None,
        };
        self.credits -= credits;
        self.posts += u64::from(credits);
        let (offset, len32) = (write.local_offset, len as u32);
        let inline = len <= self.queue.inline() as u64;
        self.flying_writes += usize::from(!inline);
        let work = Work::Write { address: address + write.remote_offset, rkey, immediate };
        let holds = Holds { write: !inline, ..Holds::default() };
        let source = match len {
            0 => Source::Nothing,
            _ if inline => Source::InlineFrom { mr, offset, len: len32 },
            _ => Source::Registered { mr, offset, len: len32 },
        };
        self.queue.post_one(work, source, holds)?;
        Ok(true)
    }

    /// Posts a write, or queues what there is no room for.
    pub fn write(&mut self, peer: PeerId, source: &Arc<Mr>, write: Outgoing) -> Result<()> {
        let mut sent = 0;
        if self.open && self.outbox.is_empty() {
            match self.post_write(source, &write, 0)? {
                Progress::Done => return Ok(()),
                Progress::At(at) => sent = at,
            }
        }
        self.reserve(peer, COST)?;
        self.bytes += COST;
        self.queued_writes += 1;
        self.outbox.push_back(Post::Write { source: Arc::clone(source), write, sent });
        Ok(())
    }

    /// Posts what waits, as far as there is room.
    pub fn flush(&mut self) -> Result<()> {
        while self.open
            && let Some(post) = self.outbox.pop_front()
        {
            match post {
                Post::Message { payload, sent } => match self.post_message(&payload, sent)? {
                    Progress::Done => self.bytes -= COST + payload.len(),
                    Progress::At(sent) => {
                        self.outbox.push_front(Post::Message { payload, sent });
                        return Ok(());
                    }
                },
                Post::Write { source, write, sent } => match self.post_write(&source, &write, sent)? {
                    Progress::Done => {
                        self.bytes -= COST;
                        self.queued_writes -= 1;
                    }
                    Progress::At(sent) => {
                        self.outbox.push_front(Post::Write { source, write, sent });
                        return Ok(());
                    }
                },
            }
        }
        Ok(())
    }

    /// Requests that may be posted. Completions that nobody waits for are taken
    /// when their room is needed; a failure among them is told by the next
    /// [`reap`](Self::reap).
    #[inline(always)]
    fn room(&mut self) -> usize {
        if self.queue.room() < KEPT + CHAIN || self.ring_used == RING {
            let _ = self.reap();
        }
        self.queue.room().saturating_sub(KEPT)
    }

    /// Is there something to post, or to be taken for somebody who waits?
    #[inline]
    pub fn needs_attention(&self) -> bool {
        let waits = self.flying_writes > 0 || !self.asks.is_empty() || !self.bound.is_empty();
        waits || self.has_output() || self.owed.is_due() || self.queue.has_failed()
    }

    fn post_message(&mut self, payload: &[u8], mut at: usize) -> Result<Progress<usize>> {
        let short = payload.len() <= self.queue.inline().min(self.buffer);
        if at == 0 && short && self.credits > 0 && self.room() > 0 {
            self.credits -= 1;
            self.posts += 1;
            let work = Work::Send { immediate: Said::Piece { rest: 0, receives: self.owed.ride() }.encode() };
            self.queue.post_one(work, Source::Inline(payload), Holds::default())?;
            return Ok(Progress::Done);
        }
        let mut whole = false;
        while !whole {
            let mut batch = Batch::new();
            let most = self.room().min(CHAIN).min(self.credits as usize);
            while batch.len() < most && !whole {
                let piece = &payload[at..][..(payload.len() - at).min(self.buffer)];
                let rest = (payload.len() - at - piece.len()) as u32;
                let carried = piece.len() <= self.queue.inline();
                if !carried && self.ring_used == RING {
                    break;
                }
                let work = Work::Send { immediate: Said::Piece { rest, receives: self.owed.ride() }.encode() };
                if carried {
                    batch.push(work, Source::Inline(piece), Holds::default());
                } else {
                    let offset = self.ring_next * BUFFER;
                    self.ring.write(offset, piece)?;
                    self.ring_next = (self.ring_next + 1) % RING;
                    self.ring_used += 1;
                    let source =
                        Source::Registered { mr: &self.ring_mr, offset: offset as u64, len: piece.len() as u32 };
                    batch.push(work, source, Holds { slot: true, ..Holds::default() });
                }
                at += piece.len();
                whole = rest == 0;
            }
            if batch.len() == 0 {
                return Ok(Progress::At(at));
            }
            self.credits -= batch.len() as u32;
            self.posts += batch.len() as u64;
            self.queue.post(&mut batch)?;
        }
        Ok(Progress::Done)
    }

    fn post_write(&mut self, source: &Mr, write: &Outgoing, at: u64) -> Result<Progress<u64>> {
        if write.len == 0 && write.notify.is_none() {
            return Ok(Progress::Done);
        }
        let known = self.openings.iter().find(|o| o.region == write.region && o.token == write.token);
        let Some(opening) = known else {
            let key = Key { region: write.region, size: write.region_size, token: write.token }.bytes(Maker::Verbs);
            self.openings.push(Opening { key, region: write.region, token: write.token, target: None });
            self.asks.push((write.region, write.token));
            return Ok(Progress::At(at));
        };
        match opening.target {
            None => Ok(Progress::At(at)),
            Some(Place::Region { address, rkey, size }) => {
                if write.remote_offset.checked_add(write.len).is_none_or(|end| end > size) {
                    return Err(Error::Protocol("a region that is smaller than its key says".into()));
                }
                self.write_direct(source, write, at, (address + write.remote_offset, rkey))
            }
            Some(Place::Landing) => self.write_landing(source, write, at),
        }
    }

    /// Straight into the region.
    fn write_direct(
        &mut self,
        mr: &Mr,
        write: &Outgoing,
        mut at: u64,
        (address, rkey): (u64, u32),
    ) -> Result<Progress<u64>> {
        let apart = write.notify.filter(|notify| notify.0 > MAX_NOTED);
        loop {
            if at == write.len
                && let Some(Notify(notify)) = apart
            {
                return Ok(if self.notify(notify)? { Progress::Done } else { Progress::At(at) });
            }
            let mut batch = Batch::new();
            let most = self.room().min(CHAIN);
            let (mut whole, mut starved) = (false, most == 0);
            while batch.len() < most && !whole {
                let len = (write.len - at).min(self.longest);
                whole = at + len == write.len;
                if whole && write.notify.is_some() && apart.is_none() && self.credits == 0 {
                    (whole, starved) = (false, true);
                    break;
                }
                let (immediate, source, holds) = self.piece(mr, write, at, len);
                batch.push(Work::Write { address: address + at, rkey, immediate }, source, holds);
                at += len;
            }
            if batch.len() > 0 {
                self.queue.post(&mut batch)?;
            }
            if whole && apart.is_none() {
                return Ok(Progress::Done);
            }
            if starved {
                return Ok(Progress::At(at));
            }
        }
    }

    /// The part of a write that one request carries, and what it takes: a credit
    /// if the last part notifies.
    fn piece<'a>(&mut self, mr: &'a Mr, write: &Outgoing, at: u64, len: u64) -> (Option<u32>, Source<'a>, Holds) {
        let whole = at + len == write.len;
        let immediate = match write.notify {
            Some(Notify(notify)) if whole && notify <= MAX_NOTED => {
                self.credits -= 1;
                self.posts += 1;
                Some(self.note(notify))
            }
            _ => None,
        };
        let (offset, len32) = (write.offset + at, len as u32);
        let inline = len <= self.queue.inline() as u64;
        let source = match len {
            0 => Source::Nothing,
            _ if inline => Source::InlineFrom { mr, offset, len: len32 },
            _ => Source::Registered { mr, offset, len: len32 },
        };
        let holds = Holds { write: whole && !(inline && at == 0), ..Holds::default() };
        self.flying_writes += usize::from(holds.write);
        (immediate, source, holds)
    }

    /// Puts bytes that no request carries itself into the next slot of the send ring;
    /// where that is. There is one free.
    fn stage(&mut self, bytes: &[u8]) -> Result<Option<u64>> {
        if bytes.len() <= self.queue.inline() {
            return Ok(None);
        }
        let offset = self.ring_next * BUFFER;
        self.ring.write(offset, bytes)?;
        self.ring_next = (self.ring_next + 1) % RING;
        self.ring_used += 1;
        Ok(Some(offset as u64))
    }

    /// The immediate of a write that notifies, and what rides on it.
    #[inline]
    fn note(&mut self, notify: u32) -> u32 {
        Noted { notify, receives: self.owed.ride() }.encode()
    }

    /// Notifies by a SEND; false if there is no room.
    fn notify(&mut self, notify: u32) -> Result<bool> {
        if self.room() == 0 || self.credits == 0 || self.ring_used == RING {
            return Ok(false);
        }
        let bytes = notify.to_le_bytes();
        let at = self.stage(&bytes)?;
        let (source, holds) = staged(&self.ring_mr, &bytes, at);
        let work = Work::Send { immediate: Said::Notified { receives: self.owed.ride() }.encode() };
        self.credits -= 1;
        self.posts += 1;
        self.queue.post_one(work, source, holds)?;
        Ok(true)
    }

    /// Into slots of the landing zone, each told of by a SEND.
    fn write_landing(&mut self, mr: &Mr, write: &Outgoing, mut at: u64) -> Result<Progress<u64>> {
        loop {
            if self.room() < 2 || self.credits == 0 || self.ring_used == RING {
                return Ok(Progress::At(at));
            }
            let Some(zone) = &mut self.zone else { return Ok(Progress::At(at)) };
            let Some(address) = zone.take() else { return Ok(Progress::At(at)) };
            let (rkey, slot) = (zone.rkey, zone.slot);
            let len = (write.len - at).min(u64::from(slot)) as u32;
            let whole = at + u64::from(len) == write.len;
            let notify = if whole { write.notify.map(|n| n.0) } else { None };
            let landed = Landed { region: write.region, offset: write.remote_offset + at, len, notify }.encode();
            let at_slot = self.stage(&landed)?;
            let mut batch = Batch::new();
            if len > 0 {
                let source = Source::Registered { mr, offset: write.offset + at, len };
                let work = Work::Write { address, rkey, immediate: None };
                batch.push(work, source, Holds { write: whole, ..Holds::default() });
                self.flying_writes += usize::from(whole);
            }
            let work = Work::Send { immediate: Said::Landed { receives: self.owed.ride() }.encode() };
            let (source, holds) = staged(&self.ring_mr, &landed, at_slot);
            batch.push(work, source, holds);
            self.credits -= 1;
            self.posts += 1;
            self.queue.post(&mut batch)?;
            at += u64::from(len);
            if whole {
                return Ok(Progress::Done);
            }
        }
    }

    /// Returns receives and slots to the peer by a message of their own, if they are
    /// worth one and the queue is not full.
    pub fn return_credits(&mut self) -> Result<()> {
        if let Some((receives, slots)) = self.owed.message()
            && self.queue.room() > 0
        {
            let work = Work::Send { immediate: Said::Credits { receives, slots }.encode() };
            self.queue.post_one(work, Source::Nothing, Holds::default())?;
            self.posts += 1;
            self.owed.returned((receives, slots));
        }
        Ok(())
    }

    /// Binds a window for `region`; false if the queue is full.
    pub fn bind(&mut self, window: &super::objects::Window, region: u32) -> Result<bool> {
        if self.queue.room() == 0 {
            return Ok(false);
        }
        let holds = Holds { window: Some(region), ..Holds::default() };
        self.queue.post_one(Work::Bind(window), Source::Nothing, holds)?;
        Ok(true)
    }
}

/// The source of bytes that a request carries itself or, staged, from the send ring;
/// and what the request holds for it.
fn staged<'a>(ring: &'a Mr, bytes: &'a [u8], at: Option<u64>) -> (Source<'a>, Holds) {
    match at {
        None => (Source::Inline(bytes), Holds::default()),
        Some(offset) => {
            let source = Source::Registered { mr: ring, offset, len: bytes.len() as u32 };
            (source, Holds { slot: true, ..Holds::default() })
        }
    }
}
