#include "bench/rig.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstring>

#include "base/error.h"
#include "kernels/simd/simd.h"

namespace perigee::bench {
namespace {

constexpr size_t kReadBytes = size_t{256} << 20;  // several times any last-level cache share of two cores
constexpr int kMinTurns = 5, kMinLongTurns = 3;

// 24 chains of multiply-adds: two units of latency 4 want 8, narrower vectors count double.
double fma_piece(int64_t steps) {
  using namespace simd;
#if defined(PERIGEE_SIMD_AVX512)
  constexpr int kChains = 24;
#else
  constexpr int kChains = 6;
#endif
  F16 sum[kChains];
  const F16 a = set1(0.999f), b = set1(1e-3f);
#pragma GCC unroll 24
  for (int c = 0; c < kChains; ++c) sum[c] = set1(static_cast<float>(c));
  for (int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 24
    for (int c = 0; c < kChains; ++c) sum[c] = fma(sum[c], a, b);
  }
  F16 all = zero();
#pragma GCC unroll 24
  for (int c = 0; c < kChains; ++c) all = add(all, sum[c]);
  volatile float keep = reduce_add(all);
  (void)keep;
  return static_cast<double>(steps) * kChains * kLanes * 2;
}

float read_piece(const float* p, int64_t floats) {
  using namespace simd;
  F16 sum[8];
  for (F16& s : sum) s = zero();
  for (int64_t i = 0; i < floats; i += 128) {
    __builtin_prefetch(p + i + 1024);
    __builtin_prefetch(p + i + 1088);
#pragma GCC unroll 8
    for (int c = 0; c < 8; ++c) sum[c] = add(sum[c], load(p + i + 16 * c));
  }
  F16 all = zero();
  for (const F16& s : sum) all = add(all, s);
  return reduce_add(all);
}

}  // namespace

double median(std::vector<double> v) {
  if (v.empty()) return 0;
  std::sort(v.begin(), v.end());
  const size_t n = v.size();
  return n % 2 == 1 ? v[n / 2] : 0.5 * (v[n / 2 - 1] + v[n / 2]);
}

HugeBuffer::HugeBuffer(size_t bytes) : bytes_(bytes) {
  constexpr size_t kHuge = size_t{2} << 20;
  const size_t rounded = (bytes + kHuge - 1) / kHuge * kHuge;
  data_ = static_cast<std::byte*>(std::aligned_alloc(kHuge, rounded));
  if (data_ == nullptr) throw_environment("out of memory: {} MiB for the bench", rounded >> 20);
  madvise(data_, rounded, MADV_HUGEPAGE);  // a wish: refused, the pages are small and the figures say so
}

HugeBuffer::~HugeBuffer() {
  std::free(data_);
}

Rig::Rig(const Options& options, Report& report, void (*done)(const Figure&))
    : options_(options), report_(report), done_(done), ctx_(options.threads), memory_(kReadBytes) {
  std::memset(memory_.data(), 0, memory_.size());
}

bool Rig::wants(const std::string& name) const {
  if (options_.what.empty()) return true;
  return std::any_of(options_.what.begin(), options_.what.end(),
                     [&](const std::string& w) { return name == w || name.starts_with(w + "-"); });
}

double Rig::fma_rate() {
  // Pieces of a tenth of a millisecond, so that a thread that the system holds up costs the other one little.
  constexpr int64_t kSteps = 20000;
  const int64_t pieces = 400 * ctx_.pool.size();
  std::atomic<int64_t> flops{0};
  const double t0 = now_s();
  ctx_.pool.parallel_for(pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) flops += static_cast<int64_t>(fma_piece(kSteps));
  });
  return fma_.emplace_back(static_cast<double>(flops.load()) / (now_s() - t0));
}

double Rig::read_rate() {
  constexpr int64_t kPiece = 1 << 18;  // floats
  const auto* p = reinterpret_cast<const float*>(memory_.data());
  std::atomic<float> keep{0};
  constexpr int64_t kPieces = static_cast<int64_t>(kReadBytes) / 4 / kPiece, kTimes = 4;
  const double t0 = now_s();
  ctx_.pool.parallel_for(kPieces * kTimes, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) keep = read_piece(p + i % kPieces * kPiece, kPiece);
  });
  return read_.emplace_back(static_cast<double>(kReadBytes) * kTimes / (now_s() - t0));
}

// At least one sample, and a tenth of the time that the turn beside it took: what a sample of some tens of milliseconds
// finds on a busy machine need not hold for seconds.
double Rig::ceiling(Bound bound, double turn_s) {
  if (bound == Bound::kNone) return 0;
  std::vector<double> samples;
  const double t0 = now_s();
  do samples.push_back(bound == Bound::kFma ? fma_rate() : read_rate());
  while (now_s() - t0 < 0.1 * turn_s);
  double inverse = 0;  // of equal work each: the harmonic mean is the rate
  for (const double s : samples) inverse += 1 / s;
  return static_cast<double>(samples.size()) / inverse;
}

void Rig::measure(Figure f, const std::function<double()>& turn) {
  const double first = now_s();
  turn();  // grows the buffers, wakes the threads, fills the caches
  std::vector<double> values, ceilings, shares;
  double spent = 0, before = ceiling(f.bound, now_s() - first);
  const auto enough = [&] {
    return spent >= options_.seconds &&
           f.turns >= (spent >= kMinTurns * options_.seconds ? kMinLongTurns : kMinTurns);
  };
  while (!enough()) {
    const double t0 = now_s(), units = turn(), dt = now_s() - t0, after = ceiling(f.bound, dt);
    const double mean = 0.5 * (before + after);
    before = after;
    values.push_back(units / dt);
    ceilings.push_back(mean);
    if (f.bound != Bound::kNone) shares.push_back(units / dt * f.work / mean);
    spent += dt;
    ++f.turns;
  }
  f.value = median(values);
  std::sort(values.begin(), values.end());
  f.low = values[values.size() / 4];
  f.high = values[values.size() * 3 / 4];
  f.ceiling = median(ceilings);
  f.limit = f.work > 0 ? f.ceiling / f.work : 0;
  f.share = median(shares);
  report_.fma_gflops = median(fma_) * 1e-9;
  report_.memory_gbs = median(read_) * 1e-9;
  report(f);
}

void Rig::report(const Figure& f) {
  report_.figures.push_back(f);
  if (done_ != nullptr) done_(f);
}

}  // namespace perigee::bench
