// A GPU emulated on the CPU: kernels/portable.h includes it where neither a HIP nor a CUDA compiler compiles cca.hip.
//
// The threads of a thread block are fibers: each has its own stack and runs as ordinary code, which a debugger can step
// through, until it reaches a barrier; then the next one runs. Waves run one after the other, and so do thread blocks.
// The instructions that a wave executes jointly (shuffle, MFMA, mma) are barriers of that wave, at which its lanes
// exchange their operands. It is slow, and only the tests use it.
//
// By default it has the 64 lanes of an AMD wavefront and the register layout of MFMA instructions; with
// -DEMULATE_NVIDIA, the 32 lanes of an NVIDIA warp and the layout of mma instructions. Both layouts follow the vendors'
// documents (see portable.h).
#pragma once
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
#include <sanitizer/common_interface_defs.h>        // AddressSanitizer must know of every stack switch
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
inline dim3 threadIdx, blockIdx, gridDim;           // of the current fiber


// ---- threads, barriers, launches ----

namespace cpu {

enum State { READY, AT_WAVE_BARRIER, AT_BLOCK_BARRIER, DONE };
constexpr size_t STACK_BYTES = 128 << 10;

struct Fiber {
    ucontext_t context;                             // to start
    void* jump[5];                                  // to resume (__builtin_setjmp: no system call, unlike swapcontext)
    std::unique_ptr<char[]> stack{new char[STACK_BYTES]};
    State state;
    bool started;
    int n_exchanges;                                // joint instructions so far
};

inline std::vector<std::unique_ptr<Fiber>> fibers;
inline std::function<void()> body;                  // the kernel with its arguments
inline Fiber* current;
inline void* scheduler[5];
inline std::unique_ptr<char[]> shared;              // exactly the requested size, for AddressSanitizer to see overruns
inline size_t shared_bytes;
alignas(16) inline char exchanged[2][64 * 64];      // double-buffered: a lane may start an exchange while others read

__attribute__((noinline)) inline void jump(void** to) { __builtin_longjmp(to, 1); }

#if defined(__SANITIZE_ADDRESS__)
inline const void* main_stack;
inline size_t main_stack_bytes;
inline void* main_fake_stack;
inline void leaving_scheduler(Fiber* f) {
    __sanitizer_start_switch_fiber(&main_fake_stack, f->stack.get(), STACK_BYTES);
}
inline void back_in_scheduler() { __sanitizer_finish_switch_fiber(main_fake_stack, nullptr, nullptr); }
inline void leaving_fiber() { __sanitizer_start_switch_fiber(nullptr, main_stack, main_stack_bytes); }
inline void in_fiber() { __sanitizer_finish_switch_fiber(nullptr, &main_stack, &main_stack_bytes); }
#else
inline void leaving_scheduler(Fiber*) {}
inline void back_in_scheduler() {}
inline void leaving_fiber() {}
inline void in_fiber() {}
#endif

/// Switch from a fiber to the scheduler; returns when the scheduler resumes the fiber.
__attribute__((noinline)) inline void pause(State state) {
    current->state = state;
    if (!__builtin_setjmp(current->jump)) {
        leaving_fiber();
        jump(scheduler);
    }
    in_fiber();
}

inline void start_fiber() {
    in_fiber();
    body();
    pause(DONE);
}

/// Run fiber i until it pauses.
__attribute__((noinline)) inline void resume(int i) {
    current = fibers[i].get();
    current->state = READY;
    threadIdx = dim3(i);
    if (!__builtin_setjmp(scheduler)) {
        leaving_scheduler(current);
        if (current->started) jump(current->jump);
        current->started = true;
        setcontext(&current->context);
    }
    back_in_scheduler();
}

/// Check that the threads first..last (a wave or a thread block) are at the same barrier, and return which.
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
        makecontext(&f.context, start_fiber, 0);
        f.started = false;
        f.n_exchanges = 0;
    }
    if (shared) memset(shared.get(), 0xff, shared_bytes);       // NaN: a read before a write shows in the result
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

/// Every lane of the wave calls this with its value and gets the values of all lanes, in lane order.
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


// ---- matrix instructions ----

template <typename T> void unpack2(uint32_t word, float& a, float& b);      // defined in portable.h

#if NVIDIA_LAYOUT
template <typename T>
inline void mma(T, float* c, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    struct Operands { uint32_t a[4], b[2]; };
    const Operands* of = cpu::exchange(Operands{{a0, a1, a2, a3}, {b0, b1}});
    const int lane = threadIdx.x % LANES_IN_WAVE, g = lane / 4, t = lane % 4;
    for (int e = 0; e < 4; e++)                                 // C at row g + 8 (e / 2), column 2t + e % 2
        for (int k2 = 0; k2 < 8; k2++) {                        // k = 2 k2, 2 k2 + 1, in lane k2 % 4 of the row's four
            float a[2], b[2];
            unpack2<T>(of[4 * g + k2 % 4].a[e / 2 + 2 * (k2 / 4)], a[0], a[1]);
            unpack2<T>(of[4 * (2 * t + e % 2) + k2 % 4].b[k2 / 4], b[0], b[1]);
            c[e] += a[0] * b[0] + a[1] * b[1];
        }
}
#else
typedef float float4_t __attribute__((vector_size(16)));
template <int N> struct Operands { float a[N], b[N]; };
template <int N> inline float4_t emulate_mfma(const Operands<N>& mine, float4_t c) {
    const Operands<N>* of = cpu::exchange(mine);
    const int lane = threadIdx.x % LANES_IN_WAVE;
    for (int group = 0; group < 4; group++)                     // k = group N + i
        for (int i = 0; i < N; i++)
            for (int e = 0; e < 4; e++)
                c[e] += of[group * 16 + 4 * (lane / 16) + e].a[i] * of[group * 16 + lane % 16].b[i];
    return c;
}
template <typename T> inline float4_t mfma(T, uint64_t a, uint64_t b, float4_t c) {
    Operands<4> mine;
    for (int i = 0; i < 2; i++) {
        unpack2<T>(uint32_t(a >> 32 * i), mine.a[2 * i], mine.a[2 * i + 1]);
        unpack2<T>(uint32_t(b >> 32 * i), mine.b[2 * i], mine.b[2 * i + 1]);
    }
    return emulate_mfma(mine, c);
}
inline float4_t mfma(float, float a, float b, float4_t c) { return emulate_mfma(Operands<1>{{a}, {b}}, c); }
#endif
