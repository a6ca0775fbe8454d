//! The regions a transport knows, and the checks every access passes.

use std::sync::Arc;

use crate::key::{Key, Maker, Token};
use crate::{Access, Error, Memory, RegionId, RemoteKey, Result};

struct Region {
    memory: Arc<Memory>,
    access: Access,
    token: Token,
}

/// Registered regions by number. Numbers are not reused.
#[derive(Default)]
pub(crate) struct Regions {
    slots: Vec<Option<Region>>,
}

impl Regions {
    pub fn register(&mut self, memory: &Arc<Memory>, access: Access) -> Result<RegionId> {
        let id = u32::try_from(self.slots.len()).map_err(|_| Error::os("registering memory", "2^32 regions"))?;
        let token = Token::random()?;
        self.slots.push(Some(Region { memory: Arc::clone(memory), access, token }));
        Ok(RegionId(id))
    }

    pub fn deregister(&mut self, id: RegionId) -> Result<()> {
        match self.slots.get_mut(id.0 as usize).and_then(Option::take) {
            Some(_) => Ok(()),
            None => Err(Error::UnknownRegion(id)),
        }
    }

    fn get(&self, id: RegionId) -> Result<&Region> {
        match self.slots.get(id.0 as usize) {
            Some(Some(region)) => Ok(region),
            _ => Err(Error::UnknownRegion(id)),
        }
    }

    pub fn key(&self, id: RegionId, maker: Maker) -> Result<RemoteKey> {
        let region = self.get(id)?;
        if matches!(region.access, Access::LocalOnly) {
            return Err(Error::NotExported(id));
        }
        Ok(Key { region: id.0, size: region.memory.len() as u64, token: region.token }.encode(maker))
    }

    /// The memory of a source range, if there is such a range.
    pub fn source(&self, id: RegionId, offset: u64, len: u64) -> Result<&Arc<Memory>> {
        let memory = &self.get(id)?.memory;
        let size = memory.len() as u64;
        if offset.checked_add(len).is_none_or(|end| end > size) {
            return Err(Error::OutOfRange { offset, len, size });
        }
        Ok(memory)
    }

    /// The memory a peer that proved itself with `token` may map or write; the
    /// error says what it did wrong.
    pub fn exported(&self, region: u32, token: &Token) -> Result<&Arc<Memory>> {
        self.exported_region(region, token).map(|r| &r.memory)
    }

    /// Is the region one whose guard is asked?
    pub fn is_guarded(&self, region: u32) -> bool {
        self.get(RegionId(region)).is_ok_and(|r| matches!(r.access, Access::Guarded(_)))
    }

    fn exported_region(&self, region: u32, token: &Token) -> Result<&Region> {
        match self.get(RegionId(region)) {
            Ok(r) if matches!(r.access, Access::LocalOnly) => Err(protocol("a region that is not exported")),
            Ok(r) if !r.token.matches(token) => Err(protocol("a forged key")),
            Ok(r) => Ok(r),
            Err(_) => Err(protocol("a region that is not, or no longer, registered")),
        }
    }

    /// The memory of a target range, if the peer that said `hello` may write
    /// there.
    pub fn target(&self, region: u32, token: &Token, offset: u64, len: u64, hello: &[u8]) -> Result<&Arc<Memory>> {
        let region = self.exported_region(region, token)?;
        if offset.checked_add(len).is_none_or(|end| end > region.memory.len() as u64) {
            return Err(protocol("a range outside the region"));
        }
        if let Access::Guarded(guard) = &region.access
            && !guard.may_write(hello, offset, len)
        {
            return Err(protocol("a range that its guard refuses"));
        }
        Ok(&region.memory)
    }

    /// The memory behind a region that was checked before, if it is still
    /// registered: a write that lands in several pieces asks before each.
    pub fn still(&self, region: u32) -> Result<&Arc<Memory>> {
        match self.get(RegionId(region)) {
            Ok(r) => Ok(&r.memory),
            Err(_) => Err(protocol("a region that is no longer registered")),
        }
    }
}

fn protocol(what: &str) -> Error {
    Error::Protocol(format!("write to {what}"))
}
