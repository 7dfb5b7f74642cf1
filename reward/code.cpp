// Code judged by hidden tests. Three things are kept apart: what the policy wrote runs in a sandbox that holds the
// arguments of the tests and nothing else; the expected results never leave this process; and results are compared here,
// after the sandbox is gone. So there is no test to read, no grader to patch and no file in which a reward stands.
#include <stdexcept>

#include "base/error.h"
#include "base/sandbox/sandbox.h"
#include "base/text.h"
#include "reward/verifiers.h"

namespace perigee::reward {
namespace {

// Runs in the sandbox beside the artefact, which may do with it what it likes: all it can win is to print results. The
// artefact's own prints go nowhere, so that they are not mistaken for results.
constexpr std::string_view kHarness = R"python(
import json, os, sys
job = json.load(sys.stdin)
out = os.fdopen(os.dup(1), "w")
nowhere = os.open(os.devnull, os.O_RDWR)
os.dup2(nowhere, 0)
os.dup2(nowhere, 1)
os.dup2(nowhere, 2)
space = {"__name__": "solution"}
exec(compile(job["code"], "solution.py", "exec"), space)
for arguments in job["calls"]:
    try:
        line = json.dumps([space[job["function"]](*arguments)])
    except Exception:
        line = "null"
    out.write(line + "\n")
out.write("end\n")
out.flush()
)python";

constexpr size_t kMaxCodeBytes = 1 << 20;

// The last block ```python ... ``` (or ``` ... ```); without a block the whole text.
std::string_view code_of(std::string_view text) {
  constexpr std::string_view kFence = "```";
  const size_t close = text.rfind(kFence);
  if (close == text.npos) return text;
  const size_t open = close == 0 ? text.npos : text.rfind(kFence, close - 1);
  if (open == text.npos) return text;
  std::string_view block = text.substr(open + kFence.size(), close - open - kFence.size());
  const size_t line = block.find('\n');
  if (line == block.npos) return block;
  return block.substr(line + 1);  // what stands behind the fence is the language
}

struct Tests {
  std::string function;
  nlohmann::json calls = nlohmann::json::array(), results = nlohmann::json::array();
};

Tests parse_tests(const std::string& answer) {
  const auto fail = [] { throw std::runtime_error("the task's answer holds no tests"); };
  const nlohmann::json all = nlohmann::json::parse(answer, nullptr, false);
  if (!all.is_object() || !all.contains("function") || !all["function"].is_string() ||
      !all.contains("tests") || !all["tests"].is_array() || all["tests"].empty())
    fail();
  Tests tests;
  tests.function = all["function"];
  for (const auto& test : all["tests"]) {
    if (!test.is_object() || !test.contains("arguments") || !test["arguments"].is_array() ||
        !test.contains("result"))
      fail();
    tests.calls.push_back(test["arguments"]);
    tests.results.push_back(test["result"]);
  }
  return tests;
}

// The results by test; an empty list when the program did not come to its end in order.
std::vector<nlohmann::json> read_results(const SandboxResult& run, size_t count) {
  if (run.outcome != SandboxResult::kExited || run.exit_code != 0 || run.truncated) return {};
  std::vector<nlohmann::json> results;
  std::string_view rest = run.output;
  for (size_t i = 0; i <= count; ++i) {
    const size_t end = rest.find('\n');
    if (end == rest.npos) return {};
    const std::string_view line = rest.substr(0, end);
    rest.remove_prefix(end + 1);
    if (i == count) return line == "end" && rest.empty() ? results : std::vector<nlohmann::json>{};
    results.push_back(nlohmann::json::parse(line, nullptr, false));
  }
  return {};
}

class Code : public Verifier {
 public:
  explicit Code(JsonReader& options) {
    limits_.wall_s = options.number("wall_s", 0.01, 3600, 5);
    limits_.cpu_s = limits_.wall_s;
    limits_.memory_bytes = options.integer("memory_mib", 16, 1 << 20, 256) << 20;
    limits_.processes = 4;
    limits_.output_bytes = 1 << 20;
    limits_.disk_bytes = 16 << 20;
    partial_ = options.boolean("partial", false);
  }
  bool judges() const override { return true; }

  Verdict verify(const RewardInput& input, const GroupContext*, Budget&) const override {
    const Tests tests = parse_tests(input.answer);
    if (input.finish != FinishReason::kStop) return {0, "cut off before its end"};
    const std::string_view code = code_of(input.response);
    if (code.size() > kMaxCodeBytes) return {0, "longer than a mebibyte"};
    if (!is_utf8(code) || code.find('\0') != code.npos) return {0, "not a text"};
    SandboxJob job;
    job.argv = {"python3", "-I", "-S", "-c", std::string(kHarness)};
    job.input = nlohmann::json{{"code", code}, {"function", tests.function}, {"calls", tests.calls}}.dump();
    job.limits = limits_;
    // A sandbox that is refused or breaks throws: a recorded failure, not a zero.
    const SandboxResult run = Sandbox().run(job);
    const auto results = read_results(run, tests.results.size());
    if (results.empty())
      return {0, fmt::format("it gave no results in order ({}, exit code {})", outcome_name(run.outcome),
                             run.exit_code)};
    size_t right = 0;
    for (size_t i = 0; i < results.size(); ++i) right += same(results[i], tests.results[i]);
    const double share = static_cast<double>(right) / static_cast<double>(results.size());
    return {right == results.size() ? 1.0
            : partial_              ? share * 0.99
                                    : 0.0,
            fmt::format("{} of {} tests", right, results.size())};
  }

 private:
  // The result stands in a list of its own, so that a lone null is told from a result that could not be printed. 1 and
  // 1.0 are the same number; true is not a number.
  static bool same(const nlohmann::json& printed, const nlohmann::json& expected) {
    if (!printed.is_array() || printed.size() != 1) return false;
    const auto& value = printed[0];
    const bool comparable = value.type() == expected.type() || (value.is_number() && expected.is_number());
    return comparable && value == expected;
  }

  SandboxLimits limits_;
  bool partial_ = false;
};

}  // namespace

std::unique_ptr<Verifier> make_code(JsonReader& options) {
  return std::make_unique<Code>(options);
}

}  // namespace perigee::reward
