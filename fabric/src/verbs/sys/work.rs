//! Work requests: what is posted to a queue pair. As in `types.rs`, names and
//! layout are those of `infiniband/verbs.h`.
#![allow(non_camel_case_types, missing_docs)]

use std::ffi::{c_int, c_uint, c_void};

use super::types::{ibv_enum, ibv_mw, ibv_mw_bind_info};

pub const IBV_WR_RDMA_WRITE: ibv_enum = 0;
pub const IBV_WR_RDMA_WRITE_WITH_IMM: ibv_enum = 1;
pub const IBV_WR_SEND: ibv_enum = 2;
pub const IBV_WR_SEND_WITH_IMM: ibv_enum = 3;
pub const IBV_WR_RDMA_READ: ibv_enum = 4;
pub const IBV_WR_LOCAL_INV: ibv_enum = 7;
pub const IBV_WR_BIND_MW: ibv_enum = 8;
pub const IBV_WR_SEND_WITH_INV: ibv_enum = 9;
pub const IBV_SEND_FENCE: c_uint = 1;
pub const IBV_SEND_SIGNALED: c_uint = 1 << 1;
pub const IBV_SEND_SOLICITED: c_uint = 1 << 2;
pub const IBV_SEND_INLINE: c_uint = 1 << 3;

/// A run of registered memory.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct ibv_sge {
    pub addr: u64,
    pub length: u32,
    pub lkey: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ibv_wr_rdma {
    pub remote_addr: u64,
    pub rkey: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ibv_wr_atomic {
    pub remote_addr: u64,
    pub compare_add: u64,
    pub swap: u64,
    pub rkey: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ibv_wr_ud {
    pub ah: *mut c_void,
    pub remote_qpn: u32,
    pub remote_qkey: u32,
}

/// Where a send request goes to.
#[repr(C)]
#[derive(Clone, Copy)]
pub union ibv_wr_target {
    pub rdma: ibv_wr_rdma,
    pub atomic: ibv_wr_atomic,
    pub ud: ibv_wr_ud,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct ibv_wr_bind_mw {
    pub mw: *mut ibv_mw,
    pub rkey: u32,
    pub bind_info: ibv_mw_bind_info,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct ibv_wr_tso {
    pub hdr: *mut c_void,
    pub hdr_sz: u16,
    pub mss: u16,
}

/// What only some opcodes use.
#[repr(C)]
#[derive(Clone, Copy)]
pub union ibv_wr_extra {
    pub bind_mw: ibv_wr_bind_mw,
    pub tso: ibv_wr_tso,
}

/// A request for the send queue.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct ibv_send_wr {
    pub wr_id: u64,
    pub next: *mut ibv_send_wr,
    pub sg_list: *mut ibv_sge,
    pub num_sge: c_int,
    pub opcode: ibv_enum,
    pub send_flags: c_uint,
    pub imm_data: u32,
    pub wr: ibv_wr_target,
    pub xrc_remote_srqn: u32,
    pub extra: ibv_wr_extra,
}

/// A request for a receive queue.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct ibv_recv_wr {
    pub wr_id: u64,
    pub next: *mut ibv_recv_wr,
    pub sg_list: *mut ibv_sge,
    pub num_sge: c_int,
}
