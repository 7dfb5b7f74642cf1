// Where tasks come from: generators and files. A task is a pure function of (configuration, seed, index): who
// asks, in which order or process, does not matter.
//
//   {"kind": "arithmetic", "min_digits": 1, "max_digits": 2, "min_operands": 2, "max_operands": 2,
//    "operators": "+-", "negative": false}
//   {"kind": "countdown", "min_numbers": 3, "max_numbers": 4, "max_number": 10, "max_target": 100}
//   {"kind": "sort", "items": "numbers", "min_length": 3, "max_length": 6, "max_number": 99}
//    ("items": or "letters")
// For comparing token mixers (docs/tasks.md); a prompt has exactly "length" bytes of printable ASCII:
//   {"kind": "palindrome", "length": 64, "symbols": 26}
//   {"kind": "mqar", "length": 64, "pairs": 8, "queries": 8, "values": 10, "key_length": 1, "gaps": "near"}
//   {"kind": "stack", "length": 64, "stacks": 64, "elements": 26, "pushes": 0.6}
// For long contexts (docs/long_context.md), of "length" tokens together with the answer's rollout.max_new_tokens:
//   {"kind": "needle", "length": 4096, "variant": "single", ...}, variable_tracking, common_words, frequent_words, mrcr
// For environments (docs/environments.md):
//   {"kind": "calculate", "min_digits": 3, "max_digits": 5, "min_operands": 2, "max_operands": 2, "operators": "+-*",
//    "call_share": 1}
//    (so large a share of the worked examples ask the calculator, the others know the answer)
//   {"kind": "sql", "min_rows": 20, "max_rows": 60}
//   {"kind": "document", "bytes": 60000, "facts": 24, "min_asked": 2, "max_asked": 3}
//   {"kind": "code", "tests": 12, "max_length": 12}
//   {"kind": "jsonl", "path": "train.jsonl", "held_out_path": "", "hash": "", "held_out_hash": ""}
//
// Generators also take "think_open", "think_close" (of worked examples) and "levels": a list of objects, each
// the generator's options where a level differs, "name" and "weight" (1); levels are shared out by weight.
// A level of weight 0 is evaluated and never trained on. "lengths": [64, 128], "held_out_lengths": [256] are short for
// levels {"name": "length 64", "length": 64}, ..., those held out of weight 0.
// "curriculum": {"floor": 0.05} lets success rates move the weights.
//
// INVARIANTS
//  T1  A train task and a held-out task are never the same problem, nor the same up to the order of operands
//      (numbers to sort, to use): the problem space is cut by a hash of the problem itself, whatever the
//      seed, the level or the split of the work.
//  T2  An index names its level: level = index % levels().
#pragma once
#include <nlohmann/json_fwd.hpp>

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "policy/tokenizer/chat.h"
#include "rollout/tasks/prompt_tokens.h"

namespace perigee::rollout {

// Of the folder that an episode's tools work in.
struct TaskFile {
  std::string name;       // plain
  std::string text;       // its content; of a database the SQL that makes it
  bool database = false;  // SQLite
  bool operator==(const TaskFile&) const = default;
};

// Of a text, [begin, end) in bytes.
struct TextRange {
  size_t begin = 0, end = 0;
  bool operator==(const TextRange&) const = default;
};

struct Task {
  uint64_t index = 0;
  std::string prompt;             // plain text; empty when messages are given
  std::vector<policy::Message> messages;  // for the chat template
  std::string tools;              // for the chat template: the text of the list of tools, or ""
  std::string answer;             // for the verifier
  // Of the prompt, ascending and apart: what is an answer too, to an earlier question of the same text. Worked examples
  // train on it; the tokens of prompt are cut at its borders. Without messages only.
  std::vector<TextRange> answered;
  std::string worked_example;     // a whole response ending in the answer, for the warm-up; files: may be ""
  // The same as a conversation that goes on from the prompt: turns of the assistant, of which the last is the answer.
  // Where a turn's calls are not followed by messages of the role tool, the environment's tools answer them.
  std::vector<policy::Message> worked_turns;
  std::vector<TaskFile> files;    // of an environment
  std::string difficulty;         // the level's name
  std::string verifier;  // that the answer is for: "numeric", "countdown", "exact", "positions",
                         // "code"; empty: the run's default
  std::string where;     // FILE:LINE that it stands in; empty: generated
  bool operator==(const Task&) const = default;
};

// Thread safety: const calls from several threads at once.
class TaskSource {
 public:
  virtual ~TaskSource() = default;
  virtual Task train(uint64_t index) const = 0;
  virtual Task held_out(uint64_t index) const = 0;
  // Distinct tasks before they repeat; 0: no such number (a generator draws with replacement).
  virtual uint64_t train_count() const { return 0; }
  virtual uint64_t held_out_count() const { return 0; }

  uint64_t levels() const { return weights_.size(); }
  const std::vector<double>& level_weights() const { return weights_; }  // as configured
  const std::vector<std::string>& level_names() const { return names_; }
  uint64_t level_of(uint64_t index) const { return index % levels(); }
  // The train index of the ordinal-th task when levels are shared out by these weights. REQUIRES
  // weights.size() == levels(), not all 0.
  uint64_t train_index(uint64_t ordinal, std::span<const double> weights) const;
  uint64_t train_index(uint64_t ordinal) const { return train_index(ordinal, weights_); }
  // The configuration asks for a curriculum; what is left of a level's weight when it teaches nothing.
  bool has_curriculum() const { return curriculum_; }
  double curriculum_floor() const { return floor_; }

 protected:
  uint64_t seed_ = 0;
  std::vector<double> weights_{1.0};
  std::vector<std::string> names_{""};
  bool curriculum_ = false;
  double floor_ = 0.05;
};

// ERRORS (input): one line, naming the key with the nearest suggestion, or the file and line; a generator
// whose problems are too few to hold some out; a length that it cannot reach.
// tokens: how generators of long prompts count.
std::unique_ptr<TaskSource> make_task_source(const nlohmann::json& config, std::string_view where, uint64_t seed,
                                             const PromptTokens& tokens = PromptTokens::bytes());

// Adds "hash" and "held_out_hash" of the files that a configuration of kind jsonl names, where it says none: from then on
// make_task_source refuses other files. ERRORS: a file that cannot be read.
void pin_task_files(nlohmann::json& tasks);
// ERRORS (input): such a file is another one, or not there.
void check_task_files(const nlohmann::json& tasks);

// What a level has shown so far; both may be fractions (mean successes of groups, or decayed counts).
struct LevelRecord {
  double attempts = 0, successes = 0;
};
// Weights that favour the levels whose samples differ most:
//   base * (floor + (1 - floor) * 4 p (1 - p)),  p = (successes + 1) / (attempts + 2)
// A level never tried has p = 1/2. A pure function of what was recorded.
std::vector<double> curriculum_weights(std::span<const double> base, std::span<const LevelRecord> records,
                                       double floor);

// The pieces of worked examples, written in full so that each byte follows from few others.
struct WorkedStyle {
  std::string think_open = "<think>", think_close = "</think>";
};
// Digit by digit, least significant first, the shorter operand padded with 0; c1 a carry, b1 a borrow:
//   47+38  7+8=15c1 4+3+1=8         a sum
//   52-38  2-8=4b1 5-3-1=1          a difference; when it is negative, of the swapped operands after "n"
//   47*8   7*8=56c5 4*8+5=37        a product by one digit
// Several operations, and a product by several digits, are sections "STEPS=VALUE" joined by ";".
// REQUIRES operands.size() == operators.size() + 1, operators of "+-*" (* before + and -), no value beyond
// 18 digits.
std::string arithmetic_steps(std::span<const int64_t> operands, std::string_view operators);
int64_t arithmetic_value(std::span<const int64_t> operands, std::string_view operators);

// The hash that cuts train from held out: one problem in eight is held out.
bool is_held_out(std::string_view canonical_problem);

}  // namespace perigee::rollout
