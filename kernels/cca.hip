// CCA's preparation of queries and keys in one pass: steps 2 to 5 of cca.py, forward and backward.
//
//     x_t = [q~; k~] of token t                        C = (Hq + Hk) D channels, in heads of D
//     a_t = w1_0 x_{t-1} + w1_1 x_t + b1               depthwise convolution (x_{-1}, x_{-2}: the past, or zero)
//     y_t = W2_0 a_{t-1} + W2_1 a_t + b2               grouped convolution, a D x 2D matrix per head
//     y_t += m_t                                       QK-mean: m_q = (q~ + k~) / 2, m_k = (mean group q~ + k~) / 2
//     out_t = rope_t(s y_t / |y_t|)                    s = sqrt(D), for a key head T sqrt(D)
//
// One thread block takes a tile of ROWS tokens and loops over the heads of a KV group. For each head:
//     1. The threads load x, apply the depthwise convolution, and store to shared memory a matrix with one row per
//        token, (a_{t-1}[0], a_t[0], a_{t-1}[1], a_t[1], ...): 2D elements in the order of a row of W2, which PyTorch
//        stores as (out, in, time), so that W2 is used as it is.
//     2. The matrix units multiply it, (ROWS x 2D), by the head's W2^T (2D x D), accumulate in float, and store the
//        result to the same shared memory.
//     3. For each token: bias, mean, norm, RoPE, and the store to global memory.
// The B S tokens of all sequences are one list, r = b S + s, so that short sequences (decoding: S = 1) share a tile.
//
// Backward recomputes y (cheaper than storing it) and goes through the same steps in reverse:
//     cca_tile, BACKWARD    dy = s / |y| (g - u (u . g)), with u = y / |y| and g the gradient rotated back
//     cca_backward_input    (da_{t-1}; da_t) = W2^T dy_t, then the transposes of depthwise convolution and mean
//     cca_backward_weight   dW2 = sum over tokens of dy_t (a_{t-1}; a_t)^T
// Each thread block stores a partial sum over its tokens, and the caller adds these: no atomics, so results are
// deterministic.
#include "portable.h"
#include "cca.h"

constexpr int THREADS = 256;
constexpr int WAVES = THREADS / LANES_IN_WAVE;
constexpr float EPS = 1.1920928955078125e-7f;           // float32's, as in cca.py: the least norm to divide by
__host__ __device__ constexpr int smaller(int a, int b) { return a < b ? a : b; }
__host__ __device__ constexpr int larger(int a, int b) { return a > b ? a : b; }

/// The index of element (row, column) of a matrix in shared memory. An XOR swizzle permutes the 16-byte chunks of each
/// row, differently in 8 adjacent rows, so that reading one column of chunks causes no bank conflicts.
template <typename T> __device__ inline int at(int row, int column, int columns) {
    constexpr int N = 16 / sizeof(T);
    return row * columns + ((column / N) ^ (row % 8)) * N + column % N;
}

/// The sum of x over the D / 8 adjacent lanes that share a row; every lane gets it.
template <int D> __device__ inline float row_sum(float x) {
#pragma unroll
    for (int mask = D / 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
    return x;
}


// ---- step 1: loads and the depthwise convolution ----

struct Token { int b, s; };
__device__ inline Token token(const Args& a, int r) { return {r / a.S, r % a.S}; }

/// Whether a document starts at token t: then the convolutions ignore x_{t-1}.
__device__ inline bool starts_document(const Args& a, Token t) { return a.start && a.start[(int64_t)t.b * a.S + t.s]; }

/// x of token r at 8 channels.
template <typename T> __device__ inline Eight<T> load_token(const Args& a, int r, int channel) {
    const T* p = (const T*)a.qk + r * a.qk_s + channel;
    return load_eight<T>([&](int i) { return p + i; });
}

/// x_{t-1} (back = 1) or x_{t-2} (back = 2) of token t: from qk, from the past, or zero.
template <typename T>
__device__ inline void load_previous(const Args& a, Token t, int back, int channel, float (&x)[8]) {
    if (t.s >= back)
        unpack(load_token<T>(a, t.b * a.S + t.s - back, channel), x);
    else if (a.past) {
        const T* p = (const T*)a.past + ((int64_t)t.b * 2 + 2 + t.s - back) * (a.Hq + a.Hk) * a.D + channel;
        load8<T>([&](int i) { return p + i; }, x);
    } else
        for (int i = 0; i < 8; i++) x[i] = 0;
}

/// The depthwise convolution's parameters of 8 channels.
struct Depthwise {
    float before[8], now[8], bias[8];
    __device__ Depthwise(const Args& a, int channel) {
        for (int i = 0; i < 8; i++) {
            before[i] = a.w1[2 * (channel + i)];
            now[i] = a.w1[2 * (channel + i) + 1];
            bias[i] = a.b1[channel + i];
        }
    }
    /// a_{t-1} and a_t from x_t, x_{t-1}, x_{t-2}. The zero padding precedes the first convolution, so its bias also
    /// applies to the padded positions: where a document starts, a_{t-1} is that bias, not zero.
    __device__ void operator()(const Args& a, Token t, const float (&x0)[8], const float (&x1)[8], const float (&x2)[8],
                               float (&a_before)[8], float (&a_now)[8]) const {
        for (int i = 0; i < 8; i++) {
            a_now[i] = before[i] * x1[i] + (now[i] * x0[i] + bias[i]);
            a_before[i] = before[i] * x2[i] + (now[i] * x1[i] + bias[i]);
        }
        if (a.start) {
            const bool first = starts_document(a, t), second = t.s > 0 && starts_document(a, {t.b, t.s - 1});
            for (int i = 0; i < 8; i++) {
                if (first) a_now[i] = now[i] * x0[i] + bias[i];
                if (first) a_before[i] = bias[i];
                else if (second) a_before[i] = now[i] * x1[i] + bias[i];
            }
        }
    }
};


// ---- step 2: matrix products, by all waves of a thread block ----

/// An M x N accumulator in the registers of a thread block: every wave has TILES_M x TILES_N register tiles of 16 x 16.
template <typename T, int M, int N> struct Product {
    static constexpr int WAVES_N = smaller(WAVES, N / 16), WAVES_M = smaller(WAVES / WAVES_N, M / 16);
    static constexpr int TILES_M = M / 16 / WAVES_M, TILES_N = N / 16 / WAVES_N;
    typedef Matrix<T> Unit;
    typename Unit::C c[TILES_M][TILES_N] = {};

    __device__ static int wave() { return threadIdx.x / LANES_IN_WAVE; }
    __device__ static bool idle() { return wave() >= WAVES_M * WAVES_N; }         // fewer tiles than waves
    __device__ static int row0() { return wave() / WAVES_N * TILES_M * 16; }
    __device__ static int column0() { return wave() % WAVES_N * TILES_N * 16; }

    /// += A (M x K) B^T (B is N x K). a(row, k) and b(row, k) return the chunks that start there.
    template <int K, typename FA, typename FB> __device__ void add(FA a, FB b) {
        if (idle()) return;
        for (int k0 = 0; k0 < K; k0 += Unit::K) {
            typename Unit::A fa[TILES_M];
            typename Unit::B fb[TILES_N];
#pragma unroll
            for (int j = 0; j < TILES_N; j++)
                fb[j] = Unit::load_b([&](int row, int k) { return b(column0() + 16 * j + row, k0 + k); });
#pragma unroll
            for (int i = 0; i < TILES_M; i++)
                fa[i] = Unit::load_a([&](int row, int k) { return a(row0() + 16 * i + row, k0 + k); });
#pragma unroll
            for (int i = 0; i < TILES_M; i++)
#pragma unroll
                for (int j = 0; j < TILES_N; j++) Unit::multiply_add(c[i][j], fa[i], fb[j]);
        }
    }

    /// Call f(row, column, sum) for every element that this thread holds.
    template <typename F> __device__ void each(F f) const {
        if (idle()) return;
#pragma unroll
        for (int i = 0; i < TILES_M; i++)
#pragma unroll
            for (int j = 0; j < TILES_N; j++)
#pragma unroll
                for (int e = 0; e < Unit::ELEMENTS; e++)
                    f(row0() + 16 * i + Unit::row(e), column0() + 16 * j + Unit::column(e), c[i][j].x[e]);
    }
};


// ---- step 3, and the kernel of all three ----

/// QK-mean's m_t of token r at 8 dims of head j of a group: heads 0..G-1 are its query heads, G its key head. The loads
/// hit the cache, because step 1 has just read the same tokens.
template <typename T> __device__ inline void qk_mean(const Args& a, int r, int group, int j, int dim, float (&m)[8]) {
    const int G = a.Hq / a.Hk, first = j < G ? j : 0, last = j < G ? j + 1 : G;
    float x[8];
    unpack(load_token<T>(a, r, (a.Hq + group) * a.D + dim), m);
    for (int i = 0; i < 8; i++) m[i] *= 0.5f;
    for (int h = first; h < last; h++) {
        unpack(load_token<T>(a, r, (group * G + h) * a.D + dim), x);
        for (int i = 0; i < 8; i++) m[i] += x[i] * (0.5f / (last - first));
    }
}

/// RoPE of the 8 dims from `dim`, given the 8 dims that they are paired with (n before or after), by the angle of token
/// t (sign = 1) or its negative (sign = -1). Dims from 2n on are not rotated. n is a multiple of 8.
__device__ inline int rope_partner(const Args& a, int dim) {
    return dim < a.n ? dim + a.n : dim < 2 * a.n ? dim - a.n : dim;
}
__device__ inline void rope(const Args& a, Token t, int dim, float sign, float (&x)[8], const float (&partner)[8]) {
    if (dim >= 2 * a.n) return;
    const int64_t row = t.b * a.table_b + (int64_t)t.s * a.n + (dim < a.n ? dim : dim - a.n);
    float cosine[8], sine[8];
    load8<float>([&](int i) { return a.cos + row + i; }, cosine);
    load8<float>([&](int i) { return a.sin + row + i; }, sine);
    if (dim < a.n) sign = -sign;                            // first of the pair: x cos - y sin; second: y cos + x sin
    for (int i = 0; i < 8; i++) x[i] = x[i] * cosine[i] + sign * sine[i] * partner[i];
}

/// Forward, or the first part of backward. Block (x, y) has tile x and the y-th slice of heads_per_block heads, of the
/// G + 1 heads of each group.
template <typename T, int D, int ROWS, bool BACKWARD>
__global__ void __launch_bounds__(THREADS, 2) cca_tile(Args a, int heads_per_block) {
    constexpr int LANES = D / 8;                                // threads per row
    constexpr int ROWS_PER_THREAD = larger(1, ROWS * LANES / THREADS);          // adjacent rows
    SHARED(shared, larger(larger(ROWS * 2 * D * (int)sizeof(T), ROWS * D * 4), THREADS * 8 * 4));
    T* mixed = (T*)shared;                                      // (ROWS, 2D): result of step 1
    float* y = (float*)shared;                                  // (ROWS, D): result of step 2, in the same memory
    const int G = a.Hq / a.Hk, R = a.B * a.S;
    const int slices = (G + heads_per_block) / heads_per_block;                 // of G + 1 heads, rounded up
    const int group = blockIdx.y / slices, j0 = blockIdx.y % slices * heads_per_block;
    const int dim = threadIdx.x % LANES * 8;                    // this thread's first dim of each head,
    const int my_row = threadIdx.x / LANES * ROWS_PER_THREAD;   // its first row of the tile,
    const int r0 = blockIdx.x * ROWS + my_row;                  // and the token of that row
    Token tokens[ROWS_PER_THREAD];
    for (int i = 0; i < ROWS_PER_THREAD; i++)
        tokens[i] = token(a, smaller(r0 + i, R - 1));           // rows after the last token repeat it

    for (int j = j0; j < smaller(j0 + heads_per_block, G + 1); j++) {
        const int head = j < G ? group * G + j : a.Hq + group, channel = head * D + dim;
        {   // 1. Load each x once: x_t of one row is x_{t-1} of the next. All loads are issued before the first use.
            Eight<T> rows[ROWS_PER_THREAD + 2];
#pragma unroll
            for (int i = 0; i < ROWS_PER_THREAD + 2; i++)
                rows[i] = load_token<T>(a, smaller(larger(r0 + i - 2, 0), R - 1), channel);
            const Depthwise depthwise(a, channel);
            float x0[8], x1[8], x2[8], a_before[8], a_now[8], pairs[8];
            unpack(rows[0], x2);
            unpack(rows[1], x1);
#pragma unroll
            for (int i = 0; i < ROWS_PER_THREAD; i++) {
                unpack(rows[i + 2], x0);
                if (tokens[i].s < 2) {                          // the row above is of another sequence
                    load_previous<T>(a, tokens[i], 1, channel, x1);
                    load_previous<T>(a, tokens[i], 2, channel, x2);
                }
                depthwise(a, tokens[i], x0, x1, x2, a_before, a_now);
                if (my_row + i < ROWS)
                    for (int half = 0; half < 2; half++) {
                        for (int e = 0; e < 4; e++)
                            pairs[2 * e] = a_before[4 * half + e], pairs[2 * e + 1] = a_now[4 * half + e];
                        const int column = 2 * dim + 8 * half;
                        store8<T>([&](int e) { return mixed + at<T>(my_row + i, column + e, 2 * D); }, pairs);
                    }
                for (int e = 0; e < 8; e++) x2[e] = x1[e], x1[e] = x0[e];
            }
        }
        __syncthreads();
        {   // 2. The grouped convolution.
            const T* w2 = (const T*)a.w2 + (int64_t)head * D * 2 * D;
            Product<T, ROWS, D> product;
            product.template add<2 * D>([&](int row, int k) { return load_chunk(mixed + at<T>(row, k, 2 * D)); },
                                        [&](int out, int k) { return load_chunk(w2 + out * 2 * D + k); });
            __syncthreads();
            product.each([&](int row, int out, float sum) { y[at<float>(row, out, D)] = sum; });
        }
        __syncthreads();
        // 3. Per token.
        float bias[8], db2[8] = {}, dtemperature = 0;
        load8<float>([&](int e) { return a.b2 + channel + e; }, bias);
        const float s = sqrtf(float(D)) * (j < G ? 1 : a.temperature[group]);
#pragma unroll
        for (int i = 0; i < ROWS_PER_THREAD; i++) {
            const bool valid = my_row + i < ROWS && r0 + i < R;
            const Token t = tokens[i];
            float v[8] = {}, squares = 0;
            float mean[8];
            qk_mean<T>(a, smaller(r0 + i, R - 1), group, j, dim, mean);
            if (valid) {
                load8<float>([&](int e) { return y + at<float>(my_row + i, dim + e, D); }, v);
                for (int e = 0; e < 8; e++) v[e] += bias[e] + mean[e], squares += v[e] * v[e];
            }
            const float norm = sqrtf(row_sum<D>(squares)), safe = norm > EPS ? norm : EPS;
            if constexpr (!BACKWARD) {
                for (int e = 0; e < 8; e++) v[e] *= s / safe;
                if (valid) store8<float>([&](int e) { return y + at<float>(my_row + i, dim + e, D); }, v);
            } else {
                float g[8] = {}, partner[8], dot = 0;
                if (valid) {
                    const T* out = j < G ? (const T*)a.dq + t.b * a.dq_b + head * a.dq_h + t.s * a.dq_s
                                         : (const T*)a.dk + t.b * a.dk_b + group * a.dk_h + t.s * a.dk_s;
                    load8<T>([&](int e) { return out + dim + e; }, g);
                    load8<T>([&](int e) { return out + rope_partner(a, dim) + e; }, partner);
                    rope(a, t, dim, -1, g, partner);
                    for (int e = 0; e < 8; e++) v[e] *= 1 / safe, dot += g[e] * v[e];           // v is now u
                }
                dot = row_sum<D>(dot);
                dtemperature += dot;
                const float along = norm < EPS ? 0 : dot;       // where EPS is the divisor, there is no projection
                for (int e = 0; e < 8; e++) g[e] = s / safe * (g[e] - along * v[e]), db2[e] += g[e];
                T* dy = (T*)a.dy + int64_t(r0 + i) * (a.Hq + a.Hk) * D + channel;
                if (valid) store8<T>([&](int e) { return dy + e; }, g);
            }
        }
        __syncthreads();
        if constexpr (!BACKWARD) {
#pragma unroll 1                                                // unrolling would spill registers
            for (int i = 0; i < ROWS_PER_THREAD && my_row + i < ROWS && r0 + i < R; i++) {
                const Token t = token(a, r0 + i);
                float v[8], partner[8];
                load8<float>([&](int e) { return y + at<float>(my_row + i, dim + e, D); }, v);
                load8<float>([&](int e) { return y + at<float>(my_row + i, rope_partner(a, dim) + e, D); }, partner);
                rope(a, t, dim, 1, v, partner);
                T* out = j < G ? (T*)a.q + (((int64_t)t.b * a.Hq + head) * a.S + t.s) * D
                               : (T*)a.k + (((int64_t)t.b * a.Hk + group) * a.S + t.s) * D;
                store8<T>([&](int e) { return out + dim + e; }, v);
            }
        } else {                                                // sums over the rows of the tile, in a fixed order
            float* part = (float*)shared;                       // (THREADS / LANES, D)
            for (int e = 0; e < 8; e++) part[threadIdx.x / LANES * D + dim + e] = db2[e];
            __syncthreads();
            if (threadIdx.x < D) {
                float sum = 0;
                for (int i = 0; i < THREADS / LANES; i++) sum += part[i * D + threadIdx.x];
                a.db2[(int64_t)blockIdx.x * (a.Hq + a.Hk) * D + head * D + threadIdx.x] = sum;
            }
            __syncthreads();
            if (j == G) {
                if (dim == 0) part[threadIdx.x / LANES] = dtemperature;
                __syncthreads();
                if (threadIdx.x == 0) {
                    float sum = 0;
                    for (int i = 0; i < THREADS / LANES; i++) sum += part[i];
                    a.dtemperature[blockIdx.x * a.Hk + group] = sum * sqrtf(float(D));
                }
            }
        }
        __syncthreads();
    }
}


// ---- backward through the convolutions to the input ----

constexpr int INPUT_ROWS = 32, INPUT_OUT = INPUT_ROWS - 2;      // a token needs dy of the two tokens after it

/// Block (x, y): INPUT_OUT tokens from x INPUT_OUT, head y. With (p_t; n_t) = W2^T dy_t, the gradients of a_{t-1} and
/// a_t through y_t:
///     da_t = n_t + p_{t+1},   dx_t = w1_1 da_t + w1_0 da_{t+1} + the gradient through QK-mean
template <typename T, int D>
__global__ void __launch_bounds__(THREADS, 2) cca_backward_input(Args a) {
    constexpr int LANES = D / 8, ROWS_PER_THREAD = larger(1, INPUT_ROWS * LANES / THREADS);
    SHARED(shared, INPUT_ROWS * 2 * D * 4);
    T* dy = (T*)shared;                                         // (INPUT_ROWS, D)
    float* pn = (float*)shared;                                 // (INPUT_ROWS, 2D): p[0], n[0], p[1], n[1], ...
    const int G = a.Hq / a.Hk, R = a.B * a.S, C = (a.Hq + a.Hk) * D, head = blockIdx.y;
    const int dim = threadIdx.x % LANES * 8, my_row = threadIdx.x / LANES * ROWS_PER_THREAD, channel = head * D + dim;
    const int r0 = blockIdx.x * INPUT_OUT + my_row;

    for (int i = 0; i < ROWS_PER_THREAD && my_row + i < INPUT_ROWS; i++) {
        float g[8] = {};
        const T* p = (const T*)a.dy + int64_t(r0 + i) * C + channel;
        if (r0 + i < R) load8<T>([&](int e) { return p + e; }, g);
        store8<T>([&](int e) { return dy + at<T>(my_row + i, dim + e, D); }, g);
    }
    __syncthreads();
    {
        const T* w2_t = (const T*)a.w2_t + (int64_t)head * 2 * D * D;
        Product<T, INPUT_ROWS, 2 * D> product;
        product.template add<D>([&](int row, int k) { return load_chunk(dy + at<T>(row, k, D)); },
                                [&](int in, int k) { return load_chunk(w2_t + in * D + k); });
        __syncthreads();
        product.each([&](int row, int in, float sum) { pn[at<float>(row, in, 2 * D)] = sum; });
    }
    __syncthreads();

    const Depthwise w(a, channel);
    auto load_pn = [&](int row, float (&p)[8], float (&n)[8]) {
        for (int half = 0; half < 2; half++) {
            float pairs[8];
            load8<float>([&](int e) { return pn + at<float>(row, 2 * dim + 8 * half + e, 2 * D); }, pairs);
            for (int e = 0; e < 4; e++) p[4 * half + e] = pairs[2 * e], n[4 * half + e] = pairs[2 * e + 1];
        }
    };
    float dw_before[8] = {}, dw_now[8] = {}, db1[8] = {};
    for (int i = 0; i < ROWS_PER_THREAD && my_row + i < INPUT_OUT; i++) {
        if (r0 + i >= R) break;
        const Token t = token(a, r0 + i);
        // Whether token t + 1 of this sequence convolves token t, and token t + 2 token t + 1.
        const bool next = t.s + 1 < a.S, convolved = next && !starts_document(a, {t.b, t.s + 1});
        const bool next_convolved = t.s + 2 < a.S && !starts_document(a, {t.b, t.s + 2}), first = starts_document(a, t);
        float p[8], da[8], p1[8], da1[8], p2[8], n2[8], x0[8], x1[8], dx[8];
        load_pn(my_row + i, p, da);
        load_pn(my_row + i + 1, p1, da1);
        load_pn(my_row + i + 2, p2, n2);
        unpack(load_token<T>(a, r0 + i, channel), x0);
        load_previous<T>(a, t, 1, channel, x1);
        for (int e = 0; e < 8; e++) {
            da[e] += convolved ? p1[e] : 0;
            da1[e] += next_convolved ? p2[e] : 0;
            dx[e] = w.now[e] * da[e] + (convolved ? w.before[e] * da1[e] : 0);
            dw_now[e] += da[e] * x0[e];
            dw_before[e] += first ? 0 : da[e] * x1[e];
            db1[e] += da[e] + (first ? p[e] : 0);               // a document start: a_{t-1} is b1
        }
        if (t.s == 0 && !first) {                               // a_{-1}, a function of the past
            float x2[8];
            load_previous<T>(a, t, 2, channel, x2);
            for (int e = 0; e < 8; e++) dw_now[e] += p[e] * x1[e], dw_before[e] += p[e] * x2[e], db1[e] += p[e];
        }
        if (t.s == 0 && a.dpast) {
            T* dpast = (T*)a.dpast + (int64_t)t.b * 2 * C + channel;
            for (int e = 0; e < 8; e++) {
                x1[e] = first ? 0 : w.now[e] * p[e] + w.before[e] * da[e];
                x0[e] = first ? 0 : w.before[e] * p[e];
            }
            store8<T>([&](int e) { return dpast + e; }, x0);
            store8<T>([&](int e) { return dpast + C + e; }, x1);
        }
        // QK-mean: q~ enters its own mean (1/2) and the key's (1 / 2G); k~ each mean of the group (1/2).
        const bool is_key = head >= a.Hq;
        const int group = is_key ? head - a.Hq : head / G;
        const T* row = (const T*)a.dy + int64_t(r0 + i) * C + dim;
        for (int h = is_key ? group * G : head; h < (is_key ? group * G + G : head + 1); h++) {
            float g[8];
            load8<T>([&](int e) { return row + h * D + e; }, g);
            for (int e = 0; e < 8; e++) dx[e] += 0.5f * g[e];
        }
        float g[8];
        load8<T>([&](int e) { return row + (a.Hq + group) * D + e; }, g);
        for (int e = 0; e < 8; e++) dx[e] += (is_key ? 0.5f : 0.5f / G) * g[e];
        T* out = (T*)a.dqk + int64_t(r0 + i) * C + channel;
        store8<T>([&](int e) { return out + e; }, dx);
    }
    __syncthreads();
    float* part = (float*)shared;                               // (THREADS / LANES, D), for each of the three
    for (int which = 0; which < 3; which++) {
        for (int e = 0; e < 8; e++)
            part[threadIdx.x / LANES * D + dim + e] = which == 0 ? dw_before[e] : which == 1 ? dw_now[e] : db1[e];
        __syncthreads();
        if (threadIdx.x < D) {
            float sum = 0;
            for (int i = 0; i < THREADS / LANES; i++) sum += part[i * D + threadIdx.x];
            a.dw1[((int64_t)blockIdx.x * 3 + which) * C + head * D + threadIdx.x] = sum;
        }
        __syncthreads();
    }
}


// ---- backward to the weight of the grouped convolution ----

/// Block (x, y, z): split x of the tokens, head y, half z of its input dims. dW2 (D x D: out x (in, time) of that half)
/// = dY^T A, whose inner dimension is the tokens, so both are stored transposed in shared memory.
template <typename T, int D>
__global__ void __launch_bounds__(THREADS, 2) cca_backward_weight(Args a, int tokens_per_block) {
    constexpr int TOKENS = 128 / sizeof(T);                     // per iteration: a row has 128 bytes
    SHARED(shared, 2 * D * 128);
    T* dy = (T*)shared;                                         // (D, TOKENS)
    T* mixed = dy + D * TOKENS;                                 // (D, TOKENS): row 2i is a_{t-1}[i], row 2i + 1 a_t[i]
    const int R = a.B * a.S, C = (a.Hq + a.Hk) * D, head = blockIdx.y;
    const int first = blockIdx.x * tokens_per_block, last = smaller(first + tokens_per_block, R);
    auto store = [&](T* matrix, int row, int column, float x) {
        if constexpr (sizeof(T) == 4) matrix[at<T>(row, column, TOKENS)] = x;
        else matrix[at<T>(row, column, TOKENS)].bits = uint16_t(pack2<T>(x, 0));
    };
    Product<T, D, D> product;
    for (int r0 = first; r0 < last; r0 += TOKENS) {
        // Adjacent threads take adjacent tokens, which are adjacent in shared memory.
        for (int i = threadIdx.x; i < TOKENS * D / 8; i += THREADS) {
            const int column = i % TOKENS, dim = i / TOKENS * 8, r = r0 + column;
            float g[8] = {};
            const T* p = (const T*)a.dy + (int64_t)r * C + head * D + dim;
            if (r < last) load8<T>([&](int e) { return p + e; }, g);
            for (int e = 0; e < 8; e++) store(dy, dim + e, column, g[e]);
        }
        for (int i = threadIdx.x; i < TOKENS * D / 16; i += THREADS) {
            const int column = i % TOKENS, dim = i / TOKENS * 8, r = r0 + column;
            const int channel = head * D + blockIdx.z * (D / 2) + dim;
            float x0[8], x1[8], x2[8], a_before[8] = {}, a_now[8] = {};
            if (r < last) {
                const Token t = token(a, r);
                unpack(load_token<T>(a, r, channel), x0);
                load_previous<T>(a, t, 1, channel, x1);
                load_previous<T>(a, t, 2, channel, x2);
                Depthwise(a, channel)(a, t, x0, x1, x2, a_before, a_now);
            }
            for (int e = 0; e < 8; e++) {
                store(mixed, 2 * (dim + e), column, a_before[e]);
                store(mixed, 2 * (dim + e) + 1, column, a_now[e]);
            }
        }
        __syncthreads();
        product.template add<TOKENS>([&](int row, int k) { return load_chunk(dy + at<T>(row, k, TOKENS)); },
                                     [&](int row, int k) { return load_chunk(mixed + at<T>(row, k, TOKENS)); });
        __syncthreads();
    }
    float* dw2 = a.dw2 + ((int64_t)blockIdx.x * C + head * D) * 2 * D + blockIdx.z * D;
    product.each([&](int out, int in, float sum) { dw2[out * 2 * D + in] = sum; });
}


// ---- launches ----

constexpr int FEW_TOKENS = 1024;    // up to here a block takes 16 tokens and one head, for more parallelism in decoding
constexpr int ENOUGH_BLOCKS = 512;  // from here on a block takes a whole KV group, so QK-mean's loads hit the cache
constexpr int WEIGHT_TOKENS = 512, MAX_SPLITS = 32;

static int divide_up(int a, int b) { return (a + b - 1) / b; }
static bool small_tile(const Args& a) { return a.tile ? a.tile == SMALL_TILE : a.B * a.S <= FEW_TOKENS; }
constexpr int BACKWARD_ROWS = 32;

Partials partials(const Args& a) {
    const int R = a.B * a.S;
    return {divide_up(R, small_tile(a) ? 16 : BACKWARD_ROWS), divide_up(R, INPUT_OUT),
            smaller(divide_up(R, WEIGHT_TOKENS), MAX_SPLITS)};
}

template <typename T, int D, int ROWS, bool BACKWARD> static const char* launch_tile(const Args& a, void* stream) {
    const int tiles = divide_up(a.B * a.S, ROWS), heads = a.Hq / a.Hk + 1;
    const int heads_per_block = a.tile == LARGE_TILE || tiles * a.Hk >= ENOUGH_BLOCKS ? heads : 1;
    const dim3 grid(tiles, a.Hk * divide_up(heads, heads_per_block));
    return launch(cca_tile<T, D, ROWS, BACKWARD>, grid, THREADS, stream, a, heads_per_block);
}

template <typename T, int D> static const char* forward(const Args& a, void* stream) {
    constexpr int LARGE = sizeof(T) == 4 ? 32 : 64;             // 32 KiB of shared memory at D = 128: two blocks per CU
    return small_tile(a) ? launch_tile<T, D, 16, false>(a, stream) : launch_tile<T, D, LARGE, false>(a, stream);
}

template <typename T, int D> static const char* backward(const Args& a, void* stream) {
    const Partials n = partials(a);
    const int heads = a.Hq + a.Hk, tokens_per_block = divide_up(a.B * a.S, n.n_splits);
    const char* error = small_tile(a) ? launch_tile<T, D, 16, true>(a, stream)
                                      : launch_tile<T, D, BACKWARD_ROWS, true>(a, stream);
    if (!error) error = launch(cca_backward_input<T, D>, dim3(n.n_tiles_input, heads), THREADS, stream, a);
    if (!error)
        error = launch(cca_backward_weight<T, D>, dim3(n.n_splits, heads, 2), THREADS, stream, a, tokens_per_block);
    return error;
}

#define DISPATCH(PASS)                                                                                  \
    (a.D == 64 ? dtype == FLOAT ? PASS<float, 64>(a, stream)                                            \
                 : dtype == BF16 ? PASS<bf16, 64>(a, stream) : PASS<f16, 64>(a, stream)                 \
               : dtype == FLOAT ? PASS<float, 128>(a, stream)                                           \
                 : dtype == BF16 ? PASS<bf16, 128>(a, stream) : PASS<f16, 128>(a, stream))
const char* cca_forward(const Args& a, DType dtype, void* stream) { return DISPATCH(forward); }
const char* cca_backward(const Args& a, DType dtype, void* stream) { return DISPATCH(backward); }
