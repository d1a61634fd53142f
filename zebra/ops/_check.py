"""Argument checks of the composites, in the words of the compiled operators.

The twin of csrc/common/torch_check.h, method by method; each composite's checks follow those of
csrc/<op>/<op>_torch.h line by line, and the ``rejects`` tests compare the two texts.  Structure
only: reading values of a CUDA tensor would wait for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def acc_dtype(t: Tensor) -> torch.dtype:
    """Accumulation dtype of an element type: float64 for float64, float32 otherwise."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype without "torch."."""
    return str(dtype).removeprefix("torch.")


def _text(value: object) -> str:
    """Of a tensor "[2, 128, 64] bfloat16 on cuda:0, strides [8192, 64, 1]"."""
    if not isinstance(value, Tensor):
        return dtype_name(value) if isinstance(value, torch.dtype) else str(value)
    strides = "" if value.is_contiguous() else f", strides {list(value.stride())}"
    return f"{list(value.shape)} {dtype_name(value.dtype)} on {value.device}{strides}"


class Check:
    """The checks of one operator; every failure names operator, argument, expected and got."""

    def __init__(self, op: str) -> None:
        self._op = op

    def that(self, ok: bool, argument: str, got: object, *expected: object) -> None:
        """Raise unless ``ok``; ``expected`` continues "<argument> must be"."""
        if not ok:
            want = "".join(map(_text, expected))
            raise RuntimeError(f"zebra::{self._op}: {argument} must be {want}, got {_text(got)}")

    def shape(self, argument: str, t: Tensor, sizes: Sequence[int], legend: str) -> None:
        """Accept any size where ``sizes`` has -1; ``legend`` names the dimensions."""
        if t.dim() != len(sizes) or any(
            w not in (-1, s) for s, w in zip(t.shape, sizes, strict=True)
        ):
            want = ", ".join("any" if size < 0 else str(size) for size in sizes)
            self.that(False, argument, t, legend, " = [", want, "]")

    def floating(self, argument: str, t: Tensor) -> None:
        """One of float32, bfloat16, float16, or (CPU only) float64."""
        cpu = t.device.type == "cpu"
        ok = t.dtype in (torch.float32, torch.bfloat16, torch.float16)
        wide = " or float64" if cpu else " (float64 on the CPU only)"
        ok = ok or (cpu and t.dtype == torch.float64)
        self.that(ok, argument, t, "float32, bfloat16 or float16", wide)

    def parameter(self, argument: str, t: Tensor, x: Tensor) -> None:
        """A contiguous weight, bias or other parameter beside x: of x's dtype or float32."""
        self.floating(argument, t)
        ok = t.dtype in (x.dtype, torch.float32)
        self.that(ok, argument, t, x.dtype, " like x, or float32")
        self.same_device(argument, t, x)
        self.contiguous(argument, t)

    def dtype(self, argument: str, t: Tensor, want: torch.dtype) -> None:
        """Exactly this dtype."""
        self.that(t.dtype == want, argument, t, want)

    def same_device(self, argument: str, t: Tensor, other: Tensor) -> None:
        """On the device of ``other``."""
        self.that(t.device == other.device, argument, t, "on ", other.device)

    def like(self, argument: str, t: Tensor, other: Tensor, other_name: str) -> None:
        """Of the dtype and on the device of ``other``, which is called ``other_name``."""
        self.that(t.dtype == other.dtype, argument, t, other.dtype, " like ", other_name)
        self.same_device(argument, t, other)

    def last_dim_contiguous(self, argument: str, t: Tensor) -> None:
        """Elements of a row lie side by side."""
        ok = t.dim() == 0 or t.size(-1) <= 1 or t.stride(-1) == 1
        self.that(ok, argument, t, "contiguous in its last dimension")

    def contiguous(self, argument: str, t: Tensor) -> None:
        """Without gaps, in order."""
        self.that(t.is_contiguous(), argument, t, "contiguous")

    def slots(self, argument: str, t: Tensor) -> None:
        """States [slots, ...], each slot contiguous in itself, none overlapping another."""
        slot, ok = 1, True
        for size, stride in zip(reversed(t.shape[1:]), reversed(t.stride()[1:]), strict=True):
            ok = ok and (size <= 1 or stride == slot)
            slot *= size
        ok = t.numel() == 0 or (ok and (t.size(0) <= 1 or t.stride(0) >= slot))
        legend = "contiguous within a slot, with slots at least "
        self.that(ok, argument, t, legend, slot, " elements apart")

    def separate_rows(self, argument: str, t: Tensor) -> None:
        """Rows [pages, page, width], each contiguous, none overlapping another."""
        self.last_dim_contiguous(argument, t)
        need = t.size(2)  # elements from the first to the last of what is counted so far
        ok = True
        for stride, size in sorted(zip(t.stride()[:2], t.shape[:2], strict=True)):
            if size > 1:
                ok = ok and stride >= need
                need += (size - 1) * stride
        self.that(t.numel() == 0 or ok, argument, t, "of rows that do not overlap")

    def cu_seqlens(self, cu: Tensor, x: Tensor, x_name: str, x_legend: str) -> int:
        """Bounds of the sequences packed in x [1, T, ...]; returns how many.  Not their values."""
        self.shape("cu_seqlens", cu, (-1,), "[n_seq + 1]")
        self.dtype("cu_seqlens", cu, torch.int32)
        self.same_device("cu_seqlens", cu, x)
        self.contiguous("cu_seqlens", cu)
        self.that(x.size(0) == 1, x_name, x, x_legend, " with cu_seqlens")
        sequences, tokens = cu.size(0) - 1, x.size(1)
        ok = sequences >= 1 or (sequences == 0 and tokens == 0)
        legend = "[n_seq + 1] with T = "
        self.that(ok, "cu_seqlens", cu, legend, tokens, " tokens in at least one sequence")
        return sequences
