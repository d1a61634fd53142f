"""Every tolerance of the test suite: error(operator) <= factor x error(eager), against fp64.

Eager is :mod:`zebra.ops.reference` at the operator's dtype: fp32 arithmetic, one rounding of each
output. So 16-bit factors are near 1, and fp32 factors allow for another order of summation.  A
factor changes only with a reason beside it.
"""

import torch

_DEFAULT = {torch.float64: 4.0, torch.float32: 4.0, torch.bfloat16: 1.05, torch.float16: 1.05}

# (operator, dtype) -> factor, where the default does not hold; the reason stands beside the entry.
_SPECIAL: dict[tuple[str, torch.dtype], float] = {
    # With a residual the backward pass reads the rounded sum, which is the model's residual stream;
    # eager differentiates the unrounded one.  Two equal roundings instead of one: sqrt(2).
    ("rms_norm.gradient", torch.bfloat16): 1.5,
    ("rms_norm.gradient", torch.float16): 1.5,
    # A whole model decoding against its own full forward pass: the roundings of four layers, made
    # in another order, each amplified by the layers after it; eager's own error is one such draw.
    ("model", torch.float32): 8.0,
    ("model", torch.bfloat16): 2.0,
    ("model", torch.float16): 2.0,
    # Without AVX a lane adds a quarter of K products in turn; eager's kernels are wider anywhere.
    ("linear_decode", torch.float32): 8.0,
    # The exp inside silu is good to 1 ulp (2 without FMA), where eager's may be half of that.
    ("mamba2_step", torch.float32): 8.0,
    # exp is good to 1 ulp (2 without FMA), twice a term, where eager's may be half of that; eager
    # often cancels to better than the rounding of its result.
    ("fused_kl_div", torch.float32): 12.0,
    # ATen's matrix product: the normalised input, each product (both of swiglu, whose product adds
    # their errors) and the sum with the residual are rounded too, where eager rounds once.
    ("linear_decode.matmul", torch.bfloat16): 3.0,
    ("linear_decode.matmul", torch.float16): 3.0,
    # The gradient of the logits is rounded to bf16 for its products, and rows of hidden states or
    # dhidden once more with dkl: three roundings about as large as that of the result.
    ("fused_kl_div.gradient", torch.bfloat16): 2.0,
    # The composite rounds the gradient of the logits to 16 bits for its products; eager does not.
    ("fused_kl_div.composite_gradient", torch.bfloat16): 2.0,
    ("fused_kl_div.composite_gradient", torch.float16): 2.0,
    # lse of absorbed bf16 queries, which enter the matrix unit with 16 bits of mantissa, against
    # eager's 24: about 6 ulp of fp32.
    ("mla_decode.lse", torch.bfloat16): 12.0,
    # The backward pass reads o rounded, in sum(dO o) of every row, as FlashAttention does; eager
    # differentiates the unrounded one.  The sharper the softmax, the more of dq that is: two
    # roundings, the first amplified.  The bf16 matrix unit takes P and dS rounded as well.
    ("mla_attention.gradient", torch.bfloat16): 1.8,
    ("mla_attention.gradient", torch.float16): 1.8,
    # dP - sum(dO o) cancels where the softmax is sharp; here the two sums run in different orders,
    # in eager in the same.
    ("mla_attention.gradient", torch.float32): 8.0,
    # cuDNN and flash, against eager with their roundings (tests/ops/test_mla_attention_cuda.py):
    # probabilities are as large an error as o; the order of a tile's sums is left.
    ("mla_attention.library", torch.bfloat16): 1.3,
    ("mla_attention.library", torch.float16): 1.3,
    # lse through the special function units: 2 ulp of exp, and of log.
    ("mla_attention.library", torch.float32): 12.0,
    # dP - sum(dO o) magnifies the rounding of o by 1 / (1 - p) where one key has probability p:
    # 4e-2 of dq in bf16 with two keys.  Eager has the same, but with few rows an o that rounds the
    # other way is another draw of it: 1.7 at worst of one head's two rows, 1.2 of a hundred.
    ("mla_attention.library.gradient", torch.bfloat16): 2.0,
    ("mla_attention.library.gradient", torch.float16): 2.0,
    # The matrix products round to the operator's dtype, as nn.Linear does, and eager rounds only
    # the end: up to five equal roundings in a row (c_q, its norm, q, the rotation; and in dhidden
    # the sum of two products) instead of one, each as large as the last: sqrt(5), with headroom.
    ("mla_project", torch.bfloat16): 2.5,
    ("mla_project", torch.float16): 2.5,
    ("mla_project.gradient", torch.bfloat16): 2.8,
    ("mla_project.gradient", torch.float16): 2.8,
    # The chunked form reaches a state through exp(s_i - s_j) and sums of 64 tokens where eager
    # multiplies token by token; with few channels nothing averages out.
    ("ssd_scan", torch.float32): 8.0,
    # The operands of the matrix products are rounded too: the decayed scores and, where it is read,
    # the state, each as large an error as the rounding of y: sqrt(3), with headroom.
    ("ssd_scan.matrix_units", torch.bfloat16): 2.0,
    ("ssd_scan.matrix_units", torch.float16): 2.0,
    # The chunked form sums dA over pairs of tokens, eager over tokens.
    ("ssd_scan.gradient", torch.float32): 12.0,
    # Eager sums dweight and dbias in short runs, pairwise; the kernel token after token in a tile.
    ("causal_conv1d.gradient", torch.float32): 8.0,
}

# Relative error of the fp32 state behind a 16-bit matrix product: its operand, decayed x, is
# rounded, 1.6e-3 of bfloat16 (eight times less of float16).
SSD_STATE_ERROR = {torch.bfloat16: 3e-3, torch.float16: 4e-4}


def factor(op: str, dtype: torch.dtype) -> float:
    """The factor for an operator (or "operator.gradient") at a dtype."""
    return _SPECIAL.get((op, dtype), _DEFAULT[dtype])
