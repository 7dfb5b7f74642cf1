// What a fuzz target gives to the driver.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

// Takes any bytes; aborts when what has to hold does not.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

std::vector<std::string> fuzz_seeds();  // well formed inputs
std::vector<std::string> fuzz_words();  // what inputs are made of
