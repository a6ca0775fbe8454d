//! Every message and datagram comes back as it was, and nothing else does.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::kv::rblock::{KvDtype, KvShape};

fn shape() -> impl Strategy<Value = KvShape> {
    let size = 1u32..=4096;
    let dtype = prop_oneof![Just(KvDtype::Bf16), Just(KvDtype::F16), Just(KvDtype::F32), Just(KvDtype::Fp8)];
    (size.clone(), size.clone(), size.clone(), size, dtype).prop_map(
        |(layers, kv_heads, head_dim, block_tokens, dtype)| KvShape { layers, kv_heads, head_dim, block_tokens, dtype },
    )
}

fn row() -> impl Strategy<Value = Row> {
    let address = || "[a-z:/.0-9é]{0,40}";
    let tier = (any::<bool>(), any::<[u32; 4]>()).prop_map(|(device, n)| TierRow {
        tier: if device { Tier::Device } else { Tier::Host },
        total: n[0],
        free: n[1],
        lent: n[2],
        lend_cap: n[3],
    });
    let debt = (any::<u64>(), any::<u32>()).prop_map(|(i, blocks)| Debt { debtor: InstanceId(i), blocks });
    let link =
        (any::<u64>(), any::<[u32; 2]>()).prop_map(|(i, n)| LinkRow { peer: InstanceId(i), rtt_us: n[0], mb_s: n[1] });
    let perf =
        [0f32..1e9, 0f32..1e9, 0f32..1e9].prop_map(|[fixed_ns, row_ns, key_ns]| PerfModel { fixed_ns, row_ns, key_ns });
    let profile = (
        (any::<bool>(), prop::option::of(any::<[u8; 32]>()), any::<u64>(), any::<u32>(), address()),
        (vec(address(), 0..=MAX_ADDRESSES), vec(address(), 0..=MAX_ADDRESSES), prop::option::of(address())),
    )
        .prop_map(|((engine, model, host, rank, http), (control, creditor, peers))| Profile {
            role: if engine { Role::Engine } else { Role::Lender },
            model,
            host,
            rank,
            control,
            creditor,
            http,
            peers,
        });
    let lists =
        (vec(tier, 0..=MAX_TIERS), vec(debt, 0..=MAX_DEBTORS), vec(link, 0..=MAX_LINKS), prop::option::of(perf));
    let options = (prop::option::of(shape()), any::<[u64; 2]>(), any::<bool>(), profile);
    (any::<[u32; 6]>(), options, lists).prop_map(
        |(n, (shape, [instance, shapeable_bytes], serving, profile), (tiers, debts, links, perf))| Row {
            instance: InstanceId(instance),
            stamp: Stamp { incarnation: n[0], version: n[1] },
            profile,
            service: if serving { Service::Serving } else { Service::Draining },
            shape,
            shapeable_bytes,
            tiers,
            debts,
            borrowed: n[2],
            running: n[3],
            waiting: n[4],
            wanted: n[5] / 2,
            tokens_s: n[5],
            perf,
            links,
        },
    )
}

fn packet() -> impl Strategy<Value = Packet> {
    let stamp = (any::<u64>(), any::<[u32; 2]>())
        .prop_map(|(i, n)| (InstanceId(i), Stamp { incarnation: n[0], version: n[1] }));
    let digest = (any::<u64>(), prop::option::of(any::<u64>()), vec(stamp, 0..=MAX_STAMPS), any::<bool>()).prop_map(
        |(from, until, stamps, answer)| {
            Packet::Digest(Digest { from: InstanceId(from), until: until.map(InstanceId), stamps, answer })
        },
    );
    prop_oneof![vec(any::<u8>(), 0..99).prop_map(Packet::Swim), digest, vec(row(), 0..4).prop_map(Packet::Rows)]
}

pub(crate) fn message() -> impl Strategy<Value = Message> {
    let loan = || (any::<u32>().prop_map(LoanId), any::<u32>());
    let refusal = prop_oneof![
        Just(Refusal::NoRoom),
        Just(Refusal::LendCap),
        Just(Refusal::Shape),
        Just(Refusal::Draining),
        Just(Refusal::Invalid),
        Just(Refusal::NotLending),
    ];
    let renewal = (loan(), any::<u32>()).prop_map(|((loan, epoch), blocks)| Renewal { loan, epoch, blocks });
    let ranges = vec((0u32..100, 1u32..100), 0..20).prop_map(|steps| {
        let mut end = 0;
        let next = |(gap, count)| {
            let range = BlockRange { start: end + gap, count };
            end = range.start + count;
            range
        };
        steps.into_iter().map(next).collect::<Vec<_>>()
    });
    prop_oneof![
        (any::<[u8; 16]>(), any::<u64>())
            .prop_map(|(cluster, instance)| Message::Hello { cluster, instance: InstanceId(instance) }),
        (any::<u64>(), vec(renewal, 0..9)).prop_map(|(sent_us, loans)| Message::Heartbeat { sent_us, loans }),
        any::<u64>().prop_map(|sent_us| Message::Heard { sent_us }),
        (any::<u64>(), any::<u64>(), any::<u32>(), shape()).prop_map(|(ticket, request, blocks, shape)| {
            Message::TryMoveKvCache { ticket, request, blocks, shape }
        }),
        (any::<u64>(), loan(), any::<u32>(), ranges).prop_map(|(ticket, (loan, epoch), lease_ms, blocks)| {
            Message::Granted { ticket, loan, epoch, lease_ms, blocks }
        }),
        (any::<u64>(), refusal, any::<u32>()).prop_map(|(ticket, reason, free)| Message::Refused {
            ticket,
            reason,
            free
        }),
        loan().prop_map(|(loan, epoch)| Message::Repay { loan, epoch }),
        loan().prop_map(|(loan, epoch)| Message::Repaid { loan, epoch }),
        loan().prop_map(|(loan, epoch)| Message::Lapsed { loan, epoch }),
    ]
}

proptest! {
    #[test]
    fn a_message_comes_back_as_it_was(message in message()) {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        prop_assert_eq!(Message::decode(&bytes), Ok(message));
        // Every prefix is an error, and so is one byte more.
        for end in 0..bytes.len() {
            prop_assert!(Message::decode(&bytes[..end]).is_err());
        }
        bytes.push(0);
        prop_assert!(Message::decode(&bytes).is_err());
    }

    #[test]
    fn a_datagram_comes_back_as_it_was(packet in packet(), damage in vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)) {
        let mut bytes = Vec::new();
        packet.encode(&mut bytes);
        if let Packet::Rows(rows) = &packet {
            prop_assert_eq!(rows.iter().map(Row::encoded_len).sum::<usize>() + 4, bytes.len());
        }
        let swim = matches!(packet, Packet::Swim(_));
        prop_assert_eq!(Packet::decode(&bytes), Ok(packet));
        for end in 0..if swim { 2 } else { bytes.len() } {
            prop_assert!(Packet::decode(&bytes[..end]).is_err());
        }
        for (at, value) in damage {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Ok(packet) = Packet::decode(&bytes) {
            let mut again = Vec::new();
            packet.encode(&mut again);
            prop_assert_eq!(again, bytes, "one datagram has one encoding");
        }
    }

    #[test]
    fn damaged_bytes_give_a_message_or_an_error(message in message(), damage in vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)) {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        for (at, value) in damage {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Ok(message) = Message::decode(&bytes) {
            let mut again = Vec::new();
            message.encode(&mut again);
            prop_assert_eq!(again, bytes, "one message has one encoding");
        }
    }

    #[test]
    fn any_bytes_give_a_message_or_an_error(mut bytes in vec(any::<u8>(), 0..300), kind in 0u8..12) {
        let _ = Message::decode(&bytes);
        if bytes.len() > 1 {
            bytes[..2].copy_from_slice(&[VERSION, kind]);
            let _ = Message::decode(&bytes);
            let _ = Packet::decode(&bytes);
        }
    }
}

#[test]
fn a_long_list_is_refused_before_it_is_read() {
    let mut bytes = vec![VERSION, HEARTBEAT];
    bytes.extend_from_slice(&1u64.to_le_bytes());
    bytes.extend_from_slice(&u16::MAX.to_le_bytes());
    let refused = DecodeError::TooMany { field: "loans", len: usize::from(u16::MAX), limit: MAX_RENEWALS };
    assert_eq!(Message::decode(&bytes), Err(refused));
    assert_eq!(Message::decode(&[VERSION + 1, HELLO]), Err(DecodeError::Version(VERSION + 1)));
    assert_eq!(Message::decode(&[VERSION, 99]), Err(DecodeError::Kind(99)));
}
