// Gives tiles to threads, in groups of consecutive tiles that are large enough to make the cost of taking one
// negligible.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

namespace ltp {

// Every worker has a range of consecutive groups and processes it in order, since memory is read a fifth faster in long
// streams. A worker that is done takes groups from the ends of the others' ranges.
class TileQueue {
  public:
    static constexpr int64_t kEntriesPerGroup = 32768;

    // Appends the next tile, with about `entries` entries of work.
    void add(int64_t entries) {
        if (open_entries_ == 0) starts_.push_back(tiles_);
        ++tiles_;
        open_entries_ += entries;
        if (open_entries_ >= kEntriesPerGroup) open_entries_ = 0;
    }

    // Splits the tiles among this many workers, or fewer if there are few tiles; returns how many. Call once, after all
    // calls of add().
    int64_t split(int64_t workers) {
        const int64_t groups = int64_t(starts_.size());
        starts_.push_back(tiles_);
        workers = workers < groups ? workers : groups;
        ranges_ = std::vector<Range>(workers);
        for (int64_t w = 0; w < workers; ++w) ranges_[w].left = pack(groups * w / workers, groups * (w + 1) / workers);
        return workers;
    }

    // Calls body(tile) for the tiles that a worker takes, until none is left.
    template <class Body>
    void for_each(int64_t worker, Body body) {
        for (int64_t begin, end; take(worker, begin, end);) {
            for (int64_t t = begin; t < end; ++t) body(t);
        }
    }

    // Takes the next group for a worker, tiles [begin, end); false when none is left.
    bool take(int64_t worker, int64_t& begin, int64_t& end) {
        const int64_t workers = int64_t(ranges_.size());
        for (int64_t i = 0; i < workers; ++i) {
            std::atomic<uint64_t>& left = ranges_[(worker + i) % workers].left;
            for (uint64_t seen = left.load(); first(seen) < last(seen);) {
                const bool own = i == 0;
                const int64_t group = own ? first(seen) : last(seen) - 1;
                const uint64_t rest = own ? pack(group + 1, last(seen)) : pack(first(seen), group);
                if (!left.compare_exchange_weak(seen, rest)) continue;
                begin = starts_[group];
                end = starts_[group + 1];
                return true;
            }
        }
        return false;
    }

  private:
    // The groups left in a range, [first, last), in one word.
    struct alignas(64) Range {
        std::atomic<uint64_t> left{0};
    };
    static uint64_t pack(int64_t first, int64_t last) { return uint64_t(first) << 32 | uint64_t(last); }
    static int64_t first(uint64_t range) { return int64_t(range >> 32); }
    static int64_t last(uint64_t range) { return int64_t(range & 0xffffffff); }

    std::vector<int64_t> starts_;
    std::vector<Range> ranges_;
    int64_t tiles_ = 0;
    int64_t open_entries_ = 0;
};

}  // namespace ltp
