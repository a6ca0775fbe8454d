//! The structs and constants of `infiniband/verbs.h`, field for field and
//! under their names there (`man 3 ibv_create_qp` and its neighbours describe
//! them). `tests/verbs_layout.rs` compares every size, offset and constant with
//! the C headers.
//!
//! Where C has an anonymous union one field stands for all its members of that
//! size: `imm_data` for `invalidate_rkey` and `invalidated_rkey`, and
//! `bind_mw` and `tso` are [`ibv_wr_extra`]. `__be32` and `__be64` fields are in
//! network byte order.
#![allow(non_camel_case_types, non_snake_case, missing_docs)]

use std::ffi::{c_char, c_int, c_uint, c_void};

use super::work::{ibv_recv_wr, ibv_send_wr};

/// A C enum whose values the headers give; an integer here, since the library
/// or a driver newer than these constants may use values unknown to us.
pub type ibv_enum = c_uint;

/// A slot of a table of functions that is not called from here.
pub type unused_fn = Option<unsafe extern "C" fn()>;

/// 16 bytes that name a port: on RoCE an IPv6 address, or an IPv4 one mapped.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ibv_gid {
    pub raw: [u8; 16],
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct ibv_gid_entry {
    pub gid: ibv_gid,
    pub gid_index: u32,
    pub port_num: u32,
    pub gid_type: u32,
    pub ndev_ifindex: u32,
}

pub const IBV_GID_TYPE_IB: u32 = 0;
pub const IBV_GID_TYPE_ROCE_V1: u32 = 1;
pub const IBV_GID_TYPE_ROCE_V2: u32 = 2;

#[repr(C)]
pub struct _ibv_device_ops {
    pub _dummy1: unused_fn,
    pub _dummy2: unused_fn,
}

pub const IBV_SYSFS_NAME_MAX: usize = 64;
pub const IBV_SYSFS_PATH_MAX: usize = 256;

#[repr(C)]
pub struct ibv_device {
    pub _ops: _ibv_device_ops,
    pub node_type: c_int,
    pub transport_type: c_int,
    pub name: [c_char; IBV_SYSFS_NAME_MAX],
    pub dev_name: [c_char; IBV_SYSFS_NAME_MAX],
    pub dev_path: [c_char; IBV_SYSFS_PATH_MAX],
    pub ibdev_path: [c_char; IBV_SYSFS_PATH_MAX],
}

pub const IBV_NODE_CA: c_int = 1;
pub const IBV_NODE_RNIC: c_int = 4;
pub const IBV_TRANSPORT_IB: c_int = 0;
pub const IBV_TRANSPORT_IWARP: c_int = 1;

#[repr(C)]
pub struct ibv_context_ops {
    pub _compat_query_device: unused_fn,
    pub _compat_query_port: unused_fn,
    pub _compat_alloc_pd: unused_fn,
    pub _compat_dealloc_pd: unused_fn,
    pub _compat_reg_mr: unused_fn,
    pub _compat_rereg_mr: unused_fn,
    pub _compat_dereg_mr: unused_fn,
    pub alloc_mw: Option<unsafe extern "C" fn(*mut ibv_pd, ibv_enum) -> *mut ibv_mw>,
    pub bind_mw: Option<unsafe extern "C" fn(*mut ibv_qp, *mut ibv_mw, *mut ibv_mw_bind) -> c_int>,
    pub dealloc_mw: Option<unsafe extern "C" fn(*mut ibv_mw) -> c_int>,
    pub _compat_create_cq: unused_fn,
    pub poll_cq: Option<unsafe extern "C" fn(*mut ibv_cq, c_int, *mut ibv_wc) -> c_int>,
    pub req_notify_cq: Option<unsafe extern "C" fn(*mut ibv_cq, c_int) -> c_int>,
    pub _compat_cq_event: unused_fn,
    pub _compat_resize_cq: unused_fn,
    pub _compat_destroy_cq: unused_fn,
    pub _compat_create_srq: unused_fn,
    pub _compat_modify_srq: unused_fn,
    pub _compat_query_srq: unused_fn,
    pub _compat_destroy_srq: unused_fn,
    pub post_srq_recv: Option<unsafe extern "C" fn(*mut ibv_srq, *mut ibv_recv_wr, *mut *mut ibv_recv_wr) -> c_int>,
    pub _compat_create_qp: unused_fn,
    pub _compat_query_qp: unused_fn,
    pub _compat_modify_qp: unused_fn,
    pub _compat_destroy_qp: unused_fn,
    pub post_send: Option<unsafe extern "C" fn(*mut ibv_qp, *mut ibv_send_wr, *mut *mut ibv_send_wr) -> c_int>,
    pub post_recv: Option<unsafe extern "C" fn(*mut ibv_qp, *mut ibv_recv_wr, *mut *mut ibv_recv_wr) -> c_int>,
    pub _compat_create_ah: unused_fn,
    pub _compat_destroy_ah: unused_fn,
    pub _compat_attach_mcast: unused_fn,
    pub _compat_detach_mcast: unused_fn,
    pub _compat_async_event: unused_fn,
}

#[repr(C)]
pub struct ibv_context {
    pub device: *mut ibv_device,
    pub ops: ibv_context_ops,
    pub cmd_fd: c_int,
    pub async_fd: c_int,
    pub num_comp_vectors: c_int,
    pub mutex: libc::pthread_mutex_t,
    pub abi_compat: *mut c_void,
}

/// What surrounds an [`ibv_context`] whose `abi_compat` is all ones, as far up
/// as `query_port`. It grows at its top: only the distance of a field from
/// `context` is fixed, and `sz` tells which fields there are.
#[repr(C)]
pub struct verbs_context {
    pub query_port: Option<unsafe extern "C" fn(*mut ibv_context, u8, *mut ibv_port_attr, usize) -> c_int>,
    pub advise_mr: unused_fn,
    pub alloc_null_mr: unused_fn,
    pub read_counters: unused_fn,
    pub attach_counters_point_flow: unused_fn,
    pub create_counters: unused_fn,
    pub destroy_counters: unused_fn,
    pub reg_dm_mr: unused_fn,
    pub alloc_dm: unused_fn,
    pub free_dm: unused_fn,
    pub modify_flow_action_esp: unused_fn,
    pub destroy_flow_action: unused_fn,
    pub create_flow_action_esp: unused_fn,
    pub modify_qp_rate_limit: unused_fn,
    pub alloc_parent_domain: unused_fn,
    pub dealloc_td: unused_fn,
    pub alloc_td: unused_fn,
    pub modify_cq: unused_fn,
    pub post_srq_ops: unused_fn,
    pub destroy_rwq_ind_table: unused_fn,
    pub create_rwq_ind_table: unused_fn,
    pub destroy_wq: unused_fn,
    pub modify_wq: unused_fn,
    pub create_wq: unused_fn,
    pub query_rt_values: unused_fn,
    pub create_cq_ex: unused_fn,
    pub _priv: *mut c_void,
    pub query_device_ex: unused_fn,
    pub ibv_destroy_flow: unused_fn,
    pub ABI_placeholder2: unused_fn,
    pub ibv_create_flow: unused_fn,
    pub ABI_placeholder1: unused_fn,
    pub open_qp: unused_fn,
    pub create_qp_ex: unused_fn,
    pub get_srq_num: unused_fn,
    pub create_srq_ex: unused_fn,
    pub open_xrcd: unused_fn,
    pub close_xrcd: unused_fn,
    pub _ABI_placeholder3: u64,
    pub sz: usize,
    pub context: ibv_context,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct ibv_device_attr {
    pub fw_ver: [c_char; 64],
    pub node_guid: u64,
    pub sys_image_guid: u64,
    pub max_mr_size: u64,
    pub page_size_cap: u64,
    pub vendor_id: u32,
    pub vendor_part_id: u32,
    pub hw_ver: u32,
    pub max_qp: c_int,
    pub max_qp_wr: c_int,
    pub device_cap_flags: c_uint,
    pub max_sge: c_int,
    pub max_sge_rd: c_int,
    pub max_cq: c_int,
    pub max_cqe: c_int,
    pub max_mr: c_int,
    pub max_pd: c_int,
    pub max_qp_rd_atom: c_int,
    pub max_ee_rd_atom: c_int,
    pub max_res_rd_atom: c_int,
    pub max_qp_init_rd_atom: c_int,
    pub max_ee_init_rd_atom: c_int,
    pub atomic_cap: ibv_enum,
    pub max_ee: c_int,
    pub max_rdd: c_int,
    pub max_mw: c_int,
    pub max_raw_ipv6_qp: c_int,
    pub max_raw_ethy_qp: c_int,
    pub max_mcast_grp: c_int,
    pub max_mcast_qp_attach: c_int,
    pub max_total_mcast_qp_attach: c_int,
    pub max_ah: c_int,
    pub max_fmr: c_int,
    pub max_map_per_fmr: c_int,
    pub max_srq: c_int,
    pub max_srq_wr: c_int,
    pub max_srq_sge: c_int,
    pub max_pkeys: u16,
    pub local_ca_ack_delay: u8,
    pub phys_port_cnt: u8,
}

pub const IBV_DEVICE_MEM_WINDOW: u32 = 1 << 17;
pub const IBV_DEVICE_MEM_WINDOW_TYPE_2A: u32 = 1 << 23;
pub const IBV_DEVICE_MEM_WINDOW_TYPE_2B: u32 = 1 << 24;

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ibv_port_attr {
    pub state: ibv_enum,
    pub max_mtu: ibv_enum,
    pub active_mtu: ibv_enum,
    pub gid_tbl_len: c_int,
    pub port_cap_flags: u32,
    pub max_msg_sz: u32,
    pub bad_pkey_cntr: u32,
    pub qkey_viol_cntr: u32,
    pub pkey_tbl_len: u16,
    pub lid: u16,
    pub sm_lid: u16,
    pub lmc: u8,
    pub max_vl_num: u8,
    pub sm_sl: u8,
    pub subnet_timeout: u8,
    pub init_type_reply: u8,
    pub active_width: u8,
    pub active_speed: u8,
    pub phys_state: u8,
    pub link_layer: u8,
    pub flags: u8,
    pub port_cap_flags2: u16,
}

pub const IBV_MTU_256: ibv_enum = 1;
pub const IBV_MTU_512: ibv_enum = 2;
pub const IBV_MTU_1024: ibv_enum = 3;
pub const IBV_MTU_2048: ibv_enum = 4;
pub const IBV_MTU_4096: ibv_enum = 5;
pub const IBV_PORT_NOP: ibv_enum = 0;
pub const IBV_PORT_DOWN: ibv_enum = 1;
pub const IBV_PORT_INIT: ibv_enum = 2;
pub const IBV_PORT_ARMED: ibv_enum = 3;
pub const IBV_PORT_ACTIVE: ibv_enum = 4;
pub const IBV_PORT_ACTIVE_DEFER: ibv_enum = 5;
pub const IBV_LINK_LAYER_UNSPECIFIED: u8 = 0;
pub const IBV_LINK_LAYER_INFINIBAND: u8 = 1;
pub const IBV_LINK_LAYER_ETHERNET: u8 = 2;
pub const IBV_QPF_GRH_REQUIRED: u8 = 1;

#[repr(C)]
#[derive(Clone, Copy)]
pub union ibv_async_element {
    pub cq: *mut ibv_cq,
    pub qp: *mut ibv_qp,
    pub srq: *mut ibv_srq,
    pub wq: *mut c_void,
    pub port_num: c_int,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct ibv_async_event {
    pub element: ibv_async_element,
    pub event_type: ibv_enum,
}

pub const IBV_EVENT_CQ_ERR: ibv_enum = 0;
pub const IBV_EVENT_QP_FATAL: ibv_enum = 1;
pub const IBV_EVENT_QP_REQ_ERR: ibv_enum = 2;
pub const IBV_EVENT_QP_ACCESS_ERR: ibv_enum = 3;
pub const IBV_EVENT_COMM_EST: ibv_enum = 4;
pub const IBV_EVENT_SQ_DRAINED: ibv_enum = 5;
pub const IBV_EVENT_DEVICE_FATAL: ibv_enum = 8;
pub const IBV_EVENT_PORT_ACTIVE: ibv_enum = 9;
pub const IBV_EVENT_PORT_ERR: ibv_enum = 10;
pub const IBV_EVENT_LID_CHANGE: ibv_enum = 11;
pub const IBV_EVENT_PKEY_CHANGE: ibv_enum = 12;
pub const IBV_EVENT_SM_CHANGE: ibv_enum = 13;
pub const IBV_EVENT_SRQ_ERR: ibv_enum = 14;
pub const IBV_EVENT_SRQ_LIMIT_REACHED: ibv_enum = 15;
pub const IBV_EVENT_QP_LAST_WQE_REACHED: ibv_enum = 16;
pub const IBV_EVENT_CLIENT_REREGISTER: ibv_enum = 17;
pub const IBV_EVENT_GID_CHANGE: ibv_enum = 18;

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct ibv_wc {
    pub wr_id: u64,
    pub status: ibv_enum,
    pub opcode: ibv_enum,
    pub vendor_err: u32,
    pub byte_len: u32,
    pub imm_data: u32,
    pub qp_num: u32,
    pub src_qp: u32,
    pub wc_flags: c_uint,
    pub pkey_index: u16,
    pub slid: u16,
    pub sl: u8,
    pub dlid_path_bits: u8,
}

pub const IBV_WC_SUCCESS: ibv_enum = 0;
pub const IBV_WC_LOC_LEN_ERR: ibv_enum = 1;
pub const IBV_WC_LOC_QP_OP_ERR: ibv_enum = 2;
pub const IBV_WC_LOC_PROT_ERR: ibv_enum = 4;
pub const IBV_WC_WR_FLUSH_ERR: ibv_enum = 5;
pub const IBV_WC_MW_BIND_ERR: ibv_enum = 6;
pub const IBV_WC_LOC_ACCESS_ERR: ibv_enum = 8;
pub const IBV_WC_REM_INV_REQ_ERR: ibv_enum = 9;
pub const IBV_WC_REM_ACCESS_ERR: ibv_enum = 10;
pub const IBV_WC_REM_OP_ERR: ibv_enum = 11;
pub const IBV_WC_RETRY_EXC_ERR: ibv_enum = 12;
pub const IBV_WC_RNR_RETRY_EXC_ERR: ibv_enum = 13;
pub const IBV_WC_REM_ABORT_ERR: ibv_enum = 16;
pub const IBV_WC_FATAL_ERR: ibv_enum = 19;
pub const IBV_WC_RESP_TIMEOUT_ERR: ibv_enum = 20;
pub const IBV_WC_GENERAL_ERR: ibv_enum = 21;
pub const IBV_WC_SEND: ibv_enum = 0;
pub const IBV_WC_RDMA_WRITE: ibv_enum = 1;
pub const IBV_WC_RDMA_READ: ibv_enum = 2;
pub const IBV_WC_BIND_MW: ibv_enum = 5;
pub const IBV_WC_LOCAL_INV: ibv_enum = 6;
pub const IBV_WC_RECV: ibv_enum = 1 << 7;
pub const IBV_WC_RECV_RDMA_WITH_IMM: ibv_enum = 129;
pub const IBV_WC_GRH: c_uint = 1;
pub const IBV_WC_WITH_IMM: c_uint = 2;
pub const IBV_WC_WITH_INV: c_uint = 8;

pub const IBV_ACCESS_LOCAL_WRITE: c_uint = 1;
pub const IBV_ACCESS_REMOTE_WRITE: c_uint = 1 << 1;
pub const IBV_ACCESS_REMOTE_READ: c_uint = 1 << 2;
pub const IBV_ACCESS_REMOTE_ATOMIC: c_uint = 1 << 3;
pub const IBV_ACCESS_MW_BIND: c_uint = 1 << 4;
pub const IBV_ACCESS_ZERO_BASED: c_uint = 1 << 5;
pub const IBV_ACCESS_ON_DEMAND: c_uint = 1 << 6;
pub const IBV_ACCESS_HUGETLB: c_uint = 1 << 7;
/// Ignored by `ibv_reg_mr_iova2` where the kernel does not know it.
pub const IBV_ACCESS_RELAXED_ORDERING: c_uint = 1 << 20;

#[repr(C)]
#[derive(Clone, Copy)]
pub struct ibv_mw_bind_info {
    pub mr: *mut ibv_mr,
    pub addr: u64,
    pub length: u64,
    pub mw_access_flags: c_uint,
}

#[repr(C)]
pub struct ibv_mw_bind {
    pub wr_id: u64,
    pub send_flags: c_uint,
    pub bind_info: ibv_mw_bind_info,
}

#[repr(C)]
pub struct ibv_pd {
    pub context: *mut ibv_context,
    pub handle: u32,
}

#[repr(C)]
pub struct ibv_mr {
    pub context: *mut ibv_context,
    pub pd: *mut ibv_pd,
    pub addr: *mut c_void,
    pub length: usize,
    pub handle: u32,
    pub lkey: u32,
    pub rkey: u32,
}

pub const IBV_MW_TYPE_1: ibv_enum = 1;
pub const IBV_MW_TYPE_2: ibv_enum = 2;

#[repr(C)]
pub struct ibv_mw {
    pub context: *mut ibv_context,
    pub pd: *mut ibv_pd,
    pub rkey: u32,
    pub handle: u32,
    pub r#type: ibv_enum,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct ibv_global_route {
    pub dgid: ibv_gid,
    pub flow_label: u32,
    pub sgid_index: u8,
    pub hop_limit: u8,
    pub traffic_class: u8,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct ibv_ah_attr {
    pub grh: ibv_global_route,
    pub dlid: u16,
    pub sl: u8,
    pub src_path_bits: u8,
    pub static_rate: u8,
    pub is_global: u8,
    pub port_num: u8,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct ibv_srq_attr {
    pub max_wr: u32,
    pub max_sge: u32,
    pub srq_limit: u32,
}

#[repr(C)]
pub struct ibv_srq_init_attr {
    pub srq_context: *mut c_void,
    pub attr: ibv_srq_attr,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct ibv_qp_cap {
    pub max_send_wr: u32,
    pub max_recv_wr: u32,
    pub max_send_sge: u32,
    pub max_recv_sge: u32,
    pub max_inline_data: u32,
}

#[repr(C)]
pub struct ibv_qp_init_attr {
    pub qp_context: *mut c_void,
    pub send_cq: *mut ibv_cq,
    pub recv_cq: *mut ibv_cq,
    pub srq: *mut ibv_srq,
    pub cap: ibv_qp_cap,
    pub qp_type: ibv_enum,
    pub sq_sig_all: c_int,
}

pub const IBV_QPT_RC: ibv_enum = 2;
pub const IBV_QP_STATE: c_int = 1;
pub const IBV_QP_CUR_STATE: c_int = 1 << 1;
pub const IBV_QP_ACCESS_FLAGS: c_int = 1 << 3;
pub const IBV_QP_PKEY_INDEX: c_int = 1 << 4;
pub const IBV_QP_PORT: c_int = 1 << 5;
pub const IBV_QP_AV: c_int = 1 << 7;
pub const IBV_QP_PATH_MTU: c_int = 1 << 8;
pub const IBV_QP_TIMEOUT: c_int = 1 << 9;
pub const IBV_QP_RETRY_CNT: c_int = 1 << 10;
pub const IBV_QP_RNR_RETRY: c_int = 1 << 11;
pub const IBV_QP_RQ_PSN: c_int = 1 << 12;
pub const IBV_QP_MAX_QP_RD_ATOMIC: c_int = 1 << 13;
pub const IBV_QP_MIN_RNR_TIMER: c_int = 1 << 15;
pub const IBV_QP_SQ_PSN: c_int = 1 << 16;
pub const IBV_QP_MAX_DEST_RD_ATOMIC: c_int = 1 << 17;
pub const IBV_QP_CAP: c_int = 1 << 19;
pub const IBV_QP_DEST_QPN: c_int = 1 << 20;
pub const IBV_QPS_RESET: ibv_enum = 0;
pub const IBV_QPS_INIT: ibv_enum = 1;
pub const IBV_QPS_RTR: ibv_enum = 2;
pub const IBV_QPS_RTS: ibv_enum = 3;
pub const IBV_QPS_SQD: ibv_enum = 4;
pub const IBV_QPS_SQE: ibv_enum = 5;
pub const IBV_QPS_ERR: ibv_enum = 6;

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct ibv_qp_attr {
    pub qp_state: ibv_enum,
    pub cur_qp_state: ibv_enum,
    pub path_mtu: ibv_enum,
    pub path_mig_state: ibv_enum,
    pub qkey: u32,
    pub rq_psn: u32,
    pub sq_psn: u32,
    pub dest_qp_num: u32,
    pub qp_access_flags: c_uint,
    pub cap: ibv_qp_cap,
    pub ah_attr: ibv_ah_attr,
    pub alt_ah_attr: ibv_ah_attr,
    pub pkey_index: u16,
    pub alt_pkey_index: u16,
    pub en_sqd_async_notify: u8,
    pub sq_draining: u8,
    pub max_rd_atomic: u8,
    pub max_dest_rd_atomic: u8,
    pub min_rnr_timer: u8,
    pub port_num: u8,
    pub timeout: u8,
    pub retry_cnt: u8,
    pub rnr_retry: u8,
    pub alt_port_num: u8,
    pub alt_timeout: u8,
    pub rate_limit: u32,
}

#[repr(C)]
pub struct ibv_comp_channel {
    pub context: *mut ibv_context,
    pub fd: c_int,
    pub refcnt: c_int,
}

#[repr(C)]
pub struct ibv_cq {
    pub context: *mut ibv_context,
    pub channel: *mut ibv_comp_channel,
    pub cq_context: *mut c_void,
    pub handle: u32,
    pub cqe: c_int,
    pub mutex: libc::pthread_mutex_t,
    pub cond: libc::pthread_cond_t,
    pub comp_events_completed: u32,
    pub async_events_completed: u32,
}

#[repr(C)]
pub struct ibv_srq {
    pub context: *mut ibv_context,
    pub srq_context: *mut c_void,
    pub pd: *mut ibv_pd,
    pub handle: u32,
    pub mutex: libc::pthread_mutex_t,
    pub cond: libc::pthread_cond_t,
    pub events_completed: u32,
}

#[repr(C)]
pub struct ibv_qp {
    pub context: *mut ibv_context,
    pub qp_context: *mut c_void,
    pub pd: *mut ibv_pd,
    pub send_cq: *mut ibv_cq,
    pub recv_cq: *mut ibv_cq,
    pub srq: *mut ibv_srq,
    pub handle: u32,
    pub qp_num: u32,
    pub state: ibv_enum,
    pub qp_type: ibv_enum,
    pub mutex: libc::pthread_mutex_t,
    pub cond: libc::pthread_cond_t,
    pub events_completed: u32,
}
