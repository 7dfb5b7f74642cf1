#include "apps/model/model_files.h"

#include <charconv>

#include "base/error.h"
#include "base/text.h"
#include "policy/learn/backend.h"
#include "policy/weights/adapter_checkpoint.h"
#include "policy/weights/checkpoint.h"

namespace perigee::apps {

policy::Dtype parse_dtype(const std::string& name) {
  if (name == "float32") return policy::Dtype::kF32;
  if (name == "bfloat16") return policy::Dtype::kBf16;
  throw_input("--dtype {}: float32 or bfloat16 is expected", quote(name));
}

OpenModel::OpenModel(const std::string& directory, const std::string& dtype) {
  if (policy::is_adapter_directory(directory)) {
    open_adapters(directory, dtype);
    return;
  }
  open(directory, dtype == "auto" ? policy::load_model_config(directory).dtype : parse_dtype(dtype));
}

void OpenModel::open(const std::string& directory, policy::Dtype dtype) {
  policy::LoadedModel model = policy::load_model(directory, dtype);
  layout_ = model.layout;
  weights_ = policy::ResidentWeights::create(nullptr, layout_->weight_bytes());
  layout_->flat_to_weights(model.flat.data(), weights_.writable());
  tokenizer_ = policy::load_tokenizer(directory, layout_->config());
}

void OpenModel::open_adapters(const std::string& directory, const std::string& dtype) {
  const policy::AdapterHead head = policy::read_adapter_head(directory);
  const policy::Dtype type = parse_dtype(dtype == "auto" ? head.base.dtype : dtype);
  const std::string path = head.base.model.value("path", "");
  if (!path.empty()) {
    open(path, type);
  } else {
    if (head.base.model.value("made_on", "") != "cpu" || !head.base.model.contains("seed"))
      throw_input("{}: its adapters stand beside a model that a GPU made from a seed, which the CPU cannot make again", directory);
    layout_ = std::make_shared<const policy::ParamLayout>(policy::load_model_config(directory), type);
    std::vector<float> flat(static_cast<size_t>(layout_->elements()));
    policy::initialize(*layout_, head.base.model["seed"].get<uint64_t>(), flat.data());
    weights_ = policy::ResidentWeights::create(nullptr, layout_->weight_bytes());
    layout_->flat_to_weights(flat.data(), weights_.writable());
    tokenizer_ = policy::load_tokenizer(directory, layout_->config());
  }
  // Of bfloat16 at a path the fingerprint may be of the form that a GPU computes with, which is not made here.
  if (dtype == "auto" && (path.empty() || type == policy::Dtype::kF32))
    if (const std::string mine = policy::weights_fingerprint(weights_.data(), weights_.bytes()); mine != head.base.fingerprint)
      throw_input("{}: its adapters belong to a model with fingerprint {}, and {} gives one with {}", directory,
                  head.base.fingerprint, path.empty() ? "the seed" : path, mine);
  adapters_ = std::make_unique<const policy::AdapterLayout>(*layout_, head.lora);
  adapter_arena_ = policy::ResidentWeights::create(nullptr, adapters_->weight_bytes());
  adapters_->flat_to_weights(policy::load_adapter(directory, *adapters_).data(), adapter_arena_.writable());
}

std::string OpenModel::fingerprint() const {
  std::string word = policy::weights_fingerprint(weights_.data(), weights_.bytes());
  if (adapters_) word += "+" + policy::weights_fingerprint(adapter_arena_.data(), adapter_arena_.bytes());
  return word;
}

std::unique_ptr<policy::Backend> OpenModel::engine_backend(kernels::Context& ctx, int64_t memory_bytes) const {
  return adapters_ ? policy::host_backend(ctx, *adapters_, weights_.data(), memory_bytes)
                   : policy::host_backend(ctx, *layout_, memory_bytes);
}

std::unique_ptr<policy::Trainer> OpenModel::trainer(kernels::Context& ctx) const {
  const policy::TrainerConfig config;
  if (!adapters_) return std::make_unique<policy::Trainer>(ctx, *layout_, config);
  return std::make_unique<policy::Trainer>(policy::host_learn_backend(ctx, *adapters_, weights_.data(), config.recompute),
                                           *adapters_, config);
}

std::vector<int32_t> parse_ids(const std::string& text, int64_t vocab) {
  std::vector<int32_t> ids;
  const char* p = text.data();
  const char* const end = p + text.size();
  while (p < end) {
    if (*p == ',' || *p == ' ' || *p == '\n' || *p == '\t' || *p == '[' || *p == ']') {
      ++p;
      continue;
    }
    int64_t id = 0;
    const auto [after, error] = std::from_chars(p, end, id);
    if (error != std::errc{})
      throw_input("--ids: {} is not a token id",
                  quote(std::string_view(p, static_cast<size_t>(end - p)), 20));
    if (id < 0 || id >= vocab)
      throw_input("--ids: token id {} is outside the vocabulary, 0 to {}", id, vocab - 1);
    ids.push_back(static_cast<int32_t>(id));
    p = after;
  }
  return ids;
}

void declare_sampling(Command& command, SamplingOptions& o) {
  command.option("--temperature", o.temperature, "X", "0: always the most likely token")
      .option("--top-k", o.top_k, "N", "only the N most likely tokens; 0: off")
      .option("--top-p", o.top_p, "X", "only the most likely tokens that make up this probability; 1: off")
      .option("--min-p", o.min_p, "X", "no token less likely than X times the most likely; 0: off")
      .option("--repetition-penalty", o.repetition_penalty, "X", "1: off")
      .option("--presence-penalty", o.presence_penalty, "X", "0: off")
      .option("--frequency-penalty", o.frequency_penalty, "X", "0: off")
      .list("--logit-bias", o.logit_bias, "ID=B",
            "adds B to the logit of this token; -inf: never; may be repeated")
      .option("--seed", o.seed, "N", "the same seed gives the same tokens");
}

namespace {
std::pair<int32_t, float> parse_bias(const std::string& text) {
  int32_t id = 0;
  float bias = 0;
  const char* const end = text.data() + text.size();
  const auto [equals, error] = std::from_chars(text.data(), end, id);
  if (error == std::errc{} && equals != end && *equals == '=')
    if (const auto [after, wrong] = std::from_chars(equals + 1, end, bias);
        wrong == std::errc{} && after == end)
      return {id, bias};
  throw_input("--logit-bias {}: ID=B is expected, a token id and a number", quote(text));
}
}  // namespace

kernels::SamplingParams SamplingOptions::params(int64_t vocab) const {
  kernels::SamplingParams p;
  p.temperature = static_cast<float>(temperature);
  if (top_k < 0 || top_k > INT32_MAX) throw_input("--top-k {}: 0 or more is expected", top_k);
  p.top_k = static_cast<int32_t>(top_k);
  p.top_p = static_cast<float>(top_p);
  p.min_p = static_cast<float>(min_p);
  p.repetition_penalty = static_cast<float>(repetition_penalty);
  p.presence_penalty = static_cast<float>(presence_penalty);
  p.frequency_penalty = static_cast<float>(frequency_penalty);
  for (const std::string& bias : logit_bias) p.logit_bias.push_back(parse_bias(bias));
  p.validate(vocab);
  return p;
}

}  // namespace perigee::apps
