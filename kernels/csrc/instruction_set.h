// Instruction sets of x86-64 that CPU programs are compiled for, each from the same source: name the copy's attribute, call it by
// number. Other processors have the baseline only.
#pragma once

#include <cstdint>

enum InstructionSet : int32_t { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

#define FOR_AVX2 __attribute__((target("avx2,fma")))
#define FOR_AVX512 __attribute__((target("fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))

#define ALWAYS_INLINE inline __attribute__((always_inline))
