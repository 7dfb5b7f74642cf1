#include "apps/runs/run_tokenizer.h"

#include <filesystem>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "policy/model/config.h"
#include "rollout/run/run.h"
#include "rollout/setup/run_model.h"

namespace perigee::apps {

std::unique_ptr<policy::Tokenizer> tokenizer_of(const RunPlace& place, StoreQueries& store) {
  const nlohmann::json record = nlohmann::json::parse(store.run(place.id).config, nullptr, false);
  if (record.is_object() && record.value("kind", "") == "session") {
    const std::string model = record.value("model", "");
    if (model.empty())
      throw_input("{}: its sessions do not say which model made them, so their tokens have no text",
                  place.directory.string());
    return policy::load_tokenizer(model, policy::load_model_config(model));
  }
  // A store that was copied or merged stands in a directory without the run's configuration, and holds it too.
  const bool alone = !std::filesystem::exists(place.directory / kConfigFile) && record.is_object();
  const rollout::RunConfig config = alone ? rollout::parse_run_config(record, place.name().string())
                                          : rollout::run_config_of(place.directory.string());
  return rollout::make_tokenizer(config, rollout::make_layout(config)->config());
}

}  // namespace perigee::apps
