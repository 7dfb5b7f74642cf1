// libFuzzer on the readers of request bodies (cmake -DPERIGEE_FUZZ=on with clang; target request_fuzz). The first byte says
// which endpoint. What is not taken must be an ApiError that is valid JSON; anything else ends the run.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "agents/server/request.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace perigee::agents;
  if (size == 0) return 0;
  const std::string_view body(reinterpret_cast<const char*>(data) + 1, size - 1);
  RequestLimits limits;
  limits.vocab = 320;
  limits.max_context = 4096;
  limits.default_max_tokens = 64;
  try {
    switch (data[0] % 3) {
      case 0:
        for (const ChatMessage& m : parse_chat(body, limits).messages) (void)rendered(m);
        break;
      case 1:
        parse_completion(body, limits);
        break;
      default:
        parse_body(body);
        parse_ordered(body, {"tools", "response_format"});
    }
  } catch (const ApiError& e) {
    if (e.status != 400 || !nlohmann::json::accept(e.body())) std::abort();
  }
  return 0;
}
