// kda_forward over float: the CPU's bits (kernels/kda/forward.cpp). The columns of S do not meet, so a block takes
// kColumns of them for one head of one slice and goes through the chunks with its part of S in shared memory.
#include "kernels/kda/kda_device.h"
#include "kernels/kda/kda_f32_chunk.cuh"

namespace perigee::kernels {

namespace {

using namespace kda_f32;

constexpr int kColumns = 32;

struct Operands {
  const float *q, *k, *v, *g, *beta;
  float *out, *chunk_states;
};

// Where the parts of one head lie in a sequence's state.
struct HeadState {
  float *s, *gamma, *k_decayed, *u;
  __device__ HeadState(std::byte* memory, const Shape& shape, int head) {
    float* state = reinterpret_cast<float*>(memory);
    const int64_t h = shape.heads, dk = shape.dk, dv = shape.dv;
    s = state + head * dk * dv;
    gamma = state + h * dk * dv + head * dk;
    k_decayed = state + h * dk * (dv + 1) + head * dk * kChunk;
    u = state + h * dk * (dv + 1 + kChunk) + static_cast<int64_t>(head) * kChunk * dv;
  }
};

int shared_floats(int dk) {
  return Rows::floats(dk) + kColumns * (dk + 32 + 16) + kChunk;
}

__global__ void __launch_bounds__(kThreads)
    forward_kernel(Shape shape, Operands x, DeviceBatch batch, int64_t state_offset) {
  extern __shared__ float memory[];
  const int slice_index = blockIdx.y, dk = shape.dk, dv = shape.dv;
  const int blocks = (dv + kColumns - 1) / kColumns, head = blockIdx.x / blocks;
  const int column0 = static_cast<int>(blockIdx.x) % blocks * kColumns;
  const DeviceSlice slice = batch.slice[slice_index];
  if (slice.count == 0) return;
  const Rows rows(memory, dk);
  float* s = memory + Rows::floats(dk);  // [dk, kColumns]
  float* s_kq = s + kColumns * dk;       // [32, kColumns]
  float* u = s_kq + kColumns * 32;       // [16, kColumns]
  float* betas = u + kColumns * kChunk;  // [16]
  const int c = threadIdx.x % kColumns, group = threadIdx.x / kColumns, column = column0 + c;
  constexpr int kGroups = kThreads / kColumns;
  const bool inside = column < dv;
  const bool training = batch.recurrent == nullptr;
  const HeadState state(training ? nullptr : batch.recurrent[slice_index] + state_offset, shape, head);
  const int64_t ldk = static_cast<int64_t>(shape.heads) * dk, ldv = static_cast<int64_t>(shape.heads) * dv;
  int64_t slot = kda_chunk_slot(slice.begin, slice_index, 0);

  int filled = slice.position % kChunk;
  for (int i = group; i < dk; i += kGroups)
    s[i * kColumns + c] = training || !inside ? 0.0f : state.s[static_cast<int64_t>(i) * dv + column];
  for (int i = group; i < kChunk; i += kGroups)
    u[i * kColumns + c] = filled == 0 || !inside ? 0.0f : state.u[static_cast<int64_t>(i) * dv + column];
  if (filled != 0) {
    for (int i = threadIdx.x; i < dk; i += kThreads) rows.gamma[i] = state.gamma[i];
    for (int i = threadIdx.x; i < 16 * dk; i += kThreads) rows.k_decayed[i] = state.k_decayed[i];
  }
  __syncthreads();

  bool changed = false;
  for (int done = 0; done < slice.count;) {
    const int64_t row = slice.begin + done;
    const int n = min(kChunk - filled, slice.count - done);
    if (x.chunk_states != nullptr) {
      float* to = x.chunk_states + (slot++ * shape.heads + head) * dk * dv;
      if (inside)
        for (int i = group; i < dk; i += kGroups)
          to[static_cast<int64_t>(i) * dv + column] = s[i * kColumns + c];
    }
    if (filled == 0) {
      for (int i = group; i < kChunk; i += kGroups) u[i * kColumns + c] = 0.0f;
      open_chunk(dk, rows);
    }
    const int64_t at_k = row * ldk + static_cast<int64_t>(head) * dk;
    prepare_rows(n, dk, x.q + at_k, x.k + at_k, x.g + at_k, ldk, rows);
    inner_products(filled, n, dk, rows);

    if (threadIdx.x < n) betas[threadIdx.x] = x.beta[(row + threadIdx.x) * shape.heads + head];
    // Row 2i: v_i - (Gamma . k_i)ᵀ S. Row 2i + 1: (Gamma . q_i)ᵀ S.
    float sum[32 / kGroups];
    for (int r = 0; r < 32 / kGroups; ++r) sum[r] = 0.0f;
    for (int i = 0; i < dk; ++i) {
      const float s_i = s[i * kColumns + c];
#pragma unroll
      for (int r = 0; r < 32 / kGroups; ++r)
        if (group + r * kGroups < 2 * n)
          sum[r] = math::fma(rows.gkq[(group + r * kGroups) * dk + i], s_i, sum[r]);
    }
#pragma unroll
    for (int r = 0; r < 32 / kGroups; ++r) {
      const int at = group + r * kGroups;
      if (at >= 2 * n) break;
      float t = sum[r];
      if (at % 2 == 0)
        t = (inside ? x.v[(row + at / 2) * ldv + static_cast<int64_t>(head) * dv + column] : 0.0f) - t;
      s_kq[at * kColumns + c] = t;
    }
    __syncthreads();
    if (group == 0) {
      for (int i = 0; i < n; ++i) {
        const int before = filled + i;
        const float *a = rows.a + 16 * i, *b = rows.b + 16 * i;
        float t = s_kq[2 * i * kColumns + c], o = s_kq[(2 * i + 1) * kColumns + c];
        for (int j = 0; j < before; ++j) {
          const float u_j = u[j * kColumns + c];
          t = math::fnma(a[j], u_j, t);
          o = math::fma(b[j], u_j, o);
        }
        t = betas[i] * t;
        o = math::fma(b[before], t, o);
        u[before * kColumns + c] = t;
        if (inside) x.out[(row + i) * ldv + static_cast<int64_t>(head) * dv + column] = o;
      }
    }
    __syncthreads();
    done += n;
    filled += n;
    if (filled == kChunk) {
      for (int i = group; i < dk; i += kGroups) {
        float t = rows.gamma[i] * s[i * kColumns + c];
#pragma unroll
        for (int r = 0; r < kChunk; ++r) t = math::fma(rows.k_decayed[16 * i + r], u[r * kColumns + c], t);
        s[i * kColumns + c] = t;
      }
      changed = true;
      filled = 0;
      __syncthreads();
    }
  }
  if (training || !inside) return;
  if (changed)
    for (int i = group; i < dk; i += kGroups)
      state.s[static_cast<int64_t>(i) * dv + column] = s[i * kColumns + c];
  for (int i = group; i < kChunk; i += kGroups)
    state.u[static_cast<int64_t>(i) * dv + column] = filled == 0 ? 0.0f : u[i * kColumns + c];
}

// Gamma and K~ as the slice leaves them. A kernel of its own, after the blocks of columns have all read the old ones.
__global__ void __launch_bounds__(kThreads)
    close_kernel(Shape shape, const float* k, const float* g, DeviceBatch batch, int64_t state_offset) {
  const int head = blockIdx.x, dk = shape.dk;
  const DeviceSlice slice = batch.slice[blockIdx.y];
  if (slice.count == 0) return;
  const HeadState state(batch.recurrent[blockIdx.y] + state_offset, shape, head);
  const int end = slice.position + slice.count, filled = end % kChunk;
  if (filled == 0) {
    for (int i = threadIdx.x; i < dk; i += kThreads) state.gamma[i] = 0.0f;
    for (int i = threadIdx.x; i < 16 * dk; i += kThreads) state.k_decayed[i] = 0.0f;
    return;
  }
  // The rows of the slice that lie in the chunk it leaves open.
  const int n = min(filled, slice.count), first = filled - n;
  const int64_t ld = static_cast<int64_t>(shape.heads) * dk;
  const int64_t at =
      (static_cast<int64_t>(slice.begin) + slice.count - n) * ld + static_cast<int64_t>(head) * dk;
  for (int x = threadIdx.x; x < dk; x += kThreads) {
    float gamma = first == 0 ? 1.0f : state.gamma[x];
    for (int r = 0; r < n; ++r) gamma = gamma * math::exp(g[at + r * ld + x]);
    state.gamma[x] = gamma;
  }
  for (int i = threadIdx.x; i < 16 * dk; i += kThreads) {
    const int x = i / 16, j = i % 16;
    float kd = first == 0 ? 0.0f : state.k_decayed[i];
    for (int r = 0; r < n; ++r) {
      kd = kd * math::exp(g[at + r * ld + x]);
      kd = math::fma(k[at + r * ld + x], j == first + r ? 1.0f : 0.0f, kd);
    }
    state.k_decayed[i] = kd;
  }
}

}  // namespace

template <>
int64_t kda_state_bytes<float>(const KdaShape& shape) {
  const int64_t floats = shape.heads * (shape.dk * shape.dv + shape.dk + kKdaChunk * (shape.dk + shape.dv));
  return (floats * static_cast<int64_t>(sizeof(float)) + 255) / 256 * 256;
}

template <>
void kda_forward<float>(Device& dev, const KdaShape& shape, const float* q, const float* k, const float* v,
                        const float* g, const float* beta, const DeviceBatch& batch, int64_t state_offset,
                        float* out, float* chunk_states) {
  PERIGEE_CHECK(shape.heads > 0 && shape.dk > 0 && shape.dv > 0, "heads {} dk {} dv {}", shape.heads,
                shape.dk, shape.dv);
  PERIGEE_CHECK(chunk_states == nullptr || batch.training(), "chunk states are stored in training");
  if (batch.rows == 0 || batch.slices == 0 || batch.max_count == 0) return;
  const Shape s{static_cast<int>(shape.heads), static_cast<int>(shape.dk), static_cast<int>(shape.dv)};
  const int bytes = shared_floats(s.dk) * static_cast<int>(sizeof(float));
  PERIGEE_CHECK(bytes <= 227 * 1024, "dk {} needs {} bytes of shared memory", s.dk, bytes);
  allow_shared_memory(forward_kernel, bytes);
  const dim3 grid(blocks_for(s.dv, kColumns) * static_cast<unsigned>(s.heads),
                  static_cast<unsigned>(batch.slices));
  forward_kernel<<<grid, kThreads, bytes, dev.stream()>>>(s, {q, k, v, g, beta, out, chunk_states}, batch,
                                                          state_offset);
  PERIGEE_LAUNCHED();
  if (batch.training()) return;
  close_kernel<<<dim3(static_cast<unsigned>(s.heads), static_cast<unsigned>(batch.slices)), kThreads, 0,
                 dev.stream()>>>(s, k, g, batch, state_offset);
  PERIGEE_LAUNCHED();
}

}  // namespace perigee::kernels
