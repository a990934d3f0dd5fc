// A few rows times a large weight matrix, on CPUs: what every decoding step of a language model does.
//
// Such a product lasts as long as the weights take to come from memory. General matrix products first copy them into another
// order, which for few rows costs more than the product. Here four rows of the weights are read once, from where they lie; while
// they meet the rows of the input, three at a time, the next four are fetched.
// An element is always summed up in the same order: it depends neither on the number of rows and threads nor on its neighbours.
#include <algorithm>
#include <cstdint>

#include "instruction_set.h"
#include "linear_task.h"

namespace {

constexpr int64_t kRows = 3;      // of the input in a tile
constexpr int64_t kColumns = 4;   // of the output, rows of the weights: kRows * kColumns sums fill the registers of AVX2
constexpr int64_t kLine = 64;     // bytes that memory brings at once
constexpr int64_t kUnrolled = 4;  // vectors between two requests to memory

template <int kWidth>
using Vector __attribute__((vector_size(4 * kWidth), aligned(4), may_alias)) = float;

// One tile of the output. `next` is memory that will be needed soon, one line of it for every kUnrolled vectors.
template <int kWidth, int64_t kNumRows, int64_t kNumColumns>
ALWAYS_INLINE void multiply_tile(const LinearTask& task, int64_t row, int64_t column, const char* next) {
  const int64_t depth = task.depth;
  const float *rows = task.rows + row * depth, *weight = task.weight + column * depth;
  Vector<kWidth> sums[kNumRows][kNumColumns] = {};
  int64_t start = 0;
  for (; start + kUnrolled * kWidth <= depth; start += kUnrolled * kWidth, next += kLine) {
    __builtin_prefetch(next);
#pragma GCC unroll 4
    for (int64_t i = start; i < start + kUnrolled * kWidth; i += kWidth) {
      Vector<kWidth> loaded[kNumRows];
      for (int64_t r = 0; r < kNumRows; ++r) loaded[r] = *reinterpret_cast<const Vector<kWidth>*>(rows + r * depth + i);
      for (int64_t c = 0; c < kNumColumns; ++c) {
        const Vector<kWidth> factor = *reinterpret_cast<const Vector<kWidth>*>(weight + c * depth + i);
        for (int64_t r = 0; r < kNumRows; ++r) sums[r][c] += loaded[r] * factor;
      }
    }
  }
  for (int64_t r = 0; r < kNumRows; ++r)
    for (int64_t c = 0; c < kNumColumns; ++c) {
      float total = 0.0f;
      for (int lane = 0; lane < kWidth; ++lane) total += sums[r][c][lane];
      for (int64_t i = start; i < depth; ++i) total += rows[r * depth + i] * weight[c * depth + i];
      task.out[(row + r) * task.num_columns + column + c] = total;
    }
}

// kNumColumns columns of the output, all rows.
template <int kWidth, int64_t kNumColumns>
ALWAYS_INLINE void multiply_columns(const LinearTask& task, int64_t column) {
  const char* next = reinterpret_cast<const char*>(task.weight + (column + kNumColumns) * task.depth);
  const int64_t fetched = task.depth / (kUnrolled * kWidth) * kLine;  // by one tile
  int64_t row = 0;
  for (; row + kRows <= task.num_rows; row += kRows, next += fetched) multiply_tile<kWidth, kRows, kNumColumns>(task, row, column, next);
  if (task.num_rows - row == 2) multiply_tile<kWidth, 2, kNumColumns>(task, row, column, next);
  if (task.num_rows - row == 1) multiply_tile<kWidth, 1, kNumColumns>(task, row, column, next);
}

// Columns [column, column + kColumns) of the output as far as there are any.
template <int kWidth>
ALWAYS_INLINE void multiply_block(const LinearTask& task, int64_t column) {
  if (column + kColumns <= task.num_columns) return multiply_columns<kWidth, kColumns>(task, column);
  for (; column < task.num_columns; ++column) multiply_columns<kWidth, 1>(task, column);
}

void multiply_baseline(const LinearTask& task, int64_t column) { multiply_block<4>(task, column); }
#if defined(__x86_64__)
FOR_AVX2 void multiply_avx2(const LinearTask& task, int64_t column) { multiply_block<8>(task, column); }
FOR_AVX512 void multiply_avx512(const LinearTask& task, int64_t column) { multiply_block<16>(task, column); }
#endif

auto* program_for(int32_t instruction_set) {
#if defined(__x86_64__)
  if (instruction_set == kAvx512) return &multiply_avx512;
  if (instruction_set == kAvx2) return &multiply_avx2;
#endif
  (void)instruction_set;
  return &multiply_baseline;
}

}  // namespace

// Every element of `out` is written.
extern "C" void megatron_sd_linear(const LinearTask* task) {
  auto* multiply = program_for(task->instruction_set);
  const int64_t num_blocks = (task->num_columns + kColumns - 1) / kColumns;
#pragma omp parallel for num_threads(task->num_threads) schedule(static)
  for (int64_t block = 0; block < num_blocks; ++block) multiply(*task, block * kColumns);
}
