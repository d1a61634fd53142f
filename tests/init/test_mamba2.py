import pytest
import torch

from zebra.init import gqa_to_mamba2
from zebra.layers import Mamba2Mixer

HIDDEN, HEADS, GROUPS, D = 48, 4, 2, 16


def projections() -> list[torch.Tensor]:
    shapes = ((HEADS * D, HIDDEN), (GROUPS * D, HIDDEN), (GROUPS * D, HIDDEN), (HIDDEN, HEADS * D))
    return [torch.randn(*shape) for shape in shapes]


def test_rows_are_z_v_k_q_dt() -> None:
    q, k, v, o = projections()
    got = gqa_to_mamba2(q, k, v, o, num_heads=HEADS)
    inner, kv = HEADS * D, GROUPS * D
    z, x, B, C, dt = got["in_proj.weight"].split([inner, kv, kv, inner, HEADS])
    assert torch.equal(x, v) and torch.equal(B, k) and torch.equal(C, q)
    assert torch.equal(got["out_proj.weight"], o)
    for random in (z, dt):
        assert random.abs().max() <= HIDDEN**-0.5
        assert random.std().item() == pytest.approx((HIDDEN * 3) ** -0.5, rel=0.15)
    assert got["conv1d.weight"].abs().max() <= 0.5 and got["conv1d.weight"].std() > 0.25
    assert got["conv1d.bias"].abs().max() <= 0.5
    assert torch.equal(got["norm.weight"], torch.ones(inner))


def test_state_dict_fits_the_layer() -> None:
    layer = Mamba2Mixer(HIDDEN, HEADS, D, D, GROUPS)
    layer.load_state_dict(gqa_to_mamba2(*projections(), num_heads=HEADS))


def test_generator_fixes_every_random_number() -> None:
    weights = projections()
    first, again, other = (
        gqa_to_mamba2(*weights, num_heads=HEADS, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["A_log"], other["A_log"])
    assert not torch.equal(first["in_proj.weight"], other["in_proj.weight"])


def test_decay_parameters_stay_fp32() -> None:
    got = gqa_to_mamba2(*(w.bfloat16() for w in projections()), num_heads=HEADS)
    assert {n for n, w in got.items() if w.dtype == torch.float32} == {"A_log", "D", "dt_bias"}


def test_sizes_that_do_not_fit_are_refused() -> None:
    q, k, v, o = projections()
    with pytest.raises(ValueError, match="gqa_to_mamba2"):
        gqa_to_mamba2(q, k, v, o.T, num_heads=HEADS)
