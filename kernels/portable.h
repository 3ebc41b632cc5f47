// What differs between AMD (HIP) and NVIDIA (CUDA), so that cca.hip is one source for both.
//
// cca.hip uses, in addition to what HIP and CUDA share (__global__, __device__, threadIdx, __syncthreads, ...):
//
//     LANES_IN_WAVE             64 on AMD Instinct, 32 on NVIDIA. A wave is the group of threads that execute in
//                               lockstep: AMD's wavefront, NVIDIA's warp
//     SHARED(name, bytes)       a thread block's shared memory (AMD: LDS), 16-byte aligned
//     shuffle_xor(x, mask)      the x of lane (lane ^ mask) of the same wave
//     launch(kernel, ...)       launches a grid; returns an error message, or null
//     bf16, f16                 16-bit floats in memory; arithmetic is in float: load8, store8
//     Chunk, load_chunk         16 bytes, the widest load or store of one thread
//     Matrix<T>                 C (16 x 16, float) += A (16 x K) B^T (B is 16 x K), computed by a wave with matrix
//                               instructions
//
// Any other compiler gets the same from tests/emulated_gpu.h, which emulates a GPU on the CPU.
#pragma once
#include <stdint.h>

#if defined(__HIPCC__) || defined(__HIP__)
#define ON_AMD 1
#include <hip/hip_runtime.h>
#elif defined(__CUDACC__)
#define ON_NVIDIA 1
#endif

#if ON_NVIDIA || defined(EMULATE_NVIDIA)
#define NVIDIA_LAYOUT 1
constexpr int LANES_IN_WAVE = 32;
#else
constexpr int LANES_IN_WAVE = 64;
#endif

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };
struct alignas(16) Chunk { uint32_t word[4]; };


// ---- shared memory, shuffles, launches ----

#if ON_AMD || ON_NVIDIA

#define SHARED(name, bytes) __shared__ __attribute__((aligned(16))) char name[bytes]

#if ON_AMD
typedef hipStream_t Stream;
__device__ inline float shuffle_xor(float x, int mask) { return __shfl_xor(x, mask); }
#else
typedef cudaStream_t Stream;
__device__ inline float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffff, x, mask); }
#endif

template <typename... Parameters, typename... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, int threads, void* stream, Arguments... arguments) {
    kernel<<<grid, threads, 0, static_cast<Stream>(stream)>>>(arguments...);
#if ON_AMD
    hipError_t error = hipGetLastError();
    return error == hipSuccess ? nullptr : hipGetErrorString(error);
#else
    cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
#endif
}

#else
#include "emulated_gpu.h"
#endif


// ---- 16-bit floats in memory, float in registers ----

template <typename To, typename From> __device__ inline To bit_cast(From x) {
    static_assert(sizeof(To) == sizeof(From), "");
    To y;
    __builtin_memcpy(&y, &x, sizeof y);
    return y;
}

/// Two floats in one 32-bit word, the first in the lower half, rounded to nearest even.
template <typename T> __device__ inline uint32_t pack2(float a, float b);
template <typename T> __device__ inline void unpack2(uint32_t word, float& a, float& b);

template <> __device__ inline void unpack2<bf16>(uint32_t word, float& a, float& b) {
    a = bit_cast<float>(word << 16);
    b = bit_cast<float>(word & 0xffff0000);
}

#if ON_NVIDIA
template <> __device__ inline uint32_t pack2<bf16>(float a, float b) {
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(b), "f"(a));
    return word;
}
template <> __device__ inline uint32_t pack2<f16>(float a, float b) {
    uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(b), "f"(a));
    return word;
}
template <> __device__ inline void unpack2<f16>(uint32_t word, float& a, float& b) {
    asm("{ .reg .f16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }"
        : "=f"(a), "=f"(b) : "r"(word));
}
#else
__device__ inline uint32_t bf16_bits(float x) {                 // in the upper half; gfx942 has no such instruction
    const uint32_t bits = bit_cast<uint32_t>(x), rounded = bits + 0x7fff + (bits >> 16 & 1), nan = bits | 0x400000;
    return x == x ? rounded : nan;                              // both are computed: a select, no branch
}
template <> __device__ inline uint32_t pack2<bf16>(float a, float b) {
    return bf16_bits(a) >> 16 | (bf16_bits(b) & 0xffff0000);
}
template <> __device__ inline uint32_t pack2<f16>(float a, float b) {
    return bit_cast<uint16_t>((_Float16)a) | uint32_t(bit_cast<uint16_t>((_Float16)b)) << 16;
}
template <> __device__ inline void unpack2<f16>(uint32_t word, float& a, float& b) {
    a = bit_cast<_Float16>(uint16_t(word));
    b = bit_cast<_Float16>(uint16_t(word >> 16));
}
#endif

template <typename T> __device__ inline Chunk load_chunk(const T* p) { return *reinterpret_cast<const Chunk*>(p); }
template <typename T> __device__ inline void store_chunk(T* p, Chunk c) { *reinterpret_cast<Chunk*>(p) = c; }

/// The 8 adjacent channels of a token that one thread handles, as they are in memory. Loading and unpacking are
/// separate steps: many loads can be in flight before the first unpacking waits for one.
template <typename T> struct Eight { Chunk chunk[sizeof(T) / 2]; };

/// at(i) points to element i, the first of a chunk.
template <typename T, typename At> __device__ inline Eight<T> load_eight(At at) {
    Eight<T> x;
    for (int i = 0; i < (int)sizeof(T) / 2; i++) x.chunk[i] = load_chunk(at(4 * i));
    return x;
}
template <typename T> __device__ inline void unpack(const Eight<T>& eight, float (&x)[8]) {
    if constexpr (sizeof(T) == 4)
        for (int i = 0; i < 8; i++) x[i] = bit_cast<float>(eight.chunk[i / 4].word[i % 4]);
    else
        for (int i = 0; i < 4; i++) unpack2<T>(eight.chunk[0].word[i], x[2 * i], x[2 * i + 1]);
}
template <typename T, typename At> __device__ inline void load8(At at, float (&x)[8]) { unpack(load_eight<T>(at), x); }
template <typename T, typename At> __device__ inline void store8(At at, const float (&x)[8]) {
    if constexpr (sizeof(T) == 4) {
        for (int half = 0; half < 2; half++) {
            Chunk c;
            for (int i = 0; i < 4; i++) c.word[i] = bit_cast<uint32_t>(x[4 * half + i]);
            store_chunk(at(4 * half), c);
        }
    } else {
        Chunk c;
        for (int i = 0; i < 4; i++) c.word[i] = pack2<T>(x[2 * i], x[2 * i + 1]);
        store_chunk(at(0), c);
    }
}


// ---- matrix instructions: one wave, C (16 x 16, float) += A (16 x K) B^T, where B is 16 x K ----
//
// A matrix instruction spreads its operands over the registers of a wave's lanes in a fixed layout. Three facts let one
// interface cover the different instructions:
//   - A and B are both read along their rows (k is contiguous in memory), so that each lane loads 16-byte chunks.
//   - The terms of a dot product may come in any order of k that A and B share: the 4 or 8 adjacent elements of a chunk
//     may go to successive instructions, regardless of which k the instruction assigns to them.
//   - load_a and load_b call chunk(row, k) for the chunk that starts there; it hides where the matrix is stored.
// Element e of this lane's part of C is at (row(e), column(e)).

__device__ inline int lane_in_wave() { return threadIdx.x % LANES_IN_WAVE; }

#if !NVIDIA_LAYOUT
// AMD: v_mfma_f32_16x16x16 (bf16, f16: 4 elements of k per lane) and v_mfma_f32_16x16x4_f32 (1 element). Lane l holds
// row l % 16 of A and of B, from k = (l / 16) * elements; of C, column l % 16 and rows 4 (l / 16) .. + 3.
// Source: AMD Instinct MI300 ISA, 7.1 and 7.4. Four lanes together load 64 bytes of a row: K is 32, for float 16.

#if ON_AMD
typedef float float4_t __attribute__((vector_size(16)));
typedef short short4_t __attribute__((vector_size(8)));
typedef _Float16 half4_t __attribute__((ext_vector_type(4)));
__device__ inline float4_t mfma(bf16, uint64_t a, uint64_t b, float4_t c) {
    return __builtin_amdgcn_mfma_f32_16x16x16bf16_1k(bit_cast<short4_t>(a), bit_cast<short4_t>(b), c, 0, 0, 0);
}
__device__ inline float4_t mfma(f16, uint64_t a, uint64_t b, float4_t c) {
    return __builtin_amdgcn_mfma_f32_16x16x16f16(bit_cast<half4_t>(a), bit_cast<half4_t>(b), c, 0, 0, 0);
}
__device__ inline float4_t mfma(float, float a, float b, float4_t c) {
    return __builtin_amdgcn_mfma_f32_16x16x4f32(a, b, c, 0, 0, 0);
}
#endif

template <typename T> struct Matrix {
    static constexpr int K = 64 / sizeof(T);
    typedef Chunk A;
    typedef Chunk B;
    struct C { float4_t x; };
    static constexpr int ELEMENTS = 4;
    __device__ static int row(int e) { return 4 * (lane_in_wave() / 16) + e; }
    __device__ static int column(int) { return lane_in_wave() % 16; }

    template <typename F> __device__ static A load_a(F chunk) {
        return chunk(lane_in_wave() % 16, lane_in_wave() / 16 * (16 / sizeof(T)));
    }
    template <typename F> __device__ static B load_b(F chunk) { return load_a(chunk); }

    __device__ static void multiply_add(C& c, const A& a, const B& b) {
        if constexpr (sizeof(T) == 4)
            for (int i = 0; i < 4; i++)
                c.x = mfma(T(), bit_cast<float>(a.word[i]), bit_cast<float>(b.word[i]), c.x);
        else
            for (int i = 0; i < 4; i += 2)
                c.x = mfma(T(), a.word[i] | uint64_t(a.word[i + 1]) << 32, b.word[i] | uint64_t(b.word[i + 1]) << 32,
                           c.x);
    }
};

#else
// NVIDIA: mma.m16n8k16 (bf16, f16), twice for 16 columns. With g = lane / 4, t = lane % 4, a lane holds rows g and
// g + 8 of A and row g of B (8 rows), both at k = 2t, 2t + 1, 2t + 8, 2t + 9; of C, rows g and g + 8, columns 2t and
// 2t + 1. Source: PTX ISA, 'Matrix Fragments for mma.m16n8k16'. The chunks of four lanes cover k = 0..31: K is 32, two
// instructions.

struct Rows2 { Chunk row[2]; };                                 // rows g and g + 8

#if ON_NVIDIA
#define MMA(T, NAME)                                                                                                   \
    __device__ inline void mma(T, float* c, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) { \
        asm("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));  \
    }
MMA(bf16, "bf16")
MMA(f16, "f16")
#endif

template <typename T> struct Matrix {
    static constexpr int K = 32;
    typedef Rows2 A;
    typedef Rows2 B;
    struct C { float x[8]; };                                   // columns 0..7, then 8..15
    static constexpr int ELEMENTS = 8;
    __device__ static int row(int e) { return lane_in_wave() / 4 + 8 * (e / 2 % 2); }
    __device__ static int column(int e) { return 8 * (e / 4) + 2 * (lane_in_wave() % 4) + e % 2; }

    template <typename F> __device__ static A load_a(F chunk) {
        const int g = lane_in_wave() / 4, k = lane_in_wave() % 4 * 8;
        return {{chunk(g, k), chunk(g + 8, k)}};
    }
    template <typename F> __device__ static B load_b(F chunk) { return load_a(chunk); }

    __device__ static void multiply_add(C& c, const A& a, const B& b) {
        for (int half = 0; half < 2; half++)
            for (int i = 0; i < 4; i += 2)
                mma(T(), c.x + 4 * half, a.row[0].word[i], a.row[1].word[i], a.row[0].word[i + 1], a.row[1].word[i + 1],
                    b.row[half].word[i], b.row[half].word[i + 1]);
    }
};

// NVIDIA's tensor cores would round float to TF32 (10 bits of mantissa): use multiply-adds, with the same layout of C.
template <> struct Matrix<float> {
    static constexpr int K = 4;
    struct A { Chunk row[2]; };
    struct B { Chunk row[4]; };
    struct C { float x[8]; };
    static constexpr int ELEMENTS = 8;
    __device__ static int row(int e) { return lane_in_wave() / 4 + 8 * (e / 2 % 2); }
    __device__ static int column(int e) { return 8 * (e / 4) + 2 * (lane_in_wave() % 4) + e % 2; }

    template <typename F> __device__ static A load_a(F chunk) { return {{chunk(row(0), 0), chunk(row(2), 0)}}; }
    template <typename F> __device__ static B load_b(F chunk) {
        return {{chunk(column(0), 0), chunk(column(1), 0), chunk(column(4), 0), chunk(column(5), 0)}};
    }
    __device__ static void multiply_add(C& c, const A& a, const B& b) {
        for (int e = 0; e < 8; e++)
            for (int k = 0; k < 4; k++)
                c.x[e] += bit_cast<float>(a.row[e / 2 % 2].word[k]) * bit_cast<float>(b.row[e / 4 * 2 + e % 2].word[k]);
    }
};
#endif
