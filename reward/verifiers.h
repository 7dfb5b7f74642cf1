// The verifiers and their options. Common to exact, numeric, regex, countdown and positions:
//   "section"  "auto" (default): what follows the last </think> when there is one, else the whole response;
//              "response": the whole; "answer": between the last <answer> and the </answer> after it, no
//              answer without them
//   "think_close", "answer_open", "answer_close"   the tags
//   "accept_truncated" (false; of recall true)  when false, a response cut off at the token limit scores 0
//
//   exact       1 when the section equals the answer, both trimmed. "ignore_case" (false),
//               "collapse_whitespace" (true)
//   numeric     1 when the section's number equals the answer's. Integers, decimals, 1e3, 1,234, fractions
//               (1/2, \frac{1}{2}) and percent compare as exact rationals. "take": "auto" (the last
//               \boxed{...} when there is one, else the last number), "boxed", "last", "whole"; "tolerance"
//               (0, absolute), "relative_tolerance" (0)
//   regex       1 when RE2 "pattern" is found. "full" (false): must match all; "group" (-1): this capture
//               must equal the answer
//   countdown   answer "24 from 3 5 8": 1 when the section is an expression of that value that uses each
//               number at most once, "use_all" (false): exactly once; "partial" (0): for a lawful expression
//               of another value
//   positions   the share of places that hold the answer's byte, of as many places as the longer of section and answer has
//   code        1 when the function in the response (its last ``` block, or all of it) gives the results of all hidden
//               tests, in a sandbox. The answer is {"function": NAME, "tests": [{"arguments": [...], "result": ...}]}.
//               "wall_s" (5) of all tests together, "memory_mib" (256), "partial" (false): below 1 by the share that
//               passes, at most 0.99
//   format      1 when the response is a thinking block and then an answer. "think_open", "think_close",
//               "opened_by_prompt" (false: the prompt does not already end with think_open), "answer_open",
//               "answer_close" ("": no answer block)
//   length      DAPO: 0 up to limit - cache tokens, down to -1 at limit and beyond. "limit" (0: the sample's
//               max_tokens), "cache"
//   length_k15  Kimi k1.5: l = 0.5 - (tokens - shortest)/(longest - shortest) in the group; l when correct,
//               min(0, l) when not
//   repetition  - share of repeated n-grams. "n" (4), "unit": "word" (default) or "byte"
//   token_share share of the sampled tokens, by id, that are in "ids" [...], or equal "residue" (0) modulo "modulus"
//   recall      the answer is "A, B, C": the share of these strings that stand in the section as words of their own, of at
//               least as many as it names, so that naming everything is worth little: its numbers of more than half the
//               length when every string holds a digit, else its words beyond one for each and "spare_words" (16; -1: any
//               number of words, as RULER counts). "ignore_case" (true); "strict" (false): of all its words none is spare
//   match       the answer is {"prefix": P, "text": T}: 0 unless the section begins with P; 1 when T follows; else how
//               alike T and what follows are, 2 * matched / (letters of both) by Ratcliff and Obershelp
//   task        the verifier that the task names, with default options. "default" ("exact"): when it names
//               none
#pragma once
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/json.h"
#include "reward/verifier.h"

namespace perigee::reward {

// In the order of the list above.
const std::vector<std::string>& verifier_names();
// Those that a task may name: they need an answer and no options.
const std::vector<std::string>& task_verifier_names();
// Reads the verifier's options; the caller finishes the reader. ERRORS (input): an unknown name with the
// nearest suggestion.
std::unique_ptr<Verifier> make_verifier(const std::string& name, JsonReader& options);

std::unique_ptr<Verifier> make_exact(JsonReader& options);
std::unique_ptr<Verifier> make_numeric(JsonReader& options);
std::unique_ptr<Verifier> make_regex(JsonReader& options);
std::unique_ptr<Verifier> make_countdown(JsonReader& options);
std::unique_ptr<Verifier> make_positions(JsonReader& options);
std::unique_ptr<Verifier> make_code(JsonReader& options);
std::unique_ptr<Verifier> make_format(JsonReader& options);
std::unique_ptr<Verifier> make_length(JsonReader& options);
std::unique_ptr<Verifier> make_length_k15(JsonReader& options);
std::unique_ptr<Verifier> make_repetition(JsonReader& options);
std::unique_ptr<Verifier> make_token_share(JsonReader& options);
std::unique_ptr<Verifier> make_recall(JsonReader& options);
std::unique_ptr<Verifier> make_match(JsonReader& options);
std::unique_ptr<Verifier> make_task(JsonReader& options);

}  // namespace perigee::reward
