import pytest
import torch

from zebra.distill import ild_loss, kl_loss, next_token_loss

D, V = 8, 11


def layers(seed, count=3):
    torch.manual_seed(seed)
    return [torch.randn(2, 5, D, dtype=torch.float64) for _ in range(count)]


def test_mse_form_is_the_mean_square_summed_over_layers():
    s, t = layers(0), layers(1)
    expected = sum(((a - b) ** 2).sum() / (2 * 5 * D) for a, b in zip(s, t, strict=True))
    torch.testing.assert_close(ild_loss(s, t, "mse"), expected)


def test_l2_form_is_the_mean_token_distance_summed_over_layers():
    s, t = layers(0), layers(1)
    expected = sum(
        torch.stack([(a[i, j] - b[i, j]).norm() for i in range(2) for j in range(5)]).mean()
        for a, b in zip(s, t, strict=True)
    )
    torch.testing.assert_close(ild_loss(s, t, "l2"), expected)


def test_enhanced_form_adds_the_mixer_distance():
    s, t, sm, tm = layers(0), layers(1), layers(2), layers(3)
    expected = ild_loss(s, t, "l2") + ild_loss(sm, tm, "l2")
    torch.testing.assert_close(ild_loss(s, t, "enhanced", sm, tm), expected)


@pytest.mark.parametrize("form", ["mse", "l2", "enhanced"])
def test_gradient_reaches_the_student_only_and_is_zero_where_they_agree(form):
    s = [t.requires_grad_() for t in layers(0)]
    t = [x.requires_grad_() for x in layers(1)]
    t[1] = s[1].detach().clone().requires_grad_()
    ild_loss(s, t, form, s, t).backward()
    assert all(x.grad is None for x in t)
    assert s[1].grad.abs().max() == 0 and s[0].grad.abs().max() > 0


def test_loss_of_half_precision_layers_is_computed_in_fp32():
    s, t = ([x.bfloat16() for x in layers(seed)] for seed in (0, 1))
    assert ild_loss(s, t, "mse").dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((layers(0), layers(1), "cosine"), "form must be one of"),
        ((layers(0), layers(1, 2), "l2"), r"as many layers as the teacher \(2"),
        (([], [], "l2"), "at least 1"),
        ((layers(0), layers(1), "enhanced"), "needs both models' mixer outputs"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ild_loss(*arguments)


def heads(seed, dim):
    torch.manual_seed(seed)
    return torch.randn(2, 5, dim), torch.randn(V, dim)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_kl_is_the_mean_divergence_from_the_teacher(temperature):
    (hs, ws), (ht, wt) = heads(0, D), heads(1, 2 * D)
    p = torch.distributions.Categorical(logits=ht.double() @ wt.double().T / temperature)
    q = torch.distributions.Categorical(logits=hs.double() @ ws.double().T / temperature)
    expected = torch.distributions.kl_divergence(p, q).mean() * temperature**2
    actual = kl_loss(hs, ws, ht, wt, temperature)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)


def test_kl_of_a_model_with_itself_is_zero():
    h, w = heads(0, D)
    assert kl_loss(h, w, h, w).abs() < 1e-6


def test_kl_refuses_different_vocabularies():
    (hs, ws), (ht, wt) = heads(0, D), heads(1, D)
    with pytest.raises(ValueError, match="share one vocabulary, got 10 and 11"):
        kl_loss(hs, ws[:-1], ht, wt)


def test_next_token_loss_scores_each_following_token():
    h, w = heads(0, D)
    tokens = torch.randint(V, (2, 5))
    log_p = torch.log_softmax(h @ w.T, -1)
    expected = -torch.stack(
        [log_p[b, t, tokens[b, t + 1]] for b in range(2) for t in range(4)]
    ).mean()
    torch.testing.assert_close(next_token_loss(h, w, tokens), expected)
