// A selection by samples: its launches in order, and their memory. The host does not wait between them.
#pragma once

#include <utility>
#include <vector>

#include "../common/delta_key.h"
#include "topk_delta.h"

namespace ltp {

// Divides a buffer of zeros into parts. Without a buffer, it only counts the bytes.
class Scratch {
  public:
    explicit Scratch(char* zeros = nullptr) : zeros_(zeros) {}

    template <class T>
    T* part(int64_t count) {
        char* const begin = zeros_ == nullptr ? nullptr : zeros_ + bytes_;
        bytes_ += (count * int64_t(sizeof(T)) + 15) / 16 * 16;
        return reinterpret_cast<T*>(begin);
    }

    int64_t bytes() const { return bytes_; }

  private:
    char* zeros_;
    int64_t bytes_ = 0;
};

class SampledSelection {
  public:
    // Bytes of the scratch.
    static int64_t scratch_bytes(int64_t n_groups, int64_t n_tiles, int digit_bits) {
        Scratch scratch;
        SampledSelection().take_parts(scratch, n_groups, n_tiles, digit_bits);
        return scratch.bytes();
    }

    // record: `Sampled` of ltp_sparse/backends/arguments.py. zeros: the scratch, which begins with the outcome.
    template <class Record>
    SampledSelection(const Record& record, const PairTable& pairs, const Kinds& kinds, int digit_bits, char* zeros)
        : pairs_(pairs), kinds_(kinds) {
        Scratch scratch(zeros);
        take_parts(scratch, record.entries("low"), pairs.n_tiles, digit_bits);
        search_.budgets = bracket_.budgets = record.template at<const Budget>("budgets");
        search_.low = bracket_.low = record.template at<int64_t>("low");
        search_.high = bracket_.high = record.template at<int64_t>("high");
        search_.thresholds = record.template at<float>("thresholds");
        search_.selected = record.template at<int64_t>("counts");
        search_.order = pairs.tile_order();
        search_.failed = band_.nonfinite + 1;

        bracket_.runs = record.entries("samples") / kRun;
        bracket_.keys = record.template at<int32_t>("samples");
        bracket_.pairs = pairs.pair_order();
        bracket_.starts = pairs.starts();
        bracket_.room = record.entries("keys");

        bins_.low = band_.low = search_.low;
        bins_.high = band_.high = search_.high;
        band_.words = record.template at<int32_t>("words");
        candidates_.keys = band_.keys = record.template at<int32_t>("keys");
        candidates_.positions = band_.positions = record.template at<uint16_t>("positions");
        candidates_.capacity = band_.capacity = record.entries("keys");
        candidates_.groups = pairs.tile_groups();
        for (Marks* marks : {static_cast<Marks*>(&above_), static_cast<Marks*>(&ties_)}) {
            marks->cut = search_.cut;
            marks->words = band_.words;
            marks->n_words = record.entries("words");
            marks->tile_words = pairs.tile_words();
        }
    }

    // Two launches find the bands, six select. Several dtypes or many groups need some more.
    void launch(void* stream) const {
        cuda_sample_upper(pairs_.of({}), bracket_, stream);
        cuda_sample_lower(bracket_, stream);
        for (const auto& kind : kinds_) cuda_delta_band(pairs_.of(kind), band_, search_, bins_.bins, stream);
        for (int round = 0; round < rounds_; ++round) {
            cuda_candidate_histogram(candidates_, bins_, search_, round, stream);
        }
        cuda_take_above(candidates_, above_, search_, band_.above, rounds_, stream);
        Band again = band_;
        again.take = search_.take;
        again.capacity = 0;
        for (const auto& kind : kinds_) {
            cuda_take_last(pairs_.of(kind), candidates_, ties_, again, search_, stream);
        }
    }

  private:
    SampledSelection() : pairs_(), kinds_() {}

    void take_parts(Scratch& scratch, int64_t n_groups, int64_t n_tiles, int digit_bits) {
        const auto per_group = [&] { return scratch.part<int64_t>(n_groups); };
        const auto per_tile = [&] { return scratch.part<int64_t>(n_tiles); };
        const int64_t n_bins = n_groups << digit_bits;
        rounds_ = (kKeyBits + digit_bits - 1) / digit_bits;
        band_.nonfinite = scratch.part<int64_t>(2);  // the second number: whether the search has failed

        bracket_.n_groups = search_.n_groups = band_.n_groups = candidates_.n_groups = n_groups;
        bracket_.digit_bits = digit_bits;
        bracket_.upper = scratch.part<uint32_t>(n_bins);
        bracket_.lower = scratch.part<uint32_t>(3 * n_bins);
        bracket_.low_bits = scratch.part<uint32_t>(n_bins);
        for (int64_t** of : {&bracket_.digits, &bracket_.ranks, &bracket_.larger, &bracket_.counts}) {
            *of = scratch.part<int64_t>(3 * n_groups);
        }
        bracket_.moved = per_group();
        bracket_.expected = scratch.part<int64_t>(1);
        bracket_.arrived = scratch.part<int64_t>(2);

        for (int64_t** of : {&search_.missing, &search_.rank, &search_.shift, &search_.cut, &search_.above,
                             &search_.inside, &search_.unstored, &search_.taken, &search_.starts}) {
            *of = per_group();
        }
        search_.open = scratch.part<int64_t>(rounds_ + 1);
        search_.arrived = scratch.part<int64_t>(rounds_ + 2);
        ties_.take = search_.take = per_tile();
        bins_.shift = search_.shift;
        bins_.bins = int64_t(1) << digit_bits;
        bins_.histogram = reinterpret_cast<int64_t*>(bracket_.lower);  // zeros again after the samples

        band_.above = per_tile();
        candidates_.inside = band_.inside = per_tile();
        candidates_.offsets = band_.offsets = per_tile();
        band_.cursor = scratch.part<int64_t>(1);
        candidates_.n_tiles = n_tiles;
        above_.taken = per_tile();
        above_.ties = per_tile();
    }

    PairTable pairs_;
    Kinds kinds_;
    Bracket bracket_ = {};
    Search search_ = {};
    Band band_ = {};
    Candidates candidates_ = {};
    CandidateBins bins_ = {};
    Above above_ = {};
    Ties ties_ = {};
    int rounds_ = 0;
};

}  // namespace ltp
