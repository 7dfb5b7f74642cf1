// Shows how a run goes: a live view in a terminal, a line per step elsewhere.
#pragma once
#include <chrono>
#include <cstdio>
#include <string>
#include <vector>

#include "rollout/setup/run_config.h"

namespace perigee::rollout {

class Progress {
 public:
  enum class Style { kLive, kLines, kSilent };
  // kLive when out is a terminal that can move its cursor, else kLines.
  static Style style_for(std::FILE* out);

  Progress(const RunConfig& config, std::FILE* out, Style style);
  ~Progress();

  // An event of the hub (docs/formats/bus.md, "Events").
  void event(const nlohmann::json& event);
  // A line of text above the view.
  void note(const std::string& line);
  // Takes the live view away, so that other output can follow.
  void close();

  // The text of the live view; its bar is what so many columns leave of it.
  std::vector<std::string> view(size_t columns = 1000) const;

 private:
  void draw();
  void erase();
  void write(const std::string& text);
  void flush();
  std::string time_left() const;
  std::string kl_text() const;  // "-" where no reference is measured

  const RunConfig& config_;
  std::FILE* out_;
  Style style_;
  int drawn_lines_ = 0;

  std::string phase_ = "starting";
  int64_t step_ = 0, version_ = 0, groups_open_ = 0, groups_scored_ = 0;
  nlohmann::json metrics_ = nlohmann::json::object();
  double tokens_per_s_ = 0, accuracy_ = -1, warm_accuracy_ = -1;
  std::chrono::steady_clock::time_point start_, phase_start_, last_draw_;
  int64_t phase_first_step_ = 0;
};

}  // namespace perigee::rollout
