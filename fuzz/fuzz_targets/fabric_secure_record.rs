//! Records with something done to their bytes: what opens is what was sealed,
//! from the first on and in order, and nothing after the first refusal.
#![no_main]

use distkv_fabric::secure::{Kind, Opener, Refused, Sealer};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u16, u8, u8, &[u8])| {
    let (at, change, piece, bytes) = input;
    let mut raw = Opener::new([9; 32]).unwrap();
    assert!(!matches!(raw.open(&mut bytes.to_vec()), Ok(Some(_))), "garbage opened");

    let mut sealer = Sealer::new([1; 32]).unwrap();
    let contents: Vec<&[u8]> = bytes.chunks(usize::from(piece) + 1).collect();
    let mut stream = Vec::new();
    for content in &contents {
        sealer.seal(Kind::Data, &[content], &mut stream).unwrap();
    }
    let sound = stream.clone();
    if !stream.is_empty() {
        let at = usize::from(at) % stream.len();
        match change % 4 {
            0 => stream[at] ^= change | 1,
            1 => drop(stream.remove(at)),
            2 => stream.insert(at, change),
            _ => stream.truncate(at),
        }
    }
    let same = stream.iter().zip(&sound).take_while(|(a, b)| a == b).count();
    let mut opener = Opener::new([1; 32]).unwrap();
    let (mut window, mut opened, mut read) = (&mut stream[..], 0, 0);
    loop {
        match opener.open(window) {
            Ok(Some(record)) => {
                assert_eq!(&window[record.content.clone()], contents[opened]);
                read += record.taken;
                assert!(read <= same, "a changed record opened");
                opened += 1;
                window = &mut window[record.taken..];
            }
            Ok(None) => break,
            Err(refused) => {
                assert_eq!(refused, Refused::Tampered);
                assert_eq!(opener.open(window), Err(Refused::Over));
                break;
            }
        }
    }
});
