//! Reading a JSON object field by field, with errors that name the field and
//! show the value.

use serde_json::{Map, Value};

use crate::model::error::{ModelError, Result};

/// A JSON object of a file, and where in the file it is.
pub(crate) struct Fields<'a> {
    file: &'a str,
    prefix: String,
    map: &'a Map<String, Value>,
}

/// A value as it may appear in a message: short.
pub(crate) fn show(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

impl<'a> Fields<'a> {
    pub fn new(file: &'a str, value: &'a Value) -> Result<Self> {
        let map = value.as_object().ok_or_else(|| ModelError::file(file, "not a JSON object"))?;
        Ok(Self { file, prefix: String::new(), map })
    }

    /// A nested object; `None` where absent or null.
    pub fn object(&self, name: &str) -> Result<Option<Fields<'a>>> {
        match self.raw(name) {
            None => Ok(None),
            Some(Value::Object(map)) => {
                Ok(Some(Fields { file: self.file, prefix: format!("{}{name}.", self.prefix), map }))
            }
            Some(other) => Err(self.error(name, format!("expected an object, found {}", show(other)))),
        }
    }

    pub fn error(&self, name: &str, problem: impl Into<String>) -> ModelError {
        ModelError::field(self.file, format!("{}{name}", self.prefix), problem)
    }

    /// The value; `None` where absent or null.
    pub fn raw(&self, name: &str) -> Option<&'a Value> {
        self.map.get(name).filter(|v| !v.is_null())
    }

    /// Whether the field is there at all, null or not.
    pub fn has(&self, name: &str) -> bool {
        self.map.contains_key(name)
    }

    pub fn iter(&self) -> impl Iterator<Item = (&'a str, &'a Value)> + use<'a> {
        self.map.iter().map(|(name, value)| (name.as_str(), value))
    }

    pub fn string(&self, name: &str) -> Result<Option<&'a str>> {
        self.typed(name, "a string", Value::as_str)
    }

    pub fn bool(&self, name: &str) -> Result<Option<bool>> {
        self.typed(name, "true or false", Value::as_bool)
    }

    /// A finite number.
    pub fn number(&self, name: &str) -> Result<Option<f64>> {
        self.typed(name, "a finite number", |v| v.as_f64().filter(|x| x.is_finite()))
    }

    /// A finite number above 0.
    pub fn positive(&self, name: &str) -> Result<Option<f64>> {
        self.typed(name, "a number above 0", |v| v.as_f64().filter(|x| x.is_finite() && *x > 0.0))
    }

    /// A whole number in `1 ..= limit`.
    pub fn count(&self, name: &str, limit: usize) -> Result<Option<usize>> {
        let what = format!("a whole number from 1 to {limit}");
        self.typed(name, &what, |v| {
            // Some writers turn every number into a float.
            let whole = || v.as_f64().filter(|x| x.fract() == 0.0 && (0.0..9e15).contains(x)).map(|x| x as u64);
            usize::try_from(v.as_u64().or_else(whole)?).ok().filter(|n| (1..=limit).contains(n))
        })
    }

    pub fn required<T>(&self, name: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| self.error(name, "missing"))
    }

    /// One token id or a list of them.
    pub fn tokens(&self, name: &str) -> Result<Option<Vec<u32>>> {
        let id = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        self.typed(name, "a token id or a list of token ids", |v| match v {
            Value::Array(list) => list.iter().map(id).collect(),
            one => Some(vec![id(one)?]),
        })
    }

    fn typed<T>(&self, name: &str, what: &str, read: impl FnOnce(&'a Value) -> Option<T>) -> Result<Option<T>> {
        match self.raw(name) {
            None => Ok(None),
            Some(value) => match read(value) {
                Some(read) => Ok(Some(read)),
                None => Err(self.error(name, format!("expected {what}, found {}", show(value)))),
            },
        }
    }
}
