//! Where the software HCA is.

/// The path of the library, for `DISTKV_LIBIBVERBS` or `Lib::open`: Cargo builds
/// examples along with tests and puts them next to each other.
pub fn path() -> String {
    let test = std::env::current_exe().expect("the test's own path");
    let folder = test.parent().and_then(|deps| deps.parent()).expect("the test is in the target folder's deps");
    let library = folder.join("examples/libsoftware_hca.so");
    assert!(
        library.exists(),
        "{} is not there: cargo build -p distkv-fabric --example software_hca",
        library.display()
    );
    library.into_os_string().into_string().expect("a path in UTF-8")
}
