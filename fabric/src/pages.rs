//! Pages larger than the system's usual ones, for memory that is read in sweeps:
//! which there are, and why there are none.

use std::fmt;
use std::fs;
use std::path::Path;

/// Bytes of a large page, where the system has them.
pub const LARGE: usize = 2 << 20;

/// The pages that memory lies on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Pages {
    /// Of 2 MiB, reserved by the system's owner (`vm.nr_hugepages`), all of them
    /// taken from it when the memory was made.
    Reserved,
    /// Of 2 MiB where the kernel finds them when a page is first touched, else of
    /// the usual size.
    Transparent,
    /// Of the system's usual size.
    Usual {
        /// Why not larger ones.
        because: String,
    },
}

impl fmt::Display for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reserved => f.write_str("reserved pages of 2 MiB"),
            Self::Transparent => f.write_str("transparent pages of 2 MiB, where the kernel finds them"),
            Self::Usual { because } => {
                write!(f, "pages of {} KiB ({because})", rustix::param::page_size() >> 10)
            }
        }
    }
}

/// Where the kernel says what pages it has.
pub(crate) const FOLDER: &str = "/sys/kernel/mm";

/// The large pages that `len` bytes take, in bytes; an error where there are none
/// to be had, or where too much of the last one would lie idle.
pub(crate) fn reserved(mm: &Path, len: usize) -> Result<usize, String> {
    if len < LARGE {
        return Err("it is smaller than a large one".into());
    }
    let whole = len.checked_next_multiple_of(LARGE).ok_or("it is larger than all memory")?;
    if whole - len > len / 8 {
        return Err("an eighth and more of large ones would lie idle".into());
    }
    let count = |name: &str| -> Option<usize> {
        let path = mm.join("hugepages/hugepages-2048kB").join(name);
        fs::read_to_string(path).ok()?.trim().parse().ok()
    };
    let Some(free) = count("free_hugepages") else { return Err("this kernel reserves none of 2 MiB".into()) };
    // Promised to others who have not touched them; and those that the kernel
    // would find beside the reserved ones.
    let promised = count("resv_hugepages").unwrap_or(0);
    let beside = count("nr_overcommit_hugepages").unwrap_or(0).saturating_sub(count("surplus_hugepages").unwrap_or(0));
    let needed = whole / LARGE;
    match free.saturating_sub(promised) + beside {
        0 if count("nr_hugepages") == Some(0) => Err("none of 2 MiB are reserved: vm.nr_hugepages is 0".into()),
        there if there < needed => Err(format!("{needed} of 2 MiB are needed, and {there} of those reserved are free")),
        _ => Ok(whole),
    }
}

/// What is set for transparent large pages of shared memory: the error says why
/// there can be none.
pub(crate) fn transparent(mm: &Path) -> Result<(), String> {
    let path = mm.join("transparent_hugepage/shmem_enabled");
    let Ok(text) = fs::read_to_string(&path) else { return Err("this kernel has no transparent ones".into()) };
    match text.split_once('[').and_then(|(_, rest)| rest.split_once(']')) {
        Some((word @ ("never" | "deny"), _)) => Err(format!("transparent ones are off: shmem_enabled is {word}")),
        _ => Ok(()),
    }
}

/// Does a process's `smaps` say that a large page is mapped at `address`?
pub(crate) fn mapped_large(smaps: &str, address: usize) -> bool {
    let mut here = false;
    for line in smaps.lines() {
        let range = line.split_once(' ').and_then(|(range, _)| range.split_once('-'));
        if let Some((from, to)) = range
            && let (Ok(from), Ok(to)) = (usize::from_str_radix(from, 16), usize::from_str_radix(to, 16))
        {
            here = (from..to).contains(&address);
        } else if here && let Some(rest) = line.strip_prefix("ShmemPmdMapped:") {
            return !rest.trim_start().starts_with("0 ");
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A kernel's folder, with its numbers of large pages and what it grants of
    /// transparent ones.
    fn kernel(counts: &[(&str, usize)], shmem: Option<&str>) -> tempfile::TempDir {
        let folder = tempfile::tempdir().expect("a folder");
        let (pages, transparent) =
            (folder.path().join("hugepages/hugepages-2048kB"), folder.path().join("transparent_hugepage"));
        if !counts.is_empty() {
            fs::create_dir_all(&pages).expect("a folder");
        }
        for (name, count) in counts {
            fs::write(pages.join(name), format!("{count}\n")).expect("a file");
        }
        if let Some(shmem) = shmem {
            fs::create_dir_all(&transparent).expect("a folder");
            fs::write(transparent.join("shmem_enabled"), shmem).expect("a file");
        }
        folder
    }

    const MIB: usize = 1 << 20;

    #[test]
    fn reserved_pages_are_taken_where_they_are_free_and_not_wasted() {
        let kernel = kernel(&[("nr_hugepages", 9), ("free_hugepages", 8), ("resv_hugepages", 2)], None);
        let asked = |len| reserved(kernel.path(), len);
        assert_eq!((asked(2 * MIB), asked(12 * MIB)), (Ok(2 * MIB), Ok(12 * MIB)));
        assert_eq!(asked(9 * MIB), Ok(10 * MIB), "a ninth lies idle");
        assert!(asked(7 * MIB).is_err_and(|e| e.contains("lie idle")), "a seventh");
        assert!(asked(2 * MIB - 1).is_err_and(|e| e.contains("smaller")));
        assert_eq!(asked(14 * MIB), Err("7 of 2 MiB are needed, and 6 of those reserved are free".into()));
        assert!(asked(usize::MAX - 5).is_err_and(|e| e.contains("larger than all memory")));
    }

    #[test]
    fn what_the_kernel_would_find_beside_the_reserved_ones_counts() {
        let none = [("nr_hugepages", 0), ("free_hugepages", 0), ("nr_overcommit_hugepages", 0)];
        assert!(reserved(kernel(&none, None).path(), 2 * MIB).is_err_and(|e| e.contains("vm.nr_hugepages is 0")));
        let beside =
            [("nr_hugepages", 3), ("free_hugepages", 0), ("nr_overcommit_hugepages", 4), ("surplus_hugepages", 3)];
        let kernel = kernel(&beside, None);
        assert_eq!(reserved(kernel.path(), 2 * MIB), Ok(2 * MIB));
        assert!(reserved(kernel.path(), 4 * MIB).is_err_and(|e| e.contains("2 of 2 MiB are needed, and 1 of")));
        assert!(reserved(Path::new("/nonexistent"), 2 * MIB).is_err_and(|e| e.contains("this kernel")));
    }

    #[test]
    fn transparent_pages_are_as_the_kernel_says() {
        let said = |text: &str| transparent(kernel(&[], Some(text)).path());
        for word in
            ["[always] within_size advise never deny force", "always within_size [advise] never", "[within_size]"]
        {
            assert_eq!(said(word), Ok(()), "{word}");
        }
        assert!(said("always [never] deny").is_err_and(|e| e.contains("shmem_enabled is never")));
        assert!(said("never [deny]").is_err_and(|e| e.contains("shmem_enabled is deny")));
        assert!(transparent(Path::new("/nonexistent")).is_err_and(|e| e.contains("no transparent ones")));
    }

    #[test]
    fn a_large_page_is_seen_where_it_is_mapped() {
        let smaps = "7f0000000000-7f0000400000 rw-s 00000000 00:01 7 /memfd:distkv (deleted)\n\
                     Size:               4096 kB\nShmemPmdMapped:     2048 kB\nVmFlags: rd wr\n\
                     7f0000400000-7f0000800000 rw-s 00000000 00:01 8 /memfd:distkv (deleted)\n\
                     ShmemPmdMapped:        0 kB\n";
        assert!(mapped_large(smaps, 0x7f00_0000_0000) && mapped_large(smaps, 0x7f00_003f_ffff));
        assert!(!mapped_large(smaps, 0x7f00_0040_0000) && !mapped_large(smaps, 0x7f00_0080_0000));
    }

    #[test]
    fn pages_are_told_in_words() {
        let usual = Pages::Usual { because: "none are reserved".into() }.to_string();
        assert!(usual.starts_with("pages of ") && usual.ends_with(" KiB (none are reserved)"), "{usual}");
        assert_eq!(Pages::Reserved.to_string(), "reserved pages of 2 MiB");
    }
}
