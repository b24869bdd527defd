// Tile kernel of the digests, over the lanes of a lanes_*.h included before.
#pragma once

#include <cstring>

#include "../common/digest.h"
#include "kernels.h"

namespace ltp {
namespace {

inline void add_stripes(DigestLanes& lanes, const char* block, int count) {
    for (int s = 0; s < count; ++s) lanes.add(block + kStripe * s, kSecret + s);
}

Digest digest(const void* bytes, int64_t nbytes) {
    const char* const tile = static_cast<const char*>(bytes);
    const int64_t blocks = (nbytes + kDigestBlock - 1) / kDigestBlock, last = (blocks - 1) * kDigestBlock;
    DigestLanes lanes(kDigestStart);
    for (int64_t at = 0; at < last; at += kDigestBlock) {
        add_stripes(lanes, tile + at, kStripes);
        lanes.scramble(kSecret + kScrambling);
    }
    char block[kDigestBlock] = {};
    memcpy(block, tile + last, nbytes - last);
    add_stripes(lanes, block, kStripes - 1);
    uint64_t secret[8], sums[8];
    for (int i = 0; i < 8; ++i) secret[i] = secret_at(kLastStripe + 8 * i);
    lanes.add(block + kStripe * (kStripes - 1), secret);
    lanes.store(sums);
    return digest_of(sums, blocks * kDigestBlock);
}

}  // namespace
}  // namespace ltp
