#include "pack.h"

#include <cstring>

#include "affine.h"
#include "super_blocks.h"

namespace ondevice::cpu {
namespace {

uint32_t load4(const uint8_t* p) {
    uint32_t four;
    std::memcpy(&four, p, 4);
    return four;
}

// Sources: codes(row, block, out) gives the codes of columns 32 block ...; number(row, group, which, out) the scale
// (0) or bias (1) of a group, as it is stored. Rows of all experts are counted through. Where nibbles(row, block)
// stands, it gives the same codes as 16 bytes: columns 0 to 15 in the low halves, 16 to 31 in the high ones, as four
// quads of a tile lie in its plane of 4 bits.

struct Nibbles {
    uint64_t half[2];
};

// Eight nibbles, the lowest first, to eight bytes.
uint64_t pairs(uint64_t nibbles) {
    nibbles = (nibbles | nibbles << 16) & 0x0000ffff0000ffff;
    nibbles = (nibbles | nibbles << 8) & 0x00ff00ff00ff00ff;
    return (nibbles | nibbles << 4) & 0x0f0f0f0f0f0f0f0f;
}

template <int bits>
struct Stream {
    static constexpr bool kNibbles = bits == 4;
    AffineParts from;
    int64_t row_bytes, groups, number_bytes;

    Stream(const AffineParts& parts, const Tiles& to)
        : from(parts),
          row_bytes(to.columns / 8 * bits),
          groups(to.columns / to.group),
          number_bytes(size_of(to.scale_type)) {}

    void codes(int64_t row, int64_t block, Codes& out) const {
        const uint8_t* at = from.codes + row * row_bytes + block * kBlock / 8 * bits;
        for (int eight = 0; eight < 4; eight++, at += bits) unpack_eight<bits>(at, out + 8 * eight);
    }
    Nibbles nibbles(int64_t row, int64_t block) const {  // eight neighbours fill four bytes, the even ones low
        const uint8_t* at = from.codes + row * row_bytes + block * 16;
        Nibbles out;
        for (int half = 0; half < 2; half++) {
            out.half[half] = pairs(load4(at + 4 * half)) | pairs(load4(at + 8 + 4 * half)) << 4;
        }
        return out;
    }
    void number(int64_t row, int64_t group, int which, uint8_t* out) const {
        const uint8_t* numbers = which ? from.biases : from.scales;
        numbers += (row * groups + group) * number_bytes;
        if (number_bytes == 2) std::memcpy(out, numbers, 2);
        else std::memcpy(out, numbers, 4);
    }
};

template <int bits, bool biased>
struct Legacy {
    static constexpr bool kNibbles = bits == 4;
    static constexpr int64_t kHigh = biased ? 4 : 2, kLow = kHigh + (bits == 5 ? 4 : 0);
    static constexpr int64_t kBytes = kLow + (bits == 8 ? 32 : 16);
    const uint8_t* data;
    int64_t blocks;

    Legacy(const LegacyBlocks& from, const Tiles& to) : data(from.data), blocks(to.columns / kBlock) {}

    void codes(int64_t row, int64_t block, Codes& out) const {
        const uint8_t *at = data + (row * blocks + block) * kBytes, *low = at + kLow;
        if constexpr (bits == 8) {
            for (int i = 0; i < kBlock; i++) out[i] = low[i] ^ 0x80;
            return;
        }
        for (int i = 0; i < 16; i += 8) {  // low nibbles are the first 16 columns, high ones the last
            const uint64_t eight = load8(low + i), mask = 0x0f0f0f0f0f0f0f0f;
            const uint64_t first = eight & mask, last = eight >> 4 & mask;
            std::memcpy(out + i, &first, 8);
            std::memcpy(out + 16 + i, &last, 8);
        }
        if constexpr (bits == 5) {
            const uint32_t high = load4(at + kHigh);
            for (int i = 0; i < kBlock; i++) out[i] |= (high >> i & 1) << 4;
        }
    }
    Nibbles nibbles(int64_t row, int64_t block) const {
        const uint8_t* low = data + (row * blocks + block) * kBytes + kLow;
        return Nibbles{{load8(low), load8(low + 8)}};
    }
    void number(int64_t row, int64_t group, int which, uint8_t* out) const {
        std::memcpy(out, data + (row * blocks + group) * kBytes + 2 * which, 2);
    }
};

template <class Block>
struct Blocked {
    static constexpr bool kNibbles = Block::kNibbles;
    static constexpr int64_t kSpan = Block::kColumns / kBlock, kGroups = Block::kColumns / Block::kGroup;
    const Block* data;
    int64_t blocks;  // in a row

    Blocked(const uint8_t* octets, const Tiles& to)
        : data(reinterpret_cast<const Block*>(octets)), blocks(to.columns / Block::kColumns) {
        static_assert(alignof(Block) == 1, "blocks lie at any address");
    }

    void codes(int64_t row, int64_t block, Codes& out) const {
        data[row * blocks + block / kSpan].codes(static_cast<int>(block % kSpan), out);
    }
    Nibbles nibbles(int64_t row, int64_t block) const {
        Codes all;
        codes(row, block, all);
        return Nibbles{{load8(all) | load8(all + 16) << 4, load8(all + 8) | load8(all + 24) << 4}};
    }
    void number(int64_t row, int64_t group, int which, uint8_t* out) const {
        const float value = data[row * blocks + group / kGroups].number(static_cast<int>(group % kGroups), which);
        std::memcpy(out, &value, 4);
    }
};

template <int bits>
void put_codes(const Codes& codes, int row, uint8_t* block) {
    for (int q = 0; q < 8; q++) {
        Field field[2];
        const int count = fields(bits, q, field);
        for (int i = 0; i < count; i++) {
            const Field& f = field[i];
            const uint32_t mask = ((1u << f.count) - 1) * 0x01010101u;
            uint32_t four = load4(codes + 4 * q) >> f.to & mask;
            if (bits == 8) four ^= 0x80808080u;
            uint8_t* at = block + kLine * f.line + 4 * row;
            four = f.from ? load4(at) | four << f.from : four;  // fields come lowest first: the first one clears
            std::memcpy(at, &four, 4);
        }
    }
}

void put_nibbles(const Nibbles& nibbles, int row, uint8_t* block) {
    for (int q = 0; q < 4; q++) {
        const auto four = static_cast<uint32_t>(nibbles.half[q / 2] >> 32 * (q % 2));
        std::memcpy(block + kLine * q + 4 * row, &four, 4);
    }
}

template <int bits, class Source>
void put(const Source& from, int64_t row, int64_t block, int r, uint8_t* to) {
    if constexpr (Source::kNibbles) return put_nibbles(from.nibbles(row, block), r, to);
    Codes codes;
    from.codes(row, block, codes);
    put_codes<bits>(codes, r, to);
}

template <int bits, class Source>
void pack_tile(const Source& from, const Tiles& to, int64_t first_row, int rows, uint8_t* tile) {
    const int64_t units = to.columns / to.unit(), blocks = to.unit() / kBlock, groups = to.unit() / to.group;
    const int64_t unit_bytes = to.unit_bytes(), code_bytes = to.code_bytes(), line = to.scales_bytes();
    const int64_t number = size_of(to.scale_type);
    for (int64_t unit = 0; unit < units; unit++, tile += unit_bytes) {
        uint8_t* numbers = tile + blocks * code_bytes;
        for (int r = 0; r < rows; r++) {
            for (int64_t b = 0; b < blocks; b++)
                put<bits>(from, first_row + r, unit * blocks + b, r, tile + b * code_bytes);
            for (int which = 0; which < (to.biased ? 2 : 1); which++)
                for (int64_t g = 0; g < groups; g++)
                    from.number(first_row + r, unit * groups + g, which, numbers + (which * groups + g) * line + r * number);
        }
    }
}

template <int bits, class Source>
void pack_all(const Source& from, Tiles& to, Pool& pool) {
    const int64_t tiles = to.experts * to.tiles();
    pool.run(tiles, [&](int64_t index, int) {
        const int64_t expert = index / to.tiles(), row = index % to.tiles() * kRows;
        const int rows = static_cast<int>(to.rows - row < kRows ? to.rows - row : kRows);
        uint8_t* tile = to.data + index * to.tile_bytes();
        if (rows < kRows) std::memset(tile, 0, static_cast<size_t>(to.tile_bytes()));
        pack_tile<bits>(from, to, expert * to.rows + row, rows, tile);
    });
}

template <int bits>
void pack_stream(const AffineParts& from, Tiles& to, Pool& pool) {
    if (from.bits == bits) pack_all<bits>(Stream<bits>(from, to), to, pool);
    else pack_all<bits>(Stream<8>(from, to), to, pool);
}

template <class Block>
Tiles tiles_of(int64_t experts, int64_t rows, int64_t columns) {
    return {Block::kBits, Block::kGroup, Number::f32, Block::kBiased, Block::kZero, experts, rows, columns, nullptr};
}

template <class Block>
void pack_blocks(const uint8_t* blocks, Tiles& to, Pool& pool) {
    pack_all<Block::kBits>(Blocked<Block>(blocks, to), to, pool);
}

template <class Block>
constexpr Kind kind(const char* name) {
    return {name, Block::kColumns, sizeof(Block), tiles_of<Block>, pack_blocks<Block>};
}

constexpr Kind kKinds[] = {kind<Q2K>("Q2_K"), kind<Q3K>("Q3_K"), kind<Q4K>("Q4_K"),
                           kind<Q5K>("Q5_K"), kind<Q6K>("Q6_K"), kind<MXFP4>("MXFP4")};

template <int bits>
void unpack_codes(const uint8_t* block, int row, Codes& out) {
    for (int q = 0; q < 8; q++) {
        Field field[2];
        const int count = fields(bits, q, field);
        uint32_t codes = 0;
        for (int i = 0; i < count; i++) {
            const Field& f = field[i];
            const uint32_t mask = ((1u << f.count) - 1) * 0x01010101u;
            codes |= (load4(block + kLine * f.line + 4 * row) >> f.from & mask) << f.to;
        }
        if (bits == 8) codes ^= 0x80808080u;
        std::memcpy(out + 4 * q, &codes, 4);
    }
}

void unpack_codes(int bits, const uint8_t* block, int row, Codes& out) {
    switch (bits) {
        case 2: return unpack_codes<2>(block, row, out);
        case 3: return unpack_codes<3>(block, row, out);
        case 4: return unpack_codes<4>(block, row, out);
        case 5: return unpack_codes<5>(block, row, out);
        case 6: return unpack_codes<6>(block, row, out);
        case 8: return unpack_codes<8>(block, row, out);
    }
}

float number_at(const uint8_t* data, int64_t index, Number type) {
    if (type == Number::f16) return widen(reinterpret_cast<const half*>(data)[index]);
    if (type == Number::bf16) return widen(reinterpret_cast<const bfloat*>(data)[index]);
    return reinterpret_cast<const float*>(data)[index];
}

}  // namespace

void pack(const AffineParts& from, Tiles& to, Pool& pool) {
    switch (to.bits) {
        case 2: return pack_stream<2>(from, to, pool);
        case 3: return pack_stream<3>(from, to, pool);
        case 4: return pack_stream<4>(from, to, pool);
        case 5: return pack_stream<5>(from, to, pool);
        case 6: return pack_stream<6>(from, to, pool);
        case 8: return pack_stream<8>(from, to, pool);
    }
}

void pack(const LegacyBlocks& from, Tiles& to, Pool& pool) {
    switch (to.bits * 2 + to.biased) {
        case 8: return pack_all<4>(Legacy<4, false>(from, to), to, pool);
        case 9: return pack_all<4>(Legacy<4, true>(from, to), to, pool);
        case 10: return pack_all<5>(Legacy<5, false>(from, to), to, pool);
        case 11: return pack_all<5>(Legacy<5, true>(from, to), to, pool);
        case 16: return pack_all<8>(Legacy<8, false>(from, to), to, pool);
    }
}

const Kind* find_kind(const std::string& name) {
    for (const Kind& kind : kKinds)
        if (name == kind.name) return &kind;
    return nullptr;
}

void unpack_row(const Tiles& w, int64_t expert, int64_t row, float* out) {
    const uint8_t* tile = w.tile(expert, row / kRows);
    const int r = static_cast<int>(row % kRows);
    const int64_t blocks = w.unit() / kBlock, groups = w.unit() / w.group;
    for (int64_t unit = 0; unit < w.columns / w.unit(); unit++, tile += w.unit_bytes(), out += w.unit()) {
        const uint8_t* numbers = tile + blocks * w.code_bytes();
        for (int64_t b = 0; b < blocks; b++) {
            Codes codes;
            unpack_codes(w.bits, tile + b * w.code_bytes(), r, codes);
            for (int i = 0; i < kBlock; i++) {
                const int64_t column = b * kBlock + i, group = column / w.group;
                const float scale = number_at(numbers, group * kRows + r, w.scale_type);
                const float bias = w.biased ? number_at(numbers, (groups + group) * kRows + r, w.scale_type) : 0.0f;
                out[column] = scale * (static_cast<float>(codes[i]) - w.zero) + bias;
            }
        }
    }
}

}  // namespace ondevice::cpu
