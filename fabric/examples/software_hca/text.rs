//! Names of statuses and events.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_char};

use distkv_fabric::verbs::sys::*;

fn status(status: ibv_enum) -> &'static CStr {
    match status {
        IBV_WC_SUCCESS => c"success",
        IBV_WC_LOC_LEN_ERR => c"local length error",
        IBV_WC_LOC_QP_OP_ERR => c"local QP operation error",
        IBV_WC_LOC_PROT_ERR => c"local protection error",
        IBV_WC_WR_FLUSH_ERR => c"work request flushed",
        IBV_WC_MW_BIND_ERR => c"memory window bind error",
        IBV_WC_LOC_ACCESS_ERR => c"local access error",
        IBV_WC_REM_INV_REQ_ERR => c"remote invalid request",
        IBV_WC_REM_ACCESS_ERR => c"remote access error",
        IBV_WC_REM_OP_ERR => c"remote operation error",
        IBV_WC_RETRY_EXC_ERR => c"transport retries exceeded",
        IBV_WC_RNR_RETRY_EXC_ERR => c"RNR retries exceeded",
        _ => c"unknown status",
    }
}

fn event(event: ibv_enum) -> &'static CStr {
    match event {
        IBV_EVENT_CQ_ERR => c"CQ error",
        IBV_EVENT_QP_FATAL => c"QP fatal error",
        IBV_EVENT_QP_REQ_ERR => c"QP invalid request error",
        IBV_EVENT_QP_ACCESS_ERR => c"QP access violation",
        IBV_EVENT_COMM_EST => c"communication established",
        IBV_EVENT_DEVICE_FATAL => c"device fatal error",
        IBV_EVENT_PORT_ACTIVE => c"port active",
        IBV_EVENT_PORT_ERR => c"port error",
        IBV_EVENT_SRQ_LIMIT_REACHED => c"SRQ limit reached",
        IBV_EVENT_QP_LAST_WQE_REACHED => c"last WQE reached",
        _ => c"unknown event",
    }
}

#[unsafe(no_mangle)]
extern "C" fn ibv_wc_status_str(number: ibv_enum) -> *const c_char {
    status(number).as_ptr()
}

#[unsafe(no_mangle)]
extern "C" fn ibv_event_type_str(number: ibv_enum) -> *const c_char {
    event(number).as_ptr()
}
