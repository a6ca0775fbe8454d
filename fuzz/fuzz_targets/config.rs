//! config.json and generation_config.json of any bytes: a configuration or an
//! error.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    // Up to the first NUL the one file, after it the other.
    let mut parts = bytes.splitn(2, |byte| *byte == 0);
    let mut json = || serde_json::from_slice::<serde_json::Value>(parts.next()?).ok();
    let (Some(config), generation) = (json(), json()) else { return };
    let _ = distkv::model::hf::parse(&config, generation.as_ref());
    if let Some(generation) = generation {
        let _ = distkv::model::hf::parse_generation(&generation);
    }
});
