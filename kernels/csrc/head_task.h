// The C interface of the head's two visits to rows of logits: raw pointers, nothing of torch or Python.
// megatron_sd/ops/native/head_visits.py is its other half.
#pragma once

#include <cstdint>

#include "jsd_task.h"

constexpr int32_t kNoDivergence = -1;  // in place of a JsdDivergence: the caller makes one, or none is wanted

extern "C" {

// Rows of logits, some of them query rows, which a row of the teacher's matrix matches. Of all rows the log-probability of one
// target and the entropy are wanted, at query rows the teacher's too, and the divergence of both.
struct HeadTask {
  JsdTask pairs;           // the query rows, in order; its student's matrix holds the logits, and their gradient in the end
  const int64_t* targets;  // [num_rows]
  const int64_t* queries;  // [num_rows]: which query row this is, -1 if it is none
  double* normalisers;     // [num_rows]: log sum exp(logit / temperature), nats
  float *logprobs, *entropies;                  // [num_rows], nats
  float *teacher_logprobs, *teacher_entropies;  // [num_queries], of the same targets
  const float *slopes, *entropy_slopes;         // [num_rows]: of the loss in logprobs and entropies; null: 0
  // Of the divergence of the likeliest tokens; num_kept 0: all tokens count, as `pairs` says, and the rest is null.
  int64_t* support;                       // [num_queries, num_kept]: their columns, increasing
  float *student_events, *teacher_events; // [num_queries, num_kept + has_tail]: logits of them, and of all others as one token
  const float* event_slopes;              // of the same shape: of the loss in the student's; null: 0
  double* outside;                        // [num_queries]: the student's normaliser of all others, nats
  float* truncated_masses;                // [num_queries]: the student's probability of all others
  int64_t num_kept;
  int32_t support_of_student, has_tail;  // whose likeliest tokens; whether all others are one token more
  int64_t num_rows;
  double temperature;  // of log-probabilities and entropies; `pairs` has the divergence's
  int32_t num_threads, instruction_set;
};

}  // extern "C"
