// perigee score: the log-probability of every token of a text, as JSON.
#include <fmt/format.h>

#include <cmath>
#include <iostream>
#include <iterator>

#include "apps/command_line/commands.h"
#include "apps/model/model_files.h"
#include "apps/output/output.h"
#include "base/error.h"
#include "base/file.h"
#include "kernels/context.h"

namespace perigee::apps {
namespace {

struct Options {
  std::string model;
  OpenModel::Options open;
  std::optional<std::string> text;
  std::string file, ids;
  bool no_bos = false, special = false;
  double temperature = 1;
  int64_t threads = 0;
};

std::vector<int32_t> tokens_of(const Options& o, const OpenModel& model) {
  const int given = (o.text ? 1 : 0) + (o.file.empty() ? 0 : 1) + (o.ids.empty() ? 0 : 1);
  if (given != 1) throw_input("score: give one of --text, --file and --ids");
  if (!o.ids.empty()) return parse_ids(o.ids, model.config().vocab_size);
  std::string text;
  if (o.text) {
    text = *o.text;
  } else if (o.file == "-") {
    text.assign(std::istreambuf_iterator<char>(std::cin), {});
  } else {
    text = read_file(o.file);
  }
  std::vector<int32_t> ids;
  if (!o.no_bos) ids.push_back(model.config().bos_id);
  const std::vector<int32_t> plain = model.tokenizer().encode(text, o.special);
  ids.insert(ids.end(), plain.begin(), plain.end());
  return ids;
}

}  // namespace

void add_score(Program& program) {
  auto o = std::make_shared<Options>();
  Command command =
      program.command("score", "Log-probabilities of a text or of token ids, as JSON", kGroupModel);
  command.option("--model", o->model, "DIRECTORY", "config.json and safetensors")
      .required("--model")
      .option("--text", o->text, "TEXT", "score this text")
      .option("--file", o->file, "FILE", "score what is in this file; - is standard input")
      .option("--ids", o->ids, "IDS", "score these token ids: 1,2,3")
      .flag("--no-bos", o->no_bos, "do not put the model's begin token before a text")
      .flag("--special", o->special,
            "names of special tokens in the text, such as <|im_end|>, mean those tokens")
      .option("--temperature", o->temperature, "X", "log-probabilities at this temperature");
  declare_place(command, o->open);
  command.option("--threads", o->threads, "N", "0: one per processor")
      .example("score --model models/tiny --text '12+30='")
      .example("score --model models/tiny --ids 256,49,50,43");
  command.action([o] {
    if (!(o->temperature > 0)) throw_input("--temperature {}: above 0 is expected", o->temperature);
    if (o->threads < 0 || o->threads > 4096) throw_input("--threads {}: 0 to 4096 is expected", o->threads);
    const OpenModel model(o->model, o->open);
    const std::vector<int32_t> given = tokens_of(*o, model);
    if (given.empty()) throw_input("score: nothing to score: no token was given");
    if (static_cast<int64_t>(given.size()) > model.config().max_length)
      throw_input("score: {} tokens, and the model's model_max_length is {}", given.size(), model.config().max_length);

    kernels::Context ctx(static_cast<int>(o->threads));
    const std::vector<float> logprobs = model.score(ctx, given, static_cast<float>(o->temperature));
    nlohmann::json tokens = nlohmann::json::array();
    double sum = 0;
    for (size_t i = 0; i < logprobs.size(); ++i) {
      nlohmann::json token = {{"id", given[i]},
                              {"text", model.tokenizer().token(given[i])}};
      token["logprob"] =
          i == 0 ? nlohmann::json() : nlohmann::json(logprobs[i]);  // nothing predicts the first
      tokens.push_back(std::move(token));
      sum += logprobs[i];
    }
    const size_t predicted = logprobs.size() - 1;
    nlohmann::json out = {
        {"tokens", std::move(tokens)}, {"logprob", sum}, {"predicted", predicted}, {"perplexity", nullptr}};
    if (predicted > 0) out["perplexity"] = std::exp(-sum / static_cast<double>(predicted));
    print_json(out);
    return 0;
  });
}

}  // namespace perigee::apps
