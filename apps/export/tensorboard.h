// Event files of TensorBoard: records of protobuf messages, each framed with its length and checksums.
//   file   = record*           the first holds file_version "brain.Event:2"
//   record = length:u64 mask(crc32c(length)):u32 event:bytes[length] mask(crc32c(event)):u32      little-endian
//   event  = 1: wall_time double, 2: step varint, 3: file_version text | 5: summary { 1: value { 1: tag text, 2: float } }
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "storage/store.h"

namespace perigee::apps {

// Castagnoli, as in RFC 3720.
uint32_t crc32c(std::string_view bytes);

std::string tensorboard_header(double wall_time);
// One number as a record. TensorBoard keeps them as float32.
std::string tensorboard_scalar(double wall_time, int64_t step, std::string_view tag, double value);

// A run's file: every metric of every step as PHASE/NAME and each evaluation as eval/SET, at the times when the steps' weights
// were recorded.
std::string tensorboard_events(StoreQueries& store, const std::string& run_id);

}  // namespace perigee::apps
