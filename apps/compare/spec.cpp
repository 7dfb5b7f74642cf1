#include "apps/compare/spec.h"

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <set>

#include "apps/command_line/shipped.h"
#include "base/error.h"
#include "base/file.h"
#include "base/json.h"
#include "base/text.h"

namespace perigee::apps::compare {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr int64_t kManyTokens = int64_t{1} << 30;
constexpr size_t kNameBytes = 200, kMostEntries = 200;

void make_absolute(json& config, const char* pointer, const fs::path& base) {
  const json::json_pointer at(pointer);
  if (!config.contains(at) || !config[at].is_string()) return;
  const fs::path path = config[at].get<std::string>();
  std::error_code ignored;
  if (path.empty() || path.is_absolute()) return;
  config[at] = (fs::exists(path, ignored) ? fs::absolute(path) : fs::absolute(base / path))
                   .lexically_normal()
                   .string();
}

void make_paths_absolute(json& config, const fs::path& base) {
  for (const char* pointer :
       {"/model/config", "/model/path", "/tokenizer/path", "/tasks/path", "/tasks/held_out_path"})
    make_absolute(config, pointer, base);
}

json load_object(const std::string& path) {
  json value = parse_json(read_file(path), path, {.comments = true});
  if (!value.is_object()) throw_input("{}: an object is expected, not {}", path, json_type_name(value));
  return value;
}

// Keys that are written with dots, at the root, as the nested ones they stand for.
json nested(const json& config, const std::string& where) {
  json out = json::object();
  for (const auto& [key, value] : config.items())
    if (key.find('.') == std::string::npos) out[key] = value;
  for (const auto& [key, value] : config.items())
    if (key.find('.') != std::string::npos) assign(out, key, value, where);
  return out;
}

std::string directory_of(const std::string& file) {
  const fs::path parent = fs::path(file).parent_path();
  return parent.empty() ? "." : parent.string();
}

const json& entries(JsonReader& in, const char* key) {
  const json& list = *in.find(key);
  if (!list.is_array() || list.empty()) in.fail(key, "a list of at least one entry is expected");
  if (list.size() > kMostEntries)
    in.fail(key, fmt::format("{} entries: at most {} are taken", list.size(), kMostEntries));
  return list;
}

std::string name_of(JsonReader& in, std::set<std::string>& used) {
  const std::string name = in.string("name");
  if (name.empty() || name.size() > kNameBytes)
    in.fail("name", fmt::format("1 to {} bytes are expected", kNameBytes));
  if (!used.insert(name).second) in.fail("name", fmt::format("{} stands there twice", quote(name)));
  return name;
}

json object_of(JsonReader& in, const char* key) {
  const json* value = in.find(key);
  if (value == nullptr) return json::object();
  if (!value->is_object()) in.fail(key, "an object from keys of a run's configuration to values is expected");
  return *value;
}

std::vector<EvaluationPoint> evaluation_points(JsonReader& in, const std::string& where) {
  std::vector<EvaluationPoint> out;
  if (!in.has("evaluate")) return out;
  std::set<std::string> used;
  size_t index = 0;
  for (const json& entry : entries(in, "evaluate")) {
    JsonReader one(entry, where, fmt::format("{}.{}", in.path("evaluate"), index));
    EvaluationPoint p;
    p.name = name_of(one, used);
    p.x = one.number("x", -1e15, 1e15, static_cast<double>(index));
    p.set = object_of(one, "set");
    p.tasks = one.integer("tasks", 1, 1000000, 100);
    one.finish();
    out.push_back(std::move(p));
    ++index;
  }
  return out;
}

int64_t tokens_of(const json& value, JsonReader& in, const char* key) {
  if (value.is_number_integer() && value.get<int64_t>() >= 1 && value.get<int64_t>() <= kManyTokens)
    return value.get<int64_t>();
  if (value.is_string()) {
    const std::string text = value.get<std::string>();
    int64_t n = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), n);
    const std::string_view unit(end, static_cast<size_t>(text.data() + text.size() - end));
    const int64_t scale = unit.empty() ? 1 : unit == "k" ? 1024 : unit == "M" ? 1048576 : 0;
    if (error == std::errc() && scale > 0 && n >= 1 && n <= kManyTokens / scale) return n * scale;
  }
  in.fail(key, fmt::format("{}: a number of tokens such as 4096, \"4k\" or \"1M\" is expected",
                           json_brief(value)));
}

ContextMeasure context_measure(JsonReader& in) {
  ContextMeasure m;
  if (in.has("context")) {
    const json& lengths = entries(in, "context");
    for (const json& value : lengths) m.lengths.push_back(tokens_of(value, in, "context"));
    std::sort(m.lengths.begin(), m.lengths.end());
    m.lengths.erase(std::unique(m.lengths.begin(), m.lengths.end()), m.lengths.end());
  }
  m.steps = in.integer("steps", 1, 1000, m.steps);
  m.memory_gib = in.number("memory_gib", 0, 1e6, m.memory_gib);
  m.set = object_of(in, "set");
  in.finish();
  return m;
}

Tolerance tolerance(JsonReader& in) {
  Tolerance t;
  if (in.has("parameters")) t.parameters = in.number("parameters", 0, 1e6);
  if (in.has("operations")) t.operations = in.number("operations", 0, 1e6);
  if (in.has("context")) t.context = tokens_of(*in.find("context"), in, "context");
  in.ignore("parameters");
  in.ignore("operations");
  in.finish();
  return t;
}

Comparison read_comparison(const json& value, const std::string& file) {
  Comparison c;
  c.where = file;
  c.directory = directory_of(file);
  JsonReader in(value, file);
  c.name = in.string("name", fs::path(file).stem().string());
  c.about = in.string("about", "");
  c.train = in.boolean("train", true);
  const json* base = in.find("base");
  if (base == nullptr) in.fail("base", "missing: the configuration that all runs share, or its path");
  if (base->is_string()) {
    std::string path = base->get<std::string>();
    if (!fs::exists(path) && fs::path(path).is_relative() && fs::exists(fs::path(c.directory) / path))
      path = (fs::path(c.directory) / path).string();
    path = shipped(path);
    c.base = nested(load_object(path), path);
    make_paths_absolute(c.base, directory_of(path));
  } else if (base->is_object()) {
    c.base = nested(*base, file);
  } else {
    in.fail("base", "an object or a path is expected");
  }
  if (!in.has("variants")) in.fail("variants", "missing");
  std::set<std::string> used;
  size_t index = 0;
  for (const json& entry : entries(in, "variants")) {
    JsonReader one(entry, file, fmt::format("variants.{}", index++));
    Setting s;
    s.name = name_of(one, used);
    s.set = object_of(one, "set");
    one.finish();
    c.variants.push_back(std::move(s));
  }
  const std::vector<EvaluationPoint> shared = evaluation_points(in, file);
  if (in.has("tasks")) {
    used.clear();
    index = 0;
    for (const json& entry : entries(in, "tasks")) {
      JsonReader one(entry, file, fmt::format("tasks.{}", index++));
      TaskAxis t;
      t.setting.name = name_of(one, used);
      t.setting.set = object_of(one, "set");
      t.evaluate = evaluation_points(one, file);
      if (t.evaluate.empty()) t.evaluate = shared;
      one.finish();
      c.tasks.push_back(std::move(t));
    }
  } else {
    c.tasks.push_back({{}, shared});
  }
  if (in.has("seeds"))
    c.seeds = in.integers("seeds", 0, int64_t{9'000'000'000'000'000});
  else
    c.seeds = {1};
  if (c.seeds.empty()) in.fail("seeds", "at least one is expected");
  if (std::set<int64_t>(c.seeds.begin(), c.seeds.end()).size() != c.seeds.size())
    in.fail("seeds", "one of them stands there twice");
  c.reach = in.number("reach", 0, 1, c.reach);
  if (const json* match = in.find("match")) {
    JsonReader one(*match, file, "match");
    c.match = tolerance(one);
  }
  if (const json* measure = in.find("measure")) {
    JsonReader one(*measure, file, "measure");
    c.context = context_measure(one);
  }
  in.finish();
  make_paths_absolute(c.base, c.directory);
  return c;
}

}  // namespace

void assign(json& config, const std::string& key, const json& value, const std::string& where) {
  json* at = &config;
  for (size_t begin = 0;;) {
    const size_t dot = key.find('.', begin);
    const std::string part = key.substr(begin, dot == std::string::npos ? dot : dot - begin);
    if (part.empty()) throw_input("{}: {} is no key", where, quote(key));
    if (at->is_null()) *at = json::object();
    if (at->is_array()) {
      size_t index = 0;
      const auto [end, error] = std::from_chars(part.data(), part.data() + part.size(), index);
      if (error != std::errc() || end != part.data() + part.size() || index >= at->size())
        throw_input("{}: {}: a list of {} entries has none that is called {}", where, quote(key), at->size(),
                    quote(part));
      at = &(*at)[index];
    } else if (at->is_object()) {
      at = &(*at)[part];
    } else {
      throw_input("{}: {}: what stands before {} is {}", where, quote(key), quote(part), json_type_name(*at));
    }
    if (dot == std::string::npos) break;
    begin = dot + 1;
  }
  *at = value;
}

void apply(json& config, const json& set, const std::string& directory, const std::string& where) {
  for (const auto& [key, value] : set.items()) {
    for (const auto& [own, option] : {std::pair{"run.seed", "--seeds, or seeds in the file"},
                                      {"run.dir", "--out"},
                                      {"workers.threads", "--threads"}})
      if (key == own) throw_input("{}: {} is not set here; use {}", where, key, option);
    json* model = config.contains("model") && config["model"].is_object() ? &config["model"] : nullptr;
    if (key.starts_with("model.config.") && model != nullptr && model->contains("config") &&
        (*model)["config"].is_string()) {
      make_paths_absolute(config, directory);
      fs::path path = (*model)["config"].get<std::string>();
      if (fs::is_directory(path)) path /= "config.json";
      (*model)["config"] = load_object(path.string());
    }
    assign(config, key, value, where);
  }
  make_paths_absolute(config, directory);
}

json configuration(const Comparison& comparison, const Setting& variant, const Setting& task,
                   const std::vector<std::string>& more) {
  json config = comparison.base;
  const auto put_all = [&](const Setting& s, const char* kind) {
    apply(config, s.set, comparison.directory,
          fmt::format("{}: {} {}", comparison.where, kind, quote(s.name)));
  };
  put_all(variant, "variant");
  put_all(task, "task");
  for (const std::string& text : more) {
    const size_t equals = text.find('=');
    if (equals == std::string::npos || equals == 0)
      throw_input("--set {}: KEY=VALUE is expected", quote(text));
    json value = json::parse(text.substr(equals + 1), nullptr, false);
    if (value.is_discarded()) value = text.substr(equals + 1);
    apply(config, {{text.substr(0, equals), value}}, comparison.directory, "--set");
  }
  make_paths_absolute(config, comparison.directory);
  return config;
}

Comparison load_comparison(const std::vector<std::string>& files) {
  if (files.empty())
    throw_input(
        "compare: name a comparison file, or the configurations of runs; configs/lab holds ready ones");
  std::vector<json> values;
  std::vector<std::string> paths;
  for (const std::string& file : files) {
    paths.push_back(shipped(file));
    values.push_back(load_object(paths.back()));
    if (values.back().contains("variants") && files.size() > 1)
      throw_input(
          "{}: is a comparison, and stands alone; configurations of runs are compared with each other", file);
  }
  if (values.front().contains("variants")) return read_comparison(values.front(), paths.front());
  if (files.size() == 1)
    throw_input(
        "{}: there is nothing to compare it with: name more configurations, or a file with \"variants\" "
        "(docs/compare.md)",
        files.front());

  // The first configuration is the base of nothing: each stands for itself, as a whole.
  Comparison c;
  c.where = paths.front();
  c.directory = ".";
  c.name = "";
  std::set<std::string> used;
  std::optional<int64_t> seed;
  for (size_t i = 0; i < files.size(); ++i) {
    json config = nested(values[i], paths[i]);
    make_paths_absolute(config, directory_of(paths[i]));
    int64_t own = 0;
    if (config.contains("run") && config["run"].is_object() && config["run"].contains("seed") &&
        config["run"]["seed"].is_number_integer())
      own = config["run"]["seed"].get<int64_t>();
    if (seed && *seed != own)
      throw_input("{}: run.seed is {}, and {} in {}: the same seeds are compared; give --seeds", paths[i],
                  own, *seed, paths[0]);
    seed = own;
    Setting s;
    const std::string stem = fs::path(paths[i]).stem().string();
    s.name = stem;
    for (int n = 2; !used.insert(s.name).second; ++n) s.name = fmt::format("{} ({})", stem, n);
    c.name += (i == 0 ? "" : " and ") + s.name;
    for (const auto& [key, value] : config.items()) s.set[key] = value;
    c.variants.push_back(std::move(s));
  }
  c.tasks.push_back({});
  c.seeds = {*seed};
  return c;
}

}  // namespace perigee::apps::compare
