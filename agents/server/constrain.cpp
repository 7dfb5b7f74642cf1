// Tools and formats of a request as a constraint on its tokens.
#include <fmt/format.h>

#include <algorithm>
#include <limits>

#include "agents/server/reply.h"
#include "base/error.h"
#include "policy/grammar/grammar.h"

namespace perigee::agents {
namespace {

// What one of two grammars allows: an answer of a form, or calls of tools. The first token that only one of them takes
// decides.
class Either : public policy::TokenConstraint {
 public:
  Either(std::unique_ptr<policy::TokenConstraint> a, std::unique_ptr<policy::TokenConstraint> b)
      : a_(std::move(a)), b_(std::move(b)) {}
  std::span<const uint32_t> allowed() override {
    if (!a_) return b_->allowed();
    if (!b_) return a_->allowed();
    const auto x = a_->allowed(), y = b_->allowed();
    both_.resize(x.size());
    for (size_t i = 0; i < x.size(); ++i) both_[i] = x[i] | y[i];
    return both_;
  }
  void accept(int32_t token) override {
    // Both were asked by allowed() at this place.
    if (a_ && b_) {
      const bool in_a = policy::allows(a_->allowed(), token), in_b = policy::allows(b_->allowed(), token);
      PERIGEE_CHECK(in_a || in_b);
      if (!in_a) a_.reset();
      if (!in_b) b_.reset();
    }
    if (a_) a_->accept(token);
    if (b_) b_->accept(token);
  }
  std::unique_ptr<policy::TokenConstraint> clone() const override {
    return std::make_unique<Either>(a_ ? a_->clone() : nullptr, b_ ? b_->clone() : nullptr);
  }

 private:
  std::unique_ptr<policy::TokenConstraint> a_, b_;
  std::vector<uint32_t> both_;
};

}  // namespace

void constrain(const Service& service, const ToolUse& tools, const Format& format, const Drawing& drawing,
               int64_t first_call, HostRequest& request) {
  using Kind = ToolChoice::Kind;
  const bool calls = tools.choice.kind != Kind::kNone, must_call = calls && tools.choice.kind != Kind::kAuto;
  const bool formed = format.kind != Format::Kind::kText && !must_call;
  if (!calls) {
    // A model may begin a section of calls out of habit: it cannot here.
    const int32_t section = service.tokenizer().special(policy::special::kToolSectionBegin);
    auto& bias = request.sampling.logit_bias;
    std::erase_if(bias, [&](const auto& b) { return b.first == section; });
    bias.emplace_back(section, -std::numeric_limits<float>::infinity());
    if (!formed) return;
  }
  if (drawing.ignore_eos)
    refuse("ignore_eos",
           "ignore_eos does not go with tools or a response_format: they end where they are complete");
  if ((formed || must_call) && drawing.min_tokens > 0)
    refuse("min_tokens",
           "min_tokens does not go with a response_format or a required tool call: they end where they are "
           "complete");

  policy::ConstraintOptions options;
  options.end_tokens = service.end_tokens();
  options.max_tokens = request.max_new_tokens;
  std::unique_ptr<policy::GrammarConstraint> shape, call;
  const auto compile = [](const std::string& param, const auto& f) {
    try {
      return f();
    } catch (const Error& e) {
      throw ApiError(400, e.what(), param, "invalid_schema");
    }
  };
  if (formed)
    shape = compile("response_format", [&] {
      options.where = "response_format";
      return format.kind == Format::Kind::kObject
                 ? policy::json_object_constraint(service.index(), options)
                 : policy::json_schema_constraint(service.index(), format.schema, options);
    });
  if (calls)
    call = compile("tools", [&] {
      policy::ToolCallOptions o;
      for (const ToolSpec& t : tools.tools)
        if (tools.choice.kind != Kind::kNamed || t.name == tools.choice.name)
          o.tools.push_back({t.name, t.parameters});
      o.choice = must_call || formed ? policy::ToolChoice::kRequired : policy::ToolChoice::kAuto;
      o.parallel = tools.parallel && tools.choice.kind != Kind::kNamed;
      o.first_index = first_call;
      options.where = "tools";
      return policy::tool_call_constraint(service.index(), o, options);
    });
  for (const auto* c : {shape.get(), call.get()})
    if (c != nullptr && c->min_tokens_to_finish() > request.max_new_tokens)
      throw ApiError(400,
                     fmt::format("{} tokens cannot complete what the request asks for: that takes up to {}",
                                 request.max_new_tokens, c->min_tokens_to_finish()),
                     "max_tokens", "max_tokens_too_small");
  if (shape && call)
    request.constraint = std::make_unique<Either>(std::move(shape), std::move(call));
  else if (shape)
    request.constraint = std::move(shape);
  else
    request.constraint = std::move(call);
}

}  // namespace perigee::agents
