//! A linear layer's weights on the CPU: one packed form for decode, prefill and
//! embedding lookups.
#![allow(unsafe_code)]

use half::bf16;

use super::buffer::{Aligned, Shared};
use super::format::{Bf16, F16, F32, Format};
use super::format_blocks::{Q4, Q4K, Q4M, Q6K, Q8};
use super::simd::PANEL;
use super::threads::ThreadPool;
use crate::device::tensor::{DType, RawTensor};
use crate::device::{DeviceError, Result, fp8};
use crate::e4m3;

/// Runs `$body` with the type `$F` standing for the packed format of `$dtype`.
macro_rules! with_format {
    ($dtype:expr, $F:ident => $body:expr) => {{
        use $crate::device::cpu::{format, format_blocks};
        match $dtype {
            $crate::device::tensor::DType::F32 => {
                type $F = format::F32;
                $body
            }
            $crate::device::tensor::DType::F16 => {
                type $F = format::F16;
                $body
            }
            $crate::device::tensor::DType::Bf16 => {
                type $F = format::Bf16;
                $body
            }
            $crate::device::tensor::DType::F8E4m3 => unreachable!("FP8 is widened when it is packed"),
            $crate::device::tensor::DType::Q8_0 => {
                type $F = format_blocks::Q8;
                $body
            }
            $crate::device::tensor::DType::Q4_0 => {
                type $F = format_blocks::Q4;
                $body
            }
            $crate::device::tensor::DType::Q4_1 => {
                type $F = format_blocks::Q4M;
                $body
            }
            $crate::device::tensor::DType::Q4K => {
                type $F = format_blocks::Q4K;
                $body
            }
            $crate::device::tensor::DType::Q6K => {
                type $F = format_blocks::Q6K;
                $body
            }
        }
    }};
}
pub(super) use with_format;

/// Input features of a packed group of `dtype`.
pub(super) const fn group_k(dtype: DType) -> usize {
    match dtype {
        DType::F32 => F32::K,
        DType::F16 => F16::K,
        DType::Bf16 => Bf16::K,
        DType::F8E4m3 => unreachable!(),
        DType::Q8_0 => Q8::K,
        DType::Q4_0 => Q4::K,
        DType::Q4_1 => Q4M::K,
        DType::Q4K => Q4K::K,
        DType::Q6K => Q6K::K,
    }
}

/// Consecutive output features of one dtype, in panels of 32 (the last one
/// filled up with zeros).
pub(super) struct Segment {
    pub dtype: DType,
    /// First output feature.
    pub first: usize,
    pub outs: usize,
    /// Groups along the input features.
    pub groups: usize,
    panel_bytes: usize,
    data: Aligned,
}

impl Segment {
    pub fn panels(&self) -> usize {
        self.outs.div_ceil(PANEL)
    }

    /// The packed groups of a panel.
    pub fn panel(&self, panel: usize) -> &[u8] {
        &self.data.bytes()[panel * self.panel_bytes..][..self.panel_bytes]
    }

    /// Output features of a panel that are not filling.
    pub fn panel_outs(&self, panel: usize) -> usize {
        (self.outs - panel * PANEL).min(PANEL)
    }

    fn pack<F: Format>(first: usize, cols: usize, parts: &[RawTensor<'_>], threads: &mut ThreadPool) -> Result<Self> {
        let outs = parts.iter().map(|p| p.rows).sum::<usize>();
        let groups = cols.div_ceil(F::K);
        let panel_bytes = groups * F::BYTES;
        let panels = outs.div_ceil(PANEL);
        let total = panels
            .checked_mul(panel_bytes)
            .ok_or_else(|| DeviceError::OutOfMemory(format!("weights of {outs} × {cols}")))?;
        let mut data = Aligned::zeroed(total)?;
        let target = Shared::new(&mut data.bytes_mut()[..total]);
        threads.run(panels, 1, &|_, range| {
            for panel in range {
                // SAFETY: each panel is packed by one thread.
                let bytes = unsafe { target.range(panel * panel_bytes..(panel + 1) * panel_bytes) };
                for lane in 0..PANEL.min(outs - panel * PANEL) {
                    let mut out = panel * PANEL + lane;
                    let Some(part) = parts.iter().find(|part| {
                        let inside = out < part.rows;
                        out -= if inside { 0 } else { part.rows };
                        inside
                    }) else {
                        continue;
                    };
                    let row = part.bytes.len() / part.rows;
                    let row = &part.bytes[out * row..][..row];
                    for (raw, group) in row.chunks(F::RAW).zip(bytes.chunks_exact_mut(F::BYTES)) {
                        if raw.len() == F::RAW {
                            F::pack(raw, lane, group);
                        } else {
                            // An odd number of input features in pairs.
                            let mut whole = [0; 4];
                            whole[..raw.len()].copy_from_slice(raw);
                            F::pack(&whole[..F::RAW], lane, group);
                        }
                    }
                }
            }
        });
        Ok(Self { dtype: parts[0].dtype, first, outs, groups, panel_bytes, data })
    }

    fn read_row<F: Format>(&self, out: usize, row: &mut [f32]) {
        let mut whole = [0.0; 256];
        for (group, row) in self.panel(out / PANEL).chunks_exact(F::BYTES).zip(row.chunks_mut(F::K)) {
            F::unpack_lane(group, out % PANEL, &mut whole[..F::K]);
            row.copy_from_slice(&whole[..row.len()]);
        }
    }
}

/// Weights `[outs, cols]`: parts stacked along the output features.
pub struct Matrix {
    segments: Vec<Segment>,
    outs: usize,
    cols: usize,
}

impl Matrix {
    pub(super) fn new(parts: &[RawTensor<'_>], threads: &mut ThreadPool) -> Result<Self> {
        let Some(cols) = parts.first().map(|p| p.cols) else {
            return Err(DeviceError::Unsupported("a matrix of no parts".into()));
        };
        for part in parts {
            check(part, cols)?;
        }
        let widened = parts.iter().map(|part| widen(part, threads)).collect::<Result<Vec<_>>>()?;
        let parts: Vec<RawTensor<'_>> = parts
            .iter()
            .zip(&widened)
            .map(|(part, widened)| match widened {
                Some(bytes) => RawTensor { dtype: DType::Bf16, bytes, stored: None, scales: None, ..*part },
                None => *part,
            })
            .collect();
        let mut matrix = Self { segments: Vec::new(), outs: 0, cols };
        for same in parts.chunk_by(|a, b| a.dtype == b.dtype) {
            let segment = with_format!(same[0].dtype, F => Segment::pack::<F>(matrix.outs, cols, same, threads))?;
            matrix.outs += segment.outs;
            matrix.segments.push(segment);
        }
        Ok(matrix)
    }

    /// Output features.
    pub fn outs(&self) -> usize {
        self.outs
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        self.segments.iter().map(|s| s.panels() * s.panel_bytes).sum()
    }

    pub(super) fn panels(&self) -> usize {
        self.segments.iter().map(Segment::panels).sum()
    }

    pub(super) fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// Writes the weights of one output feature, `[cols]`.
    pub fn read_row(&self, out: usize, row: &mut [f32]) {
        for segment in &self.segments {
            if (segment.first..segment.first + segment.outs).contains(&out) {
                with_format!(segment.dtype, F => segment.read_row::<F>(out - segment.first, row));
            }
        }
    }

    /// The parts of segments that a range of panels, counted over all of them,
    /// covers.
    pub(super) fn for_panels(
        &self,
        panels: std::ops::Range<usize>,
        mut visit: impl FnMut(&Segment, std::ops::Range<usize>),
    ) {
        let mut before = 0;
        for segment in &self.segments {
            let start = panels.start.clamp(before, before + segment.panels()) - before;
            let end = panels.end.clamp(before, before + segment.panels()) - before;
            if start < end {
                visit(segment, start..end);
            }
            before += segment.panels();
        }
    }
}

/// FP8 weights as bf16, since that is what they are held in: code times scale in
/// f32, rounded to nearest even. The memory is that of a bf16 model.
fn widen(part: &RawTensor<'_>, threads: &mut ThreadPool) -> Result<Option<Vec<u8>>> {
    let Some(scales) = part.scales else { return Ok(None) };
    let row_bytes = 2 * part.cols;
    let mut bytes = vec![0; part.rows * row_bytes];
    let target = Shared::new(&mut bytes);
    threads.run(part.rows, 16, &|_, range| {
        for row in range {
            // SAFETY: each row is widened by one thread.
            let out = unsafe { target.range(row * row_bytes..(row + 1) * row_bytes) };
            let codes = part.bytes[row * part.cols..][..part.cols].chunks(scales.block.1);
            let out = out.chunks_mut(scales.block.1.saturating_mul(2));
            for ((codes, out), scale) in codes.zip(out).zip(scales.row(row, part.cols)) {
                for (&code, out) in codes.iter().zip(out.as_chunks_mut::<2>().0) {
                    *out = bf16::from_f32(e4m3::to_f32(code) * scale).to_le_bytes();
                }
            }
        }
    });
    Ok(Some(bytes))
}

/// Refuses a part whose bytes do not fit its shape or its neighbours.
pub(super) fn check(part: &RawTensor<'_>, cols: usize) -> Result<()> {
    if part.cols != cols {
        return Err(DeviceError::Unsupported(format!("stacking matrices of {cols} and {} input features", part.cols)));
    }
    let bytes = part.dtype.bytes(part.cols).and_then(|row| row.checked_mul(part.rows));
    if bytes != Some(part.bytes.len()) || part.rows == 0 || part.cols == 0 {
        return Err(DeviceError::Unsupported(format!(
            "a {} matrix of {} × {} in {} bytes",
            part.dtype,
            part.rows,
            part.cols,
            part.bytes.len()
        )));
    }
    fp8::check(part)
}
