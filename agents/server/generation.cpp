#include "agents/server/generation.h"

#include <fmt/format.h>

#include <utility>

namespace perigee::agents {

void Wake::add(std::shared_ptr<Generation> generation) {
  bool post = false;
  {
    const std::lock_guard lock(mutex_);
    waiting_.push_back(std::move(generation));
    post = !held_ && !std::exchange(posted_, true);
  }
  if (post) post_([this] { run(); });
}

void Wake::hold(bool held) {
  bool post = false;
  {
    const std::lock_guard lock(mutex_);
    held_ = held;
    post = !held_ && !waiting_.empty() && !std::exchange(posted_, true);
  }
  if (post) post_([this] { run(); });
}

void Wake::run() {
  {
    const std::lock_guard lock(mutex_);
    posted_ = false;
    now_.swap(waiting_);
  }
  for (const auto& g : now_) g->progress();
  now_.clear();
}

void Histogram::add(double seconds) {
  size_t i = 0;
  while (i < std::size(kBounds) && seconds > kBounds[i]) ++i;
  ++buckets_[i];
  sum_us_ += static_cast<int64_t>(seconds * 1e6);
}

void Histogram::write(const std::string& name, const std::string& labels, std::string& out) const {
  const auto to = std::back_inserter(out);
  int64_t sum = 0;
  const std::string comma = labels.empty() ? "" : labels + ",";
  for (size_t i = 0; i <= std::size(kBounds); ++i) {
    sum += buckets_[i];
    if (i < std::size(kBounds))
      fmt::format_to(to, "{}_bucket{{{}le=\"{}\"}} {}\n", name, comma, kBounds[i], sum);
    else
      fmt::format_to(to, "{}_bucket{{{}le=\"+Inf\"}} {}\n", name, comma, sum);
  }
  const std::string braces = labels.empty() ? "" : "{" + labels + "}";
  fmt::format_to(to, "{}_sum{} {}\n{}_count{} {}\n", name, braces, static_cast<double>(sum_us_) * 1e-6, name,
                 braces, sum);
}

Generation::Generation(Wake& wake, ServerMetrics& metrics, const policy::Tokenizer& tokenizer, int choices,
                       bool each_token, const OutputParser::Options& parser)
    : wake_(wake),
      metrics_(metrics),
      tokenizer_(tokenizer),
      each_token_(each_token),
      choices_(static_cast<size_t>(choices)),
      open_(choices) {
  if (!parser.stops.empty())
    for (int i = 0; i < choices; ++i) stops_.emplace_back(tokenizer_, parser);
}

void Generation::read_by(std::shared_ptr<NewsReader> reader) {
  const std::lock_guard lock(mutex_);
  reader_ = std::move(reader);
}

void Generation::forget() {
  std::shared_ptr<NewsReader> reader;  // dies without the lock
  const std::lock_guard lock(mutex_);
  reader.swap(reader_);
}

void Generation::progress() {
  std::shared_ptr<NewsReader> reader;
  {
    const std::lock_guard lock(mutex_);
    awake_ = false;
    reader = reader_;
  }
  if (reader) reader->on_news();
}

void Generation::start(Host& host, HostRequest request) {
  ++metrics_.generating;
  hosted_ = true;
  uint64_t ticket = 0;
  try {
    ticket = host.start(std::move(request), shared_from_this());
  } catch (...) {
    --metrics_.generating;
    hosted_ = false;
    throw;
  }
  bool late = false;
  {
    const std::lock_guard lock(mutex_);
    host_ = &host;
    ticket_ = ticket;
    started_ = true;
    late = cancelled_;
  }
  if (late) host.cancel(ticket);
}

void Generation::refuse(std::exception_ptr why) {
  {
    const std::lock_guard lock(mutex_);
    for (Choice& c : choices_) c.refused = why;
  }
  for (int c = 0; c < choices(); ++c) on_done(c, FinishReason::kError, {}, "it was not started");
}

void Generation::cancel() {
  {
    const std::lock_guard lock(mutex_);
    cancelled_ = true;
    if (!started_) return;  // start() looks
  }
  host_->cancel(ticket_);
}

void Generation::take(int choice, Choice& out) {
  out.tokens.clear();
  const std::lock_guard lock(mutex_);
  Choice& c = choices_[static_cast<size_t>(choice)];
  out.tokens.swap(c.tokens);  // the two lists keep their room
  out.done = c.done;
  out.finish = c.finish;
  out.refused = nullptr;
  if (!c.done) return;
  out.usage = c.usage;
  out.error = c.error;
  out.refused = c.refused;
}

std::vector<HostToken> Generation::take_prompt() {
  const std::lock_guard lock(mutex_);
  return std::move(prompt_);
}

bool Generation::on_token(int choice, const HostToken& token) {
  const auto now = Clock::now();
  const std::chrono::duration<double> since =
      now - (last_token_ == Clock::time_point() ? created_ : last_token_);
  if (choice == 0) {
    (last_token_ == Clock::time_point() ? metrics_.first_token : metrics_.between_tokens).add(since.count());
    last_token_ = now;
  }
  bool stop = false;
  if (!stops_.empty()) {
    scratch_.clear();
    OutputParser& parser = stops_[static_cast<size_t>(choice)];
    parser.add(token.token, scratch_);
    stop = parser.stopped();
    if (stop) ++metrics_.stop_text;
  }
  bool wake = false;
  {
    const std::lock_guard lock(mutex_);
    choices_[static_cast<size_t>(choice)].tokens.push_back(token);
    wake = each_token_ && !std::exchange(awake_, true);
  }
  if (wake) wake_.add(shared_from_this());
  return stop;
}

void Generation::on_prompt(std::vector<HostToken> tokens) {
  const std::lock_guard lock(mutex_);
  prompt_ = std::move(tokens);
}

void Generation::on_done(int choice, FinishReason finish, const HostUsage& usage, const std::string& error) {
  bool wake = false, all = false;
  {
    const std::lock_guard lock(mutex_);
    Choice& c = choices_[static_cast<size_t>(choice)];
    c.done = true;
    c.finish = finish;
    c.usage = usage;
    c.error = error;
    all = --open_ == 0;
    if (all) metrics_.whole_request.add(std::chrono::duration<double>(Clock::now() - created_).count());
    wake = (all || each_token_) && !std::exchange(awake_, true);
  }
  if (wake) wake_.add(shared_from_this());
  if (all && hosted_) --metrics_.generating;  // last: who waits for it destroys what is used above
}

}  // namespace perigee::agents
