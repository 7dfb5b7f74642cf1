// perigee show RUN EPISODE: one episode, as it was generated and what it was worth.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>

#include "apps/command_line/commands.h"
#include "apps/command_line/run_argument.h"
#include "apps/output/output.h"
#include "apps/output/terminal.h"
#include "apps/runs/episode_filter.h"
#include "apps/runs/episode_json.h"
#include "apps/runs/episode_turns.h"
#include "apps/runs/run_tokenizer.h"
#include "base/error.h"
#include "base/text.h"
#include "policy/tokenizer/tokenizer.h"

namespace perigee::apps {
namespace {

constexpr int64_t kBranchesShown = 1000;

struct Options {
  RunArgument run;
  std::string episode, color = "never";
  bool json = false, tokens = false, siblings = false;
};

struct Shown {
  int64_t id = 0;
  GroupWithEpisodes group;
  EpisodeRecord episode;
  EpisodeTokens tokens;
  std::map<int64_t, double> advantages;  // of the group's members that were trained on
  std::vector<int64_t> branches;
};

Shown load(StoreQueries& store, const RunPlace& place, int64_t id) {
  EpisodeRecord e = store.episode(id);
  if (store.run_of_episode(id) != place.id) throw_input("{}: episode {} is of another run", place.id, id);
  EpisodeTokens tokens(e);
  Shown s{id, store.group(e.spec.group_id), std::move(e), std::move(tokens), {}, {}};
  s.advantages = advantages_of(store, place.id, s.group);
  EpisodeFilter branches;
  branches.run = place.id;
  branches.origin = GroupOrigin::kBranch;
  branches.limit = kBranchesShown;
  for (const EpisodeRow& row : store.episodes(branches))
    if (row.parent_episode_id == id) s.branches.push_back(row.episode_id);
  return s;
}

// How the tokens are coloured: each has a shade, and the legend says what shades mean.
class Coloring {
 public:
  Coloring(const std::string& what, const Shown& s) : tokens_(s.tokens) {
    if (what == "never") return;
    colors_ = colors_for(stdout);
    if (what == "logprob") {
      kind_ = Kind::kLogprob;
    } else if (what == "version") {
      kind_ = Kind::kVersion;
      for (size_t i = 0; i < tokens_.ids.size(); ++i)
        if (tokens_.sampled[i] != 0) versions_.emplace(tokens_.versions[i], 0);
      size_t n = 0;
      for (auto& [version, index] : versions_) index = n++;
    } else if (what == "advantage") {
      kind_ = Kind::kAdvantage;
      const auto it = s.advantages.find(s.id);
      if (it != s.advantages.end()) advantage_ = it->second;
    } else {
      throw_input("--color {}: one of logprob, advantage, version, never is expected{}", quote(what),
                  did_you_mean(what, std::vector<std::string>{"logprob", "advantage", "version", "never"}));
    }
  }

  // text of the cell, printable, on the background of its first token.
  std::string token(size_t index, const std::string& text) const {
    const std::optional<Rgb> shade = tokens_.sampled[index] == 0 ? std::nullopt : shade_of(index);
    return shade ? on_background(colors_, *shade, text) : text;
  }

  std::string legend() const {
    if (colors_ == Colors::kNone) return "";
    std::string out = "\ncolours   ";
    if (kind_ == Kind::kLogprob) {
      out += "log-probability  0 to -0.1: none";
      for (size_t i = 0; i < std::size(kLogprobs); ++i)
        out += " " + on_background(colors_, kLogprobs[i].shade,
                                   i + 1 < std::size(kLogprobs)
                                       ? fmt::format(" to {:g} ", kLogprobs[i + 1].below)
                                       : std::string(" below "));
    } else if (kind_ == Kind::kVersion) {
      out += "policy version ";
      for (const auto& [version, index] : versions_)
        out += " " + on_background(colors_, kVersions[index % std::size(kVersions)], fmt::format(" {} ", version));
    } else if (advantage_) {
      out += fmt::format("advantage {:+.4f}, the same for every token: ", *advantage_) +
             on_background(colors_, *shade_of(0), *advantage_ < 0 ? " made less likely " : " made more likely ");
    } else {
      out += "no advantage: the run did not train on this episode";
    }
    return out + "; fed by tools or the template: none\n";
  }

 private:
  enum class Kind { kNone, kLogprob, kAdvantage, kVersion };
  struct Step {
    double below;  // a log-probability below this has the shade, unless a later step has it
    Rgb shade;
  };
  static constexpr Step kLogprobs[] = {{-0.1, {254, 240, 200}}, {-0.5, {253, 216, 140}}, {-1, {253, 174, 97}},
                                       {-2, {244, 120, 67}},    {-4, {215, 60, 39}},     {-8, {150, 0, 38}}};
  static constexpr Rgb kVersions[] = {{141, 211, 199}, {255, 255, 179}, {190, 186, 218}, {251, 128, 114},
                                      {128, 177, 211}, {253, 180, 98},  {179, 222, 105}, {252, 205, 229}};

  std::optional<Rgb> shade_of(size_t index) const {
    if (kind_ == Kind::kLogprob) {
      std::optional<Rgb> shade;
      for (const Step& step : kLogprobs)
        if (!(tokens_.logprobs[index] >= step.below)) shade = step.shade;
      return shade;
    }
    if (kind_ == Kind::kVersion) return kVersions[versions_.at(tokens_.versions[index]) % std::size(kVersions)];
    if (kind_ == Kind::kAdvantage && advantage_ && *advantage_ != 0) {
      // From pale to strong at 2 and beyond.
      const double strength = std::min(1.0, std::fabs(*advantage_) / 2);
      const auto fade = [&](int to) { return static_cast<uint8_t>(std::lround(240 + (to - 240) * strength)); };
      return *advantage_ > 0 ? Rgb{fade(60), fade(180), fade(90)} : Rgb{fade(220), fade(60), fade(60)};
    }
    return std::nullopt;
  }

  const EpisodeTokens& tokens_;
  Colors colors_ = Colors::kNone;
  Kind kind_ = Kind::kNone;
  std::map<uint32_t, size_t> versions_;
  std::optional<double> advantage_;
};

void print_reward(const EpisodeRecord& e) {
  if (!e.reward) {
    fmt::print("\nreward     none yet\n");
    return;
  }
  fmt::print("\nreward     {:.4f}{}\n", e.reward->total, e.reward->failed ? "  (a component failed)" : "");
  Table table({"  component", "value", "weight", "status", "detail"}, {1, 2});
  for (const RewardComponent& c : e.reward->components)
    table.row({"  " + printable_line(c.name), fmt::format("{:.4f}", c.value), fmt::format("{:g}", c.weight),
               printable_line(c.status), printable_line(c.detail, 100)});
  table.print();
}

void print_tokens(const Shown& s, const policy::Tokenizer& tokenizer) {
  fmt::print("\n");
  Table table({"position", "id", "token", "log-prob", "probability", "version"}, {0, 1, 3, 4, 5});
  const EpisodeTokens& t = s.tokens;
  for (size_t i = 0; i < t.ids.size(); ++i)
    table.row({std::to_string(s.episode.spec.prompt.size() + i), std::to_string(t.ids[i]),
               printable_line(token_text(tokenizer, t.ids[i])),
               t.sampled[i] != 0 ? fmt::format("{:.6f}", t.logprobs[i]) : "-",
               t.sampled[i] != 0 ? fmt::format("{:.4f}", std::exp(t.logprobs[i])) : "-",
               std::to_string(t.versions[i])});
  table.print();
}

void print_tool(const ToolEvent& t) {
  fmt::print("\ntool {} ({}, {:.1f} ms)\n  in   {}\n  out  {}\n", printable_line(t.name, 80),
             printable_line(t.status), static_cast<double>(t.duration_us) / 1000,
             printable_line(t.input, 500), printable_line(t.output, 500));
}

// Turn by turn: what the policy wrote, then the tools that it asked for.
void print_response(const Shown& s, const policy::Tokenizer& tokenizer, const Coloring& coloring) {
  const std::vector<Turn> turns = turns_of(s.episode, s.tokens);
  for (size_t n = 0; n < turns.size(); ++n) {
    fmt::print("{}", turns.size() > 1 ? fmt::format("\nturn {}\n", n + 1) : "\nresponse\n");
    const auto ids = std::span(s.tokens.ids).subspan(turns[n].begin, turns[n].end - turns[n].begin);
    std::string out;
    for (const TokenCell& cell : token_cells(tokenizer, ids))
      out += coloring.token(turns[n].begin + cell.first, printable(cell.text));
    fmt::print("{}\n", out);
    for (const ToolEvent& t : turns[n].tools) print_tool(t);
    // What tools said is shown with them; in a session the user speaks there too.
    if (turns[n].tools.empty() && turns[n].fed_end > turns[n].end && turns[n].end > 0)
      fmt::print("\nfed\n{}\n",
                 printable(text_of(tokenizer, {s.tokens.ids.begin() + static_cast<int64_t>(turns[n].end),
                                               s.tokens.ids.begin() + static_cast<int64_t>(turns[n].fed_end)})));
  }
}

void print_siblings(const Shown& s, const policy::Tokenizer& tokenizer) {
  fmt::print("\ngroup      {}: {} members of one prompt\n", s.group.group.group_id, s.group.episodes.size());
  Table table({"  episode", "member", "state", "finish", "tokens", "reward", "advantage", "ends with"}, {1, 4, 5, 6});
  for (const EpisodeRecord& e : s.group.episodes) {
    const auto advantage = s.advantages.find(e.spec.episode_id);
    const EpisodeTokens t(e);
    // The end says more than the beginning: that is where answers stand.
    const size_t from = t.ids.size() > 60 ? t.ids.size() - 60 : 0;
    std::vector<int32_t> tail;
    for (size_t i = from; i < t.ids.size(); ++i)
      if (t.sampled[i] != 0) tail.push_back(t.ids[i]);
    table.row({fmt::format("{} {}", e.spec.episode_id == s.id ? ">" : " ", e.spec.episode_id),
               std::to_string(e.spec.member), std::string(state_name(e.state)), std::string(finish_name(e.finish)),
               std::to_string(e.token_count),
               e.reward ? fmt::format("{:.4f}{}", e.reward->total, e.reward->failed ? "!" : "") : "-",
               advantage == s.advantages.end() ? "-" : fmt::format("{:+.4f}", advantage->second),
               printable_line(text_of(tokenizer, tail), 60)});
  }
  table.print();
}

nlohmann::json as_json(const Shown& s, const policy::Tokenizer& tokenizer, bool siblings) {
  nlohmann::json out = to_json(s.episode, s.group.group, tokenizer);
  const auto advantage = [&](int64_t id) {
    const auto it = s.advantages.find(id);
    return it == s.advantages.end() ? nlohmann::json() : nlohmann::json(it->second);
  };
  out["advantage"] = advantage(s.id);
  out["branches"] = s.branches;
  if (!siblings) return out;
  out["siblings"] = nlohmann::json::array();
  for (const EpisodeRecord& e : s.group.episodes)
    out["siblings"].push_back({{"episode", e.spec.episode_id},
                               {"member", e.spec.member},
                               {"state", state_name(e.state)},
                               {"finish", finish_name(e.finish)},
                               {"tokens", e.token_count},
                               {"reward", e.reward ? nlohmann::json(e.reward->total) : nlohmann::json()},
                               {"reward_failed", e.reward && e.reward->failed},
                               {"advantage", advantage(e.spec.episode_id)}});
  return out;
}

void print_head(const Shown& s, const RunPlace& place) {
  const EpisodeRecord& e = s.episode;
  std::string versions = "-";
  if (!s.tokens.versions.empty()) {
    const auto [low, high] = std::minmax_element(s.tokens.versions.begin(), s.tokens.versions.end());
    versions = *low == *high ? std::to_string(*low) : fmt::format("{} to {}", *low, *high);
  }
  fmt::print("episode    {} of {}: group {}, member {}, step {}\n", s.id, printable_line(place.id), e.spec.group_id,
             e.spec.member, s.group.group.step);
  fmt::print("state      {}, finish {}, {} in {}, attempt {}\n", state_name(e.state), finish_name(e.finish),
             counted(e.token_count, "token", "tokens"), counted(e.segment_count, "segment", "segments"),
             e.attempt);
  fmt::print("sampling   seed {}, temperature {:g}, policy version {}\n", e.spec.seed, e.spec.temperature, versions);
  if (const auto it = s.advantages.find(s.id); it != s.advantages.end())
    fmt::print("advantage  {:+.4f}\n", it->second);
  if (e.spec.parent_episode_id != 0)
    fmt::print("branch     of episode {}, from its token {}\n", e.spec.parent_episode_id, e.spec.parent_tokens);
  if (!s.branches.empty()) {
    std::string list;
    for (const int64_t id : s.branches) list += fmt::format("{}{}", list.empty() ? "" : ", ", id);
    fmt::print("branches   {}\n", list);
  }
  fmt::print("task       {}\n", printable_line(s.group.group.task, 200));
}

int show(Options o) {
  // `show --latest 17`: the one positional is the episode.
  if (o.run.latest && o.episode.empty()) std::swap(o.run.run, o.episode);
  if (o.episode.empty()) throw_input("show: which episode? perigee rollouts lists them");
  const RunPlace place = find_run(o.run);
  StoreReader store(place.store());
  const Shown s = load(store, place, parse_episode(o.episode));
  const Coloring coloring(o.color, s);
  const auto tokenizer = tokenizer_of(place, store);
  if (o.json) {
    print_json(as_json(s, *tokenizer, o.siblings));
    return 0;
  }
  print_head(s, place);
  // A session has its prompt as tokens only.
  const EpisodeSpec& spec = s.episode.spec;
  fmt::print("\nprompt\n{}\n", printable(spec.prompt_text.empty() ? text_of(*tokenizer, spec.prompt) : spec.prompt_text));
  if (s.episode.pruned.empty())
    print_response(s, *tokenizer, coloring);
  else
    fmt::print("\nresponse   not kept: {}\n", printable_line(s.episode.pruned));
  fmt::print("{}", coloring.legend());
  print_reward(s.episode);
  if (o.siblings) print_siblings(s, *tokenizer);
  if (o.tokens) print_tokens(s, *tokenizer);
  return 0;
}

}  // namespace

void add_show(Program& program) {
  auto o = std::make_shared<Options>();
  Command command = program.command("show", "One episode: prompt, response, reward, tokens", kGroupLook);
  declare_run(command, o->run);
  command.positional("EPISODE", o->episode, "its number, as perigee rollouts lists it", false)
      .flag("--tokens", o->tokens, "every token with its log-probability and policy version")
      .option("--color", o->color, "WHAT",
              "colour the tokens by logprob, advantage or version; never (the default). On a terminal, unless NO_COLOR is set")
      .flag("--siblings", o->siblings, "the other members of its group: rewards, lengths, advantages")
      .flag("--json", o->json, "print one JSON object, tokens included")
      .example("show runs/quickstart 17 --color logprob --siblings")
      .example("show --latest 17 --json");
  command.action([o] { return show(*o); });
}

}  // namespace perigee::apps
