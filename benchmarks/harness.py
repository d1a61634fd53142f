"""Timing with a floor, peers and a correctness gate: one JSON object a line, and a table of them.

A benchmark is a list of :class:`Case`.  :func:`main` runs it: every implementation is first
compared with the fp64 truth (a wrong one gets no time), then all are timed interleaved on the same
inputs.

On a GPU one call is captured in a CUDA graph and replayed between CUDA events with the L2 flushed
before each replay: by writing 256 MB, which leaves it full of lines that must go back to memory
before others can come, or, with ``--l2 read``, by reading them, as the weights of a decoding step
do.  The time of an empty graph, measured in the same run, is part of every figure and reported as
``event_floor_us``.  On the CPU wall-clock time is taken, inputs warm.  Ceilings (bandwidth, matrix
rate) are measured in the same run, and every line states its floor: the larger of bytes / bandwidth
and flops / rate, counted for the operator's true inputs and outputs.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import zebra
from zebra.testing import relative_error

Inputs = dict[str, Any]
Outputs = Sequence[Tensor]


@dataclass(frozen=True)
class Case:
    """One shape of one operator and everything that may run it."""

    op: str
    shape: dict[str, Any]  # printed and stored as it is
    dtype: torch.dtype
    bytes: int  # true inputs + outputs, once each
    flops: int  # 0: bound by memory
    make: Callable[[str], Inputs]  # device -> inputs
    impls: dict[str, Callable[[Inputs], Outputs]]  # "zebra" first; peers by "name version"
    truth: Callable[[Inputs], Outputs]  # fp64 or the most exact form that fits
    max_error: float  # gate: relative error of every output
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Ceilings:
    """What this device gives, measured in this run."""

    bandwidth: float  # bytes/s, read + write
    rate: dict[torch.dtype, float]  # flop/s of a large matrix product
    event_floor_us: float  # an empty CUDA graph between two events; 0 on the CPU

    def floor_us(self, case: Case) -> tuple[float, str]:
        """The least time of a case and the roof that gives it."""
        memory = case.bytes / self.bandwidth * 1e6
        rate = self.rate.get(case.dtype, self.rate[torch.float32])
        compute = case.flops / rate * 1e6
        return (memory, "memory") if memory >= compute else (compute, "compute")


def _sync(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class Timer:
    """Times calls on one device; on a GPU by graph replay with a cold L2."""

    def __init__(self, device: str, l2: str = "written") -> None:
        self.device = device
        self.l2 = l2
        self._flushed = torch.zeros(64 << 20, device="cuda") if self.gpu else None

    @property
    def gpu(self) -> bool:
        return self.device == "cuda"

    def prepare(self, call: Callable[[], Any]) -> Callable[[], float]:
        """Warm a call up and return a function that runs it once and gives its time in us."""
        for _ in range(3):
            call()
        _sync(self.device)
        if not self.gpu:

            def wall() -> float:
                start = time.perf_counter()
                call()
                return (time.perf_counter() - start) * 1e6

            return wall
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            keep = call()

        def replay() -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush()
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) * 1e3

        replay.keep = keep  # type: ignore[attr-defined]  # the graph's outputs stay alive
        return replay

    def _flush(self) -> None:
        """Leave nothing of a call's data in L2."""
        assert self._flushed is not None
        if self.l2 == "written":
            self._flushed.zero_()
        else:
            self._flushed.sum()

    def ceilings(self) -> Ceilings:
        """Measure bandwidth (an in-place addition), matrix rates and the event floor."""
        size = (1 << 30) if self.gpu else (64 << 20)
        big = torch.zeros(size, dtype=torch.float32, device=self.device)
        add = self.prepare(lambda big=big: big.add_(1.0))
        bandwidth = 2 * big.numel() * 4 / (min(add() for _ in range(7)) * 1e-6)
        del big
        rate = {}
        n = 8192 if self.gpu else 1024
        for dtype in (torch.float32, torch.bfloat16):
            a, b = (torch.randn(n, n, dtype=dtype, device=self.device) for _ in range(2))
            product = self.prepare(lambda a=a, b=b: a @ b)
            rate[dtype] = 2 * n**3 / (min(product() for _ in range(5)) * 1e-6)
        rate[torch.float16] = rate[torch.bfloat16]
        floor = 0.0
        if self.gpu:
            tiny = torch.zeros(1, device="cuda")
            empty = self.prepare(lambda: tiny.zero_())
            floor = statistics.median(empty() for _ in range(30))
        return Ceilings(bandwidth, rate, floor)


def peer(module: str, package: str | None = None) -> str | None:
    """Name an installed peer "package version", or None: peers are imported, never required."""
    if importlib.util.find_spec(module) is None:
        return None
    package = package or module
    return f"{package} {importlib.metadata.version(package)}"


def bare_package(module: str) -> None:
    """Let submodules of ``module`` be imported without its ``__init__``.

    mamba-ssm's imports every model and a compiled extension; its Triton kernels need neither.
    """
    spec = importlib.util.find_spec(module)
    if module in sys.modules or spec is None or spec.submodule_search_locations is None:
        return
    package = types.ModuleType(module)
    package.__path__ = list(spec.submodule_search_locations)
    package.__spec__ = spec  # find_spec() asks it
    sys.modules[module] = package


def environment(device: str) -> dict[str, Any]:
    """Where and with what a line was measured."""
    info: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "zebra": zebra.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
    if device == "cuda":
        query = "driver_version,clocks.max.sm"
        smi = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            check=False,
        )
        fields = smi.stdout.strip().split(", ") if smi.returncode == 0 else ["unknown", "0"]
        info |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
        info |= {"driver": fields[0], "sm_clock_max_mhz": int(fields[1])}
    else:
        model = [
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        info["device"] = model[0] if model else platform.processor()
    return info


def _commit() -> str:
    root = Path(__file__).parent
    git = ["git", "-C", str(root)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    if head.returncode != 0:
        return "unknown"
    dirty = subprocess.run(
        [*git, "status", "--porcelain", "--", "../csrc", "../zebra", "."],
        capture_output=True,
        text=True,
    )
    return head.stdout.strip() + ("+dirty" if dirty.stdout.strip() else "")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def run_case(case: Case, timer: Timer, ceilings: Ceilings, repeats: int) -> list[dict[str, Any]]:
    """Check and time every implementation of a case, interleaved; one record each."""
    inputs = case.make(timer.device)
    truth = [t.detach() for t in case.truth(inputs)]
    floor_us, roof = ceilings.floor_us(case)
    records, timers = [], {}
    for name, impl in case.impls.items():
        record: dict[str, Any] = {
            "op": case.op,
            "shape": case.shape,
            "dtype": _dtype_name(case.dtype),
            "impl": name,
            "bytes": case.bytes,
            "flops": case.flops,
            "roof": roof,
            "floor_us": round(floor_us, 3),
            "event_floor_us": round(ceilings.event_floor_us, 3),
        } | case.extra
        got = impl(inputs)
        error = max(relative_error(g, t) for g, t in zip(got, truth, strict=True))
        record["error"] = float(f"{error:.3e}")
        if error > case.max_error:
            record["wrong"] = f"relative error above {case.max_error:g}: not timed"
        else:
            timers[name] = timer.prepare(lambda impl=impl: impl(inputs))
        records.append(record)
    samples: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(repeats):
        for name, once in timers.items():
            samples[name].append(once())
    zebra_us = statistics.median(samples["zebra"]) if samples.get("zebra") else None
    for record in records:
        times = sorted(samples.get(record["impl"], []))
        if not times:
            continue
        median = statistics.median(times)
        record |= {
            "n": len(times),
            "median_us": round(median, 3),
            "p10_us": round(times[len(times) // 10], 3),
            "p90_us": round(times[-1 - len(times) // 10], 3),
            "gb_s": round(case.bytes / median / 1e3, 1),
            "tflop_s": round(case.flops / median / 1e6, 2),
            "pct_of_floor": round(100 * floor_us / median, 1),
        }
        if zebra_us is not None:
            record["zebra_speedup"] = round(median / zebra_us, 3)
    return records


COLUMNS = ("op", "shape", "dtype", "impl", "median_us", "gb_s", "pct_of_floor", "error")


def table(records: Sequence[dict[str, Any]]) -> str:
    """The records as a text table, losses and wrong peers included."""
    rows = [(*COLUMNS, "zebra is")]
    for r in records:
        shape = " ".join(f"{k}={v}" for k, v in r["shape"].items())
        speed = r.get("zebra_speedup")
        versus = "-" if r["impl"] == "zebra" or speed is None else f"{speed:.2f}x"
        cells = [shape if c == "shape" else str(r.get(c, "-")) for c in COLUMNS]
        rows.append((*cells, r.get("wrong", versus)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def main(cases: Callable[[str], Sequence[Case]], description: str | None) -> None:
    """Command line of a benchmark script: ``cases(device)`` lists what to run."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    parser.add_argument("--repeats", type=int, default=None, help="default: 30 on a GPU, 7 on CPU")
    parser.add_argument(
        "--l2", choices=("written", "read"), default="written", help="what flushes a GPU's L2"
    )
    parser.add_argument("--only", default="", help="run the cases whose text contains this")
    parser.add_argument("--commit", default=None, help="stored with each line (default: ask git)")
    args = parser.parse_args()
    timer = Timer(args.device, args.l2)
    ceilings = timer.ceilings()
    common = environment(args.device) | {
        "commit": args.commit or _commit(),
        "argv": f"{Path(sys.argv[0]).name} --device {args.device}"
        + (f" --l2 {args.l2}" if args.l2 != "written" else "")
        + (f" --only '{args.only}'" if args.only else ""),
        **({"l2": args.l2} if timer.gpu else {}),
        **({"portable": True} if os.environ.get("ZEBRA_PORTABLE") == "1" else {}),
        "bandwidth_tb_s": round(ceilings.bandwidth / 1e12, 3),
        "bf16_tflop_s": round(ceilings.rate[torch.bfloat16] / 1e12, 1),
    }
    repeats = args.repeats or (30 if timer.gpu else 7)
    records = []
    for case in cases(args.device):
        if args.only and args.only not in f"{case.op} {case.shape} {_dtype_name(case.dtype)}":
            continue
        torch.manual_seed(0)
        with torch.no_grad():
            rows = run_case(case, timer, ceilings, repeats)
        records += rows
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            with args.out.open("a") as out:
                out.writelines(json.dumps(row | common) + "\n" for row in rows)
        if timer.gpu:
            torch.cuda.empty_cache()
    print(
        f"{common['device']}: {ceilings.bandwidth / 1e12:.2f} TB/s, "
        f"bf16 {common['bf16_tflop_s']} TFLOP/s, event floor {ceilings.event_floor_us:.1f} us"
    )
    print(table(records))
