// The addresses behind the page of `perigee inspect`: who may ask, what is refused and how, and that text arrives whole.
#include <fstream>
#include <regex>
#include <set>

#include "storage/sqlite.h"
#include "tests/apps/inspect/page_fixture.h"

namespace perigee::inspect_test {
namespace {

namespace fs = std::filesystem;

struct HostileRun {
  explicit HostileRun(int groups = 3) { make_hostile_run(place / "hostile", groups); }
  std::string directory() const { return place / "hostile"; }
  TempDirectory place;
};

TEST(Inspect, PageHasAPolicyAndATokenAndNothingInline) {
  const HostileRun run;
  const Inspected page({run.directory()});
  const RawAnswer answer = page.get("/");
  ASSERT_EQ(answer.status, 200);
  EXPECT_EQ(answer.headers.at("content-security-policy"),
            "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' "
            "data:; base-uri 'none'; "
            "form-action 'none'; frame-ancestors 'none'");
  EXPECT_EQ(answer.headers.at("x-content-type-options"), "nosniff");
  EXPECT_EQ(answer.headers.at("cross-origin-resource-policy"), "same-origin");
  EXPECT_EQ(page.token().size(), 32u) << answer.body;
  EXPECT_EQ(answer.body.find("@TOKEN@"), std::string::npos);
  EXPECT_FALSE(std::regex_search(answer.body,
                                 std::regex("<style|\\sstyle=|\\son[a-z]+=|javascript:|https?://|<script>")));
  for (const std::string file : {"/main.js", "/style.css", "/icon.svg"})
    EXPECT_EQ(page.get(file).status, 200) << file;
  EXPECT_EQ(page.get("/main.js").headers.at("content-type"), "text/javascript; charset=utf-8");
  for (const std::string file : {"/../CMakeLists.txt", "/page", "/main.js/", "/api", "/api/nothing"})
    EXPECT_EQ(page.get(file).status, 404) << file;
  const Inspected other({run.directory()});
  EXPECT_NE(page.token(), other.token());
}

// Text becomes text by textContent and append alone, and nothing is fetched from elsewhere.
TEST(Inspect, NoFileOfThePageParsesMarkupOrLeavesTheServer) {
  int files = 0;
  for (const auto& entry : fs::directory_iterator(std::string(PERIGEE_SOURCE_DIR) + "/apps/inspect/page")) {
    ++files;
    const std::string text = slurp(entry.path());
    EXPECT_FALSE(std::regex_search(
        text, std::regex("innerHTML|outerHTML|insertAdjacentHTML|document\\.write|DOMParser|"
                         "createContextualFragment|srcdoc|"
                         "setHTML|\\beval\\(|new "
                         "Function|javascript:|setAttribute\\(\"(style|on)|importScripts|@import|url\\(")))
        << entry.path();
    std::string rest = std::regex_replace(text, std::regex("http://www\\.w3\\.org/2000/svg"), "");
    EXPECT_FALSE(std::regex_search(rest, std::regex("https?://|//[a-z]+\\.[a-z]{2,}/"))) << entry.path();
  }
  EXPECT_GE(files, 15);
}

TEST(Inspect, OtherSitesAreRefused) {
  const HostileRun run;
  const Inspected page({run.directory()});
  const std::string port = std::to_string(page.port());
  const auto status = [&](const std::string& target, const std::string& headers) {
    RawClient client(page.port());
    client.send("GET " + target + " HTTP/1.1\r\n" + headers + "Connection: close\r\n\r\n");
    client.rest();
    return take_answer(client.received()).status;
  };
  EXPECT_EQ(status("/api/runs", "Host: 127.0.0.1:" + port + "\r\n"), 200);
  EXPECT_EQ(status("/api/runs", "Host: localhost:" + port + "\r\n"), 200);
  for (const std::string host :
       {"evil.example:" + port, std::string("127.0.0.1"), "127.0.0.1:" + port + ".evil.example",
        std::string(""), "127.0.0.1.evil.example:" + port, std::string("127.0.0.1:1")})
    for (const std::string target : {"/", "/api/runs", "/main.js"})
      EXPECT_EQ(status(target, "Host: " + host + "\r\n"), 403) << host;
  EXPECT_NE(status("/api/runs", ""), 200);
  EXPECT_NE(status("/api/runs", "Host: 127.0.0.1:" + port + "\r\nHost: evil.example\r\n"), 200);
  const std::string host = "Host: 127.0.0.1:" + port + "\r\n";
  EXPECT_EQ(status("/api/runs", host + "Origin: http://127.0.0.1:" + port + "\r\n"), 200);
  for (const std::string origin : {std::string("null"), std::string("http://evil.example"),
                                   "https://127.0.0.1:" + port, std::string("http://127.0.0.1:1")})
    EXPECT_EQ(status("/api/runs", host + "Origin: " + origin + "\r\n"), 403) << origin;
  EXPECT_EQ(status("/api/runs", host + "Sec-Fetch-Site: cross-site\r\n"), 403);
  EXPECT_EQ(status("/main.js", host + "Sec-Fetch-Site: same-site\r\n"), 403);
  EXPECT_EQ(status("/", host + "Sec-Fetch-Site: cross-site\r\n"), 200);  // a link to the page
}

TEST(Inspect, ActionsNeedTheToken) {
  const HostileRun run;
  const Inspected page({run.directory()});
  const auto post = [&](const std::string& path, const std::string& body, const std::string& headers) {
    return ask(page.port(), "POST", "/api/" + path, body, headers).status;
  };
  const std::string right = "X-Perigee-Token: " + page.token() + "\r\n";
  for (const std::string path : {"replay", "branch", "entropy", "cancel"}) {
    EXPECT_EQ(post(path, R"({"run":"hostile","episode":3})", ""), 403);
    EXPECT_EQ(post(path, R"({"run":"hostile","episode":3})",
                   "X-Perigee-Token: 00000000000000000000000000000000\r\n"),
              403);
  }
  EXPECT_EQ(post("replay", R"({"run":"hostile","episode":4711})", right), 404);
  EXPECT_EQ(post("replay", R"({"run":"hostile","episode":"3; rm"})", right), 400);
  EXPECT_EQ(post("replay", R"({"run":"hostile","episode":3,"more":1})", right), 400);
  EXPECT_EQ(post("branch", R"({"run":"hostile","episode":3,"at":1,"n":1000})", right), 400);
  EXPECT_EQ(post("entropy", R"({"run":"hostile","episode":3,"at":1})", right), 400);
  EXPECT_EQ(post("replay", "[]", right), 400);
  EXPECT_EQ(post("replay", "{", right), 400);
  EXPECT_EQ(post("cancel", R"({"job":99})", right), 400);
  EXPECT_EQ(ask(page.port(), "PUT", "/api/runs").status, 405);
  EXPECT_EQ(ask(page.port(), "POST", "/", "{}", right).status, 405);
}

// The store was written by this test: there are no weights to generate it from, and the job says so in a line.
TEST(Inspect, AJobThatCannotBeDoneSaysWhy) {
  const HostileRun run;
  const Inspected page({run.directory()});
  const RawAnswer begun = ask(page.port(), "POST", "/api/replay", R"({"run":"hostile","episode":3})",
                              "X-Perigee-Token: " + page.token() + "\r\n");
  ASSERT_EQ(begun.status, 200) << begun.body;
  nlohmann::json job = nlohmann::json::parse(begun.body);
  for (int i = 0; i < 400 && (job["state"] == "waiting" || job["state"] == "running"); ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    job = page.json("/api/job?job=" + std::to_string(job["job"].get<int>()));
  }
  EXPECT_EQ(job["state"], "ended") << job;
  EXPECT_NE(job["exit"], 0) << job;
  EXPECT_TRUE(job["error"].get<std::string>().size() > 10 || !job["result"].is_null()) << job;
}

TEST(Inspect, AFilterMistakeComesWithItsPlace) {
  const HostileRun run;
  const Inspected page({run.directory()});
  const auto mistake = [&](const std::string& where) {
    return page.json("/api/episodes?where=" + where, 400)["error"];
  };
  nlohmann::json error = mistake("reward%20%3E%20%3E");
  EXPECT_EQ(error["at"], 9);
  EXPECT_EQ(error["filter"], "reward > >");
  EXPECT_EQ(error["message"], "a value is expected");
  error = mistake("prompt~'%5E'%20and%20rewrd=1");  // a ^ of the filter's own before the place
  EXPECT_EQ(error["at"], 15) << error;
  EXPECT_NE(error["message"].get<std::string>().find("reward"), std::string::npos) << error;
  error = mistake("prompt~'%C3%A9'%20xor");  // counted in characters
  EXPECT_EQ(error["at"], 11) << error;
  EXPECT_EQ(page.json("/api/count?where=reward%3E", 400)["error"]["at"], 7);
  for (const std::string query : {"sort=size", "limit=0", "limit=501", "finish=never", "state=x", "step=-1",
                                  "descending=2", "after=nonsense", "were=1", "where=a&where=b", "where=%2"})
    EXPECT_TRUE(page.json("/api/episodes?" + query, 400)["error"]["message"].is_string()) << query;
}

TEST(Inspect, WhatIsNotThereIsSaid) {
  const HostileRun run;
  const Inspected page({run.directory()});
  for (const std::string path : {"episode", "tokens", "siblings", "text"})
    EXPECT_EQ(page.json("/api/" + path + "?episode=4711" + (path == "text" ? "&part=prompt" : ""),
                        404)["error"]["message"],
              "run hostile has no episode 4711");
  EXPECT_EQ(page.get("/api/text?episode=3&part=output").status, 404);
  EXPECT_EQ(page.get("/api/text?episode=3&part=all").status, 400);
  EXPECT_EQ(page.get("/api/episode").status, 400);
  EXPECT_EQ(page.get("/api/episode?episode=0").status, 400);
  EXPECT_EQ(page.get("/api/episode?episode=3&run=other").status, 400);
  EXPECT_EQ(page.get("/api/job?job=1").status, 400);
  EXPECT_EQ(page.json("/api/episode?episode=3&run=hostile")["episode"], 3);
}

// A curve of zeros would say that the policy stays where the reference is.
TEST(Inspect, TheKlIsThereOnlyWithAReference) {
  for (const double coef : {0.0, 0.1}) {
    TempDirectory place;
    fs::create_directories(place / "run");
    {
      Store store(place / "run/store.sqlite");
      auto t = store.begin();
      RunRecord run;
      run.id = "r";
      run.config = nlohmann::json({{"learn", {{"kl_coef", coef}}}}).dump();
      run.state = "finished";
      store.create_run(run);
      store.record_metrics("r", "rl", 1, {{"kl", coef}, {"loss", 1.0}});
      t.commit();
    }
    const Inspected page({place / "run"});
    const auto series = page.json("/api/metrics")["phases"][0]["series"];
    EXPECT_TRUE(series.contains("loss")) << series;
    EXPECT_EQ(series.contains("kl"), coef > 0) << series;
  }
}

// Every byte of it, and nothing else.
TEST(Inspect, HostileTextArrivesWhole) {
  const HostileRun run;
  const Inspected page({run.directory()});
  const nlohmann::json e = page.json("/api/episode?episode=1");
  EXPECT_EQ(unwire(e["prompt"]["text"]), kHostile);
  ASSERT_EQ(e["tools"].size(), 1u);
  EXPECT_EQ(unwire(e["tools"][0]["name"]), kScript);
  EXPECT_EQ(unwire(e["tools"][0]["input"]["text"]), kHostile);
  EXPECT_EQ(unwire(e["tools"][0]["output"]["text"]), kHostile);
  EXPECT_EQ(unwire(e["reward"]["components"][0]["detail"]["text"]), kHostile);
  EXPECT_EQ(e["seed"], "18446744073709551600");  // whole
  EXPECT_EQ(unwire(page.json("/api/text?episode=1&part=response")["text"]),
            kHostile + "given backcaf\xc3\xa9 \xf0\x9f\x98\x80!");
  EXPECT_EQ(unwire(page.json("/api/episodes?where=episode=1")["rows"][0]["prompt"]), kHostile);
  EXPECT_EQ(e["blocks"].size(), 3u) << e["blocks"];
  EXPECT_EQ(e["blocks"][1]["kind"], "given");
  EXPECT_EQ(e["blocks"][1]["tools"], nlohmann::json::array({0}));
}

TEST(Inspect, ALineOfAMegabyteComesInParts) {
  const HostileRun run;
  const Inspected page({run.directory()});
  const RawAnswer first = page.get("/api/episode?episode=2");
  EXPECT_LT(first.body.size(), 20'000u);
  nlohmann::json part = nlohmann::json::parse(first.body)["tools"][0]["output"];
  EXPECT_EQ(part["bytes"], kLineBytes);
  std::string whole = unwire(part["text"]);
  int parts = 0;
  while (part["to"] < part["bytes"]) {
    part = page.json("/api/text?episode=2&part=output&index=0&from=" +
                     std::to_string(part["to"].get<int64_t>()));
    EXPECT_LE(part["text"].get<std::string>().size(), 300'000u);
    whole += unwire(part["text"]);
    ASSERT_LT(++parts, 100);
  }
  EXPECT_TRUE(whole == long_line());
}

// Parts that begin and end anywhere hold whole characters, and together all of it.
TEST(Inspect, PartsOfATextEndBetweenCharacters) {
  const HostileRun run;
  const Inspected page({run.directory()});
  for (int64_t from = 0; from < static_cast<int64_t>(kHostile.size()); ++from) {
    const nlohmann::json part = page.json("/api/text?episode=1&part=prompt&from=" + std::to_string(from));
    const int64_t begin = part["from"];
    EXPECT_LE(begin, from);
    EXPECT_GE(begin, from - 3);
    EXPECT_EQ(unwire(part["text"]), kHostile.substr(begin)) << from;
  }
}

TEST(Inspect, TokensComeInColumnsAndCharactersWhole) {
  const HostileRun run;
  const Inspected page({run.directory()});
  const nlohmann::json all = page.json("/api/tokens?episode=3");
  const size_t n = std::string("the answer is 3").size();
  for (const char* column : {"ids", "texts", "logprobs", "versions", "policy", "special"})
    EXPECT_EQ(all[column].size(), n) << column;
  EXPECT_EQ(all["of"], n);
  const nlohmann::json some = page.json("/api/tokens?episode=3&from=4&count=3");
  EXPECT_EQ(some["texts"], (nlohmann::json{"a", "n", "s"}));
  EXPECT_EQ(some["versions"][0], all["versions"][4]);
  const nlohmann::json e = page.json("/api/episode?episode=2");
  const int64_t from = e["blocks"][2]["from"];
  const nlohmann::json texts = page.json("/api/tokens?episode=2&from=" + std::to_string(from))["texts"];
  EXPECT_EQ(texts, (nlohmann::json{"c", "a", "f", "\xc3\xa9", "", " ", "\xf0\x9f\x98\x80", "", "", "", "!"}));
  EXPECT_EQ(page.json("/api/tokens?episode=2&from=4&count=1")["policy"], nlohmann::json{0});
  EXPECT_EQ(page.get("/api/tokens?episode=2&count=100000").status, 400);
}

TEST(Inspect, PagesByCursorHoldEveryRowOnce) {
  const HostileRun run(40);
  const Inspected page({run.directory()});
  for (const std::string sort : {"id", "reward", "tokens", "step"})
    for (const std::string descending : {"0", "1"}) {
      std::vector<int64_t> seen;
      std::string after;
      do {
        const nlohmann::json answer = page.json("/api/episodes?limit=33&sort=" + sort +
                                                "&descending=" + descending + "&after=" + after);
        for (const auto& row : answer["rows"]) seen.push_back(row["episode"]);
        after = std::regex_replace(answer["next"].get<std::string>(), std::regex("\\+"), "%2B");
        ASSERT_LE(seen.size(), 160u);
      } while (!after.empty());
      EXPECT_EQ(std::set<int64_t>(seen.begin(), seen.end()).size(), 160u) << sort << descending;
      EXPECT_EQ(seen.size(), 160u);
    }
  EXPECT_EQ(page.json("/api/count")["count"], 160);
  EXPECT_EQ(page.json("/api/count?at_most=10")["at_least"], true);
  EXPECT_EQ(page.json("/api/count?step=2")["count"], 32);
  EXPECT_EQ(page.json("/api/count?where=reward=1%20or%20reward=0")["count"], 64);
}

TEST(Inspect, ContainsLooksIntoPromptsToolsAndAnswers) {
  const HostileRun run(30);
  const Inspected page({run.directory()});
  const auto found = [&](const std::string& text) {
    std::vector<int64_t> out;
    const nlohmann::json answer = page.json("/api/episodes?contains=" + text);
    for (const auto& row : answer["rows"]) out.push_back(row["episode"]);
    return out;
  };
  EXPECT_EQ(found("answer%20is%2077"), std::vector<int64_t>{77});
  EXPECT_EQ(found("big.txt"), std::vector<int64_t>{2});
  EXPECT_EQ(found("2%2B29?"), (std::vector<int64_t>{117, 118, 119, 120}));
  EXPECT_EQ(found("nowhere"), std::vector<int64_t>{});
  EXPECT_EQ(page.json("/api/episodes?contains=nowhere")["looked_at"], 120);
}

TEST(Inspect, ADamagedEpisodeIsNamedAndLeavesItsSiblingsReadable) {
  const HostileRun run;
  {
    storage::Database db(run.directory() + "/store.sqlite", {});
    db.exec("UPDATE segments SET tokens = x'0001' WHERE episode_id = 6");
  }
  const Inspected page({run.directory()});
  EXPECT_NE(page.json("/api/episode?episode=6", 503)["error"]["message"].get<std::string>().find("episode 6"),
            std::string::npos);
  const nlohmann::json e = page.json("/api/episode?episode=5");
  EXPECT_NE(e["trouble"].get<std::string>().find("episode 6"), std::string::npos) << e["trouble"];
  EXPECT_EQ(e["members"].size(), static_cast<size_t>(kGroup));
  EXPECT_EQ(e["step"], 1);
  EXPECT_EQ(page.get("/api/siblings?episode=5").status, 503);
  EXPECT_EQ(page.json("/api/count")["count"], 12);
}

TEST(Inspect, SiblingsAreTheGroup) {
  const HostileRun run;
  const Inspected page({run.directory()});
  const nlohmann::json group = page.json("/api/siblings?episode=6");
  ASSERT_EQ(group["members"].size(), static_cast<size_t>(kGroup));
  EXPECT_EQ(group["members"][1]["episode"], 6);
  EXPECT_EQ(group["members"][1]["response"]["text"], "the answer is 6");
  EXPECT_EQ(group["members"][1]["reward"]["total"], 0.25);
}

TEST(Inspect, ChangesTellOfCommitsOnly) {
  const HostileRun run;
  const Inspected page({run.directory()});
  const nlohmann::json before = page.json("/api/changes");
  page.json("/api/episode?episode=3");
  EXPECT_EQ(page.json("/api/changes"), before);
  {
    Store store(run.directory() + "/store.sqlite");
    auto tx = store.begin();
    store.record_metrics("hostile", "rl", 31, {{"reward_mean", 0.5}});
    tx.commit();
  }
  EXPECT_NE(page.json("/api/changes"), before);
  const nlohmann::json curve = page.json("/api/metrics")["phases"][0];
  EXPECT_EQ(curve["steps"].size(), 31u);
  EXPECT_EQ(curve["series"]["reward_mean"][30], 0.5);
  EXPECT_TRUE(curve["series"]["entropy"][30].is_null());
}

TEST(Inspect, SeveralRunsHaveKeysAndADirectoryIsListed) {
  TempDirectory place;
  make_hostile_run(place / "a/one", 2);
  make_hostile_run(place / "b/one", 3);
  {
    const Inspected page({place / "a/one", place / "b/one"});
    const nlohmann::json runs = page.json("/api/runs");
    ASSERT_EQ(runs["runs"].size(), 2u);
    EXPECT_EQ(runs["runs"][0]["key"], "one");
    EXPECT_EQ(runs["runs"][1]["key"], "one~2");
    EXPECT_EQ(page.json("/api/count?run=one~2")["count"], 12);
    EXPECT_EQ(page.json("/api/count")["count"], 8);
  }
  {
    const Inspected page({place / "a/one"});
    expect_refused({"inspect", place / "a/one", "--port", std::to_string(page.port())},
                   "127.0.0.1:" + std::to_string(page.port()));
  }
  expect_refused({"inspect", place / "a/none"}, "no run");
  expect_refused({"inspect", place / "a/one", "--port", "70000"}, "--port");
  expect_refused({"inspect", place / "a/one", "--open", "maybe"}, "--open");
  expect_refused({"inspect"}, "no run under ./runs", {.directory = place / "a"});
}

}  // namespace
}  // namespace perigee::inspect_test
