// The selective scan with D, z, bias and softplus, forward only, as plainly as C++ says it: one channel of one batch entry
// after the other, one number at a time. Sequences are contiguous (batch, length, channel) tensors, A is (channel, state).

#include <cmath>
#include <cstdint>
#include <vector>

extern "C" void one_channel_scan(int64_t batch, int64_t d_inner, int64_t length, int64_t d_state, int64_t threads,
                                 const float *u, const float *delta, const float *A, const float *B, const float *C,
                                 const float *D, const float *z, const float *bias, float *out) {
#pragma omp parallel for num_threads(threads)
    for (int64_t k = 0; k < batch * d_inner; k++) {
        const int64_t b = k / d_inner, d = k % d_inner;
        std::vector<float> h(d_state, 0.0f);
        for (int64_t t = 0; t < length; t++) {
            const int64_t token = b * length + t, at = token * d_inner + d;
            const float raw = delta[at] + bias[d], step = raw > 20.0f ? raw : std::log1p(std::exp(raw));
            float y = D[d] * u[at];
            for (int64_t n = 0; n < d_state; n++) {
                h[n] = std::exp(step * A[d * d_state + n]) * h[n] + step * u[at] * B[token * d_state + n];
                y += h[n] * C[token * d_state + n];
            }
            out[at] = y * z[at] / (1.0f + std::exp(-z[at]));
        }
    }
}
