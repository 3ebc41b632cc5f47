/* y = x W^T on a CPU, W in int4 or int8 (quantize.py), in one pass over W per four tokens. Built by int4.py.

For small batches the product is memory-bandwidth bound: the code must compute as fast as it reads W. Integer units can,
if x is in int8 as well. Each group of 32 inputs of a token gets a scale, and quantization is part of the product:

    a = round(x / d), d = max |x| / 127         x ~ d a, a = -127 .. 127
    int4:  W = s (c - 8) + z, c = 0 .. 15       y = sum over groups of  s d (sum c a - 8 sum a) + z sum x
    int8:  W = s c, c = -127 .. 127             y = s (sum over groups of  d sum c a)

The sums over c a are integers; sum x is exact, and sum a is that of the quantized x, so that their rounding errors
cancel. A sum over x that is not finite makes d NaN, and so y.

The layout puts 8 outputs side by side, so that a register of 32 bytes holds 4 codes of each and, after a product, one
sum of each: scales are vectors, and there are no horizontal sums. A block is one group of 8 outputs:

    int4, 160 bytes:   32 bytes | 32 | 32 | 32 | s: 8 in bf16 | z: 8 in bf16
    byte 4 r + i of 32-byte piece j (0 .. 3):   low 4 bits: code of output r, input 4 j + i; high: input 16 + 4 j + i
    int8, 256 bytes:   byte 4 r + i of piece j (0 .. 7): code of output r, input 4 j + i.   s is a float32 array apart

The blocks of 8 outputs follow each other in input order, then come the next 8 outputs.

`dot` is written once per instruction set, the rest in vector extensions of GCC and Clang. The plain C++ version is the
reference. Legend: T tokens   N matrices (experts) of out x in   G = in / 32 groups   r output of a block   g group */
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

typedef uint8_t U8x32 __attribute__((vector_size(32)));         // 4 codes of each of 8 outputs
typedef uint16_t U16x8 __attribute__((vector_size(16)));
typedef int32_t I32x8 __attribute__((vector_size(32)));         // a sum per output
typedef uint32_t U32x8 __attribute__((vector_size(32)));
typedef float F32x8 __attribute__((vector_size(32)));

template <class V> static inline V load(const void* p) { V v; memcpy(&v, p, sizeof v); return v; }
static inline F32x8 bf16(const void* p) {                       // 8 bf16 as float32
#ifdef __AVX2__                                                 // GCC 12 makes five instructions of the general form
    return (F32x8)_mm256_slli_epi32(_mm256_cvtepu16_epi32(load<__m128i>(p)), 16);
#else
    return (F32x8)(__builtin_convertvector(load<U16x8>(p), U32x8) << 16);
#endif
}

// ---- dot(sums, codes, x): add to each output's sum the products of its 4 codes with 4 values x of one token ----
// int4: codes 0 .. 15. int8: codes -127 .. 127, to which VNNI, whose first factor is unsigned, adds BIAS8.

#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
const int BIAS8 = 128;
template <int BITS> struct Sums {
    __m256i v = _mm256_setzero_si256();                         // 8 x int32
    void dot(U8x32 codes, int32_t x) {
        if (BITS == 8) codes ^= 128;
        v = _mm256_dpbusd_epi32(v, (__m256i)codes, _mm256_set1_epi32(x));
    }
    I32x8 total() const { return (I32x8)v; }
};
#elif defined(__AVX2__)
const int BIAS8 = 0;
template <int BITS> struct Sums;
template <> struct Sums<4> {                                    // 16 x int16: two sums per output. 8 times a pair of
    __m256i v = _mm256_setzero_si256();                         // products, at most 2 * 15 * 127, is below 2^15
    void dot(U8x32 codes, int32_t x) {
        v = _mm256_add_epi16(v, _mm256_maddubs_epi16((__m256i)codes, _mm256_set1_epi32(x)));
    }
    I32x8 total() const { return (I32x8)_mm256_madd_epi16(v, _mm256_set1_epi16(1)); }
};
template <> struct Sums<8> {
    __m256i v = _mm256_setzero_si256();                         // 8 x int32
    void dot(U8x32 codes, int32_t x) {                          // maddubs wants one unsigned factor: |c| * (sign(c) x)
        __m256i c = (__m256i)codes, pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(c), _mm256_sign_epi8(
            _mm256_set1_epi32(x), c));
        v = _mm256_add_epi32(v, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    I32x8 total() const { return (I32x8)v; }
};
#elif defined(__ARM_FEATURE_DOTPROD)
const int BIAS8 = 0;
template <int BITS> struct Sums {
    int32x4_t v[2] = {vdupq_n_s32(0), vdupq_n_s32(0)};
    void dot(U8x32 codes, int32_t x) {
        for (int half = 0; half < 2; half++)
            v[half] = vdotq_s32(v[half], load<int8x16_t>((char*)&codes + 16 * half),
                                vreinterpretq_s8_s32(vdupq_n_s32(x)));
    }
    I32x8 total() const { return load<I32x8>(v); }
};
#else
const int BIAS8 = 0;
template <int BITS> struct Sums {
    I32x8 v = {};
    void dot(U8x32 codes, int32_t x) {
        for (int r = 0; r < 8; r++)
            for (int i = 0; i < 4; i++) v[r] += (int8_t)codes[4 * r + i] * (int8_t)(x >> 8 * i);
    }
    I32x8 total() const { return v; }
};
#endif

// ---- quantization of x ----

struct Token {                                                  // one token's x in int8
    std::vector<int32_t> a, correction;                         // (8 G), four int8 each; (G): -8 sum a, see BIAS8
    std::vector<float> d, sum;                                  // (G): scale; (G): sum x
};

template <int BITS> static void quantize(const void* x, bool is_bf16, int64_t G, Token& q) {
    q.a.resize(8 * G), q.correction.resize(G), q.d.resize(G), q.sum.resize(G);
    for (int64_t g = 0; g < G; g++) {
        F32x8 v[4], largest = {}, sums = {};
        for (int j = 0; j < 4; j++) {
            int64_t at = 32 * g + 8 * j;
            v[j] = is_bf16 ? bf16((uint16_t*)x + at) : load<F32x8>((float*)x + at);
            F32x8 size = (F32x8)((U32x8)v[j] & 0x7fffffff);
            largest = size > largest ? size : largest;
            sums += v[j];
        }
        float most = 0, sum = 0;
        for (int r = 0; r < 8; r++) most = std::max(most, largest[r]), sum += sums[r];
        const bool finite = sum - sum == 0;
        const float inverse = most > 1e-30f ? 127 / most : 0;   // below: zero, so that 127 / most stays finite
        I32x8 total = {};
        for (int j = 0; j < 4; j++) {
            F32x8 rounded = v[j] * inverse + 12582912.f;        // 1.5 * 2^23: the last bits are the rounded integer
            const I32x8 a = finite ? (I32x8)rounded - 0x4b400000 : I32x8{};
            total += a;
            for (int r = 0; r < 8; r++) ((int8_t*)&q.a[8 * g + 2 * j])[r] = (int8_t)a[r];
        }
        int all = 0;
        for (int r = 0; r < 8; r++) all += total[r];
        q.correction[g] = -(BITS == 4 ? 8 : BIAS8) * all;
        q.d[g] = !finite ? NAN : inverse ? most / 127 : 0;
        q.sum[g] = sum;
    }
}

// ---- the product ----

// 8 outputs of TOKENS tokens. blocks: of G groups.
template <int BITS, int TOKENS> static void product(const uint8_t* blocks, int64_t G, const Token* const* x, F32x8* y) {
    F32x8 scaled[TOKENS] = {}, offset[TOKENS] = {};
    for (int64_t g = 0; g < G; g++) {
        const uint8_t* block = blocks + g * (BITS == 4 ? 160 : 256);
        Sums<BITS> sums[TOKENS];
        for (int j = 0; j < BITS; j++) {
            U8x32 codes = load<U8x32>(block + 32 * j);
            for (int t = 0; t < TOKENS; t++) {
                if (BITS == 4) {
                    sums[t].dot(codes & 15, x[t]->a[8 * g + j]);
                    sums[t].dot(codes >> 4, x[t]->a[8 * g + 4 + j]);
                } else {
                    sums[t].dot(codes, x[t]->a[8 * g + j]);
                }
            }
        }
        F32x8 s = {}, z = {};
        if (BITS == 4) s = bf16(block + 128), z = bf16(block + 144);
        for (int t = 0; t < TOKENS; t++) {
            F32x8 total = __builtin_convertvector(sums[t].total() + x[t]->correction[g], F32x8) * x[t]->d[g];
            scaled[t] += BITS == 4 ? total * s : total;
            if (BITS == 4) offset[t] += z * x[t]->sum[g];
        }
    }
    for (int t = 0; t < TOKENS; t++) y[t] = scaled[t] + offset[t];
}

// Write y as float32, or rounded to the nearest bf16.
static inline void store(float y, void* to, int64_t i, bool is_bf16) {
    uint32_t bits;
    memcpy(&bits, &y, 4);
    if (is_bf16) ((uint16_t*)to)[i] = y == y ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;
    else ((float*)to)[i] = y;
}

// y (T, out) = x W[e]^T for all tokens[e] of the experts in `used`. All threads of a team call it together.
template <int BITS> static void products(const Token* x, const std::vector<std::vector<int64_t>>& tokens,
                                         const std::vector<int64_t>& used, const uint8_t* blocks, const float* scale,
                                         void* y, bool is_bf16, int64_t out, int64_t in) {
    const int64_t G = in / 32, rows = (out + 7) / 8;            // rows of blocks, of 8 outputs each
    #pragma omp for schedule(dynamic, 8)
    for (int64_t i = 0; i < (int64_t)used.size() * rows; i++) {
        const int64_t e = used[i / rows], row = i % rows;
        const uint8_t* from = blocks + (e * rows + row) * G * (BITS == 4 ? 160 : 256);
        const int n = (int)std::min<int64_t>(8, out - 8 * row);
        F32x8 s = F32x8{} + 1.f;
        for (int r = 0; r < n && BITS == 8; r++) s[r] = scale[e * out + 8 * row + r];
        for (size_t first = 0; first < tokens[e].size(); first += 4) {
            const Token* four[4];
            F32x8 sums[4];
            const int count = (int)std::min<size_t>(4, tokens[e].size() - first);
            for (int t = 0; t < count; t++) four[t] = x + tokens[e][first + t];
            const decltype(&product<BITS, 1>) by_count[] = {product<BITS, 1>, product<BITS, 2>, product<BITS, 3>,
                                                            product<BITS, 4>};
            by_count[count - 1](from, G, four, sums);
            for (int t = 0; t < count; t++)
                for (int r = 0; r < n; r++)
                    store(sums[t][r] * s[r], y, tokens[e][first + t] * out + 8 * row + r, is_bf16);
        }
    }
}

template <int BITS> static void all_products(const void* x, bool is_bf16, const uint8_t* blocks, const float* scale,
                                             const int64_t* expert, void* y, int64_t T, int64_t N, int64_t out,
                                             int64_t in) {
    const int64_t size = is_bf16 ? 2 : 4;
    static thread_local std::vector<Token> q;                   // kept: allocating it takes longer than a small product
    if ((int64_t)q.size() < T) q.resize(T);
    std::vector<std::vector<int64_t>> tokens(N);                // of each expert
    std::vector<int64_t> used;                                  // experts with tokens
    for (int64_t t = 0; t < T; t++) {
        const int64_t e = expert ? expert[t] : 0;
        if (e < 0 || e >= N) memset((char*)y + t * out * size, 0, out * size);      // 'skip'
        else if (tokens[e].push_back(t), tokens[e].size() == 1) used.push_back(e);
    }
    Token* const quantized = q.data();
    #pragma omp parallel
    {
        #pragma omp for
        for (int64_t t = 0; t < T; t++) quantize<BITS>((char*)x + t * in * size, is_bf16, in / 32, quantized[t]);
        products<BITS>(quantized, tokens, used, blocks, scale, y, is_bf16, out, in);
    }
    if (T > 256) q.resize(256);                                 // free what a long prompt needed
}

// y (T, out) = x (T, in) W[expert]^T, in x's dtype: float32 or bf16. expert (T) int64 or null: the index of each
// token's matrix; one outside 0 .. N - 1 ('skip') yields zeros. scale (N, out): int8 only, else null. All contiguous.
extern "C" void nanozaya_product(int bits, const void* x, int is_bf16, const uint8_t* blocks, const float* scale,
                                 const int64_t* expert, void* y, int64_t T, int64_t N, int64_t out, int64_t in) {
    (bits == 4 ? all_products<4> : all_products<8>)(x, is_bf16, blocks, scale, expert, y, T, N, out, in);
}
