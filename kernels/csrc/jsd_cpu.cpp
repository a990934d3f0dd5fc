// Divergence of listed rows of two logit matrices on CPUs: value and gradient in one visit to each row.
//
// A row is read in blocks that stay in the first-level cache; a short last block is filled up with masked entries, which add
// nothing. Sums are pairwise within a block and double precision across blocks, always in the same order, and rows are shared
// out among threads: a row's result depends neither on their number nor on its neighbours. (Instruction sets differ in the last
// bits, where one fuses a * b + c.)
// The interface is plain C with raw pointers (megatron_sd/ops/native/cpu_library.py holds its other half): nothing of torch or Python.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "instruction_set.h"
#include "jsd.h"
#include "jsd_task.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

#define ALWAYS_INLINE_LAMBDA __attribute__((always_inline))

namespace {

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

// `n` logits from `start` on as float32, -inf clamped; the rest of the block is masked.
ALWAYS_INLINE void load(const JsdMatrix& matrix, int64_t row, int64_t start, int64_t n, float* block) {
  const int64_t offset = row * matrix.row_stride + start;
  if (matrix.element_type == kBfloat16) {
    const uint16_t* source = static_cast<const uint16_t*>(matrix.data) + offset;
    for (int64_t i = 0; i < n; ++i) {
      const float logit = jsd::from_bf16(source[i]);
      block[i] = logit < jsd::kMasked ? jsd::kMasked : logit;
    }
  } else {
    const float* source = static_cast<const float*>(matrix.data) + offset;
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

ALWAYS_INLINE void load_pair(const JsdTask& task, int64_t index, int64_t start, int64_t n, Pair& pair) {
  load(task.student, task.student_rows[index], start, n, pair.student);
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

ALWAYS_INLINE void normalise_row(const JsdTask& task, int64_t index) {
  const float scale = jsd::scale_of(task.temperature);
  Normaliser student, teacher;
  Pair pair;
  for_each_block(task.vocabulary, [&](int64_t start, int64_t n) ALWAYS_INLINE_LAMBDA {
    load_pair(task, index, start, n, pair);
    add_block(student, pair.student, scale);
    add_block(teacher, pair.teacher, scale);
  });
  task.normalisers[2 * index] = jsd::kLn2 * jsd::log_normaliser(static_cast<double>(student.highest) * scale, student.total, scale);
  task.normalisers[2 * index + 1] = jsd::kLn2 * jsd::log_normaliser(static_cast<double>(teacher.highest) * scale, teacher.total, scale);
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

ALWAYS_INLINE int64_t gradient_row(const JsdTask& task, int64_t index) {
  return task.gradient_rows == nullptr ? index : task.gradient_rows[index];
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

// The last sweep of generalised_jsd and reverse_kl. `scores` may be the gradient's own row.
ALWAYS_INLINE void write_gradient(const JsdTask& task, int64_t index, const float* scores) {
  const jsd::RowConstants row = constants_of(task, index);
  const float constant = constant_of(task, index);
  const float expected = static_cast<float>(task.sums[2 * index + 1] / jsd::kLn2);
  float student[kBlock], gradient[kBlock];
  for_each_block(task.vocabulary, [&](int64_t start, int64_t n) ALWAYS_INLINE_LAMBDA {
    load(task.student, task.student_rows[index], start, n, student);
    for (int64_t i = 0; i < n; ++i) gradient[i] = scores[start + i];
    for (int64_t i = n; i < kBlock; ++i) gradient[i] = 0.0f;
    for (int64_t i = 0; i < kBlock; ++i) {
      const float q = jsd::probability(student[i], row.student, row.scale);
      gradient[i] = constant * q * (gradient[i] - expected);
    }
    store(task.gradient, gradient_row(task, index), start, n, gradient);
  });
}

// The gradient, its scores computed where they are used; returns the value in nats. forward_kl needs no sum for its gradient, so
// that this is its middle and last sweep together; the others read task.sums.
template <int32_t kDivergence>
ALWAYS_INLINE double sweep_gradient(const JsdTask& task, int64_t index, jsd::RowConstants row, const Divergence& divergence) {
  const float constant = constant_of(task, index);
  const float expected = kDivergence == kForwardKl ? 0.0f : static_cast<float>(task.sums[2 * index + 1] / jsd::kLn2);
  Pair pair;
  Terms terms;
  double value = 0.0;
  for_each_block(task.vocabulary, [&](int64_t start, int64_t n) ALWAYS_INLINE_LAMBDA {
    load_pair(task, index, start, n, pair);
    terms_of<kDivergence>(pair, row, divergence, terms);
    for (int64_t i = 0; i < kBlock; ++i) {
      const float factor = kDivergence == kForwardKl ? 1.0f : jsd::probability(pair.student[i], row.student, row.scale);
      terms.score[i] = constant * factor * (terms.score[i] - expected);
    }
    value += sum(terms.value);
    store(task.gradient, gradient_row(task, index), start, n, terms.score);
  });
  return jsd::kLn2 * value;
}

// What a row program does: everything, or one of the steps between which a vocabulary in shards has to communicate.
enum Step : int32_t { kEverything = 0, kNormalise = 1, kSum = 2, kGradient = 3 };

// After the normalisers. forward_kl has its value and gradient from one sweep.
template <int32_t kDivergence>
ALWAYS_INLINE void run_sweeps(const JsdTask& task, int64_t index, int32_t step, const Divergence& divergence, float* scores) {
  const jsd::RowConstants row = constants_of(task, index);
  const bool in_one_sweep = kDivergence == kForwardKl && step == kEverything && task.gradient.data != nullptr;
  if (step == kSum || (step == kEverything && !in_one_sweep)) sum_row<kDivergence>(task, index, row, divergence, scores);
  if (step != kGradient && !in_one_sweep) return;
  const double value = sweep_gradient<kDivergence>(task, index, row, divergence);
  if (in_one_sweep) task.sums[2 * index] = value, task.sums[2 * index + 1] = 0.0;
}

ALWAYS_INLINE void run_row(const JsdTask& task, int64_t index, int32_t step, const Divergence& divergence, float* scratch) {
  if (step == kEverything || step == kNormalise) normalise_row(task, index);
  if (step == kNormalise) return;
  const bool keeps_scores = step == kEverything && task.divergence != kForwardKl && task.gradient.data != nullptr;
  float* scores = keeps_scores ? scratch : nullptr;
  if (keeps_scores && scratch == nullptr)
    scores = static_cast<float*>(task.gradient.data) + gradient_row(task, index) * task.gradient.row_stride;
  if (task.divergence == kJsd) run_sweeps<kJsd>(task, index, step, divergence, scores);
  if (task.divergence == kForwardKl) run_sweeps<kForwardKl>(task, index, step, divergence, scores);
  if (task.divergence == kReverseKl) run_sweeps<kReverseKl>(task, index, step, divergence, scores);
  if (keeps_scores) write_gradient(task, index, scores);
  if (step == kEverything) task.values[index] = static_cast<float>(task.sums[2 * index]);
}

// out[row] = sum over the list's entries of this row of scale * gradient; first[row] and next[i] chain them, -1 ends a chain.
ALWAYS_INLINE void scatter_row(const JsdScatterTask& task, int64_t row, int64_t first, const int64_t* next) {
  float total[kBlock], block[kBlock];
  for_each_block(task.vocabulary, [&](int64_t start, int64_t n) ALWAYS_INLINE_LAMBDA {
    for (int64_t i = 0; i < kBlock; ++i) total[i] = 0.0f;
    for (int64_t index = first; index >= 0; index = next[index]) {
      const float scale = task.scales[index];
      load(task.gradient, index, start, n, block);
      for (int64_t i = 0; i < kBlock; ++i) total[i] += scale * block[i];
    }
    store(task.out, row, start, n, total);
  });
}

// ---- one copy of the row programs an instruction set -------------------------------------------------------------------------

using RunRow = void (*)(const JsdTask&, int64_t, int32_t, const Divergence&, float*);
using ScatterRow = void (*)(const JsdScatterTask&, int64_t, int64_t, const int64_t*);

struct RowPrograms {
  RunRow run;
  ScatterRow scatter;
};

#define ROW_PROGRAMS(name, attribute)                                                                              \
  attribute void run_row_##name(const JsdTask& task, int64_t index, int32_t step, const Divergence& divergence,    \
                                float* scratch) {                                                                  \
    run_row(task, index, step, divergence, scratch);                                                               \
  }                                                                                                                \
  attribute void scatter_row_##name(const JsdScatterTask& task, int64_t row, int64_t first, const int64_t* next) { \
    scatter_row(task, row, first, next);                                                                           \
  }

ROW_PROGRAMS(baseline, )
#if defined(__x86_64__)
ROW_PROGRAMS(avx2, FOR_AVX2)
ROW_PROGRAMS(avx512, FOR_AVX512)
#endif

InstructionSet best_instruction_set() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
    return kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
  return kBaseline;
}

RowPrograms programs_for(int32_t instruction_set) {
#if defined(__x86_64__)
  if (instruction_set == kAvx512) return {run_row_avx512, scatter_row_avx512};
  if (instruction_set == kAvx2) return {run_row_avx2, scatter_row_avx2};
#endif
  (void)instruction_set;
  return {run_row_baseline, scatter_row_baseline};
}

int thread_index() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

void for_each_row(const JsdTask& task, Step step) {
  const RowPrograms programs = programs_for(task.instruction_set);
  const Divergence divergence = {static_cast<float>(task.beta), jsd::near_polynomials<12>(task.beta, kBlockLimit)};
  float* scratch = static_cast<float*>(task.scratch);
#pragma omp parallel for num_threads(task.num_threads) schedule(dynamic)
  for (int64_t index = 0; index < task.num_rows; ++index)
    programs.run(task, index, step, divergence, scratch == nullptr ? nullptr : scratch + thread_index() * task.vocabulary);
}

}  // namespace

extern "C" {

// The newest instruction set that this processor and this build both have; tasks must not name a newer one.
int32_t megatron_sd_instruction_set() { return best_instruction_set(); }

int32_t megatron_sd_has_openmp() {
#if defined(_OPENMP)
  return 1;
#else
  return 0;
#endif
}

const char* megatron_sd_compiler() { return __VERSION__; }

// Of all four: row numbers must be in range and num_threads at least 1: the caller has checked them.

// Everything: values, and gradients if wanted; normalisers and sums are written on the way. scratch: [num_threads, vocabulary]
// float32 where a gradient of jsd or reverse_kl is bfloat16 or overwrites the student, else null.
void megatron_sd_jsd_rows(const JsdTask* task) { for_each_row(*task, kEverything); }

// The split steps, for a vocabulary in shards: each reads what the ones before it wrote, combined over all shards.
void megatron_sd_jsd_normalisers(const JsdTask* task) { for_each_row(*task, kNormalise); }
void megatron_sd_jsd_sums(const JsdTask* task) { for_each_row(*task, kSum); }
void megatron_sd_jsd_gradient(const JsdTask* task) { for_each_row(*task, kGradient); }

// Every row of `out` is written: rows that are not listed become 0, rows listed several times get the sum in list order.
void megatron_sd_scatter_rows(const JsdScatterTask* task) {
  const RowPrograms programs = programs_for(task->instruction_set);
  std::vector<int64_t> first(static_cast<size_t>(task->out.num_rows), -1), next(static_cast<size_t>(task->gradient.num_rows), -1);
  for (int64_t index = task->gradient.num_rows - 1; index >= 0; --index) {
    next[index] = first[task->rows[index]];
    first[task->rows[index]] = index;
  }
#pragma omp parallel for num_threads(task->num_threads) schedule(static)
  for (int64_t row = 0; row < task->out.num_rows; ++row) programs.scatter(*task, row, first[row], next.data());
}

}  // extern "C"
