// An engine's arithmetic on a GPU (policy/engine/backend.h).
//
// A step is at most two passes: the sequences that decode, one token each, as one graph replay; and the slices of
// prompts, launched directly. By the numeric contract it makes no difference which pass computes a token. The graph is
// recorded once for each number of rows (rounded up) and size of the page tables; everything that changes between
// steps lies in one input block, which the graph fetches from pinned memory first.
#pragma once
#include <memory>

#include "kernels/device/device.h"
#include "policy/engine/backend.h"
#include "policy/engine/engine.h"

namespace perigee::policy {

// Temporary memory of forward passes of at most this many rows, in bytes: what a Device for this model is made with.
int64_t device_scratch_bytes(const ParamLayout& layout, int64_t rows);

// Sequence states on the device, of a model in this layout: float32 in panels, or bfloat16 in tiles.
StateLayout device_state_layout(const ParamLayout& layout);

// ERRORS (input): a bfloat16 model on a device without such kernels, or of sizes that they do not take, by name.
// REQUIRES Device::count() > 0.
void check_device_model(const ParamLayout& layout);

// layout: MatrixForm::kTiles for activations in bfloat16 (compute capability 9.0); panels for activations in float32, with the
// bits of the CPU whatever the weights' dtype, on any device. device and layout outlive the backend. Everything but
// the states is allocated here.
std::unique_ptr<Backend> device_backend(kernels::Device& device, const ParamLayout& layout, const EngineConfig& config);

// The same over weights that lie on the device already and change in place: set_weights takes this address only.
std::unique_ptr<Backend> device_backend(kernels::Device& device, const ParamLayout& layout, const EngineConfig& config,
                                        const std::byte* device_weights);

// Adapters beside a frozen model. device_base: the weights arena of adapter.base(), in memory of this device (its own, or
// another process's that it maps), not changed while the backend lives. set_weights copies an arena of the adapters' layout
// from the host into the memory that the recorded graphs read: no graph is recorded again.
std::unique_ptr<Backend> device_backend(kernels::Device& device, const AdapterLayout& adapter, const EngineConfig& config,
                                        const std::byte* device_base);
int64_t device_scratch_bytes(const AdapterLayout& adapter, int64_t rows);

}  // namespace perigee::policy
