//! The kernels' machine code, embedded when the program is built.

/// The kernels of one file of `cuda/`.
#[derive(Clone, Copy, Debug)]
pub struct Image {
    /// The file's name.
    pub name: &'static str,
    /// A fat binary: code for several kinds of GPU, and PTX for newer ones.
    pub code: &'static [u8],
    /// What the assembler said of registers, shared memory and spills.
    pub report: &'static str,
}

include!(concat!(env!("OUT_DIR"), "/cuda_images.rs"));
