// The rows of a language model's head on CPUs: what a loss needs of a row of logits in one visit, and the finished gradient in
// the logits' place in another.
//
// Between the two the caller's loss of these few numbers a row says how much each of them counts. Nothing of a row's length is
// kept beside the logits: the second visit makes probabilities, and at query rows the divergence's terms, once more.
// Rows are shared out among threads; a row's result depends neither on their number nor on its neighbours, nor on whether it is
// a query row, as far as the policy goes: the one loop over its blocks serves both.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "head_task.h"
#include "instruction_set.h"
#include "jsd.h"
#include "jsd_blocks.h"
#include "top_k.h"

namespace {

using namespace jsd_cpu;

// ---- first visit --------------------------------------------------------------------------------------------------------

// A row's highest logit, and with b = scale * (logit - highest) the sums of 2^b and of 2^b b: NaN if the row holds a NaN or +inf.
struct Moments {
  float highest = -std::numeric_limits<float>::infinity();
  double total = 0.0, weighted = 0.0;
};

// kLength powers are added up in float32: as many more than kRun as vectors hold more, so that a lane's share stays as short.
template <int64_t kLength>
ALWAYS_INLINE void add_block(Moments& row, const float* block, float scale) {
  const float block_highest = largest(block);
  if (block_highest > row.highest) {
    const double change = row.total == 0.0 ? 0.0 : (static_cast<double>(row.highest) - block_highest) * scale;
    const double factor = std::exp2(change);
    row.weighted = factor * (row.weighted + change * row.total);
    row.total *= factor;
    row.highest = block_highest;
  }
  const float highest = row.highest;
  for (int64_t start = 0; start < kBlock; start += kLength) {
    float total = 0.0f, weighted = 0.0f;
#pragma omp simd reduction(+ : total, weighted)
    for (int64_t i = start; i < start + kLength; ++i) {
      const float bits = (block[i] - highest) * scale;
      const float power = jsd::power_of_2(bits).value;
      total += power;
      weighted += power * bits;
    }
    row.total += total;
    row.weighted += weighted;
  }
}

// Log of the sum of powers in nats, -inf if nothing lies above kMasked.
template <class Sums>
ALWAYS_INLINE double normaliser_of(const Sums& row, float scale) {
  return jsd::kLn2 * jsd::log_normaliser(static_cast<double>(row.highest) * scale, row.total, scale);
}

// As it stands in memory: -inf stays.
ALWAYS_INLINE float logit_at(const JsdMatrix& matrix, int64_t row, int64_t column) {
  const int64_t offset = row * matrix.row_stride + column;
  if (matrix.element_type == kBfloat16) return jsd::from_bf16(static_cast<const uint16_t*>(matrix.data)[offset]);
  return static_cast<const float*>(matrix.data)[offset];
}

// log softmax of the target's logit, and the entropy; NaN for a row without a finite normaliser.
ALWAYS_INLINE void write_numbers(const Moments& row, float scale, float logit, float* logprob, float* entropy) {
  const double normaliser = normaliser_of(row, scale), spoilt = normaliser - normaliser;
  const double log_total = std::log2(row.total);
  *logprob = static_cast<float>(jsd::kLn2 * ((static_cast<double>(logit) - row.highest) * scale - log_total) + spoilt);
  *entropy = static_cast<float>(jsd::kLn2 * (log_total - row.weighted / row.total) + spoilt);
}

ALWAYS_INLINE int64_t num_events(const HeadTask& task) { return task.num_kept + task.has_tail; }

ALWAYS_INLINE std::vector<int64_t> support_of(const HeadTask& task, int64_t query) {
  TopK likeliest{static_cast<size_t>(task.num_kept)};
  Pair pair;
  for_each_block(task.pairs.vocabulary, [&](int64_t start, int64_t n) ALWAYS_INLINE_LAMBDA {
    load_pair(task.pairs, query, start, n, pair);
    const float* logits = task.support_of_student ? pair.student : pair.teacher;
    if (!(largest(logits) > likeliest.lowest)) return;
    for (int64_t i = 0; i < n; ++i) likeliest.add(logits[i], start + i);
  });
  return likeliest.columns(task.pairs.vocabulary);
}

// As the divergence takes it: what was clamped is -inf again.
ALWAYS_INLINE float unclamped(float logit) { return logit <= jsd::kMasked ? -std::numeric_limits<float>::infinity() : logit; }

// The likeliest tokens of a query row whose normalisers are known: their logits at both sides, and what lies outside of them.
ALWAYS_INLINE void read_support(const HeadTask& task, int64_t query) {
  const float scale = jsd::scale_of(task.pairs.temperature);
  const std::vector<int64_t> support = support_of(task, query);
  float *student = task.student_events + query * num_events(task), *teacher = task.teacher_events + query * num_events(task);
  Normaliser student_outside, teacher_outside;
  int64_t next = 0;
  Pair pair;
  for_each_block(task.pairs.vocabulary, [&](int64_t start, int64_t n) ALWAYS_INLINE_LAMBDA {
    load_pair(task.pairs, query, start, n, pair);
    for (; next < task.num_kept && support[next] < start + n; ++next) {
      const int64_t i = support[next] - start;
      task.support[query * task.num_kept + next] = support[next];
      student[next] = unclamped(pair.student[i]), teacher[next] = unclamped(pair.teacher[i]);
      pair.student[i] = pair.teacher[i] = jsd::kMasked;
    }
    add_block(student_outside, pair.student, scale);
    if (task.has_tail) add_block(teacher_outside, pair.teacher, scale);
  });
  const double* whole = task.pairs.normalisers + 2 * query;
  task.outside[query] = normaliser_of(student_outside, scale);
  task.truncated_masses[query] = static_cast<float>(std::exp(task.outside[query] - whole[0]));
  if (task.has_tail) {
    student[next] = static_cast<float>(task.outside[query] * task.pairs.temperature);
    teacher[next] = static_cast<float>(normaliser_of(teacher_outside, scale) * task.pairs.temperature);
  }
  // A row of NaN, +inf or nothing is one wherever in it that stands.
  const double spoilt = (whole[0] - whole[0]) + (task.support_of_student ? 0.0 : whole[1] - whole[1]);
  for (int64_t i = 0; i < num_events(task); ++i) student[i] += static_cast<float>(spoilt);
}

template <int32_t kDivergence, int64_t kLength>
ALWAYS_INLINE void read_row(const HeadTask& task, int64_t row, const Divergence& divergence) {
  const JsdTask& pairs = task.pairs;
  const float scale = jsd::scale_of(task.temperature), pair_scale = jsd::scale_of(pairs.temperature);
  const int64_t query = task.queries[row], target = task.targets[row];
  const bool has_pair = query >= 0 && (kDivergence != kNoDivergence || task.num_kept > 0), is_same = scale == pair_scale;
  Moments student, teacher;
  Normaliser pair_student, pair_teacher;
  Pair pair;
  for_each_block(pairs.vocabulary, [&](int64_t start, int64_t n) ALWAYS_INLINE_LAMBDA {
    load(pairs.student, row, start, n, pair.student);
    add_block<kLength>(student, pair.student, scale);
    if (query < 0) return;
    load_teacher(pairs, query, start, n, pair);
    add_block<kLength>(teacher, pair.teacher, scale);
    if (!has_pair || is_same) return;
    add_block(pair_student, pair.student, pair_scale);
    add_block(pair_teacher, pair.teacher, pair_scale);
  });
  const float logit = logit_at(pairs.student, row, target);
  task.normalisers[row] = normaliser_of(student, scale);
  write_numbers(student, scale, logit, task.logprobs + row, task.entropies + row);
  if (query < 0) return;
  const float read = logit_at(pairs.teacher, query, target);
  write_numbers(teacher, scale, pairs.teacher_is_difference ? logit + read : read, task.teacher_logprobs + query,
                task.teacher_entropies + query);
  if (!has_pair) return;
  pairs.normalisers[2 * query] = is_same ? normaliser_of(student, scale) : normaliser_of(pair_student, pair_scale);
  pairs.normalisers[2 * query + 1] = is_same ? normaliser_of(teacher, scale) : normaliser_of(pair_teacher, pair_scale);
  if constexpr (kDivergence != kNoDivergence) {
    sum_row<kDivergence>(pairs, query, constants_of(pairs, query), divergence, nullptr);
    pairs.values[query] = static_cast<float>(pairs.sums[2 * query]);
  } else {
    read_support(task, query);
  }
}

// ---- second visit -------------------------------------------------------------------------------------------------------

// What a row's gradient is made of: with p the softmax and H its entropy, all over the temperature,
// slope (onehot - p) - entropy_slope p (log p + H) = slope onehot + p (constant + factor log2 p).
struct PolicyGradient {
  jsd::RowSide side;
  float scale, at_target, constant, factor;
};

ALWAYS_INLINE PolicyGradient policy_gradient(const HeadTask& task, int64_t row) {
  const double slope = task.slopes == nullptr ? 0.0 : task.slopes[row] / task.temperature;
  const double entropy_slope = task.entropy_slopes == nullptr ? 0.0 : task.entropy_slopes[row] / task.temperature;
  const double normaliser = task.normalisers[row] / jsd::kLn2, spoilt = normaliser - normaliser;
  const float scale = jsd::scale_of(task.temperature);
  const double of_entropy = entropy_slope == 0.0 ? 0.0 : entropy_slope * task.entropies[row];
  return {jsd::row_side(normaliser + spoilt, scale), scale, static_cast<float>(slope), static_cast<float>(-slope - of_entropy),
          static_cast<float>(-entropy_slope * jsd::kLn2)};
}

// Adds the divergence's gradient to that of the policy.
template <int32_t kDivergence>
ALWAYS_INLINE void add_divergence(const Pair& pair, jsd::RowConstants row, const Divergence& divergence, float constant,
                                  float expected, float* gradient) {
  Terms terms;
  terms_of<kDivergence>(pair, row, divergence, terms);
  for (int64_t i = 0; i < kBlock; ++i) {
    const float factor = kDivergence == kForwardKl ? 1.0f : terms.q[i];
    gradient[i] += constant * factor * (terms.score[i] - expected);
  }
}

// Adds a block's part of the gradient in the likeliest tokens, and in the tail, which all others share by probability. `next`: the
// first of the likeliest that lies in this block or behind it.
ALWAYS_INLINE void add_events(const HeadTask& task, int64_t query, const float* student, int64_t start, int64_t n, int64_t& next,
                              float* gradient) {
  const int64_t* support = task.support + query * task.num_kept;
  const float* slopes = task.event_slopes + query * num_events(task);
  float tail[kBlock];
  const bool has_tail = task.has_tail && std::isfinite(task.outside[query]);
  if (has_tail) {
    const float scale = jsd::scale_of(task.pairs.temperature);
    const jsd::RowSide side = jsd::row_side(task.outside[query] / jsd::kLn2, scale);
    for (int64_t i = 0; i < kBlock; ++i) {
      const float logit = student[i] < side.reference ? student[i] : side.reference;  // one of the likeliest may lie above
      tail[i] = slopes[task.num_kept] * jsd::probability(logit, side, scale);
    }
  }
  for (; next < task.num_kept && support[next] < start + n; ++next) {
    gradient[support[next] - start] += slopes[next];
    tail[support[next] - start] = 0.0f;
  }
  if (has_tail)
    for (int64_t i = 0; i < kBlock; ++i) gradient[i] += tail[i];
}

template <int32_t kDivergence>
ALWAYS_INLINE void write_row(const HeadTask& task, int64_t row, const Divergence& divergence) {
  const JsdTask& pairs = task.pairs;
  const int64_t query = task.queries[row], target = task.targets[row];
  const bool has_divergence = kDivergence != kNoDivergence && query >= 0 && pairs.scales != nullptr;
  const PolicyGradient policy = policy_gradient(task, row);
  const jsd::RowConstants constants = has_divergence ? constants_of(pairs, query) : jsd::RowConstants{};
  const float constant = has_divergence ? constant_of(pairs, query) : 0.0f;
  const float expected = has_divergence ? static_cast<float>(pairs.sums[2 * query + 1] / jsd::kLn2) : 0.0f;
  int64_t next = 0;
  Pair pair;
  float gradient[kBlock];
  for_each_block(pairs.vocabulary, [&](int64_t start, int64_t n) ALWAYS_INLINE_LAMBDA {
    load(pairs.student, row, start, n, pair.student);
    for (int64_t i = 0; i < kBlock; ++i) {
      const float bits = (pair.student[i] - policy.side.reference) * policy.scale + policy.side.correction;
      gradient[i] = jsd::power_of_2(bits).value * (policy.constant + policy.factor * bits);
    }
    if (target >= start && target < start + n) gradient[target - start] += policy.at_target;
    if constexpr (kDivergence != kNoDivergence) {
      if (has_divergence) {
        load_teacher(pairs, query, start, n, pair);
        add_divergence<kDivergence>(pair, constants, divergence, constant, expected, gradient);
      }
    } else if (query >= 0 && task.event_slopes != nullptr) {
      add_events(task, query, pair.student, start, n, next, gradient);
    }
    store(pairs.student, row, start, n, gradient);
  });
}

// ---- one copy of the row programs an instruction set -------------------------------------------------------------------------

using RowProgram = void (*)(const HeadTask&, int64_t, const Divergence&);

struct RowPrograms {
  RowProgram read, write;
};

template <int64_t kLength>
ALWAYS_INLINE void read_any(const HeadTask& task, int64_t row, const Divergence& divergence) {
  if (task.pairs.divergence == kJsd) return read_row<kJsd, kLength>(task, row, divergence);
  if (task.pairs.divergence == kForwardKl) return read_row<kForwardKl, kLength>(task, row, divergence);
  if (task.pairs.divergence == kReverseKl) return read_row<kReverseKl, kLength>(task, row, divergence);
  read_row<kNoDivergence, kLength>(task, row, divergence);
}

ALWAYS_INLINE void write_any(const HeadTask& task, int64_t row, const Divergence& divergence) {
  if (task.pairs.divergence == kJsd) return write_row<kJsd>(task, row, divergence);
  if (task.pairs.divergence == kForwardKl) return write_row<kForwardKl>(task, row, divergence);
  if (task.pairs.divergence == kReverseKl) return write_row<kReverseKl>(task, row, divergence);
  write_row<kNoDivergence>(task, row, divergence);
}

#define ROW_PROGRAMS(name, attribute, length)                                                                  \
  attribute void read_row_##name(const HeadTask& task, int64_t row, const Divergence& divergence) {            \
    read_any<length>(task, row, divergence);                                                                   \
  }                                                                                                            \
  attribute void write_row_##name(const HeadTask& task, int64_t row, const Divergence& divergence) {           \
    write_any(task, row, divergence);                                                                          \
  }

ROW_PROGRAMS(baseline, , kRun)
#if defined(__x86_64__)
ROW_PROGRAMS(avx2, FOR_AVX2, 2 * kRun)
ROW_PROGRAMS(avx512, FOR_AVX512, 4 * kRun)
#endif

RowPrograms programs_for(int32_t instruction_set) {
#if defined(__x86_64__)
  if (instruction_set == kAvx512) return {read_row_avx512, write_row_avx512};
  if (instruction_set == kAvx2) return {read_row_avx2, write_row_avx2};
#endif
  (void)instruction_set;
  return {read_row_baseline, write_row_baseline};
}

void for_each_row(const HeadTask& task, RowProgram program) {
  const Divergence divergence = {static_cast<float>(task.pairs.beta), jsd::near_polynomials<12>(task.pairs.beta, kBlockLimit)};
#pragma omp parallel for num_threads(task.num_threads) schedule(dynamic)
  for (int64_t row = 0; row < task.num_rows; ++row) program(task, row, divergence);
}

}  // namespace

extern "C" {

// Of both: targets and row numbers must be in range and num_threads at least 1: the caller has checked them.

// Writes logprobs, entropies and normalisers of all rows; of query rows also the teacher's, and unless pairs.divergence is
// kNoDivergence their values, normalisers and sums; with num_kept, normalisers and all that the task says of the likeliest tokens.
void megatron_sd_head_values(const HeadTask* task) { for_each_row(*task, programs_for(task->instruction_set).read); }

// Reads what the first visit wrote, and writes the loss's gradient over the logits. pairs.scales: its slopes in the divergences;
// null (unlike elsewhere): 0.
void megatron_sd_head_gradient(const HeadTask* task) { for_each_row(*task, programs_for(task->instruction_set).write); }

}  // extern "C"
