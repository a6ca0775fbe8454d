//! Where each token's keys and values are: rBlocks, the lock-free rBlock
//! table, the pool of physical blocks, block tables, and prefix reuse.

pub mod block_table;
pub mod entry;
pub mod moves;
pub mod pool;
pub mod prefix;
pub mod rblock;
pub mod step;
pub mod sync;
pub mod table;

#[cfg(test)]
mod tests;
