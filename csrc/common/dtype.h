// Element types of tensors, free of torch and CUDA.
#pragma once

namespace zebra {

enum class DType { kFloat32, kFloat64, kFloat16, kBFloat16 };

}  // namespace zebra
