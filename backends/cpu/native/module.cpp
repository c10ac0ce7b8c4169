// The Python face of the kernels: arrays become pointers and sizes, sizes are checked against one another.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <stdexcept>

#include "affine.h"
#include "machine.h"
#include "moments.h"
#include "pack.h"
#include "stack.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace ondevice::cpu {
namespace {

template <class T>
using Array = nb::ndarray<T, nb::c_contig, nb::device::cpu>;
using Out = Array<float>;
using In = Array<const float>;
using Ints = Array<const int32_t>;
using Bytes = Array<const uint8_t>;
using Maybe = std::optional<In>;

void require(bool fits, const char* what) {
    if (!fits) throw std::invalid_argument(what);
}

const float* data(const Maybe& a) { return a ? a->data() : nullptr; }

int64_t size(const Maybe& a) { return a ? static_cast<int64_t>(a->size()) : 0; }

int64_t last(const In& a) { return static_cast<int64_t>(a.shape(a.ndim() - 1)); }

Number number(const std::string& dtype) {
    if (dtype == "float32") return Number::f32;
    if (dtype == "float16") return Number::f16;
    if (dtype == "bfloat16") return Number::bf16;
    if (dtype == "int8") return Number::i8;
    throw std::invalid_argument("no such type: " + dtype);
}

template <class Arguments>
void call(Machine& machine, Kernel<Arguments> kernel, const Arguments& arguments) {
    nb::gil_scoped_release others_may_run;
    machine.call(kernel, arguments);
}

// ---- weights

// A matrix, or a stack of them, with the memory it lies in.
struct Weight {
    std::shared_ptr<uint8_t> room;    // of tiles
    nb::object owner;                 // of dense numbers
    std::shared_ptr<Fetching> stack;  // of matrices that come and go; `tiles` and `matrix` are then like theirs
    int64_t bytes = 0;                // of memory of its own
    Tiles tiles{};
    Matrix matrix{};

    const Matrix like() const {
        Matrix m = matrix;
        if (tiled()) m.tiles = &tiles;
        return m;
    }
    const Matrix at(int64_t expert) const {
        if (stack) return (*stack)[expert];
        Matrix m = like();
        m.expert = expert;
        if (!tiled()) m.dense = static_cast<const uint8_t*>(m.dense) + expert * m.rows * m.columns * size_of(m.type);
        return m;
    }
    bool tiled() const { return tiles.bits != 0; }
};

// Keeps one of a weight's matrices in memory for as long as it lives, and other threads from calling the machine.
class Keeping {
  public:
    Keeping(Machine& machine, const Weight& weight, int64_t expert) {
        if (!weight.stack) return;
        require(!machine.plan, "a plan would outlive the expert");
        const auto id = static_cast<int32_t>(expert);
        nb::gil_scoped_release others_may_run;
        turn_ = std::unique_lock(machine.pool().turn);
        weight.stack->need(&id, 1);
    }

  private:
    std::unique_lock<std::recursive_mutex> turn_;
};

// Shares what Python made with threads that do not hold its lock.
template <class T>
std::shared_ptr<T> shared_with_python(T&& value) {
    return {new T(std::move(value)), [](T* held) {
                nb::gil_scoped_acquire turn;
                delete held;
            }};
}

// own: the numbers lie in memory of their own, not in a file's pages
std::shared_ptr<Weight> dense(nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu> a, const std::string& dtype, int64_t rows,
                              int64_t columns, bool own) {
    auto weight = std::make_shared<Weight>();
    weight->matrix = Matrix{a.data(), number(dtype), rows, columns, nullptr, 0};
    require(static_cast<int64_t>(a.nbytes()) >= rows * columns * size_of(weight->matrix.type), "too few numbers");
    weight->owner = nb::cast(a);
    weight->bytes = own ? static_cast<int64_t>(a.nbytes()) : 0;
    return weight;
}

// panels [rows / 16][columns][16]: see Matrix
std::shared_ptr<Weight> panels(nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu> a, const std::string& dtype,
                               int64_t rows) {
    require(a.ndim() == 3 && a.shape(2) == kRows && static_cast<int64_t>(a.shape(0)) == (rows + kRows - 1) / kRows, "panels");
    auto weight = dense(a, dtype, static_cast<int64_t>(a.shape(0)) * kRows, static_cast<int64_t>(a.shape(1)), true);
    weight->matrix.rows = rows;
    weight->matrix.panels = true;
    return weight;
}

// alone: the memory is given back with them
std::shared_ptr<Weight> empty_tiles(Machine& machine, const Tiles& shape, bool alone) {
    auto weight = std::make_shared<Weight>();
    weight->tiles = shape;
    weight->bytes = shape.bytes();
    weight->room = alone ? Shelf::alone(weight->bytes) : machine.shelf().take(weight->bytes);
    weight->tiles.data = weight->room.get();
    weight->matrix = Matrix{nullptr, Number::f32, shape.rows, shape.columns, nullptr, 0};
    return weight;
}

std::shared_ptr<Weight> pack_affine(Machine& machine, Bytes codes, int stored_bits, Bytes scales,
                                    std::optional<Bytes> biases, const std::string& dtype, int bits, int group,
                                    float zero, int64_t experts, int64_t rows, int64_t columns, bool alone) {
    const Tiles shape{bits, group, number(dtype), biases.has_value(), zero, experts, rows, columns, nullptr};
    const int64_t numbers = experts * rows * (columns / group) * size_of(shape.scale_type);
    require(columns % shape.unit() == 0, "columns are no multiple of the group");
    require(static_cast<int64_t>(codes.nbytes()) == experts * rows * columns / 8 * stored_bits, "codes do not fit");
    require(static_cast<int64_t>(scales.nbytes()) == numbers, "scales do not fit");
    require(!biases || static_cast<int64_t>(biases->nbytes()) == numbers, "biases do not fit");
    auto weight = empty_tiles(machine, shape, alone);
    const AffineParts parts{codes.data(), stored_bits, scales.data(), biases ? biases->data() : nullptr};
    nb::gil_scoped_release others_may_run;
    machine.run([&] { pack(parts, weight->tiles, machine.pool()); });
    return weight;
}

std::shared_ptr<Weight> pack_legacy(Machine& machine, Bytes blocks, int bits, bool biased, int64_t experts,
                                    int64_t rows, int64_t columns, bool alone) {
    const float zero = biased ? 0.0f : static_cast<float>(1 << (bits - 1));
    const int64_t block = 4 * bits + (biased ? 4 : 2);
    require(columns % kBlock == 0, "columns are no multiple of the block");
    require(static_cast<int64_t>(blocks.nbytes()) == experts * rows * (columns / kBlock) * block, "blocks do not fit");
    auto weight =
        empty_tiles(machine, Tiles{bits, kBlock, Number::f16, biased, zero, experts, rows, columns, nullptr}, alone);
    const LegacyBlocks from{blocks.data()};
    nb::gil_scoped_release others_may_run;
    machine.run([&] { pack(from, weight->tiles, machine.pool()); });
    return weight;
}

std::shared_ptr<Weight> pack_blocks(Machine& machine, Bytes blocks, const std::string& name, int64_t experts, int64_t rows,
                                    int64_t columns, bool alone) {
    const Kind* kind = find_kind(name);
    require(kind, "no such kind of blocks");
    require(columns % kind->columns == 0, "columns are no multiple of the block");
    require(static_cast<int64_t>(blocks.nbytes()) == experts * rows * (columns / kind->columns) * kind->bytes, "blocks do not fit");
    auto weight = empty_tiles(machine, kind->tiles(experts, rows, columns), alone);
    nb::gil_scoped_release others_may_run;
    machine.run([&] { kind->pack(blocks.data(), weight->tiles, machine.pool()); });
    return weight;
}

// Matrices that fetch(index) gives, each a Weight, when they are needed.
std::shared_ptr<Weight> stack(Machine& machine, nb::callable fetch, int64_t experts) {
    const auto ask = shared_with_python(std::move(fetch));
    auto weight = std::make_shared<Weight>();
    weight->stack = std::make_shared<Fetching>(machine.residents, experts, [ask](int64_t expert) {
        nb::gil_scoped_acquire turn;
        auto one = shared_with_python(nb::cast<std::shared_ptr<Weight>>((*ask)(expert)));
        return Fetched{(*one)->at(0), (*one)->bytes, one};
    });
    const Keeping first(machine, *weight, 0);
    weight->matrix = weight->at(0);
    if (weight->matrix.tiles) weight->tiles = *weight->matrix.tiles;
    weight->tiles.data = nullptr;
    weight->matrix.tiles = nullptr;
    return weight;
}

// ---- activations in int8

struct Activations {
    Buffer buffer;
    Quantized view;

    Activations(int64_t tokens, int64_t columns, int block)
        : buffer(padded_tokens(tokens, block) * (columns + 2 * columns / kHalf * int64_t{sizeof(float)})) {
        const int64_t places = padded_tokens(tokens, block);
        auto* scales = reinterpret_cast<float*>(buffer.as() + places * columns);
        view = Quantized{buffer.as<int8_t>(), scales, scales + places * (columns / kHalf), tokens, columns};
    }
};

std::shared_ptr<Activations> quantize(Machine& machine, In x) {
    const int64_t columns = last(x), tokens = static_cast<int64_t>(x.size()) / columns;
    require(columns % kBlock == 0, "columns are no multiple of 32");
    auto made = std::make_shared<Activations>(tokens, columns, machine.kernels().tokens);
    call(machine, machine.kernels().quantize, Quantize{x.data(), made->view});
    return made;
}

// The two halves of a LowRank, for all the activations that they will meet.
struct Adapter {
    std::shared_ptr<Weight> down, up;
    float scale;

    Adapter(std::shared_ptr<Weight> narrow, std::shared_ptr<Weight> wide, float factor)
        : down(std::move(narrow)), up(std::move(wide)), scale(factor) {
        require(!down->tiled() && !down->matrix.panels && up->matrix.panels, "down is dense, up in panels");
        require(up->matrix.columns == down->matrix.rows, "ranks differ");
    }

    LowRank change(const float* x, const Matrix& w) const {
        require(down->matrix.columns == w.columns && up->matrix.rows == w.rows, "adapter and weight do not fit");
        return {x, down->at(0), up->at(0), scale};
    }
};

// plain: the float32 numbers of x, for an adapter
void linear_int8(Machine& machine, const Activations& x, const Weight& weight, Maybe bias, Maybe plain,
                 const Adapter* adapter, Out out) {
    const Matrix w = weight.at(0);
    require(w.tiles && x.view.columns == w.columns, "activations and weight do not fit");
    require(static_cast<int64_t>(out.size()) == x.view.tokens * w.rows && (!bias || size(bias) == w.rows), "sizes");
    require(!adapter || size(plain) == x.view.tokens * w.columns, "activations and their plain numbers do not fit");
    const LowRank change = adapter ? adapter->change(plain->data(), w) : LowRank{};
    call(machine, machine.kernels().linear_int8, LinearInt8{x.view, {Product{w, data(bias), out.data(), change}}, 1});
}

void linear_float(Machine& machine, In x, const Weight& weight, Maybe bias, const Adapter* adapter, Out out) {
    const Matrix w = weight.at(0);
    const int64_t tokens = static_cast<int64_t>(x.size()) / w.columns;
    require(last(x) == w.columns, "activations and weight do not fit");
    require(static_cast<int64_t>(out.size()) == tokens * w.rows && (!bias || size(bias) == w.rows), "sizes");
    const LowRank change = adapter ? adapter->change(x.data(), w) : LowRank{};
    call(machine, machine.kernels().linear_float,
         LinearFloat{x.data(), tokens, Product{w, data(bias), out.data(), change}});
}

// scale x . weight^T, or, `back`, scale x . weight; `turned`: x [depth, tokens] stands for its transpose.
Term term(const In& x, const Weight& weight, int64_t expert, bool back, bool turned, float scale) {
    const Term t{x.data(), weight.at(expert), back, turned, scale};
    const size_t depth = turned ? x.shape(0) : x.shape(x.ndim() - 1);
    require(static_cast<int64_t>(depth) == t.depth() && (!turned || x.ndim() == 2), "activations and weight do not fit");
    return t;
}

// A term, and a second one if x2 is given.
void products(Machine& machine, In x, const Weight& weight, int64_t expert, bool back, bool turned, float scale, Maybe x2,
              const Weight* weight2, float scale2, Maybe bias, bool add, bool narrow, Out out) {
    const Keeping here(machine, weight, expert);
    Products p{{term(x, weight, expert, back, turned, scale)}, 1, data(bias), out.data(), 0, 0, add, narrow};
    p.width = p.terms[0].width();
    p.tokens = static_cast<int64_t>(x.size()) / p.terms[0].depth();
    if (x2) {
        require(weight2 && !weight2->stack, "a second weight is missing");
        p.terms[p.count++] = term(*x2, *weight2, 0, back, turned, scale2);
        require(p.terms[1].width() == p.width, "weights do not fit");
        require(static_cast<int64_t>(x2->size()) == p.tokens * p.terms[1].depth(), "tokens do not fit");
    }
    require(static_cast<int64_t>(out.size()) == p.tokens * p.width && (!bias || size(bias) == p.width), "sizes");
    call(machine, machine.kernels().products, p);
}

void embed_rows(Machine& machine, const Weight& weight, int64_t expert, Ints ids, Out out) {
    const Keeping here(machine, weight, expert);
    const Matrix w = weight.at(expert);
    require(out.size() == ids.size() * static_cast<size_t>(w.columns), "sizes");
    call(machine, &embed, Embed{w, ids.data(), out.data(), static_cast<int64_t>(ids.size())});
}

// ---- everything else

void pairwise(Machine& machine, Kernel<Pairwise> kernel, In a, In b, Out out) {
    require(b.size() && a.size() == out.size() && a.size() % b.size() == 0, "sizes");
    call(machine, kernel,
         Pairwise{a.data(), b.data(), out.data(), static_cast<int64_t>(a.size()), static_cast<int64_t>(b.size())});
}

void single(Machine& machine, Kernel<Single> kernel, In a, float number, Out out) {
    require(a.size() == out.size(), "sizes");
    call(machine, kernel, Single{a.data(), out.data(), static_cast<int64_t>(a.size()), number});
}

void gated(Machine& machine, In gate, Maybe up, int kind, Out out) {
    require(gate.size() == out.size() && (!up || up->size() == gate.size()), "sizes");
    const auto size = static_cast<int64_t>(gate.size());
    call(machine, machine.kernels().gated, Gated{gate.data(), data(up), out.data(), size, Activation(kind)});
}

void gated_back(Machine& machine, In grad, In gate, Maybe up, int kind, Out to_gate, std::optional<Out> to_up) {
    require(grad.size() == gate.size() && to_gate.size() == gate.size() && up.has_value() == to_up.has_value(), "sizes");
    require(!up || (up->size() == gate.size() && to_up->size() == gate.size()), "sizes");
    call(machine, machine.kernels().gated_back,
         GatedBack{grad.data(), gate.data(), data(up), to_gate.data(), to_up ? to_up->data() : nullptr,
                   static_cast<int64_t>(gate.size()), Activation(kind)});
}

void norm_back(Machine& machine, In grad, In x, In gain, float eps, float offset, bool centred, std::optional<Out> to_gain,
               std::optional<Out> to_bias, Out out) {
    const int64_t width = last(x), rows = static_cast<int64_t>(x.size()) / width;
    const int64_t gains = static_cast<int64_t>(gain.size()) / width;
    require(gains > 0 && static_cast<int64_t>(gain.size()) == gains * width && rows % gains == 0, "gains");
    require(grad.size() == x.size() && out.size() == x.size(), "sizes");
    for (const auto& sums : {to_gain, to_bias})
        require(!sums || (gains == 1 && static_cast<int64_t>(sums->size()) == width), "sizes");
    call(machine, machine.kernels().norm_back,
         NormBack{grad.data(), x.data(), gain.data(), out.data(), to_gain ? to_gain->data() : nullptr,
                  to_bias ? to_bias->data() : nullptr, rows, width, gains, eps, offset, centred});
}

void softcap_back(Machine& machine, In grad, In x, float cap, Out out) {
    require(grad.size() == x.size() && out.size() == x.size(), "sizes");
    call(machine, machine.kernels().softcap_back,
         SoftcapBack{grad.data(), x.data(), out.data(), static_cast<int64_t>(x.size()), cap});
}

void token_loss(Machine& machine, In logits, std::optional<Ints> targets, Maybe wanted, Maybe grad, Out out) {
    require(logits.ndim() == 2 && targets.has_value() != wanted.has_value(), "targets, or what is wanted");
    require(targets ? targets->size() == logits.shape(0) : wanted->size() == logits.size(), "sizes");
    const auto rows = static_cast<int64_t>(logits.shape(0)), width = last(logits);
    require(static_cast<int64_t>(out.size()) == (grad ? rows * width : rows) && (!grad || size(grad) == rows), "sizes");
    for (int64_t i = 0; targets && i < rows; i++)
        if (targets->data()[i] >= width) throw std::out_of_range("target");
    call(machine, machine.kernels().token_loss,
         TokenLoss{logits.data(), targets ? targets->data() : nullptr, data(wanted), data(grad), out.data(), rows, width});
}

void adamw(Machine& machine, In param, In grad, Maybe m, Maybe v, int step, float rate, float beta1, float beta2,
           float eps, float decay, Out new_param, Out new_m, Out new_v) {
    const size_t count = param.size();
    require(grad.size() == count && (!m || m->size() == count) && (!v || v->size() == count), "sizes");
    require(new_param.size() == count && new_m.size() == count && new_v.size() == count, "sizes");
    const auto fix = [&](float beta) { return static_cast<float>(1 / (1 - std::pow(double{beta}, step))); };
    call(machine, machine.kernels().adamw,
         AdamW{param.data(), grad.data(), data(m), data(v), new_param.data(), new_m.data(), new_v.data(),
               static_cast<int64_t>(count), rate, beta1, beta2, eps, decay, fix(beta1), fix(beta2)});
}

// Codes as MLX packs them, in groups that share a scale: the last axis of `scales`.
template <class Scales>
PackedCodes packed_codes(const Array<const uint32_t>& codes, const Scales& scales, int bits, int group_size) {
    require((bits >= 2 && bits <= 6) || bits == 8, "bits");
    require(group_size > 0 && group_size % 8 == 0 && scales.ndim() > 0 && scales.size() > 0, "groups");
    const auto groups = static_cast<int64_t>(scales.shape(scales.ndim() - 1)), rows = static_cast<int64_t>(scales.size()) / groups;
    const PackedCodes found{reinterpret_cast<const uint8_t*>(codes.data()), rows, groups, group_size, bits};
    require(static_cast<int64_t>(codes.nbytes()) == rows * found.row_bytes(), "codes do not fit");
    return found;
}

void affine_weight(Machine& machine, In scales, In biases, Array<const uint32_t> codes, int bits, int group_size, Out out) {
    require(biases.size() == scales.size() && out.size() == scales.size() * group_size, "sizes");
    const auto packed = packed_codes(codes, scales, bits, group_size);
    call(machine, affine, Affine{packed, scales.data(), biases.data(), out.data()});
}

void affine_weight_back(Machine& machine, In grad, Array<const uint32_t> codes, int bits, int group_size, Out to_scales,
                        Out to_biases) {
    require(to_biases.size() == to_scales.size() && grad.size() == to_scales.size() * group_size, "sizes");
    const auto packed = packed_codes(codes, to_scales, bits, group_size);
    call(machine, affine_back, AffineBack{packed, grad.data(), to_scales.data(), to_biases.data()});
}

// A table of backends/moments.py: levels, edges, starts.
using Table = std::tuple<In, In, Ints>;

Levels levels_of(const Table& table, bool is_signed) {
    const auto& [levels, edges, starts] = table;
    const size_t magnitudes = is_signed ? 128 : 256;
    require(levels.size() == 256 && edges.size() == magnitudes + 1 && starts.size() == (0x3F800000 >> 17) + 1, "a table");
    for (size_t i = 0; i < starts.size(); i++)
        require(starts.data()[i] >= 0 && starts.data()[i] < static_cast<int32_t>(magnitudes), "a table");
    return {levels.data(), edges.data(), starts.data(), is_signed};
}

// Moments in eight bits, four to an int32.
template <class Codes, class Scales>
Coded coded(const Codes& codes, const Scales& scales, int64_t blocks) {
    require(static_cast<int64_t>(codes.nbytes()) == blocks * kShared, "codes do not fit");
    require(static_cast<int64_t>(scales.size()) == blocks, "scales do not fit");
    return {const_cast<uint8_t*>(reinterpret_cast<const uint8_t*>(codes.data())), const_cast<float*>(scales.data())};
}

using Moments = std::tuple<Ints, In, Ints, In>;

void adamw_in_eight_bits(Machine& machine, In param, In grad, std::optional<Moments> old, const Table& of_m,
                         const Table& of_root, int step, float rate, float beta1, float beta2, float eps, float decay,
                         Out new_param, Array<int32_t> new_m, Out new_m_scale, Array<int32_t> new_root,
                         Out new_root_scale) {
    const auto count = static_cast<int64_t>(param.size()), blocks = (count + kShared - 1) / kShared;
    require(grad.size() == param.size() && new_param.size() == param.size(), "sizes");
    const auto fix = [&](float beta) { return static_cast<float>(1 / (1 - std::pow(double{beta}, step))); };
    AdamW8 made{param.data(), grad.data(), new_param.data(), {}, {},
                coded(new_m, new_m_scale, blocks), coded(new_root, new_root_scale, blocks),
                levels_of(of_m, true), levels_of(of_root, false), count,
                rate, beta1, beta2, eps, decay, fix(beta1), fix(beta2)};
    if (old) {
        made.m = coded(std::get<0>(*old), std::get<1>(*old), blocks);
        made.root = coded(std::get<2>(*old), std::get<3>(*old), blocks);
    }
    call(machine, adamw8, made);
}

void norm(Machine& machine, Kernel<Norm> kernel, In x, In gain, Maybe bias, float eps, float offset, Out out) {
    const int64_t width = last(x), rows = static_cast<int64_t>(x.size()) / width;
    const int64_t gains = static_cast<int64_t>(gain.size()) / width;
    require(gains > 0 && static_cast<int64_t>(gain.size()) == gains * width && rows % gains == 0, "gains");
    require((!bias || size(bias) == width) && x.size() == out.size(), "sizes");
    call(machine, kernel, Norm{x.data(), gain.data(), data(bias), out.data(), rows, width, gains, eps, offset});
}

void make_rope_table(Machine& machine, Ints starts, In freqs, float scale, Out table) {
    const auto B = static_cast<int64_t>(starts.size()), pairs = static_cast<int64_t>(freqs.size());
    const int64_t T = static_cast<int64_t>(table.size()) / (B * 2 * pairs);
    call(machine, &rope_table, RopeTable{starts.data(), freqs.data(), table.data(), B, T, pairs, scale});
}

void rope(Machine& machine, In x, In table, bool interleaved, Out out) {
    require(x.ndim() == 4 && table.ndim() == 4 && x.size() == out.size(), "sizes");
    const auto tokens = static_cast<int64_t>(x.shape(0) * x.shape(1)), pairs = static_cast<int64_t>(table.shape(3));
    const auto heads = static_cast<int64_t>(x.shape(2)), d = static_cast<int64_t>(x.shape(3));
    require(2 * pairs <= d && static_cast<int64_t>(table.size()) == tokens * 2 * pairs, "table");
    call(machine, machine.kernels().rope, Rope{x.data(), table.data(), out.data(), tokens, heads, d, pairs, interleaved});
}

void take_rows(Machine& machine, In x, Ints rows, Out out) {
    const int64_t width = x.shape(0) ? static_cast<int64_t>(x.size() / x.shape(0)) : 0;
    require(out.size() == rows.size() * static_cast<size_t>(width), "sizes");
    for (size_t i = 0; i < rows.size(); i++)
        if (rows.data()[i] < 0 || static_cast<size_t>(rows.data()[i]) >= x.shape(0)) throw std::out_of_range("row");
    call(machine, &take,
         Take{reinterpret_cast<const uint8_t*>(x.data()), rows.data(), reinterpret_cast<uint8_t*>(out.data()),
              static_cast<int64_t>(rows.size()), width * int64_t{sizeof(float)}});
}

void cut_piece(Machine& machine, In x, int64_t from, Out out) {
    const int64_t stride = last(x), rows = static_cast<int64_t>(x.size()) / stride;
    const int64_t width = static_cast<int64_t>(out.shape(out.ndim() - 1));
    require(from >= 0 && from + width <= stride && static_cast<int64_t>(out.size()) == rows * width, "sizes");
    call(machine, &piece, Piece{x.data(), out.data(), rows, stride, from, width});
}

void join_rows(Machine& machine, In a, In b, Out out) {
    const int64_t width_a = last(a), width_b = last(b), rows = static_cast<int64_t>(a.size()) / width_a;
    require(static_cast<int64_t>(b.size()) == rows * width_b && out.size() == a.size() + b.size(), "sizes");
    call(machine, &join, Join{a.data(), b.data(), out.data(), rows, width_a, width_b});
}

struct Step {
    Ints starts, lengths, slots;
    std::optional<Ints> segments;
};

struct LayerRoom {
    nb::ndarray<nb::c_contig, nb::device::cpu> keys, values;
    Number type;
    int64_t capacity;
    std::optional<Out> key_scales, value_scales;
    std::optional<Array<int32_t>> bases;
    int64_t kept;
};

struct Mask {
    float scale;
    int64_t window, chunk;
    float softcap;
};

// Arguments of attention without a cache: what a backward pass has too.
Attention attention_alone(const In& q, const In& k, const In& v, const Maybe& sinks, const Mask& mask, const Step& step) {
    require(q.ndim() == 4 && k.ndim() == 4 && v.ndim() == 4, "q, k and v have four axes");
    const auto axis = [](const In& a, size_t i) { return static_cast<int64_t>(a.shape(i)); };
    const int64_t B = axis(q, 0), T = axis(q, 1), H = axis(q, 2), K = axis(k, 2), d = axis(q, 3), dv = axis(v, 3);
    require(K > 0 && H % K == 0 && axis(k, 3) == d && axis(v, 2) == K, "heads do not fit");
    require(axis(k, 0) == B && axis(k, 1) == T && axis(v, 0) == B && axis(v, 1) == T, "tokens do not fit");
    require(!sinks || size(sinks) == H, "sinks");
    require(static_cast<int64_t>(step.starts.size()) == B && static_cast<int64_t>(step.lengths.size()) == B, "step");
    require(!step.segments || static_cast<int64_t>(step.segments->size()) == B * T, "segments");
    return {q.data(), k.data(), v.data(), data(sinks), nullptr, step.starts.data(), step.lengths.data(), step.slots.data(),
            step.segments ? step.segments->data() : nullptr, nullptr, nullptr, Number::f32, B, T, H, K, d, dv, T,
            mask.window, mask.chunk, mask.scale, mask.softcap};
}

void attend(Machine& machine, In q, In k, In v, Maybe sinks, const Mask& mask, const Step& step, const LayerRoom* room,
            Out out) {
    Attention p = attention_alone(q, k, v, sinks, mask, step);
    require(static_cast<int64_t>(out.size()) == p.B * p.T * p.H * p.dv, "sizes");
    p.out = out.data();
    if (room) {
        p.keys = room->keys.data(), p.values = room->values.data();
        p.type = room->type, p.capacity = room->capacity;
        p.key_scales = room->key_scales ? room->key_scales->data() : nullptr;
        p.value_scales = room->value_scales ? room->value_scales->data() : nullptr;
        p.bases = room->bases ? room->bases->data() : nullptr, p.kept = room->kept;
    }
    call(machine, machine.kernels().attention, p);
}

// q [B, T, H, L + r] and k [B, T, L + r], whose first L numbers are the values -> out [B, T, H, L]
void attend_latents(Machine& machine, In q, In k, const Mask& mask, const Step& step, const LayerRoom* room, Out out) {
    constexpr int64_t kTogether = 32;  // heads: enough for a block of latents that is read once for all of them
    require(q.ndim() == 4 && k.ndim() == 3 && out.ndim() == 4, "q and out have four axes, k has three");
    const auto B = static_cast<int64_t>(q.shape(0)), T = static_cast<int64_t>(q.shape(1));
    const auto H = static_cast<int64_t>(q.shape(2)), d = last(q), L = static_cast<int64_t>(out.shape(3));
    require(last(k) == d && L <= d && static_cast<int64_t>(k.size()) == B * T * d, "latents do not fit");
    require(static_cast<int64_t>(out.size()) == B * T * H * L, "sizes");
    require(static_cast<int64_t>(step.starts.size()) == B && static_cast<int64_t>(step.lengths.size()) == B, "step");
    require(!step.segments || static_cast<int64_t>(step.segments->size()) == B * T, "segments");
    int64_t parts = (H + kTogether - 1) / kTogether;
    while (H % parts) parts++;
    Attention p{q.data(), k.data(), nullptr, nullptr, out.data(), step.starts.data(), step.lengths.data(),
                step.slots.data(), step.segments ? step.segments->data() : nullptr, nullptr, nullptr, Number::f32, B, T, H,
                parts, d, L, T, mask.window, mask.chunk, mask.scale, mask.softcap};
    p.latent = true;
    if (room) {
        p.keys = room->keys.data(), p.type = room->type, p.capacity = room->capacity;
        p.key_scales = room->key_scales ? room->key_scales->data() : nullptr;
    }
    call(machine, machine.kernels().attention, p);
}

void absorb_queries(Machine& machine, In q, In turning, const Weight& weight, int64_t heads, Out out) {
    const Matrix w = weight.at(0);
    const int64_t r = last(turning), tokens = static_cast<int64_t>(turning.size()) / (heads * r);
    require(last(q) == w.rows && static_cast<int64_t>(q.size()) == tokens * heads * w.rows, "queries do not fit");
    require(static_cast<int64_t>(out.size()) == tokens * heads * (w.columns + r), "sizes");
    call(machine, machine.kernels().absorb, Absorb{q.data(), turning.data(), w, out.data(), tokens, heads, r});
}

void attend_back(Machine& machine, In grad, In q, In k, In v, Maybe sinks, const Mask& mask, const Step& step, Out to_q,
                 Out to_k, Out to_v, std::optional<Out> to_sinks) {
    const Attention p = attention_alone(q, k, v, sinks, mask, step);
    require(static_cast<int64_t>(grad.size()) == p.B * p.T * p.H * p.dv, "gradient");
    require(to_q.size() == q.size() && to_k.size() == k.size() && to_v.size() == v.size(), "sizes");
    require(sinks.has_value() == to_sinks.has_value(), "sinks");
    require(!to_sinks || static_cast<int64_t>(to_sinks->size()) == p.B * p.H, "sizes");
    call(machine, machine.kernels().attention_back,
         AttentionBack{p, grad.data(), to_q.data(), to_k.data(), to_v.data(), to_sinks ? to_sinks->data() : nullptr});
}

void convolve(Machine& machine, In x, In weight, Maybe bias, const Step& step, std::optional<Out> state, Out out) {
    require(x.ndim() == 3 && weight.ndim() == 2 && x.size() == out.size(), "sizes");
    const auto B = static_cast<int64_t>(x.shape(0)), T = static_cast<int64_t>(x.shape(1)), C = last(x);
    const auto taps = static_cast<int64_t>(weight.shape(0));
    require(last(weight) == C && (!bias || size(bias) == C), "weight");
    require(!state || (state->ndim() == 3 && state->shape(1) == size_t(taps - 1) && state->shape(2) == size_t(C)), "state");
    require(static_cast<int64_t>(step.starts.size()) == B && static_cast<int64_t>(step.lengths.size()) == B, "step");
    call(machine, machine.kernels().short_convolution,
         ShortConvolution{x.data(), weight.data(), data(bias), out.data(), state ? state->data() : nullptr,
                          step.starts.data(), step.lengths.data(), step.slots.data(),
                          step.segments ? step.segments->data() : nullptr, B, T, C, taps});
}

void remember(Machine& machine, In q, In k, In v, In a, In b, In rate, In shift, const Step& step,
              std::optional<Out> state, Out out) {
    require(q.ndim() == 4 && v.ndim() == 4 && q.size() == k.size() && v.size() == out.size(), "sizes");
    const auto axis = [](const In& x, size_t i) { return static_cast<int64_t>(x.shape(i)); };
    const int64_t B = axis(v, 0), T = axis(v, 1), H = axis(v, 2), K = axis(q, 2), dk = last(q), dv = last(v);
    require(axis(q, 0) == B && axis(q, 1) == T && K > 0 && H % K == 0, "heads do not fit");
    require(static_cast<int64_t>(a.size()) == B * T * H && a.size() == b.size(), "gates");
    require(static_cast<int64_t>(rate.size()) == H && rate.size() == shift.size(), "rates");
    require(!state || (state->ndim() == 4 && state->shape(1) == size_t(H) && state->shape(2) == size_t(dk) &&
                       state->shape(3) == size_t(dv)), "state");
    require(static_cast<int64_t>(step.starts.size()) == B && static_cast<int64_t>(step.lengths.size()) == B, "step");
    call(machine, machine.kernels().gated_delta,
         GatedDelta{q.data(), k.data(), v.data(), a.data(), b.data(), rate.data(), shift.data(), out.data(),
                    state ? state->data() : nullptr, step.starts.data(), step.lengths.data(), step.slots.data(),
                    step.segments ? step.segments->data() : nullptr, B, T, H, K, dk, dv});
}

void choose(Machine& machine, In logits, Maybe bias, int64_t groups, int64_t top_groups, int scoring,
            Array<int32_t> ids) {
    require(logits.ndim() == 2 && ids.ndim() == 2 && logits.shape(0) == ids.shape(0), "sizes");
    const auto tokens = static_cast<int64_t>(ids.shape(0)), k = static_cast<int64_t>(ids.shape(1));
    const int64_t experts = last(logits);
    require(k <= experts && (!bias || size(bias) == experts) && groups > 0 && experts % groups == 0, "experts");
    call(machine, &elect, Elect{logits.data(), data(bias), ids.data(), tokens, experts, k, groups, top_groups,
                                static_cast<Scoring>(scoring)});
}

void make_gates(Machine& machine, In logits, Ints ids, int scoring, float jitter, bool renormalise, float scale,
                Out out) {
    require(logits.ndim() == 2 && ids.ndim() == 2 && ids.size() == out.size(), "sizes");
    const auto tokens = static_cast<int64_t>(ids.shape(0)), k = static_cast<int64_t>(ids.shape(1));
    call(machine, &gates,
         Gates{logits.data(), ids.data(), out.data(), tokens, last(logits), k, static_cast<Scoring>(scoring), jitter,
               renormalise, scale});
}

void expert_linear(Machine& machine, In x, const Weight& weight, Maybe bias, Maybe gates, Ints ids, int64_t experts,
                   bool exact, Out out) {
    const Matrix w = weight.stack ? weight.like() : weight.at(0);
    const bool own = x.ndim() == 3;
    const auto tokens = static_cast<int64_t>(ids.shape(0)), k = static_cast<int64_t>(ids.shape(1));
    require(last(x) == w.columns && static_cast<int64_t>(x.size()) == tokens * (own ? k : 1) * w.columns, "inputs");
    require(static_cast<int64_t>(out.size()) == tokens * k * w.rows && (!gates || gates->size() == ids.size()), "sizes");
    require(!bias || size(bias) == experts * w.rows, "bias");
    call(machine, machine.kernels().expert_linear,
         ExpertLinear{x.data(), data(gates), ids.data(), tokens, k, own, exact, w, experts, data(bias), out.data(),
                      weight.stack.get()});
}

void combine_experts(Machine& machine, In y, Maybe gates, Out out) {
    require(y.ndim() == 3 && out.size() * y.shape(1) == y.size(), "sizes");
    const auto tokens = static_cast<int64_t>(y.shape(0)), k = static_cast<int64_t>(y.shape(1));
    require(!gates || size(gates) == tokens * k, "gates");
    call(machine, &combine, Combine{y.data(), data(gates), out.data(), tokens, k, last(y)});
}

int64_t draw_one(Machine& machine, In scores, double temperature, int64_t top_k, double top_p, double min_p, double u) {
    int64_t id = 0;
    const Draw parameters{scores.data(), static_cast<int64_t>(scores.size()), top_k, temperature, top_p, min_p, u};
    nb::gil_scoped_release others_may_run;
    machine.run([&] { id = draw(parameters, machine.kernels(), machine.pool()); });
    return id;
}

// Replays a plan that makes logits of ids and starts, both [1], as often as there are numbers u; each time the id that is
// drawn becomes the next one's. Ends behind an id of `stop`. Returns how many were drawn.
int64_t burst(Machine& machine, const Plan& plan, Array<int32_t> ids, Array<int32_t> starts, In logits, double temperature,
              int64_t top_k, double top_p, double min_p, In u, Ints stop, Array<int32_t> drawn) {
    require(ids.size() == 1 && starts.size() == 1 && drawn.size() == u.size(), "sizes");
    const int32_t *first = stop.data(), *end = first + stop.size();
    Draw parameters{logits.data(), static_cast<int64_t>(logits.size()), top_k, temperature, top_p, min_p, 0};
    int64_t count = 0;
    nb::gil_scoped_release others_may_run;
    machine.run([&] {
        while (count < static_cast<int64_t>(u.size())) {
            plan.run(machine.pool());
            parameters.u = u.data()[count];
            const auto id = static_cast<int32_t>(draw(parameters, machine.kernels(), machine.pool()));
            drawn.data()[count++] = ids.data()[0] = id;
            starts.data()[0]++;
            if (std::find(first, end, id) != end) break;
        }
    });
    return count;
}

// An array in an arena; its memory is free for later calls once Python has let go of it.
template <class T>
nb::ndarray<nb::numpy, T> arena_array(const std::shared_ptr<Arena>& arena, const std::vector<size_t>& shape) {
    struct Lease {
        std::shared_ptr<Arena> arena;
        uint8_t* data;
    };
    size_t bytes = sizeof(T);
    for (size_t n : shape) bytes *= n;
    auto* lease = new Lease{arena, arena->take(round_up(static_cast<int64_t>(bytes), kLine))};
    nb::capsule owner(lease, [](void* p) noexcept {
        auto* gone = static_cast<Lease*>(p);
        gone->arena->give(gone->data);
        delete gone;
    });
    return {lease->data, shape.size(), shape.data(), owner};
}

std::vector<std::string> variant_names() {
    const Variants found = variants();
    std::vector<std::string> names;
    for (int i = 0; i < found.count; i++) names.emplace_back(found.all[i]->name);
    return names;
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "Kernels of the CPU backend. Arrays are float32 and contiguous; nothing is copied or converted.";
    m.def("variants", &variant_names, "Instruction sets that this processor can run, the best first.");

    nb::class_<Weight>(m, "Weight")
        .def_ro("nbytes", &Weight::bytes, "Of memory of its own.")
        .def_prop_ro("tiled", &Weight::tiled);
    nb::class_<Activations>(m, "Activations");
    nb::class_<Mask>(m, "Mask").def(nb::init<float, int64_t, int64_t, float>());
    nb::class_<Step>(m, "Step").def(
        "__init__",
        [](Step* self, Ints starts, Ints lengths, Ints slots, std::optional<Ints> segments) {
            new (self) Step{starts, lengths, slots, segments};
        },
        "starts"_a.noconvert(), "lengths"_a.noconvert(), "slots"_a.noconvert(), "segments"_a.noconvert().none());
    nb::class_<LayerRoom>(m, "LayerRoom")
        .def("__init__", [](LayerRoom* self, nb::ndarray<nb::c_contig, nb::device::cpu> keys,
                            nb::ndarray<nb::c_contig, nb::device::cpu> values, const std::string& dtype,
                            int64_t capacity, std::optional<Out> key_scales, std::optional<Out> value_scales,
                            std::optional<Array<int32_t>> bases, int64_t kept) {
            require((dtype == "int8") == (key_scales && value_scales), "int8 has scales");
            require(kept == 0 || (bases && kept > 0 && kept + 2 * kRows <= capacity), "no room for what is kept");
            new (self) LayerRoom{keys, values, number(dtype), capacity, key_scales, value_scales, bases, kept};
        }, "keys"_a, "values"_a, "dtype"_a, "capacity"_a, "key_scales"_a = nb::none(), "value_scales"_a = nb::none(),
           "bases"_a = nb::none(), "kept"_a = 0);
    nb::class_<Plan>(m, "Plan")
        .def(nb::init<>())
        .def("__len__", &Plan::size)
        .def("owns", [](const Plan& self, const nb::ndarray<nb::ro>& a) { return self.arena->owns(a.data()); })
        .def("empty", [](const Plan& self, const std::vector<size_t>& shape) { return arena_array<float>(self.arena, shape); },
             "shape"_a, "A float32 array for a recorded result.")
        .def("empty_ids",
             [](const Plan& self, const std::vector<size_t>& shape) { return arena_array<int32_t>(self.arena, shape); },
             "shape"_a, "An int32 array for a recorded result.");
    nb::class_<Arena>(m, "Arena", "Buffers for results that come and go.")
        .def("__init__", [](Arena* self) { new (self) Arena(true); })
        .def("tidy", &Arena::tidy, "Give back what lies idle.")
        .def_prop_ro("held", &Arena::held, "Bytes, in use or not.")
        .def("empty", [](std::shared_ptr<Arena> self, const std::vector<size_t>& shape) { return arena_array<float>(self, shape); },
             "shape"_a, "A float32 array.");

    m.def("dense", &dense, "array"_a.noconvert(), "dtype"_a, "rows"_a, "columns"_a, "own"_a);
    m.def("panels", &panels, "array"_a.noconvert(), "dtype"_a, "rows"_a);
    nb::class_<Adapter>(m, "Adapter")
        .def(nb::init<std::shared_ptr<Weight>, std::shared_ptr<Weight>, float>(), "down"_a, "up"_a, "scale"_a);

    nb::class_<Residents>(m, "Residents", "The matrices of stacks that are in memory of their own.")
        .def_prop_ro("held", &Residents::held, "Bytes that they take.")
        .def("allow", &Residents::allow, "bytes"_a, "How many they may take; those not needed for longest go first.")
        .def_prop_ro("due", &Residents::due, "Whether `allow` should be called again.");
    nb::class_<Machine>(m, "Machine")
        .def(nb::init<int, const std::string&>(), "threads"_a, "kernels"_a = "")
        .def_prop_ro("threads", [](Machine& self) { return self.pool().threads(); })
        .def_prop_ro("kernels", [](Machine& self) { return self.kernels().name; })
        .def_prop_ro("pairs", [](Machine& self) { return self.kernels().pairs; },
                     "Whether products of bfloat16 numbers are the quicker ones.")
        .def_rw("plan", &Machine::plan, nb::arg().none())
        .def("burst", &burst, "plan"_a, "ids"_a.noconvert(), "starts"_a.noconvert(), "logits"_a.noconvert(),
             "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a, "u"_a.noconvert(), "stop"_a.noconvert(), "drawn"_a.noconvert())
        .def("replay", &Machine::replay, nb::call_guard<nb::gil_scoped_release>())
        .def("pack_affine", &pack_affine, "codes"_a.noconvert(), "stored_bits"_a, "scales"_a.noconvert(),
             "biases"_a.noconvert().none(), "dtype"_a, "bits"_a, "group"_a, "zero"_a, "experts"_a, "rows"_a, "columns"_a, "alone"_a)
        .def("pack_legacy", &pack_legacy, "blocks"_a.noconvert(), "bits"_a, "biased"_a, "experts"_a, "rows"_a, "columns"_a,
             "alone"_a)
        .def("pack_blocks", &pack_blocks, "blocks"_a.noconvert(), "kind"_a, "experts"_a, "rows"_a, "columns"_a, "alone"_a)
        .def("stack", &stack, "fetch"_a, "experts"_a)
        .def_prop_ro("residents", [](Machine& self) { return self.residents; })
        .def("quantize", &quantize, "x"_a.noconvert())
        .def("linear_int8", &linear_int8, "x"_a, "weight"_a, "bias"_a.noconvert().none(), "plain"_a.noconvert().none(),
             "adapter"_a.none(), "out"_a.noconvert())
        .def("linear_float", &linear_float, "x"_a.noconvert(), "weight"_a, "bias"_a.noconvert().none(),
             "adapter"_a.none(), "out"_a.noconvert())
        .def("products", &products, "x"_a.noconvert(), "weight"_a, "expert"_a, "back"_a, "turned"_a, "scale"_a,
             "x2"_a.noconvert().none(), "weight2"_a.none(), "scale2"_a, "bias"_a.noconvert().none(), "add"_a,
             "narrow"_a, "out"_a.noconvert())
        .def("gated_back", &gated_back, "grad"_a.noconvert(), "gate"_a.noconvert(), "up"_a.noconvert().none(), "kind"_a,
             "to_gate"_a.noconvert(), "to_up"_a.noconvert().none())
        .def("norm_back", &norm_back, "grad"_a.noconvert(), "x"_a.noconvert(), "gain"_a.noconvert(), "eps"_a, "offset"_a,
             "centred"_a, "to_gain"_a.noconvert().none(), "to_bias"_a.noconvert().none(), "out"_a.noconvert())
        .def("softcap_back", &softcap_back, "grad"_a.noconvert(), "x"_a.noconvert(), "cap"_a, "out"_a.noconvert())
        .def("attention_back", &attend_back, "grad"_a.noconvert(), "q"_a.noconvert(), "k"_a.noconvert(), "v"_a.noconvert(),
             "sinks"_a.noconvert().none(), "mask"_a, "step"_a, "to_q"_a.noconvert(), "to_k"_a.noconvert(),
             "to_v"_a.noconvert(), "to_sinks"_a.noconvert().none())
        .def("token_loss", &token_loss, "logits"_a.noconvert(), "targets"_a.noconvert().none(),
             "wanted"_a.noconvert().none(), "grad"_a.noconvert().none(), "out"_a.noconvert())
        .def("adamw", &adamw, "param"_a.noconvert(), "grad"_a.noconvert(), "m"_a.noconvert().none(),
             "v"_a.noconvert().none(), "step"_a, "rate"_a, "beta1"_a, "beta2"_a, "eps"_a, "decay"_a,
             "new_param"_a.noconvert(), "new_m"_a.noconvert(), "new_v"_a.noconvert())
        .def("adamw8", &adamw_in_eight_bits, "param"_a.noconvert(), "grad"_a.noconvert(), "old"_a.none(), "of_m"_a,
             "of_root"_a, "step"_a, "rate"_a, "beta1"_a, "beta2"_a, "eps"_a, "decay"_a, "new_param"_a.noconvert(),
             "new_m"_a.noconvert(), "new_m_scale"_a.noconvert(), "new_root"_a.noconvert(),
             "new_root_scale"_a.noconvert())
        .def("affine", &affine_weight, "scales"_a.noconvert(), "biases"_a.noconvert(), "codes"_a.noconvert(), "bits"_a,
             "group_size"_a, "out"_a.noconvert())
        .def("affine_back", &affine_weight_back, "grad"_a.noconvert(), "codes"_a.noconvert(), "bits"_a, "group_size"_a,
             "to_scales"_a.noconvert(), "to_biases"_a.noconvert())
        .def("embed", &embed_rows, "weight"_a, "expert"_a, "ids"_a.noconvert(), "out"_a.noconvert())
        .def("add", [](Machine& self, In a, In b, Out out) { pairwise(self, self.kernels().add, a, b, out); },
             "a"_a.noconvert(), "b"_a.noconvert(), "out"_a.noconvert())
        .def("multiply", [](Machine& self, In a, In b, Out out) { pairwise(self, self.kernels().multiply, a, b, out); },
             "a"_a.noconvert(), "b"_a.noconvert(), "out"_a.noconvert())
        .def("add_number",
             [](Machine& self, In a, float number, Out out) { single(self, self.kernels().add_number, a, number, out); },
             "a"_a.noconvert(), "number"_a, "out"_a.noconvert())
        .def("multiply_number",
             [](Machine& self, In a, float n, Out out) { single(self, self.kernels().multiply_number, a, n, out); },
             "a"_a.noconvert(), "number"_a, "out"_a.noconvert())
        .def("softcap", [](Machine& self, In a, float cap, Out out) { single(self, self.kernels().softcap, a, cap, out); },
             "a"_a.noconvert(), "cap"_a, "out"_a.noconvert())
        .def("gated", &gated, "gate"_a.noconvert(), "up"_a.noconvert().none(), "kind"_a, "out"_a.noconvert())
        .def("rms_norm",
             [](Machine& self, In x, In gain, float eps, float offset, Out out) {
                 norm(self, self.kernels().rms_norm, x, gain, std::nullopt, eps, offset, out);
             },
             "x"_a.noconvert(), "gain"_a.noconvert(), "eps"_a, "offset"_a, "out"_a.noconvert())
        .def("layer_norm",
             [](Machine& self, In x, In gain, Maybe bias, float eps, Out out) {
                 norm(self, self.kernels().layer_norm, x, gain, bias, eps, 0.0f, out);
             },
             "x"_a.noconvert(), "gain"_a.noconvert(), "bias"_a.noconvert().none(), "eps"_a, "out"_a.noconvert())
        .def("rope_table", &make_rope_table, "starts"_a.noconvert(), "freqs"_a.noconvert(), "scale"_a, "table"_a.noconvert())
        .def("rope", &rope, "x"_a.noconvert(), "table"_a.noconvert(), "interleaved"_a, "out"_a.noconvert())
        .def("take", &take_rows, "x"_a.noconvert(), "rows"_a.noconvert(), "out"_a.noconvert())
        .def("piece", &cut_piece, "x"_a.noconvert(), "start"_a, "out"_a.noconvert())
        .def("join", &join_rows, "a"_a.noconvert(), "b"_a.noconvert(), "out"_a.noconvert())
        .def("absorb", &absorb_queries, "q"_a.noconvert(), "turning"_a.noconvert(), "weight"_a, "heads"_a, "out"_a.noconvert())
        .def("latent_attention", &attend_latents, "q"_a.noconvert(), "k"_a.noconvert(), "mask"_a, "step"_a, "room"_a.none(),
             "out"_a.noconvert())
        .def("elect", &choose, "logits"_a.noconvert(), "bias"_a.noconvert().none(), "groups"_a, "top_groups"_a, "scoring"_a,
             "ids"_a.noconvert())
        .def("gates", &make_gates, "logits"_a.noconvert(), "ids"_a.noconvert(), "scoring"_a, "jitter"_a,
             "renormalise"_a, "scale"_a, "out"_a.noconvert())
        .def("expert_linear", &expert_linear, "x"_a.noconvert(), "weight"_a, "bias"_a.noconvert().none(),
             "gates"_a.noconvert().none(), "ids"_a.noconvert(), "experts"_a, "exact"_a, "out"_a.noconvert())
        .def("short_convolution", &convolve, "x"_a.noconvert(), "weight"_a.noconvert(), "bias"_a.noconvert().none(),
             "step"_a, "state"_a.noconvert().none(), "out"_a.noconvert())
        .def("gated_delta", &remember, "q"_a.noconvert(), "k"_a.noconvert(), "v"_a.noconvert(), "a"_a.noconvert(),
             "b"_a.noconvert(), "rate"_a.noconvert(), "shift"_a.noconvert(), "step"_a, "state"_a.noconvert().none(),
             "out"_a.noconvert())
        .def("combine", &combine_experts, "y"_a.noconvert(), "gates"_a.noconvert().none(), "out"_a.noconvert())
        .def("draw", &draw_one, "scores"_a.noconvert(), "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a, "u"_a)
        .def("attention", &attend, "q"_a.noconvert(), "k"_a.noconvert(), "v"_a.noconvert(), "sinks"_a.noconvert().none(),
             "mask"_a, "step"_a, "room"_a.none(), "out"_a.noconvert());
}

}  // namespace ondevice::cpu
