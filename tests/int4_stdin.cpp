// Run one product of kernels/int4.cpp outside of Python, for tests/test_int4.py: seven int64 (bits, bf16, experts given, T,
// N, out, in), then x, blocks, scale (float32, with 8 bits) and expert on stdin; y on stdout.
#include "../kernels/int4.cpp"
#include <cstdio>

template <class V> static std::vector<V> read(size_t n) {
    std::vector<V> v(n);
    if (n && fread(v.data(), sizeof(V), n, stdin) != n) exit(1);
    return v;
}

int main() {
    auto h = read<int64_t>(7);
    const int64_t bits = h[0], size = h[1] ? 2 : 4, T = h[3], N = h[4], out = h[5], in = h[6];
    auto x = read<char>(T * in * size);
    auto blocks = read<uint8_t>(N * ((out + 7) / 8) * (in / 32) * (bits == 4 ? 160 : 256));
    auto scale = read<float>(bits == 8 ? N * out : 0);
    auto expert = read<int64_t>(h[2] ? T : 0);
    std::vector<char> y(T * out * size);
    nanozaya_product(bits, x.data(), h[1], blocks.data(), bits == 8 ? scale.data() : nullptr,
                     h[2] ? expert.data() : nullptr, y.data(), T, N, out, in);
    fwrite(y.data(), 1, y.size(), stdout);
}
