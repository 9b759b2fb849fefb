#include "gated_delta_rule_fp32.h"

#define gated_delta_rule_fwd_kernel_fp32_inverse HYLO_JOIN(HYLO_SYMBOL, _inverse)
#define gated_delta_rule_fwd_kernel_fp32_o HYLO_JOIN(HYLO_SYMBOL, _o)
#include "gated_delta_rule/fp32_forward.cuh"

HYLO_REGISTER("gated_delta_rule_fwd_kernel_fp32_inverse", gated_delta_rule_fwd_kernel_fp32_inverse)
HYLO_REGISTER("gated_delta_rule_fwd_kernel_fp32_o", gated_delta_rule_fwd_kernel_fp32_o)
