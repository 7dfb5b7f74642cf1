// Subcommands and their options: a thin layer over CLI11, so that one file pays for its templates and all
// commands report mistakes alike. Each apps/ROOM/cmd_*.cpp declares one command in a function listed in
// apps/command_line/commands.h.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace perigee::apps {

// One subcommand while it is declared. The values that options write to must live as long as the Program:
// commands keep them in a shared_ptr that their action holds.
class Command {
 public:
  Command& positional(const std::string& name, std::string& value, const std::string& help,
                      bool required = true);
  // Any number of them, none included; after the other positionals.
  Command& positionals(const std::string& name, std::vector<std::string>& values, const std::string& help);
  // names: "-n,--count"; label stands for the value in the help.
  Command& option(const std::string& names, std::string& value, const std::string& label,
                  const std::string& help);
  Command& option(const std::string& names, int64_t& value, const std::string& label,
                  const std::string& help);
  Command& option(const std::string& names, double& value, const std::string& label, const std::string& help);
  // Stay empty when the option is not given.
  Command& option(const std::string& names, std::optional<std::string>& value, const std::string& label,
                  const std::string& help);
  Command& option(const std::string& names, std::optional<int64_t>& value, const std::string& label,
                  const std::string& help);
  Command& option(const std::string& names, std::optional<double>& value, const std::string& label,
                  const std::string& help);
  // May be given several times, one value each.
  Command& list(const std::string& names, std::vector<std::string>& values, const std::string& label,
                const std::string& help);
  Command& flag(const std::string& names, bool& value, const std::string& help);
  Command& required(const std::string& name);  // an option declared before must be given
  Command& example(const std::string& line);   // after "perigee "

  // What the command does; its result is the exit code. Called after the options hold their values.
  void action(std::function<int()> run);

 private:
  friend class Program;
  struct Impl;
  explicit Command(std::shared_ptr<Impl> impl) : impl_(std::move(impl)) {}
  std::shared_ptr<Impl> impl_;
};

class Program {
 public:
  Program();
  ~Program();
  // group: the heading it stands under in `perigee --help`; empty: not listed.
  Command command(const std::string& name, const std::string& summary, const std::string& group);
  // Parses and runs. Exit codes: 0, 2 for what is refused, bad input or a broken environment (base/error.h), 1 for what
  // ran and failed and for a bug; other codes are the command's own. An error is one line on stderr:
  // "perigee: error: ...".
  int main(int argc, char** argv);

 private:
  int parse_and_run(int argc, char** argv);
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace perigee::apps
