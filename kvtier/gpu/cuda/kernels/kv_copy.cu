// Kernels that move an object's bytes between a pool's pages and linear memory, and that hash them in the pool.
// Linear memory is device staging, or registered host memory that the kernel reaches over the link itself.
// Compiled by NVRTC at first use; nothing is included but the files beside it.
#include "codec.cuh"
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
// Where `s.lo` is not 0 it is the beginning of a piece.
__device__ __forceinline__ void checksum_tiles(const KvSegment* segments, u32 count, u32 tiles, u64* results) {
  __shared__ u64 terms[KV_PIECE / KV_XXH_BLOCK][8];
  __shared__ u64 secret[KV_SECRET_WORDS];
  __shared__ u64 accs[8];
  const u32 lane = threadIdx.x % 8;
  for (u32 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const KvSegment& s = kv_segment_of(segments, count, tile);
    const u64 seed = tile - s.first_tile + s.lo / KV_PIECE;
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

extern "C" __global__ void __launch_bounds__(256)
kv_checksum(const KvSegment* segments, u32 count, u32 tiles, u64* results) {
  checksum_tiles(segments, count, tiles, results);
}

// The same of one segment's bytes where they lie in linear memory: as a page that has all of the object.
extern "C" __global__ void __launch_bounds__(256)
kv_hash(const KvSegment* segments, u32, u32 tiles, u64 base, u64, u64 results) {
  __shared__ KvPlane plane;
  __shared__ KvSegment there;
  __shared__ u32 id;
  if (threadIdx.x == 0) {
    const KvSegment& s = segments[0];
    id = 0;
    plane = {base + s.linear - s.lo, 0, 0, 0, 0, 1, static_cast<u32>(s.hi), 2, 0};
    there = s;
    there.planes = reinterpret_cast<u64>(&plane);
    there.ids = reinterpret_cast<u64>(&id);
    there.plane_count = there.page_tokens = there.rows = 1;
    there.first_row = there.first_tile = 0;
  }
  __syncthreads();
  checksum_tiles(&there, 1, tiles, reinterpret_cast<u64*>(results));
}

// -- lossy codecs. An encoded object is a float32 scale for each vector, then a byte for each value; a launch
// has one segment, bytes [lo, hi) of that. Eight lanes take a vector, so a warp takes four at a time.

#define KV_LANES 8u
#define KV_GROUPS (KV_WARP / KV_LANES)

__device__ __forceinline__ u32 largest_of(u64 address, u32 lane, const KvForm& form) {
  u64 largest = 0;
  if (address)
    for (u32 k = lane; k < form.vector; k += KV_LANES) {
      const u64 size = kv_bits(kv_value(kv_load(address, k, form), form)) & 0x7fffffffu;
      largest = size > largest ? size : largest;
    }
#pragma unroll
  for (u32 step = 1; step < KV_LANES; step *= 2) {
    const u64 other = __shfl_xor_sync(0xffffffffu, largest, step);
    largest = other > largest ? other : largest;
  }
  return static_cast<u32>(largest);
}

__device__ __forceinline__ double sum_of_warp(double mine) {
  union {
    double real;
    u64 bits;
  } both;
#pragma unroll
  for (u32 step = 1; step < KV_WARP; step *= 2) {
    both.real = mine;
    both.bits = __shfl_xor_sync(0xffffffffu, both.bits, step);
    mine += both.real;
  }
  return mine;
}

struct KvRange {
  u64 lo, hi;
};

// Part of a tile from `base` on, whose unit is a vector's `unit` bytes: the vectors that it touches.
__device__ __forceinline__ KvRange vectors_of(u64 at, u64 end, u64 begin, u64 stop, u32 unit) {
  const u64 lo = at > begin ? at : begin, hi = end < stop ? end : stop;
  if (lo >= hi) return {0, 0};
  return {(lo - begin) / unit, (hi - begin + unit - 1) / unit};
}

// losses: for each item the squares of what was lost and of what was there, and whether a value is not finite.
extern "C" __global__ void __launch_bounds__(256)
kv_encode(const KvSegment* segments, u32, u32 tiles, u64 base, u64 packed, u64 losses) {
  const KvSegment& s = segments[0];
  const KvForm form = kv_form(packed);
  const u32 lane = threadIdx.x % KV_WARP, part = lane % KV_LANES, group = lane / KV_LANES;
  const u64 vectors = kv_vectors(s, form), codes = 4 * vectors, out = base + s.linear - s.lo;
  const u64 whole = codes + vectors * form.vector;
  double lost = 0, there = 0;
  for (u32 tile = (blockIdx.x * blockDim.x + threadIdx.x) / KV_WARP; tile < tiles;
       tile += gridDim.x * (blockDim.x / KV_WARP)) {
    const u64 at = s.lo + static_cast<u64>(tile) * KV_TILE, end = at + KV_TILE < s.hi ? at + KV_TILE : s.hi;
    const KvRange scales = vectors_of(at, end, 0, codes, 4);
    for (u64 first = scales.lo; first < scales.hi; first += KV_GROUPS) {
      const u64 number = first + group;
      const bool mine = number < scales.hi;
      const u32 largest = largest_of(mine ? kv_vector_at(s, number, form) : 0, part, form);
      if (mine && largest >= 0x7f800000u) reinterpret_cast<u64*>(losses)[3 * s.item + 2] = 1;
      if (mine && part == 0) reinterpret_cast<float*>(out)[number] = kv_scale(largest, form);
    }
    const KvRange bytes = vectors_of(at, end, codes, whole, form.vector);
    for (u64 first = bytes.lo; first < bytes.hi; first += KV_GROUPS) {
      const u64 number = first + group;
      const u64 address = number < bytes.hi ? kv_vector_at(s, number, form) : 0;
      const float scale = kv_scale(largest_of(address, part, form), form);
      if (!address) continue;
      const u64 begin = codes + number * form.vector;
      for (u32 k = part; k < form.vector; k += KV_LANES) {
        if (begin + k < at || begin + k >= end) continue;
        const float value = kv_value(kv_load(address, k, form), form);
        const u32 code = kv_encoded(value, scale, form);
        reinterpret_cast<u8*>(out)[begin + k] = static_cast<u8>(code);
        const double error = kv_minus(value, kv_decoded(code, scale, form));
        lost += error * error;
        there += static_cast<double>(value) * value;
      }
    }
  }
  lost = sum_of_warp(lost);
  there = sum_of_warp(there);
  if (lane == 0 && there != 0) {
    atomicAdd(reinterpret_cast<double*>(losses) + 3 * s.item, lost);
    atomicAdd(reinterpret_cast<double*>(losses) + 3 * s.item + 1, there);
  }
}

// scales: where those of the whole object are, since this part of it need not have them.
extern "C" __global__ void __launch_bounds__(256)
kv_decode(const KvSegment* segments, u32, u32 tiles, u64 base, u64 packed, u64 scales) {
  const KvSegment& s = segments[0];
  const KvForm form = kv_form(packed);
  const u32 lane = threadIdx.x % KV_WARP, part = lane % KV_LANES, group = lane / KV_LANES;
  const u64 vectors = kv_vectors(s, form), codes = 4 * vectors, from = base + s.linear - s.lo;
  const u64 whole = codes + vectors * form.vector;
  for (u32 tile = (blockIdx.x * blockDim.x + threadIdx.x) / KV_WARP; tile < tiles;
       tile += gridDim.x * (blockDim.x / KV_WARP)) {
    const u64 at = s.lo + static_cast<u64>(tile) * KV_TILE, end = at + KV_TILE < s.hi ? at + KV_TILE : s.hi;
    const KvRange bytes = vectors_of(at, end, codes, whole, form.vector);
    for (u64 number = bytes.lo + group; number < bytes.hi; number += KV_GROUPS) {
      const u64 address = kv_vector_at(s, number, form), begin = codes + number * form.vector;
      const float scale = reinterpret_cast<const float*>(scales)[number];
      for (u32 k = part; k < form.vector; k += KV_LANES) {
        if (begin + k < at || begin + k >= end) continue;
        const u32 code = reinterpret_cast<const u8*>(from)[begin + k];
        kv_store(address, k, kv_raw(kv_decoded(code, scale, form), form), form);
      }
    }
  }
}
