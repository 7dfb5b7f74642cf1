// The runs that a page shows: where their stores are, the key by which addresses name them, how their tokens read.
#pragma once
#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "apps/command_line/run_argument.h"
#include "policy/tokenizer/tokenizer.h"
#include "storage/store.h"

namespace perigee::apps::inspect {

// Null pointer in `tokenizer`: token ids are all there is, and `why` says the reason.
struct RunTokens {
  std::unique_ptr<policy::Tokenizer> tokenizer;
  std::string why;
};

struct OpenRun {
  std::string
      key;  // its directory's name, with a number where two have the same: stays the same from start to start
  RunPlace place;
};

// Thread safe.
class RunSet {
 public:
  explicit RunSet(const std::vector<RunPlace>& places);
  // Every run under a directory, as it comes and goes.
  explicit RunSet(std::filesystem::path root);

  bool of_directory() const { return !root_.empty(); }
  // In the order given, or newest first. Of a directory: looks again, at most once a second.
  std::vector<OpenRun> list();
  // "" names the first. ERRORS (input): no run of this key.
  OpenRun find(const std::string& key);
  // Read from the run's configuration once, then kept.
  std::shared_ptr<const RunTokens> tokens(const OpenRun& run);

 private:
  void add(const RunPlace& place);
  std::mutex mutex_;
  std::filesystem::path root_;  // "": the runs were named
  int64_t looked_us_ = 0;
  std::vector<OpenRun> runs_;
  std::map<std::string, std::shared_ptr<const RunTokens>> tokens_;
};

// Changes whenever something was committed to the store, or another file was put in its place. Costs two stat calls.
std::string store_fingerprint(const std::filesystem::path& store);

// The connections of one thread, opened when first asked for, and again when another file is there.
class Readers {
 public:
  StoreReader& of(const OpenRun& run);

 private:
  struct Reader {
    uint64_t device = 0, inode = 0;
    std::unique_ptr<StoreReader> store;
  };
  std::map<std::string, Reader> readers_;
};

}  // namespace perigee::apps::inspect
