//! Writes small GGUF files for tests.

/// A metadata value.
#[derive(Clone, Debug)]
pub(crate) enum Field<'a> {
    U32(u32),
    F32(f32),
    Bool(bool),
    Str(&'a str),
    Strs(Vec<&'a str>),
    F32s(Vec<f32>),
    I32s(Vec<i32>),
}

/// A tensor: name, dimensions (inner first), ggml's type, bytes.
pub(crate) type Tensor<'a> = (&'a str, Vec<u64>, u32, Vec<u8>);

fn string(text: &str, out: &mut Vec<u8>) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// A version 3 file of these fields and tensors.
pub(crate) fn write(fields: &[(&str, Field<'_>)], tensors: &[Tensor<'_>]) -> Vec<u8> {
    let mut out = Vec::from(*b"GGUF");
    out.extend(3u32.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((fields.len() as u64).to_le_bytes());
    for (name, field) in fields {
        string(name, &mut out);
        let array = |kind: u32, len: usize, out: &mut Vec<u8>| {
            out.extend(9u32.to_le_bytes());
            out.extend(kind.to_le_bytes());
            out.extend((len as u64).to_le_bytes());
        };
        match field {
            Field::U32(n) => out.extend([4u32.to_le_bytes(), n.to_le_bytes()].concat()),
            Field::F32(x) => out.extend([6u32.to_le_bytes(), x.to_le_bytes()].concat()),
            Field::Bool(b) => {
                out.extend(7u32.to_le_bytes());
                out.push(u8::from(*b));
            }
            Field::Str(text) => {
                out.extend(8u32.to_le_bytes());
                string(text, &mut out);
            }
            Field::Strs(list) => {
                array(8, list.len(), &mut out);
                list.iter().for_each(|text| string(text, &mut out));
            }
            Field::F32s(list) => {
                array(6, list.len(), &mut out);
                out.extend(list.iter().flat_map(|x| x.to_le_bytes()));
            }
            Field::I32s(list) => {
                array(5, list.len(), &mut out);
                out.extend(list.iter().flat_map(|x| x.to_le_bytes()));
            }
        }
    }
    let mut offset = 0usize;
    for (name, dims, kind, bytes) in tensors {
        string(name, &mut out);
        out.extend((dims.len() as u32).to_le_bytes());
        dims.iter().for_each(|dim| out.extend(dim.to_le_bytes()));
        out.extend(kind.to_le_bytes());
        out.extend((offset as u64).to_le_bytes());
        offset = (offset + bytes.len()).next_multiple_of(32);
    }
    for (_, _, _, bytes) in tensors {
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend(bytes);
    }
    out
}
