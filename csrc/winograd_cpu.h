// A 3 x 3 convolution of stride 1 with 2.25 times fewer multiplications: Winograd's minimal filtering F(2 x 2, 3 x 3), Lavin
// and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015.
//
// Each 2 x 2 tile of the result comes from a 4 x 4 tile of the input: Y = A' [(G g G') * (B' d B)] A, where the elementwise
// products, summed over channels, are 16 products of matrices. Sums over channels are as long as in the direct form's ninth,
// so rounding is no worse than there (measured in tests/test_ops_products.py). A value of the result depends on its own window
// alone, in rounding errors too: a window of zeros gives zero exactly, which ratios rely on. Larger tiles would save more and
// lose digits.
//
// In bfloat16 tiles are transformed in float32 and rounded for the products alone, whose sums are in float32 up to the epilogue. The
// rounding of four values' sums in place of one value's, both ways, makes the error of a layer 5 / 3 as large. The instructions count
// denormals as zero, as they do in oneDNN.
#pragma once

#include "epilogue_cpu.h"

namespace lrpfast {
namespace {

constexpr int kTile = 4, kPoints = kTile * kTile;

// B' d: the rows 0 - 2, 1 + 2, 2 - 1, 1 - 3.
inline void transform_input(const Lanes d[4], Lanes out[4]) {
  out[0] = d[0] - d[2];
  out[1] = d[1] + d[2];
  out[2] = d[2] - d[1];
  out[3] = d[1] - d[3];
}

struct TileGrid {
  std::int64_t rows, columns;
};

template <typename T>
inline TileGrid tile_grid(const WinogradArguments<T>& a) { return {(a.out_size[0] + 1) / 2, (a.out_size[1] + 1) / 2}; }

// The transformed 4 x 4 tile of the input at (y, x), which may reach over its edges, all channels.
template <typename T>
void load_tile(const WinogradArguments<T>& a, const T* image, std::int64_t y, std::int64_t x, T* out,
               std::int64_t point_stride) {
  const std::int64_t channels = a.channels;
  const bool inside = y >= 0 && x >= 0 && y + kTile <= a.size[0] && x + kTile <= a.size[1];
  for (std::int64_t c = 0; c < channels; c += kLanes) {
    Lanes half[kTile][kTile];  // [column][row]
#pragma GCC unroll 4
    for (int j = 0; j < kTile; ++j) {
      Lanes d[kTile];
#pragma GCC unroll 4
      for (int i = 0; i < kTile; ++i) {
        const std::int64_t row = y + i, column = x + j;
        const bool there = inside || (row >= 0 && row < a.size[0] && column >= 0 && column < a.size[1]);
        d[i] = there ? lanes(image + (row * a.size[1] + column) * channels + c) : Lanes{};
      }
      transform_input(d, half[j]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kTile; ++i) {
      const Lanes d[kTile] = {half[0][i], half[1][i], half[2][i], half[3][i]};
      Lanes transformed[kTile];
      transform_input(d, transformed);
#pragma GCC unroll 4
      for (int j = 0; j < kTile; ++j) {
        put(out + (i * kTile + j) * point_stride + c, transformed[j]);
      }
    }
  }
}

// A' m: the sums 0 + 1 + 2 and 1 - 2 - 3.
inline void transform_output(const Lanes m[4], Lanes out[2]) {
  out[0] = m[0] + m[1] + m[2];
  out[1] = m[1] - m[2] - m[3];
}

// The 2 x 2 tile of an image's result at (y, x), `count` filters from `filter` on.
template <typename T>
void store_tile(const WinogradArguments<T>& a, std::int64_t image, std::int64_t y, std::int64_t x, std::int64_t filter,
                std::int64_t count, const float* products, std::int64_t point_stride) {
  for (std::int64_t c = 0; c < count; c += kLanes) {
    Lanes half[kTile][2];  // [column][row]
#pragma GCC unroll 4
    for (int j = 0; j < kTile; ++j) {
      Lanes m[kTile];
#pragma GCC unroll 4
      for (int i = 0; i < kTile; ++i) {
        m[i] = lanes(products + (i * kTile + j) * point_stride + c);
      }
      transform_output(m, half[j]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const Lanes m[kTile] = {half[0][i], half[1][i], half[2][i], half[3][i]};
      Lanes pair[2];
      transform_output(m, pair);
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        if (y + i >= a.out_size[0] || x + j >= a.out_size[1]) {
          continue;
        }
        finish(a.epilogue, pair[j], filter + c, a.result,
               ((image * a.out_size[0] + y + i) * a.out_size[1] + x + j) * a.filters + filter + c);
      }
    }
  }
}

// Floats of a workspace: a block's transformed inputs, then products.
template <typename T>
inline std::int64_t winograd_workspace(const WinogradArguments<T>& a) {
  return kPoints * a.block * (a.channels / kValuesAFloat<T> + kSkew + a.chunk + kSkew);
}

// The tiles [begin, end), counted over all images, with the help of a workspace.
template <typename T>
void winograd_tiles(const WinogradArguments<T>& a, std::int64_t begin, std::int64_t end, float* workspace) {
  constexpr std::int64_t kValues = kValuesAFloat<T>;
  const TileGrid grid = tile_grid(a);
  const std::int64_t tiles_an_image = grid.rows * grid.columns;
  const std::int64_t depth = a.channels / kValues, stride = depth + kSkew, chunk_stride = a.chunk + kSkew;
  T* inputs = reinterpret_cast<T*>(workspace);
  const float* weight = reinterpret_cast<const float*>(a.weight);
  float* products = workspace + kPoints * a.block * stride;
  for (std::int64_t first = begin; first < end; first += a.block) {
    const std::int64_t count = smaller(a.block, end - first);
    for (std::int64_t t = 0; t < count; ++t) {
      const std::int64_t image = (first + t) / tiles_an_image, tile = (first + t) % tiles_an_image;
      load_tile(a, a.input + image * a.size[0] * a.size[1] * a.channels, tile / grid.columns * 2 - a.padding[0],
                tile % grid.columns * 2 - a.padding[1], inputs + t * stride * kValues, a.block * stride * kValues);
    }
    for (std::int64_t filter = 0; filter < a.filters; filter += a.chunk) {
      const std::int64_t width = smaller(a.chunk, a.filters - filter);
      for (int point = 0; point < kPoints; ++point) {
        for (std::int64_t f = 0; f < width; f += kPanel) {
          float* to = products + point * a.block * chunk_stride + f;
          multiply_panel<kFactorsOf<T>>(
              count, workspace + point * a.block * stride, stride, weight + (point * a.filters + filter + f) * depth,
              depth, kPanel,
              [=](std::int64_t row, std::int64_t column, Lanes sum) { put(to + row * chunk_stride + column, sum); });
        }
      }
      for (std::int64_t t = 0; t < count; ++t) {
        const std::int64_t image = (first + t) / tiles_an_image, tile = (first + t) % tiles_an_image;
        store_tile(a, image, tile / grid.columns * 2, tile % grid.columns * 2, filter, width,
                   products + t * chunk_stride, a.block * chunk_stride);
      }
    }
  }
}

// The shares [begin, end) of a.shares equal ones; each has its own workspace.
template <typename T>
void winograd(const WinogradArguments<T>& a, std::int64_t begin, std::int64_t end) {
  const TileGrid grid = tile_grid(a);
  const std::int64_t tiles = a.images * grid.rows * grid.columns;
  const std::int64_t share = (tiles + a.shares - 1) / a.shares;
  for (std::int64_t i = begin; i < end; ++i) {
    winograd_tiles(a, smaller(tiles, i * share), smaller(tiles, (i + 1) * share), a.workspace + i * winograd_workspace(a));
  }
}

}  // namespace
}  // namespace lrpfast
