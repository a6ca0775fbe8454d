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

} // namespace distkv
