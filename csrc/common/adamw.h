// The update rule of masked_adamw_ for CPUs and GPUs: in float32, in exactly this order, and compiled without fused
// multiply-add, so that every instruction set gives the same bits as the reference.
#pragma once

#include <math.h>

#include "rounding.h"

namespace ltp {

// The coefficients of one parameter, in float32.
struct AdamWCoefficients {
    float grad_factor, decay_step, one_minus_beta1, beta2, one_minus_beta2, step_size, inv_sqrt_bias_correction2, eps,
        pull;
};

// All that kernels on a GPU read about one parameter. `prepare_step` writes it.
struct alignas(64) Prepared {
    AdamWCoefficients c;
    uint32_t rounding_key;
    uint64_t param, grad;  // addresses; grad is 0 if there is none
    uint32_t applies;      // 0: the update leaves the parameter and its state as they are
};
static_assert(sizeof(Prepared) == 64, "a row of `prepared` has 8 words of 64 bits");

// The hyperparameters of a parameter group, in the order of `HYPER` in ltp_sparse/backends/coefficients.py.
struct Hyper {
    double lr, beta1, beta2, eps, weight_decay, sign, pull;
};

// The arguments of `prepare_step`. Pointers to optional values are null where a value is absent.
struct Step {
    int64_t n_params;
    const Hyper* hyper;         // [G]
    const int64_t* group;       // [P], the row of `hyper`
    const int64_t* numbers;     // [P], distinguish the parameters in random bits
    const double* has_grad;     // [P], 0 or 1
    double* steps;              // [P], updates taken; null if the coefficients are computed already
    const float* found_inf;     // if it is not 0, the step is skipped
    const float* grad_scale;    // the loss scale that the gradients contain
    const double* pull_factor;  // multiplies the pull
    uint64_t seed;
    bool counts;           // whether `steps` goes up
    double* coefficients;  // [P, 11]; null if only addresses are wanted
};

// One parameter's row of the float64 `coefficients`, with the columns of ltp_sparse/backends/coefficients.py.
struct CoefficientRow {
    static constexpr int kColumns = 11;

    double* row;

    LTP_HD CoefficientRow(const double* coefficients, int64_t param)
        : row(const_cast<double*>(coefficients) + kColumns * param) {}

    LTP_HD bool applies() const { return row[0] != 0.0; }

    // The key of the random bits of this step, see rounding.h.
    LTP_HD uint32_t rounding_key() const { return uint32_t(row[10]); }

    // clip: a factor of gradients and pull; null stands for 1
    LTP_HD AdamWCoefficients rounded(const double* clip) const {
        const double factor = clip == nullptr ? 1.0 : *clip;
        return {float(row[1] * factor), float(row[2]), float(row[3]), float(row[4]),         float(row[5]),
                float(row[6]),          float(row[7]), float(row[8]), float(row[9] * factor)};
    }

    LTP_HD void write(const Step& step, int64_t param) {
        const Hyper& h = step.hyper[step.group[param]];
        const bool skipped = step.found_inf != nullptr && *step.found_inf != 0.0f;
        const double apply = skipped ? 0.0 : step.has_grad[param];
        const double count = step.steps[param] + (step.counts ? apply : 0.0);
        if (step.counts) step.steps[param] = count;
        // a parameter without an update yet would divide by 0; its row is not applied
        const double at_least_1 = count < 1.0 ? 1.0 : count;
        row[0] = apply;
        row[1] = step.grad_scale == nullptr ? h.sign : h.sign / double(*step.grad_scale);
        row[2] = h.lr * h.weight_decay;
        row[3] = 1.0 - h.beta1;
        row[4] = h.beta2;
        row[5] = 1.0 - h.beta2;
        row[6] = h.lr / (1.0 - pow(h.beta1, at_least_1));
        row[7] = 1.0 / sqrt(1.0 - pow(h.beta2, at_least_1));
        row[8] = h.eps;
        // a norm counts the pull of parameters with a gradient only
        row[9] = apply * (step.pull_factor == nullptr ? h.pull : h.pull * *step.pull_factor);
        row[10] = rounding_key_of(step.seed, uint64_t(count), uint64_t(step.numbers[param]));
    }
};

// Counts the step of a parameter at these addresses, and computes the row that kernels read.
LTP_HD Prepared prepare(const Step& step, int64_t param, uint64_t param_address, uint64_t grad_address) {
    Prepared prepared = {};
    prepared.param = param_address;
    prepared.grad = grad_address;
    if (step.coefficients == nullptr) return prepared;
    CoefficientRow row(step.coefficients, param);
    if (step.steps != nullptr) row.write(step, param);
    prepared.c = row.rounded(nullptr);
    prepared.rounding_key = row.rounding_key();
    prepared.applies = row.applies();
    return prepared;
}

// The effective gradient: scaled, and with HAS_ANCHOR pulled towards `anchor`.
template <bool HAS_ANCHOR>
LTP_HD float effective_gradient(float grad, float param, float anchor, const AdamWCoefficients& c) {
    const float scaled = grad * c.grad_factor;
    if (!HAS_ANCHOR) return scaled;
    const float distance = param - anchor;
    return scaled + c.pull * (float(distance > 0.0f) - float(distance < 0.0f));
}

// Updates one active entry in place and returns the root of its second moment; `grad` is the effective gradient. Decay
// and step are subtracted from the weight together. A factor 1 - lr * weight_decay, rounded to float32, would be wrong
// in the same direction in every step, and two subtractions would round twice.
LTP_HD float adamw_update(float& param, float grad, float& exp_avg, float& exp_avg_sq, const AdamWCoefficients& c) {
    exp_avg = exp_avg + c.one_minus_beta1 * (grad - exp_avg);
    exp_avg_sq = exp_avg_sq * c.beta2 + c.one_minus_beta2 * (grad * grad);
    const float root = sqrtf(exp_avg_sq);
    const float denominator = root * c.inv_sqrt_bias_correction2 + c.eps;
    param = param - (c.decay_step * param + c.step_size * (exp_avg / denominator));
    return root;
}

}  // namespace ltp
