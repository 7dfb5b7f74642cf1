// Sampling parameters as JSON, in leases, stores and configurations.
#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>

#include "base/error.h"
#include "rollout/wire/protocol.h"

namespace perigee::rollout {
namespace {

constexpr const char* kNever = "-inf";  // JSON has no infinity

}  // namespace

Json sampling_to_json(const kernels::SamplingParams& p) {
  const kernels::SamplingParams plain;
  Json value = Json::object();
  if (p.top_k != plain.top_k) value["top_k"] = p.top_k;
  if (p.top_p != plain.top_p) value["top_p"] = p.top_p;
  if (p.min_p != plain.min_p) value["min_p"] = p.min_p;
  if (p.repetition_penalty != plain.repetition_penalty) value["repetition_penalty"] = p.repetition_penalty;
  if (p.presence_penalty != plain.presence_penalty) value["presence_penalty"] = p.presence_penalty;
  if (p.frequency_penalty != plain.frequency_penalty) value["frequency_penalty"] = p.frequency_penalty;
  if (!p.logit_bias.empty()) value["logit_bias"] = logit_bias_to_json(p.logit_bias);
  return value;
}

std::optional<kernels::SamplingParams> sampling_from_json(const Json& value, float temperature) {
  if (!value.is_object()) return std::nullopt;
  kernels::SamplingParams p;
  p.temperature = temperature;
  for (const auto& [key, v] : value.items()) {
    if (key == "logit_bias") {
      auto bias = logit_bias_from_json(v);
      if (!bias) return std::nullopt;
      p.logit_bias = std::move(*bias);
      continue;
    }
    if (key == "top_k") {
      const auto k = field<int32_t>(value, "top_k");
      if (!k) return std::nullopt;
      p.top_k = *k;
      continue;
    }
    const auto number = field<double>(value, key.c_str());
    const float x = number ? static_cast<float>(*number) : std::numeric_limits<float>::infinity();
    if (!std::isfinite(x)) return std::nullopt;
    if (key == "top_p") {
      p.top_p = x;
    } else if (key == "min_p") {
      p.min_p = x;
    } else if (key == "repetition_penalty") {
      p.repetition_penalty = x;
    } else if (key == "presence_penalty") {
      p.presence_penalty = x;
    } else if (key == "frequency_penalty") {
      p.frequency_penalty = x;
    } else {
      return std::nullopt;
    }
  }
  return p;
}

Json logit_bias_to_json(const LogitBias& bias) {
  Json value = Json::object();
  for (const auto& [token, added] : bias) {
    Json& place = value[std::to_string(token)];
    PERIGEE_CHECK(place.is_null(), "token {} is there twice", token);
    if (std::isinf(added))
      place = kNever;
    else
      place = added;
  }
  return value;
}

std::optional<LogitBias> logit_bias_from_json(const Json& value) {
  if (!value.is_object()) return std::nullopt;
  LogitBias bias;
  for (const auto& [key, v] : value.items()) {
    int32_t token = 0;
    const auto [end, error] = std::from_chars(key.data(), key.data() + key.size(), token);
    // In one form only ("7", not "07"), so that no token is there twice.
    if (error != std::errc{} || end != key.data() + key.size() || token < 0 || std::to_string(token) != key)
      return std::nullopt;
    float added = -std::numeric_limits<float>::infinity();
    if (v.is_number())
      added = v.get<float>();
    else if (v != kNever)
      return std::nullopt;
    if (v.is_number() && !std::isfinite(added)) return std::nullopt;
    bias.emplace_back(token, added);
  }
  std::sort(bias.begin(), bias.end());
  return bias;
}

}  // namespace perigee::rollout
