#include "policy/model/adapter_products.h"

#include <vector>

#include "policy/model/adapter.h"

namespace perigee::policy {
namespace {

using namespace kernels;

Weight matrix(const Weights& w, int i) {
  const ParamSpec& t = w.adapter->tensor(i);
  return {w.adapter_data + t.byte_offset, w.adapter->dtype(), t.n, t.k};
}

void scale_rows(Context& ctx, int64_t n, float factor, float* x) {
  ctx.parallel_for(n, 16384, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) x[i] *= factor;
  });
}

// Calls use(product, adapter's number, adapter) for all adapters of the products' tensors.
template <class Products, class Use>
void each(const Pass& pass, const Products& products, Use&& use) {
  if (!pass.frozen()) return;
  for (const auto& p : products)
    for (const AdapterLayout::Part& part : pass.weights.adapter->parts(p.tensor))
      if (part.adapter >= 0) use(p, part.adapter, pass.weights.adapter->adapter(part.adapter));
}

}  // namespace

void multiply(const Pass& pass, std::span<const Product> products, LowRows<float>& low) {
  if (products.empty()) return;
  std::vector<MatmulTask> tasks;
  for (const Product& p : products)
    tasks.push_back({pass.weights.matrix(p.tensor), p.x, p.ldx, pass.rows, p.y, p.ldy});
  matmul(pass.ctx, tasks);
  add_adapters(pass, products, low);
}

void multiply_backward(const Pass& pass, std::span<const ProductGrad> products, const LowRows<float>& low, float* gradient) {
  if (!pass.frozen() && !products.empty()) {
    std::vector<MatmulGradWeightTask> weights;
    for (const ProductGrad& p : products) {
      const ParamSpec& t = pass.layout().tensor(p.tensor);
      weights.push_back({p.dy, p.lddy, p.x, p.ldx, pass.rows, gradient + t.element_offset, t.n, t.k});
    }
    matmul_grad_weight(pass.ctx, weights);
  }
  // Those that end in memory of their own go together, the others one after the other.
  std::vector<MatmulGradInputTask> together;
  for (size_t begin = 0, end = 0; begin < products.size(); begin = end) {
    together.clear();
    for (; end < products.size() && (together.empty() || products[end].dx != together.back().dx); ++end) {
      const ProductGrad& p = products[end];
      const bool more = end > 0 && products[end - 1].dx == p.dx;
      together.push_back({pass.weights.matrix(p.tensor), p.dy, p.lddy, pass.rows, p.dx, p.lddx, more});
    }
    matmul_grad_input(pass.ctx, together);
    adapters_backward(pass, products.subspan(begin, end - begin), low, gradient);
  }
}

void add_adapters(const Pass& pass, std::span<const Product> products, LowRows<float>& low) {
  std::vector<MatmulTask> down, up;
  const int64_t rows = pass.rows;
  each(pass, products, [&](const Product& p, int i, const AdapterLayout::Adapter& a) {
    const int64_t rank = pass.weights.adapter->config().rank;
    float* rows_of_it = pass.take(rank);
    low.add(i, rows_of_it);
    down.push_back({matrix(pass.weights, a.a), p.x, p.ldx, rows, rows_of_it, rank});
    up.push_back({matrix(pass.weights, a.b), rows_of_it, rank, rows, p.y + a.row, p.ldy, true});
  });
  if (down.empty()) return;
  matmul(pass.ctx, down);
  for (const MatmulTask& t : down) scale_rows(pass.ctx, rows * t.w.n, pass.weights.adapter->scale(), t.y);
  matmul(pass.ctx, up);
}

void adapters_backward(const Pass& pass, std::span<const ProductGrad> products, const LowRows<float>& low, float* gradient) {
  Scratch::Mark mark(pass.ctx.scratch);
  std::vector<MatmulGradInputTask> up, down;
  std::vector<MatmulGradWeightTask> weights;
  const int64_t rows = pass.rows;
  each(pass, products, [&](const ProductGrad& p, int i, const AdapterLayout::Adapter& a) {
    const AdapterLayout& layout = *pass.weights.adapter;
    const int64_t rank = layout.config().rank;
    const auto grad = [&](int t) { return gradient + layout.tensor(t).element_offset; };
    float* dlow = pass.take(rank);
    up.push_back({matrix(pass.weights, a.b), p.dy + a.row, p.lddy, rows, dlow, rank, false});
    down.push_back({matrix(pass.weights, a.a), dlow, rank, rows, p.dx, p.lddx, true});
    weights.push_back({p.dy + a.row, p.lddy, low.of(i), rank, rows, grad(a.b), a.n, rank});
    weights.push_back({dlow, rank, p.x, p.ldx, rows, grad(a.a), rank, a.k});
  });
  if (up.empty()) return;
  matmul_grad_input(pass.ctx, up);
  for (const MatmulGradInputTask& t : up)
    scale_rows(pass.ctx, rows * t.lddx, pass.weights.adapter->scale(), t.dx);
  matmul_grad_weight(pass.ctx, weights);
  // They may end in the same dx: one after the other.
  for (const MatmulGradInputTask& t : down) matmul_grad_input(pass.ctx, {&t, 1});
}

namespace {

// The adapter of part `part` of expert e's tensor, or null.
const AdapterLayout::Adapter* expert_adapter(const Pass& pass, int first, size_t part, int64_t e) {
  const AdapterLayout& layout = *pass.weights.adapter;
  const auto parts = layout.parts(first + static_cast<int>(e));
  if (part >= parts.size() || parts[part].adapter < 0) return nullptr;
  return &layout.adapter(parts[part].adapter);
}

// Calls use(adapter, first slot, slots) for every expert that got tokens.
template <class Use>
void each_expert(const Pass& pass, int first, size_t part, const int64_t* offsets, Use&& use) {
  for (int64_t e = 0; e < pass.config.num_experts; ++e)
    if (const int64_t n = offsets[e + 1] - offsets[e]; n > 0) use(*expert_adapter(pass, first, part, e), offsets[e], n);
}

}  // namespace

void add_expert_adapters(const Pass& pass, int first, const int64_t* offsets, const float* x, int64_t k, float* y, int64_t ldy,
                         ExpertLow<float>& low) {
  low = {};
  if (!pass.frozen()) return;
  const int64_t slots = offsets[pass.config.num_experts], rank = pass.weights.adapter->config().rank;
  for (size_t part = 0; part < low.size(); ++part) {
    if (expert_adapter(pass, first, part, 0) == nullptr) continue;
    low[part] = pass.ctx.scratch.take<float>(slots * rank);
    std::vector<MatmulTask> down, up;
    each_expert(pass, first, part, offsets, [&](const AdapterLayout::Adapter& a, int64_t at, int64_t n) {
      float* const rows = low[part] + at * rank;
      down.push_back({matrix(pass.weights, a.a), x + at * k, k, n, rows, rank});
      up.push_back({matrix(pass.weights, a.b), rows, rank, n, y + at * ldy + a.row, ldy, true});
    });
    matmul(pass.ctx, down);
    scale_rows(pass.ctx, slots * rank, pass.weights.adapter->scale(), low[part]);
    matmul(pass.ctx, up);
  }
}

void expert_adapters_backward(const Pass& pass, int first, const int64_t* offsets, const float* dy, int64_t lddy,
                              const float* x, int64_t k, float* dx, const ExpertLow<float>& low, float* gradient) {
  if (!pass.frozen()) return;
  Scratch::Mark mark(pass.ctx.scratch);
  const AdapterLayout& layout = *pass.weights.adapter;
  const int64_t slots = offsets[pass.config.num_experts], rank = layout.config().rank;
  const auto grad = [&](int t) { return gradient + layout.tensor(t).element_offset; };
  for (size_t part = 0; part < low.size(); ++part) {
    if (low[part] == nullptr) continue;
    float* const dlow = pass.ctx.scratch.take<float>(slots * rank);
    std::vector<MatmulGradInputTask> up, down;
    std::vector<MatmulGradWeightTask> weights;
    each_expert(pass, first, part, offsets, [&](const AdapterLayout::Adapter& a, int64_t at, int64_t n) {
      const float* const dy_rows = dy + at * lddy + a.row;
      float* const dlow_rows = dlow + at * rank;
      up.push_back({matrix(pass.weights, a.b), dy_rows, lddy, n, dlow_rows, rank, false});
      down.push_back({matrix(pass.weights, a.a), dlow_rows, rank, n, dx + at * k, k, true});
      weights.push_back({dy_rows, lddy, low[part] + at * rank, rank, n, grad(a.b), a.n, rank});
      weights.push_back({dlow_rows, rank, x + at * k, k, n, grad(a.a), rank, k});
    });
    matmul_grad_input(pass.ctx, up);
    scale_rows(pass.ctx, slots * rank, layout.scale(), dlow);
    matmul_grad_weight(pass.ctx, weights);
    matmul_grad_input(pass.ctx, down);
  }
}

}  // namespace perigee::policy
