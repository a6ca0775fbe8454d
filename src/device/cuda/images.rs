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

impl Image {
    /// Whether the file has a kernel of this name, by what the assembler said: a
    /// module that is asked for what it lacks answers with an error, which debuggers
    /// report.
    pub fn has(&self, kernel: &str) -> bool {
        let named = |rest: &str| rest.split('\'').next() == Some(kernel);
        self.report.split("Compiling entry function '").skip(1).any(named)
    }
}

include!(concat!(env!("OUT_DIR"), "/cuda_images.rs"));
