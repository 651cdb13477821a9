// XXH3-64 of a piece of an object, for kvtier's checksum xxh3sum/1 (kvtier/checksum.py).
// Written after the algorithm's specification (github.com/Cyan4973/xxHash, doc/xxhash_spec.md).
//
// Past 240 bytes XXH3 adds, for each block of 1024 bytes, terms that depend on the data alone, and then stirs
// the eight accumulators. So the terms of all blocks can be computed at once, and only the stirring is a chain.
#pragma once

#include "locate.cuh"

#define XXH_P32_1 0x9E3779B1u
#define XXH_P32_2 0x85EBCA77u
#define XXH_P32_3 0xC2B2AE3Du
#define XXH_P64_1 0x9E3779B185EBCA87ull
#define XXH_P64_2 0xC2B2AE3D27D4EB4Full
#define XXH_P64_3 0x165667B19E3779F9ull
#define XXH_P64_4 0x85EBCA77C2B2AE63ull
#define XXH_P64_5 0x27D4EB2F165667C5ull

#define KV_PIECE 262144u
#define KV_XXH_BLOCK 1024u
#define KV_XXH_SHORT 240u
#define KV_SECRET_WORDS 24

// The default secret as little-endian words.
#define KV_XXH_SECRET \
  0xbe4ba423396cfeb8ull, 0x1cad21f72c81017cull, 0xdb979083e96dd4deull, 0x1f67b3b7a4a44072ull, \
  0x78e5c0cc4ee679cbull, 0x2172ffcc7dd05a82ull, 0x8e2443f7744608b8ull, 0x4c263a81e69035e0ull, \
  0xcb00c391bb52283cull, 0xa32e531b8b65d088ull, 0x4ef90da297486471ull, 0xd8acdea946ef1938ull, \
  0x3f349ce33f76faa8ull, 0x1d4f0bc7c7bbdcf9ull, 0x3159b4cd4be0518aull, 0x647378d9c97e9fc8ull, \
  0xc3ebd33483acc5eaull, 0xeb6313faffa081c5ull, 0x49daf0b751dd0d17ull, 0x9e68d429265516d3ull, \
  0xfca1477d58be162bull, 0xce31d07ad1b8f88full, 0x280416958f3acb45ull, 0x7e404bbbcafbd7afull

// Word `word` of the secret that the seed makes.
KV_HD u64 kv_secret_word(u32 word, u64 seed) {
  const u64 secret[KV_SECRET_WORDS] = {KV_XXH_SECRET};
  return word & 1 ? secret[word] - seed : secret[word] + seed;
}

KV_HD u64 kv_word_at(const u64* words, u32 byte) {
  const u32 shift = byte % 8 * 8;
  const u64 low = words[byte / 8] >> shift;
  return shift ? low | words[byte / 8 + 1] << (64 - shift) : low;
}

KV_HD u64 kv_rotl(u64 x, u32 n) { return x << n | x >> (64 - n); }

KV_HD u64 kv_swap64(u64 x) {
  x = (x & 0x00ff00ff00ff00ffull) << 8 | (x >> 8 & 0x00ff00ff00ff00ffull);
  x = (x & 0x0000ffff0000ffffull) << 16 | (x >> 16 & 0x0000ffff0000ffffull);
  return x << 32 | x >> 32;
}

KV_HD u64 kv_fold(u64 a, u64 b) {
#if defined(__CUDA_ARCH__)
  return a * b ^ __umul64hi(a, b);
#else
  const u64 mask = 0xffffffffull;
  const u64 ll = (a & mask) * (b & mask), hl = (a >> 32) * (b & mask);
  const u64 lh = (a & mask) * (b >> 32), hh = (a >> 32) * (b >> 32);
  const u64 cross = (ll >> 32) + (hl & mask) + lh;
  return ((hl >> 32) + (cross >> 32) + hh) ^ (cross << 32 | (ll & mask));
#endif
}

KV_HD u64 kv_avalanche(u64 h) {
  h ^= h >> 37;
  h *= 0x165667919E3779F9ull;
  return h ^ h >> 32;
}

KV_HD u64 kv_avalanche_64(u64 h) {
  h ^= h >> 33;
  h *= XXH_P64_2;
  h ^= h >> 29;
  h *= XXH_P64_3;
  return h ^ h >> 32;
}

// -- long pieces

// What word i of a stripe and its neighbour i^1 add to accumulator i.
KV_HD u64 kv_term(u64 word, u64 neighbour, u64 secret) {
  const u64 key = word ^ secret;
  return (key & 0xffffffffull) * (key >> 32) + neighbour;
}

// key: word 16 + i of the secret for accumulator i.
KV_HD u64 kv_stir(u64 acc, u64 key) {
  acc ^= acc >> 47;
  acc ^= key;
  return acc * XXH_P32_1;
}

KV_HD u64 kv_start(u32 lane) {
  const u64 start[8] = {XXH_P32_3, XXH_P64_1, XXH_P64_2, XXH_P64_3, XXH_P64_4, XXH_P32_2, XXH_P64_5, XXH_P32_1};
  return start[lane];
}

// Blocks that are stirred, and stripes after them; the last 64 bytes come once more at the end.
KV_HD u32 kv_whole_blocks(u32 bytes) { return (bytes - 1) / KV_XXH_BLOCK; }
KV_HD u32 kv_rest_stripes(u32 bytes) { return (bytes - 1) % KV_XXH_BLOCK / 64; }

KV_HD void kv_make_secret(u64* words, u64 seed) {
  for (u32 i = 0; i < KV_SECRET_WORDS; i++) words[i] = kv_secret_word(i, seed);
}

KV_HD u64 kv_last_key(const u64* secret, u32 lane) { return kv_word_at(secret, 192 - 64 - 7 + 8 * lane); }

KV_HD u64 kv_merge(const u64* acc, const u64* secret, u32 bytes) {
  u64 sum = bytes * XXH_P64_1;
  for (u32 i = 0; i < 4; i++)
    sum += kv_fold(acc[2 * i] ^ kv_word_at(secret, 11 + 16 * i), acc[2 * i + 1] ^ kv_word_at(secret, 19 + 16 * i));
  return kv_avalanche(sum);
}

// -- pieces of 240 bytes and less; `words` holds the bytes, with a word of room behind them, the secret is plain

KV_HD u64 kv_mix16(const u64* words, u32 at, const u64* secret, u32 key, u64 seed) {
  return kv_fold(kv_word_at(words, at) ^ (kv_word_at(secret, key) + seed),
                 kv_word_at(words, at + 8) ^ (kv_word_at(secret, key + 8) - seed));
}

KV_HD u64 kv_short_16(const u64* words, u32 n, const u64* s, u64 seed) {
  if (n > 8) {
    const u64 low = kv_word_at(words, 0) ^ ((s[3] ^ s[4]) + seed);
    const u64 high = kv_word_at(words, n - 8) ^ ((s[5] ^ s[6]) - seed);
    return kv_avalanche(n + kv_swap64(low) + high + kv_fold(low, high));
  }
  if (n >= 4) {
    const u64 mixed = seed ^ (kv_swap64(seed & 0xffffffffull));
    const u64 first = words[0] & 0xffffffffull, last = kv_word_at(words, n - 4) & 0xffffffffull;
    u64 h = (last + (first << 32)) ^ ((s[1] ^ s[2]) - mixed);
    h ^= kv_rotl(h, 49) ^ kv_rotl(h, 24);
    h *= 0x9FB21C651E98DF25ull;
    h ^= (h >> 35) + n;
    h *= 0x9FB21C651E98DF25ull;
    return h ^ h >> 28;
  }
  if (n) {
    const u64 c1 = words[0] & 255, c2 = words[0] >> (n >> 1) * 8 & 255, c3 = words[0] >> (n - 1) * 8 & 255;
    const u64 all = c1 << 16 | c2 << 24 | c3 | static_cast<u64>(n) << 8;
    return kv_avalanche_64(all ^ (((s[0] ^ s[0] >> 32) & 0xffffffffull) + seed));
  }
  return kv_avalanche_64(seed ^ s[7] ^ s[8]);
}

KV_HD u64 kv_short(const u64* words, u32 n, u64 seed) {
  const u64 s[KV_SECRET_WORDS] = {KV_XXH_SECRET};
  if (n <= 16) return kv_short_16(words, n, s, seed);
  u64 sum = n * XXH_P64_1;
  if (n <= 128) {
    for (u32 i = (n - 1) / 32 + 1; i-- > 0;)
      sum += kv_mix16(words, 16 * i, s, 32 * i, seed) + kv_mix16(words, n - 16 * (i + 1), s, 32 * i + 16, seed);
    return kv_avalanche(sum);
  }
  for (u32 i = 0; i < 8; i++) sum += kv_mix16(words, 16 * i, s, 16 * i, seed);
  sum = kv_avalanche(sum);
  for (u32 i = 8; i < n / 16; i++) sum += kv_mix16(words, 16 * i, s, 16 * (i - 8) + 3, seed);
  return kv_avalanche(sum + kv_mix16(words, n - 16, s, 136 - 17, seed));
}

// -- reading an object's words from its pages

struct KvCursor {
  u64 lo, hi, address;  // bytes [lo, hi) of the object lie at `address` in one piece
};

KV_HD u64 kv_object_word(const KvSegment& s, KvCursor& c, u64 at) {
  if (at < c.lo || at + 8 > c.hi) {
    const KvRun run = kv_locate(s, at);
    c.lo = at;
    c.hi = at + run.bytes;
    c.address = run.address;
  }
  const u64 here = c.address + (at - c.lo);
  if (at + 8 <= c.hi && here % 8 == 0) return *reinterpret_cast<const u64*>(here);
  u64 word = 0;
  for (u32 i = 0; i < 8 && at + i < s.hi; i++)
    word |= static_cast<u64>(*reinterpret_cast<const u8*>(kv_locate(s, at + i).address)) << 8 * i;
  return word;
}

KV_HD u64 kv_short_piece(const KvSegment& s, u64 begin, u32 bytes, u64 seed) {
  u64 words[KV_XXH_SHORT / 8 + 1];
  KvCursor cursor = {0, 0, 0};
  for (u32 i = 0; i < KV_XXH_SHORT / 8 + 1; i++)
    words[i] = 8 * i < bytes ? kv_object_word(s, cursor, begin + 8 * i) : 0;
  return kv_short(words, bytes, seed);
}
