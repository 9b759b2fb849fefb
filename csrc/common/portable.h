// Functions that host code and kernels both call, in files that both compile.
#pragma once

#ifdef __CUDACC__
#define HYLO_HOST_DEVICE __host__ __device__
#else
#define HYLO_HOST_DEVICE
#endif
