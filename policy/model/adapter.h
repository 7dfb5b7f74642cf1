// Low-rank adapters (LoRA) beside a frozen model: y = W x + scale * B (A x), A [rank, k], B [n, rank], scale = alpha / rank.
// W is a weight matrix of the model, whole; or, where this program packs two of the checkpoint in one tensor (gate_proj
// over up_proj, an expert's w1 over its w3), one of the two. Each expert has adapters of its own.
//
// NUMERICS, the same in engine and learner, prefill and decode: low = scale * (A x), rounded to the type of activations;
// float activations: y = W x, one chain, plus B low, one chain, added once. bfloat16 on a GPU: the chain of W x goes on
// over B low in the same float32 sum, rounded once; of experts W x, A x, low, B low and their sum are each rounded. So B = 0
// gives the bits of the model alone, and a row's bits never depend on its batch.
//
// An AdapterLayout is an ArenaLayout: the weights arena of the adapters (the model's dtype and form of matrices) is what
// engines and learners are handed, the flat arena holds gradient, moments and masters. Nothing of the model is trained.
#pragma once
#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "policy/model/params.h"

namespace perigee::policy {

inline constexpr int64_t kMostRank = 64;  // one tile across

struct LoraConfig {
  int64_t rank = 16;  // 1..kMostRank; a multiple of 8 for bfloat16 on a GPU
  double alpha = 32;
  // Modules by their last name in the checkpoint. Of every layer that has one: q_proj, k_proj, v_proj, o_proj, f_a_proj,
  // f_b_proj, a_proj, b_proj, e_a_proj, e_b_proj, g_a_proj, g_b_proj (linear mixers, docs/mixers.md), kv_a_proj_with_mqa
  // (MLA), gate_proj, up_proj, down_proj (dense layers and shared experts), w1, w3, w2 (gate, up, down of every single expert).
  std::vector<std::string> targets = {"q_proj", "k_proj", "v_proj", "o_proj"};
  uint64_t seed = 0;  // of the first weights

  float scale() const { return static_cast<float>(alpha / static_cast<double>(rank)); }
  bool operator==(const LoraConfig&) const = default;
};

// The object {rank, alpha, targets, seed}, each with its default above (alpha: twice the rank). where and prefix are JsonReader's.
// ERRORS (input): one line for a key or target that is unknown (with the nearest known one), a target given twice, one
// that this program cannot adapt (kv_b_proj, router, embedding, head) with the reason, a number out of range.
LoraConfig parse_lora_config(const nlohmann::json& value, std::string_view where, std::string_view prefix = "lora");
nlohmann::json to_json(const LoraConfig& config);

class AdapterLayout : public ArenaLayout {
 public:
  // base outlives it. ERRORS (input): a target that no layer of the model has; a rank that the form of matrices does not
  // take; gate_proj or up_proj of a width that cannot be cut between the two.
  AdapterLayout(const ParamLayout& base, LoraConfig config);

  const ParamLayout& base() const { return base_; }
  const LoraConfig& config() const { return config_; }
  float scale() const { return config_.scale(); }

  // Rows [row, row + n) of the base's tensor `base`.
  struct Adapter {
    std::string module;  // "model.layers.3.self_attn.q_proj", as in the checkpoint
    int base = -1;
    int64_t row = 0, n = 0, k = 0;
    int a = -1, b = -1;  // tensors of this layout: A [rank, k], B [n, rank]
  };
  const std::vector<Adapter>& adapters() const { return adapters_; }
  const Adapter& adapter(int i) const { return adapters_[static_cast<size_t>(i)]; }

  // An adapted tensor of the base as the pieces it is multiplied in, in order; empty: not adapted.
  struct Part {
    int64_t row, n;
    int adapter;  // -1: none
  };
  std::span<const Part> parts(int base_tensor) const;

  // Float row-major values of tensor i of this layout out of, or into, a flat arena.
  void read_flat(const float* flat, int i, float* values) const;
  void write_flat(float* flat, int i, const float* values) const;

 private:
  const ParamLayout& base_;
  LoraConfig config_;
  std::vector<Adapter> adapters_;
  std::vector<Part> parts_;
  struct Range {
    int32_t begin = 0, count = 0;
  };
  std::vector<Range> of_tensor_;  // [base tensors] into parts_
};

// The first weights, flat: A normal with variance 1/k, so that A x is as large as x; B zero, so that the policy is the
// model's. A pure function of (layout, layout.config().seed); each tensor has its own stream.
void initialize_adapter(const AdapterLayout& layout, float* flat);

}  // namespace perigee::policy
