/* One decode step of a quantized model on a CPU: one new token per sequence through all layers, in one call.

decode.py defines the step; here it is written so that a token costs hardly more than reading the weights. All threads
run the whole step, and each `parallel_for` divides one stage among them and ends with a barrier. The products are those
of int4.cpp. What differs from decode.py:

  - The two convolutions stay separate: a_t = w1_old u_{t-1} + w1_new u_t + b1, then W2 [a_{t-1}; a_t] + b2 has 2/3 of
    the weights of the merged one, in the model's dtype.
  - Attention is an online softmax split over chunks of CHUNK positions, which threads share, for the query heads of a
    KV head at once. A chunk gives m = max logit, l = sum exp(logit - m) and the unnormalized output, sum exp(logit - m)
    v; the next stage combines the chunks.
  - Everything between the products is float32. Weights and cache are read as they are stored, float32 or bf16.

Legend as in decode.py: B sequences   E residual width   Hq, Hk query / KV heads, H = Hq + Hk   G = Hq / Hk   d head dim
C = H d channels   n rotated pairs   R router width   M router classes   N experts   F expert width */
#include "int4.cpp"

enum { CHUNK = 256 };
typedef float F32x4 __attribute__((vector_size(16)));

struct Sizes { int64_t B, L, E, Hq, Hk, d, n, R, M, N, F, capacity, is_bf16; };

// Of a layer. float: float32; void: the model's dtype. decode.py lists the names up to balancing_bias in this order.
struct Layer {
    const float *attn_norm, *moe_norm;                          // (E), times sqrt(E)
    const float *attn_scale, *attn_constant, *attn_branch, *moe_scale, *moe_constant, *moe_branch;     // (E)
    const float *w1, *b1, *b2, *size;                           // (C, 2), (C), (C), (H)
    const void* w2;                                             // (C, 2, d)
    const void *router_down, *router_bias, *eda_scale;          // (R, E), (R), (R) or null
    const void *fc1, *fc1_bias, *fc2, *fc2_bias, *out;          // (R, R), (R), (R, R), (R), (M, R)
    const float* balancing_bias;                                // (M)
    const uint8_t *down, *o, *gate_up, *experts_down;           // blocks
    const float *down_s, *o_s, *gate_up_s, *experts_down_s;     // scales of int8, or null
    void *k, *v;                                                // (B, Hk, capacity + 1, d)
    float *qk, *v_last;                                         // (B, 2, C), (B, Hk d / 2)
};

// ---- small parts ----

template <bool BF16> static inline F32x8 load8(const void* p, int64_t i) {
    return BF16 ? bf16((const uint16_t*)p + i) : load<F32x8>((const float*)p + i);
}
static inline float load1(const void* p, int64_t i, bool is_bf16) {
    if (!is_bf16) return ((const float*)p)[i];
    const uint32_t bits = (uint32_t)((const uint16_t*)p)[i] << 16;
    return load<float>(&bits);
}
static inline float add_up(F32x8 v) {
    const F32x4 half = load<F32x4>(&v) + load<F32x4>((float*)&v + 4);
    return (half[0] + half[2]) + (half[1] + half[3]);
}
static inline F32x8 exp8(F32x8 x) {                             // x <= 0: 2^k 2^f, |f| <= 1/2, error 2e-7
    x = x <= -87.f ? F32x8{} - 127.f : x * 1.44269504f;         // 2^-127 is zero: the exponent's bits are 0. NaN stays
    const F32x8 rounded = x + 12582912.f, f = (x - (rounded - 12582912.f)) * 0.69314718f;
    const F32x8 power = 1 + f * (1 + f * (0.5f + f * (0.166666667f + f * (0.0416666667f + f * (0.00833333f +
                        f * 0.00138889f)))));
    return power * (F32x8)(((I32x8)rounded - 0x4b400000 + 127) << 23);
}
// y[t] = w x[t] for T <= 4 vectors x[t] (n), each `stride` floats after the one before. n: a multiple of 8.
template <bool BF16, int T> static void dots_of(const void* w, int64_t at, const float* x, int64_t stride, int64_t n,
                                                float* y) {
    F32x8 sums[T][2] = {};
    for (int64_t i = 0; i < n; i += 16) {
        const F32x8 a = load8<BF16>(w, at + i), b = i + 8 < n ? load8<BF16>(w, at + i + 8) : F32x8{};
        for (int t = 0; t < T; t++) {
            sums[t][0] += a * load<F32x8>(x + t * stride + i);
            if (i + 8 < n) sums[t][1] += b * load<F32x8>(x + t * stride + i + 8);
        }
    }
    for (int t = 0; t < T; t++) y[t] = add_up(sums[t][0] + sums[t][1]);
}
static void dots(const void* w, int64_t at, bool is_bf16, const float* x, int64_t stride, int64_t T, int64_t n,
                 float* y) {
    for (int64_t t = 0; t < T;) {
        const bool four = T - t >= 4;
        const auto f = is_bf16 ? (four ? dots_of<true, 4> : dots_of<true, 1>)
                               : four ? dots_of<false, 4> : dots_of<false, 1>;
        f(w, at, x + t * stride, stride, n, y + t);
        t += four ? 4 : 1;
    }
}
static float l2_norm(const float* x, int64_t n) {
    float square;
    dots_of<false, 1>(x, 0, x, 0, n, &square);
    return sqrtf(square);
}
static float sqrt_n_rms(const float* x, int64_t n, float eps) { return hypotf(l2_norm(x, n), sqrtf(n * eps)); }
static float gelu(float x) { return x / 2 * (1 + erff(x * 0.70710678f)); }

template <class F> static void parallel_for(int64_t n, F f) {   // called by all threads; ends with a barrier
    #pragma omp for
    for (int64_t i = 0; i < n; i++) f(i);
}

// ---- attention of HEADS query heads (d floats each) to n <= CHUNK positions of their KV head ----
// partial: of each head d sums, m, l.
template <bool BF16, int HEADS> static void attend(const float* q, const void* k, const void* v, int64_t at, int n,
                                                   int64_t d, float* partial) {
    float p[HEADS][CHUNK];
    for (int i = 0; i < n; i += 2) {                            // two positions share each read of q
        const int64_t last = i + 1 < n ? i + 1 : i;
        F32x8 sums[HEADS][2] = {};
        for (int64_t j = 0; j < 2 * d; j += 32) {               // keys read soon, and values that the loop below reads
            __builtin_prefetch((const char*)k + (at + (i + 32) * d + j) * (BF16 ? 2 : 4));
            __builtin_prefetch((const char*)v + (at + i * d + j) * (BF16 ? 2 : 4));
        }
        for (int64_t j = 0; j < d; j += 8) {
            const F32x8 a = load8<BF16>(k, at + i * d + j), b = load8<BF16>(k, at + last * d + j);
            for (int h = 0; h < HEADS; h++) {
                const F32x8 query = load<F32x8>(q + h * d + j);
                sums[h][0] += a * query, sums[h][1] += b * query;
            }
        }
        for (int h = 0; h < HEADS; h++) p[h][i] = add_up(sums[h][0]), p[h][last] = add_up(sums[h][1]);
    }
    for (int h = 0; h < HEADS; h++) {
        for (int i = n; i % 8; i++) p[h][i] = -INFINITY;
        F32x8 most = load<F32x8>(p[h]), l = {};
        for (int i = 8; i < n; i += 8) most = load<F32x8>(p[h] + i) > most ? load<F32x8>(p[h] + i) : most;
        const float m = *std::max_element((float*)&most, (float*)&most + 8);
        for (int i = 0; i < n; i += 8) {
            const F32x8 e = exp8(load<F32x8>(p[h] + i) - m);
            memcpy(p[h] + i, &e, sizeof e);
            l += e;
        }
        partial[h * (d + 2) + d] = m, partial[h * (d + 2) + d + 1] = add_up(l);
        std::fill(partial + h * (d + 2), partial + h * (d + 2) + d, 0.f);
    }
    for (int from = 0; from < n; from += 16)                    // 16 positions at a time, which stay in the L1 cache
        for (int64_t j = 0; j < d; j += 16) {                   // 16 dims share each read of p
            F32x8 sums[HEADS][2];
            for (int h = 0; h < HEADS; h++) memcpy(sums[h], partial + h * (d + 2) + j, sizeof sums[h]);
            for (int i = from; i < n && i < from + 16; i++) {
                const F32x8 a = load8<BF16>(v, at + i * d + j), b = load8<BF16>(v, at + i * d + j + 8);
                for (int h = 0; h < HEADS; h++) sums[h][0] += a * p[h][i], sums[h][1] += b * p[h][i];
            }
            for (int h = 0; h < HEADS; h++) memcpy(partial + h * (d + 2) + j, sums[h], sizeof sums[h]);
        }
}

// Combine the chunks of one query head into y (d). stride: floats from one chunk's partial result to the next one's.
static void combine(const float* partial, int64_t chunks, int64_t stride, int64_t d, float* y) {
    float m = -INFINITY, l = 0;
    for (int64_t c = 0; c < chunks; c++) m = std::max(m, partial[c * stride + d]);
    std::fill(y, y + d, 0.f);
    for (int64_t c = 0; c < chunks; c++) {
        const float weight = expf(partial[c * stride + d] - m);
        l += weight * partial[c * stride + d + 1];
        for (int64_t j = 0; j < d; j++) y[j] += weight * partial[c * stride + j];
    }
    for (int64_t j = 0; j < d; j++) y[j] /= l;
}

// ---- steps 2 to 5 of cca.py for head h of T <= 4 sequences ----
// u, past, cos, sin, y: those of the first. u (C): [q~; k~] of the new token; sequences are `stride` floats apart.
// past (2, C): u of the last two tokens. cos, sin (n). y (C): the queries and keys, of which d are written.
static void mix(const Sizes& s, const Layer& w, int64_t h, int64_t T, const float* past, const float* u, int64_t stride,
                const float* cos, const float* sin, float* y) {
    const int64_t d = s.d, C = (s.Hq + s.Hk) * d, G = s.Hq / s.Hk, first = h * d;
    const bool is_query = h < s.Hq;
    const int64_t group = is_query ? h / G : h - s.Hq;
    float a[4 * 2 * 512];                                       // a_{t-1}, a_t of this head's channels; d <= 512
    for (int64_t t = 0; t < T; t++)
        for (int64_t j = 0; j < d; j++) {
            const int64_t c = first + j;
            const float *old = past + t * 2 * C, *w1 = w.w1 + 2 * c;
            a[t * 2 * d + j] = w1[0] * old[c] + w1[1] * old[C + c] + w.b1[c];
            a[t * 2 * d + d + j] = w1[0] * old[C + c] + w1[1] * u[t * stride + c] + w.b1[c];
        }
    for (int64_t j = 0; j < d; j++) {
        float z[4];
        dots(w.w2, (first + j) * 2 * d, s.is_bf16, a, 2 * d, T, 2 * d, z);
        for (int64_t t = 0; t < T; t++) {
            const float *now = u + t * stride, key = now[(s.Hq + group) * d + j];
            float query = is_query ? now[first + j] : 0;        // QK-mean
            for (int64_t i = 0; i < G && !is_query; i++) query += now[(group * G + i) * d + j] / G;
            y[t * C + first + j] = z[t] + w.b2[first + j] + (query + key) / 2;
        }
    }
    for (int64_t t = 0; t < T; t++) {
        float* head = y + t * C + first;
        const float scale = w.size[h] / std::max(l2_norm(head, d), 1e-7f);
        for (int64_t j = 0; j < d; j++) head[j] *= scale;
        for (int64_t j = 0; j < s.n; j++) {                     // RoPE
            const float a = head[j], b = head[j + s.n], c = cos[t * s.n + j], d = sin[t * s.n + j];
            head[j] = a * c - b * d, head[j + s.n] = b * c + a * d;
        }
    }
}

// ---- the step ----

// x (B, E): the residual stream, read and written. cos, sin (B, n). position (B): tokens in the cache.
template <int BITS> static void decode(const Sizes& s, const Layer* layers, float* x, const float* cos,
                                       const float* sin, const int64_t* position, float eps) {
    const int64_t B = s.B, E = s.E, H = s.Hq + s.Hk, d = s.d, C = H * d, V = s.Hk * d, G = s.Hq / s.Hk, R = s.R;
    const bool is_bf16 = s.is_bf16;
    const int64_t chunks = *std::max_element(position, position + B) / CHUNK + 1, stride = G * (d + 2);
    typedef std::vector<float> Floats;
    Floats u(B * (C + V)), qk(B * C), partial(B * s.Hk * chunks * stride), y(B * E), h(B * E), r(B * R), r_new(B * R),
        z(B * R), z2(B * R), hidden(B * 2 * s.F), weight(B), attended(B * s.Hq * d);
    std::vector<Token> q(B);
    std::vector<int64_t> expert(B);
    std::vector<std::vector<int64_t>> all(1), tokens(s.N);      // a dense product has one expert, with all tokens
    for (int64_t t = 0; t < B; t++) all[0].push_back(t);
    const std::vector<int64_t> only{0};
    std::vector<int64_t> used;                                  // experts with tokens
    // h = x / |x| * weight, in float32 and quantized.
    auto rmsnorm = [&](int64_t t, const float* weight) {
        const float length = sqrt_n_rms(&x[t * E], E, eps);
        for (int64_t i = 0; i < E; i++) h[t * E + i] = x[t * E + i] / length * weight[i];
        quantize<BITS>(&h[t * E], false, E / 32, q[t]);
    };
    auto add = [&](int64_t t, const float* scale, const float* constant, const float* branch, float weight) {
        for (int64_t i = 0; i < E; i++)
            x[t * E + i] = constant[i] + x[t * E + i] * scale[i] + weight * y[t * E + i] * branch[i];
    };
    #pragma omp parallel
    for (int64_t l = 0; l < s.L; l++) {
        Floats inverse(B), sums(B);                             // of each thread
        const Layer& w = layers[l];
        // Attention.
        parallel_for(B, [&](int64_t t) { rmsnorm(t, w.attn_norm); });
        products<BITS>(q.data(), all, only, w.down, w.down_s, u.data(), false, C + V, E);
        parallel_for(H * ((B + 3) / 4), [&](int64_t i) {        // a head of four sequences
            const int64_t head = i % H, first = i / H * 4, T = std::min<int64_t>(4, B - first), g = head - s.Hq;
            mix(s, w, head, T, w.qk + first * 2 * C, &u[first * (C + V)], C + V, cos + first * s.n, sin + first * s.n,
                &qk[first * C]);
            for (int64_t t = first; g >= 0 && t < first + T; t++) {
                const int64_t at = ((t * s.Hk + g) * (s.capacity + 1) + position[t]) * d;
                for (int64_t j = 0; j < d; j++) {               // value shift: half are those of the last token
                    const int64_t c = g * d + j;
                    const float value = c < V / 2 ? u[t * (C + V) + C + c] : w.v_last[t * V / 2 + c - V / 2];
                    store(qk[t * C + head * d + j], w.k, at + j, is_bf16), store(value, w.v, at + j, is_bf16);
                }
            }
        });
        parallel_for(B * s.Hk * chunks, [&](int64_t i) {
            const int64_t t = i / (s.Hk * chunks), g = i / chunks % s.Hk, from = i % chunks * CHUNK;
            const int n = (int)std::min<int64_t>(CHUNK, position[t] + 1 - from);
            const int64_t at = ((t * s.Hk + g) * (s.capacity + 1) + from) * d;
            for (int64_t head = 0, heads; n > 0 && head < G; head += heads) {
                heads = G - head >= 4 ? 4 : 1;
                const auto f = is_bf16 ? (heads == 4 ? attend<true, 4> : attend<true, 1>)
                                       : heads == 4 ? attend<false, 4> : attend<false, 1>;
                f(&qk[t * C + (g * G + head) * d], w.k, w.v, at, n, d, &partial[i * stride + head * (d + 2)]);
            }
        });
        parallel_for(B, [&](int64_t t) {
            float* past = w.qk + t * 2 * C;
            memmove(past, past + C, C * sizeof(float)), memcpy(past + C, &u[t * (C + V)], C * sizeof(float));
            memcpy(w.v_last + t * V / 2, &u[t * (C + V) + C + V / 2], V / 2 * sizeof(float));
            for (int64_t head = 0; head < s.Hq; head++)
                combine(&partial[(t * s.Hk + head / G) * chunks * stride + head % G * (d + 2)], position[t] / CHUNK + 1,
                        stride, d, &attended[(t * s.Hq + head) * d]);
            quantize<BITS>(&attended[t * s.Hq * d], false, s.Hq * d / 32, q[t]);
        });
        products<BITS>(q.data(), all, only, w.o, w.o_s, y.data(), false, E, s.Hq * d);
        // Router.
        parallel_for(B, [&](int64_t t) {
            add(t, w.attn_scale, w.attn_constant, w.attn_branch, 1), rmsnorm(t, w.moe_norm);
        });
        // f(i, t, W[i] in[t] + bias[i]) for all outputs i < R and sequences t.
        auto linear = [&](const void* W, const void* bias, const Floats& in, int64_t n, auto scale, auto f) {
            parallel_for(R, [&](int64_t i) {
                dots(W, i * n, is_bf16, in.data(), n, B, n, sums.data());
                for (int64_t t = 0; t < B; t++) f(i, t, sums[t] * scale(t) + load1(bias, i, is_bf16));
            });
        };
        auto one = [](int64_t) { return 1.f; };
        linear(w.router_down, w.router_bias, h, E, one, [&](int64_t i, int64_t t, float y) {
            r_new[t * R + i] = y + (w.eda_scale ? load1(w.eda_scale, i, is_bf16) * r[t * R + i] : 0);
        });
        for (int64_t t = 0; t < B; t++) inverse[t] = 1 / sqrt_n_rms(&r_new[t * R], R, eps);
        linear(w.fc1, w.fc1_bias, r_new, R, [&](int64_t t) { return inverse[t]; },
               [&](int64_t i, int64_t t, float y) { z[t * R + i] = gelu(y); });
        linear(w.fc2, w.fc2_bias, z, R, one, [&](int64_t i, int64_t t, float y) { z2[t * R + i] = gelu(y); });
        #pragma omp single
        {
            r.swap(r_new), used.clear();
            for (auto& of : tokens) of.clear();
            for (int64_t t = 0; t < B; t++) {
                float logits[1024], most = -INFINITY, sum = 0;
                for (int64_t i = 0; i < s.M; i++) {
                    dots(w.out, i * R, is_bf16, &z2[t * R], R, 1, R, &logits[i]);
                    most = std::max(most, logits[i]);
                }
                for (int64_t i = 0; i < s.M; i++) sum += logits[i] = expf(logits[i] - most);
                int64_t best = 0;
                for (int64_t i = 1; i < s.M; i++)
                    if (logits[i] / sum + w.balancing_bias[i] > logits[best] / sum + w.balancing_bias[best]) best = i;
                weight[t] = best < s.N ? logits[best] / sum : 0;
                expert[t] = best;
                if (best < s.N && (tokens[best].push_back(t), tokens[best].size() == 1)) used.push_back(best);
                if (best >= s.N) std::fill(&y[t * E], &y[t * E] + E, 0.f);
            }
        }
        // Experts.
        products<BITS>(q.data(), tokens, used, w.gate_up, w.gate_up_s, hidden.data(), false, 2 * s.F, E);
        parallel_for(B, [&](int64_t t) {
            float *gate = &hidden[t * 2 * s.F], *up = gate + s.F;
            for (int64_t i = 0; i < s.F && expert[t] < s.N; i += 8) {           // SwiGLU
                const F32x8 x = load<F32x8>(gate + i), e = exp8(x < 0 ? x : -x);
                const F32x8 silu = x * (x < 0 ? e : F32x8{} + 1.f) / (1 + e) * load<F32x8>(up + i);
                memcpy(gate + i, &silu, sizeof silu);
            }
            quantize<BITS>(gate, false, s.F / 32, q[t]);
        });
        products<BITS>(q.data(), tokens, used, w.experts_down, w.experts_down_s, y.data(), false, E, s.F);
        parallel_for(B, [&](int64_t t) { add(t, w.moe_scale, w.moe_constant, w.moe_branch, weight[t]); });
    }
}

extern "C" void nanozaya_decode(int bits, const int64_t* sizes, const void* layers, float* x, const float* cos,
                                const float* sin, const int64_t* position, float eps) {
    (bits == 4 ? decode<4> : decode<8>)(*(const Sizes*)sizes, (const Layer*)layers, x, cos, sin, position, eps);
}
