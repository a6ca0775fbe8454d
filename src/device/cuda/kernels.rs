//! The kernels, loaded, and how each is launched.

#![allow(unsafe_code)]

use std::ffi::c_void;

use cudarc::driver::sys::CUtensorMap;

use super::driver::{Context, Function, Launch, Module, Stream};
use super::element::Element;
use super::images::{IMAGES, WITHOUT_KERNELS};
use crate::device::{DeviceError, Result};

/// All kernels of this program, on one GPU.
pub struct Kernels {
    modules: Vec<Module>,
    element: Element,
}

impl Kernels {
    /// Loads them.
    pub fn load(context: &Context, element: Element) -> Result<Self> {
        if IMAGES.is_empty() {
            return Err(DeviceError::Unsupported(format!("CUDA: this program has no CUDA kernels: {WITHOUT_KERNELS}")));
        }
        let (major, minor) = context.properties().capability;
        if major < 8 {
            return Err(DeviceError::Unsupported(format!(
                "CUDA: {} has compute capability {major}.{minor}; the kernels need 8.0 (A100) or newer",
                context.properties().name
            )));
        }
        let modules =
            IMAGES.iter().map(|image| Module::load(context, image.name, image.code)).collect::<Result<_>>()?;
        Ok(Self { modules, element })
    }

    /// A kernel that is the same for all element types, allowed `shared` bytes of
    /// dynamic shared memory.
    pub fn plain(&self, name: &str, shared: u32) -> Result<Kernel> {
        let missing = || DeviceError::System(format!("this program has no kernel {name}"));
        let image = IMAGES.iter().position(|image| image.has(name)).ok_or_else(missing)?;
        Ok(Kernel { function: self.modules[image].function(name, shared)?, shared })
    }

    /// A kernel for the device's element type.
    pub fn typed(&self, name: &str, shared: u32) -> Result<Kernel> {
        self.plain(&format!("{name}_{}", self.element.suffix()), shared)
    }
}

/// A kernel with the shared memory that it is launched with.
#[derive(Clone, Copy)]
pub struct Kernel {
    function: Function,
    shared: u32,
}

/// The shape of a launch.
#[derive(Clone, Copy, Debug)]
pub struct Grid {
    /// Blocks.
    pub blocks: (u32, u32, u32),
    /// Threads a block.
    pub threads: u32,
    /// Blocks of a cluster, along the first dimension.
    pub cluster: u32,
}

impl Grid {
    /// So many blocks of so many threads.
    pub fn new(blocks: usize, threads: u32) -> Self {
        Self { blocks: (blocks.max(1) as u32, 1, 1), threads, cluster: 1 }
    }
}

impl Kernel {
    /// The same with other shared memory, of at most what it was allowed.
    pub fn with_shared(self, shared: u32) -> Self {
        assert!(shared <= self.shared, "a kernel's shared memory");
        Self { shared, ..self }
    }

    /// Launches it behind what the stream was given, to run when that has ended.
    ///
    /// # Safety
    ///
    /// `arguments` is the struct that the kernel takes, and every address in it is
    /// valid for what the kernel does with it (`cuda/api.h`).
    pub unsafe fn launch<T: bytemuck::Pod>(self, stream: &Stream, grid: Grid, arguments: &T) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.start(stream, grid, &mut [std::ptr::from_ref(arguments).cast_mut().cast()], false) }
    }

    /// As [`launch`](Self::launch), for a kernel that waits for its predecessor
    /// itself, so that it may start before that has ended.
    ///
    /// # Safety
    ///
    /// As there, and the kernel waits before it touches what others write.
    pub unsafe fn overlap<T: bytemuck::Pod>(self, stream: &Stream, grid: Grid, arguments: &T) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.start(stream, grid, &mut [std::ptr::from_ref(arguments).cast_mut().cast()], true) }
    }

    /// As [`launch`](Self::launch) (or, where `overlaps`, [`overlap`](Self::overlap)),
    /// with a tensor map behind the struct.
    ///
    /// # Safety
    ///
    /// As there, and the map is of memory that is valid likewise.
    pub unsafe fn launch_with_map<T: bytemuck::Pod>(
        self,
        stream: &Stream,
        grid: Grid,
        arguments: &T,
        map: &TensorMap,
        overlaps: bool,
    ) -> Result<()> {
        let arguments = std::ptr::from_ref(arguments).cast_mut().cast();
        // SAFETY: the caller's promise.
        unsafe { self.start(stream, grid, &mut [arguments, std::ptr::from_ref(&map.0).cast_mut().cast()], overlaps) }
    }

    /// As [`overlap`](Self::overlap), with a struct that is no plain data for Rust.
    ///
    /// # Safety
    ///
    /// As there, and `arguments` points to what the kernel takes.
    pub unsafe fn overlap_raw(self, stream: &Stream, grid: Grid, arguments: *const c_void) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.start(stream, grid, &mut [arguments.cast_mut()], true) }
    }

    /// Clusters of so many blocks that the device holds at once.
    pub fn clusters(self, threads: u32, cluster: u32) -> Result<u32> {
        self.function.clusters(threads, self.shared, cluster)
    }

    unsafe fn start(self, stream: &Stream, grid: Grid, arguments: &mut [*mut c_void], overlaps: bool) -> Result<()> {
        let how =
            Launch { grid: grid.blocks, block: grid.threads, shared: self.shared, cluster: grid.cluster, overlaps };
        // SAFETY: the caller's promise.
        unsafe { self.function.launch(stream, how, arguments) }
    }

    /// Blocks of so many threads that one multiprocessor holds.
    pub fn occupancy(self, threads: u32) -> Result<u32> {
        self.function.occupancy(threads, self.shared)
    }
}

/// Where the copy engine finds the pieces of a matrix, and how it lays them out
/// in shared memory.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct TensorMap(CUtensorMap);

/// How rows of a piece are spread over the banks of shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Swizzle {
    /// As they are.
    None,
    /// Within 64 bytes.
    Bytes64,
    /// Within 128 bytes.
    Bytes128,
}

/// A matrix in the device's memory and the piece that is copied at once.
pub struct Tensor<'a> {
    /// Where it begins; a multiple of 16.
    pub address: u64,
    /// Elements of each dimension, the innermost first.
    pub dims: &'a [u64],
    /// Bytes from one element to the next of each dimension but the innermost.
    pub strides: &'a [u64],
    /// Elements of a piece.
    pub piece: &'a [u32],
    /// See [`Swizzle`].
    pub swizzle: Swizzle,
    /// Bytes that a miss brings to the second-level cache: 128 or 256.
    pub promotion: u32,
}

impl TensorMap {
    /// Describes a matrix of the working precision to the copy engine.
    pub fn new(element: Element, tensor: &Tensor<'_>) -> Result<Self> {
        use cudarc::driver::sys;
        let kind = match element {
            Element::Bf16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            Element::F16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        };
        let swizzle = match tensor.swizzle {
            Swizzle::None => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_NONE,
            Swizzle::Bytes64 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_64B,
            Swizzle::Bytes128 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
        };
        let promotion = match tensor.promotion {
            256 => sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            _ => sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        };
        let rank = tensor.dims.len();
        assert!(tensor.strides.len() + 1 == rank && tensor.piece.len() == rank, "a tensor of one rank");
        let steps = vec![1u32; rank];
        // SAFETY: all zeros is a valid map, of nothing; the call reads arrays of
        // `rank` (strides: one fewer) elements and writes the map.
        unsafe {
            let mut map: CUtensorMap = std::mem::zeroed();
            sys::cuTensorMapEncodeTiled(
                &mut map,
                kind,
                rank as u32,
                tensor.address as *mut c_void,
                tensor.dims.as_ptr(),
                tensor.strides.as_ptr(),
                tensor.piece.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle,
                promotion,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
            .result()
            .map_err(|e| super::driver::failed("describing a matrix to the copy engine", e))?;
            Ok(Self(map))
        }
    }

    /// Its bytes, for kernels that read it from memory.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: plain data, without padding, of this size.
        unsafe { std::slice::from_raw_parts(std::ptr::from_ref(&self.0).cast(), size_of::<CUtensorMap>()) }
    }
}
