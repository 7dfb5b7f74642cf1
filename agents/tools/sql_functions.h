// SQLite's instr, replace, trim, ltrim and rtrim in time proportional to their arguments. Its own take the product of the
// lengths, hours for two texts of a megabyte, and within one call of a function nothing can stop a query.
#pragma once

struct sqlite3;

namespace perigee::agents {

// In the place of the connection's own. The values are the same, but that trim looks for characters of at most four
// bytes (a valid text has no others).
void use_linear_functions(sqlite3* db);

}  // namespace perigee::agents
