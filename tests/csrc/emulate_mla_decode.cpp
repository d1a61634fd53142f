// mla_decode on CUDA, its schedule on the CPU: the device's own code deals random batches to CTAs,
// and every cached token must be attended to once, every partial result be combined once.
#include "cuda_on_host.h"
// The device's code.
#include "mla_decode/mla_decode_schedule.cuh"

#include <cstdio>
#include <map>
#include <random>
#include <string>
#include <vector>

namespace {

using zebra::MlaArgs, zebra::MlaDecodeConfig, zebra::MlaShare, zebra::MlaStep, zebra::MlaUnit,
    zebra::MlaWalk;

int failures = 0, checked = 0;

void fail(const std::string& what, const std::string& where) {
  if (++failures < 20) std::printf("%s: %s\n", where.c_str(), what.c_str());
}

void divisions_are_exact() {
  std::mt19937 random(5);
  constexpr std::int64_t kMost = 0x7fffffff;
  const auto check = [&](std::int64_t d) {
    ++checked;
    const zebra::MlaDivisor divisor = zebra::mla_divisor(d);
    const auto expect = [&](std::int64_t n) {
      if (n >= 0 && n <= kMost && divisor.quotient(static_cast<int>(n)) != n / d)
        fail(std::to_string(n) + " / " + std::to_string(d), "division");
    };
    for (int i = 0; i < 30; ++i) expect(random() & kMost);
    for (const std::int64_t k : {std::int64_t{0}, std::int64_t{1}, (kMost / 2) / d, kMost / d})
      for (int off = -2; off <= 2; ++off) expect(k * d + off);
    expect(kMost);
  };
  for (int d = 1; d < 5000; ++d) check(d);
  for (int i = 0; i < 100000; ++i) check(1 + random() % kMost);
  for (const std::int64_t d : {kMost, kMost - 63, (kMost + 1) / 2}) check(d);
}

// A CTA's share by a plain search, what mla_share() finds with all threads.
MlaShare plain_share(const MlaArgs& a, int cta) {
  MlaShare s;
  std::memset(&s, 0, sizeof(s));
  int total = 0;
  for (int b = 0; b < a.batch; ++b) {
    const int length = zebra::mla_length(a, b);
    s.has_empty |= length == 0;
    total += zebra::mla_weight(a, zebra::mla_units(a, length));
  }
  const int ctas = max(1, min(a.ctas.divisor, total >> a.least));
  s.each = total / ctas, s.larger = total % ctas;
  s.low = s.each * cta + min(cta, s.larger);
  s.high = cta < ctas ? s.low + s.each + (cta < s.larger) : s.low;
  s.batch = a.batch, s.start = s.high;
  int before = 0;
  for (int b = 0; b < a.batch && s.low < s.high; ++b) {
    const int length = zebra::mla_length(a, b), units = zebra::mla_units(a, length);
    if (s.low < before + zebra::mla_weight(a, units)) {
      s.batch = b, s.start = before, s.length = length, s.units = units;
      break;
    }
    before += zebra::mla_weight(a, units);
  }
  return s;
}

void shares_are_found_by_all_threads() {
  struct Batch {
    std::vector<int> lens;
    MlaArgs a;
    int cta;
  };
  std::mt19937 random(3);
  std::vector<Batch> batches;
  for (const int size : {1, 2, 31, 32, 33, 64, 127, 128, 129, 256, 257, 300, 700, 1100})
    for (int kind = 0; kind < 6; ++kind) {
      Batch batch;
      for (int b = 0; b < size; ++b)
        batch.lens.push_back(kind == 0           ? 0
                             : kind == 1         ? 300
                             : random() % 3 == 0 ? 0
                                                 : static_cast<int>(random() % 2000));
      MlaArgs& a = batch.a;
      std::memset(&a, 0, sizeof(a));
      a.batch = size, a.seq_lens_stride = 1, a.max_tokens = 1900, a.unit = zebra::mla_divisor(64);
      a.passes = 1 + kind % 2, a.least = kind % 4, a.item_cost = kind % 3;
      a.ctas = zebra::mla_divisor(kind == 2 ? 1 : 132);
      batch.cta = static_cast<int>(random() % static_cast<unsigned>(a.ctas.divisor));
      batches.push_back(batch);
    }
  for (Batch& batch : batches) batch.a.seq_lens = batch.lens.data();
  static int scratch[zebra::kMlaWarps + 4];
  std::vector<MlaShare> found(batches.size() * zebra::kMlaLineThreads);
  cuda_on_host::run_cta(zebra::kMlaLineThreads, {}, [&](int i) {
    for (std::size_t n = 0; n < batches.size(); ++n) {
      blockIdx.x = batches[n].cta;
      found[n * zebra::kMlaLineThreads + i] = zebra::mla_share(
          batches[n].a, scratch, zebra::mla_first_length(batches[n].a), [] { __syncthreads(); });
      __syncthreads();
    }
  });
  for (std::size_t n = 0; n < batches.size(); ++n) {
    ++checked;
    const MlaShare want = plain_share(batches[n].a, batches[n].cta);
    for (int i = 0; i < zebra::kMlaLineThreads; ++i) {
      const MlaShare& got = found[n * zebra::kMlaLineThreads + i];
      if (got.low == want.low && got.high == want.high && got.has_empty == want.has_empty &&
          got.batch == want.batch && got.start == want.start && got.length == want.length &&
          got.units == want.units && (want.low == want.high || got.each == want.each))
        continue;
      fail("share of CTA " + std::to_string(batches[n].cta) + " in thread " + std::to_string(i),
           std::to_string(batches[n].lens.size()) + " sequences");
      break;
    }
  }
}

// What a warp of the combination finds from the lengths is what the attention kernel would list: an
// item a lane up to kMlaLaneBatch sequences, one for all lanes above.
void units_are_found() {
  struct Batch {
    std::vector<int> lens;
    MlaArgs a;
    std::vector<MlaUnit> found;
  };
  std::mt19937 random(9);
  const auto below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  constexpr int kItems = 4;  // of a batch that a warp finds
  const auto item_of = [](int k, int items) { return k * (items - 1) / (kItems - 1); };
  std::vector<Batch> batches(120);
  for (std::size_t n = 0; n < batches.size(); ++n) {
    Batch& batch = batches[n];
    batch.lens.resize(1 + below(n % 5 < 2 ? 32 : 600));
    for (int& length : batch.lens) length = below(3) == 0 ? below(2) : below(n % 2 ? 300 : 30000);
    MlaArgs& a = batch.a;
    std::memset(static_cast<void*>(&a), 0, sizeof(a));
    a.batch = static_cast<int>(batch.lens.size()), a.seq_lens_stride = 1, a.max_tokens = 28000;
    a.seq_lens = batch.lens.data(), a.unit = zebra::mla_divisor(n % 3 ? 64 : 512);
    a.passes = 1 + below(2), a.least = below(3), a.item_cost = below(2);
    a.is_split = n % 3 == 0, a.pieces = 60, a.ctas = zebra::mla_divisor(1 + below(132));
    if (a.is_split) a.least = a.item_cost = 0;
    batch.found.resize(zebra::kMlaLineThreads);
  }
  cuda_on_host::run_cta(zebra::kMlaLineThreads, {}, [&](int i) {
    for (Batch& batch : batches) {
      const int items = batch.a.batch * batch.a.passes;
      if (batch.a.batch <= zebra::kMlaLaneBatch) {
        batch.found[i] = zebra::mla_find_unit<true>(batch.a, i % items);
      } else {
        for (int k = 0; k < kItems; ++k) {
          const MlaUnit found = zebra::mla_find_unit<true>(batch.a, item_of(k, items));
          if (i == k * 37 % zebra::kMlaLineThreads) batch.found[k] = found;  // of any warp
        }
      }
      __syncthreads();
    }
  });
  for (Batch& batch : batches) {
    ++checked;
    MlaArgs& a = batch.a;
    const int items = a.batch * a.passes;
    std::vector<MlaUnit> listed(items, MlaUnit{});
    a.units = listed.data(), a.unit_count = items, a.unit_per_item = true;
    for (int cta = 0; cta < a.ctas.divisor; ++cta) {
      blockIdx.x = cta;
      const MlaShare share = plain_share(a, cta);
      MlaWalk walk;
      walk.begin(a, share);
      while (walk.advance(a, share))
        if (walk.token == 0) walk.list(a, share);
    }
    const bool by_lane = a.batch <= zebra::kMlaLaneBatch;
    for (int i = 0; i < (by_lane ? zebra::kMlaLineThreads : kItems); ++i) {
      const int item = by_lane ? i % items : item_of(i, items);
      const MlaUnit &want = listed[item], &got = batch.found[i];
      if (got.count == want.count &&
          (got.count < 1 || (got.item == want.item && got.first == want.first &&
                             got.rest == want.rest && got.step == want.step)))
        continue;
      fail("unit of item " + std::to_string(item), std::to_string(a.batch) + " sequences");
      break;
    }
  }
}

// A batch, and what its CTAs do with it.
class Schedule {
 public:
  Schedule(const std::vector<int>& lens_, int T, int H, const MlaDecodeConfig& config,
           int max_tokens)
      : lens(lens_), c(config), items(lens.size() * c.passes), units(c.units + 1) {
    where = std::to_string(lens.size()) + " sequences, T " + std::to_string(T) + ", H " +
            std::to_string(H) + ", split " + std::to_string(c.split) + ", " +
            std::to_string(c.ctas) + " CTAs, " + std::to_string(c.streams) + " streams";
    std::memset(&a, 0, sizeof(a));
    const auto log2 = [](int n) {
      int bits = 0;
      while (1 << bits < n) ++bits;
      return bits;
    };
    a.batch = static_cast<int>(lens.size()), a.tokens = T, a.rows = T * H;
    a.seq_lens = lens.data(), a.seq_lens_stride = 1, a.max_tokens = max_tokens;
    a.unit = zebra::mla_divisor(c.split > 0 ? c.split : c.stage);
    a.ctas = zebra::mla_divisor(c.ctas);
    a.passes = c.passes, a.halves = c.halves, a.groups = c.groups, a.streams = c.streams;
    a.slots = c.slots, a.least = c.split > 0 ? 0 : log2(c.streams), a.item_cost = c.item_cost;
    a.pieces = static_cast<int>(c.pieces), a.unit_count = static_cast<int>(c.units);
    a.is_split = c.split > 0, a.unit_per_item = c.unit_per_item;
    std::memset(units.data(), 0xff, units.size() * sizeof(MlaUnit));
    a.units = units.data();
  }

  // With `expands` every item is looked up by its index.
  void check(bool expands) {
    ++checked;
    for (int cta = 0; cta < c.ctas; ++cta)
      if (!run_cta(cta)) return;
    for (std::int64_t u = 0; u < c.units; ++u) {
      if (units[u].count < 0 || units[u].count > 1 << 20)
        return fail("unit " + std::to_string(u) + " is not written", where);
      if (units[u].count > 1) listed[units[u].item] = units[u];
    }
    for (std::size_t item = 0; expands && item < items.size(); ++item)
      if (units[item].item != static_cast<int>(items[item].empty() ? 0 : item) ||
          units[item].count != static_cast<int>(items[item].size()))
        return fail("what is listed of item " + std::to_string(item), where);
    for (std::size_t item = 0; item < items.size(); ++item)
      if (!item_is_whole(static_cast<int>(item)))
        return fail("item " + std::to_string(item) + " of " +
                        std::to_string(lens[item / c.passes]) + " tokens",
                    where);
  }

 private:
  struct Piece {
    int token, end;
    std::int64_t partial;  // -1: straight to o
  };
  const std::vector<int>& lens;
  const MlaDecodeConfig c;
  std::string where;
  MlaArgs a;
  std::vector<std::vector<Piece>> items;
  std::vector<MlaUnit> units;
  std::map<int, MlaUnit> listed;
  std::map<std::int64_t, int> written;  // partial results

  bool failed(const char* what) const {
    fail(what, where);
    return false;
  }

  bool run_cta(int cta) {
    blockIdx.x = cta;
    // As the kernel begins: nothing to combine, of this CTA or of empty sequences.
    if (c.units > 0 && !c.unit_per_item) units[cta] = MlaUnit{};
    for (int b = cta; b < a.batch; b += c.ctas)
      if (zebra::mla_length(a, b) == 0 && c.unit_per_item && c.units > 0)
        for (int pass = 0; pass < c.passes; ++pass) units[b * c.passes + pass] = MlaUnit{};
    const MlaShare share = plain_share(a, cta);
    std::vector<std::vector<MlaStep>> steps(c.streams);
    for (int stream = 0; stream < c.streams; ++stream)
      if (!walk_stream(share, stream, steps[stream])) return false;
    return streams_agree(steps);
  }

  // MlaLoader::advance() and list(), until there is no stage left.
  bool walk_stream(const MlaShare& share, int stream, std::vector<MlaStep>& steps) {
    threadIdx.x = 64 * stream;
    MlaWalk walk;
    std::memset(static_cast<void*>(&walk), 0x77, sizeof(walk));
    walk.begin(a, share);
    while (steps.size() < 3000000) {
      int token = walk.stage + c.stage * c.streams, flags = 0;
      if (token >= walk.end) {
        if (walk.advance(a, share)) {
          flags = MlaStep::kFirst;
          if (stream == 0 && !open_piece(share, walk)) return false;
        } else {
          flags = MlaStep::kStop;
          walk.end = 0;
        }
        token = walk.token + c.stage * stream;
      }
      if (flags != MlaStep::kStop && token + c.stage * c.streams >= walk.end)
        flags |= MlaStep::kLast;
      walk.stage = token, walk.flags = flags;
      MlaStep step;
      step.note(a, walk);
      steps.push_back(step);
      if (flags & MlaStep::kStop) return step.token >= step.end || failed("stops with tokens left");
    }
    return failed("does not end");
  }
  bool open_piece(const MlaShare& share, const MlaWalk& walk) {
    if (walk.token == 0) walk.list(a, share);
    if (walk.token >= walk.end || walk.end > walk.length) return failed("an empty piece");
    const std::int64_t partial = walk.partial(a);
    if (partial >= c.partials) return failed("no place for a partial result");
    if (partial >= 0 && written[partial]++ > 0) return failed("a partial result is written twice");
    items[walk.item(a)].push_back({walk.token, walk.end, partial});
    return true;
  }

  // All streams see the same pieces, and their stages together are those of the piece.
  bool streams_agree(const std::vector<std::vector<MlaStep>>& steps) const {
    std::vector<std::size_t> at(c.streams, 0);
    while (!(steps[0][at[0]].flags & MlaStep::kStop)) {
      const MlaStep piece = steps[0][at[0]];
      std::vector<int> tokens;
      for (int stream = 0; stream < c.streams; ++stream)
        for (bool is_first = true;; is_first = false) {
          const MlaStep& step = steps[stream][at[stream]++];
          if (((step.flags & MlaStep::kFirst) != 0) != is_first || step.b != piece.b ||
              step.pass != piece.pass || step.end != piece.end || step.length != piece.length ||
              step.partial != piece.partial)
            return failed("streams are at different pieces");
          if (step.token < step.end) tokens.push_back(step.token);
          if (step.flags & MlaStep::kLast) break;
        }
      std::sort(tokens.begin(), tokens.end());
      int expected = piece.token;
      for (const int token : tokens) {
        if (token != expected) return failed("stages of a piece leave a gap");
        expected += c.stage;
      }
      if (expected < piece.end) return failed("a piece lacks stages");
    }
    for (int stream = 0; stream < c.streams; ++stream)
      if (!(steps[stream][at[stream]].flags & MlaStep::kStop)) return failed("a stream goes on");
    return true;
  }

  // Its pieces are its tokens, and they end in o directly or in one combination of all of them.
  bool item_is_whole(int item) const {
    const std::vector<Piece>& pieces = items[item];
    int token = 0;
    for (const Piece& piece : pieces) {
      if (piece.token != token) return false;
      token = piece.end;
    }
    if (token != zebra::mla_length(a, item / c.passes)) return false;
    const auto unit = listed.find(item);
    if (pieces.size() <= 1)
      return unit == listed.end() && (pieces.empty() || pieces[0].partial < 0);
    if (unit == listed.end() || unit->second.count != static_cast<int>(pieces.size())) return false;
    const MlaUnit& u = unit->second;
    for (int k = 0; k < u.count; ++k)
      if (pieces[k].partial != (k == 0 ? u.first : u.rest + std::int64_t{k - 1} * u.step))
        return false;
    return true;
  }
};

void check_schedule(const std::vector<int>& lens, int T, int H, int R, int E, int max_tokens,
                    int split, int sms, bool tma) {
  for (const bool expands : {false, true}) {
    const MlaDecodeConfig c = zebra::select_mla_decode_config(
        {static_cast<std::int64_t>(lens.size()), T * H, R, E, max_tokens, split, tma, expands}, sms,
        zebra::kMlaSm90SmemBytes);
    Schedule(lens, T, H, c, max_tokens).check(expands);
  }
}

void random_batches_are_covered() {
  std::mt19937 random(1);
  const auto below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  constexpr int kRanks[] = {64, 96, 128, 160, 192, 256};
  for (int i = 0; i < 3000; ++i) {
    const int longest = 1 + below(i % 5 == 0 ? 40000 : 800);
    std::vector<int> lens(1 + below(i % 7 == 0 ? 600 : 12));
    for (int& length : lens) length = below(3) == 0 ? below(2) : below(longest + 1);
    for (const bool tma : {false, true}) {
      const int R = tma ? kRanks[below(6)] : 8 * (1 + below(32)), E = tma ? 64 : 8 * below(9);
      // Now and then the table has room for fewer tokens than lengths say: those are cut.
      const int room = below(8) == 0 ? 1 + longest / 2 : longest + below(100);
      const int split = below(3) == 0 ? 1 + below(1000) : 0;
      const int T = 1 + below(16), H = 1 + below(128), sms = below(2) == 0 ? 132 : 1 + below(140);
      check_schedule(lens, T, H, R, E, room, split, sms, tma);
    }
  }
  for (const int length : {2048, 32768})
    check_schedule({length}, 1, 32, 160, 64, length, 0, 132, true);
}

}  // namespace

int main() {
  divisions_are_exact();
  shares_are_found_by_all_threads();
  units_are_found();
  random_batches_are_covered();
  std::printf("mla_decode: %d checked, %d failures\n", checked, failures);
  return failures == 0 ? 0 : 1;
}
