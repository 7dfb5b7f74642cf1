// The folder that an episode's tools work in.
#pragma once
#include <filesystem>
#include <string>
#include <vector>

#include "rollout/tasks/tasks.h"

namespace perigee::rollout {

// Makes the folder anew with these files, each a plain name; of a database, text is the SQL that makes it.
// ERRORS (environment): a full disk; (input): SQL that fails, a name with a slash.
void prepare_workspace(const std::filesystem::path& folder, const std::vector<TaskFile>& files);
// Nothing when it is not there; what cannot be removed stays.
void remove_workspace(const std::filesystem::path& folder);

}  // namespace perigee::rollout
