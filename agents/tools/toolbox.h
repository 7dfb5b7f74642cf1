// The tools of a conversation, by name: declares them to the policy, checks what it calls them with, and runs them.
#pragma once
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "agents/tools/schema.h"
#include "agents/tools/tool.h"
#include "base/episode.h"
#include "policy/tokenizer/chat.h"

namespace perigee::agents {

// Constant after the last add(); call() may then be run by several threads at once.
class ToolBox {
 public:
  ToolBox() = default;
  ToolBox(ToolBox&&) = default;
  ToolBox& operator=(ToolBox&&) = default;

  // ERRORS (input): a name of another form or already there, a schema with unknown keywords.
  void add(std::unique_ptr<Tool> tool);

  bool empty() const { return entries_.empty(); }
  std::vector<std::string> names() const;  // in order of addition
  // The tool of that name, or null. Lives as long as the box.
  const Tool* find(std::string_view name) const;
  // Its parameters' schema (for constrained decoding), or null.
  const nlohmann::ordered_json* parameters(std::string_view name) const;
  // The text for policy::append_tools: a JSON list, in order of addition; "" when there are no tools.
  const std::string& declarations() const { return declarations_; }

  // Runs the call and tells all that the record needs, digest and times included. Never throws: an unknown tool,
  // malformed JSON or arguments that break the schema give status "error" and a sentence the model can act on.
  ToolEvent call(const policy::ParsedCall& call, int turn, const ToolContext& context) const;
  // The same for a call whose arguments are JSON text.
  ToolEvent call(std::string_view name, std::string_view arguments, int turn,
                 const ToolContext& context) const;

 private:
  struct Entry {
    std::string name;
    std::unique_ptr<Tool> tool;
    nlohmann::ordered_json parameters;
    std::unique_ptr<ArgumentSchema> schema;
  };
  const Entry* entry(std::string_view name) const;

  std::vector<Entry> entries_;
  std::string declarations_;
};

// Adds the tools of one entry {"tool": KIND, ...} of a configuration to the box. ERRORS (input): name where.
using ToolMaker = std::function<void(const nlohmann::json& entry, const std::string& where, ToolBox& box)>;

// From a configuration: a list of names and objects, such as
//   ["calculator", {"tool": "python", "wall_s": 5}, {"tool": "command", "name": "wc", "argv": ["wc", "-l"], ...}]
// docs/tools.md has all of it. more: kinds that other rooms bring, such as "mcp".
// ERRORS (input): "WHERE: ..." for an unknown kind or key, a wrong type, a name twice.
// ERRORS (environment): a tool that needs the sandbox, where Sandbox::why_not() refuses it.
std::unique_ptr<ToolBox> make_toolbox(const nlohmann::json& config, std::string_view where,
                                      const std::map<std::string, ToolMaker>& more = {});

}  // namespace perigee::agents
