// A tool: what a policy may call in the middle of a turn. Its answer is text that goes back into the conversation.
//
// Every tool keeps to this:
//  T1  call() never throws for anything that a model can cause; a machine that fails is a status "error" too, with one
//      sentence that says what happened.
//  T2  the answer is at most the context's output_bytes long, and says at its end when something was left out.
//  T3  call() returns soon (a second) after stop or the deadline, with nothing of the call still running.
//  T4  call() may be run by several threads at once.
#pragma once
#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <stop_token>
#include <string>

namespace perigee::agents {

struct ToolContext {
  std::filesystem::path work;  // the session's folder, of no one else; empty: there is none
  std::stop_token stop = {};
  double deadline_s = 0;            // seconds that the call may take at most; 0: the tool's own limit alone
  int64_t output_bytes = 16 << 10;  // of the answer
};

struct ToolResult {
  std::string output;         // bytes; not necessarily UTF-8
  std::string status = "ok";  // "ok", "error", "timeout", "limit"
};

class Tool {
 public:
  virtual ~Tool() = default;
  virtual const std::string& name() const = 0;  // [A-Za-z0-9_-]{1,64}
  // {"type":"function","function":{"name":NAME,"description":TEXT,"parameters":SCHEMA}}; the same at every call.
  virtual nlohmann::ordered_json declaration() const = 0;
  // Whether call() checks its arguments itself, and the toolbox leaves the schema alone (a server elsewhere may declare
  // what ArgumentSchema does not know).
  virtual bool checks_arguments() const { return false; }
  // arguments: an object that keeps to the declaration's schema (the toolbox has checked it, unless checks_arguments()).
  virtual ToolResult call(const nlohmann::json& arguments, const ToolContext& context) = 0;
};

}  // namespace perigee::agents
