// The arithmetic of a divergence at one vocabulary entry, in float32; the same lines serve every host instruction set and a GPU.
//
// P is the teacher's probability of the entry and Q the student's, d = log P - log Q, M = beta P + (1 - beta) Q. Logarithms are
// to base 2 and exponentials powers of 2 throughout: `scale` takes logits there (log2(e) / temperature), kLn2 the results back.
// No function branches, so that a loop over entries becomes vector instructions, and NaN passes through all of them.
// Formulas and their checks: megatron_sd/ops/jsd_reference.py and kernels/README.md.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define JSD_HD __host__ __device__ __forceinline__
#else
#define JSD_HD inline __attribute__((always_inline))
#endif

namespace jsd {

constexpr float kMasked = -1e30f;  // what -inf becomes, so that no inf - inf arises
constexpr double kLn2 = 0.693147180559945309;

JSD_HD int32_t bits_of(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

JSD_HD float float_of(int32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

JSD_HD float from_bf16(uint16_t bits) { return float_of(static_cast<int32_t>(static_cast<uint32_t>(bits) << 16)); }

// Rounds to the nearest, ties to even; NaN stays NaN.
JSD_HD uint16_t to_bf16(float value) {
  const uint32_t bits = static_cast<uint32_t>(bits_of(value));
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(value == value ? rounded : 0x7fc0u);
}

struct Power {
  float value;      // 2^x
  float minus_one;  // 2^x - 1, accurate near x = 0
};

// For x <= 0; 0 from about -126 on. x = n + r with |r| <= 1/2; Cephes' polynomial for e^(r ln 2).
JSD_HD Power polynomial_power_of_2(float x) {
  constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the low bits
  constexpr float kLowest = -127.0f;       // n = -127 makes the exponent's bits, and with them the result, 0
  constexpr double kLn2Squared = kLn2 * kLn2;
  const float bounded = x < kLowest ? kLowest : x;
  const float shifted = bounded + kRounder;
  const float r = bounded - (shifted - kRounder);
  const float power = float_of(static_cast<int32_t>(static_cast<uint32_t>(bits_of(shifted) - bits_of(kRounder) + 127) << 23));
  const float r2 = r * r;
  constexpr float c2 = static_cast<float>(5.0000001201e-1 * kLn2Squared);
  constexpr float c3 = static_cast<float>(1.6666665459e-1 * kLn2Squared * kLn2);
  constexpr float c4 = static_cast<float>(4.1665795894e-2 * kLn2Squared * kLn2Squared);
  constexpr float c5 = static_cast<float>(8.3334519073e-3 * kLn2Squared * kLn2Squared * kLn2);
  constexpr float c6 = static_cast<float>(1.3981999507e-3 * kLn2Squared * kLn2Squared * kLn2Squared);
  constexpr float c7 = static_cast<float>(1.9875691500e-4 * kLn2Squared * kLn2Squared * kLn2Squared * kLn2);
  const float p = (c2 + c3 * r) + ((c4 + c5 * r) + (c6 + c7 * r) * r2) * r2;
  const float remainder_minus_one = p * r2 + static_cast<float>(kLn2) * r;
  return {power * remainder_minus_one + power, power * remainder_minus_one + (power - 1.0f)};
}

// log2(1 + a) for -1 < a <= 0, given one_plus_a as accurately as the caller can: near 1 it is a that counts. Cephes' polynomial.
JSD_HD float polynomial_log2_one_plus(float a, float one_plus_a) {
  constexpr int32_t kHalfRoot = 0x3f3504f3;  // sqrt(1/2): the mantissa lies in [sqrt(1/2), sqrt(2))
  const int32_t shifted = bits_of(one_plus_a) + (0x3f800000 - kHalfRoot);
  const float exponent = static_cast<float>((shifted >> 23) - 127);
  const float mantissa = float_of((shifted & 0x007fffff) + kHalfRoot);
  const float f = one_plus_a < float_of(kHalfRoot) ? mantissa - 1.0f : a;  // NaN is not below: it takes a, which is NaN too
  const float f2 = f * f;
  const float f4 = f2 * f2;
  const float low = (3.3333331174e-1f - 2.4999993993e-1f * f) + (2.0000714765e-1f - 1.6668057665e-1f * f) * f2;
  const float high = (1.4249322787e-1f - 1.2420140846e-1f * f) + (1.1676998740e-1f - 1.1514610310e-1f * f) * f2;
  const float p = low + (high + 7.0376836292e-2f * f4) * f4;
  const float logarithm = f + (p * f - 0.5f) * f2;
  return exponent + logarithm * static_cast<float>(1.0 / kLn2);
}

// A GPU has both functions in hardware, to about 2^-22: relative for powers, absolute for logarithms between 1/2 and 1. The
// replay (tests/ops/replay) brings its own model of that hardware, at its worst.
#if defined(__CUDA_ARCH__)
__device__ __forceinline__ float hardware_exp2(float x) {
  float value;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
  return value;
}
__device__ __forceinline__ float hardware_log2(float x) {
  float value;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
  return value;
}
#elif defined(JSD_REPLAY)
float hardware_exp2(float x);
float hardware_log2(float x);
#endif

#if defined(__CUDA_ARCH__) || defined(JSD_REPLAY)
JSD_HD Power power_of_2(float x) {
  const float value = hardware_exp2(x);
  return {value, value - 1.0f};
}
JSD_HD float log2_one_plus(float, float one_plus_a) { return hardware_log2(one_plus_a); }
#else
JSD_HD Power power_of_2(float x) { return polynomial_power_of_2(x); }
JSD_HD float log2_one_plus(float a, float one_plus_a) { return polynomial_log2_one_plus(a, one_plus_a); }
#endif

// A logit's probability in its row is 2^(scale * (logit - reference) + correction), where the reference is the row's normaliser
// rounded to float32 and the correction what the rounding lost: exact at the top, whatever the row's offset.
struct RowSide {
  float reference;
  float correction;
};

JSD_HD float probability(float logit, RowSide side, float scale) {
  return power_of_2((logit - side.reference) * scale + side.correction).value;
}

// What a row's sweeps share.
struct RowConstants {
  float scale;
  RowSide student, teacher;
  float normaliser_difference;  // log-normaliser of the teacher minus the student's, rounded once: d stays accurate near 0
};

// log_normaliser: log2 of the sum of 2^(scale * logit).
JSD_HD RowSide row_side(double log_normaliser, float scale) {
  const float reference = static_cast<float>(log_normaliser / scale);
  return {reference, static_cast<float>(static_cast<double>(reference) * scale - log_normaliser)};
}

// A row without a normaliser (NaN, or infinite: nothing but masked entries) makes the pair's every probability NaN.
JSD_HD RowConstants row_constants(double student_log_normaliser, double teacher_log_normaliser, float scale) {
  const double spoilt = (student_log_normaliser - student_log_normaliser) + (teacher_log_normaliser - teacher_log_normaliser);
  const double student = student_log_normaliser + spoilt, teacher = teacher_log_normaliser + spoilt;
  return {scale, row_side(student, scale), row_side(teacher, scale), static_cast<float>(teacher - student)};
}

// From the largest logit in bits, or one about as large, and the sum of 2^(scale * logit - highest_bits). -inf if nothing lies above
// kMasked.
JSD_HD double log_normaliser(double highest_bits, double total, float scale) {
  if (total != total) return total;
  return highest_bits > static_cast<double>(kMasked) * scale * 0.999999 ? highest_bits + log2(total) : -HUGE_VAL;
}

// As the doors take it: 1 / (ln 2 * temperature), which turns logits into base 2.
inline float scale_of(double temperature) { return static_cast<float>(1.0 / (kLn2 * temperature)); }

struct Probabilities {
  float d;
  float p;
  float q;
  float ratio;            // smaller / larger of p and q
  float ratio_minus_one;
  bool teacher_larger;
};

// student and teacher: logits, at least kMasked, and teacher - student as accurately as the caller can. Equal logits in equal
// rows give d = 0 exactly.
JSD_HD Probabilities probabilities(float student, float teacher, float difference, RowConstants row) {
  Probabilities e;
  e.d = difference * row.scale - row.normaliser_difference;
  e.teacher_larger = e.d > 0.0f;
  const RowSide side = {e.teacher_larger ? row.teacher.reference : row.student.reference,
                        e.teacher_larger ? row.teacher.correction : row.student.correction};
  const float larger = probability(e.teacher_larger ? teacher : student, side, row.scale);
  const Power ratio = power_of_2(e.teacher_larger ? -e.d : e.d);
  const float smaller = larger * ratio.value;
  e.p = e.teacher_larger ? larger : smaller;
  e.q = e.teacher_larger ? smaller : larger;
  e.ratio = ratio.value;
  e.ratio_minus_one = ratio.minus_one;
  return e;
}

// value: the entry's share of the divergence, in bits. score: h of the gradient Q (h - sum Q h) * constant.
struct Term {
  float value;
  float score;
};

// With L = log(M / max(P, Q)): log(P/M) and log(Q/M) are -L and -|d| - L, never a difference of logarithms.
JSD_HD Term generalised_jsd(Probabilities e, float beta) {
  const float small_share = e.teacher_larger ? 1.0f - beta : beta;
  const float large_share = e.teacher_larger ? beta : 1.0f - beta;
  const float log_m = log2_one_plus(small_share * e.ratio_minus_one, large_share + small_share * e.ratio);
  const float log_p_over_m = (e.teacher_larger ? 0.0f : e.d) - log_m;
  const float log_q_over_m = (e.teacher_larger ? -e.d : 0.0f) - log_m;
  return {beta * e.p * log_p_over_m + (1.0f - beta) * e.q * log_q_over_m, log_q_over_m};
}

JSD_HD Term reverse_kl(Probabilities e) { return {e.q * -e.d, -e.d}; }

JSD_HD float forward_kl(Probabilities e) { return e.p * e.d; }

// Q - P without cancellation: the gradient of forward_kl.
JSD_HD float student_minus_teacher(Probabilities e) {
  return e.teacher_larger ? e.p * e.ratio_minus_one : -e.q * e.ratio_minus_one;
}

// ---- near d = 0 ---------------------------------------------------------------------------------------------------------

// For |d| of at most one nat the generalised JSD is a polynomial in d: cheaper than a power and a logarithm, and accurate
// where a logarithm near 1 has few digits. With K(d) = log(1 - beta + beta e^d), log(Q/M) = -K(d), and an entry's share of the
// divergence is Q g(d), g(d) = beta e^d d - e^K(d) K(d).
constexpr float kNearLimit = 1.4426950f;  // in bits
constexpr int kNearTerms = 8;

// In bits: log2(Q/M) = d * (score[0] + score[1] d + ...), the share is Q d^2 (value[0] + value[1] d + ...); and for forward_kl
// P/Q - 1 = d * (excess[0] + excess[1] d + ...).
template <int kTerms>
struct NearPolynomialsOf {
  float score[kTerms], value[kTerms], excess[kTerms];
};

using NearPolynomials = NearPolynomialsOf<kNearTerms>;

// The coefficients of the polynomial through (x, y), by Newton's differences; y is used up.
template <int kTerms>
inline void interpolate(const double* x, double* y, float* coefficients) {
  double result[kTerms] = {0.0};
  for (int order = 1; order < kTerms; ++order)
    for (int i = kTerms - 1; i >= order; --i) y[i] = (y[i] - y[i - 1]) / (x[i] - x[i - order]);
  for (int order = kTerms - 1; order >= 0; --order) {
    for (int i = kTerms - 1; i > 0; --i) result[i] = result[i - 1] - x[order] * result[i];
    result[0] = y[order] - x[order] * result[0];
  }
  for (int i = 0; i < kTerms; ++i) coefficients[i] = static_cast<float>(result[i]);
}

// Through Chebyshev's points (an even number: 0 is not among them). Eight terms to one nat, and twelve to two, are within 4e-7 of
// the functions for every beta, the value's within 1e-6.
template <int kTerms = kNearTerms>
inline NearPolynomialsOf<kTerms> near_polynomials(double beta, float limit = kNearLimit) {
  double x[kTerms], score[kTerms], value[kTerms], excess[kTerms];
  for (int i = 0; i < kTerms; ++i) {
    x[i] = limit * std::cos((2 * i + 1) * 3.14159265358979324 / (2 * kTerms));
    const double d = x[i] * kLn2, k = std::log1p(beta * std::expm1(d));
    score[i] = -k / d;
    excess[i] = std::expm1(d) / x[i];
    value[i] = (beta * std::exp(d) * d - std::exp(k) * k) / (d * d) * kLn2;
  }
  NearPolynomialsOf<kTerms> polynomials;
  interpolate<kTerms>(x, score, polynomials.score);
  interpolate<kTerms>(x, value, polynomials.value);
  interpolate<kTerms>(x, excess, polynomials.excess);
  return polynomials;
}

template <int kTerms>
JSD_HD float polynomial(const float (&coefficients)[kTerms], float x) {
  float result = coefficients[kTerms - 1];
  for (int i = kTerms - 2; i >= 0; --i) result = result * x + coefficients[i];
  return result;
}

}  // namespace jsd
