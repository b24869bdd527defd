// The arguments of the passes of topk_delta on CPUs and GPUs: the fields of the records of the same names in
// ltp_sparse/backends/arguments.py. The pairs of tensors are in cpu/topk_delta.h and cuda/topk_delta.h. Arrays are
// contiguous. T is the number of tiles: 65,536 entries each, in order, the last tile of a tensor may be shorter.
#pragma once

#include "platform.h"

namespace ltp {

struct Histogram {
    const int64_t* prefixes;  // [n_groups], or null: see `bins`
    int64_t* bins;       // added to: [n_groups, 32768] by key >> 16, or with prefixes [n_groups, 65536] by key & 0xFFFF
    int64_t* nonfinite;  // [1], set to 1 if a key was NaN or inf
    int64_t n_groups;

    template <class Record>
    explicit Histogram(const Record& record)
        : prefixes(record.template at<const int64_t>("prefixes")),
          bins(record.template at<int64_t>("histogram")),
          nonfinite(record.template at<int64_t>("nonfinite")),
          n_groups(record.entries("histogram") / (prefixes == nullptr ? 32768 : 65536)) {}
};

struct Sample {
    const int64_t *tensors, *runs;  // [count], 0 <= runs[r] < max(1, entries / kRun) of its tensor
    int64_t count;
    int32_t* keys;  // out [count, kRun]: at most the largest finite key, 0 beyond the end of a tensor

    template <class Record>
    explicit Sample(const Record& record)
        : tensors(record.template at<const int64_t>("tensors")),
          runs(record.template at<const int64_t>("runs")),
          count(record.entries("tensors")),
          keys(record.template at<int32_t>("keys")) {}
};

struct Band {
    const int64_t *low, *high;  // [n_groups], 1 <= low <= high
    int64_t n_groups;
    int32_t* words;       // out: bit set where key >= high, and for the entries of `take`
    int64_t* above;       // out [T]: entries with key >= high
    int64_t* inside;      // out [T]: entries with low <= key < high
    const int64_t* take;  // [T] bits set for the first take[t] entries inside, or null
    int32_t* keys;        // out [capacity]: candidates, the entries inside
    uint16_t* positions;  // out [capacity]: their positions in their tiles
    int64_t capacity;
    int64_t* offsets;    // out [T]: where the tile's candidates stand, ascending; -1: they did not fit
    int64_t* cursor;     // [1]: candidates so far, kept or not; advanced
    int64_t* nonfinite;  // [1], set to 1 if a key was NaN or inf
    int64_t* digests;    // out [T, 2]: of the tiles of `initial`, or null

    Band() = default;

    template <class Record>
    explicit Band(const Record& record)
        : low(record.template at<const int64_t>("low")),
          high(record.template at<const int64_t>("high")),
          n_groups(record.entries("low")),
          words(record.template at<int32_t>("words")),
          above(record.template at<int64_t>("above")),
          inside(record.template at<int64_t>("inside")),
          take(record.template at<const int64_t>("take")),
          keys(record.template at<int32_t>("keys")),
          positions(record.template at<uint16_t>("positions")),
          capacity(record.entries("keys")),
          offsets(record.template at<int64_t>("offsets")),
          cursor(record.template at<int64_t>("cursor")),
          nonfinite(record.template at<int64_t>("nonfinite")),
          digests(record.template at<int64_t>("digests")) {}
};

// The candidates that the band pass has stored. Tiles whose candidates had no room have none here.
struct Candidates {
    const int32_t* keys;
    const uint16_t* positions;
    int64_t capacity;        // of keys and positions
    const int64_t* offsets;  // [n_tiles]
    const int64_t* inside;   // [n_tiles]
    const int64_t* groups;   // [n_tiles] budget group
    int64_t n_tiles, n_groups;

    Candidates() = default;

    // per_group: a field with an item for each group
    template <class Record>
    Candidates(const Record& record, const char* per_group)
        : keys(record.template at<const int32_t>("keys")),
          positions(record.template at<const uint16_t>("positions")),
          capacity(record.entries("keys")),
          offsets(record.template at<const int64_t>("offsets")),
          inside(record.template at<const int64_t>("inside")),
          groups(record.template at<const int64_t>("tile_groups")),
          n_tiles(record.entries("offsets")),
          n_groups(record.entries(per_group)) {}
};

struct CandidateBins {
    const int64_t *low, *high, *shift;  // [n_groups]: counted are low <= key < high, by (key - low) >> shift
    int64_t* histogram;                 // [n_groups, bins], added to; what is beyond the bins is left out
    int64_t bins;

    CandidateBins() = default;

    template <class Record>
    explicit CandidateBins(const Record& record)
        : low(record.template at<const int64_t>("low")),
          high(record.template at<const int64_t>("high")),
          shift(record.template at<const int64_t>("shift")),
          histogram(record.template at<int64_t>("histogram")),
          bins(record.entries("low") == 0 ? 0 : record.entries("histogram") / record.entries("low")) {}
};

struct Marks {
    const int64_t* cut;  // [n_groups]
    int32_t* words;      // bitmaps as the band pass writes them
    int64_t n_words;
    const int64_t* tile_words;  // [n_tiles], the first word of each tile

    Marks() = default;

    template <class Record>
    explicit Marks(const Record& record)
        : cut(record.template at<const int64_t>("cut")),
          words(record.template at<int32_t>("words")),
          n_words(record.entries("words")),
          tile_words(record.template at<const int64_t>("tile_words")) {}
};

struct Above : Marks {
    int64_t *taken, *ties;  // out [n_tiles]: candidates above the cut, and at it

    Above() = default;

    template <class Record>
    explicit Above(const Record& record)
        : Marks(record), taken(record.template at<int64_t>("taken")), ties(record.template at<int64_t>("ties")) {}
};

struct Ties : Marks {
    const int64_t* take;  // [n_tiles]: so many candidates at the cut are marked, the first ones

    Ties() = default;

    template <class Record>
    explicit Ties(const Record& record) : Marks(record), take(record.template at<const int64_t>("take")) {}
};

}  // namespace ltp
