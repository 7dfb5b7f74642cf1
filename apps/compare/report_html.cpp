#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <set>

#include "apps/compare/chart.h"
#include "apps/compare/report.h"
#include "apps/output/html.h"
#include "apps/output/output.h"
#include "base/error.h"
#include "base/text.h"

namespace perigee::apps::compare {
namespace {

constexpr std::string_view kStyle = R"css(
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#57606a;--paper:#fff;--panel:#f6f8fa;--edge:#d0d7de;
--s0:#0550ae;--s1:#b35900;--s2:#1a7f37;--s3:#8250df;--s4:#cf222e;--s5:#0a7d8c;--s6:#9a6700;--s7:#57606a}
@media (prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#9198a1;--paper:#0d1117;--panel:#161b22;--edge:#30363d;
--s0:#79c0ff;--s1:#ffa657;--s2:#7ee787;--s3:#d2a8ff;--s4:#ff7b72;--s5:#56d4dd;--s6:#e3b341;--s7:#b1bac4}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:80rem;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.4rem;margin:.2rem 0}h2{font-size:1.15rem;margin:2rem 0 .4rem;border-top:1px solid var(--edge);padding-top:1rem}
h3{font-size:1rem;margin:1.2rem 0 .3rem}p{margin:.4rem 0}.soft{color:var(--soft)}
.wide{overflow-x:auto}table{border-collapse:collapse;min-width:100%;overflow-wrap:normal}
th,td{text-align:left;padding:.2rem .6rem .2rem 0;border-bottom:1px solid var(--edge);vertical-align:top}th{color:var(--soft);font-weight:600}
td.n,th.n{text-align:right;white-space:nowrap}td small{color:var(--soft);display:block}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,22rem),1fr));gap:1rem}
figure{margin:0;padding:.5rem;background:var(--panel);border:1px solid var(--edge);border-radius:6px}figcaption{font-weight:600}
figure>svg{width:100%;height:auto;display:block}svg text{font:11px system-ui,sans-serif;fill:var(--soft)}
.key{display:flex;flex-wrap:wrap;gap:.1rem .9rem;margin:.2rem 0;font-size:13px}.mark{width:26px;height:8px;margin-right:.3rem}
.tick{stroke:var(--edge);stroke-width:1}.line{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}.band{opacity:.16;stroke:none}
.line.s0{stroke:var(--s0)}.line.s1{stroke:var(--s1);stroke-dasharray:6 3}.line.s2{stroke:var(--s2);stroke-dasharray:2 3}
.line.s3{stroke:var(--s3);stroke-dasharray:9 3 2 3}.line.s4{stroke:var(--s4)}.line.s5{stroke:var(--s5);stroke-dasharray:6 3}
.line.s6{stroke:var(--s6);stroke-dasharray:2 3}.line.s7{stroke:var(--s7);stroke-dasharray:9 3 2 3}
.band.s0{fill:var(--s0)}.band.s1{fill:var(--s1)}.band.s2{fill:var(--s2)}.band.s3{fill:var(--s3)}.band.s4{fill:var(--s4)}.band.s5{fill:var(--s5)}.band.s6{fill:var(--s6)}.band.s7{fill:var(--s7)}
details{margin:.5rem 0;border:1px solid var(--edge);border-radius:6px;padding:.4rem .7rem}summary{cursor:pointer}
)css";

// A cell of a table: what stands there, and in small below it the spread.
struct Cell {
  std::string text, small;
};

class HtmlTable {
 public:
  // Columns whose header begins with # hold numbers, unless headers are names, which may begin with anything.
  explicit HtmlTable(const std::vector<std::string>& header, bool names = false) {
    out_ = "<div class=\"wide\"><table><thead><tr>";
    for (const std::string& h : header) {
      number_.push_back(!names && h.starts_with("#"));
      out_ += fmt::format("<th scope=\"col\"{}>{}</th>", number_.back() ? " class=\"n\"" : "",
                          escape_html(number_.back() ? h.substr(1) : h));
    }
    out_ += "</tr></thead><tbody>\n";
  }
  void row(const std::vector<Cell>& cells) {
    PERIGEE_CHECK(cells.size() == number_.size(), "{} cells, {} columns", cells.size(), number_.size());
    out_ += "<tr>";
    for (size_t i = 0; i < cells.size(); ++i)
      out_ += fmt::format("<td{}>{}{}</td>", number_[i] ? " class=\"n\"" : "", escape_html(cells[i].text),
                          cells[i].small.empty() ? "" : "<small>" + escape_html(cells[i].small) + "</small>");
    out_ += "</tr>\n";
  }
  std::string html() const { return out_ + "</tbody></table></div>\n"; }

 private:
  std::string out_;
  std::vector<bool> number_;
};

std::string percent(double share) {
  return fmt::format("{:.1f} %", 100 * share);
}

template <class Text>
Cell spread_cell(const std::optional<Spread>& s, Text&& text) {
  if (!s) return {"-", ""};
  return {text(s->median), s->n > 1 ? fmt::format("{} to {}", text(s->min), text(s->max)) : ""};
}

Cell reached_cell(const Reached& r) {
  if (r.of == 0) return {"-", ""};
  if (r.n == 0) return {"not reached", ""};
  const std::string of = fmt::format("{} of {}: {:.0f} to {:.0f}", r.n, r.of, *r.first, *r.last);
  return {r.median ? fmt::format("{:.0f}", *r.median) : "not by half", r.of > 1 ? of : ""};
}

std::string figure(const Chart& chart) {
  const std::string svg = chart_svg(chart);
  if (svg.empty()) return "";
  return fmt::format("<figure><figcaption>{}</figcaption>{}{}</figure>\n", escape_html(chart.title), svg,
                     chart_key(chart));
}

std::string figures(const std::vector<Chart>& charts) {
  std::string out;
  for (const Chart& c : charts) out += figure(c);
  return out.empty() ? "" : "<div class=\"charts\">\n" + out + "</div>\n";
}

class Page {
 public:
  explicit Page(const ReportInput& in) : in_(in), c_(in.plan.comparison) {}

  std::string html() {
    std::string out = fmt::format("<h1>{}</h1>\n", escape_html(c_.name));
    if (!c_.about.empty()) out += fmt::format("<p>{}</p>\n", escape_html(c_.about));
    out += fmt::format("<p class=\"soft\">{} · program {}{}</p>\n", escape_html(in_.machine),
                       escape_html(in_.program),
                       in_.jobs > 0 ? fmt::format(" · {} at a time, {} thread{} each", in_.jobs, in_.threads,
                                                  in_.threads == 1 ? "" : "s")
                                    : "");
    if (!in_.plan.runs.empty() && !in_.results.complete()) {
      const auto done = std::count_if(in_.results.runs.begin(), in_.results.runs.end(),
                                      [](const RunResult& r) { return r.state == "finished"; });
      out += fmt::format(
          "<p><strong>Not complete: {} of {} runs are finished.</strong> Final accuracies are those of "
          "finished runs.</p>\n",
          done, in_.plan.runs.size());
    }
    for (const std::string& f : in_.failures)
      out += fmt::format("<p><strong>Failed:</strong> {}</p>\n", escape_html(f));
    out += models();
    if (!in_.results.groups.empty()) out += table() + curves();
    if (in_.context != nullptr) out += context();
    return out + differences() + runs();
  }

 private:
  const std::string& variant(size_t v) const { return c_.variants[v].name; }
  std::string task(size_t t) const { return c_.tasks[t].setting.name; }
  bool has_tasks() const { return c_.tasks.size() > 1 || !c_.tasks[0].setting.name.empty(); }
  std::vector<const GroupResult*> groups_of(size_t t) const {
    std::vector<const GroupResult*> out;
    for (const GroupResult& g : in_.results.groups)
      if (g.task == t) out.push_back(&g);
    return out;
  }

  std::string models() {
    HtmlTable t({"variant", "mixers", "#parameters", "#operations a token", "#cache, bytes a token",
                 "#state of a sequence"});
    for (size_t v = 0; v < c_.variants.size(); ++v) {
      const ModelFacts& f = in_.plan.facts[v];
      t.row({{variant(v), ""},
             {f.mixers, ""},
             {std::to_string(f.parameters), ""},
             {number_text(f.operations()), ""},
             {fmt::format("{:.0f}", f.cache_bytes_per_token), ""},
             {human_bytes(static_cast<uint64_t>(f.state_bytes)), ""}});
    }
    return "<h2>Models</h2>\n" + t.html() +
           fmt::format(
               "<p class=\"soft\">Operations of a forward pass behind {} tokens; caches in float32.</p>\n",
               tokens_text(c_.match.context));
  }

  std::string table() {
    const auto& groups = in_.results.groups;
    const auto any = [&](auto has) { return std::any_of(groups.begin(), groups.end(), has); };
    const bool warm = any([](const GroupResult& g) { return !g.warmup_accuracy.empty(); });
    const bool rl = any([](const GroupResult& g) { return !g.rl_accuracy.empty() || !g.reward.empty(); });
    std::vector<std::string> header;
    if (has_tasks()) header.push_back("task");
    header.insert(header.end(), {"variant", "#final accuracy"});
    const bool score = any([](const GroupResult& g) { return g.final_score.has_value(); });
    if (score) header.push_back("#mean reward");
    const std::string to = fmt::format("steps to {:g} %", 100 * c_.reach);
    if (warm) header.insert(header.end(), {"#supervised: " + to, "#learnt tokens/s"});
    if (rl) header.insert(header.end(), {"#RL: " + to, "#learnt tokens/s", "#sampled tokens/s"});
    HtmlTable t(header);
    for (const GroupResult& g : groups) {
      std::vector<Cell> row;
      if (has_tasks()) row.push_back({task(g.task), ""});
      row.push_back({variant(g.variant), ""});
      row.push_back(spread_cell(g.final_accuracy, percent));
      if (score) row.push_back(spread_cell(g.final_score, [](double x) { return fmt::format("{:.3f}", x); }));
      if (warm)
        row.insert(row.end(), {reached_cell(g.warmup_reached), spread_cell(g.warmup_rate, number_text)});
      if (rl)
        row.insert(row.end(), {reached_cell(g.rl_reached), spread_cell(g.rl_rate, number_text),
                               spread_cell(g.sample_rate, number_text)});
      t.row(row);
    }
    return "<h2>Results</h2>\n" + t.html() +
           fmt::format(
               "<p class=\"soft\">Medians over the seeds {}; below them the least and the greatest. Held-out "
               "tasks. A run that ended early "
               "because it was right about enough counts with its last accuracy for later steps.</p>\n",
               fmt::join(c_.seeds, ", "));
  }

  Chart band_chart(const std::string& title, size_t t, const std::vector<BandPoint> GroupResult::*band,
                   bool percent_axis) {
    Chart chart;
    chart.title = title;
    chart.x_label = "steps";
    chart.percent = percent_axis;
    for (const GroupResult* g : groups_of(t)) {
      ChartLine line{variant(g->variant), static_cast<int>(g->variant), {}};
      for (const BandPoint& p : g->*band) line.points.push_back({p.x, p.median, p.min, p.max});
      chart.lines.push_back(std::move(line));
    }
    return chart;
  }

  Chart length_chart(size_t t) {
    Chart chart;
    chart.title = "accuracy by length or level";
    chart.percent = true;
    const auto& points = c_.tasks[t].evaluate;
    chart.x_log =
        std::all_of(points.begin(), points.end(), [](const EvaluationPoint& p) { return p.x >= 1; });
    chart.binary_x = chart.x_log;
    chart.x_label = chart.x_log ? "tokens or size" : "level";
    for (const GroupResult* g : groups_of(t)) {
      ChartLine line{variant(g->variant), static_cast<int>(g->variant), {}};
      for (size_t p = 0; p < points.size(); ++p)
        if (const auto& s = g->evaluated[p]) line.points.push_back({points[p].x, s->median, s->min, s->max});
      std::sort(line.points.begin(), line.points.end(),
                [](const ChartPoint& a, const ChartPoint& b) { return a.x < b.x; });
      chart.lines.push_back(std::move(line));
    }
    return chart;
  }

  std::string length_table(size_t t) {
    const auto& points = c_.tasks[t].evaluate;
    const auto groups = groups_of(t);
    const bool any = std::any_of(groups.begin(), groups.end(), [](const GroupResult* g) {
      return std::any_of(g->evaluated.begin(), g->evaluated.end(),
                         [](const auto& s) { return s.has_value(); });
    });
    if (!any) return "";
    std::vector<std::string> header = {"variant"};
    for (const EvaluationPoint& p : points) header.push_back("#" + p.name);
    HtmlTable table(header);
    for (const GroupResult* g : groups) {
      std::vector<Cell> row = {{variant(g->variant), ""}};
      for (const auto& s : g->evaluated) row.push_back(spread_cell(s, percent));
      table.row(row);
    }
    return table.html();
  }

  std::string level_table(size_t t) {
    std::set<std::string> names;
    for (const GroupResult* g : groups_of(t))
      for (const auto& [name, s] : g->levels) names.insert(name);
    if (names.empty()) return "";
    std::vector<std::string> header = {"accuracy by level"};
    for (const std::string& name : names) header.push_back("#" + name);
    HtmlTable table(header);
    for (const GroupResult* g : groups_of(t)) {
      std::vector<Cell> row = {{variant(g->variant), ""}};
      for (const std::string& name : names) {
        const auto it = g->levels.find(name);
        row.push_back(
            spread_cell(it == g->levels.end() ? std::nullopt : std::optional<Spread>(it->second), percent));
      }
      table.row(row);
    }
    return table.html();
  }

  std::string curves() {
    std::string out =
        "<h2>Curves</h2>\n<p class=\"soft\">Median over the seeds, and from the least to the greatest.</p>\n";
    for (size_t t = 0; t < c_.tasks.size(); ++t) {
      if (has_tasks()) out += fmt::format("<h3>{}</h3>\n", escape_html(task(t)));
      out += figures(
          {band_chart("held-out accuracy, supervised", t, &GroupResult::warmup_accuracy, true),
           band_chart("loss, supervised", t, &GroupResult::loss, false),
           band_chart("held-out accuracy, reinforcement learning", t, &GroupResult::rl_accuracy, true),
           band_chart("held-out mean reward, supervised", t, &GroupResult::warmup_score, false),
           band_chart("held-out mean reward, reinforcement learning", t, &GroupResult::rl_score, false),
           band_chart("reward of training episodes", t, &GroupResult::reward, false), length_chart(t)});
      out += length_table(t) + level_table(t);
    }
    return out;
  }

  std::string context() {
    Chart time, processor, bytes;
    time.title = "time of a decoding token";
    processor.title = "processor time of a decoding token";
    bytes.title = "memory of a sequence";
    for (Chart* c : {&time, &processor, &bytes}) {
      c->x_label = "tokens of context";
      c->x_log = c->y_log = c->binary_x = true;
    }
    time.title += ", ms";
    processor.title += ", ms";
    bytes.title += ", MiB";
    std::vector<std::string> header = {"variant", "#parameters", "#cache, bytes a token"};
    const auto& all = in_.context->variants;
    for (const ContextPoint& p : all.empty() ? std::vector<ContextPoint>{} : all[0])
      header.push_back("#" + tokens_text(p.tokens));
    HtmlTable table(header);
    std::string left_out;
    for (size_t v = 0; v < all.size(); ++v) {
      ChartLine t{variant(v), static_cast<int>(v), {}}, q = t, b = t;
      const ModelFacts facts = model_facts(in_.plan.context_models[v], c_.match.context);
      std::vector<Cell> row = {{variant(v), facts.mixers},
                               {number_text(static_cast<double>(facts.parameters)), ""},
                               {fmt::format("{:.0f}", facts.cache_bytes_per_token), ""}};
      for (const ContextPoint& p : all[v]) {
        const auto x = static_cast<double>(p.tokens), mib = static_cast<double>(p.bytes) / 1048576;
        b.points.push_back({x, mib, mib, mib});
        if (p.left_out.empty()) {
          t.points.push_back({x, 1e3 * p.median_s, 1e3 * p.min_s, 1e3 * p.max_s});
          const double used = 1e3 * p.processor_median_s;
          q.points.push_back({x, used, used, used});
          row.push_back({fmt::format("{} ms", number_text(1e3 * p.median_s)),
                         fmt::format("processor {} ms; {}", number_text(used),
                                     human_bytes(static_cast<uint64_t>(p.bytes)))});
        } else {
          row.push_back({"left out", human_bytes(static_cast<uint64_t>(p.bytes))});
          left_out += fmt::format("<p class=\"soft\">{} at {} tokens is left out: {}.</p>\n",
                                  escape_html(variant(v)), tokens_text(p.tokens), escape_html(p.left_out));
        }
      }
      table.row(row);
      time.lines.push_back(std::move(t));
      processor.lines.push_back(std::move(q));
      bytes.lines.push_back(std::move(b));
    }
    return fmt::format(
               "<h2>Context</h2>\n<p class=\"soft\">One sequence, batch 1, float32, threads: {}, {}: the "
               "memory of a sequence filled with random "
               "numbers, medians of {} steps, and from the least to the greatest. Where others use the "
               "machine too, "
               "processor time says more.</p>\n",
               in_.context->threads, escape_html(in_.context->machine), c_.context.steps) +
           figures({time, processor, bytes}) + table.html() + left_out;
  }

  std::string differences() {
    if (in_.plan.differences.empty()) return "";
    std::vector<std::string> header = {"key"};
    for (const Setting& v : c_.variants) header.push_back(v.name);
    HtmlTable t(header, true);
    for (const Difference& d : in_.plan.differences) {
      std::vector<Cell> row = {{d.key, ""}};
      for (const std::string& value : d.values) row.push_back({value, ""});
      t.row(row);
    }
    return "<h2>Where the variants differ</h2>\n<p class=\"soft\">Every other key of the configuration is "
           "the same.</p>\n" +
           t.html();
  }

  std::string runs() {
    if (in_.plan.runs.empty()) return "";
    HtmlTable t({"run", "#seed", "state", "#steps", "#final accuracy", "weights"});
    for (size_t i = 0; i < in_.plan.runs.size(); ++i) {
      const RunResult& r = in_.results.runs[i];
      t.row({{in_.plan.runs[i].id, ""},
             {std::to_string(in_.plan.runs[i].seed), ""},
             {r.state, ""},
             {std::to_string(r.steps), ""},
             {r.final_accuracy ? percent(*r.final_accuracy) : "-", ""},
             {r.weights_hash, ""}});
    }
    return "<h2>Runs</h2>\n<details><summary>" + fmt::format("{} runs", in_.plan.runs.size()) + "</summary>" +
           t.html() + "</details>\n";
  }

  const ReportInput& in_;
  const Comparison& c_;
};

}  // namespace

std::string report_html(const ReportInput& input) {
  return fmt::format(
             "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n"
             "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src {}; "
             "base-uri 'none'; form-action 'none'\">\n"
             "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<meta "
             "name=\"referrer\" content=\"no-referrer\">\n"
             "<title>{}</title>\n<style>{}</style>\n</head>\n<body>\n",
             csp_hash(kStyle), escape_html(input.plan.comparison.name), kStyle) +
         Page(input).html() + "</body>\n</html>\n";
}

}  // namespace perigee::apps::compare
