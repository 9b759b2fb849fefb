// The driver's CUtensorMap: what the copy engine needs to know of a tensor. Opaque, the same on host and device.
#pragma once

namespace hylo {

struct alignas(64) TensorMap {
  unsigned char opaque[128];
};

}  // namespace hylo
