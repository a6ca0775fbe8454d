//! The GGUF container, versions 2 and 3, little-endian. Nothing is trusted and
//! nothing is copied: values and names borrow from the file.

use std::collections::HashMap;

use crate::device::tensor::DType;
use crate::model::error::{ModelError, Result};

/// Longest name of a field or tensor that is believed.
const MAX_NAME: usize = 4096;
/// Dimensions of a tensor.
const MAX_DIMS: usize = 4;
/// Arrays inside arrays.
const MAX_NESTING: usize = 2;
/// Smallest encodings, so that a count can be refused before memory is taken:
/// an empty name, a type and one byte; an empty name, no dimension, a type and
/// an offset.
const MIN_FIELD_BYTES: usize = 8 + 4 + 1;
const MIN_TENSOR_BYTES: usize = 8 + 4 + 4 + 8;

/// A metadata value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Value<'a> {
    /// Any unsigned integer.
    U64(u64),
    /// Any signed integer.
    I64(i64),
    /// Any float; f32 are widened.
    F64(f64),
    /// A boolean.
    Bool(bool),
    /// Text.
    Str(&'a str),
    /// An array.
    Array(Array<'a>),
}

impl<'a> Value<'a> {
    /// An integer that is not negative, of whatever width it was stored.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Self::U64(n) => Some(n),
            Self::I64(n) => u64::try_from(n).ok(),
            _ => None,
        }
    }

    /// A number.
    pub fn as_f64(&self) -> Option<f64> {
        match *self {
            Self::F64(x) => Some(x),
            Self::U64(n) => Some(n as f64),
            Self::I64(n) => Some(n as f64),
            _ => None,
        }
    }

    /// A boolean.
    pub fn as_bool(&self) -> Option<bool> {
        match *self {
            Self::Bool(b) => Some(b),
            _ => None,
        }
    }

    /// Text.
    pub fn as_str(&self) -> Option<&'a str> {
        match *self {
            Self::Str(s) => Some(s),
            _ => None,
        }
    }

    /// An array.
    pub fn as_array(&self) -> Option<Array<'a>> {
        match *self {
            Self::Array(a) => Some(a),
            _ => None,
        }
    }
}

/// An array of values of one type, checked when the file was parsed and decoded
/// as it is iterated.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Array<'a> {
    kind: u32,
    len: usize,
    bytes: &'a [u8],
}

impl<'a> Array<'a> {
    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// No element.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The elements, in order.
    pub fn iter(&self) -> impl Iterator<Item = Value<'a>> + use<'a> {
        let mut reader = Reader { file: "", bytes: self.bytes, at: 0 };
        let kind = self.kind;
        // The bytes were read once already, so that this never ends early.
        (0..self.len).map_while(move |_| reader.value(kind, 0).ok())
    }

    /// The elements, if all of them are text.
    pub fn strings(&self) -> Option<impl Iterator<Item = &'a str> + use<'a>> {
        (self.kind == kind::STRING).then(|| self.iter().filter_map(|v| v.as_str()))
    }
}

/// A tensor in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor<'a> {
    /// Name.
    pub name: &'a str,
    /// Dimensions, innermost first (of a matrix: in, out). At least one; their
    /// product fits usize.
    pub dims: Vec<usize>,
    /// Type number of ggml.
    pub kind: u32,
    /// Its first byte in the file.
    pub start: usize,
    /// Bytes, all inside the file; `None` where the type is not one of ours.
    pub len: Option<usize>,
}

impl Tensor<'_> {
    /// Our name of the type, where it is supported.
    pub fn dtype(&self) -> Option<DType> {
        dtype(self.kind)
    }

    /// ggml's name of the type.
    pub fn kind_name(&self) -> String {
        const NAMES: [&str; 31] = [
            "F32", "F16", "Q4_0", "Q4_1", "Q4_2", "Q4_3", "Q5_0", "Q5_1", "Q8_0", "Q8_1", "Q2_K", "Q3_K", "Q4_K",
            "Q5_K", "Q6_K", "Q8_K", "IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S", "IQ2_S", "IQ4_XS",
            "I8", "I16", "I32", "I64", "F64", "IQ1_M", "BF16",
        ];
        match NAMES.get(self.kind as usize) {
            Some(name) => (*name).to_owned(),
            None => format!("number {}", self.kind),
        }
    }

    /// Elements.
    pub fn elements(&self) -> usize {
        self.dims.iter().product()
    }
}

fn dtype(kind: u32) -> Option<DType> {
    Some(match kind {
        0 => DType::F32,
        1 => DType::F16,
        2 => DType::Q4_0,
        3 => DType::Q4_1,
        8 => DType::Q8_0,
        12 => DType::Q4K,
        14 => DType::Q6K,
        30 => DType::Bf16,
        _ => return None,
    })
}

/// A parsed file.
#[derive(Clone, Debug)]
pub struct Gguf<'a> {
    /// For messages.
    pub file: &'a str,
    /// 2 or 3.
    pub version: u32,
    /// Metadata fields in the file's order.
    pub fields: Vec<(&'a str, Value<'a>)>,
    /// Tensors in the file's order.
    pub tensors: Vec<Tensor<'a>>,
    by_field: HashMap<&'a str, usize>,
    by_tensor: HashMap<&'a str, usize>,
    bytes: &'a [u8],
}

impl<'a> Gguf<'a> {
    /// The whole file.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// The metadata field `name`.
    pub fn get(&self, name: &str) -> Option<Value<'a>> {
        self.by_field.get(name).map(|i| self.fields[*i].1)
    }

    /// The tensor `name`.
    pub fn tensor(&self, name: &str) -> Option<&Tensor<'a>> {
        self.by_tensor.get(name).map(|i| &self.tensors[*i])
    }
}

/// ggml's numbers of the metadata types.
mod kind {
    pub const STRING: u32 = 8;
    pub const ARRAY: u32 = 9;
}

/// Parses a whole file. Any bytes give a result or an error, in time and memory
/// in proportion to them.
pub fn parse<'a>(file: &'a str, bytes: &'a [u8]) -> Result<Gguf<'a>> {
    let mut reader = Reader { file, bytes, at: 0 };
    if reader.take(4, "the magic number")? != b"GGUF" {
        return Err(reader.error("not a GGUF file"));
    }
    let version = reader.u32("the version")?;
    if version.swap_bytes() == 2 || version.swap_bytes() == 3 {
        return Err(reader.error("a big-endian GGUF file; only little-endian ones are supported"));
    }
    if version != 2 && version != 3 {
        return Err(reader.error(format!("GGUF version {version} is not supported; 2 and 3 are")));
    }
    let tensor_count = reader.count(MIN_TENSOR_BYTES, "tensors")?;
    let field_count = reader.count(MIN_FIELD_BYTES, "metadata fields")?;

    let mut fields = Vec::with_capacity(field_count);
    let mut by_field = HashMap::with_capacity(field_count);
    for i in 0..field_count {
        let name = reader.name("a metadata field's name")?;
        let kind = reader.u32("a metadata field's type")?;
        let value = reader.value(kind, 0).map_err(|e| match e {
            ModelError::File { file, problem } => ModelError::field(&file, name, problem),
            other => other,
        })?;
        fields.push((name, value));
        if by_field.insert(name, i).is_some() {
            return Err(ModelError::field(file, name, "is there twice"));
        }
    }

    let mut tensors = Vec::with_capacity(tensor_count);
    for _ in 0..tensor_count {
        tensors.push(reader.tensor()?);
    }
    let alignment =
        match by_field.get("general.alignment").map(|i: &usize| fields[*i].1) {
            None => 32,
            Some(value) => value.as_u64().filter(|n| n.is_power_of_two() && *n <= 1 << 20).ok_or_else(|| {
                ModelError::field(file, "general.alignment", format!("{value:?} is not a power of two"))
            })? as usize,
        };
    let data = reader.at.next_multiple_of(alignment);
    let mut by_tensor = HashMap::with_capacity(tensor_count);
    for (i, tensor) in tensors.iter_mut().enumerate() {
        place(tensor, file, data, alignment, bytes.len())?;
        if by_tensor.insert(tensor.name, i).is_some() {
            return Err(ModelError::tensor(file, tensor.name, "is there twice"));
        }
    }
    Ok(Gguf { file, version, fields, tensors, by_field, by_tensor, bytes })
}

/// Turns the tensor's offset into the data section into one into the file and
/// checks that the tensor ends inside it.
fn place(tensor: &mut Tensor<'_>, file: &str, data: usize, alignment: usize, file_len: usize) -> Result<()> {
    let error = |problem: String| Err(ModelError::tensor(file, tensor.name, problem));
    if !tensor.start.is_multiple_of(alignment) {
        return error(format!("its offset {} is not a multiple of the alignment {alignment}", tensor.start));
    }
    let Some(start) = data.checked_add(tensor.start).filter(|start| *start <= file_len) else {
        return error(format!("begins at byte {} after the end of the file; is it truncated?", tensor.start));
    };
    tensor.len = match dtype(tensor.kind) {
        None => None,
        Some(dtype) => {
            if !tensor.dims[0].is_multiple_of(dtype.block_len()) {
                return error(format!("rows of {} are not whole blocks of {dtype}", tensor.dims[0]));
            }
            let Some(len) = dtype.bytes(tensor.elements()) else {
                return error(format!("{:?} of {dtype} is too large", tensor.dims));
            };
            if len > file_len - start {
                let problem = format!("needs {len} bytes, the file has {} left; is it truncated?", file_len - start);
                return error(problem);
            }
            Some(len)
        }
    };
    tensor.start = start;
    Ok(())
}

struct Reader<'a> {
    file: &'a str,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn error(&self, problem: impl Into<String>) -> ModelError {
        ModelError::file(self.file, problem)
    }

    fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    fn take(&mut self, len: usize, what: &str) -> Result<&'a [u8]> {
        if len > self.left() {
            return Err(self.error(format!("truncated: the file ends inside {what}")));
        }
        let taken = &self.bytes[self.at..self.at + len];
        self.at += len;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N, what)?);
        Ok(array)
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A count of things of at least `each` bytes, no more than can be left.
    fn count(&mut self, each: usize, what: &str) -> Result<usize> {
        let count = self.u64(what)?;
        if count > (self.left() / each) as u64 {
            return Err(self.error(format!("truncated or damaged: it cannot hold {count} {what}")));
        }
        Ok(count as usize)
    }

    fn str(&mut self, what: &str) -> Result<&'a str> {
        let len = self.u64(what)?;
        if len > self.left() as u64 {
            return Err(self.error(format!("truncated or damaged: {what} claims {len} bytes")));
        }
        let bytes = self.take(len as usize, what)?;
        std::str::from_utf8(bytes).map_err(|_| self.error(format!("{what} is not UTF-8")))
    }

    fn name(&mut self, what: &str) -> Result<&'a str> {
        let name = self.str(what)?;
        if name.len() > MAX_NAME {
            return Err(self.error(format!("{what} has {} bytes", name.len())));
        }
        Ok(name)
    }

    fn value(&mut self, kind: u32, nesting: usize) -> Result<Value<'a>> {
        const WHAT: &str = "a metadata value";
        Ok(match kind {
            0 => Value::U64(u8::from_le_bytes(self.array(WHAT)?).into()),
            1 => Value::I64(i8::from_le_bytes(self.array(WHAT)?).into()),
            2 => Value::U64(u16::from_le_bytes(self.array(WHAT)?).into()),
            3 => Value::I64(i16::from_le_bytes(self.array(WHAT)?).into()),
            4 => Value::U64(u32::from_le_bytes(self.array(WHAT)?).into()),
            5 => Value::I64(i32::from_le_bytes(self.array(WHAT)?).into()),
            6 => Value::F64(f32::from_le_bytes(self.array(WHAT)?).into()),
            7 => match self.array::<1>(WHAT)? {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                [other] => return Err(self.error(format!("a boolean is {other}"))),
            },
            kind::STRING => Value::Str(self.str(WHAT)?),
            kind::ARRAY => {
                if nesting == MAX_NESTING {
                    return Err(self.error(format!("arrays are nested deeper than {MAX_NESTING}")));
                }
                let kind = self.u32("an array's type")?;
                let len = self.count(smallest(kind), "array elements")?;
                let from = self.at;
                match fixed(kind) {
                    // Nothing to check in numbers but that they are there.
                    Some(each) => {
                        self.take(len * each, "an array")?;
                    }
                    None => {
                        for _ in 0..len {
                            self.value(kind, nesting + 1)?;
                        }
                    }
                }
                Value::Array(Array { kind, len, bytes: &self.bytes[from..self.at] })
            }
            10 => Value::U64(u64::from_le_bytes(self.array(WHAT)?)),
            11 => Value::I64(i64::from_le_bytes(self.array(WHAT)?)),
            12 => Value::F64(f64::from_le_bytes(self.array(WHAT)?)),
            other => return Err(self.error(format!("metadata type {other} is not known"))),
        })
    }

    fn tensor(&mut self) -> Result<Tensor<'a>> {
        let name = self.name("a tensor's name")?;
        let error = |problem: String| ModelError::tensor(self.file, name, problem);
        let rank = self.u32("a tensor's rank")? as usize;
        if rank == 0 || rank > MAX_DIMS {
            return Err(error(format!("has {rank} dimensions; 1 to {MAX_DIMS} are possible")));
        }
        let mut dims = Vec::with_capacity(rank);
        let mut elements = 1usize;
        for _ in 0..rank {
            let dim = self.u64("a tensor's dimensions")?;
            let product = usize::try_from(dim).ok().filter(|d| *d > 0).and_then(|d| elements.checked_mul(d));
            elements =
                product.ok_or_else(|| ModelError::tensor(self.file, name, "its dimensions are 0 or too large"))?;
            dims.push(dim as usize);
        }
        let kind = self.u32("a tensor's type")?;
        let offset = self.u64("a tensor's offset")?;
        let start = usize::try_from(offset)
            .map_err(|_| ModelError::tensor(self.file, name, format!("its offset {offset} is too large")))?;
        Ok(Tensor { name, dims, kind, start, len: None })
    }
}

/// Bytes of every value of a metadata type that has a fixed size and admits all
/// bit patterns.
fn fixed(kind: u32) -> Option<usize> {
    match kind {
        0 | 1 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}

/// Bytes of the smallest value of a metadata type.
fn smallest(kind: u32) -> usize {
    match kind {
        kind::STRING => 8,
        kind::ARRAY => 12,
        other => fixed(other).unwrap_or(1),
    }
}
