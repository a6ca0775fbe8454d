//! Prefix reuse by content hash: a block whose tokens, and all tokens before
//! them, have been computed by the same model is computed once.
//!
//! A block's name is the hash of its parent's name, its tokens and the model,
//! so it means the same in every process and on every machine.

use std::collections::{BTreeSet, HashMap};

use super::table::{BlockRef, RBlockTable};

/// Content name of a full block and everything before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockHash(pub [u8; 16]);

impl BlockHash {
    /// The name before the first block of any sequence of a model.
    /// `fingerprint` says everything that changes the KV of the same tokens:
    /// weights, configuration, KV element type.
    pub fn root(fingerprint: &[u8]) -> Self {
        Self::from(blake3::Hasher::new_derive_key("distkv prefix root v1").update(fingerprint))
    }

    /// The name of the block of `tokens` that follows `self`.
    pub fn then(self, tokens: &[u32]) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("distkv prefix block v1");
        hasher.update(&self.0);
        let mut bytes = [0; 256];
        for part in tokens.chunks(bytes.len() / 4) {
            for (slot, token) in bytes.chunks_exact_mut(4).zip(part) {
                slot.copy_from_slice(&token.to_le_bytes());
            }
            hasher.update(&bytes[..part.len() * 4]);
        }
        Self::from(&mut hasher)
    }
}

impl From<&mut blake3::Hasher> for BlockHash {
    fn from(hasher: &mut blake3::Hasher) -> Self {
        let mut name = [0; 16];
        hasher.finalize_xof().fill(&mut name);
        Self(name)
    }
}

/// What became of an [`insert`](PrefixCache::insert).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inserted {
    /// The cache holds the block from now on, beside its other holders.
    New,
    /// The same content is already held in another block (or this one).
    Known,
    /// Left out: what comes before it is not in the cache, or the block cannot
    /// be shared.
    Skipped,
}

struct Node {
    block: BlockRef,
    parent: BlockHash,
    children: u32,
    used: u64,
}

/// The blocks kept for reuse. The rBlock table's refs are the truth: the cache
/// is one holder among others, and evicts only what nobody else holds.
pub struct PrefixCache {
    root: BlockHash,
    block_tokens: usize,
    nodes: HashMap<BlockHash, Node>,
    /// Nodes without children, least recently used first.
    leaves: BTreeSet<(u64, BlockHash)>,
    clock: u64,
}

impl PrefixCache {
    /// An empty cache for one model; see [`BlockHash::root`].
    pub fn new(fingerprint: &[u8], block_tokens: usize) -> Self {
        assert!(block_tokens > 0);
        let root = BlockHash::root(fingerprint);
        Self { root, block_tokens, nodes: HashMap::new(), leaves: BTreeSet::new(), clock: 0 }
    }

    /// The name before the first block.
    pub fn root(&self) -> BlockHash {
        self.root
    }

    /// Blocks held.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Holds nothing.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// Blocks that nobody else holds, counted one by one: as many as
    /// [`evict`](Self::evict) can free.
    pub fn evictable(&self, table: &RBlockTable) -> usize {
        self.evictable_up_to(table, usize::MAX)
    }

    /// As [`evictable`](Self::evictable), but counts no further than `most`: in
    /// a full cache the first few blocks tell that there are enough.
    pub fn evictable_up_to(&self, table: &RBlockTable, most: usize) -> usize {
        let sole = |n: &&Node| table.entry(n.block.index).is_some_and(|e| e.refs == 1);
        self.nodes.values().filter(sole).take(most).count()
    }

    /// The longest run of full blocks that begins `tokens` and is held, with
    /// the name of the last one. Each block is retained for the caller, who
    /// releases it. To get at least one token to compute (for its logits) pass
    /// all tokens but the last.
    pub fn lookup(&mut self, table: &RBlockTable, tokens: &[u32]) -> (Vec<BlockRef>, BlockHash) {
        self.clock += 1;
        let mut found = Vec::new();
        let mut name = self.root;
        for part in tokens.chunks_exact(self.block_tokens) {
            let next = name.then(part);
            let Some(node) = self.nodes.get(&next) else { break };
            if table.retain(node.block).is_err() {
                break;
            }
            found.push(node.block);
            self.touch(next);
            name = next;
        }
        (found, name)
    }

    /// Keeps a full block of `tokens` that follows `parent`; returns its name
    /// (to chain the next one on) whether or not it was kept. Call once the
    /// block's KV is complete in every layer.
    pub fn insert(
        &mut self,
        table: &RBlockTable,
        parent: BlockHash,
        tokens: &[u32],
        block: BlockRef,
    ) -> (BlockHash, Inserted) {
        debug_assert_eq!(tokens.len(), self.block_tokens);
        let name = parent.then(tokens);
        self.clock += 1;
        if self.nodes.contains_key(&name) {
            self.touch(name);
            return (name, Inserted::Known);
        }
        // A block whose parent is gone could never be found, only occupy memory.
        if parent != self.root && !self.nodes.contains_key(&parent) || table.retain(block).is_err() {
            return (name, Inserted::Skipped);
        }
        if let Some(above) = self.nodes.get_mut(&parent) {
            above.children += 1;
            self.leaves.remove(&(above.used, parent));
        }
        self.nodes.insert(name, Node { block, parent, children: 0, used: self.clock });
        self.leaves.insert((self.clock, name));
        (name, Inserted::New)
    }

    /// Frees up to `n` blocks that nobody else holds, least recently used ends
    /// of prefixes first; returns how many.
    ///
    /// A block may be held by nobody else although one after it is: a sequence
    /// has moved the earlier one to a creditor. Where ends of prefixes do not
    /// suffice, such a block goes, and with it what follows it leaves the cache:
    /// without it that could not be found any more.
    pub fn evict(&mut self, table: &RBlockTable, n: usize) -> usize {
        let freed = self.evict_leaves(table, n);
        if freed < n { freed + self.evict_inner(table, n - freed) } else { freed }
    }

    fn evict_inner(&mut self, table: &RBlockTable, n: usize) -> usize {
        let sole = |node: &Node| table.entry(node.block.index).is_some_and(|e| e.refs == 1);
        let mut roots: Vec<_> = self.nodes.iter().filter(|(_, v)| sole(v)).map(|(&k, v)| (v.used, k)).collect();
        if roots.is_empty() {
            return 0;
        }
        roots.sort_unstable();
        let mut children: HashMap<BlockHash, Vec<BlockHash>> = HashMap::new();
        for (&name, node) in &self.nodes {
            children.entry(node.parent).or_default().push(name);
        }
        let mut freed = 0;
        for (_, root) in roots {
            if freed >= n {
                break;
            }
            if let Some(node) = self.nodes.get(&root) {
                self.orphan(node.parent);
            }
            let mut subtree = vec![root];
            while let Some(name) = subtree.pop() {
                subtree.extend(children.get(&name).into_iter().flatten());
                let Some(node) = self.nodes.remove(&name) else { continue };
                self.leaves.remove(&(node.used, name));
                match table.release(node.block) {
                    Ok(last) => freed += usize::from(last),
                    Err(error) => debug_assert!(false, "prefix cache: {error}"),
                }
            }
        }
        freed
    }

    /// A node has lost a child.
    fn orphan(&mut self, parent: BlockHash) {
        if let Some(above) = self.nodes.get_mut(&parent) {
            above.children -= 1;
            if above.children == 0 {
                self.leaves.insert((above.used, parent));
            }
        }
    }

    fn evict_leaves(&mut self, table: &RBlockTable, n: usize) -> usize {
        let mut freed = 0;
        let mut after = None;
        while freed < n {
            // Evicting a leaf may turn its parent into one that is older than
            // where we stand: begin again from the oldest then.
            let Some(&(used, name)) = (match after {
                None => self.leaves.first(),
                Some(key) => self.leaves.range((std::ops::Bound::Excluded(key), std::ops::Bound::Unbounded)).next(),
            }) else {
                break;
            };
            let node = &self.nodes[&name];
            match table.release_if_sole(node.block) {
                Ok(true) => freed += 1,
                Ok(false) => {
                    after = Some((used, name));
                    continue;
                }
                // Somebody released what the cache held: forget the block.
                Err(error) => debug_assert!(false, "prefix cache: {error}"),
            }
            let parent = node.parent;
            self.leaves.remove(&(used, name));
            self.nodes.remove(&name);
            if let Some(above) = self.nodes.get_mut(&parent) {
                above.children -= 1;
                if above.children == 0 {
                    let key = (above.used, parent);
                    self.leaves.insert(key);
                    if after.is_some_and(|a| key < a) && table.entry(above.block.index).is_some_and(|e| e.refs == 1) {
                        after = None;
                    }
                }
            }
        }
        freed
    }

    /// Gives up every block; those that nobody else holds are freed.
    pub fn clear(&mut self, table: &RBlockTable) {
        for (_, node) in self.nodes.drain() {
            let released = table.release(node.block);
            debug_assert!(released.is_ok());
        }
        self.leaves.clear();
    }

    fn touch(&mut self, name: BlockHash) {
        let Some(node) = self.nodes.get_mut(&name) else { return };
        if self.leaves.remove(&(node.used, name)) {
            self.leaves.insert((self.clock, name));
        }
        node.used = self.clock;
    }
}
