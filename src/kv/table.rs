//! The lock-free rBlock table.

/// Who holds which block.
pub struct RBlockTable {}

impl RBlockTable {
    /// A table of `blocks` free blocks.
    pub fn new(_blocks: u32) -> Self {
        Self {}
    }
}
