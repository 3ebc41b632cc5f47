// One source, three machines: what differs between AMD (HIP), NVIDIA (CUDA) and a plain C++ compiler on a CPU.
//
// cca.hip uses, beyond what HIP and CUDA share anyway (__global__, __device__, threadIdx, __syncthreads, ...):
//
//     LANES_IN_WAVE             64 on AMD Instinct, 32 on NVIDIA: threads that run in lockstep
//     SHARED(name, bytes)       a block's shared memory (AMD: LDS), 16-byte aligned
//     shuffle_xor(x, mask)      the x of lane (lane ^ mask) of the same wave
//     launch(kernel, ...)       starts a grid; returns an error message, or null
//     bf16, f16                 16-bit floats in memory; arithmetic is in float: load8, store8
//     Chunk, load_chunk         16 bytes, the most that one thread moves in one instruction
//     Matrix<T>                 C (16 x 16, float) += A (16 x K) B^T (B is 16 x K), done by a wave on its matrix unit
//
// On the CPU, a block's threads are fibers: each has its own stack and runs, as ordinary code that a debugger can step
// through, until it reaches a barrier; then the next one runs. Waves come one after the other, blocks as well. A wave's
// joint instructions (shuffle, matrix product) are barriers of that wave, at which its lanes show each other their
// operands. It is slow, and for checking only. By default it has AMD's 64 lanes and register layout of the matrix
// instructions; with -DIMITATE_NVIDIA, NVIDIA's 32 lanes and layout. So both ways of spreading a matrix over a wave's
// registers are checked without either GPU, as far as the vendors' documents tell what those do.
#pragma once
#include <stdint.h>

#if defined(__HIPCC__) || defined(__HIP__)
#define ON_AMD 1
#include <hip/hip_runtime.h>
#elif defined(__CUDACC__)
#define ON_NVIDIA 1
#else
#define ON_CPU 1
#endif

#if ON_NVIDIA || defined(IMITATE_NVIDIA)
#define NVIDIA_LAYOUT 1
constexpr int LANES_IN_WAVE = 32;
#else
constexpr int LANES_IN_WAVE = 64;
#endif

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };
struct alignas(16) Chunk { uint32_t word[4]; };


// ---- the machine: threads, shared memory, shuffles, launches ----

#if !ON_CPU

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

#else  // ON_CPU

#include <math.h>
#include <string.h>
#include <ucontext.h>
#include <algorithm>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <vector>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>        // AddressSanitizer wants to be told when the stack changes
#endif

#define __global__
#define __host__
#define __device__
#define __launch_bounds__(...)
#define SHARED(name, bytes) char* const name = cpu::shared_memory(bytes)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, gridDim;           // of the fiber that runs at the moment

namespace cpu {

enum State { READY, AT_WAVE_BARRIER, AT_BLOCK_BARRIER, DONE };
constexpr size_t STACK_BYTES = 128 << 10;

struct Fiber {
    ucontext_t context;                             // to begin with
    void* jump[5];                                  // where to go on (__builtin_setjmp: no system call, unlike swapcontext)
    std::unique_ptr<char[]> stack{new char[STACK_BYTES]};
    State state;
    bool begun;
    int n_exchanges;                                // joint instructions so far
};

inline std::vector<std::unique_ptr<Fiber>> fibers;
inline std::function<void()> body;                  // the kernel with its arguments
inline Fiber* current;
inline void* scheduler[5];
inline std::unique_ptr<char[]> shared;              // exactly as large as asked for, so that AddressSanitizer sees overruns
inline size_t shared_bytes;
alignas(16) inline char exchanged[2][64 * 64];      // two, so that a lane may begin the next exchange while others read

__attribute__((noinline)) inline void jump(void** to) { __builtin_longjmp(to, 1); }

#if defined(__SANITIZE_ADDRESS__)
inline const void* main_stack;
inline size_t main_stack_bytes;
inline void* main_fake_stack;
inline void leaving_scheduler(Fiber* f) { __sanitizer_start_switch_fiber(&main_fake_stack, f->stack.get(), STACK_BYTES); }
inline void back_in_scheduler() { __sanitizer_finish_switch_fiber(main_fake_stack, nullptr, nullptr); }
inline void leaving_fiber() { __sanitizer_start_switch_fiber(nullptr, main_stack, main_stack_bytes); }
inline void in_fiber() { __sanitizer_finish_switch_fiber(nullptr, &main_stack, &main_stack_bytes); }
#else
inline void leaving_scheduler(Fiber*) {}
inline void back_in_scheduler() {}
inline void leaving_fiber() {}
inline void in_fiber() {}
#endif

/// From a fiber back to the scheduler; returns when the scheduler resumes the fiber.
__attribute__((noinline)) inline void pause(State state) {
    current->state = state;
    if (!__builtin_setjmp(current->jump)) {
        leaving_fiber();
        jump(scheduler);
    }
    in_fiber();
}

inline void begin_fiber() {
    in_fiber();
    body();
    pause(DONE);
}

/// Runs fiber i until it pauses.
__attribute__((noinline)) inline void resume(int i) {
    current = fibers[i].get();
    current->state = READY;
    threadIdx = dim3(i);
    if (!__builtin_setjmp(scheduler)) {
        leaving_scheduler(current);
        if (current->begun) jump(current->jump);
        current->begun = true;
        setcontext(&current->context);
    }
    back_in_scheduler();
}

/// Runs the threads first..last (one wave, or the block) up to a barrier that all of them reach, and tells which.
inline State check_together(int first, int last) {
    for (int i = first; i < last; i++)
        if (fibers[i]->state != fibers[first]->state)
            throw std::runtime_error("threads of a block or wave reach different barriers: on a GPU this would hang");
    return fibers[first]->state;
}

inline void run_block(int threads) {
    while ((int)fibers.size() < threads) fibers.emplace_back(new Fiber);
    for (int i = 0; i < threads; i++) {
        Fiber& f = *fibers[i];
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.get();
        f.context.uc_stack.ss_size = STACK_BYTES;
        f.context.uc_link = nullptr;
        makecontext(&f.context, begin_fiber, 0);
        f.begun = false;
        f.n_exchanges = 0;
    }
    if (shared) memset(shared.get(), 0xff, shared_bytes);       // NaN: who reads before writing will notice
    do {
        for (int wave = 0; wave < threads; wave += LANES_IN_WAVE)
            do
                for (int lane = 0; lane < LANES_IN_WAVE; lane++) resume(wave + lane);
            while (check_together(wave, wave + LANES_IN_WAVE) == AT_WAVE_BARRIER);
    } while (check_together(0, threads) == AT_BLOCK_BARRIER);
}

inline char* shared_memory(size_t bytes) {
    if (!shared) {
        shared.reset(new char[bytes]);
        shared_bytes = bytes;
        memset(shared.get(), 0xff, bytes);
    }
    return shared.get();
}

/// Every lane of the wave calls this with its value and gets all of them, in lane order.
template <typename T> const T* exchange(const T& value) {
    static_assert(sizeof(T) <= 64, "");
    T* all = reinterpret_cast<T*>(exchanged[current->n_exchanges++ % 2]);
    all[threadIdx.x % LANES_IN_WAVE] = value;
    pause(AT_WAVE_BARRIER);
    return all;
}

}  // namespace cpu

inline void __syncthreads() { cpu::pause(cpu::AT_BLOCK_BARRIER); }
inline float shuffle_xor(float x, int mask) { return cpu::exchange(x)[(threadIdx.x % LANES_IN_WAVE) ^ mask]; }

template <typename... Parameters, typename... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, int threads, void*, Arguments... arguments) {
    static std::mutex one_at_a_time;
    std::lock_guard<std::mutex> lock(one_at_a_time);
    cpu::body = [=] { kernel(arguments...); };
    cpu::shared.reset();
    gridDim = grid;
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++) {
                blockIdx = dim3(x, y, z);
                cpu::run_block(threads);
            }
    return nullptr;
}

#endif  // ON_CPU


// ---- numbers: 16-bit floats in memory, float in registers ----

template <typename To, typename From> __device__ inline To bit_cast(From x) {
    static_assert(sizeof(To) == sizeof(From), "");
    To y;
    __builtin_memcpy(&y, &x, sizeof y);
    return y;
}

/// Two numbers to one 32-bit word, the first in the lower half, rounded to nearest even.
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
__device__ inline uint32_t bf16_bits(float x) {                 // in the upper half; gfx942 has no instruction for this
    const uint32_t bits = bit_cast<uint32_t>(x), rounded = bits + 0x7fff + (bits >> 16 & 1), nan = bits | 0x400000;
    return x == x ? rounded : nan;                              // both at hand: a selection, not a branch
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

/// A thread's share of a row: 8 neighbouring channels, as they lie in memory. Loading (which takes long, but many loads
/// can be under way at once) and unpacking (which waits for them) are separate steps.
template <typename T> struct Eight { Chunk chunk[sizeof(T) / 2]; };

/// `at(i)` points to element i, a multiple of a chunk's elements.
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


// ---- the matrix unit: one wave, C (16 x 16, float) += A (16 x K) B^T, where B is 16 x K ----
//
// A wave holds a matrix spread over its lanes' registers, in a pattern that the hardware fixes. Three facts make one
// primitive of the different instructions:
//   - A and B are both read along their rows (k runs along memory), so that one lane's share is one chunk of 16 bytes.
//   - The order of the K terms of a dot product is free, if it is the same for A and B: a chunk's 4 or 8 neighbouring
//     elements may be fed to several instructions in turn, whatever k the instruction thinks they are.
//   - load_a and load_b ask a function `chunk(row, k)` for the chunk that begins there: it knows where the matrix lies.
// C's element e of this lane lies at (row(e), column(e)).

__device__ inline int lane_in_wave() { return threadIdx.x % LANES_IN_WAVE; }

#if !NVIDIA_LAYOUT
// AMD: v_mfma_f32_16x16x16 (bf16, f16: 4 elements of k a lane) and v_mfma_f32_16x16x4_f32 (one). Lane l holds row l % 16
// of A and of B, at k = (l / 16) * elements onwards; of C, column l % 16 and rows 4 (l / 16) .. + 3.
// Source: AMD Instinct MI300 ISA, 7.1 and 7.4. Four lanes together cover 64 bytes of a row: K is 32, in float 16.

typedef float float4_t __attribute__((vector_size(16)));

#if ON_AMD
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
#else
template <int N> struct Operands { float a[N], b[N]; };
template <int N> inline float4_t imitate_mfma(const Operands<N>& mine, float4_t c) {
    const Operands<N>* of = cpu::exchange(mine);
    for (int group = 0; group < 4; group++)                     // k = group N + i
        for (int i = 0; i < N; i++)
            for (int e = 0; e < 4; e++)
                c[e] += of[group * 16 + 4 * (lane_in_wave() / 16) + e].a[i] * of[group * 16 + lane_in_wave() % 16].b[i];
    return c;
}
template <typename T> inline float4_t mfma(T, uint64_t a, uint64_t b, float4_t c) {
    Operands<4> mine;
    for (int i = 0; i < 2; i++) {
        unpack2<T>(uint32_t(a >> 32 * i), mine.a[2 * i], mine.a[2 * i + 1]);
        unpack2<T>(uint32_t(b >> 32 * i), mine.b[2 * i], mine.b[2 * i + 1]);
    }
    return imitate_mfma(mine, c);
}
inline float4_t mfma(float, float a, float b, float4_t c) { return imitate_mfma(Operands<1>{{a}, {b}}, c); }
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
                c.x = mfma(T(), a.word[i] | uint64_t(a.word[i + 1]) << 32, b.word[i] | uint64_t(b.word[i + 1]) << 32, c.x);
    }
};

#else
// NVIDIA: mma.m16n8k16 (bf16, f16), twice for 16 columns. With g = lane / 4, t = lane % 4, a lane holds of A the rows g and
// g + 8, of B (8 rows) row g, both at k = 2t, 2t + 1, 2t + 8, 2t + 9; of C, rows g and g + 8, columns 2t and 2t + 1.
// Source: PTX ISA, 'Matrix Fragments for mma.m16n8k16'. Four lanes' chunks cover k = 0..31: K is 32, two instructions.

struct Rows2 { Chunk row[2]; };                                 // rows g and g + 8

#if ON_NVIDIA
#define MMA(T, NAME)                                                                                                   \
    __device__ inline void mma(T, float* c, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) { \
        asm("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));  \
    }
MMA(bf16, "bf16")
MMA(f16, "f16")
#else
template <typename T>
inline void mma(T, float* c, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    struct Operands { uint32_t a[4], b[2]; };
    const Operands* of = cpu::exchange(Operands{{a0, a1, a2, a3}, {b0, b1}});
    const int g = lane_in_wave() / 4, t = lane_in_wave() % 4;
    for (int e = 0; e < 4; e++)                                 // C at row g + 8 (e / 2), column 2t + e % 2
        for (int k2 = 0; k2 < 8; k2++) {                        // k = 2 k2, 2 k2 + 1, in lane k2 % 4 of the row's four
            float a[2], b[2];
            unpack2<T>(of[4 * g + k2 % 4].a[e / 2 + 2 * (k2 / 4)], a[0], a[1]);
            unpack2<T>(of[4 * (2 * t + e % 2) + k2 % 4].b[k2 / 4], b[0], b[1]);
            c[e] += a[0] * b[0] + a[1] * b[1];
        }
}
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

// In float NVIDIA's matrix unit would round to 10 bits of mantissa (TF32). So plain multiply-adds, with C spread as above.
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
