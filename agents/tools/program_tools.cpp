// Tools that run a program in the sandbox.
#include <fmt/format.h>

#include <algorithm>

#include "agents/tools/kinds.h"
#include "agents/tools/output.h"
#include "base/error.h"
#include "base/text.h"

namespace perigee::agents {
namespace {

using Json = nlohmann::ordered_json;

constexpr size_t kMaxCommandBytes = 100'000;  // the kernel takes 128 KiB in one argument
constexpr int kMaxCodeCharacters = 200'000;

Json function(const std::string& name, const std::string& description, Json parameters) {
  return Json{{"type", "function"},
              {"function",
               Json{{"name", name}, {"description", description}, {"parameters", std::move(parameters)}}}};
}

Json one_text(const char* name, const char* description, int max_length) {
  return Json{
      {"type", "object"},
      {"properties",
       Json{{name, Json{{"type", "string"}, {"description", description}, {"maxLength", max_length}}}}},
      {"required", Json::array({name})},
      {"additionalProperties", false}};
}

// The end of text, at most limit bytes, with a line before it that says so when it is cut.
std::string ending(const std::string& text, size_t limit) {
  if (text.size() <= limit) return text;
  const std::string note = fmt::format("[the last part of {} bytes]\n", text.size());
  if (limit <= note.size()) return "";
  size_t begin = text.size() - (limit - note.size());
  while (begin < text.size() && (static_cast<unsigned char>(text[begin]) & 0xC0) == 0x80) ++begin;
  return note + text.substr(begin);
}

ToolResult answer(const SandboxResult& r, const SandboxLimits& limits, int64_t output_bytes) {
  ToolResult result;
  std::string end;
  switch (r.outcome) {
    case SandboxResult::kExited:
      if (r.exit_code != 0) end = fmt::format("[exit code {}]", r.exit_code);
      break;
    case SandboxResult::kSignalled:
      end = fmt::format("[killed by signal {}]", r.exit_code - 128);
      break;
    case SandboxResult::kTimeout:
      end = fmt::format("[stopped: it took longer than {:g} s]", limits.wall_s);
      break;
    case SandboxResult::kStopped:
      end = "[stopped]";
      break;
    case SandboxResult::kMemory:
      end = fmt::format("[stopped: it took more than {} of memory]",
                        human_bytes(static_cast<uint64_t>(limits.memory_bytes)));
      break;
    case SandboxResult::kOutput:
      end = "[stopped: it wrote far too much output]";
      break;
    case SandboxResult::kDisk:
      end = fmt::format("[stopped: more than {} files or {} on its disk]", limits.files,
                        human_bytes(static_cast<uint64_t>(limits.disk_bytes)));
      break;
  }
  if (!r.note.empty()) end += fmt::format("{}[{}]", end.empty() ? "" : "\n", r.note);
  switch (r.outcome) {
    case SandboxResult::kExited:
      result.status = r.exit_code == 0 ? "ok" : "error";
      break;
    case SandboxResult::kSignalled:
      result.status = "error";
      break;
    case SandboxResult::kTimeout:
    case SandboxResult::kStopped:
      result.status = "timeout";
      break;
    default:
      result.status = "limit";
  }
  // The end of the errors says most (a traceback's last lines), the beginning of the output does. Both and the last
  // line share the room.
  const auto line_end = [](std::string& text) {
    if (!text.empty() && text.back() != '\n') text += '\n';
  };
  const size_t room = static_cast<size_t>(std::max<int64_t>(0, output_bytes));
  const size_t rest = room - std::min(room, end.size() + 40);
  std::string error =
      r.error.empty() ? "" : ending(r.error, std::max(rest / 2, rest - std::min(rest, r.output.size())));
  std::string output = r.output;
  const size_t left = rest - std::min(rest, error.size());
  if (output.size() > left || r.truncated) {
    const std::string_view shown = beginning(output, left - std::min<size_t>(left, 40));
    if (shown.size() < output.size() || r.output.size() >= static_cast<size_t>(limits.output_bytes))
      output = std::string(shown) + fmt::format("\n[cut after {} bytes]", shown.size());
  }
  if (!error.empty()) {
    line_end(output);
    output += "[errors]\n" + error;
  }
  if (!end.empty()) {
    line_end(output);
    output += end;
  }
  if (output.empty()) output = "[no output]";
  result.output = cut_output(std::move(output), output_bytes);
  return result;
}

ToolResult run(SandboxJob job, const ToolContext& context) {
  if (context.deadline_s > 0) job.limits.wall_s = std::min(job.limits.wall_s, context.deadline_s);
  job.limits.output_bytes = std::min(job.limits.output_bytes, context.output_bytes);
  job.work = context.work;
  try {
    return answer(Sandbox().run(job, context.stop), job.limits, context.output_bytes);
  } catch (const Error& e) {
    return {cut_output(fmt::format("this could not be run: {}", e.what()), context.output_bytes), "error"};
  }
}

class ProgramTool : public Tool {
 public:
  ProgramTool(ProgramOptions options, const char* name, const char* description, Json parameters)
      : options_(std::move(options)), parameters_(std::move(parameters)) {
    if (options_.name.empty()) options_.name = name;
    if (options_.description.empty()) options_.description = description;
  }
  const std::string& name() const override { return options_.name; }
  Json declaration() const override { return function(options_.name, options_.description, parameters_); }

 protected:
  ProgramOptions options_;
  Json parameters_;
};

class Python final : public ProgramTool {
 public:
  explicit Python(ProgramOptions options)
      : ProgramTool(std::move(options), "python",
                    "Runs Python 3 code in a sandbox without network, in the work folder. Print what you "
                    "want to see.",
                    one_text("code", "a whole program", kMaxCodeCharacters)) {}
  ToolResult call(const nlohmann::json& arguments, const ToolContext& context) override {
    SandboxJob job;
    job.argv = {"python3", "-I", "-B", "-"};
    job.input = arguments.at("code").get<std::string>();
    job.limits = options_.limits;
    return run(std::move(job), context);
  }
};

class Shell final : public ProgramTool {
 public:
  explicit Shell(ProgramOptions options)
      : ProgramTool(std::move(options), "shell",
                    "Runs a command of /bin/sh in a sandbox without network, in the work folder.",
                    one_text("command", "for example: sort data.txt | uniq -c | head", kMaxCommandBytes)) {}
  ToolResult call(const nlohmann::json& arguments, const ToolContext& context) override {
    SandboxJob job;
    const auto& command = arguments.at("command").get_ref<const std::string&>();
    if (command.size() > kMaxCommandBytes)
      return {fmt::format("the command is longer than {} bytes", kMaxCommandBytes), "error"};
    job.argv = {"/bin/sh", "-c", command};
    job.limits = options_.limits;
    return run(std::move(job), context);
  }
};

class Command final : public Tool {
 public:
  explicit Command(CommandOptions options) : options_(std::move(options)) {}
  const std::string& name() const override { return options_.name; }
  Json declaration() const override { return function(options_.name, options_.description, options_.schema); }
  ToolResult call(const nlohmann::json& arguments, const ToolContext& context) override {
    SandboxJob job;
    for (const std::string& part : options_.argv) {
      const bool named = part.size() > 2 && part.front() == '{' && part.back() == '}';
      if (!named) {
        job.argv.push_back(part);
        continue;
      }
      const auto value = arguments.find(part.substr(1, part.size() - 2));
      if (value == arguments.end()) continue;
      std::string text = value->is_string() ? value->get<std::string>() : value->dump();
      if (text.size() > kMaxCommandBytes)
        return {fmt::format("{} is longer than {} bytes", quote(part), kMaxCommandBytes), "error"};
      job.argv.push_back(std::move(text));
    }
    job.input = arguments.dump();
    job.read_only = options_.read_only;
    job.limits = options_.limits;
    return run(std::move(job), context);
  }

 private:
  CommandOptions options_;
};

}  // namespace

std::unique_ptr<Tool> make_python(ProgramOptions options) {
  return std::make_unique<Python>(std::move(options));
}
std::unique_ptr<Tool> make_shell(ProgramOptions options) {
  return std::make_unique<Shell>(std::move(options));
}
std::unique_ptr<Tool> make_command(CommandOptions options) {
  return std::make_unique<Command>(std::move(options));
}

}  // namespace perigee::agents
