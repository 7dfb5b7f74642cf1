#include "policy/grammar/grammar.h"

#include <algorithm>
#include <set>

#include "base/error.h"
#include "base/text.h"
#include "policy/grammar/constraint.h"
#include "policy/grammar/schema.h"

namespace perigee::policy {
namespace {

using nlohmann::ordered_json;

// The symbol of a special token.
uint16_t symbol(Automaton& a, int32_t token) {
  const auto it = std::find(a.specials.begin(), a.specials.end(), token);
  const auto at = static_cast<size_t>(it - a.specials.begin());
  if (it == a.specials.end()) a.specials.push_back(token);
  return static_cast<uint16_t>(kFirstSpecial + at);
}

int32_t token_step(Automaton& a, int32_t token, int32_t to) {
  const uint16_t s = symbol(a, token);
  return a.step(s, s, to);
}

// Before any of the end tokens, after which the text is complete.
int32_t ending(Automaton& a, const std::vector<int32_t>& end_tokens) {
  if (a.final < 0) a.final = a.add({});
  const int32_t end = a.add({});
  for (int32_t t : end_tokens) {
    const uint16_t s = symbol(a, t);
    a.edge(end, s, s, a.final);
    a.edge(a.final, s, s, a.final);
  }
  return end;
}

std::string key_of(std::string_view kind, const std::vector<int32_t>& end_tokens) {
  std::string key(kind);
  for (int32_t t : end_tokens) key += fmt::format(" {}", t);
  return key + "\n";
}

void check_options(const TokenIndex& index, const ConstraintOptions& options) {
  PERIGEE_CHECK(!options.end_tokens.empty() && options.max_tokens >= 0, "{} end tokens, max_tokens {}",
                options.end_tokens.size(), options.max_tokens);
  for (int32_t t : options.end_tokens)
    PERIGEE_CHECK(t >= 0 && t < index.vocab_size(), "token {} of {}", t, index.vocab_size());
}

// As text, with what tells schemas apart. Invalid UTF-8 is refused by the compiler.
std::string text_of(const ordered_json& schema) {
  return schema.dump(-1, ' ', false, ordered_json::error_handler_t::replace);
}

std::unique_ptr<GrammarConstraint> constraint(const TokenIndex& index, const ConstraintOptions& options,
                                              const std::string& key,
                                              const std::function<void(Automaton&)>& build) {
  std::shared_ptr<CompiledGrammar> grammar;
  try {
    grammar = index.cache().get(key, build);
  } catch (const Error& e) {
    const std::string what = e.what();
    if (what.starts_with(options.where + ": ")) throw;
    throw_input("{}: #: {}", options.where, what);  // of the automaton as a whole
  }
  return std::make_unique<MachineConstraint>(index, std::move(grammar), options.max_tokens);
}

void check_tools(const ToolCallOptions& tools, const std::string& where) {
  if (tools.tools.empty()) throw_input("{}: there are no tools to call", where);
  constexpr size_t kMaxTools = 1000;
  if (tools.tools.size() > kMaxTools) throw_input("{}: more than {} tools", where, kMaxTools);
  PERIGEE_CHECK(tools.first_index >= 0 && tools.max_calls >= 1, "{} {}", tools.first_index, tools.max_calls);
  std::set<std::string> names;
  for (const ToolSpec& t : tools.tools) {
    const bool fine =
        !t.name.empty() && t.name.size() <= 128 && std::all_of(t.name.begin(), t.name.end(), [](char c) {
          return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' ||
                 c == '-' || c == '.';
        });
    if (!fine)
      throw_input("{}: the tool name {} is not of letters, digits, '_', '-' and '.'", where, quote(t.name));
    if (!names.insert(t.name).second) throw_input("{}: the tool {} is there twice", where, t.name);
  }
}

void build_calls(Automaton& a, const TokenIndex& index, const ToolCallOptions& tools,
                 const ConstraintOptions& options) {
  const auto token = [&](std::string_view name) { return index.special(name); };
  std::vector<int32_t> arguments;
  for (const ToolSpec& t : tools.tools) {
    if (t.parameters.is_null())
      arguments.push_back(a.call(a.literal("{}", a.pop()), a.pop(), true));
    else
      arguments.push_back(
          schema_rule(a, t.parameters, fmt::format("{}: parameters of {}", options.where, t.name), true));
  }
  const int32_t end = ending(a, options.end_tokens);
  const int32_t section_end = token_step(a, token(special::kToolSectionEnd), end);
  int32_t after = section_end, calls = -1;
  for (int i = tools.parallel ? tools.max_calls : 1; i-- > 0;) {
    const int32_t call_end = token_step(a, token(special::kToolCallEnd), after);
    std::vector<int32_t> names;
    for (size_t t = 0; t < tools.tools.size(); ++t) {
      const int32_t json = token_step(a, token(special::kToolArgumentBegin), a.call(arguments[t], call_end));
      names.push_back(a.literal(fmt::format("{}:{}", tools.tools[t].name, tools.first_index + i), json));
    }
    calls = token_step(a, token(special::kToolCallBegin), a.literal("functions.", a.split(std::move(names))));
    after = a.split({section_end, calls});
  }
  const int32_t section = token_step(a, token(special::kToolSectionBegin), calls);
  if (tools.choice == ToolChoice::kRequired && !tools.text_before) {
    a.root = section;
    return;
  }
  // Any bytes; then the section, or the end where there may be none.
  const int32_t text = a.add({});
  a.edge(text, 0, 255, text);
  std::vector<int32_t> ways = {text, section};
  if (tools.choice == ToolChoice::kAuto) ways.push_back(end);
  a.root = a.split(std::move(ways));
  a.nodes[text].edges[0].to = a.root;
}

}  // namespace

std::unique_ptr<GrammarConstraint> json_schema_constraint(const TokenIndex& index, const ordered_json& schema,
                                                          const ConstraintOptions& options) {
  check_options(index, options);
  return constraint(index, options, key_of("schema", options.end_tokens) + text_of(schema),
                    [&](Automaton& a) {
                      const int32_t rule = schema_rule(a, schema, options.where);
                      a.root = a.call(rule, ending(a, options.end_tokens));
                    });
}

std::unique_ptr<GrammarConstraint> json_object_constraint(const TokenIndex& index,
                                                          const ConstraintOptions& options) {
  check_options(index, options);
  return constraint(index, options, key_of("object", options.end_tokens), [&](Automaton& a) {
    const int32_t rule = any_object_rule(a);
    a.root = a.call(rule, ending(a, options.end_tokens));
  });
}

std::unique_ptr<GrammarConstraint> tool_call_constraint(const TokenIndex& index, const ToolCallOptions& tools,
                                                        const ConstraintOptions& options) {
  check_options(index, options);
  check_tools(tools, options.where);
  std::string key = key_of("calls", options.end_tokens);
  key += fmt::format("{} {} {} {} {}\n", static_cast<int>(tools.choice), tools.parallel, tools.max_calls,
                     tools.first_index, tools.text_before);
  for (const ToolSpec& t : tools.tools) key += t.name + " " + text_of(t.parameters) + "\n";
  return constraint(index, options, key, [&](Automaton& a) { build_calls(a, index, tools, options); });
}

void check_schema(const ordered_json& schema, const std::string& where) {
  Automaton a;
  try {
    const int32_t rule = schema_rule(a, schema, where);
    a.final = a.add({});
    a.root = a.call(rule, a.final);
    a.finish();
  } catch (const Error& e) {
    const std::string what = e.what();
    if (what.starts_with(where + ": ")) throw;
    throw_input("{}: #: {}", where, what);
  }
}

}  // namespace perigee::policy
