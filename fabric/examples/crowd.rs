//! What a tcp hub pays to hear from many peers at once, with io_uring's batched
//! receives and without.
//!
//! Every peer posts one 64-byte message; then the hub polls until it has heard
//! them all, and only that is timed. Also: a poll that finds nothing.

use std::time::{Duration, Instant};

use distkv_fabric::secure::Security;
use distkv_fabric::tcp::{TcpConfig, TcpTransport};
use distkv_fabric::{Event, Transport};

fn bind(io_uring: bool) -> TcpTransport {
    let config = TcpConfig { io_uring, ..TcpConfig::new(Security::Insecure) };
    TcpTransport::bind(([127, 0, 0, 1], 0).into(), config).expect("cannot bind")
}

fn main() {
    println!(
        "{:>6} {:>24} {:>24}   µs, min of 300 rounds",
        "peers", "all heard (plain, uring)", "empty poll (plain, uring)"
    );
    for peers in [1, 4, 8, 16, 64, 256] {
        let [plain, uring] = [false, true].map(|io_uring| round(peers, io_uring));
        println!("{peers:>6} {:>12.2} {:>11.2} {:>12.3} {:>11.3}", plain.0, uring.0, plain.1, uring.1);
    }
}

fn round(peers: usize, io_uring: bool) -> (f64, f64) {
    let mut hub = bind(io_uring);
    let mut rim = bind(false);
    let to_hub: Vec<_> = (0..peers).map(|_| rim.connect(&hub.address(), b"").expect("cannot connect")).collect();
    let mut connected = 0;
    while connected < peers {
        rim.poll(&mut |event| connected += usize::from(matches!(event, Event::Connected { .. }))).expect("rim");
        hub.poll(&mut |_| {}).expect("hub");
    }
    let (mut all, mut empty) = (Duration::MAX, Duration::MAX);
    for _ in 0..300 {
        for peer in &to_hub {
            rim.send(*peer, &[7; 64]).expect("send");
        }
        let mut heard = 0;
        let start = Instant::now();
        while heard < peers {
            hub.poll(&mut |event| heard += usize::from(matches!(event, Event::Message { .. }))).expect("hub");
        }
        all = all.min(start.elapsed());
        let start = Instant::now();
        hub.poll(&mut |_| {}).expect("hub");
        empty = empty.min(start.elapsed());
    }
    (all.as_secs_f64() * 1e6, empty.as_secs_f64() * 1e6)
}
