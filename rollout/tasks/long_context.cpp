#include "rollout/tasks/long_context.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "base/error.h"
#include "base/text.h"
#include "rollout/tasks/long_words.h"

namespace perigee::rollout {
namespace {

constexpr int64_t kLongest = int64_t{1} << 24;
constexpr size_t kNoiseLine = 64;  // bytes
constexpr int kDraws = 16;         // of a line that fits, before the text is ended
constexpr std::string_view kRepeated =
    "The road goes on and the sky stays grey. Nothing happens here today.\n";
constexpr int kCorrections = 4;

std::string printable_letters(JsonReader& options, std::string_view key, std::string_view absent) {
  std::string letters = options.string(key, absent);
  std::string seen;
  for (const char c : letters) {
    if (c <= ' ' || c > '~' || c == '=' || c == ';' || c == '?' || c == ':' || c == ',')
      options.fail(key, "printable ASCII is expected, without blanks and = ; ? : ,");
    if (seen.find(c) != seen.npos)
      options.fail(key, fmt::format("{} stands there twice", quote(std::string_view(&c, 1))));
    seen += c;
  }
  if (letters.size() < 2) options.fail(key, "at least two letters are expected");
  return letters;
}

int64_t tolerance(int64_t length) {
  return std::max<int64_t>(32, length / 200);
}

}  // namespace

PromptTokens PromptTokens::bytes() {
  PromptTokens t;
  t.text = [](std::string_view text) { return static_cast<int64_t>(text.size()); };
  t.prompt = [](const Task& task) {
    size_t bytes = 1 + task.prompt.size();
    for (const auto& m : task.messages) bytes += m.content.size() + 1;
    return static_cast<int64_t>(bytes);
  };
  return t;
}

LongOptions::LongOptions(JsonReader& options, const PromptTokens& counted) : tokens(counted) {
  length = options.integer("length", 1, kLongest, 4096);
  min_length = options.integer("min_length", 1, length, length);
  where = fmt::format("{}: {}", options.where(), options.path("length"));
  if (tokens.longest > 0 && length > tokens.longest)
    throw_input("{}: {} tokens are more than the {} of the model", where, length, tokens.longest);
  chat = options.boolean("chat", false);
  const std::string style = options.string("style", "text");
  if (style != "text" && style != "noise")
    options.fail("style", fmt::format("\"text\" or \"noise\" is expected, not {}", quote(style)));
  noise = style == "noise";
  // Letters that only one of the styles looks at are refused with the other.
  if (noise) {
    noise_alphabet = printable_letters(options, "noise_alphabet", "abcdefghijklmnopqrstuvwxyz");
    key_alphabet = printable_letters(options, "key_alphabet", "ABCDEFGHIJKLMNOPQRSTUVWXYZ");
    value_alphabet = printable_letters(options, "value_alphabet", "0123456789");
    key_length = options.integer("key_length", 1, 16, 2);
    value_length = options.integer("value_length", 1, 64, 4);
  }
}

void LongOptions::check_recalled(JsonReader& options, std::string_view key, std::string_view alphabet) {
  std::string seen;
  for (char c : alphabet) {
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
    const bool word = (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '-' || c == '_';
    if (!word || seen.find(c) != seen.npos)
      options.fail(
          key,
          "letters in one case, digits, - and _ are expected: others mean nothing to the verifier recall");
    seen += c;
  }
}

Filler::Filler(Kind kind, const LongOptions& options) : kind_(kind), options_(options) {}

size_t Filler::Text::cut(double from, double to, Random& random) const {
  const double share = from + (to - from) * ((random.next_u32() + 0.5) * 0x1p-32);
  const double at = share * static_cast<double>(text.size());
  if (cuts.empty()) return std::min(text.size(), static_cast<size_t>(at));
  // The nearest cut; of sentences it is less than one away.
  const auto above = std::lower_bound(cuts.begin(), cuts.end(), static_cast<size_t>(at));
  if (above == cuts.begin()) return *above;
  if (above == cuts.end()) return cuts.back();
  return static_cast<double>(*above) - at < at - static_cast<double>(*(above - 1)) ? *above : *(above - 1);
}

namespace {

// Lines of noise, of which the first begins after `at` letters of another.
std::string noise(std::string_view alphabet, int64_t letters, size_t at, Random& random) {
  std::string text = words::random_string(alphabet, letters, random);
  for (size_t i = kNoiseLine - 1 - at % kNoiseLine; i < text.size(); i += kNoiseLine) text[i] = '\n';
  return text;
}

}  // namespace

Filler::Text Filler::make(int64_t tokens, Random& random) const {
  return kind_ == Kind::kNoise ? make_noise(tokens, random) : make_lines(tokens, random);
}

Filler::Text Filler::make_noise(int64_t tokens, Random& random) const {
  Text made;
  double letters_per_token =
      1;  // of a tokenizer that takes some letters together there are more, found out by and by
  for (int64_t left = tokens; left > 0;) {
    const auto letters =
        std::max<int64_t>(1, static_cast<int64_t>(static_cast<double>(left) * letters_per_token));
    const std::string piece = noise(options_.noise_alphabet, letters, made.text.size(), random);
    const int64_t cost = std::max<int64_t>(1, options_.tokens.text(piece));
    if (cost <= left) {
      made.text += piece;
      left -= cost;
    } else if (letters == 1) {
      break;
    } else {
      letters_per_token *= 0.9 * static_cast<double>(left) / static_cast<double>(cost);
    }
  }
  return made;
}

Filler::Text Filler::make_lines(int64_t tokens, Random& random) const {
  Text made;
  const auto append = [&](std::string& to) {
    if (kind_ == Kind::kRepeat)
      to += kRepeated;
    else
      words::append_sentence(random, to);
  };
  made.cuts.push_back(0);
  const Padding padding(options_.tokens, "The day was", " long.\n");
  // Half of what is left at a time, so that each byte is counted once and the end can be met line by line.
  double bytes_per_token = 1;
  std::string block;
  int64_t left = tokens;
  while (left > 2 * padding.most()) {
    const double bytes = static_cast<double>(left) * bytes_per_token * 0.5;
    block.clear();
    std::vector<size_t> ends;
    while (static_cast<double>(block.size()) < bytes) {
      append(block);
      ends.push_back(block.size());
    }
    const int64_t cost = options_.tokens.text(block);
    if (cost > left - padding.most()) {
      if (ends.size() <= 1) break;
      bytes_per_token *= 0.5;
      continue;
    }
    for (const size_t end : ends) made.cuts.push_back(made.text.size() + end);
    made.text += block;
    left -= cost;
    bytes_per_token = static_cast<double>(block.size()) / static_cast<double>(cost);
  }
  // Then lines that leave what a padded one can end with.
  for (int refused = 0; left > 0 && refused < kDraws;) {
    block.clear();
    append(block);
    const int64_t rest = left - options_.tokens.text(block);
    if (rest <= padding.most() && !padding.reaches(rest)) {
      ++refused;
      continue;
    }
    made.text += block;
    made.cuts.push_back(made.text.size());
    left = rest;
    refused = 0;
  }
  while (!padding.reaches(left)) --left;
  made.text += padding.text(left);
  if (left > 0) made.cuts.push_back(made.text.size());
  return made;
}

Padding::Padding(const PromptTokens& tokens, std::string before, std::string after,
                 std::vector<std::string> between)
    : before_(std::move(before)), after_(std::move(after)), between_(std::move(between)) {
  const int64_t base = tokens.text(before_ + after_);
  for (const std::string& word : between_)
    costs_.push_back(std::max<int64_t>(1, tokens.text(before_ + word + after_) - base));
  constexpr int64_t kMost = 192;
  last_.assign(static_cast<size_t>(kMost) + 1, kUnreached);
  last_[0] = kNone;
  for (int64_t n = base; n <= kMost; ++n) {
    int& last = last_[static_cast<size_t>(n)];
    if (n == base) last = kNone;
    for (size_t a = 0; a < costs_.size() && last == kUnreached; ++a) {
      const size_t word = (a + static_cast<size_t>(n)) % costs_.size();  // not always the same one
      const int64_t rest = n - costs_[word];
      if (rest >= base && last_[static_cast<size_t>(rest)] != kUnreached) last = static_cast<int>(word);
    }
  }
}

bool Padding::reaches(int64_t tokens) const {
  return tokens >= 0 && tokens <= most() && last_[static_cast<size_t>(tokens)] != kUnreached;
}

std::string Padding::text(int64_t tokens) const {
  PERIGEE_CHECK(reaches(tokens), "padding of {}", tokens);
  if (tokens == 0) return {};
  std::string words;
  for (int64_t n = tokens; last_[static_cast<size_t>(n)] >= 0;) {
    const auto word = static_cast<size_t>(last_[static_cast<size_t>(n)]);
    words += between_[word];
    n -= costs_[word];
  }
  return before_ + words + after_;
}

std::string put_in(const Filler::Text& text, const std::vector<size_t>& cuts,
                   const std::vector<std::string>& lines) {
  PERIGEE_CHECK(cuts.size() == lines.size(), "{} cuts for {} lines", cuts.size(), lines.size());
  std::string out;
  size_t at = 0;
  for (size_t i = 0; i < lines.size(); ++i) {
    out.append(text.text, at, cuts[i] - at);
    at = cuts[i];
    out += lines[i];
  }
  return out.append(text.text, at);
}

Problem LongGenerator::draw(Random& random) const {
  const int64_t length = random.next_int(options_.min_length, options_.length);
  auto made = std::make_shared<Sketch>(sketch(random));
  const uint64_t seed = random.next_u64();
  const int64_t target = length - options_.tokens.answer, alone = least(*made);
  if (alone > target) refuse(length, alone);
  Problem problem;
  problem.canonical = made->canonical;
  problem.finish = [this, made, seed, length, target, alone] {
    // What borders cost or save is not known before: the whole is counted, and the filler is made again by the difference.
    int64_t filler = target - alone, nearest = -1;
    Task best;
    for (int i = 0; i < kCorrections && filler >= 0; ++i) {
      Task task = made->task;
      made->write(task, filler, Random(seed));
      const int64_t tokens = options_.tokens.prompt(task);
      if (tokens <= target && tokens > nearest) {
        nearest = tokens;
        best = std::move(task);
      }
      if (tokens == target) break;
      filler += target - tokens;
    }
    if (nearest < 0 || target - nearest > tolerance(length))
      throw_input("{}: {} tokens cannot be reached: the nearest prompt and answer have {}", options_.where,
                  length, nearest < 0 ? alone + options_.tokens.answer : nearest + options_.tokens.answer);
    return best;
  };
  return problem;
}

int64_t LongGenerator::least(const Sketch& sketch) const {
  Task task = sketch.task;
  sketch.write(task, 0, Random(0));
  return options_.tokens.prompt(task);
}

void LongGenerator::check_length(int64_t least_filler) const {
  Random random(0x6c656e677468u);
  int64_t most = 0;
  for (int i = 0; i < 8; ++i) most = std::max(most, least(sketch(random)));
  most += least_filler;
  if (!options_.noise) most += most / 8;  // others may be longer than these
  if (most > options_.min_length - options_.tokens.answer) refuse(options_.min_length, most);
}

void LongGenerator::check_at_least(double tokens) const {
  const double most = static_cast<double>(options_.min_length - options_.tokens.answer);
  if (tokens > most) refuse(options_.min_length, static_cast<int64_t>(std::min(tokens, 0x1p53)));
}

void LongGenerator::refuse(int64_t length, int64_t least) const {
  throw_input("{}: {} tokens cannot be reached: this task takes at least {}, {} of them for the answer",
              options_.where, length, least + options_.tokens.answer, options_.tokens.answer);
}

void LongGenerator::set_prompt(Task& task, std::string text) const {
  if (options_.chat)
    task.messages = {{policy::Role::kUser, std::move(text)}};
  else
    task.prompt = std::move(text);
}

std::string joined(const std::vector<std::string>& values) {
  return join(values);
}

}  // namespace perigee::rollout
