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
#include "policy/learn/trainer.h"

namespace perigee::apps {
namespace {

struct Options {
  std::string model, dtype = "auto";
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
      .option("--temperature", o->temperature, "X", "log-probabilities at this temperature")
      .option("--dtype", o->dtype, "NAME",
              "compute with float32 or bfloat16 weights; auto: as in the checkpoint")
      .option("--threads", o->threads, "N", "0: one per processor")
      .example("score --model models/tiny --text '12+30='")
      .example("score --model models/tiny --ids 256,49,50,43");
  command.action([o] {
    if (!(o->temperature > 0)) throw_input("--temperature {}: above 0 is expected", o->temperature);
    if (o->threads < 0 || o->threads > 4096) throw_input("--threads {}: 0 to 4096 is expected", o->threads);
    const OpenModel model(o->model, o->dtype);
    policy::TrainSequence sequence;
    sequence.tokens = tokens_of(*o, model);
    if (sequence.tokens.empty()) throw_input("score: nothing to score: no token was given");
    if (static_cast<int64_t>(sequence.tokens.size()) > model.config().max_length)
      throw_input("score: {} tokens, and the model's model_max_length is {}", sequence.tokens.size(),
                  model.config().max_length);
    sequence.mask.assign(sequence.tokens.size(), 1.0f);
    sequence.mask[0] = 0;
    sequence.mu.assign(sequence.tokens.size(), 0.0f);
    sequence.temperature = static_cast<float>(o->temperature);

    kernels::Context ctx(static_cast<int>(o->threads));
    const std::vector<float> logprobs = model.trainer(ctx)->logprobs(model.arena(), {sequence});
    nlohmann::json tokens = nlohmann::json::array();
    double sum = 0;
    for (size_t i = 0; i < logprobs.size(); ++i) {
      nlohmann::json token = {{"id", sequence.tokens[i]},
                              {"text", model.tokenizer().token(sequence.tokens[i])}};
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
