// Tile configurations are pure functions: check their promises over many problems, without CUDA.
#include <cstdio>
#include <initializer_list>
#include <utility>
#include <vector>

#include "common/token_tile.h"
#include "linear_decode/linear_decode_sm90_config.h"
#include "mla_decode/mla_decode_config.h"
#include "mla_decode/mla_decode_weight_config.h"
#include "mla_decode/mla_decode_wide_config.h"
#include "rms_norm/rms_norm.h"
#include "rms_norm/rms_norm_config.h"
#include "ssd_scan/ssd_scan_sm90_config.h"

namespace {

int failures = 0;

#define EXPECT(condition, ...)                                             \
  do {                                                                     \
    if (!(condition)) {                                                    \
      ++failures;                                                          \
      std::printf("%s:%d: %s fails for ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                            \
      std::printf("\n");                                                   \
    }                                                                      \
  } while (0)

void token_tiles_cover_a_token() {
  for (std::int64_t vecs = 0; vecs <= 20000; ++vecs) {
    const zebra::TokenTile t = zebra::select_token_tile(vecs);
    const long n = static_cast<long>(vecs);
    EXPECT(t.x % 32 == 0 && t.x >= 32 && t.x * t.y <= 256 && t.y >= 1, "%ld vectors", n);
    EXPECT(t.passes * t.x >= vecs && (t.passes - 1) * t.x < vecs + 1, "%ld vectors", n);
    EXPECT(t.passes * t.x - vecs < 32 * (t.passes > 1 ? t.passes : 1), "%ld vectors", n);
  }
}

void rms_norm_tiles_cover_a_row() {
  for (std::int64_t dim = 1; dim <= 70000; dim += dim < 600 ? 1 : 97)
    for (const int bytes : {2, 4})
      for (const bool aligned : {false, true}) {
        if (aligned && dim % (16 / bytes) != 0) continue;
        const zebra::RmsNormConfig c = zebra::select_rms_norm_config(dim, bytes, aligned);
        EXPECT(c.threads % 32 == 0 && c.threads <= 512, "dim %ld", static_cast<long>(dim));
        EXPECT(c.vec == (aligned ? 16 / bytes : 1), "dim %ld", static_cast<long>(dim));
        const std::int64_t held = std::int64_t{c.threads} * c.vec * c.vecs_per_thread;
        EXPECT(c.vecs_per_thread == 0 || held >= dim, "dim %ld", static_cast<long>(dim));
        EXPECT(c.vecs_per_thread == 0 || c.threads == 32 || held < 4 * dim,
               "dim %ld wastes threads", static_cast<long>(dim));
      }
  static_assert(zebra::rms_norm_backward_ctas(0) == 1, "a launch needs a CTA");
  static_assert(zebra::rms_norm_backward_ctas(1 << 20) == 256, "bounded partials");
}

void rms_norm_backward_tiles_cover_a_row() {
  for (std::int64_t dim = 1; dim <= 70000; dim += dim < 600 ? 1 : 8)
    for (const int bytes : {2, 4})
      for (const bool aligned : {false, true})
        for (const bool has_dsum : {false, true}) {
          const int vec = aligned ? 16 / bytes : 1;
          if (dim % vec != 0) continue;
          const zebra::RmsNormBackwardConfig c =
              zebra::select_rms_norm_backward_config(dim, bytes, aligned, has_dsum);
          const long n = static_cast<long>(dim);
          const int threads = c.threads * c.rows;
          EXPECT(c.vec == vec && c.threads % 32 == 0 && threads <= 512, "dim %ld", n);
          EXPECT(c.vecs_per_thread != 0 || !aligned || dim > 8 * 1024, "dim %ld walks", n);
          if (c.vecs_per_thread == 0) continue;
          const std::int64_t held = std::int64_t{c.threads} * c.vec * c.vecs_per_thread;
          EXPECT(held >= dim && (c.threads == 32 || held < dim + 32 * c.vec * c.vecs_per_thread),
                 "dim %ld wastes threads", n);
          // The kernels' launch bounds; rstd and sums lie beside the ring.
          EXPECT(c.vecs_per_thread == 4 || threads <= 320, "dim %ld", n);
          EXPECT(c.rows == 1 || threads <= 256, "dim %ld", n);
          EXPECT(c.smem_bytes + 512 <= zebra::kRmsNormMostSmemBytes, "dim %ld", n);
          EXPECT(c.smem_bytes == threads * zebra::kRmsNormRingVecs * 16 * (has_dsum ? 3 : 2),
                 "dim %ld", n);
        }
}

constexpr zebra::SsdMachine kH200 = {132, 4250};

// Not packed: walks the units as the CTAs do and finds every grain once; walks the shares of the
// walk for the states, and finds that what every unit folds is what lies before it in its sequence.
void ssd_scan_units_cover_the_line(const zebra::SsdScanSm90Config& c, std::int64_t lines,
                                   const char* where) {
  struct Range {
    int line, from, to;  // chunks
  };
  std::vector<Range> slots(c.cut ? c.state_units + c.units : 0, Range{-1, 0, 0});
  for (int v = 0; c.cut && v < c.state_units; ++v) {
    int at = zebra::ssd_scan_state_cut(c, v);
    const int end = zebra::ssd_scan_state_cut(c, v + 1);
    EXPECT(end > at, "share %d of %s", v, where);
    for (int begin = at; at < end;) {
      const int line = at / c.state_line;
      if (at == line * c.state_line) begin = at;  // afresh
      const zebra::SsdNextCut cut = zebra::ssd_scan_next_cut(c, line, at - line * c.state_line);
      const int next = line * c.state_line + cut.chunk;
      EXPECT(next > at && cut.chunk <= c.state_line && cut.unit < c.units, "%s", where);
      if (next <= at) break;
      at = next < end ? next : end;
      Range& slot = slots[next < end ? c.state_units + cut.unit : v];
      EXPECT(slot.line < 0, "a slot is written twice in %s", where);
      slot = {line, begin - line * c.state_line, at - line * c.state_line};
    }
    if (v + 1 == c.state_units) EXPECT(end == c.cut_lines * c.state_line, "%s", where);
  }
  std::vector<char> seen(lines * c.grains, 0);
  const auto see = [&](int line, int grain, int size) {
    EXPECT(size > 0 && line < lines && grain + size <= c.grains, "%s", where);
    for (int g = grain; g < grain + size && line < lines && g < c.grains; ++g)
      EXPECT(seen[line * c.grains + g]++ == 0, "line %d, grain %d of %s", line, g, where);
  };
  for (int u = 0; u < c.units; ++u) {
    zebra::SsdRun r = {};
    for (int i = 0; i < 2; ++i) {
      if (i == 0 ? c.cut_lines == 0 : c.wholes == 0) continue;
      r = i == 0 ? zebra::ssd_scan_cut_run(c, u) : zebra::ssd_scan_whole_run(c, u);
      EXPECT(r.left >= 0 && (r.left == 0 || r.grain < r.stop), "unit %d of %s", u, where);
      if (r.left > 0 && r.grain > 0) {
        const int from = r.line * c.state_line, to = from + (r.grain << c.grain_shift);
        int v = zebra::ssd_scan_state_unit(c, from), known = 0;
        const auto fold = [&](const Range& slot) {
          EXPECT(slot.line == r.line && slot.from == known, "unit %d of %s", u, where);
          known = slot.to;
        };
        for (; zebra::ssd_scan_state_cut(c, v + 1) <= to; ++v) fold(slots[v]);
        if (zebra::ssd_scan_state_cut(c, v) < to) fold(slots[c.state_units + u]);
        EXPECT(known == to - from, "unit %d of %s", u, where);
      }
      for (; r.left > 0; ++r.line, r.grain = 0) {
        const int size = r.stop - r.grain < r.left ? r.stop - r.grain : r.left;
        see(r.line, r.grain, size);
        r.left -= size;
      }
    }
  }
  for (std::size_t i = 0; i < seen.size(); ++i) EXPECT(seen[i] == 1, "grain %zu of %s", i, where);
}

void ssd_scan_cuts_cover_every_sequence(const zebra::SsdScanSm90Shape& s, bool invariant) {
  const zebra::SsdScanSm90Config c = zebra::select_ssd_scan_sm90_config(s, kH200, invariant);
  char where[96];
  std::snprintf(where, sizeof(where), "%ld tokens, %ld sequences, %ld heads, P %d, N %d",
                static_cast<long>(s.tokens), static_cast<long>(s.sequences),
                static_cast<long>(s.heads), s.head_dim, s.state_dim);
  EXPECT(c.smem_bytes <= zebra::kSsdSm90SmemBytes && c.stages >= 1 && c.zy_slots >= 2, "%s", where);
  EXPECT(c.state_smem_bytes <= zebra::kSsdSm90SmemBytes && c.state_stages >= 2, "%s", where);
  EXPECT(c.heads * c.head_slots >= s.heads && c.width * c.bundles == c.head_slots, "%s", where);
  EXPECT(c.items == c.units * c.width && c.units >= 1, "%s", where);
  EXPECT(c.state_slots >= c.state_items && (c.state_items > 0) == c.cut, "%s", where);
  // A bundle holds whole groups of heads that read the same x and B.
  const std::int64_t group = s.heads / (s.x_heads > s.b_heads ? s.x_heads : s.b_heads);
  const std::int64_t slots = group % c.heads == 0 ? group / c.heads : 1;
  EXPECT(c.width == 1 || c.width % slots == 0 || slots > 16, "%s", where);
  if (s.sequences == 0) ssd_scan_units_cover_the_line(c, s.rows * c.bundles, where);
  if (s.sequences > 0 && !c.cut) EXPECT(c.units == c.bundles * s.sequences, "%s", where);
  if (invariant && c.cut) EXPECT(1 << c.grain_shift == 2048 / zebra::kSsdChunk, "%s", where);
}

void ssd_scan_tiles_fit() {
  for (const int head_dim : {64, 128})
    for (const int state_dim : {64, 128})
      for (const std::int64_t heads : {1, 3, 4, 24, 32, 80})
        for (const std::int64_t group : {1, 2, 3, 4, 8})  // heads that share x, B or C
          for (std::int64_t tokens = 0; tokens < 70000; tokens = tokens * 3 + 1)
            for (const bool flag : {false, true}) {
              if (heads % group != 0) continue;
              const std::int64_t few = heads / group;
              for (const std::int64_t c_heads : {few, heads})
                for (const std::int64_t x_heads : {few, heads})
                  for (const std::int64_t sequences : {0, 1, 7, 300})
                    ssd_scan_cuts_cover_every_sequence(
                        {sequences > 0 ? 1 : 2, sequences, tokens, heads, x_heads, few, c_heads,
                         head_dim, state_dim, flag},
                        flag);
            }
  // One wave of the 132 multiprocessors of an H200 where it can be had.
  constexpr zebra::SsdScanSm90Config c =
      zebra::select_ssd_scan_sm90_config({2, 0, 8192, 32, 8, 8, 32, 128, 128, true}, kH200, false);
  static_assert(
      c.items <= 132 && c.items >= 128 && c.width == 4 && c.stages == 3 && c.zy_slots == 3,
      "the 8B layer, 2 x 8192");
}

void mla_decode_tiles_fit() {
  for (const int smem : {101376, 166912, zebra::kMlaSm90SmemBytes})  // sm_89, sm_80, sm_90
    for (std::int64_t rank = 8; rank <= 256; rank += 8)
      for (std::int64_t rope = 0; rope <= 64; rope += 8)
        for (const std::int64_t rows : {1, 16, 17, 24, 32, 48, 64, 128, 2048})
          for (const std::int64_t batch : {1, 7, 64, 300})
            for (const std::int64_t split : {0, 1, 512, -1}) {
              const bool tma = split < 0;
              if (tma &&
                  (smem < zebra::kMlaSm90SmemBytes || !zebra::mla_decode_tma_takes(rank, rope, 64)))
                continue;
              const zebra::MlaDecodeConfig c = zebra::select_mla_decode_config(
                  {batch, rows, rank, rope, 5000, tma ? 0 : split, tma}, 132, smem);
              const auto r = static_cast<long>(rank), e = static_cast<long>(rope);
              EXPECT(c.rank >= rank && c.rope >= rope, "%ld + %ld", r, e);
              EXPECT(c.smem_bytes <= smem && c.slots >= 2, "%ld + %ld in %d", r, e, smem);
              const int width = c.rank + c.rope, parts = c.rank / 32;
              EXPECT(c.merge_parts >= 1 && c.merge_parts <= parts, "%ld + %ld", r, e);
              EXPECT(c.q_offset % 1024 == 0 && c.ring_offset % 1024 == 0, "%ld + %ld", r, e);
              EXPECT(c.q_offset >= zebra::kMlaMergeOffset + zebra::mla_merge_bytes(c.merge_parts) &&
                         c.ring_offset >= c.q_offset + zebra::mla_q_bytes(c.groups, width),
                     "%ld + %ld", r, e);
              EXPECT(c.streams >= 1 && c.streams * c.groups * c.halves <= zebra::kMlaWarps,
                     "%ld + %ld", r, e);
              EXPECT(std::int64_t{16} * c.groups * c.passes >= rows, "%ld rows",
                     static_cast<long>(rows));
              const int workers = c.streams * c.halves;  // that an item's end knows by TMA
              EXPECT(!tma || rows > 32 || workers == 4 || workers == 8, "%ld + %ld: %d", r, e,
                     workers);
              EXPECT(c.split % zebra::kMlaTmaStage == 0 && c.split >= split, "split %ld",
                     static_cast<long>(split));
              EXPECT(c.split == 0 || c.pieces * c.split >= 5000, "split %ld",
                     static_cast<long>(split));
              EXPECT(c.ctas >= 1 && c.ctas <= 132, "batch %ld", static_cast<long>(batch));
            }
  // 32 rows of the 8B model: four streams of two stages on Hopper, whole rows added at once.
  constexpr zebra::MlaDecodeConfig c = zebra::select_mla_decode_config(
      {64, 32, 160, 64, 8192, 0, false}, 132, zebra::kMlaSm90SmemBytes);
  static_assert(c.groups == 2 && c.streams == 4 && c.slots == 2 && c.passes == 1, "8B");
  static_assert(c.merge_parts == 5, "8B");
  // Where sequences are cut, in equal parts if that is nearly all, a multiprocessor is left to the
  // combination; where all have whole ones, none is.
  const auto ctas = [](std::int64_t batch) {
    return zebra::select_mla_decode_config({batch, 32, 160, 64, 32768, 0, true}, 132,
                                           zebra::kMlaSm90SmemBytes)
        .ctas;
  };
  EXPECT(ctas(1) == 131 && ctas(2) == 130 && ctas(8) == 128 && ctas(12) == 132, "1: %d", ctas(1));
  EXPECT(ctas(64) == 128 && ctas(132) == 132 && ctas(264) == 132, "64: %d", ctas(64));
}

void mla_wide_tiles_fit() {
  for (const std::int64_t page : {8, 16, 24, 48, 64, 96, 256}) {
    const int box = zebra::mla_wide_box(page);
    EXPECT(zebra::mla_wide_takes(512, 64, page) && box >= 8 && page % box == 0 && 64 % box == 0,
           "page %ld", static_cast<long>(page));
  }
  for (std::int64_t rank = 8; rank <= 512; rank += 8)
    for (const std::int64_t rows : {1, 16, 64, 65, 128, 129, 2048})
      for (const std::int64_t batch : {1, 7, 64, 300})
        for (const std::int64_t split : {0, 1, 512})
          for (const std::int64_t sms : {1, 78, 132}) {
            const zebra::MlaDecodeConfig c =
                zebra::select_mla_wide_config({batch, rows, rank, 64, 5000, split, true}, sms);
            const auto r = static_cast<long>(rank);
            EXPECT(c.rank >= rank && c.smem_bytes <= zebra::kMlaSm90SmemBytes, "%ld", r);
            EXPECT(c.slots >= 2 && c.slots % 2 == 0, "%ld", r);
            EXPECT(std::int64_t{16} * c.groups * c.passes >= rows && c.groups * 16 <= 128,
                   "%ld rows", static_cast<long>(rows));
            const int all = (c.ctas + c.rehearses) * (c.groups * 16 / 64);
            EXPECT(c.ctas >= 1 && (sms == 1 || all <= sms), "%ld SMs", static_cast<long>(sms));
          }
  // DeepSeek's 128 heads: a sequence is a pair's.
  constexpr zebra::MlaDecodeConfig c =
      zebra::select_mla_wide_config({64, 128, 512, 64, 8192, 0, true}, 132);
  static_assert(c.ctas == 64 && c.groups == 8 && c.passes == 1 && c.slots == 2 && c.rehearses);
  // A combination of few threads a multiprocessor.
  constexpr zebra::MlaDecodeConfig eight =
      zebra::select_mla_wide_config({8, 128, 512, 64, 8192, 0, true}, 132);
  static_assert(eight.ctas == 64 && eight.combine_lanes == 1);
  static_assert(
      zebra::select_mla_wide_config({1, 128, 512, 64, 32768, 0, true}, 132).combine_lanes == 8);
}

// The products with kv_b_weight fit shared memory and the limits of a grid, and give every element
// of a tile a thread.
void mla_decode_weight_tiles_fit() {
  struct Size {
    std::int64_t heads, kv_heads, nope, v_dim, rank;
  };
  constexpr Size kSizes[] = {
      {32, 8, 64, 128, 160}, {24, 8, 64, 128, 128}, {32, 8, 32, 64, 128}, {128, 128, 128, 128, 512},
      {4, 1, 0, 8, 8},       {6, 2, 512, 520, 256}, {3, 3, 8, 24, 480}};
  for (const int smem : {101376, 166912, zebra::kMlaSm90SmemBytes})
    for (const Size& s : kSizes)
      for (const std::int64_t tokens : {1, 2, 8, 64, 256, 5000})
        for (const bool is_split : {false, true}) {
          const zebra::MlaWeightConfig c = zebra::select_mla_weight_config(
              {tokens * s.heads, s.heads, s.kv_heads, s.nope, s.v_dim, s.rank, 64, is_split}, 132,
              smem);
          const auto t = static_cast<long>(tokens), r = static_cast<long>(s.rank);
          EXPECT(c.absorb_smem_bytes <= smem && c.expand_smem_bytes <= smem, "rank %ld", r);
          EXPECT(c.absorb_slices >= 1 && c.absorb_slices < 65536, "%ld tokens", t);
          EXPECT(c.expand_slices >= 1 && c.expand_slices < 65536, "%ld tokens", t);
          EXPECT(c.width % 8 == 0 && c.widths * c.width >= s.v_dim, "rank %ld", r);
          EXPECT(c.rows >= 1 && c.rows <= 16 && c.threads % 32 == 0, "%ld tokens", t);
          EXPECT(c.lanes == 1 || c.lanes * c.rows * r / 4 <= c.threads, "rank %ld", r);
          EXPECT(c.pitch / 16 % 2 == 1, "rank %ld", r);
          EXPECT(c.pitch >= r * 2 + 16 && (c.pitch - 16) % 64 == 0, "rank %ld", r);
          // With split_size the order of summation is the same for every batch.
          EXPECT(!is_split || (c.rows == 4 && c.threads == zebra::kMlaExpandThreads), "%ld tokens",
                 t);
        }
  constexpr zebra::MlaWeightConfig one = zebra::select_mla_weight_config(
      {32, 32, 8, 64, 128, 160, 64, false}, 132, zebra::kMlaSm90SmemBytes);
  static_assert(one.rows == 1 && one.expand_slices == 4 && one.lanes == 25, "8B, one sequence");
  constexpr zebra::MlaWeightConfig many = zebra::select_mla_weight_config(
      {64 * 32, 32, 8, 64, 128, 160, 64, false}, 132, zebra::kMlaSm90SmemBytes);
  static_assert(many.rows == 16 && many.expand_slices == 16 && many.absorb_slices == 16,
                "8B, 64 sequences");
}

// Every output belongs to one unit, every step along K to one CTA, and no product reads past the
// shared memory of its CTA.
void linear_decode_units_cover_the_outputs(const zebra::LinearDecodeSm90Shape& s, int sms) {
  const zebra::LinearDecodeSm90Config c = zebra::select_linear_decode_sm90_config(s, sms);
  const auto N = static_cast<long>(s.outputs), K = static_cast<long>(s.K);
  const auto rows = static_cast<long>(s.rows);
  const auto other = static_cast<long>(s.second_outputs);
#define EXPECT_HERE(condition) \
  EXPECT(condition, "%ld rows, N %ld + %ld, K %ld, %d SMs", rows, N, other, K, sms)
  EXPECT_HERE(c.tokens >= s.rows && (c.tokens == 8 || c.tokens < 2 * s.rows));
  EXPECT_HERE(c.unit >= 8 && c.unit <= (s.swiglu ? 64 : 128) && c.unit <= 64 * c.row_tiles);
  const auto cover = [&](std::int64_t units, std::int64_t outputs) {
    return units * c.unit >= outputs && (units - 1) * c.unit < outputs;
  };
  EXPECT_HERE(cover(c.first_units, s.outputs));
  EXPECT_HERE(cover(c.all_units - c.first_units, s.second_outputs));
  EXPECT_HERE(c.clusters * c.units >= c.all_units && (c.clusters - 1) * c.units < c.all_units);
  EXPECT_HERE(c.projects == s.projects && (!s.projects || c.unit % 2 == 0));
  EXPECT_HERE(!s.projects ||
              (c.tokens_offset % 16 == 0 &&
               c.tokens_offset >= c.gain_offset + (c.norms ? 4 * K : 0) &&
               c.tokens_offset + zebra::kLinearTokenBytes * c.tokens <= c.smem_bytes));
  EXPECT_HERE(c.clusters * c.cluster <= (sms < c.cluster ? c.cluster : sms));
  EXPECT_HERE(std::int64_t{c.steps} * c.boxes * 64 >= s.K &&
              std::int64_t{c.steps - 1} * c.boxes * 64 < s.K);
  EXPECT_HERE(zebra::linear_ring_turns(c) && c.stages <= zebra::kLinearMostStages);
  EXPECT_HERE(c.smem_bytes <= zebra::kLinearWholeSmemBytes);
  EXPECT_HERE(c.last_loads >= 1);
  EXPECT_HERE(c.box_rows % 8 == 0 && c.box_rows >= c.unit && c.box_rows < c.unit + 8);
  EXPECT_HERE(c.weight_box == (s.swiglu ? 2 : 1) * c.box_rows * 128);
  EXPECT_HERE(c.weight_box % 1024 == 0 && c.second_offset % 1024 == 0 && c.x_box % 1024 == 0 &&
              c.stage_bytes % 1024 == 0 && c.staging_offset % 1024 == 0);
  // A product reads 64 rows of every box, both warpgroups have one in every stage, and all boxes of
  // a stage are theirs.
  const int last_box = c.staging_offset - c.stage_bytes + (c.boxes - 1) * c.weight_box;
  EXPECT_HERE(last_box + (c.row_tiles - 1) * c.second_offset + 8192 <= c.smem_bytes);
  const int split = zebra::linear_parts(c.tokens, c.row_tiles);
  const int groups = c.boxes / c.slices / split;
  EXPECT_HERE(groups == 1 || groups == 2 || groups == 4);
  const int parts = c.cluster == 1 ? split : 1, merged = split > parts ? c.tokens * 256 : 0;
  const bool in_ring = c.merge_offset < c.staging_offset;
  EXPECT_HERE(merged == 0 ? in_ring
              : in_ring   ? c.units == 1 && c.merge_offset + merged <= c.staging_offset
                          : c.merge_offset + merged <= c.smem_bytes);
  const int held = (in_ring ? c.h_offset : c.merge_offset) - c.staging_offset;
  const int staged = zebra::linear_staged_tokens(c.tokens, c.row_tiles);
  EXPECT_HERE(held >= parts * staged * zebra::linear_staging_pitch(c.row_tiles) * 4);
  EXPECT_HERE(c.tokens % (c.cluster * staged) == 0);
  EXPECT_HERE(c.cluster == 1 || held >= c.tokens / 2 * 64 * c.row_tiles * 4);
  EXPECT_HERE(!c.norms || (s.norm && c.cluster == 1 && c.h_offset % 1024 == 0 &&
                           c.gain_offset - c.h_offset >= c.steps * c.boxes * c.x_box &&
                           c.gain_offset + 4 * K <= c.smem_bytes));
  // How sums are split must not depend on the GPU.
  const zebra::LinearDecodeSm90Config elsewhere = zebra::select_linear_decode_sm90_config(s, 78);
  EXPECT_HERE(c.cluster == elsewhere.cluster && c.slices == elsewhere.slices);
  EXPECT_HERE(c.boxes % c.slices == 0 && (c.slices == 1 || c.slices * c.weight_box <= 8192));
  // Enough of the weight on its way, where there is that much.
  const int wanted = c.stages * c.boxes * c.unit * 128 * (s.swiglu ? 2 : 1);
  const bool all = c.stages >= (c.steps / c.cluster) * c.units;
  EXPECT_HERE(sms != 132 || all || s.outputs < 2048 || wanted >= 24 * 1024);
#undef EXPECT_HERE
}

void linear_decode_tiles_fit() {
  for (const int sms : {1, 78, 114, 132, 144})
    for (const std::int64_t rows : {1, 7, 8, 9, 16, 17, 32, 33, 64, 65, 100, 128})
      for (const std::int64_t K : {1, 64, 72, 1000, 2048, 4096, 14336})
        for (std::int64_t N = 1; N < 300000; N += N < 300 ? 1 : N / 7)
          for (const bool swiglu : {false, true})
            for (const bool norm : {false, true}) {
              linear_decode_units_cover_the_outputs({rows, N, K, swiglu, norm}, sms);
              if (swiglu || N > 30000) continue;
              for (const std::int64_t second : {0, 2, 224, 576})
                linear_decode_units_cover_the_outputs({rows, N, K, false, norm, true, second}, sms);
            }
  // The shapes of decoding on an H200: units are whole boxes, and three of four multiprocessors
  // have one, or the share of the busiest is near the mean.
  for (const std::int64_t N : {2048, 2208, 3264, 4096, 4320, 10272, 14336, 128256}) {
    const zebra::LinearDecodeSm90Config c =
        zebra::select_linear_decode_sm90_config({8, N, 4096, false}, 132);
    EXPECT(c.unit % 8 == 0 ? 4 * c.clusters >= 3 * 132
                           : 132.0 * c.units * c.unit < 1.05 * static_cast<double>(N),
           "N %ld", static_cast<long>(N));
  }
  for (const auto& [N, second] : {std::pair{2048, 160}, {3072, 192}, {4096, 224}}) {
    const zebra::LinearDecodeSm90Config c =
        zebra::select_linear_decode_sm90_config({1, N, N, false, true, true, second}, 132);
    EXPECT(c.units == 1 &&
               (c.unit % 8 == 0 ? 4 * c.clusters >= 3 * 132 : 132.0 * c.unit < 1.08 * (N + second)),
           "N %d", N);
  }
  constexpr auto most_rows = [](std::int64_t outputs, std::int64_t K, bool is_plain,
                                bool norm = false, bool swiglu = false) {
    return zebra::linear_most_rows({1, outputs, K, swiglu, norm}, is_plain);
  };
  static_assert(most_rows(14336, 4096, false) == 64 && most_rows(14336, 4096, false, true) == 64 &&
                most_rows(14336, 4096, false, true, true) == 128);
  static_assert(most_rows(4096, 8192, false) == 128 && most_rows(4096, 8192, true) == 128 &&
                most_rows(4096, 8192, false, true) == 128 && most_rows(4097, 8192, false) == 128 &&
                most_rows(4097, 8192, true) == 128 && most_rows(4225, 8192, true) == 64);
  static_assert(most_rows(4096, 4096, true) == 128 && most_rows(4224, 4096, true) == 128 &&
                most_rows(4095, 4096, true) == 64 && most_rows(4225, 4096, true) == 64 &&
                most_rows(4096, 4095, true) == 64 && most_rows(4097, 4096, true) == 128 &&
                most_rows(2208, 2048, true) == 64 && most_rows(2048, 2048, true) == 64);
  static_assert(most_rows(8191, 4096, false) == 128 && most_rows(8192, 4096, false) == 64 &&
                most_rows(8191, 4096, true) == 64 && most_rows(8192, 4096, true) == 64 &&
                most_rows(16384, 2048, true) == 64 && most_rows(28672, 4096, true) == 64);
  static_assert(most_rows(24576, 16384, false) == 64 && most_rows(24575, 16384, false) == 128 &&
                most_rows(24575, 4096, true) == 64 && most_rows(24576, 4096, true) == 64 &&
                most_rows(128256, 4096, false) == 64 &&
                most_rows(128256, 4096, false, true) == 64 && most_rows(128256, 4096, true) == 64 &&
                most_rows(128256, 4096, true, false, true) == 128);
}

}  // namespace

int main() {
  token_tiles_cover_a_token();
  mla_decode_tiles_fit();
  mla_wide_tiles_fit();
  mla_decode_weight_tiles_fit();
  linear_decode_tiles_fit();
  rms_norm_tiles_cover_a_row();
  rms_norm_backward_tiles_cover_a_row();
  ssd_scan_tiles_fit();
  std::printf(failures == 0 ? "configs: all promises hold\n" : "configs: %d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
