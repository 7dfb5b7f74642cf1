// Which commit this program was built from ("-dirty" when files differed), or "unknown". Defined in a generated file.
#pragma once

namespace perigee {
extern const char* const kCommit;
}
