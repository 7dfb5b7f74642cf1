// What a terminal can show: colours, small charts, a screen that is drawn again in place.
#pragma once
#include <cstdint>
#include <chrono>
#include <cstdio>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace perigee::apps {

enum class Colors : uint8_t { kNone, k256, kTrue };
// kNone when NO_COLOR is set, TERM is absent or "dumb", or out is no terminal (CLICOLOR_FORCE, not "0", stands for one);
// kTrue when COLORTERM is "truecolor" or "24bit".
Colors colors_for(std::FILE* out);

struct Rgb {
  uint8_t red = 0, green = 0, blue = 0;
};
// The text, black or white by what can be read, on this background; at a line break the background pauses. REQUIRES text as
// printable() makes it. kNone: the text.
std::string on_background(Colors colors, Rgb background, std::string_view text);

// A chart one line high and at most `columns` wide, of the numbers in order: ▁ the least of them, █ the greatest. More numbers
// than columns: means of neighbours. Numbers that are not finite leave a blank.
std::string sparkline(std::span<const double> values, size_t columns);

struct WindowSize {
  size_t columns = 80, rows = 24;
};
WindowSize window_size(std::FILE* out);

// A terminal that can write a line again: out is one, and TERM is neither empty nor "dumb".
bool rewrites_lines(std::FILE* out);

// A line on standard error that the next one replaces, cut at the window's edge, where that can be done (rewrites_lines); at
// most some times a second. Its end takes it away.
class ProgressLine {
 public:
  ProgressLine();
  ~ProgressLine();
  ProgressLine(const ProgressLine&) = delete;
  ProgressLine& operator=(const ProgressLine&) = delete;
  // text gives one printable line.
  void show(const std::function<std::string()>& text);
  bool live() const { return live_; }

 private:
  bool live_;
  bool shown_ = false;
  std::chrono::steady_clock::time_point last_;
};

// The alternate screen of a terminal, without a cursor, keys read as they are pressed. However the object's life ends, by an
// exception too, the terminal is as before; while it lives SIGINT, SIGTERM, SIGHUP and SIGQUIT set stopped() instead of
// ending the process. One at a time.
class Screen {
 public:
  // REQUIRES out and the standard input to be terminals.
  explicit Screen(std::FILE* out);
  ~Screen();
  Screen(const Screen&) = delete;
  Screen& operator=(const Screen&) = delete;

  // These lines, cut at the window's edges. Each is printable but for the escapes of on_background.
  void draw(const std::vector<std::string>& lines);
  // Waits at most so long; returns early on a key, a signal or a change of the window. The key, or 0.
  char wait(int milliseconds);
  bool stopped() const;  // a signal asked to end
  int signal() const;    // which; 0: none

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace perigee::apps
