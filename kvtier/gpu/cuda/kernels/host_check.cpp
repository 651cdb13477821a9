// The arithmetic of the kernels as functions of a shared library, for tests on a machine without a GPU.
#include <cstring>

#include "xxh3.cuh"

extern "C" void kv_host_move(const KvSegment* segments, u32 count, u64 base, u32 gather, u32 tile_bytes) {
  for (u32 i = 0; i < count; i++) {
    const KvSegment& s = segments[i];
    for (u64 tile = s.lo; tile < s.hi; tile += tile_bytes) {
      const u64 end = tile + tile_bytes < s.hi ? tile + tile_bytes : s.hi;
      for (u64 at = tile; at < end;) {
        const KvRun run = kv_locate(s, at);
        const u64 bytes = run.bytes < end - at ? run.bytes : end - at;
        void* linear = reinterpret_cast<void*>(base + s.linear + (at - s.lo));
        void* pool = reinterpret_cast<void*>(run.address);
        std::memcpy(gather ? linear : pool, gather ? pool : linear, bytes);
        at += bytes;
      }
    }
  }
}

static u64 long_piece(const KvSegment& s, u64 begin, u32 bytes, u64 seed) {
  u64 secret[KV_SECRET_WORDS], acc[8], word[8];
  kv_make_secret(secret, seed);
  KvCursor cursor = {0, 0, 0};
  const u32 whole = kv_whole_blocks(bytes);
  for (u32 i = 0; i < 8; i++) acc[i] = kv_start(i);
  for (u32 block = 0; block <= whole; block++) {
    const u32 stripes = block < whole ? 16 : kv_rest_stripes(bytes);
    u64 terms[8] = {0};
    for (u32 stripe = 0; stripe < stripes; stripe++) {
      for (u32 i = 0; i < 8; i++)
        word[i] = kv_object_word(s, cursor, begin + u64(block) * KV_XXH_BLOCK + stripe * 64 + i * 8);
      for (u32 i = 0; i < 8; i++) terms[i] += kv_term(word[i], word[i ^ 1], secret[stripe + i]);
    }
    for (u32 i = 0; i < 8; i++) acc[i] = block < whole ? kv_stir(acc[i] + terms[i], secret[16 + i]) : acc[i] + terms[i];
  }
  for (u32 i = 0; i < 8; i++) word[i] = kv_object_word(s, cursor, begin + bytes - 64 + i * 8);
  for (u32 i = 0; i < 8; i++) acc[i] += kv_term(word[i], word[i ^ 1], kv_last_key(secret, i));
  return kv_merge(acc, secret, bytes);
}

extern "C" void kv_host_checksum(const KvSegment* segments, u32 count, u64* results) {
  for (u32 i = 0; i < count; i++) {
    const KvSegment& s = segments[i];
    for (u64 piece = 0; piece * KV_PIECE < s.hi; piece++) {
      const u64 begin = piece * KV_PIECE;
      const u32 bytes = u32(s.hi - begin < KV_PIECE ? s.hi - begin : KV_PIECE);
      results[s.item] += bytes <= KV_XXH_SHORT ? kv_short_piece(s, begin, bytes, piece)
                                               : long_piece(s, begin, bytes, piece);
    }
  }
}
