// Held, saved, restored and constrained sequences on a GPU: over float32 the bits of the CPU, over bfloat16 the bits of a
// sequence that was never stopped.
#include <algorithm>
#include <map>

#include "base/random.h"
#include "policy/device/backend.h"
#include "policy/engine/engine.h"
#include "tests/kernels/device_fixture.h"
#include "tests/policy/small_model.h"

namespace perigee::policy {
namespace {

using testing::small_config;

// Allows a few tokens that depend on those accepted.
class FewTokens : public TokenConstraint {
 public:
  FewTokens(int64_t vocab, uint64_t seed) : vocab_(vocab), seed_(seed) {}
  std::span<const uint32_t> allowed() override {
    mask_.assign(static_cast<size_t>(vocab_ + 31) / 32, 0);
    Random random(derive_seed(seed_, position_));
    for (int i = 0; i < 5; ++i) {
      const int64_t t = random.next_int(3, vocab_ - 1);
      mask_[static_cast<size_t>(t / 32)] |= 1u << (t % 32);
    }
    return mask_;
  }
  void accept(int32_t token) override {
    EXPECT_TRUE(allows(allowed(), token));
    ++position_;
  }
  std::unique_ptr<TokenConstraint> clone() const override { return std::make_unique<FewTokens>(*this); }

 private:
  int64_t vocab_;
  uint64_t seed_, position_ = 0;
  std::vector<uint32_t> mask_;
};

struct Heard {
  std::vector<int32_t> tokens;
  std::vector<float> logprobs;
  std::vector<std::pair<int32_t, float>> top;

  bool operator==(const Heard&) const = default;
  void add(const GeneratedToken& t) {
    tokens.push_back(t.token);
    logprobs.push_back(t.logprob);
    top.insert(top.end(), t.top.begin(), t.top.end());
  }
};

std::vector<int32_t> random_tokens(Random& random, int64_t vocab, int64_t n) {
  std::vector<int32_t> t;
  for (; n > 0; --n) t.push_back(static_cast<int32_t>(random.next_int(3, vocab - 1)));
  return t;
}

std::map<uint64_t, Heard> finish(Engine& engine) {
  std::map<uint64_t, Heard> heard;
  std::vector<GeneratedToken> out;
  while (!engine.idle()) engine.step(out);
  for (const GeneratedToken& t : out) heard[t.id].add(t);
  return heard;
}

// Four sessions in three turns each; every other one is constrained, one wants the most likely tokens, one the
// log-probabilities of what is fed. Before the last turn two are saved and restored, and one is forked.
std::map<uint64_t, Heard> converse(Engine& engine, int64_t vocab, bool travel) {
  Random random(3);
  std::map<uint64_t, Heard> heard;
  std::map<uint64_t, int64_t> prompt;
  for (uint64_t id = 1; id <= 4; ++id) EXPECT_TRUE(engine.restore({id, 50 + id, {}, -1, nullptr}));
  for (int turn = 0; turn < 3; ++turn) {
    for (uint64_t id = 1; id <= 4; ++id) {
      if (turn == 2 && travel && id <= 2) {
        const std::vector<int32_t> tokens(engine.tokens(id).begin(), engine.tokens(id).end());
        const auto snapshot = std::make_shared<const Snapshot>(engine.save(id));
        engine.release(id);
        EXPECT_TRUE(engine.restore({id, 50 + id, tokens, prompt[id], snapshot}));
      }
      if (turn == 2 && travel && id == 3) {
        EXPECT_TRUE(engine.fork(3, 9));
        engine.release(3);
        EXPECT_TRUE(engine.fork(9, 3));
        engine.release(9);
      }
      Extension x;
      x.tokens = random_tokens(random, vocab, random.next_int(1, 90));
      if (turn == 0) prompt[id] = static_cast<int64_t>(x.tokens.size());
      x.max_new_tokens = random.next_int(5, 30);
      x.seed = 50 + id;
      x.sampling.emplace();
      if (id == 2) x.sampling->top_p = 0.8f;
      if (id % 2 == 0) x.constraint = std::make_shared<FewTokens>(vocab, id + static_cast<uint64_t>(turn));
      if (id == 3) x.top_logprobs = 7;
      if (id >= 3) x.prompt_logprobs = true;
      EXPECT_TRUE(engine.extend(id, x));
    }
    for (auto& [id, h] : finish(engine)) {
      Heard& all = heard[id];
      all.tokens.insert(all.tokens.end(), h.tokens.begin(), h.tokens.end());
      all.logprobs.insert(all.logprobs.end(), h.logprobs.begin(), h.logprobs.end());
      all.top.insert(all.top.end(), h.top.begin(), h.top.end());
    }
  }
  for (uint64_t id = 1; id <= 4; ++id) engine.release(id);
  EXPECT_EQ(engine.stats().memory_used_bytes, 0);
  return heard;
}

class HeldOnDevice : public kernels::DeviceTest {};

TEST_F(HeldOnDevice, float32_converses_in_the_bits_of_the_cpu) {
  const ModelConfig config = small_config();
  const ParamLayout layout(config, Dtype::kF32);
  testing::Arena arena(layout);
  std::vector<float> flat(static_cast<size_t>(layout.elements()));
  initialize(layout, 4, flat.data());
  layout.flat_to_weights(flat.data(), arena.data());
  kernels::Context ctx(4);
  Engine cpu(ctx, layout, {});
  cpu.set_weights(arena.data(), 1);
  const auto want = converse(cpu, config.vocab_size, false);
  for (const bool travel : {false, true}) {
    EngineConfig c;
    c.prefill_chunk = travel ? 37 : 512;
    Engine engine(device_backend(device(), layout, c), layout, c);
    engine.set_weights(arena.data(), 1);
    const auto got = converse(engine, config.vocab_size, travel);
    for (uint64_t id = 1; id <= 4; ++id) {
      EXPECT_EQ(got.at(id).tokens, want.at(id).tokens) << id;
      EXPECT_EQ(got.at(id).logprobs, want.at(id).logprobs) << id;
      EXPECT_EQ(got.at(id).top, want.at(id).top) << id;
    }
  }
}

TEST_F(HeldOnDevice, bfloat16_goes_on_as_if_it_had_not_stopped) {
  ModelConfig config = small_config();
  config.num_heads = config.linear_heads = 4;
  config.vocab_size = 320;
  config.hidden_size = 64;
  config.intermediate_size = 96;
  config.moe_intermediate_size = 32;
  config.kv_lora_rank = 64;
  config.qk_nope_head_dim = config.qk_rope_head_dim = config.v_head_dim = 16;
  config.dtype = Dtype::kBf16;
  const ParamLayout layout(config, Dtype::kBf16, MatrixForm::kTiles);
  testing::Arena arena(layout);
  std::vector<float> flat(static_cast<size_t>(layout.elements()));
  initialize(layout, 5, flat.data());
  layout.flat_to_weights(flat.data(), arena.data());
  std::map<uint64_t, Heard> want;
  for (const bool travel : {false, true}) {
    EngineConfig c;
    c.prefill_chunk = travel ? 37 : 512;
    Engine engine(device_backend(device(), layout, c), layout, c);
    engine.set_weights(arena.data(), 1);
    const auto got = converse(engine, config.vocab_size, travel);
    if (!travel) want = got;
    EXPECT_TRUE(got == want);
  }
}

}  // namespace
}  // namespace perigee::policy
