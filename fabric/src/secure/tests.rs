//! Two sides of a session, and who sits between them.

use proptest::prelude::*;

use super::record::{HEADER, REKEY};
use super::session::MESSAGE;
use super::*;
use crate::MAX_SEND;

fn secret() -> Secret {
    Secret::new([7; 32])
}

fn greeting(incarnation: u64, hello: &[u8]) -> Greeting {
    Greeting { incarnation, hello: hello.to_vec() }
}

/// A side and what it heard.
struct Side {
    bootstrap: Bootstrap,
    heard: Vec<Greeting>,
    readies: usize,
    answer: Option<Greeting>,
}

impl Side {
    fn connect(secret: &Secret, hello: &[u8]) -> Self {
        let mut bootstrap = Bootstrap::connect(secret, Purpose::Tcp, greeting(1, hello)).unwrap();
        bootstrap.ready().unwrap();
        Self { bootstrap, heard: Vec::new(), readies: 0, answer: None }
    }

    fn accept(secret: &Secret, hello: &[u8]) -> Self {
        let bootstrap = Bootstrap::accept(secret, Purpose::Tcp);
        Self { bootstrap, heard: Vec::new(), readies: 0, answer: Some(greeting(2, hello)) }
    }

    /// All that it has to say now.
    fn says(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        while !self.bootstrap.output().is_empty() {
            bytes.extend(self.bootstrap.output());
            let n = self.bootstrap.output().len();
            self.bootstrap.sent(n);
        }
        bytes
    }

    /// Hears bytes in pieces; returns how many it took.
    fn hears(&mut self, bytes: &[u8], cut: usize) -> Result<usize, Refused> {
        let mut at = 0;
        while at < bytes.len() && !self.bootstrap.is_complete() {
            let piece = &bytes[at..bytes.len().min(at + cut)];
            let (taken, heard) = self.bootstrap.feed(piece)?;
            assert!(taken == piece.len() || heard.is_some() || self.bootstrap.is_complete());
            at += taken;
            match heard {
                Some(Heard::Greeting(greeting)) => {
                    self.heard.push(greeting);
                    if let Some(answer) = self.answer.take() {
                        self.bootstrap.answer(answer)?;
                        self.bootstrap.ready()?;
                    }
                }
                Some(Heard::Ready) => self.readies += 1,
                None => {}
            }
        }
        Ok(at)
    }
}

/// Both through their bootstrap; returns the bytes that went each way.
fn meet(a: &mut Side, b: &mut Side, cut: usize) -> (Vec<u8>, Vec<u8>) {
    let (mut there, mut back) = (Vec::new(), Vec::new());
    while !(a.bootstrap.is_complete() && b.bootstrap.is_complete()) {
        let said = a.says();
        assert_eq!(b.hears(&said, cut), Ok(said.len()));
        let answered = b.says();
        assert_eq!(a.hears(&answered, cut), Ok(answered.len()));
        assert!(!said.is_empty() || !answered.is_empty(), "both wait");
        there.extend(said);
        back.extend(answered);
    }
    (there, back)
}

/// The halves of a finished session: (a's, b's).
fn session() -> ((Sealer, Opener), (Sealer, Opener)) {
    let (mut a, mut b) = (Side::connect(&secret(), b"a"), Side::accept(&secret(), b"b"));
    meet(&mut a, &mut b, usize::MAX >> 1);
    (a.bootstrap.finish().unwrap(), b.bootstrap.finish().unwrap())
}

fn opens(opener: &mut Opener, record: &[u8]) -> Result<Vec<u8>, Refused> {
    let mut bytes = record.to_vec();
    let opened = opener.open(&mut bytes)?.expect("a whole record");
    assert_eq!((opened.taken, opened.kind), (record.len(), Kind::Data));
    Ok(bytes[opened.content].to_vec())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn both_hear_each_other_however_the_bytes_are_cut(
        hello in prop::collection::vec(any::<u8>(), 0..300),
        answer in prop::collection::vec(any::<u8>(), 0..300),
        cut in 1usize..100,
        data in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..50), 0..6),
    ) {
        let (mut a, mut b) = (Side::connect(&secret(), &hello), Side::accept(&secret(), &answer));
        meet(&mut a, &mut b, cut);
        prop_assert_eq!((&a.heard, &b.heard), (&vec![greeting(2, &answer)], &vec![greeting(1, &hello)]));
        prop_assert_eq!((a.readies, b.readies), (1, 1));
        let (mut a, mut b) = (a.bootstrap.finish().unwrap(), b.bootstrap.finish().unwrap());
        let mut stream = Vec::new();
        for part in &data {
            let half = part.len() / 2;
            a.0.seal(Kind::Data, &[&part[..half], &part[half..]], &mut stream).unwrap();
        }
        // However much of the stream is there: only whole records open.
        let (mut window, mut got) = (Vec::new(), Vec::new());
        for piece in stream.chunks(cut) {
            window.extend(piece);
            while let Some(opened) = b.1.open(&mut window).unwrap() {
                got.push(window[opened.content].to_vec());
                window.drain(..opened.taken);
            }
        }
        prop_assert_eq!((got, window), (data, Vec::new()));
    }

    #[test]
    fn garbage_is_refused_by_either_side(bytes in prop::collection::vec(any::<u8>(), 60..200), proper: bool) {
        for mut side in [Side::accept(&secret(), b""), Side::connect(&secret(), b"")] {
            let mut bytes = bytes.clone();
            if proper {
                bytes[..12].copy_from_slice(&Side::connect(&secret(), b"").says()[..12]);
            }
            let refused = side.hears(&bytes, 7).unwrap_err();
            prop_assert_eq!(refused == Refused::Key, proper);
            prop_assert_eq!(side.bootstrap.feed(&bytes).unwrap_err(), Refused::Over);
        }
    }

    #[test]
    fn records_of_garbage_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut opener = Opener::new([1; 32]).unwrap();
        if let Some(opened) = opener.open(&mut bytes.clone()).unwrap_or(None) {
            panic!("{opened:?}");
        }
    }
}

#[test]
fn a_hello_of_any_length_up_to_the_limit_arrives() {
    for len in [MAX_PLAIN - 12, MAX_PLAIN - 11, MAX_SEND] {
        let hello: Vec<u8> = (0..len).map(|i| (i / 255) as u8).collect();
        let (mut a, mut b) = (Side::connect(&secret(), &hello), Side::accept(&secret(), b""));
        meet(&mut a, &mut b, 5000);
        assert_eq!(b.heard, [greeting(1, &hello)]);
    }
    assert!(Bootstrap::connect(&secret(), Purpose::Tcp, greeting(1, &vec![0; MAX_SEND + 1])).is_err());
}

#[test]
fn any_changed_bit_is_refused_wherever_it_is() {
    let (mut a, mut b) = (Side::connect(&secret(), b"hello"), Side::accept(&secret(), b"answer"));
    let (there, back) = meet(&mut a, &mut b, usize::MAX >> 1);
    let (greeted, answered) = (there.len(), back.len());
    // The bytes of the first message, then those of the records behind it; the
    // same of the answers.
    for at in 0..greeted {
        let bit = 1 << (at % 8);
        let (mut a, mut b) = (Side::connect(&secret(), b"hello"), Side::accept(&secret(), b"answer"));
        let mut first = a.says();
        if at < MESSAGE {
            first[at] ^= bit;
            assert!(b.hears(&first, 9).is_err(), "byte {at} of the first message");
            assert_eq!(b.says(), b"", "a stranger is told nothing");
        } else {
            b.hears(&first, 9).unwrap();
            a.hears(&b.says(), 9).unwrap();
            let mut records = a.says();
            records[at - MESSAGE] ^= bit;
            // A length may grow, and the record then never be complete.
            let refused = b.hears(&[&records[..], &[0; MAX_PLAIN + OVERHEAD]].concat(), 4096);
            assert_eq!(refused, Err(Refused::Tampered), "byte {at} of what connects");
            assert_eq!(b.bootstrap.feed(b"x"), Err(Refused::Over));
        }
        assert!(!b.bootstrap.is_complete());
    }
    for at in 0..answered {
        let (mut a, mut b) = (Side::connect(&secret(), b"hello"), Side::accept(&secret(), b"answer"));
        b.hears(&a.says(), 9).unwrap();
        let mut second = b.says();
        if at < MESSAGE {
            second[at] ^= 1 << (at % 8);
            assert!(a.hears(&second, 9).is_err(), "byte {at} of the second message");
            assert_eq!(a.says(), b"", "a stranger is told nothing");
        } else {
            a.hears(&second, 9).unwrap();
            b.hears(&a.says(), 9).unwrap();
            let mut records = b.says();
            records[at - MESSAGE] ^= 1 << (at % 8);
            let refused = a.hears(&[&records[..], &[0; MAX_PLAIN + OVERHEAD]].concat(), 4096);
            assert_eq!(refused, Err(Refused::Tampered), "byte {at} of what accepts");
        }
        assert!(!a.bootstrap.is_complete());
    }
}

#[test]
fn a_handshake_played_again_gets_one_answer_and_is_nobody() {
    let (mut a, mut b) = (Side::connect(&secret(), b"hello"), Side::accept(&secret(), b"answer"));
    let (recorded, _) = meet(&mut a, &mut b, 99);
    let mut again = Side::accept(&secret(), b"answer");
    assert_eq!(again.hears(&recorded[..MESSAGE], 99), Ok(MESSAGE));
    assert_eq!(again.says().len(), MESSAGE);
    assert_eq!(again.hears(&recorded[MESSAGE..], 99), Err(Refused::Tampered));
    assert_eq!((again.heard.len(), again.says().len()), (0, 0));
    // Whoever connects is not fooled by its own echo or by another's answer.
    let mut echoed = Side::connect(&secret(), b"hello");
    let said = echoed.says();
    assert_eq!(echoed.hears(&said, 99), Err(Refused::Key));
    let (mut a, mut b) = (Side::connect(&secret(), b"hello"), Side::accept(&secret(), b"answer"));
    b.hears(&a.says(), 99).unwrap();
    let other = b.says();
    let mut fooled = Side::connect(&secret(), b"hello");
    fooled.says();
    assert_eq!(fooled.hears(&other, 99), Err(Refused::Key));
}

#[test]
fn another_secret_is_turned_away_without_a_word() {
    let (mut a, mut b) = (Side::connect(&Secret::new([8; 32]), b"hello"), Side::accept(&secret(), b"answer"));
    assert_eq!(b.hears(&a.says(), 99), Err(Refused::Key));
    assert_eq!((b.says().len(), b.heard.len()), (0, 0));
}

#[test]
fn two_that_open_at_once_have_two_sessions() {
    let (mut a, mut b) = (Side::connect(&secret(), b"a"), Side::accept(&secret(), b"b"));
    let (mut c, mut d) = (Side::connect(&secret(), b"b"), Side::accept(&secret(), b"a"));
    let (from_a, from_c) = (a.says(), c.says());
    d.hears(&from_c, 99).unwrap();
    b.hears(&from_a, 99).unwrap();
    meet(&mut a, &mut b, 99);
    meet(&mut c, &mut d, 99);
    let (mut ab, mut cd) = (a.bootstrap.finish().unwrap(), d.bootstrap.finish().unwrap());
    let mut record = Vec::new();
    ab.0.seal(Kind::Data, &[b"mine"], &mut record).unwrap();
    assert_eq!(opens(&mut cd.1, &record), Err(Refused::Tampered));
    // Two that both connect over one stream are no pair.
    let (mut a, mut b) = (Side::connect(&secret(), b"a"), Side::connect(&secret(), b"b"));
    assert_eq!(a.hears(&b.says(), 99), Err(Refused::Key));
}

#[test]
fn the_first_bytes_tell_who_is_no_peer() {
    let first = Side::connect(&secret(), b"").says();
    let refused = |bytes: &[u8]| Side::accept(&secret(), b"").hears(bytes, 1).unwrap_err();
    assert_eq!(refused(b"G"), Refused::Foreign);
    assert_eq!(refused(b"\x16\x03\x01"), Refused::Foreign);
    assert_eq!(refused(&crate::tcp::handshake::greeting(b"plain")), Refused::Insecure);
    for (at, to, why) in [(8, 2, Refused::Version), (9, 1, Refused::Version), (10, 9, Refused::Foreign)] {
        let mut bytes = first.clone();
        bytes[at] = to;
        assert_eq!(refused(&bytes[..=at]), why);
    }
    let verbs = Session::connect(&secret(), Purpose::Verbs).unwrap();
    assert_eq!(refused(&verbs.output()[..12]), Refused::Purpose);
    // A purpose changed on the way is another prologue.
    let mut bent = verbs.output().to_vec();
    bent[11] = Purpose::Tcp as u8;
    assert_eq!(refused(&bent), Refused::Key);
}

#[test]
fn a_record_left_out_doubled_or_moved_ends_the_session() {
    let lost: [&[usize]; 4] = [&[1], &[0, 0], &[0, 2], &[0, 1, 0]];
    for order in lost {
        let ((mut sealer, _), (_, mut opener)) = session();
        let records: Vec<Vec<u8>> = (0..3u8)
            .map(|i| {
                let mut record = Vec::new();
                sealer.seal(Kind::Data, &[&[i]], &mut record).unwrap();
                record
            })
            .collect();
        let (last, well) = order.split_last().unwrap();
        for at in well {
            assert_eq!(opens(&mut opener, &records[*at]), Ok(vec![*at as u8]));
        }
        assert_eq!(opens(&mut opener, &records[*last]), Err(Refused::Tampered), "{order:?}");
        assert_eq!(opens(&mut opener, &records[well.len()]), Err(Refused::Over), "{order:?}");
    }
    // A record of the other direction.
    let ((mut sealer, mut opener), _) = session();
    let mut record = Vec::new();
    sealer.seal(Kind::Data, &[b"x"], &mut record).unwrap();
    assert_eq!(opens(&mut opener, &record), Err(Refused::Tampered));
}

#[test]
fn keys_change_in_step_and_nonces_end() {
    let (mut sealer, mut opener) = (Sealer::with_rekey([3; 32], 4).unwrap(), Opener::with_rekey([3; 32], 4).unwrap());
    let mut never = Opener::new([3; 32]).unwrap();
    for i in 0..40u8 {
        let mut record = Vec::new();
        sealer.seal(Kind::Data, &[&[i; 100]], &mut record).unwrap();
        assert_eq!(opens(&mut opener, &record).unwrap(), [i; 100]);
        if i <= 4 {
            assert_eq!(opens(&mut never, &record).is_ok(), i < 4, "the key is another after four");
        }
    }
    const { assert!(REKEY.is_power_of_two()) };
    let mut sealer = Sealer::new([3; 32]).unwrap();
    sealer.skip_to(u64::MAX);
    let mut record = Vec::new();
    assert_eq!(sealer.seal(Kind::Data, &[b"x"], &mut record), Err(Refused::Exhausted));
    assert_eq!(record, b"", "nothing half done is left");
}

#[test]
fn records_have_their_limits() {
    let (mut sealer, mut opener) = (Sealer::new([3; 32]).unwrap(), Opener::new([3; 32]).unwrap());
    let mut out = Vec::new();
    assert!(sealer.seal(Kind::Data, &[&vec![0; MAX_PLAIN + 1]], &mut out).is_err());
    assert!(sealer.seal(Kind::Data, &[], &mut out).is_err());
    assert!(sealer.seal(Kind::Ready, &[b"x"], &mut out).is_err());
    assert_eq!(out, b"");
    sealer.seal(Kind::Data, &[&vec![5; MAX_PLAIN]], &mut out).unwrap();
    assert_eq!(out.len(), MAX_PLAIN + OVERHEAD);
    assert_eq!(opener.length(&out[..HEADER - 1]), Ok(None));
    assert_eq!(opener.length(&out), Ok(Some(out.len())));
    assert_eq!(opener.open(&mut out.clone()[..MAX_PLAIN]), Ok(None), "a part is not yet wrong");
    assert_eq!(opens(&mut opener, &out).unwrap(), vec![5; MAX_PLAIN]);
}

/// What a peer with the secret must not say.
#[test]
fn a_member_that_breaks_the_order_is_refused() {
    let head = |len: u32| [&9u64.to_le_bytes()[..], &len.to_le_bytes()].concat();
    let whole = [head(2), b"hi".to_vec()].concat();
    type Said<'a> = &'a [(Kind, Vec<u8>)];
    let cases: [(Said, &str); 7] = [
        (&[(Kind::Ready, vec![])], "ready before the greeting"),
        (&[(Kind::Data, vec![1])], "data before ready"),
        (&[(Kind::Greeting, whole.clone()), (Kind::Data, vec![1])], "data before ready"),
        (&[(Kind::Greeting, whole.clone()), (Kind::Greeting, whole.clone())], "a second greeting"),
        (&[(Kind::Greeting, vec![1; 11])], "a greeting that is cut in its head"),
        (&[(Kind::Greeting, [head(1), b"hi".to_vec()].concat())], "a greeting that is longer than it says"),
        (&[(Kind::Greeting, head(MAX_SEND as u32 + 1))], "a hello over the limit"),
    ];
    for (records, why) in cases {
        let mut member = Session::connect(&secret(), Purpose::Tcp).unwrap();
        let mut side = Side::accept(&secret(), b"answer");
        side.hears(member.output(), 99).unwrap();
        member.feed(&side.says()).unwrap();
        let mut bytes = Vec::new();
        for (kind, content) in records {
            member.seal(*kind, &[content], &mut bytes).unwrap();
        }
        assert_eq!(side.hears(&bytes, 99), Err(Refused::Protocol(why)));
    }
    let mut early = Bootstrap::accept(&secret(), Purpose::Tcp);
    assert!(early.answer(greeting(1, b"")).is_err(), "nobody has spoken yet");
    assert!(early.finish().is_none());
}

#[test]
fn a_secret_does_not_show() {
    assert_eq!(format!("{:?}", Security::Sealed(secret())), "Sealed(Secret(..))");
}
