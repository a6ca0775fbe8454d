//! The bootstrap, fed in pieces of any length: as a stranger, who gets no
//! further than the handshake, and as a member of the cluster, whose records
//! open and may say anything.
#![no_main]

use distkv_fabric::secure::{Bootstrap, Greeting, Heard, Kind, MAX_PLAIN, Purpose, Refused, Secret, Session};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u8, u8, &[u8])| {
    let (role, cut, bytes) = input;
    let secret = Secret::new([7; 32]);
    if role & 1 == 0 {
        let greeting = Greeting { incarnation: 1, hello: b"hello".to_vec() };
        for mut side in [
            Bootstrap::accept(&secret, Purpose::Tcp),
            Bootstrap::connect(&secret, Purpose::Tcp, greeting).unwrap(),
        ] {
            assert!(hear(&mut side, bytes, cut).is_empty(), "a stranger was heard");
        }
        return;
    }
    let mut side = Bootstrap::accept(&secret, Purpose::Tcp);
    let mut member = Session::connect(&secret, Purpose::Tcp).unwrap();
    side.feed(member.output()).unwrap();
    member.feed(side.output()).unwrap();
    assert!(member.is_established());
    // Pieces: kind and length in one byte each.
    let (mut records, mut rest) = (Vec::new(), bytes);
    while let [kind, len, tail @ ..] = rest {
        let (content, after) = tail.split_at(usize::from(*len).min(tail.len()));
        rest = after;
        let kind = [Kind::Greeting, Kind::Ready, Kind::Data][usize::from(kind % 3)];
        // Some are longer than one byte tells.
        let content = if *len == 255 { content.repeat(200) } else { content.to_vec() };
        let content = &content[..content.len().min(MAX_PLAIN)];
        let _ = member.seal(kind, &[content], &mut records);
    }
    let heard = hear(&mut side, &records, cut);
    assert!(heard.len() <= 2);
    if let Some(first) = heard.first() {
        assert!(matches!(first, Heard::Greeting(_)), "nothing before the greeting");
    }
});

/// What a side hears until it has refused or read all.
fn hear(side: &mut Bootstrap, bytes: &[u8], cut: u8) -> Vec<Heard> {
    let (mut all, mut at) = (Vec::new(), 0);
    while at < bytes.len() && !side.is_complete() {
        let piece = &bytes[at..bytes.len().min(at + usize::from(cut) + 1)];
        match side.feed(piece) {
            Ok((taken, heard)) => {
                assert!(taken <= piece.len());
                assert!(taken > 0 || heard.is_some() || all.contains(&Heard::Ready));
                at += taken;
                if taken == 0 && heard.is_none() {
                    break;
                }
                all.extend(heard);
            }
            Err(refused) => {
                assert_ne!(refused, Refused::Over, "only the second error is that");
                assert_eq!(side.feed(bytes), Err(Refused::Over));
                assert!(!side.is_complete());
                break;
            }
        }
    }
    all
}
