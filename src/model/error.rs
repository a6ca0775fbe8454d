//! What can be wrong with a model on disk.

use std::path::{Path, PathBuf};

/// A model could not be read. Every variant names the file or the field, so
/// that the one line it prints says where to look.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The system refused to read or map a file.
    #[error("{}: {source}", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A configuration field is missing, malformed, or asks for mathematics
    /// that this engine does not do.
    #[error("{file}: `{field}`: {problem}")]
    Field {
        /// Which file.
        file: String,
        /// Field, with dots for nesting: `rope_scaling.rope_type`.
        field: String,
        /// Its value and what is wrong with it.
        problem: String,
    },
    /// A tensor is missing, unexpected, of a wrong shape or of a wrong type.
    #[error("{file}: tensor `{tensor}`: {problem}")]
    Tensor {
        /// Which file.
        file: String,
        /// The tensor's name in that file.
        tensor: String,
        /// What is wrong.
        problem: String,
    },
    /// A file as a whole is damaged or not what it should be.
    #[error("{file}: {problem}")]
    File {
        /// Which file.
        file: String,
        /// What is wrong.
        problem: String,
    },
    /// Text could not be turned into tokens or back.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// A chat could not be rendered by the model's template.
    #[error("chat template: {0}")]
    Chat(String),
}

/// Result of reading a model.
pub type Result<T> = std::result::Result<T, ModelError>;

impl ModelError {
    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        Self::Io { path: path.to_owned(), source }
    }

    pub(crate) fn field(file: &str, field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Field { file: file.to_owned(), field: field.into(), problem: problem.into() }
    }

    pub(crate) fn tensor(file: &str, tensor: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Tensor { file: file.to_owned(), tensor: tensor.into(), problem: problem.into() }
    }

    pub(crate) fn file(file: &str, problem: impl Into<String>) -> Self {
        Self::File { file: file.to_owned(), problem: problem.into() }
    }
}
