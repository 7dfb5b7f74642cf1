// The commit that was checked out when this program was built, or "unknown". Defined in a generated file.
#pragma once

namespace perigee {
extern const char* const kCommit;
}
