//! A tokenizer from GGUF metadata: byte-level BPE ("gpt2") with the pre-
//! tokenizer that `tokenizer.ggml.pre` names, or SentencePiece BPE ("llama").

use tokenizers::decoders::DecoderWrapper;
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as Decoders;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::{BPE, BpeBuilder, Vocab};
use tokenizers::normalizers::{NormalizerWrapper, Prepend, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior, Tokenizer as Inner};

use crate::model::error::{ModelError, Result};
use crate::model::gguf::{Array, Gguf};
use crate::model::tokenizer::Tokenizer;

const TOKENS: &str = "tokenizer.ggml.tokens";
/// Longest SentencePiece token that is believed, in bytes.
const MAX_PIECE: usize = 1024;

/// GGUF's token types.
mod kind {
    pub const UNKNOWN: u64 = 2;
    pub const CONTROL: u64 = 3;
    pub const USER_DEFINED: u64 = 4;
}

/// How a text is cut before byte-level BPE.
struct PreTokenizer {
    /// Applied one after the other, each to the pieces of the one before.
    splits: &'static [&'static str],
    /// A piece that is a token as a whole is not put together from merges.
    ignore_merges: bool,
    /// Whether texts begin with the bos token unless the file says otherwise.
    add_bos: bool,
}

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

fn pre_tokenizer(name: &str) -> Option<PreTokenizer> {
    let plain = |splits| PreTokenizer { splits, ignore_merges: false, add_bos: false };
    Some(match name {
        "default" => plain(&[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"]),
        "gpt-2" | "gpt2" | "phi-2" => plain(&[GPT2]),
        "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" => plain(&[r"\p{N}", GPT2]),
        "qwen2" | "deepseek-r1-qwen" | "stablelm2" => plain(&[QWEN2]),
        "llama3" | "llama-v3" | "llama-bpe" => PreTokenizer { splits: &[LLAMA3], ignore_merges: true, add_bos: true },
        "smaug-bpe" => plain(&[LLAMA3]),
        "tekken" => PreTokenizer { splits: &[TEKKEN], ignore_merges: true, add_bos: false },
        _ => return None,
    })
}

/// Builds the tokenizer; `None` where the file has none.
pub(super) fn build(gguf: &Gguf<'_>) -> Result<Option<Tokenizer>> {
    let Some(model) = gguf.get("tokenizer.ggml.model") else { return Ok(None) };
    let field = |name: &str, problem: String| ModelError::field(gguf.file, name, problem);
    let tokens = array(gguf, TOKENS)?.ok_or_else(|| field(TOKENS, "missing".into()))?;
    let tokens: Vec<&str> = match tokens.strings() {
        Some(strings) => strings.collect(),
        None => return Err(field(TOKENS, "not an array of text".into())),
    };
    let kinds: Vec<u64> = match array(gguf, "tokenizer.ggml.token_type")? {
        Some(kinds) => kinds.iter().map(|v| v.as_u64().unwrap_or(0)).collect(),
        None => vec![1; tokens.len()],
    };
    if kinds.len() != tokens.len() {
        let problem = format!("{} entries for {} tokens", kinds.len(), tokens.len());
        return Err(field("tokenizer.ggml.token_type", problem));
    }

    let (mut inner, add_bos) = match model.as_str() {
        Some("gpt2") => byte_level(gguf, &tokens)?,
        Some("llama") => sentence_piece(gguf, &tokens, &kinds)?,
        _ => {
            let problem = format!("{:?} is not supported; \"gpt2\" and \"llama\" are", model.as_str().unwrap_or("?"));
            return Err(field("tokenizer.ggml.model", problem));
        }
    };
    for (text, kind) in tokens.iter().zip(&kinds).filter(|(text, _)| !text.is_empty()) {
        let token = |special| AddedToken::from((*text).to_owned(), special).normalized(false);
        match *kind {
            kind::CONTROL | kind::UNKNOWN => inner.add_special_tokens(&[token(true)]),
            kind::USER_DEFINED => inner.add_tokens(&[token(false)]),
            _ => 0,
        };
    }
    let id = |name: &str| crate::model::gguf::token_id(gguf, name, tokens.len());
    let (bos, eos) = (id("bos")?, id("eos")?);
    let prefix = bos.filter(|_| flag(gguf, "tokenizer.ggml.add_bos_token").unwrap_or(add_bos));
    let suffix = eos.filter(|_| flag(gguf, "tokenizer.ggml.add_eos_token").unwrap_or(false));
    Tokenizer::new(gguf.file, inner, prefix, suffix, bos, eos).map(Some)
}

fn array<'a>(gguf: &Gguf<'a>, name: &str) -> Result<Option<Array<'a>>> {
    match gguf.get(name) {
        None => Ok(None),
        Some(value) => value.as_array().map(Some).ok_or_else(|| ModelError::field(gguf.file, name, "not an array")),
    }
}

fn flag(gguf: &Gguf<'_>, name: &str) -> Option<bool> {
    gguf.get(name)?.as_bool()
}

fn model(gguf: &Gguf<'_>, builder: BpeBuilder) -> Result<BPE> {
    builder.build().map_err(|e| ModelError::field(gguf.file, "tokenizer.ggml.merges", e.to_string()))
}

fn ids(tokens: &[&str]) -> Vocab {
    tokens.iter().enumerate().map(|(id, text)| ((*text).to_owned(), id as u32)).collect()
}

fn byte_level(gguf: &Gguf<'_>, tokens: &[&str]) -> Result<(Inner, bool)> {
    let name = gguf.get("tokenizer.ggml.pre").and_then(|v| v.as_str()).ok_or_else(|| {
        let problem = "missing: how this vocabulary cuts text is unknown; convert the model again";
        ModelError::field(gguf.file, "tokenizer.ggml.pre", problem)
    })?;
    let pre = pre_tokenizer(name)
        .ok_or_else(|| ModelError::field(gguf.file, "tokenizer.ggml.pre", format!("\"{name}\" is not supported")))?;
    let merges_error = |problem: String| ModelError::field(gguf.file, "tokenizer.ggml.merges", problem);
    let list = array(gguf, "tokenizer.ggml.merges")?.and_then(|a| a.strings());
    let mut merges = Vec::new();
    for merge in list.ok_or_else(|| merges_error("missing or not an array of text".into()))? {
        // A space is spelt Ġ, so that the first one after the first character
        // separates.
        let pair = merge.char_indices().nth(1).and_then(|(from, _)| {
            let at = from + merge[from..].find(' ')?;
            Some((merge[..at].to_owned(), merge[at + 1..].to_owned()))
        });
        merges.push(pair.ok_or_else(|| merges_error(format!("{merge:?} is not a pair")))?);
    }
    let builder = BPE::builder().vocab_and_merges(ids(tokens), merges).ignore_merges(pre.ignore_merges);
    let mut inner = Inner::new(model(gguf, builder)?);
    let mut steps: Vec<PreTokenizerWrapper> = Vec::new();
    for pattern in pre.splits {
        let pattern = SplitPattern::Regex((*pattern).to_owned());
        let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false)
            .map_err(|e| ModelError::Tokenizer(format!("pre-tokenizer {name}: {e}")))?;
        steps.push(split.into());
    }
    steps.push(ByteLevel::new(false, false, false).into());
    inner.with_pre_tokenizer(Some(PreTokenizers::new(steps)));
    inner.with_decoder(Some(ByteLevel::new(false, false, false)));
    Ok((inner, pre.add_bos))
}

fn sentence_piece(gguf: &Gguf<'_>, tokens: &[&str], kinds: &[u64]) -> Result<(Inner, bool)> {
    let scores_error = |problem: String| ModelError::field(gguf.file, "tokenizer.ggml.scores", problem);
    let scores = array(gguf, "tokenizer.ggml.scores")?.ok_or_else(|| scores_error("missing".into()))?;
    let scores: Vec<f64> = scores.iter().map_while(|v| v.as_f64().filter(|x| !x.is_nan())).collect();
    if scores.len() != tokens.len() {
        return Err(scores_error(format!("{} numbers for {} tokens", scores.len(), tokens.len())));
    }
    let unknown = crate::model::gguf::token_id(gguf, "unknown", tokens.len())?;
    let unknown = unknown.map(|id| tokens[id as usize]).or_else(|| {
        let at = kinds.iter().position(|kind| *kind == kind::UNKNOWN)?;
        Some(tokens[at])
    });
    if let Some(token) = tokens.iter().find(|token| token.len() > MAX_PIECE) {
        return Err(ModelError::field(gguf.file, TOKENS, format!("a token has {} bytes", token.len())));
    }
    let vocab = ids(tokens);
    let merges = merges_of_scores(tokens, &scores, &vocab);
    let mut builder = BPE::builder().vocab_and_merges(vocab, merges).byte_fallback(true).fuse_unk(true);
    if let Some(unknown) = unknown {
        builder = builder.unk_token(unknown.to_owned());
    }
    let mut inner = Inner::new(model(gguf, builder)?);
    let prepend = flag(gguf, "tokenizer.ggml.add_space_prefix").unwrap_or(true);
    let mark = |e: tokenizers::Error| ModelError::Tokenizer(e.to_string());
    let mut normal: Vec<NormalizerWrapper> = Vec::new();
    if prepend {
        normal.push(Prepend::new("▁".into()).into());
    }
    normal.push(Replace::new(" ", "▁").map_err(mark)?.into());
    inner.with_normalizer(Some(Normalizers::new(normal)));
    let mut decoders: Vec<DecoderWrapper> =
        vec![Replace::new("▁", " ").map_err(mark)?.into(), ByteFallback::new().into(), Fuse::new().into()];
    if prepend {
        decoders.push(Strip::new(' ', 1, 0).into());
    }
    inner.with_decoder(Some(Decoders::new(decoders)));
    Ok((inner, true))
}

/// SentencePiece joins the two neighbours whose joint piece has the best score;
/// as merges: every way to join two pieces into a third, best third first.
fn merges_of_scores(tokens: &[&str], scores: &[f64], vocab: &Vocab) -> Vec<(String, String)> {
    let mut joins: Vec<(u32, u32, u32)> = Vec::new();
    for (id, token) in tokens.iter().enumerate() {
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(left), Some(right)) = (vocab.get(left), vocab.get(right)) {
                joins.push((id as u32, *left, *right));
            }
        }
    }
    joins.sort_by(|a, b| scores[b.0 as usize].total_cmp(&scores[a.0 as usize]).then(a.cmp(b)));
    let text = |id: u32| tokens[id as usize].to_owned();
    joins.into_iter().map(|(_, left, right)| (text(left), text(right))).collect()
}
