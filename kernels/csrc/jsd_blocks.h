// What programs for rows of logits on CPUs are made of: blocks of a row, sums over them, and the terms of a divergence.
//
// A row is read in blocks that stay in the first-level cache; a short last block is filled up with masked entries, which add
// nothing. Sums are pairwise within a block and double precision across blocks, always in the same order.
// All of it is inlined into the programs, which are compiled for each instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "instruction_set.h"
#include "jsd.h"
#include "jsd_task.h"

#define ALWAYS_INLINE_LAMBDA __attribute__((always_inline))

namespace jsd_cpu {

constexpr int64_t kBlock = 512;
constexpr int64_t kRun = 128;  // as many powers are added up in float32

// ---- blocks -------------------------------------------------------------------------------------------------------------

// body(start, n) for each block in turn; all but the last are of constant size, for which the compiler has better loops.
template <class Body>
ALWAYS_INLINE void for_each_block(int64_t vocabulary, Body body) {
  int64_t start = 0;
  for (; start + kBlock <= vocabulary; start += kBlock) body(start, kBlock);
  if (start < vocabulary) body(start, vocabulary - start);
}

// Asks memory for the block after the one at `source`: while a block is worked on, the processor does not look so far ahead.
template <class Element>
ALWAYS_INLINE void fetch_next(const Element* source) {
  constexpr int64_t kLine = 64 / sizeof(Element);
  for (int64_t i = kBlock; i < 2 * kBlock; i += kLine) __builtin_prefetch(source + i);
}

// `n` logits from `start` on as float32, -inf clamped; the rest of the block is masked.
ALWAYS_INLINE void load(const JsdMatrix& matrix, int64_t row, int64_t start, int64_t n, float* block) {
  const int64_t offset = row * matrix.row_stride + start;
  if (matrix.element_type == kBfloat16) {
    const uint16_t* source = static_cast<const uint16_t*>(matrix.data) + offset;
    fetch_next(source);
    for (int64_t i = 0; i < n; ++i) {
      const float logit = jsd::from_bf16(source[i]);
      block[i] = logit < jsd::kMasked ? jsd::kMasked : logit;
    }
  } else {
    const float* source = static_cast<const float*>(matrix.data) + offset;
    fetch_next(source);
    for (int64_t i = 0; i < n; ++i) block[i] = source[i] < jsd::kMasked ? jsd::kMasked : source[i];
  }
  for (int64_t i = n; i < kBlock; ++i) block[i] = jsd::kMasked;
}

ALWAYS_INLINE void store(const JsdMatrix& matrix, int64_t row, int64_t start, int64_t n, const float* block) {
  const int64_t offset = row * matrix.row_stride + start;
  if (matrix.element_type == kBfloat16) {
    uint16_t* target = static_cast<uint16_t*>(matrix.data) + offset;
    for (int64_t i = 0; i < n; ++i) target[i] = jsd::to_bf16(block[i]);
  } else {
    float* target = static_cast<float*>(matrix.data) + offset;
    for (int64_t i = 0; i < n; ++i) target[i] = block[i];
  }
}

// `n` entries of a row pair; the teacher's logits less the student's are taken once, or read where the matrix holds them.
struct Pair {
  float student[kBlock], teacher[kBlock], difference[kBlock];
};

// The teacher's half, beside the student's that is there.
ALWAYS_INLINE void load_teacher(const JsdTask& task, int64_t index, int64_t start, int64_t n, Pair& pair) {
  if (task.teacher_is_difference) {
    load(task.teacher, task.teacher_rows[index], start, n, pair.difference);
    for (int64_t i = n; i < kBlock; ++i) pair.difference[i] = 0.0f;
    for (int64_t i = 0; i < kBlock; ++i) {
      const float logit = pair.student[i] + pair.difference[i];
      pair.teacher[i] = logit < jsd::kMasked ? jsd::kMasked : logit;
    }
  } else {
    load(task.teacher, task.teacher_rows[index], start, n, pair.teacher);
    for (int64_t i = 0; i < kBlock; ++i) pair.difference[i] = pair.teacher[i] - pair.student[i];
  }
}

ALWAYS_INLINE void load_pair(const JsdTask& task, int64_t index, int64_t start, int64_t n, Pair& pair) {
  load(task.student, task.student_rows[index], start, n, pair.student);
  load_teacher(task, index, start, n, pair);
}

ALWAYS_INLINE float sum(const float* block) {
  float total = 0.0f;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < kBlock; ++i) total += block[i];
  return total;
}

// Largest entry; NaNs are passed over.
ALWAYS_INLINE float largest(const float* block) {
  float result = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : result)
  for (int64_t i = 0; i < kBlock; ++i) result = block[i] > result ? block[i] : result;
  return result;
}

// ---- a row --------------------------------------------------------------------------------------------------------------

// A row's highest logit, and the sum of 2^(scale * (logit - highest)): NaN if the row holds a NaN or +inf.
struct Normaliser {
  float highest = -std::numeric_limits<float>::infinity();
  double total = 0.0;
};

ALWAYS_INLINE void add_block(Normaliser& normaliser, const float* block, float scale) {
  const float block_highest = largest(block);
  if (block_highest > normaliser.highest) {
    normaliser.total *= std::exp2((static_cast<double>(normaliser.highest) - block_highest) * scale);
    normaliser.highest = block_highest;
  }
  const float highest = normaliser.highest;
  for (int64_t start = 0; start < kBlock; start += kRun) {
    float total = 0.0f;
#pragma omp simd reduction(+ : total)
    for (int64_t i = start; i < start + kRun; ++i) total += jsd::power_of_2((block[i] - highest) * scale).value;
    normaliser.total += total;
  }
}

ALWAYS_INLINE jsd::RowConstants constants_of(const JsdTask& task, int64_t index) {
  const double* normalisers = task.normalisers + 2 * index;
  return jsd::row_constants(normalisers[0] / jsd::kLn2, normalisers[1] / jsd::kLn2, jsd::scale_of(task.temperature));
}

// What a block adds: each entry's share of the value, the score h of its gradient Q (h - sum Q h) * constant, and Q. forward_kl's
// score is Q - P itself, and its Q is not set.
struct Terms {
  float value[kBlock], score[kBlock], q[kBlock];
};

// Where a whole block has |d| of at most two nats, polynomials in d take the place of a power and a logarithm an entry.
constexpr float kBlockLimit = 2.8853900f;  // in bits
using BlockPolynomials = jsd::NearPolynomialsOf<12>;

struct Divergence {
  float beta;
  BlockPolynomials near;
};

template <int32_t kDivergence>
ALWAYS_INLINE void near_terms(const float* d, const BlockPolynomials& near, Terms& terms) {
  for (int64_t i = 0; i < kBlock; ++i) {
    if (kDivergence == kForwardKl) {
      const float excess = d[i] * jsd::polynomial(near.excess, d[i]);
      terms.value[i] = (terms.q[i] + terms.q[i] * excess) * d[i];
      terms.score[i] = -terms.q[i] * excess;
    } else {
      terms.score[i] = d[i] * jsd::polynomial(near.score, d[i]);
      terms.value[i] = terms.q[i] * (d[i] * d[i]) * jsd::polynomial(near.value, d[i]);
    }
  }
}

// Two loops: in one, an entry's chain of dependent instructions would be longer than what a processor looks ahead.
template <int32_t kDivergence>
ALWAYS_INLINE void far_terms(const Pair& pair, jsd::RowConstants row, float beta, Terms& terms) {
  float d[kBlock], p[kBlock], ratio[kBlock], ratio_minus_one[kBlock];
  for (int64_t i = 0; i < kBlock; ++i) {
    const jsd::Probabilities e = jsd::probabilities(pair.student[i], pair.teacher[i], pair.difference[i], row);
    d[i] = e.d, p[i] = e.p, terms.q[i] = e.q, ratio[i] = e.ratio, ratio_minus_one[i] = e.ratio_minus_one;
  }
  for (int64_t i = 0; i < kBlock; ++i) {
    const jsd::Probabilities e = {d[i], p[i], terms.q[i], ratio[i], ratio_minus_one[i], d[i] > 0.0f};
    if (kDivergence == kForwardKl) {
      terms.value[i] = jsd::forward_kl(e);
      terms.score[i] = jsd::student_minus_teacher(e);
    } else {
      const jsd::Term term = jsd::generalised_jsd(e, beta);
      terms.value[i] = term.value;
      terms.score[i] = term.score;
    }
  }
}

template <int32_t kDivergence>
ALWAYS_INLINE void terms_of(const Pair& pair, jsd::RowConstants row, const Divergence& divergence, Terms& terms) {
  float d[kBlock];
  int32_t num_far = 0;
  for (int64_t i = 0; i < kBlock; ++i) {
    d[i] = pair.difference[i] * row.scale - row.normaliser_difference;
    num_far += !(std::fabs(d[i]) <= kBlockLimit);  // NaN is far
  }
  if (kDivergence != kReverseKl && num_far > 0) {
    far_terms<kDivergence>(pair, row, divergence.beta, terms);
    return;
  }
  for (int64_t i = 0; i < kBlock; ++i) terms.q[i] = jsd::probability(pair.student[i], row.student, row.scale);
  if (kDivergence != kReverseKl) {
    near_terms<kDivergence>(d, divergence.near, terms);
    return;
  }
  for (int64_t i = 0; i < kBlock; ++i) {
    terms.score[i] = -d[i];
    terms.value[i] = terms.q[i] * -d[i];
  }
}

// The factor that takes a gradient to nats per logit, times the row's own.
ALWAYS_INLINE float constant_of(const JsdTask& task, int64_t index) {
  const double scale = task.scales == nullptr ? 1.0 : task.scales[index];
  const double share = task.divergence == kJsd ? 1.0 - task.beta : 1.0;
  return static_cast<float>(scale * (task.divergence == kForwardKl ? 1.0 : share * jsd::kLn2) / task.temperature);
}

// The middle sweep: sums, in nats, and each entry's score into `scores` unless that is null.
template <int32_t kDivergence>
ALWAYS_INLINE void sum_row(const JsdTask& task, int64_t index, jsd::RowConstants row, const Divergence& divergence, float* scores) {
  Pair pair;
  Terms terms;
  double value = 0.0, expected = 0.0;
  for_each_block(task.vocabulary, [&](int64_t start, int64_t n) ALWAYS_INLINE_LAMBDA {
    load_pair(task, index, start, n, pair);
    terms_of<kDivergence>(pair, row, divergence, terms);
    if (scores != nullptr)
      for (int64_t i = 0; i < n; ++i) scores[start + i] = terms.score[i];
    float block_value = 0.0f, block_expected = 0.0f;
#pragma omp simd reduction(+ : block_value, block_expected)
    for (int64_t i = 0; i < kBlock; ++i) {
      block_value += terms.value[i];
      if (kDivergence != kForwardKl) block_expected += terms.q[i] * terms.score[i];
    }
    value += block_value;
    expected += block_expected;
  });
  task.sums[2 * index] = jsd::kLn2 * value;
  task.sums[2 * index + 1] = jsd::kLn2 * expected;
}

}  // namespace jsd_cpu
