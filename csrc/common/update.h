// The arguments of masked_adamw_, masked_sum_squares and masked_pack_ on CPUs and GPUs, read by name from the fields of
// the records Tiles, Norm and Update of ltp_sparse/backends/arguments.py.
#pragma once

#include "adamw.h"
#include "tile.h"

namespace ltp {

// The packed state, contiguous and in slot order. Parts that are not used are null.
struct PackedState {
    void *exp_avg, *exp_avg_sq;  // [K] float32, or with scales int8 and uint8, see quantization.h; updated
    float* scales;               // [B, 2] scales of 8-bit moments; updated
    float* master;               // [K] the exact weights, updated; null if the parameters are exact
    const float* anchor;         // [K] the weights that the pull draws to

    // The state of a tile, from its first slot and block on. size: bytes of a moment
    LTP_HD PackedState of_tile(const TileRow& row, int64_t size) const {
        PackedState own = {};
        if (exp_avg != nullptr) own.exp_avg = static_cast<char*>(exp_avg) + size * row.slot;
        if (exp_avg_sq != nullptr) own.exp_avg_sq = static_cast<char*>(exp_avg_sq) + size * row.slot;
        if (scales != nullptr) own.scales = scales + 2 * row.block;
        if (master != nullptr) own.master = master + row.slot;
        if (anchor != nullptr) own.anchor = anchor + row.slot;
        return own;
    }
};

struct Update {
    const TileRow* tiles;  // [T]
    int64_t n_tiles;
    const int32_t* words;       // bitmaps, 2 * ceil(LENGTH / 64) words at INDEX
    const uint16_t* ranks;      // the directory of the bitmaps; read only on GPUs
    const uint16_t* positions;  // lists, ACTIVE ascending positions in the tile at INDEX
    TileRoom room;
    Dtype param_dtype, grad_dtype;
    bool packed;                 // gradients are float32 [K]
    bool stochastic;             // bfloat16 parameters are rounded stochastically
    const double* coefficients;  // [P, 11], see adamw.h
    const double* clip;          // one factor of gradients and pull in the update; null stands for 1
    PackedState state;
};

template <class Record>
void read_index(const Record& record, int64_t params, Update& to) {
    to.tiles = record.template at<const TileRow>("tiles");
    to.n_tiles = record.entries("tiles") / int64_t(sizeof(TileRow) / sizeof(int64_t));
    to.words = record.template at<const int32_t>("words");
    to.ranks = record.template at<const uint16_t>("ranks");
    to.positions = record.template at<const uint16_t>("positions");
    to.room = {params, record.entries("words"), record.entries("positions"), kNoLimit, kNoLimit};
}

template <class Record>
void read_tiles(const Record& record, int64_t params, Update& to) {
    read_index(record, params, to);
    to.param_dtype = to.grad_dtype = record.dtype("grads");  // the same, if parameters are not read
}

// The address of a tensor with one number per slot; its size limits `room`.
template <class T, class Record>
T* read_slots(const Record& record, const char* name, TileRoom& room) {
    if (!record.has(name)) return nullptr;
    const int64_t entries = record.entries(name);
    room.slots = entries < room.slots ? entries : room.slots;
    return record.template at<T>(name);
}

template <class Record>
void read_norm(const Record& record, int64_t params, Update& to) {
    read_tiles(record, params, to);
    to.param_dtype = record.dtype("params");
    to.packed = record.flag("packed");
    to.coefficients = record.template at<const double>("coefficients");
    to.state.master = read_slots<float>(record, "master", to.room);
    to.state.anchor = read_slots<const float>(record, "anchor", to.room);
    const int64_t grad_slots = to.packed ? record.sizes("grads")[0] : kNoLimit;
    to.room.slots = grad_slots < to.room.slots ? grad_slots : to.room.slots;
}

template <class Record>
void read_update(const Record& record, int64_t params, Update& to) {
    read_norm(record, params, to);
    to.stochastic = record.flag("stochastic");
    to.clip = record.template at<const double>("clip");
    to.state.exp_avg = read_slots<void>(record, "exp_avg", to.room);
    to.state.exp_avg_sq = read_slots<void>(record, "exp_avg_sq", to.room);
    to.state.scales = record.template at<float>("scales");
    if (record.has("scales")) to.room.blocks = record.entries("scales") / 2;
}

// The norm of the gradients of a step, over the tiles of all its launches.
struct Total {
    int64_t first, tiles;  // tiles of the earlier launches, and of all
    double max_norm;
    double* sums;  // the sum of squares of each tile
    uint32_t* arrived;
    double *grad_norm, *clip;  // the norm, and the factor that makes it at most `max_norm`

    LTP_HD void finish(double squares) const {
        *grad_norm = sqrt(squares);
        const double factor = max_norm / (*grad_norm + 1e-6);
        *clip = factor > 1.0 ? 1.0 : factor;  // NaN stays
    }
};

template <class Record>
Total read_total(const Record& record) {
    return {int64_t(record.number("first")),
            int64_t(record.number("tiles")),
            record.real("max_norm"),
            record.template at<double>("sums"),
            record.template at<uint32_t>("arrived"),
            record.template at<double>("grad_norm"),
            record.template at<double>("clip")};
}

template <class Record>
void read_step(const Record& record, Step& to) {
    to.n_params = record.entries("group");
    to.hyper = record.template at<const Hyper>("hyper");
    to.group = record.template at<const int64_t>("group");
    to.numbers = record.template at<const int64_t>("numbers");
    to.has_grad = record.template at<const double>("has_grad");
    to.steps = record.template at<double>("steps");
    to.found_inf = record.template at<const float>("found_inf");
    to.grad_scale = record.template at<const float>("grad_scale");
    to.pull_factor = record.template at<const double>("pull_factor");
    to.seed = record.number("seed");
    to.counts = record.flag("counts");
    to.coefficients = record.template at<double>("coefficients");
}

}  // namespace ltp
