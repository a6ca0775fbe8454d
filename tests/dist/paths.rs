//! Which transport a lane takes when the preferred one does not open it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use distkv::attention::debtor::{Debtor, DebtorConfig, LaneState};
use distkv::attention::wire::{LaneHello, LaneMessage};
use distkv::device::AttentionShape;
use distkv::kv::pool::KvPool;
use distkv::kv::rblock::{InstanceId, KvDtype, KvShape};
use distkv_fabric::secure::{Secret, Security};
use distkv_fabric::select::{Kind, Options};
use distkv_fabric::{Access, Address, Event, Memory, Transport};

use crate::cluster::until;
use crate::with_software_hca;

const CREDITOR: InstanceId = InstanceId(7);

fn transport(kind: Kind) -> Box<dyn Transport> {
    let options = Options::from(Security::Sealed(Secret::new([3; 32])));
    kind.bind(SocketAddr::from(([127, 0, 0, 1], 0)), &options).unwrap()
}

/// A creditor over one transport, which opens lanes and hears how many came.
struct Lender {
    transport: Box<dyn Transport>,
    key: distkv_fabric::RemoteKey,
    lanes: usize,
}

impl Lender {
    fn new(kind: Kind) -> Self {
        let mut transport = transport(kind);
        let region = transport.register(&Memory::new(4096).unwrap(), Access::RemoteWrite).unwrap();
        let key = transport.remote_key(region).unwrap();
        Self { transport, key, lanes: 0 }
    }

    fn poll(&mut self) {
        let mut new = Vec::new();
        let heard = &mut |event: Event<'_>| {
            if let Event::Accepted { peer, hello } = event {
                assert_eq!(LaneHello::decode(hello).unwrap().debtor, InstanceId(1));
                new.push(peer);
            }
        };
        self.transport.poll(heard).unwrap();
        for peer in new {
            self.lanes += 1;
            let (query_key, pool_key) = (self.key.clone(), self.key.clone());
            let mut accept = Vec::new();
            LaneMessage::Accept { query_key, pool_key, blocks: 4 }.encode(&mut accept);
            self.transport.send(peer, &accept).unwrap();
        }
    }
}

fn debtor(kinds: &[Kind], deadline: Duration) -> Debtor {
    let shape = KvShape { layers: 1, kv_heads: 2, head_dim: 16, block_tokens: 16, dtype: KvDtype::F32 };
    let config = DebtorConfig {
        instance: InstanceId(1),
        attention: AttentionShape { heads: 4, kv_heads: 2, head_dim: 16, scale: 0.25 },
        windows: Vec::new(),
        max_rows: 8,
        deadline,
        spin: Duration::ZERO,
    };
    let transports = kinds.iter().map(|kind| transport(*kind)).collect();
    Debtor::new(config, Arc::new(KvPool::new(shape, 4).unwrap()), transports, Arc::default()).unwrap()
}

/// An address of a transport where nobody is.
fn nobody(scheme: &str) -> Address {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    Address(format!("{scheme}://{free}"))
}

/// Somebody who is there and says nothing.
fn mute(scheme: &str) -> (Address, std::net::TcpListener) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    (Address(format!("{scheme}://{}", listener.local_addr().unwrap())), listener)
}

fn opens_over_tcp(debtor: &mut Debtor, lender: &mut Lender, first: &Address) {
    let addresses = [lender.transport.address(), first.clone()];
    for opened in 1..=2 {
        debtor.open(CREDITOR, &addresses, false);
        until("the lane to open", || {
            lender.poll();
            debtor.poll();
            debtor.state(CREDITOR) == LaneState::Open
        });
        assert_eq!(debtor.finish_step(), [], "nothing was lost that anybody would have to mend");
        // Later lanes to it take the path that has not failed at once.
        assert_eq!(lender.lanes, opened);
        debtor.close(CREDITOR);
    }
}

#[test]
fn a_lane_that_verbs_does_not_open_is_opened_over_tcp() {
    with_software_hca();
    let mut lender = Lender::new(Kind::Tcp);
    let mut debtor = debtor(&[Kind::Verbs, Kind::Tcp], Duration::from_secs(20));
    opens_over_tcp(&mut debtor, &mut lender, &nobody("verbs"));
}

#[test]
fn a_transport_that_hears_nothing_in_time_is_passed_over() {
    with_software_hca();
    let mut lender = Lender::new(Kind::Tcp);
    let mut debtor = debtor(&[Kind::Verbs, Kind::Tcp], Duration::from_millis(300));
    let (silent, _listener) = mute("verbs");
    opens_over_tcp(&mut debtor, &mut lender, &silent);
}

#[test]
fn a_transport_whose_connect_fails_at_once_is_passed_over() {
    let mut lender = Lender::new(Kind::Tcp);
    let mut debtor = debtor(&[Kind::Shm, Kind::Tcp], Duration::from_secs(20));
    opens_over_tcp(&mut debtor, &mut lender, &Address("shm:///nonexistent/distkv.socket".into()));
}

#[test]
fn where_every_transport_fails_the_creditor_is_lost_once_and_may_be_tried_again() {
    let mut debtor = debtor(&[Kind::Shm, Kind::Tcp], Duration::from_secs(20));
    let addresses = [Address("shm:///nonexistent/distkv.socket".into()), nobody("tcp")];
    for _ in 0..2 {
        debtor.open(CREDITOR, &addresses, false);
        until("the lane to be given up", || {
            debtor.poll();
            debtor.has_losses()
        });
        let lost = debtor.finish_step();
        assert_eq!((lost.len(), lost[0].0, debtor.state(CREDITOR)), (1, CREDITOR, LaneState::Absent), "{lost:?}");
    }
    debtor.open(CREDITOR, &[nobody("verbs")], false);
    assert_eq!(debtor.finish_step(), [(CREDITOR, "opening a lane: no transport in common".to_string())]);
}
