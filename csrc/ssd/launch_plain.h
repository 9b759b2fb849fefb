// The launchers of the plain kernels, that the bindings expose.
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "common/driver.h"
#include "ssd/plain_params.h"
#include "ssd/views.h"

namespace hylo::ssd::plain {

// Dynamic shared memory, in bytes, of a plain kernel: "factors", "ends", "carry", "o", "dx", "db", "dc", "ddt" or
// "vectors".
int shared_bytes(const std::string& kernel);

// Floats that the factors, and the sums of the gates' gradients, take of each chunk and head.
int factors_length();
int sums_length(int values, int width);

// One call of the op, launch by launch: what all of its kernels share is said once. Pointers are of the tensors in
// plain_params.h, 0 stands for an absent one; all launches are asynchronous, on the caller's stream.
class Call {
 public:
  // chunks: of all sequences, or a bound; factors have room for so many. Strides in elements, of the dims B, T, heads,
  // width; the last is 1, the others are multiples of 16 bytes (where a dim has more than one entry).
  Call(const std::array<std::uintptr_t, 3>& x_b_c, const std::array<Strides, 3>& strides, const ScalarView& dt,
            const ScalarView& a, const ScalarView& d, const ScalarView& dt_bias, std::uintptr_t cu_seqlens,
            const Shape& shape, int chunks, std::uintptr_t factors, bool softplus, float least, float greatest,
            std::uintptr_t stream);

  // The factors of all chunks and heads.
  void factors(const Kernel& kernel) const;

  // Where the states before each chunk go, or back the gradients of those behind it; what each sequence is given, and
  // where what it leaves goes.
  void set_states(int direction, std::uintptr_t states, std::uintptr_t given, std::uintptr_t left);

  // The gradient of o, contiguous.
  void set_gradient(std::uintptr_t d_o);

  // These states, in so many directions.
  void states(const Kernel& ends, const Kernel& carry, int directions) const;

  void outputs(const Kernel& kernel, std::uintptr_t o) const;

  // dx, db and dc; `sums` has room for what dx and dc leave for ddt.
  void gradients(const std::array<const Kernel*, 3>& dx_db_dc, const std::array<std::uintptr_t, 3>& results,
                 std::uintptr_t sums);

  // The gradients of dt, and parts of those of d, dt_bias and a, [3, chunks, H], which are left as they are where a
  // slot has no chunk.
  void ddt(const Kernel& kernel, std::uintptr_t ddt, std::uintptr_t parts) const;

  // Sums those up, into the gradients of d, dt_bias and a: addresses, 0 where not wanted, and types.
  void vectors(const Kernel& kernel, std::uintptr_t parts, const std::array<std::uintptr_t, 3>& sums,
               const std::array<int, 3>& types) const;

 private:
  void collect(const Kernel& kernel, std::int64_t columns, Dim owners, const Params& params) const;

  Params params_{};
  Shape shape_;
  void* stream_;
};

}  // namespace hylo::ssd::plain
