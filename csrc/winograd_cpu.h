// 3 x 3 convolutions of stride 1 and 2, and the transposes of the latter, with fewer multiplications: Winograd's minimal filtering, Lavin
// and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015.
//
// A tile of the result comes from a tile of the input: Y = A' [(G g G') * (B' d B)] A, where the elementwise products, summed over
// channels, are products of matrices. Stride 1 is F(2 x 2, 3 x 3), 16 multiplications where the direct form has 36. With stride 2
// every second place of the input meets the outer taps alone, which is F(2, 2), and the places between the middle one alone: along an
// axis 5 multiplications for 6, in all 25 for 36. The same holds for places of its transpose's result.
//
// Sums over channels are as long as in the direct form's ninth, so rounding is no worse than there (measured in
// tests/test_ops_products.py). A value of the result depends on its own window alone, in rounding errors too: a window of zeros gives
// zero exactly, which ratios rely on. Larger tiles would save more and lose digits.
//
// In bfloat16 tiles are transformed in float32 and rounded for the products alone, whose sums are in float32 up to the epilogue. The
// rounding of four values' sums in place of one value's, both ways, makes the error of a layer 5 / 3 as large. The instructions count
// denormals as zero, as they do in oneDNN.
#pragma once

#include <utility>

#include "epilogue_cpu.h"
#include "filters_cpu.h"
#include "parallel.h"

namespace lrpfast {
namespace {

// The forms, along one axis: from kInput values of a tile come kOperands operands (B' d); product i is that of operand(i) and filter(i),
// of which there are kFilters (G g, see filters_cpu.h); the kResult results are sums of products (A' m), of which first_use(i) is the
// first that product i is part of. The next tile's input begins kInputStep further on. The first tile's begins at input_begin(padding),
// its result at result_begin(padding), which may be outside.

constexpr int kFilters = 4;

struct UnitStride {
  static constexpr int kInput = 4, kInputStep = 2, kOperands = 4, kProducts = 4, kResult = 2;
  static constexpr int operand(int i) { return i; }
  static constexpr int filter(int i) { return i; }
  static constexpr int first_use(int i) { return i == 3 ? 1 : 0; }
  static std::int64_t input_begin(std::int64_t padding) { return -padding; }
  static std::int64_t result_begin(std::int64_t) { return 0; }

  static void operands(const Lanes d[kInput], Lanes out[kOperands]) {
    out[0] = d[0] - d[2];
    out[1] = d[1] + d[2];
    out[2] = d[2] - d[1];
    out[3] = d[1] - d[3];
  }
  static void results(const Lanes m[kProducts], Lanes out[kResult]) {
    out[0] = m[0] + m[1] + m[2];
    out[1] = m[1] - m[2] - m[3];
  }
};

struct Strided {
  static constexpr int kInput = 5, kInputStep = 4, kOperands = 5, kProducts = 5, kResult = 2;
  static constexpr int operand(int i) { return i; }
  static constexpr int filter(int i) { return i < 3 ? i : 3; }
  static constexpr int first_use(int i) { return i == 2 || i == 4 ? 1 : 0; }
  static std::int64_t input_begin(std::int64_t padding) { return -padding; }
  static std::int64_t result_begin(std::int64_t) { return 0; }

  static void operands(const Lanes d[kInput], Lanes out[kOperands]) {
    out[0] = d[0] - d[2];
    out[1] = d[2];
    out[2] = d[4] - d[2];
    out[3] = d[1];
    out[4] = d[3];
  }
  static void results(const Lanes m[kProducts], Lanes out[kResult]) {
    out[0] = m[0] + m[1] + m[3];
    out[1] = m[1] + m[2] + m[4];
  }
};

// A tile's first place meets the middle tap.
struct StridedTranspose {
  static constexpr int kInput = 3, kInputStep = 2, kOperands = 4, kProducts = 5, kResult = 4;
  static constexpr int operand(int i) { return i < 4 ? i : 1; }
  static constexpr int filter(int i) { return i < 3 ? i : 3; }
  static constexpr int first_use(int i) { return i == 3 ? 0 : i < 2 ? 1 : i == 4 ? 2 : 3; }
  static std::int64_t input_begin(std::int64_t padding) { return padding == 0 ? -1 : 0; }
  static std::int64_t result_begin(std::int64_t padding) { return padding == 1 ? 0 : -1; }

  static void operands(const Lanes d[kInput], Lanes out[kOperands]) {
    out[0] = d[0] - d[1];
    out[1] = d[1];
    out[2] = d[2] - d[1];
    out[3] = d[0];
  }
  static void results(const Lanes m[kProducts], Lanes out[kResult]) {
    out[0] = m[3];
    out[1] = m[0] + m[1];
    out[2] = m[4];
    out[3] = m[1] + m[2];
  }
};

struct Tile {
  std::int64_t image, place[2];
};

// The tiles of a result, in an order of their own: those of the last row that reach over the edge, then those that do not, those of
// the last column, the corners, each over all images. The tiles that need a product are neighbours then.
template <typename Form>
class Tiles {
 public:
  template <typename T>
  explicit Tiles(const WinogradArguments<T>& a) : images_(a.images) {
    for (int axis = 0; axis < 2; ++axis) {
      input_begin_[axis] = Form::input_begin(a.padding[axis]), result_begin_[axis] = Form::result_begin(a.padding[axis]);
      const std::int64_t size = a.out_size[axis] - result_begin_[axis];
      along_[axis] = (size + Form::kResult - 1) / Form::kResult;
      last_[axis] = size - (along_[axis] - 1) * Form::kResult;
      over_[axis] = last_[axis] < Form::kResult ? 1 : 0;
      within_[axis] = along_[axis] - over_[axis];
    }
    counts_[0] = images_ * over_[0] * within_[1], counts_[1] = images_ * within_[0] * within_[1];
    counts_[2] = images_ * within_[0] * over_[1], counts_[3] = images_ * over_[0] * over_[1];
  }

  std::int64_t count() const { return images_ * along_[0] * along_[1]; }

  Tile at(std::int64_t i) const {
    if (i < counts_[0]) {
      return {i / within_[1], {within_[0], i % within_[1]}};
    }
    i -= counts_[0];
    if (i < counts_[1]) {
      return {i / (within_[0] * within_[1]), {i / within_[1] % within_[0], i % within_[1]}};
    }
    i -= counts_[1];
    if (i < counts_[2]) {
      return {i / within_[0], {i % within_[0], within_[1]}};
    }
    return {i - counts_[2], {within_[0], within_[1]}};
  }

  std::int64_t input(const Tile& tile, int axis) const { return tile.place[axis] * Form::kInputStep + input_begin_[axis]; }
  std::int64_t result(const Tile& tile, int axis) const { return tile.place[axis] * Form::kResult + result_begin_[axis]; }

  // Of [begin, end), the tiles that need product (i, j); the others' results that it is part of lie outside.
  std::pair<std::int64_t, std::int64_t> needing(int i, int j, std::int64_t begin, std::int64_t end) const {
    const bool not_last_row = Form::first_use(i) >= last_[0], not_last_column = Form::first_use(j) >= last_[1];
    const std::int64_t first = not_last_row ? counts_[0] : 0;
    const std::int64_t last = count() - (not_last_row || not_last_column ? counts_[3] : 0) - (not_last_column ? counts_[2] : 0);
    return {larger(begin, first), smaller(end, last)};
  }

 private:
  std::int64_t images_, along_[2], within_[2];     // along_: tiles, of which within_ do not reach over the edge
  std::int64_t last_[2], over_[2];                 // results of the last tile that lie within; whether others do not
  std::int64_t input_begin_[2], result_begin_[2];
  std::int64_t counts_[4];                         // tiles of each kind
};

// The operands of the tile of the input at (y, x), which may reach over its edges, all channels.
template <typename Form, typename T>
void load_tile(const WinogradArguments<T>& a, const T* image, std::int64_t y, std::int64_t x, T* out,
               std::int64_t operand_stride) {
  constexpr int kInput = Form::kInput, kOperands = Form::kOperands;
  const std::int64_t channels = a.channels;
  const bool inside = y >= 0 && x >= 0 && y + kInput <= a.size[0] && x + kInput <= a.size[1];
  for (std::int64_t c = 0; c < channels; c += kLanes) {
    Lanes half[kOperands][kInput];  // [row][column]
#pragma GCC unroll 5
    for (int j = 0; j < kInput; ++j) {
      Lanes d[kInput], transformed[kOperands];
#pragma GCC unroll 5
      for (int i = 0; i < kInput; ++i) {
        const std::int64_t row = y + i, column = x + j;
        const bool there = inside || (row >= 0 && row < a.size[0] && column >= 0 && column < a.size[1]);
        d[i] = there ? lanes(image + (row * a.size[1] + column) * channels + c) : Lanes{};
      }
      Form::operands(d, transformed);
#pragma GCC unroll 5
      for (int i = 0; i < kOperands; ++i) {
        half[i][j] = transformed[i];
      }
    }
#pragma GCC unroll 5
    for (int i = 0; i < kOperands; ++i) {
      Lanes transformed[kOperands];
      Form::operands(half[i], transformed);
#pragma GCC unroll 5
      for (int j = 0; j < kOperands; ++j) {
        put(out + (i * kOperands + j) * operand_stride + c, transformed[j]);
      }
    }
  }
}

// The tile of an image's result at (y, x), which may reach over its edges, `count` filters from `filter` on.
template <typename Form, typename T>
void store_tile(const WinogradArguments<T>& a, std::int64_t image, std::int64_t y, std::int64_t x, std::int64_t filter,
                std::int64_t count, const float* products, std::int64_t product_stride) {
  constexpr int kProducts = Form::kProducts, kResult = Form::kResult;
  for (std::int64_t c = 0; c < count; c += kLanes) {
    Lanes half[kResult][kProducts];  // [row][column]
#pragma GCC unroll 5
    for (int j = 0; j < kProducts; ++j) {
      Lanes m[kProducts], sums[kResult];
#pragma GCC unroll 5
      for (int i = 0; i < kProducts; ++i) {
        m[i] = lanes(products + (i * kProducts + j) * product_stride + c);
      }
      Form::results(m, sums);
#pragma GCC unroll 4
      for (int i = 0; i < kResult; ++i) {
        half[i][j] = sums[i];
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kResult; ++i) {
      Lanes sums[kResult];
      Form::results(half[i], sums);
#pragma GCC unroll 4
      for (int j = 0; j < kResult; ++j) {
        const std::int64_t row = y + i, column = x + j;
        if (row >= 0 && row < a.out_size[0] && column >= 0 && column < a.out_size[1]) {
          finish(a.epilogue, sums[j], filter + c, a.result,
                 ((image * a.out_size[0] + row) * a.out_size[1] + column) * a.filters + filter + c);
        }
      }
    }
  }
}

// Of a thread's workspace, in floats: a block's operands; its products with a chunk of filters; and that chunk, where filters are given.
template <typename Form, typename T>
struct Workspace {
  float *operands, *products, *filters;

  static std::int64_t operands_size(const WinogradArguments<T>& a) {
    return Form::kOperands * Form::kOperands * a.block * (a.channels / kValuesAFloat<T> + kSkew);
  }
  static std::int64_t products_size(const WinogradArguments<T>& a) {
    return Form::kProducts * Form::kProducts * a.block * (a.chunk + kSkew);
  }

  Workspace(const WinogradArguments<T>& a, int member) {
    const std::int64_t filters_size = a.weight ? 0 : kFilters * kFilters * a.chunk * a.channels;
    operands = a.workspace + member * (operands_size(a) + products_size(a) + filters_size);
    products = operands + operands_size(a), filters = products + products_size(a);
  }
};

template <typename Form, typename T>
void load_tiles(const WinogradArguments<T>& a, const Tiles<Form>& tiles, std::int64_t first, std::int64_t last,
                float* operands) {
  const std::int64_t stride = a.channels + kSkew * kValuesAFloat<T>;
  for (std::int64_t t = first; t < last; ++t) {
    const Tile tile = tiles.at(t);
    load_tile<Form>(a, a.input + tile.image * a.size[0] * a.size[1] * a.channels, tiles.input(tile, 0), tiles.input(tile, 1),
                    reinterpret_cast<T*>(operands) + (t - first) * stride, a.block * stride);
  }
}

// The results of the tiles [first, last), whose operands are loaded, for `width` filters from `filter` on.
template <typename Form, typename T>
void convolve_tiles(const WinogradArguments<T>& a, const Tiles<Form>& tiles, std::int64_t first, std::int64_t last,
                    std::int64_t filter, std::int64_t width, const Workspace<Form, T>& workspace) {
  const std::int64_t depth = a.channels / kValuesAFloat<T>, stride = depth + kSkew, chunk_stride = a.chunk + kSkew;
  const float* weight = a.weight ? reinterpret_cast<const float*>(a.weight) + filter * depth : workspace.filters;
  const std::int64_t point_stride = (a.weight ? a.filters : a.chunk) * depth;
  for (int point = 0; point < Form::kProducts * Form::kProducts; ++point) {
    const int i = point / Form::kProducts, j = point % Form::kProducts;
    const auto [from, until] = tiles.needing(i, j, first, last);
    const std::int64_t operand = Form::operand(i) * Form::kOperands + Form::operand(j);
    const std::int64_t filter_point = Form::filter(i) * kFilters + Form::filter(j);
    for (std::int64_t f = 0; f < width; f += kPanel) {
      float* to = workspace.products + (point * a.block + from - first) * chunk_stride + f;
      multiply_panel<kFactorsOf<T>>(
          until - from, workspace.operands + (operand * a.block + from - first) * stride, stride,
          weight + filter_point * point_stride + f * depth, depth, kPanel,
          [=](std::int64_t row, std::int64_t column, Lanes sum) { put(to + row * chunk_stride + column, sum); });
    }
  }
  for (std::int64_t t = first; t < last; ++t) {
    const Tile tile = tiles.at(t);
    store_tile<Form>(a, tile.image, tiles.result(tile, 0), tiles.result(tile, 1), filter, width,
                     workspace.products + (t - first) * chunk_stride, a.block * chunk_stride);
  }
}

// A piece is a chunk of filters, for a block of tiles.
template <typename Form, typename T>
void winograd_of(const WinogradArguments<T>& a, Pieces& pieces) {
  const Tiles<Form> tiles(a);
  const Workspace<Form, T> workspace(a, pieces.member());
  const std::int64_t chunks = (a.filters + a.chunk - 1) / a.chunk, count = (tiles.count() + a.block - 1) / a.block * chunks;
  std::int64_t loaded = -1;
  for (std::int64_t i = pieces.next(count); i >= 0; i = pieces.next(count)) {
    const std::int64_t first = i / chunks * a.block, last = smaller(tiles.count(), first + a.block);
    const std::int64_t filter = i % chunks * a.chunk, width = smaller(a.chunk, a.filters - filter);
    if (loaded != first) {
      load_tiles(a, tiles, first, last, workspace.operands);
      loaded = first;
    }
    if (!a.weight) {
      transform_panels(a.given, filter / kPanel, (filter + width) / kPanel, workspace.filters, a.chunk * a.channels);
    }
    convolve_tiles(a, tiles, first, last, filter, width, workspace);
  }
}

template <typename T>
void winograd(const WinogradArguments<T>& a, Pieces& pieces) {
  switch (a.form) {
    case WinogradForm::kUnitStride:
      return winograd_of<UnitStride>(a, pieces);
    case WinogradForm::kStrided:
      return winograd_of<Strided>(a, pieces);
    case WinogradForm::kStridedTranspose:
      return winograd_of<StridedTranspose>(a, pieces);
  }
}

}  // namespace
}  // namespace lrpfast
