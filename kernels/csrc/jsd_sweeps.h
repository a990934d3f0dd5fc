// What one GPU thread does with its vectors of a row: loads, the three sweeps, stores.
//
// Nothing here knows of other threads, so the same lines run on a host (tests/ops/replay). A vector is 16 bytes of the wider of the
// two element types. Where a block's part of a row ends within a vector, the missing entries count as masked.
#pragma once

#include "jsd.h"
#include "jsd_task.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define JSD_DEVICE __device__ __forceinline__
#else
#define JSD_DEVICE inline
#endif

#if defined(__CUDA_ARCH__)
#define JSD_UNROLL _Pragma("unroll")
#else
#define JSD_UNROLL
#endif

namespace jsd {

// ---- vectors in memory --------------------------------------------------------------------------------------------------

// Aligned to their size in memory, and moved in one instruction.
template <int kNum>
struct Words {
  uint32_t word[kNum];
};

template <int kNum>
JSD_DEVICE Words<kNum> load_words(const void* source) {
  Words<kNum> words;
#if defined(__CUDA_ARCH__)
  if (kNum == 4) {
    const uint4 loaded = *static_cast<const uint4*>(source);
    words.word[0] = loaded.x, words.word[1] = loaded.y, words.word[2] = loaded.z, words.word[3] = loaded.w;
  } else {
    const uint2 loaded = *static_cast<const uint2*>(source);
    words.word[0] = loaded.x, words.word[1] = loaded.y;
  }
#else
  std::memcpy(&words, source, sizeof words);
#endif
  return words;
}

template <int kNum>
JSD_DEVICE void store_words(void* target, Words<kNum> words) {
#if defined(__CUDA_ARCH__)
  if (kNum == 4)
    *static_cast<uint4*>(target) = make_uint4(words.word[0], words.word[1], words.word[2], words.word[3]);
  else
    *static_cast<uint2*>(target) = make_uint2(words.word[0], words.word[1]);
#else
  std::memcpy(target, &words, sizeof words);
#endif
}

// float16, by rounding to nearest even; a host without the type does it by hand (no NaN, no overflow: scores are neither).
JSD_DEVICE uint32_t pack_fp16(float low, float high) {
#if defined(__CUDA_ARCH__)
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
#else
  const auto rounded = [](float value) -> uint32_t {
    const uint32_t bits = static_cast<uint32_t>(bits_of(value)), sign = (bits >> 16) & 0x8000u;
    const float magnitude = float_of(static_cast<int32_t>(bits & 0x7fffffffu));
    if (magnitude < 6.103515625e-5f)  // subnormal: multiples of 2^-24
      return sign | static_cast<uint32_t>(std::nearbyint(magnitude * 16777216.0f));
    const uint32_t kept = bits & 0x7fffffffu;
    return sign | ((kept + 0xfffu + ((kept >> 13) & 1u) - (112u << 23)) >> 13);
  };
  return rounded(low) | rounded(high) << 16;
#endif
}

JSD_DEVICE void unpack_fp16(uint32_t packed, float& low, float& high) {
#if defined(__CUDA_ARCH__)
  const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&packed));
  low = pair.x, high = pair.y;
#else
  const auto widened = [](uint32_t half) {
    const uint32_t sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
    if (magnitude < 0x400u) {
      const float value = static_cast<float>(magnitude) / 16777216.0f;
      return sign ? -value : value;
    }
    return float_of(static_cast<int32_t>(sign | ((magnitude << 13) + (112u << 23))));
  };
  low = widened(packed & 0xffffu), high = widened(packed >> 16);
#endif
}

JSD_DEVICE uint32_t pack_bf16(float low, float high) {
#if defined(__CUDA_ARCH__)
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
#else
  return static_cast<uint32_t>(to_bf16(low)) | static_cast<uint32_t>(to_bf16(high)) << 16;
#endif
}

JSD_DEVICE float widen(float value) { return value; }
JSD_DEVICE float widen(uint16_t bits) { return from_bf16(bits); }

template <int kVector>
JSD_DEVICE void load_vector(const uint16_t* source, float (&entries)[kVector]) {
  const Words<kVector / 2> words = load_words<kVector / 2>(source);
  JSD_UNROLL for (int i = 0; i < kVector / 2; ++i) {
    entries[2 * i] = float_of(static_cast<int32_t>(words.word[i] << 16));
    entries[2 * i + 1] = float_of(static_cast<int32_t>(words.word[i] & 0xffff0000u));
  }
}

template <int kVector>
JSD_DEVICE void load_vector(const float* source, float (&entries)[kVector]) {
  static_assert(kVector == 4, "a vector of float32 has four entries");
  const Words<4> words = load_words<4>(source);
  JSD_UNROLL for (int i = 0; i < 4; ++i) entries[i] = float_of(static_cast<int32_t>(words.word[i]));
}

// ---- a block's part of a row pair ---------------------------------------------------------------------------------------

// StudentT, TeacherT: float or uint16_t (bfloat16). Difference: the teacher's matrix holds its logits less the student's.
template <class StudentT, class TeacherT, bool kDifferenceV>
struct Kind {
  using Student = StudentT;
  using Teacher = TeacherT;
  static constexpr bool kDifference = kDifferenceV;
  static constexpr int kVector = sizeof(Student) == 2 && sizeof(Teacher) == 2 ? 8 : 4;
  static constexpr int kBytesAnEntry = sizeof(Student) + sizeof(Teacher);
};

template <class K>
struct Entries {
  float student[K::kVector];
  float teacher[K::kVector];  // logits, or differences

  JSD_DEVICE float teacher_logit(int i) const { return K::kDifference ? student[i] + teacher[i] : teacher[i]; }
  JSD_DEVICE float difference(int i) const { return K::kDifference ? teacher[i] : teacher[i] - student[i]; }

  // -inf becomes kMasked; NaN stays.
  JSD_DEVICE void clamp() {
    JSD_UNROLL for (int i = 0; i < K::kVector; ++i) {
      student[i] = student[i] < kMasked ? kMasked : student[i];
      if (!K::kDifference) teacher[i] = teacher[i] < kMasked ? kMasked : teacher[i];
    }
  }
};

// In shared memory (kWhole: filled up to whole vectors) or in the matrices themselves. Once a thread has the score of a vector, it
// may keep it in the teacher's place.
template <class K, bool kWhole>
struct Part {
  typename K::Student* student;
  typename K::Teacher* teacher;
  int num_entries;
  bool vector_loads;

  JSD_DEVICE int num_vectors() const { return (num_entries + K::kVector - 1) / K::kVector; }

  JSD_DEVICE Entries<K> load(int vector) const {
    Entries<K> entries;
    const int start = vector * K::kVector;
    if (kWhole || (vector_loads && start + K::kVector <= num_entries)) {
      load_vector(student + start, entries.student);
      load_vector(teacher + start, entries.teacher);
    } else {
      JSD_UNROLL for (int i = 0; i < K::kVector; ++i) {
        const bool inside = start + i < num_entries;
        entries.student[i] = inside ? widen(student[start + i]) : kMasked;
        entries.teacher[i] = inside ? widen(teacher[start + i]) : K::kDifference ? 0.0f : kMasked;
      }
    }
    return entries;
  }

  // In float16 a score is kept 256-fold, for the digits of small ones; kLeastScore bounds it.
  JSD_DEVICE void keep(int vector, const float (&scores)[K::kVector]) const {
    typename K::Teacher* target = teacher + vector * K::kVector;
    if (sizeof(typename K::Teacher) == 4) {
      Words<4> words;
      JSD_UNROLL for (int i = 0; i < 4; ++i) words.word[i] = static_cast<uint32_t>(bits_of(scores[i]));
      store_words(target, words);
    } else {
      Words<K::kVector / 2> words;
      JSD_UNROLL for (int i = 0; i < K::kVector / 2; ++i)
        words.word[i] = pack_fp16(256.0f * scores[2 * i], 256.0f * scores[2 * i + 1]);
      store_words(target, words);
    }
  }

  JSD_DEVICE void load_kept(int vector, float (&student_logits)[K::kVector], float (&scores)[K::kVector]) const {
    const typename K::Teacher* source = teacher + vector * K::kVector;
    load_vector(student + vector * K::kVector, student_logits);
    if (sizeof(typename K::Teacher) == 4) {
      const Words<4> words = load_words<4>(source);
      JSD_UNROLL for (int i = 0; i < 4; ++i) scores[i] = float_of(static_cast<int32_t>(words.word[i]));
    } else {
      const Words<K::kVector / 2> words = load_words<K::kVector / 2>(source);
      JSD_UNROLL for (int i = 0; i < K::kVector / 2; ++i) {
        unpack_fp16(words.word[i], scores[2 * i], scores[2 * i + 1]);
        scores[2 * i] *= 1.0f / 256.0f, scores[2 * i + 1] *= 1.0f / 256.0f;
      }
    }
  }
};

// Where a block's part of a gradient row goes; data is null when none is wanted.
struct Target {
  void* data;
  int num_entries;
  bool is_bf16, vector_stores;
};

template <int kVector>
JSD_DEVICE void store_gradient(const Target& target, int vector, const float (&gradient)[kVector]) {
  const int start = vector * kVector;
  const bool whole = target.vector_stores && start + kVector <= target.num_entries;
  if (target.is_bf16) {
    uint16_t* out = static_cast<uint16_t*>(target.data) + start;
    Words<kVector / 2> words;
    JSD_UNROLL for (int i = 0; i < kVector / 2; ++i) words.word[i] = pack_bf16(gradient[2 * i], gradient[2 * i + 1]);
    if (whole) return store_words(out, words);
    JSD_UNROLL for (int i = 0; i < kVector; ++i)
      if (start + i < target.num_entries) out[i] = static_cast<uint16_t>(words.word[i / 2] >> (i % 2 * 16));
  } else {
    float* out = static_cast<float*>(target.data) + start;
    if (whole) {
      JSD_UNROLL for (int part = 0; part < kVector / 4; ++part) {
        Words<4> words;
        JSD_UNROLL for (int i = 0; i < 4; ++i) words.word[i] = static_cast<uint32_t>(bits_of(gradient[4 * part + i]));
        store_words(out + 4 * part, words);
      }
      return;
    }
    JSD_UNROLL for (int i = 0; i < kVector; ++i)
      if (start + i < target.num_entries) out[i] = gradient[i];
  }
}

// ---- one vector ---------------------------------------------------------------------------------------------------------

constexpr float kLeastScore = -255.0f;  // log2(Q/M), when Q is 0 in float32 long since

// Of each entry: its share of the value in bits, h of the gradient constant * Q (h - sum Q h), and Q; value and Q are still to be
// multiplied by `factor`. With forward_kl `score` is Q - P, the gradient itself less that factor, and Q is not used.
template <int kVector>
struct Terms {
  float value[kVector], score[kVector], q[kVector];
  float factor;
};

// A row's constants, and the student's side once more as a fused multiply-add wants it:
// Q = 2^(scale * logit - student_bits) * student_factor, exact at the top because such an addition rounds once.
struct Row : RowConstants {
  float student_bits, student_factor;
};

JSD_DEVICE Row row_of(double student_log_normaliser, double teacher_log_normaliser, float scale) {
  Row row = {row_constants(student_log_normaliser, teacher_log_normaliser, scale), 0.0f, 0.0f};
  row.student_bits = static_cast<float>(student_log_normaliser);
  row.student_factor = static_cast<float>(exp2(row.student_bits - student_log_normaliser));
  return row;
}

// Less student_factor.
JSD_DEVICE float bare_probability(float student, const Row& row) {
  return power_of_2(fmaf(student, row.scale, -row.student_bits)).value;
}

template <int32_t kDivergence, class K>
JSD_DEVICE Terms<K::kVector> terms_of(Entries<K> entries, const Row& row, float beta, const NearPolynomials& near) {
  Terms<K::kVector> terms;
  terms.factor = row.student_factor;
  if (kDivergence != kReverseKl) {
    float d[K::kVector];
    bool all_near = true;  // a NaN or infinite d is not
    JSD_UNROLL for (int i = 0; i < K::kVector; ++i) {
      d[i] = fmaf(entries.difference(i), row.scale, -row.normaliser_difference);
      all_near = all_near && fabsf(d[i]) <= kNearLimit;
    }
    if (all_near) {
      JSD_UNROLL for (int i = 0; i < K::kVector; ++i) {
        terms.q[i] = bare_probability(entries.student[i], row);
        if (kDivergence == kForwardKl) {
          const float excess = d[i] * polynomial(near.excess, d[i]);
          terms.score[i] = -terms.q[i] * excess;
          terms.value[i] = (terms.q[i] + terms.q[i] * excess) * d[i];
          continue;
        }
        terms.score[i] = d[i] * polynomial(near.score, d[i]);
        terms.value[i] = terms.q[i] * (d[i] * d[i]) * polynomial(near.value, d[i]);
      }
      return terms;
    }
  }
  entries.clamp();
  JSD_UNROLL for (int i = 0; i < K::kVector; ++i) {
    if (kDivergence == kReverseKl) {
      const float d = fmaf(entries.difference(i), row.scale, -row.normaliser_difference);
      terms.q[i] = bare_probability(entries.student[i], row);
      terms.score[i] = -d;
      terms.value[i] = terms.q[i] * -d;
      continue;
    }
    const Probabilities e = probabilities(entries.student[i], entries.teacher_logit(i), entries.difference(i), row);
    terms.q[i] = e.q;
    if (kDivergence == kJsd) {
      Term term = generalised_jsd(e, beta);
      if (fabsf(e.d) <= kNearLimit) {  // a likely token must not have its logarithm from the hardware because of its neighbours
        term.score = e.d * polynomial(near.score, e.d);
        term.value = beta * e.p * (e.d + term.score) + (1.0f - beta) * e.q * term.score;
      }
      terms.value[i] = term.value, terms.score[i] = fmaxf(term.score, kLeastScore);
    } else {
      terms.value[i] = forward_kl(e), terms.score[i] = student_minus_teacher(e);
      if (fabsf(e.d) <= kNearLimit) terms.score[i] = -e.q * (e.d * polynomial(near.excess, e.d));
    }
  }
  if (kDivergence != kReverseKl) terms.factor = 1.0f;  // these had both sides' own
  return terms;
}

template <int kVector>
JSD_DEVICE float sum_of(const float (&terms)[kVector]) {
  float sum = terms[0];
  JSD_UNROLL for (int i = 1; i < kVector; ++i) sum += terms[i];
  return sum;
}

// ---- a thread's sweeps --------------------------------------------------------------------------------------------------

// The sum of 2^(scale * logit - highest) of both sides; `highest`, in bits, is that of some logit of the thread's, not always the
// largest.
struct Normalisers {
  float student_highest, teacher_highest;
  double student_total, teacher_total;
};

constexpr float kNothing = -3e38f;  // as `highest`: below every logit's

JSD_DEVICE Normalisers no_normalisers() { return {kNothing, kNothing, 0.0, 0.0}; }

// 2^(scale * logit - bits) for logits up to `reference`, where bits is scale * reference rounded. What the rounding lost is put
// back, except with references so large that it would be a multiple of the sum.
JSD_DEVICE float power_below(float logit, float reference, float scale) {
  const float lost = fmaf(reference, scale, -(reference * scale));
  return power_of_2((logit - reference) * scale + (fabsf(lost) <= 1.0f ? lost : 0.0f)).value;
}

// The reference is the largest entry of the thread's first vector: no maximum to keep, no sum to rescale. Only if an entry lies
// far above it does the sum overflow, and only without an entry near it (all masked) is the sum next to nothing; then the thread
// starts again with its true maximum. wait(k) returns once the block's k-th tile has arrived.
template <class K, class PartT, class Wait>
JSD_DEVICE Normalisers sweep_normalisers(const PartT& part, float scale, int thread, int num_threads, Wait wait) {
  if (thread >= part.num_vectors()) return no_normalisers();
  float student_reference = kMasked, teacher_reference = kMasked, student_total = 0.0f, teacher_total = 0.0f;
  int tile = 0;
  for (int vector = thread; vector < part.num_vectors(); vector += num_threads, ++tile) {
    wait(tile);
    const Entries<K> entries = part.load(vector);
    if (tile == 0) {
      JSD_UNROLL for (int i = 0; i < K::kVector; ++i) {
        student_reference = fmaxf(student_reference, entries.student[i]);
        teacher_reference = fmaxf(teacher_reference, entries.teacher_logit(i));
      }
      student_reference *= scale, teacher_reference *= scale;
    }
    float student_powers[K::kVector], teacher_powers[K::kVector];
    JSD_UNROLL for (int i = 0; i < K::kVector; ++i) {
      student_powers[i] = power_of_2(fmaf(entries.student[i], scale, -student_reference)).value;
      const float exponent = fmaf(K::kDifference ? entries.student[i] : entries.teacher[i], scale, -teacher_reference);
      teacher_powers[i] = power_of_2(K::kDifference ? fmaf(entries.teacher[i], scale, exponent) : exponent).value;
    }
    student_total += sum_of(student_powers), teacher_total += sum_of(teacher_powers);
  }
  if (fminf(student_total, teacher_total) >= 0.5f && student_total < HUGE_VALF && teacher_total < HUGE_VALF)
    return {student_reference, teacher_reference, student_total, teacher_total};

  student_reference = teacher_reference = kMasked;
  for (int vector = thread; vector < part.num_vectors(); vector += num_threads) {
    Entries<K> entries = part.load(vector);
    entries.clamp();
    JSD_UNROLL for (int i = 0; i < K::kVector; ++i) {
      student_reference = fmaxf(student_reference, entries.student[i]);
      teacher_reference = fmaxf(teacher_reference, entries.teacher_logit(i));
    }
  }
  student_total = teacher_total = 0.0f;
  for (int vector = thread; vector < part.num_vectors(); vector += num_threads) {
    Entries<K> entries = part.load(vector);
    entries.clamp();
    JSD_UNROLL for (int i = 0; i < K::kVector; ++i) {
      student_total += power_below(entries.student[i], student_reference, scale);
      teacher_total += power_below(entries.teacher_logit(i), teacher_reference, scale);
    }
  }
  return {student_reference * scale, teacher_reference * scale, student_total, teacher_total};
}

struct Sums {
  double value, score;
};

// The factors of a gradient: constant * Q (h - expected), or constant * (Q - P) with forward_kl.
struct GradientConstants {
  float constant, expected;
};

// forward_kl needs no sum for its gradient and stores it here, if `target` has data; the others keep their scores if asked to.
template <int32_t kDivergence, bool kKeep, class K, class PartT>
JSD_DEVICE Sums sweep_sums(const PartT& part, const Row& row, float beta, const NearPolynomials& near, const Target& target,
                           GradientConstants factors, int thread, int num_threads) {
  float value = 0.0f, score = 0.0f;
  for (int vector = thread; vector < part.num_vectors(); vector += num_threads) {
    const Terms<K::kVector> terms = terms_of<kDivergence, K>(part.load(vector), row, beta, near);
    value += terms.factor * sum_of(terms.value);
    if (kDivergence == kForwardKl) {
      if (target.data != nullptr) {
        float gradient[K::kVector];
        JSD_UNROLL for (int i = 0; i < K::kVector; ++i) gradient[i] = factors.constant * terms.factor * terms.score[i];
        store_gradient(target, vector, gradient);
      }
    } else {
      float weighted[K::kVector];
      JSD_UNROLL for (int i = 0; i < K::kVector; ++i) weighted[i] = terms.q[i] * terms.score[i];
      score += terms.factor * sum_of(weighted);
      if (kKeep) part.keep(vector, terms.score);
    }
  }
  return {value, score};
}

template <int32_t kDivergence, bool kKept, class K, class PartT>
JSD_DEVICE void sweep_gradient(const PartT& part, const Row& row, float beta, const NearPolynomials& near, const Target& target,
                               GradientConstants factors, int thread, int num_threads) {
  for (int vector = thread; vector < part.num_vectors(); vector += num_threads) {
    float gradient[K::kVector];
    if (kKept) {
      float student[K::kVector], scores[K::kVector];
      part.load_kept(vector, student, scores);
      JSD_UNROLL for (int i = 0; i < K::kVector; ++i)
        gradient[i] = factors.constant * row.student_factor * bare_probability(student[i], row) * (scores[i] - factors.expected);
    } else {
      const Terms<K::kVector> terms = terms_of<kDivergence, K>(part.load(vector), row, beta, near);
      JSD_UNROLL for (int i = 0; i < K::kVector; ++i)
        gradient[i] = kDivergence == kForwardKl ? factors.constant * terms.factor * terms.score[i]
                                                : factors.constant * terms.factor * terms.q[i] * (terms.score[i] - factors.expected);
    }
    store_gradient(target, vector, gradient);
  }
}

}  // namespace jsd
