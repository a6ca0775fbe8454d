//! Every struct and constant of `verbs::sys` against rdma-core's own headers: a
//! C program, made and compiled here from the same list, prints what they are
//! in C.
//!
//! Needs a C compiler and Debian's libibverbs-dev, which `scripts/setup --test`
//! installs; fails, and says so, where they are missing.

use std::fmt::Write;
use std::mem::{offset_of, size_of};
use std::process::Command;

use distkv_fabric::verbs::sys::*;

/// How much of a struct is fixed.
#[derive(Clone, Copy, PartialEq)]
enum Extent {
    /// All of it.
    Whole,
    /// Newer headers add fields at its end; the callee is told its size.
    Grows,
    /// Newer headers add fields at its top: distances from its end are fixed.
    Tail,
}
use Extent::{Grows, Tail, Whole};

struct Layout {
    c_type: &'static str,
    extent: Extent,
    size: usize,
    fields: Vec<Field>,
}

struct Field {
    /// Its path in C.
    path: &'static str,
    offset: usize,
    size: usize,
}

fn size_of_field<S, F>(_field: fn(&S) -> *const F) -> usize {
    size_of::<F>()
}

/// The name in C: the second where there is one.
macro_rules! c_name {
    ($name:expr) => {
        $name
    };
    ($name:expr, $other:expr) => {
        $other
    };
}

/// A struct's layout. A field that is left out does not compile: the pattern
/// would not cover the struct.
macro_rules! layout {
    ($rust:ident, $c:literal, $extent:ident, { $($field:ident $(= $path:literal)?),* $(,)? }) => {{
        #[allow(dead_code)]
        fn all($rust { $($field: _),* }: &$rust) {}
        let fields = vec![$(Field {
            path: c_name!(stringify!($field) $(, $path)?),
            offset: offset_of!($rust, $field),
            size: size_of_field(|s: &$rust| &raw const s.$field),
        }),*];
        Layout { c_type: $c, extent: $extent, size: size_of::<$rust>(), fields }
    }};
}

/// Members of the unions in a send request: the path here and the one in C.
macro_rules! paths {
    ($($a:ident $(. $b:ident)* = $path:literal),* $(,)?) => {
        vec![$((offset_of!(ibv_send_wr, $a $(. $b)*), $path)),*]
    };
}

macro_rules! constants {
    ($($name:ident),* $(,)?) => {
        vec![$((stringify!($name), $name as u64)),*]
    };
}

fn structs() -> Vec<Layout> {
    vec![
        layout!(ibv_gid, "union ibv_gid", Whole, { raw }),
        layout!(ibv_gid_entry, "struct ibv_gid_entry", Whole, { gid, gid_index, port_num, gid_type, ndev_ifindex }),
        layout!(_ibv_device_ops, "struct _ibv_device_ops", Whole, { _dummy1, _dummy2 }),
        layout!(ibv_device, "struct ibv_device", Whole, {
            _ops, node_type, transport_type, name, dev_name, dev_path, ibdev_path,
        }),
        layout!(ibv_context_ops, "struct ibv_context_ops", Whole, {
            _compat_query_device, _compat_query_port, _compat_alloc_pd, _compat_dealloc_pd, _compat_reg_mr,
            _compat_rereg_mr, _compat_dereg_mr, alloc_mw, bind_mw, dealloc_mw, _compat_create_cq, poll_cq, req_notify_cq,
            _compat_cq_event, _compat_resize_cq, _compat_destroy_cq, _compat_create_srq, _compat_modify_srq,
            _compat_query_srq, _compat_destroy_srq, post_srq_recv, _compat_create_qp, _compat_query_qp, _compat_modify_qp,
            _compat_destroy_qp, post_send, post_recv, _compat_create_ah, _compat_destroy_ah, _compat_attach_mcast,
            _compat_detach_mcast, _compat_async_event,
        }),
        layout!(ibv_context, "struct ibv_context", Whole, {
            device, ops, cmd_fd, async_fd, num_comp_vectors, mutex, abi_compat,
        }),
        layout!(verbs_context, "struct verbs_context", Tail, {
            query_port, advise_mr, alloc_null_mr, read_counters, attach_counters_point_flow, create_counters,
            destroy_counters, reg_dm_mr, alloc_dm, free_dm, modify_flow_action_esp, destroy_flow_action,
            create_flow_action_esp, modify_qp_rate_limit, alloc_parent_domain, dealloc_td, alloc_td, modify_cq,
            post_srq_ops, destroy_rwq_ind_table, create_rwq_ind_table, destroy_wq, modify_wq, create_wq, query_rt_values,
            create_cq_ex, _priv = "priv", query_device_ex, ibv_destroy_flow, ABI_placeholder2, ibv_create_flow,
            ABI_placeholder1, open_qp, create_qp_ex, get_srq_num, create_srq_ex, open_xrcd, close_xrcd, _ABI_placeholder3,
            sz, context,
        }),
        layout!(ibv_device_attr, "struct ibv_device_attr", Whole, {
            fw_ver, node_guid, sys_image_guid, max_mr_size, page_size_cap, vendor_id, vendor_part_id, hw_ver, max_qp,
            max_qp_wr, device_cap_flags, max_sge, max_sge_rd, max_cq, max_cqe, max_mr, max_pd, max_qp_rd_atom,
            max_ee_rd_atom, max_res_rd_atom, max_qp_init_rd_atom, max_ee_init_rd_atom, atomic_cap, max_ee, max_rdd,
            max_mw, max_raw_ipv6_qp, max_raw_ethy_qp, max_mcast_grp, max_mcast_qp_attach, max_total_mcast_qp_attach,
            max_ah, max_fmr, max_map_per_fmr, max_srq, max_srq_wr, max_srq_sge, max_pkeys, local_ca_ack_delay,
            phys_port_cnt,
        }),
        layout!(ibv_port_attr, "struct ibv_port_attr", Grows, {
            state, max_mtu, active_mtu, gid_tbl_len, port_cap_flags, max_msg_sz, bad_pkey_cntr, qkey_viol_cntr,
            pkey_tbl_len, lid, sm_lid, lmc, max_vl_num, sm_sl, subnet_timeout, init_type_reply, active_width,
            active_speed, phys_state, link_layer, flags, port_cap_flags2,
        }),
        layout!(ibv_async_event, "struct ibv_async_event", Whole, { element, event_type }),
        layout!(ibv_wc, "struct ibv_wc", Whole, {
            wr_id, status, opcode, vendor_err, byte_len, imm_data, qp_num, src_qp, wc_flags, pkey_index, slid, sl,
            dlid_path_bits,
        }),
        layout!(ibv_mw_bind_info, "struct ibv_mw_bind_info", Whole, { mr, addr, length, mw_access_flags }),
        layout!(ibv_mw_bind, "struct ibv_mw_bind", Whole, { wr_id, send_flags, bind_info }),
        layout!(ibv_pd, "struct ibv_pd", Whole, { context, handle }),
        layout!(ibv_mr, "struct ibv_mr", Whole, { context, pd, addr, length, handle, lkey, rkey }),
        layout!(ibv_mw, "struct ibv_mw", Whole, { context, pd, rkey, handle, r#type = "type" }),
        layout!(ibv_global_route, "struct ibv_global_route", Whole, {
            dgid, flow_label, sgid_index, hop_limit, traffic_class,
        }),
        layout!(ibv_ah_attr, "struct ibv_ah_attr", Whole, {
            grh, dlid, sl, src_path_bits, static_rate, is_global, port_num,
        }),
        layout!(ibv_srq_attr, "struct ibv_srq_attr", Whole, { max_wr, max_sge, srq_limit }),
        layout!(ibv_srq_init_attr, "struct ibv_srq_init_attr", Whole, { srq_context, attr }),
        layout!(ibv_qp_cap, "struct ibv_qp_cap", Whole, {
            max_send_wr, max_recv_wr, max_send_sge, max_recv_sge, max_inline_data,
        }),
        layout!(ibv_qp_init_attr, "struct ibv_qp_init_attr", Whole, {
            qp_context, send_cq, recv_cq, srq, cap, qp_type, sq_sig_all,
        }),
        layout!(ibv_qp_attr, "struct ibv_qp_attr", Whole, {
            qp_state, cur_qp_state, path_mtu, path_mig_state, qkey, rq_psn, sq_psn, dest_qp_num, qp_access_flags, cap,
            ah_attr, alt_ah_attr, pkey_index, alt_pkey_index, en_sqd_async_notify, sq_draining, max_rd_atomic,
            max_dest_rd_atomic, min_rnr_timer, port_num, timeout, retry_cnt, rnr_retry, alt_port_num, alt_timeout,
            rate_limit,
        }),
        layout!(ibv_comp_channel, "struct ibv_comp_channel", Whole, { context, fd, refcnt }),
        layout!(ibv_cq, "struct ibv_cq", Whole, {
            context, channel, cq_context, handle, cqe, mutex, cond, comp_events_completed, async_events_completed,
        }),
        layout!(ibv_srq, "struct ibv_srq", Whole, { context, srq_context, pd, handle, mutex, cond, events_completed }),
        layout!(ibv_qp, "struct ibv_qp", Whole, {
            context, qp_context, pd, send_cq, recv_cq, srq, handle, qp_num, state, qp_type, mutex, cond, events_completed,
        }),
        layout!(ibv_sge, "struct ibv_sge", Whole, { addr, length, lkey }),
        layout!(ibv_send_wr, "struct ibv_send_wr", Whole, {
            wr_id, next, sg_list, num_sge, opcode, send_flags, imm_data, wr, xrc_remote_srqn = "qp_type.xrc.remote_srqn",
            extra = "bind_mw",
        }),
        layout!(ibv_recv_wr, "struct ibv_recv_wr", Whole, { wr_id, next, sg_list, num_sge }),
    ]
}

fn union_members() -> Vec<(usize, &'static str)> {
    paths![
        wr.rdma.remote_addr = "wr.rdma.remote_addr",
        wr.rdma.rkey = "wr.rdma.rkey",
        wr.atomic.remote_addr = "wr.atomic.remote_addr",
        wr.atomic.compare_add = "wr.atomic.compare_add",
        wr.atomic.swap = "wr.atomic.swap",
        wr.atomic.rkey = "wr.atomic.rkey",
        wr.ud.ah = "wr.ud.ah",
        wr.ud.remote_qpn = "wr.ud.remote_qpn",
        wr.ud.remote_qkey = "wr.ud.remote_qkey",
        extra.bind_mw.mw = "bind_mw.mw",
        extra.bind_mw.rkey = "bind_mw.rkey",
        extra.bind_mw.bind_info = "bind_mw.bind_info",
        extra.tso.hdr = "tso.hdr",
        extra.tso.hdr_sz = "tso.hdr_sz",
        extra.tso.mss = "tso.mss",
    ]
}

fn constant_values() -> Vec<(&'static str, u64)> {
    constants![
        IBV_GID_TYPE_IB,
        IBV_GID_TYPE_ROCE_V1,
        IBV_GID_TYPE_ROCE_V2,
        IBV_SYSFS_NAME_MAX,
        IBV_SYSFS_PATH_MAX,
        IBV_NODE_CA,
        IBV_NODE_RNIC,
        IBV_TRANSPORT_IB,
        IBV_TRANSPORT_IWARP,
        IBV_DEVICE_MEM_WINDOW,
        IBV_DEVICE_MEM_WINDOW_TYPE_2A,
        IBV_DEVICE_MEM_WINDOW_TYPE_2B,
        IBV_MTU_256,
        IBV_MTU_512,
        IBV_MTU_1024,
        IBV_MTU_2048,
        IBV_MTU_4096,
        IBV_PORT_NOP,
        IBV_PORT_DOWN,
        IBV_PORT_INIT,
        IBV_PORT_ARMED,
        IBV_PORT_ACTIVE,
        IBV_PORT_ACTIVE_DEFER,
        IBV_LINK_LAYER_UNSPECIFIED,
        IBV_LINK_LAYER_INFINIBAND,
        IBV_LINK_LAYER_ETHERNET,
        IBV_QPF_GRH_REQUIRED,
        IBV_EVENT_CQ_ERR,
        IBV_EVENT_QP_FATAL,
        IBV_EVENT_QP_REQ_ERR,
        IBV_EVENT_QP_ACCESS_ERR,
        IBV_EVENT_COMM_EST,
        IBV_EVENT_SQ_DRAINED,
        IBV_EVENT_DEVICE_FATAL,
        IBV_EVENT_PORT_ACTIVE,
        IBV_EVENT_PORT_ERR,
        IBV_EVENT_LID_CHANGE,
        IBV_EVENT_PKEY_CHANGE,
        IBV_EVENT_SM_CHANGE,
        IBV_EVENT_SRQ_ERR,
        IBV_EVENT_SRQ_LIMIT_REACHED,
        IBV_EVENT_QP_LAST_WQE_REACHED,
        IBV_EVENT_CLIENT_REREGISTER,
        IBV_EVENT_GID_CHANGE,
        IBV_WC_SUCCESS,
        IBV_WC_LOC_LEN_ERR,
        IBV_WC_LOC_QP_OP_ERR,
        IBV_WC_LOC_PROT_ERR,
        IBV_WC_WR_FLUSH_ERR,
        IBV_WC_MW_BIND_ERR,
        IBV_WC_LOC_ACCESS_ERR,
        IBV_WC_REM_INV_REQ_ERR,
        IBV_WC_REM_ACCESS_ERR,
        IBV_WC_REM_OP_ERR,
        IBV_WC_RETRY_EXC_ERR,
        IBV_WC_RNR_RETRY_EXC_ERR,
        IBV_WC_REM_ABORT_ERR,
        IBV_WC_FATAL_ERR,
        IBV_WC_RESP_TIMEOUT_ERR,
        IBV_WC_GENERAL_ERR,
        IBV_WC_SEND,
        IBV_WC_RDMA_WRITE,
        IBV_WC_RDMA_READ,
        IBV_WC_BIND_MW,
        IBV_WC_LOCAL_INV,
        IBV_WC_RECV,
        IBV_WC_RECV_RDMA_WITH_IMM,
        IBV_WC_GRH,
        IBV_WC_WITH_IMM,
        IBV_WC_WITH_INV,
        IBV_ACCESS_LOCAL_WRITE,
        IBV_ACCESS_REMOTE_WRITE,
        IBV_ACCESS_REMOTE_READ,
        IBV_ACCESS_REMOTE_ATOMIC,
        IBV_ACCESS_MW_BIND,
        IBV_ACCESS_ZERO_BASED,
        IBV_ACCESS_ON_DEMAND,
        IBV_ACCESS_HUGETLB,
        IBV_ACCESS_RELAXED_ORDERING,
        IBV_MW_TYPE_1,
        IBV_MW_TYPE_2,
        IBV_QPT_RC,
        IBV_QP_STATE,
        IBV_QP_CUR_STATE,
        IBV_QP_ACCESS_FLAGS,
        IBV_QP_PKEY_INDEX,
        IBV_QP_PORT,
        IBV_QP_AV,
        IBV_QP_PATH_MTU,
        IBV_QP_TIMEOUT,
        IBV_QP_RETRY_CNT,
        IBV_QP_RNR_RETRY,
        IBV_QP_RQ_PSN,
        IBV_QP_MAX_QP_RD_ATOMIC,
        IBV_QP_MIN_RNR_TIMER,
        IBV_QP_SQ_PSN,
        IBV_QP_MAX_DEST_RD_ATOMIC,
        IBV_QP_CAP,
        IBV_QP_DEST_QPN,
        IBV_QPS_RESET,
        IBV_QPS_INIT,
        IBV_QPS_RTR,
        IBV_QPS_RTS,
        IBV_QPS_SQD,
        IBV_QPS_SQE,
        IBV_QPS_ERR,
        IBV_WR_RDMA_WRITE,
        IBV_WR_RDMA_WRITE_WITH_IMM,
        IBV_WR_SEND,
        IBV_WR_SEND_WITH_IMM,
        IBV_WR_RDMA_READ,
        IBV_WR_LOCAL_INV,
        IBV_WR_BIND_MW,
        IBV_WR_SEND_WITH_INV,
        IBV_SEND_FENCE,
        IBV_SEND_SIGNALED,
        IBV_SEND_SOLICITED,
        IBV_SEND_INLINE,
    ]
}

/// The numbers that C gives for these expressions, in their order.
fn ask_c(expressions: &[String]) -> Vec<u64> {
    let folder = tempfile::tempdir().expect("a folder for the program");
    let (source, program) = (folder.path().join("layout.c"), folder.path().join("layout"));
    let mut text = String::from("#include <infiniband/verbs.h>\n#include <stdio.h>\nint main(void) {\n");
    for expression in expressions {
        writeln!(text, "printf(\"%llu\\n\", (unsigned long long)({expression}));").expect("text grows");
    }
    text.push_str("return 0; }\n");
    std::fs::write(&source, text).expect("writing the program");
    let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".into());
    let compiled = Command::new(&compiler).arg(&source).arg("-o").arg(&program).output();
    let compiled = compiled.unwrap_or_else(|e| panic!("no C compiler {compiler} ({e}): run scripts/setup --test"));
    let complaint = String::from_utf8_lossy(&compiled.stderr);
    let missing = complaint.contains("infiniband/verbs.h");
    assert!(!missing, "no infiniband/verbs.h here: run scripts/setup --test, or install libibverbs-dev\n{complaint}");
    assert!(compiled.status.success(), "a name that the headers lack?\n{complaint}");
    let printed = Command::new(&program).output().expect("running the program").stdout;
    let printed = String::from_utf8(printed).expect("digits");
    printed.lines().map(|line| line.parse().expect("a number")).collect()
}

/// What differs between the numbers here and those of C.
fn differences(claims: &[(String, u64)]) -> Vec<String> {
    let expressions: Vec<String> = claims.iter().map(|(expression, _)| expression.clone()).collect();
    let answers = ask_c(&expressions);
    assert_eq!(answers.len(), claims.len(), "C answered another number of questions");
    let wrong = claims.iter().zip(answers).filter(|((_, ours), theirs)| ours != theirs);
    wrong.map(|((expression, ours), theirs)| format!("{expression}: {ours} here, {theirs} in C")).collect()
}

#[test]
fn structs_and_constants_are_those_of_the_headers() {
    let mut claims = Vec::new();
    for layout in structs() {
        let c = layout.c_type;
        match layout.extent {
            Whole => claims.push((format!("sizeof({c})"), layout.size as u64)),
            Grows => claims.push((format!("sizeof({c}) >= {}", layout.size), 1)),
            Tail => {}
        }
        for field in layout.fields {
            claims.push((format!("sizeof((({c} *)0)->{})", field.path), field.size as u64));
            if layout.extent == Tail {
                let distance = layout.size - field.offset;
                claims.push((format!("sizeof({c}) - offsetof({c}, {})", field.path), distance as u64));
            } else {
                claims.push((format!("offsetof({c}, {})", field.path), field.offset as u64));
            }
        }
    }
    for (offset, path) in union_members() {
        claims.push((format!("offsetof(struct ibv_send_wr, {path})"), offset as u64));
    }
    for (name, value) in constant_values() {
        claims.push((name.to_string(), value));
    }
    assert!(claims.len() > 600, "only {} claims: the lists have shrunk", claims.len());
    assert_eq!(differences(&claims), Vec::<String>::new());
}

#[test]
fn a_difference_is_seen() {
    let wrong = [("sizeof(struct ibv_sge)".to_string(), 17), ("offsetof(struct ibv_sge, lkey)".to_string(), 12)];
    assert_eq!(differences(&wrong), ["sizeof(struct ibv_sge): 17 here, 16 in C"]);
}
