// Numbers of a type known at run time only, as the host hands them to a kernel. Plain data, the same layout on both
// sides.
#pragma once

namespace hylo {

enum ScalarType : int { kScalarBf16, kScalarFp16, kScalarFp32, kScalarFp64 };

// A floating number for each sequence and head. Strides in elements: of the batch, of the heads.
struct Scalar {
  const void* data;
  long long stride_b, stride_h;
  int type;  // ScalarType
};

// The same with tokens in between.
struct TokenScalar {
  const void* data;
  long long stride_b, stride_t, stride_h;
  int type;
};

// A vector of int32 or int64 or, with a stride between rows, a matrix; data is null where there is none.
struct Integers {
  const void* data;
  long long stride;
  int wide;  // int64
};

}  // namespace hylo
