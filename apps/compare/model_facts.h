// How large a model is: what has to be equal before its speed and its accuracy say something about its mixers.
#pragma once
#include <nlohmann/json.hpp>

#include <cstdint>
#include <string>

#include "policy/model/config.h"

namespace perigee::apps::compare {

struct ModelFacts {
  int64_t parameters = 0;
  // Of one token of a forward pass, a multiplication and an addition counted as two; experts as far as they are chosen.
  double matrix_operations = 0;  // every matrix that the token is multiplied by, the head included
  // What the mixers do beside their matrices: recurrences (docs/compare.md counts them), and scores and sums of attention
  // over `context` tokens, keys and values of MLA expanded.
  double mixer_operations = 0;
  int64_t context = 0;
  double operations() const { return matrix_operations + mixer_operations; }

  double cache_bytes_per_token = 0;  // what each token adds
  int64_t state_bytes = 0;           // of a sequence, whatever its length
  std::string mixers;                // "3 kda, 1 mla"

  nlohmann::json to_json() const;
};

// Caches are counted as they lie on the CPU, in float32.
ModelFacts model_facts(const policy::ModelConfig& config, int64_t context);

}  // namespace perigee::apps::compare
