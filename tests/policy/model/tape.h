// Numbers that remember how they were made: reverse mode over any plain computation, for gradients of references.
//   Tape<double> tape;                         // the one that Var<double> of this thread writes to while it lives
//   Var<double> x = tape.leaf(2), y = x * exp(x);
//   tape.gradient(y)[x.node] == (1 + 2) e^2
#pragma once
#include <cmath>
#include <cstdint>
#include <vector>

namespace perigee::policy::reference {

template <class T>
class Tape;

template <class T>
struct Var {
  T value = 0;
  int32_t node = -1;  // -1: a constant

  Var() = default;
  explicit Var(double constant) : value(static_cast<T>(constant)) {}
  Var(T v, int32_t n) : value(v), node(n) {}
};

template <class T>
class Tape {
 public:
  Tape() : nodes_(memory()) {
    current() = this;
    nodes_.clear();
  }
  ~Tape() { current() = nullptr; }
  Tape(const Tape&) = delete;
  Tape& operator=(const Tape&) = delete;

  static Tape*& current() {
    static thread_local Tape* tape = nullptr;
    return tape;
  }
  Var<T> leaf(double value) { return add(static_cast<T>(value), -1, 0, -1, 0); }
  // value = f(a, b), with its partial derivatives.
  Var<T> add(T value, int32_t a, T da, int32_t b, T db) {
    nodes_.push_back({a, b, da, db});
    return {value, static_cast<int32_t>(nodes_.size()) - 1};
  }
  // d y / d node for every node.
  std::vector<T> gradient(const Var<T>& y) const {
    std::vector<T> d(nodes_.size(), T(0));
    d[static_cast<size_t>(y.node)] = 1;
    for (size_t i = nodes_.size(); i-- > 0;) {
      const Node& n = nodes_[i];
      if (n.a >= 0) d[static_cast<size_t>(n.a)] += d[i] * n.da;
      if (n.b >= 0) d[static_cast<size_t>(n.b)] += d[i] * n.db;
    }
    return d;
  }

 private:
  struct Node {
    int32_t a, b;
    T da, db;
  };
  // Kept from tape to tape: tens of megabytes given back and taken again cost more than what is computed in them.
  static std::vector<Node>& memory() {
    static thread_local std::vector<Node> nodes;
    return nodes;
  }
  std::vector<Node>& nodes_;
};

template <class T>
Var<T> record(T value, const Var<T>& a, T da, const Var<T>& b = Var<T>(), T db = 0) {
  if (a.node < 0 && b.node < 0) return {value, -1};
  return Tape<T>::current()->add(value, a.node, da, b.node, db);
}

template <class T>
double plain(const Var<T>& x) {
  return x.value;
}
template <class T>
Var<T> operator+(const Var<T>& a, const Var<T>& b) {
  return record(a.value + b.value, a, T(1), b, T(1));
}
template <class T>
Var<T> operator-(const Var<T>& a, const Var<T>& b) {
  return record(a.value - b.value, a, T(1), b, T(-1));
}
template <class T>
Var<T> operator*(const Var<T>& a, const Var<T>& b) {
  return record(a.value * b.value, a, b.value, b, a.value);
}
template <class T>
Var<T> operator/(const Var<T>& a, const Var<T>& b) {
  return record(a.value / b.value, a, 1 / b.value, b, -a.value / (b.value * b.value));
}
template <class T>
Var<T> exp(const Var<T>& a) {
  const T e = std::exp(a.value);
  return record(e, a, e);
}
template <class T>
Var<T> log(const Var<T>& a) {
  return record(std::log(a.value), a, 1 / a.value);
}
template <class T>
Var<T> log1p(const Var<T>& a) {
  return record(std::log1p(a.value), a, 1 / (1 + a.value));
}
template <class T>
Var<T> sqrt(const Var<T>& a) {
  const T root = std::sqrt(a.value);
  return record(root, a, T(0.5) / root);
}

}  // namespace perigee::policy::reference
