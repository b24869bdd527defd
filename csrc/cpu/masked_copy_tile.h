// Copies the active entries of one tile between a tensor and their slots, bit by bit. Only the size of an item matters.
#pragma once

#include <algorithm>
#include <cstring>

#include "active_entries.h"

namespace ltp {
namespace {

// Item: the unsigned integer of that size.
template <class Item>
class EntryCopy {
  public:
    explicit EntryCopy(const EntryTile& tile)
        : tile_(tile), items_(static_cast<Item*>(tile.items)), slots_(static_cast<Item*>(tile.slots)) {}

    template <Copy HOW>
    void run() const {
        if (tile_.encoding == Encoding::kFull) return move_range<HOW>(items_, slots_, tile_.length);
        if (tile_.encoding == Encoding::kList16) return move_listed<HOW>(tile_.positions);
        if constexpr (kLanes) {
            if (kSparse * tile_.active > tile_.length) return move_groups<HOW>();
        }
        uint16_t positions[kTile + 64];
        decode_tile(tile_, positions);
        move_listed<HOW>(positions);
    }

  private:
    static constexpr bool kLanes = sizeof(Item) == 4 ? kPacksLanes : sizeof(Item) == 2 && kPacksHalf;
    using Lane = std::conditional_t<sizeof(Item) == 4, float, Item>;

    static Lane* lanes(Item* items) { return reinterpret_cast<Lane*>(items); }

    template <Copy HOW>
    static void move_range(Item* items, Item* slots, int64_t count) {
        if (HOW == Copy::kGather) memcpy(slots, items, size_t(count) * sizeof(Item));
        if (HOW == Copy::kScatter) memcpy(items, slots, size_t(count) * sizeof(Item));
        if (HOW == Copy::kSwap) std::swap_ranges(items, items + count, slots);
    }

    template <Copy HOW>
    LTP_INLINE static void move_item(Item& item, Item& slot) {
        const Item old = item;
        if (HOW != Copy::kGather) item = slot;
        if (HOW != Copy::kScatter) slot = old;
    }

    template <Copy HOW>
    void move_listed(const uint16_t* positions) const {
        // Entries of a list are far apart in memory. The second cache holds more loads in flight than the first.
        const auto fetch = [&](int64_t i) { __builtin_prefetch(items_ + positions[i], 0, 1); };
        for (int64_t i = 0; i < std::min(kListAhead, tile_.active); ++i) fetch(i);
        for (int64_t i = 0; i < tile_.active; ++i) {
            if (i + kListAhead < tile_.active) fetch(i + kListAhead);
            move_item<HOW>(items_[positions[i]], slots_[i]);
        }
    }

    // Lanes read 64 items and write up to 64. At the end of the tensor or of the slots, items go through a buffer or
    // singly.
    template <Copy HOW>
    void move_groups() const {
        Item taken[64], given[64];
        int64_t slot = 0;
        for (int64_t group = 0; 64 * group < tile_.length; ++group) {
            uint64_t bits = load_group(tile_.words, group);
            Item *items = items_ + 64 * group, *slots = slots_ + slot;
            const int64_t count = count_bits(bits);
            slot += count;
            if (64 * group + 64 > tile_.length) {
                for (; bits != 0; bits &= bits - 1) move_item<HOW>(items[__builtin_ctzll(bits)], *slots++);
                break;
            }
            const bool room = slot - count + 64 <= tile_.active;
            if (HOW == Copy::kGather) {
                pack(lanes(items), bits, lanes(room ? slots : taken));
                if (!room) memcpy(slots, taken, size_t(count) * sizeof(Item));
                continue;
            }
            if (HOW == Copy::kSwap) pack(lanes(items), bits, lanes(taken));
            if (!room) memcpy(given, slots, size_t(count) * sizeof(Item));
            unpack(lanes(room ? slots : given), bits, lanes(items));
            if (HOW == Copy::kSwap) memcpy(slots, taken, size_t(count) * sizeof(Item));
        }
    }

    const EntryTile& tile_;
    Item *items_, *slots_;
};

template <class Item>
void copy_items(const EntryTile& tile) {
    const EntryCopy<Item> copy(tile);
    if (tile.how == Copy::kGather) copy.template run<Copy::kGather>();
    if (tile.how == Copy::kScatter) copy.template run<Copy::kScatter>();
    if (tile.how == Copy::kSwap) copy.template run<Copy::kSwap>();
}

void copy_entries(const EntryTile& tile) {
    if (tile.item_bytes == 1) copy_items<uint8_t>(tile);
    if (tile.item_bytes == 2) copy_items<uint16_t>(tile);
    if (tile.item_bytes == 4) copy_items<uint32_t>(tile);
    if (tile.item_bytes == 8) copy_items<uint64_t>(tile);
}

}  // namespace
}  // namespace ltp
