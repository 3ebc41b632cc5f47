// The PyTorch binding of cca.hip: checks all arguments, allocates the results and launches on the current stream.
// For ROCm, torch.utils.cpp_extension translates the CUDA names.
#define TORCH_ASSERT_ONLY_METHOD_OPERATORS      // omits the header of all operators: halves the compile time
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>
#ifndef FOR_CPU
#include <c10/cuda/CUDAStream.h>
#endif
#include "cca.h"

namespace {

using at::Tensor;
using std::optional;

struct Problem {                            // the checked arguments; `kept` keeps the tensors behind the pointers alive
    Args args{};
    DType dtype;
    void* stream = nullptr;
    std::vector<Tensor> kept;

    template <typename T = void> const T* pointer(Tensor t) {
        kept.push_back(t);
        return static_cast<const T*>(t.const_data_ptr());
    }
};

void check_shape(const char* name, const Tensor& t, at::IntArrayRef shape) {
    TORCH_CHECK_VALUE(t.sizes() == shape, "cca_mix: ", name, " must have the shape ", shape, ", it has ", t.sizes());
}

/// Whether 8 adjacent channels can be read as 16-byte chunks.
bool aligned(const Tensor& t) {
    bool good = t.stride(-1) == 1 && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
    for (int64_t i = 0; i < t.dim() - 1; i++)
        good = good && (t.size(i) == 1 || t.stride(i) * t.element_size() % 16 == 0);
    return good;
}

Problem check(const Tensor& qk, const optional<Tensor>& past, const Tensor& w1, const Tensor& b1, const Tensor& w2,
              const Tensor& b2, const Tensor& temperature, const Tensor& cos, const Tensor& sin,
              const optional<Tensor>& start, int64_t tile) {
    Problem p;
    Args& a = p.args;
    const at::ScalarType type = qk.scalar_type();
    TORCH_CHECK_TYPE(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf,
                     "cca_mix: qk must be float32, bfloat16 or float16, it is ", type);
    p.dtype = type == at::kFloat ? FLOAT : type == at::kBFloat16 ? BF16 : F16;
    TORCH_CHECK_VALUE(qk.dim() == 3 && qk.size(0) > 0 && qk.size(1) > 0,
                      "cca_mix: qk must have the shape (B, S, C) with B and S at least 1, it has ", qk.sizes());
    TORCH_CHECK_VALUE(w2.dim() == 3 && (w2.size(1) == 64 || w2.size(1) == 128),
                      "cca_mix: the head dim must be 64 or 128 (conv_grouped_weight is (C, head dim, 2)), ",
                      "the weight has ", w2.sizes(), "; use kernel = 'torch'");
    const int64_t B = qk.size(0), S = qk.size(1), C = qk.size(2), D = w2.size(1), Hk = temperature.numel();
    TORCH_CHECK_VALUE(Hk > 0 && C % D == 0 && C / D > Hk && (C / D - Hk) % Hk == 0, "cca_mix: qk's ", C,
                      " channels must be the query heads', a multiple of ", Hk, " (of temperature's), and the ", Hk,
                      " key heads', of ", D, " each");
    TORCH_CHECK_VALUE(B * S < (1 << 30), "cca_mix: at most 2^30 tokens at once, got ", B * S);
    TORCH_CHECK_VALUE(aligned(qk) && (B == 1 || S == 1 || qk.stride(0) == S * qk.stride(1)),
                      "cca_mix: qk must have contiguous channels, and tokens at equal strides that are multiples of "
                      "16 bytes, its strides are ", qk.strides(), "; use qk.contiguous()");
    TORCH_CHECK_VALUE(tile >= CHOOSE && tile <= LARGE_TILE, "cca_mix: tile must be 0, 1 or 2, it is ", tile);
    check_shape("conv_depthwise_weight", w1, {C, 1, 2});
    check_shape("conv_depthwise_bias", b1, {C});
    check_shape("conv_grouped_weight", w2, {C, D, 2});
    check_shape("conv_grouped_bias", b2, {C});
    check_shape("temperature", temperature, {Hk});
    TORCH_CHECK_VALUE(cos.dim() == 3 && (cos.size(0) == 1 || cos.size(0) == B) && cos.size(1) == S,
                      "cca_mix: cos must have the shape (1 or B, S, n) = (1 or ", B, ", ", S, ", n), it has ",
                      cos.sizes());
    check_shape("sin", sin, cos.sizes());
    TORCH_CHECK_VALUE(cos.size(2) % 8 == 0 && 2 * cos.size(2) <= D, "cca_mix: cos and sin must rotate 2n of ", D,
                      " dims with n a multiple of 8, n is ", cos.size(2), "; use kernel = 'torch'");
    if (past) {
        check_shape("past", *past, {B, 2, C});
        TORCH_CHECK_TYPE(past->scalar_type() == type, "cca_mix: past must have qk's dtype, ", type, ", it is ",
                         past->scalar_type());
    }
    if (start) {
        check_shape("start", *start, {B, S});
        TORCH_CHECK_TYPE(start->scalar_type() == at::kBool, "cca_mix: start must be bool, it is ",
                         start->scalar_type());
    }
    for (const Tensor* t : {&w1, &b1, &w2, &b2, &temperature, &cos, &sin, past ? &*past : &qk, start ? &*start : &qk})
        TORCH_CHECK_VALUE(t->device() == qk.device(), "cca_mix: all tensors must be on qk's device, ", qk.device(),
                          ", one is on ", t->device());
    for (const Tensor* t : {&w1, &b1, &w2, &b2, &temperature, &cos, &sin})
        TORCH_CHECK_TYPE(t->is_floating_point(), "cca_mix: parameters, cos and sin must be floats, one is ",
                         t->scalar_type());

    auto plain = [](const Tensor& t, at::ScalarType dtype) {        // contiguous and aligned; copies only if needed
        Tensor u = t.to(dtype).contiguous();
        return aligned(u) ? u : u.clone();
    };
    a.B = B, a.S = S, a.Hk = Hk, a.Hq = C / D - Hk, a.D = D, a.n = cos.size(2), a.tile = tile;
    a.qk = p.pointer(qk), a.qk_s = S > 1 ? qk.stride(1) : qk.stride(0);
    if (past) a.past = p.pointer(plain(*past, type));
    if (start) a.start = p.pointer<bool>(start->contiguous());
    a.w1 = p.pointer<float>(plain(w1, at::kFloat));
    a.b1 = p.pointer<float>(plain(b1, at::kFloat));
    a.w2 = p.pointer(plain(w2, type));
    a.b2 = p.pointer<float>(plain(b2, at::kFloat));
    a.temperature = p.pointer<float>(plain(temperature, at::kFloat));
    a.cos = p.pointer<float>(plain(cos, at::kFloat));
    a.sin = p.pointer<float>(plain(sin, at::kFloat));
    a.table_b = cos.size(0) == 1 ? 0 : S * cos.size(2);
#ifndef FOR_CPU
    p.stream = c10::cuda::getCurrentCUDAStream(qk.device().index()).stream();
#endif
    return p;
}

std::tuple<Tensor, Tensor> forward(
        const Tensor& qk, const optional<Tensor>& past, const Tensor& w1, const Tensor& b1, const Tensor& w2,
        const Tensor& b2, const Tensor& temperature, const Tensor& cos, const Tensor& sin,
        const optional<Tensor>& start, int64_t tile) {
    const c10::DeviceGuard guard(qk.device());
    Problem p = check(qk, past, w1, b1, w2, b2, temperature, cos, sin, start, tile);
    Args& a = p.args;
    Tensor q = at::empty({a.B, a.Hq, a.S, a.D}, qk.options()), k = at::empty({a.B, a.Hk, a.S, a.D}, qk.options());
    a.q = q.mutable_data_ptr(), a.k = k.mutable_data_ptr();
    const char* error = cca_forward(a, p.dtype, p.stream);
    TORCH_CHECK(!error, "cca_mix: the kernel could not be launched (", error, ")");
    return {q, k};
}

/// Return the gradients of qk, past (empty without one), w1, b1, w2, b2, temperature; those of parameters in float32.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
        const Tensor& dq, const Tensor& dk, const Tensor& qk, const optional<Tensor>& past, const Tensor& w1,
        const Tensor& b1, const Tensor& w2, const Tensor& b2, const Tensor& temperature, const Tensor& cos,
        const Tensor& sin, const optional<Tensor>& start, int64_t tile) {
    const c10::DeviceGuard guard(qk.device());
    Problem p = check(qk, past, w1, b1, w2, b2, temperature, cos, sin, start, tile);
    Args& a = p.args;
    const int64_t C = (a.Hq + a.Hk) * a.D;
    check_shape("the gradient of q", dq, {a.B, a.Hq, a.S, a.D});
    check_shape("the gradient of k", dk, {a.B, a.Hk, a.S, a.D});
    auto gradient = [&](const Tensor& t) {                          // autograd may pass any strides
        Tensor u = t.to(qk.options());
        return aligned(u) ? u : u.contiguous();
    };
    const Tensor gq = gradient(dq), gk = gradient(dk);
    a.dq = p.pointer(gq), a.dq_b = gq.stride(0), a.dq_h = gq.stride(1), a.dq_s = gq.stride(2);
    a.dk = p.pointer(gk), a.dk_b = gk.stride(0), a.dk_h = gk.stride(1), a.dk_s = gk.stride(2);
    a.w2_t = p.pointer(w2.to(qk.scalar_type()).view({-1, a.D, 2 * a.D}).transpose(1, 2).contiguous());
    const Partials n = partials(a);
    const auto floats = qk.options().dtype(at::kFloat);
    Tensor dqk = at::empty({a.B, a.S, C}, qk.options()), dpast = at::empty({past ? a.B : 0, 2, C}, qk.options());
    Tensor dy = at::empty({a.B, a.S, C}, qk.options());
    Tensor db2 = at::empty({n.n_tiles, C}, floats), dtemperature = at::empty({n.n_tiles, a.Hk}, floats);
    Tensor dw1 = at::empty({n.n_tiles_input, 3, C}, floats), dw2 = at::empty({n.n_splits, C, a.D, 2}, floats);
    a.dy = dy.mutable_data_ptr(), a.dqk = dqk.mutable_data_ptr();
    a.dpast = past ? dpast.mutable_data_ptr() : nullptr;
    a.db2 = db2.mutable_data_ptr<float>(), a.dtemperature = dtemperature.mutable_data_ptr<float>();
    a.dw1 = dw1.mutable_data_ptr<float>(), a.dw2 = dw2.mutable_data_ptr<float>();
    const char* error = cca_backward(a, p.dtype, p.stream);
    TORCH_CHECK(!error, "cca_mix: the kernel could not be launched (", error, ")");
    const Tensor sums = dw1.sum(0);                                 // (3, C)
    return {dqk, dpast, sums.slice(0, 0, 2).t().unsqueeze(1).contiguous(), sums[2].clone(), dw2.sum(0), db2.sum(0),
            dtemperature.sum(0)};
}

}  // namespace

// __init__.py defines the operators' signatures.
#ifdef FOR_CPU
TORCH_LIBRARY_IMPL(nanozaya, CPU, m) {
#else
TORCH_LIBRARY_IMPL(nanozaya, CUDA, m) {                             // ROCm uses this key, too
#endif
    m.impl("cca_forward", forward);
    m.impl("cca_backward", backward);
}
