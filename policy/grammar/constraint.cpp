#include "policy/grammar/constraint.h"

#include <algorithm>

#include "base/error.h"

namespace perigee::policy {

MachineConstraint::MachineConstraint(const TokenIndex& index, std::shared_ptr<CompiledGrammar> grammar,
                                     int64_t max_tokens)
    : index_(index),
      grammar_(std::move(grammar)),
      machine_(std::make_unique<Machine>(grammar_->automaton)),
      bits_(index.mask_words()) {
  state_ = machine_->start(grammar_->automaton.root);
  PERIGEE_CHECK(state_ != Machine::kDead, "a grammar of no text");
  set_remaining(max_tokens > 0 ? max_tokens : kUnlimited);
}

std::unique_ptr<TokenConstraint> MachineConstraint::clone() const {
  std::unique_ptr<MachineConstraint> out(new MachineConstraint(index_, grammar_, 0));
  out->machine_ = machine_->compact(state_, &out->state_);
  out->remaining_ = remaining_;
  return out;
}

bool MachineConstraint::complete() const {
  const auto& configs = machine_->configs(state_);
  return std::all_of(configs.begin(), configs.end(), [&](const Config& c) {
    const auto& edges = grammar_->automaton.nodes[c.node].edges;
    return std::all_of(edges.begin(), edges.end(),
                       [&](const Edge& e) { return e.to == grammar_->automaton.final; });
  });
}

void MachineConstraint::accept(int32_t token) {
  const int32_t to = after(state_, token);
  PERIGEE_CHECK(to != Machine::kDead, "token {} was not allowed", token);
  state_ = to;
  valid_ = false;
  if (remaining_ != kUnlimited) remaining_ = std::max<int64_t>(0, remaining_ - 1);
  constexpr size_t kMostStates = 1024;
  if (machine_->states() > kMostStates) machine_ = machine_->compact(state_, &state_);
}

int32_t MachineConstraint::after(int32_t state, int32_t token) {
  const auto& specials = grammar_->automaton.specials;
  for (size_t i = 0; i < specials.size(); ++i)
    if (specials[i] == token) {
      const int32_t to = machine_->step_special(state, static_cast<uint16_t>(kFirstSpecial + i));
      if (to != Machine::kDead) return to;
    }
  const std::string_view bytes = index_.bytes(token);
  if (bytes.empty()) return Machine::kDead;
  for (char c : bytes) {
    state = machine_->step(state, static_cast<uint8_t>(c));
    if (state == Machine::kDead) return state;
  }
  return state;
}

std::span<const uint32_t> MachineConstraint::allowed() {
  if (valid_) return bits_;
  // A step that leads to a state of distance d needs d more tokens at most.
  const int64_t left = remaining_ == kUnlimited ? kNever : remaining_ - 1;
  if (machine_->distance(state_) <= left) {
    put_together(left);
  } else {
    nearer();
    if (std::all_of(bits_.begin(), bits_.end(), [](uint32_t w) { return w == 0; })) put_together(kNever);
  }
  valid_ = true;
  return bits_;
}

void MachineConstraint::put_together(int64_t left) {
  std::fill(bits_.begin(), bits_.end(), 0);
  const std::vector<Config> configs = machine_->configs(state_);  // a copy: walking adds states
  for (const Config& c : configs) {
    const int64_t distance = machine_->distance(c);
    if (distance > left) continue;
    const auto mask = grammar_->masks->get(c, machine_->depth(c.frame));
    for (size_t w = 0; w < mask->bits.size(); ++w) bits_[w] |= mask->bits[w];
    for (int32_t t : mask->tokens) set(t);
    for (const auto& r : mask->rising)
      if (distance + r.by <= left) set(r.token);
    if (!mask->tail.empty()) walk_tail(*mask, c.frame, left);
  }
  put_specials(left);
  drop_second_keys(configs);
}

void MachineConstraint::walk_tail(const LocalMask& mask, int32_t frame, int64_t left) {
  const int32_t begin = machine_->after(frame);
  if (begin == Machine::kDead) return;
  path_.assign(1, begin);
  for (size_t i = 1; i < mask.tail.size();) {
    const LocalMask::TailNode& n = mask.tail[i];
    const int32_t s = machine_->step(path_[n.depth - 1u], n.byte);
    if (s == Machine::kDead) {
      i = static_cast<size_t>(n.skip);
      continue;
    }
    path_.resize(n.depth);
    path_.push_back(s);
    if (machine_->distance(s) <= left)
      for (int32_t t = n.first_token; t < n.last_token; ++t) set(mask.tail_tokens[t]);
    ++i;
  }
}

void MachineConstraint::put_specials(int64_t left) {
  const auto& automaton = grammar_->automaton;
  std::vector<uint16_t> symbols;
  for (const Config& c : machine_->configs(state_))
    for (const Edge& e : automaton.nodes[c.node].edges)
      for (uint16_t s = std::max<uint16_t>(e.low, kFirstSpecial); s <= e.high; ++s) symbols.push_back(s);
  for (uint16_t s : symbols) {
    const int32_t to = machine_->step_special(state_, s);
    if (to != Machine::kDead && machine_->distance(to) <= left)
      set(automaton.specials[static_cast<size_t>(s - kFirstSpecial)]);
  }
}

// Masks do not know which keys an object has. A token that would end a key for the second time holds its closing quote:
// after the rest of a key that is being written, or after the whole of one.
void MachineConstraint::drop_second_keys(const std::vector<Config>& configs) {
  std::vector<int32_t> sets;
  for (const Config& c : configs) machine_->open_key_sets(c.frame, sets);
  if (sets.empty()) return;
  std::sort(sets.begin(), sets.end());
  sets.erase(std::unique(sets.begin(), sets.end()), sets.end());
  std::vector<int32_t> suspects = index_.many_quotes();
  for (int32_t set : sets)
    for (int32_t key : machine_->keys(set)) {
      const auto& tokens = index_.quoting(machine_->text(key));
      suspects.insert(suspects.end(), tokens.begin(), tokens.end());
    }
  for (const Config& c : configs) {
    if (!grammar_->automaton.nodes[c.node].in_key) continue;
    const int32_t set = machine_->key_set(c.frame);
    if (set < 0) continue;
    const std::string so_far = machine_->text(c.counter);
    for (int32_t key : machine_->keys(set)) {
      const std::string text = machine_->text(key);
      if (!text.starts_with(so_far)) continue;
      const int32_t node = index_.find(text.substr(so_far.size()) + '"');
      if (node < 0) continue;
      for (int32_t i = node; i < index_.tree()[node].skip; ++i)
        for (int32_t t = index_.tree()[i].token; t >= 0; t = index_.next_same(t)) suspects.push_back(t);
    }
  }
  for (int32_t t : suspects)
    if (allows(bits_, t) && after(state_, t) == Machine::kDead) bits_[t / 32] &= ~(1u << (t % 32));
}

// Only tokens every byte of which leads nearer to the end.
void MachineConstraint::nearer() {
  std::fill(bits_.begin(), bits_.end(), 0);
  const auto& tree = index_.tree();
  path_.assign(1, state_);
  for (size_t i = 1; i < tree.size();) {
    const TokenIndex::Node& n = tree[i];
    const int32_t from = path_[n.depth - 1u], s = machine_->step(from, n.byte);
    if (s == Machine::kDead || machine_->distance(s) >= machine_->distance(from)) {
      i = static_cast<size_t>(n.skip);
      continue;
    }
    path_.resize(n.depth);
    path_.push_back(s);
    for (int32_t t = n.token; t >= 0; t = index_.next_same(t)) set(t);
    ++i;
  }
  put_specials(machine_->distance(state_) - 1);
}

}  // namespace perigee::policy
