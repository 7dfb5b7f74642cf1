// What the figures of a GPU share. Private to bench.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "bench/rig.h"
#include "kernels/device/device.h"
#include "policy/model/params.h"

namespace perigee::bench {

// Multiply-adds counted twice: what a large bf16 product reached on one H200 (docs/performance.md), for want of a
// library's product in this program.
inline constexpr double kMatrixRate = 790e12;
// Of the targets that are multiples of a floor.
inline constexpr double kNominalMemoryRate = 4.2e12;

// A device that holds a model of random weights.
struct Gpu {
  policy::ParamLayout layout;
  kernels::Device device;
  std::byte* weights;

  // scratch_bytes: of the layout.
  Gpu(const policy::ModelConfig& config,
      const std::function<int64_t(const policy::ParamLayout&)>& scratch_bytes);
  ~Gpu() { device.release(weights); }
  Gpu(const Gpu&) = delete;
  Gpu& operator=(const Gpu&) = delete;
};

// Device memory that is given back together.
class Arrays {
 public:
  explicit Arrays(kernels::Device& device) : device_(device) {}
  ~Arrays() {
    for (void* p : all_) device_.release(p);
  }
  Arrays(const Arrays&) = delete;
  Arrays& operator=(const Arrays&) = delete;

  template <class T>
  T* take(int64_t count) {
    all_.push_back(device_.allocate(count * static_cast<int64_t>(sizeof(T))));
    return static_cast<T*>(all_.back());
  }
  template <class T>
  T* upload(const std::vector<T>& values) {
    T* p = take<T>(static_cast<int64_t>(values.size()));
    device_.copy_in(p, values.data(), static_cast<int64_t>(values.size() * sizeof(T)));
    return p;
  }
  // count values: `values` again and again.
  template <class T>
  T* repeat(const std::vector<T>& values, int64_t count) {
    T* p = take<T>(count);
    auto have = std::min(count, static_cast<int64_t>(values.size()));
    const auto bytes = static_cast<int64_t>(sizeof(T));
    device_.copy_in(p, values.data(), have * bytes);
    for (int64_t more; have < count; have += more) {
      more = std::min(have, count - have);
      device_.copy(p + have, p, more * bytes);
    }
    return p;
  }

 private:
  kernels::Device& device_;
  std::vector<void*> all_;
};

double copy_rate(kernels::Device& device);  // bytes read and written per second by a copy of 4 GB

std::vector<int32_t> random_tokens(const policy::ModelConfig& config, int64_t n, uint64_t seed);

// work(0) .. work(count - 1), recorded as one graph: seconds of one of them in each of `turns` replays, by the host's
// clock around a replay and its end.
std::vector<double> replays(kernels::Device& device, int64_t count, int turns,
                            const std::function<void(int64_t)>& work);

// values: units per second. work: bytes or operations of one unit. aim: the share of the ceiling wanted, or 0.
Figure rate_figure(const std::string& name, const std::string& unit, Bound bound, double work, double ceiling,
                   double aim, std::vector<double> values, const std::string& note);
// A figure that is a time. unit: "ms" or "us". work: bytes or operations of it all. target in `unit`, or 0.
Figure time_figure(const std::string& name, const std::string& unit, Bound bound, double work, double ceiling,
                   double target, std::vector<double> seconds, const std::string& note);
// A number that is no measurement of time.
Figure plain_figure(const std::string& name, const std::string& unit, double value, double target,
                    const std::string& note);

// The families. copy: copy_rate().
void bench_gpu_kda(Rig& rig, double copy);
void bench_gpu_mla(Rig& rig, double copy);
void bench_gpu_train(Rig& rig);
void bench_gpu_train_lora(Rig& rig);
void bench_gpu_context(Rig& rig, double copy);
std::vector<std::string> gpu_kernel_figure_names();
std::vector<std::string> gpu_context_figure_names();

}  // namespace perigee::bench
