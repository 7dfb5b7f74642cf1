// A case of the general delta rule on the device, for T = float and bf16.
#pragma once
#include <memory>

#include "kernels/dplr/dplr_device.h"
#include "kernels/kda/kda_device.h"
#include "tests/kernels/device_values.h"
#include "tests/kernels/dplr/cases.h"

namespace perigee::kernels {

// The first `count` of all sequences' rows that a call takes of each; 0: a padding entry.
using DplrCall = std::vector<int64_t>;

template <class T>
struct DplrOnDevice {
  DplrShape shape;
  std::vector<int64_t> lengths, begins;
  DplrCase c;  // rows of all sequences one after the other, as T holds them

  DplrOnDevice(DplrShape s, std::vector<int64_t> lengths_, Decay decay, uint64_t seed)
      : shape(s), lengths(std::move(lengths_)) {
    int64_t rows = 0;
    for (const int64_t n : lengths) begins.push_back(rows), rows += n;
    c = make_dplr_case(shape, rows, decay, seed);
    for (Floats* x : {&c.q, &c.k, &c.v, &c.a, &c.b, &c.dout}) *x = held<T>(*x);
  }
  int64_t rows() const { return c.rows; }
  int64_t key_width() const { return shape.heads * shape.dk; }
  int64_t value_width() const { return shape.heads * shape.dv; }
  std::vector<Slice> whole() const {
    std::vector<Slice> slices;
    for (size_t i = 0; i < lengths.size(); ++i) slices.push_back({begins[i], lengths[i], 0});
    return slices;
  }
};

template <class T>
struct DplrArrays {
  DplrArrays(Device& d, const DplrCase& c)
      : q(d, as<T>(c.q)), k(d, as<T>(c.k)), v(d, as<T>(c.v)), a(d, as<T>(c.a)), b(d, as<T>(c.b)), g(d, c.g) {}
  DplrDeviceInputs<T> inputs() const { return {q, k, v, a, b, g}; }
  DeviceArray<T> q, k, v, a, b;
  DeviceArray<float> g;
};

inline std::vector<DeviceSlice> device_slices(const std::vector<Slice>& slices) {
  std::vector<DeviceSlice> r;
  for (const Slice& s : slices)
    r.push_back(
        {static_cast<int32_t>(s.begin), static_cast<int32_t>(s.count), static_cast<int32_t>(s.position), 0});
  return r;
}

inline DeviceBatch batch_of(int64_t rows, const std::vector<Slice>& slices,
                            const DeviceArray<DeviceSlice>& memory) {
  DeviceBatch b;
  b.rows = static_cast<int32_t>(rows);
  b.slices = static_cast<int32_t>(slices.size());
  for (const Slice& s : slices) b.max_count = std::max(b.max_count, static_cast<int32_t>(s.count));
  b.slice = memory;
  return b;
}

// The states of sequences, at an offset in each one's memory.
class DplrStates {
 public:
  static constexpr int64_t kOffset = 512;
  DplrStates(Device& d, int64_t bytes, size_t sequences)
      : bytes_(kOffset + bytes),
        memory_(d, std::vector<std::byte>(static_cast<size_t>(bytes_) * sequences)),
        pointers_(d, addresses(sequences)) {}
  std::byte* const* pointers() const { return pointers_; }
  std::vector<std::byte> get(size_t i) const {
    const std::vector<std::byte> all = memory_.get();
    const auto begin = all.begin() + static_cast<int64_t>(i) * bytes_;
    return {begin + kOffset, begin + bytes_};
  }

 private:
  std::vector<std::byte*> addresses(size_t n) const {
    std::vector<std::byte*> r;
    for (size_t i = 0; i < n; ++i) r.push_back(memory_.data() + static_cast<int64_t>(i) * bytes_);
    return r;
  }
  int64_t bytes_;
  DeviceArray<std::byte> memory_;
  DeviceArray<std::byte*> pointers_;
};

// The calls one after the other, each a packed batch of its own; out in the order of the case.
template <class T>
std::vector<T> run_calls(Device& d, const DplrOnDevice<T>& x, const std::vector<DplrCall>& calls) {
  const DplrStates states(d, dplr_state_bytes<T>(x.shape), x.lengths.size());
  std::vector<int64_t> done(x.lengths.size());
  std::vector<T> out(static_cast<size_t>(x.rows() * x.value_width()));
  for (const DplrCall& call : calls) {
    DplrCase c;
    std::vector<Slice> slices;
    int64_t rows = 0;
    for (size_t i = 0; i < call.size(); ++i) {
      slices.push_back({call[i] == 0 ? 0 : rows, call[i], done[i]});
      const auto gather = [&](Floats& to, const Floats& from, int64_t width) {
        const int64_t row = x.begins[i] + done[i];
        to.insert(to.end(), from.begin() + row * width, from.begin() + (row + call[i]) * width);
      };
      gather(c.q, x.c.q, x.key_width()), gather(c.k, x.c.k, x.key_width()),
          gather(c.v, x.c.v, x.value_width());
      gather(c.a, x.c.a, x.key_width()), gather(c.b, x.c.b, x.key_width()), gather(c.g, x.c.g, x.key_width());
      rows += call[i];
    }
    if (rows == 0) continue;
    const DplrArrays<T> in(d, c);
    const DeviceArray<DeviceSlice> slice_memory(d, device_slices(slices));
    DeviceBatch batch = batch_of(rows, slices, slice_memory);
    batch.recurrent = states.pointers();
    const DeviceArray<T> got_memory(d, rows * x.value_width());
    dplr_forward<T>(d, x.shape, in.inputs(), batch, DplrStates::kOffset, got_memory);
    const std::vector<T> got = got_memory.get();
    for (size_t i = 0; i < call.size(); ++i) {
      std::copy_n(got.begin() + slices[i].begin * x.value_width(), call[i] * x.value_width(),
                  out.begin() + (x.begins[i] + done[i]) * x.value_width());
      done[i] += call[i];
    }
  }
  return out;
}

// Forward and backward of whole sequences.
template <class T>
struct DplrTraining {
  std::vector<T> out, states, dq, dk, dv, da, db;
  Floats dg;
};
template <class T>
DplrTraining<T> train(Device& d, const DplrOnDevice<T>& x, const std::vector<Slice>& slices) {
  const DplrArrays<T> in(d, x.c);
  const DeviceArray<DeviceSlice> slice_memory(d, device_slices(slices));
  const DeviceBatch batch = batch_of(x.rows(), slices, slice_memory);
  const int64_t keys = x.rows() * x.key_width(), values = x.rows() * x.value_width();
  const DeviceArray<T> states(d, kda_chunk_slots(x.rows(), batch.slices) * x.key_width() * x.shape.dv),
      out(d, values), dout(d, as<T>(x.c.dout)), dq(d, keys), dk(d, keys), dv(d, values), da(d, keys),
      db(d, keys);
  const DeviceArray<float> dg(d, keys);
  dplr_forward<T>(d, x.shape, in.inputs(), batch, 0, out, states);
  dplr_backward<T>(d, x.shape, in.inputs(), states, batch, dout, {dq, dk, dv, da, db, dg});
  return {out.get(), states.get(), dq.get(), dk.get(), dv.get(), da.get(), db.get(), dg.get()};
}

}  // namespace perigee::kernels
