#include <fmt/format.h>

#include "agents/tools/folder.h"
#include "agents/tools/kinds.h"
#include "agents/tools/output.h"
#include "base/text.h"

namespace perigee::agents {
namespace {

using Json = nlohmann::ordered_json;

constexpr int kMaxContent = 1'000'000;  // characters
constexpr size_t kMaxListed = 1000;

class Files final : public Tool {
 public:
  explicit Files(FilesOptions options) : options_(options) {}
  const std::string& name() const override { return name_; }
  Json declaration() const override {
    const Json properties = {
        {"action", Json{{"type", "string"}, {"enum", Json::array({"read", "write", "list", "delete"})}}},
        {"path",
         Json{{"type", "string"}, {"description", "below the work folder; of list: a directory, . for all"}}},
        {"content",
         Json{{"type", "string"}, {"description", "of write: the whole file"}, {"maxLength", kMaxContent}}}};
    return Json{
        {"type", "function"},
        {"function", Json{{"name", name_},
                          {"description", "Reads, writes, lists and deletes files of the work folder."},
                          {"parameters", Json{{"type", "object"},
                                              {"properties", properties},
                                              {"required", Json::array({"action", "path"})},
                                              {"additionalProperties", false}}}}}};
  }

  ToolResult call(const nlohmann::json& arguments, const ToolContext& context) override {
    const auto& action = arguments.at("action").get_ref<const std::string&>();
    std::string wrong;
    const std::string path = clean_path(arguments.at("path").get_ref<const std::string&>(), wrong);
    if (!wrong.empty()) return {wrong, "error"};
    const WorkFolder folder(context.work, wrong);
    if (!wrong.empty()) return {wrong, "error"};
    if (action == "write" && !arguments.contains("content"))
      return {"content is missing: the text to write", "error"};
    if (action != "write" && arguments.contains("content")) return {"content goes with write only", "error"};
    if (action == "read") return read(folder, path, context);
    if (action == "write") return write(folder, path, arguments.at("content").get_ref<const std::string&>());
    if (action == "list") return list(folder, path, context);
    wrong = folder.remove(path);
    if (!wrong.empty()) return {wrong, "error"};
    return {fmt::format("deleted {}", quote(path)), "ok"};
  }

 private:
  static ToolResult read(const WorkFolder& folder, const std::string& path, const ToolContext& context) {
    struct stat status {};
    std::string wrong;
    const auto file = folder.open_file(path, INT64_MAX, status, wrong);
    if (!file.open()) return {wrong, "error"};
    const int64_t size = status.st_size;
    std::string bytes = WorkFolder::read_at(file, 0, std::min(size, context.output_bytes));
    if (size <= context.output_bytes) return {std::move(bytes), "ok"};
    const std::string note = fmt::format("\n[cut: {} bytes in all]", size);
    const size_t room = static_cast<size_t>(context.output_bytes);
    return {std::string(beginning(bytes, room - std::min(room, note.size()))) + note, "limit"};
  }

  ToolResult write(const WorkFolder& folder, const std::string& path, const std::string& content) const {
    bool over = false;
    const int64_t held = folder.bytes(options_.disk_bytes, options_.files, over);
    if (over || held + static_cast<int64_t>(content.size()) > options_.disk_bytes)
      return {fmt::format("the work folder is full: {} files or {} at most", options_.files,
                          human_bytes(static_cast<uint64_t>(options_.disk_bytes))),
              "limit"};
    std::string wrong = folder.write_file(path, content);
    if (!wrong.empty()) return {std::move(wrong), "error"};
    return {fmt::format("wrote {} bytes to {}", content.size(), quote(path)), "ok"};
  }

  static ToolResult list(const WorkFolder& folder, const std::string& path, const ToolContext& context) {
    std::string wrong, text;
    const auto entries = folder.list(path, kMaxListed + 1, wrong);
    if (!wrong.empty()) return {wrong, "error"};
    size_t shown = 0;
    const size_t room = static_cast<size_t>(std::max<int64_t>(0, context.output_bytes - 60));
    for (const auto& e : entries) {
      // A name with a line break in it must not look like two.
      const std::string said = quote(e.name, 255);
      const std::string name = said.size() == e.name.size() + 2 ? e.name : said;
      const std::string line =
          e.directory ? fmt::format("{}/\n", name) : fmt::format("{} {}\n", name, e.bytes);
      if (shown == kMaxListed || text.size() + line.size() > room) break;
      text += line;
      ++shown;
    }
    if (entries.empty()) text = "[empty]";
    if (shown < entries.size()) return {text + "[and more]", "limit"};
    return {text, "ok"};
  }

  const std::string name_ = "files";
  FilesOptions options_;
};

}  // namespace

std::unique_ptr<Tool> make_files(FilesOptions options) {
  return std::make_unique<Files>(options);
}

}  // namespace perigee::agents
