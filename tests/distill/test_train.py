import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from zebra.distill import DistillConfig, checkpoint
from zebra.distill.stages import distill, kd_objective, load_model
from zebra.distill.train import learning_rate, read_metrics

SAME = ("step", "loss", "lr", "grad_norm", "tokens")


def make(pair, out, **values):
    defaults = dict(
        teacher=str(pair / "teacher"),
        student=str(pair / "student"),
        out=str(out),
        data=(str(pair / "text.txt"),),
        steps=12,
        batch=2,
        accumulation=2,
        length=16,
        learning_rate=3e-3,
        save_every=5,
    )
    return DistillConfig(**{**defaults, **values})


def curve(out):
    return [tuple(line[key] for key in SAME) for line in read_metrics(out)]


@pytest.fixture(scope="module")
def whole_run(pair, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    summary = distill(make(pair, out))
    return out, summary


def test_every_step_is_logged_once_and_the_model_can_be_loaded(whole_run):
    out, summary = whole_run
    assert [line[0] for line in curve(out)] == list(range(1, 13))
    assert summary["steps"] == 12 and summary["tokens"] == 12 * 4 * 16
    load_model(str(out), "cpu")


# The process dies by SIGKILL inside the checkpoint of step 10: at the n-th call of a function that
# the write goes through.
KILLED = """
import json, os, signal, sys
from zebra.distill import DistillConfig, checkpoint
from zebra.distill.stages import distill

module, name, at_call = {"fsync": (os, "fsync", 15), "rename": (os, "rename", 2)}[sys.argv[2]]
original, calls = getattr(module, name), []

def die(*args, **kwargs):
    calls.append(1)
    if len(calls) == at_call:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)

setattr(module, name, die)
distill(DistillConfig.from_mapping(json.loads(sys.argv[1])))
"""


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_run_killed_inside_a_checkpoint_resumes_to_the_same_numbers(
    pair, whole_run, tmp_path, call
):
    config = make(pair, tmp_path / "run")
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(config).items()}
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.run(
        [sys.executable, "-c", KILLED, json.dumps(values), call],
        env=environment,
        capture_output=True,
        check=False,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    folders = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert folders == [".writing-10", "step-00000005"]
    assert not (tmp_path / "run" / "done.json").exists()
    with (tmp_path / "run" / "metrics.jsonl").open("a") as log:
        log.write('{"step": 11, "loss": 9.0}\n{"step": 12, "lo')  # unsaved and torn lines

    distill(config)

    assert curve(tmp_path / "run") == curve(whole_run[0])
    resumed, whole = (
        (folder / "model.safetensors").read_bytes() for folder in (tmp_path / "run", whole_run[0])
    )
    assert resumed == whole
    folders = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert folders == ["step-00000010", "step-00000012"]


def test_a_finished_run_is_not_run_again(pair, whole_run, monkeypatch):
    out, summary = whole_run
    monkeypatch.setattr("zebra.distill.stages.load_model", None)
    assert distill(make(pair, out)) == summary


def test_a_run_cannot_go_on_with_another_config(pair, whole_run):
    with pytest.raises(ValueError, match=r"learning_rate=0.003 \(got 0.001\)"):
        distill(make(pair, whole_run[0], learning_rate=1e-3))


def test_a_run_cannot_go_on_with_other_data(pair, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a" * 4000)
    out = tmp_path / "run"
    distill(make(pair, out, data=(str(text),), steps=1))
    (out / "done.json").unlink()
    text.write_text("b" * 4000)
    with pytest.raises(ValueError, match="corpus="):
        distill(make(pair, out, data=(str(text),), steps=1))


def test_accumulation_gives_the_step_of_the_whole_batch(pair, whole_run, tmp_path):
    distill(make(pair, tmp_path, batch=4, accumulation=1))
    losses = np.array([line[1] for line in curve(tmp_path)])
    np.testing.assert_allclose(losses, [line[1] for line in curve(whole_run[0])], rtol=1e-4)


@pytest.mark.parametrize("stage", ["ild", "kd"])
@pytest.mark.parametrize("student", ["student", "hybrid"])
def test_gradient_checkpointing_changes_no_number(pair, tmp_path, stage, student):
    for flag in (False, True):
        values = {"student": str(pair / student), "gradient_checkpointing": flag}
        distill(make(pair, tmp_path / str(flag), stage=stage, steps=4, **values))
    assert curve(tmp_path / "True") == curve(tmp_path / "False")


@pytest.mark.parametrize("form", ["mse", "l2", "enhanced"])
def test_ild_lowers_its_loss_and_leaves_the_embedding_alone(pair, tmp_path, form):
    config = make(pair, tmp_path, stage="ild", steps=60, ild_form=form, learning_rate=1e-2)
    distill(config)
    losses = [line[1] for line in curve(tmp_path)]
    assert np.mean(losses[-5:]) < 0.65 * np.mean(losses[:2])
    before, after = (load_model(str(p), "cpu").state_dict() for p in (pair / "student", tmp_path))
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {name for name in after if ".layers." in name}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_hybrid_learns_its_teacher_layer_by_layer_then_end_to_end(pair, tmp_path, precision):
    student = pair / "hybrid"
    for stage, bound in (("ild", 0.75), ("kd", 0.9)):
        values = {"precision": precision, "save_every": 60, "learning_rate": 1e-2}
        distill(make(pair, tmp_path / stage, stage=stage, student=str(student), steps=60, **values))
        losses = [line[1] for line in curve(tmp_path / stage)]
        assert np.mean(losses[-5:]) < bound * np.mean(losses[:2]), stage
        student = tmp_path / stage


def test_a_student_equal_to_its_teacher_has_no_loss(pair, tmp_path):
    for stage in ("ild", "kd"):
        config = make(pair, tmp_path / stage, stage=stage, student=str(pair / "teacher"), steps=1)
        assert distill(config)["loss"] < 1e-5


def test_a_loss_that_is_not_finite_stops_the_run(pair, tmp_path):
    model = load_model(str(pair / "student"), "cpu")
    model.get_input_embeddings().weight.data[ord("q")] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    for file in (pair / "student").glob("tokenizer*"):
        (tmp_path / "broken" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(FloatingPointError, match="step 1 must have a finite loss"):
        distill(make(pair, tmp_path / "run", student=str(tmp_path / "broken"), length=64))


def test_rate_rises_linearly_then_falls_as_a_cosine(pair, tmp_path):
    config = make(pair, tmp_path, steps=100, warmup=0.1, final_rate=0.1, learning_rate=1.0)
    rates = [learning_rate(step, config) for step in range(100)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    assert rates[10] == 1.0 and np.all(np.diff(rates[10:]) < 0)
    np.testing.assert_allclose(rates[55], 0.55)
    np.testing.assert_allclose(learning_rate(100, config), 0.1)


def test_old_checkpoints_go_and_half_written_ones_are_not_found(tmp_path):
    for name in ("step-00000003", "step-00000012", ".writing-20", ".deleting-step-00000030"):
        (tmp_path / name).mkdir()
    assert checkpoint.latest_checkpoint(tmp_path).name == "step-00000012"
    assert checkpoint.latest_checkpoint(tmp_path / "missing") is None


def test_stream_position_of_a_resumed_run_is_where_it_stopped(pair, whole_run):
    newest = checkpoint.latest_checkpoint(whole_run[0] / "checkpoints")
    state = torch.load(newest / checkpoint.STATE_FILE, weights_only=True)
    assert (state["step"], state["position"]) == (12, 12 * 4)


def test_a_head_that_is_more_than_its_weight_is_refused(pair, tmp_path):
    teacher, student = (load_model(str(pair / name), "cpu") for name in ("teacher", "student"))
    kd_objective(student, teacher, make(pair, tmp_path))
    student.get_output_embeddings().register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="the student's output embeddings must be a plain nn"):
        kd_objective(student, teacher, make(pair, tmp_path))
