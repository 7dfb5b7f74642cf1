// What this build's device code can do on the current GPU. Private to kernels/device.
#pragma once

namespace perigee::kernels {

struct Features {
  bool runs = false;            // device code for this GPU's compute capability (or one that the driver can translate) is here
  bool tensor_kernels = false;  // and it is sm_90a's: bfloat16 kernels have a body
};
Features features_here();

}  // namespace perigee::kernels
