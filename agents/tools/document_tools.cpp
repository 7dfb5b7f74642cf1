// search and read: finding one's way in a document that is longer than a context.
#include <fmt/format.h>
#include <re2/re2.h>

#include <algorithm>
#include <chrono>
#include <cstring>

#include "agents/tools/folder.h"
#include "agents/tools/kinds.h"
#include "agents/tools/output.h"
#include "base/text.h"

namespace perigee::agents {
namespace {

using Json = nlohmann::ordered_json;

constexpr int64_t kStep = 1 << 20;         // bytes of the document in memory at a time
constexpr size_t kShownOfLine = 300;       // bytes of a matching line that are shown
constexpr int64_t kLongestLine = 1 << 20;  // a longer one is searched in pieces
constexpr double kSearchS = 10;

Json integer(const char* description, int64_t minimum, int64_t maximum) {
  return Json{{"type", "integer"}, {"description", description}, {"minimum", minimum}, {"maximum", maximum}};
}

class Document : public Tool {
 public:
  Document(DocumentOptions options, const char* name, const char* description, Json properties, Json required)
      : options_(std::move(options)), name_(name) {
    Json all = Json::object();
    if (options_.path.empty()) {
      all["path"] = Json{{"type", "string"}, {"description", "the document, below the work folder"}};
      required.push_back("path");
    }
    for (auto& [key, value] : properties.items()) all[key] = value;
    Json parameters = {{"type", "object"}, {"properties", all}};
    if (!required.empty()) parameters["required"] = required;
    parameters["additionalProperties"] = false;
    declaration_ =
        Json{{"type", "function"},
             {"function", Json{{"name", name_}, {"description", description}, {"parameters", parameters}}}};
  }
  const std::string& name() const override { return name_; }
  Json declaration() const override { return declaration_; }

 protected:
  // The document, or not open with a sentence in wrong.
  sandbox::Descriptor open(const nlohmann::json& arguments, const ToolContext& context, int64_t& size,
                           std::string& wrong) const {
    const std::string named = options_.path.empty() ? arguments.at("path").get<std::string>() : options_.path;
    const std::string path = clean_path(named, wrong);
    if (!wrong.empty()) return {};
    const WorkFolder folder(context.work, wrong);
    if (!wrong.empty()) return {};
    struct stat status {};
    auto file = folder.open_file(path, options_.document_bytes, status, wrong);
    size = status.st_size;
    return file;
  }
  static int64_t number(const nlohmann::json& arguments, const char* key, int64_t absent) {
    const auto it = arguments.find(key);
    if (it == arguments.end()) return absent;
    // The schema takes 3.0 for 3.
    return it->is_number_float() ? static_cast<int64_t>(it->get<double>()) : it->get<int64_t>();
  }

  DocumentOptions options_;
  const std::string name_;
  Json declaration_;
};

// Goes through a document line by line. A line is what lies between two '\n'; the last one may lack its '\n'.
class Lines {
 public:
  Lines(const sandbox::Descriptor& file, int64_t offset) : file_(file), offset_(offset) {}

  struct Line {
    int64_t offset = 0;     // of its first byte
    std::string_view text;  // without '\n'; valid until the next call
    bool whole = true;      // false: a piece of a line that is too long; more of it follows
  };
  bool next(Line& line) {
    for (;;) {
      const char* found =
          static_cast<const char*>(std::memchr(buffer_.data() + at_, '\n', buffer_.size() - at_));
      if (found != nullptr || ended_ || static_cast<int64_t>(buffer_.size() - at_) >= kLongestLine) {
        if (found == nullptr && at_ == buffer_.size()) return false;
        const size_t end = found == nullptr ? buffer_.size() : static_cast<size_t>(found - buffer_.data());
        line = {offset_ + static_cast<int64_t>(at_), std::string_view(buffer_).substr(at_, end - at_),
                found != nullptr || ended_};
        at_ = found == nullptr ? end : end + 1;
        return true;
      }
      offset_ += static_cast<int64_t>(at_);
      buffer_.erase(0, at_);
      at_ = 0;
      const std::string more =
          WorkFolder::read_at(file_, offset_ + static_cast<int64_t>(buffer_.size()), kStep);
      ended_ = static_cast<int64_t>(more.size()) < kStep;
      buffer_ += more;
    }
  }

 private:
  const sandbox::Descriptor& file_;
  int64_t offset_;  // of buffer_[0] in the document
  std::string buffer_;
  size_t at_ = 0;
  bool ended_ = false;
};

class Search final : public Document {
 public:
  explicit Search(DocumentOptions options)
      : Document(
            std::move(options), "search",
            "Finds lines in a document. Each answer is LINE@BYTE: the number of the line, the byte at which "
            "it "
            "begins, and its text.",
            Json{{"pattern", Json{{"type", "string"}, {"minLength", 1}, {"maxLength", 1000}}},
                 {"regex", Json{{"type", "boolean"}, {"description", "pattern is a regular expression"}}},
                 {"ignore_case", Json{{"type", "boolean"}}},
                 {"offset", integer("byte to start at, of a line's beginning; 0 if absent", 0, INT64_MAX)},
                 {"limit", integer("matching lines to show; 20 if absent", 1, 100)}},
            Json::array({"pattern"})) {}

  ToolResult call(const nlohmann::json& arguments, const ToolContext& context) override {
    const auto start = std::chrono::steady_clock::now();
    const double allowed_s = context.deadline_s > 0 ? std::min(context.deadline_s, kSearchS) : kSearchS;
    const auto& pattern = arguments.at("pattern").get_ref<const std::string&>();
    re2::RE2::Options options;
    options.set_log_errors(false);
    options.set_literal(!arguments.value("regex", false));
    options.set_case_sensitive(!arguments.value("ignore_case", false));
    options.set_max_mem(8 << 20);
    options.set_never_nl(true);
    const re2::RE2 expression(pattern, options);
    if (!expression.ok())
      return {fmt::format("pattern: not a regular expression: {}", expression.error()), "error"};
    int64_t size = 0;
    std::string wrong;
    const auto file = open(arguments, context, size, wrong);
    if (!file.open()) return {wrong, "error"};
    const int64_t from = number(arguments, "offset", 0), limit = number(arguments, "limit", 20);
    if (from > size) return {fmt::format("offset: the document ends at byte {}", size), "error"};

    std::string text;
    const size_t room = static_cast<size_t>(std::max<int64_t>(0, context.output_bytes - 100));
    int64_t line_number = 0, shown = 0, steps = 0;
    // From the beginning also when the search starts later: the numbers of lines count from there.
    Lines lines(file, 0);
    bool fresh = true;  // the line is the first piece of its kind
    for (Lines::Line line; lines.next(line);) {
      line_number += fresh;
      const bool searched = line.offset >= from;
      fresh = line.whole;
      if (++steps % 4096 == 0 || line.text.size() > 65536) {
        if (context.stop.stop_requested() ||
            std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() > allowed_s)
          return {text + fmt::format("[stopped after {:g} s at byte {} of {}]", allowed_s, line.offset, size),
                  "timeout"};
      }
      if (!searched) continue;
      re2::StringPiece match;
      if (!expression.Match(line.text, 0, line.text.size(), re2::RE2::UNANCHORED, &match, 1)) continue;
      // A long line is shown around its match.
      const size_t at = static_cast<size_t>(match.data() - line.text.data());
      size_t begin = line.text.size() <= kShownOfLine || at < kShownOfLine / 2 ? 0 : at - kShownOfLine / 2;
      while (begin > 0 && begin < line.text.size() &&
             (static_cast<unsigned char>(line.text[begin]) & 0xC0) == 0x80)
        --begin;
      const std::string_view part = beginning(line.text.substr(begin), kShownOfLine);
      const std::string row = fmt::format("{}@{}: {}{}{}\n", line_number, line.offset, begin > 0 ? "..." : "",
                                          part, begin + part.size() < line.text.size() ? "..." : "");
      if (shown == limit || text.size() + row.size() > room)
        return {text + fmt::format("[more: go on with offset {}]", line.offset),
                shown == limit ? "ok" : "limit"};
      text += row;
      ++shown;
    }
    if (shown == 0) return {from == 0 ? "[no line matches]" : "[no line matches from there on]", "ok"};
    return {text + fmt::format("[{} {}]", shown, shown == 1 ? "line" : "lines"), "ok"};
  }
};

class Read final : public Document {
 public:
  explicit Read(DocumentOptions options)
      : Document(std::move(options), "read",
                 "Reads a stretch of a document, from a line or a byte on. The first line of the answer says "
                 "which "
                 "bytes follow.",
                 Json{{"line", integer("line to start at, from 1", 1, INT64_MAX)},
                      {"offset", integer("byte to start at, instead of a line", 0, INT64_MAX)},
                      {"bytes", integer("how many; 4000 if absent", 1, 1 << 20)}},
                 Json::array()) {}

  ToolResult call(const nlohmann::json& arguments, const ToolContext& context) override {
    if (arguments.contains("line") && arguments.contains("offset"))
      return {"either line or offset, not both", "error"};
    int64_t size = 0;
    std::string wrong;
    const auto file = open(arguments, context, size, wrong);
    if (!file.open()) return {wrong, "error"};
    int64_t from = number(arguments, "offset", 0);
    if (from > size) return {fmt::format("offset: the document ends at byte {}", size), "error"};
    if (const int64_t line = number(arguments, "line", 1); line > 1) {
      int64_t left = line - 1, at = 0, last = 1;
      while (left > 0) {
        if (context.stop.stop_requested()) return {"[stopped]", "timeout"};
        const std::string bytes = WorkFolder::read_at(file, at, kStep);
        size_t i = 0;
        for (const char* found; left > 0 && (found = static_cast<const char*>(std::memchr(
                                                 bytes.data() + i, '\n', bytes.size() - i))) != nullptr;) {
          i = static_cast<size_t>(found - bytes.data()) + 1;
          --left;
          ++last;
          from = at + static_cast<int64_t>(i);
        }
        at += static_cast<int64_t>(bytes.size());
        // A '\n' at the very end closes the last line; it does not open another.
        if (left > 0 && bytes.empty()) {
          if (from == size && size > 0) --last;
          return {fmt::format("line: the document has {} lines", size == 0 ? 0 : last), "error"};
        }
      }
      if (from == size) return {fmt::format("line: the document has {} lines", line - 1), "error"};
    }
    constexpr int64_t kHead = 120;
    const int64_t room = std::max<int64_t>(1, context.output_bytes - kHead);
    const int64_t wanted = number(arguments, "bytes", 4000);
    std::string bytes = WorkFolder::read_at(file, from, std::min(wanted, room) + 4);
    // Not through the middle of a character, unless not even one fits.
    std::string_view shown = beginning(bytes, static_cast<size_t>(std::min(wanted, room)));
    if (shown.empty() && !bytes.empty())
      shown = std::string_view(bytes).substr(0, static_cast<size_t>(std::min(wanted, room)));
    const int64_t end = from + static_cast<int64_t>(shown.size());
    return {fmt::format("[bytes {} to {} of {}{}]\n{}", from, end, size,
                        end < size ? "; go on with that offset" : "", shown),
            wanted > room && end < size ? "limit" : "ok"};
  }
};

}  // namespace

std::unique_ptr<Tool> make_search(DocumentOptions options) {
  return std::make_unique<Search>(std::move(options));
}
std::unique_ptr<Tool> make_read(DocumentOptions options) {
  return std::make_unique<Read>(std::move(options));
}

}  // namespace perigee::agents
