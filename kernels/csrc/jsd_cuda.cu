// The divergence of rows on NVIDIA GPUs: the machine that jsd_kernel.h asks for, the kernels, and a C interface.
//
// From compute capability 9.0 on a cluster of blocks holds a row pair in its shared memory: the logits are read from memory once
// and the gradient written once. Before that (and where a row does not fit) the split kernels sweep the matrices themselves,
// a few rows at a time, so that the second and third sweep find them in the second-level cache.
// Nothing here waits for the device; errors are the CUDA runtime's own numbers.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "jsd_launch.h"

namespace {

using jsd::Launch;

constexpr int kClusterArchitecture = 900;

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define JSD_NO_CLUSTERS
#endif

extern __shared__ __align__(128) unsigned char shared_memory[];

struct Gpu {
  JSD_DEVICE int thread() const { return static_cast<int>(threadIdx.x); }
  JSD_DEVICE int num_threads() const { return static_cast<int>(blockDim.x); }
  JSD_DEVICE int lane() const { return static_cast<int>(threadIdx.x % 32); }
  JSD_DEVICE int warp() const { return static_cast<int>(threadIdx.x / 32); }
  JSD_DEVICE int64_t block() const { return blockIdx.x; }
  JSD_DEVICE unsigned char* memory() const { return shared_memory; }
  JSD_DEVICE void sync() { __syncthreads(); }

  template <class T>
  JSD_DEVICE T shuffle_xor(T value, int offset) {
    return __shfl_xor_sync(0xffffffffu, value, offset);
  }

#if !defined(JSD_NO_CLUSTERS)
  JSD_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
  JSD_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

  template <class T>
  JSD_DEVICE T* peer(T* mine, int rank) {
    return cooperative_groups::this_cluster().map_shared_rank(mine, static_cast<unsigned>(rank));
  }

  JSD_DEVICE static uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
  }

  JSD_DEVICE void init_tile(uint64_t* tile) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(tile)) : "memory");
  }
  // What was initialised, to the copy engine too; a block barrier follows.
  JSD_DEVICE void publish_tiles() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  JSD_DEVICE void expect(uint64_t* tile, int num_bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(tile)), "r"(num_bytes) : "memory");
  }
  JSD_DEVICE void copy(void* target, const void* source, int num_bytes, uint64_t* tile) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(target)),
                 "l"(__cvta_generic_to_global(source)), "r"(num_bytes), "r"(shared_address(tile))
                 : "memory");
  }
  JSD_DEVICE void wait(uint64_t* tile) {
    uint32_t arrived;
    do {
      asm volatile(
          "{\n"
          ".reg .pred arrived;\n"
          "mbarrier.try_wait.parity.shared::cta.b64 arrived, [%1], 0;\n"
          "selp.u32 %0, 1, 0, arrived;\n"
          "}"
          : "=r"(arrived)
          : "r"(shared_address(tile))
          : "memory");
    } while (arrived == 0);
  }
#endif
};

// ---- kernels ------------------------------------------------------------------------------------------------------------

template <class K>
__global__ void __launch_bounds__(jsd::kThreads, 2) jsd_fused_kernel(const __grid_constant__ Launch launch) {
#if defined(JSD_NO_CLUSTERS)
  __trap();  // the launcher looks at the image's architecture first
#else
  Gpu gpu;
  jsd::fused_rows<K>(gpu, launch);
#endif
}

template <class K>
__global__ void __launch_bounds__(jsd::kThreads, 2) jsd_normaliser_kernel(const __grid_constant__ Launch launch) {
  Gpu gpu;
  jsd::normaliser_parts<K>(gpu, launch);
}

template <class K>
__global__ void __launch_bounds__(jsd::kThreads, 2) jsd_sum_kernel(const __grid_constant__ Launch launch) {
  Gpu gpu;
  jsd::sum_parts<K>(gpu, launch);
}

template <class K>
__global__ void __launch_bounds__(jsd::kThreads, 2) jsd_gradient_kernel(const __grid_constant__ Launch launch) {
  Gpu gpu;
  jsd::gradient_parts<K>(gpu, launch);
}

__global__ void __launch_bounds__(32) jsd_merge_normalisers_kernel(const __grid_constant__ Launch launch) {
  Gpu gpu;
  jsd::merge_normaliser_parts(gpu, launch);
}

__global__ void __launch_bounds__(32) jsd_merge_sums_kernel(const __grid_constant__ Launch launch) {
  Gpu gpu;
  jsd::merge_sum_parts(gpu, launch);
}

template <class E>
__global__ void __launch_bounds__(256) jsd_scatter_kernel(const __grid_constant__ JsdScatterTask task, int64_t blocks_a_row,
                                                          bool vectors) {
  Gpu gpu;
  jsd::scatter_rows<E>(gpu, task, blocks_a_row, vectors);
}

// ---- launches -----------------------------------------------------------------------------------------------------------

#define RETURN_IF_ERROR(call)                                   \
  do {                                                          \
    const cudaError_t error = (call);                           \
    if (error != cudaSuccess) return static_cast<int>(error);   \
  } while (false)

int num_grid_blocks_error(int64_t num_blocks) { return num_blocks > 0x7fffffff ? jsd::kUnsupportedShape : jsd::kDone; }

int split_normalisers(Launch& launch, cudaStream_t stream) {
  jsd::cut_for_split(launch);
  const int64_t num_rows = launch.task.num_rows, num_blocks = num_rows * launch.num_blocks;
  if (const int error = num_grid_blocks_error(num_blocks)) return error;
  return jsd::with_kind(launch.task, [&](auto kind) {
    jsd_normaliser_kernel<decltype(kind)><<<num_blocks, jsd::kThreads, sizeof(jsd::Exchange), stream>>>(launch);
    jsd_merge_normalisers_kernel<<<num_rows, 32, 0, stream>>>(launch);
    return static_cast<int>(cudaGetLastError());
  });
}

int split_sums(Launch& launch, cudaStream_t stream) {
  jsd::cut_for_split(launch);
  const int64_t num_rows = launch.task.num_rows, num_blocks = num_rows * launch.num_blocks;
  if (const int error = num_grid_blocks_error(num_blocks)) return error;
  return jsd::with_kind(launch.task, [&](auto kind) {
    jsd_sum_kernel<decltype(kind)><<<num_blocks, jsd::kThreads, sizeof(jsd::Exchange), stream>>>(launch);
    jsd_merge_sums_kernel<<<num_rows, 32, 0, stream>>>(launch);
    return static_cast<int>(cudaGetLastError());
  });
}

int split_gradient(Launch& launch, cudaStream_t stream) {
  jsd::cut_for_split(launch);
  const int64_t num_blocks = launch.task.num_rows * launch.num_blocks;
  if (const int error = num_grid_blocks_error(num_blocks)) return error;
  return jsd::with_kind(launch.task, [&](auto kind) {
    jsd_gradient_kernel<decltype(kind)><<<num_blocks, jsd::kThreads, 0, stream>>>(launch);
    return static_cast<int>(cudaGetLastError());
  });
}

// Rows in groups of which about half the second-level cache holds inputs and gradient.
int split_rows(const JsdTask& task, int device, cudaStream_t stream) {
  int cache_bytes = 0;
  RETURN_IF_ERROR(cudaDeviceGetAttribute(&cache_bytes, cudaDevAttrL2CacheSize, device));
  const bool with_gradient = task.gradient.data != nullptr;
  const int64_t row_bytes = task.vocabulary * (jsd::element_bytes(task.student) + jsd::element_bytes(task.teacher) +
                                               (with_gradient ? jsd::element_bytes(task.gradient) : 0));
  const int64_t group = std::max<int64_t>(8, cache_bytes / 2 / std::max<int64_t>(row_bytes, 1));
  for (int64_t first = 0; first < task.num_rows; first += group) {
    Launch launch = jsd::launch_of(jsd::some_rows(task, first, std::min(group, task.num_rows - first)));
    if (const int error = split_normalisers(launch, stream)) return error;
    if (const int error = split_sums(launch, stream)) return error;
    if (!with_gradient) continue;
    if (const int error = split_gradient(launch, stream)) return error;
  }
  return jsd::kDone;
}

template <class K>
cudaLaunchConfig_t fused_config(const Launch& launch, cudaStream_t stream, cudaLaunchAttribute& cluster) {
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(launch.num_blocks);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(launch.task.num_rows * launch.num_blocks));
  config.blockDim = dim3(jsd::kThreads);
  config.dynamicSmemBytes = jsd::fused_bytes<K>(launch);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return config;
}

// Cuts the rows so that two blocks share a multiprocessor, one loading while the other computes; failing that, one.
// `fits` is false where there are no clusters or rows are too long for them.
template <class K>
int cut_rows(Launch& launch, int device, bool& fits) {
  fits = false;
  cudaFuncAttributes attributes;
  RETURN_IF_ERROR(cudaFuncGetAttributes(&attributes, jsd_fused_kernel<K>));
  int major = 0, a_multiprocessor = 0, a_block = 0, reserved = 0;
  RETURN_IF_ERROR(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  RETURN_IF_ERROR(cudaDeviceGetAttribute(&a_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device));
  RETURN_IF_ERROR(cudaDeviceGetAttribute(&a_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  RETURN_IF_ERROR(cudaDeviceGetAttribute(&reserved, cudaDevAttrReservedSharedMemoryPerBlock, device));
  if (major < 9 || attributes.ptxVersion * 10 < kClusterArchitecture) return jsd::kDone;
  const int64_t half = std::min(a_multiprocessor / 2 - reserved, a_block);
  RETURN_IF_ERROR(cudaFuncSetAttribute(jsd_fused_kernel<K>, cudaFuncAttributeMaxDynamicSharedMemorySize, a_block));
  if (jsd::cut_for_fused<K>(launch, half, 8)) {
    fits = true;
    return jsd::kDone;
  }
  if (jsd::cut_for_fused<K>(launch, half, jsd::kMaxBlocks)) {  // more than 8 is for the device to grant
    RETURN_IF_ERROR(cudaFuncSetAttribute(jsd_fused_kernel<K>, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
    cudaLaunchAttribute cluster;
    cudaLaunchConfig_t config = fused_config<K>(launch, nullptr, cluster);
    int num_clusters = 0;
    if (cudaOccupancyMaxActiveClusters(&num_clusters, jsd_fused_kernel<K>, &config) == cudaSuccess && num_clusters > 0) {
      fits = true;
      return jsd::kDone;
    }
    cudaGetLastError();  // "no" is an answer, not an error
  }
  fits = jsd::cut_for_fused<K>(launch, a_block, 8);
  return jsd::kDone;
}

template <class K>
int rows(const JsdTask& task, int device, cudaStream_t stream) {
  Launch launch = jsd::launch_of(task);
  bool fits = false;
  if (const int error = cut_rows<K>(launch, device, fits)) return error;
  if (!fits) return split_rows(task, device, stream);
  if (const int error = num_grid_blocks_error(task.num_rows * launch.num_blocks)) return error;
  cudaLaunchAttribute cluster;
  const cudaLaunchConfig_t config = fused_config<K>(launch, stream, cluster);
  RETURN_IF_ERROR(cudaLaunchKernelEx(&config, jsd_fused_kernel<K>, launch));
  return jsd::kDone;
}

}  // namespace

extern "C" {

const char* megatron_sd_cuda_architectures() { return MEGATRON_SD_CUDA_ARCHS; }

// Of the CUDA toolkit, as in 13000.
int32_t megatron_sd_cuda_version() { return CUDART_VERSION; }

const char* megatron_sd_cuda_error(int error) {
  if (error == jsd::kUnsupportedTypes) return "these element types are not among the kernels'";
  if (error == jsd::kUnsupportedShape) return "too many rows for one launch";
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

// Whether the driver, the device and this library fit: an error of the CUDA runtime, or 0.
int megatron_sd_cuda_ready(int device) {
  RETURN_IF_ERROR(cudaSetDevice(device));
  cudaFuncAttributes attributes;
  return static_cast<int>(cudaFuncGetAttributes(&attributes, jsd_merge_sums_kernel));
}

// Bytes that `scratch` of every call below needs.
int64_t megatron_sd_cuda_scratch_bytes(const JsdTask* task) { return jsd::split_scratch_bytes(*task); }

// Of all below: `device` is the current one from here on; the work is queued on `stream`.

// Values, gradients if wanted; normalisers and sums on the way.
int megatron_sd_cuda_jsd_rows(const JsdTask* task, int device, void* stream) {
  RETURN_IF_ERROR(cudaSetDevice(device));
  return jsd::with_kind(*task, [&](auto kind) { return rows<decltype(kind)>(*task, device, static_cast<cudaStream_t>(stream)); });
}

// The split steps, for a vocabulary in shards: each reads what the ones before it wrote, combined over all shards.
int megatron_sd_cuda_jsd_normalisers(const JsdTask* task, int device, void* stream) {
  RETURN_IF_ERROR(cudaSetDevice(device));
  Launch launch = jsd::launch_of(*task);
  return split_normalisers(launch, static_cast<cudaStream_t>(stream));
}

int megatron_sd_cuda_jsd_sums(const JsdTask* task, int device, void* stream) {
  RETURN_IF_ERROR(cudaSetDevice(device));
  Launch launch = jsd::launch_of(*task);
  return split_sums(launch, static_cast<cudaStream_t>(stream));
}

int megatron_sd_cuda_jsd_gradient(const JsdTask* task, int device, void* stream) {
  RETURN_IF_ERROR(cudaSetDevice(device));
  Launch launch = jsd::launch_of(*task);
  return split_gradient(launch, static_cast<cudaStream_t>(stream));
}

// Every row of `out` is written.
int megatron_sd_cuda_scatter_rows(const JsdScatterTask* task, int device, void* stream) {
  RETURN_IF_ERROR(cudaSetDevice(device));
  constexpr int kScatterThreads = 256;
  const bool vectors = jsd::is_aligned(task->gradient) && jsd::is_aligned(task->out);
  const bool is_bf16 = task->gradient.element_type == kBfloat16;
  const int64_t blocks_a_row = jsd::ceil_div(task->vocabulary, kScatterThreads * (is_bf16 ? 8 : 4));
  const int64_t num_blocks = task->out.num_rows * blocks_a_row;
  if (const int error = num_grid_blocks_error(num_blocks)) return error;
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  if (is_bf16)
    jsd_scatter_kernel<uint16_t><<<num_blocks, kScatterThreads, 0, queue>>>(*task, blocks_a_row, vectors);
  else
    jsd_scatter_kernel<float><<<num_blocks, kScatterThreads, 0, queue>>>(*task, blocks_a_row, vectors);
  return static_cast<int>(cudaGetLastError());
}

}  // extern "C"
