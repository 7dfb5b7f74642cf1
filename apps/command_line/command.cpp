#include "apps/command_line/command.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <charconv>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <new>

#include "apps/command_line/commit.h"
#include "apps/command_line/environment_variables.h"
#include "base/error.h"
#include "base/text.h"

namespace perigee::apps {

struct Command::Impl {
  CLI::App* app = nullptr;
  std::vector<std::string> examples;
  std::function<int()> run;
};

struct Program::Impl {
  CLI::App app{
      "Trains hybrid linear-attention MoE policies by reinforcement learning and keeps every rollout.",
      "perigee"};
  std::vector<std::shared_ptr<Command::Impl>> commands;
};

namespace {

// Before CLI11 converts: it takes a number that is too large as the largest there is, and says "Could not convert".
std::string whole_number(const std::string& text) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error == std::errc::result_out_of_range) return fmt::format("{} is too large a number", text);
  return error == std::errc{} && end == text.data() + text.size() ? "" : "a whole number is expected, not " + quote(text);
}

std::string number(const std::string& text) {
  char* end = nullptr;
  std::strtod(text.c_str(), &end);
  return !text.empty() && end == text.c_str() + text.size() ? "" : "a number is expected, not " + quote(text);
}

}  // namespace

Command& Command::positional(const std::string& name, std::string& value, const std::string& help,
                             bool required) {
  impl_->app->add_option(name, value, help)->required(required)->type_name(" ");
  return *this;
}

Command& Command::positionals(const std::string& name, std::vector<std::string>& values, const std::string& help) {
  impl_->app->add_option(name, values, help)->type_name(" ");
  return *this;
}

Command& Command::option(const std::string& names, std::string& value, const std::string& label,
                         const std::string& help) {
  impl_->app->add_option(names, value, help)->type_name(label);
  return *this;
}

Command& Command::option(const std::string& names, int64_t& value, const std::string& label,
                         const std::string& help) {
  impl_->app->add_option(names, value, help)->type_name(label)->capture_default_str()->check(whole_number);
  return *this;
}

Command& Command::option(const std::string& names, double& value, const std::string& label,
                         const std::string& help) {
  impl_->app->add_option(names, value, help)->type_name(label)->capture_default_str()->check(number);
  return *this;
}

Command& Command::option(const std::string& names, std::optional<std::string>& value,
                         const std::string& label, const std::string& help) {
  impl_->app->add_option(names, value, help)->type_name(label);
  return *this;
}

Command& Command::option(const std::string& names, std::optional<int64_t>& value, const std::string& label,
                         const std::string& help) {
  impl_->app->add_option(names, value, help)->type_name(label)->check(whole_number);
  return *this;
}

Command& Command::option(const std::string& names, std::optional<double>& value, const std::string& label,
                         const std::string& help) {
  impl_->app->add_option(names, value, help)->type_name(label)->check(number);
  return *this;
}

Command& Command::list(const std::string& names, std::vector<std::string>& values, const std::string& label,
                       const std::string& help) {
  impl_->app->add_option(names, values, help)
      ->type_name(label)
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
      ->allow_extra_args(false);
  return *this;
}

Command& Command::flag(const std::string& names, bool& value, const std::string& help) {
  impl_->app->add_flag(names, value, help);
  return *this;
}

Command& Command::required(const std::string& name) {
  impl_->app->get_option(name)->required();
  return *this;
}

Command& Command::example(const std::string& line) {
  impl_->examples.push_back(line);
  return *this;
}

void Command::action(std::function<int()> run) {
  impl_->run = std::move(run);
  if (impl_->examples.empty()) return;
  std::string footer = "Examples:";
  for (const std::string& line : impl_->examples) footer += "\n  perigee " + line;
  impl_->app->footer(footer);
}

Program::Program() : impl_(std::make_unique<Impl>()) {
  impl_->app.footer("perigee COMMAND --help says what a command takes. ./perigee test runs the tests.");
}

Program::~Program() = default;

Command Program::command(const std::string& name, const std::string& summary, const std::string& group) {
  auto command = std::make_shared<Command::Impl>();
  command->app = impl_->app.add_subcommand(name, summary);
  command->app->group(group);
  impl_->commands.push_back(command);
  return Command(command);
}

namespace {

// Errors of several lines (a library's message) still take one.
std::string one_line(std::string text) {
  while (!text.empty() && (text.back() == '\n' || text.back() == ' ')) text.pop_back();
  std::string out;
  for (const char c : text) {
    if (c == '\n') {
      out += "; ";
    } else if (c != '\r') {
      out += c;
    }
  }
  return out;
}

std::vector<std::string> long_options(const CLI::App& app) {
  std::vector<std::string> names;
  for (const CLI::Option* option : app.get_options())
    for (const std::string& name : option->get_lnames()) names.push_back("--" + name);
  return names;
}

// What CLI11 found wrong with a command's arguments, in our words: where, what, what to do.
// command: its name, empty for the program itself.
[[noreturn]] void refuse(const CLI::App& app, const std::string& command, const CLI::ParseError& e) {
  const std::string name = command.empty() ? "" : command + ": ";
  // A word that nothing takes comes first: an argument may be missing only because its option is misspelt.
  const std::vector<std::string> rest = app.remaining(true);
  if (!rest.empty() && (e.get_exit_code() == static_cast<int>(CLI::ExitCodes::ExtrasError) ||
                        (e.get_exit_code() == static_cast<int>(CLI::ExitCodes::RequiredError) && rest.front()[0] == '-'))) {
    const std::string& word = rest.front();
    if (word[0] == '-')
      throw_input("{}unknown option {}{}", name, quote(word),
                  did_you_mean(word.substr(0, word.find('=')), long_options(app)));
    throw_input("{}unexpected argument {}", name, quote(word));
  }
  const std::string what = one_line(e.what());
  for (const CLI::Option* option : app.get_options()) {
    if (!what.starts_with(option->get_name() + ": ")) continue;
    if (what.find(" required ") != what.npos && what.ends_with(" missing"))
      throw_input("{}{} needs a value: {} {}", name, option->get_name(), option->get_name(), option->get_type_name());
    if (what.find("At Most 1 required") != what.npos)
      throw_input("{}{} is given more than once: give it one value", name, option->get_name());
  }
  throw_input("{}{}; perigee {}--help", name, what, command.empty() ? "" : command + " ");
}

}  // namespace

int Program::parse_and_run(int argc, char** argv) {
  CLI::App& app = impl_->app;
  std::vector<std::string> args(argv + 1, argv + argc);
  if (!args.empty() && args.front() == "--version") {
    if (args.size() > 1) throw_input("unexpected argument {}", quote(args[1]));
    std::printf("perigee, built from commit %s\n", kCommit);
    return 0;
  }
  // perigee help COMMAND: as other programs have it.
  if (!args.empty() && args.front() == "help") {
    args.erase(args.begin());
    args.emplace_back("--help");
  }
  if (args.empty()) args.emplace_back("--help");
  const std::string name = args.front();
  if (name.starts_with('-')) {
    try {
      app.parse(std::vector<std::string>(args.rbegin(), args.rend()));
    } catch (const CLI::CallForHelp&) {
      std::fputs(app.help().c_str(), stdout);
      return 0;
    } catch (const CLI::ParseError& e) {
      refuse(app, "", e);
    }
    throw_input("options of a command stand behind its name; perigee --help lists the commands");
  }
  std::vector<std::string> listed;
  for (const auto& command : impl_->commands) {
    if (command->app->get_name() == name) {
      // Parsed as a program of its own: within the whole one, a run called "serve" would be taken for the command.
      try {
        command->app->parse(std::vector<std::string>(args.rbegin(), args.rend() - 1));
      } catch (const CLI::CallForHelp&) {
        std::fputs(command->app->help("perigee").c_str(), stdout);
        return 0;
      } catch (const CLI::ParseError& e) {
        refuse(*command->app, name, e);
      }
      return command->run();
    }
    if (!command->app->get_group().empty()) listed.push_back(command->app->get_name());
  }
  throw_input("unknown command {}{}; perigee --help lists the commands", quote(name), did_you_mean(name, listed));
}

int Program::main(int argc, char** argv) {
  auto fail = [](const char* kind, const std::string& what, int code) {
    std::fflush(stdout);
    std::fprintf(stderr, "perigee: %s: %s\n", kind, one_line(what).c_str());
    return code;
  };
  try {
    check_environment();
    const int code = parse_and_run(argc, argv);
    if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0)
      throw_environment("cannot write to standard output: is the disk full?");
    return code;
  } catch (const Error& e) {
    // Refused, whatever the reason. (1 is for what ran and failed: a run, a verification, a bug.)
    return fail("error", e.what(), 2);
  } catch (const std::bad_alloc&) {
    return fail("error", "out of memory; lower the batch, the memory budget or the model's size", 1);
  } catch (const std::logic_error& e) {
    return fail("bug", e.what(), 1);
  } catch (const std::exception& e) {
    return fail("error", e.what(), 1);
  }
}

}  // namespace perigee::apps
