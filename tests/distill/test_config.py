import dataclasses

import pytest

from zebra.distill import DistillConfig
from zebra.distill.config import read_recipe

REQUIRED = {"teacher": "t", "student": "s", "out": "o"}


def test_every_field_says_what_it_is_and_why():
    for name, field in DistillConfig.fields().items():
        assert len(field.metadata["help"]) > 20, name


def test_config_cannot_change_after_it_is_made():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DistillConfig.from_mapping(REQUIRED).steps = 3


def test_strings_become_the_type_of_their_field():
    config = DistillConfig.from_mapping(
        {**REQUIRED, "learning_rate": "2e-4", "steps": "12", "data": "a.txt"}
    )
    assert (config.learning_rate, config.steps, config.data) == (2e-4, 12, ("a.txt",))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": 1}, "got \\['lr'\\]"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": 1.5}, "steps must be int, got 1.5"),
        ({"steps": "many"}, "steps must be int, got 'many'"),
        ({"stage": "sft"}, "stage must be one of"),
        ({"precision": "fp8"}, "precision must be one of"),
        ({"warmup": 2}, "warmup must be between 0 and 1, got 2"),
        ({"gradient_checkpointing": "yes"}, "gradient_checkpointing must be bool"),
        ({"teacher": ""}, "teacher must be given"),
        ({"data": []}, "data must be at least one source"),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        DistillConfig.from_mapping({**REQUIRED, **values})


RECIPE = """
teacher: t
student: s
out: runs/x
learning_rate: 1e-3
stages:
  - {stage: ild, steps: 3}
  - {stage: kd, learning_rate: 5e-4}
"""


def test_recipe_stages_follow_each_other_and_share_the_keys_above(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    first, second = read_recipe(path)
    assert (first.stage, first.steps, first.learning_rate) == ("ild", 3, 1e-3)
    assert (first.student, first.out) == ("s", "runs/x/1-ild")
    assert (second.stage, second.learning_rate) == ("kd", 5e-4)
    assert (second.student, second.out) == ("runs/x/1-ild", "runs/x/2-kd")


def test_flags_hold_over_a_recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    first, second = read_recipe(path, {"steps": "7", "out": "y"})
    assert (first.steps, second.steps, first.out, second.student) == (7, 7, "y/1-ild", "y/1-ild")


@pytest.mark.parametrize("text", ["- a", "a: [", "stages: 3", "stages: []", "stages: [1]"])
def test_a_file_that_is_no_recipe_is_refused(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="read_recipe"):
        read_recipe(path)
