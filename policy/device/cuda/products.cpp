#include "policy/device/products.h"

#include "kernels/gemm/low_rank_device.h"

namespace perigee::policy::device {

using namespace kernels;

namespace {

const void* adapter_table(const Pass& pass, int i) {
  return pass.weights.adapter_data + pass.weights.adapter->tensor(i).byte_offset;
}

// Where the rows from `row` on of a matrix lie: a multiple of what its form keeps together.
template <class T>
const void* rows_from(const Pass& pass, int tensor, int64_t row) {
  const int64_t width = pass.weights.layout->tensor(tensor).k;
  const int64_t k = sizeof(T) == 2 ? tiles_across(width) * kTile : width;
  return static_cast<const std::byte*>(pass.weights.table(tensor)) + row * k * dtype_bytes(pass.weights.layout->dtype());
}

}  // namespace

template <class T>
std::vector<DeviceMatmulTask<T>> with_adapters(const Pass& pass, std::span<const Product<T>> products,
                                               LowRows<T>& low) {
  std::vector<DeviceMatmulTask<T>> tasks, down;
  const int64_t rows = pass.rows();
  for (const Product<T>& p : products) {
    auto whole = product<T>(pass, p.tensor, p.x, p.ldx, p.y, p.ldy, p.store);
    const auto parts = pass.frozen() ? pass.weights.adapter->parts(p.tensor) : std::span<const AdapterLayout::Part>();
    if (parts.empty()) {
      tasks.push_back(whole);
      continue;
    }
    const AdapterLayout& layout = *pass.weights.adapter;
    const int64_t rank = layout.config().rank;
    for (const AdapterLayout::Part& part : parts) {
      DeviceMatmulTask<T> t = whole;
      t.w = rows_from<T>(pass, p.tensor, part.row);
      t.n = part.n;
      t.y = static_cast<std::byte*>(p.y) + part.row * static_cast<int64_t>(p.store == Store::kAct ? sizeof(T) : sizeof(float));
      if (part.adapter >= 0) {
        const AdapterLayout::Adapter& a = layout.adapter(part.adapter);
        T* values = pass.take<T>(rank);
        low.add(part.adapter, values);
        down.push_back({adapter_table(pass, a.a), rank, a.k, p.x, p.ldx, rows, values, rank, Store::kAct, {}, layout.scale(),
                        narrow_weights<T>(pass)});
        t.low = {adapter_table(pass, a.b), rank, values, rank};
      }
      tasks.push_back(t);
    }
  }
  low_rank_rows<T>(pass.device, down);
  return tasks;
}

template <class T>
void first_products(const Pass& pass, int64_t layer, const Before<T>& before, const float* in, float* x, T* h,
                    std::span<const Product<T>> products, LowRows<T>& low) {
  const int64_t D = pass.config.hidden_size;
  low.clear();
  if constexpr (sizeof(T) == 2) {
    if (before.combination != nullptr) {
      PERIGEE_CHECK(row_combine_matmul(pass.device, *before.combination, x, with_adapters<T>(pass, products, low)),
                    "layer {}", layer);
      return;
    }
  }
  if (before.h == nullptr)
    rms_norm_forward<T, float>(pass.device, pass.rows(), D, in, D, pass.weights.vector(pass.params(layer).input_norm),
                               pass.config.rms_norm_eps, h, D);
  matmul<T>(pass.device, with_adapters<T>(pass, products, low));
}

template <class T>
std::vector<DeviceGradInputTask<T>> ProductGradients<T>::inputs(std::span<const Input> products) {
  std::vector<DeviceGradInputTask<T>> tasks, up;
  const int64_t rows = pass_.rows();
  for (const Input& p : products) {
    auto task = grad_input<T>(pass_, p.tensor, p.dy, p.lddy, p.dx, p.lddx, p.store);
    if (!pass_.frozen()) {
      tasks.push_back(task);
      weights_.push_back(grad_weight<T>(pass_, p.tensor, p.dy, p.lddy, p.x, p.ldx, gradient_));
      continue;
    }
    const AdapterLayout& layout = *pass_.weights.adapter;
    const int64_t rank = layout.config().rank;
    const auto parts = layout.parts(p.tensor);
    std::vector<DeviceGradInputTask<T>> beside;
    for (const AdapterLayout::Part& part : parts) {
      if (part.adapter < 0) continue;
      const AdapterLayout::Adapter& a = layout.adapter(part.adapter);
      const auto grad = [&](int t) { return gradient_ + layout.tensor(t).element_offset; };
      T* dlow = pass_.template take<T>(rank);
      up.push_back({adapter_table(pass_, a.b), a.n, rank, p.dy + a.row, p.lddy, rows, dlow, rank, Store::kAct, {}, layout.scale(),
                    narrow_weights<T>(pass_)});
      weights_.push_back({p.dy + a.row, p.lddy, low_.of(part.adapter), rank, rows, grad(a.b), a.n, rank});
      weights_.push_back({dlow, rank, p.x, p.ldx, rows, grad(a.a), rank, a.k});
      if (parts.size() == 1) {
        task.low = {adapter_table(pass_, a.a), rank, dlow, rank};
      } else {
        PERIGEE_CHECK(p.store != Store::kAct);
        beside.push_back({adapter_table(pass_, a.a), rank, a.k, dlow, rank, rows, p.dx, p.lddx, Store::kAddF32, {}, 1.0f,
                          narrow_weights<T>(pass_)});
      }
    }
    tasks.push_back(task);
    tasks.insert(tasks.end(), beside.begin(), beside.end());
  }
  if (!up.empty()) matmul_grad_input<T>(pass_.device, up);
  return tasks;
}

template <class T>
void ProductGradients<T>::sum_of_inputs(std::vector<DeviceGradInputTask<T>> tasks) {
  for (size_t i = 0; i < tasks.size(); ++i) {
    tasks[i].store = i == 0 ? Store::kF32 : Store::kAddF32;
    matmul_grad_input<T>(pass_.device, {&tasks[i], 1});
  }
}

template <class T>
void ProductGradients<T>::weights() {
  matmul_grad_weight<T>(pass_.device, weights_);
  weights_.clear();
}

template std::vector<DeviceMatmulTask<float>> with_adapters(const Pass&, std::span<const Product<float>>,
                                                            LowRows<float>&);
template std::vector<DeviceMatmulTask<bf16>> with_adapters(const Pass&, std::span<const Product<bf16>>, LowRows<bf16>&);
template void first_products(const Pass&, int64_t, const Before<float>&, const float*, float*, float*,
                             std::span<const Product<float>>, LowRows<float>&);
template void first_products(const Pass&, int64_t, const Before<bf16>&, const float*, float*, bf16*,
                             std::span<const Product<bf16>>, LowRows<bf16>&);
template class ProductGradients<float>;
template class ProductGradients<bf16>;

}  // namespace perigee::policy::device
