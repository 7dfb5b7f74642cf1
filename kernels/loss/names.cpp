// Names, published constants and what a configuration may not say.
#include <array>
#include <cmath>

#include "base/error.h"
#include "kernels/loss/loss.h"

namespace perigee::kernels {
namespace {

template <class E>
struct Named {
  E value;
  std::string_view text;
};
constexpr std::array<Named<LossKind>, 7> kLossKinds{{{LossKind::kGrpo, "grpo"},
                                                     {LossKind::kDrGrpo, "dr_grpo"},
                                                     {LossKind::kDapo, "dapo"},
                                                     {LossKind::kGspo, "gspo"},
                                                     {LossKind::kCispo, "cispo"},
                                                     {LossKind::kRloo, "rloo"},
                                                     {LossKind::kK15, "k15"}}};
constexpr std::array<Named<Correction>, 5> kCorrections{{{Correction::kNone, "none"},
                                                         {Correction::kTis, "tis"},
                                                         {Correction::kIcepop, "icepop"},
                                                         {Correction::kSeqTis, "seq_tis"},
                                                         {Correction::kSeqMis, "seq_mis"}}};
constexpr std::array<Named<KlKind>, 3> kKlKinds{
    {{KlKind::kK1, "k1"}, {KlKind::kK2, "k2"}, {KlKind::kK3, "k3"}}};

template <class E, size_t N>
std::string_view find_name(const std::array<Named<E>, N>& table, E value) {
  for (const auto& row : table)
    if (row.value == value) return row.text;
  return "?";
}
template <class E, size_t N>
bool find_value(const std::array<Named<E>, N>& table, std::string_view text, E& out) {
  for (const auto& row : table)
    if (row.text == text) {
      out = row.value;
      return true;
    }
  return false;
}

void require(bool holds, std::string_view key, double value, std::string_view must) {
  if (!holds) throw_input("loss: {} is {}, must be {}", key, value, must);
}

}  // namespace

std::string_view name(LossKind kind) {
  return find_name(kLossKinds, kind);
}
std::string_view name(Correction correction) {
  return find_name(kCorrections, correction);
}
std::string_view name(KlKind kind) {
  return find_name(kKlKinds, kind);
}
bool parse(std::string_view text, LossKind& out) {
  return find_value(kLossKinds, text, out);
}
bool parse(std::string_view text, Correction& out) {
  return find_value(kCorrections, text, out);
}
bool parse(std::string_view text, KlKind& out) {
  return find_value(kKlKinds, text, out);
}

LossConfig loss_defaults(LossKind kind) {
  LossConfig c;
  c.kind = kind;
  if (kind == LossKind::kDapo || kind == LossKind::kCispo) c.clip_high = 0.28;
  if (kind == LossKind::kGspo) {
    c.clip_low = 3e-4;
    c.clip_high = 4e-4;
  }
  return c;
}

AdvantageKind usual_advantage(LossKind kind) {
  if (kind == LossKind::kDrGrpo || kind == LossKind::kK15) return AdvantageKind::kMean;
  return kind == LossKind::kRloo ? AdvantageKind::kRloo : AdvantageKind::kGrpo;
}

void check_config(const LossConfig& c) {
  require(c.clip_low >= 0 && c.clip_low <= 1, "clip_low", c.clip_low, "from 0 to 1");
  require(c.clip_high >= 0 && std::isfinite(c.clip_high), "clip_high", c.clip_high, "0 or more");
  if (c.kind == LossKind::kDrGrpo)
    require(c.max_length > 0 && std::isfinite(c.max_length), "max_length", c.max_length,
            "positive with dr_grpo");
  if (c.kind == LossKind::kK15) require(c.tau > 0 && std::isfinite(c.tau), "tau", c.tau, "positive with k15");
  require(c.veto >= 0 && c.veto < 1, "veto", c.veto, "0 (off) or below 1");
  require(c.kl_coef >= 0 && std::isfinite(c.kl_coef), "kl_coef", c.kl_coef, "0 or more");
  require(std::isfinite(c.entropy_coef), "entropy_coef", c.entropy_coef, "finite");
  switch (c.correction) {
    case Correction::kNone:
      break;
    case Correction::kTis:
    case Correction::kSeqTis:
    case Correction::kSeqMis:
      require(c.cap > 0 && std::isfinite(c.cap), "cap", c.cap, "positive");
      break;
    case Correction::kIcepop:
      require(c.icepop_low >= 0 && c.icepop_low <= c.icepop_high, "icepop_low", c.icepop_low,
              "from 0 to icepop_high");
      break;
  }
  const bool one_term_per_sequence = c.kind == LossKind::kGspo || c.kind == LossKind::kK15;
  if (one_term_per_sequence && (c.correction == Correction::kTis || c.correction == Correction::kIcepop))
    throw_input("loss: correction {} weighs tokens, but {} has one term per sequence; use seq_tis or seq_mis",
                name(c.correction), name(c.kind));
}

}  // namespace perigee::kernels
