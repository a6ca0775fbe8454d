//! A GPU's memory, as far as the fabric knows of it: what its owner says and does
//! so that a NIC can reach it.
#![allow(unsafe_code)]

use std::os::fd::OwnedFd;

/// A GPU's memory as a file that another device's driver can map.
#[derive(Debug)]
pub struct Dmabuf {
    /// The file.
    pub file: OwnedFd,
    /// Where in it the memory begins, bytes.
    pub offset: u64,
    /// Bytes of memory from there on.
    pub len: usize,
}

/// A range of a GPU's memory that a NIC may be given.
///
/// # Safety
///
/// The range is allocated, and nothing of it is lent to code that expects it
/// unchanged, for as long as the value lives.
pub unsafe trait GpuRange: Send + Sync + 'static {
    /// Where it begins, in the GPU's address space, which is the process's.
    fn device_address(&self) -> u64;
    /// Bytes.
    fn bytes(&self) -> usize;
    /// Told before a NIC gets the range, by whichever way: what the GPU's driver
    /// wants done then. An error says what it refused.
    fn prepare(&self) -> std::result::Result<(), String>;
    /// All of it as a dmabuf; an error says why the GPU's driver gives none.
    fn export(&self) -> std::result::Result<Dmabuf, String>;
}
