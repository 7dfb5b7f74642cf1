// perigee explain RUN STEP: what one step of the learner did. The step is run again, watched, and its result compared with
// the recorded one.
#include <fmt/format.h>

#include <charconv>
#include <cmath>
#include <cstring>
#include <map>

#include "apps/command_line/commands.h"
#include "apps/output/output.h"
#include "apps/replay/past_run.h"
#include "apps/runs/episode_json.h"
#include "base/error.h"
#include "base/text.h"
#include "rollout/replay/explain.h"

namespace perigee::apps {
namespace {

struct Options {
  AgainOptions again;
  std::string step;
  std::optional<int64_t> episode;
  bool warmup = false, tokens = false;
  int64_t limit = 40;
};

// The step to explain, as the store knows it.
struct Step {
  std::string phase;
  int64_t number = 0;
  uint32_t before = 0, after = 0;
  std::vector<int64_t> episodes;  // of its plain sequences, in the order of the batch
  Metrics recorded;
};

int64_t parse_step(const std::string& text) {
  int64_t number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc{} || end != text.data() + text.size() || number < 1)
    throw_input("{} is not the number of a step: 1 and up", quote(text));
  return number;
}

Step find_step(PastRun& run, int64_t number, bool warmup) {
  Step step;
  step.phase = warmup ? "warmup" : "rl";
  step.number = number;
  if (warmup) {
    int64_t last = 0;
    bool found = false;
    for (const PolicyVersion& v : run.store().versions(run.place.id)) {
      if (v.phase != "warmup") continue;
      last = std::max(last, v.step);
      if (v.step != number) continue;
      found = true;
      step.after = v.version;
      step.before = v.version - 1;
    }
    if (!found) throw_input("step {}: the warm-up of {} has steps 1 to {}", number, run.directory(), last);
  } else {
    const std::optional<TrainBatch> batch = run.store().train_batch(run.place.id, number);
    if (!batch) {
      const std::vector<int64_t> steps = run.store().train_steps(run.place.id);
      if (steps.empty())
        throw_input("step {}: {} has no step of reinforcement learning yet (--warmup?)", number,
                    run.directory());
      throw_input("step {}: {} has steps {} to {}", number, run.directory(), steps.front(), steps.back());
    }
    if (batch->version_after == batch->version_before)
      throw_input(
          "step {}: it had nothing to learn from (rewards equal within each group), so the weights are "
          "version {} as before",
          number, batch->version_before);
    step.before = batch->version_before;
    step.after = batch->version_after;
    for (const TrainItem& item : batch->items) step.episodes.push_back(item.episode_id);
  }
  for (const StepMetrics& m : run.store().metrics(run.place.id, step.phase))
    if (m.step == number) step.recorded = m.values;
  return step;
}

std::optional<double> recorded(const Step& step, std::string_view name) {
  for (const auto& [key, value] : step.recorded)
    if (key == name) return value;
  return std::nullopt;
}

struct LayerNorms {
  double gradient = 0, weights = 0, update = 0;  // sums of squares
};
std::string layer_name(int64_t layer, const std::string& kind) {
  return layer >= 0 ? fmt::format("layer {}", layer) : kind;
}

// Sums over tensors, in their order in the model; by: layer or kind.
std::vector<std::pair<std::string, LayerNorms>> sum_up(const rollout::ExplainedMinibatch* minibatch,
                                                       const std::vector<rollout::ExplainedUpdate>& updates,
                                                       bool by_layer) {
  std::vector<std::pair<std::string, LayerNorms>> out;
  const auto at = [&](int64_t layer, const std::string& kind) -> LayerNorms& {
    const std::string name = by_layer ? layer_name(layer, kind) : kind;
    for (auto& [known, norms] : out)
      if (known == name) return norms;
    return out.emplace_back(name, LayerNorms()).second;
  };
  for (const auto& u : updates) {
    LayerNorms& n = at(u.layer, u.kind);
    n.weights += u.weights * u.weights;
    n.update += u.update * u.update;
  }
  if (minibatch != nullptr)
    for (const auto& t : minibatch->tensors) at(t.layer, t.kind).gradient += t.gradient * t.gradient;
  return out;
}

double gradient_norm(const rollout::ExplainedMinibatch& m) {
  double sum = 0;
  for (const auto& t : m.tensors) sum += t.gradient * t.gradient;
  return std::sqrt(sum);
}

double update_norm(const std::vector<rollout::ExplainedUpdate>& updates) {
  double sum = 0;
  for (const auto& u : updates) sum += u.update * u.update;
  return std::sqrt(sum);
}

struct Means {
  double sampler = 0, now = 0, ratio = 0, weight = 0, entropy = 0, largest_mismatch = 0;
};
Means means_of(const rollout::ExplainedSequence& s) {
  Means m;
  if (s.tokens.empty()) return m;
  const double share = 1.0 / static_cast<double>(s.tokens.size());
  for (const auto& t : s.tokens) {
    m.sampler += t.sampler * share;
    m.now += t.now * share;
    m.ratio += t.ratio * share;
    m.weight += t.weight * share;
    m.entropy += t.entropy * share;
    m.largest_mismatch = std::max(m.largest_mismatch, std::fabs(static_cast<double>(t.old) - t.sampler));
  }
  return m;
}

nlohmann::json to_json(const rollout::ExplainedToken& t, const policy::Tokenizer& tokenizer, bool curated) {
  nlohmann::json out = {
      {"position", t.position}, {"id", t.token},        {"text", token_text(tokenizer, t.token)},
      {"logprob", t.now},       {"entropy", t.entropy}, {"contribution", t.contribution()},
      {"slope", t.slope}};
  if (curated) return out;
  out.update({{"logprob_sampler", t.sampler},
              {"logprob_old", t.old},
              {"logprob_reference", t.ref},
              {"ratio", t.ratio},
              {"rho", t.rho},
              {"weight", t.weight},
              {"clipped", t.clipped},
              {"policy", t.policy},
              {"kl", t.kl},
              {"entropy_bonus", t.bonus}});
  return out;
}

nlohmann::json to_json(const std::vector<std::pair<std::string, LayerNorms>>& sums) {
  nlohmann::json out = nlohmann::json::array();
  for (const auto& [name, n] : sums)
    out.push_back({{"name", name},
                   {"gradient", std::sqrt(n.gradient)},
                   {"weights", std::sqrt(n.weights)},
                   {"update", std::sqrt(n.update)}});
  return out;
}

nlohmann::json metrics_json(const policy::StepMetrics& m) {
  return {{"loss", m.loss},
          {"policy_loss", m.policy_loss},
          {"kl", m.kl},
          {"entropy", m.entropy},
          {"ptx_loss", m.ptx_loss},
          {"grad_norm", m.grad_norm},
          {"lr", m.lr},
          {"clip_fraction", m.clip_fraction},
          {"ratio_mean", m.ratio_mean},
          {"mismatch_kl", m.mismatch_kl},
          {"mismatch_max", m.mismatch_max},
          {"mismatch_share", m.mismatch_share},
          {"trained_tokens", m.trained_tokens},
          {"sequences", m.sequences},
          {"dropped_sequences", m.dropped_sequences}};
}

struct Result {
  std::string hash, recorded_hash;
  std::string loss;
  rollout::Rebuilt rebuilt;
  bool same() const { return recorded_hash.empty() || hash == recorded_hash; }
};

int64_t episode_of(const Step& step, const rollout::ExplainedSequence& s) {
  return s.curated ? 0 : step.episodes.at(s.index);
}

void print_json(const PastRun& run, const Options& o, const Step& step, const rollout::StepExplainer& x,
                const Result& r) {
  nlohmann::json sequences = nlohmann::json::array(), minibatches = nlohmann::json::array();
  for (const auto& s : x.sequences()) {
    const int64_t episode = episode_of(step, s);
    if (o.episode && *o.episode != episode) continue;
    const Means m = means_of(s);
    nlohmann::json q = {{"minibatch", s.minibatch},
                        {"tokens", s.tokens.size()},
                        {"logprob_mean", m.now},
                        {"entropy_mean", m.entropy},
                        {"contribution", s.contribution()}};
    if (s.curated)
      q["worked_example"] = s.index;
    else
      q.update({{"episode", episode},
                {"advantage", s.advantage},
                {"logprob_sampler_mean", m.sampler},
                {"mismatch_max", m.largest_mismatch},
                {"ratio_mean", m.ratio},
                {"weight_mean", m.weight},
                {"clipped", s.clipped()},
                {"dropped", s.dropped}});
    if (o.tokens) {
      nlohmann::json& tokens = q["per_token"] = nlohmann::json::array();
      for (const auto& t : s.tokens) tokens.push_back(to_json(t, *run.tokenizer, s.curated));
    }
    sequences.push_back(std::move(q));
  }
  for (const auto& m : x.minibatches()) {
    nlohmann::json tensors = nlohmann::json::array();
    for (const auto& t : m.tensors)
      tensors.push_back({{"name", t.name}, {"layer", t.layer}, {"kind", t.kind}, {"gradient", t.gradient}});
    minibatches.push_back({{"metrics", metrics_json(m.metrics)},
                           {"grad_norm", gradient_norm(m)},
                           {"grad_scale", m.grad_scale},
                           {"grad_norm_clipped", gradient_norm(m) * m.grad_scale},
                           {"by_layer", to_json(sum_up(&m, x.updates(), true))},
                           {"by_kind", to_json(sum_up(&m, x.updates(), false))},
                           {"tensors", std::move(tensors)}});
  }
  nlohmann::json before = nlohmann::json::object();
  for (const auto& [name, value] : step.recorded) before[name] = value;
  perigee::apps::print_json({{"run", run.place.id},
                             {"phase", step.phase},
                             {"step", step.number},
                             {"version_before", step.before},
                             {"version_after", step.after},
                             {"loss_kind", r.loss},
                             {"weights_hash", {{"recorded", r.recorded_hash}, {"again", r.hash}}},
                             {"same", r.same()},
                             {"versions_with_other_hash", r.rebuilt.other_hash},
                             {"recorded_metrics", std::move(before)},
                             {"update_norm", update_norm(x.updates())},
                             {"minibatches", std::move(minibatches)},
                             {"sequences", std::move(sequences)}});
}

void print_sequences(const Options& o, const Step& step, const rollout::StepExplainer& x,
                     const policy::Tokenizer& tokenizer) {
  Table table({"episode", "tokens", "advantage", "sampler", "now", "ratio", "clipped", "weight", "entropy",
               "contribution", ""},
              {0, 1, 2, 3, 4, 5, 6, 7, 8, 9});
  int64_t rows = 0, left = 0;
  for (const auto& s : x.sequences()) {
    const int64_t episode = episode_of(step, s);
    if (o.episode && *o.episode != episode) continue;
    if (o.limit > 0 && rows >= o.limit) {
      ++left;
      continue;
    }
    ++rows;
    const Means m = means_of(s);
    if (s.curated)
      table.row({"worked", std::to_string(s.tokens.size()), "-", "-", fmt::format("{:.4f}", m.now), "-", "-",
                 "-", fmt::format("{:.4f}", m.entropy), fmt::format("{:+.3e}", s.contribution()), ""});
    else
      table.row({std::to_string(episode), std::to_string(s.tokens.size()),
                 fmt::format("{:+.4f}", s.advantage), fmt::format("{:.4f}", m.sampler),
                 fmt::format("{:.4f}", m.now), fmt::format("{:.4f}", m.ratio), std::to_string(s.clipped()),
                 fmt::format("{:.4f}", m.weight), fmt::format("{:.4f}", m.entropy),
                 fmt::format("{:+.3e}", s.contribution()), s.dropped ? "dropped" : ""});
  }
  fmt::print("\nsequences (means over their tokens; contribution: to the loss)\n");
  table.print();
  if (left > 0) fmt::print("and {} more: --limit 0 shows all\n", left);
  if (!o.tokens) return;
  rows = 0;
  for (const auto& s : x.sequences()) {
    const int64_t episode = episode_of(step, s);
    if (o.episode && *o.episode != episode) continue;
    if (o.limit > 0 && rows++ >= o.limit) break;
    fmt::print("\n{}\n",
               s.curated ? fmt::format("worked example {}", s.index) : fmt::format("episode {}", episode));
    Table tokens({"position", "token", "sampler", "now", "ratio", "weight", "clip", "entropy", "contribution",
                  "slope"},
                 {0, 2, 3, 4, 5, 7, 8, 9});
    for (const auto& t : s.tokens)
      tokens.row({std::to_string(t.position), printable_line(token_text(tokenizer, t.token)),
                  s.curated ? "-" : fmt::format("{:.5f}", t.sampler), fmt::format("{:.5f}", t.now),
                  fmt::format("{:.5f}", t.ratio), fmt::format("{:.5f}", t.weight), t.clipped ? "cut" : "",
                  fmt::format("{:.4f}", t.entropy), fmt::format("{:+.3e}", t.contribution()),
                  fmt::format("{:+.3e}", t.slope)});
    tokens.print();
  }
}

void print_norms(const char* title, const std::vector<std::pair<std::string, LayerNorms>>& sums) {
  fmt::print("\n");
  Table table({title, "gradient", "weights", "update"}, {1, 2, 3});
  for (const auto& [name, n] : sums)
    table.row({name, fmt::format("{:.4e}", std::sqrt(n.gradient)),
               fmt::format("{:.4f}", std::sqrt(n.weights)), fmt::format("{:.4e}", std::sqrt(n.update))});
  table.print();
}

void print_text(const PastRun& run, const Options& o, const Step& step, const rollout::StepExplainer& x,
                const Result& r) {
  fmt::print("{} step {} of {}: version {} to {}, loss {}\n", step.phase, step.number, run.place.id,
             step.before, step.after, step.phase == "warmup" ? "negative log-likelihood" : r.loss);
  if (r.recorded_hash.empty())
    fmt::print("weights    {}; the run recorded no hash\n", r.hash);
  else
    fmt::print("weights    {} {}\n", r.hash,
               r.same() ? "as recorded"
                        : fmt::format("and {} was recorded: an altered store, or built by other code?",
                                      r.recorded_hash));
  if (r.rebuilt.other_hash > 0 && r.same())
    fmt::print("           version {} before it came out with another hash than recorded\n",
               r.rebuilt.first_other);
  for (size_t i = 0; i < x.minibatches().size(); ++i) {
    const auto& m = x.minibatches()[i];
    const double norm = gradient_norm(m);
    if (x.minibatches().size() > 1) fmt::print("\nminibatch {} of {}\n", i + 1, x.minibatches().size());
    const auto loss = x.minibatches().size() == 1 ? recorded(step, "loss") : std::nullopt;
    fmt::print("loss       {:+.6e}{}\n", m.metrics.loss,
               loss ? (std::memcmp(&*loss, &m.metrics.loss, sizeof(double)) == 0
                           ? " as recorded"
                           : fmt::format(", {:+.6e} was recorded", *loss))
                    : "");
    if (m.metrics.ptx_loss != 0)
      fmt::print("           of it {:+.6e} of worked examples\n", m.metrics.ptx_loss);
    fmt::print("gradient   norm {:.6e}, after clipping {:.6e}\n", norm, norm * m.grad_scale);
    fmt::print("policy     entropy {:.4f}, KL {:.3e}, clipped {:.2f} %, mean ratio {:.6f}\n",
               m.metrics.entropy, m.metrics.kl, 100 * m.metrics.clip_fraction, m.metrics.ratio_mean);
    fmt::print("sampler    mismatch {:.3e}, at most {:.3e}, of {:.2f} % of tokens\n", m.metrics.mismatch_kl,
               m.metrics.mismatch_max, 100 * m.metrics.mismatch_share);
    fmt::print("learning   rate {:.3e}, {} sequences, {} trained tokens, {} sequences dropped\n",
               m.metrics.lr, m.metrics.sequences, m.metrics.trained_tokens, m.metrics.dropped_sequences);
    print_norms("by layer", sum_up(&m, x.updates(), true));
    print_norms("by kind", sum_up(&m, x.updates(), false));
  }
  fmt::print("\nupdate     norm {:.6e} over all weights{}\n", update_norm(x.updates()),
             x.minibatches().size() > 1 ? ", all minibatches together (so are those of the tables)" : "");
  print_sequences(o, step, x, *run.tokenizer);
}

int explain(Options o) {
  if (o.again.run.latest && o.step.empty()) std::swap(o.again.run.run, o.step);
  if (o.step.empty()) throw_input("explain: which step? 1 and up");
  const int64_t number = parse_step(o.step);
  PastRun run(o.again);
  const Step step = find_step(run, number, o.warmup);
  if (o.episode && std::find(step.episodes.begin(), step.episodes.end(), *o.episode) == step.episodes.end())
    throw_input("--episode {}: step {} did not learn from it", *o.episode, number);
  const policy::TrainerConfig& trainer = o.warmup ? run.config.warmup.trainer : run.config.learn.trainer;
  rollout::StepExplainer explainer(trainer.loss, run.model.model.trained());
  Result result;
  result.loss = kernels::name(trainer.loss.kind);
  result.rebuilt = run.rebuild(
      step.before, step.after,
      [&](uint32_t version, const std::byte* weights) {
        if (version == step.before) explainer.before(weights);
        if (version != step.after) return;
        explainer.after(weights);
        result.hash = run.model.hash(weights);
      },
      {}, &explainer);
  if (const auto version = run.store().version(run.place.id, step.after))
    result.recorded_hash = version->weights_hash;
  if (o.again.json)
    print_json(run, o, step, explainer, result);
  else
    print_text(run, o, step, explainer, result);
  return result.same() && result.rebuilt.other_hash == 0 ? 0 : 1;
}

}  // namespace

void add_explain(Program& program) {
  auto o = std::make_shared<Options>();
  Command command =
      program.command("explain", "What one step of the learner did, token by token", kGroupLook);
  declare_run(command, o->again.run);
  command.positional("STEP", o->step, "of reinforcement learning, 1 and up", false)
      .flag("--warmup", o->warmup, "STEP is one of the warm-up")
      .flag("--tokens", o->tokens, "every token: log-probabilities, ratio, weight, clip, contribution")
      .option("--episode", o->episode, "N", "only this episode of the batch")
      .option("--limit", o->limit, "N", "sequences shown; 0: all");
  declare_again(command, o->again);
  command.example("explain runs/quickstart 12").example("explain --latest 12 --tokens --episode 6017");
  command.action([o] { return explain(*o); });
}

}  // namespace perigee::apps
