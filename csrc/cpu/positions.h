// Table lookups that turn a bitmap into positions.
#pragma once

#include <cstdint>
#include <cstring>

namespace ltp {
namespace {

// For every byte, the positions of its set bits in ascending order; the rest of a row is 0.
struct BytePositions {
    uint16_t row[256][8];

    constexpr BytePositions() : row() {
        for (int byte = 0; byte < 256; ++byte) {
            int rank = 0;
            for (int bit = 0; bit < 8; ++bit) {
                if (byte >> bit & 1) row[byte][rank++] = uint16_t(bit);
            }
        }
    }
};
constexpr BytePositions kBytePositions;

}  // namespace
}  // namespace ltp
