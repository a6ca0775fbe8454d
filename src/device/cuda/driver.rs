//! A thin layer over the CUDA driver: a context, streams, events, graphs. The
//! library is opened when the first device is asked for, so that the program
//! runs where there is none.

#![allow(unsafe_code)]

use std::ffi::c_int;
use std::mem::MaybeUninit;
use std::sync::Arc;

use cudarc::driver::result;
use cudarc::driver::sys;

pub use super::refusal::failed;
use crate::device::{DeviceError, Result};

/// How many GPUs there are; an error says why none can be used.
pub fn count() -> Result<usize> {
    // SAFETY: looks for the library, and opens it where it is.
    if !unsafe { sys::is_culib_present() } {
        return Err(DeviceError::Unsupported(
            "CUDA: libcuda.so.1, NVIDIA's driver library, is not on this machine".into(),
        ));
    }
    super::symbols::driver()?;
    result::init().map_err(|e| failed("starting the CUDA driver", e))?;
    result::device::get_count().map(|n| n as usize).map_err(|e| failed("counting GPUs", e))
}

/// Where GPU `ordinal` is on the bus, `domain:bus:device.0`; it is not opened.
pub fn address(ordinal: usize) -> Result<String> {
    pci(device(ordinal)?)
}

fn device(ordinal: usize) -> Result<sys::CUdevice> {
    let count = count()?;
    if ordinal >= count {
        return Err(DeviceError::Unsupported(format!("there is no GPU {ordinal}: there are {count}, from 0 on")));
    }
    result::device::get(ordinal as c_int).map_err(|e| failed("opening the GPU", e))
}

/// What a GPU is.
#[derive(Clone, Debug)]
pub struct Properties {
    /// As the driver names it.
    pub name: String,
    /// Compute capability, major and minor.
    pub capability: (u32, u32),
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of memory.
    pub memory: usize,
    /// Bytes of shared memory that a block may have.
    pub shared_memory: u32,
    /// Bytes a second, by the memory's clock and width; 0 where the driver does not
    /// tell. What can be read is less.
    pub memory_bandwidth: u64,
    /// Bytes of the second-level cache.
    pub l2: usize,
    /// CUDA version of the driver, as 13.0 is 13000.
    pub driver: u32,
    /// Its address on the bus, `domain:bus:device.0`.
    pub pci: String,
    /// NUMA node of the host that it hangs at, where known.
    pub numa: Option<u32>,
    /// Memory can be exported as a dma-buf, for a NIC to reach.
    pub dma_buf: bool,
    /// Who sees a NIC's writes into its memory without a flush.
    pub nic_writes: NicWrites,
}

/// Who sees a NIC's writes into a GPU's memory in order, without a flush.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NicWrites {
    /// Nobody: they are to be flushed (`cuFlushGPUDirectRDMAWrites`).
    Flushed,
    /// The GPU itself.
    Owner,
    /// All GPUs.
    All,
}

/// A GPU's primary context, retained while this lives.
pub struct Context {
    device: sys::CUdevice,
    context: sys::CUcontext,
    properties: Properties,
}

// SAFETY: a context is a handle that any thread may make current.
unsafe impl Send for Context {}
// SAFETY: as above; the driver locks within.
unsafe impl Sync for Context {}

impl Context {
    /// Opens GPU `ordinal`.
    pub fn open(ordinal: usize) -> Result<Arc<Self>> {
        let device = device(ordinal)?;
        let properties = properties(device)?;
        // SAFETY: the device was just given by the driver.
        let context =
            unsafe { result::primary_ctx::retain(device) }.map_err(|e| failed("making the GPU's context", e))?;
        let context = Arc::new(Self { device, context, properties });
        context.bind()?;
        Ok(context)
    }

    /// Makes this the calling thread's context. Every thread that uses the GPU
    /// does so first.
    pub fn bind(&self) -> Result<()> {
        // SAFETY: the context is retained while `self` lives.
        unsafe { result::ctx::set_current(self.context) }.map_err(|e| failed("taking the GPU's context", e))
    }

    /// What the GPU is.
    pub fn properties(&self) -> &Properties {
        &self.properties
    }

    /// Bytes of the GPU's memory that are free, of all processes.
    pub fn free_memory(&self) -> Result<usize> {
        self.bind()?;
        result::mem_get_info().map(|(free, _)| free).map_err(|e| failed("asking for free memory", e))
    }

    /// Waits for everything that was given to the GPU.
    pub fn synchronize(&self) -> Result<()> {
        self.bind()?;
        result::ctx::synchronize().map_err(|e| failed("waiting for the GPU", e))
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained once, in `open`. Nothing can be done about a refusal.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}

/// One of a device's figures.
fn attribute(device: sys::CUdevice, which: sys::CUdevice_attribute) -> Result<u32> {
    // SAFETY: the device was given by the driver.
    unsafe { result::device::get_attribute(device, which) }
        .map(|value| value.max(0) as u32)
        .map_err(|e| failed("asking what the GPU is", e))
}

fn pci(device: sys::CUdevice) -> Result<String> {
    use sys::CUdevice_attribute as A;
    Ok(format!(
        "{:04x}:{:02x}:{:02x}.0",
        attribute(device, A::CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID)?,
        attribute(device, A::CU_DEVICE_ATTRIBUTE_PCI_BUS_ID)?,
        attribute(device, A::CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID)?
    ))
}

fn properties(device: sys::CUdevice) -> Result<Properties> {
    use sys::CUdevice_attribute as A;
    let get = |which| attribute(device, which);
    // SAFETY: the device was given by the driver.
    let memory = unsafe { result::device::total_mem(device) }.map_err(|e| failed("asking for the GPU's memory", e))?;
    let mut driver = 0;
    // SAFETY: writes one number.
    unsafe { sys::cuDriverGetVersion(&mut driver) }
        .result()
        .map_err(|e| failed("asking for the driver's version", e))?;
    // SAFETY: the device was given by the driver. Negative: not known.
    let numa = unsafe { result::device::get_attribute(device, A::CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID) };
    let numa = numa.ok().and_then(|node| u32::try_from(node).ok());
    // kHz, twice a clock; bits.
    let clock = get(A::CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE).unwrap_or(0);
    let width = get(A::CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH).unwrap_or(0);
    Ok(Properties {
        name: result::device::get_name(device).map_err(|e| failed("asking for the GPU's name", e))?,
        capability: (
            get(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            get(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        multiprocessors: get(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        memory,
        shared_memory: get(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        memory_bandwidth: 2 * 1000 * u64::from(clock) * u64::from(width) / 8,
        l2: get(A::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)? as usize,
        driver: driver.max(0) as u32,
        pci: pci(device)?,
        numa,
        dma_buf: get(A::CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED).unwrap_or(0) != 0,
        // Numbers of CUGPUDirectRDMAWritesOrdering.
        nic_writes: match get(A::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WRITES_ORDERING) {
            Ok(200..) => NicWrites::All,
            Ok(100..) => NicWrites::Owner,
            Ok(_) | Err(_) => NicWrites::Flushed,
        },
    })
}

/// A queue of work on a GPU.
pub struct Stream {
    context: Arc<Context>,
    stream: sys::CUstream,
}

// SAFETY: a stream is a handle that any thread with the context may use.
unsafe impl Send for Stream {}
// SAFETY: as above; the driver locks within.
unsafe impl Sync for Stream {}

impl Stream {
    /// A stream of the highest (`urgent`) or the lowest priority.
    pub fn new(context: &Arc<Context>, urgent: bool) -> Result<Self> {
        context.bind()?;
        let make = || {
            let (least, greatest) = result::stream::get_priority_range()?;
            let priority = if urgent { greatest } else { least };
            result::stream::create_with_priority(result::stream::StreamKind::NonBlocking, priority)
        };
        let stream = make().map_err(|e| failed("making a stream", e))?;
        Ok(Self { context: context.clone(), stream })
    }

    /// Whose it is.
    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// Waits for everything given to it.
    pub fn synchronize(&self) -> Result<()> {
        // SAFETY: the stream lives.
        unsafe { result::stream::synchronize(self.stream) }.map_err(|e| failed("a step on the GPU", e))
    }

    /// Begins to record what is given to the stream, instead of doing it.
    pub fn begin_capture(&self) -> Result<()> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives.
        unsafe { result::stream::begin_capture(self.stream, mode) }.map_err(|e| failed("recording a step", e))
    }

    /// Ends the recording.
    pub fn end_capture(&self) -> Result<Graph> {
        // SAFETY: the stream lives; the graph is instantiated, then dropped, once.
        unsafe {
            let graph = result::stream::end_capture(self.stream).map_err(|e| failed("recording a step", e))?;
            if graph.is_null() {
                return Err(DeviceError::System("recording a step: the recording was broken off".into()));
            }
            let made = result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0));
            let _ = result::graph::destroy(graph);
            made.map(|exec| Graph { exec }).map_err(|e| failed("making a graph of a step", e))
        }
    }

    /// Gives a recorded step to the GPU.
    pub fn launch(&self, graph: &Graph) -> Result<()> {
        // SAFETY: both live, and what the graph touches lives as long as the device.
        unsafe { result::graph::launch(graph.exec, self.stream) }.map_err(|e| failed("starting a step", e))
    }

    /// The driver's handle.
    pub(super) fn raw(&self) -> sys::CUstream {
        self.stream
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: made in `new`, not used afterwards.
            let _ = unsafe { result::stream::destroy(self.stream) };
        }
    }
}

/// A recorded step.
pub struct Graph {
    exec: sys::CUgraphExec,
}

// SAFETY: a handle, used by one thread at a time.
unsafe impl Send for Graph {}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made in `end_capture`, not used afterwards.
        let _ = unsafe { result::graph::exec_destroy(self.exec) };
    }
}

/// A mark in a stream that can be waited for and, where timed, subtracted.
pub struct Event {
    event: sys::CUevent,
}

// SAFETY: a handle; the driver locks within.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// A mark that is not set yet.
    pub fn new(context: &Context, timed: bool) -> Result<Self> {
        context.bind()?;
        let flags = match timed {
            true => sys::CUevent_flags::CU_EVENT_DEFAULT,
            false => sys::CUevent_flags::CU_EVENT_DISABLE_TIMING,
        };
        result::event::create(flags).map(|event| Self { event }).map_err(|e| failed("making an event", e))
    }

    /// Sets it behind what `stream` was given so far.
    pub fn record(&self, stream: &Stream) -> Result<()> {
        // SAFETY: both live.
        unsafe { result::event::record(self.event, stream.stream) }.map_err(|e| failed("setting an event", e))
    }

    /// Waits until the stream has come by.
    pub fn synchronize(&self) -> Result<()> {
        // SAFETY: it lives.
        unsafe { result::event::synchronize(self.event) }.map_err(|e| failed("a step on the GPU", e))
    }

    /// Milliseconds from `earlier` to this; both were timed and have come by.
    pub fn since(&self, earlier: &Self) -> Result<f32> {
        // SAFETY: both live.
        unsafe { result::event::elapsed(earlier.event, self.event) }.map_err(|e| failed("reading a time", e))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made in `new`, not used afterwards.
        let _ = unsafe { result::event::destroy(self.event) };
    }
}

/// How a kernel is launched.
#[derive(Clone, Copy, Debug)]
pub struct Launch {
    /// Blocks.
    pub grid: (u32, u32, u32),
    /// Threads a block.
    pub block: u32,
    /// Bytes of dynamic shared memory.
    pub shared: u32,
    /// Blocks of a cluster, along the first dimension; 1: no clusters.
    pub cluster: u32,
    /// The kernel waits for its predecessor itself, so that it may start before
    /// that has ended (programmatic dependent launch).
    pub overlaps: bool,
}

/// A kernel in a loaded module.
#[derive(Clone, Copy)]
pub struct Function {
    function: sys::CUfunction,
}

// SAFETY: a handle into a module that lives as long as its context.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

/// Kernels, loaded.
pub struct Module {
    module: sys::CUmodule,
}

// SAFETY: a handle, read by any thread.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

impl Module {
    /// Loads an image (a fat binary).
    pub fn load(context: &Context, name: &str, image: &[u8]) -> Result<Self> {
        context.bind()?;
        // SAFETY: the image is what nvcc wrote, whole; its length is inside it.
        unsafe { result::module::load_data(image.as_ptr().cast()) }
            .map(|module| Self { module })
            .map_err(|e| failed(&format!("loading the kernels of {name}"), e))
    }

    /// A kernel, allowed `shared` bytes of dynamic shared memory.
    pub fn function(&self, name: &str, shared: u32) -> Result<Function> {
        let c_name = std::ffi::CString::new(name).expect("a name without zeros");
        // SAFETY: the module lives.
        let function = unsafe { result::module::get_function(self.module, c_name) }
            .map_err(|e| failed(&format!("looking for the kernel {name}"), e))?;
        if shared > 48 << 10 {
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function was just given.
            unsafe { result::function::set_function_attribute(function, attribute, shared as i32) }
                .map_err(|e| failed(&format!("giving {name} {shared} bytes of shared memory"), e))?;
        }
        Ok(Function { function })
    }
}

impl Function {
    /// Launches it with the parameters whose addresses are in `arguments`.
    ///
    /// # Safety
    ///
    /// The arguments are what the kernel takes, and every address in them is
    /// valid, for what the kernel does with it, until it has run.
    pub unsafe fn launch(self, stream: &Stream, how: Launch, arguments: &mut [*mut std::ffi::c_void]) -> Result<()> {
        // SAFETY: all zeros is a valid attribute (to be ignored).
        let mut attributes: [sys::CUlaunchAttribute; 2] = unsafe { MaybeUninit::zeroed().assume_init() };
        let mut count = 0;
        if how.overlaps {
            attributes[0].id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
            attributes[0].value.programmaticStreamSerializationAllowed = 1;
            count = 1;
        }
        if how.cluster > 1 {
            attributes[count].id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
            attributes[count].value.clusterDim.x = how.cluster;
            attributes[count].value.clusterDim.y = 1;
            attributes[count].value.clusterDim.z = 1;
            count += 1;
        }
        let config = sys::CUlaunchConfig {
            gridDimX: how.grid.0,
            gridDimY: how.grid.1,
            gridDimZ: how.grid.2,
            blockDimX: how.block,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: how.shared,
            hStream: stream.stream,
            attrs: attributes.as_mut_ptr(),
            numAttrs: count as u32,
        };
        // SAFETY: the configuration and the arguments live through the call; the
        // rest is the caller's promise.
        unsafe { sys::cuLaunchKernelEx(&config, self.function, arguments.as_mut_ptr(), std::ptr::null_mut()) }
            .result()
            .map_err(|e| failed("launching a kernel", e))
    }

    /// Clusters of `cluster` blocks, of `block` threads and `shared` bytes, that the
    /// device holds at once.
    pub fn clusters(self, block: u32, shared: u32, cluster: u32) -> Result<u32> {
        // SAFETY: all zeros is a valid attribute (to be ignored).
        let mut attribute: sys::CUlaunchAttribute = unsafe { MaybeUninit::zeroed().assume_init() };
        attribute.id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
        attribute.value.clusterDim.x = cluster;
        attribute.value.clusterDim.y = 1;
        attribute.value.clusterDim.z = 1;
        let config = sys::CUlaunchConfig {
            gridDimX: cluster,
            gridDimY: 1,
            gridDimZ: 1,
            blockDimX: block,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shared,
            hStream: std::ptr::null_mut(),
            attrs: &mut attribute,
            numAttrs: 1,
        };
        let mut count = 0;
        // SAFETY: the configuration lives through the call, which writes one number.
        unsafe { sys::cuOccupancyMaxActiveClusters(&mut count, self.function, &config) }
            .result()
            .map_err(|e| failed("asking how a kernel fits", e))?;
        Ok(count.max(0) as u32)
    }

    /// Blocks of `block` threads and `shared` bytes that one multiprocessor holds.
    pub fn occupancy(self, block: u32, shared: u32) -> Result<u32> {
        // SAFETY: the function lives.
        unsafe { result::occupancy::max_active_block_per_multiprocessor(self.function, block as i32, shared as usize) }
            .map(|n| n.max(0) as u32)
            .map_err(|e| failed("asking how a kernel fits", e))
    }
}
