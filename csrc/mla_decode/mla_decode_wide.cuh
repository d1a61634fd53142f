// The kernel of mla_decode for many query rows, or latents wider than 256, on Hopper.
//
// Computes       o and lse of mla_decode.h for latent queries, R up to 512, E up to 64.
//                Derivation: docs/kernels/mla_decode.md.
// Grid           (n, 1 or 2), persistent, one CTA a multiprocessor: mla_decode_schedule.cuh deals
//                the tokens to n pairs of CTAs, of which each has 64 of the pair's rows.  Both walk
//                the same tokens, so L2 serves one of them.  Where there is room, one pair more:
//                mla_wide_rehearses().
// Warps          12: two warpgroups of products with half of the columns of o each, and a warp that
//                loads, mla_decode_wide_load.cuh.
// Block          64 cached rows.  Warpgroup b % 2 owns block b: it makes the scores and
//                probabilities of it, and passes them to the other through shared memory, in place
//                of the block's rope columns, which nobody needs any more.  Then each adds its
//                half of the columns.  While one exponentiates, the other multiplies.
// Softmax        base 2, relative to a reference that moves only when a score exceeds it by 2^20
//                (fp16: 2^8).  The owner of a block moves it; the other follows.
// Bound          128 rows of 512 + 64: the tensor cores.  64 rows: HBM.
#pragma once

#include "common/sm90/wgmma.cuh"
#include "mla_decode/mla_decode_kernel.cuh"
#include "mla_decode/mla_decode_wide_load.cuh"

namespace zebra {
namespace {

enum { kMlaBarrierRows = 1, kMlaBarrierOwn = 2, kMlaBarrierHandOver = 4 };  // named barriers

constexpr int kMlaProducts = 256;  // threads of both warpgroups
// Registers of a thread; together no more than the CTA was launched with, 168 for each.
constexpr int kMlaLoadRegisters = 40, kMlaProductRegisters = 232;
static_assert(kMlaLoadRegisters * 128 + kMlaProductRegisters * kMlaProducts <=
              168 * (kMlaProducts + 128));

// What a thread of the products works with.
template <typename T, typename S>
struct MlaWideRows {
  float o[S::kRank / 4];       // 64 rows x half of the columns, over the warpgroup
  float reference[2], sum[2];  // of rows g and g + 8 of the warp; the sum is of own blocks
  std::uint32_t base, q;       // shared memory: of the kernel, of q
  int half, warp, lane;        // the warpgroup, the warp in it

  __device__ __forceinline__ int row(int i) const { return warp * 16 + lane / 4 + 8 * i; }
  __device__ __forceinline__ bool is_left_behind(float top, int i) const {
    return top > reference[i] + (std::is_same_v<T, __half> ? 8.f : 20.f);
  }
  __device__ __forceinline__ void barrier_of_both() const {
    named_barrier(kMlaBarrierRows, kMlaProducts);
  }

  // ---- opens a piece: q to shared memory, in the layout of TMA's swizzle.  Rows past the last one
  // compute what it does, and are not written.
  __device__ __forceinline__ void begin(const MlaArgs& a, const MlaStep& step, int first_row) {
    int thread = threadIdx.x;
    asm volatile("" : "+r"(thread));  // indices are computed here, not kept from piece to piece
    const char* const from = static_cast<const char*>(a.q) + 2 * step.b * a.q_stride[0];
    barrier_of_both();  // the item before needs q and its place no more
    const int rows = mla_wide_rehearses(a) ? 0 : kMlaWideRows;
#pragma unroll 1
    for (int r = thread / 8; r < rows; r += kMlaProducts / 8) {
      const int mine = min(first_row + r, a.rows - 1), unit = thread % 8;
      const int token = a.heads.quotient(mine), head = mine - token * a.heads.divisor;
      const char* const row = from + 2 * (token * a.q_stride[1] + head * a.q_stride[2]);
      const std::uint32_t to = q + r * 128 + ((unit ^ (r & 7)) << 4);
      const auto copy = [&](int tile, int column, bool is_there) {
        const char* const unit_of_q = is_there ? row + 2 * column : row;
        if (a.q_is_aligned) {
          cp_async_16(to + tile * kMlaWideTileBytes, unit_of_q, is_there);
        } else {
#pragma unroll
          for (int k = 0; k < 16; k += 4)
            cp_async_4(to + tile * kMlaWideTileBytes + k, unit_of_q + k, is_there);
        }
      };
#pragma unroll
      for (int tile = 0; tile < S::kRope; ++tile)
        copy(tile, tile * 64 + unit * 8, tile * 64 + unit * 8 < a.R);
      copy(S::kRope, a.R + unit * 8, unit * 8 < a.E);
    }
    if (thread < kMlaWideRows)
      S::shared().limits[thread] =
          step.length - a.tokens + a.heads.quotient(min(first_row + thread, a.rows - 1)) + 1;
#pragma unroll
    for (int j = 0; j < S::kRank / 4; ++j) o[j] = 0.f;
#pragma unroll
    for (int i = 0; i < 2; ++i) reference[i] = -kInfinity, sum[i] = 0.f;  // no token yet
    cp_async_wait_all();
    sm90::fence_async_proxy();
    barrier_of_both();
  }

  // ---- one block of tokens

  // Starts tiles `first` to `last` of the scores of a block as they arrive.
  __device__ __forceinline__ void score(float (&s)[32], const MlaWideSlot<S>& slot, int first,
                                        int last) const {
#pragma unroll
    for (int n = first; n < last; ++n) {
      const int tile = S::tile(half, n);
      sm90::mbarrier_wait(slot.full(tile), slot.parity);
      sm90::wgmma_fence();
      const std::uint64_t dq = sm90::wgmma_descriptor(q + tile * kMlaWideTileBytes, 16);
      const std::uint64_t dk = sm90::wgmma_descriptor(slot.stage + tile * kMlaWideTileBytes, 16);
#pragma unroll
      for (int k = 0; k < 4; ++k)
        sm90::wgmma_ss<T>(s, sm90::advance(dq, 32 * k), sm90::advance(dk, 32 * k), n > 0 || k > 0);
    }
    sm90::wgmma_commit();
  }

  __device__ __forceinline__ void scale_sums(const float (&shrink)[2]) {
#pragma unroll
    for (int j = 0; j < S::kRank / 4; ++j) o[j] *= shrink[j / 2 % 2];
  }

  // Starts the products of a block that the other warpgroup owns.
  __device__ __forceinline__ void follow(const MlaWideSlot<S>& slot) {
    const int owner = 1 - half, mine = half * S::kHalfTiles;
#pragma unroll
    for (int n = 0; n < S::kHalfTiles; ++n) sm90::mbarrier_wait(slot.full(mine + n), slot.parity);
    named_barrier(kMlaBarrierHandOver + owner, kMlaProducts);
    if (__any_sync(kWarp, S::shared().is_raised[owner][warp])) {
      float shrink[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float raised = S::shared().references[owner][row(i)];
        shrink[i] = reference[i] == -kInfinity ? 1.f : exp2_approx(reference[i] - raised);
        reference[i] = raised, sum[i] *= shrink[i];
      }
      scale_sums(shrink);
    }
    sm90::wgmma_fence(o);
    const std::uint64_t dp = sm90::wgmma_descriptor(slot.probabilities(), 16);
    const std::uint64_t dv =
        sm90::wgmma_descriptor(slot.stage + mine * kMlaWideTileBytes, kMlaWideTileBytes);
    constexpr int kColumns = S::kRank / 4 / S::kChunks;  // of a chunk, in registers
#pragma unroll
    for (int c = 0; c < S::kChunks; ++c) {
#pragma unroll
      for (int k = 0; k < 4; ++k)
        sm90::wgmma_ss<T, sm90::Major::kMN>(
            reinterpret_cast<float (&)[kColumns]>(o[c * kColumns]), sm90::advance(dp, 32 * k),
            sm90::advance(dv, c * S::kChunkTiles * kMlaWideTileBytes + 2048 * k), true);
      sm90::wgmma_commit();
    }
  }
  // Once products with chunk c of this warpgroup's half of a block that the other one owns are
  // done: it needs no more of it.
  __device__ __forceinline__ void release(const MlaWideSlot<S>& slot, int c) const {
    if (lane == 0) sm90::mbarrier_arrive(slot.empty(S::kChunks + c));
  }
  __device__ __forceinline__ void release_rest(const MlaWideSlot<S>& slot) const {
#pragma unroll
    for (int c = 0; c < S::kChunks; ++c) release(slot, c);
  }

  // Where there is room for two blocks, half 0 makes the products of the block before its own ahead
  // of its scores: of two blocks, the first is exponentiated while the second is scored, the second
  // while all make products with the first, and so each gives way to the next one's tiles sooner.
  static constexpr bool scores_first(int of_half) { return of_half == 1 || S::kStages > 2; }

  // A block that this warpgroup owns, whose tokens start at `token`; `follows`: with the products
  // of the one before it, which the other owns, while it waits for its scores.  kMayFollow:
  // otherwise it does not.  Products that are under way where two paths meet would be waited for,
  // so only the half that has none there decides at run time, and finds the code of its first block
  // again.
  template <int kHalf, bool kMayFollow>
  __device__ __forceinline__ void attend(const MlaArgs& a, const MlaStep& step, int b, int token,
                                         bool follows) {
    const MlaWideSlot<S> slot(base, b), before(base, b - 1);
    float s[32];
    constexpr int kLast = S::kChunks - 1;
    constexpr bool kScoresFirst = scores_first(kHalf);
    if (kScoresFirst) {
      score(s, slot, 0, S::kTiles);
      if (kMayFollow) follow(before);
      sm90::wgmma_wait<kMayFollow ? S::kChunks : 0>(s);
    } else if (follows) {
      follow(before);
      score(s, slot, 0, S::kHalfTiles / S::kChunks);
      sm90::wgmma_wait<S::kChunks>(o);
      release(before, 0);
      if constexpr (S::kChunks == 2) {
        score(s, slot, S::kHalfTiles / 2, S::kHalfTiles);
        sm90::wgmma_wait<2>(o);
        release(before, 1);
      }
      score(s, slot, S::kHalfTiles, S::kTiles);
      sm90::wgmma_wait<0>(s);
    } else {
      score(s, slot, 0, S::kTiles);
      sm90::wgmma_wait<0>(s);
    }

    const int left = step.end - token;
    if (left < kMlaWideBlock) {
      named_barrier(kMlaBarrierOwn + half, 128);  // the scores of the other warps are made
      slot.clear_tail(left, threadIdx.x % 128);
    }
    if (a.scale < 0.f) {
#pragma unroll
      for (float& v : s) v = -v;
    }
    const float scale = fabsf(a.scale);
    if (token + kMlaWideBlock > step.length - a.tokens + 1) {
      const int limit[2] = {S::shared().limits[row(0)], S::shared().limits[row(1)]};
      const int first = token + 2 * (lane % 4);
#pragma unroll
      for (int j = 0; j < 32; ++j)
        if (first + j / 4 * 8 + j % 2 >= limit[j / 2 % 2]) s[j] = -kInfinity;
    }
    float top[2] = {-kInfinity, -kInfinity};
#pragma unroll
    for (int j = 0; j < 32; ++j) top[j / 2 % 2] = fmaxf(top[j / 2 % 2], s[j]);
    top[0] *= scale, top[1] *= scale;
    const bool is_raised =
        __any_sync(kWarp, is_left_behind(top[0], 0) || is_left_behind(top[1], 1));
    float shrink[2] = {1.f, 1.f};
    if (is_raised) raise(top, shrink);
    if (lane == 0) S::shared().is_raised[half][warp] = is_raised;
    const float zero[2] = {reference[0] == -kInfinity ? 0.f : reference[0],
                           reference[1] == -kInfinity ? 0.f : reference[1]};
    std::uint32_t p[4][4];
#pragma unroll
    for (int j = 0; j < 32; j += 2) {
      const int i = j / 2 % 2;
      s[j] = exp2_approx(fmaf(s[j], scale, -zero[i]));
      s[j + 1] = exp2_approx(fmaf(s[j + 1], scale, -zero[i]));
      sum[i] += s[j] + s[j + 1];
      p[j / 8][j / 2 % 4] = pack<T>(s[j], s[j + 1]);
    }
    if (kScoresFirst && kMayFollow && S::kChunks == 2) {
      sm90::wgmma_wait<1>();
      release(before, 0);
    }
    // All four warps are done with the rope columns, and have cleared rows past the end.
    named_barrier(kMlaBarrierOwn + half, 128);
#pragma unroll
    for (int k = 0; k < 4; ++k)
      sm90::stmatrix_x4(slot.probabilities(warp * 16 + lane % 16, 2 * k + lane / 16), p[k][0],
                        p[k][1], p[k][2], p[k][3]);
    sm90::fence_async_proxy();
    named_barrier_arrive(kMlaBarrierHandOver + half, kMlaProducts);

    if (kScoresFirst && kMayFollow) {
      sm90::wgmma_wait<0>(o);
      release(before, kLast);
    }
    if (is_raised) scale_sums(shrink);
    sm90::wgmma_fence(o);
    const std::uint64_t dv = sm90::wgmma_descriptor(
        slot.stage + half * S::kHalfTiles * kMlaWideTileBytes, kMlaWideTileBytes);
    constexpr int kColumns = S::kRank / 4 / S::kChunks;  // of a chunk, in registers
#pragma unroll
    for (int c = 0; c < S::kChunks; ++c) {
#pragma unroll
      for (int k = 0; k < 4; ++k)
        sm90::wgmma_rs<T, sm90::Major::kMN>(
            reinterpret_cast<float (&)[kColumns]>(o[c * kColumns]), p[k],
            sm90::advance(dv, c * S::kChunkTiles * kMlaWideTileBytes + 2048 * k));
      sm90::wgmma_commit();
    }
    if constexpr (S::kChunks == 2) {
      sm90::wgmma_wait<1>();
      if (lane == 0) sm90::mbarrier_arrive(slot.empty(0));
    }
    sm90::wgmma_wait<0>(o);
    if (lane == 0) sm90::mbarrier_arrive(slot.empty(S::kChunks - 1));
  }

  // Raises the reference of rows whose scores have left it behind.
  __device__ __forceinline__ void raise(float (&top)[2], float (&shrink)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      top[i] = fmaxf(top[i], __shfl_xor_sync(kWarp, top[i], 1));
      top[i] = fmaxf(top[i], __shfl_xor_sync(kWarp, top[i], 2));
      if (is_left_behind(top[i], i)) {
        shrink[i] = reference[i] == -kInfinity ? 1.f : exp2_approx(reference[i] - top[i]);
        reference[i] = top[i];
      }
      sum[i] *= shrink[i];
      if (lane % 4 == 0) S::shared().references[half][row(i)] = reference[i];
    }
  }

  // ---- the end of a piece: the item's o and lse, or a partial result
  __device__ __forceinline__ void finish(const MlaArgs& a, const MlaStep& step, int first_row) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sum[i] += __shfl_xor_sync(kWarp, sum[i], 1);
      sum[i] += __shfl_xor_sync(kWarp, sum[i], 2);
      if (lane % 4 == 0) S::shared().sums[half][row(i)] = sum[i];
    }
    barrier_of_both();  // after it nobody reads q
    const int rows = a.rows - first_row, pass_rows = 16 * a.groups;
    const bool is_whole = step.partial < 0;
    const std::int64_t first = is_whole
                                   ? static_cast<std::int64_t>(step.b) * a.rows + first_row
                                   : step.partial * pass_rows + (first_row - step.pass * pass_rows);
    float inverse[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float whole = S::shared().sums[0][row(i)] + S::shared().sums[1][row(i)];
      inverse[i] = mla_inverse(whole);
      if (half != 0 || lane % 4 != 0 || row(i) >= rows) continue;
      if (is_whole)
        a.lse[first + row(i)] = mla_lse(reference[i], whole);
      else
        a.stats[first + row(i)] = {reference[i], whole};
    }
    if (is_whole)
      write(static_cast<T*>(a.o) + first * a.R, a.R, rows, inverse);
    else
      write(a.sums + first * S::kRank, S::kRank, rows, {1.f, 1.f});
  }
  // Rows of `pitch` elements, by way of q's place in shared memory: as they are in registers, a
  // store would be 32 or 16 bytes of each of 8 rows, and take as long as one of 8 lines.
  template <typename V>
  __device__ __forceinline__ void write(V* to, int pitch, int rows, const float (&scale)[2]) const {
    constexpr int kSize = sizeof(V), kColumns = S::kRank / 4, kLanes = kColumns * kSize / 16;
    constexpr int kPitch = kColumns * 4 + 32;  // bytes; 4 rows fill the banks
    static_assert(8 * 16 * kPitch <= S::kTiles * kMlaWideTileBytes);
    const std::uint32_t mine = q + (half * 4 + warp) * 16 * kPitch;
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      __syncwarp();
#pragma unroll
      for (int j = 0; j < kColumns / 4; ++j) {
        const int i = j % 2;
        const float x = o[part * kColumns / 2 + 2 * j] * scale[i];
        const float y = o[part * kColumns / 2 + 2 * j + 1] * scale[i];
        const std::uint32_t at =
            mine + (lane / 4 + 8 * i) * kPitch + (j / 2 * 8 + lane % 4 * 2) * kSize;
        if constexpr (kSize == 4)
          st_shared_v2(at, __float_as_uint(x), __float_as_uint(y));
        else
          st_shared(at, pack<V>(x, y));
      }
      __syncwarp();
      const int column = half * 2 * kColumns + part * kColumns + lane % kLanes * (16 / kSize);
#pragma unroll
      for (int r = 0; r < 16; r += 32 / kLanes) {
        const int at = r + lane / kLanes;
        if (warp * 16 + at < rows && column < pitch)
          *reinterpret_cast<uint4*>(to + static_cast<std::int64_t>(warp * 16 + at) * pitch +
                                    column) = ld_shared_v4(mine + at * kPitch + lane % kLanes * 16);
      }
    }
  }
};

// The blocks of a piece, of warpgroup kHalf: those that it owns, and the products of the others.
// `first` of `last` is the piece's first block in the order in which the CTA loads them.
template <int kHalf, typename T, typename S>
__device__ __forceinline__ void mla_wide_piece(const MlaArgs& a, MlaWideRows<T, S>& mine,
                                               const MlaStep& step, int first, int last) {
  mine.half = kHalf;  // as it is, for the compiler to know
  int b = first + ((first & 1) != kHalf);
  const auto token = [&] { return step.token + (b - first) * kMlaWideBlock; };
  if (MlaWideRows<T, S>::scores_first(kHalf) && b == first) {
    mine.template attend<kHalf, false>(a, step, b, token(), false);
    b += 2;
  }
#pragma unroll 1
  for (; b < last; b += 2) mine.template attend<kHalf, true>(a, step, b, token(), b > first);
  if (b == last) {
    const MlaWideSlot<S> slot(mine.base, b - 1);
    mine.follow(slot);
    sm90::wgmma_wait<0>(mine.o);
    mine.release_rest(slot);
    // The block's owner met before it cleared rows past the end.  Here nobody has to, but racecheck
    // takes warps that met others less often for unordered.
    if ((step.end - step.token) % kMlaWideBlock != 0) named_barrier(kMlaBarrierOwn + kHalf, 128);
  }
}

// Tells the CTA its share, and the item of its first piece, whose q is asked for before the piece
// is noted.  In shared memory it takes no registers from the products.  One thread.
template <typename S>
__device__ __forceinline__ void mla_wide_open(const MlaArgs& a, const MlaShare& share) {
  MlaStep& opened = S::shared().opened;
  opened.b = share.batch, opened.length = share.length, opened.pass = mla_first_pass(a, share);
  const bool has_rows = mla_wide_first_row(a, opened.pass) < a.rows;
  opened.flags = share.low < share.high && has_rows ? MlaStep::kFirst : 0;
  S::shared().share = share;
}

// The products of all pieces of a CTA.  Both warpgroups open and close a piece with the same
// instructions: compute-sanitizer knows a barrier by where it stands.
template <typename T, typename S>
__device__ __forceinline__ void mla_wide_products(const MlaArgs& a, int warp) {
  MlaWideRows<T, S> mine;
  mine.base = smem_addr(&S::shared()), mine.q = mine.base + kMlaWideHeader;
  mine.half = warp / 4, mine.warp = warp % 4, mine.lane = threadIdx.x % 32;
  int first = 0;
#pragma unroll 1
  for (int n = 0;; ++n) {
    const MlaStep& step = S::shared().pieces[n % kMlaWidePieces];
    const MlaStep& opened = S::shared().opened;
    const bool is_early = n == 0 && opened.flags != 0;
    const auto is_last = [&] {
      sm90::mbarrier_wait(S::noted(n), n / kMlaWidePieces & 1);
      return (step.flags & MlaStep::kStop) != 0;
    };
    if (!is_early && is_last()) break;
    const MlaStep& item = is_early ? opened : step;
    mine.begin(a, item, mla_wide_first_row(a, item.pass));
    if (is_early && is_last()) break;  // a share may end before its item's first token
    const int last = first + ceil_div(step.end - step.token, kMlaWideBlock);
    if (warp < 4)
      mla_wide_piece<0>(a, mine, step, first, last);
    else
      mla_wide_piece<1>(a, mine, step, first, last);
    mine.half = warp / 4;
    mine.finish(a, step, mla_wide_first_row(a, step.pass));
    first = last;
  }
}

template <typename T, typename S>
__global__ void __launch_bounds__(kMlaProducts + 128, 1)
    mla_wide_kernel(const __grid_constant__ MlaArgs a, const __grid_constant__ MlaWideMaps maps) {
  const int length = mla_first_length(a);
  sm90::grid_launch_dependents();
  auto& shared = S::shared();
  // The same in all lanes, which the compiler has to know: products in branches must not diverge.
  const int warp = __shfl_sync(kWarp, static_cast<int>(threadIdx.x / 32), 0);
  // Registers move first of all: behind the first barrier it took 2,000 clocks.
  if (warp >= kMlaProducts / 32) {
    sm90::registers_decrease<kMlaLoadRegisters>();
    if (warp == kMlaProducts / 32 + 3) {  // which has nothing else to do
      const int lane = threadIdx.x % 32;
#pragma unroll 1
      for (int i = lane; i < S::kBarriers; i += 32)
        sm90::mbarrier_init(S::barrier(i), i < S::kEmptyBarriers ? 4 : 1);
      sm90::mbarrier_init_fence();
      mla_prefetch_table(a, lane);
    }
    named_barrier_arrive(kMlaBarrierReady, kMlaProducts + 128);
    named_barrier(kMlaBarrierKnown, kMlaProducts + 128);
    if (warp == kMlaProducts / 32) {
      const MlaShare share = shared.share;
      if (mla_wide_rehearses(a))
        mla_wide_rehearse<S>(a);
      else if (maps.box == kMlaWideBlock)
        mla_wide_load<S, true>(a, maps, share);
      else
        mla_wide_load<S, false>(a, maps, share);
    }
    return;
  }
  sm90::registers_increase<kMlaProductRegisters>();
  const MlaShare share =
      mla_share(a, shared.scratch, length, [] { named_barrier(kMlaBarrierRows, kMlaProducts); });
  if (threadIdx.x == 0) mla_wide_open<S>(a, share);
  named_barrier_arrive(kMlaBarrierKnown, kMlaProducts + 128);
  named_barrier(kMlaBarrierReady, kMlaProducts + 128);
  if (!mla_wide_rehearses(a)) sm90::grid_dependency_wait();  // for q
  mla_wide_products<T, S>(a, warp);
  sm90::grid_dependency_wait();  // a grid must not end before the one that it follows
  if (shared.share.has_empty && blockIdx.y == 0) mla_write_empty<T>(a);
}

}  // namespace
}  // namespace zebra
