// The C interface of the native divergence: raw pointers, nothing of torch or Python. megatron_sd/ops/native/structs.py is its other half.
#pragma once

#include <cstdint>

enum JsdDivergence : int32_t { kJsd = 0, kForwardKl = 1, kReverseKl = 2 };
enum JsdElementType : int32_t { kFloat32 = 0, kBfloat16 = 1 };

extern "C" {

// Columns are adjacent, rows lie row_stride elements apart.
struct JsdMatrix {
  void* data;
  int64_t num_rows, row_stride;
  int32_t element_type;
};

// Everything that an entry point may ask for; each says what it reads and writes, the rest may be null.
struct JsdTask {
  JsdMatrix student, teacher;
  JsdMatrix gradient;  // [*, vocabulary]; data is null when no gradient is wanted. It may be the student's matrix itself
  const int64_t *student_rows, *teacher_rows;  // [num_rows]
  const int64_t* gradient_rows;                // [num_rows], each at most once; null: row i of the list goes to row i
  const float* scales;                         // [num_rows], factors of the gradient; null: 1
  float* values;                               // [num_rows], nats
  double* normalisers;                         // [num_rows, 2]: log sum exp(logit / temperature) of the student and the teacher
  double* sums;                                // [num_rows, 2]: value and expected score, nats
  void* scratch;
  int64_t num_rows, vocabulary;
  double beta, temperature;
  int32_t divergence;
  int32_t teacher_is_difference;         // the teacher's matrix holds its logits minus the student's
  int32_t num_threads, instruction_set;  // of CPUs
};

// out[row] = sum over the list's entries i of this row, in list order, of scales[i] * gradient[i]; 0 where there are none.
struct JsdScatterTask {
  JsdMatrix gradient;   // [num_rows, vocabulary]
  JsdMatrix out;        // [num_out_rows, vocabulary], of the same element type
  const int64_t* rows;  // [num_rows]; on GPUs the list entries sorted by their row, and `starts` says where each row's begin
  const int64_t* starts;  // [num_out_rows + 1], GPUs only
  const float* scales;    // [num_rows]
  int64_t vocabulary;
  int32_t num_threads, instruction_set;
};

}  // extern "C"
