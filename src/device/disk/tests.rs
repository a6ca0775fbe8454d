//! The reader beside plain reads of the same files.

#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;
use rustix::fs::Advice;

use super::block::{Block, Next, Way};
use super::cached::{Looker, Share, count};
use super::*;

/// Ordinary memory of whole pages.
struct Plain(*mut [Page]);

#[repr(align(4096))]
#[derive(Clone)]
struct Page(#[allow(dead_code)] [u8; 4096]);

impl Plain {
    fn new(bytes: usize) -> Self {
        Self(Box::into_raw(vec![Page([0xee; 4096]); bytes / 4096].into_boxed_slice()))
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        // SAFETY: made by `Box::into_raw`, dropped once.
        drop(unsafe { Box::from_raw(self.0) });
    }
}

// SAFETY: the pages stay where they are on the heap until it is dropped.
unsafe impl Room for Plain {
    fn pointer(&self) -> *mut u8 {
        self.0.cast()
    }

    fn size(&self) -> usize {
        self.0.len() * 4096
    }
}

fn content(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u8
    };
    (0..len).map(|_| next()).collect()
}

/// A file that is on the disk.
fn write(path: &Path, bytes: &[u8]) -> Arc<StoredFile> {
    std::fs::write(path, bytes).unwrap();
    File::open(path).unwrap().sync_all().unwrap();
    Arc::new(StoredFile::open(path).unwrap())
}

/// Asks the system to forget a range of a file.
fn forget(file: &StoredFile, range: Range<u64>) {
    rustix::fs::fadvise(file.file(), range.start, std::num::NonZeroU64::new(range.end - range.start), Advice::DontNeed)
        .unwrap();
}

/// Reads runs of bytes, each into a piece of its own, and gives them in order.
fn read_all(reader: &mut Reader<Plain>, file: &Arc<StoredFile>, runs: &[Range<usize>]) -> Result<Vec<Vec<u8>>, String> {
    let mut found = Vec::new();
    let mut out = VecDeque::new();
    let mut take = |reader: &mut Reader<Plain>, wait: bool| -> Result<bool, String> {
        let Some(piece) = reader.next(wait)? else { return Ok(false) };
        found.push(reader.bytes(&piece).to_vec());
        out.push_back(piece);
        // Some stay out for a while.
        while out.len() > 2 {
            out.pop_front();
            reader.give_back();
        }
        Ok(true)
    };
    for run in runs {
        let from = Stored { file, offset: run.start as u64 };
        while !reader.begin(from, run.len())? {
            if !take(reader, true)? {
                reader.give_back();
            }
        }
        take(reader, false)?;
    }
    while take(reader, true)? {}
    Ok(found)
}

fn read_one(reader: &mut Reader<Plain>, file: &Arc<StoredFile>, run: Range<usize>) -> Result<Vec<u8>, String> {
    read_all(reader, file, std::slice::from_ref(&run)).map(|mut found| found.remove(0))
}

fn how() -> impl Strategy<Value = How> {
    (1usize..40_000, 1usize..9, 1usize..4, any::<bool>(), any::<bool>())
        .prop_map(|(block, depth, threads, io_uring, direct)| How { block, depth, threads, io_uring, direct })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Any runs of a file, of any alignment, cached or not, in any way.
    #[test]
    fn what_is_read_is_what_the_file_holds(
        len in 1usize..300_000,
        how in how(),
        pages in 4usize..64,
        wanted in prop::collection::vec((0.0f64..1.0, 0.0f64..1.0), 1..24),
        forgotten in prop::collection::vec((0.0f64..1.0, 0.0f64..1.0), 0..4),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let bytes = content(len, len as u64);
        let file = write(&dir.path().join("weights"), &bytes);
        let span = |&(a, b): &(f64, f64)| {
            let (a, b) = ((a * len as f64) as usize, (b * len as f64) as usize);
            a.min(b)..a.max(b) + 1
        };
        forgotten.iter().map(span).for_each(|range| forget(&file, range.start as u64..range.end as u64));
        let mut reader = Reader::new(Plain::new(pages * 4096), how).unwrap();
        let most = reader.most();
        prop_assume!(most > 0);
        let runs: Vec<Range<usize>> =
            wanted.iter().map(span).map(|run| run.start..run.end.min(run.start + most)).collect();
        let found = read_all(&mut reader, &file, &runs).unwrap();
        prop_assert_eq!(found.len(), runs.len());
        for (run, found) in runs.iter().zip(&found) {
            prop_assert!(bytes[run.clone()] == found[..], "bytes {:?} of {}", run, len);
        }
        let sums = reader.sums();
        prop_assert_eq!(sums.total(), runs.iter().map(|r| r.len() as u64).sum::<u64>());
        prop_assert!(how.direct || sums.direct == 0);
        prop_assert_eq!((reader.waiting(), sums.copied), (0, 0));
    }
}

#[test]
fn cached_blocks_come_from_the_cache_and_the_others_from_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = content(4 << 20, 5);
    let file = write(&dir.path().join("weights"), &bytes);
    let whole = 0..bytes.len() as u64;
    for mut looker in [Looker::new(), Looker::that_samples()] {
        assert_eq!(looker.look(&file, whole.clone()), Share::All);
        assert_eq!(looker.resident(file.file(), &(5000..9000)), 2);
    }
    forget(&file, whole.clone());
    let how = How { block: 256 << 10, depth: 3, threads: 2, io_uring: true, direct: true };
    if count(file.file(), &whole) != Some(0) || file.direct().is_err() {
        // A filesystem in memory forgets nothing, and a kernel before 6.5 does not
        // say what it has forgotten.
        let mut reader = Reader::new(Plain::new(16 << 20), how).unwrap();
        assert!(read_one(&mut reader, &file, 0..bytes.len()).unwrap() == bytes);
        return;
    }
    assert_eq!(Looker::that_samples().look(&file, whole.clone()), Share::None);
    let second_megabyte_alone = || {
        // A page that is still on its way for a sample is not forgotten at once.
        let forgotten = (0..10_000).any(|_| {
            forget(&file, whole.clone());
            std::thread::sleep(std::time::Duration::from_millis(1));
            count(file.file(), &whole) == Some(0)
        });
        assert!(forgotten, "the cache keeps the file");
        file.buffered().read_exact_at(&mut vec![0; 1 << 20], 1 << 20).unwrap();
    };
    second_megabyte_alone();
    assert_eq!(Looker::new().resident(file.file(), &whole), 256);
    for mut looker in [Looker::new(), Looker::that_samples()] {
        assert_eq!(looker.look(&file, whole.clone()), Share::Some);
        assert_eq!(looker.look(&file, 1 << 20..2 << 20), Share::All);
    }
    for io_uring in [true, false] {
        second_megabyte_alone();
        let mut reader = Reader::new(Plain::new(16 << 20), How { io_uring, ..how }).unwrap();
        let runs = [0..1 << 20, 1 << 20..2 << 20, 1 << 19..3 << 20];
        let found = read_all(&mut reader, &file, &runs).unwrap();
        for (run, found) in runs.into_iter().zip(found) {
            assert!(bytes[run] == found[..]);
        }
        let cached = 2 << 20;
        assert_eq!(reader.sums(), Sums { direct: (7 << 19) + (1 << 20) - cached, cached, ..Sums::default() });
        // What came directly has left nothing in the cache.
        assert_eq!(count(file.file(), &(2 << 20..3 << 20)), Some(0));
    }
}

#[test]
fn a_file_that_ends_early_is_an_error_that_says_where() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("weights");
    let bytes = content(200_000, 9);
    for (io_uring, direct) in [(true, true), (false, true), (true, false)] {
        for (cut, forgotten) in [(150_001u64, true), (150_001, false), (147_456, true), (10, true)] {
            let file = write(&path, &bytes);
            let how = How { block: 64 << 10, depth: 2, threads: 2, io_uring, direct };
            let mut reader = Reader::new(Plain::new(1 << 20), how).unwrap();
            OpenOptions::new().write(true).open(&path).unwrap().set_len(cut).unwrap();
            file.file().sync_all().unwrap();
            if forgotten {
                forget(&file, 0..bytes.len() as u64);
            }
            // Up to the end all is well, and to the byte.
            let until = cut as usize;
            assert!(read_one(&mut reader, &file, 0..until).unwrap() == bytes[..until]);
            let error = read_one(&mut reader, &file, until - 7..until + 1).unwrap_err();
            assert!(error.contains("weights: reading bytes "), "{error}");
            assert!(error.ends_with(&format!("the file ends at byte {cut}")), "{error}");
            // Far behind the end there is nothing at all.
            let mut reader = Reader::new(Plain::new(1 << 20), how).unwrap();
            let error = read_one(&mut reader, &file, 180_000..190_000).unwrap_err();
            assert!(error.contains("the file ends"), "{error}");
        }
    }
}

#[test]
fn a_piece_of_more_blocks_than_the_queue_holds_comes_whole() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = content(1 << 20, 3);
    let file = write(&dir.path().join("weights"), &bytes);
    for depth in [1, 2, 7] {
        forget(&file, 0..bytes.len() as u64);
        let how = How { block: 4096, depth, threads: 1, io_uring: true, direct: true };
        let mut reader = Reader::new(Plain::new(4 << 20), how).unwrap();
        let found = read_all(&mut reader, &file, &[1..bytes.len() - 1, 0..bytes.len()]).unwrap();
        assert!(found[0] == bytes[1..bytes.len() - 1] && found[1] == bytes);
    }
}

#[test]
fn a_read_that_is_refused_is_an_error_that_names_the_file() {
    let dir = tempfile::tempdir().unwrap();
    // A folder can be opened, but the system refuses every read.
    let file = Arc::new(StoredFile::new(File::open(dir.path()).unwrap(), "weights of mine".into()));
    let mut reader = Reader::new(Plain::new(1 << 20), How::default()).unwrap();
    let error = read_one(&mut reader, &file, 4_000..90_000).unwrap_err();
    assert!(error.starts_with("weights of mine: reading bytes 4000 to 90000: Is a directory"), "{error}");
    let beyond = Stored { file: &file, offset: u64::MAX - 3 };
    assert!(reader.begin(beyond, 100).unwrap_err().contains("weights of mine"));
}

#[test]
fn a_file_that_takes_no_direct_reads_goes_through_the_cache() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = content(300_000, 2);
    let file = write(&dir.path().join("weights"), &bytes);
    forget(&file, 0..bytes.len() as u64);
    file.refuse("not today".into());
    assert_eq!(file.direct().unwrap_err(), "not today");
    let mut reader = Reader::new(Plain::new(1 << 20), How::default()).unwrap();
    assert!(read_one(&mut reader, &file, 77..bytes.len()).unwrap() == bytes[77..]);
    let sums = reader.sums();
    assert_eq!((sums.direct, sums.through + sums.cached), (0, bytes.len() as u64 - 77));
}

#[test]
fn memory_may_go_while_reads_are_under_way() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = content(8 << 20, 4);
    let file = write(&dir.path().join("weights"), &bytes);
    for round in 0..12 {
        forget(&file, 0..bytes.len() as u64);
        let how = How { block: 32 << 10, depth: 64, threads: 3, io_uring: round % 2 == 0, direct: round % 3 > 0 };
        let mut reader = Reader::new(Plain::new(8 << 20), how).unwrap();
        assert!(reader.begin(Stored { file: &file, offset: 5 }, 3 << 20).unwrap());
        assert!(reader.begin(Stored { file: &file, offset: 4 << 20 }, 3 << 20).unwrap());
        assert_eq!(reader.waiting(), 2);
        drop(reader);
    }
}

#[test]
fn memory_of_the_process_is_copied_in_between() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = content(50_000, 6);
    let file = write(&dir.path().join("weights"), &bytes);
    let mut reader = Reader::new(Plain::new(64 << 10), How::default()).unwrap();
    assert!(reader.copy(b"before"));
    assert!(reader.begin(Stored { file: &file, offset: 49_000 }, 1000).unwrap());
    assert!(reader.copy(b"behind"));
    let pieces: Vec<_> = (0..3).map(|_| reader.next(true).unwrap().unwrap()).collect();
    let found: Vec<&[u8]> = pieces.iter().map(|piece| reader.bytes(piece)).collect();
    assert_eq!(found, [&b"before"[..], &bytes[49_000..], b"behind"]);
    assert_eq!(reader.next(true), Ok(None));
    assert_eq!((reader.handed(), reader.sums().copied), (3, 12));
    // One, two and one pages are taken of sixteen, now six and six more.
    assert!(reader.copy(&bytes[..24_000]) && reader.copy(&bytes[..24_000]) && !reader.copy(b"full"));
    reader.give_back();
    assert!(reader.copy(b"where the first was") && !reader.copy(b"full"));
    let pieces: Vec<_> = (0..3).map(|_| reader.next(false).unwrap().unwrap()).collect();
    assert_eq!((reader.bytes(&pieces[1]), reader.bytes(&pieces[2])), (&bytes[..24_000], &b"where the first was"[..]));
    assert_eq!((reader.handed(), reader.waiting()), (5, 0));
}

/// What systems may answer to a read, one by one.
#[test]
fn a_read_that_comes_short_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let file = write(&dir.path().join("weights"), &content(100_000, 8));
    let room = Plain::new(16 << 10);
    let block = |way| {
        // SAFETY: nothing is read into it here.
        unsafe { Block::new(0, &file, way, 8192, 12_288, 9_000, 8_000, room.pointer()) }
    };
    let place = |block: &Block| (block.rest().0, block.rest().1.addr() - room.pointer().addr(), block.rest().2);
    let system = |error: i32| Err(io::Error::from_raw_os_error(error));

    let mut direct = block(Way::Direct);
    assert_eq!(place(&direct), (8192, 0, 12_288));
    assert_eq!((direct.advance(Ok(5_000)), place(&direct)), (Next::Again, (12_288, 4096, 8192)));
    assert_eq!((direct.advance(system(libc::EINTR)), place(&direct)), (Next::Again, (12_288, 4096, 8192)));
    assert_eq!(direct.advance(Ok(4_904)), Next::Over);
    assert_eq!(direct.failed, None);

    // The same bytes once more are no progress: the file ends in them.
    let mut direct = block(Way::Direct);
    assert_eq!(direct.advance(Ok(5_000)), Next::Again);
    assert_eq!(direct.advance(Ok(904)), Next::Over);
    assert!(direct.failed.unwrap().ends_with("reading bytes 8192 to 17192: the file ends at byte 13192"));

    let mut cached = block(Way::Cached);
    assert_eq!((cached.advance(Ok(5_000)), place(&cached)), (Next::Again, (13_192, 5_000, 4_000)));
    assert_eq!(cached.advance(Ok(0)), Next::Over);
    assert!(cached.failed.is_some());

    let mut refused = block(Way::Direct);
    assert!(matches!(refused.advance(system(libc::EINVAL)), Next::Refused(because) if because.contains("Invalid")));
    refused.restart(Way::Through);
    assert_eq!(place(&refused), (8192, 0, 9_000));
    assert_eq!(refused.advance(system(libc::EINVAL)), Next::Over);
    assert!(refused.failed.is_some());

    let mut broken = block(Way::Direct);
    assert_eq!(broken.advance(system(libc::EIO)), Next::Over);
    assert!(broken.failed.unwrap().contains("weights: reading bytes 8192 to 17192: Input/output error"));
}
