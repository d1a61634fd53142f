"""Operators of Zebra: ``zebra.ops.NAME`` is the documented form of ``torch.ops.zebra.NAME``.

Dimensions, used in every docstring and error message:

====  ==========================================  ====  ===================================
B     batch                                       H     query (or SSM) heads
T     new tokens                                  G     KV heads (Gx, Gb, Gc: of x, B, C)
S     cached tokens                               P     SSM head dimension
D     hidden size                                 N     SSM state size (d_state)
R     kv_lora_rank                                C     channels of the convolution
E     qk_rope_head_dim                            W     width of the convolution
Dn    qk_nope_head_dim                            Dv    v_head_dim
====  ==========================================  ====  ===================================

Every operator has a schema, a CPU kernel, a CUDA implementation, a fake (meta) function and, where
training needs it, gradients.  Dispatch is by device alone.  :func:`support_matrix` says which
implementation serves each device: a kernel, or a composite of eager PyTorch operations.

Packed batches: with ``cu_seqlens`` [n_seq + 1] int32, B is 1, sequence i holds the tokens
cu_seqlens[i] to cu_seqlens[i + 1], and states have n_seq rows.
"""

from zebra import _extension

_extension.load()

from zebra.ops._register import support_matrix  # noqa: E402
from zebra.ops.norm import rms_norm  # noqa: E402
from zebra.ops.ssd import ssd_scan  # noqa: E402

__all__ = ["rms_norm", "ssd_scan", "support_matrix"]
