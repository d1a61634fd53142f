"""The demo's report: the summary table and the figure, both made from report.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

UNIFORM_BITS = 8.0  # what a byte costs without any model
INK, MUTED, GRID = "#1d2733", "#6b7785", "#e3e7ec"
TEACHER, HYBRID, ILD, FAINT = "#6b7785", "#0f766e", "#b45309", "#c9d3dd"
# What the figure and the table call each score of the report, in the order they came about.
SCORES = {
    "hybrid_init_bpb": "hybrid, converted",
    "hybrid_ild_bpb": "hybrid, after ILD",
    "hybrid_kd_bpb": "hybrid, after KD",
    "teacher_bpb": "teacher",
}


def kept_percent(teacher_bpb: float, hybrid_bpb: float) -> float:
    """Return the share of the teacher's compression that the hybrid has, in per cent.

    Equation::

        100 * (8 - hybrid) / (8 - teacher)

    8 bits per byte is no model at all; 100 % is the teacher.
    """
    return 100 * (UNIFORM_BITS - hybrid_bpb) / (UNIFORM_BITS - teacher_bpb)


def summary_table(report: Mapping[str, Any]) -> str:
    """Return the report as a few aligned lines of text."""
    lines = ["", f"  {'held-out text':<22}{'bits/byte':>10}{'of the teacher':>17}"]
    for key, name in SCORES.items():
        kept = kept_percent(report["teacher_bpb"], report[key])
        lines.append(f"  {name:<22}{report[key]:>10.3f}{kept:>15.1f} %")
    lines += [
        "",
        f"  KV cache    {report['kv_bytes_per_token']:,} bytes per token, "
        f"{report['kv_percent']:.2f} % of the teacher's {report['teacher_kv_bytes_per_token']:,}",
        f"  state       {report['state_bytes_per_sequence']:,} bytes per sequence, at any length",
        f"  parameters  {report['parameters']['hybrid']:,} (teacher "
        f"{report['parameters']['teacher']:,}), layers {' '.join(report['layout'])}",
        f"  time        {report['seconds']:.0f} s: "
        + ", ".join(f"{name} {seconds:.0f}" for name, seconds in report["stage_seconds"].items()),
        "",
    ]
    return "\n".join(lines)


def plot_report(report: Mapping[str, Any], path: Path) -> None:
    """Draw the report: scores, learning curves, and cache against context length.

    Args:
        report: What the demo found (see ``report.json``).
        path: The PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style: Any = {
        "font.size": 10,
        "text.color": INK,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlesize": 11,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "legend.frameon": False,
    }
    with plt.rc_context(style):
        figure, (scores, curves, cache) = plt.subplots(
            1, 3, figsize=(14, 5), width_ratios=(1.15, 1, 1), layout="constrained"
        )
        kept = kept_percent(report["teacher_bpb"], report["hybrid_kd_bpb"])
        figure.suptitle(
            f"A hybrid with {report['kv_percent']:.1f} % of the KV cache keeps {kept:.1f} % of "
            "what its teacher learnt",
            x=0.01,
            ha="left",
            fontsize=15,
            fontweight="bold",
        )
        figure.supxlabel(
            f"{report['parameters']['teacher'] / 1e6:.1f} M-parameter Llama trained on the Python "
            f"standard library's source; layers {' '.join(report['layout'])}; "
            f"{report['seconds']:.0f} s in all on {report['device']}",
            x=0.01,
            ha="left",
            fontsize=9,
            color=MUTED,
        )
        _draw_scores(scores, report)
        _draw_curves(curves, report)
        _draw_cache(cache, report)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _draw_scores(axes: Any, report: Mapping[str, Any]) -> None:
    values = [report[key] for key in SCORES]
    colours = [FAINT, ILD, HYBRID, TEACHER]
    bars = axes.barh(list(SCORES.values()), values, color=colours, height=0.62)
    axes.bar_label(bars, labels=[f"{value:.3f}" for value in values], padding=5, fontweight="bold")
    axes.axvline(report["teacher_bpb"], color=TEACHER, linewidth=1, linestyle=(0, (4, 3)))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max(values))
    axes.set_title("Held-out text, bits per byte (lower is better)")
    axes.tick_params(axis="y", length=0, labelcolor=INK)


def _draw_curves(axes: Any, report: Mapping[str, Any]) -> None:
    """Draw each stage's loss as a share of where it began: the stages have different units."""
    axes.set_title("Distillation loss, share of its start")
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    names = {"ild": ("ILD, layer by layer", ILD), "kd": ("KD, end to end", HYBRID)}
    begin, top = 0, 100.0
    for stage, (name, colour) in names.items():
        losses = _smooth(report["losses"][stage])
        shares = [100 * loss / losses[0] for loss in losses]
        steps = range(begin + 1, begin + 1 + len(losses))
        axes.plot(steps, shares, color=colour, linewidth=2.2)
        axes.fill_between(steps, shares, color=colour, alpha=0.07)
        axes.text(
            begin + len(losses) / 2,
            0.95,
            name,
            color=colour,
            ha="center",
            fontweight="bold",
            transform=axes.get_xaxis_transform(),
        )
        begin, top = begin + len(losses), max(top, *shares)
    axes.set_ylim(0, 1.12 * top)
    axes.set_xlim(0, begin)
    axes.set_xlabel("optimiser steps")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:.0f} %")


def _draw_cache(axes: Any, report: Mapping[str, Any]) -> None:
    contexts = [2**k for k in range(6, 18)]
    state, mib = report["state_bytes_per_sequence"], 2**20
    teacher = [report["teacher_kv_bytes_per_token"] * n / mib for n in contexts]
    hybrid = [(state + report["kv_bytes_per_token"] * n) / mib for n in contexts]
    axes.plot(contexts, teacher, color=TEACHER, linewidth=2.2)
    axes.plot(contexts, hybrid, color=HYBRID, linewidth=2.2)
    axes.fill_between(contexts, hybrid, teacher, color=HYBRID, alpha=0.07)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlim(contexts[0], contexts[-1])
    axes.set_xticks(contexts[::2], [f"{n}" if n < 1024 else f"{n // 1024}K" for n in contexts[::2]])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_title("Memory of one sequence, MiB")
    axes.set_xlabel("context, tokens")
    place = {"textcoords": "offset points", "fontweight": "bold"}
    middle = len(contexts) // 2
    axes.annotate(
        "teacher: KV cache",
        (contexts[middle], teacher[middle]),
        xytext=(-8, 10),
        ha="right",
        color=TEACHER,
        **place,
    )
    axes.annotate(
        "hybrid: latents + states",
        (contexts[-1], hybrid[middle // 2]),
        xytext=(-6, -16),
        ha="right",
        color=HYBRID,
        **place,
    )
    axes.annotate(
        f"{teacher[-1] / hybrid[-1]:.0f}x less at {contexts[-1] // 1024}K",
        (contexts[-3], (teacher[-3] * hybrid[-3]) ** 0.5),
        xytext=(0, 0),
        ha="center",
        va="center",
        color=HYBRID,
        **place,
    )


def _smooth(losses: list[float]) -> list[float]:
    """Average each loss with the ones around it: 2 % of the curve to either side."""
    reach = len(losses) // 50
    windows = [losses[max(0, i - reach) : i + reach + 1] for i in range(len(losses))]
    return [sum(window) / len(window) for window in windows]
