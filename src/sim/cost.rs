//! How long things take in a simulation: a step by its rows and keys, a
//! message by its bytes. Built in are a few devices; measured ones come as JSON
//! of the same fields.

use serde::{Deserialize, Serialize};

/// One instance's device, its model and its links.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CostModel {
    /// For people.
    pub name: String,
    /// Layers of the model: a remote exchange happens in each.
    pub layers: u32,
    /// Tokens of an rBlock.
    pub block_tokens: u32,
    /// rBlocks of an instance's pool.
    pub blocks: u32,
    /// KV of one token, bytes.
    pub token_bytes: u64,
    /// Queries of one row in all layers, bytes; a partial is as large.
    pub query_bytes: u64,
    /// Least time of a step, ns: the weights are read once.
    pub fixed_ns: f64,
    /// Arithmetic of one row outside attention, ns. A step takes the greater of
    /// the two.
    pub row_ns: f64,
    /// Reading one key (all layers), ns.
    pub key_ns: f64,
    /// Arithmetic of one row with one key, ns: what counts in prefill, where
    /// many rows read a key together.
    pub pair_ns: f64,
    /// Instances of one host; those of a host are neighbours in the world.
    pub host_instances: u32,
    /// Query out and partial back in one layer, without the attention, ns,
    /// between two hosts.
    pub layer_rtt_ns: f64,
    /// The same within a host.
    pub host_layer_rtt_ns: f64,
    /// A message of the control plane, one way, ns.
    pub control_ns: f64,
    /// Bandwidth of an instance to all on other hosts, bytes a second each way.
    pub link_bytes_s: f64,
    /// The same to all on its own host.
    pub host_link_bytes_s: f64,
}

impl CostModel {
    /// A built-in one. Sources: the paper's machines are A100-80GB in groups of
    /// 8 (NVLink within, 200 Gb/s between); their datasheet gives 2.04 TB/s and
    /// 312 TFLOP/s of bf16, of which 0.80 and 0.60 are reckoned with here.
    /// 7B: 32 layers, 4096 wide, multi-head, 13.5 GB, 512 KiB of KV a token, 0.9
    /// of the memory for weights and KV. 13B: 40 layers, 5120 wide, 26 GB, 800
    /// KiB. `h200`: an 8B grouped-query model (15 GB, 128 KiB a token), with the
    /// rates measured on one H200: 4.3 TB/s of KV read, 3.9 TB/s of weights,
    /// 550 TFLOP/s in prefill, 7 µs there and back over NVLink at 16 KB. The
    /// round trips of the A100s are assumed: 20 µs a layer. Queries and partials
    /// are f32, so a row's are as large as a token's KV of multi-head f16.
    pub fn preset(name: &str) -> Option<Self> {
        let a100 = Self {
            name: name.to_string(),
            layers: 32,
            block_tokens: 16,
            blocks: 6973,
            token_bytes: 512 << 10,
            query_bytes: 512 << 10,
            fixed_ns: 8.3e6,
            row_ns: 75e3,
            key_ns: 321.0,
            pair_ns: 2.8,
            host_instances: 8,
            layer_rtt_ns: 33e3,
            host_layer_rtt_ns: 10e3,
            control_ns: 50e3,
            link_bytes_s: 25e9,
            host_link_bytes_s: 250e9,
        };
        match name {
            "a100" | "a100-7b" => Some(a100),
            "a100-13b" => Some(Self {
                layers: 40,
                blocks: 3507,
                token_bytes: 800 << 10,
                query_bytes: 800 << 10,
                fixed_ns: 15.9e6,
                row_ns: 139e3,
                key_ns: 502.0,
                pair_ns: 4.4,
                ..a100
            }),
            "h200" => Some(Self {
                blocks: 53_000,
                token_bytes: 128 << 10,
                fixed_ns: 3.9e6,
                row_ns: 29e3,
                key_ns: 30.5,
                pair_ns: 0.95,
                host_layer_rtt_ns: 7e3,
                link_bytes_s: 50e9,
                host_link_bytes_s: 390e9,
                ..a100
            }),
            _ => None,
        }
    }

    /// A toy device for worlds of a few small pools, where what counts is what
    /// happens and not how fast.
    pub fn small(blocks: u32) -> Self {
        Self {
            name: "small".into(),
            layers: 4,
            block_tokens: 4,
            blocks,
            token_bytes: 1024,
            query_bytes: 1024,
            fixed_ns: 2e6,
            row_ns: 1e5,
            key_ns: 1e3,
            pair_ns: 10.0,
            host_instances: 8,
            layer_rtt_ns: 20e3,
            host_layer_rtt_ns: 20e3,
            control_ns: 100e3,
            link_bytes_s: 1e9,
            host_link_bytes_s: 1e9,
        }
    }

    /// What is wrong with it, if anything.
    pub fn check(&self) -> Result<(), String> {
        let Self { layer_rtt_ns, host_layer_rtt_ns, .. } = self;
        let times = [self.fixed_ns, self.row_ns, self.key_ns, self.pair_ns, self.control_ns];
        let times = [&times[..], &[*layer_rtt_ns, *host_layer_rtt_ns]].concat();
        if times.iter().any(|ns| !ns.is_finite() || *ns < 0.0) || self.fixed_ns < 1.0 {
            return Err("times must be finite and not negative, and fixed_ns at least 1".into());
        }
        if [self.link_bytes_s, self.host_link_bytes_s].iter().any(|rate| !rate.is_finite() || *rate <= 0.0) {
            return Err("link_bytes_s and host_link_bytes_s must be positive".into());
        }
        if self.host_instances == 0 {
            return Err("host_instances must be at least 1".into());
        }
        if self.blocks < 4 || self.blocks >= 1 << 30 || !(1..=4096).contains(&self.block_tokens) || self.layers == 0 {
            return Err("blocks from 4, block_tokens 1 to 4096, layers from 1".into());
        }
        Ok(())
    }

    /// All of `n` instances as one static tensor-parallel whole: its memory is
    /// the sum; attention over it is as fast as all together; the rest of the
    /// model loses by being split. The paper: an 8-way split leaves a third of
    /// the speed (per device). Taken as 1 / (1 + ⅔ log₂ n), which gives ⅓ at 8.
    pub fn whole(&self, n: u32) -> Self {
        let n = f64::from(n.max(1));
        let split = n / (1.0 + n.log2() * 2.0 / 3.0);
        Self {
            blocks: self.blocks.saturating_mul(n as u32),
            fixed_ns: self.fixed_ns / split,
            row_ns: self.row_ns / split,
            key_ns: self.key_ns / n,
            pair_ns: self.pair_ns / n,
            ..self.clone()
        }
    }

    /// Time of a step's rows outside attention, ns.
    pub fn rows_ns(&self, rows: usize) -> f64 {
        self.fixed_ns.max(self.row_ns * rows as f64)
    }

    /// The host of the instance at `slot`.
    pub fn host(&self, slot: usize) -> usize {
        slot / self.host_instances as usize
    }

    /// The exchanges of all layers with an instance of the same host or of
    /// another, without the attention, ns.
    pub fn exchanges_ns(&self, near: bool) -> f64 {
        f64::from(self.layers) * if near { self.host_layer_rtt_ns } else { self.layer_rtt_ns }
    }

    /// Time of a message of `bytes` between two hosts, ns.
    pub fn wire_ns(&self, bytes: u64) -> f64 {
        bytes as f64 / self.link_bytes_s * 1e9
    }

    /// Time of attention of `rows` rows of one sequence over `keys` keys, ns.
    pub fn attention_ns(&self, rows: usize, keys: u64) -> f64 {
        (self.key_ns * keys as f64).max(self.pair_ns * keys as f64 * rows as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presets_are_sound_and_read_back() {
        for name in ["a100", "a100-13b", "h200"] {
            let cost = CostModel::preset(name).unwrap();
            cost.check().unwrap();
            let text = serde_json::to_string(&cost).unwrap();
            assert_eq!(serde_json::from_str::<CostModel>(&text).unwrap(), cost);
        }
        assert!(CostModel::preset("abacus").is_none());
        assert!(CostModel { key_ns: f64::NAN, ..CostModel::small(8) }.check().is_err());
    }

    #[test]
    fn paper_splitting_eight_ways_leaves_a_third_of_the_speed() {
        let one = CostModel::preset("a100").unwrap();
        let whole = one.whole(8);
        assert!((one.fixed_ns / whole.fixed_ns / 8.0 - 1.0 / 3.0).abs() < 1e-9);
        assert_eq!(whole.blocks, one.blocks * 8);
        assert_eq!(one.whole(1), one);
    }
}
