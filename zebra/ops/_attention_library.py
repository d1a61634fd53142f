"""Attention of 16-bit CUDA tensors by the kernels that come with torch: cuDNN's and flash.

Keys are assembled once for every KV head by one kernel, values are a view of the up-projection, and
both libraries group the heads themselves: nothing is repeated or concatenated.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

CUDNN, FLASH, COMPOSITE = "cudnn", "flash", "composite"
SERVED = "kernel + torch's cuDNN or flash attention (bfloat16, float16); composite (float32)"

_aten, _zebra = torch.ops.aten, torch.ops.zebra
_VEC = 8  # 16-bit elements of the 16 bytes that the kernels move
_CUDNN_FIRST = 91501  # with earlier versions torch itself avoids lengths that 128 does not divide
_CUDNN_TILE = 128  # tokens of cuDNN's largest tile


class Problem(NamedTuple):
    """What the choice of a library depends on beside the device."""

    dtype: torch.dtype
    T: int
    S: int
    nope: int
    rope: int
    v_dim: int
    causal: bool
    packed: bool

    @classmethod
    def of(
        cls, q: Tensor, kv: Tensor, k_rope: Tensor, cu_seqlens: Tensor | None, causal: bool
    ) -> Problem:
        """Describe the arguments of mla_attention; a single query sees all keys either way."""
        T, S, rope = q.size(1), k_rope.size(1), k_rope.size(2)
        nope, packed = q.size(3) - rope, cu_seqlens is not None
        causal = causal and (T > 1 or packed)
        return cls(q.dtype, T, S, nope, rope, kv.size(3) - nope, causal, packed)


class Libraries(NamedTuple):
    """Which libraries a device has, and the user's wish for determinism."""

    cudnn: bool
    flash: bool

    @classmethod
    def on(cls, device: torch.device) -> Libraries:
        """Ask torch: architecture, versions and the switches of torch.backends.cuda."""
        major, _ = torch.cuda.get_device_capability(device)
        version = torch.backends.cudnn.version() or 0
        cudnn = torch.backends.cuda.cudnn_sdp_enabled() and version >= _CUDNN_FIRST
        # In this mode torch lays out cuDNN's log-sum-exp in another way.
        cudnn = cudnn and not os.environ.get("TORCH_CUDNN_SDPA_AVOID_RECOMPILE")
        return cls(cudnn and major in (9, 10), torch.backends.cuda.flash_sdp_enabled())


def choose(
    p: Problem, libraries: Libraries, *, backward: bool = False, deterministic: bool = False
) -> str:
    """Name the library for a problem: the fastest one that takes it.

    Either library's backward pass takes the other's output and log-sum-exp.  Measured on an H100
    (torch 2.11, cuDNN 9.19): cuDNN was faster than flash in both passes of every model shape, and
    neither repeated KV heads nor copied values paid for themselves.

    Args:
        p: the problem.
        libraries: what the device has.
        backward: whether for the gradients.
        deterministic: whether gradients must be; cuDNN adds up dq in no fixed order.

    Returns:
        "cudnn", "flash", or "composite" where neither takes the shape.
    """
    fits = p.dtype in (torch.bfloat16, torch.float16) and p.T > 0
    if not fits or any(n % _VEC for n in (p.nope, p.rope, p.v_dim)):
        return COMPOSITE
    width, same = p.nope + p.rope, p.nope + p.rope == p.v_dim
    # cuDNN masks from the upper left corner, flash from the lower right as we do; cuDNN's form
    # for packed sequences plans anew in every call.
    square = p.T == p.S or not p.causal
    takes = (same and width <= 128) or (width, p.v_dim) == (192, 128)
    takes = takes and square and p.S > 1 and not p.packed
    if backward:
        # Behind the last token of a partial tile cuDNN takes exp(-lse) unmasked, up to 9.26 at
        # least: NaN where all of a row's scores are below -88.  It also crashes on one query.
        whole = p.T % _CUDNN_TILE == 0 and p.S % _CUDNN_TILE == 0
        takes = takes and whole and not deterministic
    if libraries.cudnn and takes:
        return CUDNN
    return FLASH if libraries.flash and same and width <= 256 else COMPOSITE


def forward(
    library: str,
    q: Tensor,
    kv: Tensor,
    k_rope: Tensor,
    scale: float,
    cu_seqlens: Tensor | None,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of mla_attention, contiguous."""
    q, key, value = _operands(q, kv, k_rope)
    if library == CUDNN:
        heads_first = [t.transpose(1, 2) for t in (q, key, value)]
        o, lse = _planned(
            "forward", heads_first, causal,
            lambda: _aten._scaled_dot_product_cudnn_attention(
                *heads_first, None, True, 0.0, causal, scale=scale
            ),
        )[:2]  # fmt: skip
        return o.transpose(1, 2).contiguous(), _by_token(lse.reshape(o.shape[:3]))
    rows = [t if cu_seqlens is None else t[0] for t in (q, key, value)]
    o, lse = _aten._flash_attention_forward(
        *rows, cu_seqlens, cu_seqlens, q.size(1), key.size(1), 0.0, causal, False, scale=scale
    )[:2]
    o, lse = (o, lse) if cu_seqlens is None else (o[None], lse[None])
    return o.contiguous(), _by_token(lse)


def backward(
    library: str,
    do: Tensor,
    q: Tensor,
    kv: Tensor,
    k_rope: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
    cu_seqlens: Tensor | None,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, kv and k_rope, contiguous; of the output alone, not of lse."""
    nope = q.size(3) - k_rope.size(2)
    q, key, value = _operands(q, kv, k_rope)
    do, o, lse = _plain(do), _plain(o), _by_token(lse)  # lse as [B, H, T] again
    seed, offset = q.new_empty(2, dtype=torch.uint64), q.new_empty((), dtype=torch.uint64)
    if library == CUDNN:
        if _cudnn_lse_dims() == 4:
            lse = lse[..., None]
        heads_first = [t.transpose(1, 2) for t in (q, key, value)]
        grads = _planned(
            "backward", heads_first, causal,
            lambda: _aten._scaled_dot_product_cudnn_attention_backward(
                do.transpose(1, 2), *heads_first, o.transpose(1, 2), lse, seed, offset, None, None,
                None, q.size(1), key.size(1), 0.0, causal, scale=scale,
            ),
        )  # fmt: skip
        dq, dkey, dvalue = (t.transpose(1, 2) for t in grads)
    else:
        packed = cu_seqlens is not None
        rows = [t[0] if packed else t for t in (do, q, key, value, o, lse)]
        with _strictly_deterministic():
            grads = _aten._flash_attention_backward(
                *rows, cu_seqlens, cu_seqlens, q.size(1), key.size(1), 0.0, causal, seed, offset,
                scale=scale,
            )  # fmt: skip
        dq, dkey, dvalue = (t[None] if packed else t for t in grads)
    dkv, dk_rope = _zebra._mla_attention_key_gradients(dkey, dvalue, nope)
    return dq.contiguous(), dkv, dk_rope


# Where cuDNN finds no plan, torch (2.11 to 2.13) raises, but leaves an empty one in its cache, and
# the next call of the same shape would read through a null pointer: such a call is not made.
_refused: dict[tuple[object, ...], str] = {}


def _planned(
    name: str, operands: list[Tensor], causal: bool, call: Callable[[], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """``call()`` of cuDNN on q, keys and values [B, heads, tokens, width], or the error it gave."""
    key = (name, causal, *((t.device, t.dtype, t.shape, t.stride()) for t in operands))
    if key not in _refused:
        try:
            return call()
        except torch.OutOfMemoryError:  # of tensors: whatever plan there is stays usable
            raise
        except RuntimeError as error:
            shapes = ", ".join(str(list(t.shape)) for t in operands)
            _refused[key] = (
                f"mla_attention: cuDNN's {name} pass refused q, keys and values [B, heads, tokens, "
                f"width] of {shapes}: {str(error).splitlines()[0]}; "
                f"torch.backends.cuda.enable_cudnn_sdp(False) serves them in another way"
            )
            raise RuntimeError(_refused[key]) from error
    raise RuntimeError(_refused[key])


def _operands(q: Tensor, kv: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, keys and values [B, tokens, heads, width], keys assembled, values a view of kv."""
    rope = k_rope.size(2)
    nope = q.size(3) - rope
    kv = _vectors(kv)
    key = kv[..., :nope]
    if rope > 0:
        key = _zebra._mla_attention_keys(kv, _vectors(k_rope), nope)
    # cuDNN's plan is found again by the strides of q, but not by those of the output
    return _plain(q), key, kv[..., nope:]


def _vectors(t: Tensor) -> Tensor:
    """``t``, copied only where its rows do not allow 16-byte access."""
    aligned = t.data_ptr() % 16 == 0 and t.stride(-1) == 1
    steps = zip(t.shape[:-1], t.stride()[:-1], strict=True)
    aligned = aligned and all(n <= 1 or step % _VEC == 0 for n, step in steps)
    return t if aligned else t.contiguous()


def _plain(t: Tensor) -> Tensor:
    """``t`` contiguous, with the usual strides also where a dimension has one element."""
    return t.contiguous().view(-1).view(t.shape)


def _by_token(lse: Tensor) -> Tensor:
    """[B, H, T] -> [B, T, H], and back."""
    return lse.transpose(1, 2).contiguous()


@functools.cache
def _cudnn_lse_dims() -> int:
    """3 or 4: whether this torch keeps cuDNN's log-sum-exp as [B, H, T] or [B, H, T, 1]."""
    t = torch.empty(1, 1, 8, 8, dtype=torch.bfloat16, device="meta")
    lse: Tensor = _aten._scaled_dot_product_cudnn_attention(t, t, t, None, True)[1]
    return lse.dim()


@contextlib.contextmanager
def _strictly_deterministic() -> Iterator[None]:
    """Let flash take its deterministic form even where non-deterministic ones only warn."""
    if not torch.are_deterministic_algorithms_enabled():
        yield
        return
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=warn_only)
