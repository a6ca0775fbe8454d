//! The choice of rails on recorded machines.

use super::topology::tests::Tree;
use super::*;

fn port(number: u8, link: Link, address: &str) -> Port {
    let kind = if link == Link::InfiniBand { GidKind::InfiniBand } else { GidKind::RoceV2 };
    let raw = match address.parse().expect("an address") {
        std::net::IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        std::net::IpAddr::V6(v6) => v6.octets(),
    };
    Port {
        number,
        state: PortState::Active,
        link,
        mtu: 4096,
        lid: if link == Link::InfiniBand { 17 } else { 0 },
        grh_required: false,
        gigabits: Some(400),
        gids: vec![Gid { index: 0, raw: sys::ibv_gid { raw }, kind }],
    }
}

fn device(tree: &Tree, name: &str, ports: Vec<Port>) -> Device {
    let place = Place::of_nic(tree.root(), name);
    Device {
        name: name.into(),
        transport: Transport::InfiniBand,
        place,
        ports,
        dmabuf: DmabufSupport::Yes,
        peermem: false,
    }
}

/// Four InfiniBand NICs, one of them near the GPU 0000:18:00.0, and one
/// Ethernet NIC with two ports.
fn machine() -> (Tree, Vec<Device>) {
    let tree = Tree::new();
    tree.pci("pci0000:15/0000:15:01.0/0000:16:00.0/0000:18:00.0", 0);
    tree.nic("mlx5_10", Some(("pci0000:15/0000:15:01.0/0000:16:00.0/0000:19:00.0", 0)));
    tree.nic("mlx5_2", Some(("pci0000:48/0000:48:01.0/0000:49:00.0", 0)));
    tree.nic("mlx5_0", Some(("pci0000:97/0000:97:01.0/0000:98:00.0", 1)));
    tree.nic("mlx5_9", Some(("pci0000:97/0000:97:01.0/0000:99:00.0", 1)));
    tree.nic("roce_0", Some(("pci0000:a7/0000:a7:01.0/0000:a8:00.0", 1)));
    let ib = |name| device(&tree, name, vec![port(1, Link::InfiniBand, "fe80::1")]);
    let mut ethernet = vec![port(1, Link::Ethernet, "10.0.0.1"), port(2, Link::Ethernet, "10.0.0.2")];
    ethernet[0].gigabits = Some(100);
    ethernet[1].gigabits = Some(100);
    let mut devices: Vec<Device> = ["mlx5_10", "mlx5_9", "mlx5_2", "mlx5_0"].map(ib).into();
    devices.push(device(&tree, "roce_0", ethernet));
    (tree, devices)
}

fn chosen(rails: &Rails) -> Vec<String> {
    rails.chosen.iter().map(|rail| format!("{}:{}", rail.device, rail.port)).collect()
}

#[test]
fn the_closest_come_first_then_the_fastest_then_by_name() {
    let (tree, devices) = machine();
    let config = VerbsConfig { max_rails: 9, near: Near::Pci("0000:18:00.0".into()), ..VerbsConfig::default() };
    let near = config.near.place(tree.root()).expect("the GPU");
    let order = rails(&devices, &near, &config);
    assert_eq!(chosen(&order), ["mlx5_10:1", "mlx5_2:1", "mlx5_0:1", "mlx5_9:1", "roce_0:1", "roce_0:2"]);
    assert_eq!(order.chosen[0].distance, Distance::Bridge(2));
    assert!(order.passed_over.is_empty());
    assert!(!order.chosen[0].global && order.chosen[4].global);

    let nowhere = rails(&devices, &Place::default(), &config);
    assert_eq!(chosen(&nowhere), ["mlx5_0:1", "mlx5_2:1", "mlx5_9:1", "mlx5_10:1", "roce_0:1", "roce_0:2"]);
}

/// A host as built for GPUs: two sockets, on each two switches with two GPUs and
/// two NICs of two ports, and an Ethernet NIC on the first socket.
fn gpu_host() -> (Tree, Vec<Device>) {
    let tree = Tree::new();
    let mut devices = Vec::new();
    for (socket, buses) in [["15", "27"], ["87", "95"]].into_iter().enumerate() {
        for (switch, bus) in buses.into_iter().enumerate() {
            let above = format!("pci0000:{bus}/0000:{bus}:01.0/0000:{bus}:02.0");
            for slot in 0..2 {
                tree.pci(&format!("{above}/0000:{bus}:1{slot}.0"), socket as i32);
                let name = format!("mlx5_{}", socket * 4 + switch * 2 + slot);
                tree.nic(&name, Some((&format!("{above}/0000:{bus}:2{slot}.0"), socket as i32)));
                let ports = [1, 2].map(|number| port(number, Link::InfiniBand, "fe80::1"));
                devices.push(device(&tree, &name, ports.into()));
            }
        }
    }
    tree.nic("roce_0", Some(("pci0000:31/0000:31:01.0/0000:32:00.0", 0)));
    devices.push(device(&tree, "roce_0", vec![port(1, Link::Ethernet, "10.0.0.1")]));
    (tree, devices)
}

/// What the engine of a local rank uses.
fn of_rank(machine: &(Tree, Vec<Device>), near: &Near, local_rank: u32, max_rails: usize) -> Vec<String> {
    let (tree, devices) = machine;
    let config = VerbsConfig { max_rails, local_rank, near: near.clone(), ..VerbsConfig::default() };
    chosen(&rails(devices, &near.place(tree.root()).expect("a place"), &config))
}

#[test]
fn engines_of_one_host_begin_with_different_rails() {
    let machine = gpu_host();
    let first = |near: &Near, rank| of_rank(&machine, near, rank, 1).remove(0);
    // Nowhere in particular: all adapters' first ports, then their second ones.
    let anywhere: Vec<String> = (0..17).map(|rank| first(&Near::Anywhere, rank)).collect();
    let expected: Vec<String> = [1, 2].iter().flat_map(|p| (0..8).map(move |nic| format!("mlx5_{nic}:{p}"))).collect();
    assert_eq!((&anywhere[..16], &anywhere[16]), (&expected[..], &expected[0]), "round and round");
    // Near a GPU: the two under its switch.
    let near = Near::Pci("0000:27:10.0".into());
    assert_eq!(
        (0..5).map(|rank| first(&near, rank)).collect::<Vec<_>>(),
        ["mlx5_2:1", "mlx5_3:1", "mlx5_2:2", "mlx5_3:2", "mlx5_2:1"]
    );
    // On a NUMA node: its four.
    let node: Vec<String> = (0..4).map(|rank| first(&Near::Node(1), rank)).collect();
    assert_eq!(node, ["mlx5_4:1", "mlx5_5:1", "mlx5_6:1", "mlx5_7:1"]);
}

#[test]
fn a_rail_is_never_passed_by_for_one_that_is_further_slower_or_of_another_network() {
    let machine = gpu_host();
    let near = Near::Pci("0000:15:10.0".into());
    for rank in 0..9 {
        // Those under the switch, in whichever order; the socket's others; the
        // Ethernet port, which is no further; and those of the other socket.
        let all = of_rank(&machine, &near, rank, 99);
        let sorted = |range: std::ops::Range<usize>| {
            let mut names = all[range].to_vec();
            names.sort_unstable();
            names
        };
        assert_eq!(sorted(0..4), ["mlx5_0:1", "mlx5_0:2", "mlx5_1:1", "mlx5_1:2"], "rank {rank}");
        assert_eq!(sorted(4..8), ["mlx5_2:1", "mlx5_2:2", "mlx5_3:1", "mlx5_3:2"], "rank {rank}");
        assert_eq!((all[8].as_str(), all.len()), ("roce_0:1", 17), "rank {rank}");
    }
    let (tree, mut devices) = gpu_host();
    // A port that has come up at half its speed is nobody's first.
    devices[1].ports.iter_mut().for_each(|port| port.gigabits = Some(200));
    let machine = (tree, devices);
    let firsts: Vec<String> = (0..4).map(|rank| of_rank(&machine, &near, rank, 1).remove(0)).collect();
    assert_eq!(firsts, ["mlx5_0:1", "mlx5_0:2", "mlx5_0:1", "mlx5_0:2"]);
}

#[test]
fn the_rails_after_the_first_go_on_from_there() {
    let machine = gpu_host();
    let near = Near::Node(0);
    assert_eq!(of_rank(&machine, &near, 0, 2), ["mlx5_0:1", "mlx5_1:1"]);
    assert_eq!(of_rank(&machine, &near, 3, 3), ["mlx5_3:1", "mlx5_0:2", "mlx5_1:2"]);
    assert_eq!(of_rank(&machine, &near, 7, 2), ["mlx5_3:2", "mlx5_0:1"]);
}

#[test]
fn only_as_many_as_allowed_and_the_others_are_told() {
    let (tree, devices) = machine();
    let config = VerbsConfig { max_rails: 2, near: Near::Node(1), ..VerbsConfig::default() };
    let near = config.near.place(tree.root()).expect("a node");
    let two = rails(&devices, &near, &config);
    assert_eq!(chosen(&two), ["mlx5_0:1", "mlx5_9:1"]);
    assert_eq!(two.passed_over.len(), 4);
    assert!(two.passed_over.contains(&("roce_0:2".into(), "usable; not needed for 2 rail(s)".into())));
}

#[test]
fn a_filter_takes_devices_and_ports_and_names_those_that_are_missing() {
    let (_tree, devices) = machine();
    let names = ["roce_0:2", "mlx5_2", "mlx5_7", "roce_0:3"].map(String::from).to_vec();
    let config = VerbsConfig { max_rails: 9, devices: names, ..VerbsConfig::default() };
    let some = rails(&devices, &Place::default(), &config);
    assert_eq!(chosen(&some), ["mlx5_2:1", "roce_0:2"]);
    for name in ["mlx5_7", "roce_0:3"] {
        assert!(some.passed_over.contains(&(name.into(), "there is no such device or port".into())), "{name}");
    }
    assert!(some.passed_over.contains(&("roce_0:1".into(), "not among the devices asked for".into())));
}

#[test]
fn what_cannot_be_used_is_passed_over_with_the_reason() {
    let (tree, _) = machine();
    let why = |change: &dyn Fn(&mut Device)| {
        let mut one = device(&tree, "mlx5_2", vec![port(1, Link::InfiniBand, "fe80::1")]);
        change(&mut one);
        let found = rails(&[one], &Place::default(), &VerbsConfig::default());
        assert!(found.chosen.is_empty());
        found.passed_over[0].1.clone()
    };
    assert_eq!(why(&|d| d.ports[0].state = PortState::Down), "the port is down");
    assert!(why(&|d| d.ports[0].state = PortState::Init).contains("subnet manager"));
    assert!(why(&|d| d.ports[0].lid = 0).contains("no LID"));
    assert!(why(&|d| d.ports[0].gids.clear()).contains("GID 0 is empty"));
    assert!(why(&|d| d.ports[0].mtu = 0).contains("MTU"));
    assert!(why(&|d| d.transport = Transport::Iwarp).contains("iWARP"));
    assert!(why(&|d| d.transport = Transport::Other(4)).contains("transport 4"));
}

#[test]
fn the_cap_lowers_the_mtu() {
    let (_tree, devices) = machine();
    let config = VerbsConfig { mtu_cap: 1024, ..VerbsConfig::default() };
    assert_eq!(rails(&devices, &Place::default(), &config).chosen[0].mtu, 1024);
    assert_eq!((1..=6).map(mtu_bytes).collect::<Vec<_>>(), [256, 512, 1024, 2048, 4096, 0]);
    assert_eq!((mtu_number(2048), mtu_number(1500), mtu_number(0)), (Some(4), None, None));
}

#[test]
fn a_configuration_that_the_hardware_cannot_hold_is_refused() {
    assert_eq!(VerbsConfig::default().check(), Ok(()));
    let wrong = [
        VerbsConfig { service_level: 16, ..VerbsConfig::default() },
        VerbsConfig { mtu_cap: 1500, ..VerbsConfig::default() },
        VerbsConfig { retry_count: 8, ..VerbsConfig::default() },
        VerbsConfig { timeout: 32, ..VerbsConfig::default() },
        VerbsConfig { timeout: 0, ..VerbsConfig::default() },
        VerbsConfig { max_rails: 0, ..VerbsConfig::default() },
    ];
    for config in wrong {
        assert!(matches!(config.check(), Err(Error::Unavailable { transport: "verbs", .. })), "{config:?}");
    }
}

#[test]
fn rates_as_sysfs_writes_them() {
    assert_eq!(parse_rate("400 Gb/sec (4X NDR)\n"), Some(400));
    assert_eq!(parse_rate("2.5 Gb/sec (1X SDR)\n"), Some(2));
    assert_eq!(parse_rate("unknown\n"), None);
}

#[test]
fn where_gpu_memory_must_be_reached_a_device_that_copies_is_passed_over() {
    let (_, mut devices) = machine();
    let no = DmabufSupport::No { because: "the driver is old".into() };
    devices.iter_mut().for_each(|device| device.dmabuf = no.clone());
    devices[2].dmabuf = DmabufSupport::Yes;
    let config = VerbsConfig { max_rails: 9, require_gpu_direct: true, ..VerbsConfig::default() };
    let found = rails(&devices, &Place::default(), &config);
    assert_eq!(chosen(&found), ["mlx5_2:1"]);
    let (name, because) = &found.passed_over[0];
    assert_eq!(name, "mlx5_10:1");
    assert!(because.contains("the driver is old, and the module nvidia_peermem is not loaded"), "{because}");
    devices.iter_mut().for_each(|device| device.peermem = true);
    assert_eq!(rails(&devices, &Place::default(), &config).chosen.len(), 6, "the module serves every device");
}
