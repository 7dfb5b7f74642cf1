// Decoding restricted to a JSON schema, to any JSON object, or to tool calls: whatever the model's probabilities, the
// text is valid when it ends, and it can always end.
//
// What is generated (a subset of what the schema allows, of one form; docs/structured_output.md):
//   white space   at most one space after ',' and after ':', nowhere else
//   objects       declared properties in the schema's order, then additional ones; no key twice
//   numbers       integers of at most 18 digits, without "-0"; other numbers of at most 15 digits before and 15 after
//                 the point and an exponent of at most 2 digits
//   strings       well-formed UTF-8; any JSON escape in free text, surrogates in pairs only; under a pattern or format,
//                 in keys, in enum and const: raw but for `\"`, `\\`, \b \f \n \r \t and \u00xx for other controls
//   nesting       at most 64 levels, as base/json.h reads
//
// Schemas are refused, never weakened: a keyword that is not honoured is an error that names it and where it stands.
#pragma once
#include <nlohmann/json.hpp>

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "policy/engine/constraint.h"
#include "policy/grammar/token_index.h"

namespace perigee::policy {

struct ConstraintOptions {
  // Tokens that end the text, all of them allowed where it may end. At least one.
  std::vector<int32_t> end_tokens;
  // The tokens this turn may have, the end token included; 0: not known. With it the constraint counts, and as the
  // limit comes near allows only what can still be finished: with max_tokens >= min_tokens_to_finish() at the start the
  // text is complete, end token and all, within the limit.
  int64_t max_tokens = 0;
  std::string where = "schema";  // names the schema in errors
};

class GrammarConstraint : public TokenConstraint {
 public:
  // The fewest bytes and special tokens that complete the text from here, the end token included. Every byte is a
  // token of both tokenizers, so as many tokens are enough.
  virtual int64_t min_tokens_to_finish() const = 0;
  // Sets anew what max_tokens counts: tokens that may still come.
  virtual void set_remaining(int64_t tokens) = 0;
  // Only an end token may come (or has come).
  virtual bool complete() const = 0;
};

// The text is a value of the schema. Keys keep the order of an ordered_json. ERRORS (input), one line
// "WHERE: #/pointer: what": a keyword or combination that is not supported, a schema that nothing satisfies, or one
// too large (limits: policy/grammar/automaton.h).
std::unique_ptr<GrammarConstraint> json_schema_constraint(const TokenIndex& index,
                                                          const nlohmann::ordered_json& schema,
                                                          const ConstraintOptions& options);
// The text is any JSON object.
std::unique_ptr<GrammarConstraint> json_object_constraint(const TokenIndex& index,
                                                          const ConstraintOptions& options);

struct ToolSpec {
  std::string name;
  nlohmann::ordered_json parameters;  // a schema of an object; null: no parameters, the arguments are {}
};

enum class ToolChoice : uint8_t {
  kAuto,      // text and, if the model begins one, a section of calls
  kRequired,  // a section of calls
};

struct ToolCallOptions {
  std::vector<ToolSpec> tools;  // those that may be called: for a named choice, the one
  ToolChoice choice = ToolChoice::kAuto;
  bool parallel = true;      // more than one call in the section
  int max_calls = 16;        // in the section, when parallel
  int64_t first_index = 0;   // of the calls' ids: calls earlier in the conversation
  bool text_before = false;  // kRequired: text may come before the section
};

// An assistant's turn (policy/tokenizer/chat.h): for kAuto TEXT [CALLS] END; for kRequired CALLS END. TEXT is any
// plain tokens; no special token but the section's begin and the end tokens is allowed in it. Ids are
// functions.NAME:INDEX with the indices counted on. ERRORS (input): as above, a tool's schema that is not of an object,
// a name that is empty, twice or not of [A-Za-z0-9_.-], no tool.
std::unique_ptr<GrammarConstraint> tool_call_constraint(const TokenIndex& index, const ToolCallOptions& tools,
                                                        const ConstraintOptions& options);

// Compiles and drops: the same errors, for a request that is checked before it is queued.
void check_schema(const nlohmann::ordered_json& schema, const std::string& where);

}  // namespace perigee::policy
