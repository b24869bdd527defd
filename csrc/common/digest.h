// The digest of a tile: the 128-bit XXH3 (xxhash.com) of its bytes, filled up with zeros to whole blocks, so that only
// the algorithm for long inputs is needed. ltp_sparse/weights/digests.py says what digests are for.
#pragma once

#include "platform.h"

namespace ltp {

struct Digest {
    uint64_t low, high;
};

// Bytes. A block is 16 stripes of eight words of 64 bits, one for each lane.
constexpr int64_t kDigestBlock = 1024, kStripe = 64;
constexpr int kStripes = 16;

constexpr uint32_t kPrime32_1 = 0x9E3779B1, kPrime32_2 = 0x85EBCA77, kPrime32_3 = 0xC2B2AE3D;
constexpr uint64_t kPrime64_1 = 0x9E3779B185EBCA87, kPrime64_2 = 0xC2B2AE3D27D4EB4F, kPrime64_3 = 0x165667B19E3779F9,
                   kPrime64_4 = 0x85EBCA77C2B2AE63, kPrime64_5 = 0x27D4EB2F165667C5;

// The secret of XXH3, as little-endian words. Stripe s of a block takes words s to s + 7.
constexpr uint64_t kSecret[24] = {
    0xBE4BA423396CFEB8, 0x1CAD21F72C81017C, 0xDB979083E96DD4DE, 0x1F67B3B7A4A44072, 0x78E5C0CC4EE679CB,
    0x2172FFCC7DD05A82, 0x8E2443F7744608B8, 0x4C263A81E69035E0, 0xCB00C391BB52283C, 0xA32E531B8B65D088,
    0x4EF90DA297486471, 0xD8ACDEA946EF1938, 0x3F349CE33F76FAA8, 0x1D4F0BC7C7BBDCF9, 0x3159B4CD4BE0518A,
    0x647378D9C97E9FC8, 0xC3EBD33483ACC5EA, 0xEB6313FAFFA081C5, 0x49DAF0B751DD0D17, 0x9E68D429265516D3,
    0xFCA1477D58BE162B, 0xCE31D07AD1B8F88F, 0x280416958F3ACB45, 0x7E404BBBCAFBD7AF,
};

// The word that starts at any byte of the secret.
LTP_HD constexpr uint64_t secret_at(int byte) {
    const int word = byte / 8, shift = byte % 8 * 8;
    return shift == 0 ? kSecret[word] : kSecret[word] >> shift | kSecret[word + 1] << (64 - shift);
}

// Where the secret of the last stripe starts, in bytes, and that of the scrambling after every block except the last,
// in words.
constexpr int kLastStripe = 121, kScrambling = 16;

constexpr uint64_t kDigestStart[8] = {kPrime32_3, kPrime64_1, kPrime64_2, kPrime64_3,
                                      kPrime64_4, kPrime32_2, kPrime64_5, kPrime32_1};

// The two halves of the 128 bits of a * b, combined by xor.
LTP_HD uint64_t folded_product(uint64_t a, uint64_t b) {
    const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
    return uint64_t(product) ^ uint64_t(product >> 64);
}

LTP_HD uint64_t merged(const uint64_t* lanes, int secret, uint64_t sum) {
    for (int i = 0; i < 8; i += 2) {
        sum += folded_product(lanes[i] ^ secret_at(secret + 8 * i), lanes[i + 1] ^ secret_at(secret + 8 * i + 8));
    }
    sum = (sum ^ sum >> 37) * 0x165667919E3779F9;
    return sum ^ sum >> 32;
}

// nbytes: bytes of the tile, with the added zeros.
LTP_HD Digest digest_of(const uint64_t* lanes, uint64_t nbytes) {
    return {merged(lanes, 11, nbytes * kPrime64_1), merged(lanes, 117, ~(nbytes * kPrime64_2))};
}

}  // namespace ltp
