// From the sums over blocks of a row to its token.
#include <cfloat>

#include "kernels/sampling/row.cuh"
#include "kernels/vocab/row_pass.cuh"

namespace perigee::kernels {
namespace sampling {
namespace {

constexpr int64_t kBlock = 256;
constexpr int64_t kMostChunks = 1024;  // as on the CPU
constexpr int kThreads = 256;
constexpr int kMost = 1024;  // chunks of a row, or tokens of a chunk
constexpr int64_t kMostVocab = kMostChunks * kMost;
static_assert(kBlock == kVocabBlock);

struct Draw {
  vocab::RowPass plain;  // of the logits as they are
  vocab::RowPass
      drawn;  // of the rows after bias, penalties and filters; where its scale is 0, and if there are no
  const DeviceSampling* params;  // such rows (logits null), the plain one
  int32_t* tokens;
  float *logprob, *entropy;
};

// Philox4x32-10 of base/random.h; 53 of its bits as a double in [0, 1).
__device__ double uniform(uint64_t key, uint64_t counter) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = 0, c3 = 0;
  for (int round = 0; round < 10; ++round) {
    const uint32_t h0 = __umulhi(0xD2511F53u, c0), h1 = __umulhi(0xCD9E8D57u, c2);
    const uint32_t l0 = 0xD2511F53u * c0, l1 = 0xCD9E8D57u * c2;
    c0 = h1 ^ c1 ^ k0;
    c2 = h0 ^ c3 ^ k1;
    c1 = l1;
    c3 = l0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const uint64_t bits = (static_cast<uint64_t>(c1) << 32 | c0) >> 11;
  return static_cast<double>(bits) * 0x1p-53;
}

struct Shared {
  alignas(16) double value[kMost];
  alignas(16) double before[kMost + 8];  // the sum of the values before
  int first, last;
  vocab::pass::Chain chain;
};

// before[i] = start + value[0] + ... + value[i - 1], by one thread; values to a multiple of 8 exist (0 past n).
__device__ __forceinline__ void run_chain(Shared& sh, int n, double start) {
  double sum = start;
  for (int i = 0; i < n; i += 8) {
    double v[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = sh.value[i + j];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      sh.before[i + j] = sum;
      sum += v[j];
    }
  }
  sh.before[(n + 7) / 8 * 8] = sum;
}

// The first i with value[i] > 0 at which the sum exceeds the goal; else the last with value[i] > 0; -1 if there is none.
__device__ int search(Shared& sh, int n, double goal) {
  if (threadIdx.x == 0) {
    sh.first = kMost;
    sh.last = -1;
  }
  __syncthreads();
  int first = kMost, last = -1;
  for (int i = threadIdx.x; i < n; i += kThreads) {
    if (!(sh.value[i] > 0)) continue;
    last = i;
    if (first == kMost && sh.before[i + 1] > goal) first = i;
  }
  if (first < kMost) atomicMin(&sh.first, first);
  if (last >= 0) atomicMax(&sh.last, last);
  __syncthreads();
  const int found = sh.first < kMost ? sh.first : sh.last;
  __syncthreads();
  return found;
}

// The lowest token in [begin, end) whose z equals top, or 0.
__device__ int lowest(const float* z, int64_t begin, int64_t end, float top, Shared& sh) {
  if (threadIdx.x == 0) sh.first = 0x7fffffff;
  __syncthreads();
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads)
    if (z[i] == top) {
      atomicMin(&sh.first, static_cast<int>(i));
      break;
    }
  __syncthreads();
  return sh.first == 0x7fffffff ? 0 : sh.first;
}

// As the CPU's greedy() without knowing more than the logits.
__device__ int greedy_of_all(const float* z, int64_t vocab, Shared& sh) {
  float top = -FLT_MAX;
  for (int64_t i = threadIdx.x; i < vocab; i += kThreads) top = fmaxf(top, z[i]);
  for (int s = 16; s > 0; s /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, s));
  __syncthreads();
  if (threadIdx.x % 32 == 0) sh.value[threadIdx.x / 32] = top;
  __syncthreads();
  for (int w = 0; w < kThreads / 32; ++w) top = fmaxf(top, static_cast<float>(sh.value[w]));
  return lowest(z, 0, vocab, top, sh);
}

__device__ int greedy(const vocab::RowPass& p, const float* z, int64_t row, Shared& sh) {
  const int blocks = p.blocks();
  const float top = p.next[(row + 1) * blocks - 1];
  if (top == -FLT_MAX) return greedy_of_all(z, p.vocab, sh);
  if (threadIdx.x == 0) sh.last = blocks;
  __syncthreads();
  for (int b = threadIdx.x; b < blocks; b += kThreads)
    if (p.block_top[row * blocks + b] == top) {
      atomicMin(&sh.last, b);
      break;
    }
  __syncthreads();
  const int64_t begin = sh.last * kBlock;
  return lowest(z, begin, min(begin + kBlock, p.vocab), top, sh);
}

__device__ __forceinline__ int chunk_blocks_of(int blocks) {
  return static_cast<int>((blocks + kMostChunks - 1) / kMostChunks);
}

// draw() of the CPU, see there for what it means, after the sums over chunks and before each of them.
__device__ int draw_token(const vocab::RowPass& p, const float* z, float inv_temperature, int64_t row,
                          uint64_t seed, int64_t position, int chunks, Shared& sh) {
  const int blocks = p.blocks(), chunk_blocks = chunk_blocks_of(blocks);
  const float top = p.next[(row + 1) * blocks - 1];
  const double total = sh.before[(chunks + 7) / 8 * 8];
  if (!(total > 0 && total <= DBL_MAX)) return greedy_of_all(z, p.vocab, sh);
  const double goal = uniform(seed, static_cast<uint64_t>(position)) * total;
  const int pick = search(sh, chunks, goal);
  const double start = sh.before[pick];
  __syncthreads();
  const int64_t begin = static_cast<int64_t>(pick) * chunk_blocks * kBlock;
  const int n = static_cast<int>(min(static_cast<int64_t>(chunk_blocks) * kBlock, p.vocab - begin));
  for (int i = threadIdx.x; i < (n + 7) / 8 * 8; i += kThreads)
    sh.value[i] = i < n ? static_cast<double>(math::exp(z[begin + i] * inv_temperature - top)) : 0.0;
  __syncthreads();
  if (threadIdx.x == 0) run_chain(sh, n, start);
  __syncthreads();
  return static_cast<int>(begin) + search(sh, n, goal);
}

__global__ void __launch_bounds__(kThreads) draw(const Draw d) {
  __shared__ Shared sh;
  wait_for_previous();
  let_next_start();
  const int64_t row = blockIdx.x;
  const DeviceSampling s = d.params[row];
  const bool changed = d.drawn.logits != nullptr && d.drawn.inv_temperature(row) != 0.0f;
  const vocab::RowPass& p = changed ? d.drawn : d.plain;
  const float* const z = p.logits + row * p.ld;
  const int blocks = p.blocks(), chunk_blocks = chunk_blocks_of(blocks);
  const int chunks = (blocks + chunk_blocks - 1) / chunk_blocks;
  const bool greedily = s.greedy != 0;
  if (!greedily)
    for (int c = threadIdx.x; c < (chunks + 7) / 8 * 8; c += kThreads) {
      double sum = 0;
      for (int b = c * chunk_blocks; b < min((c + 1) * chunk_blocks, blocks); ++b)
        sum += static_cast<double>(p.draw_sum[row * blocks + b]);
      sh.value[c] = sum;
    }
  // The plain policy's statistics by the first warp, the sums for drawing by the second.
  vocab::pass::Running running;
  for (int first = 0; first < blocks; first += vocab::pass::kChainTile) {
    vocab::pass::load_chain<kThreads>(d.plain, row, first, sh.chain);
    if (threadIdx.x < 32)
      vocab::pass::run_chain(sh.chain, min(vocab::pass::kChainTile, blocks - first), running);
    else if (threadIdx.x == 32 && first == 0 && !greedily)
      run_chain(sh, chunks, 0.0);
    __syncthreads();
  }
  const int token = greedily ? greedy(p, z, row, sh)
                             : draw_token(p, z, p.inv_temperature(row), row, s.seed, s.position, chunks, sh);
  if (threadIdx.x != 0) return;
  const LogitStats stats = vocab::pass::finish(d.plain.next[(row + 1) * blocks - 1], running);
  d.tokens[row] = token;
  if (d.logprob != nullptr)
    d.logprob[row] = s.inv_temperature * d.plain.logits[row * d.plain.ld + token] - stats.lse;
  if (d.entropy != nullptr) d.entropy[row] = stats.entropy;
}

}  // namespace
}  // namespace sampling

void sample_tokens(Device& device, int64_t rows, int64_t vocab, const float* logits, int64_t ld,
                   const DeviceSampling* params, const SeenToken* seen, const TokenBias* bias, bool plain,
                   int32_t* tokens, float* logprob, float* entropy) {
  PERIGEE_CHECK(rows >= 0 && vocab > 0 && ld >= vocab && vocab <= sampling::kMostVocab);
  if (rows == 0) return;
  DeviceScratch::Mark mark(device.scratch);
  sampling::Draw d = {};
  d.plain.logits = logits;
  d.plain.ld = ld;
  d.plain.rows = rows;
  d.plain.vocab = vocab;
  d.plain.scale = {&params->inv_temperature, sizeof(DeviceSampling), 1.0f};
  d.plain.take(device.scratch, true);
  d.params = params;
  d.tokens = tokens;
  d.logprob = logprob;
  d.entropy = entropy;
  vocab::row_pass<true>(device, d.plain);
  if (!plain) {
    float* const z = device.scratch.take<float>(rows * vocab);
    float* const scale = device.scratch.take<float>(rows);
    sampling::modify_rows(device, rows, vocab, logits, ld, params, seen, bias, z, scale);
    d.drawn = d.plain;
    d.drawn.logits = z;
    d.drawn.ld = vocab;
    d.drawn.scale = {scale, sizeof(float), 1.0f};
    d.drawn.take(device.scratch, true);
    vocab::row_pass<true>(device, d.drawn);
  }
  launch_dependent(sampling::draw, dim3(static_cast<unsigned>(rows)), dim3(sampling::kThreads), 0,
                   device.stream(), d);
}

}  // namespace perigee::kernels
