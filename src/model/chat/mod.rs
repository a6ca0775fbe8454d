//! Chats to prompts, by the model's own Jinja template in the environment that
//! Hugging Face's transformers gives it.

mod python;

use std::path::Path;
use std::sync::Arc;

use minijinja::value::{Kwargs, Rest, Value as Jinja};
use minijinja::{Environment, Error, ErrorKind, Output, State};
use serde_json::{Map, Value};

use crate::model::error::{ModelError, Result};
use crate::model::load::read_json;
use crate::model::tokenizer::{Tokenizer, special_text};

const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";
/// Instructions that a template may execute: a chat of a thousand messages takes
/// some hundred thousand.
const FUEL: u64 = 10_000_000;

/// A model's chat template. Cheap to clone, usable from any thread.
#[derive(Clone)]
pub struct ChatTemplate {
    shared: Arc<Shared>,
}

struct Shared {
    environment: Environment<'static>,
    /// `bos_token` and the like, as templates see them.
    special: Map<String, Value>,
}

impl ChatTemplate {
    /// The template of a Hugging Face directory: `chat_template.jinja`,
    /// `chat_template.json` or `chat_template` in `tokenizer_config.json`, the
    /// first that is there; `None` where there is none.
    pub fn open(dir: &Path) -> Result<Option<Self>> {
        let config = read_json(&dir.join("tokenizer_config.json"))?.unwrap_or(Value::Null);
        let special = special_tokens(&config);
        let jinja = dir.join("chat_template.jinja");
        match std::fs::read_to_string(&jinja) {
            Ok(template) => return Self::new(&jinja.display().to_string(), &template, special).map(Some),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(ModelError::io(&jinja, e)),
        }
        for (name, json) in [
            ("chat_template.json", read_json(&dir.join("chat_template.json"))?),
            ("tokenizer_config.json", Some(config)),
        ] {
            let file = dir.join(name).display().to_string();
            match json.as_ref().and_then(|json| json.get("chat_template")) {
                None | Some(Value::Null) => {}
                Some(Value::String(template)) => return Self::new(&file, template, special).map(Some),
                Some(Value::Array(list)) => return Self::named(&file, list, special).map(Some),
                Some(_) => return Err(ModelError::field(&file, "chat_template", "neither text nor a list")),
            }
        }
        Ok(None)
    }

    /// One template for every chat; `file` is for messages. `special` are the
    /// variables `bos_token`, `eos_token` and so on.
    pub fn new(file: &str, template: &str, special: Map<String, Value>) -> Result<Self> {
        Self::build(file, [(DEFAULT, template)].into_iter(), special)
    }

    /// With the special tokens of a tokenizer, as for a GGUF.
    pub fn with_tokenizer(file: &str, template: &str, tokenizer: &Tokenizer) -> Result<Self> {
        let mut special = Map::new();
        for (name, id) in [("bos_token", tokenizer.bos()), ("eos_token", tokenizer.eos())] {
            special.insert(name.into(), Value::String(id.map(|id| tokenizer.token_text(id)).unwrap_or_default()));
        }
        Self::new(file, template, special)
    }

    fn named(file: &str, list: &[Value], special: Map<String, Value>) -> Result<Self> {
        let error = |problem: &str| ModelError::field(file, "chat_template", problem);
        let mut templates = Vec::new();
        for entry in list {
            match (entry["name"].as_str(), entry["template"].as_str()) {
                (Some(name @ (DEFAULT | TOOL_USE)), Some(template)) => templates.push((name, template)),
                (Some(_), Some(_)) => {}
                _ => return Err(error("an entry has no name or no template")),
            }
        }
        if !templates.iter().any(|(name, _)| *name == DEFAULT) {
            return Err(error("has no template named \"default\""));
        }
        Self::build(file, templates.into_iter(), special)
    }

    fn build<'t>(
        file: &str,
        templates: impl Iterator<Item = (&'t str, &'t str)>,
        special: Map<String, Value>,
    ) -> Result<Self> {
        let mut environment = Environment::new();
        environment.set_fuel(Some(FUEL));
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_formatter(print);
        environment.add_filter("tojson", to_json);
        environment.add_function("raise_exception", raise_exception);
        environment
            .add_function("strftime_now", |format: &str| python::strftime_utc(format, std::time::SystemTime::now()));
        for (name, template) in templates {
            environment
                .add_template_owned(name.to_owned(), without_generation_tags(template))
                .map_err(|e| ModelError::file(file, format!("the chat template cannot be read: {}", describe(&e))))?;
        }
        Ok(Self { shared: Arc::new(Shared { environment, special }) })
    }

    /// The prompt for `messages` (OpenAI's objects with `role` and `content`)
    /// and `tools` (OpenAI's too); with `add_generation_prompt` it ends where
    /// the assistant's answer begins. The prompt spells out all of its special
    /// tokens: encode it without adding any.
    ///
    /// A template may refuse messages, such as two of the same role in a row:
    /// the error says what it says.
    pub fn render(&self, messages: &[Value], tools: Option<&[Value]>, add_generation_prompt: bool) -> Result<String> {
        self.render_with(messages, tools, add_generation_prompt, &Map::new())
    }

    /// As [`render`](Self::render), with further variables for the template,
    /// e.g. `enable_thinking`.
    pub fn render_with(
        &self,
        messages: &[Value],
        tools: Option<&[Value]>,
        add_generation_prompt: bool,
        variables: &Map<String, Value>,
    ) -> Result<String> {
        let error = |e: Error| ModelError::Chat(describe(&e));
        let environment = &self.shared.environment;
        let template = match tools {
            Some(_) => environment.get_template(TOOL_USE).or_else(|_| environment.get_template(DEFAULT)),
            None => environment.get_template(DEFAULT),
        };
        let mut context = self.shared.special.clone();
        context.extend(variables.iter().map(|(name, value)| (name.clone(), value.clone())));
        context.insert("messages".into(), Value::Array(messages.to_vec()));
        context.insert("tools".into(), tools.map_or(Value::Null, |tools| Value::Array(tools.to_vec())));
        context.insert("documents".into(), Value::Null);
        context.insert("add_generation_prompt".into(), Value::Bool(add_generation_prompt));
        template.map_err(error)?.render(Jinja::from_serialize(&context)).map_err(error)
    }
}

/// The texts of `tokenizer_config.json`'s special tokens.
fn special_tokens(config: &Value) -> Map<String, Value> {
    const NAMES: [&str; 5] = ["bos_token", "eos_token", "unk_token", "pad_token", "sep_token"];
    NAMES
        .into_iter()
        .filter_map(|name| Some((name.to_owned(), Value::String(special_text(config, name)?.to_owned()))))
        .collect()
}

fn describe(error: &Error) -> String {
    match (error.detail(), error.line()) {
        // What the template itself says stands alone.
        (Some(detail), _) if error.kind() == ErrorKind::InvalidOperation => detail.to_owned(),
        (detail, line) => {
            let line = line.map(|line| format!(" (line {line} of the template)")).unwrap_or_default();
            format!("{}{}{line}", error.kind(), detail.map(|d| format!(": {d}")).unwrap_or_default())
        }
    }
}

/// Prints as Python's str does, which is what templates were written for.
fn print(out: &mut Output<'_>, _state: &State<'_, '_>, value: &Jinja) -> std::result::Result<(), Error> {
    out.write_str(&python::str(value)).map_err(|_| Error::new(ErrorKind::WriteFailure, "cannot write"))
}

fn raise_exception(message: &str) -> std::result::Result<String, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message.to_owned()))
}

/// transformers' `tojson`: Python's `json.dumps` with `ensure_ascii=False`.
fn to_json(value: &Jinja, args: Rest<Jinja>, kwargs: Kwargs) -> std::result::Result<String, Error> {
    if !args.is_empty() {
        return Err(Error::new(ErrorKind::TooManyArguments, "tojson takes only named arguments"));
    }
    let indent: Option<usize> = kwargs.get("indent")?;
    let separators: Option<Vec<String>> = kwargs.get("separators")?;
    let options = python::Json {
        ensure_ascii: kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sort_keys: kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        indent,
        separators: match separators.as_deref() {
            None => None,
            Some([item, key]) => Some((item.clone(), key.clone())),
            Some(_) => return Err(Error::new(ErrorKind::InvalidOperation, "separators are two texts")),
        },
    };
    kwargs.assert_all_used()?;
    let value =
        serde_json::to_value(value).map_err(|e| Error::new(ErrorKind::BadSerialization, format!("tojson: {e}")))?;
    Ok(options.dumps(&value))
}

/// Templates mark the assistant's words with `{% generation %}` for training;
/// for a prompt the marks mean nothing, but their whitespace control does.
fn without_generation_tags(template: &str) -> String {
    let mut out = String::with_capacity(template.len());
    let mut rest = template;
    while let Some(start) = rest.find("{%") {
        let Some(len) = rest[start..].find("%}") else { break };
        let inner = &rest[start + 2..start + len];
        let word = inner.trim_matches(['-', '+']).trim();
        out.push_str(&rest[..start + 2]);
        match word {
            "generation" => out.push_str(&inner.replace("generation", "if true")),
            "endgeneration" => out.push_str(&inner.replace("endgeneration", "endif")),
            _ => out.push_str(inner),
        }
        out.push_str("%}");
        rest = &rest[start + len + 2..];
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests;
