import pytest
import torch
from torch import nn

from zebra.distill.stages import load_model
from zebra.distill.taps import LayerTaps, mixer_of


@pytest.fixture(scope="module")
def models(pair):
    return load_model(str(pair / "teacher"), "cpu"), load_model(str(pair / "student"), "cpu")


TOKENS = torch.arange(20).view(2, 10)


@torch.no_grad()
def test_taps_see_the_hidden_states_that_the_model_reports(models):
    teacher, _ = models
    with LayerTaps(teacher) as seen:
        hidden = teacher.base_model(TOKENS, output_hidden_states=True).hidden_states
    for index, layer in enumerate(seen.inputs):
        assert torch.equal(layer, hidden[index])
        assert torch.equal(seen.outputs[index], hidden[index + 1])  # the last is after the norm


@torch.no_grad()
def test_mixer_output_is_what_attention_adds_to_the_residual(models):
    teacher, _ = models
    layer = teacher.base_model.layers[0]
    with LayerTaps(teacher) as seen:
        teacher.base_model(TOKENS)
    after = seen.inputs[0] + seen.mixers[0]
    expected = after + layer.mlp(layer.post_attention_layernorm(after))
    torch.testing.assert_close(seen.outputs[0], expected)


def test_fed_layers_learn_on_their_own(models):
    teacher, student = models
    with LayerTaps(teacher) as seen, LayerTaps(student) as made:
        with torch.no_grad():
            teacher.base_model(TOKENS)
        made.feed = list(seen.inputs)
        student.base_model(TOKENS)
        made.outputs[1].square().sum().backward()
    moved = {
        index
        for index, layer in enumerate(student.base_model.layers)
        if any(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())
    }
    student.zero_grad()
    assert moved == {1}
    assert student.get_input_embeddings().weight.grad is None


@torch.no_grad()
def test_closed_taps_leave_the_model_as_it_was(models):
    student = models[1]
    before = student(TOKENS).logits
    with LayerTaps(student) as made:
        made.feed = [torch.zeros(2, 10, 32)] * 3
        assert not torch.equal(student(TOKENS).logits, before)
    assert torch.equal(student(TOKENS).logits, before)


def test_a_layer_without_a_known_mixer_is_refused():
    with pytest.raises(ValueError, match=r"must have one of .*got Sequential"):
        mixer_of(nn.Sequential(nn.Linear(1, 1)))
