// linear_decode on Hopper, its addressing on the CPU: which rows copies bring where in shared
// memory, what products read there, and how sums leave.  Whole numbers, so that one wrong element
// shows; memory that nothing was brought to is NaN.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <initializer_list>
#include <limits>
#include <random>
#include <vector>

#include "linear_decode/linear_decode_sm90_config.h"

namespace {

using zebra::LinearDecodeSm90Config;
using zebra::LinearDecodeSm90Shape;
using zebra::LinearDecodeSm90Tuning;

constexpr int kBox = zebra::kLinearBox, kLineBytes = 2 * kBox;  // elements; bytes in shared memory
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
int failures = 0, emulated = 0;

class Emulation {
 public:
  Emulation(const LinearDecodeSm90Shape& shape, const LinearDecodeSm90Config& config)
      : s(shape),
        c(config),
        rows(static_cast<int>(s.rows)),
        N(static_cast<int>(s.outputs + s.second_outputs)),
        K(static_cast<int>(s.K)),
        parts(zebra::linear_parts(c.tokens, c.row_tiles)),
        group_skip(zebra::linear_halves_tokens(c.tokens, c.row_tiles) ? c.tokens / 2 : 0),
        group_tokens(c.tokens - group_skip),
        columns(group_tokens * c.slices) {
    std::mt19937 random(static_cast<unsigned>(rows * 7 + N * 13 + K));
    const auto fill = [&](std::vector<float>& values, int count, int most) {
      values.resize(count);
      for (float& v : values)
        v = static_cast<float>(static_cast<int>(random() % (2u * most + 1)) - most);
    };
    fill(weight, (s.swiglu ? 2 : 1) * N * K, 8);
    fill(x, rows * K, 6);
    y.assign(rows * N, kNaN);
  }

  void run() {
    for (int cluster = 0; cluster < c.clusters; ++cluster) {
      const int first = cluster * c.units, units = std::min(c.units, c.all_units - first);
      if (units < 1) return fail("a cluster without work");
      for (int u = 0; u < units; ++u) {
        const Outputs of = outputs_of(first + u);
        for (int rank = 0; rank < c.cluster; ++rank) multiply_unit(rank, u, of);
        for (int rank = 0; rank < c.cluster; ++rank) finish_unit(rank, of);
      }
    }
    for (int m = 0; m < rows; ++m)
      for (int n = 0; n < N; ++n) {
        float expected = dot(m, n);
        if (s.swiglu) expected = combine(expected, dot(m, N + n));
        if (y[m * N + n] == expected) continue;
        std::printf("token %d, output %d: %g, expected %g\n", m, n,
                    static_cast<double>(y[m * N + n]), static_cast<double>(expected));
        return fail("wrong");
      }
  }

 private:
  const LinearDecodeSm90Shape s;
  const LinearDecodeSm90Config c;
  const int rows, N, K;
  const int parts;                     // into which warpgroups split sums along K
  const int group_skip, group_tokens;  // tokens before the second warpgroup's; those of one
  const int columns;                   // of a warpgroup's product
  std::vector<float> weight, x, y;
  std::vector<float> memory;   // of a CTA, 64 elements a line of 128 bytes
  std::vector<float> d[2][2];  // sums of a CTA's warpgroups, [64 rows, columns]

  // Outputs of a unit: its first, and where those of its weight end.  A second weight's follow on
  // the first one's.
  struct Outputs {
    int first, end;
  };
  Outputs outputs_of(int unit) const {
    const int own = static_cast<int>(s.outputs);
    return unit < c.first_units ? Outputs{unit * c.unit, own}
                                : Outputs{own + (unit - c.first_units) * c.unit, N};
  }

  void fail(const char* what) const {
    ++failures;
    std::printf("  %s: %d rows, N %d, K %d, swiglu %d; cluster %d, slices %d, boxes %d\n", what,
                rows, N, K, s.swiglu, c.cluster, c.slices, c.boxes);
  }
  // In place of silu(gate) up: whole numbers stay whole.
  static float combine(float gate, float up) { return 3 * gate + up; }
  float dot(int m, int n) const {
    float sum = 0;
    for (int k = 0; k < K; ++k) sum += x[m * K + k] * weight[n * K + k];
    return sum;
  }

  // What TMA does with a box: zeros outside of the tensor.
  void copy_box(int byte, const std::vector<float>& from, int first_row, int end_row, int k,
                int box_rows) {
    if (byte % 1024 != 0) fail("a box where no swizzle begins");
    const int line = byte / kLineBytes;
    if ((line + box_rows) * kLineBytes > c.smem_bytes) return fail("a copy past shared memory");
    for (int r = 0; r < box_rows; ++r)
      for (int e = 0; e < kBox; ++e)
        memory[(line + r) * kBox + e] =
            first_row + r < end_row && k + e < K ? from[(first_row + r) * K + k + e] : 0;
  }
  // LinearLoader: the boxes of a stage.
  void load(int stage, int k, Outputs of) {
    for (int b = 0; b < c.boxes; ++b) {
      const int to = stage + b * c.weight_box, at = k + b * kBox;
      copy_box(to, weight, of.first, of.end, at, c.box_rows);
      if (s.swiglu) copy_box(to + c.second_offset, weight, N + of.first, 2 * N, at, c.box_rows);
      if (!c.norms) copy_box(stage + c.x_offset + b * c.x_box, x, 0, rows, at, c.x_rows);
    }
  }
  // LinearNorm: the rows that there are, zeros behind K; here without what a norm changes.
  void load_h() {
    if (c.h_offset % 1024 != 0 || c.h_offset + c.steps * c.boxes * c.x_box > c.gain_offset ||
        c.gain_offset + 4 * K > c.smem_bytes)
      fail("h or its gain past shared memory");
    for (int u = 0; u < c.steps * c.boxes * 8; ++u)
      for (int row = 0; row < rows; ++row)
        for (int e = 0; e < 8; ++e) {
          const int k = 8 * u + e, byte = c.h_offset + u / 8 * c.x_box + row * kLineBytes;
          memory[byte / kLineBytes * kBox + u % 8 * 8 + e] = k < K ? x[row * K + k] : 0;
        }
  }
  // A product of 64 lines from `w` on with as many lines from `v` on as there are columns.
  void multiply(std::vector<float>& sums, int w, int v) {
    if (std::max(w + 64 * kLineBytes, v + columns * kLineBytes) > c.smem_bytes)
      return fail("a product past shared memory");
    for (int r = 0; r < 64; ++r)
      for (int n = 0; n < columns; ++n) {
        const float* const a = &memory[(w / kLineBytes + r) * kBox];
        const float* const b = &memory[(v / kLineBytes + n) * kBox];
        float sum = 0;
        for (int e = 0; e < kBox; ++e) sum += a[e] * b[e];
        sums[r * columns + n] += sum;
      }
  }
  // LinearLoader::walk and LinearProduct::multiply_all for a unit, in turns.
  void multiply_unit(int rank, int unit, Outputs of) {
    const int first_step = rank == 0 ? 0 : c.steps / 2;
    const int steps = (c.cluster == 2 && rank == 0 ? c.steps / 2 : c.steps) - first_step;
    memory.assign(zebra::ceil_div(c.smem_bytes, kLineBytes) * kBox, kNaN);
    for (std::vector<float>& sums : d[rank]) sums.assign(64 * columns, 0);
    if (c.norms) load_h();
    for (int i = 0; i < steps; ++i) {
      const int slot = (unit * steps + i) % c.stages;
      const int stage = zebra::kLinearHeaderBytes + slot * c.stage_bytes;
      load(stage, (first_step + i) * c.boxes * kBox, of);
      for (int group = 0; group < 2; ++group)
        for (int b = parts == 2 ? group * c.slices : 0; b < c.boxes; b += c.slices * parts)
          multiply(d[rank][group],
                   stage + (c.row_tiles == 2 ? group * c.second_offset : 0) + b * c.weight_box,
                   (c.norms ? c.h_offset + (i * c.boxes + b) * c.x_box
                            : stage + c.x_offset + b * c.x_box) +
                       group * group_skip * kLineBytes);
    }
  }

  // Accumulator i of a thread, with what merge() and exchange() add to it.
  float accumulator(int rank, int warp, int lane, int i) const {
    const int row = 16 * (warp % 4) + i / 2 % 2 * 8 + lane / 4;
    const int at = row * columns + i / 4 * 8 + lane % 4 * 2 + i % 2;
    float v = d[rank][warp / 4][at];
    if (c.cluster == 1) return v;
    v += d[rank ^ 1][warp / 4][at];
    if (parts == 2) v += d[rank][1][at] + d[rank ^ 1][1][at];
    return v;
  }
  // LinearProduct::finish and write.
  void finish_unit(int rank, Outputs of) {
    const bool in_parts = parts == 2 && c.cluster == 1;
    const int staged = zebra::linear_staged_tokens(c.tokens, c.row_tiles);
    const int pitch = zebra::linear_staging_pitch(c.row_tiles), part_size = staged * pitch;
    const int size = (in_parts ? 2 : 1) * part_size;
    if (size * 4 > c.smem_bytes - c.staging_offset) return fail("sums past shared memory");
    for (int from = 0; from < c.tokens && from < rows; from += staged) {
      if (c.cluster == 2 && from / (c.tokens / 2) != rank) continue;
      std::vector<float> staging(size, kNaN);
      for (int warp = 0; warp < 8; ++warp) {
        const int part = parts == 2 ? warp / 4 : 0, tile = c.row_tiles == 2 ? warp / 4 : 0;
        if (part == 1 && !in_parts) continue;
        const int own = from - warp / 4 * group_skip;  // among the warpgroup's tokens
        if (own < 0 || own >= group_tokens) continue;
        for (int half = 0; half < 2; ++half) {
          const int slice = (16 * (warp % 4) + 8 * half) * kLineBytes / c.weight_box;
          if (c.slices > 1 && slice >= c.slices) continue;
          for (int lane = 0; lane < 32; ++lane)
            for (int j = 0; j < staged / 8; ++j) {
              const int i =
                  ((c.slices > 1 ? slice : 0) * group_tokens + own) / 2 + 4 * j + 2 * half;
              const int row = 64 * tile + 16 * (warp % 4) + lane / 4 + 8 * half;
              const int to = (part * staged + 8 * j + lane % 4 * 2) * pitch + row;
              staging[to] = accumulator(rank, warp, lane, i);
              staging[to + pitch] = accumulator(rank, warp, lane, i + 1);
            }
        }
      }
      for (int t = 0; t < staged && from + t < rows; ++t)
        for (int n = 0; n < c.unit && of.first + n < of.end; ++n) {
          float v = 0;
          for (int slice = 0; slice < c.slices; ++slice) {
            const int at = t * pitch + slice * (c.weight_box / kLineBytes) + n;
            v += in_parts ? staging[at] + staging[part_size + at] : staging[at];
          }
          if (s.swiglu) v = combine(v, staging[t * pitch + 64 + n]);
          float& to = y[(from + t) * N + of.first + n];
          if (!std::isnan(to)) return fail("an output written twice");
          to = v;
        }
    }
  }
};

void emulate(const LinearDecodeSm90Shape& s, int sms, const LinearDecodeSm90Tuning& tuning = {}) {
  const LinearDecodeSm90Config c = zebra::select_linear_decode_sm90_config(s, sms, tuning);
  if (!zebra::linear_ring_turns(c)) return;
  ++emulated;
  Emulation(s, c).run();
}

}  // namespace

int main() {
  // Few multiprocessors, so that small problems have clusters with several units.
  for (const int sms : {3, 6})
    for (const int rows : {1, 8, 9, 17, 33, 64, 70, 128})
      for (const int N : {1, 7, 40, 66, 131, 300, 1000})
        for (const int K : {8, 64, 100, 200, 520})
          for (const bool swiglu : {false, true}) {
            if (std::int64_t{rows} * N * K > 3000000) continue;
            const LinearDecodeSm90Shape s = {rows, N, K, swiglu};
            emulate(s, sms);
            for (const int second : {30, 162})
              if (!swiglu && K > 64)
                emulate({rows, N, K, false, rows <= 8 && K % 8 == 0, true, second}, sms);
            if (rows <= 8 && K % 8 == 0) emulate({rows, N, K, swiglu, true}, sms);
            if (rows > 32) emulate(s, sms, {1, 1, 0, -1});
            emulate(s, sms,
                    rows > 32 ? LinearDecodeSm90Tuning{2, 4, 60000, -1}
                              : LinearDecodeSm90Tuning{0, 4, 0, -1});
          }
  // Slices and shares as the whole machine has them.
  for (const LinearDecodeSm90Shape& s :
       {LinearDecodeSm90Shape{5, 4300, 200, false}, LinearDecodeSm90Shape{5, 2000, 300, false},
        LinearDecodeSm90Shape{20, 3000, 136, false}, LinearDecodeSm90Shape{3, 17000, 72, false},
        LinearDecodeSm90Shape{40, 5000, 72, false},
        LinearDecodeSm90Shape{5, 2000, 304, false, true},
        LinearDecodeSm90Shape{5, 2000, 304, false, true, true, 160},
        LinearDecodeSm90Shape{5, 4096, 200, false, false, true, 224},
        LinearDecodeSm90Shape{40, 4096, 72, false, false, true, 224},
        LinearDecodeSm90Shape{5, 2048, 304, false, true, true, 0},
        LinearDecodeSm90Shape{3, 17000, 72, false, true}})
    emulate(s, 132);
  std::printf("linear_decode: %d emulated, %d failures\n", emulated, failures);
  return failures == 0 ? 0 : 1;
}
