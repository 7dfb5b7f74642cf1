// Multi-round co-reference (MRCR: arXiv 2409.12640, and OpenAI's variant): a long conversation in which somebody asks for
// pieces of writing, a few times for the same one; at the end the i-th of these is to be said again, after some letters.
#include <algorithm>

#include "base/error.h"
#include "base/text.h"
#include "rollout/tasks/long_context.h"
#include "rollout/tasks/long_words.h"

namespace perigee::rollout {
namespace {

constexpr std::string_view kPrefixLetters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";

class Mrcr : public LongGenerator {
 public:
  Mrcr(JsonReader& options, const PromptTokens& tokens)
      : LongGenerator(options, tokens), padding_(tokens, " The day was", " long.") {
    copies_ = options.integer("copies", 2, 64, 2);
    prefix_length_ = options.integer("prefix_length", 1, 64, options_.noise ? 1 : 10);
    if (!options_.noise) {
      sentences_ = options.integer("sentences", 1, 100, 5);
      keys_ = words::kForms * words::kTopics;
    } else {
      if (options_.chat) options.fail("chat", "with \"style\": \"noise\" there is no conversation");
      keys_ = words::string_count(options_.key_alphabet, options_.key_length);
      if (words::string_count(options_.value_alphabet, options_.value_length) < copies_)
        options.fail("copies", "there are fewer different replies");
    }
    if (options_.chat) message_tokens_ = measure_messages();
    check_length(options_.noise ? options_.key_length + 8 : 256);
  }

 private:
  // A request and what it was answered with.
  struct Exchange {
    int64_t key = 0;
    std::string reply;
  };

  Sketch sketch(Random& random) const override {
    Sketch s;
    const int64_t key = random.next_int(0, keys_ - 1);
    std::vector<Exchange> same;
    for (int64_t i = 0; i < copies_; ++i) {
      Exchange e{key, {}};
      do e.reply = reply(key, random);
      while (std::any_of(same.begin(), same.end(),
                         [&](const Exchange& other) { return other.reply == e.reply; }));
      same.push_back(std::move(e));
    }
    const auto asked = static_cast<size_t>(random.next_int(0, copies_ - 1));
    const std::string prefix = words::random_string(options_.noise ? options_.noise_alphabet : kPrefixLetters,
                                                    prefix_length_, random);
    const std::string& text = same[asked].reply;
    s.canonical = fmt::format("mrcr {} {}", key, text);  // whichever of them it is
    s.task.answer = nlohmann::json{{"prefix", prefix}, {"text", text}}.dump();
    s.task.verifier = "match";
    s.task.worked_example =
        (options_.noise || options_.chat ? "" : " ") + prefix + (options_.noise ? "" : " ") + text;
    s.write = [this, same = std::move(same), asked, prefix](Task& task, int64_t tokens, Random r) {
      write(task, same, asked, prefix, tokens, r);
    };
    return s;
  }

  std::string reply(int64_t key, Random& random) const {
    if (options_.noise) return words::random_string(options_.value_alphabet, options_.value_length, random);
    std::string text;
    for (int64_t i = 0; i < sentences_; ++i)
      text += (i > 0 ? " " : "") + words::topic_sentence(words::topic(key / words::kForms), random);
    return text;
  }
  std::string name(int64_t key) const {
    if (options_.noise) return words::string_at(options_.key_alphabet, options_.key_length, key);
    return fmt::format("{} about {}", words::form(key % words::kForms), words::topic(key / words::kForms));
  }
  std::string request(int64_t key) const { return fmt::format("Write a {}.", name(key)); }
  std::string transcript(const Exchange& e) const {
    if (options_.noise) return fmt::format("{}:{}\n", name(e.key), e.reply);
    return fmt::format("User: {}\nAssistant: {}\n\n", request(e.key), e.reply);
  }
  int64_t cost(const Exchange& e) const {
    if (options_.chat)
      return options_.tokens.text(request(e.key)) + options_.tokens.text(e.reply) + message_tokens_;
    return options_.tokens.text(transcript(e));
  }

  // Of the chat template, around a request and its reply.
  int64_t measure_messages() const {
    Task one, three;
    one.messages = {{policy::Role::kUser, "a"}};
    three.messages = {
        {policy::Role::kUser, "a"}, {policy::Role::kAssistant, "a"}, {policy::Role::kUser, "a"}};
    return options_.tokens.prompt(three) - options_.tokens.prompt(one) - 2 * options_.tokens.text("a");
  }

  // Other exchanges of so many tokens together. The last one's reply is as long as it takes.
  std::vector<Exchange> others(int64_t key, int64_t tokens, Random& random) const {
    std::vector<Exchange> list;
    const auto draw_key = [&] {
      const int64_t other = random.next_int(0, keys_ - 2);
      return other < key ? other : other + 1;
    };
    for (int64_t left = tokens; left > 0;) {
      Exchange e{draw_key(), {}};
      e.reply = reply(e.key, random);
      const int64_t rest = left - cost(e);
      if (rest >= (options_.noise ? options_.key_length + 8 : 256)) {
        list.push_back(std::move(e));
        left = rest;
        continue;
      }
      e.reply.clear();
      extend(e, left, random);
      if (!e.reply.empty()) list.push_back(std::move(e));
      break;
    }
    return list;
  }

  void extend(Exchange& e, int64_t tokens, Random& random) const {
    if (options_.noise) {
      const int64_t letters = tokens - cost(e);
      if (letters > 0) e.reply = words::random_string(options_.value_alphabet, letters, random);
      return;
    }
    // Sentences while they fit, and one that ends even.
    for (int refused = 0; refused < 16;) {
      Exchange longer = e;
      longer.reply +=
          (e.reply.empty() ? "" : " ") + words::topic_sentence(words::topic(e.key / words::kForms), random);
      const int64_t rest = tokens - cost(longer);
      if (rest <= padding_.most() && !padding_.reaches(rest)) {
        ++refused;
        continue;
      }
      e = std::move(longer);
      if (rest == 0) return;
    }
    int64_t rest = tokens - cost(e);
    while (rest > 0 && !padding_.reaches(rest)) --rest;
    if (rest <= 0) return;
    e.reply += padding_.text(rest);
    if (e.reply.starts_with(' ')) e.reply.erase(0, 1);
  }

  void write(Task& task, const std::vector<Exchange>& same, size_t asked, const std::string& prefix,
             int64_t tokens, Random& random) const {
    std::vector<Exchange> list = others(same[0].key, tokens, random);
    std::vector<size_t> places;  // among the others
    for (size_t i = 0; i < same.size(); ++i)
      places.push_back(static_cast<size_t>(random.next_int(0, static_cast<int64_t>(list.size()))));
    std::sort(places.begin(), places.end());
    std::vector<const Exchange*> order;
    size_t at = 0;
    for (size_t i = 0; i < same.size(); ++i) {
      for (; at < places[i]; ++at) order.push_back(&list[at]);
      order.push_back(&same[i]);
    }
    for (; at < list.size(); ++at) order.push_back(&list[at]);

    const std::string question = fmt::format(
        "Say again the {} {} that you wrote, counting from 1, with {} and a blank before it and nothing "
        "else.",
        fmt::format("{}{}", asked + 1, ordinal(asked + 1)), name(same[0].key), prefix);
    if (options_.chat) {
      for (const Exchange* e : order) {
        task.messages.push_back({policy::Role::kUser, request(e->key)});
        task.messages.push_back({policy::Role::kAssistant, e->reply});
      }
      task.messages.push_back({policy::Role::kUser, question});
      return;
    }
    for (const Exchange* e : order) task.prompt += transcript(*e);
    if (options_.noise)
      task.prompt += fmt::format("?{}{}{}:", asked + 1, name(same[0].key), prefix);
    else
      task.prompt += fmt::format("User: {}\nAssistant:", question);
  }

  static std::string_view ordinal(size_t n) {
    if (n % 100 >= 11 && n % 100 <= 13) return "th";
    return n % 10 == 1 ? "st" : n % 10 == 2 ? "nd" : n % 10 == 3 ? "rd" : "th";
  }

  const Padding padding_;
  int64_t copies_ = 0, prefix_length_ = 0, sentences_ = 0, keys_ = 0, message_tokens_ = 0;
};

}  // namespace

std::unique_ptr<Generator> make_mrcr(JsonReader& options, const PromptTokens& tokens) {
  return std::make_unique<Mrcr>(options, tokens);
}

}  // namespace perigee::rollout
