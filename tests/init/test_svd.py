import pytest
import torch

from zebra.init import gqa_to_mla, rank_for_energy
from zebra.init.svd import head_rows, share_rope_key
from zebra.layers import MultiheadLatentAttention, RotaryEmbedding

HIDDEN, HEADS, GROUPS, D, NOPE, E = 96, 4, 2, 24, 12, 12


def projections(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    shapes = ((HEADS * D, HIDDEN), (GROUPS * D, HIDDEN), (GROUPS * D, HIDDEN), (HIDDEN, HEADS * D))
    return [torch.randn(*shape, dtype=dtype) / HIDDEN**0.5 for shape in shapes]


def convert(weights, q_rank=HEADS * D, kv_rank=2 * GROUPS * D, **options) -> dict:
    sizes = {"num_heads": HEADS, "num_kv_heads": GROUPS}
    sizes |= {"qk_nope_head_dim": NOPE, "qk_rope_head_dim": E}
    return gqa_to_mla(*weights, q_lora_rank=q_rank, kv_lora_rank=kv_rank, **(sizes | options))


@pytest.mark.parametrize("rope_aware", [False, True])
def test_full_rank_is_exact_on_queries_nope_keys_and_values(rope_aware: bool) -> None:
    weights = projections()
    q, k, v, o = weights
    got = convert(weights, rope_aware=rope_aware)
    x = torch.randn(7, HIDDEN, dtype=torch.float64)
    nope, rope = head_rows(D, NOPE, E, rope_aware)

    heads = (x @ q.T).unflatten(-1, (HEADS, D))
    want = torch.cat((heads[..., nope], heads[..., rope]), dim=-1).flatten(1)
    queries = x @ got["q_a_proj.weight"].T @ got["q_b_proj.weight"].T
    if rope_aware:  # the rope queries carry the KV heads' factors: see the test of the scores
        queries, want = (t.unflatten(-1, (HEADS, D))[..., :NOPE] for t in (queries, want))
    torch.testing.assert_close(queries, want, rtol=1e-10, atol=1e-10)

    latent, k_rope = (x @ got["kv_a_proj_with_mqa.weight"].T).split([2 * GROUPS * D, E], dim=-1)
    key, value = (
        (latent @ got["kv_b_proj.weight"].T).unflatten(-1, (GROUPS, -1)).split([NOPE, D], dim=-1)
    )
    keys = (x @ k.T).unflatten(-1, (GROUPS, D))
    torch.testing.assert_close(key, keys[..., nope], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(value.flatten(1), x @ v.T, rtol=1e-10, atol=1e-10)
    if not rope_aware:
        torch.testing.assert_close(k_rope, keys[..., rope].mean(1), rtol=1e-10, atol=1e-10)
    assert torch.equal(got["out_proj.weight"], o)


def test_truncation_is_the_best_of_its_rank() -> None:
    weights = projections()
    got = convert(weights, q_rank=20, kv_rank=16)
    s = torch.linalg.svdvals(weights[0])
    up = got["q_b_proj.weight"]
    assert torch.allclose(up.T @ up, torch.eye(20, dtype=up.dtype), atol=1e-10)  # U is orthonormal
    down = got["q_a_proj.weight"]
    torch.testing.assert_close(torch.linalg.svdvals(down), s[:20], rtol=1e-10, atol=0)
    error = (weights[0] - up @ down).square().sum()
    torch.testing.assert_close(error, s[20:].square().sum(), rtol=1e-9, atol=0)


def test_paper_rows_are_the_first_and_the_last() -> None:
    nope, rope = head_rows(8, 4, 4, rope_aware=False)
    assert nope.tolist() == [0, 1, 2, 3] and rope.tolist() == [4, 5, 6, 7]


def test_rope_aware_rows_are_whole_pairs_at_the_students_frequencies() -> None:
    nope, rope = head_rows(16, 8, 8, rope_aware=True)
    assert rope.tolist() == [0, 8, 2, 10, 4, 12, 6, 14]
    assert nope.tolist() == [1, 3, 5, 7, 9, 11, 13, 15]
    teacher = RotaryEmbedding(16, 4).inv_freq
    student = RotaryEmbedding(8, 4).inv_freq
    torch.testing.assert_close(student, teacher[rope[::2]])


def test_rope_aware_start_keeps_rotated_scores_that_the_paper_start_loses() -> None:
    """With no nope part and one KV head, the rope-aware start is the teacher's attention."""
    torch.manual_seed(0)
    q, k, v, o = (torch.randn(64, 64, dtype=torch.float64) / 8 for _ in range(4))
    x = torch.randn(1, 9, 64, dtype=torch.float64)
    # the student's tables carry a magnitude that the teacher's do not
    plain = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 1.0}
    plain |= {"original_max_position_embeddings": 16, "attention_factor": 1.25}
    rotary = RotaryEmbedding(32, 16, plain)
    cos, sin = (t[:9].double() / 1.25 for t in rotary.tables(x.device))

    def rotate(t: torch.Tensor) -> torch.Tensor:
        a, b = t.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    query = rotate((x[0] @ q.T).view(9, 2, 32).transpose(0, 1))
    key, value = rotate(x[0] @ k[:32].T), x[0] @ v[:32].T
    score = (query @ key.T / 32**0.5).masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
    want = (score.softmax(-1) @ value).transpose(0, 1).flatten(1) @ o.T
    errors = {}
    for aware in (True, False):
        layer = MultiheadLatentAttention(64, 2, 1, 64, 1, 32, 32, rotary, softmax_scale=32**-0.5)
        weights = gqa_to_mla(
            q, k[:32], v[:32], o, num_heads=2, num_kv_heads=1, q_lora_rank=None,
            kv_lora_rank=64, qk_nope_head_dim=0, qk_rope_head_dim=32, rope_aware=aware,
            rope_gain=1.25**2,
        )  # fmt: skip
        layer = layer.double()
        # the layer wants a nope channel: give it one that is zero
        weights["q_proj.weight"] = torch.cat(
            (torch.zeros(2, 1, 64), weights["q_proj.weight"].view(2, 32, 64)), dim=1
        ).flatten(0, 1)
        weights["kv_b_proj.weight"] = torch.cat((torch.zeros(1, 64), weights["kv_b_proj.weight"]))
        layer.load_state_dict(weights)
        errors[aware] = (layer(x)[0] - want).abs().max().item()
    assert errors[True] < 1e-6 < 1e-2 < errors[False]


def rope_scores(q: torch.Tensor, k: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """q [.., E] . R(angle) k [.., E] over adjacent pairs."""
    q, k = (torch.view_as_complex(t.unflatten(-1, (-1, 2)).contiguous()) for t in (q, k))
    return (q.conj() * k * torch.polar(torch.ones_like(angle), angle)).real.sum(-1)


def test_shared_rope_key_fits_scores_better_than_the_average() -> None:
    q, k, _, _ = projections()
    _, rope = head_rows(D, NOPE, E, rope_aware=True)
    moved, shared = share_rope_key(q, k, rope, HEADS, GROUPS)
    x, y = torch.randn(2, 500, HIDDEN, dtype=torch.float64)
    angle = torch.rand(500, 1, E // 2, dtype=torch.float64) * 6
    rows = lambda w, t, n: (t @ w.T).unflatten(-1, (n, D))[..., rope]  # noqa: E731
    query, key = rows(q, x, HEADS), rows(k, y, GROUPS)
    want = rope_scores(query, key.repeat_interleave(HEADS // GROUPS, 1), angle)
    average = rope_scores(query, key.mean(1, keepdim=True).expand_as(query), angle)
    one = (y @ shared.T)[:, None].expand_as(query)
    fitted = rope_scores(rows(moved, x, HEADS), one, angle)
    assert (fitted - want).norm() < 0.95 * (average - want).norm()


def test_shared_rope_key_is_exact_where_heads_differ_by_a_turn() -> None:
    q, _, _, _ = projections()
    _, rope = head_rows(D, NOPE, E, rope_aware=True)
    first = torch.randn(E // 2, HIDDEN, dtype=torch.complex128)
    second = first * torch.polar(
        torch.rand(E // 2, 1).double() + 0.5, torch.rand(E // 2, 1).double()
    )
    k = torch.zeros(GROUPS, D, HIDDEN, dtype=torch.float64)
    k[:, rope] = torch.view_as_real(torch.stack((first, second))).movedim(-1, 2).flatten(1, 2)
    moved, shared = share_rope_key(q, k.flatten(0, 1), rope, HEADS, GROUPS)
    x, y = torch.randn(2, 50, HIDDEN, dtype=torch.float64)
    angle = torch.rand(50, 1, E // 2, dtype=torch.float64) * 6
    query = (x @ q.T).unflatten(-1, (HEADS, D))[..., rope]
    key = torch.einsum("th,gdh->tgd", y, k)[..., rope].repeat_interleave(HEADS // GROUPS, 1)
    got = rope_scores(
        (x @ moved.T).unflatten(-1, (HEADS, D))[..., rope],
        (y @ shared.T)[:, None].expand_as(query),
        angle,
    )
    torch.testing.assert_close(got, rope_scores(query, key, angle), rtol=1e-9, atol=1e-9)


def test_no_query_rank_keeps_queries_exact() -> None:
    weights = projections()
    got = convert(weights, q_rank=None)
    assert "q_a_proj.weight" not in got
    torch.testing.assert_close(got["q_proj.weight"], weights[0])


def test_half_precision_weights_go_through_fp32() -> None:
    weights = projections(torch.bfloat16)
    got = convert(weights)
    assert {w.dtype for w in got.values()} == {torch.bfloat16}
    product = got["q_b_proj.weight"].float() @ got["q_a_proj.weight"].float()
    assert (product - weights[0].float()).norm() < 0.01 * weights[0].float().norm()


def test_state_dict_fits_the_layer() -> None:
    layer = MultiheadLatentAttention(
        HIDDEN, HEADS, GROUPS, 16, NOPE, E, D, RotaryEmbedding(E, 8), q_lora_rank=20
    ).double()
    layer.load_state_dict(convert(projections(), q_rank=20, kv_rank=16))


def test_rank_for_energy_counts_singular_values() -> None:
    weight = torch.diag(torch.tensor([4.0, 2.0, 1.0, 1.0]))  # squares: 16 + 4 + 1 + 1
    assert [rank_for_energy(weight, e, multiple=1) for e in (0.5, 0.9, 0.92, 0.96, 1.0)] == [
        1,
        2,
        3,
        4,
        4,
    ]
    assert rank_for_energy(torch.randn(64, 64), 0.3) % 16 == 0
    with pytest.raises(ValueError, match="energy must be in"):
        rank_for_energy(weight, 0.0)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"q_rank": 97}, r"q_lora_rank must be in \[1, 96\]"),
        ({"kv_rank": 0}, r"kv_lora_rank must be in \[1, 96\]"),
        ({"qk_nope_head_dim": 13}, "at most head_dim = 24"),
        ({"qk_rope_head_dim": 10, "rope_aware": True}, "divides head_dim = 24"),
        ({"num_kv_heads": 4}, "k and v must be"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_refused(options: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        convert(projections(), **options)
