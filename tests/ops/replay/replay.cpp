// The CUDA kernels' own bodies (kernels/csrc/jsd_kernel.h) on a host: threads are fibers, run one at a time in random order.
//
// Everything that a GPU's threads do to each other goes through the Machine, so this one checks it: a barrier that not every
// thread reaches, memory of a block that has not begun or has ended, a copy that is misaligned, unannounced or read before it
// arrived (shared memory starts as NaN, a copy happens when somebody waits for it), a store past the end of shared memory. A
// missing barrier shows as results that depend on the order. Powers and logarithms carry the largest error that the
// PTX manual allows them. The interface is that of jsd_cuda.cu, for megatron_sd/ops/native/cuda_library.py to call.
#include <ucontext.h>

#include <cmath>
#include <array>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../../../kernels/csrc/jsd_launch.h"

namespace jsd {

// In [-1, 1], a function of the bits.
static double noise(float x) {
  uint32_t bits = static_cast<uint32_t>(bits_of(x)) * 2654435761u;
  bits ^= bits >> 15, bits *= 2246822519u, bits ^= bits >> 13;
  return bits / 2147483647.5 - 1.0;
}

float hardware_exp2(float x) {
  const double exact = std::exp2(static_cast<double>(x));
  const float value = static_cast<float>(x == 0.0f ? 1.0 : exact * (1.0 + noise(x) * 0x1p-22));
  return value < 0x1p-126f ? 0.0f : value;
}

float hardware_log2(float x) {
  const double exact = std::log2(static_cast<double>(x));
  if (x == 1.0f) return 0.0f;
  return static_cast<float>(x > 0.5f && x < 2.0f ? exact + noise(x) * 0x1p-22 : exact * (1.0 + noise(x) * 0x1p-22));
}

}  // namespace jsd

namespace {

constexpr size_t kStackBytes = 64 * 1024, kGuardBytes = 64;

struct Settings {
  bool clusters = true;
  int max_blocks = 8;
  int64_t shared_bytes = 112 * 1024;
} settings;

std::mt19937 generator;
std::string fault;  // the first

void report(const char* what) {
  if (fault.empty()) fault = what;
}

struct Fiber;

struct Barrier {
  int expected = 0, arrived = 0;
  uint64_t generation = 0;
  std::vector<Fiber*> waiting;
};

struct Tile {
  bool initialised = false, published = false;
  int64_t expected_bytes = -1, copied_bytes = 0;
  struct Copy {
    void* target;
    const void* source;
    int num_bytes;
  };
  std::vector<Copy> copies;
};

struct Block {
  std::vector<unsigned char> memory;
  unsigned char* aligned = nullptr;
  size_t num_bytes = 0;
  int64_t number = 0;
  int begun = 0, ended = 0;
  Barrier barrier;
  std::vector<Barrier> warps;
  std::vector<std::array<std::array<uint64_t, 32>, 2>> slots;
  std::map<uint64_t*, Tile> tiles;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Block* block = nullptr;
  int thread = 0, num_threads = 0, shuffles = 0;
  bool arrived_at_cluster = false;
  uint64_t cluster_ticket = 0;
};

ucontext_t scheduler;
Fiber* current = nullptr;
std::vector<Fiber*> runnable;
std::vector<std::unique_ptr<Block>> cluster;
Barrier cluster_barrier;
std::function<void()> body;

void pause_fiber() { swapcontext(&current->context, &scheduler); }

uint64_t arrive(Barrier& barrier) {
  const uint64_t ticket = barrier.generation;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0, ++barrier.generation;
    runnable.insert(runnable.end(), barrier.waiting.begin(), barrier.waiting.end());
    barrier.waiting.clear();
  }
  return ticket;
}

void wait(Barrier& barrier, uint64_t ticket) {
  if (barrier.generation != ticket) return;
  barrier.waiting.push_back(current);
  pause_fiber();
}

struct Host {
  int thread() const { return current->thread; }
  int num_threads() const { return current->num_threads; }
  int lane() const { return current->thread % 32; }
  int warp() const { return current->thread / 32; }
  int64_t block() const { return current->block->number; }
  unsigned char* memory() const { return current->block->aligned; }
  void sync() { ::wait(current->block->barrier, arrive(current->block->barrier)); }

  template <class T>
  T shuffle_xor(T value, int offset) {
    auto& slots = current->block->slots[warp()][current->shuffles++ % 2];
    std::memcpy(&slots[lane()], &value, sizeof value);
    Barrier& barrier = current->block->warps[warp()];
    ::wait(barrier, arrive(barrier));
    std::memcpy(&value, &slots[lane() ^ offset], sizeof value);
    return value;
  }

  void cluster_arrive() {
    if (current->arrived_at_cluster) report("a thread arrives at the cluster's barrier twice");
    current->arrived_at_cluster = true;
    current->cluster_ticket = arrive(cluster_barrier);
  }
  void cluster_wait() {
    if (!current->arrived_at_cluster) report("a thread waits for the cluster without having arrived");
    current->arrived_at_cluster = false;
    ::wait(cluster_barrier, current->cluster_ticket);
  }

  template <class T>
  T* peer(T* mine, int rank) {
    if (rank >= static_cast<int>(cluster.size())) return report("a block of another cluster is written to"), mine;
    Block& other = *cluster[rank];
    if (other.begun == 0) report("a block is written to before it has begun");
    if (other.ended == current->num_threads) report("a block is written to after it has ended");
    return reinterpret_cast<T*>(other.aligned + (reinterpret_cast<unsigned char*>(mine) - current->block->aligned));
  }

  void init_tile(uint64_t* tile) { current->block->tiles[tile].initialised = true; }
  void publish_tiles() {
    for (auto& [address, tile] : current->block->tiles) tile.published = true;
  }
  void expect(uint64_t* tile, int num_bytes) {
    Tile& found = current->block->tiles[tile];
    if (!found.initialised || !found.published) report("a tile is used before it is initialised and published");
    if (found.expected_bytes >= 0) report("a tile is used twice");
    if (num_bytes >= 1 << 20) report("a tile expects more bytes than its barrier can count");
    found.expected_bytes = num_bytes;
  }
  void copy(void* target, const void* source, int num_bytes, uint64_t* tile) {
    Tile& found = current->block->tiles[tile];
    const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
    if (!aligned(target) || !aligned(source) || num_bytes % 16 != 0) report("a copy is not aligned to 16 bytes");
    found.copied_bytes += num_bytes;
    found.copies.push_back({target, source, num_bytes});
  }
  void wait(uint64_t* tile) {
    Tile& found = current->block->tiles[tile];
    if (!found.published) report("a tile is waited for before it is initialised and published");
    for (int turns = 0; found.expected_bytes < 0 && turns < 100000; ++turns) {  // the thread that starts the copies is not here yet
      runnable.push_back(current);
      pause_fiber();
    }
    if (found.expected_bytes != found.copied_bytes) report("a tile's bytes are not those it expects");
    for (const Tile::Copy& copy : found.copies) std::memcpy(copy.target, copy.source, copy.num_bytes);
    found.copies.clear();
  }
};

void run_fiber() {
  ++current->block->begun;
  body();
  if (current->arrived_at_cluster) report("a thread ends between arriving at the cluster's barrier and waiting");
  if (++current->block->ended == current->num_threads)
    for (auto& [address, tile] : current->block->tiles)
      if (!tile.copies.empty()) report("a block ends before its copies have arrived");
  swapcontext(&current->context, &scheduler);
}

void prepare(Fiber& fiber) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get(), fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = &scheduler;
  makecontext(&fiber.context, run_fiber, 0);
  runnable.push_back(&fiber);
}

std::vector<std::unique_ptr<Fiber>> fibers;

// One cluster of `num_blocks` blocks, numbered from `first` on, to its end.
void run_cluster(int64_t first, int num_blocks, int num_threads, size_t num_bytes) {
  cluster.clear(), runnable.clear();
  cluster_barrier = Barrier();
  cluster_barrier.expected = num_blocks * num_threads;
  while (fibers.size() < static_cast<size_t>(num_blocks * num_threads)) {
    fibers.push_back(std::make_unique<Fiber>());
    fibers.back()->stack.reset(new char[kStackBytes]);
  }
  for (int rank = 0; rank < num_blocks; ++rank) {
    auto block = std::make_unique<Block>();
    block->memory.assign(num_bytes + 128 + kGuardBytes, 0xff);
    block->aligned = block->memory.data() + (128 - reinterpret_cast<uintptr_t>(block->memory.data()) % 128);
    block->num_bytes = num_bytes;
    block->number = first + rank;
    block->barrier.expected = num_threads;
    block->warps.resize(num_threads / 32), block->slots.resize(num_threads / 32);
    for (Barrier& warp : block->warps) warp.expected = 32;
    for (int thread = 0; thread < num_threads; ++thread) {
      Fiber& fiber = *fibers[rank * num_threads + thread];
      fiber.block = block.get();
      fiber.thread = thread, fiber.num_threads = num_threads, fiber.shuffles = 0;
      fiber.arrived_at_cluster = false;
      prepare(fiber);
    }
    cluster.push_back(std::move(block));
  }
  while (!runnable.empty()) {
    std::swap(runnable[generator() % runnable.size()], runnable.back());
    current = runnable.back();
    runnable.pop_back();
    swapcontext(&scheduler, &current->context);
  }
  for (const auto& block : cluster) {
    if (block->ended != num_threads) report("threads wait at a barrier that the others do not reach");
    for (size_t i = 0; i < kGuardBytes; ++i)
      if (block->aligned[num_bytes + i] != 0xff) report("a store past the end of shared memory");
  }
}

template <class Body>
int run_blocks(int64_t num_blocks, int blocks_a_cluster, int num_threads, size_t num_bytes, Body kernel) {
  body = kernel;
  for (int64_t first = 0; first < num_blocks && fault.empty(); first += blocks_a_cluster)
    run_cluster(first, blocks_a_cluster, num_threads, num_bytes);
  return fault.empty() ? jsd::kDone : 1;
}

int split_normalisers(jsd::Launch launch) {
  jsd::cut_for_split(launch);
  const int64_t num_rows = launch.task.num_rows, num_blocks = num_rows * launch.num_blocks;
  return jsd::with_kind(launch.task, [&](auto kind) {
    using K = decltype(kind);
    run_blocks(num_blocks, 1, jsd::kThreads, sizeof(jsd::Exchange), [&] {
      Host host;
      jsd::normaliser_parts<K>(host, launch);
    });
    return run_blocks(num_rows, 1, 32, 0, [&] {
      Host host;
      jsd::merge_normaliser_parts(host, launch);
    });
  });
}

int split_sums(jsd::Launch launch) {
  jsd::cut_for_split(launch);
  const int64_t num_rows = launch.task.num_rows, num_blocks = num_rows * launch.num_blocks;
  return jsd::with_kind(launch.task, [&](auto kind) {
    using K = decltype(kind);
    run_blocks(num_blocks, 1, jsd::kThreads, sizeof(jsd::Exchange), [&] {
      Host host;
      jsd::sum_parts<K>(host, launch);
    });
    return run_blocks(num_rows, 1, 32, 0, [&] {
      Host host;
      jsd::merge_sum_parts(host, launch);
    });
  });
}

int split_gradient(jsd::Launch launch) {
  jsd::cut_for_split(launch);
  return jsd::with_kind(launch.task, [&](auto kind) {
    using K = decltype(kind);
    return run_blocks(launch.task.num_rows * launch.num_blocks, 1, jsd::kThreads, 0, [&] {
      Host host;
      jsd::gradient_parts<K>(host, launch);
    });
  });
}

template <class K>
int rows(const JsdTask& task) {
  jsd::Launch launch = jsd::launch_of(task);
  if (!settings.clusters || !jsd::cut_for_fused<K>(launch, settings.shared_bytes, settings.max_blocks)) {
    constexpr int64_t kGroup = 2;
    for (int64_t first = 0; first < task.num_rows; first += kGroup) {
      const int64_t num = task.num_rows - first < kGroup ? task.num_rows - first : kGroup;
      const jsd::Launch some = jsd::launch_of(jsd::some_rows(task, first, num));
      if (const int error = split_normalisers(some)) return error;
      if (const int error = split_sums(some)) return error;
      if (task.gradient.data == nullptr) continue;
      if (const int error = split_gradient(some)) return error;
    }
    return jsd::kDone;
  }
  return run_blocks(task.num_rows * launch.num_blocks, launch.num_blocks, jsd::kThreads, jsd::fused_bytes<K>(launch), [&] {
    Host host;
    jsd::fused_rows<K>(host, launch);
  });
}

}  // namespace

extern "C" {

// clusters: 0 for the split kernels. shared_bytes, max_blocks: what a GPU would have, to force more or fewer blocks a row.
void replay_configure(int32_t clusters, int32_t max_blocks, int64_t shared_bytes, uint32_t seed) {
  settings.clusters = clusters != 0, settings.max_blocks = max_blocks, settings.shared_bytes = shared_bytes;
  generator.seed(seed);
  fault.clear();
}

const char* megatron_sd_cuda_architectures() { return "replay"; }
int32_t megatron_sd_cuda_version() { return 0; }
int megatron_sd_cuda_ready(int) { return jsd::kDone; }

const char* megatron_sd_cuda_error(int error) {
  return error == 1 ? fault.c_str() : "these element types or sizes are not among the kernels'";
}

int64_t megatron_sd_cuda_scratch_bytes(const JsdTask* task) { return jsd::split_scratch_bytes(*task); }

int megatron_sd_cuda_jsd_rows(const JsdTask* task, int, void*) {
  return jsd::with_kind(*task, [&](auto kind) { return rows<decltype(kind)>(*task); });
}

int megatron_sd_cuda_jsd_normalisers(const JsdTask* task, int, void*) { return split_normalisers(jsd::launch_of(*task)); }
int megatron_sd_cuda_jsd_sums(const JsdTask* task, int, void*) { return split_sums(jsd::launch_of(*task)); }
int megatron_sd_cuda_jsd_gradient(const JsdTask* task, int, void*) { return split_gradient(jsd::launch_of(*task)); }

int megatron_sd_cuda_scatter_rows(const JsdScatterTask* task, int, void*) {
  constexpr int kScatterThreads = 256;
  const bool vectors = jsd::is_aligned(task->gradient) && jsd::is_aligned(task->out);
  const bool is_bf16 = task->gradient.element_type == kBfloat16;
  const int64_t blocks_a_row = jsd::ceil_div(task->vocabulary, kScatterThreads * (is_bf16 ? 8 : 4));
  return run_blocks(task->out.num_rows * blocks_a_row, 1, kScatterThreads, 0, [&] {
    Host host;
    if (is_bf16)
      jsd::scatter_rows<uint16_t>(host, *task, blocks_a_row, vectors);
    else
      jsd::scatter_rows<float>(host, *task, blocks_a_row, vectors);
  });
}

}  // extern "C"
