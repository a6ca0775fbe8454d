//! Fields of a request's JSON object, read so that every error names the field.

use axum::body::Bytes;
use serde_json::{Map, Value};

use super::error::ApiError;
use super::reply::blocking;

/// Bytes of JSON that take longer to parse than a thread change costs.
const LARGE: usize = 64 << 10;

/// A request's JSON object. An explicit null counts as absent, as OpenAI has
/// it.
pub(super) struct Fields(Map<String, Value>);

impl Fields {
    /// Parses a body; a large one off the threads that serve connections.
    pub(super) async fn of(body: Bytes) -> Result<Self, ApiError> {
        if body.len() <= LARGE { Self::parse(&body) } else { blocking(move || Self::parse(&body)).await }
    }

    fn parse(body: &[u8]) -> Result<Self, ApiError> {
        match serde_json::from_slice(body) {
            Ok(Value::Object(map)) => Ok(Self(map)),
            Ok(other) => Err(ApiError::invalid(format!("the body must be a JSON object, not {}", name(&other)))),
            // serde_json's message ends with the line and the column.
            Err(error) => Err(ApiError::invalid(format!("the body is not valid JSON: {error}"))),
        }
    }

    pub(super) fn get(&self, field: &str) -> Option<&Value> {
        self.0.get(field).filter(|value| !value.is_null())
    }

    fn read<T>(&self, field: &str, what: &str, read: impl Fn(&Value) -> Option<T>) -> Result<Option<T>, ApiError> {
        match self.get(field) {
            None => Ok(None),
            Some(value) => read(value).map(Some).ok_or_else(|| wrong(field, what, value)),
        }
    }

    pub(super) fn bool(&self, field: &str) -> Result<Option<bool>, ApiError> {
        self.read(field, "true or false", Value::as_bool)
    }

    pub(super) fn f32(&self, field: &str) -> Result<Option<f32>, ApiError> {
        self.read(field, "a number", |value| value.as_f64().map(|v| v as f32))
    }

    pub(super) fn i64(&self, field: &str) -> Result<Option<i64>, ApiError> {
        self.read(field, "an integer", Value::as_i64)
    }

    /// A non-negative integer.
    pub(super) fn count(&self, field: &str) -> Result<Option<usize>, ApiError> {
        self.read(field, "an integer of at least 0", |value| value.as_u64().and_then(|v| usize::try_from(v).ok()))
    }

    /// Any 64-bit seed, negative ones too.
    pub(super) fn seed(&self, field: &str) -> Result<Option<u64>, ApiError> {
        self.read(field, "an integer", |value| value.as_u64().or_else(|| value.as_i64().map(|v| v as u64)))
    }

    pub(super) fn string(&self, field: &str) -> Result<Option<&str>, ApiError> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(value) => Err(wrong(field, "a string", value)),
        }
    }

    pub(super) fn array(&self, field: &str) -> Result<Option<&Vec<Value>>, ApiError> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::Array(values)) => Ok(Some(values)),
            Some(value) => Err(wrong(field, "an array", value)),
        }
    }

    pub(super) fn object(&self, field: &str) -> Result<Option<&Map<String, Value>>, ApiError> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(map)),
            Some(value) => Err(wrong(field, "an object", value)),
        }
    }
}

/// `field` has the wrong type.
pub(super) fn wrong(field: &str, what: &str, value: &Value) -> ApiError {
    ApiError::field(field, format!("`{field}` must be {what}, not {}", name(value)))
}

/// A value in an error message: its type, and itself where that is short.
fn name(value: &Value) -> String {
    match value {
        Value::Null => "null".into(),
        Value::Bool(_) => format!("the boolean {value}"),
        Value::Number(_) => format!("the number {value}"),
        Value::String(text) if text.chars().count() <= 32 => format!("the string {value}"),
        Value::String(_) => "a string".into(),
        Value::Array(_) => "an array".into(),
        Value::Object(_) => "an object".into(),
    }
}

/// Token ids below `vocab` from a JSON array.
pub(super) fn token_ids(field: &str, values: &[Value], vocab: usize) -> Result<Vec<u32>, ApiError> {
    values
        .iter()
        .map(|value| match value.as_u64() {
            Some(id) if (id as usize) < vocab && u32::try_from(id).is_ok() => Ok(id as u32),
            Some(id) => {
                Err(ApiError::field(field, format!("`{field}`: token {id} is outside the vocabulary of {vocab}")))
            }
            None => Err(wrong(field, "made of token ids", value)),
        })
        .collect()
}
