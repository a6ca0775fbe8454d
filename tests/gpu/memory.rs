//! How much of the GPU's memory a node takes, and what it says where there is too
//! little.

use distkv::device::cuda::driver::Context;
use distkv::device::tensor::DType;
use distkv::kv::rblock::KvDtype;
use distkv::node::Node;
use distkv::node::device::DeviceName;
use distkv::node::transports::FabricChoice;

use crate::Settings;
use crate::cluster::{Setup, model_of, prompt, tokens};

/// Share of all memory by which what is left may differ from the reserve.
const WITHIN: f64 = 0.01;

/// A pool of no given size leaves the reserve and nothing else, within 1% of the
/// GPU's memory, also after requests have run; one that is too large is refused
/// with advice.
pub fn is_taken(settings: &Settings) -> Result<String, String> {
    let DeviceName::Cuda(ordinal) = settings.device else { return Err("this check is for a GPU".into()) };
    let context = Context::open(ordinal).map_err(|e| e.to_string())?;
    let (total, free) = (context.properties().memory, || context.free_memory().map_err(|e| e.to_string()));
    let before = free()?;
    let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
    // rBlocks of half a MiB, so that they are not too many.
    let wide = serde_json::json!({
        "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128
    });
    let files = model_of(dir.path(), wide, DType::Bf16);
    let mut setup = Setup::new(FabricChoice::Shm, KvDtype::Bf16, &[16]);
    (setup.device, setup.whole_device, setup.taps) = (settings.device, true, false);
    let cluster = setup.start_by(&files, Node::engine).map_err(|e| e.to_string())?;
    let pool = cluster.node.pool().map_or(0, |pool| pool.shape().block_bytes() * pool.blocks() as usize);
    let at_start = free()?;
    let streams: Vec<_> = (0..32).map(|i| cluster.submit(prompt(i, 300), 16, false)).collect();
    let answered = streams.into_iter().map(tokens).filter(|tokens| tokens.len() == 16).count();
    let after = free()?;
    cluster.stop();
    let returned = free()?;
    let reserve = (total / 200).max(256 << 20);
    let mib = |bytes: usize| bytes >> 20;
    let found = format!(
        "of {} MiB a pool took {}, {} were left at start and {} after 32 requests, of a reserve of {}; {} free before, \
         {} afterwards",
        mib(total),
        mib(pool),
        mib(at_start),
        mib(after),
        mib(reserve),
        mib(before),
        mib(returned)
    );
    let near = |left: usize| (left as f64 - reserve as f64).abs() <= WITHIN * total as f64;
    if !near(at_start) || !near(after) || answered != 32 {
        return Err(found);
    }
    if (before as f64 - returned as f64).abs() > WITHIN * total as f64 {
        return Err(format!("it did not give everything back: {found}"));
    }

    // Twice what there is.
    let block = files.config.kv_shape(16, KvDtype::Bf16).block_bytes();
    let mut setup = Setup::new(FabricChoice::Shm, KvDtype::Bf16, &[2 * total / block * 16]);
    setup.device = settings.device;
    match setup.start_by(&files, Node::engine) {
        Ok(_) => Err("a pool of twice the GPU's memory was made".into()),
        Err(refused) => {
            let refused = refused.to_string();
            println!("    {refused}");
            let advised = ["out of memory", "the KV pool", "are free", "less --kv-memory"];
            match advised.iter().find(|word| !refused.contains(**word)) {
                Some(missing) => Err(format!("the refusal does not say {missing:?}: {refused}")),
                None => Ok(found),
            }
        }
    }
}
