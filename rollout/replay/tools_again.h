// The tools of stored episodes, run again: the calls that the policy's tokens make, in a work folder made as in the run, and
// what they answer compared with what is stored. Needs no weights: the tokens are the record's.
#pragma once
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <stop_token>
#include <string>
#include <vector>

#include "base/leftovers.h"
#include "policy/tokenizer/tokenizer.h"
#include "rollout/replay/whole.h"
#include "rollout/roles/agent_episodes.h"

namespace perigee::rollout {

// Where tools part from what is stored.
struct ToolDifference {
  enum class What : uint8_t {
    kOutput,  // the tool answers something else now, or ends with another status
    kStored,  // the stored answer is not the one whose digest is stored
    kTokens,  // the tokens that were fed do not say what the stored answers say
    kCall,    // the policy's tokens make another call than the stored one
    kFailed,  // the folder could not be made: nothing was run
  };
  int64_t episode = 0;
  int32_t turn = 0, call = 0;  // call: within the turn
  int64_t position = 0;        // in the sequence, prompt included, where the turn's answers are fed
  What what = What::kOutput;
  std::string tool;
  std::string digest_then, digest_again;  // of answers; again: empty when it was not run
  std::string status_then, status_again;
  int64_t first_byte =
      -1;  // of the first difference between the two answers; -1: there is none, or nothing was run
  int64_t context_begin = 0;  // the byte with which the next two begin
  std::string then, again;    // the answers around that byte
  std::string detail;         // of kTokens, kCall and kFailed: one line
};

struct ToolTally {
  int64_t calls = 0;                        // looked at
  int64_t run = 0;                          // of them run again
  std::vector<ToolDifference> differences;  // by episode, turn and call, once finish() returned
};

// Makes the folder (where the environment has any) and runs in it the calls of the first `turns` turns. The events of all of
// them, in order. ERRORS: of prepare_workspace.
std::vector<ToolEvent> run_turns(const Environment& environment, const policy::Tokenizer& tokenizer,
                                 const WholeEpisode& episode, size_t turns,
                                 const std::filesystem::path& folder, const std::vector<TaskFile>& files,
                                 std::stop_token stop);

class ToolReplayer {
 public:
  // All outlive it. execute: else nothing is run, and stored answers are only compared with their digests and tokens.
  ToolReplayer(const Environment& environment, const policy::Tokenizer& tokenizer, bool execute);
  ~ToolReplayer();

  // files: what its folder begins with. Waits while many are being run.
  void add(WholeEpisode episode, std::vector<TaskFile> files);
  // Until all are done.
  void finish();
  const ToolTally& tally() const { return tally_; }

 private:
  struct Waiting {
    std::shared_ptr<const WholeEpisode> episode;
    std::filesystem::path folder;
  };
  void take();
  void compare(const WholeEpisode& episode, const std::vector<ToolEvent>* again);
  void compare_call(ToolDifference place, const ToolEvent& then, const ToolEvent* again);

  const Environment& environment_;
  const policy::Tokenizer& tokenizer_;
  bool execute_;
  std::unique_ptr<TemporaryFolder> work_;
  std::map<uint64_t, Waiting> waiting_;  // by episode
  ToolTally tally_;
  ToolPool pool_;
};

}  // namespace perigee::rollout
