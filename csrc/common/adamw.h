// The update rule of masked_adamw_, once for all devices: float32, in exactly this order, and compiled without fused
// multiply-add, so that every instruction set gives the bits of an eager evaluation.
#pragma once

#include <math.h>

#include "platform.h"

namespace ltp {

// One parameter's row of the float64 `coefficients` table, rounded to float32.
struct AdamWCoefficients {
    static constexpr int kColumns = 11;  // column 0 is APPLY, the others stand below in their order

    float grad_factor, decay_step, one_minus_beta1, beta2, one_minus_beta2, step_size, inv_sqrt_bias_correction2, eps,
        pull;

    static LTP_HD bool applies(const double* row) { return row[0] != 0.0; }

    // Column 10: 32 bits that the random bits of the step start from, see rounding.h.
    static LTP_HD uint32_t rounding_key(const double* row) { return uint32_t(row[10]); }

    static LTP_HD AdamWCoefficients from_row(const double* row) {
        return {float(row[1]), float(row[2]), float(row[3]), float(row[4]), float(row[5]),
                float(row[6]), float(row[7]), float(row[8]), float(row[9])};
    }
};

// The gradient the step works with; HAS_ANCHOR adds the L1 pull towards `anchor`.
template <bool HAS_ANCHOR>
LTP_HD float effective_gradient(float grad, float param, float anchor, const AdamWCoefficients& c) {
    const float scaled = grad * c.grad_factor;
    if (!HAS_ANCHOR) return scaled;
    const float distance = param - anchor;
    return scaled + c.pull * (float(distance > 0.0f) - float(distance < 0.0f));
}

// Updates one active entry in place and returns the root of its second moment; `grad` is the effective gradient.
// Decay and step leave the weight in one subtraction: 1 - lr * weight_decay, rounded to float32, would be off in the
// same direction in every step, and a subtraction each would round twice.
LTP_HD float adamw_update(float& param, float grad, float& exp_avg, float& exp_avg_sq, const AdamWCoefficients& c) {
    exp_avg = exp_avg + c.one_minus_beta1 * (grad - exp_avg);
    exp_avg_sq = exp_avg_sq * c.beta2 + c.one_minus_beta2 * (grad * grad);
    const float root = sqrtf(exp_avg_sq);
    const float denominator = root * c.inv_sqrt_bias_correction2 + c.eps;
    param = param - (c.decay_step * param + c.step_size * (exp_avg / denominator));
    return root;
}

}  // namespace ltp
