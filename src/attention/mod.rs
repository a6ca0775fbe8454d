//! DistAttention: attention over a KV cache whose rBlocks lie at several
//! instances.
//!
//! A sequence's keys are cut into parts by where they lie. Each holder computes
//! its MicroAttention, a *partial* `(o, lse)` a query row and head: `o` the
//! attention over that part alone, `lse` the natural logarithm of the sum of
//! exponentiated scores, −∞ where the part has no key. Partials merge (paper,
//! equations of section "DistAttention", in the (o, lse) form):
//!
//! ```text
//! lse = ln(e^lse₁ + e^lse₂)      o = e^(lse₁ − lse) · o₁ + e^(lse₂ − lse) · o₂
//! ```
//!
//! which is exact, associative and commutative up to rounding; it is done in
//! f32 by [`Device::merge`](crate::device::Device::merge).
//!
//! The **debtor** ([`debtor::Debtor`], owned by the engine thread) sends each
//! layer's queries to the **creditors** ([`creditor::Creditor`], a thread of
//! its own at each instance that lends), attends to its own keys meanwhile, and
//! merges what comes back. [`wire`] is what travels; [`mailbox`] the memory it
//! lands in.

pub mod creditor;
pub mod debtor;
pub mod exchange;
pub mod fetch;
#[cfg(test)]
mod gap_tests;
pub mod landing;
pub mod mailbox;
mod paths;
mod source;
pub mod wire;

use crate::device::Device;

/// What DistAttention does inside a layer, seen from the transformer.
pub trait LayerHook<D: Device> {
    /// Whether nothing is to be done in this step: all keys are local, and none
    /// are to lie elsewhere.
    fn is_idle(&self) -> bool;

    /// The step's K and V of `layer` are in the pool and the queries are ready
    /// in `qkv`: send queries out, and KV that is to lie elsewhere.
    fn queries_ready(&mut self, layer: usize, device: &mut D, qkv: &D::Buffer);

    /// The local partials of `layer` are in `o` and `lse`: merge the others'.
    fn local_done(&mut self, layer: usize, device: &mut D, o: &mut D::Buffer, lse: &mut D::Buffer);
}

/// All keys are local.
pub struct LocalOnly;

impl<D: Device> LayerHook<D> for LocalOnly {
    fn is_idle(&self) -> bool {
        true
    }

    fn queries_ready(&mut self, _: usize, _: &mut D, _: &D::Buffer) {}
    fn local_done(&mut self, _: usize, _: &mut D, _: &mut D::Buffer, _: &mut D::Buffer) {}
}
