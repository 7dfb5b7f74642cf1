// Whole models of every token mixer, from docs/mixers.md: one sequence, token by token, each recurrence as its equation
// stands there. Shares no code with policy/ or kernels/; reads the configuration's JSON itself, and the parameters by
// their names in a checkpoint. In double it is the truth; in float it tells how much the precision alone costs, which
// is where tolerances come from; over Var (tests/policy/model/tape.h) it has gradients.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <numeric>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

namespace perigee::policy::reference {

template <class T>
using Tensors = std::map<std::string, std::vector<T>>;

inline double plain(double x) {
  return x;
}

template <class T>
T logistic(const T& x) {
  using std::exp;
  return T(1) / (T(1) + exp(T(0) - x));
}
template <class T>
T softplus(const T& x) {
  using std::exp;
  using std::log1p;
  return plain(x) > 0 ? x + log1p(exp(T(0) - x)) : log1p(exp(x));
}
template <class T>
T silu(const T& x) {
  return x * logistic(x);
}

template <class T>
T dot(std::span<const T> a, std::span<const T> b) {
  T sum(0);
  for (size_t i = 0; i < b.size(); ++i) sum = sum + a[i] * b[i];
  return sum;
}

// Of x over its own length; w may be shorter than a whole tensor.
template <class T>
std::vector<T> rms_norm(std::span<const T> x, std::span<const T> w, double eps) {
  using std::sqrt;
  const T scale = T(1) / sqrt(dot(x, x) / T(static_cast<double>(x.size())) + T(eps));
  std::vector<T> y;
  for (size_t i = 0; i < x.size(); ++i) y.push_back(x[i] * scale * w[i]);
  return y;
}
template <class T>
std::vector<T> l2_norm(std::span<const T> x, double scale) {
  using std::sqrt;
  const T inverse = T(1) / sqrt(dot(x, x) + T(1e-6));
  std::vector<T> y;
  for (const T& e : x) y.push_back(e * inverse * T(scale));
  return y;
}
template <class T>
std::vector<T> softmax(std::vector<T> x) {
  using std::exp;
  double largest = -INFINITY;
  for (const T& e : x) largest = std::max(largest, plain(e));
  T sum(0);
  for (T& e : x) sum = sum + (e = exp(e - T(largest)));
  for (T& e : x) e = e / sum;
  return x;
}

// x[0..r) at position t. The angle is a constant of the model, not an operation on its data: in double always.
template <class T>
void rotate(std::span<T> x, int64_t t, double theta) {
  const size_t half = x.size() / 2;
  for (size_t i = 0; i < half; ++i) {
    const double phi = static_cast<double>(t) *
                       std::pow(theta, -2.0 * static_cast<double>(i) / static_cast<double>(x.size()));
    const T c(std::cos(phi)), s(std::sin(phi)), a = x[i], b = x[i + half];
    x[i] = a * c - b * s;
    x[i + half] = b * c + a * s;
  }
}

// The name of each layer's mixer.
inline std::vector<std::string> mixers_of(const nlohmann::json& config) {
  const auto layers = config.at("num_hidden_layers").get<size_t>();
  std::vector<std::string> out(layers);
  if (config.contains("token_mixers")) {
    const nlohmann::json& names = config["token_mixers"];
    for (size_t i = 0; i < layers; ++i) out[i] = names[i % names.size()];
    return out;
  }
  for (const size_t i : config.at("linear_attn_config").at("kda_layers")) out.at(i - 1) = "kda";
  for (const size_t i : config.at("linear_attn_config").at("full_attn_layers")) out.at(i - 1) = "mla";
  return out;
}

template <class T>
class Model {
 public:
  using Vector = std::vector<T>;
  using View = std::span<const T>;

  // Both outlive it.
  Model(const nlohmann::json& config, const Tensors<T>& tensors)
      : config_(config), tensors_(tensors), mixers_(mixers_of(config)) {
    reset();
  }

  // Forgets the sequence.
  void reset() {
    position_ = 0;
    memory_.assign(mixers_.size(), {});
  }

  // The log-probability of each token after `token`, the next of the sequence.
  Vector step(int32_t token) {
    using std::exp;
    using std::log;
    const size_t D = size("hidden_size");
    const double eps = config_.at("rms_norm_eps");
    const View row = View(tensor("model.embed_tokens.weight")).subspan(static_cast<size_t>(token) * D, D);
    Vector x(row.begin(), row.end());
    layers_.clear();
    for (size_t i = 0; i < mixers_.size(); ++i) {
      prefix_ = "model.layers." + std::to_string(i) + ".";
      add(x, mix(i, rms_norm<T>(x, tensor(prefix_ + "input_layernorm.weight"), eps)));
      add(x, feed_forward(i, rms_norm<T>(x, tensor(prefix_ + "post_attention_layernorm.weight"), eps)));
      layers_.push_back(x);
    }
    ++position_;
    hidden_ = rms_norm<T>(x, tensor("model.norm.weight"), eps);
    Vector logits = times("lm_head.weight", hidden_);
    double largest = -INFINITY;
    for (const T& e : logits) largest = std::max(largest, plain(e));
    T sum(0);
    for (const T& e : logits) sum = sum + exp(e - T(largest));
    const T lse = log(sum) + T(largest);
    for (T& e : logits) e = e - lse;
    return logits;
  }

  // Of the last step: after the final norm, and the residual stream after each layer.
  const Vector& hidden() const { return hidden_; }
  const std::vector<Vector>& layers() const { return layers_; }

 private:
  struct Memory {
    std::vector<Vector> inputs[3];     // of the q, k and v convolutions, one for each token
    Vector state;                      // [H, d, d], keys down
    std::vector<Vector> keys, values;  // one for each token
  };

  size_t size(const char* key) const { return config_.at(key).get<size_t>(); }
  const nlohmann::json& linear() const { return config_.at("linear_attn_config"); }
  const Vector& tensor(const std::string& name) const {
    const auto it = tensors_.find(name);
    if (it == tensors_.end()) throw std::out_of_range("no tensor " + name);
    return it->second;
  }
  const Vector& self(const char* name) const { return tensor(prefix_ + "self_attn." + name); }
  Vector times(const std::string& name, View x) const {
    const Vector& w = tensor(name);
    Vector y;
    for (size_t i = 0; i < w.size(); i += x.size()) y.push_back(dot(View(w).subspan(i, x.size()), x));
    return y;
  }
  Vector project(const char* name, View x) const {
    return times(prefix_ + "self_attn." + name + ".weight", x);
  }
  static void add(Vector& x, const Vector& y) {
    for (size_t i = 0; i < x.size(); ++i) x[i] = x[i] + y[i];
  }

  Vector mix(size_t layer, View h) {
    const std::string& name = mixers_[layer];
    Memory& m = memory_[layer];
    if (name == "attention") return attention(m, h);
    if (name == "mla" || name == "mla_rope") return latent(m, h, name == "mla_rope");
    return recurrent(m, h, name);
  }

  // conv(W h), or SiLU alone.
  Vector convolved(std::vector<Vector>& inputs, const std::string& which, View h) {
    const size_t taps = linear().at("short_conv_kernel_size");
    Vector x = project((which + "_proj").c_str(), h);
    if (taps > 0) {
      inputs.push_back(x);
      const Vector& w = self((which + "_conv1d.weight").c_str());
      for (size_t c = 0; c < x.size(); ++c) {
        T sum(0);
        for (size_t back = 0; back < taps && back < inputs.size(); ++back)
          sum = sum + w[c * taps + taps - 1 - back] * inputs[inputs.size() - 1 - back][c];
        x[c] = sum;
      }
    }
    for (T& e : x) e = silu(e);
    return x;
  }

  Vector recurrent(Memory& m, View h, const std::string& mixer) {
    using std::exp;
    const size_t H = linear().at("num_heads"), d = linear().at("head_dim");
    const std::string gate = linear().value("output_gate", "sigmoid");
    const Vector q = convolved(m.inputs[0], "q", h), k = convolved(m.inputs[1], "k", h),
                 v = convolved(m.inputs[2], "v", h);
    const Vector &a_log = self("A_log"), &dt_bias = self("dt_bias"), &w = self("o_norm.weight");
    const bool wide = mixer == "kda" || mixer == "dplr";  // a decay for each channel
    const Vector f = wide             ? project("f_b_proj", project("f_a_proj", h))
                     : mixer == "gdn" ? project("a_proj", h)
                                      : project("b_proj", h);
    const Vector eta = mixer == "dplr" ? project("e_b_proj", project("e_a_proj", h)) : Vector();
    const Vector b = mixer == "kda" || mixer == "gdn" ? project("b_proj", h) : Vector();
    m.state.resize(H * d * d, T(0));
    Vector out;
    for (size_t head = 0; head < H; ++head) {
      T* S = &m.state[head * d * d];
      const auto mine = [&](const Vector& x) { return View(x).subspan(head * d, d); };
      const auto step_of = [&](size_t i) { return softplus(f[i] + dt_bias[i]); };
      Vector alpha, o(d, T(0));
      for (size_t i = 0; i < d; ++i)
        alpha.push_back(exp(T(0) - exp(a_log[head]) * step_of(wide ? head * d + i : head)));
      if (mixer == "mamba2") {
        const T delta = step_of(head);
        for (size_t i = 0; i < d; ++i)
          for (size_t j = 0; j < d; ++j)
            S[i * d + j] = alpha[i] * S[i * d + j] + mine(k)[i] * (delta * mine(v)[j]);
        for (size_t j = 0; j < d; ++j) {
          for (size_t i = 0; i < d; ++i) o[j] = o[j] + S[i * d + j] * mine(q)[i];
          o[j] = o[j] + self("D")[head] * mine(v)[j];
        }
      } else {
        const Vector key = l2_norm<T>(mine(k), 1),
                     query = l2_norm<T>(mine(q), 1 / std::sqrt(static_cast<double>(d)));
        const auto read = [&](size_t j) {
          T sum(0);
          for (size_t i = 0; i < d; ++i) sum = sum + S[i * d + j] * key[i];
          return sum;
        };
        if (mixer == "dplr") {
          for (size_t j = 0; j < d; ++j) {
            const T before = read(j);
            for (size_t i = 0; i < d; ++i) {
              const T strength = logistic(eta[head * d + i]) * key[i];
              S[i * d + j] = alpha[i] * S[i * d + j] - strength * before + strength * mine(v)[j];
            }
          }
        } else if (mixer == "kda" || mixer == "gdn") {
          const T beta = logistic(b[head]);
          for (size_t j = 0; j < d; ++j) {
            for (size_t i = 0; i < d; ++i) S[i * d + j] = alpha[i] * S[i * d + j];
            const T write = mine(v)[j] - read(j);
            for (size_t i = 0; i < d; ++i) S[i * d + j] = S[i * d + j] + beta * key[i] * write;
          }
        } else {
          throw std::invalid_argument("no mixer " + mixer);
        }
        for (size_t j = 0; j < d; ++j)
          for (size_t i = 0; i < d; ++i) o[j] = o[j] + S[i * d + j] * query[i];
      }
      const Vector normed = rms_norm<T>(o, w, config_.at("rms_norm_eps"));
      out.insert(out.end(), normed.begin(), normed.end());
    }
    if (gate != "none") {
      const Vector z = project("g_b_proj", project("g_a_proj", h));
      for (size_t i = 0; i < out.size(); ++i)
        out[i] = out[i] * (gate == "swish" ? silu(z[i]) : logistic(z[i]));
    }
    return project("o_proj", out);
  }

  // Softmax attention of one query over all keys so far.
  static Vector attend(View q, const std::vector<View>& keys, const std::vector<View>& values, double scale) {
    Vector scores;
    for (const View& k : keys) scores.push_back(dot(q, k) * T(scale));
    const Vector p = softmax(scores);
    Vector o(values[0].size(), T(0));
    for (size_t t = 0; t < p.size(); ++t)
      for (size_t j = 0; j < o.size(); ++j) o[j] = o[j] + p[t] * values[t][j];
    return o;
  }

  Vector attention(Memory& m, View h) {
    const size_t heads = size("num_attention_heads"), kv_heads = size("num_key_value_heads"),
                 d = size("head_dim");
    Vector q = project("q_proj", h), k = project("k_proj", h);
    for (size_t i = 0; i < heads; ++i)
      rotate(std::span<T>(q).subspan(i * d, d), position_, config_.at("rope_theta"));
    for (size_t i = 0; i < kv_heads; ++i)
      rotate(std::span<T>(k).subspan(i * d, d), position_, config_.at("rope_theta"));
    m.keys.push_back(k);
    m.values.push_back(project("v_proj", h));
    Vector out;
    for (size_t i = 0; i < heads; ++i) {
      const size_t from = i / (heads / kv_heads) * d;
      std::vector<View> keys, values;
      for (size_t t = 0; t < m.keys.size(); ++t) {
        keys.push_back(View(m.keys[t]).subspan(from, d));
        values.push_back(View(m.values[t]).subspan(from, d));
      }
      const Vector o = attend(View(q).subspan(i * d, d), keys, values, 1 / std::sqrt(static_cast<double>(d)));
      out.insert(out.end(), o.begin(), o.end());
    }
    return project("o_proj", out);
  }

  // Latent attention with the keys and values of every head written out: memory holds them, not the latent row.
  Vector latent(Memory& m, View h, bool rope) {
    const size_t heads = size("num_attention_heads"), rank = size("kv_lora_rank"),
                 nope = size("qk_nope_head_dim"), shared = size("qk_rope_head_dim"), dv = size("v_head_dim"),
                 dk = nope + shared;
    Vector q = project("q_proj", h);
    const Vector a = project("kv_a_proj_with_mqa", h);
    const Vector both =
        project("kv_b_proj", rms_norm<T>(View(a).first(rank), self("kv_a_layernorm.weight"), 1e-6));
    Vector common(a.begin() + static_cast<std::ptrdiff_t>(rank), a.end());
    if (rope) {
      rotate(std::span<T>(common), position_, config_.at("rope_theta"));
      for (size_t i = 0; i < heads; ++i)
        rotate(std::span<T>(q).subspan(i * dk + nope, shared), position_, config_.at("rope_theta"));
    }
    Vector key, value;
    for (size_t i = 0; i < heads; ++i) {
      const View head = View(both).subspan(i * (nope + dv), nope + dv);
      key.insert(key.end(), head.begin(), head.begin() + static_cast<std::ptrdiff_t>(nope));
      key.insert(key.end(), common.begin(), common.end());
      value.insert(value.end(), head.begin() + static_cast<std::ptrdiff_t>(nope), head.end());
    }
    m.keys.push_back(key);
    m.values.push_back(value);
    Vector out;
    for (size_t i = 0; i < heads; ++i) {
      std::vector<View> keys, values;
      for (size_t t = 0; t < m.keys.size(); ++t) {
        keys.push_back(View(m.keys[t]).subspan(i * dk, dk));
        values.push_back(View(m.values[t]).subspan(i * dv, dv));
      }
      const Vector o =
          attend(View(q).subspan(i * dk, dk), keys, values, 1 / std::sqrt(static_cast<double>(dk)));
      out.insert(out.end(), o.begin(), o.end());
    }
    return project("o_proj", out);
  }

  Vector swiglu(const std::string& gate, const std::string& up, const std::string& down, View h) const {
    Vector inner = times(gate + ".weight", h);
    const Vector other = times(up + ".weight", h);
    for (size_t i = 0; i < inner.size(); ++i) inner[i] = silu(inner[i]) * other[i];
    return times(down + ".weight", inner);
  }

  Vector feed_forward(size_t layer, View h) const {
    const auto optional = [&](const char* key, size_t absent) {
      return config_.contains(key) && !config_[key].is_null() ? config_[key].get<size_t>() : absent;
    };
    const size_t experts = optional("num_experts", 0);
    if (experts == 0 || layer < optional("first_k_dense_replace", 0) ||
        layer % optional("moe_layer_freq", 1) != 0)
      return swiglu(prefix_ + "mlp.gate_proj", prefix_ + "mlp.up_proj", prefix_ + "mlp.down_proj", h);
    const std::string moe = prefix_ + "block_sparse_moe.";
    Vector scores = times(moe + "gate.weight", h);
    const Vector& bias = tensor(moe + "gate.e_score_correction_bias");
    std::vector<double> choice;
    for (size_t e = 0; e < experts; ++e) {
      scores[e] = logistic(scores[e]);
      choice.push_back(plain(scores[e]) + plain(bias[e]));
    }
    const auto best = [](const std::vector<double>& of,
                         size_t count) {  // indices of the largest, ties to the lower
      std::vector<size_t> index(of.size());
      std::iota(index.begin(), index.end(), size_t{0});
      std::stable_sort(index.begin(), index.end(), [&](size_t a, size_t b) { return of[a] > of[b]; });
      index.resize(count);
      return index;
    };
    const size_t groups = optional("num_expert_group", 1), width = experts / groups;
    if (groups > 1) {
      std::vector<double> worth;
      for (size_t g = 0; g < groups; ++g) {
        std::vector<double> of(choice.begin() + static_cast<std::ptrdiff_t>(g * width),
                               choice.begin() + static_cast<std::ptrdiff_t>((g + 1) * width));
        std::sort(of.rbegin(), of.rend());
        worth.push_back(of[0] + of[1]);
      }
      std::vector<bool> kept(groups, false);
      for (const size_t g : best(worth, optional("topk_group", 1))) kept[g] = true;
      for (size_t e = 0; e < experts; ++e)
        if (!kept[e / width]) choice[e] = 0;
    }
    const std::vector<size_t> chosen = best(choice, optional("num_experts_per_token", 1));
    T sum(1e-20);
    for (const size_t e : chosen) sum = sum + scores[e];
    Vector y(h.size(), T(0));
    for (const size_t e : chosen) {
      T weight = scores[e] * T(config_.value("routed_scaling_factor", 1.0));
      if (config_.value("moe_renormalize", true)) weight = weight / sum;
      const std::string expert = moe + "experts." + std::to_string(e) + ".";
      const Vector of = swiglu(expert + "w1", expert + "w3", expert + "w2", h);
      for (size_t i = 0; i < y.size(); ++i) y[i] = y[i] + weight * of[i];
    }
    if (optional("num_shared_experts", 0) > 0)
      add(y, swiglu(moe + "shared_experts.gate_proj", moe + "shared_experts.up_proj",
                    moe + "shared_experts.down_proj", h));
    return y;
  }

  const nlohmann::json& config_;
  const Tensors<T>& tensors_;
  std::vector<std::string> mixers_;
  std::vector<Memory> memory_;
  int64_t position_ = 0;
  std::string prefix_;
  Vector hidden_;
  std::vector<Vector> layers_;
};

}  // namespace perigee::policy::reference
