// What generated kernels take of the bfloat16 header of ROCm.
#pragma once
#include <hip/hip_runtime.h>
struct hip_bfloat16 {
  unsigned short data;
  __host__ __device__ hip_bfloat16() = default;
  __host__ __device__ hip_bfloat16(float f) { data = __builtin_bit_cast(unsigned short, (__bf16)f); }
  __host__ __device__ operator float() const { return __builtin_bit_cast(float, (unsigned)data << 16); }
};
using __hip_bfloat16 = hip_bfloat16;
struct __hip_bfloat162 { hip_bfloat16 x, y; };
