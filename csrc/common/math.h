// Integer helpers, usable in constant expressions on host and device.
#pragma once

namespace zebra {

template <typename T>
constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

template <typename T>
constexpr T round_up(T a, T b) {
  return ceil_div(a, b) * b;
}

}  // namespace zebra
