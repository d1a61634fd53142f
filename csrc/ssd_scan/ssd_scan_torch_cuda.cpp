#include "common/torch_cuda.h"

#include <torch/csrc/stable/library.h>

#include <array>

#include "ssd_scan/ssd_scan_config.h"
#include "ssd_scan/ssd_scan_torch.h"

namespace zebra {
namespace {

// The kernels move x, B, C and z in units of 16 bytes.
void check_aligned(const Check& check, const char* name, const Tensor& t) {
  const auto remainder = reinterpret_cast<std::uintptr_t>(t.data_ptr()) % 16;
  bool ok = remainder == 0;
  for (int64_t d = 0; d < 3; ++d) ok = ok && (t.size(d) <= 1 || t.stride(d) % 8 == 0);
  if (ok) return;
  std::ostringstream got;
  got << describe(t) << ", " << remainder << " bytes past a 16-byte boundary";
  check.that(false, name, got.str(), "16-byte aligned with strides that are multiples of 8");
}

void check_kernel_takes(const Check& check, const SsdScanInputs& in, const SsdScanParams& p) {
  const char* dims = " = 64 or 128 (CUDA, 16 bit; float32 takes any)";
  check.that(ssd_scan_takes(p.head_dim), "x", in.x, "[B, T, Gx, P] with P", dims);
  check.that(ssd_scan_takes(p.state_dim), "B", in.B, "[B, T, Gb, N] with N", dims);
  check_aligned(check, "x", in.x);
  check_aligned(check, "B", in.B);
  check_aligned(check, "C", in.C);
  if (in.z) check_aligned(check, "z", *in.z);
}

std::tuple<Tensor, Tensor> composite(const SsdScanInputs& in, bool dt_softplus, double norm_eps) {
  using torch::stable::detail::from;
  std::array<StableIValue, 13> stack{from(in.x),           from(in.dt),
                                     from(in.A),           from(in.B),
                                     from(in.C),           from(in.D),
                                     from(in.z),           from(in.dt_bias),
                                     from(in.norm_weight), from(in.initial_state),
                                     from(in.cu_seqlens),  from(dt_softplus),
                                     from(norm_eps)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("zebra::_ssd_scan_composite", "", stack.data(), TORCH_ABI_VERSION));
  Tensor y = torch::stable::detail::to<Tensor>(stack[0]);
  return {y, torch::stable::detail::to<Tensor>(stack[1])};
}

std::tuple<Tensor, Tensor> ssd_scan_op(const Tensor& x, const Tensor& dt, const Tensor& A,
                                       const Tensor& B, const Tensor& C, const OptTensor& D,
                                       const OptTensor& z, const OptTensor& dt_bias,
                                       const OptTensor& norm_weight, const OptTensor& initial_state,
                                       const OptTensor& cu_seqlens, bool dt_softplus,
                                       double norm_eps) {
  const CudaScope scope(x);
  const Check check("ssd_scan");
  const SsdScanInputs in{x, dt, A, B, C, D, z, dt_bias, norm_weight, initial_state, cu_seqlens};
  if (x.scalar_type() == ScalarType::Float) {
    Tensor state = x;  // checked here: a message from below would not survive the dispatcher
    ssd_scan_inputs(check, in, dt_softplus, norm_eps, state);
    return composite(in, dt_softplus, norm_eps);
  }
  return ssd_scan_torch(in, dt_softplus, norm_eps, [&](const SsdScanParams& p) {
    check_kernel_takes(check, in, p);
    const int64_t bytes = ssd_scan_cuda_workspace(p);
    const Tensor workspace = torch::stable::new_empty(x, {bytes}, ScalarType::Byte);
    check.status(ssd_scan_cuda(p, workspace.data_ptr(), scope.stream()));
  });
}

}  // namespace
}  // namespace zebra

STABLE_TORCH_LIBRARY_IMPL(zebra, CUDA, m) { m.impl("ssd_scan", TORCH_BOX(&zebra::ssd_scan_op)); }
