// The selective scan on a CPU, forward and backward: plain C++ with a C interface, compiled and called by cpu.py.
//
// One task is one batch entry and a group of channels; it walks over time. The vector dimension is the channels, so
// sequences are read as contiguous rows of a (batch, length, channel) tensor, B and C as broadcast scalars, and the
// sum over states needs no shuffle. The recurrence of one channel would wait four cycles a step for its multiply-add;
// here d_state vectors of channels are between one step and the next, so it never waits.
//
// Backward walks over time in chunks of CHUNK tokens, from the last to the first. It recomputes a chunk's states and
// decays from a checkpoint that forward left, into a buffer that stays in the L1/L2 cache. The gradients of B and C sum
// over channels: vectors are added up over the channels of the group, lanes once at the end. Each task writes its own
// partial sums, which the caller adds in a fixed order: the result does not depend on the number of threads.
//
// Sequences are float32 and contiguous along channels (B and C: along states), with any other strides.

#include <cstdint>
#include <cstring>
#include <new>

#if defined(__AVX512F__)
#include <immintrin.h>
constexpr int64_t LANES = 16;
#elif defined(__AVX__)
constexpr int64_t LANES = 8;
#else
constexpr int64_t LANES = 4;
#endif

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef int32_t IntVec __attribute__((vector_size(LANES * 4)));

extern "C" struct Scan {  // mirrored in cpu.py, in this order
    int64_t batch, d_inner, length, d_state, chunk, group, threads, softplus;
    int64_t reversed;  // scan from the last token to the first; states and the order of chunks are those of the scan
    const float *u, *delta, *A, *B, *C, *D, *z, *bias, *dout, *d_last;  // A: (d_state, d_inner); D to d_last may be null
    int64_t u_b, u_t, delta_b, delta_t, B_b, B_t, C_b, C_t, z_b, z_t, dout_b, dout_t;  // strides: batch, time
    float *out;         // (batch, length, d_inner)
    float *states;      // (batch, chunks - 1, d_state, d_inner): the state before each chunk but the first; may be null
    float *last;        // (batch, d_state, d_inner), may be null
    float *du, *ddelta, *dz;  // (batch, length, d_inner)
    float *parameters;  // (batch, d_state + 2, d_inner): gradients of A, D and the bias
    float *dB, *dC;     // (batch, groups, length, d_state)
};

namespace {

// ---------------------------------------------------------------- vectors

constexpr float LOG2E = 1.44269504088896341f;
constexpr float P1 = 6.9314697760e-01f, P2 = 2.4022242083e-01f, P3 = 5.5507337445e-02f, P4 = 9.6715127858e-03f,
                P5 = 1.3264727253e-03f;

inline Vec splat(float x) { return Vec{} + x; }

inline Vec load(const float *from, int64_t count) {
    Vec v{};
    if (count == LANES) std::memcpy(&v, from, sizeof v);
    else std::memcpy(&v, from, count * sizeof(float));
    return v;
}

inline void store(float *to, Vec v, int64_t count) {
    if (count == LANES) std::memcpy(to, &v, sizeof v);
    else std::memcpy(to, &v, count * sizeof(float));
}

inline float sum(Vec v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float total = 0;
    for (int64_t i = 0; i < LANES; i++) total += v[i];
    return total;
#endif
}

// 2^x: x = n + f, a polynomial in f on [-1/2, 1/2] (relative error 9e-8), times 2^n. Exact at 0; NaN stays NaN.
inline Vec exp2(Vec x) {
#if defined(__AVX512F__)
    const Vec n = (Vec)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    x = x < -127.0f ? splat(-127.0f) : x;  // scale 0
    x = x > 128.0f ? splat(128.0f) : x;    // scale infinity
    const float magic = 12582912.0f + 127.0f;  // 1.5 * 2^23: rounds to whole numbers; the low bits hold n + 127
    const Vec shifted = x + magic;
    const Vec n = shifted - magic;
#endif
    const Vec f = x - n;
    Vec p = splat(P5);
    p = p * f + P4;
    p = p * f + P3;
    p = p * f + P2;
    p = p * f + P1;
    p = p * f + 1.0f;
#if defined(__AVX512F__)
    return (Vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    return p * (Vec)((IntVec)shifted << 23);
#endif
}

inline Vec sigmoid(Vec x) { return 1.0f / (1.0f + exp2(x * -LOG2E)); }

// log(1 + e^x), accurate also where e^x is tiny: max(x, 0) + e P(e), e = e^-|x|; e P(e) is log(1 + e) on [0, 1], relative
// error 5e-9.
inline Vec softplus(Vec x) {
    const Vec e = exp2((Vec)((IntVec)x | INT32_MIN) * LOG2E);
    const Vec e2 = e * e, e4 = e2 * e2;
    const Vec p0 = e * -4.9999901652e-01f + 1.0f, p2 = e * -2.4954134226e-01f + 3.3329963684e-01f;
    const Vec p4 = e * -1.5305593610e-01f + 1.9675940275e-01f, p6 = e * -5.6959543377e-02f + 1.0603655875e-01f;
    const Vec p8 = e * -3.2440256327e-03f + 1.9851464778e-02f;
    const Vec p = (p8 * e4 + (p6 * e2 + p4)) * e4 + (p2 * e2 + p0);
    return (x < 0.0f ? splat(0.0f) : x) + e * p;
}

// ---------------------------------------------------------------- tasks

struct Buffer {  // of vectors, not initialised
    Vec *at;
    explicit Buffer(int64_t vectors) : at((Vec *)::operator new(vectors * sizeof(Vec), std::align_val_t(64))) {}
    ~Buffer() { ::operator delete(at, std::align_val_t(64)); }
    Buffer(const Buffer &) = delete;
};

struct Task {  // one batch entry, channels first to end
    int64_t b, group, first, end;
    Task(const Scan &s, int64_t index, int64_t groups) {
        b = index / groups;
        group = index % groups;
        first = group * s.group;
        end = first + s.group < s.d_inner ? first + s.group : s.d_inner;
    }
};

// The token that is scanned as number t.
inline int64_t token_at(const Scan &s, int64_t t) { return s.reversed ? s.length - 1 - t : t; }

int64_t lanes_at(const Task &task, int64_t d) { return task.end - d < LANES ? task.end - d : LANES; }

// Ask for the memory of token number t and LANES channels ahead of its use, a chunk early: it is one cache line in each
// tensor, too far from the next token's for the processor to guess. Any address may be asked for. always_inline: g++ 12
// takes a function that does nothing but ask for one without effect, and drops its calls.
__attribute__((always_inline)) inline void ask(const Scan &s, int64_t b, int64_t t, int64_t d, bool backward) {
    const int64_t token = token_at(s, t), at = (b * s.length + token) * s.d_inner + d;
    __builtin_prefetch(s.u + b * s.u_b + token * s.u_t + d);
    __builtin_prefetch(s.delta + b * s.delta_b + token * s.delta_t + d);
    if (s.z) __builtin_prefetch(s.z + b * s.z_b + token * s.z_t + d);
    if (!backward) return __builtin_prefetch(s.out + at, 1);
    __builtin_prefetch(s.dout + b * s.dout_b + token * s.dout_t + d);
    __builtin_prefetch(s.du + at, 1);
    __builtin_prefetch(s.ddelta + at, 1);
    if (s.z) __builtin_prefetch(s.dz + at, 1);
}

// STATES states through a chunk of tokens: h = 2^(exponent A) h + drive B, y += h C. Tokens are the inner loop, so that a
// state stays in a register; several states share the loads and stores of what belongs to a token.
template <int STATES>
inline void advance(Vec *h, const Vec *A, const Vec *exponent, const Vec *drive, Vec *y, const float *B, const float *C,
                    int64_t B_t, int64_t C_t, int64_t tokens) {
    Vec state[STATES], rate[STATES];
    for (int j = 0; j < STATES; j++) {
        state[j] = h[j];
        rate[j] = A[j];
    }
    for (int64_t i = 0; i < tokens; i++, B += B_t, C += C_t) {
        Vec sum = y[i];
#pragma GCC unroll 4
        for (int j = 0; j < STATES; j++) {
            state[j] = exp2(exponent[i] * rate[j]) * state[j] + drive[i] * B[j];
            sum += state[j] * C[j];
        }
        y[i] = sum;
    }
    for (int j = 0; j < STATES; j++) h[j] = state[j];
}

// What the loops of backward over one chunk and LANES channels share.
struct Token {
    Vec u, raw, step, drive, dy, d_drive, d_step;
};

constexpr int TOGETHER = 2;  // tokens that backward takes back in time at once

// TOKENS tokens back in time, `last` the latest of them, all states. g is the gradient of the state, carry the share of
// it that comes from the next token. Several tokens at a time, because the loop is bound by its loads and stores.
template <int TOKENS>
inline void retreat(Token *last, const Vec *h, const Vec *decay, const Vec *A, Vec *dA, Vec *carry, Vec *to_B, Vec *to_C,
                    const float *B, const float *C, int64_t B_t, int64_t C_t, int64_t N) {
    Vec d_drive[TOKENS]{}, d_step[TOKENS]{};
    for (int64_t n = 0; n < N; n++) {
        Vec from_next = carry[n], dA_n = dA[n];
        const Vec A_n = A[n];
#pragma GCC unroll 4
        for (int j = 0; j < TOKENS; j++) {
            const Token &token = last[-j];
            const int64_t row = n - j * N;
            const Vec g = token.dy * C[n - j * C_t] + from_next;
            from_next = g * decay[row];
            const Vec d_exponent = from_next * h[row];
            d_drive[j] += g * B[n - j * B_t];
            d_step[j] += d_exponent * A_n;
            dA_n += d_exponent * token.step;
            to_B[row] += g * token.drive;
            to_C[row] += token.dy * h[row + N];
        }
        carry[n] = from_next;
        dA[n] = dA_n;
    }
    for (int j = 0; j < TOKENS; j++) {
        last[-j].d_drive = d_drive[j];
        last[-j].d_step = d_step[j];
    }
}

int64_t forward_scratch(const Scan &s) { return 2 * s.d_state + 3 * s.chunk; }

// In three passes over a chunk of tokens: what is done once a token waits for long chains of operations, which overlap
// between tokens only if the recurrence is not in between.
void forward_task(const Scan &s, const Task &task, Vec *scratch) {
    const int64_t N = s.d_state, b = task.b, T = s.chunk;
    const int64_t slots = (s.length + T - 1) / T - 1;
    const int64_t B_t = s.reversed ? -s.B_t : s.B_t, C_t = s.reversed ? -s.C_t : s.C_t;
    Vec *A = scratch, *h = A + N, *exponent = h + N, *drive = exponent + T, *y = drive + T;
    for (int64_t d = task.first; d < task.end; d += LANES) {
        const int64_t count = lanes_at(task, d);
        for (int64_t n = 0; n < N; n++) {
            A[n] = load(s.A + n * s.d_inner + d, count);
            h[n] = Vec{};
        }
        const Vec bias = s.bias ? load(s.bias + d, count) : Vec{};
        const Vec skip = s.D ? load(s.D + d, count) : Vec{};
        for (int64_t start = 0; start < s.length; start += T) {
            const bool more = start + T < s.length;
            const int64_t tokens = more ? T : s.length - start;
            for (int64_t i = 0; i < tokens; i++) {
                const int64_t at = token_at(s, start + i);
                ask(s, b, more ? start + T + i : i, more ? d : d + LANES, false);
                const Vec u = load(s.u + b * s.u_b + at * s.u_t + d, count);
                Vec step = load(s.delta + b * s.delta_b + at * s.delta_t + d, count) + bias;
                if (s.softplus) step = softplus(step);
                exponent[i] = step * LOG2E;
                drive[i] = step * u;
                y[i] = skip * u;
            }
            float *checkpoint = s.states && more ? s.states + (b * slots + start / T) * N * s.d_inner + d : nullptr;
            for (int64_t n = 0; checkpoint && n < N; n++) __builtin_prefetch(checkpoint + n * s.d_inner, 1);
            const int64_t first = token_at(s, start);
            const float *B = s.B + b * s.B_b + first * s.B_t, *C = s.C + b * s.C_b + first * s.C_t;
            int64_t n = 0;
            for (; n + 4 <= N; n += 4) advance<4>(h + n, A + n, exponent, drive, y, B + n, C + n, B_t, C_t, tokens);
            for (; n < N; n++) advance<1>(h + n, A + n, exponent, drive, y, B + n, C + n, B_t, C_t, tokens);
            for (int64_t n = 0; checkpoint && n < N; n++) store(checkpoint + n * s.d_inner, h[n], count);
            for (int64_t i = 0; i < tokens; i++) {
                const int64_t at = token_at(s, start + i);
                if (s.z) {
                    const Vec z = load(s.z + b * s.z_b + at * s.z_t + d, count);
                    y[i] *= z * sigmoid(z);
                }
                store(s.out + (b * s.length + at) * s.d_inner + d, y[i], count);
            }
        }
        if (s.last)
            for (int64_t n = 0; n < N; n++) store(s.last + (b * N + n) * s.d_inner + d, h[n], count);
    }
}

int64_t backward_scratch(const Scan &s) {
    const int64_t blocks = (s.group + LANES - 1) / LANES, N = s.d_state;
    return blocks * (3 * N + 2) + (4 * s.chunk + 1) * N + s.chunk * int64_t(sizeof(Token) / sizeof(Vec));
}

void backward_task(const Scan &s, const Task &task, int64_t groups, Vec *scratch) {
    const int64_t N = s.d_state, b = task.b, T = s.chunk;
    const int64_t chunks = (s.length + T - 1) / T;
    const int64_t blocks = (s.group + LANES - 1) / LANES;
    const int64_t B_t = s.reversed ? -s.B_t : s.B_t, C_t = s.reversed ? -s.C_t : s.C_t;
    const auto take = [&scratch](int64_t vectors) { Vec *v = scratch; scratch += vectors; return v; };
    Vec *all_A = take(blocks * N), *all_dA = take(blocks * N), *all_carry = take(blocks * N);
    Vec *all_dD = take(blocks), *all_dbias = take(blocks);
    Vec *h = take((T + 1) * N), *decay = take(T * N), *shares_B = take(T * N), *shares_C = take(T * N);
    Token *all = (Token *)take(T * int64_t(sizeof(Token) / sizeof(Vec)));

    for (int64_t d = task.first, k = 0; d < task.end; d += LANES, k++) {
        const int64_t count = lanes_at(task, d);
        for (int64_t n = 0; n < N; n++) {
            all_A[k * N + n] = load(s.A + n * s.d_inner + d, count);
            all_carry[k * N + n] = s.d_last ? load(s.d_last + (b * N + n) * s.d_inner + d, count) : Vec{};
            all_dA[k * N + n] = Vec{};
        }
        all_dD[k] = all_dbias[k] = Vec{};
    }

    for (int64_t c = chunks - 1; c >= 0; c--) {
        const int64_t start = c * T, tokens = start + T < s.length ? T : s.length - start;
        for (int64_t i = 0; i < T * N; i++) shares_B[i] = shares_C[i] = Vec{};

        for (int64_t d = task.first, k = 0; d < task.end; d += LANES, k++) {
            const int64_t count = lanes_at(task, d);
            Vec *A = all_A + k * N, *dA = all_dA + k * N, *carry = all_carry + k * N;
            const Vec bias = s.bias ? load(s.bias + d, count) : Vec{};
            const Vec skip = s.D ? load(s.D + d, count) : Vec{};

            // forward again from the checkpoint, keeping states and decays
            const auto checkpoint = [&](int64_t chunk) { return s.states + (b * (chunks - 1) + chunk - 1) * N * s.d_inner; };
            const bool more = d + LANES < task.end;  // else the chunk before comes next
            const int64_t next_d = more ? d + LANES : task.first, next_c = more ? c : c - 1;
            for (int64_t n = 0; n < N; n++) {
                h[n] = c ? load(checkpoint(c) + n * s.d_inner + d, count) : Vec{};
                if (next_c > 0) __builtin_prefetch(checkpoint(next_c) + n * s.d_inner + next_d);
            }
            for (int64_t i = 0; i < tokens; i++) {
                const int64_t t = token_at(s, start + i), at = (b * s.length + t) * s.d_inner + d;
                const float *B = s.B + b * s.B_b + t * s.B_t, *C = s.C + b * s.C_b + t * s.C_t;
                ask(s, b, next_c * T + i, next_d, true);
                const Vec u = load(s.u + b * s.u_b + t * s.u_t + d, count);
                const Vec raw = load(s.delta + b * s.delta_b + t * s.delta_t + d, count) + bias;
                const Vec step = s.softplus ? softplus(raw) : raw;
                const Vec drive = step * u, exponent = step * LOG2E;
                Vec y = skip * u;
                const Vec *before = h + i * N;
                Vec *after = h + (i + 1) * N, *a = decay + i * N;
                for (int64_t n = 0; n < N; n++) {
                    a[n] = exp2(exponent * A[n]);
                    after[n] = a[n] * before[n] + drive * B[n];
                    y += after[n] * C[n];
                }
                Vec dy = load(s.dout + b * s.dout_b + t * s.dout_t + d, count);
                if (s.z) {
                    const Vec z = load(s.z + b * s.z_b + t * s.z_t + d, count), gate = sigmoid(z);
                    store(s.dz + at, dy * y * gate * (1.0f + z * (1.0f - gate)), count);
                    dy *= z * gate;
                }
                all[i] = {u, raw, step, drive, dy, Vec{}, Vec{}};
            }

            for (int64_t i = tokens - 1; i >= 0;) {
                const int64_t t = token_at(s, start + i);
                const float *B = s.B + b * s.B_b + t * s.B_t, *C = s.C + b * s.C_b + t * s.C_t;
                const auto back = i >= TOGETHER - 1 ? retreat<TOGETHER> : retreat<1>;
                back(all + i, h + i * N, decay + i * N, A, dA, carry, shares_B + i * N, shares_C + i * N, B, C, B_t,
                     C_t, N);
                i -= i >= TOGETHER - 1 ? TOGETHER : 1;
            }
            for (int64_t i = 0; i < tokens; i++) {
                const Token &token = all[i];
                const int64_t at = (b * s.length + token_at(s, start + i)) * s.d_inner + d;
                Vec d_step = token.d_step + token.d_drive * token.u;
                if (s.softplus) d_step *= sigmoid(token.raw);
                store(s.ddelta + at, d_step, count);
                store(s.du + at, token.d_drive * token.step + skip * token.dy, count);
                all_dD[k] += token.dy * token.u;
                all_dbias[k] += d_step;
            }
        }

        for (int64_t i = 0; i < tokens; i++) {
            const int64_t at = ((b * groups + task.group) * s.length + token_at(s, start + i)) * N;
            for (int64_t n = 0; n < N; n++) {
                s.dB[at + n] = sum(shares_B[i * N + n]);
                s.dC[at + n] = sum(shares_C[i * N + n]);
            }
        }
    }

    for (int64_t d = task.first, k = 0; d < task.end; d += LANES, k++) {
        const int64_t count = lanes_at(task, d);
        float *to = s.parameters + b * (N + 2) * s.d_inner + d;
        for (int64_t n = 0; n < N; n++) store(to + n * s.d_inner, all_dA[k * N + n], count);
        store(to + N * s.d_inner, all_dD[k], count);
        store(to + (N + 1) * s.d_inner, all_dbias[k], count);
    }
}

}  // namespace

// One or two scans of the same sizes, their tasks side by side.

extern "C" void mamba_forge_scan_forward(const Scan *scans, int64_t count) {
    const Scan &s = *scans;
    const int64_t groups = (s.d_inner + s.group - 1) / s.group, tasks = s.batch * groups;
#pragma omp parallel num_threads(s.threads)
    {
        Buffer scratch(forward_scratch(s));
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < count * tasks; i++)
            forward_task(scans[i / tasks], Task(s, i % tasks, groups), scratch.at);
    }
}

extern "C" void mamba_forge_scan_backward(const Scan *scans, int64_t count) {
    const Scan &s = *scans;
    const int64_t groups = (s.d_inner + s.group - 1) / s.group, tasks = s.batch * groups;
#pragma omp parallel num_threads(s.threads)
    {
        Buffer scratch(backward_scratch(s));
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < count * tasks; i++)
            backward_task(scans[i / tasks], Task(s, i % tasks, groups), groups, scratch.at);
    }
}
