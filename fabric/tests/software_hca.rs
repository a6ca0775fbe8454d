//! The software HCA does what `man 3 ibv_…` says of real ones.
#![allow(unsafe_code)]

#[path = "software_hca/place.rs"]
mod place;
#[path = "software_hca/rig.rs"]
mod rig;

use std::ffi::CStr;
use std::mem::MaybeUninit;
use std::ptr;
use std::time::{Duration, Instant};

use distkv_fabric::verbs::sys::*;
use rig::{End, MEMORY, SHAPE, SLOT, Shape, Wr, alone, ids, incidents, knob, lib, living, open, pair, requests};

const OK: u32 = IBV_WC_SUCCESS;
const FLUSHED: u32 = IBV_WC_WR_FLUSH_ERR;

#[test]
fn devices_have_names_limits_a_port_and_a_gid() {
    let _alone = alone();
    // SAFETY: objects are used while they are alive.
    unsafe {
        let mut count = 0;
        let list = (lib().ibv_get_device_list)(&mut count);
        let name = |i: usize| CStr::from_ptr((lib().ibv_get_device_name)(*list.add(i))).to_str().unwrap();
        assert_eq!((count, name(0), name(1)), (2, "soft0", "soft1"));
        assert!((*list.add(2)).is_null(), "the list ends in null");
        (lib().ibv_free_device_list)(list);
        let context = open(1);
        let mut limits = MaybeUninit::uninit();
        assert_eq!((lib().ibv_query_device)(context, limits.as_mut_ptr()), 0);
        let limits = limits.assume_init();
        assert_eq!(limits.phys_port_cnt, 1);
        assert_ne!(limits.device_cap_flags & IBV_DEVICE_MEM_WINDOW_TYPE_2B, 0);
        let mut port = MaybeUninit::uninit();
        assert_eq!(query_port(lib(), context, 1, port.as_mut_ptr()), 0);
        let port = port.assume_init();
        assert_eq!((port.state, port.active_mtu, port.link_layer), (IBV_PORT_ACTIVE, IBV_MTU_4096, 2));
        assert_eq!(query_port(lib(), context, 2, MaybeUninit::uninit().as_mut_ptr()), libc::EINVAL);
        let query = lib()._ibv_query_gid_ex.unwrap();
        let mut entry = ibv_gid_entry::default();
        assert_eq!(query(context, 1, 0, &mut entry, 0, size_of::<ibv_gid_entry>()), 0);
        assert_eq!((entry.gid, entry.gid_type), (rig::gid(1), IBV_GID_TYPE_ROCE_V2));
        assert_eq!(entry.gid.raw[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff]);
        assert_ne!(entry.gid, rig::gid(0));
        assert_eq!(query(context, 1, 1, &mut entry, 0, size_of::<ibv_gid_entry>()), libc::ENODATA);
        assert_eq!((lib().ibv_close_device)(context), 0);
    }
}

#[test]
fn sends_fill_receives_in_order_with_their_immediates() {
    let _alone = alone();
    for b in [SHAPE, Shape { device: 1, shared: false, ..SHAPE }] {
        let (a, b) = pair(SHAPE, b);
        assert_eq!(b.receive([3, 1, 2, 0]), 0);
        a.fill(0, b"first");
        a.fill(8, b"second");
        let chain = [
            Wr::send(1, (0, 5), 0x0102_0304).quiet(),
            Wr::send(2, (8, 6), 2).inline(),
            Wr::new(3, IBV_WR_SEND, (0, 0)),
        ];
        assert_eq!(a.post(&chain), Ok(()));
        let got = b.received(3);
        assert_eq!(ids(&got), [(3, OK), (1, OK), (2, OK)], "receives are taken as they were posted");
        let told = |wc: &ibv_wc| (wc.byte_len, wc.imm_data, wc.opcode, wc.wc_flags, wc.qp_num, wc.src_qp);
        let with = IBV_WC_WITH_IMM;
        assert_eq!(told(&got[0]), (5, 0x0102_0304, IBV_WC_RECV, with, b.number(), a.number()));
        assert_eq!(told(&got[1]), (6, 2, IBV_WC_RECV, with, b.number(), a.number()));
        assert_eq!(told(&got[2]), (0, 0, IBV_WC_RECV, 0, b.number(), a.number()));
        assert_eq!((b.read(3 * SLOT, 5), b.read(SLOT, 6)), (b"first".to_vec(), b"second".to_vec()));
        assert_eq!(a.sent(2), [(2, OK), (3, OK)], "the first was not signalled");
        assert!(a.poll(a.send_cq, 8).is_empty() && b.poll(b.recv_cq, 8).is_empty());
    }
}

#[test]
fn inline_bytes_are_taken_when_posted_and_others_when_carried_out() {
    let _alone = alone();
    let (a, b) = pair(SHAPE, SHAPE);
    b.receive([0, 1]);
    knob("software_hca_hold", (0, 1));
    a.fill(0, b"before");
    a.post(&[Wr::send(1, (0, 6), 0).inline(), Wr::send(2, (0, 6), 0)]).unwrap();
    a.fill(0, b"after.");
    assert!(a.poll(a.send_cq, 1).is_empty(), "a held device does nothing");
    knob("software_hca_hold", (0, 0));
    b.received(2);
    assert_eq!((b.read(0, 6), b.read(SLOT, 6)), (b"before".to_vec(), b"after.".to_vec()));
}

#[test]
fn writes_land_and_tell_if_they_have_an_immediate() {
    let _alone = alone();
    let (a, b) = pair(SHAPE, SHAPE);
    a.fill(0, b"written");
    a.post(&[Wr::write(1, (0, 7), (b.at(1000), b.rkey()))]).unwrap();
    assert_eq!(a.sent(1), [(1, OK)]);
    assert_eq!(b.read(1000, 7), b"written");
    assert!(b.poll(b.recv_cq, 1).is_empty(), "a write tells nobody");
    let told = Wr { opcode: IBV_WR_RDMA_WRITE_WITH_IMM, immediate: 9, ..Wr::write(2, (0, 3), (b.at(0), b.rkey())) };
    // Without bytes no key is looked at.
    let empty = Wr { from: (0, 0), to: (0, 0), id: 3, ..told };
    b.receive([5, 6]);
    a.post(&[told, empty, Wr::write(4, (0, 0), (0, 0))]).unwrap();
    assert_eq!(a.sent(3), [(2, OK), (3, OK), (4, OK)]);
    let got = b.received(2);
    let told = |wc: &ibv_wc| (wc.wr_id, wc.byte_len, wc.imm_data, wc.opcode, wc.wc_flags);
    assert_eq!(told(&got[0]), (5, 3, 9, IBV_WC_RECV_RDMA_WITH_IMM, IBV_WC_WITH_IMM));
    assert_eq!(told(&got[1]), (6, 0, 9, IBV_WC_RECV_RDMA_WITH_IMM, IBV_WC_WITH_IMM));
    assert_eq!((b.read(0, 3), b.read(5 * SLOT, 3)), (b"wri".to_vec(), vec![0; 3]), "the receive's memory is not used");
}

#[test]
fn a_write_that_the_key_does_not_allow_ends_both_sides() {
    let _alone = alone();
    let plain = Shape { memory_access: IBV_ACCESS_LOCAL_WRITE, ..SHAPE };
    // Another key; a byte before and behind; no right; memory of another domain.
    for (case, shape, (offset, len), key) in [
        (0, SHAPE, (0, 8), 1),
        (1, SHAPE, (-1, 8), 0),
        (2, SHAPE, (MEMORY as i64 - 7, 8), 0),
        (3, plain, (0, 8), 0),
        (4, SHAPE, (0, 8), 0),
    ] {
        let (a, b) = pair(SHAPE, shape);
        let other = End::new(SHAPE);
        let target = if case == 4 { &other } else { &b };
        let to = (b.at(0).wrapping_add_signed(offset), target.rkey() ^ key);
        let to = if case == 4 { (other.at(0), to.1) } else { to };
        b.receive([0]);
        let chain = [Wr::write(1, (0, len), to), Wr::send(2, (0, 1), 0).quiet(), Wr::send(3, (0, 1), 0)];
        a.post(&chain).unwrap();
        let sent = a.sent(3);
        assert_eq!(sent, [(1, IBV_WC_REM_ACCESS_ERR), (2, FLUSHED), (3, FLUSHED)], "case {case}");
        assert_eq!((a.state(), b.state()), (IBV_QPS_ERR, IBV_QPS_ERR));
        assert!(b.poll(b.recv_cq, 1).is_empty());
        assert_eq!(b.incidents(), [IBV_EVENT_QP_ACCESS_ERR, IBV_EVENT_QP_LAST_WQE_REACHED]);
        assert_eq!(a.incidents(), [IBV_EVENT_QP_LAST_WQE_REACHED]);
    }
    // The queue pair's own right comes before the key's.
    let (a, b) = pair(SHAPE, Shape { qp_access: 0, ..SHAPE });
    a.post(&[Wr::write(1, (0, 8), (b.at(0), b.rkey()))]).unwrap();
    assert_eq!(a.sent(1), [(1, IBV_WC_REM_INV_REQ_ERR)]);
}

#[test]
fn a_window_opens_memory_to_one_queue_pair() {
    let _alone = alone();
    let shape = Shape { memory_access: IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_MW_BIND, ..SHAPE };
    let (a, b) = pair(SHAPE, shape);
    let (c, d) = (End::new(SHAPE), b.another_qp());
    // SAFETY: alive.
    let number = unsafe { (*d).qp_num };
    c.connect(c.qp, &b.shape, number);
    b.connect(d, &c.shape, c.number());
    // SAFETY: alive.
    let (mw, first) = unsafe {
        let mw = alloc_mw(b.pd, IBV_MW_TYPE_2);
        (mw, (*mw).rkey)
    };
    let rkey = (first & !0xff) | (first.wrapping_add(1) & 0xff);
    b.post(&[Wr::bind(1, mw, rkey, b.mr, (b.at(SLOT), SLOT as u64))]).unwrap();
    let bound = b.take(b.send_cq, 1);
    assert_eq!((ids(&bound), bound[0].opcode), (vec![(1, OK)], IBV_WC_BIND_MW));
    a.fill(0, b"windowed");
    a.post(&[Wr::write(1, (0, 8), (b.at(SLOT), rkey))]).unwrap();
    assert_eq!((a.sent(1), b.read(SLOT, 8)), (vec![(1, OK)], b"windowed".to_vec()));
    // SAFETY: alive.
    assert_eq!(unsafe { (lib().ibv_dereg_mr)(b.mr) }, libc::EBUSY, "a window is bound to it");
    // Another queue pair of the same domain shows the same key.
    c.post(&[Wr::write(2, (0, 8), (b.at(SLOT), rkey))]).unwrap();
    assert_eq!(c.sent(1), [(2, IBV_WC_REM_ACCESS_ERR)]);
    // SAFETY: alive.
    assert_eq!(unsafe { dealloc_mw(mw) }, 0);
    a.post(&[Wr::write(3, (0, 8), (b.at(SLOT), rkey))]).unwrap();
    assert_eq!(a.sent(1), [(3, IBV_WC_REM_ACCESS_ERR)], "the window is gone");
    b.incidents();
    // SAFETY: nothing uses it any more.
    assert_eq!(unsafe { (lib().ibv_destroy_qp)(d) }, 0);
}

#[test]
fn a_write_reaches_no_further_than_its_window() {
    let _alone = alone();
    for (offset, len) in [(SLOT - 1, 2), (2 * SLOT - 1, 2), (0, 3 * SLOT)] {
        let (a, b) = pair(SHAPE, SHAPE);
        // SAFETY: alive.
        let mw = unsafe { alloc_mw(b.pd, IBV_MW_TYPE_2) };
        // SAFETY: alive.
        let rkey = unsafe { (*mw).rkey } - 1;
        b.post(&[Wr::bind(1, mw, rkey, b.mr, (b.at(SLOT), SLOT as u64))]).unwrap();
        assert_eq!(b.sent(1), [(1, OK)]);
        a.post(&[Wr::write(1, (0, len as u32), (b.at(offset), rkey))]).unwrap();
        assert_eq!(a.sent(1), [(1, IBV_WC_REM_ACCESS_ERR)]);
        b.incidents();
        // SAFETY: alive.
        assert_eq!(unsafe { dealloc_mw(mw) }, 0);
    }
}

#[test]
fn a_bind_that_cannot_be_ends_the_queue_pair() {
    let _alone = alone();
    let unbindable = Shape { memory_access: IBV_ACCESS_LOCAL_WRITE, ..SHAPE };
    for (case, shape) in [SHAPE, SHAPE, SHAPE, unbindable].into_iter().enumerate() {
        let (a, _b) = pair(shape, SHAPE);
        // SAFETY: alive.
        let (mw, first) = unsafe {
            let mw = alloc_mw(a.pd, IBV_MW_TYPE_2);
            (mw, (*mw).rkey)
        };
        let whole = (a.at(0), MEMORY as u64);
        let (fine, status) = (first ^ 1, IBV_WC_MW_BIND_ERR);
        let (chain, expected) = match case {
            // Under the key that it has; over the end; twice; without the right.
            0 => (vec![Wr::bind(1, mw, first, a.mr, whole)], vec![(1, status)]),
            1 => (vec![Wr::bind(1, mw, fine, a.mr, (whole.0 + 1, whole.1))], vec![(1, status)]),
            2 => {
                let second = Wr::bind(2, mw, first ^ 2, a.mr, whole);
                (vec![Wr::bind(1, mw, fine, a.mr, whole), second], vec![(1, OK), (2, status)])
            }
            _ => (vec![Wr::bind(1, mw, fine, a.mr, whole)], vec![(1, status)]),
        };
        a.post(&chain).unwrap();
        assert_eq!(a.sent(expected.len()), expected, "case {case}");
        assert_eq!(a.state(), IBV_QPS_ERR);
        // SAFETY: alive.
        assert_eq!(unsafe { dealloc_mw(mw) }, 0);
    }
    // A window that is freed while its bind is queued.
    let (a, _b) = pair(SHAPE, SHAPE);
    knob("software_hca_hold", (0, 1));
    // SAFETY: alive.
    unsafe {
        let mw = alloc_mw(a.pd, IBV_MW_TYPE_2);
        a.post(&[Wr::bind(1, mw, (*mw).rkey ^ 1, a.mr, (a.at(0), 8))]).unwrap();
        assert_eq!(dealloc_mw(mw), 0);
    }
    knob("software_hca_hold", (0, 0));
    assert_eq!(a.sent(1), [(1, IBV_WC_MW_BIND_ERR)]);
}

#[test]
fn registrations_that_cannot_be_are_refused() {
    let _alone = alone();
    let a = End::new(SHAPE);
    let register = |address: u64, len: usize, access: u32| {
        let at = ptr::without_provenance_mut(address as usize);
        // SAFETY: the range need not be valid.
        let mr = unsafe { (lib().ibv_reg_mr_iova2)(a.pd, at, len, address, access) };
        let errno = std::io::Error::last_os_error().raw_os_error();
        if mr.is_null() { errno } else { panic!("registered {address:#x} {len} {access}") }
    };
    assert_eq!(register(a.at(0), 8, IBV_ACCESS_REMOTE_WRITE), Some(libc::EINVAL), "remote without local");
    assert_eq!(register(a.at(0), 0, IBV_ACCESS_LOCAL_WRITE), Some(libc::EINVAL));
    assert_eq!(register(0x1000, 8, IBV_ACCESS_LOCAL_WRITE), Some(libc::EFAULT), "not mapped");
    assert_eq!(register(u64::MAX - 4, 8, IBV_ACCESS_LOCAL_WRITE), Some(libc::EINVAL));
}

#[test]
fn a_local_key_that_does_not_fit_fails_here() {
    let _alone = alone();
    for wr in [Wr { lkey: Some(0x1234_5678), ..Wr::send(1, (0, 8), 0) }, Wr::send(1, (MEMORY - 4, 8), 0)] {
        let (a, b) = pair(SHAPE, SHAPE);
        b.receive([0]);
        a.post(&[wr]).unwrap();
        assert_eq!(a.sent(1), [(1, IBV_WC_LOC_PROT_ERR)]);
        assert_eq!((a.state(), b.state()), (IBV_QPS_ERR, IBV_QPS_RTS));
    }
}

#[test]
fn a_receive_that_is_too_small_ends_both_sides() {
    let _alone = alone();
    let (a, b) = pair(SHAPE, SHAPE);
    b.receive_of([0], 4);
    a.post(&[Wr::send(1, (0, 5), 0)]).unwrap();
    assert_eq!(a.sent(1), [(1, IBV_WC_REM_INV_REQ_ERR)]);
    assert_eq!(ids(&b.received(1)), [(0, IBV_WC_LOC_LEN_ERR)]);
    assert_eq!(b.state(), IBV_QPS_ERR);
}

#[test]
fn a_send_queue_has_room_again_when_completions_are_polled() {
    let _alone = alone();
    let (a, b) = pair(SHAPE, SHAPE);
    b.receive(0..16);
    let quiet: Vec<Wr> = (0..8).map(|i| Wr::send(i, (0, 1), 0).quiet()).collect();
    a.post(&quiet[..7]).unwrap();
    let more = [Wr::send(7, (0, 1), 0), Wr::send(8, (0, 1), 0)];
    assert_eq!(a.post(&more), Err((libc::ENOMEM, 1)), "the chain is posted up to where the queue is full");
    assert_eq!(b.received(8).len(), 8, "though all is carried out");
    assert_eq!(a.post(&more[1..]), Err((libc::ENOMEM, 0)));
    assert_eq!(a.sent(1), [(7, OK)]);
    a.post(&quiet).unwrap();
    assert_eq!(b.received(8).len(), 8);
    assert_eq!(a.post(&more), Err((libc::ENOMEM, 0)), "nothing signalled, nothing free");
    let _ = a;
}

#[test]
fn inline_bytes_and_opcodes_have_limits() {
    let _alone = alone();
    let (a, _b) = pair(SHAPE, SHAPE);
    assert_eq!(a.post(&[Wr::send(1, (0, 65), 0).inline()]), Err((libc::ENOMEM, 0)));
    assert_eq!(a.post(&[Wr::new(1, IBV_WR_RDMA_READ, (0, 1))]), Err((libc::EINVAL, 0)));
}

#[test]
fn states_come_in_order_with_all_they_ask_for() {
    let _alone = alone();
    let (a, b) = (End::new(SHAPE), End::new(Shape { shared: false, ..SHAPE }));
    let send = [Wr::send(1, (0, 1), 0)];
    assert_eq!(b.receive([0]), libc::EINVAL, "RESET takes no receives");
    assert_eq!(a.post(&send), Err((libc::EINVAL, 0)));
    assert_eq!(a.to_rtr(a.qp, &b.shape, b.number()), libc::EINVAL, "INIT comes first");
    let init = ibv_qp_attr { qp_state: IBV_QPS_INIT, port_num: 1, ..Default::default() };
    let (port, access) = (IBV_QP_PORT | IBV_QP_PKEY_INDEX, IBV_QP_ACCESS_FLAGS);
    assert_eq!(a.modify(a.qp, init, IBV_QP_STATE | port), libc::EINVAL, "no access flags");
    assert_eq!(a.modify(a.qp, init, IBV_QP_STATE | port | access | IBV_QP_TIMEOUT), libc::EINVAL, "too early");
    let wrong = ibv_qp_attr { port_num: 2, ..init };
    assert_eq!(a.modify(a.qp, wrong, IBV_QP_STATE | port | access), libc::EINVAL, "no such port");
    assert_eq!((a.to_init(a.qp), b.to_init(b.qp)), (0, 0));
    assert_eq!(b.receive([0]), 0, "INIT takes receives");
    assert_eq!(a.post(&send), Err((libc::EINVAL, 0)));
    assert_eq!(a.to_rts(a.qp), libc::EINVAL);
    assert_eq!(a.to_rtr(a.qp, &b.shape, b.number()), 0);
    assert_eq!(a.post(&send), Err((libc::EINVAL, 0)));
    assert_eq!((a.to_rts(a.qp), a.state()), (0, IBV_QPS_RTS));
    // The peer is not ready to receive: it is tried again until it is.
    a.post(&send).unwrap();
    assert!(a.poll(a.send_cq, 1).is_empty());
    assert_eq!(b.to_rtr(b.qp, &a.shape, a.number()), 0);
    assert_eq!((a.sent(1), ids(&b.received(1))), (vec![(1, OK)], vec![(0, OK)]));
    assert_eq!(b.incidents(), [IBV_EVENT_COMM_EST]);
}

#[test]
fn a_peer_without_a_receive_is_waited_for() {
    let _alone = alone();
    for shared in [true, false] {
        let (a, b) = pair(SHAPE, Shape { shared, ..SHAPE });
        a.fill(0, b"123");
        let target = (b.at(1000), b.rkey());
        let before = requests();
        a.post(&[Wr::send(1, (0, 1), 1), Wr::write(2, (0, 3), target), Wr::send(3, (0, 1), 3)]).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        assert!(a.poll(a.send_cq, 1).is_empty());
        assert_eq!(b.read(1000, 3), [0; 3], "what comes after waits too");
        b.receive([0]);
        assert_eq!(a.sent(2), [(1, OK), (2, OK)]);
        assert_eq!(b.read(1000, 3), b"123");
        b.receive([1]);
        assert_eq!(a.sent(1), [(3, OK)]);
        assert_eq!(b.received(2).iter().map(|wc| wc.imm_data).collect::<Vec<_>>(), [1, 3]);
        let after = requests();
        assert!(after.0 == before.0 + 3 && after.1 >= before.1 + 2, "{before:?} {after:?}");
    }
    // Only so often: 0.64 ms, twice.
    let (a, _b) = pair(Shape { rnr_retry: 1, ..SHAPE }, SHAPE);
    a.post(&[Wr::send(1, (0, 1), 1)]).unwrap();
    assert_eq!(a.sent(1), [(1, IBV_WC_RNR_RETRY_EXC_ERR)]);
}

#[test]
fn silence_fails_a_request_when_its_retries_are_used_up() {
    let _alone = alone();
    // 4.096 µs × 2^10 × 8 = 34 ms.
    let patience = Duration::from_millis(33);
    for case in 0..5 {
        let (a, mut b) = pair(SHAPE, Shape { psn: if case == 4 { 8 } else { 7 }, ..SHAPE });
        b.receive([0]);
        a.arm(a.send_cq);
        match case {
            0 => b.to_err(),
            // SAFETY: not used after.
            1 => unsafe {
                assert_eq!((lib().ibv_destroy_qp)(b.qp), 0);
                b.qp = ptr::null_mut();
            },
            2 => knob("software_hca_cut", (0, 1)),
            3 => knob("software_hca_port", (0, 0)),
            // It awaits other packet numbers.
            _ => {
                let other = Shape { psn: 9, ..b.shape };
                let reset = ibv_qp_attr { qp_state: IBV_QPS_RESET, ..Default::default() };
                assert_eq!(b.modify(b.qp, reset, IBV_QP_STATE), 0);
                b.connect(b.qp, &other, a.number());
            }
        }
        let start = Instant::now();
        a.post(&[Wr::send(1, (0, 1), 1), Wr::send(2, (0, 1), 1).quiet()]).unwrap();
        // Whoever sleeps is woken: nobody polls.
        // SAFETY: one writable struct.
        let ready = unsafe {
            let mut file = libc::pollfd { fd: (*a.channel).fd, events: libc::POLLIN, revents: 0 };
            libc::poll(&mut file, 1, 5000)
        };
        assert_eq!((ready, start.elapsed() >= patience), (1, true), "case {case}: {:?}", start.elapsed());
        assert_eq!(a.sent(2), [(1, IBV_WC_RETRY_EXC_ERR), (2, FLUSHED)], "case {case}");
        assert_eq!(a.events(), [a.send_cq]);
        knob("software_hca_cut", (0, 0));
        knob("software_hca_port", (0, 1));
    }
}

#[test]
fn what_was_lost_is_sent_again() {
    let _alone = alone();
    let (a, b) = pair(Shape { timeout: 20, ..SHAPE }, Shape { device: 1, ..SHAPE });
    b.receive([0]);
    knob("software_hca_cut", (1, 1));
    a.post(&[Wr::send(1, (0, 1), 1)]).unwrap();
    std::thread::sleep(Duration::from_millis(10));
    assert!(a.poll(a.send_cq, 1).is_empty());
    knob("software_hca_cut", (1, 0));
    assert_eq!(a.sent(1), [(1, OK)]);
}

#[test]
fn an_ended_queue_pair_flushes_what_it_has_and_gets() {
    let _alone = alone();
    let (a, b) = pair(Shape { shared: false, ..SHAPE }, SHAPE);
    a.receive([0, 1]);
    a.post(&[Wr::send(1, (0, 1), 1).quiet(), Wr::send(2, (0, 1), 1)]).unwrap();
    a.to_err();
    assert_eq!(a.sent(2), [(1, FLUSHED), (2, FLUSHED)], "unsignalled ones too");
    assert_eq!(ids(&a.received(2)), [(0, FLUSHED), (1, FLUSHED)]);
    a.post(&[Wr::send(3, (0, 1), 1).quiet()]).unwrap();
    assert_eq!((a.receive([2]), a.sent(1), ids(&a.received(1))), (0, vec![(3, FLUSHED)], vec![(2, FLUSHED)]));
    // Those of a shared queue stay for the others.
    b.receive([0]);
    b.to_err();
    assert!(b.poll(b.recv_cq, 1).is_empty());
    assert_eq!(b.incidents(), [IBV_EVENT_QP_LAST_WQE_REACHED]);
}

#[test]
fn an_armed_queue_tells_once_of_what_comes_after() {
    let _alone = alone();
    let (a, b) = pair(SHAPE, SHAPE);
    b.receive(0..8);
    let send = |id| a.post(&[Wr::send(id, (0, 1), 0)]).unwrap();
    send(0);
    b.received(1);
    send(1);
    a.sent(2);
    b.arm(b.recv_cq);
    assert!(b.events().is_empty(), "not of what is there");
    send(2);
    send(3);
    a.sent(2);
    assert_eq!(b.events(), [b.recv_cq], "once");
    b.arm(b.recv_cq);
    b.arm(b.recv_cq);
    b.arm(b.send_cq);
    send(4);
    a.sent(1);
    assert_eq!(b.events(), [b.recv_cq]);
    assert_eq!(b.received(4).len(), 4);
}

#[test]
fn destroying_waits_for_acknowledgement_and_takes_back_what_nobody_saw() {
    let _alone = alone();
    let (a, b) = pair(SHAPE, SHAPE);
    b.receive(0..2);
    b.arm(b.recv_cq);
    a.post(&[Wr::send(1, (0, 1), 0)]).unwrap();
    a.sent(1);
    let (mut cq, mut context) = (ptr::null_mut(), ptr::null_mut());
    // SAFETY: alive.
    assert_eq!(unsafe { (lib().ibv_get_cq_event)(b.channel, &mut cq, &mut context) }, 0);
    let (late, start) = (Duration::from_millis(50), Instant::now());
    let cq = cq.expose_provenance();
    let acknowledges = std::thread::spawn(move || {
        std::thread::sleep(late);
        // SAFETY: alive until then.
        unsafe { (lib().ibv_ack_cq_events)(ptr::with_exposed_provenance_mut(cq), 1) };
    });
    // The end's queue pair and queues go; an event of the send queue was not seen.
    b.arm(b.send_cq);
    b.to_err();
    drop(b);
    assert!(start.elapsed() >= late);
    acknowledges.join().unwrap();
}

#[test]
fn a_full_completion_queue_loses_what_comes_and_says_so() {
    let _alone = alone();
    let (a, b) = pair(SHAPE, Shape { cq: 2, ..SHAPE });
    b.receive(0..4);
    a.post(&[0, 1, 2, 3].map(|id| Wr::send(id, (0, 1), 0))).unwrap();
    a.sent(4);
    assert_eq!(b.incidents(), [IBV_EVENT_CQ_ERR], "once");
    assert_eq!(ids(&b.received(2)), [(0, OK), (1, OK)]);
    assert!(b.poll(b.recv_cq, 1).is_empty());
}

#[test]
fn a_shared_queue_has_a_depth_and_a_limit() {
    let _alone = alone();
    let (a, b) = pair(SHAPE, Shape { receives: 4, ..SHAPE });
    assert_eq!((b.receive(0..4), b.receive([4])), (0, libc::ENOMEM));
    let limit = |srq_limit| {
        let mut attr = ibv_srq_attr { max_wr: 0, max_sge: 0, srq_limit };
        // SAFETY: alive; 2 is the bit of the limit.
        unsafe { (lib().ibv_modify_srq)(b.srq, &mut attr, 2) }
    };
    assert_eq!((limit(5), limit(3)), (libc::EINVAL, 0));
    a.post(&[0, 1, 2].map(|id| Wr::send(id, (0, 1), 0))).unwrap();
    a.sent(3);
    assert_eq!(b.incidents(), [IBV_EVENT_SRQ_LIMIT_REACHED], "once");
    assert_eq!(b.receive([4]), libc::ENOMEM, "a slot is free when its completion was polled");
    b.received(1);
    assert_eq!((b.receive([4]), b.receive([5])), (0, libc::ENOMEM));
}

#[test]
fn ports_and_breakdowns_are_told() {
    let _alone = alone();
    let (a, b) = pair(SHAPE, Shape { device: 1, ..SHAPE });
    knob("software_hca_port", (1, 0));
    let mut port = MaybeUninit::uninit();
    // SAFETY: open.
    unsafe { assert_eq!(query_port(lib(), b.context, 1, port.as_mut_ptr()), 0) };
    // SAFETY: filled.
    assert_eq!(unsafe { port.assume_init() }.state, IBV_PORT_DOWN);
    knob("software_hca_port", (1, 1));
    assert_eq!(b.incidents(), [IBV_EVENT_PORT_ERR, IBV_EVENT_PORT_ACTIVE]);
    assert_eq!(a.incidents(), [], "of the other device");
    knob("software_hca_break_qp", (a.number() as i32, 0));
    assert_eq!(a.incidents(), [IBV_EVENT_QP_FATAL, IBV_EVENT_QP_LAST_WQE_REACHED]);
    knob("software_hca_break", (1, 0));
    assert_eq!(b.incidents(), [IBV_EVENT_QP_LAST_WQE_REACHED, IBV_EVENT_DEVICE_FATAL]);
    assert_eq!((a.state(), b.state()), (IBV_QPS_ERR, IBV_QPS_ERR));
}

#[test]
fn a_reader_of_events_may_block() {
    let _alone = alone();
    let context = open(0);
    // SAFETY: open; not set to be non-blocking.
    let reader = {
        let context = context.expose_provenance();
        std::thread::spawn(move || {
            let mut event = ibv_async_event { element: ibv_async_element { port_num: 0 }, event_type: 0 };
            // SAFETY: open until this thread is done.
            unsafe {
                let answer = (lib().ibv_get_async_event)(ptr::with_exposed_provenance_mut(context), &mut event);
                (answer, event.event_type, event.element.port_num)
            }
        })
    };
    std::thread::sleep(Duration::from_millis(30));
    assert!(!reader.is_finished());
    knob("software_hca_port", (0, 0));
    assert_eq!(reader.join().unwrap(), (0, IBV_EVENT_PORT_ERR, 1));
    knob("software_hca_port", (0, 1));
    // SAFETY: open.
    unsafe {
        let fd = (*context).async_fd;
        libc::fcntl(fd, libc::F_SETFL, libc::O_NONBLOCK);
        assert_eq!(incidents(context), [IBV_EVENT_PORT_ACTIVE]);
        assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(libc::EAGAIN));
        assert_eq!((lib().ibv_close_device)(context), 0);
    }
}

#[test]
fn a_destroyed_queue_pair_takes_its_completions_along() {
    let _alone = alone();
    let (a, b) = pair(SHAPE, Shape { receives: 2, ..SHAPE });
    let other = b.another_qp();
    b.receive([0, 1]);
    a.post(&[Wr::send(1, (0, 1), 0), Wr::send(2, (0, 1), 0)]).unwrap();
    a.sent(2);
    assert_eq!(b.receive([2]), libc::ENOMEM);
    let mut b = b;
    // SAFETY: not used after.
    unsafe { assert_eq!((lib().ibv_destroy_qp)(std::mem::replace(&mut b.qp, other)), 0) };
    assert!(b.poll(b.recv_cq, 2).is_empty());
    assert_eq!(b.receive([0, 1]), 0, "their slots are free");
}

#[test]
fn what_is_in_use_cannot_be_destroyed_and_nothing_is_left() {
    let _alone = alone();
    let before = living();
    let a = End::new(SHAPE);
    // SAFETY: alive.
    unsafe {
        assert_eq!((lib().ibv_destroy_cq)(a.send_cq), libc::EBUSY);
        assert_eq!((lib().ibv_destroy_srq)(a.srq), libc::EBUSY);
        assert_eq!((lib().ibv_destroy_comp_channel)(a.channel), libc::EBUSY);
        assert_eq!((lib().ibv_dealloc_pd)(a.pd), libc::EBUSY);
        assert_eq!((lib().ibv_close_device)(a.context), -1);
    }
    assert_eq!(living(), before + 8);
    drop(a);
    assert_eq!(living(), before);
}

#[test]
fn many_threads_may_use_one_device() {
    let _alone = alone();
    let lane = |_| {
        let (a, b) = pair(SHAPE, SHAPE);
        for round in 0..500u32 {
            b.receive([0]);
            a.fill(0, &round.to_le_bytes());
            a.post(&[Wr::send(round.into(), (0, 4), round)]).unwrap();
            assert_eq!(b.received(1)[0].imm_data, round);
            assert_eq!(b.read(0, 4), round.to_le_bytes());
            a.sent(1);
        }
    };
    std::thread::scope(|scope| {
        for lane_number in 0..4 {
            scope.spawn(move || lane(lane_number));
        }
    });
}

#[test]
fn statuses_and_events_have_names() {
    // SAFETY: static strings.
    let text = |text| unsafe { CStr::from_ptr(text) }.to_str().unwrap();
    // SAFETY: any number will do.
    unsafe {
        assert_eq!(text((lib().ibv_wc_status_str)(IBV_WC_RETRY_EXC_ERR)), "transport retries exceeded");
        assert_eq!(text((lib().ibv_wc_status_str)(4711)), "unknown status");
        assert_eq!(text((lib().ibv_event_type_str)(IBV_EVENT_PORT_ERR)), "port error");
        assert_eq!((lib().ibv_fork_init)(), 0);
    }
}
