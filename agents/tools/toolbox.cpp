#include "agents/tools/toolbox.h"

#include <chrono>
#include <exception>

#include "agents/tools/output.h"
#include "base/error.h"
#include "base/hash.h"
#include "base/json.h"
#include "base/text.h"

namespace perigee::agents {
namespace {

constexpr size_t kMaxName = 64;
constexpr size_t kMaxArguments = 4 << 20;

bool is_name(std::string_view name) {
  if (name.empty() || name.size() > kMaxName) return false;
  for (const char c : name)
    if (!((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c == '-'))
      return false;
  return true;
}

ToolResult refused(std::string sentence) {
  return {std::move(sentence), "error"};
}

}  // namespace

void ToolBox::add(std::unique_ptr<Tool> tool) {
  PERIGEE_CHECK(tool != nullptr);
  Entry entry;
  entry.name = tool->name();
  if (!is_name(entry.name))
    throw_input("tool {}: a name is 1 to {} of the characters A-Z a-z 0-9 _ -", quote(entry.name), kMaxName);
  if (find(entry.name) != nullptr) throw_input("tool {}: this name is there twice", entry.name);
  const nlohmann::ordered_json declaration = tool->declaration();
  const auto function = declaration.find("function");
  PERIGEE_CHECK(function != declaration.end() && function->value("name", "") == entry.name, "tool {}",
                entry.name);
  entry.parameters = function->value("parameters", nlohmann::ordered_json{{"type", "object"}});
  if (!entry.parameters.is_object()) throw_input("tool {}: its schema is not an object", entry.name);
  if (!tool->checks_arguments())
    entry.schema = std::make_unique<ArgumentSchema>(entry.parameters, "tool " + entry.name);
  std::string text;
  try {
    text = declaration.dump();
  } catch (const nlohmann::json::exception&) {
    throw_input("tool {}: its declaration is not UTF-8", entry.name);
  }
  entry.tool = std::move(tool);
  entries_.push_back(std::move(entry));
  if (declarations_.empty())
    declarations_ = "[" + text + "]";
  else
    declarations_.replace(declarations_.size() - 1, 1, "," + text + "]");
}

std::vector<std::string> ToolBox::names() const {
  std::vector<std::string> names;
  for (const Entry& e : entries_) names.push_back(e.name);
  return names;
}

const ToolBox::Entry* ToolBox::entry(std::string_view name) const {
  for (const Entry& e : entries_)
    if (e.name == name) return &e;
  return nullptr;
}

const Tool* ToolBox::find(std::string_view name) const {
  const Entry* e = entry(name);
  return e == nullptr ? nullptr : e->tool.get();
}

const nlohmann::ordered_json* ToolBox::parameters(std::string_view name) const {
  const Entry* e = entry(name);
  return e == nullptr ? nullptr : &e->parameters;
}

ToolEvent ToolBox::call(const policy::ParsedCall& call, int turn, const ToolContext& context) const {
  if (call.error.empty()) return this->call(call.call.name, call.call.arguments, turn, context);
  ToolEvent event;
  event.turn = turn;
  event.started_us = std::chrono::duration_cast<std::chrono::microseconds>(
                         std::chrono::system_clock::now().time_since_epoch())
                         .count();
  event.name = is_name(call.call.name) ? call.call.name : quote(call.call.name, kMaxName);
  event.input = call.call.arguments;
  event.output = cut_output(fmt::format("this call cannot be run: {}", call.error), context.output_bytes);
  event.status = "error";
  event.digest = hash_hex(event.output);
  return event;
}

ToolEvent ToolBox::call(std::string_view name, std::string_view arguments, int turn,
                        const ToolContext& context) const {
  const auto clock = std::chrono::steady_clock::now();
  ToolEvent event;
  event.turn = turn;
  event.started_us = std::chrono::duration_cast<std::chrono::microseconds>(
                         std::chrono::system_clock::now().time_since_epoch())
                         .count();
  event.name = is_name(name) ? std::string(name) : quote(name, kMaxName);
  event.input = arguments;
  ToolResult result;
  try {
    const Entry* e = entry(name);
    if (e == nullptr) {
      const std::vector<std::string> known = names();
      const std::string near = did_you_mean(name, known);
      result =
          refused(fmt::format("there is no tool {}{}", quote(name, kMaxName),
                              near.empty() ? (known.empty() ? "" : "; the tools are " + join(known)) : near));
    } else if (arguments.size() > kMaxArguments) {
      result = refused(fmt::format("the arguments are longer than {} bytes", kMaxArguments));
    } else {
      nlohmann::json parsed;
      std::string wrong;
      try {
        parsed = parse_json(arguments, "arguments");
        if (!parsed.is_object())
          wrong = "arguments: a JSON object is expected";
        else if (e->schema)
          wrong = e->schema->check(parsed);
      } catch (const Error& error) {
        wrong = error.what();
      }
      result = wrong.empty() ? e->tool->call(parsed, context) : refused(std::move(wrong));
    }
  } catch (const std::exception& error) {
    // A machine that fails is the session's to live with: the policy is told, the episode goes on.
    result = refused(fmt::format("the tool failed: {}", error.what()));
  }
  event.output = cut_output(std::move(result.output), context.output_bytes);
  event.status = std::move(result.status);
  event.digest = hash_hex(event.output);
  event.duration_us =
      std::chrono::duration_cast<std::chrono::microseconds>(std::chrono::steady_clock::now() - clock).count();
  return event;
}

}  // namespace perigee::agents
