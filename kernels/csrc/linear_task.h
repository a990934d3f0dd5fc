// The C interface of the product of few rows: raw pointers, nothing of torch or Python. megatron_sd/ops/few_rows.py is its other
// half.
#pragma once

#include <cstdint>

extern "C" {

// out[r, c] = sum over i < depth of rows[r, i] * weight[c, i], all float32, adjacent columns, no gaps between rows.
struct LinearTask {
  const float *rows, *weight;  // [num_rows, depth], [num_columns, depth]
  float* out;                  // [num_rows, num_columns]
  int64_t num_rows, num_columns, depth;
  int32_t num_threads, instruction_set;
};

}  // extern "C"
