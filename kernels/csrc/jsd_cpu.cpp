// Divergence of listed rows of two logit matrices on CPUs: value and gradient in one visit to each row.
//
// A row is read in blocks that stay in the first-level cache; a short last block is filled up with masked entries, which add
// nothing. Sums are pairwise within a block and double precision across blocks, always in the same order, and rows are shared
// out among threads: a row's result depends neither on their number nor on its neighbours. (Instruction sets differ in the last
// bits, where one fuses a * b + c.)
// The interface is plain C with raw pointers (megatron_sd/ops/native.py holds its other half): nothing of torch or Python.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "jsd.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

#define ALWAYS_INLINE inline __attribute__((always_inline))

namespace {

constexpr int64_t kBlock = 512;

enum Divergence : int32_t { kJsd = 0, kForwardKl = 1, kReverseKl = 2 };
enum ElementType : int32_t { kFloat32 = 0, kBfloat16 = 1 };
enum InstructionSet : int32_t { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

}  // namespace

extern "C" {

// A matrix of logits; columns are adjacent, rows lie row_stride elements apart.
struct JsdMatrix {
  void* data;
  int64_t row_stride;
  int32_t element_type;
};

struct JsdTask {
  JsdMatrix student, teacher;
  JsdMatrix gradient;  // [num_rows, vocabulary], of the student's element type; data is null when no gradient is wanted
  const int64_t *student_rows, *teacher_rows;
  float* values;   // [num_rows]
  float* scratch;  // [num_threads, vocabulary] with a bfloat16 gradient, else null
  int64_t num_rows, vocabulary;
  double beta, temperature;
  int32_t divergence, num_threads, instruction_set;
};

struct JsdScatterTask {
  JsdMatrix gradient;  // [num_rows, vocabulary]
  JsdMatrix out;       // [num_out_rows, vocabulary], of the same element type
  const int64_t* rows;
  const float* scales;  // [num_rows]
  int64_t num_rows, num_out_rows, vocabulary;
  int32_t num_threads, instruction_set;
};

}  // extern "C"

namespace {

// ---- blocks -------------------------------------------------------------------------------------------------------------

ALWAYS_INLINE int64_t entries_left(int64_t start, int64_t vocabulary) {
  return vocabulary - start < kBlock ? vocabulary - start : kBlock;
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

// Pairwise sum; the block is used up.
ALWAYS_INLINE float sum(float* block) {
  for (int64_t half = kBlock / 2; half >= 16; half /= 2)
    for (int64_t i = 0; i < half; ++i) block[i] += block[i + half];
  float total = 0.0f;
  for (int64_t i = 0; i < 16; ++i) total += block[i];
  return total;
}

// Largest entry; NaNs are passed over.
ALWAYS_INLINE float largest(const float* block) {
  float lanes[64];
  for (int64_t i = 0; i < 64; ++i) lanes[i] = block[i];
  for (int64_t start = 64; start < kBlock; start += 64)
    for (int64_t i = 0; i < 64; ++i) lanes[i] = block[start + i] > lanes[i] ? block[start + i] : lanes[i];
  float result = lanes[0] == lanes[0] ? lanes[0] : -std::numeric_limits<float>::infinity();
  for (int64_t i = 1; i < 64; ++i) result = lanes[i] > result ? lanes[i] : result;
  return result;
}

// ---- a row --------------------------------------------------------------------------------------------------------------

// A row's highest logit, and the sum of 2^(scale * (logit - highest)): NaN if the row holds a NaN or +inf, or nothing above kMasked.
struct Normaliser {
  float highest;
  double total;
};

ALWAYS_INLINE Normaliser normaliser_of(const JsdMatrix& matrix, int64_t row, int64_t vocabulary, float scale) {
  float block[kBlock];
  Normaliser result = {-std::numeric_limits<float>::infinity(), 0.0};
  for (int64_t start = 0; start < vocabulary; start += kBlock) {
    load(matrix, row, start, entries_left(start, vocabulary), block);
    const float highest = largest(block);
    if (highest > result.highest) {
      result.total *= std::exp2((static_cast<double>(result.highest) - highest) * scale);
      result.highest = highest;
    }
    for (int64_t i = 0; i < kBlock; ++i) block[i] = jsd::power_of_2((block[i] - result.highest) * scale).value;
    result.total += sum(block);
  }
  if (!(result.highest > jsd::kMasked)) result.total = std::numeric_limits<double>::quiet_NaN();
  return result;
}

ALWAYS_INLINE jsd::RowConstants constants_of(const JsdTask& task, int64_t index) {
  const float scale = static_cast<float>(1.0 / (jsd::kLn2 * task.temperature));
  const Normaliser student = normaliser_of(task.student, task.student_rows[index], task.vocabulary, scale);
  const Normaliser teacher = normaliser_of(task.teacher, task.teacher_rows[index], task.vocabulary, scale);
  const double shift = (static_cast<double>(teacher.highest) - student.highest) * scale;
  return {scale,
          {student.highest, static_cast<float>(1.0 / student.total)},
          {teacher.highest, static_cast<float>(1.0 / teacher.total)},
          static_cast<float>(shift + std::log2(teacher.total / student.total))};
}

struct Sums {
  double value;
  double score;  // sum of Q h
};

// The middle sweep of generalised_jsd and reverse_kl: sums, and each entry's score into `scores` unless that is null.
template <class TermOf>
ALWAYS_INLINE Sums sum_terms(const JsdTask& task, int64_t index, jsd::RowConstants row, float* scores, TermOf term_of) {
  float student[kBlock], teacher[kBlock], value[kBlock], weighted[kBlock];
  Sums sums = {0.0, 0.0};
  for (int64_t start = 0; start < task.vocabulary; start += kBlock) {
    const int64_t n = entries_left(start, task.vocabulary);
    load(task.student, task.student_rows[index], start, n, student);
    load(task.teacher, task.teacher_rows[index], start, n, teacher);
    for (int64_t i = 0; i < kBlock; ++i) {
      const jsd::Probabilities e = jsd::probabilities(student[i], teacher[i], row);
      const jsd::Term term = term_of(e);
      value[i] = term.value;
      weighted[i] = e.q * term.score;
      student[i] = term.score;
    }
    if (scores != nullptr)
      for (int64_t i = 0; i < n; ++i) scores[start + i] = student[i];
    sums.value += sum(value);
    sums.score += sum(weighted);
  }
  return sums;
}

// The last sweep: gradient = constant * Q (h - sum Q h). `scores` may be the gradient's own row.
ALWAYS_INLINE void write_gradient(
    const JsdTask& task, int64_t index, jsd::RowConstants row, const float* scores, float expected, float constant) {
  float student[kBlock], gradient[kBlock];
  for (int64_t start = 0; start < task.vocabulary; start += kBlock) {
    const int64_t n = entries_left(start, task.vocabulary);
    load(task.student, task.student_rows[index], start, n, student);
    for (int64_t i = 0; i < n; ++i) gradient[i] = scores[start + i];
    for (int64_t i = n; i < kBlock; ++i) gradient[i] = 0.0f;
    for (int64_t i = 0; i < kBlock; ++i) {
      const float q = jsd::probability(student[i], row.student, row.scale);
      gradient[i] = constant * q * (gradient[i] - expected);
    }
    store(task.gradient, index, start, n, gradient);
  }
}

// Forward KL needs no sum for its gradient: one sweep.
ALWAYS_INLINE double forward_kl_row(const JsdTask& task, int64_t index, jsd::RowConstants row) {
  const float inverse_temperature = static_cast<float>(1.0 / task.temperature);
  float student[kBlock], teacher[kBlock], value[kBlock];
  double total = 0.0;
  for (int64_t start = 0; start < task.vocabulary; start += kBlock) {
    const int64_t n = entries_left(start, task.vocabulary);
    load(task.student, task.student_rows[index], start, n, student);
    load(task.teacher, task.teacher_rows[index], start, n, teacher);
    for (int64_t i = 0; i < kBlock; ++i) {
      const jsd::Probabilities e = jsd::probabilities(student[i], teacher[i], row);
      value[i] = jsd::forward_kl(e);
      student[i] = inverse_temperature * jsd::student_minus_teacher(e);
    }
    total += sum(value);
    if (task.gradient.data != nullptr) store(task.gradient, index, start, n, student);
  }
  return total;
}

ALWAYS_INLINE void visit_row(const JsdTask& task, int64_t index, float* scratch) {
  const jsd::RowConstants row = constants_of(task, index);
  if (task.divergence == kForwardKl) {
    task.values[index] = static_cast<float>(jsd::kLn2 * forward_kl_row(task, index, row));
    return;
  }
  float* scores = nullptr;
  if (task.gradient.data != nullptr)
    scores = task.gradient.element_type == kBfloat16
                 ? scratch
                 : static_cast<float*>(task.gradient.data) + index * task.gradient.row_stride;
  const float beta = static_cast<float>(task.beta);
  const bool is_jsd = task.divergence == kJsd;
  const auto jsd_term = [beta](jsd::Probabilities e) __attribute__((always_inline)) { return jsd::generalised_jsd(e, beta); };
  const auto reverse_term = [](jsd::Probabilities e) __attribute__((always_inline)) { return jsd::reverse_kl(e); };
  const Sums sums = is_jsd ? sum_terms(task, index, row, scores, jsd_term)
                           : sum_terms(task, index, row, scores, reverse_term);
  task.values[index] = static_cast<float>(jsd::kLn2 * sums.value);
  const float constant = static_cast<float>((is_jsd ? 1.0 - task.beta : 1.0) * jsd::kLn2 / task.temperature);
  if (scores != nullptr) write_gradient(task, index, row, scores, static_cast<float>(sums.score), constant);
}

// out[row] = sum over the list's entries of this row of scale * gradient; first[row] and next[i] chain them, -1 ends a chain.
ALWAYS_INLINE void scatter_row(const JsdScatterTask& task, int64_t row, int64_t first, const int64_t* next) {
  float total[kBlock], block[kBlock];
  for (int64_t start = 0; start < task.vocabulary; start += kBlock) {
    const int64_t n = entries_left(start, task.vocabulary);
    for (int64_t i = 0; i < kBlock; ++i) total[i] = 0.0f;
    for (int64_t index = first; index >= 0; index = next[index]) {
      const float scale = task.scales[index];
      load(task.gradient, index, start, n, block);
      for (int64_t i = 0; i < kBlock; ++i) total[i] += scale * block[i];
    }
    store(task.out, row, start, n, total);
  }
}

// ---- one copy of the row programs an instruction set -------------------------------------------------------------------------

using VisitRow = void (*)(const JsdTask&, int64_t, float*);
using ScatterRow = void (*)(const JsdScatterTask&, int64_t, int64_t, const int64_t*);

struct RowPrograms {
  VisitRow visit;
  ScatterRow scatter;
};

#define ROW_PROGRAMS(name, attribute)                                                                              \
  attribute void visit_row_##name(const JsdTask& task, int64_t index, float* scratch) {                            \
    visit_row(task, index, scratch);                                                                               \
  }                                                                                                                \
  attribute void scatter_row_##name(const JsdScatterTask& task, int64_t row, int64_t first, const int64_t* next) { \
    scatter_row(task, row, first, next);                                                                           \
  }

ROW_PROGRAMS(baseline, )
#if defined(__x86_64__)
ROW_PROGRAMS(avx2, __attribute__((target("avx2,fma"))))
ROW_PROGRAMS(avx512, __attribute__((target("fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"))))
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
  if (instruction_set == kAvx512) return {visit_row_avx512, scatter_row_avx512};
  if (instruction_set == kAvx2) return {visit_row_avx2, scatter_row_avx2};
#endif
  (void)instruction_set;
  return {visit_row_baseline, scatter_row_baseline};
}

int thread_index() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
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

// Row numbers must be in range and num_threads at least 1: the caller has checked them.
void megatron_sd_jsd_rows(const JsdTask* task) {
  const RowPrograms programs = programs_for(task->instruction_set);
#pragma omp parallel for num_threads(task->num_threads) schedule(static)
  for (int64_t index = 0; index < task->num_rows; ++index)
    programs.visit(*task, index, task->scratch == nullptr ? nullptr : task->scratch + thread_index() * task->vocabulary);
}

// Every row of `out` is written: rows that are not listed become 0, rows listed several times get the sum in list order.
void megatron_sd_scatter_rows(const JsdScatterTask* task) {
  const RowPrograms programs = programs_for(task->instruction_set);
  std::vector<int64_t> first(static_cast<size_t>(task->num_out_rows), -1), next(static_cast<size_t>(task->num_rows), -1);
  for (int64_t index = task->num_rows - 1; index >= 0; --index) {
    next[index] = first[task->rows[index]];
    first[task->rows[index]] = index;
  }
#pragma omp parallel for num_threads(task->num_threads) schedule(static)
  for (int64_t row = 0; row < task->num_out_rows; ++row) programs.scatter(*task, row, first[row], next.data());
}

}  // extern "C"
