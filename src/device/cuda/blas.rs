//! Linear layers through cuBLASLt, for steps of many rows: for each shape the
//! fastest of the algorithms that the library proposes, timed once.

#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::sync::Arc;

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;

use super::driver::{Context, Event, Stream};
use super::element::Element;
use super::memory::GpuMemory;
use crate::device::{DeviceError, Result};

/// Scratch of a product; what NVIDIA advises for Hopper.
const WORKSPACE: usize = 32 << 20;
/// Algorithms tried for a shape.
const CANDIDATES: usize = 12;
/// Times that each is run: the first does not count.
const RUNS: usize = 4;

fn failed(what: &str, error: CublasError) -> DeviceError {
    DeviceError::System(format!("cuBLASLt: {what}: {:?}", error.0))
}

/// What becomes of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Into {
    /// Stored in the working precision.
    Working,
    /// Stored in single precision.
    Single,
    /// Added to what is there, in single precision.
    AddSingle,
}

/// `out[rows, outs] (+)= x[rows, ins] · w[outs, ins]ᵀ`, addresses on the device.
#[derive(Clone, Copy, Debug)]
pub struct Product {
    /// Rows.
    pub rows: usize,
    /// Output features.
    pub outs: usize,
    /// Input features.
    pub ins: usize,
    /// Weights.
    pub w: u64,
    /// Activations; rows are `x_stride` elements apart.
    pub x: u64,
    /// Elements from one row of `x` to the next.
    pub x_stride: usize,
    /// Result; rows are `out_stride` elements apart.
    pub out: u64,
    /// Elements from one row of `out` to the next.
    pub out_stride: usize,
    /// What becomes of it.
    pub into: Into,
}

/// Whether the library is on this machine.
pub fn present() -> Result<()> {
    // SAFETY: looks for the library, and opens it where it is.
    match unsafe { sys::is_culib_present() } {
        true => super::symbols::matrices(),
        false => Err(DeviceError::Unsupported(
            "CUDA: libcublasLt.so.13 was not found; it comes with the CUDA toolkit, and as nvidia-cublas from PyPI \
             (name its folder in LD_LIBRARY_PATH)"
                .into(),
        )),
    }
}

type Key = (usize, usize, usize, usize, usize, Into);

/// Descriptors of one shape, and the algorithm chosen for it.
struct Plan {
    operation: sys::cublasLtMatmulDesc_t,
    w: sys::cublasLtMatrixLayout_t,
    x: sys::cublasLtMatrixLayout_t,
    out: sys::cublasLtMatrixLayout_t,
    algorithm: Option<sys::cublasLtMatmulAlgo_t>,
}

/// cuBLASLt, with the shapes that it has met.
pub struct Blas {
    handle: sys::cublasLtHandle_t,
    context: Arc<Context>,
    workspace: GpuMemory,
    element: Element,
    plans: BTreeMap<Key, Plan>,
}

// SAFETY: handles that one thread at a time uses: `Blas` is borrowed mutably.
unsafe impl Send for Blas {}

impl Blas {
    /// Opens the library.
    pub fn new(context: &Arc<Context>, element: Element) -> Result<Self> {
        present()?;
        context.bind()?;
        let workspace = GpuMemory::new(context, WORKSPACE, "the matrix library")?;
        let handle = result::create_handle().map_err(|e| failed("starting", e))?;
        Ok(Self { handle, context: context.clone(), workspace, element, plans: BTreeMap::new() })
    }

    /// Whether the product's shape has been met: its algorithm is chosen.
    pub fn knows(&self, product: &Product) -> bool {
        self.plans.contains_key(&key(product))
    }

    /// Computes it behind what the stream was given. A shape that is new is timed
    /// first, which waits for the stream.
    pub fn run(&mut self, stream: &Stream, product: &Product) -> Result<()> {
        if !self.knows(product) {
            let mut plan = Plan::new(self.element, product).map_err(|e| failed("describing a product", e))?;
            self.tune(stream, product, &mut plan)?;
            self.plans.insert(key(product), plan);
        }
        let plan = &self.plans[&key(product)];
        let algorithm = plan.algorithm.as_ref();
        self.matmul(stream, product, plan, algorithm, product.out).map_err(|e| failed(&format!("{product:?}"), e))
    }

    fn tune(&self, stream: &Stream, product: &Product, plan: &mut Plan) -> Result<()> {
        let found = self.candidates(plan).map_err(|e| failed(&format!("no algorithm for {product:?}"), e))?;
        // A sum must not be added to twice: those of the timing go elsewhere. Other
        // results are written over by the product itself.
        let elsewhere = match product.into {
            Into::AddSingle => {
                let memory = GpuMemory::new(&self.context, product.rows * product.out_stride * 4, "timing products")?;
                memory.fill(stream, 0)?;
                Some(memory)
            }
            Into::Working | Into::Single => None,
        };
        let out = elsewhere.as_ref().map_or(product.out, GpuMemory::address);
        // In a step the weights come from memory, not from the cache: it is
        // emptied before each run.
        let cache = GpuMemory::new(&self.context, 2 * self.context.properties().l2, "timing products")?;
        let marks = [Event::new(&self.context, true)?, Event::new(&self.context, true)?];
        let mut best = f32::INFINITY;
        for algorithm in found {
            let mut fastest = f32::INFINITY;
            for run in 0..RUNS {
                cache.fill(stream, run as u8)?;
                marks[0].record(stream)?;
                if self.matmul(stream, product, plan, Some(&algorithm), out).is_err() {
                    break;
                }
                marks[1].record(stream)?;
                marks[1].synchronize()?;
                if run > 0 {
                    fastest = fastest.min(marks[1].since(&marks[0])?);
                }
            }
            if fastest < best {
                best = fastest;
                plan.algorithm = Some(algorithm);
            }
        }
        if plan.algorithm.is_none() {
            return Err(DeviceError::Unsupported(format!("cuBLASLt has no algorithm that runs {product:?}")));
        }
        tracing::debug!(?product, milliseconds = best, "a product's algorithm was chosen");
        Ok(())
    }

    fn candidates(&self, plan: &Plan) -> std::result::Result<Vec<sys::cublasLtMatmulAlgo_t>, CublasError> {
        let preference = result::create_matmul_pref()?;
        let bytes = WORKSPACE;
        // SAFETY: the attribute is a usize, read during the call; all handles live;
        // the results are plain data of which `count` are written.
        unsafe {
            let attribute = sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
            result::set_matmul_pref_attribute(preference, attribute, (&raw const bytes).cast(), size_of::<usize>())?;
            let mut found: [sys::cublasLtMatmulHeuristicResult_t; CANDIDATES] = std::mem::zeroed();
            let mut count = 0;
            let asked = sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                plan.operation,
                plan.w,
                plan.x,
                plan.out,
                plan.out,
                preference,
                CANDIDATES as i32,
                found.as_mut_ptr(),
                &mut count,
            )
            .result();
            result::destroy_matmul_pref(preference)?;
            asked?;
            Ok(found[..count.max(0) as usize].iter().map(|f| f.algo).collect())
        }
    }

    fn matmul(
        &self,
        stream: &Stream,
        product: &Product,
        plan: &Plan,
        algorithm: Option<&sys::cublasLtMatmulAlgo_t>,
        out: u64,
    ) -> std::result::Result<(), CublasError> {
        let (alpha, beta) = (1.0f32, if product.into == Into::AddSingle { 1.0f32 } else { 0.0 });
        let algorithm = algorithm.map_or(std::ptr::null(), std::ptr::from_ref);
        // SAFETY: the descriptors say what lies at the addresses, which the caller
        // of `run` took from memory that lives as long as the device.
        unsafe {
            result::matmul(
                self.handle,
                plan.operation,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                product.w as *const c_void,
                plan.w,
                product.x as *const c_void,
                plan.x,
                out as *const c_void,
                plan.out,
                out as *mut c_void,
                plan.out,
                algorithm,
                self.workspace.address() as *mut c_void,
                WORKSPACE,
                stream.raw().cast(),
            )
        }
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        // SAFETY: made in `new`; nothing can be done about a refusal.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

fn key(p: &Product) -> Key {
    (p.rows, p.outs, p.ins, p.x_stride, p.out_stride, p.into)
}

impl Plan {
    /// The library is column-major: a row-major `[a, b]` is its `b × a`. So the
    /// result is `outs × rows` = op(W) · X with W, `ins × outs`, transposed.
    fn new(element: Element, p: &Product) -> std::result::Result<Self, CublasError> {
        let working = match element {
            Element::Bf16 => sys::cudaDataType::CUDA_R_16BF,
            Element::F16 => sys::cudaDataType::CUDA_R_16F,
        };
        let single = sys::cudaDataType::CUDA_R_32F;
        let out = if p.into == Into::Working { working } else { single };
        let operation = result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, single)?;
        let transposed = 1i32;
        let attribute = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA;
        // SAFETY: the attribute is an i32, read during the call.
        unsafe {
            result::set_matmul_desc_attribute(operation, attribute, (&raw const transposed).cast(), size_of::<i32>())?;
        }
        let layout = result::create_matrix_layout;
        Ok(Self {
            operation,
            w: layout(working, p.ins as u64, p.outs as u64, p.ins as i64)?,
            x: layout(working, p.ins as u64, p.rows as u64, p.x_stride as i64)?,
            out: layout(out, p.outs as u64, p.rows as u64, p.out_stride as i64)?,
            algorithm: None,
        })
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: made in `new`, not used afterwards; nothing can be done about a
        // refusal.
        unsafe {
            let _ = result::destroy_matmul_desc(self.operation);
            for layout in [self.w, self.x, self.out] {
                let _ = result::destroy_matrix_layout(layout);
            }
        }
    }
}
