// dplr_forward over float: the CPU's bits (kernels/dplr/forward.cpp). The columns of S do not meet, so a
// block takes kColumns of them for one head of one slice and goes through the chunks with its part of S in shared memory.
#include "kernels/dplr/dplr_f32_chunk.cuh"

namespace perigee::kernels {

namespace {

using namespace dplr;

constexpr int kColumns = 32;

// Where the parts of one head lie in a sequence's state.
struct HeadState {
  float *s, *gamma, *ka_decayed, *vw;
  __device__ HeadState(std::byte* memory, const Shape& shape, int head) {
    float* state = reinterpret_cast<float*>(memory);
    const int64_t h = shape.heads, dk = shape.dk, dv = shape.dv;
    s = state + head * dk * dv;
    gamma = state + h * dk * dv + head * dk;
    ka_decayed = state + h * dk * (dv + 1) + head * dk * 2 * kChunk;
    vw = state + h * dk * (dv + 1 + 2 * kChunk) + static_cast<int64_t>(head) * 2 * kChunk * dv;
  }
};

int shared_floats(int dk) {
  return DeviceRows::floats(dk) + kTileFloats + kColumns * (dk + 32 + 32);
}

__global__ void __launch_bounds__(kThreads)
    forward_kernel(Shape shape, DplrDeviceInputs<float> in, float* out, float* chunk_states,
                   DeviceBatch batch, int64_t state_offset) {
  extern __shared__ float memory[];
  const int slice_index = blockIdx.y, dk = shape.dk, dv = shape.dv;
  const int blocks = (dv + kColumns - 1) / kColumns, head = blockIdx.x / blocks;
  const int column0 = static_cast<int>(blockIdx.x) % blocks * kColumns;
  const DeviceSlice slice = batch.slice[slice_index];
  if (slice.count == 0) return;
  float* tile = memory + DeviceRows::floats(dk);
  const DeviceRows rows(memory, tile, dk);
  float* s = tile + kTileFloats;     // [dk, kColumns]
  float* s_bq = s + kColumns * dk;   // [32, kColumns]
  float* vw = s_bq + kColumns * 32;  // [2*16, kColumns]
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
  for (int i = group; i < 2 * kChunk; i += kGroups)
    vw[i * kColumns + c] = filled == 0 || !inside ? 0.0f : state.vw[static_cast<int64_t>(i) * dv + column];
  if (filled != 0) {
    for (int i = threadIdx.x; i < dk; i += kThreads) rows.gamma[i] = state.gamma[i];
    for (int i = threadIdx.x; i < 32 * dk; i += kThreads) rows.ka_decayed[i] = state.ka_decayed[i];
  }
  __syncthreads();

  bool changed = false;
  for (int done = 0; done < slice.count;) {
    const int64_t row = slice.begin + done;
    const int n = min(kChunk - filled, slice.count - done);
    if (chunk_states != nullptr) {
      float* to = chunk_states + (slot++ * shape.heads + head) * dk * dv;
      if (inside)
        for (int i = group; i < dk; i += kGroups)
          to[static_cast<int64_t>(i) * dv + column] = s[i * kColumns + c];
    }
    if (filled == 0) {
      for (int i = group; i < 2 * kChunk; i += kGroups) vw[i * kColumns + c] = 0.0f;
      open_chunk(dk, rows);
    }
    const int64_t at_v = row * ldv + static_cast<int64_t>(head) * dv + column;
    prepare_rows(n, dk, in, row * ldk + static_cast<int64_t>(head) * dk, ldk, rows);
    inner_products(filled, n, dk, rows);

    // Row 2i: (Gamma . b_i)ᵀ S. Row 2i + 1: (Gamma . q_i)ᵀ S.
    float sum[32 / kGroups];
    for (int r = 0; r < 32 / kGroups; ++r) sum[r] = 0.0f;
    for (int i = 0; i < dk; ++i) {
      const float s_i = s[i * kColumns + c];
#pragma unroll
      for (int r = 0; r < 32 / kGroups; ++r)
        if (group + r * kGroups < 2 * n)
          sum[r] = math::fma(rows.gbq[(group + r * kGroups) * dk + i], s_i, sum[r]);
    }
#pragma unroll
    for (int r = 0; r < 32 / kGroups; ++r)
      if (group + r * kGroups < 2 * n) s_bq[(group + r * kGroups) * kColumns + c] = sum[r];
    // The rows' values to their places.
    for (int i = group; i < n; i += kGroups)
      vw[(filled + i) * kColumns + c] = inside ? in.v[at_v + i * ldv] : 0.0f;
    __syncthreads();
    if (group == 0) {
      for (int i = 0; i < n; ++i) {
        const int before = filled + i;
        const float *ce = rows.ce + 32 * i, *fh = rows.fh + 32 * i;
        float t = s_bq[2 * i * kColumns + c], o = s_bq[(2 * i + 1) * kColumns + c];
        for (int j = 0; j < before; ++j) {
          const float v_j = vw[j * kColumns + c], w_j = vw[(16 + j) * kColumns + c];
          t = math::fma(ce[j], v_j, t);
          t = math::fma(ce[16 + j], w_j, t);
          o = math::fma(fh[j], v_j, o);
          o = math::fma(fh[16 + j], w_j, o);
        }
        t = 0.0f - t;
        o = math::fma(fh[before], vw[before * kColumns + c], o);
        o = math::fma(fh[16 + before], t, o);
        vw[(16 + before) * kColumns + c] = t;
        if (inside) out[at_v + i * ldv] = o;
      }
    }
    __syncthreads();
    done += n;
    filled += n;
    if (filled == kChunk) {
      for (int i = group; i < dk; i += kGroups) {
        float t = rows.gamma[i] * s[i * kColumns + c];
#pragma unroll
        for (int r = 0; r < 2 * kChunk; ++r)
          t = math::fma(rows.ka_decayed[32 * i + r], vw[r * kColumns + c], t);
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
  for (int i = group; i < 2 * kChunk; i += kGroups)
    state.vw[static_cast<int64_t>(i) * dv + column] = filled == 0 ? 0.0f : vw[i * kColumns + c];
}

// Gamma, K~ and A~ as the slice leaves them. A kernel of its own, after the blocks of columns have all read the old ones.
__global__ void __launch_bounds__(kThreads)
    close_kernel(Shape shape, const float* k, const float* a, const float* g, DeviceBatch batch,
                 int64_t state_offset) {
  const int head = blockIdx.x, dk = shape.dk;
  const DeviceSlice slice = batch.slice[blockIdx.y];
  if (slice.count == 0) return;
  const HeadState state(batch.recurrent[blockIdx.y] + state_offset, shape, head);
  const int end = slice.position + slice.count, filled = end % kChunk;
  if (filled == 0) {
    for (int i = threadIdx.x; i < dk; i += kThreads) state.gamma[i] = 0.0f;
    for (int i = threadIdx.x; i < 32 * dk; i += kThreads) state.ka_decayed[i] = 0.0f;
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
  for (int i = threadIdx.x; i < 32 * dk; i += kThreads) {
    const int x = i / 32, lane = i % 32;
    const float* own = lane < 16 ? k : a;
    float decayed = first == 0 ? 0.0f : state.ka_decayed[i];
    for (int r = 0; r < n; ++r)
      decayed = math::fma(own[at + r * ld + x], lane % 16 == first + r ? 1.0f : 0.0f,
                          decayed * math::exp(g[at + r * ld + x]));
    state.ka_decayed[i] = decayed;
  }
}

}  // namespace

template <>
int64_t dplr_state_bytes<float>(const DplrShape& shape) {
  const int64_t floats =
      shape.heads * (shape.dk * shape.dv + shape.dk + 2 * kKdaChunk * (shape.dk + shape.dv));
  return (floats * static_cast<int64_t>(sizeof(float)) + 255) / 256 * 256;
}

template <>
void dplr_forward<float>(Device& dev, const DplrShape& shape, const DplrDeviceInputs<float>& in,
                         const DeviceBatch& batch, int64_t state_offset, float* out, float* chunk_states) {
  PERIGEE_CHECK(shape.heads > 0 && shape.dk > 0 && shape.dv > 0, "heads {} dk {} dv {}", shape.heads,
                shape.dk, shape.dv);
  PERIGEE_CHECK(chunk_states == nullptr || batch.training(), "chunk states are stored in training");
  PERIGEE_CHECK(state_offset % 256 == 0, "state offset");
  if (batch.rows == 0 || batch.slices == 0 || batch.max_count == 0) return;
  const Shape s{static_cast<int>(shape.heads), static_cast<int>(shape.dk), static_cast<int>(shape.dv)};
  const int bytes = shared_floats(s.dk) * static_cast<int>(sizeof(float));
  PERIGEE_CHECK(bytes <= 227 * 1024, "dk {} needs {} bytes of shared memory", s.dk, bytes);
  allow_shared_memory(forward_kernel, bytes);
  const dim3 grid(blocks_for(s.dv, kColumns) * static_cast<unsigned>(s.heads),
                  static_cast<unsigned>(batch.slices));
  forward_kernel<<<grid, kThreads, bytes, dev.stream()>>>(s, in, out, chunk_states, batch, state_offset);
  PERIGEE_LAUNCHED();
  if (batch.training()) return;
  close_kernel<<<dim3(static_cast<unsigned>(s.heads), static_cast<unsigned>(batch.slices)), kThreads, 0,
                 dev.stream()>>>(s, in.k, in.a, in.g, batch, state_offset);
  PERIGEE_LAUNCHED();
}

}  // namespace perigee::kernels
