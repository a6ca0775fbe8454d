//! Where the listening socket lies: a folder that only its user may enter.

use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::key::Token;
use crate::{Error, Result};

/// A path for a socket, in the first folder of these that there is:
/// `$XDG_RUNTIME_DIR`, `/dev/shm`, `/tmp`.
pub(super) fn choose() -> Result<PathBuf> {
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    let candidates = runtime.into_iter().chain(["/dev/shm", "/tmp"].map(PathBuf::from));
    let mut last = None;
    for base in candidates.filter(|base| base.is_absolute() && base.is_dir()) {
        match private(&base) {
            Ok(folder) => {
                sweep(&folder);
                let name: String = Token::random()?.0[..8].iter().map(|byte| format!("{byte:02x}")).collect();
                return Ok(folder.join(format!("{name}.sock")));
            }
            Err(e) => last = Some(e),
        }
    }
    Err(last.unwrap_or_else(|| Error::os("finding a folder for a socket", "set XDG_RUNTIME_DIR to one of yours")))
}

/// The user's own folder in `base`, made if need be.
fn private(base: &Path) -> Result<PathBuf> {
    let user = rustix::process::geteuid().as_raw();
    let folder = base.join(format!("distkv-{user}"));
    match std::fs::DirBuilder::new().mode(0o700).create(&folder) {
        Ok(()) => {}
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
        Err(e) => return Err(Error::os("making a folder for a socket", e)),
    }
    // Someone else may have made it before us, in a folder like /tmp.
    let found = std::fs::symlink_metadata(&folder).map_err(|e| Error::os("looking at the folder of sockets", e))?;
    if !found.is_dir() || found.uid() != user || found.mode() & 0o077 != 0 {
        let why = format!("{} is not a folder that only its owner may enter", folder.display());
        return Err(Error::os("looking at the folder of sockets", why));
    }
    Ok(folder)
}

/// Removes the sockets of processes that are gone. A socket gets its `.sock`
/// name only once it listens, so a refusal means that nobody ever will again.
fn sweep(folder: &Path) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for path in entries.flatten().map(|entry| entry.path()) {
        if path.extension().is_some_and(|ext| ext == "sock") {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let Ok(probe) = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None) else {
                return;
            };
            let Ok(address) = SocketAddrUnix::new(&path) else { continue };
            if rustix::net::connect(&probe, &address) == Err(rustix::io::Errno::CONNREFUSED) {
                let _ = std::fs::remove_file(&path);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_others_may_enter_is_refused() {
        let base = tempfile::tempdir().unwrap();
        let folder = private(base.path()).unwrap();
        assert!(private(base.path()).is_ok(), "it is there already");
        std::fs::set_permissions(&folder, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        assert!(private(base.path()).is_err());
    }

    #[test]
    fn the_sockets_of_the_dead_are_swept_and_those_of_the_living_stay() {
        let base = tempfile::tempdir().unwrap();
        let path = |name: &str| base.path().join(name);
        let listen = |name: &str| super::super::socket::listen(&path(name)).unwrap();
        drop(listen("dead.sock"));
        let _alive = listen("alive.sock");
        std::fs::write(path("else"), "not ours").unwrap();
        sweep(base.path());
        let mut left: Vec<_> = std::fs::read_dir(base.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["alive.sock", "else"]);
    }
}
