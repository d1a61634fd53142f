import json

import pytest
import torch

from zebra import __version__
from zebra.cli import COMMANDS, main, parse_layout


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A tiny Llama folder with a byte-level tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from zebra.data import byte_tokenizer

    folder = tmp_path_factory.mktemp("models") / "teacher"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=272,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def hybrid(teacher):
    out = teacher.parent / "hybrid"
    arguments = ["convert", str(teacher), str(out), "--layout=mla,mamba2", "--kv-lora-rank=16"]
    assert main(arguments) == 0
    return out


@pytest.fixture(scope="module")
def text(teacher):
    path = teacher.parent / "text.txt"
    path.write_text("to be or not to be, caf\u00e9. " * 40)
    return path


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)


def test_version_is_the_package_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"zebra {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_its_flags(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "--debug" in capsys.readouterr().out


def test_distill_has_a_flag_for_every_field(capsys):
    from zebra.distill import DistillConfig

    with pytest.raises(SystemExit):
        main(["distill", "--help"])
    shown = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')} " in shown for name in DistillConfig.fields())


def test_convert_writes_a_folder_that_loads_and_says_what_it_cost(hybrid, teacher, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(hybrid)
    assert model.config.layer_types == ["mla", "mamba2"]
    assert AutoTokenizer.from_pretrained(hybrid).encode("a") == [256, 97]
    capsys.readouterr()
    assert main(["info", str(hybrid), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["layout"] == "mla mamba2"
    assert facts["kv_cache"]["bytes_per_token"] == 2 * (16 + 8)
    assert facts["kv_cache"]["parameters"] == model.num_parameters()
    assert main(["info", str(teacher), "--json"]) == 0
    cache = json.loads(capsys.readouterr().out)["kv_cache"]
    assert cache["bytes_per_token"] == 2 * 2 * 2 * 16
    assert cache["parameters"] == AutoModelForCausalLM.from_pretrained(teacher).num_parameters()


def test_info_without_a_model_names_the_build_and_every_operator(capsys):
    import zebra

    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert torch.__version__ in shown
    assert all(name in shown for name in zebra.ops.support_matrix())


def test_info_says_when_portable_kernels_are_forced(monkeypatch, capsys):
    monkeypatch.delenv("ZEBRA_PORTABLE", raising=False)
    assert main(["info"]) == 0 and "ZEBRA_PORTABLE" not in capsys.readouterr().out
    monkeypatch.setenv("ZEBRA_PORTABLE", "1")
    assert main(["info"]) == 0 and "ZEBRA_PORTABLE" in capsys.readouterr().out


def test_distill_runs_a_recipe_of_both_stages(hybrid, teacher, text, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"teacher: {teacher}\nstudent: {hybrid}\nout: {tmp_path / 'run'}\ndata: {text}\n"
        "steps: 3\nbatch: 2\nlength: 16\n"
        "stages:\n- {stage: ild, learning_rate: 1e-3}\n- {stage: kd}\n"
    )
    assert main(["distill", "--config", str(recipe), "--steps", "2"]) == 0
    shown = capsys.readouterr().out
    assert "ild: loss" in shown and "kd: loss" in shown and "2 steps" in shown
    assert (tmp_path / "run" / "2-kd" / "model.safetensors").is_file()


def test_distill_takes_flags_alone(hybrid, teacher, text, tmp_path):
    flags = ["--teacher", str(teacher), "--student", str(hybrid), "--data", str(text)]
    flags += ["--stage=ild", "--ild-form=mse", "--steps=2", "--batch=1", "--length=16"]
    flags += ["--gradient-checkpointing", f"--out={tmp_path}"]
    assert main(["distill", *flags]) == 0
    identity = json.loads((tmp_path / "done.json").read_text())["identity"]
    assert identity["gradient_checkpointing"] is True and identity["ild_form"] == "mse"


@pytest.mark.parametrize("model", ["teacher", "hybrid"])
def test_eval_counts_bytes_and_tokens(model, text, tmp_path, request, capsys):
    folder = request.getfixturevalue(model)
    out = tmp_path / "score.json"
    assert main(["eval", str(folder), "--data", str(text), "--context=32", f"--out={out}"]) == 0
    score = json.loads(out.read_text())
    assert score["bytes"] == score["tokens"] == len(text.read_bytes())
    assert 4 < score["bits_per_byte"] < 12
    assert "bits per byte" in capsys.readouterr().out


@pytest.mark.parametrize("model", ["teacher", "hybrid"])
def test_generate_prints_and_saves_the_continuation(model, tmp_path, request, capsys):
    folder, out = request.getfixturevalue(model), tmp_path / "text.txt"
    flags = ["--prompt", "to be", "--max-new-tokens=5", "--temperature=1", f"--out={out}"]
    assert main(["generate", str(folder), *flags]) == 0
    saved = out.read_text()
    assert saved.startswith("to be")
    assert capsys.readouterr().out.startswith("to be")
    assert main(["generate", str(folder), *flags]) == 0
    assert out.read_text() == saved  # the same seed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "/nowhere/x", "--data", "x"], "must be a model folder or hub name"),
        (["eval", "TEACHER", "--data", "nowhere.txt"], "got nowhere.txt"),
        (["info", "/nowhere/x"], "'/nowhere/x' must be a model folder"),
        (["convert", "TEACHER", "OUT", "--layout=9b"], "must be one of ('1b-4mla-12m2'"),
        (["convert", "TEACHER", "OUT", "--layout=mla"], "layer_types"),
        (["convert", "TEACHER", "TEACHER", "--layout=mla,mla"], "must be a new or empty folder"),
        (["convert", "TEACHER", "OUT", "--layout=mla=x"], "shares like mla=0.25"),
        (["distill", "--teacher", "TEACHER"], "out must be given"),
        (["distill", "--config", "nowhere.yaml"], "nowhere.yaml must be a YAML file"),
        (["generate", "TEACHER", "--prompt", "a", "--temperature=-1"], "temperature"),
    ],
)
def test_a_mistake_is_told_in_one_line_with_exit_code_2(
    arguments, message, teacher, tmp_path, capsys
):
    names = {"TEACHER": str(teacher), "OUT": str(tmp_path / "out")}
    capsys.readouterr()
    assert main([names.get(argument, argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert error.startswith(f"zebra {arguments[0]}: ") and error.count("\n") == 1


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(ValueError, match="model folder"):
        main(["eval", str(tmp_path), "--data", "x", "--debug"])


def test_a_failed_conversion_leaves_nothing_behind(teacher, tmp_path):
    assert main(["convert", str(teacher), str(tmp_path / "out"), "--layout=9b"]) == 2
    assert list(tmp_path.iterdir()) == []


def test_layouts_are_presets_types_or_shares():
    assert parse_layout("8b-8mla-24m2") == "8b-8mla-24m2"
    assert parse_layout("mla, mamba2") == ["mla", "mamba2"]
    assert parse_layout("mla") == ["mla"]
    assert parse_layout("mla=0.25,mamba2=0.75") == {"mla": 0.25, "mamba2": 0.75}
