#include <fmt/format.h>
#include <gtest/gtest.h>
#include <sqlite3.h>

#include <filesystem>
#include <fstream>
#include <random>

#include "agents/tools/sql_functions.h"
#include "agents/tools/toolbox.h"
#include "tests/base/temp_directory.h"

namespace perigee::agents {
namespace {

class SqlTool : public ::testing::Test {
 protected:
  void SetUp() override {
    context_.work = work_.path();
    make(work_ / "data.sqlite",
         "CREATE TABLE t(id INTEGER PRIMARY KEY, name TEXT, x REAL, b BLOB);"
         "INSERT INTO t VALUES (1, 'one', 1.5, x'00ff'), (2, 'line' || char(10) || 'break', -0.1, NULL),"
         "(3, CAST(x'ff41' AS TEXT), 1e999, x'');");
  }
  static void make(const std::string& path, const char* sql) {
    sqlite3* db = nullptr;
    ASSERT_EQ(sqlite3_open(path.c_str(), &db), SQLITE_OK);
    char* error = nullptr;
    EXPECT_EQ(sqlite3_exec(db, sql, nullptr, nullptr, &error), SQLITE_OK) << error;
    sqlite3_close(db);
  }
  ToolEvent call(const char* config, const std::string& query) {
    const auto box = make_toolbox(nlohmann::json::parse(config), "test");
    return box->call("sql", nlohmann::json{{"query", query}}.dump(), 0, context_);
  }
  std::string query(const std::string& text) { return call(R"(["sql"])", text).output; }

  TempDirectory work_;
  ToolContext context_;
};

TEST_F(SqlTool, RowsAreExactJson) {
  EXPECT_EQ(query("SELECT * FROM t"),
            "[\"id\",\"name\",\"x\",\"b\"]\n[1,\"one\",1.5,\"x'00ff'\"]\n[2,\"line\\nbreak\",-0.1,null]\n"
            "[3,\"x'ff41'\",\"Infinity\",\"x''\"]\n[3 rows]");
  EXPECT_EQ(query("SELECT count(*) AS n FROM t WHERE id > 1; -- done"), "[\"n\"]\n[2]\n[1 row]");
  EXPECT_EQ(query("SELECT 1 WHERE 0"), "[\"1\"]\n[0 rows]");
  EXPECT_EQ(query("SELEC 1"), "SQL error: near \"SELEC\": syntax error");
  EXPECT_EQ(query("SELECT 1; SELECT 2"), "one statement at a time");
  EXPECT_EQ(query(" -- nothing"), "the query is empty");
  EXPECT_EQ(query("PRAGMA table_info(t)").find("[\"cid\",\"name\""), 0u);
}

TEST_F(SqlTool, WhatItMustNotDoIsRefused) {
  const std::string other = work_ / "other.sqlite";
  const std::pair<std::string, const char*> cases[] = {
      {"INSERT INTO t(id) VALUES (9)", "not allowed: changes: this database is read-only"},
      {"DELETE FROM t", "not allowed: changes"},
      {"DROP TABLE t", "not allowed: changes"},
      {"CREATE TABLE u(a)", "not allowed: changes"},
      {"ATTACH '" + other + "' AS o", "not allowed: other databases (ATTACH)"},
      {"VACUUM INTO '" + other + "'", "not allowed: other databases"},
      {"SELECT load_extension('x')", "not allowed: the function load_extension"},
      {"PRAGMA journal_mode=DELETE", "not allowed: the pragma"},
      {"PRAGMA temp_store_directory='/'", "not allowed: the pragma"},
      {"PRAGMA writable_schema=ON", "not allowed: the pragma"},
      {"CREATE VIRTUAL TABLE v USING fts5(a)", "not allowed: "},
      {"CREATE TEMP TABLE v(a)", "not allowed: "},
      {"BEGIN", "not allowed: "},
      {"SELECT readfile('/etc/passwd')", ""},
  };
  for (const char* config : {R"(["sql"])", R"([{"tool":"sql","write":true}])"})
    for (const auto& [text, sentence] : cases) {
      if (std::string_view(config).find("write") != std::string_view::npos &&
          std::string_view(sentence).find("changes") != std::string_view::npos)
        continue;
      const ToolEvent e = call(config, text);
      EXPECT_EQ(e.status, "error") << text;
      EXPECT_EQ(e.output.find(sentence), 0u) << text << ": " << e.output;
    }
  EXPECT_FALSE(std::filesystem::exists(other));
  EXPECT_EQ(query("SELECT count(*) FROM t"), "[\"count(*)\"]\n[3]\n[1 row]");
}

TEST_F(SqlTool, WritesWhereItMay) {
  const char* config = R"([{"tool":"sql","write":true,"path":"new.sqlite"}])";
  EXPECT_EQ(call(config, "CREATE TABLE a(x)").output, "[done, 0 rows changed]");
  EXPECT_EQ(call(config, "INSERT INTO a VALUES (1), (2)").output, "[done, 2 rows changed]");
  EXPECT_EQ(call(config, "UPDATE a SET x = x + 1 RETURNING x").output, "[\"x\"]\n[2]\n[3]\n[2 rows]");
  EXPECT_EQ(call(config, "SELECT sum(x) FROM a").output, "[\"sum(x)\"]\n[5]\n[1 row]");
}

TEST_F(SqlTool, TimeRowsBytesAndMemoryAreBounded) {
  const char* endless = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT ";
  ToolEvent e = call(R"([{"tool":"sql","wall_s":0.2}])", std::string(endless) + "max(x) FROM c");
  EXPECT_EQ(e.status, "timeout");
  EXPECT_EQ(e.output, "[stopped: the query took longer than 0.2 s]");
  e = call(R"([{"tool":"sql","rows":3}])", std::string(endless) + "x FROM c");
  EXPECT_EQ(e.output, "[\"x\"]\n[1]\n[2]\n[3]\n[the first 3 rows; there are more]");
  EXPECT_EQ(e.status, "limit");
  e = call(R"([{"tool":"sql","rows":100000}])", std::string(endless) + "x, hex(zeroblob(5000)) FROM c");
  EXPECT_EQ(e.status, "limit");
  EXPECT_LE(static_cast<int64_t>(e.output.size()), context_.output_bytes);
  e = call(R"([{"tool":"sql","wall_s":20,"memory_mib":16}])",
           std::string(endless) + "randomblob(100000) AS r FROM c ORDER BY r");
  EXPECT_EQ(e.output, "[stopped: the query took too much memory]");
  EXPECT_EQ(e.status, "limit");
  EXPECT_EQ(call(R"(["sql"])", "SELECT zeroblob(100000000)").status, "error");
}

// A single call of a function can not be stopped: each ends soon by itself. With SQLite's own the first would take hours.
TEST_F(SqlTool, NoFunctionTakesTheProductOfItsTexts) {
  const std::string a = "printf('%.*c', 1000000, 'a')", half = "printf('%.*c', 500000, 'a')",
                    b = "printf('%.*c', 500000, 'b')";
  const std::pair<std::string, const char*> cases[] = {
      {"SELECT length(trim(" + a + ", " + b + " || 'a'))", "0"},
      {"SELECT length(ltrim(" + a + " || 'c', " + b + " || 'a')), length(rtrim('c' || " + a + ", " + b +
           " || 'a'))",
       "1,1"},
      {"SELECT instr(" + a + ", " + half + " || 'b')", "0"},
      {"SELECT instr(zeroblob(1000000), CAST(zeroblob(500000) || x'01' AS BLOB))", "0"},
      {"SELECT length(replace(" + a + ", " + half + " || 'b', 'c'))", "1000000"},
  };
  for (const auto& [text, values] : cases) {
    const ToolEvent e = call(R"([{"tool":"sql","wall_s":60}])", text);
    EXPECT_NE(e.output.find("\n[" + std::string(values) + "]\n"), std::string::npos) << text << "\n"
                                                                                     << e.output;
  }
  // What would take as long is refused.
  EXPECT_EQ(query("SELECT json_patch('{}', '{}')"), "not allowed: the function json_patch");
  EXPECT_EQ(call(R"(["sql"])", "SELECT " + a + " LIKE '%' || printf('%.*c', 200, 'a') || 'b%'").status,
            "error");
  // Between two of them time is looked at.
  const ToolEvent e = call(R"([{"tool":"sql","wall_s":0.3}])",
                           "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + (" + a +
                               " LIKE '%' || printf('%.*c', 90, 'a') || 'b%') FROM c) SELECT max(x) FROM c");
  EXPECT_EQ(e.status, "timeout");
}

// They say what SQLite's say.
TEST_F(SqlTool, LinearFunctionsAgreeWithTheirModels) {
  sqlite3 *own = nullptr, *plain = nullptr;
  ASSERT_EQ(sqlite3_open(":memory:", &own), SQLITE_OK);
  ASSERT_EQ(sqlite3_open(":memory:", &plain), SQLITE_OK);
  use_linear_functions(own);
  const auto value = [](sqlite3* db, const std::string& expression) {
    sqlite3_stmt* s = nullptr;
    const std::string text = "SELECT quote(" + expression + "), typeof(" + expression + ")";
    EXPECT_EQ(sqlite3_prepare_v2(db, text.c_str(), -1, &s, nullptr), SQLITE_OK) << text;
    EXPECT_EQ(sqlite3_step(s), SQLITE_ROW) << text;
    std::string out;
    for (int i = 0; i < 2; ++i)
      if (const auto* p = sqlite3_column_text(s, i); p != nullptr)
        out += std::string(reinterpret_cast<const char*>(p)) + " ";
    sqlite3_finalize(s);
    return out;
  };
  std::mt19937 random(11);
  const auto one = [&] {
    const std::string letters[] = {"a", "a", "b", " ", "é", "€", "😀"};
    const unsigned kind = random() % 12;
    if (kind == 0) return std::string("NULL");
    if (kind == 1) return std::to_string(random() % 200);
    if (kind == 2) return "0." + std::to_string(random() % 20);
    std::string text;
    for (unsigned n = random() % 7; n > 0; --n) text += letters[random() % 7];
    if (kind > 3) return "'" + text + "'";
    std::string hex = "x'";
    for (const char c : text) hex += fmt::format("{:02x}", static_cast<unsigned char>(c));
    return hex + "'";
  };
  for (int i = 0; i < 6000; ++i) {
    const std::string x = one(), y = one(), z = one();
    for (const std::string& e :
         {"instr(" + x + "," + y + ")", "replace(" + x + "," + y + "," + z + ")", "trim(" + x + ")",
          "trim(" + x + "," + y + ")", "ltrim(" + x + "," + y + ")", "rtrim(" + x + "," + y + ")"})
      ASSERT_EQ(value(own, e), value(plain, e)) << e;
  }
  sqlite3_close(own);
  sqlite3_close(plain);
}

TEST_F(SqlTool, ADatabaseGrowsToItsLimitAndNoFurther) {
  const char* config = R"([{"tool":"sql","write":true,"disk_mib":2,"path":"new.sqlite","wall_s":60}])";
  EXPECT_EQ(call(config, "CREATE TABLE a(x)").status, "ok");
  EXPECT_EQ(call(config, "INSERT INTO a VALUES (randomblob(900000))").status, "ok");
  const ToolEvent e = call(config,
                           "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < 100) "
                           "INSERT INTO a SELECT randomblob(900000) FROM c");
  EXPECT_EQ(e.output, "[stopped: the database is full]");
  EXPECT_EQ(e.status, "limit");
  EXPECT_EQ(call(config, "SELECT count(*), sum(length(x)) FROM a").output,
            "[\"count(*)\",\"sum(length(x))\"]\n[1,900000]\n[1 row]");
  EXPECT_LE(std::filesystem::file_size(work_ / "new.sqlite"), 2u << 20);
}

TEST_F(SqlTool, HostileFilesAreErrors) {
  const auto said = [&](const char* path) {
    const std::string config = std::string(R"([{"tool":"sql","path":")") + path + "\"}]";
    const ToolEvent e = call(config.c_str(), "SELECT * FROM t");
    EXPECT_EQ(e.status, "error") << path;
    return e.output;
  };
  EXPECT_EQ(said("none.sqlite"), "\"none.sqlite\": there is no such file");
  std::ofstream(work_ / "noise") << std::string(5000, 'x');
  EXPECT_EQ(said("noise"), "SQL error: file is not a database");
  const TempDirectory outside;
  make(outside / "secret.sqlite", "CREATE TABLE t(a); INSERT INTO t VALUES ('hush');");
  std::filesystem::create_symlink(outside / "secret.sqlite", work_ / "link.sqlite");
  EXPECT_EQ(said("link.sqlite"), "\"link.sqlite\": links are not followed");
  EXPECT_EQ(said("../x"), "\"../x\": '..' leads out of the work folder");
  // A schema that would call a dangerous function when it is read.
  make(work_ / "view.sqlite", "CREATE VIEW t AS SELECT load_extension('x');");
  EXPECT_EQ(said("view.sqlite"), "SQL error: unsafe use of load_extension()");
}

}  // namespace
}  // namespace perigee::agents
