/* One decode step of a quantized model on a CPU: one new token per sequence through all layers, in one call.

decode.py defines the step; here it is written so that a token costs hardly more than reading the weights. All threads run
the whole step together, and every `each` divides one stage among them and ends with a barrier. The products are those of
int4.cpp. What differs from decode.py:

  - The two convolutions stay separate: a_t = w1_old u_{t-1} + w1_new u_t + b1, then W2 [a_{t-1}; a_t] + b2 reads 2/3 of
    the bytes of the merged one.
  - Attention reads the cache in chunks of CHUNK positions, which threads share, for the query heads of a KV head at once.
    Each chunk gives max m, l = sum exp(logit - m) and sum exp(logit - m) v; the next stage combines the chunks.
  - Everything between the products is float32. Weights and cache are read as they are stored, float32 or bf16.

Legend as in decode.py: B sequences   E residual width   Hq, Hk query / KV heads, H = Hq + Hk   G = Hq / Hk   d head dim
C = H d channels   n rotated pairs   R router width   M router classes   N experts   F expert width */
#include "int4.cpp"

enum { CHUNK = 256 };

struct Sizes { int64_t B, L, E, Hq, Hk, d, n, R, M, N, F, capacity, is_bf16; };

// Of a layer; float32 where it is typed so. decode.py lists the same names in the same order.
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

static inline F32x8 load8(const void* p, int64_t i, bool is_bf16) {
    return is_bf16 ? bf16((const uint16_t*)p + i) : load<F32x8>((const float*)p + i);
}
static inline float load1(const void* p, int64_t i, bool is_bf16) {
    if (!is_bf16) return ((const float*)p)[i];
    const uint32_t bits = (uint32_t)((const uint16_t*)p)[i] << 16;
    return load<float>(&bits);
}
static inline float add_up(F32x8 v) {
    float sum = 0;
    for (int i = 0; i < 8; i++) sum += v[i];
    return sum;
}
static inline F32x8 exp8(F32x8 x) {                             // x <= 0: 2^k 2^f, |f| <= 1/2, error 2e-7
    x = x > -87.f ? x * 1.44269504f : F32x8{} - 126.f;
    const F32x8 rounded = x + 12582912.f, f = (x - (rounded - 12582912.f)) * 0.69314718f;
    const F32x8 power = 1 + f * (1 + f * (0.5f + f * (0.166666667f + f * (0.0416666667f + f * (0.00833333f +
                        f * 0.00138889f)))));
    return power * (F32x8)(((I32x8)rounded - 0x4b400000 + 127) << 23);
}
static float dot(const void* w, int64_t at, bool is_bf16, const float* x, int64_t n) {     // n: a multiple of 8
    F32x8 sums[2] = {};
    for (int64_t i = 0; i < n; i += 8) sums[i / 8 % 2] += load8(w, at + i, is_bf16) * load<F32x8>(x + i);
    return add_up(sums[0] + sums[1]);
}
static float norm(const float* x, int64_t n) { return sqrtf(dot(x, 0, false, x, n)); }
static float rms(const float* x, int64_t n, float eps) { return hypotf(norm(x, n), sqrtf(n * eps)); }       // times sqrt(n)
static float gelu(float x) { return x / 2 * (1 + erff(x * 0.70710678f)); }

template <class F> static void each(int64_t n, F f) {           // called by all threads
    #pragma omp for
    for (int64_t i = 0; i < n; i++) f(i);
}

// ---- attention of HEADS query heads (d floats each) to n <= CHUNK positions of their KV head ----
// partial: of each head d sums, m, l.
template <int HEADS> static void attend(const float* q, const void* k, const void* v, int64_t at, bool is_bf16, int n,
                                        int64_t d, float* partial) {
    float p[HEADS][CHUNK];
    for (int i = 0; i < n; i++) {
        F32x8 sums[HEADS] = {};
        for (int64_t j = 0; j < d; j += 8) {
            const F32x8 key = load8(k, at + i * d + j, is_bf16);
            for (int h = 0; h < HEADS; h++) sums[h] += key * load<F32x8>(q + h * d + j);
        }
        for (int h = 0; h < HEADS; h++) p[h][i] = add_up(sums[h]);
    }
    for (int h = 0; h < HEADS; h++) {
        float m = p[h][0];
        for (int i = 1; i < n; i++) m = std::max(m, p[h][i]);
        for (int i = n; i % 8; i++) p[h][i] = -INFINITY;
        F32x8 l = {};
        for (int i = 0; i < n; i += 8) {
            const F32x8 e = exp8(load<F32x8>(p[h] + i) - m), kept = load<F32x8>(p[h] + i) > -INFINITY ? e : F32x8{};
            memcpy(p[h] + i, &kept, sizeof kept);
            l += kept;
        }
        partial[h * (d + 2) + d] = m, partial[h * (d + 2) + d + 1] = add_up(l);
    }
    for (int64_t j = 0; j < d; j += 8) {
        F32x8 sums[HEADS] = {};
        for (int i = 0; i < n; i++) {
            const F32x8 value = load8(v, at + i * d + j, is_bf16);
            for (int h = 0; h < HEADS; h++) sums[h] += value * p[h][i];
        }
        for (int h = 0; h < HEADS; h++) memcpy(partial + h * (d + 2) + j, &sums[h], sizeof sums[h]);
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

// ---- steps 2 to 6 of cca.py for head h of one sequence ----
// u: [q~; k~] of this token, after those of the last two (past). cos, sin (n). y (d): the query or key.
static void mix(const Sizes& s, const Layer& w, int64_t h, const float* past, const float* u, const float* cos,
                const float* sin, float* y) {
    const int64_t d = s.d, C = (s.Hq + s.Hk) * d, G = s.Hq / s.Hk, first = h * d;
    float a[2 * 512];                                           // a_{t-1}, a_t of this head's channels; d <= 512
    for (int64_t j = 0; j < d; j++) {
        const int64_t c = first + j;
        a[j] = w.w1[2 * c] * past[c] + w.w1[2 * c + 1] * past[C + c] + w.b1[c];
        a[d + j] = w.w1[2 * c] * past[C + c] + w.w1[2 * c + 1] * u[c] + w.b1[c];
    }
    const bool is_query = h < s.Hq;
    const int64_t group = is_query ? h / G : h - s.Hq;
    const float* key = u + (s.Hq + group) * d;
    for (int64_t j = 0; j < d; j++) {
        float mean = is_query ? u[first + j] : 0;               // QK-mean
        for (int64_t i = 0; i < G && !is_query; i++) mean += u[(group * G + i) * d + j] / G;
        y[j] = dot(w.w2, (first + j) * 2 * d, s.is_bf16, a, 2 * d) + w.b2[first + j] + (mean + key[j]) / 2;
    }
    const float scale = w.size[h] / std::max(norm(y, d), 1e-7f);
    for (int64_t j = 0; j < d; j++) y[j] *= scale;
    for (int64_t j = 0; j < s.n; j++) {                         // RoPE
        const float x = y[j], z = y[j + s.n];
        y[j] = x * cos[j] - z * sin[j], y[j + s.n] = z * cos[j] + x * sin[j];
    }
}

// ---- the step ----

// x (B, E): the residual stream, read and written. cos, sin (B, n). position (B): tokens in the cache.
template <int BITS> static void decode(const Sizes& s, const Layer* layers, float* x, const float* cos, const float* sin,
                                       const int64_t* position, float eps) {
    const int64_t B = s.B, E = s.E, H = s.Hq + s.Hk, d = s.d, C = H * d, V = s.Hk * d, G = s.Hq / s.Hk, R = s.R;
    const bool is_bf16 = s.is_bf16;
    const int64_t chunks = *std::max_element(position, position + B) / CHUNK + 1, stride = G * (d + 2);
    typedef std::vector<float> Floats;
    Floats u(B * (C + V)), qk(B * C), partial(B * s.Hk * chunks * stride), y(B * E), h(B * E), r(B * R), r_new(B * R),
        z(B * R), z2(B * R), hidden(B * 2 * s.F), weight(B), attended(B * s.Hq * d);
    std::vector<Token> q(B);
    std::vector<int64_t> expert(B);
    std::vector<std::vector<int64_t>> all(1), tokens(s.N);      // tokens of the only matrix, of each expert
    for (int64_t t = 0; t < B; t++) all[0].push_back(t);
    const std::vector<int64_t> only{0};
    std::vector<int64_t> used;
    // h = x / |x| * weight, in float32 and quantized.
    auto normed = [&](int64_t t, const float* weight) {
        const float length = rms(&x[t * E], E, eps);
        for (int64_t i = 0; i < E; i++) h[t * E + i] = x[t * E + i] / length * weight[i];
        quantize<BITS>(&h[t * E], false, E / 32, q[t]);
    };
    auto add = [&](int64_t t, const float* scale, const float* constant, const float* branch, float weight) {
        for (int64_t i = 0; i < E; i++)
            x[t * E + i] = constant[i] + x[t * E + i] * scale[i] + weight * y[t * E + i] * branch[i];
    };
    #pragma omp parallel
    for (int64_t l = 0; l < s.L; l++) {
        Floats length(B);                                       // of each thread
        const Layer& w = layers[l];
        // Attention.
        each(B, [&](int64_t t) { normed(t, w.attn_norm); });
        products<BITS>(q.data(), all, only, w.down, w.down_s, u.data(), false, C + V, E);
        each(B * H, [&](int64_t i) {
            const int64_t head = i / B, t = i % B, g = head - s.Hq;
            const float *now = &u[t * (C + V)], *v = now + C;
            mix(s, w, head, w.qk + t * 2 * C, now, cos + t * s.n, sin + t * s.n, &qk[t * C + head * d]);
            if (g < 0) return;
            const int64_t at = ((t * s.Hk + g) * (s.capacity + 1) + position[t]) * d;
            for (int64_t j = 0; j < d; j++) {                   // value shift: half are those of the last token
                const int64_t c = g * d + j;
                const float value = c < V / 2 ? v[c] : w.v_last[t * V / 2 + c - V / 2];
                store(qk[t * C + head * d + j], w.k, at + j, is_bf16), store(value, w.v, at + j, is_bf16);
            }
        });
        each(B * s.Hk * chunks, [&](int64_t i) {
            const int64_t t = i / (s.Hk * chunks), g = i / chunks % s.Hk, from = i % chunks * CHUNK;
            const int n = (int)std::min<int64_t>(CHUNK, position[t] + 1 - from);
            const int64_t at = ((t * s.Hk + g) * (s.capacity + 1) + from) * d;
            for (int64_t head = 0, some; n > 0 && head < G; head += some) {
                some = G - head >= 4 ? 4 : 1;
                const auto f = some == 4 ? attend<4> : attend<1>;
                f(&qk[t * C + (g * G + head) * d], w.k, w.v, at, is_bf16, n, d, &partial[i * stride + head * (d + 2)]);
            }
        });
        each(B, [&](int64_t t) {
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
        each(B, [&](int64_t t) { add(t, w.attn_scale, w.attn_constant, w.attn_branch, 1), normed(t, w.moe_norm); });
        each(R, [&](int64_t i) {
            for (int64_t t = 0; t < B; t++) {
                const float below = w.eda_scale ? load1(w.eda_scale, i, is_bf16) * r[t * R + i] : 0;
                r_new[t * R + i] = dot(w.router_down, i * E, is_bf16, &h[t * E], E) + load1(w.router_bias, i, is_bf16) +
                                   below;
            }
        });
        for (int64_t t = 0; t < B; t++) length[t] = rms(&r_new[t * R], R, eps);
        each(R, [&](int64_t i) {
            for (int64_t t = 0; t < B; t++)
                z[t * R + i] = gelu(dot(w.fc1, i * R, is_bf16, &r_new[t * R], R) / length[t] + load1(w.fc1_bias, i, is_bf16));
        });
        each(R, [&](int64_t i) {
            for (int64_t t = 0; t < B; t++)
                z2[t * R + i] = gelu(dot(w.fc2, i * R, is_bf16, &z[t * R], R) + load1(w.fc2_bias, i, is_bf16));
        });
        #pragma omp single
        {
            r.swap(r_new), used.clear();
            for (auto& of : tokens) of.clear();
            for (int64_t t = 0; t < B; t++) {
                float logits[1024], most = -INFINITY, sum = 0;
                for (int64_t i = 0; i < s.M; i++) most = std::max(most, logits[i] = dot(w.out, i * R, is_bf16, &z2[t * R], R));
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
        each(B, [&](int64_t t) {
            float *gate = &hidden[t * 2 * s.F], *up = gate + s.F;
            for (int64_t i = 0; i < s.F && expert[t] < s.N; i += 8) {           // SwiGLU
                const F32x8 x = load<F32x8>(gate + i), e = exp8(x < 0 ? x : -x);
                const F32x8 silu = x * (x < 0 ? e : F32x8{} + 1.f) / (1 + e) * load<F32x8>(up + i);
                memcpy(gate + i, &silu, sizeof silu);
            }
            quantize<BITS>(gate, false, s.F / 32, q[t]);
        });
        products<BITS>(q.data(), tokens, used, w.experts_down, w.experts_down_s, y.data(), false, E, s.F);
        each(B, [&](int64_t t) { add(t, w.moe_scale, w.moe_constant, w.moe_branch, weight[t]); });
    }
}

extern "C" void nanozaya_decode(int bits, const int64_t* sizes, const void* layers, float* x, const float* cos,
                                const float* sin, const int64_t* position, float eps) {
    (bits == 4 ? decode<4> : decode<8>)(*(const Sizes*)sizes, (const Layer*)layers, x, cos, sin, position, eps);
}
