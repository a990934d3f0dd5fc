// How the kernels are launched: which element types there are, how rows are cut, what may be moved in 16 bytes. For GPUs
// (jsd_cuda.cu) and the replay on a host (tests/ops/replay) alike.
#pragma once

#include <cstddef>

#include "jsd_kernel.h"

namespace jsd {

constexpr int kSplitPart = 16384;  // entries that a block of the split kernels takes

enum Status : int { kDone = 0, kUnsupportedTypes = -1, kUnsupportedShape = -2 };  // positive: an error of the CUDA runtime

// Calls run(Kind) for the task's element types.
template <class Run>
int with_kind(const JsdTask& task, Run run) {
  const bool student_bf16 = task.student.element_type == kBfloat16, teacher_bf16 = task.teacher.element_type == kBfloat16;
  const bool difference = task.teacher_is_difference != 0;
  if (student_bf16 && teacher_bf16 && !difference) return run(Kind<uint16_t, uint16_t, false>());
  if (student_bf16 && teacher_bf16 && difference) return run(Kind<uint16_t, uint16_t, true>());
  if (!student_bf16 && teacher_bf16 && difference) return run(Kind<float, uint16_t, true>());
  if (!student_bf16 && !teacher_bf16 && !difference) return run(Kind<float, float, false>());
  return kUnsupportedTypes;
}

inline int64_t element_bytes(const JsdMatrix& matrix) { return matrix.element_type == kBfloat16 ? 2 : 4; }

// Every row starts at a multiple of 16 bytes.
inline bool is_aligned(const JsdMatrix& matrix) {
  return reinterpret_cast<uintptr_t>(matrix.data) % 16 == 0 && matrix.row_stride * element_bytes(matrix) % 16 == 0;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What does not depend on how rows are cut.
inline Launch launch_of(const JsdTask& task) {
  Launch launch = {};
  launch.task = task;
  launch.scale = scale_of(task.temperature);
  launch.beta = static_cast<float>(task.beta);
  launch.near = near_polynomials(task.beta);
  const double share = task.divergence == kJsd ? 1.0 - task.beta : 1.0;
  launch.constant = static_cast<float>((task.divergence == kForwardKl ? 1.0 : share * kLn2) / task.temperature);
  launch.vector_loads = is_aligned(task.student) && is_aligned(task.teacher);
  launch.vector_stores = is_aligned(task.gradient);
  launch.bulk_loads = launch.vector_loads && task.vocabulary % 8 == 0;
  launch.keeps_scores = task.teacher.element_type == kFloat32 || task.gradient.element_type == kBfloat16;
  return launch;
}

template <class K>
size_t fused_bytes(const Launch& launch) {
  return static_cast<size_t>(launch.part_entries) * K::kBytesAnEntry + sizeof(Exchange);
}

// Cuts rows into as few parts as shared memory allows, at most max_blocks. False if even that is too few.
template <class K>
bool cut_for_fused(Launch& launch, int64_t shared_bytes_a_block, int max_blocks) {
  for (int num_blocks = 1; num_blocks <= max_blocks; num_blocks *= 2) {
    const int64_t part = ceil_div(ceil_div(launch.task.vocabulary, num_blocks), 8) * 8;
    const int64_t bytes = part * K::kBytesAnEntry + static_cast<int64_t>(sizeof(Exchange));
    if (bytes > shared_bytes_a_block || ceil_div(part, kThreads * K::kVector) > kMaxTiles) continue;
    launch.num_blocks = num_blocks, launch.part_entries = static_cast<int>(part);
    return true;
  }
  return false;
}

inline void cut_for_split(Launch& launch) {
  launch.num_blocks = static_cast<int>(ceil_div(launch.task.vocabulary, kSplitPart));
  launch.part_entries = kSplitPart;
  launch.partial_normalisers = static_cast<Normalisers*>(launch.task.scratch);
  launch.partial_sums = reinterpret_cast<Sums*>(launch.partial_normalisers + launch.task.num_rows * launch.num_blocks);
}

inline int64_t split_scratch_bytes(const JsdTask& task) {
  return task.num_rows * ceil_div(task.vocabulary, kSplitPart) * static_cast<int64_t>(sizeof(Normalisers) + sizeof(Sums));
}

// The same task for `num` rows of the list from `first` on.
inline JsdTask some_rows(JsdTask task, int64_t first, int64_t num) {
  task.student_rows += first, task.teacher_rows += first;
  if (task.gradient_rows != nullptr)
    task.gradient_rows += first;
  else if (task.gradient.data != nullptr)
    task.gradient.data = static_cast<char*>(task.gradient.data) + first * task.gradient.row_stride * element_bytes(task.gradient);
  if (task.gradient_rows == nullptr) task.gradient.num_rows -= first;
  if (task.scales != nullptr) task.scales += first;
  if (task.values != nullptr) task.values += first;
  task.normalisers += 2 * first, task.sums += 2 * first;
  task.num_rows = num;
  return task;
}

}  // namespace jsd
