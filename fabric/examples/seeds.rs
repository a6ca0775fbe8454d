//! Writes first inputs for the fuzz targets of `secure`, where cargo-fuzz looks
//! for them: a fuzzer does not come by a handshake by chance.
//!
//!     cargo run -p distkv-fabric --example seeds fuzz/corpus

use std::fs;
use std::path::Path;

use distkv_fabric::secure::{Purpose, Secret, Session};

fn main() -> std::io::Result<()> {
    let folder = std::env::args().nth(1).unwrap_or_else(|| "fuzz/corpus".into());
    let secret = Secret::new([7; 32]);
    let session = |purpose| Session::connect(&secret, purpose).map_err(std::io::Error::other);
    // A stranger: 0, cut, bytes. A member: 1, cut, then kind, length, content.
    let mut bootstrap = Vec::new();
    for purpose in [Purpose::Tcp, Purpose::Verbs] {
        bootstrap.push([&[0, 59], session(purpose)?.output()].concat());
    }
    let greeting = [&[0, 17], &7u64.to_le_bytes()[..], &5u32.to_le_bytes(), b"hello"].concat();
    bootstrap.push([&[1, 3], &greeting[..], &[1, 0]].concat());
    bootstrap.push([&[1, 255], &greeting[..], &greeting, &[2, 1, 9]].concat());
    let cut = [&[0, 14], &7u64.to_le_bytes()[..], &5u32.to_le_bytes(), b"he", &[0, 3], b"llo", &[1, 0]].concat();
    bootstrap.push([&[1, 9], &cut[..]].concat());
    // Where, what is done there, bytes a record, content.
    let record = (0..4u8).map(|change| [&[40, 0, change, 9], &b"thirty bytes in three records."[..]].concat());
    // Verbs: an endpoint in an offer and in an answer, a key shown, the two kinds
    // of target, a bye, and a note of what landed.
    let endpoint = [&[1, 1], &[0; 18][..], &[9, 0, 0, 0, 7, 0, 0, 0, 0, 16, 32, 0, 0, 32, 0, 0], &[5; 8]].concat();
    let verbs = vec![
        [&[1], &endpoint[..], &[0; 4], b"hello"].concat(),
        [&[2], &endpoint[..]].concat(),
        [&[5, 3, 0, 0, 0], &[9; 16][..]].concat(),
        [&[6, 3, 0, 0, 0, 0], &[0; 8][..], &[1, 2, 3, 4], &4096u64.to_le_bytes()].concat(),
        [&[6, 3, 0, 0, 0, 1], &[0; 8][..], &[1, 2, 3, 4], &[0, 0, 4, 0, 8, 0, 0, 0]].concat(),
        [&[7], &64u64.to_le_bytes()[..]].concat(),
        [&[3, 0, 0, 0, 64, 0, 0, 0], &[0; 8][..], &[1, 0, 0, 0, 6, 0, 0, 0]].concat(),
    ];
    let targets = [
        ("fabric_secure_bootstrap", bootstrap),
        ("fabric_secure_record", record.collect()),
        ("fabric_verbs_wire", verbs),
    ];
    for (target, inputs) in targets {
        let folder = Path::new(&folder).join(target);
        fs::create_dir_all(&folder)?;
        for (i, input) in inputs.iter().enumerate() {
            fs::write(folder.join(format!("seed-{i}")), input)?;
        }
        println!("{} inputs in {}", inputs.len(), folder.display());
    }
    Ok(())
}
