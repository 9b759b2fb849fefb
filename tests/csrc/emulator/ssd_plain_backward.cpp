#include "ssd_plain.h"

#define ssd_bwd_kernel_plain_dx HYLO_JOIN(HYLO_SYMBOL, _dx)
#define ssd_bwd_kernel_plain_db HYLO_JOIN(HYLO_SYMBOL, _db)
#define ssd_bwd_kernel_plain_dc HYLO_JOIN(HYLO_SYMBOL, _dc)
#define ssd_bwd_kernel_plain_ddt HYLO_JOIN(HYLO_SYMBOL, _ddt)
#define ssd_bwd_kernel_plain_vectors HYLO_JOIN(HYLO_SYMBOL, _vectors)
#include "ssd/plain_backward.cuh"

HYLO_REGISTER("ssd_bwd_kernel_plain_dx", ssd_bwd_kernel_plain_dx, plain::Params)
HYLO_REGISTER("ssd_bwd_kernel_plain_db", ssd_bwd_kernel_plain_db, plain::Params)
HYLO_REGISTER("ssd_bwd_kernel_plain_dc", ssd_bwd_kernel_plain_dc, plain::Params)
HYLO_REGISTER("ssd_bwd_kernel_plain_ddt", ssd_bwd_kernel_plain_ddt, plain::Params)
HYLO_REGISTER("ssd_bwd_kernel_plain_vectors", ssd_bwd_kernel_plain_vectors, VectorsParams)
