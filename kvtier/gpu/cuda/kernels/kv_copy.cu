// Kernels that move an object's bytes between a pool's pages and linear memory, and that hash them in the pool.
// Linear memory is device staging, or registered host memory that the kernel reaches over the link itself.
// Compiled by NVRTC at first use; nothing is included but the two files beside it.
#include "xxh3.cuh"

#define KV_TILE 4096u
#define KV_WARP 32u

template <typename Vector, u32 UNROLL>
__device__ __forceinline__ void copy_as(u64 to, u64 from, u64 bytes, u32 lane) {
  const u64 count = bytes / sizeof(Vector);
  const Vector* source = reinterpret_cast<const Vector*>(from);
  Vector* target = reinterpret_cast<Vector*>(to);
  for (u64 i = lane; i < count; i += KV_WARP * UNROLL) {
    // All loads go out before the first store: over the link each takes a microsecond or two.
    Vector held[UNROLL];
#pragma unroll
    for (u32 k = 0; k < UNROLL; k++)
      if (i + k * KV_WARP < count) held[k] = source[i + k * KV_WARP];
#pragma unroll
    for (u32 k = 0; k < UNROLL; k++)
      if (i + k * KV_WARP < count) target[i + k * KV_WARP] = held[k];
  }
}

__device__ __forceinline__ void copy_run(u64 to, u64 from, u64 bytes, u32 lane) {
  const u64 all = to | from | bytes;
  if (all % 16 == 0) copy_as<uint4, 8>(to, from, bytes, lane);
  else if (all % 4 == 0) copy_as<u32, 8>(to, from, bytes, lane);
  else copy_as<u8, 8>(to, from, bytes, lane);
}

// One warp moves a tile: it finds each gapless run once, and its lanes share the run.
template <bool GATHER>
__device__ __forceinline__ void move_tiles(const KvSegment* segments, u32 count, u32 tiles, u64 base) {
  const u32 lane = threadIdx.x % KV_WARP;
  const u32 warps = gridDim.x * (blockDim.x / KV_WARP);
  for (u32 tile = (blockIdx.x * blockDim.x + threadIdx.x) / KV_WARP; tile < tiles; tile += warps) {
    const KvSegment s = kv_segment_of(segments, count, tile);
    u64 at = s.lo + static_cast<u64>(tile - s.first_tile) * KV_TILE;
    const u64 end = at + KV_TILE < s.hi ? at + KV_TILE : s.hi;
    while (at < end) {
      const KvRun run = kv_locate(s, at);
      const u64 bytes = run.bytes < end - at ? run.bytes : end - at;
      const u64 linear = base + s.linear + (at - s.lo);
      if (GATHER) copy_run(linear, run.address, bytes, lane);
      else copy_run(run.address, linear, bytes, lane);
      at += bytes;
    }
  }
}

extern "C" __global__ void __launch_bounds__(256)
kv_gather(const KvSegment* segments, u32 count, u32 tiles, u64 base) {
  move_tiles<true>(segments, count, tiles, base);
}

extern "C" __global__ void __launch_bounds__(256)
kv_scatter(const KvSegment* segments, u32 count, u32 tiles, u64 base) {
  move_tiles<false>(segments, count, tiles, base);
}

// Kept out of line: inlined sixteen times they would make the compiler work for seconds.
__device__ __noinline__ u64 slow_word(const KvSegment& s, u64 at) {
  KvCursor cursor = {0, 0, 0};
  return kv_object_word(s, cursor, at);
}

__device__ __noinline__ u64 slow_short(const KvSegment& s, u64 begin, u32 bytes, u64 seed) {
  return kv_short_piece(s, begin, bytes, seed);
}

// Words `at`, at + 64, ... of `stripes` stripes; 0 past them. All loads are out before the first is needed.
__device__ __forceinline__ void block_words(const KvSegment& s, u64 at, u32 stripes, u64* words) {
  const KvRun run = stripes ? kv_locate(s, at) : KvRun{0, 0};
  if (stripes == 16 && run.bytes >= 15 * 64 + 8 && run.address % 8 == 0) {
    const u64* here = reinterpret_cast<const u64*>(run.address);
#pragma unroll
    for (u32 stripe = 0; stripe < 16; stripe++) words[stripe] = here[stripe * 8];
    return;
  }
#pragma unroll
  for (u32 stripe = 0; stripe < 16; stripe++)
    words[stripe] = stripe < stripes ? slow_word(s, at + stripe * 64) : 0;
}

// One thread block a piece of 256 KiB: eight threads take a stripe, 32 such groups take blocks in turn.
extern "C" __global__ void __launch_bounds__(256)
kv_checksum(const KvSegment* segments, u32 count, u32 tiles, u64* results) {
  __shared__ u64 terms[KV_PIECE / KV_XXH_BLOCK][8];
  __shared__ u64 secret[KV_SECRET_WORDS];
  __shared__ u64 accs[8];
  const u32 lane = threadIdx.x % 8;
  for (u32 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const KvSegment& s = kv_segment_of(segments, count, tile);
    const u64 seed = tile - s.first_tile;
    const u64 begin = seed * KV_PIECE;
    const u32 bytes = static_cast<u32>(s.hi - begin < KV_PIECE ? s.hi - begin : KV_PIECE);
    if (bytes <= KV_XXH_SHORT) {
      if (threadIdx.x == 0) atomicAdd(results + s.item, slow_short(s, begin, bytes, seed));
      continue;
    }
    if (threadIdx.x < KV_SECRET_WORDS) secret[threadIdx.x] = kv_secret_word(threadIdx.x, seed);
    __syncthreads();
    const u32 whole = kv_whole_blocks(bytes);
    for (u32 first = 0; first <= whole; first += 32) {
      const u32 block = first + threadIdx.x / 8;
      const u32 stripes = block < whole ? 16 : block == whole ? kv_rest_stripes(bytes) : 0;
      u64 words[16];
      block_words(s, begin + static_cast<u64>(block) * KV_XXH_BLOCK + lane * 8, stripes, words);
      // Every thread of a warp goes through the same steps: the shuffle needs all of them.
      u64 sum = 0;
#pragma unroll
      for (u32 stripe = 0; stripe < 16; stripe++) {
        const u64 neighbour = __shfl_xor_sync(0xffffffffu, words[stripe], 1);
        if (stripe < stripes) sum += kv_term(words[stripe], neighbour, secret[stripe + lane]);
      }
      if (block <= whole) terms[block][lane] = sum;
    }
    __syncthreads();
    if (threadIdx.x < KV_WARP) {
      u64 acc = kv_start(lane);
      const u64 key = secret[16 + lane];
      for (u32 block = 0; block < whole; block++) acc = kv_stir(acc + terms[block][lane], key);
      acc += terms[whole][lane];
      const u64 word = slow_word(s, begin + bytes - 64 + lane * 8);
      const u64 neighbour = __shfl_xor_sync(0xffffffffu, word, 1);
      acc += kv_term(word, neighbour, kv_last_key(secret, lane));
      if (threadIdx.x < 8) accs[lane] = acc;
    }
    __syncthreads();
    if (threadIdx.x == 0) atomicAdd(results + s.item, kv_merge(accs, secret, bytes));
    __syncthreads();
  }
}
