// What exports hold, read by others than those that wrote them.
#include <bit>
#include <cmath>
#include <cstring>
#include <map>
#include <set>

#include "apps/export/svg_chart.h"
#include "apps/export/tensorboard.h"
#include "apps/output/html.h"
#include "base/text.h"
#include "tests/apps/made_run.h"

namespace perigee {
namespace {

class Export : public ::testing::Test {
 protected:
  void SetUp() override { made_ = make_run(place_ / "run"); }
  std::string to_file(std::vector<std::string> args, const std::string& name) {
    const std::string path = place_ / name;
    args.insert(args.begin(), {"export", made_.directory});
    args.insert(args.end(), {"--out", path});
    const Said said = run_perigee(args);
    EXPECT_EQ(said.code, 0) << said.err;
    EXPECT_EQ(said.out, "");
    return slurp(path);
  }
  std::string episode(size_t i) const { return std::to_string(made_.episodes[i]); }

  TempDirectory place_;
  MadeRun made_;
};

// The tags of an HTML text, and its text between them with references resolved; a script's and style's content is no text.
struct Parsed {
  std::vector<std::string> tags;  // "script type=..." as written, without < and >
  std::string text;
  std::vector<std::string> scripts, styles;
};
Parsed parse_html(const std::string& html) {
  Parsed out;
  for (size_t i = 0; i < html.size();) {
    if (html[i] != '<') {
      if (html[i] == '&') {
        const size_t end = html.find(';', i);
        const std::map<std::string, char> known = {{"&amp;", '&'}, {"&lt;", '<'},   {"&gt;", '>'},
                                                   {"&quot;", '"'}, {"&#39;", '\''}, {"&#96;", '`'}};
        const auto it = known.find(html.substr(i, end + 1 - i));
        EXPECT_NE(it, known.end()) << html.substr(i, 20);
        if (it != known.end()) out.text += it->second;
        i = end + 1;
      } else {
        out.text += html[i++];
      }
      continue;
    }
    const size_t end = html.find('>', i);
    EXPECT_NE(end, std::string::npos);
    const std::string tag = html.substr(i + 1, end - i - 1);
    out.tags.push_back(tag);
    i = end + 1;
    for (const char* raw : {"script", "style"}) {
      if (tag.rfind(raw, 0) != 0) continue;
      const size_t close = html.find(std::string("</") + raw, i);
      EXPECT_NE(close, std::string::npos);
      (std::string(raw) == "style" ? out.styles : out.scripts).push_back(html.substr(i, close - i));
      i = close;
    }
  }
  return out;
}

void expect_atif(const nlohmann::json& t);

void expect_self_contained(const std::string& html) {
  EXPECT_TRUE(is_utf8(html));
  for (const char c : html) EXPECT_TRUE(static_cast<unsigned char>(c) >= 0x20 || c == '\n' || c == '\t');
  for (const char* hidden : {"\xe2\x80\xae", "\xe2\x80\xa8", "\xef\xbb\xbf", "\xf3\xa0\x81\xa1"})
    EXPECT_EQ(html.find(hidden), std::string::npos);
  const Parsed p = parse_html(html);
  std::string policy;
  const std::set<std::string> allowed = {"!doctype", "html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "h4",
                                         "section", "dl", "dt", "dd", "pre", "div", "label", "select", "option", "span", "i",
                                         "details", "summary", "table", "thead", "tbody", "tr", "th", "td", "script", "figure",
                                         "figcaption", "b", "svg", "line", "text", "path", "p"};
  for (const std::string& tag : p.tags) {
    const std::string name = tag.substr(tag[0] == '/' ? 1 : 0, tag.find_first_of(" /", 1) - (tag[0] == '/' ? 1 : 0));
    EXPECT_TRUE(allowed.contains(name)) << tag;
    EXPECT_EQ(tag.find(" on"), std::string::npos) << tag;
    for (const char* fetches : {"src=", "href=", "style=", "srcdoc="}) EXPECT_EQ(tag.find(fetches), std::string::npos) << tag;
    if (tag.find("Content-Security-Policy") != std::string::npos) policy = tag;
  }
  // Nothing is fetched, and no other script or style than these runs.
  EXPECT_NE(policy.find("default-src 'none'"), std::string::npos);
  EXPECT_EQ(policy.find("unsafe"), std::string::npos);
  ASSERT_EQ(p.styles.size(), 1u);
  EXPECT_NE(policy.find("style-src " + apps::csp_hash(p.styles[0])), std::string::npos);
  ASSERT_FALSE(p.scripts.empty());
  EXPECT_NE(policy.find("script-src " + apps::csp_hash(p.scripts.back())), std::string::npos);
  EXPECT_EQ(p.styles[0].find("url("), std::string::npos);
  for (size_t i = 0; i + 1 < p.scripts.size(); ++i) EXPECT_FALSE(nlohmann::json::parse(p.scripts[i], nullptr, false).is_discarded());
}

TEST_F(Export, HtmlOfARolloutShowsHostileTextAsText) {
  for (size_t i = 0; i < 5; ++i) {
    const std::string html = to_file({episode(i), "--format", "html"}, "episode" + std::to_string(i) + ".html");
    expect_self_contained(html);
    const Parsed p = parse_html(html);
    EXPECT_NE(p.text.find(i < 4 ? "=" + hostile_texts()[0] : "1+1="), std::string::npos);
    const nlohmann::json data = nlohmann::json::parse(p.scripts[0]);
    EXPECT_EQ(data["ids"].size(), data["logprobs"].size());
    EXPECT_TRUE(data["logprobs"][1].is_null()) << "not finite";
    EXPECT_EQ(data["advantage"], i % 4 == 0 ? 1.5 : -0.5);
    if (i == 0) {
      EXPECT_NE(p.text.find("</script><script>document.title='owned'"), std::string::npos);
      EXPECT_NE(p.text.find("Turn 2"), std::string::npos);
      EXPECT_NE(p.text.find("tool calculator"), std::string::npos);
    }
    if (i == 3) EXPECT_NE(p.text.find("\xe6\x97\xa5"), std::string::npos) << "a character of three tokens";
  }
  const std::string all = to_file({"--where", "reward >= 0", "--format", "html"}, "all.html");
  expect_self_contained(all);
  size_t sections = 0;
  for (const std::string& tag : parse_html(all).tags) sections += tag.rfind("section", 0) == 0;
  EXPECT_EQ(sections, made_.episodes.size());
}

// One line of a megabyte, in the prompt, in what the policy wrote and in what a tool answered.
TEST_F(Export, TakesLinesOfAMegabyte) {
  std::string line;
  while (line.size() < 1 << 20) line += "<a \xff\xe2\x80\xae&";
  int64_t id = 0;
  {
    Store store(made_.directory + "/store.sqlite");
    auto t = store.begin();
    GroupRecord group;
    std::vector<EpisodeSpec> members(1);
    members[0].prompt = {49};
    members[0].prompt_text = line;
    store.open_group("made", group, members);
    id = members[0].episode_id;
    Segment s;
    s.episode_id = id;
    s.attempt = *store.begin_attempt(id);
    s.finish = FinishReason::kStop;
    for (size_t i = 0; i < 100000; ++i) s.tokens.push_back(static_cast<unsigned char>(line[i]));
    s.logprobs.assign(s.tokens.size(), -1);
    s.versions.assign(s.tokens.size(), 1);
    ToolEvent tool;
    tool.name = line;
    tool.input = tool.output = line;
    s.tools.push_back(tool);
    ASSERT_EQ(store.append_segment(s), Append::kAppended);
    t.commit();
  }
  const std::string html = to_file({std::to_string(id), "--format", "html"}, "long.html");
  expect_self_contained(html);
  expect_atif(nlohmann::json::parse(to_file({std::to_string(id), "--format", "atif"}, "long.json")));
  const Said shown = run_perigee({"show", made_.directory, std::to_string(id)});
  EXPECT_EQ(shown.code, 0) << shown.err;
  for (const char c : shown.out) ASSERT_TRUE(static_cast<unsigned char>(c) >= 0x20 || c == '\n');
  const Said listed = run_perigee({"rollouts", made_.directory, "--where", "episode = " + std::to_string(id)});
  EXPECT_LT(listed.out.size(), 1000u);
}

TEST_F(Export, HtmlOfARunHasItsCurves) {
  const std::string html = to_file({"--format", "html"}, "run.html");
  expect_self_contained(html);
  const Parsed p = parse_html(html);
  for (const char* text : {"reward", "held-out accuracy", "KL to the reference", "tokens/s", "warm-up loss", "80.0 %",
                           "16: 16 trained", "Configuration"})
    EXPECT_NE(p.text.find(text), std::string::npos) << text;
  const nlohmann::json data = nlohmann::json::parse(p.scripts[0]);
  size_t figures = 0;
  for (const std::string& tag : p.tags) figures += tag == "figure";
  EXPECT_EQ(data.size(), figures);
  EXPECT_EQ(data[0]["steps"].size(), 30u);
}

TEST(ExportChart, DrawsEveryCourse) {
  const auto chart = [](std::vector<double> values) {
    apps::Series s{"k", "<t>", "rl", {}, std::move(values)};
    for (size_t i = 0; i < s.values.size(); ++i) s.steps.push_back(static_cast<int64_t>(i) + 1);
    const std::string svg = apps::svg_chart(s);
    EXPECT_EQ(svg.find("nan"), std::string::npos) << svg;
    EXPECT_EQ(svg.find("inf"), std::string::npos) << svg;
    EXPECT_EQ(svg.find("<t>"), std::string::npos);
    return svg;
  };
  chart({});
  chart({1});
  chart({0, 0, 0});
  chart({NAN, INFINITY});
  chart({1e300, -1e300});
  chart({1e-300, 2e-300});
  EXPECT_NE(chart({1, NAN, 2, 3}).find("h0"), std::string::npos) << "a lone point is a dot";
  // Of a hundred thousand points the one spike is still there.
  apps::Series s{"k", "t", "rl", {}, std::vector<double>(100000, 1.0)};
  for (int64_t i = 0; i < 100000; ++i) s.steps.push_back(i);
  s.values[54321] = 9;
  const std::vector<size_t> points = apps::chart_points(s);
  EXPECT_LE(points.size(), apps::kChartPoints);
  EXPECT_NE(std::find(points.begin(), points.end(), 54321u), points.end());
}

TEST_F(Export, JsonLinesAreTheEpisodes) {
  const std::string text = to_file({"--format", "jsonl"}, "all.jsonl");
  std::istringstream lines(text);
  size_t n = 0;
  for (std::string line; std::getline(lines, line); ++n) {
    const nlohmann::json e = nlohmann::json::parse(line);
    EXPECT_EQ(e["episode"], made_.episodes[n]);
    EXPECT_EQ(e["run"], "made");
    EXPECT_EQ(e["advantage"], n % 4 == 0 ? 1.5 : -0.5);
    const nlohmann::json shown = run_perigee({"show", made_.directory, episode(n), "--json"}).json();
    EXPECT_EQ(e["tokens"], shown["tokens"]);
    EXPECT_EQ(e["task"], shown["task"]);
    EXPECT_EQ(e["tools"], shown["tools"]);
    if (n == 5) break;
  }
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), static_cast<int64_t>(made_.episodes.size()));
  const Said some = run_perigee({"export", made_.directory, "--format", "jsonl", "--where", "reward > 1", "--limit", "2"});
  EXPECT_EQ(std::count(some.out.begin(), some.out.end(), '\n'), 2);
  const Said text_found = run_perigee({"export", made_.directory, "--format", "jsonl", "--contains", "answer is 3"});
  EXPECT_EQ(std::count(text_found.out.begin(), text_found.out.end(), '\n'), 2);
}

// The rules of the format's specification, and of the models with which its own validator reads it: unknown keys are refused.
void expect_keys(const nlohmann::json& object, const std::set<std::string>& required, const std::set<std::string>& optional) {
  ASSERT_TRUE(object.is_object());
  for (const std::string& key : required) EXPECT_TRUE(object.contains(key)) << key;
  for (const auto& [key, value] : object.items()) {
    EXPECT_TRUE(required.contains(key) || optional.contains(key)) << key;
    EXPECT_FALSE(value.is_null()) << key;
  }
}
void expect_atif(const nlohmann::json& t) {
  expect_keys(t, {"schema_version", "agent", "steps"},
              {"session_id", "trajectory_id", "notes", "final_metrics", "continued_trajectory_ref", "extra", "subagent_trajectories"});
  EXPECT_EQ(t["schema_version"], "ATIF-v1.7");
  expect_keys(t["agent"], {"name", "version"}, {"model_name", "tool_definitions", "extra"});
  expect_keys(t["final_metrics"], {},
              {"total_prompt_tokens", "total_completion_tokens", "total_cached_tokens", "total_cost_usd", "total_steps", "extra"});
  ASSERT_FALSE(t["steps"].empty());
  EXPECT_EQ(t["final_metrics"]["total_steps"], t["steps"].size());
  int64_t id = 0, prompt = 0, completion = 0;
  for (const nlohmann::json& s : t["steps"]) {
    expect_keys(s, {"step_id", "source", "message"},
                {"timestamp", "model_name", "reasoning_effort", "reasoning_content", "tool_calls", "observation", "metrics",
                 "is_copied_context", "llm_call_count", "extra"});
    EXPECT_EQ(s["step_id"], ++id);
    EXPECT_TRUE(s["message"].is_string());
    if (s.contains("timestamp")) {
      const std::string time = s["timestamp"];
      EXPECT_EQ(time.size(), std::string("2026-11-21T23:15:02.123456Z").size()) << time;
      EXPECT_TRUE(time[4] == '-' && time[10] == 'T' && time[13] == ':' && time[19] == '.' && time.back() == 'Z') << time;
    }
    const std::string source = s["source"];
    EXPECT_TRUE(source == "user" || source == "agent" || source == "system");
    if (source != "agent") {
      for (const char* key : {"model_name", "reasoning_effort", "reasoning_content", "tool_calls", "metrics"})
        EXPECT_FALSE(s.contains(key)) << key;
      continue;
    }
    expect_keys(s["metrics"], {},
                {"prompt_tokens", "completion_tokens", "cached_tokens", "cost_usd", "prompt_token_ids", "completion_token_ids",
                 "logprobs", "extra"});
    EXPECT_EQ(s["metrics"]["prompt_token_ids"].size(), s["metrics"]["prompt_tokens"].get<size_t>());
    EXPECT_EQ(s["metrics"]["completion_token_ids"].size(), s["metrics"]["completion_tokens"].get<size_t>());
    if (s["metrics"].contains("logprobs")) {
      EXPECT_EQ(s["metrics"]["logprobs"].size(), s["metrics"]["completion_token_ids"].size());
      for (const auto& x : s["metrics"]["logprobs"]) EXPECT_TRUE(x.is_number());
    }
    prompt += s["metrics"]["prompt_tokens"].get<int64_t>();
    completion += s["metrics"]["completion_tokens"].get<int64_t>();
    std::set<std::string> calls;
    if (s.contains("tool_calls"))
      for (const auto& c : s["tool_calls"]) {
        expect_keys(c, {"tool_call_id", "function_name", "arguments"}, {"extra"});
        EXPECT_TRUE(c["arguments"].is_object());
        EXPECT_TRUE(calls.insert(c["tool_call_id"]).second) << "an id twice";
      }
    if (s.contains("observation"))
      for (const auto& r : s["observation"]["results"]) {
        expect_keys(r, {}, {"source_call_id", "content", "subagent_trajectory_ref", "extra"});
        EXPECT_TRUE(calls.contains(r["source_call_id"]));
      }
  }
  EXPECT_EQ(t["final_metrics"]["total_prompt_tokens"], prompt);
  EXPECT_EQ(t["final_metrics"]["total_completion_tokens"], completion);
}

TEST_F(Export, AtifHoldsTheTrajectory) {
  const nlohmann::json one = nlohmann::json::parse(to_file({episode(0), "--format", "atif"}, "one.json"));
  expect_atif(one);
  ASSERT_EQ(one["steps"].size(), 3u);  // the prompt and two turns
  EXPECT_EQ(one["steps"][1]["tool_calls"][0]["function_name"], "calculator");
  EXPECT_EQ(one["steps"][1]["tool_calls"][0]["arguments"]["expression"], "1+1");
  EXPECT_EQ(one["steps"][1]["timestamp"], "2025-11-22T08:26:41.000000Z");
  // What the second turn was sampled after: prompt, first turn, the two tokens fed.
  const auto length = static_cast<int64_t>(hostile_texts()[0].size());
  EXPECT_EQ(one["steps"][2]["metrics"]["prompt_tokens"], 4 + length - 10);
  EXPECT_EQ(one["final_metrics"]["extra"]["reward"], 1.5);
  EXPECT_FALSE(one["steps"][1]["metrics"].contains("logprobs")) << "one is not finite";
  EXPECT_TRUE(one["steps"][2]["metrics"].contains("logprobs"));
  std::istringstream lines(run_perigee({"export", made_.directory, "--format", "atif"}).out);
  size_t n = 0;
  for (std::string line; std::getline(lines, line); ++n) expect_atif(nlohmann::json::parse(line));
  EXPECT_EQ(n, made_.episodes.size());
}

TEST_F(Export, CsvHasAColumnForEachMetric) {
  const std::string text = run_perigee({"export", made_.directory, "--format", "csv"}).out;
  std::istringstream lines(text);
  std::vector<std::string> rows;
  for (std::string line; std::getline(lines, line);) {
    EXPECT_EQ(line.back(), '\r');
    rows.push_back(line.substr(0, line.size() - 1));
  }
  ASSERT_EQ(rows.size(), 1u + 3 + 30);
  EXPECT_EQ(rows[0],
            "phase,step,loss,\"'=odd,\"\"name\"\"\",entropy,kl,lag_mean,length_mean,mismatch_max,reward_mean,tokens_per_s,"
            "accuracy:held-out");
  EXPECT_EQ(rows[1], "warmup,1,3,,,,,,,,,");
  EXPECT_EQ(rows[3], "warmup,3,1,,,,,,,,,0.4");
  EXPECT_EQ(rows[4], "rl,1,,1,1,0.001,0.5,40,1e-07,0.02,1234.5,");
  EXPECT_NE(rows[10].find(",nan,"), std::string::npos);
  EXPECT_EQ(rows[33].substr(rows[33].size() - 11), ",1234.5,0.8");
}

// A reader of event files that shares nothing with their writer.
struct Scalar {
  std::string tag;
  int64_t step = 0;
  float value = 0;
  double time = 0;
};
uint32_t slow_crc32c(const std::string& bytes) {
  uint32_t crc = 0xffffffff;
  for (const char c : bytes) {
    crc ^= static_cast<uint8_t>(c);
    for (int i = 0; i < 8; ++i) crc = crc & 1 ? (crc >> 1) ^ 0x82f63b78 : crc >> 1;
  }
  return crc ^ 0xffffffff;
}
// The fields of a protobuf message: number -> (varint or fixed bits, bytes).
struct Field {
  int number = 0;
  uint64_t bits = 0;
  std::string bytes;
};
std::vector<Field> fields(const std::string& m) {
  std::vector<Field> out;
  size_t at = 0;
  const auto varint = [&] {
    uint64_t x = 0;
    for (int shift = 0;; shift += 7) {
      const auto byte = static_cast<uint8_t>(m.at(at++));
      x |= uint64_t{byte & 0x7fu} << shift;
      if (byte < 0x80) return x;
    }
  };
  while (at < m.size()) {
    const uint64_t key = varint();
    Field f;
    f.number = static_cast<int>(key >> 3);
    if ((key & 7) == 0) {
      f.bits = varint();
    } else if ((key & 7) == 2) {
      const uint64_t n = varint();
      f.bytes = m.substr(at, n);
      at += n;
    } else {
      const size_t n = (key & 7) == 1 ? 8 : 4;
      EXPECT_TRUE((key & 7) == 1 || (key & 7) == 5);
      std::memcpy(&f.bits, m.data() + at, n);
      at += n;
    }
    out.push_back(f);
  }
  return out;
}
std::vector<Scalar> read_events(const std::string& file) {
  std::vector<Scalar> out;
  bool first = true;
  for (size_t at = 0; at < file.size();) {
    uint64_t length = 0;
    uint32_t length_crc = 0, crc = 0;
    std::memcpy(&length, file.data() + at, 8);
    std::memcpy(&length_crc, file.data() + at + 8, 4);
    EXPECT_LE(at + 16 + length, file.size());
    const std::string event = file.substr(at + 12, length);
    std::memcpy(&crc, file.data() + at + 12 + length, 4);
    const auto masked = [](uint32_t x) { return ((x >> 15) | (x << 17)) + 0xa282ead8u; };
    EXPECT_EQ(length_crc, masked(slow_crc32c(file.substr(at, 8))));
    EXPECT_EQ(crc, masked(slow_crc32c(event)));
    at += 16 + length;
    Scalar s;
    for (const Field& f : fields(event)) {
      if (f.number == 1) s.time = std::bit_cast<double>(f.bits);
      if (f.number == 2) s.step = static_cast<int64_t>(f.bits);
      if (f.number == 3) EXPECT_TRUE(first && f.bytes == "brain.Event:2");
      if (f.number != 5) continue;
      for (const Field& value : fields(f.bytes)) {
        EXPECT_EQ(value.number, 1);
        for (const Field& part : fields(value.bytes)) {
          if (part.number == 1) s.tag = part.bytes;
          if (part.number == 2) s.value = std::bit_cast<float>(static_cast<uint32_t>(part.bits));
        }
      }
    }
    if (!first) out.push_back(s);
    first = false;
  }
  return out;
}

TEST_F(Export, TensorBoardEventsHoldEveryMetric) {
  EXPECT_EQ(apps::crc32c("123456789"), 0xe3069283u);  // the check value of the polynomial
  EXPECT_EQ(apps::crc32c(std::string(32, '\0')), 0x8a9136aau);
  const Said said = run_perigee({"export", made_.directory, "--format", "tensorboard", "--out", place_ / "board"});
  ASSERT_EQ(said.code, 0) << said.err;
  const std::string file = slurp(place_ / "board/events.out.tfevents.1763800000.perigee");
  ASSERT_FALSE(file.empty());
  const std::vector<Scalar> scalars = read_events(file);
  EXPECT_EQ(scalars.size(), 3u + 30 * 8 + 2);
  std::map<std::pair<std::string, int64_t>, Scalar> by;
  for (const Scalar& s : scalars) by[{s.tag, s.step}] = s;
  EXPECT_EQ(by.size(), scalars.size());
  EXPECT_EQ((by[{"rl/reward_mean", 30}].value), 0.6f);
  EXPECT_EQ((by[{"rl/reward_mean", 30}].time), 1763800060.0);
  EXPECT_EQ((by[{"warmup/loss", 2}].value), 1.5f);
  EXPECT_EQ((by[{"eval/held-out", 30}].value), 0.8f);
  EXPECT_TRUE(std::isnan(by[{"rl/mismatch_max", 7}].value));
  // A step beyond what one byte of a varint holds, and a tag as long.
  const std::string tag(300, 't');
  const auto one = read_events(apps::tensorboard_header(1) + apps::tensorboard_scalar(2.5, 1234567890123, tag, -7));
  ASSERT_EQ(one.size(), 1u);
  EXPECT_EQ(one[0].step, 1234567890123);
  EXPECT_EQ(one[0].tag, tag);
  EXPECT_EQ(one[0].value, -7);
}

TEST_F(Export, WritesWholeFilesAndNoOthers) {
  const std::string there = place_ / "there";
  spill(there, "mine");
  expect_refused({"export", made_.directory, "--format", "csv", "--out", there}, "--force");
  EXPECT_EQ(slurp(there), "mine");
  EXPECT_EQ(run_perigee({"export", made_.directory, "--format", "csv", "--out", there, "--force"}).code, 0);
  EXPECT_EQ(slurp(there).substr(0, 10), "phase,step");
  expect_refused({"export", made_.directory, "--format", "csv", "--out", place_ / "."}, "directory");
  expect_refused({"export", made_.directory, "--format", "csv", "--out", place_ / "no/such"}, "no/such");
  expect_refused({"export", made_.directory, "--format", "jsnol"}, "did you mean jsonl?");
  expect_refused({"export", made_.directory, "--format", "tensorboard"}, "--out");
  expect_refused({"export", made_.directory, episode(0), "--format", "csv"}, "no episodes");
  expect_refused({"export", made_.directory, "999999", "--format", "jsonl"}, "999999");
  expect_refused({"export", made_.directory, "999999", "--format", "html", "--out", place_ / "none.html"}, "999999");
  expect_refused({"export", made_.directory, episode(0), "--where", "reward > 1", "--format", "jsonl"}, "not both");
  expect_refused({"export", made_.directory, "--where", "rewrd > 1", "--format", "jsonl"}, "^");
  EXPECT_FALSE(std::filesystem::exists(place_ / "none.html"));
  // A disk that fills up leaves no file.
  RunOptions full;
  full.max_file_bytes = 1000;
  const Said said = run_perigee({"export", made_.directory, "--format", "html", "--out", place_ / "full.html"}, full);
  EXPECT_EQ(said.code, 2) << said.err;
  EXPECT_FALSE(std::filesystem::exists(place_ / "full.html"));
  EXPECT_EQ(std::count(said.err.begin(), said.err.end(), '\n'), 1) << said.err;
}

}  // namespace
}  // namespace perigee
