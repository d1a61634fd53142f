// ssd_scan on the CPU: chunked, matrix products in registers, one task a sequence and a few heads.
#include "ssd_scan/ssd_scan_backward.h"
#include "ssd_scan/ssd_scan_forward.h"

namespace zebra::ZEBRA_ISA {

void ssd_scan(const SsdScanParams& p) { ZEBRA_DISPATCH_CPU(p.dtype, forward, p); }

void ssd_scan_backward(const SsdScanBackwardParams& p) {
  ZEBRA_DISPATCH_CPU(p.in.dtype, backward, p);
}

}  // namespace zebra::ZEBRA_ISA
