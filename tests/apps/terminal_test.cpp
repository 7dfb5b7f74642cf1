// What commands print for people: widths, colours, listings, one episode, a run as it goes on.
#include "apps/output/terminal.h"

#include <pty.h>
#include <sys/file.h>
#include <termios.h>

#include <chrono>
#include <cmath>
#include <thread>

#include "apps/output/output.h"
#include "apps/runs/episode_json.h"
#include "apps/runs/episode_turns.h"
#include "base/text.h"
#include "tests/apps/made_run.h"

namespace perigee {
namespace {

using namespace perigee::apps;

TEST(Terminal, WidthCountsColumns) {
  EXPECT_EQ(text_width("abc"), 3u);
  EXPECT_EQ(text_width("\xe6\x97\xa5\xe6\x9c\xac"), 4u);             // two wide characters
  EXPECT_EQ(text_width("\xf0\x9f\x9a\x80"), 2u);                     // an emoji
  EXPECT_EQ(text_width("e\xcc\x81"), 1u);                            // a letter and a mark on it
  EXPECT_EQ(text_width("\xe1\x84\x92\xe1\x85\xa1\xe1\x86\xab"), 2u);  // a syllable in three pieces
  EXPECT_EQ(text_width("\xef\xbd\xb1\xef\xbc\xa1"), 3u);             // half wide, full wide
  EXPECT_EQ(text_width("\xc3\xa9\xd7\xa9…"), 3u);
}

TEST(Terminal, LinesAreCutByColumns) {
  EXPECT_EQ(printable_line("abcdef", 4), "abcd…");
  EXPECT_EQ(printable_line("abcd", 4), "abcd");
  EXPECT_EQ(printable_line("\xe6\x97\xa5\xe6\x9c\xac\xe8\xaa\x9e", 5), "\xe6\x97\xa5\xe6\x9c\xac…");
  EXPECT_EQ(printable_line("a\nb\t\x1b[2J\xff", 0), "a\\nb\\t\\x1b[2J\\xff");
  std::string marks = "e";
  for (int i = 0; i < 100000; ++i) marks += "\xcc\x81";
  EXPECT_LT(printable_line(marks, 10).size(), 400u);
  for (const std::string& text : hostile_texts())
    for (const size_t columns : {0u, 1u, 7u, 20u}) {
      const std::string line = printable_line(text, columns);
      EXPECT_TRUE(is_utf8(line));
      for (const char c : line) EXPECT_GE(static_cast<unsigned char>(c), 0x20);
      if (columns > 0) EXPECT_LE(text_width(line), columns + 1);
    }
  EXPECT_EQ(printable("\xf3\xa0\x81\xa1"), "\\u{e0061}");  // a letter that is not seen
}

TEST(Terminal, CsvFieldsAreQuotedAndNoFormulas) {
  EXPECT_EQ(csv_field("plain"), "plain");
  EXPECT_EQ(csv_field("a,b"), "\"a,b\"");
  EXPECT_EQ(csv_field("a\"b\nc"), "\"a\"\"b\nc\"");
  EXPECT_EQ(csv_field("=1+1"), "'=1+1");
  EXPECT_EQ(csv_field("@SUM(A1),\"x\""), "\"'@SUM(A1),\"\"x\"\"\"");
  EXPECT_EQ(csv_field("\r=1"), "\\x0d=1");
  EXPECT_EQ(csv_field("\t=1"), "'\t=1");
  EXPECT_EQ(csv_field(""), "");
}

TEST(Terminal, SparklinesShowTheCourse) {
  const std::vector<double> up = {0, 1, 2, 3, 4, 5, 6, 7};
  EXPECT_EQ(sparkline(up, 8), "▁▂▃▄▅▆▇█");
  EXPECT_EQ(sparkline(up, 4), "▁▃▆█");
  EXPECT_EQ(sparkline(up, 100), "▁▂▃▄▅▆▇█");
  EXPECT_EQ(sparkline(std::vector<double>{1, NAN, 2}, 3), "▁ █");
  EXPECT_EQ(sparkline(std::vector<double>{5, 5}, 3), "▅▅");
  EXPECT_EQ(sparkline(std::vector<double>{NAN, INFINITY}, 3), "  ");
  EXPECT_EQ(sparkline({}, 3), "");
  EXPECT_EQ(sparkline(up, 0), "");
}

TEST(Terminal, BackgroundsPauseAtLineBreaks) {
  EXPECT_EQ(on_background(Colors::kNone, {1, 2, 3}, "a\nb"), "a\nb");
  EXPECT_EQ(on_background(Colors::kTrue, {255, 255, 0}, "a"), "\x1b[38;5;16;48;2;255;255;0ma\x1b[0m");
  EXPECT_EQ(on_background(Colors::k256, {0, 0, 0}, "a"), "\x1b[38;5;231;48;5;16ma\x1b[0m");
  const std::string two = on_background(Colors::k256, {255, 0, 0}, "a\nb");
  EXPECT_NE(two.find("a\x1b[0m\n\x1b["), std::string::npos) << two;
}

TEST(Terminal, CellsHoldWholeCharacters) {
  const policy::ByteTokenizer tokenizer;
  std::vector<int32_t> ids;
  for (const char c : std::string("a\xe6\x97\xa5\xff\xe6\x97z\xf0\x9f\x9a\x80")) ids.push_back(static_cast<unsigned char>(c));
  std::string joined, shapes;
  size_t at = 0;
  for (const TokenCell& cell : token_cells(tokenizer, ids)) {
    EXPECT_EQ(cell.first, at);
    at += cell.count;
    joined += cell.text;
    shapes += std::to_string(cell.count);
  }
  EXPECT_EQ(at, ids.size());
  EXPECT_EQ(joined, text_of(tokenizer, ids));
  EXPECT_EQ(shapes, "131214");
}

TEST(Terminal, TurnsCoverTheTokens) {
  EpisodeRecord e;
  Segment s;
  for (int i = 0; i < 10; ++i) {
    s.tokens.push_back(i);
    s.logprobs.push_back(0);
    s.versions.push_back(1);
  }
  s.mask = {1, 1, 0, 0, 1, 1, 1, 0, 1, 1};
  s.tools.resize(2);
  s.tools[1].turn = 1;
  e.segments.push_back(s);
  const EpisodeTokens tokens(e);
  const std::vector<Turn> turns = turns_of(e, tokens);
  ASSERT_EQ(turns.size(), 3u);
  const size_t expected[3][3] = {{0, 2, 4}, {4, 7, 8}, {8, 10, 10}};
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(turns[i].begin, expected[i][0]);
    EXPECT_EQ(turns[i].end, expected[i][1]);
    EXPECT_EQ(turns[i].fed_end, expected[i][2]);
  }
  EXPECT_EQ(turns[0].tools.size(), 1u);
  EXPECT_EQ(turns[1].tools.size(), 1u);
  EXPECT_EQ(turns_of({}, EpisodeTokens({})).size(), 1u);
}

// Fields of CSV records as RFC 4180 has them.
std::vector<std::vector<std::string>> parse_csv(const std::string& text) {
  std::vector<std::vector<std::string>> rows(1);
  std::string field;
  bool quoted = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (quoted) {
      if (c == '"' && i + 1 < text.size() && text[i + 1] == '"')
        field += '"', ++i;
      else if (c == '"')
        quoted = false;
      else
        field += c;
    } else if (c == '"') {
      quoted = true;
    } else if (c == ',' || c == '\r') {
      rows.back().push_back(field);
      field.clear();
      if (c == '\r') rows.emplace_back(), ++i;
    } else {
      field += c;
    }
  }
  rows.pop_back();
  return rows;
}

TEST(Terminal, RolloutsListPageAndFind) {
  TempDirectory place;
  const MadeRun made = make_run(place / "run");
  const std::string dir = made.directory;
  // By cursor, page by page, each row once.
  std::vector<int64_t> seen;
  std::string after;
  do {
    std::vector<std::string> args = {"rollouts", dir, "--sort", "reward", "--descending", "--limit", "5", "--json"};
    if (!after.empty()) args.insert(args.end(), {"--after", after});
    const nlohmann::json page = run_perigee(args).json();
    ASSERT_TRUE(page.is_object());
    EXPECT_EQ(page["total"], 16);
    for (const auto& e : page["episodes"]) seen.push_back(e["episode"]);
    after = page["next"].is_string() ? page["next"].get<std::string>() : "";
  } while (!after.empty() && seen.size() < 100);
  std::sort(seen.begin(), seen.end());
  EXPECT_EQ(seen, made.episodes);
  // Text of the policy, of a tool, of the prompt.
  const auto found = [&](const std::string& text) {
    std::vector<int64_t> ids;
    const nlohmann::json out = run_perigee({"rollouts", dir, "--contains", text, "--json"}).json();
    for (const auto& e : out["episodes"]) ids.push_back(e["episode"]);
    return ids;
  };
  EXPECT_EQ(found("answer is 3"), (std::vector<int64_t>{made.episodes[5], made.episodes[8]}));
  EXPECT_EQ(found("\"expression\":\"1+1\""), std::vector<int64_t>{made.episodes[0]});
  EXPECT_EQ(found("nowhere"), std::vector<int64_t>{});
  EXPECT_EQ(found("=1+1,\"two\"").size(), 4u);
  // Bounded: it says how far it looked and where to go on.
  const nlohmann::json part = run_perigee({"rollouts", dir, "--contains", "answer is 3", "--look-at", "7", "--json"}).json();
  EXPECT_EQ(part["looked_at"], 7);
  ASSERT_TRUE(part["next"].is_string());
  const nlohmann::json rest =
      run_perigee({"rollouts", dir, "--contains", "answer is 3", "--after", part["next"], "--json"}).json();
  EXPECT_EQ(part["episodes"].size() + rest["episodes"].size(), 2u);
  EXPECT_NE(run_perigee({"rollouts", dir, "--contains", "is 3", "--look-at", "7"}).out.find("looked at 7 of 16"), std::string::npos);
  // CSV: as many fields in each record, nothing a spreadsheet computes, the text otherwise.
  const auto rows = parse_csv(run_perigee({"rollouts", dir, "--csv", "--limit", "100"}).out);
  ASSERT_EQ(rows.size(), 17u);
  for (const auto& row : rows) EXPECT_EQ(row.size(), rows[0].size());
  EXPECT_EQ(rows[1][16], "'=" + hostile_texts()[0]);
  EXPECT_EQ(rows[5][16], "1+1=");
  expect_refused({"rollouts", dir, "--json", "--csv"}, "not both");
  expect_refused({"rollouts", dir, "--sort", "rewards"}, "did you mean reward?");
  expect_refused({"rollouts", dir, "--contains", "x", "--page", "2"}, "--after");
  expect_refused({"rollouts", dir, "--after", "nonsense"}, "nonsense");
}

// What `perigee serve` keeps: the prompt as tokens, between the turns what users said, a note of the host beside each turn.
TEST(Terminal, ASessionIsReadAsAConversation) {
  TempDirectory place;
  std::filesystem::create_directories(place / "serve");
  int64_t id = 0;
  {
    Store store(place / "serve/store.sqlite");
    auto t = store.begin();
    RunRecord run;
    run.id = "sessions";
    run.config = nlohmann::json({{"kind", "session"}, {"model", golden("tiny")}}).dump();
    run.state = "running";
    store.create_run(run);
    GroupRecord group;
    group.task = R"({"session":"first","meta":{}})";
    std::vector<EpisodeSpec> one(1);
    one[0].prompt = {'a', 's', 'k'};
    store.open_group("sessions", group, one);
    id = one[0].episode_id;
    Segment s;
    s.episode_id = id;
    s.attempt = *store.begin_attempt(id);
    for (const std::string said : {"one", "two"}) {
      s.tokens.assign(said.begin(), said.end());
      s.mask.assign(3, 1);
      if (s.index == 1) {
        s.tokens.insert(s.tokens.begin(), {'m', 'o', 'r', 'e'});
        s.mask.insert(s.mask.begin(), 4, 0);
      }
      s.logprobs.assign(s.tokens.size(), -0.5f);
      s.versions.assign(s.tokens.size(), 0);
      ToolEvent note;
      note.turn = static_cast<int32_t>(s.index);
      note.name = "perigee.turn";
      note.status = "ok";
      note.digest = hash_hex("");
      s.tools = {note};
      EXPECT_EQ(store.append_segment(s), Append::kAppended);
      ++s.index;
    }
    t.commit();
  }
  const Said shown = run_perigee({"show", place / "serve", std::to_string(id)});
  EXPECT_EQ(shown.code, 0) << shown.err;
  EXPECT_NE(shown.out.find("\nprompt\nask\n\nturn 1\none\n\nfed\nmore\n\nturn 2\ntwo\n"), std::string::npos) << shown.out;
  EXPECT_EQ(shown.out.find("perigee.turn"), std::string::npos) << shown.out;
  const Said listed = run_perigee({"rollouts", place / "serve"});
  EXPECT_NE(listed.out.find("session first"), std::string::npos) << listed.out;
}

TEST(Terminal, ShowColoursAndCompares) {
  TempDirectory place;
  const MadeRun made = make_run(place / "run");
  const std::string dir = made.directory;
  const auto show = [&](int64_t id, const std::string& color, std::vector<std::string> environment) {
    environment.push_back("TERM=xterm");
    return run_perigee({"show", dir, std::to_string(id), "--color", color, "--siblings"}, {{}, std::move(environment)});
  };
  for (const int64_t id : made.episodes) {
    for (const char* what : {"logprob", "advantage", "version", "never"}) {
      for (const char* depth : {"COLORTERM=truecolor", "COLORTERM="}) {
        const Said said = show(id, what, {"CLICOLOR_FORCE=1", depth});
        ASSERT_EQ(said.code, 0) << said.err;
        // Colours and resets are the only escapes, and each colour ends.
        int64_t open = 0;
        for (size_t i = 0; i < said.out.size(); ++i) {
          const auto c = static_cast<unsigned char>(said.out[i]);
          if (c != 0x1b) {
            EXPECT_TRUE(c >= 0x20 || c == '\n' || c == '\t') << what << " " << int{c};
            if (c == '\n') EXPECT_EQ(open, 0);
            continue;
          }
          const size_t end = said.out.find('m', i);
          ASSERT_NE(end, std::string::npos);
          const std::string escape = said.out.substr(i + 1, end - i - 1);
          EXPECT_EQ(escape.find_first_not_of("[0123456789;"), std::string::npos) << escape;
          open = escape == "[0" ? 0 : 1;
          i = end;
        }
        EXPECT_EQ(said.out.find('\x1b') == std::string::npos, std::string(what) == "never");
      }
      EXPECT_EQ(show(id, what, {"CLICOLOR_FORCE=1", "NO_COLOR=1"}).out.find('\x1b'), std::string::npos);
    }
    EXPECT_EQ(show(id, "logprob", {}).out.find('\x1b'), std::string::npos) << "not a terminal";
    break;  // one of the hostile ones; the others differ in text only
  }
  EXPECT_NE(show(made.episodes[0], "logprob", {"CLICOLOR_FORCE=1", "COLORTERM=24bit"}).out.find("48;2;"), std::string::npos);
  const Said said = show(made.episodes[5], "advantage", {});
  EXPECT_NE(said.out.find("-0.5000"), std::string::npos);
  EXPECT_NE(said.out.find("> " + std::to_string(made.episodes[5])), std::string::npos) << said.out;
  EXPECT_NE(said.out.find("4 members"), std::string::npos);
  const nlohmann::json json =
      run_perigee({"show", dir, std::to_string(made.episodes[4]), "--siblings", "--json"}).json();
  EXPECT_EQ(json["advantage"], 1.5);
  ASSERT_EQ(json["siblings"].size(), 4u);
  EXPECT_EQ(json["siblings"][3]["advantage"], -0.5);
  EXPECT_EQ(json["siblings"][0]["reward"], 1.5);
  EXPECT_TRUE(json["parent"].is_null());
  expect_refused({"show", dir, std::to_string(made.episodes[0]), "--color", "logprobs"}, "did you mean logprob?");
}

TEST(Terminal, ShowKnowsBranchesAndTheirParent) {
  TempDirectory place;
  const MadeRun made = make_run(place / "run");
  int64_t branch = 0;
  {
    Store store(made.directory + "/store.sqlite");
    auto t = store.begin();
    GroupRecord group;
    std::vector<EpisodeSpec> members(1);
    const EpisodeRecord parent = store.episode(made.episodes[4]);
    members[0].prompt = parent.spec.prompt;
    members[0].prompt.insert(members[0].prompt.end(), parent.segments[0].tokens.begin(), parent.segments[0].tokens.begin() + 3);
    members[0].parent_episode_id = made.episodes[4];
    members[0].parent_tokens = 3;
    members[0].max_new_tokens = 5;
    store.open_branch("made", group, members);
    branch = members[0].episode_id;
    t.commit();
  }
  const std::string parent = std::to_string(made.episodes[4]);
  EXPECT_NE(run_perigee({"show", made.directory, parent}).out.find("branches   " + std::to_string(branch)), std::string::npos);
  const Said said = run_perigee({"show", made.directory, std::to_string(branch)});
  EXPECT_NE(said.out.find("of episode " + parent + ", from its token 3"), std::string::npos) << said.out << said.err;
  EXPECT_EQ(run_perigee({"show", made.directory, std::to_string(branch), "--json"}).json()["parent"]["tokens"], 3);
}

TEST(Terminal, WatchTellsAFinishedRunLineByLine) {
  TempDirectory place;
  const MadeRun made = make_run(place / "run");
  const Said said = run_perigee({"watch", made.directory});
  EXPECT_EQ(said.code, 0) << said.err;
  EXPECT_EQ(std::count(said.out.begin(), said.out.end(), '\n'), 3 + 30 + 2 + 1) << said.out;
  EXPECT_NE(said.out.find("learning step 30  reward 0.600  KL"), std::string::npos) << said.out;
  EXPECT_NE(said.out.find("learning step 30  held-out accuracy 80.0 %\n"), std::string::npos) << said.out;
  EXPECT_NE(said.out.find("made: finished\n"), std::string::npos);
  EXPECT_EQ(said.out.find('\x1b'), std::string::npos);
  const Said once = run_perigee({"watch", made.directory, "--once"});
  EXPECT_EQ(once.code, 0) << once.err;
  EXPECT_NE(once.out.find("step 30 of 2   version 30"), std::string::npos) << once.out;
  EXPECT_NE(once.out.find("80.0 %  ▁█\n"), std::string::npos) << once.out;
  EXPECT_LT(std::count(once.out.begin(), once.out.end(), '\n'), 20);
  expect_refused({"watch", made.directory, "--interval", "0"}, "--interval");
}

// Says "running" and nobody writes it.
TEST(Terminal, WatchSaysThatARunWasKilled) {
  TempDirectory place;
  const MadeRun made = make_run(place / "run", "running");
  const Said said = run_perigee({"watch", made.directory});
  EXPECT_EQ(said.code, 1) << said.err;
  EXPECT_NE(said.out.find("perigee resume"), std::string::npos) << said.out;
}

// A program on a terminal of its own.
class OnTerminal {
 public:
  explicit OnTerminal(const std::vector<std::string>& args, const char* term = "xterm", unsigned short columns = 100) {
    const winsize size{30, columns, 0, 0};
    pid_ = ::forkpty(&fd_, nullptr, nullptr, &size);
    if (pid_ == 0) {
      ::setenv("TERM", term, 1);
      std::vector<char*> argv{const_cast<char*>(PERIGEE_PROGRAM)};
      for (const std::string& a : args) argv.push_back(const_cast<char*>(a.c_str()));
      argv.push_back(nullptr);
      ::execv(PERIGEE_PROGRAM, argv.data());
      ::_exit(127);
    }
    ::tcgetattr(fd_, &before_);
  }
  ~OnTerminal() {
    if (!ended_) {
      ::kill(pid_, SIGKILL);
      ::waitpid(pid_, nullptr, 0);
    }
    ::close(fd_);
  }
  // Reads until `text` was shown, or the program ended, or 20 seconds passed.
  bool shows(const std::string& text) {
    const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    while (shown_.find(text, from_) == std::string::npos) {
      if (std::chrono::steady_clock::now() > until || !read_some()) return false;
    }
    from_ = shown_.find(text, from_) + text.size();
    return true;
  }
  void type(const std::string& keys) { EXPECT_EQ(::write(fd_, keys.data(), keys.size()), static_cast<ssize_t>(keys.size())); }
  void signal(int number) { ::kill(pid_, number); }
  int wait() {
    while (read_some()) {
    }
    int status = 0;
    ::waitpid(pid_, &status, 0);
    ended_ = true;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
  }
  // The settings of the terminal are as they were.
  bool restored() const {
    termios now{};
    ::tcgetattr(fd_, &now);
    return now.c_lflag == before_.c_lflag && now.c_iflag == before_.c_iflag && now.c_oflag == before_.c_oflag;
  }
  const std::string& shown() const { return shown_; }

 private:
  bool read_some() {
    char bytes[4096];
    const ssize_t n = ::read(fd_, bytes, sizeof bytes);
    if (n <= 0) return false;
    shown_.append(bytes, static_cast<size_t>(n));
    return true;
  }
  pid_t pid_ = -1;
  int fd_ = -1;
  termios before_{};
  bool ended_ = false;
  std::string shown_;
  size_t from_ = 0;
};

// The view follows a run that is being written, and leaves the terminal as it was, however it ends.
TEST(Terminal, WatchDrawsInPlaceAndRestoresTheTerminal) {
  TempDirectory place;
  const MadeRun made = make_run(place / "run", "running");
  Store store(made.directory + "/store.sqlite");
  const auto step = [&](int number) {
    auto t = store.begin();
    store.record_metrics("made", "rl", number, {{"reward_mean", 0.875}});
    t.commit();
  };
  for (const std::string how : {"ctrl-c", "q", "term", "hup"}) {
    OnTerminal watch({"watch", made.directory, "--interval", "0.05"});
    ASSERT_TRUE(watch.shows("\x1b[?1049h")) << watch.shown();
    ASSERT_TRUE(watch.shows("held-out accuracy")) << watch.shown();
    if (how == "ctrl-c") {
      step(31);
      EXPECT_TRUE(watch.shows("0.875")) << watch.shown();
      watch.type("\x03");
    } else if (how == "q") {
      watch.type("q");
    } else {
      watch.signal(how == "term" ? SIGTERM : SIGHUP);
    }
    const int code = watch.wait();
    EXPECT_EQ(code, how == "ctrl-c" ? 130 : how == "q" ? 0 : how == "term" ? 143 : 129) << how;
    const size_t left = watch.shown().rfind("\x1b[?1049l");
    ASSERT_NE(left, std::string::npos) << how;
    EXPECT_NE(watch.shown().find("\x1b[?25h"), std::string::npos) << how;
    EXPECT_NE(watch.shown().find("made", left), std::string::npos) << "what was last seen stays";
    EXPECT_TRUE(watch.restored()) << how;
  }
  // A run that ends ends the view.
  OnTerminal watch({"watch", made.directory, "--interval", "0.05"});
  ASSERT_TRUE(watch.shows("held-out accuracy"));
  {
    auto t = store.begin();
    store.set_run_state("made", "finished");
    t.commit();
  }
  EXPECT_EQ(watch.wait(), 0);
  EXPECT_NE(watch.shown().rfind("\x1b[?1049l"), std::string::npos);
  EXPECT_NE(watch.shown().find("finished"), std::string::npos);
}

TEST(Terminal, ProgressKeepsWithinTheWindowAndIsLeftOutWhereItCannotBeDrawn) {
  TempDirectory place;
  spill(place / "run.json", small_run(place / "run").dump());
  ASSERT_EQ(run_perigee({"train", place / "run.json", "--quiet", "--in-process"}).code, 0);
  const auto in_a_window = [&](const char* term, unsigned short columns) {
    OnTerminal verify({"verify", place / "run"}, term, columns);
    EXPECT_EQ(verify.wait(), 0) << verify.shown();
    return verify.shown();
  };
  const std::string live = in_a_window("xterm", 16);
  ASSERT_NE(live.find("\x1b[K"), std::string::npos) << live;
  EXPECT_NE(live.find("rebuilding vers"), std::string::npos) << live;
  EXPECT_EQ(live.find("rebuilding versi"), std::string::npos) << live;
  EXPECT_EQ(in_a_window("dumb", 80).find('\x1b'), std::string::npos);
}

}  // namespace
}  // namespace perigee
