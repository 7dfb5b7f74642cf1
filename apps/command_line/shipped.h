// Files that come with the program: configs/.
#pragma once
#include <string>

namespace perigee::apps {

// The path to open for one that the user gave. One that exists is itself. Else configs/... names what came with the
// program, beside its sources (of build/NAME/perigee) or in share/perigee of an installed tree, wherever the user
// stands. Else it is itself again, for the error message to name.
std::string shipped(const std::string& path);

}  // namespace perigee::apps
