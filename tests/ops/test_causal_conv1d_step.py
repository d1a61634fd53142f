"""causal_conv1d_step against its fp64 truth and against the scan, on every device."""

import pytest
import tolerances
import torch
from refusals import assert_rejected

from zebra import ops
from zebra.ops import conv, reference
from zebra.testing import assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(batch, channels, width=4, dtype=torch.float32, device="cpu", slots=None):
    """x, conv_state, weight, bias of causal_conv1d_step."""

    def normal(*shape):
        return torch.randn(shape).to(dtype).to(device)  # the same inputs on every device

    state = normal(slots or batch, channels, width - 1)
    return normal(batch, channels), state, normal(channels, width) / 2, normal(channels)


def slots_of(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


def doubles(*tensors):
    return [t.double().cpu() for t in tensors]


@pytest.mark.parametrize("call", [ops.causal_conv1d_step, conv._causal_conv1d_step_composite])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("channels", [40, 41])
def test_causal_conv1d_step_matches_reference(channels, width, dtype, call, device):
    x, state, *parameters = make(5, channels, width, dtype, device, slots=9)
    indices = slots_of([7, -1, 0, 3, -1], device)
    truth, _ = reference.causal_conv1d_step(*doubles(x, state, *parameters), "silu", indices.cpu())
    eager, after = reference.causal_conv1d_step(x, state, *parameters, "silu", indices)
    y = call(x, state, *parameters, "silu", indices)
    assert_close(y, truth, eager, tolerances.factor("causal_conv1d_step", dtype), "y")
    assert torch.equal(state, after) and (y[[1, 4]] == 0).all()


@pytest.mark.parametrize("batch", [1, 300, 600])  # beyond 256 rows a CTA takes several
def test_causal_conv1d_step_matches_reference_at_any_batch(batch, device):
    x, state, *parameters = make(batch, 16, 4, torch.bfloat16, device)
    eager, after = reference.causal_conv1d_step(x, state, *parameters)
    y = ops.causal_conv1d_step(x, state, *parameters)
    torch.testing.assert_close(y, eager)
    assert torch.equal(state, after)


@pytest.mark.parametrize("channels", [24, 25])
def test_causal_conv1d_steps_equal_the_scan(channels, device):
    x = torch.randn(3, 50, channels, dtype=torch.bfloat16, device=device)
    _, initial, weight, bias = make(3, channels, 4, torch.bfloat16, device)
    y, final = ops.causal_conv1d(x, weight, bias, initial)
    wide = torch.full((3, 3 * channels + 8, 3), float("nan"), dtype=y.dtype, device=device)
    state = wide[:, :channels]  # a slot stride of its own
    state.copy_(initial)
    for t in range(50):
        step = ops.causal_conv1d_step(x[:, t], state, weight, bias)  # rows with a stride
        assert torch.equal(step, y[:, t])
    assert torch.equal(state, final) and wide[:, channels:].isnan().all()


def test_causal_conv1d_step_takes_no_bias_and_no_activation(device):
    x, weight = torch.ones(2, 8, device=device), torch.ones(8, 4, device=device)
    state = torch.ones(2, 8, 3, device=device)
    y = ops.causal_conv1d_step(x, state, weight, activation="none")
    assert torch.equal(y, torch.full_like(y, 4.0))


def test_causal_conv1d_step_leaves_other_slots_alone(device):
    x, state, weight, bias = make(2, 16, device=device, slots=5)
    state[[0, 2, 4]] = float("nan")
    y = ops.causal_conv1d_step(x, state, weight, bias, "silu", slots_of([3, 1], device))
    assert y.isfinite().all()
    assert state[[1, 3]].isfinite().all() and state[[0, 2, 4]].isnan().all()


def test_causal_conv1d_step_passes_opcheck(device):
    x, state, weight, bias = make(3, 16, device=device, slots=6)
    for chosen in (None, slots_of([4, -1, 0], device)):
        torch.library.opcheck(
            torch.ops.zebra.causal_conv1d_step.default, (x, state, weight, bias, "silu", chosen)
        )


def test_causal_conv1d_step_compiles_fullgraph(device):
    x, state, weight, bias = make(3, 16, device=device)
    other = state.clone()
    compiled = torch.compile(ops.causal_conv1d_step, fullgraph=True, backend="aot_eager")
    got, want = compiled(x, state, weight, bias), ops.causal_conv1d_step(x, other, weight, bias)
    assert torch.equal(got, want) and torch.equal(state, other)


@pytest.mark.gpu
def test_causal_conv1d_step_survives_graph_replay_with_other_slots():
    x, state, weight, bias = make(2, 64, 4, torch.bfloat16, "cuda", slots=4)
    indices = slots_of([0, 1], "cuda")
    ops.causal_conv1d_step(x, state, weight, bias, "silu", indices)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.causal_conv1d_step(x, state, weight, bias, "silu", indices)
    x.normal_()
    indices.copy_(slots_of([3, -1], "cuda"))
    other = state.clone()
    graph.replay()
    want = ops.causal_conv1d_step(x, other, weight, bias, "silu", indices)
    assert torch.equal(y, want) and torch.equal(state, other)


@pytest.mark.gpu
def test_causal_conv1d_step_gives_nan_for_a_slot_out_of_range_on_a_gpu():
    x, state, weight, bias = make(2, 16, device="cuda")
    before = state.clone()
    y = ops.causal_conv1d_step(x, state, weight, bias, "silu", slots_of([2, 1], "cuda"))
    assert y[0].isnan().all() and y[1].isfinite().all()
    assert torch.equal(state[0], before[0])


REJECTED_STEPS = {
    "x_rank": ({"x": lambda t: t[0]}, r"x must be \[B, C\]"),
    "state_shape": (
        {"conv_state": lambda t: t[:, :, :2]},
        r"conv_state must be \[slots, C, W-1\] = \[any, 8, 3\], got \[4, 8, 2\]",
    ),
    "state_dtype": ({"conv_state": lambda t: t.half()}, "conv_state must be float32 like x"),
    "state_strides": (
        {"conv_state": lambda t: t.mT.contiguous().mT},
        "conv_state must be contiguous within a slot",
    ),
    "state_overlap": (
        {"conv_state": lambda t: t[:1].expand(4, -1, -1)},
        "conv_state must be contiguous within a slot, with slots at least 24 elements apart",
    ),
    "too_few_slots": (
        {"conv_state": lambda t: t[:2], "state_indices": lambda _: None},
        r"conv_state must be \[slots, C, W-1\] with at least B = 3 slots",
    ),
    "indices_dtype": ({"state_indices": lambda t: t.long()}, "state_indices must be int32"),
    "indices_shape": (
        {"state_indices": lambda t: t[:2]},
        r"state_indices must be \[B\] = \[3\], got \[2\]",
    ),
    "activation": ({"activation": lambda _: "gelu"}, "activation must be 'silu' or 'none'"),
}


@pytest.mark.parametrize("case", REJECTED_STEPS)
def test_causal_conv1d_step_rejects(case, device):
    args = {
        "x": torch.randn(3, 8, device=device),
        "conv_state": torch.randn(4, 8, 3, device=device),
        "weight": torch.randn(8, 4, device=device),
        "activation": "silu",
        "state_indices": torch.zeros(3, dtype=torch.int32, device=device),
    }
    change, message = REJECTED_STEPS[case]
    args = {k: change[k](v) if k in change else v for k, v in args.items()}
    message = "zebra::causal_conv1d_step: " + message
    forms = (ops.causal_conv1d_step, conv._causal_conv1d_step_composite)
    assert_rejected(message, *forms, **args)


def test_causal_conv1d_step_rejects_a_slot_out_of_range_on_the_cpu():
    indices = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="state_indices must be below slots = 4, got 4 at index"):
        ops.causal_conv1d_step(
            torch.randn(2, 8), torch.randn(4, 8, 3), torch.randn(8, 4), state_indices=indices
        )
