//! What a node's model runs on.

use std::str::FromStr;

use crate::device::Device;
use crate::device::cpu::{CpuDevice, CpuOptions};
use crate::device::cuda::{CudaDevice, CudaOptions, Element, FENCED_BELOW};
use crate::kv::pool::KvPool;
use crate::kv::rblock::KvShape;

use super::start::{ModelParts, NodeError};

/// Names a device: `cpu`, or `cuda:N`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceName {
    /// The processor's cores.
    #[default]
    Cpu,
    /// A GPU of NVIDIA's.
    Cuda(usize),
}

impl FromStr for DeviceName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let unknown = || format!("`{text}` is no device: `cpu`, or `cuda:0` and so on");
        match text.split_once(':') {
            None if text == "cpu" => Ok(Self::Cpu),
            None if text == "cuda" => Ok(Self::Cuda(0)),
            Some(("cuda", ordinal)) => ordinal.parse().map(Self::Cuda).map_err(|_| unknown()),
            _ => Err(unknown()),
        }
    }
}

impl std::fmt::Display for DeviceName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

/// A device that an engine can be built on.
pub trait EngineDevice: Device + Sized + 'static
where
    Self::Matrix: 'static,
    Self::Vector: 'static,
    Self::Buffer: 'static,
{
    /// Makes it; `pin`: threads stay on their cores.
    fn make(pin: bool, model: &ModelParts) -> Result<Self, NodeError>;

    /// The weights are loaded; makes the pool, of `bytes`, or of all that is left.
    fn pool(&mut self, shape: KvShape, bytes: Option<usize>) -> Result<KvPool, NodeError>;
}

/// Fewest blocks with which an engine can do anything.
const LEAST_BLOCKS: usize = 4;

fn blocks(shape: &KvShape, bytes: usize) -> Result<u32, NodeError> {
    let (block, least) = (shape.block_bytes(), LEAST_BLOCKS * shape.block_bytes());
    match u32::try_from(bytes / block) {
        Ok(blocks) if blocks as usize >= LEAST_BLOCKS => Ok(blocks),
        Ok(blocks) => Err(NodeError::Memory { given: bytes, blocks: blocks as usize, block, least }),
        Err(_) => Ok(u32::MAX),
    }
}

impl EngineDevice for CpuDevice {
    fn make(pin: bool, model: &ModelParts) -> Result<Self, NodeError> {
        let options =
            CpuOptions { threads: model.threads, pin, math: model.math, max_rows: model.schedule.max_rows, isa: None };
        // Before the weights are loaded: what cannot work is found out at once.
        blocks(&model.kv_shape(), model.kv_bytes.unwrap_or(0))?;
        Ok(Self::new(options)?)
    }

    fn pool(&mut self, shape: KvShape, bytes: Option<usize>) -> Result<KvPool, NodeError> {
        Ok(KvPool::new(shape, blocks(&shape, bytes.unwrap_or(0))?)?)
    }
}

impl EngineDevice for CudaDevice {
    fn make(_: bool, model: &ModelParts) -> Result<Self, NodeError> {
        let DeviceName::Cuda(ordinal) = model.device else { unreachable!("asked for by its name") };
        let options = CudaOptions {
            ordinal,
            element: Element::of_kv(model.kv_dtype)?,
            max_rows: model.schedule.max_rows,
            max_seqs: model.schedule.max_sequences,
            graphs: true,
            fenced_below: FENCED_BELOW,
        };
        Ok(Self::new(options)?)
    }

    fn pool(&mut self, shape: KvShape, bytes: Option<usize>) -> Result<KvPool, NodeError> {
        self.loaded()?;
        let bytes = match bytes {
            Some(bytes) => bytes,
            None => {
                let (left, least) = (self.room(shape.dtype)?, LEAST_BLOCKS * shape.block_bytes());
                if left < least {
                    return Err(self.no_pool(left, least).into());
                }
                left
            }
        };
        Ok(CudaDevice::pool(self, shape, blocks(&shape, bytes)? as usize)?)
    }
}
