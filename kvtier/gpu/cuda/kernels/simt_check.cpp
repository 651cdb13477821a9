// The kernels themselves on a CPU: one thread for each of a block's threads, barriers for __syncthreads and
// shuffles, blocks one after the other. For tests; slow.
#include <pthread.h>

#include <thread>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(threads)

namespace {

constexpr unsigned THREADS = 256, WARP = 32;

struct Index {
  unsigned x;
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

thread_local Index threadIdx, blockIdx;
Index blockDim = {THREADS}, gridDim = {1};

struct Barrier {
  pthread_barrier_t made;
  explicit Barrier(unsigned count = WARP) { pthread_barrier_init(&made, nullptr, count); }
  void wait() { pthread_barrier_wait(&made); }
};

Barrier whole_block(THREADS);
Barrier warps[THREADS / WARP];
unsigned long long exchanged[THREADS];

void __syncthreads() { whole_block.wait(); }

unsigned long long __shfl_xor_sync(unsigned, unsigned long long value, int mask) {
  Barrier& warp = warps[threadIdx.x / WARP];
  exchanged[threadIdx.x] = value;
  warp.wait();
  const unsigned long long got = exchanged[threadIdx.x ^ mask];
  warp.wait();
  return got;
}

unsigned long long atomicAdd(unsigned long long* at, unsigned long long value) {
  return __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
}

double atomicAdd(double* at, double value) {
  static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
  pthread_mutex_lock(&lock);
  const double before = *at;
  *at = before + value;
  pthread_mutex_unlock(&lock);
  return before;
}

}  // namespace

#include "kv_copy.cu"

// kernel: 0 gather, 1 scatter, 2 checksum, 3 encode, 4 decode, 5 hash. The rest as in the launch.
extern "C" void kv_simt_launch(u32 kernel, const KvSegment* segments, u32 count, u32 tiles, u64 base, u32 blocks,
                               u64 form, u64 extra) {
  gridDim.x = blocks;
  for (u32 block = 0; block < blocks; block++) {
    std::vector<std::thread> threads;
    for (u32 number = 0; number < THREADS; number++)
      threads.emplace_back([=] {
        threadIdx.x = number;
        blockIdx.x = block;
        if (kernel == 0) kv_gather(segments, count, tiles, base);
        if (kernel == 1) kv_scatter(segments, count, tiles, base);
        if (kernel == 2) kv_checksum(segments, count, tiles, reinterpret_cast<u64*>(base));
        if (kernel == 3) kv_encode(segments, count, tiles, base, form, extra);
        if (kernel == 4) kv_decode(segments, count, tiles, base, form, extra);
        if (kernel == 5) kv_hash(segments, count, tiles, base, form, extra);
      });
    for (std::thread& thread : threads) thread.join();
  }
}
