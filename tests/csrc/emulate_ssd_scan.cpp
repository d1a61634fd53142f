// ssd_scan on Hopper, its schedule on the CPU: the device's own code walks random batches, every
// chunk must be walked once, and every piece must start from the states of all that lies before it.
#include "cuda_on_host.h"

struct CUtensorMap {};
// The device's code.
#include "ssd_scan/ssd_scan_sm90_pieces.cuh"

#include <cstdio>
#include <random>
#include <string>
#include <vector>

namespace {

using zebra::SsdScanSm90Config;
using zebra::sm90::kQ, zebra::sm90::Pieces, zebra::sm90::SsdArgs;

int failures = 0, emulated = 0, cut = 0;

// Tokens `from` to `to` of a head of a batch row.
struct Range {
  int row = -1, head = 0, from = 0, to = 0;
};

class Emulation {
 public:
  Emulation(const zebra::SsdScanSm90Shape& s, int sms, bool invariant) : machine(sms) {
    a.cfg = zebra::select_ssd_scan_sm90_config(s, {sms, 4250}, invariant);
    a.p.tokens = s.tokens, a.p.heads = s.heads, a.p.batch = a.p.sequences = s.rows;
    where = std::to_string(s.rows) + " x " + std::to_string(s.tokens) + ", heads " +
            std::to_string(s.heads) + ", P " + std::to_string(s.head_dim) + " on " +
            std::to_string(sms) + (invariant ? ", invariant" : "");
  }

  void run() {
    ++emulated, cut += a.cfg.cut;
    slots.resize(a.cfg.state_slots);
    if (a.cfg.cut) on_ctas(a.cfg.state_items, [&] { walk_states(); });
    chunks = static_cast<int>(zebra::ceil_div<std::int64_t>(a.p.tokens, kQ));
    seen.resize(a.p.batch * a.cfg.head_slots * chunks);
    on_ctas(a.cfg.items, [&] { walk(); });
    for (const char times : seen) expect(times == 1, "a chunk is not walked once");
  }

 private:
  void expect(bool condition, const char* what) {
    if (!condition && ++failures < 20) std::printf("%s: %s\n", where.c_str(), what);
  }
  template <typename Walk>
  void on_ctas(std::int64_t items, Walk walk_all) {
    gridDim.x = static_cast<int>(std::min<std::int64_t>(items, machine));
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) walk_all();
  }

  void walk_states() {
    Range walked;
    for (Pieces<true> piece(a); piece.next();) {
      expect(piece.tokens > 0 && piece.tokens % kQ == 0, "a piece without chunks");
      expect(piece.first + piece.tokens < a.p.tokens, "the walk for the states goes to the end");
      if (piece.fresh) walked = {piece.row, piece.head, piece.first, piece.first};
      expect(walked.row == piece.row && walked.head == piece.head && walked.to == piece.first,
             "a state goes on from another place");
      walked.to = piece.first + piece.tokens;
      if (piece.slot < 0 || piece.slot >= a.cfg.state_slots) return expect(false, "no such slot");
      expect(slots[piece.slot].row < 0, "a slot is written twice");
      slots[piece.slot] = walked;
    }
  }

  // What a piece's start folds, as the state warps do.
  int folded(const Pieces<false>& piece) {
    const SsdScanSm90Config& c = a.cfg;
    const int line = piece.head / (c.width * c.heads) * static_cast<int>(a.p.sequences) + piece.row;
    const int from = line * c.state_line, to = from + (piece.grain << c.grain_shift);
    int known = 0, v = zebra::ssd_scan_state_unit(c, from);
    const auto fold = [&](int slot) {
      const Range& r = slots[slot * c.width + piece.member()];
      expect(r.row == piece.row && r.head == piece.head && r.from == known, "a wrong state");
      known = r.to;
    };
    for (; zebra::ssd_scan_state_cut(c, v + 1) <= to; ++v) fold(v);
    if (zebra::ssd_scan_state_cut(c, v) < to) fold(c.state_units + piece.unit());
    return known;
  }

  void walk() {
    for (Pieces<false> piece(a); piece.next();) {
      expect(piece.first == (piece.grain > 0 ? folded(piece) : 0), "the state before is not whole");
      expect(piece.last == (piece.first + piece.tokens == a.p.tokens), "last is wrong");
      const int first = piece.first / kQ, count = piece.chunks();
      expect(piece.first % kQ == 0 && first + count <= chunks, "a piece outside of its sequence");
      char* const of_head =
          seen.data() + (piece.row * a.cfg.head_slots + piece.head / a.cfg.heads) * chunks;
      for (int i = first; i < first + count && i < chunks; ++i) ++of_head[i];
    }
  }

  SsdArgs a = {};
  int machine, chunks = 0;
  std::string where;
  std::vector<Range> slots;
  std::vector<char> seen;
};

}  // namespace

int main() {
  std::mt19937 random(3);
  const auto below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  for (int i = 0; i < 3000; ++i) {
    const int groups = (1 + below(3)) * (below(2) == 0 ? 4 : 1), heads = groups * (1 + below(4));
    const zebra::SsdScanSm90Shape shape = {1 + below(below(2) == 0 ? 40 : 4),
                                           0,
                                           1 + below(below(2) == 0 ? 60000 : 3000),
                                           heads,
                                           below(2) == 0 ? groups : heads,
                                           below(2) == 0 ? groups : 1,
                                           heads,
                                           below(2) == 0 ? 64 : 128,
                                           128,
                                           true};
    constexpr int kMachines[] = {132, 114, 78, 5, 1};
    Emulation(shape, kMachines[below(5)], below(4) == 0).run();
  }
  std::printf("ssd_scan: %d batches, %d of them cut, %d failures\n", emulated, cut, failures);
  return failures == 0 ? 0 : 1;
}
