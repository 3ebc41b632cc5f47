// What the launchers of cca.hip take: plain pointers and sizes, nothing of PyTorch.
//
// Legend as in cca.py:  B batch   S sequence   Hq, Hk query / KV heads   G = Hq / Hk   D head dim   C = (Hq + Hk) D
//                       n rotated pairs of dims   R = B S rows (tokens of all sequences, one after the other)
// T is float, bf16 or f16. Everything is contiguous unless strides (in elements) are given.
#pragma once
#include <stdint.h>

enum Tile { CHOOSE, SMALL_TILE, LARGE_TILE };

struct Args {
    int B, S, Hq, Hk, D, n;
    int tile;                               // CHOOSE by the number of rows; SMALL_TILE: 16; LARGE_TILE: 32 or 64, a KV group each
    const void* qk;                         // (B, S, C) T, [q~; k~]
    int64_t qk_s;                           // its stride from row to row; sequences follow one another, S rows each
    const void* past;                       // (B, 2, C) T, the two columns before qk; null: zeros
    const bool* start;                      // (B, S), a document begins here; null: nowhere
    const float *w1, *b1;                   // depthwise convolution (C, 2), (C)
    const void* w2;                         // grouped convolution (C, D, 2) T: (head, out, in, time)
    const float* b2;                        // (C)
    const float* temperature;               // (Hk)
    const float *cos, *sin;                 // (B or 1, S, n)
    int64_t table_b;                        // their stride from one sequence to the next; 0 when there is one for all

    void *q, *k;                            // forward's results: (B, Hq, S, D), (B, Hk, S, D) T

    const void *dq, *dk;                    // backward: the gradients of q and k, T
    int64_t dq_b, dq_h, dq_s, dk_b, dk_h, dk_s;
    const void* w2_t;                       // (Hq + Hk, D, 2, D) T: w2 with `out` innermost
    void* dy;                               // (B, S, C) T, workspace: gradient of the vectors before the norm
    void *dqk, *dpast;                      // (B, S, C), (B, 2, C) T; dpast may be null
    float* db2;                             // (n_tiles, C): partial sums, which the caller adds up, as all that follow
    float* dtemperature;                    // (n_tiles, Hk)
    float* dw1;                             // (n_tiles_input, 3, C): of the depthwise weights at t - 1 and t, and the bias
    float* dw2;                             // (n_splits, C, D, 2)
};

enum DType { FLOAT, BF16, F16 };

/// Numbers of partial sums, functions of the shapes alone: the order of every sum is always the same.
struct Partials { int n_tiles, n_tiles_input, n_splits; };
Partials partials(const Args& a);

/// Each launches on `stream` (ignored on the CPU) and returns null or an error message.
const char* cca_forward(const Args& a, DType dtype, void* stream);
const char* cca_backward(const Args& a, DType dtype, void* stream);
