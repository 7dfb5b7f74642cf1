#include <fmt/format.h>

#include <functional>
#include <map>

#include "agents/tools/calculator.h"
#include "agents/tools/toolbox.h"
#include "base/error.h"
#include "base/json.h"
#include "base/text.h"

namespace perigee::agents {
namespace {

std::map<std::string, ToolMaker> own_kinds() {
  std::map<std::string, ToolMaker> kinds;
  kinds["calculator"] = [](const nlohmann::json& entry, const std::string& where, ToolBox& box) {
    JsonReader reader(entry, where);
    reader.ignore("tool");
    reader.finish();
    box.add(make_calculator());
  };
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
