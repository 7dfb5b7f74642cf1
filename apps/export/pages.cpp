#include "apps/export/pages.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "apps/export/svg_chart.h"
#include "apps/output/html.h"
#include "apps/output/output.h"
#include "apps/runs/episode_json.h"
#include "apps/runs/run_metrics.h"
#include "base/error.h"

namespace perigee::apps {
namespace {

constexpr int64_t kNewestEpisodes = 20;
constexpr size_t kPromptBytes = 400;  // of a row of a table

std::string pre(std::string_view text) {
  // A parser drops the line break that follows the tag.
  return fmt::format("<pre tabindex=\"0\">\n{}</pre>\n", escape_html(text));
}

class Facts {
 public:
  Facts& add(std::string_view name, std::string_view value) {
    if (!value.empty()) out_ += fmt::format("<dt>{}</dt><dd>{}</dd>", escape_html(name), escape_html(value));
    return *this;
  }
  std::string html() const { return "<dl>" + out_ + "</dl>\n"; }

 private:
  std::string out_;
};

// A table; columns whose header begins with # hold numbers.
class HtmlTable {
 public:
  explicit HtmlTable(const std::vector<std::string>& header) {
    out_ = "<div class=\"wide\"><table><thead><tr>";
    for (const std::string& h : header) {
      number_.push_back(h.starts_with("#"));
      out_ += fmt::format("<th scope=\"col\"{}>{}</th>", number_.back() ? " class=\"n\"" : "",
                          escape_html(number_.back() ? h.substr(1) : h));
    }
    out_ += "</tr></thead><tbody>\n";
  }
  void row(const std::vector<std::string>& cells, bool marked = false) {
    PERIGEE_CHECK(cells.size() == number_.size(), "{} cells, {} columns", cells.size(), number_.size());
    out_ += marked ? "<tr class=\"this\">" : "<tr>";
    for (size_t i = 0; i < cells.size(); ++i)
      out_ += fmt::format("<td{}>{}</td>", number_[i] ? " class=\"n\"" : "", escape_html(cells[i]));
    out_ += "</tr>\n";
  }
  std::string html() const { return out_ + "</tbody></table></div>\n"; }

 private:
  std::string out_;
  std::vector<bool> number_;
};

// As the script shades it: apps/export/page_frame.cpp.
std::string_view shade(float logprob) {
  constexpr std::pair<float, std::string_view> kShades[] = {{-8, "l6"}, {-4, "l5"},   {-2, "l4"},
                                                            {-1, "l3"}, {-0.5f, "l2"}, {-0.1f, "l1"}};
  if (!std::isfinite(logprob)) return "l6";
  for (const auto& [below, name] : kShades)
    if (logprob < below) return name;
  return "";
}

std::string turn_html(const policy::Tokenizer& tokenizer, const EpisodeTokens& tokens, const Turn& turn) {
  std::string out = fmt::format("<pre class=\"tokens\" tabindex=\"0\" data-from=\"{}\">\n", turn.begin);
  const auto ids = std::span(tokens.ids).subspan(turn.begin, turn.end - turn.begin);
  for (const TokenCell& cell : token_cells(tokenizer, ids)) {
    const std::string_view name = shade(tokens.logprobs[turn.begin + cell.first]);
    out += "<i";
    if (!name.empty()) out += fmt::format(" class=\"{}\"", name);
    if (cell.count > 1) out += fmt::format(" data-n=\"{}\"", cell.count);
    out += ">" + escape_html(cell.text) + "</i>";
  }
  return out + "</pre>\n";
}

std::string tool_html(const ToolEvent& t) {
  return fmt::format("<details open><summary>tool {} <span class=\"soft\">{}, {:.1f} ms</span></summary>\n<h4>input</h4>{}"
                     "<h4>output</h4>{}</details>\n",
                     escape_html(t.name), escape_html(t.status), static_cast<double>(t.duration_us) / 1000, pre(t.input),
                     pre(t.output));
}

std::string reward_text(const std::optional<Reward>& reward) {
  if (!reward) return "";
  return fmt::format("{:.4f}{}", reward->total, reward->failed ? " (failed)" : "");
}

std::string advantage_text(const std::map<int64_t, double>& advantages, int64_t episode) {
  const auto it = advantages.find(episode);
  return it == advantages.end() ? "" : fmt::format("{:+.4f}", it->second);
}

nlohmann::json finite(const std::vector<float>& values) {
  nlohmann::json out = nlohmann::json::array();
  for (const float x : values) out.push_back(std::isfinite(x) ? nlohmann::json(x) : nlohmann::json());
  return out;
}

std::string facts_of(const EpisodePageInput& input, const EpisodeTokens& tokens) {
  const EpisodeRecord& e = input.episode;
  Facts facts;
  facts.add("run", input.run_id)
      .add("step, group, member",
           fmt::format("{}, {}, {}", input.group.group.step, e.spec.group_id, e.spec.member))
      .add("state", fmt::format("{}, finish {}", state_name(e.state), finish_name(e.finish)))
      .add("tokens", fmt::format("{} in {}, attempt {}", e.token_count,
                                 counted(e.segment_count, "segment", "segments"), e.attempt))
      .add("sampling", fmt::format("seed {}, temperature {:g}", e.spec.seed, e.spec.temperature));
  if (!tokens.versions.empty()) {
    const auto [low, high] = std::minmax_element(tokens.versions.begin(), tokens.versions.end());
    facts.add("policy version", *low == *high ? std::to_string(*low) : fmt::format("{} to {}", *low, *high));
  }
  facts.add("reward", reward_text(e.reward)).add("advantage", advantage_text(input.advantages, e.spec.episode_id));
  if (e.spec.parent_episode_id != 0)
    facts.add("branch", fmt::format("of episode {}, from its token {}", e.spec.parent_episode_id, e.spec.parent_tokens));
  return facts.add("task", input.group.group.task).html();
}

std::string group_html(const EpisodePageInput& input) {
  HtmlTable table({"episode", "#member", "state", "finish", "#tokens", "#reward", "#advantage"});
  for (const EpisodeRecord& m : input.group.episodes)
    table.row({std::to_string(m.spec.episode_id), std::to_string(m.spec.member), std::string(state_name(m.state)),
               std::string(finish_name(m.finish)), std::to_string(m.token_count), reward_text(m.reward),
               advantage_text(input.advantages, m.spec.episode_id)},
              m.spec.episode_id == input.episode.spec.episode_id);
  return "<h3>Group</h3>\n" + table.html();
}

std::string chart_html(const Series& s, nlohmann::json& data) {
  nlohmann::json steps = nlohmann::json::array(), texts = nlohmann::json::array();
  for (const size_t i : chart_points(s)) {
    steps.push_back(s.steps[i]);
    texts.push_back(metric_text(s.key, s.values[i]));
  }
  data.push_back({{"steps", std::move(steps)}, {"texts", std::move(texts)}});
  return fmt::format("<figure><figcaption><span>{}</span><b class=\"now\">{}</b></figcaption>{}</figure>\n", escape_html(s.title),
                     escape_html(metric_text(s.key, s.values.back())), svg_chart(s));
}

}  // namespace

EpisodePageInput load_episode_page(StoreQueries& store, const std::string& run_id, int64_t episode_id) {
  EpisodePageInput input{run_id, store.episode(episode_id), {}, {}};
  if (store.run_of_episode(episode_id) != run_id) throw_input("{}: episode {} is of another run", run_id, episode_id);
  input.group = store.group(input.episode.spec.group_id);
  input.advantages = advantages_of(store, run_id, input.group);
  return input;
}

std::string episode_section(const EpisodePageInput& input, const policy::Tokenizer& tokenizer) {
  const EpisodeRecord& e = input.episode;
  const EpisodeTokens tokens(e);
  std::string out = fmt::format("<section class=\"episode\" id=\"episode-{}\">\n<h2>Episode {}</h2>\n", e.spec.episode_id,
                                e.spec.episode_id);
  out += facts_of(input, tokens);
  out += "<h3>Prompt</h3>\n" + pre(e.spec.prompt_text);
  out +=
      "<div class=\"bar\"><label>colour tokens by <select><option value=\"logprob\">log-probability</option><option "
      "value=\"advantage\">advantage</option><option value=\"version\">policy version</option><option "
      "value=\"none\">nothing</option></select></label><span class=\"key\"></span></div>\n<div class=\"tip\" "
      "aria-live=\"polite\"></div>\n";
  const std::vector<Turn> turns = turns_of(e, tokens);
  if (!e.pruned.empty()) out += fmt::format("<p>The response was not kept: {}</p>\n", escape_html(e.pruned));
  for (size_t n = 0; n < turns.size() && e.pruned.empty(); ++n) {
    out += turns.size() > 1 ? fmt::format("<h3>Turn {}</h3>\n", n + 1) : "<h3>Response</h3>\n";
    out += turn_html(tokenizer, tokens, turns[n]);
    for (const ToolEvent& t : turns[n].tools) out += tool_html(t);
  }
  if (e.reward) {
    HtmlTable table({"component", "#value", "#weight", "status", "detail"});
    for (const RewardComponent& c : e.reward->components)
      table.row({c.name, fmt::format("{:.4f}", c.value), fmt::format("{:g}", c.weight), c.status, c.detail});
    out += fmt::format("<h3>Reward {}</h3>\n", escape_html(reward_text(e.reward))) + table.html();
  }
  out += group_html(input);
  const auto advantage = input.advantages.find(e.spec.episode_id);
  const nlohmann::json data = {{"ids", tokens.ids},
                               {"logprobs", finite(tokens.logprobs)},
                               {"versions", tokens.versions},
                               {"advantage", advantage == input.advantages.end() ? nlohmann::json() : nlohmann::json(advantage->second)}};
  return out + "<script type=\"application/json\">" + script_json(data) + "</script>\n</section>\n";
}

std::string run_summary(StoreQueries& store, const std::string& run_id) {
  const RunProgress p = run_progress(store, run_id);
  EpisodeFilter all;
  all.run = run_id;
  const int64_t episodes = store.count_episodes(all);
  std::string states;
  for (int i = 0; i <= static_cast<int>(EpisodeState::kDropped); ++i) {
    EpisodeFilter filter = all;
    filter.state = static_cast<EpisodeState>(i);
    if (const int64_t n = store.count_episodes(filter); n > 0)
      states += fmt::format("{}{} {}", states.empty() ? "" : ", ", n, state_name(*filter.state));
  }
  const std::vector<Checkpoint> checkpoints = store.checkpoints(run_id);
  std::string out = fmt::format("<h1>Run {}</h1>\n", escape_html(run_id));
  out += Facts()
             .add("state", p.run.state)
             .add("phase", fmt::format("{}, step {}{}", p.phase, p.step, p.steps > 0 ? fmt::format(" of {}", p.steps) : ""))
             .add("begun", utc(p.started_us) + " UTC")
             .add("newest weights", fmt::format("version {}, {} after the beginning", p.version,
                                                duration(static_cast<double>(p.last_us - p.started_us) / 1e6)))
             .add("episodes", states.empty() ? std::to_string(episodes) : fmt::format("{}: {}", episodes, states))
             .add("checkpoints kept", std::to_string(checkpoints.size()))
             .add("goes on from", p.run.parent)
             .add("program", p.run.code_version)
             .html();
  nlohmann::json data = nlohmann::json::array();
  out += "<h2>Curves</h2>\n<div class=\"charts\">\n";
  for (const Series& s : run_series(store, run_id)) out += chart_html(s, data);
  out += "</div>\n";

  const std::vector<Evaluation> evaluations = store.evaluations(run_id);
  if (!evaluations.empty()) {
    HtmlTable table({"held-out set", "phase", "#step", "#version", "#right", "#of", "#accuracy"});
    for (const Evaluation& e : evaluations)
      table.row({e.name, e.phase, std::to_string(e.step), std::to_string(e.version), std::to_string(e.correct),
                 std::to_string(e.n), metric_text("accuracy", e.accuracy)});
    out += "<h2>Evaluations</h2>\n" + table.html();
  }
  EpisodeFilter newest = all;
  newest.descending = true;
  newest.limit = kNewestEpisodes;
  HtmlTable table({"#episode", "#step", "state", "finish", "#tokens", "#reward", "prompt"});
  for (const EpisodeRow& e : store.episodes(newest))
    table.row({std::to_string(e.episode_id), std::to_string(e.step), std::string(state_name(e.state)),
               std::string(finish_name(e.finish)), std::to_string(e.token_count),
               e.reward ? fmt::format("{:.4f}{}", *e.reward, e.reward_failed ? " (failed)" : "") : "",
               printable_line(e.prompt_text, kPromptBytes)});
  out += fmt::format("<h2>The newest {} episodes</h2>\n", std::min(episodes, kNewestEpisodes)) + table.html();
  const nlohmann::json config = nlohmann::json::parse(p.run.config, nullptr, false);
  out += "<h2>Configuration</h2>\n<details><summary>config.json</summary>" +
         pre(config.is_discarded() ? p.run.config
                                   : config.dump(2, ' ', false, nlohmann::json::error_handler_t::replace)) +
         "</details>\n";
  return out + "<script type=\"application/json\" id=\"charts\">" + script_json(data) + "</script>\n";
}

}  // namespace perigee::apps
