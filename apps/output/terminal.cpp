#include "apps/output/terminal.h"

#include <fmt/format.h>
#include <poll.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <termios.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "base/error.h"
#include "base/text.h"

namespace perigee::apps {
namespace {

constexpr std::string_view kEnter = "\x1b[?1049h\x1b[?25l", kLeave = "\x1b[0m\x1b[?25h\x1b[?1049l", kReset = "\x1b[0m";
constexpr std::chrono::milliseconds kLineEvery{100};

std::string variable(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

// The cube of six levels and the greys of the 256 colours: the nearest.
int nearest_256(Rgb c) {
  constexpr int kLevels[] = {0, 95, 135, 175, 215, 255};
  const auto level = [&](int x) {
    int best = 0;
    for (int i = 1; i < 6; ++i)
      if (std::abs(kLevels[i] - x) < std::abs(kLevels[best] - x)) best = i;
    return best;
  };
  const int r = level(c.red), g = level(c.green), b = level(c.blue);
  return 16 + 36 * r + 6 * g + b;
}

void write_all(int fd, std::string_view text) {
  while (!text.empty()) {
    const ssize_t n = ::write(fd, text.data(), text.size());
    if (n < 0 && errno != EINTR && errno != EAGAIN) return;
    if (n > 0) text.remove_prefix(static_cast<size_t>(n));
  }
}

volatile sig_atomic_t g_signal = 0, g_resized = 0;
void on_signal(int signal) { g_signal = signal; }
void on_resize(int) { g_resized = 1; }

// At most so many columns of a line; escapes take none.
std::string cut(std::string_view line, size_t columns) {
  std::string out;
  size_t shown = 0;
  bool coloured = false;
  while (!line.empty()) {
    if (line[0] == '\x1b') {
      const size_t end = std::min(line.find('m'), line.size() - 1) + 1;
      out += line.substr(0, end);
      coloured = true;
      line.remove_prefix(end);
      continue;
    }
    if (shown == columns) break;
    const size_t bytes = std::max<size_t>(utf8_sequence_bytes(line), 1);
    out += line.substr(0, bytes);
    line.remove_prefix(bytes);
    ++shown;
  }
  if (coloured) out += kReset;
  return out;
}

}  // namespace

Colors colors_for(std::FILE* out) {
  if (!variable("NO_COLOR").empty()) return Colors::kNone;
  const std::string force = variable("CLICOLOR_FORCE"), term = variable("TERM");
  const bool forced = !force.empty() && force != "0";
  if (!forced && (::isatty(::fileno(out)) == 0 || term.empty() || term == "dumb")) return Colors::kNone;
  const std::string depth = variable("COLORTERM");
  return depth == "truecolor" || depth == "24bit" ? Colors::kTrue : Colors::k256;
}

std::string on_background(Colors colors, Rgb c, std::string_view text) {
  if (colors == Colors::kNone) return std::string(text);
  const bool light = 299 * c.red + 587 * c.green + 114 * c.blue > 128 * 1000;
  const std::string begin =
      colors == Colors::kTrue
          ? fmt::format("\x1b[{};48;2;{};{};{}m", light ? "38;5;16" : "38;5;231", c.red, c.green, c.blue)
          : fmt::format("\x1b[{};48;5;{}m", light ? "38;5;16" : "38;5;231", nearest_256(c));
  std::string out;
  while (!text.empty()) {
    const size_t end = std::min(text.find('\n'), text.size());
    // A line break alone would not be seen.
    if (end > 0 || text[0] == '\n') out += fmt::format("{}{}{}{}", begin, text.substr(0, end), end == 0 ? "\\n" : "", kReset);
    text.remove_prefix(end);
    if (!text.empty()) {
      out += '\n';
      text.remove_prefix(1);
    }
  }
  return out;
}

std::string sparkline(std::span<const double> values, size_t columns) {
  static constexpr std::string_view kBars[] = {"▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"};
  const size_t n = std::min(columns, values.size());
  std::vector<double> means(n, NAN);
  for (size_t i = 0; i < n; ++i) {
    double sum = 0;
    int64_t count = 0;
    for (size_t j = values.size() * i / n; j < values.size() * (i + 1) / n; ++j)
      if (std::isfinite(values[j])) sum += values[j], ++count;
    if (count > 0) means[i] = sum / static_cast<double>(count);
  }
  double low = INFINITY, high = -INFINITY;
  for (const double x : means)
    if (std::isfinite(x)) low = std::min(low, x), high = std::max(high, x);
  std::string out;
  for (const double x : means) {
    if (!std::isfinite(x)) {
      out += ' ';
      continue;
    }
    const double share = high > low ? (x - low) / (high - low) : 0.5;
    out += kBars[std::clamp(static_cast<int>(share * 8), 0, 7)];
  }
  return out;
}

WindowSize window_size(std::FILE* out) {
  winsize size{};
  if (::ioctl(::fileno(out), TIOCGWINSZ, &size) != 0 || size.ws_col == 0 || size.ws_row == 0) return {};
  return {size.ws_col, size.ws_row};
}

bool rewrites_lines(std::FILE* out) {
  const std::string term = variable("TERM");
  return ::isatty(::fileno(out)) != 0 && !term.empty() && term != "dumb";
}

ProgressLine::ProgressLine() : live_(rewrites_lines(stderr)) {}

ProgressLine::~ProgressLine() {
  if (shown_) std::fputs("\r\x1b[K", stderr);
}

void ProgressLine::show(const std::function<std::string()>& text) {
  if (!live_) return;
  const auto now = std::chrono::steady_clock::now();
  if (shown_ && now - last_ < kLineEvery) return;
  last_ = now;
  shown_ = true;
  // A line that wraps would leave its first row behind. In the last column some terminals wrap already.
  const std::string line = "\r\x1b[K" + cut(text(), window_size(stderr).columns - 1);
  std::fputs(line.c_str(), stderr);
}

struct Screen::Impl {
  std::FILE* out;
  termios before{};
  bool have_termios = false;
  struct sigaction old_actions[5];
  static constexpr int kSignals[] = {SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGWINCH};
};

Screen::Screen(std::FILE* out) : impl_(std::make_unique<Impl>()) {
  PERIGEE_CHECK(::isatty(::fileno(out)) != 0, "not a terminal");
  impl_->out = out;
  g_signal = 0;
  g_resized = 0;
  for (size_t i = 0; i < std::size(Impl::kSignals); ++i) {
    struct sigaction action {};
    action.sa_handler = Impl::kSignals[i] == SIGWINCH ? on_resize : on_signal;
    ::sigemptyset(&action.sa_mask);
    ::sigaction(Impl::kSignals[i], &action, &impl_->old_actions[i]);
  }
  std::fflush(out);
  impl_->have_termios = ::tcgetattr(STDIN_FILENO, &impl_->before) == 0;
  if (impl_->have_termios) {
    termios raw = impl_->before;
    raw.c_lflag &= ~static_cast<tcflag_t>(ICANON | ECHO);
    raw.c_cc[VMIN] = 0;
    raw.c_cc[VTIME] = 0;
    // Suspending would leave the shell with this screen.
    raw.c_cc[VSUSP] = _POSIX_VDISABLE;
    ::tcsetattr(STDIN_FILENO, TCSANOW, &raw);
  }
  write_all(::fileno(out), kEnter);
}

Screen::~Screen() {
  write_all(::fileno(impl_->out), kLeave);
  if (impl_->have_termios) ::tcsetattr(STDIN_FILENO, TCSANOW, &impl_->before);
  for (size_t i = 0; i < std::size(Impl::kSignals); ++i) ::sigaction(Impl::kSignals[i], &impl_->old_actions[i], nullptr);
}

void Screen::draw(const std::vector<std::string>& lines) {
  const WindowSize size = window_size(impl_->out);
  std::string out = "\x1b[H";
  const size_t rows = std::min(lines.size(), size.rows);
  for (size_t i = 0; i < rows; ++i) {
    out += cut(lines[i], size.columns);
    out += "\x1b[K";
    if (i + 1 < size.rows) out += "\r\n";
  }
  if (rows < size.rows) out += "\x1b[J";
  write_all(::fileno(impl_->out), out);
}

char Screen::wait(int milliseconds) {
  pollfd input{STDIN_FILENO, POLLIN, 0};
  const int ready = g_signal != 0 || g_resized != 0 ? 0 : ::poll(&input, 1, milliseconds);
  g_resized = 0;
  if (ready <= 0) return 0;
  if ((input.revents & (POLLHUP | POLLERR | POLLNVAL)) != 0 && (input.revents & POLLIN) == 0) {
    g_signal = SIGHUP;  // the terminal is gone
    return 0;
  }
  char key = 0;
  const ssize_t n = ::read(STDIN_FILENO, &key, 1);
  return n == 1 ? key : '\0';
}

bool Screen::stopped() const { return g_signal != 0; }
int Screen::signal() const { return g_signal; }

}  // namespace perigee::apps
