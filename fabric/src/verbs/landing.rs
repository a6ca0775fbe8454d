//! The landing zone: where a peer's writes to guarded regions come down.
//!
//! A guard decides write by write, and a device cannot ask it. So the peer gets
//! no key to the region; it writes into slots of its own zone, in order, and
//! tells of each with a SEND. The owner checks, copies, and returns the slot.
//! A slot's life: free (the writer counts it) → filled by an RDMA WRITE → told
//! → checked and copied → due → returned with the next credits.

use std::sync::Arc;

use super::device::{Mr, MrAccess, Pd};
use super::objects::Window;
use super::receiver::Bound;
use super::wire::Target;
use crate::{Memory, Result};

/// Bytes of a slot.
pub const SLOT: u32 = 256 << 10;

/// Slots of a zone.
pub const SLOTS: u16 = 8;

/// So many consumed slots are worth a message.
pub const SLOTS_DUE: u16 = 2;

/// The receiving side of a zone.
pub struct Landing {
    pub memory: Arc<Memory>,
    pub mr: Arc<Mr>,
    /// The peer's key, where the device has windows.
    pub window: Option<Window>,
    pub bound: Bound,
    next: u16,
}

impl Landing {
    /// A zone for one peer.
    pub fn new(pd: &Arc<Pd>, windows: bool) -> Result<Self> {
        let memory = Memory::new(SLOT as usize * SLOTS as usize)?;
        let mr = Arc::new(Mr::register(pd, &memory, writable(windows))?);
        let window = if windows { Some(Window::new(&mr)?) } else { None };
        let bound = if window.is_some() { Bound::No } else { Bound::Yes };
        Ok(Self { memory, mr, window, bound, next: 0 })
    }

    /// As the writer has to know it.
    pub fn target(&self) -> Target {
        let rkey = self.window.as_ref().map_or(self.mr.rkey(), Window::rkey);
        Target::Landing { address: self.mr.address(), rkey, slot: SLOT, slots: SLOTS }
    }

    /// First byte of the slot that is filled next.
    pub fn take(&mut self) -> usize {
        let at = usize::from(self.next) * SLOT as usize;
        self.next = (self.next + 1) % SLOTS;
        at
    }
}

/// The access with which memory that peers may write is registered: by windows
/// bound to one queue pair each, or by its own key.
pub fn writable(windows: bool) -> MrAccess {
    if windows { MrAccess::Windows } else { MrAccess::RemoteWrite }
}

/// The writing side of a zone.
#[derive(Clone, Copy, Debug)]
pub struct Zone {
    pub address: u64,
    pub rkey: u32,
    pub slot: u32,
    slots: u16,
    next: u16,
    free: u16,
}

impl Zone {
    /// All of whose slots are free.
    pub fn new(address: u64, rkey: u32, slot: u32, slots: u16) -> Self {
        Self { address, rkey, slot, slots, next: 0, free: slots }
    }

    /// Takes the next slot; its address.
    pub fn take(&mut self) -> Option<u64> {
        self.free = self.free.checked_sub(1)?;
        let address = self.address + u64::from(self.next) * u64::from(self.slot);
        self.next = (self.next + 1) % self.slots;
        Some(address)
    }

    /// The owner has returned slots.
    pub fn give_back(&mut self, slots: u16) -> std::result::Result<(), &'static str> {
        self.free = self.free.checked_add(slots).filter(|free| *free <= self.slots).ok_or("slots that were not out")?;
        Ok(())
    }
}
