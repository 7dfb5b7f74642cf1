#include <fmt/format.h>

#include <algorithm>
#include <functional>
#include <map>

#include "agents/tools/calculator.h"
#include "agents/tools/kinds.h"
#include "agents/tools/toolbox.h"
#include "base/error.h"
#include "base/json.h"
#include "base/text.h"

namespace perigee::agents {
namespace {

SandboxLimits read_limits(JsonReader& reader) {
  SandboxLimits limits;
  limits.wall_s = reader.number("wall_s", 0.1, 3600, limits.wall_s);
  limits.cpu_s = reader.number("cpu_s", 1, 3600, std::max(limits.cpu_s, limits.wall_s));
  limits.memory_bytes = reader.integer("memory_mib", 16, 1 << 20, limits.memory_bytes >> 20) << 20;
  limits.processes = static_cast<int>(reader.integer("processes", 1, 4096, limits.processes));
  limits.output_bytes = reader.integer("output_kib", 1, 65536, limits.output_bytes >> 10) << 10;
  limits.disk_bytes = reader.integer("disk_mib", 1, 65536, limits.disk_bytes >> 20) << 20;
  limits.files = reader.integer("files", 1, 1 << 20, limits.files);
  return limits;
}

// A tool that runs programs is refused when it is configured, not at its first call.
void need_sandbox(const std::string& where) {
  if (const std::string why = Sandbox::why_not(); !why.empty())
    throw_environment("{}: this tool needs the sandbox, which does not work here: {}", where, why);
}

ProgramOptions read_program(JsonReader& reader, const std::string& where) {
  ProgramOptions options;
  options.name = reader.string("name", "");
  options.description = reader.string("description", "");
  options.limits = read_limits(reader);
  reader.finish();
  need_sandbox(where);
  return options;
}

std::vector<std::string> read_texts(JsonReader& reader, std::string_view key) {
  std::vector<std::string> texts;
  const nlohmann::json* list = reader.find(key);
  if (list == nullptr || !list->is_array() || list->empty()) reader.fail(key, "a list of texts is expected");
  for (const auto& element : *list) {
    if (!element.is_string()) reader.fail(key, "a list of texts is expected");
    texts.push_back(element.get<std::string>());
  }
  return texts;
}

void add_command(const nlohmann::json& entry, const std::string& where, ToolBox& box) {
  JsonReader reader(entry, where);
  reader.ignore("tool");
  CommandOptions options;
  options.name = reader.string("name");
  options.description = reader.string("description", "");
  options.argv = read_texts(reader, "argv");
  const nlohmann::json* schema = reader.find("schema");
  if (schema == nullptr || !schema->is_object())
    reader.fail("schema", "a JSON schema (an object) is expected");
  options.schema = nlohmann::ordered_json(*schema);
  if (options.schema.value("type", nlohmann::ordered_json()) != "object")
    reader.fail("schema", "a call's arguments are an object: \"type\": \"object\" is expected");
  for (const std::string& part : options.argv) {
    if (part.size() <= 2 || part.front() != '{' || part.back() != '}') continue;
    const auto properties = options.schema.find("properties");
    if (properties == options.schema.end() || !properties->contains(part.substr(1, part.size() - 2)))
      reader.fail("argv", fmt::format("{} is no property of the schema", quote(part)));
  }
  if (const nlohmann::json* mounts = reader.find("read_only")) {
    if (!mounts->is_object())
      reader.fail("read_only", "an object {HOST PATH: PATH IN THE SANDBOX} is expected");
    for (const auto& [from, to] : mounts->items()) {
      if (!to.is_string() || !to.get<std::string>().starts_with("/"))
        reader.fail("read_only", fmt::format("{}: an absolute path is expected", quote(from)));
      options.read_only.emplace_back(from, to.get<std::string>());
    }
  }
  options.limits = read_limits(reader);
  reader.finish();
  need_sandbox(where);
  box.add(make_command(std::move(options)));
}

void add_documents(const nlohmann::json& entry, const std::string& where, ToolBox& box) {
  JsonReader reader(entry, where);
  reader.ignore("tool");
  DocumentOptions options;
  options.path = reader.string("path", "");
  options.document_bytes = reader.integer("document_mib", 1, 1 << 20, options.document_bytes >> 20) << 20;
  reader.finish();
  box.add(make_search(options));
  box.add(make_read(options));
}

void add_sql(const nlohmann::json& entry, const std::string& where, ToolBox& box) {
  JsonReader reader(entry, where);
  reader.ignore("tool");
  SqlOptions options;
  options.path = reader.string("path", options.path);
  options.write = reader.boolean("write", options.write);
  options.wall_s = reader.number("wall_s", 0.01, 600, options.wall_s);
  options.rows = reader.integer("rows", 1, 100000, options.rows);
  options.disk_bytes = reader.integer("disk_mib", 1, 65536, options.disk_bytes >> 20) << 20;
  options.memory_bytes = reader.integer("memory_mib", 1, 65536, options.memory_bytes >> 20) << 20;
  reader.finish();
  box.add(make_sql(std::move(options)));
}

std::map<std::string, ToolMaker> own_kinds() {
  std::map<std::string, ToolMaker> kinds;
  kinds["calculator"] = [](const nlohmann::json& entry, const std::string& where, ToolBox& box) {
    JsonReader reader(entry, where);
    reader.ignore("tool");
    reader.finish();
    box.add(make_calculator());
  };
  kinds["python"] = [](const nlohmann::json& entry, const std::string& where, ToolBox& box) {
    JsonReader reader(entry, where);
    reader.ignore("tool");
    box.add(make_python(read_program(reader, where)));
  };
  kinds["shell"] = [](const nlohmann::json& entry, const std::string& where, ToolBox& box) {
    JsonReader reader(entry, where);
    reader.ignore("tool");
    box.add(make_shell(read_program(reader, where)));
  };
  kinds["command"] = add_command;
  kinds["files"] = [](const nlohmann::json& entry, const std::string& where, ToolBox& box) {
    JsonReader reader(entry, where);
    reader.ignore("tool");
    FilesOptions options;
    options.disk_bytes = reader.integer("disk_mib", 1, 65536, options.disk_bytes >> 20) << 20;
    options.files = reader.integer("files", 1, 1 << 20, options.files);
    reader.finish();
    box.add(make_files(options));
  };
  kinds["search"] = add_documents;
  kinds["sql"] = add_sql;
  return kinds;
}

}  // namespace

std::unique_ptr<ToolBox> make_toolbox(const nlohmann::json& config, std::string_view where,
                                      const std::map<std::string, ToolMaker>& more) {
  std::map<std::string, ToolMaker> kinds = own_kinds();
  for (const auto& [kind, maker] : more) kinds[kind] = maker;
  if (!config.is_array())
    throw_input("{}: a list of tools is expected, not {}", where, json_type_name(config));
  auto box = std::make_unique<ToolBox>();
  for (size_t i = 0; i < config.size(); ++i) {
    const std::string at = fmt::format("{}[{}]", where, i);
    const nlohmann::json entry = config[i].is_string() ? nlohmann::json{{"tool", config[i]}} : config[i];
    JsonReader reader(entry, at);
    const std::string kind = reader.string("tool");
    const auto maker = kinds.find(kind);
    if (maker == kinds.end()) {
      std::vector<std::string> names;
      for (const auto& [name, unused] : kinds) names.push_back(name);
      throw_input("{}: there is no kind of tool {}; there are {}", at, quote(kind), join(names));
    }
    maker->second(entry, at, *box);
  }
  return box;
}

}  // namespace perigee::agents
