#include <torch/csrc/stable/library.h>

#include "mla_project/mla_project_torch_products.h"

namespace zebra {
namespace {

struct CpuDevice {
  static constexpr bool kInPlace = false;

  static int64_t norm_partials(int64_t) { return kRmsNormCpuPartials; }
  static Status norm(const RmsNormParams& p) { return rms_norm_cpu(p), Status{}; }
  static Status norm_backward(const RmsNormBackwardParams& p) {
    return rms_norm_backward_cpu(p), Status{};
  }
  static std::optional<std::tuple<Tensor, Tensor>> project(const Check&, const MlaProjectInputs&,
                                                           const MlaProjectDims&,
                                                           const MlaProjectParams&, const Tensor&) {
    return std::nullopt;
  }
  static Status rotate(const MlaProjectParams& p) { return mla_project_cpu(p), Status{}; }
  static Status unrotate(const MlaProjectBackwardParams& p) {
    return mla_project_backward_cpu(p), Status{};
  }
  static void check_positions(const Check& check, const RopeTable& rope, const MlaProjectDims& d) {
    for (int64_t t = 0; t < d.tokens; ++t)
      check.that(rope.position(t) >= 0 && rope.position(t) < rope.max_positions, "positions",
                 std::to_string(rope.position(t)) + " at [" + std::to_string(t / d.T) + ", " +
                     std::to_string(t % d.T) + "]",
                 "0 to maxpos - 1 = ", rope.max_positions - 1);
  }
};

std::tuple<Tensor, Tensor> mla_project_op(const Tensor& hidden, const OptTensor& q_a_weight,
                                          const Tensor& q_b_weight, const Tensor& kv_a_weight,
                                          const Tensor& cos, const Tensor& sin,
                                          const Tensor& positions, int64_t num_heads,
                                          const OptTensor& q_a_norm_weight,
                                          const OptTensor& kv_a_norm_weight, double norm_eps) {
  const Check check("mla_project");
  const MlaProjectInputs in{hidden,    q_a_weight, q_b_weight,      kv_a_weight,      cos,     sin,
                            positions, num_heads,  q_a_norm_weight, kv_a_norm_weight, norm_eps};
  return MlaProducts(check, in, CpuDevice{}).forward(nullptr, nullptr);
}

std::tuple<Tensor, Tensor, Tensor> mla_project_training_op(
    const Tensor& hidden, const Tensor& q_a, const Tensor& q_b_weight, const Tensor& kv_a_weight,
    const Tensor& cos, const Tensor& sin, const Tensor& positions, int64_t num_heads,
    const OptTensor& q_a_norm_weight, const OptTensor& kv_a_norm_weight, double norm_eps) {
  const Check check("mla_project");
  const OptTensor q_a_weight(q_a);
  const MlaProjectInputs in{hidden,    q_a_weight, q_b_weight,      kv_a_weight,      cos,     sin,
                            positions, num_heads,  q_a_norm_weight, kv_a_norm_weight, norm_eps};
  Tensor c_q = hidden;
  const auto [q, latent] = MlaProducts(check, in, CpuDevice{}).forward(nullptr, nullptr, &c_q);
  return {q, latent, c_q};
}

std::tuple<Tensor, Tensor> mla_project_append_op(
    const Tensor& hidden, const OptTensor& q_a_weight, const Tensor& q_b_weight,
    const Tensor& kv_a_weight, const Tensor& cos, const Tensor& sin, const Tensor& positions,
    int64_t num_heads, Tensor cache, const Tensor& slot_mapping, const OptTensor& q_a_norm_weight,
    const OptTensor& kv_a_norm_weight, double norm_eps, const OptTensor& input_norm_weight,
    double input_norm_eps) {
  const Check check("mla_project_append");
  const MlaProjectInputs in{
      hidden,   q_a_weight,         q_b_weight,    kv_a_weight,     cos,
      sin,      positions,          num_heads,     q_a_norm_weight, kv_a_norm_weight,
      norm_eps, &input_norm_weight, input_norm_eps};
  return MlaProducts(check, in, CpuDevice{}).forward(&cache, &slot_mapping);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mla_project_backward_op(
    const Tensor& dq, const Tensor& dlatent, const Tensor& hidden, const OptTensor& q_a_weight,
    const Tensor& q_b_weight, const Tensor& kv_a_weight, const Tensor& cos, const Tensor& sin,
    const Tensor& positions, int64_t num_heads, const OptTensor& q_a_norm_weight,
    const OptTensor& kv_a_norm_weight, double norm_eps, const OptTensor& c_q) {
  const Check check("mla_project_backward");
  const MlaProjectInputs in{hidden,    q_a_weight, q_b_weight,      kv_a_weight,      cos,     sin,
                            positions, num_heads,  q_a_norm_weight, kv_a_norm_weight, norm_eps};
  return MlaProducts(check, in, CpuDevice{}).backward(dq, dlatent, c_q);
}

}  // namespace
}  // namespace zebra

STABLE_TORCH_LIBRARY_IMPL(zebra, CPU, m) {
  m.impl("mla_project", TORCH_BOX(&zebra::mla_project_op));
  m.impl("mla_project_training", TORCH_BOX(&zebra::mla_project_training_op));
  m.impl("mla_project_append", TORCH_BOX(&zebra::mla_project_append_op));
  m.impl("mla_project_backward", TORCH_BOX(&zebra::mla_project_backward_op));
}
