// What another process of a run sends, and what lies in its store. The first byte says which message; then its header as
// JSON up to the first line break, and its frames, a line each. What is taken is written and read again as it is.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string_view>

#include "base/blob.h"
#include "base/hash.h"
#include "rollout/wire/protocol.h"
#include "tests/fuzz/target.h"

namespace {

using namespace perigee;
using namespace perigee::rollout;

void require(bool holds) {
  if (!holds) std::abort();
}

// encoded: what a second process would get. Numbers that are none stay what they are, and equal nothing: bytes are compared.
template <class Decode, class Encode>
void there_and_back(const BusMessage& message, Decode decode, Encode encode_it) {
  const auto first = decode(message);
  if (!first) return;
  const BusMessage once = encode_it(*first);
  const auto second = decode(once);
  require(second.has_value());
  const BusMessage twice = encode_it(*second);
  require(Json::to_cbor(once.header) == Json::to_cbor(twice.header) && once.frames == twice.frames);
}

void read_blob(std::string_view bytes) {
  const std::span blob(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size());
  const BlobStatus status = check_blob(blob);
  std::vector<uint32_t> wide{7};
  std::vector<uint8_t> narrow{7};
  for (const BlobStatus decoded : {decode_blob(blob, wide), decode_blob(blob, narrow)})
    require(decoded != BlobStatus::kOk || status == BlobStatus::kOk);
  // Whoever can write the checksum too.
  std::vector<uint8_t> sealed(blob.begin(), blob.end());
  if (sealed.size() < kBlobHeaderBytes) return;
  uint64_t seed = 0;
  std::memcpy(&seed, sealed.data(), 8);
  const uint64_t sum =
      XXH3_64bits_withSeed(sealed.data() + kBlobHeaderBytes, sealed.size() - kBlobHeaderBytes, seed);
  std::memcpy(sealed.data() + 8, &sum, 8);
  require(check_blob(sealed) != BlobStatus::kChecksum);
  for (const BlobStatus decoded : {decode_blob(std::span<const uint8_t>(sealed), wide),
                                   decode_blob(std::span<const uint8_t>(sealed), narrow)})
    require(decoded != BlobStatus::kChecksum);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  std::string_view rest(reinterpret_cast<const char*>(data) + 1, size - 1);
  if (data[0] % 9 == 8) {
    read_blob(rest);
    return 0;
  }
  const auto line = [&] {
    const size_t end = std::min(rest.find('\n'), rest.size());
    const std::string_view out = rest.substr(0, end);
    rest.remove_prefix(std::min(end + 1, rest.size()));
    return out;
  };
  BusMessage m;
  m.header = Json::parse(line(), nullptr, false);
  if (!m.header.is_object()) return 0;
  while (!rest.empty()) m.frames.emplace_back(line());
  const auto as = [](const auto& what) { return encode(what); };
  switch (data[0] % 9) {
    case 0:
      there_and_back(m, decode_lease, as);
      break;
    case 1:
      there_and_back(m, decode_segment, as);
      break;
    case 2:
      there_and_back(m, decode_score, as);
      break;
    case 3:
      there_and_back(m, decode_scored, as);
      break;
    case 4:
      there_and_back(m, decode_train, as);
      break;
    case 5:
      there_and_back(m, decode_weights, [](const WeightsNotice& n) { return encode("weights", n); });
      break;
    case 6:
      there_and_back(m, decode_stepped, as);
      break;
    default: {
      const auto params = sampling_from_json(m.header, 0.5f);
      if (!params) break;
      const auto again = sampling_from_json(sampling_to_json(*params), 0.5f);
      require(again.has_value() && sampling_to_json(*again) == sampling_to_json(*params));
    }
  }
  return 0;
}

std::vector<std::string> fuzz_seeds() {
  std::string blob;
  for (const auto& b :
       {encode_blob(std::vector<uint32_t>(300, 5)), encode_blob(std::vector<uint8_t>{1, 2, 3})})
    blob = std::string(b.begin(), b.end());
  const auto small = encode_blob(std::vector<uint32_t>(300, 5));
  return {
      std::string(1, '\0') +
          R"({"group":3,"version":1,"max_new_tokens":9,"temperature":0.5,"sampling":{"top_k":4},"task_index":7,"held_out":false,"members":[{"episode":1,"attempt":1,"seed":5,"index":0},{"episode":2,"attempt":2,"seed":6,"index":1}]})"
          "\naaaabbbb\n\n\nccccdddd\nef\n",
      "\1"
      R"({"episode":4,"attempt":1,"index":0,"finish":"stop","tools":[{"turn":0,"started_us":5,"duration_us":6,"status":"ok","digest":"d"}]})"
      "\naaaabbbb\nccccdddd\neeeeffff\ngh\nname\n{}\nout\n",
      "\2"
      R"({"group":3,"task":{"prompt":"p","answer":"4"},"max_new_tokens":9,"members":[{"episode":1,"finish":"length"}]})"
      "\naaaa\nb\n",
      "\3"
      R"({"group":3,"rewards":[{"episode":1,"total":0.5,"failed":false,"correct":true,"components":[{"name":"n","value":1,"weight":0.5,"status":"ok","detail":"d"}]}]})",
      "\4"
      R"({"step":1,"before":0,"after":1,"publish":true,"sequences":[{"n":1,"temperature":1,"advantage":-0.5},{"n":1,"temperature":1,"advantage":2}]})"
      "\naaaabbbb\ncd\neeeeffff\n",
      "\5"
      R"({"version":4,"shm":"/x","hash":"00","bytes":64})",
      "\6"
      R"({"phase":"learn","step":2,"version":3,"hash":"h","metrics":[["loss",0.25],["lr",1e-3]]})",
      "\7"
      R"({"top_k":4,"top_p":0.9,"min_p":0.1,"repetition_penalty":1.5,"presence_penalty":-1,"frequency_penalty":2,"logit_bias":{"257":-5,"12":"-inf"}})",
      "\x08" + blob,
      "\x08" + std::string(small.begin(), small.end())};
}

std::vector<std::string> fuzz_words() {
  return {"{",
          "}",
          "[",
          "]",
          ",",
          ":",
          "\"",
          "\n",
          "\naaaa",
          "aaaa",
          "null",
          "true",
          "false",
          "-1",
          "0",
          "1",
          "1e999",
          "1e300",
          "1e39",
          "-0.0",
          "2147483648",
          "4294967296",
          "9223372036854775807",
          "9223372036854775808",
          "18446744073709551615",
          "-9223372036854775808",
          "{}",
          "[]",
          "\"n\":",
          "\"members\":",
          "\"tools\":",
          "\"episode\":",
          "\"attempt\":",
          "\"index\":",
          "\"finish\":",
          "\"stop\"",
          "\"none\"",
          "\"sampling\":",
          "\"top_k\":",
          "\"logit_bias\":",
          "\"-inf\"",
          "\"007\"",
          "\"rewards\":",
          "\"components\":",
          "\"sequences\":",
          "\"metrics\":",
          "\"bytes\":",
          "\xff",
          std::string(1, '\0'),
          std::string(4, '\xff')};
}
