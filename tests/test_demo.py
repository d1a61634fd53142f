import json

import pytest

from zebra import demo as module
from zebra.cli import main
from zebra.demo import QUICK, demo

WANTED = (
    "teacher_bpb",
    "hybrid_init_bpb",
    "hybrid_ild_bpb",
    "hybrid_kd_bpb",
    "kv_percent",
    "kv_bytes_per_token",
    "seconds",
    "teacher_kept_percent",
    "losses",
    "config",
    "versions",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A quick demo that was stopped in its third command and run again."""
    out, commands = tmp_path_factory.mktemp("demo"), []

    def stop_in_kd(arguments):
        commands.append(arguments[0])
        return 2 if len(commands) == 3 else main(arguments)

    with pytest.raises(RuntimeError, match="command above failed: distill"):
        demo(out, "cpu", True, stop_in_kd)
    assert not (out / "report.json").exists()

    def count(arguments):
        commands.append(arguments[0])
        return main(arguments)

    return out, demo(out, "cpu", True, count), commands


def test_demo_reports_what_was_kept(finished):
    out, report, _ = finished
    assert json.loads((out / "report.json").read_text()) == report
    assert set(WANTED) <= set(report)
    assert report["hybrid_kd_bpb"] < report["hybrid_init_bpb"] - 0.2
    assert report["teacher_bpb"] < 6
    assert report["kv_percent"] == pytest.approx(12.5)
    assert report["kv_bytes_per_token"] == 2 * (16 + 16)
    assert {k: len(v) for k, v in report["losses"].items()} == report["steps"]
    assert report["text"]["hybrid_kd"].startswith(QUICK.prompt)
    assert (out / "report.png").read_bytes()[:4] == b"\x89PNG"


def test_demo_continues_where_it_stopped(finished):
    _, _, commands = finished
    assert commands[:4] == ["convert", "distill", "distill", "distill"]
    assert commands.count("convert") == 1 and commands.count("eval") == 4


def test_a_finished_demo_trains_nothing_and_reports_the_same(finished, monkeypatch):
    out, report, _ = finished
    monkeypatch.setattr(module, "open_stream", None)

    def refuse(arguments):
        raise AssertionError(arguments)

    assert demo(out, "cpu", True, refuse) == report


def test_demo_refuses_a_folder_of_other_sizes(finished):
    with pytest.raises(ValueError, match="demo of other sizes"):
        demo(finished[0], "cpu", False, main)
