// The tokenizer of what a store holds.
#pragma once
#include <memory>

#include "apps/command_line/run_argument.h"
#include "policy/tokenizer/tokenizer.h"
#include "storage/store.h"

namespace perigee::apps {

// Of a training run, by its configuration; of hosted sessions (apps/serve/session_store.h), by the model that their run names.
// ERRORS (input): of run_config_of and of the model's files; sessions of a program that did not name the model.
std::unique_ptr<policy::Tokenizer> tokenizer_of(const RunPlace& place, StoreQueries& store);

}  // namespace perigee::apps
