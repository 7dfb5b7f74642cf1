#include "apps/command_line/command.h"

#include <CLI/CLI.hpp>
#include <cstdio>
#include <map>
#include <new>

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
  impl_->app->add_option(names, value, help)->type_name(label)->capture_default_str();
  return *this;
}

Command& Command::option(const std::string& names, double& value, const std::string& label,
                         const std::string& help) {
  impl_->app->add_option(names, value, help)->type_name(label)->capture_default_str();
  return *this;
}

Command& Command::option(const std::string& names, std::optional<std::string>& value,
                         const std::string& label, const std::string& help) {
  impl_->app->add_option(names, value, help)->type_name(label);
  return *this;
}

Command& Command::option(const std::string& names, std::optional<int64_t>& value, const std::string& label,
                         const std::string& help) {
  impl_->app->add_option(names, value, help)->type_name(label);
  return *this;
}

Command& Command::option(const std::string& names, std::optional<double>& value, const std::string& label,
                         const std::string& help) {
  impl_->app->add_option(names, value, help)->type_name(label);
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

}  // namespace

int Program::parse_and_run(int argc, char** argv) {
  CLI::App& app = impl_->app;
  if (argc < 2) {
    std::fputs(app.help().c_str(), stdout);
    return 0;
  }
  if (argv[1][0] != '-') {
    std::vector<std::string> listed;
    bool known = false;
    for (const auto& command : impl_->commands) {
      known = known || command->app->get_name() == argv[1];
      if (!command->app->get_group().empty()) listed.push_back(command->app->get_name());
    }
    if (!known)
      throw_input("unknown command {}{}; perigee --help lists the commands", quote(argv[1]),
                  did_you_mean(argv[1], listed));
  }
  try {
    app.parse(argc, argv);
  } catch (const CLI::CallForHelp&) {
    std::fputs(app.help().c_str(), stdout);  // of the subcommand, when one was named
    return 0;
  } catch (const CLI::ParseError& e) {
    const auto chosen = app.get_subcommands();
    const CLI::App& where = chosen.empty() ? app : *chosen.front();
    const std::string name = chosen.empty() ? "" : where.get_name() + ": ";
    const std::vector<std::string> rest = app.remaining(true);
    if (dynamic_cast<const CLI::ExtrasError*>(&e) != nullptr && !rest.empty()) {
      const std::string& word = rest.front();
      if (word[0] == '-')
        throw_input("{}unknown option {}{}", name, quote(word),
                    did_you_mean(word.substr(0, word.find('=')), long_options(where)));
      throw_input("{}unexpected argument {}", name, quote(word));
    }
    throw_input("{}{}; perigee {}--help", name, one_line(e.what()),
                chosen.empty() ? "" : where.get_name() + " ");
  }
  for (const auto& command : impl_->commands)
    if (command->app->parsed()) return command->run();
  throw_input("no command given; perigee --help lists the commands");
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
