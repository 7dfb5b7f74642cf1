// A strict configuration schema: modules register the members of their structs as fields; files and --set
// assignments go through it; the effective configuration and docs/configuration.md come out of it. A key that
// nobody registered is an error, never ignored.
//
//   struct TrainConfig { double lr = 1e-3; int64_t steps = 100; };
//   void describe(Schema& s, TrainConfig& c) {
//     s.section("train", "The optimiser and its schedule.");
//     s.field("train.lr", &c.lr, "learning rate at the peak", Range{0, 1});
//     s.field("train.steps", &c.steps, "optimiser steps", Range{1, 1e9});
//   }
//   schema.load_file("run.json"); schema.set("train.lr=3e-4"); write(schema.dump());
//
// The member's value at registration is the default. Members must outlive the schema. Not thread safe.
//
// In files, "train.lr" is {"train": {"lr": ...}} (or the dotted name as one key); comments are allowed.
// ERRORS (input): "FILE: train.lrr: unknown key; did you mean train.lr?", wrong types, values out of range
// (with the range), a key twice. A load or set that fails changes no field at all.
#pragma once
#include <nlohmann/json.hpp>

#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace perigee {

// Numbers allowed, ends included; of a list, for each element.
struct Range {
  double lo = -std::numeric_limits<double>::infinity();
  double hi = std::numeric_limits<double>::infinity();
};

// The names of an enumeration's values, in order of declaration from 0.
using Names = std::vector<std::string>;

class Schema {
 public:
  Schema() = default;
  Schema(const Schema&) = delete;
  Schema& operator=(const Schema&) = delete;

  // A heading of the documentation: applies to the keys "name.…".
  void section(std::string name, std::string meaning);

  // Registers a key. REQUIRES the key new, no key a prefix of another, the default within the range.
  void field(std::string key, int64_t* p, std::string meaning, Range range = {});
  void field(std::string key, int32_t* p, std::string meaning, Range range = {});
  void field(std::string key, double* p, std::string meaning, Range range = {});
  void field(std::string key, float* p, std::string meaning, Range range = {});
  void field(std::string key, bool* p, std::string meaning);
  void field(std::string key, std::string* p, std::string meaning);
  void field(std::string key, std::string* p, std::string meaning, Names allowed);  // one of these texts
  void field(std::string key, std::vector<int64_t>* p, std::string meaning, Range range = {});
  void field(std::string key, std::vector<double>* p, std::string meaning, Range range = {});
  void field(std::string key, std::vector<std::string>* p, std::string meaning);
  // Any JSON, checked by the module that uses it (and by check, when given: returns "" or what is wrong).
  void field(std::string key, nlohmann::json* p, std::string meaning,
             std::function<std::string(const nlohmann::json&)> check = {});
  template <class E>
  requires std::is_enum_v<E>
  void field(std::string key, E* p, std::string meaning, Names names) {
    enum_field(
        std::move(key), [p] { return static_cast<size_t>(*p); }, [p](size_t i) { *p = static_cast<E>(i); },
        std::move(meaning), std::move(names));
  }

  // A file with JSON and comments; keys not in it keep their values.
  void load_file(const std::string& path);
  void load(const nlohmann::json& value, std::string_view where);
  // "key=value", as --set takes it. The value is JSON, or the text itself where the field holds one; a list
  // may be given as a,b,c. where names the source in messages. Behind the key of a JSON field stands a path into its
  // value: tasks.max_digits, reward.0.weight; a new key of an object is added, for the field's module to check.
  void set(std::string_view assignment, std::string_view where = "--set");

  // The effective configuration: every key, nested, in order of registration.
  nlohmann::ordered_json dump() const;
  // Was the key given by a file or --set?
  bool given(std::string_view key) const { return given_.contains(std::string(key)); }
  bool has(std::string_view key) const { return index_.contains(std::string(key)); }
  std::vector<std::string> keys() const;

  // docs/configuration.md: a table per section of key, type, default, range, meaning. Defaults are those at
  // registration.
  std::string markdown() const;

 private:
  struct Field {
    std::string key, type, range, meaning;
    nlohmann::json initial;
    std::function<nlohmann::json()> get;
    // Returns "" or what is wrong; writes the member only when apply. The check half is run for all first.
    std::function<std::string(const nlohmann::json&, bool apply)> put;
    bool text = false;    // --set takes the text as it is
    bool list = false;    // --set takes a,b,c
    bool object = false;  // a JSON object is a value, not a nested section
  };
  void add(Field f);
  void enum_field(std::string key, std::function<size_t()> get, std::function<void(size_t)> put,
                  std::string meaning, Names names);
  template <class T>
  void integer_field(std::string key, T* p, std::string meaning, Range range);
  template <class T>
  void number_field(std::string key, T* p, std::string meaning, Range range);
  using Assignments = std::vector<std::pair<const Field*, nlohmann::json>>;
  void collect(const nlohmann::json& value, const std::string& prefix, std::string_view where,
               Assignments& out) const;
  void apply(const Assignments& assignments, std::string_view where);
  const Field& known(const std::string& key, std::string_view where) const;
  // The JSON field that key leads into, or null.
  const Field* container_of(const std::string& key) const;

  std::vector<Field> fields_;
  std::map<std::string, size_t> index_;
  std::vector<std::pair<std::string, std::string>> sections_;
  std::set<std::string> given_;
};

// The environment variables that Perigee reads; any other PERIGEE_* is refused, so that a misspelt one is
// not ignored.
struct EnvironmentVariable {
  std::string name, meaning;
};
std::span<const EnvironmentVariable> environment_variables();
// environ: null-terminated "NAME=value".
// ERRORS (input): an unknown PERIGEE_* variable, with the nearest known one.
void check_environment(const char* const* environ);
// The value, or "" when unset. REQUIRES a name of the table.
std::string environment(std::string_view name);

}  // namespace perigee
