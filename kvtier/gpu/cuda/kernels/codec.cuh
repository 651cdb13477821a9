// The lossy codecs' arithmetic: kvtier/gpu/quantise.py, to the bit. Runs on the device and, in tests, on a CPU.
#pragma once

#include "locate.cuh"

// What a launch works with. quantise.py names the same; work.py packs them.
struct KvForm {
  u32 vector;  // values that share a scale
  u32 dtype;   // 0 bf16, 1 fp16, 2 fp32
  u32 codec;   // 0 int8, 1 fp8
};

KV_HD KvForm kv_form(u64 packed) {
  return {static_cast<u32>(packed), static_cast<u32>(packed >> 32) & 255u, static_cast<u32>(packed >> 40) & 255u};
}

KV_HD u32 kv_item_bytes(const KvForm& form) { return form.dtype == 2 ? 4 : 2; }

union KvFloat {
  float real;
  u32 bits;
};

KV_HD float kv_real(u32 bits) {
  KvFloat both;
  both.bits = bits;
  return both.real;
}

KV_HD u32 kv_bits(float real) {
  KvFloat both;
  both.real = real;
  return both.bits;
}

// Rounded once each, to nearest: no fused operation may take their place, and nothing small becomes 0. Written
// as assembly on the device, since cupy compiles with -ftz=true, which the intrinsics obey.
#if defined(__CUDA_ARCH__)
#define KV_OPERATION(name, text) \
  __device__ __forceinline__ float name(float a, float b) { \
    float result; \
    asm(text " %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b)); \
    return result; \
  }
KV_OPERATION(kv_divide, "div.rn.f32")
KV_OPERATION(kv_times, "mul.rn.f32")
KV_OPERATION(kv_minus, "sub.rn.f32")
#define KV_NEAREST rintf
#else
KV_HD float kv_divide(float a, float b) { return a / b; }
KV_HD float kv_times(float a, float b) { return a * b; }
KV_HD float kv_minus(float a, float b) { return a - b; }
#define KV_NEAREST __builtin_rintf
#endif

// value >> shift, to nearest, ties to even; shift is 1 to 31
KV_HD u32 kv_round_shift(u32 value, u32 shift) {
  const u32 kept = value >> shift, rest = value & ((1u << shift) - 1), half = 1u << (shift - 1);
  return kept + (rest > half || (rest == half && (kept & 1)));
}

KV_HD u32 kv_half_of(float real) {
  const u32 bits = kv_bits(real), sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
  if (size >= 0x47800000u) return sign | (size > 0x7f800000u ? 0x7e00u : 0x7c00u);
  if (size >= 0x38800000u) return sign | (kv_round_shift(size, 13) - (112u << 10));
  const u32 exponent = size >> 23;
  if (exponent < 102) return sign;
  return sign | kv_round_shift((size & 0x7fffffu) | 0x800000u, 126 - exponent);
}

KV_HD float kv_of_half(u32 half) {
  const u32 sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31u, rest = half & 1023u;
  if (exponent == 31) return kv_real(sign | 0x7f800000u | rest << 13);
  if (exponent) return kv_real(sign | (exponent + 112) << 23 | rest << 13);
  const float small = static_cast<float>(rest) * 5.9604644775390625e-8f;
  return kv_real(sign | kv_bits(small));
}

KV_HD u32 kv_e4m3_of_half(u32 half) {
  const u32 sign = half >> 8 & 128u, exponent = half >> 10 & 31u, rest = half & 1023u;
  u32 code;
  if (exponent >= 9) {
    code = ((exponent - 8) << 3) + kv_round_shift(rest, 7);
  } else {
    code = kv_round_shift(exponent ? rest | 1024u : rest, exponent ? 16 - exponent : 15);
  }
  return sign | (code > 126 ? 126 : code);
}

KV_HD float kv_of_e4m3(u32 code) {
  const u32 sign = (code & 128u) << 24, exponent = code >> 3 & 15u, rest = code & 7u;
  if (exponent == 15 && rest == 7) return kv_real(0x7fc00000u);
  if (exponent) return kv_real(sign | (exponent + 120) << 23 | rest << 20);
  return kv_real(sign | kv_bits(static_cast<float>(rest) * 0.001953125f));
}

KV_HD float kv_value(u32 raw, const KvForm& form) {
  if (form.dtype == 0) return kv_real(raw << 16);
  return form.dtype == 1 ? kv_of_half(raw) : kv_real(raw);
}

// 0 where all values are 0, or too small to be divided by
KV_HD float kv_scale(u32 largest_bits, const KvForm& form) {
  const float scale = kv_divide(kv_real(largest_bits), form.codec ? 448.0f : 127.0f);
  return scale < 1.17549435e-38f ? 0.0f : scale;
}

KV_HD u32 kv_encoded(float value, float scale, const KvForm& form) {
  if (scale == 0.0f) return 0;
  const float scaled = kv_divide(value, scale);
  if (form.codec) return kv_e4m3_of_half(kv_half_of(scaled));
  const float whole = KV_NEAREST(scaled);
  return static_cast<u32>(static_cast<int>(whole > 127.0f ? 127.0f : whole < -127.0f ? -127.0f : whole)) & 255u;
}

KV_HD float kv_decoded(u32 code, float scale, const KvForm& form) {
  const float units = form.codec ? kv_of_e4m3(code) : static_cast<float>(static_cast<signed char>(code));
  return kv_times(units, scale);
}

KV_HD u32 kv_raw(float value, const KvForm& form) {
  const u32 bits = kv_bits(value);
  if (form.dtype == 0) return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  if (form.dtype == 2) return bits;
  return kv_half_of(value > 65504.0f ? 65504.0f : value < -65504.0f ? -65504.0f : value);
}

// Values of the whole object, from its last plane.
KV_HD u64 kv_vectors(const KvSegment& s, const KvForm& form) {
  const KvPlane& last = reinterpret_cast<const KvPlane*>(s.planes)[s.plane_count - 1];
  const u64 nbytes = last.out + static_cast<u64>(last.strips) * last.row_bytes * s.rows;
  return nbytes / (static_cast<u64>(form.vector) * kv_item_bytes(form));
}

// A vector lies within one row, so in one piece.
KV_HD u64 kv_vector_at(const KvSegment& s, u64 number, const KvForm& form) {
  return kv_locate(s, number * form.vector * kv_item_bytes(form)).address;
}

KV_HD u32 kv_load(u64 address, u32 k, const KvForm& form) {
  if (form.dtype == 2) return reinterpret_cast<const u32*>(address)[k];
  return reinterpret_cast<const unsigned short*>(address)[k];
}

KV_HD void kv_store(u64 address, u32 k, u32 raw, const KvForm& form) {
  if (form.dtype == 2) reinterpret_cast<u32*>(address)[k] = raw;
  else reinterpret_cast<unsigned short*>(address)[k] = static_cast<unsigned short>(raw);
}
