// Reads a long prompt as a patient person would, with none of the generators' code.
#pragma once
#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

namespace perigee::rollout {

inline std::vector<std::string> lines_of(const std::string& text) {
  std::vector<std::string> lines;
  for (size_t at = 0; at <= text.size();) {
    const size_t end = std::min(text.find('\n', at), text.size());
    lines.push_back(text.substr(at, end - at));
    at = end + 1;
  }
  return lines;
}

inline std::string between(const std::string& text, const std::string& open, const std::string& close) {
  const size_t begin = text.rfind(open);
  if (begin == text.npos) return "(no " + open + ")";
  const size_t from = begin + open.size();
  return text.substr(from, text.find(close, from) - from);
}

inline std::vector<std::string> split(const std::string& text, const std::string& separator) {
  std::vector<std::string> parts;
  size_t begin = 0;
  for (size_t at = text.find(separator); at != text.npos; at = text.find(separator, begin)) {
    parts.push_back(text.substr(begin, at - begin));
    begin = at + separator.size();
  }
  parts.push_back(text.substr(begin));
  return parts;
}

inline std::string together(const std::vector<std::string>& list) {
  std::string text;
  for (const auto& item : list) text += (text.empty() ? "" : ", ") + item;
  return text;
}

struct Needles {
  std::vector<std::pair<std::string, std::string>> pairs;
  std::vector<std::string> asked;
};

inline Needles needles(const std::string& prompt) {
  Needles n;
  for (const std::string& line : lines_of(prompt)) {
    const size_t is = line.find(" is ");
    if (line.starts_with("The password of ") && is != line.npos)
      n.pairs.emplace_back(line.substr(16, is - 16), line.substr(is + 4, line.size() - is - 5));
    if (line.starts_with("What ")) {
      std::string who = between(line, " of ", "?");
      if (const size_t last = who.find(" and "); last != who.npos) who.replace(last, 5, ", ");
      n.asked = split(who, ", ");
    }
  }
  return n;
}

// In a noisy text, "KEY=VALUE;" with so long a key.
inline Needles noisy(const std::string& prompt, size_t key_length) {
  Needles n;
  const size_t question = prompt.rfind("\n?");
  for (size_t at = prompt.find('='); at < question; at = prompt.find('=', at + 1))
    n.pairs.emplace_back(prompt.substr(at - key_length, key_length),
                         prompt.substr(at + 1, prompt.find(';', at) - at - 1));
  std::string asked = prompt.substr(question + 2);
  asked.pop_back();
  n.asked = split(asked, ",");
  return n;
}

inline std::string ask(const Needles& n) {
  std::vector<std::string> values;
  for (const auto& who : n.asked)
    for (const auto& [key, value] : n.pairs)
      if (key == who) values.push_back(value);
  return together(values);
}

inline std::string follow(const Needles& n, const std::string& value) {
  std::vector<std::string> holders;
  for (const auto& [name, from] : n.pairs)
    if (from == value || std::find(holders.begin(), holders.end(), from) != holders.end())
      holders.push_back(name);
  return together(holders);
}

// The most frequent words of a text, most frequent first; empty where the last of them is no more frequent than the next.
inline std::string most_frequent(const std::string& text, size_t asked) {
  std::map<std::string, int> counts;
  for (const std::string& line : lines_of(text))
    for (const std::string& w : split(line, " "))
      if (!w.empty() && !isdigit(w[0]) && w[0] != '.' && w[0] != '?') ++counts[w];
  std::vector<std::pair<int, std::string>> order;
  for (const auto& [w, n] : counts) order.emplace_back(-n, w);
  std::sort(order.begin(), order.end());
  if (order.size() > asked && order[asked - 1].first == order[asked].first) return "";
  std::vector<std::string> words;
  for (size_t i = 0; i < asked; ++i) words.push_back(order[i].second);
  return together(words);
}

inline std::string sorted(const std::string& list) {
  std::vector<std::string> parts = split(list, ", ");
  std::sort(parts.begin(), parts.end());
  return together(parts);
}

inline std::string mrcr(const std::string& prompt, bool noise) {
  const auto answer = [](const std::string& prefix, const std::string& text) {
    return nlohmann::json{{"prefix", prefix}, {"text", text}}.dump();
  };
  if (noise) {  // "?2KKp:" after lines "KK:1234"
    const std::string question = prompt.substr(prompt.rfind('?') + 1);
    const std::string key = question.substr(1, 2), prefix = question.substr(3, 1);
    int left = question[0] - '0';
    for (const std::string& line : lines_of(prompt))
      if (line.starts_with(key + ":") && --left == 0) return answer(prefix, line.substr(3));
    return "";
  }
  std::string which = between(prompt, "Say again the ", " that you wrote");
  const std::string prefix = between(prompt, "counting from 1, with ", " and a blank");
  int left = std::stoi(which);
  which = which.substr(which.find(' ') + 1);
  const std::vector<std::string> lines = lines_of(prompt);
  for (size_t i = 0; i + 1 < lines.size(); ++i)
    if (lines[i] == "User: Write a " + which + "." && --left == 0)
      return answer(prefix, lines[i + 1].substr(11));
  return "";
}

// A task's answer, in an order of its own where it is a list.
inline std::string unordered_answer(const nlohmann::json& config, const std::string& answer) {
  return config["kind"] == "mrcr" ? answer : sorted(answer);
}

// The answer that a prompt asks for.
inline std::string found_answer(const nlohmann::json& config, const std::string& prompt) {
  const bool noise = config.value("style", "") == "noise";
  const std::string kind = config["kind"];
  const size_t key_length = config.value("key_length", 2);
  if (kind == "needle") return ask(noise ? noisy(prompt, key_length) : needles(prompt));
  if (kind == "mrcr") return mrcr(prompt, noise);
  if (kind == "variable_tracking") {
    Needles n;
    if (noise) {
      n = noisy(prompt, key_length);
      return follow(n, n.asked[0]);
    }
    for (const std::string& line : lines_of(prompt)) {
      if (!line.starts_with("VAR ")) continue;
      const std::vector<std::string> sides = split(line.substr(4), " = ");
      n.pairs.emplace_back(sides[0], sides[1].starts_with("VAR ") ? sides[1].substr(4) : sides[1]);
    }
    return follow(n, between(prompt, "hold the value ", "?"));
  }
  // What stands between the introduction and the question.
  const size_t asked = kind == "common_words" ? config.value("common", 10) : config.value("asked", 3);
  if (noise) return most_frequent(prompt, asked);
  const size_t begin = prompt.find("\n\n");
  return most_frequent(prompt.substr(begin, prompt.rfind("\n\n") - begin), asked);
}

inline std::string solve(const nlohmann::json& config, const std::string& prompt) {
  return unordered_answer(config, found_answer(config, prompt));
}

}  // namespace perigee::rollout
