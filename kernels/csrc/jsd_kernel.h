// The kernels' bodies: how blocks of threads share a row, and what they exchange.
//
// Written against a Machine, which a GPU (jsd_cuda.cu) and a host (tests/ops/replay, threads as fibers) provide: thread numbers,
// shuffles within a warp, barriers of a block and of a cluster, memory of a cluster's other blocks, and copies that arrive later.
//
// A row is cut into parts, one a block, and a part into vectors that the block's threads take in turn: which thread adds what, and
// in which order partial sums are merged, depends on the row's length and element types alone. No atomics.
#pragma once

#include "jsd_sweeps.h"

namespace jsd {

constexpr int kThreads = 512;
constexpr int kMaxBlocks = 16;  // of a cluster
constexpr int kMaxTiles = 24;   // of a block's part; a tile is one vector of every thread

// What the launcher works out once for all rows.
struct Launch {
  JsdTask task;
  NearPolynomials near;
  float scale, beta;
  float constant;    // of the gradient, without the row's own scale
  int num_blocks;    // that share a row
  int part_entries;  // of a block, a multiple of 8; the last may have fewer
  bool bulk_loads, vector_loads, vector_stores;
  bool keeps_scores;  // the fused kernel's shared memory is precise enough for the gradient's type
  Normalisers* partial_normalisers;  // [num_rows, num_blocks], of the split kernels
  Sums* partial_sums;                // [num_rows, num_blocks], of the split kernels
};

// A cluster's messages, one place a block, and what the threads of one block hand each other.
struct Exchange {
  uint64_t tiles[kMaxTiles];
  Normalisers warp_normalisers[kThreads / 32], block_normalisers[kMaxBlocks];
  Sums warp_sums[kThreads / 32], block_sums[kMaxBlocks];
  Row row;
  float expected;
};

// ---- merging in a fixed order -------------------------------------------------------------------------------------------

// Butterflies: every lane ends with the same bits.
template <class Machine>
JSD_DEVICE Normalisers merge_lanes(Machine& machine, Normalisers mine) {
  const float student = mine.student_highest, teacher = mine.teacher_highest;
  for (int offset = 16; offset > 0; offset /= 2) {
    mine.student_highest = fmaxf(mine.student_highest, machine.shuffle_xor(mine.student_highest, offset));
    mine.teacher_highest = fmaxf(mine.teacher_highest, machine.shuffle_xor(mine.teacher_highest, offset));
  }
  mine.student_total *= polynomial_power_of_2(student - mine.student_highest).value;
  mine.teacher_total *= polynomial_power_of_2(teacher - mine.teacher_highest).value;
  for (int offset = 16; offset > 0; offset /= 2) {
    mine.student_total += machine.shuffle_xor(mine.student_total, offset);
    mine.teacher_total += machine.shuffle_xor(mine.teacher_total, offset);
  }
  return mine;
}

template <class Machine>
JSD_DEVICE Sums merge_lanes(Machine& machine, Sums mine) {
  for (int offset = 16; offset > 0; offset /= 2) {
    mine.value += machine.shuffle_xor(mine.value, offset);
    mine.score += machine.shuffle_xor(mine.score, offset);
  }
  return mine;
}

// Of the block's threads; the result is warp 0's alone. `warps` has a place for each warp.
template <class Machine, class T>
JSD_DEVICE T merge_block(Machine& machine, T mine, T nothing, T* warps) {
  mine = merge_lanes(machine, mine);
  if (machine.lane() == 0) warps[machine.warp()] = mine;
  machine.sync();
  if (machine.warp() == 0) {
    mine = machine.lane() < machine.num_threads() / 32 ? warps[machine.lane()] : nothing;
    mine = merge_lanes(machine, mine);
  }
  return mine;
}

// Of a list of partial results, by one warp: a lane takes every 32nd.
template <class Machine>
JSD_DEVICE Normalisers merge_list(Machine& machine, const Normalisers* list, int num) {
  Normalisers mine = no_normalisers();
  for (int i = machine.lane(); i < num; i += 32) {
    const float student = fmaxf(mine.student_highest, list[i].student_highest);
    const float teacher = fmaxf(mine.teacher_highest, list[i].teacher_highest);
    mine.student_total = mine.student_total * polynomial_power_of_2(mine.student_highest - student).value +
                         list[i].student_total * polynomial_power_of_2(list[i].student_highest - student).value;
    mine.teacher_total = mine.teacher_total * polynomial_power_of_2(mine.teacher_highest - teacher).value +
                         list[i].teacher_total * polynomial_power_of_2(list[i].teacher_highest - teacher).value;
    mine.student_highest = student, mine.teacher_highest = teacher;
  }
  return merge_lanes(machine, mine);
}

template <class Machine>
JSD_DEVICE Sums merge_list(Machine& machine, const Sums* list, int num) {
  Sums mine = {0.0, 0.0};
  for (int i = machine.lane(); i < num; i += 32) mine.value += list[i].value, mine.score += list[i].score;
  return merge_lanes(machine, mine);
}

// ---- where a row lies ---------------------------------------------------------------------------------------------------

JSD_DEVICE bool in_range(int64_t row, const JsdMatrix& matrix) { return row >= 0 && row < matrix.num_rows; }

template <class Machine>
struct Place {
  int64_t index;  // in the list
  int rank;       // of the block among those that share the row
  int64_t student_row, teacher_row, gradient_row;
  int num_entries;  // of this block
  bool known;       // the listed rows exist

  JSD_DEVICE Place(const Machine& machine, const Launch& launch) {
    const JsdTask& task = launch.task;
    index = machine.block() / launch.num_blocks;
    rank = static_cast<int>(machine.block() % launch.num_blocks);
    student_row = task.student_rows[index], teacher_row = task.teacher_rows[index];
    gradient_row = task.gradient_rows == nullptr ? index : task.gradient_rows[index];
    const int64_t left = task.vocabulary - static_cast<int64_t>(rank) * launch.part_entries;
    num_entries = static_cast<int>(left < 0 ? 0 : left < launch.part_entries ? left : launch.part_entries);
    known = in_range(student_row, task.student) && in_range(teacher_row, task.teacher);
  }

  template <class E>
  JSD_DEVICE E* part_of(const JsdMatrix& matrix, int64_t row, const Launch& launch) const {
    return static_cast<E*>(matrix.data) + row * matrix.row_stride + static_cast<int64_t>(rank) * launch.part_entries;
  }

  JSD_DEVICE Target target(const Launch& launch) const {
    const JsdMatrix& gradient = launch.task.gradient;
    const bool is_bf16 = gradient.element_type == kBfloat16;
    if (gradient.data == nullptr || !in_range(gradient_row, gradient)) return {nullptr, 0, is_bf16, false};
    void* data = is_bf16 ? static_cast<void*>(part_of<uint16_t>(gradient, gradient_row, launch))
                         : static_cast<void*>(part_of<float>(gradient, gradient_row, launch));
    return {data, num_entries, is_bf16, launch.vector_stores};
  }

  template <class K>
  JSD_DEVICE Part<K, false> part(const Launch& launch) const {
    const JsdTask& task = launch.task;
    return {part_of<typename K::Student>(task.student, student_row, launch),
            part_of<typename K::Teacher>(task.teacher, teacher_row, launch), num_entries, launch.vector_loads};
  }

  JSD_DEVICE GradientConstants factors(const Launch& launch, float expected) const {
    return {launch.constant * (launch.task.scales == nullptr ? 1.0f : launch.task.scales[index]), expected};
  }
};

// Results leave in nats.
JSD_DEVICE void write_normalisers(const JsdTask& task, int64_t index, double student_bits, double teacher_bits) {
  task.normalisers[2 * index] = kLn2 * student_bits;
  task.normalisers[2 * index + 1] = kLn2 * teacher_bits;
}

JSD_DEVICE void write_sums(const JsdTask& task, int64_t index, Sums bits) {
  task.sums[2 * index] = kLn2 * bits.value;
  task.sums[2 * index + 1] = kLn2 * bits.score;
  if (task.values != nullptr) task.values[index] = static_cast<float>(kLn2 * bits.value);
}

// A row number out of range cannot stop a kernel without stopping the process: the row's gradient becomes NaN, its value too.
template <class Machine>
JSD_DEVICE void spoil(const Machine& machine, const Target& target) {
  const float nan[4] = {NAN, NAN, NAN, NAN};
  if (target.data == nullptr) return;
  for (int start = machine.thread(); 4 * start < target.num_entries; start += machine.num_threads())
    store_gradient({target.data, target.num_entries, target.is_bf16, false}, start, nan);
}

// ---- one visit to memory: a cluster's shared memory holds the row pair ------------------------------------------------------

JSD_DEVICE void mask(float& element) { element = -INFINITY; }
JSD_DEVICE void mask(uint16_t& element) { element = 0xff80u; }

// The part of `source`, filled up to a whole vector with masked entries, or zeros.
template <int kVector, class E, class Machine>
JSD_DEVICE void copy_part(const Machine& machine, E* target, const E* source, int num_entries, bool zeros) {
  const int filled = (num_entries + kVector - 1) / kVector * kVector;
  for (int i = machine.thread(); i < filled; i += machine.num_threads()) {
    E element = E(0);
    if (i < num_entries)
      element = source[i];
    else if (!zeros)
      mask(element);
    target[i] = element;
  }
}

// Starts the copies of all tiles; each has a barrier of its own, used once.
template <class K, class Machine>
JSD_DEVICE void start_tiles(Machine& machine, const Part<K, true>& target, const Part<K, false>& source, uint64_t* tiles) {
  const int tile_entries = machine.num_threads() * K::kVector;
  if (machine.thread() == 0) {
    for (int tile = 0; tile * tile_entries < source.num_entries; ++tile) machine.init_tile(&tiles[tile]);
    machine.publish_tiles();
  }
  machine.sync();
  if (machine.thread() != 0) return;
  for (int tile = 0; tile * tile_entries < source.num_entries; ++tile) {
    const int start = tile * tile_entries, left = source.num_entries - start;
    const int num = left < tile_entries ? left : tile_entries;
    machine.expect(&tiles[tile], num * K::kBytesAnEntry);
    machine.copy(target.student + start, source.student + start, num * static_cast<int>(sizeof(typename K::Student)), &tiles[tile]);
    machine.copy(target.teacher + start, source.teacher + start, num * static_cast<int>(sizeof(typename K::Teacher)), &tiles[tile]);
  }
}

template <int32_t kDivergence, class K, class Machine>
JSD_DEVICE void sum_and_store(Machine& machine, const Launch& launch, const Place<Machine>& place, const Part<K, true>& part,
                              Exchange& exchange) {
  const int thread = machine.thread(), num_threads = machine.num_threads();
  const Row row = exchange.row;
  const Target target = place.target(launch);
  const bool keeps = kDivergence == kJsd && launch.keeps_scores;
  Sums sums;
  if (kDivergence == kJsd && keeps)
    sums = sweep_sums<kDivergence, true, K>(part, row, launch.beta, launch.near, target, {}, thread, num_threads);
  else
    sums = sweep_sums<kDivergence, false, K>(part, row, launch.beta, launch.near, target, place.factors(launch, 0.0f), thread,
                                             num_threads);
  sums = merge_block(machine, sums, {0.0, 0.0}, exchange.warp_sums);
  if (machine.warp() == 0 && machine.lane() < launch.num_blocks)
    *machine.peer(&exchange.block_sums[place.rank], machine.lane()) = sums;
  machine.cluster_arrive();
  machine.cluster_wait();  // also keeps every block alive until no peer writes to it any more
  if (machine.warp() == 0) {
    sums = merge_list(machine, exchange.block_sums, launch.num_blocks);
    if (machine.lane() == 0) {
      exchange.expected = static_cast<float>(sums.score);
      if (place.rank == 0) write_sums(launch.task, place.index, sums);
    }
  }
  if (kDivergence == kForwardKl || target.data == nullptr) return;
  machine.sync();
  const GradientConstants factors = place.factors(launch, exchange.expected);
  if (kDivergence == kJsd && keeps)
    sweep_gradient<kDivergence, true, K>(part, row, launch.beta, launch.near, target, factors, thread, num_threads);
  else
    sweep_gradient<kDivergence, false, K>(part, row, launch.beta, launch.near, target, factors, thread, num_threads);
}

template <class K, class Machine>
JSD_DEVICE void fused_rows(Machine& machine, const Launch& launch) {
  const Place<Machine> place(machine, launch);
  if (!place.known) {  // for every block of the cluster alike
    spoil(machine, place.target(launch));
    if (place.rank == 0 && machine.thread() == 0) {
      write_normalisers(launch.task, place.index, NAN, NAN);
      write_sums(launch.task, place.index, {NAN, NAN});
    }
    return;
  }
  machine.cluster_arrive();
  unsigned char* memory = machine.memory();
  auto* student = reinterpret_cast<typename K::Student*>(memory);
  auto* teacher = reinterpret_cast<typename K::Teacher*>(memory + launch.part_entries * sizeof(typename K::Student));
  Exchange& exchange = *reinterpret_cast<Exchange*>(memory + launch.part_entries * K::kBytesAnEntry);
  const Part<K, false> source = place.template part<K>(launch);
  const Part<K, true> part = {student, teacher, place.num_entries, true};
  if (launch.bulk_loads) {
    start_tiles<K>(machine, part, source, exchange.tiles);
  } else {
    copy_part<K::kVector>(machine, student, source.student, place.num_entries, false);
    copy_part<K::kVector>(machine, teacher, source.teacher, place.num_entries, K::kDifference);
    machine.sync();
  }
  const bool bulk_loads = launch.bulk_loads;
  Normalisers normalisers =
      sweep_normalisers<K>(part, launch.scale, machine.thread(), machine.num_threads(), [&](int tile) {
        if (bulk_loads) machine.wait(&exchange.tiles[tile]);
      });
  normalisers = merge_block(machine, normalisers, no_normalisers(), exchange.warp_normalisers);
  machine.cluster_wait();  // every block of the cluster has begun: its memory may be written
  if (machine.warp() == 0 && machine.lane() < launch.num_blocks)
    *machine.peer(&exchange.block_normalisers[place.rank], machine.lane()) = normalisers;
  machine.cluster_arrive();
  machine.cluster_wait();
  if (machine.warp() == 0) {
    normalisers = merge_list(machine, exchange.block_normalisers, launch.num_blocks);
    if (machine.lane() == 0) {
      const double student_bits = log_normaliser(normalisers.student_highest, normalisers.student_total, launch.scale);
      const double teacher_bits = log_normaliser(normalisers.teacher_highest, normalisers.teacher_total, launch.scale);
      exchange.row = row_of(student_bits, teacher_bits, launch.scale);
      if (place.rank == 0) write_normalisers(launch.task, place.index, student_bits, teacher_bits);
    }
  }
  machine.sync();
  if (launch.task.divergence == kJsd) sum_and_store<kJsd, K>(machine, launch, place, part, exchange);
  if (launch.task.divergence == kForwardKl) sum_and_store<kForwardKl, K>(machine, launch, place, part, exchange);
  if (launch.task.divergence == kReverseKl) sum_and_store<kReverseKl, K>(machine, launch, place, part, exchange);
}

// ---- the split kernels: partial results meet in global memory between launches ----------------------------------------------

template <class K, class Machine>
JSD_DEVICE void normaliser_parts(Machine& machine, const Launch& launch) {
  const Place<Machine> place(machine, launch);
  Exchange& exchange = *reinterpret_cast<Exchange*>(machine.memory());
  Normalisers mine = no_normalisers();
  if (place.known)
    mine = sweep_normalisers<K>(place.template part<K>(launch), launch.scale, machine.thread(), machine.num_threads(), [](int) {});
  else
    mine.student_total = mine.teacher_total = NAN;
  mine = merge_block(machine, mine, no_normalisers(), exchange.warp_normalisers);
  if (machine.thread() == 0) launch.partial_normalisers[machine.block()] = mine;
}

// One warp a row.
template <class Machine>
JSD_DEVICE void merge_normaliser_parts(Machine& machine, const Launch& launch) {
  const int64_t index = machine.block();
  const Normalisers merged =
      merge_list(machine, launch.partial_normalisers + index * launch.num_blocks, launch.num_blocks);
  if (machine.lane() == 0)
    write_normalisers(launch.task, index, log_normaliser(merged.student_highest, merged.student_total, launch.scale),
                      log_normaliser(merged.teacher_highest, merged.teacher_total, launch.scale));
}

JSD_DEVICE Row given_row(const Launch& launch, int64_t index) {
  const double* normalisers = launch.task.normalisers + 2 * index;
  return row_of(normalisers[0] / kLn2, normalisers[1] / kLn2, launch.scale);
}

template <class K, class Machine>
JSD_DEVICE void sum_parts(Machine& machine, const Launch& launch) {
  const Place<Machine> place(machine, launch);
  Exchange& exchange = *reinterpret_cast<Exchange*>(machine.memory());
  const int thread = machine.thread(), num_threads = machine.num_threads();
  const Row row = given_row(launch, place.index);
  const Target nowhere = {nullptr, 0, false, false};
  Sums mine = {NAN, NAN};
  if (place.known) {
    const Part<K, false> part = place.template part<K>(launch);
    if (launch.task.divergence == kJsd)
      mine = sweep_sums<kJsd, false, K>(part, row, launch.beta, launch.near, nowhere, {}, thread, num_threads);
    if (launch.task.divergence == kForwardKl)
      mine = sweep_sums<kForwardKl, false, K>(part, row, launch.beta, launch.near, nowhere, {}, thread, num_threads);
    if (launch.task.divergence == kReverseKl)
      mine = sweep_sums<kReverseKl, false, K>(part, row, launch.beta, launch.near, nowhere, {}, thread, num_threads);
  }
  mine = merge_block(machine, mine, {0.0, 0.0}, exchange.warp_sums);
  if (machine.thread() == 0) launch.partial_sums[machine.block()] = mine;
}

// One warp a row.
template <class Machine>
JSD_DEVICE void merge_sum_parts(Machine& machine, const Launch& launch) {
  const int64_t index = machine.block();
  const Sums merged = merge_list(machine, launch.partial_sums + index * launch.num_blocks, launch.num_blocks);
  if (machine.lane() == 0) write_sums(launch.task, index, merged);
}

template <class K, class Machine>
JSD_DEVICE void gradient_parts(Machine& machine, const Launch& launch) {
  const Place<Machine> place(machine, launch);
  const int thread = machine.thread(), num_threads = machine.num_threads();
  const Target target = place.target(launch);
  if (!place.known) return spoil(machine, target);
  if (target.data == nullptr) return;
  const Row row = given_row(launch, place.index);
  const GradientConstants factors = place.factors(launch, static_cast<float>(launch.task.sums[2 * place.index + 1] / kLn2));
  const Part<K, false> part = place.template part<K>(launch);
  if (launch.task.divergence == kJsd)
    sweep_gradient<kJsd, false, K>(part, row, launch.beta, launch.near, target, factors, thread, num_threads);
  if (launch.task.divergence == kForwardKl)
    sweep_gradient<kForwardKl, false, K>(part, row, launch.beta, launch.near, target, factors, thread, num_threads);
  if (launch.task.divergence == kReverseKl)
    sweep_gradient<kReverseKl, false, K>(part, row, launch.beta, launch.near, target, factors, thread, num_threads);
}

// ---- the backward -------------------------------------------------------------------------------------------------------

// out[row] = sum over the list's entries of this row, in list order, of scale * gradient.
template <class E, class Machine>
JSD_DEVICE void scatter_rows(Machine& machine, const JsdScatterTask& task, int64_t blocks_a_row, bool vectors) {
  constexpr int kVector = 16 / sizeof(E);
  const int64_t row = machine.block() / blocks_a_row;
  const int64_t first = machine.block() % blocks_a_row * machine.num_threads() * kVector;  // of this block
  const int64_t left = task.vocabulary - first;
  const int num = static_cast<int>(left < machine.num_threads() * kVector ? left : machine.num_threads() * kVector);
  const int start = machine.thread() * kVector;
  if (start >= num) return;
  const bool whole = vectors && start + kVector <= num;
  float total[kVector], entries[kVector];
  JSD_UNROLL for (int i = 0; i < kVector; ++i) total[i] = 0.0f;
  for (int64_t k = task.starts[row]; k < task.starts[row + 1]; ++k) {
    const int64_t index = task.rows[k];
    const float scale = task.scales[index];
    const E* source = static_cast<const E*>(task.gradient.data) + index * task.gradient.row_stride + first + start;
    if (whole) {
      load_vector(source, entries);
    } else {
      JSD_UNROLL for (int i = 0; i < kVector; ++i) entries[i] = start + i < num ? widen(source[i]) : 0.0f;
    }
    JSD_UNROLL for (int i = 0; i < kVector; ++i) total[i] += scale * entries[i];
  }
  E* out = static_cast<E*>(task.out.data) + row * task.out.row_stride + first;
  store_gradient({out, num, sizeof(E) == 2, vectors}, machine.thread(), total);
}

}  // namespace jsd
