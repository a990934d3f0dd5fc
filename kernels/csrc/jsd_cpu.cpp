// Divergence of listed rows of two logit matrices on CPUs: value and gradient in one visit to each row.
//
// A row is read in blocks (jsd_blocks.h), and rows are shared out among threads: a row's result depends neither on their number
// nor on its neighbours. (Instruction sets differ in the last bits, where one fuses a * b + c.)
// The interface is plain C with raw pointers (megatron_sd/ops/native/cpu_library.py holds its other half): nothing of torch or Python.
#include <cstddef>
#include <cstdint>
#include <vector>

#include "instruction_set.h"
#include "jsd.h"
#include "jsd_blocks.h"
#include "jsd_task.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace {

using namespace jsd_cpu;

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

ALWAYS_INLINE int64_t gradient_row(const JsdTask& task, int64_t index) {
  return task.gradient_rows == nullptr ? index : task.gradient_rows[index];
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
