// The losses on the device: gradients and statistics with the bits of the CPU, for every kind, correction and estimator.
#include "kernels/loss/loss_device.h"
#include "tests/kernels/device_fixture.h"
#include "tests/kernels/loss/loss_case.h"

namespace perigee {
namespace {

using namespace kernels;

class LossDevice : public DeviceTest {};

// Which arrays the batch has.
struct Present {
  bool old = true, mu = true, ref = true, entropy = true, mask = true;
};

struct Both {
  LossStats cpu, gpu;
};

// One call on either side with statistics that go on from those given; compares the gradients.
void run_both(Device& d, const LossConfig& c, const Packed<float>& p, const Present& has, Both& stats) {
  check_config(c);
  const auto tokens = static_cast<int64_t>(p.logprob.size());
  LossBatch<float> cpu = p.view();
  if (!has.old) cpu.old = nullptr;
  if (!has.mu) cpu.mu = nullptr;
  if (!has.ref) cpu.ref = nullptr;
  if (!has.entropy) cpu.entropy = nullptr;
  if (!has.mask) cpu.mask = nullptr;
  Normalizer norm = count(cpu);
  norm.sequences += 3;  // as a part of a step
  norm.tokens += 11;
  std::vector<float> dlogprob(p.logprob.size(), 777.0f), dentropy(p.logprob.size(), 777.0f);
  policy_loss(c, norm, cpu, dlogprob.data(), dentropy.data(), stats.cpu);

  DeviceArray<int64_t> offsets(d, p.offsets);
  DeviceArray<float> logprob(d, p.logprob), old(d, p.old), mu(d, p.mu), ref(d, p.ref), entropy(d, p.entropy),
      to_logprob(d, tokens), to_entropy(d, tokens);
  DeviceArray<uint8_t> mask(d, p.mask);
  DeviceArray<double> advantage(d, p.advantage);
  DeviceArray<LossStats> device_stats(d, std::vector<LossStats>{stats.gpu});
  LossBatch<float> gpu = cpu;
  gpu.offsets = offsets;
  gpu.logprob = logprob;
  gpu.old = has.old ? old.data() : nullptr;
  gpu.mu = has.mu ? mu.data() : nullptr;
  gpu.ref = has.ref ? ref.data() : nullptr;
  gpu.entropy = has.entropy ? entropy.data() : nullptr;
  gpu.mask = has.mask ? mask.data() : nullptr;
  gpu.advantage = advantage;
  policy_loss(d, c, norm, gpu, tokens, to_logprob, to_entropy, device_stats);
  stats.gpu = device_stats.get()[0];
  EXPECT_EQ(first_difference(to_logprob.get(), dlogprob), -1);
  EXPECT_EQ(first_difference(to_entropy.get(), dentropy), -1);
}

void expect_equal(const LossStats& got, const LossStats& want) {
  EXPECT_EQ(std::memcmp(&got, &want, sizeof got), 0)
      << "loss " << got.loss << " against " << want.loss << ", policy " << got.policy_loss << " "
      << want.policy_loss << ", kl " << got.kl_sum << " " << want.kl_sum << ", ratio " << got.ratio_sum << " "
      << want.ratio_sum << ", mismatch " << got.mismatch_sum << " " << want.mismatch_sum << " "
      << got.mismatch_max << " " << want.mismatch_max << ", tokens " << got.tokens << " " << want.tokens
      << ", clipped " << got.clipped_tokens << " " << want.clipped_tokens << ", dropped "
      << got.dropped_tokens << " " << want.dropped_tokens;
}

TEST_F(LossDevice, every_loss_has_the_bits_of_the_cpu) {
  const Packed<float> one(random_batch(1, 0.3)), two(random_batch(2, 0.02));
  for (const auto kind : {LossKind::kGrpo, LossKind::kDrGrpo, LossKind::kDapo, LossKind::kGspo,
                          LossKind::kCispo, LossKind::kRloo, LossKind::kK15})
    for (const auto correction :
         {Correction::kNone, Correction::kTis, Correction::kIcepop, Correction::kSeqTis, Correction::kSeqMis})
      for (const auto kl : {KlKind::kK1, KlKind::kK2, KlKind::kK3}) {
        const bool by_sequence = kind == LossKind::kGspo || kind == LossKind::kK15;
        if (by_sequence && (correction == Correction::kTis || correction == Correction::kIcepop)) continue;
        LossConfig c = loss_defaults(kind);
        c.max_length = 50;
        c.correction = correction;
        c.cap = 1.3;
        c.icepop_low = 0.7;
        c.kl = kl;
        c.kl_coef = 0.04;
        c.entropy_coef = kl == KlKind::kK1 ? 0.0 : 0.01;
        c.veto = kl == KlKind::kK2 ? 0.5 : 0;
        SCOPED_TRACE(std::string(name(kind)) + " " + std::string(name(correction)) + " " +
                     std::string(name(kl)));
        Both stats;
        run_both(device(), c, one, {}, stats);
        run_both(device(), c, two, {}, stats);  // a second micro-batch of the step
        expect_equal(stats.gpu, stats.cpu);
      }
}

TEST_F(LossDevice, absent_arrays_mean_what_they_mean_on_the_cpu) {
  const Packed<float> p(random_batch(3, 0.2));
  for (int bits = 0; bits < 32; ++bits) {
    const Present has = {(bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0, (bits & 8) != 0,
                         (bits & 16) != 0};
    LossConfig c = loss_defaults(LossKind::kDapo);
    c.correction = Correction::kTis;
    if (has.ref) c.kl_coef = 0.1;
    SCOPED_TRACE(bits);
    Both stats;
    run_both(device(), c, p, has, stats);
    expect_equal(stats.gpu, stats.cpu);
  }
}

// Sequences longer than what is read at a time, and more of them.
TEST_F(LossDevice, long_sequences_sum_in_order) {
  std::vector<reference::LossSequence> all;
  for (uint64_t seed = 0; seed < 100; ++seed)
    for (auto& s : random_batch(50 + seed, 0.1)) all.push_back(s);
  for (const int repeats : {1, 30, 101}) {
    reference::LossSequence s = all[3];
    for (int i = 0; i < repeats; ++i)
      for (auto member :
           {&reference::LossSequence::logprob, &reference::LossSequence::old, &reference::LossSequence::mu,
            &reference::LossSequence::ref, &reference::LossSequence::entropy, &reference::LossSequence::mask})
        (s.*member).insert((s.*member).end(), (all[3].*member).begin(), (all[3].*member).end());
    all.push_back(s);
  }
  const Packed<float> p(all);
  for (const auto kind : {LossKind::kGrpo, LossKind::kGspo, LossKind::kK15, LossKind::kCispo}) {
    LossConfig c = loss_defaults(kind);
    c.kl_coef = 0.01;
    c.entropy_coef = 0.001;
    Both stats;
    run_both(device(), c, p, {}, stats);
    expect_equal(stats.gpu, stats.cpu);
  }
}

TEST_F(LossDevice, curated_tokens_have_the_bits_of_the_cpu) {
  const Packed<float> p(random_batch(9, 0.1));
  const auto tokens = static_cast<int64_t>(p.logprob.size());
  for (const bool with_mask : {true, false}) {
    std::vector<float> want(p.logprob.size());
    double loss = 0.25;
    loss += ptx_loss<float>(0.3, 2 * tokens, tokens, p.logprob.data(), with_mask ? p.mask.data() : nullptr,
                            want.data());
    DeviceArray<float> logprob(device(), p.logprob), gradient(device(), tokens);
    DeviceArray<uint8_t> mask(device(), p.mask);
    DeviceArray<double> sum(device(), std::vector<double>{0.25});
    ptx_loss(device(), 0.3, 2 * tokens, tokens, logprob, with_mask ? mask.data() : nullptr, gradient, sum);
    EXPECT_EQ(first_difference(gradient.get(), want), -1);
    EXPECT_EQ(sum.get()[0], loss);
  }
}

}  // namespace
}  // namespace perigee
