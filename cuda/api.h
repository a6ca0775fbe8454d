// What the kernels are told: one struct a kernel, passed by value. The build
// script reads this file and writes the same structs in Rust, so it holds only
// structs of the types below, one field a line, each with its shape beside it.
//
// A pointer is an address in the device's memory. `T` is the device's element
// type, bfloat16 or IEEE half; a kernel exists once for each, named
// `<kernel>_bf16` and `<kernel>_f16`. Shapes are row-major.
#pragma once
#include <stdint.h>

namespace distkv {

// Counts of a step that change between two replays of one graph.
struct Step {
    uint32_t rows;     // rows in use; those behind are padding
    uint32_t seqs;     // sequences in use
    uint32_t logits;   // rows of logits in use
    uint32_t reserved; // 0
};

// One row's place in its sequence, and where its K and V go.
struct Slot {
    uint32_t position; // in the sequence
    uint32_t block;    // of the pool
    uint32_t offset;   // token inside the block
};

// Consecutive rows of one sequence and the pages that they attend to.
struct Seq {
    uint32_t row;      // first row
    uint32_t rows;     // rows; their positions are consecutive
    uint32_t position; // of the first row
    uint32_t page;     // first of its pages
    uint32_t pages;    // may be 0: the partial is then (0, -inf)
};

// Consecutive tokens of one sequence in one block of the pool.
struct Page {
    uint32_t block;    // of the pool
    uint32_t position; // of the block's first token; pages of a sequence come in order, perhaps with gaps between
    uint32_t tokens;   // filled, 1 ..= block_tokens
};

// --- Prefill attention ---

// Kernel `prefill_plan`: the work list of the prefill attention kernels, for
// all layers of a step that share a window.
struct PrefillPlan {
    const Step *step;      // [1]
    const Seq *seqs;       // [step.seqs]
    const Page *pages;     // all pages of the sequences
    uint32_t *plan;        // [8 + 8 * capacity], 16-byte aligned; see prefill_plan.cuh
    uint32_t capacity;     // tiles: at least max_rows * group / tile_rows + max_seqs
    uint32_t group;        // heads / kv_heads
    uint32_t kv_heads;     // key/value heads
    uint32_t head_dim;     // elements a head
    uint32_t block_tokens; // tokens a block
    uint32_t window;       // a row sees its last `window` positions; 0: all before it
    uint32_t tile_rows;    // packed rows a tile of the attention kernel that takes the plan
    uint32_t tile_keys;    // keys a tile of that kernel
};

// Kernels `attention_prefill_d<head_dim>_<T>` and, with a tensor map behind it,
// `attention_prefill_sm90_d<head_dim>_<T>`: the sequences that are not decoded.
struct Prefill {
    const void *q;         // T [rows, q_stride]: heads * head_dim query elements first in each row
    const void *kv;        // T, or e4m3 (kernels `..._fp8_<T>`): the layer's pool
    void *o;               // T [rows, heads * head_dim]
    float *lse;            // [rows, heads]
    const Seq *seqs;       // [step.seqs]
    const Page *pages;     // all pages of the sequences
    uint32_t *plan;        // by `prefill_plan` for the same window, tile_rows and tile_keys
    uint32_t q_stride;     // elements from one row of q to the next; (heads + 2 kv_heads) * head_dim of a fused row
    uint32_t heads;        // query heads
    uint32_t kv_heads;     // key/value heads
    uint32_t block_tokens; // tokens a block, a multiple of 16
    uint32_t window;       // a row sees its last `window` positions; 0: all before it
    float scale;           // on the scores, > 0
    uint32_t gathered;     // sm_90: pages lie one after another from this one on; NOT_GATHERED: by their block
    uint32_t reserved;     // 0
};
constexpr uint32_t NOT_GATHERED = 0xffffffff; // pages lie where their blocks do

// Kernel `widen_pages_<T>`: e4m3 keys and values of sequences that are prefilled.
struct WidenPages {
    const void *kv;          // e4m3, the layer's pool
    void *out;               // T [pages, 2, kv_heads, block_tokens, head_dim]
    const Seq *seqs;         // [gridDim.y]
    const Page *pages;       // all pages of the sequences
    uint32_t first;          // page that goes to the beginning of `out`
    uint32_t group;          // query heads a KV head
    uint32_t block_elements; // of a block's layer, a multiple of 16
    uint32_t reserved;       // 0
};

// Kernel `read_sweep`: reads, and writes one number if their sum is
// `impossible`.
struct ReadSweep {
    const void *from;    // 16-byte pieces
    uint32_t *sink;      // [1]
    uint64_t pieces;     // of 16 bytes
    uint32_t impossible; // a sum that is not expected
    uint32_t reserved;   // 0
};

// Kernel `attention_plain_<T>`: MicroAttention of all sequences of a step, for
// heads of any width up to 256.
struct AttentionPlain {
    const void *qkv;       // T [rows, q_stride]: heads * head_dim query elements first in each row
    const void *kv;        // T, or e4m3 (kernels `..._fp8_<T>`): the layer's pool
    void *o;               // T [rows, heads * head_dim]
    float *lse;            // [rows, heads]
    const Step *step;      // [1]
    const Seq *seqs;       // [step.seqs]
    const Page *pages;     // all pages of the sequences
    uint32_t q_stride;     // elements from one row of q to the next
    uint32_t heads;        // query heads
    uint32_t kv_heads;     // key/value heads
    uint32_t head_dim;     // elements a head, at most 256
    uint32_t block_tokens; // tokens a block
    uint32_t window;       // a row sees its last `window` positions; 0: all before it
    float scale;           // on the scores
    uint32_t reserved;     // 0
};

// Rows of the step. `rows` of a kernel below is the count of rows in use in the
// device's memory: a field of its Step, which no kernel writes. Rows behind are
// not touched.

// Kernel `embed_<T>`: out[r] = table[tokens[r]]; a row of NaN for a token that
// the table lacks.
struct Embed {
    const void *table;      // T [vocab, cols]
    const uint32_t *tokens; // [rows]
    float *out;             // [rows, cols]
    const uint32_t *rows;   // rows in use
    uint32_t cols;
    uint32_t vocab;
};

// Kernel `gather`: out[i] = x[index[i]].
struct Gather {
    const float *x;        // [any, cols]
    const uint32_t *index; // [rows]
    float *out;            // [rows, cols]
    const uint32_t *rows;  // rows of out in use
    uint32_t cols;
    uint32_t reserved;     // 0
};

// Kernel `rms_norm_<T>`: x[r] += delta[r] + bias where delta is given, then
// out[r] = x[r] / sqrt(mean(x[r]^2) + eps) * weight. With an index, out[i] is
// of row index[i] of x and of delta, and x stays as it is.
struct RmsNorm {
    float *x;              // [rows, cols], the residual stream
    const void *delta;     // T [rows, cols]; or null
    const float *bias;     // [cols], added with delta; or null
    const float *weight;   // [cols]
    void *out;             // T [rows, cols]
    const uint32_t *index; // [rows]; or null
    const uint32_t *rows;  // rows of out in use
    uint32_t cols;
    float eps;
};

// Kernel `add_<T>`: x[r] += delta[r] (+ bias).
struct Add {
    float *x;             // [rows, cols]
    const void *delta;    // T [rows, cols]
    const float *bias;    // [cols]; or null
    const uint32_t *rows; // rows in use
    uint32_t cols;
    uint32_t reserved;    // 0
};

// Kernel `add_bias_<T>`: x[r] += bias.
struct AddBias {
    void *x;              // T [rows, cols]
    const float *bias;    // [cols]
    const uint32_t *rows; // rows in use
    uint32_t cols;
    uint32_t reserved;    // 0
};

// Kernel `swiglu_<T>`: out[r] = silu(gate[r]) * up[r], after the bias.
struct Swiglu {
    const void *gate_up;  // T [rows, 2 * cols]: gate, then up, in each row
    const float *bias;    // [2 * cols]; or null
    void *out;            // T [rows, cols]
    const uint32_t *rows; // rows in use
    uint32_t cols;
    uint32_t reserved;    // 0
};

// Kernel `rope_table`: cos and sin of a step's positions, once for all layers.
struct RopeTable {
    const float *inv_freq; // [pairs]
    float *table;          // [rows, pairs, 2 (cos, sin)]
    const Slot *slots;     // [rows]
    const uint32_t *rows;  // rows in use
    uint32_t pairs;
    float magnitude;       // factor on cos and sin
};

// Kernel `rope_append_<T>`: on fused QKV rows, the bias, the RMS norm of each
// query and key head, the rotary embedding; then queries in place, keys and
// values into the pool (their places in qkv stay as they are).
struct RopeAppend {
    void *qkv;             // T [rows, (heads + 2 kv_heads) * head_dim]
    void *pool;            // T, or e4m3 where `fp8`: the layer's pool
    const float *table;    // by `rope_table`
    const float *bias;     // [(heads + 2 kv_heads) * head_dim]; or null
    const float *q_norm;   // [head_dim]; or null, as k_norm then is
    const float *k_norm;   // [head_dim]
    const Slot *slots;     // [rows]
    const uint32_t *rows;  // rows in use
    uint32_t heads;        // query heads
    uint32_t kv_heads;     // key/value heads
    uint32_t head_dim;     // even, at most 256
    uint32_t block_tokens; // tokens a block
    uint32_t pairs;        // that are rotated, at most head_dim / 2: the first 2 * pairs elements
    uint32_t interleaved;  // pairs are 1: (2i, 2i+1), 0: (i, i + pairs)
    float eps;             // of the norms
    uint32_t fp8;          // 1: the pool's elements are e4m3
};

// Kernels `convert_<from>_<to>`: a tensor's bytes in one of the formats of
// src/device/tensor.rs into elements of f32, f16 or bf16, nearest even. For
// formats in blocks, `offset` and `elements` are multiples of their length.
struct Convert {
    const void *bytes; // of any alignment
    void *out;         // [elements]
    uint64_t offset;   // elements of the source before the first to convert
    uint64_t elements;
};

// Choosing tokens. Rows are those of logits in use.

// Kernel `argmax`: the likeliest token, of equals the first. A row with a value
// that is infinite or not a number gets flag 1 and token 0.
struct Argmax {
    const float *logits;  // [rows, stride]
    uint32_t *tokens;     // [rows]
    uint32_t *flags;      // [rows]
    const uint32_t *rows; // rows in use
    uint32_t vocab;       // at most stride
    uint32_t stride;      // elements from one row to the next
};

// --- Linear layers of few rows ---

// One product of the kernels `linear_m<rows>_<T>` (rows = 8, 16 or 32), which
// run up to four of them one after another; linear.cuh says how they are passed.
//   y[r] = scale[r] * (x[r] . W^T) + bias; scale[r] = 1 / rms of the row that x
//   is made from where `x_squares` is given (x is then that row times the
//   norm's weight), else 1.
//   end 0: out T [rows, out] = y
//   end 1: out T [rows, out / 2] = silu(y[..out / 2]) * y[out / 2..]
//   end 2: out f32 [rows, out] += y; where `next` is given, also
//          next = T(out * next_norm) and squares = sums of out^2
//   end 3: out f32 [rows, out] = y
// Only rows in use are written.
struct Linear {
    const float *x_squares;  // [rows, in / 32] sums of squares of 32 elements each, or null
    const float *bias;       // [out] or null
    void *out;               // see above
    void *next;              // T [rows, out] or null
    const float *next_norm;  // [out], with `next`
    float *squares;          // [rows, out / 32], with `next`, where out is a multiple of 64
    const uint32_t *rows;    // [1] rows in use
    uint32_t in_features;    // a multiple of 64
    uint32_t out_features;   // a multiple of 4 (of 32 with end 1)
    uint32_t end;            // see above
    uint32_t tile_units;     // units of 32 features that a block takes at once, 1 ..= 8
    uint32_t depth;          // times 64 elements of `in` a stage: 1, 2, 4 or 8; tile_units * depth <= 8
    uint32_t splits;         // blocks that share `in`: 1, or the cluster; at most in / (64 depth), rounded up
    float eps;               // of the norm, with `x_squares`
    uint32_t pace;           // picoseconds from one KiB of weights that a block asks for to the next, at least
};

// What the products of one launch have in common.
struct LinearChain {
    uint32_t *relay; // of this kernel alone: 128 bytes, zeros at first, and two halves of 0xff (linear_relay.cuh)
    uint32_t count;  // products, 1 ..= 4, each but the first of what the one before it makes
    uint32_t stages; // of the ring
    uint32_t stage;  // bytes of one: the most that one of the products needs
    uint32_t half;   // bytes of a half of the relay
    uint32_t fenced; // 1: rows are handed on in `out` and `next`, behind a fence; 0: through the relay
    uint32_t reserved; // 0
};

// --- FP8 weights ---

// How scales of FP8 weights lie: f32 [ceil(out / 2^scale_shift), scale_cols]. A
// scale is that of 2^scale_shift features and, with more than one column, of 128
// elements of `in`, else of all.

// Kernels `linear_fp8_m<rows>_<T>` (rows = 16 or 32; one column of scales) and
// `linear_fp8_blocks_m<rows>_<T>`, and, for up to 8 rows, `linear_fp8_few_b<most
// bricks>_<T>` and `linear_fp8_few_blocks_b<most bricks>_<T>` (4 or 14): y[r] = x[r] . (W * scales)^T + bias.
//   end 0: out T [rows, out] = y
//   end 1: out T [rows, out / 2] = silu(y[..out / 2]) * y[out / 2..]
//   end 2: out f32 [rows, out] += y
//   end 3: out f32 [rows, out] = y
// With end 1 out / 2 is a multiple of 16. Only rows in use are written.
struct LinearFp8 {
    const void *weights;    // [out, in] packed for T (fp8.cuh), 16-byte aligned
    const float *scales;    // see above
    const void *x;          // T [rows, x_stride], 16-byte aligned
    const float *bias;      // [out] or null
    void *out;              // see above
    const uint32_t *rows;   // [1] rows of the step in use
    uint32_t first;         // row of the step that x and out begin with
    uint32_t x_stride;      // elements from one row of x to the next, a multiple of 8
    uint32_t in_features;   // a multiple of 16
    uint32_t out_features;
    uint32_t scale_shift;   // see above
    uint32_t scale_cols;    // 1, or ceil(in / 128)
    uint32_t end;           // see above
    uint32_t splits;        // blocks that share `in`: a cluster; 1 before Hopper
    uint32_t bricks;        // of the kernels `few`: of 16 features that a block takes
    uint32_t reserved;      // 0
};

// Kernel `pack_fp8_<T>`: a part of a matrix as it lies in a file, into bricks. What
// fills the last bricks up is not written.
struct PackFp8 {
    const void *codes;      // e4m3 [elements], 16-byte aligned
    void *weights;          // [out, in] packed for T (fp8.cuh), 16-byte aligned
    uint32_t *flag;         // [1] set to 1 by a code that is not a number
    uint64_t first;         // of the matrix's elements, row by row; a multiple of 16
    uint64_t elements;      // a multiple of 16
    uint32_t in_features;   // a multiple of 16
    uint32_t reserved;      // 0
};

// Kernel `widen_fp8_<T>`: out = T(W * scales).
struct WidenFp8 {
    const void *weights;    // [out, in] packed for T (fp8.cuh), 16-byte aligned
    const float *scales;    // see above
    void *out;              // T [out, in], 16-byte aligned
    uint32_t in_features;   // a multiple of 16
    uint32_t out_features;
    uint32_t scale_shift;   // see above
    uint32_t scale_cols;    // 1, or ceil(in / 128)
};

// ---- Decode attention ----
// decode_plan.cu, once a step (and distinct window); attention_decode.cu and
// decode_join.cu, once a layer. See decode.cuh for `box_rows` and
// `together`. With `grid` the blocks of the attention kernel, what lies between them takes
//   items    48 * (grid + max_seqs * kv_heads / together) bytes
//   spans    16 * (max_seqs + 1) bytes
//   cuts     20 * (grid + 1) bytes
//   parts    4 * 2 * grid * together * 16 * (head_dim + 2) bytes

constexpr uint32_t DECODE_SLOTS = 16;        // most slots of a block's ring
constexpr uint32_t DECODE_NONE = 0xffffffff; // no further item

// A range of cells of one sequence and `together` kv heads, for one block. A
// cell is what a box holds: box_rows / together tokens. Cell c of the item is the
// (c % n)th of page c / n, with n = block_tokens * together / box_rows.
struct DecodeItem {
    uint32_t row;      // first query row
    uint32_t columns;  // query rows * (heads / kv_heads), at most 16; 0: the block has nothing to do
    uint32_t position; // of the first query row
    uint32_t head;     // first kv head
    uint32_t page;     // that cell 0 lies in
    uint32_t begin;    // first cell
    uint32_t end;      // behind the last; may be `begin`
    uint32_t parts;    // blocks that share this sequence and these heads
    uint32_t first;    // of these blocks; they are consecutive
    uint32_t next;     // item of this block, or DECODE_NONE
    uint32_t reserved0;
    uint32_t reserved1;
};

// What the planner notes of a sequence.
struct DecodeSpan {
    uint32_t before; // units of the sequences before it, for `together` kv heads
    uint32_t page;   // first page that a query sees
    uint32_t begin;  // first cell there
    uint32_t end;    // behind the last cell, from the same page
};

// A sequence and `together` kv heads that several blocks share.
struct DecodeCut {
    uint32_t row;     // first query row; of cuts[0]: how many follow
    uint32_t columns; // as in the items
    uint32_t head;    // first kv head
    uint32_t first;   // block
    uint32_t parts;   // blocks
};

// Turns the sequences of a step that are decoded (see `is_decode`) into items.
struct DecodePlan {
    const Step *step;
    const Seq *seqs;       // [step.seqs]
    const Page *pages;
    void *items;           // DecodeItem [grid + max_seqs * kv_heads / together]
    void *spans;           // DecodeSpan [max_seqs + 1]
    void *cuts;            // DecodeCut [grid + 1]
    uint32_t heads;
    uint32_t kv_heads;
    uint32_t head_dim;
    uint32_t block_tokens; // a multiple of 16
    uint32_t window;       // 0: none
    uint32_t box_rows;     // rows of a box, see decode.cuh
    uint32_t together;     // kv heads that a block takes at once
    uint32_t grid;         // blocks of the attention kernel
    uint32_t least;        // units that a block is given at least
    uint32_t reserved;
};

// Kernels `attention_decode_d<head_dim>_<T>` and, where no item has more than 8
// columns, `attention_decode_narrow_d<head_dim>_<T>`: MicroAttention of these
// items over one layer, (o, lse), or parts of it. Cells that end before an
// item's position are read while the kernel before this one may still run.
struct Decode {
    const void *qkv;         // T [rows, (heads + 2 kv_heads) * head_dim]: the queries lead each row
    const void *kv;          // T [blocks, 2, kv_heads, block_tokens, head_dim], the layer's (sm_80)
    const void *kv_map;      // tensor map of the pool, 64-byte aligned (sm_90)
    void *o;                 // T [rows, heads * head_dim]
    float *lse;              // [rows, heads]
    const Page *pages;
    const DecodeItem *items; // as planned
    float *parts;            // [grid, 2, together, 16 * (head_dim + 2)]
    uint32_t map_row;        // row of the map at which the layer begins
    uint32_t heads;
    uint32_t kv_heads;
    uint32_t block_tokens;   // a multiple of 16
    uint32_t window;         // 0: none; as planned
    uint32_t box_rows;       // as planned
    uint32_t together;       // as planned
    uint32_t slots;          // of the ring: 2 ..= DECODE_SLOTS
    float scale;
    uint32_t reserved;
};

// Joins the parts of shared sequences into (o, lse).
struct DecodeJoin {
    const DecodeCut *cuts; // as planned
    float *parts;          // as `Decode` left them
    void *o;               // T [rows, heads * head_dim]
    float *lse;            // [rows, heads]
    uint32_t heads;
    uint32_t kv_heads;
    uint32_t head_dim;
    uint32_t together;     // as planned
};

// `decode_short_d<head_dim>_g<g>_<T>`: `rope_append` and attention of rows that are a
// sequence each and attend to few positions; see decode_short.cu. Positions that no
// page holds are left out; the row's own is attended to and need not be in a page.
struct DecodeShort {
    const void *qkv;       // T [rows, (heads + 2 kv_heads) * head_dim], as the linear layer left it
    void *pool;            // T: the layer's pool
    const float *table;    // by `rope_table`
    const float *q_norm;   // [head_dim]; or null, as k_norm then is
    const float *k_norm;   // [head_dim]
    const Slot *slots;     // [rows]
    const Seq *seqs;       // [rows], a row each
    const Page *pages;     // of all sequences
    const Step *step;
    void *o;               // T [rows, heads * head_dim]
    float *lse;            // [rows, heads]
    uint32_t heads;        // query heads: at most g a kv head
    uint32_t kv_heads;     // key/value heads
    uint32_t block_tokens; // tokens a block
    uint32_t pairs;        // as in RopeAppend
    uint32_t interleaved;  // likewise
    uint32_t window;       // positions that a row sees, its own among them; 0: all
    float eps;             // of the norms
    float scale;           // of scores
    uint32_t tokens;       // positions that a block has room for
    uint32_t reserved;
};

// Merges a peer's partials into (o, lse), in place; see state.cuh.
struct Merge {
    const float *remote_o;   // [count, heads * head_dim]
    const float *remote_lse; // [count, heads]
    const uint32_t *rows;    // [count] rows of o and lse, each at most once
    void *o;                 // T [rows, heads * head_dim]
    float *lse;              // [rows, heads]
    uint32_t count;
    uint32_t heads;
    uint32_t head_dim; // a multiple of 4
    uint32_t reserved;
};

// What is added to and taken from one logit of a row before the choice; a row's
// entries name distinct tokens of the vocabulary.
struct SampleEntry {
    uint32_t token;
    uint32_t generated; // times that the row's request has generated it
    uint32_t seen;      // 1: generated, or in a prompt that counts; else 0
    float bias;         // added first
};

// How to choose one row's token: the fields of SamplingParams.
struct SampleRow {
    uint64_t unit;       // the draw is at unit / 2^53; below 2^53
    uint32_t entry;      // first of its entries
    uint32_t entries;    // may be 0
    float temperature;   // below 1e-5: the likeliest token
    float top_p;         // 1: all
    float min_p;         // 0: all
    uint32_t top_k;      // 0: all
    float repetition;    // of penalties; 1: none
    float presence;
    float frequency;
    uint32_t reserved;   // 0
};

// Kernels `sample` and, where a row does not fit a cluster's shared memory,
// `sample_global`: a token a row as src/model/sampler chooses it. A row with a
// value that is infinite or not a number gets flag 1 and token 0.
struct Sample {
    const float *logits;        // [rows, stride]; they stay as they are
    float *weights;             // room for sample_global, [rows, (vocab + 3) / 4 * 4]; or null
    const SampleRow *params;    // [rows]
    const SampleEntry *entries; // of all rows
    uint32_t *tokens;           // [rows]
    uint32_t *flags;            // [rows]
    const uint32_t *rows;       // rows in use
    uint32_t vocab;             // at most stride and 2^18
    uint32_t stride;            // elements from one row to the next
};

// Kernel `logprobs`: the log-probability of a token a row and of the likeliest
// ones, likeliest first, of equals the smaller token; NaN where the row is not
// finite.
struct Logprobs {
    const float *logits;    // [rows, stride]
    const uint32_t *tokens; // [rows], below vocab
    const uint32_t *counts; // [rows], how many of the likeliest, at most 20 and vocab; ~0: none, not of the token either
    float *chosen;          // [rows]
    uint32_t *top_tokens;   // [rows, 20]
    float *top;             // [rows, 20]
    const uint32_t *rows;   // rows in use
    uint32_t vocab;         // at most stride
    uint32_t stride;        // elements from one row to the next
};

} // namespace distkv
