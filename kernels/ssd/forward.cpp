#include <algorithm>
#include <cstring>

#include "kernels/kda/heads.h"
#include "kernels/ssd/chunk.h"

namespace perigee::kernels {

namespace {

using simd::F16;

// The parts of a state that belong to one head.
struct HeadState {
  float* s;      // [dk, dv]
  float* k;      // [dk, 16]
  float* v;      // [16, dv]
  float* decay;  // [16]

  HeadState(float* state, const SsdShape& shape, int64_t head) {
    const int64_t h = shape.heads, dk = shape.dk, dv = shape.dv;
    s = state + head * dk * dv;
    k = state + h * dk * dv + head * dk * kKdaChunk;
    v = state + h * dk * (dv + kKdaChunk) + head * kKdaChunk * dv;
    decay = state + h * (dk * dv + kKdaChunk * (dk + dv)) + head * kKdaChunk;
  }
  void clear_open(const SsdShape& shape) const {
    std::fill_n(k, shape.dk * kKdaChunk, 0.0f);
    std::fill_n(v, kKdaChunk * shape.dv, 0.0f);
    std::fill_n(decay, kKdaChunk, 0.0f);
  }
  ssd::Decay load_decay() const {
    alignas(64) float lanes[16];
    std::memcpy(lanes, decay, sizeof lanes);
    const float gamma = std::exchange(lanes[15], 0.0f);
    return {simd::load(lanes), gamma};
  }
  void store_decay(const ssd::Decay& d) const {
    simd::store(decay, d.since);
    decay[15] = d.gamma;
  }
};

struct Operands {
  const float *q, *k, *v, *g;
  float *out, *chunk_states;
};

class HeadForward {
 public:
  static int64_t floats(const SsdShape& s) {
    return 16 * (kda::round_up16(s.dv) + 16 + 2 * s.dk) + kda::round_up16(s.dk);
  }

  HeadForward(const SsdShape& shape, const Operands& operands, float* memory) : shape_(shape), x_(operands) {
    q_s_ = memory;
    scores_ = q_s_ + 16 * kda::round_up16(shape.dv);
    keys_ = scores_ + 16 * 16;
    decayed_ = keys_ + 16 * shape.dk;
    gamma_ = decayed_ + 16 * shape.dk;
  }

  // All rows of a slice.
  void run(const SsdSlice& item, int64_t head, int64_t first_chunk) {
    const int64_t dk = shape_.dk, dv = shape_.dv, count = item.slice.count;
    const HeadState state(item.state, shape_, head);
    int64_t filled = item.slice.position % kKdaChunk, chunk = first_chunk;
    for (int64_t done = 0; done < count;) {
      const int64_t row = item.slice.begin + done, n = std::min(kKdaChunk - filled, count - done);
      if (x_.chunk_states != nullptr)
        std::memcpy(x_.chunk_states + (chunk++ * shape_.heads + head) * dk * dv, state.s,
                    sizeof(float) * static_cast<size_t>(dk * dv));
      if (n == kKdaChunk)
        whole_chunk(state, row, head);
      else
        part_of_chunk(state, row, n, head, filled);
      done += n;
      filled = (filled + n) % kKdaChunk;
    }
    if (filled == 0 && count > 0) state.clear_open(shape_);
  }

 private:
  // Nothing of a chunk that opens and closes here has to be kept in the state.
  void whole_chunk(const HeadState& state, int64_t row, int64_t head) {
    const float* k = x_.k + row * ldk() + head * shape_.dk;
    ssd::columns_of(kKdaChunk, shape_.dk, k, ldk(), keys_);
    const ssd::Decay decay = rows(ssd::Decay(), state, keys_, x_.v + row * ldv() + head * shape_.dv, ldv(),
                                  row, kKdaChunk, head, 0);
    close(decay, state, keys_, x_.v + row * ldv() + head * shape_.dv, ldv());
  }

  void part_of_chunk(const HeadState& state, int64_t row, int64_t n, int64_t head, int64_t filled) {
    if (filled == 0) state.clear_open(shape_);
    for (int64_t i = 0; i < n; ++i) {
      const float* k = x_.k + (row + i) * ldk() + head * shape_.dk;
      for (int64_t x = 0; x < shape_.dk; ++x) state.k[16 * x + filled + i] = k[x];
      std::memcpy(state.v + (filled + i) * shape_.dv, x_.v + (row + i) * ldv() + head * shape_.dv,
                  sizeof(float) * static_cast<size_t>(shape_.dv));
    }
    const ssd::Decay decay = rows(filled == 0 ? ssd::Decay() : state.load_decay(), state, state.k, state.v,
                                  shape_.dv, row, n, head, filled);
    if (filled + n == kKdaChunk)
      close(decay, state, state.k, state.v, shape_.dv);
    else
      state.store_decay(decay);
  }

  // The outputs of rows [first, first + n) of the chunk; keys [dk, 16] and values [16, ld] of the chunk up to them.
  ssd::Decay rows(ssd::Decay decay, const HeadState& state, const float* keys, const float* values,
                  int64_t ld, int64_t row, int64_t n, int64_t head, int64_t first) {
    const int64_t dk = shape_.dk, dv = shape_.dv, dvp = kda::round_up16(dv);
    const float* q = x_.q + row * ldk() + head * dk;
    kda::multiply(n, dk, dv, q, ldk(), 1, state.s, dv, q_s_, dvp);
    kda::multiply(n, dk, kKdaChunk, q, ldk(), 1, keys, kKdaChunk, scores_, kKdaChunk);
    alignas(64) float alpha[16];
    ssd::decays_of(n, x_.g + row * shape_.heads + head, shape_.heads, alpha);
    for (int64_t i = 0; i < n; ++i) {
      decay.add_row(first + i, alpha[i]);
      float* weights = scores_ + 16 * i;
      simd::store(weights, simd::mul(decay.since, simd::load(weights)));
      ssd::combine(dv, decay.gamma, q_s_ + i * dvp, weights, 1, 0, first + i + 1, values, ld,
                   x_.out + (row + i) * ldv() + head * dv);
    }
    return decay;
  }

  void close(const ssd::Decay& decay, const HeadState& state, const float* keys, const float* values,
             int64_t ld) {
    for (int64_t x = 0; x < shape_.dk; ++x)
      simd::store(decayed_ + 16 * x, simd::mul(decay.since, simd::load(keys + 16 * x)));
    std::fill_n(gamma_, shape_.dk, decay.gamma);
    kda::decay_and_add(shape_.dk, shape_.dv, kKdaChunk, gamma_, decayed_, kKdaChunk, 1, values, ld, state.s,
                       shape_.dv);
  }

  int64_t ldk() const { return shape_.heads * shape_.dk; }
  int64_t ldv() const { return shape_.heads * shape_.dv; }

  const SsdShape& shape_;
  const Operands& x_;
  float* q_s_;      // [16, dvp]  Sᵀ q_i
  float* scores_;   // [16, 16]   q_i . k_j, then times L_j
  float* keys_;     // [dk, 16]
  float* decayed_;  // [dk, 16]   L_j k_j at the end of the chunk
  float* gamma_;    // [dk]
};

}  // namespace

int64_t ssd_state_floats(const SsdShape& shape) {
  return shape.heads * (shape.dk * shape.dv + kKdaChunk * (shape.dk + shape.dv + 1));
}

void ssd_forward(Context& ctx, const SsdShape& shape, const float* q, const float* k, const float* v,
                 const float* g, std::span<const SsdSlice> slices, float* out, float* chunk_states) {
  const Scratch::Mark mark(ctx.scratch);
  const kda::Batch batch = kda::count_batch(ctx, shape, slices, chunk_states != nullptr);
  const Operands operands{q, k, v, g, out, chunk_states};
  kda::for_heads(ctx, shape, batch, shape.dk * (2 * shape.dv + 32), HeadForward::floats(shape),
                 [&](float* memory) {
                   return [&, forward = HeadForward(shape, operands, memory)](int64_t slice, int64_t head,
                                                                              int64_t first_chunk) mutable {
                     forward.run(slices[static_cast<size_t>(slice)], head, first_chunk);
                   };
                 });
}

}  // namespace perigee::kernels
