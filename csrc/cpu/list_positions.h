// The list of a bitmap: the positions of its set bits.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>

namespace ltp {

// Writes the position of each set bit, its lowest 16 bits: of an entry of a parameter, the position in its tile.
// k: the set bits; another number of them is an error, and nothing beyond `to` + k is written.
inline void list_positions(const uint32_t* words, int64_t n_words, uint16_t* to, int64_t k) {
    int64_t found = 0;
    for (int64_t group = 0; group < n_words / 2; ++group) {
        uint64_t bits;
        memcpy(&bits, words + 2 * group, sizeof bits);
        for (; bits != 0 && found < k; bits &= bits - 1) to[found++] = uint16_t(64 * group + __builtin_ctzll(bits));
        if (bits != 0) throw std::invalid_argument("the bitmap has more bits set than expected");
    }
    if (found != k) throw std::invalid_argument("the bitmap has fewer bits set than expected");
}

}  // namespace ltp
