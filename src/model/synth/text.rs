//! A toy tokenizer and chat template for models of random weights, so that
//! text flows through them.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::model::error::{ModelError, Result};
use crate::model::synth::write_json;
use crate::model::tokenizer::char_of;

/// Special tokens of the toy tokenizer, from id 256 on: text begins, text ends,
/// a message begins, a message ends.
pub const TOY_SPECIALS: [&str; 4] = ["<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"];

const CHAT: &str = "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n\
                    {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// Writes `tokenizer.json`, `tokenizer_config.json` and `generation_config.json`
/// into `dir` for a model of `vocab` tokens: ids 0–255 are the bytes, then come
/// the specials, then made-up words, one an id, that only random weights will
/// ever produce. Needs a vocabulary of at least 260.
pub fn write_tokenizer(dir: &Path, vocab: usize) -> Result<()> {
    let least = 256 + TOY_SPECIALS.len();
    if vocab < least {
        let problem = format!("{vocab} is too small for the toy tokenizer, which needs {least}; give another one");
        return Err(ModelError::field("config.json", "vocab_size", problem));
    }
    let mut ids = Map::new();
    for byte in 0..=255u8 {
        ids.insert(char_of(byte).to_string(), json!(byte));
    }
    for (i, special) in TOY_SPECIALS.iter().enumerate() {
        ids.insert((*special).to_owned(), json!(256 + i));
    }
    for id in least..vocab {
        ids.insert(format!("Ġw{id}"), json!(id));
    }
    let added: Vec<Value> = TOY_SPECIALS
        .iter()
        .enumerate()
        .map(|(i, special)| {
            json!({
                "id": 256 + i, "content": special, "special": true,
                "single_word": false, "lstrip": false, "rstrip": false, "normalized": false
            })
        })
        .collect();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": ids, "merges": []
        }
    });
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT,
        "bos_token": TOY_SPECIALS[0], "eos_token": TOY_SPECIALS[1]
    });
    write_json(&dir.join("tokenizer.json"), &tokenizer)?;
    write_json(&dir.join("tokenizer_config.json"), &config)?;
    write_json(&dir.join("generation_config.json"), &json!({"bos_token_id": 256, "eos_token_id": [257, 259]}))
}
