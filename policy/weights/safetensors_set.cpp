#include "policy/weights/safetensors_set.h"

#include <algorithm>
#include <filesystem>
#include <set>

#include "base/error.h"
#include "base/json.h"
#include "base/text.h"

namespace perigee::policy {
namespace {

using nlohmann::json;

constexpr const char* kSingle = "model.safetensors";
constexpr const char* kIndex = "model.safetensors.index.json";

// shard -> the tensors the index gives to it.
std::map<std::string, std::set<std::string>> read_index(const std::string& path) {
  const json index = parse_json(read_file(path, uint64_t{1} << 30), path);
  if (!index.is_object() || !index.contains("weight_map") || !index["weight_map"].is_object())
    throw_input("{}: no object \"weight_map\" from tensor names to files", path);
  std::map<std::string, std::set<std::string>> shards;
  for (const auto& [tensor, file] : index["weight_map"].items()) {
    const std::string name = file.is_string() ? file.get<std::string>() : "";
    // A file of this directory and no other: an index must not lead the reader elsewhere.
    if (!name.ends_with(".safetensors") || name.find('/') != std::string::npos ||
        name.find('\0') != std::string::npos)
      throw_input("{}: tensor {}: {} is not the name of a .safetensors file beside the index", path,
                  quote(tensor, 120), json_brief(file));
    shards[name].insert(tensor);
  }
  if (shards.empty()) throw_input("{}: weight_map names no tensors", path);
  return shards;
}

bool is_weights_name(const std::string& name) {
  return name == kSingle || name == kIndex || (name.starts_with("model-") && name.ends_with(".safetensors"));
}

}  // namespace

SafetensorsSet::SafetensorsSet(const std::string& path) : path_(path) {
  if (!directory_exists(path)) {
    files_.push_back(std::make_unique<SafetensorsFile>(path));
  } else {
    const std::string single = path + "/" + kSingle, index = path + "/" + kIndex;
    if (file_exists(single) && file_exists(index))
      throw_input("{}: holds both {} and {}; remove the one that is not meant", path, kSingle, kIndex);
    if (file_exists(index)) {
      open_indexed(index);
      return;
    }
    if (!file_exists(single)) throw_input("{}: no weights here: neither {} nor {}", path, kSingle, kIndex);
    files_.push_back(std::make_unique<SafetensorsFile>(single));
  }
  for (const TensorView& t : files_.back()->tensors()) add(t);
}

void SafetensorsSet::open_indexed(const std::string& index_path) {
  const auto shards = read_index(index_path);
  for (const auto& [name, unused] : shards)
    if (!file_exists(path_ + "/" + name))
      throw_input("{}: the shard {} that {} names is missing; copy it here", path_, quote(name), kIndex);
  for (const auto& [name, names] : shards) {
    files_.push_back(std::make_unique<SafetensorsFile>(path_ + "/" + name));
    const SafetensorsFile& file = *files_.back();
    for (const TensorView& t : file.tensors()) {
      if (!names.contains(t.name)) {
        for (const auto& [other, theirs] : shards)
          if (theirs.contains(t.name))
            throw_input("{}: tensor {} is in this shard, but {} gives it to {}", file.path(),
                        quote(t.name, 120), kIndex, other);
        throw_input("{}: tensor {} is in this shard, but not in {}", file.path(), quote(t.name, 120), kIndex);
      }
      add(t);
    }
    for (const auto& tensor : names)
      if (file.find(tensor) == nullptr)
        throw_input("{}: tensor {} is missing in this shard, where {} says it is", file.path(),
                    quote(tensor, 120), kIndex);
  }
}

void SafetensorsSet::add(const TensorView& tensor) {
  const auto [it, fresh] = index_.emplace(tensor.name, &tensor);
  if (!fresh)
    throw_input("{}: tensor {} is also in {}", tensor.file, quote(tensor.name, 120), it->second->file);
  tensors_.push_back(&tensor);
}

const TensorView* SafetensorsSet::find(std::string_view name) const {
  const auto it = index_.find(name);
  return it == index_.end() ? nullptr : it->second;
}

const TensorView& SafetensorsSet::need(std::string_view name, std::span<const int64_t> shape) const {
  const TensorView* t = find(name);
  if (t == nullptr) {
    std::vector<std::string> names;
    for (const TensorView* other : tensors_) names.push_back(other->name);
    throw_input("{}: tensor {} is missing{}", path_, name, did_you_mean(name, names));
  }
  if (t->type == TensorType::kI32 || t->type == TensorType::kI64)
    throw_input("{}: tensor {}: {} where floating point is expected", t->file, name,
                tensor_type_name(t->type));
  if (!std::ranges::equal(t->shape, shape))
    throw_input("{}: tensor {}: shape {}, but the configuration asks for {}", t->file, name,
                shape_text(t->shape), shape_text(shape));
  return *t;
}

int64_t SafetensorsSet::total_bytes() const {
  int64_t sum = 0;
  for (const TensorView* t : tensors_) sum += t->bytes();
  return sum;
}

SafetensorsSetWriter::SafetensorsSetWriter(const std::string& directory, std::span<const TensorSpec> specs,
                                           int64_t max_shard_bytes,
                                           const std::map<std::string, std::string>& metadata)
    : directory_(directory), specs_(specs.begin(), specs.end()) {
  PERIGEE_CHECK(max_shard_bytes > 0, "{}", max_shard_bytes);
  // First tensor of each shard, and one past the last.
  std::vector<size_t> cuts{0};
  int64_t used = 0, total = 0;
  for (size_t i = 0; i < specs_.size(); ++i) {
    const int64_t bytes = specs_[i].bytes();
    if (i > cuts.back() && used + bytes > max_shard_bytes) {
      cuts.push_back(i);
      used = 0;
    }
    used += bytes;
    total += bytes;
  }
  cuts.push_back(specs_.size());
  const size_t count = cuts.size() - 1;
  json weight_map = json::object();
  std::set<std::string> names;
  for (size_t s = 0; s < count; ++s) {
    shards_.push_back(
        {count == 1 ? kSingle : fmt::format("model-{:05}-of-{:05}.safetensors", s + 1, count), nullptr});
    names.insert(shards_.back().name);
    for (size_t i = cuts[s]; i < cuts[s + 1]; ++i) {
      PERIGEE_CHECK(!weight_map.contains(specs_[i].name), "tensor {} twice", specs_[i].name);
      weight_map[specs_[i].name] = shards_.back().name;
    }
  }
  if (count > 1) {
    names.insert(kIndex);
    index_json_ = json{{"metadata", {{"total_size", total}}}, {"weight_map", weight_map}}.dump(1) + "\n";
  }
  make_directories(directory_);
  for (const auto& entry : std::filesystem::directory_iterator(directory_)) {
    const std::string name = entry.path().filename().string();
    if (is_weights_name(name) && !names.contains(name))
      throw_input("{}: holds weights of another layout ({}); remove them or choose another directory",
                  directory_, name);
  }
  for (size_t s = 0; s < count; ++s)
    shards_[s].writer = std::make_unique<SafetensorsWriter>(
        directory_ + "/" + shards_[s].name, std::span(specs_).subspan(cuts[s], cuts[s + 1] - cuts[s]),
        metadata);
  if (!specs_.empty()) tensor_remaining_ = specs_[0].bytes();
  advance();
}

// Passes finished tensors (those without elements, too) and finished shards.
void SafetensorsSetWriter::advance() {
  while (tensor_ < specs_.size() && tensor_remaining_ == 0) {
    ++tensor_;
    if (tensor_ < specs_.size()) tensor_remaining_ = specs_[tensor_].bytes();
  }
  while (shard_ + 1 < shards_.size() && shards_[shard_].writer->remaining_bytes() == 0) ++shard_;
}

void SafetensorsSetWriter::write(const void* data, int64_t bytes) {
  const char* p = static_cast<const char*>(data);
  while (bytes > 0) {
    PERIGEE_CHECK(tensor_ < specs_.size(), "{} bytes too many", bytes);
    const int64_t n = std::min(bytes, tensor_remaining_);
    shards_[shard_].writer->write(p, n);
    p += n;
    bytes -= n;
    tensor_remaining_ -= n;
    advance();
  }
}

void SafetensorsSetWriter::write_float32(const float* x, int64_t count) {
  while (count > 0) {
    PERIGEE_CHECK(tensor_ < specs_.size(), "{} values too many", count);
    const TensorType type = specs_[tensor_].type;
    const int64_t n = std::min(count, tensor_remaining_ / tensor_type_bytes(type));
    PERIGEE_CHECK(n > 0, "tensor {} has {} bytes left", specs_[tensor_].name, tensor_remaining_);
    shards_[shard_].writer->write_float32(x, n, type);
    x += n;
    count -= n;
    tensor_remaining_ -= n * tensor_type_bytes(type);
    advance();
  }
}

void SafetensorsSetWriter::commit() {
  PERIGEE_CHECK(tensor_ == specs_.size(), "tensor {} is not written", specs_[tensor_].name);
  for (Shard& s : shards_) s.writer->commit();
  if (!index_json_.empty()) write_file_atomic(directory_ + "/" + kIndex, index_json_);
}

}  // namespace perigee::policy
