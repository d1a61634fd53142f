// mla_decode's attention kernels on the CPU: random problems for the device's own code, with a
// thread of the host for each of the device's, against fp64.  Unused cache, table and shared memory
// hold NaN or nonsense.  Include it after a kernel.
#pragma once

#include <random>
#include <sstream>
#include <string>

namespace {

using zebra::MlaArgs, zebra::MlaDecodeConfig, zebra::MlaUnit;

int failures = 0, checked = 0;

struct Case {
  std::vector<int> lens;
  int T, H, R, E, page;
  int sms = 4, split = 0;
  bool late = false, steep = false;
};

// A kernel: kThreads; configure(shape, multiprocessors), map(cache, its rows), and run(arguments).
template <typename T, typename Kernel>
class Problem {
 public:
  explicit Problem(const Case& c_) : c(c_), width(c.R + c.E), random(7) {
    std::ostringstream text;
    text << "R " << c.R << " + " << c.E << ", H " << c.H << ", T " << c.T << ", page " << c.page
         << ", split " << c.split << (c.late ? ", late" : "") << ", lengths";
    int used = 1;
    for (const int length : c.lens) {
      text << " " << length;
      used += (length + c.page - 1) / c.page;
      most = max(most, (length + c.page - 1) / c.page);
    }
    where = text.str();
    most += 1;
    table.assign(c.lens.size() * most, -1);
    cache.assign(static_cast<std::size_t>(used) * c.page * width, 0xffff);
    std::vector<int> ids(used);
    for (int i = 0; i < used; ++i) ids[i] = i;
    std::shuffle(ids.begin(), ids.end(), random);
    int next = 0;
    for (std::size_t b = 0; b < c.lens.size(); ++b)
      for (int t = 0; t < c.lens[b]; ++t) {
        if (t % c.page == 0) table[b * most + t / c.page] = ids[next++];
        for (int d = 0; d < width; ++d)
          *row(b, t, d) = zebra::narrow<T>(c.steep && d == 0 ? 6.f * (t / 16) : normal());
      }
    q.resize(c.lens.size() * c.T * c.H * width);
    for (std::uint16_t& v : q) v = zebra::narrow<T>(normal());
    std::memset(&a, 0, sizeof(a));
  }

  void check() {
    ++checked;
    const MlaDecodeConfig config =
        Kernel::configure({static_cast<std::int64_t>(c.lens.size()), c.T * c.H, c.R, c.E,
                           std::int64_t{most} * c.page, c.split, Kernel::kTma},
                          c.sms);
    set(config);
    gridDim.x = config.ctas + Kernel::kRehearsing, gridDim.y = Kernel::ctas_of_rows(config);
    for (int y = 0; y < gridDim.y; ++y)
      for (int x = 0; x < gridDim.x; ++x) {
        std::memset(zebra::smem, 0xff, sizeof(zebra::smem));
        zebra::copies_are_late = zebra::sm90::wgmma_is_late = c.late;
        cuda_on_host::run_cta(Kernel::kThreads, {x, y}, [&](int) { Kernel::run(a, maps); });
        zebra::all_have_met();
      }
    combine(config);
    compare();
  }

 private:
  const Case c;
  const int width;
  std::mt19937 random;
  std::string where;
  int most = 0;
  std::vector<std::uint16_t> q, cache, o;
  std::vector<int> table;
  std::vector<float> lse, sums;
  std::vector<float2> stats;
  std::vector<MlaUnit> units;
  MlaArgs a;
  typename Kernel::Maps maps;

  float normal() { return static_cast<float>(random() % 2001) / 1000 - 1; }
  std::uint16_t* row(std::size_t b, int t, int d) {
    const std::int64_t page = table[b * most + t / c.page];
    return &cache[(page * c.page + t % c.page) * width + d];
  }

  void set(const MlaDecodeConfig& config) {
    const std::size_t rows = c.lens.size() * c.T * c.H;
    o.assign(rows * c.R, 0xffff), lse.assign(rows, NAN);
    sums.assign(config.partials * 16 * config.groups * config.rank, NAN);
    stats.assign(config.partials * 16 * config.groups, {NAN, NAN});
    units.resize(config.units + 1);
    std::memset(static_cast<void*>(units.data()), 0xff, units.size() * sizeof(MlaUnit));
    a.q = q.data(), a.cache = cache.data(), a.block_table = table.data();
    a.seq_lens = c.lens.data(), a.o = o.data(), a.lse = lse.data();
    a.stats = stats.data(), a.sums = sums.data(), a.units = units.data();
    a.q_stride[2] = width, a.q_stride[1] = c.H * width, a.q_stride[0] = c.T * c.H * width;
    a.table_stride = most, a.seq_lens_stride = 1;
    a.page = zebra::mla_divisor(c.page), a.heads = zebra::mla_divisor(c.H);
    a.unit = zebra::mla_divisor(config.split > 0 ? config.split : config.stage);
    a.ctas = zebra::mla_divisor(config.ctas);
    a.batch = static_cast<int>(c.lens.size()), a.tokens = c.T, a.rows = c.T * c.H;
    a.R = c.R, a.E = c.E, a.pages = static_cast<int>(cache.size() / width / c.page);
    a.max_tokens = most * c.page, a.passes = config.passes, a.groups = config.groups;
    const auto log2 = [](int n) { return n <= 1 ? 0 : n <= 2 ? 1 : n <= 4 ? 2 : 3; };
    a.halves = config.halves, a.streams = config.streams, a.slots = config.slots;
    a.log_groups = log2(config.groups), a.log_team = log2(config.groups * config.halves);
    a.least = config.split > 0 ? 0 : log2(config.streams), a.item_cost = config.item_cost;
    a.merge_parts = config.merge_parts, a.q_offset = config.q_offset;
    a.ring_offset = config.ring_offset, a.page_stride = width * c.page, a.row_stride = width;
    a.pieces = static_cast<int>(config.pieces), a.unit_count = static_cast<int>(config.units);
    a.is_split = config.split > 0, a.unit_per_item = config.unit_per_item, a.q_is_aligned = true;
    a.scale = static_cast<float>(1.44269504 / std::sqrt(width));
    maps = Kernel::map({cache.data(), {width, c.page, a.pages}, {1, width, width * c.page}, {}},
                       c.R, c.E);
  }

  // mla_decode_combine.cuh, plainly.
  void combine(const MlaDecodeConfig& config) {
    const int pass_rows = 16 * config.groups;
    for (std::int64_t u = 0; u < config.units; ++u) {
      const MlaUnit& unit = units[u];
      if (unit.count < 2) continue;
      const int b = unit.item / config.passes, first = unit.item % config.passes * pass_rows;
      for (int r = 0; r < pass_rows && first + r < a.rows; ++r) {
        const auto at = [&](int k) {
          return (k == 0 ? unit.first : unit.rest + std::int64_t{k - 1} * unit.step) * pass_rows +
                 r;
        };
        float top = -INFINITY;
        for (int k = 0; k < unit.count; ++k) top = max(top, stats[at(k)].x);
        double sum = 0;
        std::vector<double> columns(c.R, 0);
        for (int k = 0; k < unit.count; ++k) {
          const double scale = top == -INFINITY ? 0 : std::exp2(stats[at(k)].x - top);
          sum += scale * stats[at(k)].y;
          for (int d = 0; d < c.R; ++d) columns[d] += scale * sums[at(k) * config.rank + d];
        }
        const std::int64_t out = std::int64_t{b} * a.rows + first + r;
        for (int d = 0; d < c.R; ++d)
          o[out * c.R + d] = zebra::narrow<T>(static_cast<float>(sum == 0 ? 0 : columns[d] / sum));
        lse[out] = static_cast<float>((top + std::log2(sum)) * 0.6931471805599453);
      }
    }
  }

  void compare() {
    const int rows = c.T * c.H;
    for (std::size_t b = 0; b < c.lens.size(); ++b)
      for (int r = 0; r < rows; ++r) {
        const int limit = c.lens[b] - c.T + r / c.H + 1;
        const std::size_t out = b * rows + r;
        std::vector<double> score(max(limit, 0)), want(c.R, 0), size(c.R, 0);
        double top = -INFINITY, total = 0;
        for (int t = 0; t < limit; ++t) {
          for (int d = 0; d < width; ++d)
            score[t] += static_cast<double>(zebra::widen<T>(q[out * width + d])) *
                        static_cast<double>(zebra::widen<T>(*row(b, t, d)));
          score[t] /= std::sqrt(width);
          top = max(top, score[t]);
        }
        for (int t = 0; t < limit; ++t) {
          const double p = std::exp(score[t] - top);
          total += p;
          for (int d = 0; d < c.R; ++d) {
            const double v = p * static_cast<double>(zebra::widen<T>(*row(b, t, d)));
            want[d] += v, size[d] += std::abs(v);
          }
        }
        const double want_lse = limit > 0 ? top + std::log(total) : -INFINITY, got_lse = lse[out];
        bool is_right = std::isinf(want_lse) ? got_lse == want_lse
                                             : std::abs(got_lse - want_lse) <
                                                   2e-4 * std::max(1., std::abs(want_lse));
        int d = 0;
        for (; is_right && d < c.R; ++d) {
          const double got = static_cast<double>(zebra::widen<T>(o[out * c.R + d]));
          const double w = limit > 0 ? want[d] / total : 0, s = limit > 0 ? size[d] / total : 0;
          is_right = std::abs(got - w) <= (std::abs(w) + s) / 200 + 1e-4;
          if (!is_right) std::printf("column %d: got %g, expected %g; ", d, got, w);
        }
        if (is_right) continue;
        if (++failures < 20)
          std::printf("sequence %zu, row %d (lse %g, expected %g): %s\n", b, r, got_lse, want_lse,
                      where.c_str());
        return;
      }
  }
};

}  // namespace
