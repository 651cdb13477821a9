// Where the bytes of an object lie in a pool's pages: the arithmetic of kvtier/gpu/layout.py.
// The same text runs on the device and, compiled by a C++ compiler, in the tests on a CPU.
#pragma once

#if defined(__CUDACC__)
#define KV_HD __host__ __device__ __forceinline__
#else
#define KV_HD inline
#endif

typedef unsigned long long u64;
typedef unsigned int u32;
typedef unsigned char u8;

// One plane of a group. Sizes are in bytes; descriptors.py packs the same 56 bytes.
struct KvPlane {
  u64 base;          // address of page 0; in a contiguous cache of the object's first row
  u64 page_stride;
  u64 strip_stride;
  u64 token_stride;
  u64 out;           // where the plane begins in the object
  u32 strips;
  u32 row_bytes;
  u32 gapless;       // what lies in one piece: 2 a full page, 1 a strip, 0 a row
  u32 unused;
};

// Bytes [lo, hi) of one object. descriptors.py packs the same 64 bytes.
struct KvSegment {
  u64 planes;        // address of KvPlane[plane_count]
  u64 ids;           // address of u32[pages]: page ids in order of position
  u64 linear;        // where byte `lo` is kept outside of the pool, from the launch's base on
  u64 lo;
  u64 hi;
  u32 plane_count;
  u32 page_tokens;
  u32 first_row;     // of the first page
  u32 rows;          // of the object
  u32 first_tile;    // tiles of all segments of a launch are numbered through
  u32 item;          // which result is this object's
};

struct KvRun {
  u64 address;
  u64 bytes;         // from there on without a gap, and in stored order
};

KV_HD u32 kv_plane_of(const KvPlane* planes, u32 count, u64 at) {
  u32 low = 0, high = count;
  while (high - low > 1) {
    u32 middle = (low + high) / 2;
    if (planes[middle].out <= at) low = middle; else high = middle;
  }
  return low;
}

KV_HD KvRun kv_locate(const KvSegment& s, u64 at) {
  const KvPlane* planes = reinterpret_cast<const KvPlane*>(s.planes);
  const KvPlane& p = planes[kv_plane_of(planes, s.plane_count, at)];
  const u32* ids = reinterpret_cast<const u32*>(s.ids);
  const u64 in_plane = at - p.out;
  const u64 token_bytes = static_cast<u64>(p.strips) * p.row_bytes;
  // Each page holds a whole number of tokens' bytes, so tokens alone tell the page.
  const u32 page = (static_cast<u32>(in_plane / token_bytes) + s.first_row) / s.page_tokens;
  const u32 before = page ? page * s.page_tokens - s.first_row : 0;
  const u32 skipped = page ? 0 : s.first_row;
  const u32 room = s.page_tokens - skipped, left = s.rows - before;
  const u32 rows = room < left ? room : left;
  const u64 in_page = in_plane - before * token_bytes;
  const u64 strip_bytes = static_cast<u64>(rows) * p.row_bytes;
  const u64 strip = in_page / strip_bytes, in_strip = in_page % strip_bytes;
  const u64 row = in_strip / p.row_bytes, in_row = in_strip % p.row_bytes;
  KvRun run;
  run.address = p.base + ids[page] * p.page_stride + strip * p.strip_stride +
                (row + skipped) * p.token_stride + in_row;
  if (p.gapless == 2 && rows == s.page_tokens) run.bytes = rows * token_bytes - in_page;
  else run.bytes = p.gapless ? strip_bytes - in_strip : p.row_bytes - in_row;
  return run;
}

// The segment with this tile.
KV_HD const KvSegment& kv_segment_of(const KvSegment* segments, u32 count, u32 tile) {
  u32 low = 0, high = count;
  while (high - low > 1) {
    u32 middle = (low + high) / 2;
    if (segments[middle].first_tile <= tile) low = middle; else high = middle;
  }
  return segments[low];
}
