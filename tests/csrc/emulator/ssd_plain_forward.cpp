#include "ssd_plain.h"

#define ssd_fwd_kernel_plain_factors HYLO_JOIN(HYLO_SYMBOL, _factors)
#define ssd_fwd_kernel_plain_ends HYLO_JOIN(HYLO_SYMBOL, _ends)
#define ssd_fwd_kernel_plain_carry HYLO_JOIN(HYLO_SYMBOL, _carry)
#define ssd_fwd_kernel_plain_o HYLO_JOIN(HYLO_SYMBOL, _o)
#include "ssd/plain_forward.cuh"

HYLO_REGISTER("ssd_fwd_kernel_plain_factors", ssd_fwd_kernel_plain_factors, plain::Params)
HYLO_REGISTER("ssd_fwd_kernel_plain_ends", ssd_fwd_kernel_plain_ends, plain::Params)
HYLO_REGISTER("ssd_fwd_kernel_plain_carry", ssd_fwd_kernel_plain_carry, plain::Params)
HYLO_REGISTER("ssd_fwd_kernel_plain_o", ssd_fwd_kernel_plain_o, plain::Params)
