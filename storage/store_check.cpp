// Looks for damage in all that is stored.
#include <algorithm>

#include "base/error.h"
#include "base/hash.h"
#include "storage/columns.h"
#include "storage/row_sum.h"
#include "storage/store.h"

namespace perigee {
using storage::Query;

std::vector<std::string> StoreQueries::check(int limit) {
  storage::ReadScope scope(*db_);
  std::vector<std::string> findings;
  const auto full = [&] { return static_cast<int>(findings.size()) >= limit; };
  // A finding a line, each once: several searches meet the same damage.
  const auto add = [&](std::string_view text) {
    for (size_t begin = 0; begin <= text.size() && !full();) {
      const size_t end = std::min(text.find('\n', begin), text.size());
      const std::string_view finding = text.substr(begin, end - begin);
      begin = end + 1;
      if (!finding.empty() && std::find(findings.begin(), findings.end(), finding) == findings.end())
        findings.emplace_back(finding);
    }
  };

  // A damaged page can end any of the searches with an error: that is a finding too.
  const auto search = [&](const auto& body) {
    try {
      body();
    } catch (const Error& error) {
      add(error.what());
    }
  };

  search([&] {
    Query q = db_->query_once(fmt::format("PRAGMA integrity_check({})", std::max(limit, 1)));
    while (q.step())
      if (q.text(0) != "ok") add(q.str(0));
  });
  search([&] {
    Query q = db_->query_once("PRAGMA foreign_key_check");
    while (!full() && q.step())
      add(fmt::format("table {}, row {}: refers to a row of {} that is not there", q.text(0), q.int64(1),
                      q.text(2)));
  });
  search([&] {
    Query q = db_->query_once("SELECT group_id, prompt FROM groups");
    while (!full() && q.step())
      if (const BlobStatus status = check_blob(q.blob(1)); status != BlobStatus::kOk)
        add(fmt::format("group {}, prompt: {}", q.int64(0), blob_status_text(status)));
  });
  // Segments in their order: blobs whole, and S4 against what the episode says.
  search([&] {
    Query q = db_->query_once(fmt::format(
        "SELECT e.episode_id, s.segment_index, s.attempt, s.finish, s.token_count, s.tokens, s.logprobs, "
        "s.versions, s.mask, e.segment_count, e.token_count, e.finish, e.attempt, {} FROM episodes e "
        "LEFT JOIN segments s ON s.episode_id = e.episode_id ORDER BY e.episode_id, s.segment_index",
        schema_ >= 3 ? "e.pruned IS NOT NULL" : "0"));
    int64_t episode = -1, segments = 0, tokens = 0, want_segments = 0, want_tokens = 0, attempt = 0;
    std::string finish, want_finish;
    bool any = false, pruned = false;
    const auto end_episode = [&] {
      if (!any) return;
      if (pruned) {
        if (segments > 0) add(fmt::format("episode {}: its tokens were dropped, and segments are there", episode));
        return;
      }
      if (segments != want_segments || tokens != want_tokens)
        add(fmt::format("episode {}: {} segments with {} tokens are there, {} with {} should be", episode,
                        segments, tokens, want_segments, want_tokens));
      if (finish != want_finish)
        add(fmt::format("episode {}: its last segment says finish {}, the episode {}", episode, finish,
                        want_finish));
    };
    while (!full() && q.step()) {
      if (!any || q.int64(0) != episode) {
        end_episode();
        any = true;
        episode = q.int64(0);
        segments = tokens = attempt = 0;
        finish = "none";
        want_segments = q.int64(9);
        want_tokens = q.int64(10);
        want_finish = q.str(11);
        pruned = q.int64(13) != 0;
      }
      if (q.is_null(1)) continue;
      const auto place = [&] { return fmt::format("episode {}, segment {}", episode, q.int64(1)); };
      if (q.int64(1) != segments) add(fmt::format("{}: {} was expected", place(), segments));
      if (finish != "none") add(fmt::format("{}: follows a finish", place()));
      if (q.int64(2) < attempt || q.int64(2) > q.int64(12))
        add(fmt::format("{}: attempt {}", place(), q.int64(2)));
      ++segments;
      tokens += q.int64(4);
      attempt = q.int64(2);
      finish = q.str(3);
      try {
        storage::segment_row(*db_, q);
      } catch (const Error& error) {
        add(error.what());
      }
    }
    if (!full()) end_episode();
  });
  // Rows that went missing whole, which nothing else would tell.
  if (schema_ >= 4) {
    const auto missing = [&](const char* sql, const char* what) {
      search([&] {
        Query q = db_->query_once(sql);
        while (!full() && q.step()) add(fmt::format("{} {}: {} {} are there, {} should be", what, q.int64(0), q.int64(1), q.str(4), q.int64(2)));
      });
    };
    missing("SELECT e.episode_id, (SELECT count(*) FROM reward_components c WHERE c.episode_id = e.episode_id) n, "
            "e.component_count, 0, 'reward components' FROM episodes e WHERE e.component_count IS NOT NULL AND n <> e.component_count",
            "episode");
    missing("SELECT s.episode_id, (SELECT count(*) FROM tool_events t WHERE t.episode_id = s.episode_id AND t.segment_index = "
            "s.segment_index) n, s.tool_count, 0, 'tool calls of a segment' FROM segments s WHERE s.tool_count IS NOT NULL AND n <> "
            "s.tool_count",
            "episode");
    missing("SELECT b.step, (SELECT count(*) FROM train_items i WHERE i.run = b.run AND i.step = b.step) n, b.item_count, 0, "
            "'episodes of the batch' FROM train_batches b WHERE b.item_count IS NOT NULL AND n <> b.item_count",
            "step");
  }
  if (schema_ >= 4)
    for (const storage::SummedTable& table : storage::summed_tables())
      search([&] {
        const std::string_view columns = table.columns;
        Query q = db_->query_once(
            fmt::format("SELECT {} FROM {} WHERE sum IS NOT NULL AND sum <> row_sum({})", columns, table.name, columns));
        while (!full() && q.step())
          add(fmt::format("{}: the row of {} {} does not have the checksum that it was written with", table.name,
                          columns.substr(0, columns.find(',')), q.str(0)));
      });
  if (schema_ >= 3)
    search([&] {
      Query q = db_->query_once(
          "SELECT e.episode_id FROM episodes e JOIN groups g ON g.group_id = e.group_id WHERE e.run <> g.run OR e.step <> g.step");
      while (!full() && q.step())
        add(fmt::format("episode {}: its copies of the group's run and step differ from them", q.int64(0)));
    });
  search([&] {
    Query q = db_->query_once("SELECT episode_id, segment_index, position, output, digest FROM tool_events");
    while (!full() && q.step())
      if (!q.text(4).empty() && hash_hex(storage::bytes_text(q.blob(3))) != q.text(4))
        add(fmt::format("episode {}, segment {}, tool call {}: output does not match its digest", q.int64(0),
                        q.int64(1), q.int64(2)));
  });
  return findings;
}

}  // namespace perigee
