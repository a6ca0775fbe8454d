//! A request for a send queue: what it does, of which bytes, and how the library
//! takes it.
#![allow(unsafe_code)]

use std::ptr;

use super::device::Mr;
use super::objects::Window;
use super::sys::*;

/// What a request does.
#[derive(Clone, Copy)]
pub enum Work<'a> {
    /// Places bytes at the peer.
    Write {
        /// Where.
        address: u64,
        /// With which key.
        rkey: u32,
        /// Takes one of the peer's receives and tells it this.
        immediate: Option<u32>,
    },
    /// Fills one of the peer's receives and tells it this.
    Send {
        /// The immediate.
        immediate: u32,
    },
    /// Makes a window usable by the peer.
    Bind(&'a Window),
}

/// Where a request's bytes are.
#[derive(Clone, Copy)]
pub enum Source<'a> {
    /// No bytes.
    Nothing,
    /// Copied during the call; at most [`Qp::inline`](super::objects::Qp::inline) bytes.
    Inline(&'a [u8]),
    /// As `Inline`, of memory that others may write meanwhile.
    InlineFrom {
        /// Its registration.
        mr: &'a Mr,
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u32,
    },
    /// Read by the device until the completion.
    Registered {
        /// The registration.
        mr: &'a Mr,
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u32,
    },
}

/// A request for the send queue.
#[derive(Clone, Copy)]
pub struct Request<'a> {
    /// Comes back with its completion.
    pub id: u64,
    /// What.
    pub work: Work<'a>,
    /// Of which bytes.
    pub source: Source<'a>,
    /// Completes even if nothing goes wrong.
    pub signalled: bool,
}

impl Request<'_> {
    /// As the library takes it.
    ///
    /// # Safety
    /// `run` and `to` can be written.
    #[inline(always)]
    pub(super) unsafe fn lay_out(&self, run: *mut ibv_sge, to: *mut ibv_send_wr, next: *mut ibv_send_wr) {
        let mut send_flags = if self.signalled { IBV_SEND_SIGNALED } else { 0 };
        let (sge, num_sge) = match self.source {
            Source::Nothing => (ibv_sge::default(), 0),
            Source::Inline(bytes) => {
                send_flags |= IBV_SEND_INLINE;
                (ibv_sge { addr: bytes.as_ptr().addr() as u64, length: bytes.len() as u32, lkey: 0 }, 1)
            }
            Source::InlineFrom { mr, offset, len } => {
                send_flags |= IBV_SEND_INLINE;
                (ibv_sge { addr: mr.address() + offset, length: len, lkey: mr.lkey() }, 1)
            }
            Source::Registered { mr, offset, len } => {
                (ibv_sge { addr: mr.address() + offset, length: len, lkey: mr.lkey() }, 1)
            }
        };
        let nowhere = ibv_wr_target { rdma: ibv_wr_rdma { remote_addr: 0, rkey: 0 } };
        // Not every request has it, and all zeroes is a value of it.
        let mut extra = ibv_wr_extra { tso: ibv_wr_tso { hdr: ptr::null_mut(), hdr_sz: 0, mss: 0 } };
        let (opcode, imm_data, wr) = match self.work {
            Work::Write { address, rkey, immediate } => {
                let wr = ibv_wr_target { rdma: ibv_wr_rdma { remote_addr: address, rkey } };
                match immediate {
                    Some(immediate) => (IBV_WR_RDMA_WRITE_WITH_IMM, immediate.to_be(), wr),
                    None => (IBV_WR_RDMA_WRITE, 0, wr),
                }
            }
            Work::Send { immediate } => (IBV_WR_SEND_WITH_IMM, immediate.to_be(), nowhere),
            Work::Bind(window) => {
                extra = ibv_wr_extra { bind_mw: window.bind() };
                (IBV_WR_BIND_MW, 0, nowhere)
            }
        };
        // SAFETY: the caller's promise.
        unsafe {
            run.write(sge);
            to.write(ibv_send_wr {
                wr_id: self.id,
                next,
                sg_list: run,
                num_sge,
                opcode,
                send_flags,
                imm_data,
                wr,
                xrc_remote_srqn: 0,
                extra,
            });
        }
    }
}
