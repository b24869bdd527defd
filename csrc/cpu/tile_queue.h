// Hands out tiles to threads: consecutive tiles in groups of enough work that the shared counter costs nothing.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

namespace ltp {

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

    int64_t groups() const { return int64_t(starts_.size()); }

    // Takes the next group, tiles [begin, end); false when none is left.
    bool take(int64_t& begin, int64_t& end) {
        const int64_t group = next_.fetch_add(1, std::memory_order_relaxed);
        if (group >= groups()) return false;
        begin = starts_[group];
        end = group + 1 < groups() ? starts_[group + 1] : tiles_;
        return true;
    }

  private:
    std::vector<int64_t> starts_;
    int64_t tiles_ = 0;
    int64_t open_entries_ = 0;
    std::atomic<int64_t> next_{0};
};

}  // namespace ltp
