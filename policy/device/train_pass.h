// Forward and backward over whole sequences on a GPU: policy/model/forward.h's TrainPass where the weights are.
#pragma once
#include <memory>
#include <span>
#include <vector>

#include "kernels/device/device.h"
#include "policy/model/params.h"

namespace perigee::policy::device {

// Of a pass of this many tokens.
int64_t kept_attention_bytes(const ModelConfig& config, int64_t tokens, int64_t activation_bytes);

// T is the type of activations: float (the CPU's bits, forwards and backwards) or bf16.
// Between forward() and the object's end its activations live in the device's scratch: objects nest like a stack.
template <class T>
class TrainPass {
 public:
  // weights hold device memory. recompute: keep only the inputs of each half layer and compute the rest again; with
  // keep_attention, for a backward that follows, also what latent attention gave (kept_attention_bytes), which grows with
  // the square of a sequence to compute.
  TrainPass(kernels::Device& device, const Weights& weights, bool recompute, bool keep_attention = false);
  ~TrainPass();
  TrainPass(const TrainPass&) = delete;
  TrainPass& operator=(const TrainPass&) = delete;

  // tokens and lengths: host memory. Returns device memory: hidden [rows, hidden_size] after the final norm, with the
  // bits of device::forward.
  const T* forward(std::span<const int32_t> tokens, std::span<const int64_t> lengths);

  // dhidden: device float32 [rows, hidden_size] -> gradient: device flat float32 [layout.elements()], accumulated; with
  // adapters [adapter.elements()], of theirs alone.
  void backward(const float* dhidden, float* gradient);

  // Tokens sent to each expert in the forward, [moe layers][experts] in layer order. Waits for the device.
  std::vector<int64_t> expert_load();
  // The first layer that left a NaN or infinity in the residual stream of the forward, or -1. Waits for the device.
  int64_t first_nonfinite_layer();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace perigee::policy::device
