//! Where each token's keys and values are: rBlocks, the lock-free rBlock
//! table, the pool of physical blocks, and prefix reuse.

pub mod pool;
pub mod prefix;
pub mod rblock;
pub mod table;
