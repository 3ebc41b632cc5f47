// The arguments of the launchers in cca.hip: plain pointers and sizes, independent of PyTorch.
//
// Legend as in cca.py:  B batch   S sequence   Hq, Hk query / KV heads   G = Hq / Hk   D head dim   C = (Hq + Hk) D
//                       n rotated pairs of dims
// T is float, bf16 or f16. Everything is contiguous unless strides (in elements) are given.
#pragma once
#include <stdint.h>

enum Tile { CHOOSE, SMALL_TILE, LARGE_TILE };

struct Args {
    int B, S, Hq, Hk, D, n;
    int tile;                               // CHOOSE by token count; SMALL_TILE: 16; LARGE_TILE: 32 or 64, a whole KV group
    const void* qk;                         // (B, S, C) T, [q~; k~]
    int64_t qk_s;                           // its stride between tokens, also from one sequence to the next
    const void* past;                       // (B, 2, C) T, the two tokens before qk; null: zeros
    const bool* start;                      // (B, S), whether a document starts here; null: nowhere
    const float *w1, *b1;                   // depthwise convolution (C, 2), (C)
    const void* w2;                         // grouped convolution (C, D, 2) T: (head, out, in, time)
    const float* b2;                        // (C)
    const float* temperature;               // (Hk)
    const float *cos, *sin;                 // (B or 1, S, n)
    int64_t table_b;                        // their stride between sequences; 0 if all share them

    void *q, *k;                            // results of forward: (B, Hq, S, D), (B, Hk, S, D) T

    const void *dq, *dk;                    // backward: the gradients of q and k, T
    int64_t dq_b, dq_h, dq_s, dk_b, dk_h, dk_s;
    const void* w2_t;                       // (Hq + Hk, D, 2, D) T: w2 with `out` as the last dim
    void* dy;                               // (B, S, C) T, workspace: gradient of the vectors before the norm
    void *dqk, *dpast;                      // (B, S, C), (B, 2, C) T; dpast may be null
    float* db2;                             // (n_tiles, C): partial sums, like all below; the caller adds them
    float* dtemperature;                    // (n_tiles, Hk)
    float* dw1;                             // (n_tiles_input, 3, C): depthwise weights at t - 1 and t; bias
    float* dw2;                             // (n_splits, C, D, 2)
};

enum DType { FLOAT, BF16, F16 };

/// The counts of partial sums. They depend only on the shapes, so the order of summation is deterministic.
struct Partials { int n_tiles, n_tiles_input, n_splits; };
Partials partials(const Args& a);

/// Launch on `stream` (ignored on the CPU). Return null or an error message.
const char* cca_forward(const Args& a, DType dtype, void* stream);
const char* cca_backward(const Args& a, DType dtype, void* stream);
