//! One suite, every transport: the cases in `suite/cases.rs` run over each.

#[path = "suite/cases.rs"]
mod cases;
#[path = "suite/death.rs"]
mod death;
#[path = "suite/node.rs"]
mod node;
#[path = "software_hca/place.rs"]
mod place;
#[path = "suite/rdma.rs"]
mod rdma_devices;

use distkv_fabric::secure::{Secret, Security};
use distkv_fabric::tcp::{TcpConfig, TcpTransport};

/// The cases as tests of one transport.
macro_rules! suite {
    ($transport:ident, $make:expr, $attributes:tt, [$($case:ident),* $(,)?]) => {
        mod $transport {
            $(
                suite!(@test $attributes $case $make);
            )*
        }
    };
    (@test [$(#[$attribute:meta])*] $case:ident $make:expr) => {
                #[test]
                $(#[$attribute])*
                fn $case() {
                    crate::cases::$case($make);
                }
    };
}

/// The cases that every transport passes.
macro_rules! suite_for {
    ($transport:ident, $make:expr, $attributes:tt $(, $more:ident)* $(,)?) => {
        suite!($transport, $make, $attributes, [
            hello_is_handed_over,
            nobody_at_the_address_ends_in_closed,
            posts_before_connected_are_queued,
            what_is_posted_arrives_once_and_in_order,
            messages_of_every_length_arrive,
            a_notification_comes_after_the_data,
            small_messages_keep_their_place_behind_big_writes,
            many_peers_are_told_apart,
            a_post_that_cannot_be_is_refused_at_once,
            a_forged_key_closes_the_connection,
            the_key_of_another_transport_closes_the_connection,
            a_deregistered_region_is_closed_to_writes,
            a_region_deregistered_after_use_is_closed_to_writes,
            disconnect_is_seen_once_and_only_by_the_other,
            a_dropped_transport_closes_its_connections,
            a_waker_ends_a_wait,
            a_wait_ends_by_itself,
            a_wait_misses_no_wakeup,
            a_peer_that_does_not_poll_holds_nobody_up,
            writes_to_a_peer_that_does_not_poll_wait_for_it,
            both_sides_may_flood_at_once,
            a_crowd_wakes_its_hub,
            $($more,)*
        ]);
    };
}

fn make_loopback() -> Box<dyn distkv_fabric::Transport> {
    Box::new(distkv_fabric::loopback::LoopbackTransport::bind())
}

fn tcp(security: Security) -> Box<dyn distkv_fabric::Transport> {
    let any = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
    Box::new(TcpTransport::bind(any, TcpConfig::new(security)).unwrap())
}

fn make_tcp() -> Box<dyn distkv_fabric::Transport> {
    tcp(Security::Sealed(Secret::new([1; 32])))
}

fn make_tcp_insecure() -> Box<dyn distkv_fabric::Transport> {
    tcp(Security::Insecure)
}

fn make_shm() -> Box<dyn distkv_fabric::Transport> {
    Box::new(distkv_fabric::shm::ShmTransport::bind(Default::default()).unwrap())
}

suite_for!(loopback, crate::make_loopback, [], the_guard_decides);
suite_for!(tcp, crate::make_tcp, [], the_guard_decides);
suite_for!(tcp_insecure, crate::make_tcp_insecure, [], the_guard_decides);
suite_for!(shm, crate::make_shm, []);
suite_for!(verbs, crate::rdma_devices::make_verbs, [], the_guard_decides);
suite_for!(
    rdma,
    crate::rdma_devices::make_rdma,
    [#[ignore = "needs an RDMA device: scripts/softroce brings one"]],
    the_guard_decides
);
