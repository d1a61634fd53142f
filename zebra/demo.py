"""``zebra demo``: train a teacher, convert it, distil it, and say what was kept, in minutes.

Everything after the teacher goes through the command line's own commands, which are printed.
Running it again with the same folder continues where it stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import platform
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zebra.data import byte_tokenizer
from zebra.distill import DistillConfig, LossFunction, TrainConfig, next_token_loss
from zebra.distill.checkpoint import write_text
from zebra.distill.stages import load_model, objective, open_stream
from zebra.distill.train import DONE_FILE, read_metrics, train
from zebra.report import kept_percent, plot_report, summary_table

Run = Callable[[Sequence[str]], int]  # the command line: arguments after "zebra" -> exit code

TARGET_SECONDS = 270.0  # of the whole demo; six minutes less a margin for a machine that is busy
RESERVED_SECONDS = 40.0  # of it for everything but training: imports, evaluation, text, figure
MEASURE_SECONDS = 1.5  # of each measurement that the steps are chosen by
STAGES = ("teacher", "ild", "kd")


@dataclass(frozen=True)
class Plan:
    """The sizes of the demo.  The steps of a stage follow from how fast the machine turns out."""

    hidden_size: int = 256
    intermediate_size: int = 768
    layers: tuple[str, ...] = ("mamba2", "mla", "mamba2", "mamba2")
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    kv_lora_rank: int = 32
    q_lora_rank: int = 192
    batch: int = 2
    length: int = 256
    learning_rates: tuple[float, ...] = (1e-3, 1e-3, 5e-4)  # of the stages, in their order
    shares: tuple[float, ...] = (0.55, 0.15, 0.3)  # of the training time; ILD is soon done
    least_steps: tuple[int, ...] = (200, 80, 120)
    most_steps: tuple[int, ...] = (6000, 2400, 3600)
    data: tuple[str, ...] = ("stdlib",)
    eval_bytes: int = 5_000  # of each of the held-out files
    new_tokens: int = 240
    prompt: str = "    def __init__(self, "


QUICK = Plan(
    hidden_size=64,
    intermediate_size=128,
    heads=2,
    kv_heads=1,
    head_dim=32,
    kv_lora_rank=16,
    q_lora_rank=48,
    length=64,
    most_steps=(60, 30, 40),
    least_steps=(60, 30, 40),
    eval_bytes=300,
    new_tokens=32,
)


def demo(out: Path, device: str, quick: bool, run: Run) -> dict[str, Any]:
    """Run the demo, or go on with it.

    Args:
        out: Folder for everything it writes, ``report.json`` and ``report.png`` among it.
        device: Where to train: ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.
        quick: Tiny sizes and fixed steps: seconds instead of minutes.
        run: The command line.

    Returns:
        The report, as in ``report.json``.

    Raises:
        RuntimeError: A command failed; it has said why.
        ValueError: ``out`` holds a demo of other sizes.
    """
    return _Demo(out, device, QUICK if quick else Plan(), run).report()


class _Demo:
    """One demo: its folder is its state."""

    def __init__(self, out: Path, device: str, plan: Plan, run: Run) -> None:
        self.out, self.device, self.plan, self._run = out, device, plan, run
        out.mkdir(parents=True, exist_ok=True)
        self.state: dict[str, Any] = {
            "plan": _plain(dataclasses.asdict(plan)),
            "precision": None,
            "steps": {},
            "seconds": {},
        }
        path = out / "demo.json"
        if path.is_file():
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["plan"] != self.state["plan"]:
                raise ValueError(
                    f"zebra.demo: {out} holds a demo of other sizes; choose another --out"
                )
            self.state = stored
        self.models = {
            "teacher": out / "teacher",
            "hybrid_init": out / "hybrid-init",
            "hybrid_ild": out / "hybrid-ild",
            "hybrid_kd": out / "hybrid-kd",
        }

    def report(self) -> dict[str, Any]:
        """Run every stage that is not done, then write and print the report."""
        with self._timed("teacher"):
            self._train_teacher()
        with self._timed("convert"):
            self._convert()
        with self._timed("ild"):
            self._distill("ild", self.models["hybrid_init"], self.models["hybrid_ild"])
        with self._timed("kd"):
            self._distill("kd", self.models["hybrid_ild"], self.models["hybrid_kd"])
        with self._timed("eval"):
            scores = {f"{name}_bpb": self._evaluate(name) for name in self.models}
            texts = {name: self._generate(name) for name in ("teacher", "hybrid_kd")}
        report = self._assemble(scores, texts)
        plot_report(report, self.out / "report.png")
        write_text(self.out / "report.json", json.dumps(report, indent=2) + "\n")
        print(summary_table(report))
        print(f"  saved {self.out / 'report.json'} and {self.out / 'report.png'}")
        return report

    # ------------------------------------------------------------ stages

    def _train_teacher(self) -> None:
        if (self.models["teacher"] / DONE_FILE).is_file():
            return
        plan, tokenizer = self.plan, byte_tokenizer()
        model = _llama(plan, tokenizer).to(self.device)
        weight, base = model.get_output_embeddings().weight, model.base_model

        def loss(tokens: Tensor) -> Tensor:
            hidden = base(tokens, use_cache=False).last_hidden_state
            return next_token_loss(hidden, weight, tokens)

        if self.state["precision"] is None:
            self.state["precision"] = self._faster_precision(model, loss)
            self._save()
        print(
            f"Train a Llama teacher ({model.num_parameters():,} parameters) -> {self.out}/teacher"
        )
        if "teacher" not in self.state["steps"]:
            self._choose_steps("teacher", model, loss)
        config = self._config(TrainConfig, "teacher", self.state["steps"]["teacher"])
        train(model, tokenizer, loss, open_stream(config, tokenizer), config, label="teacher")

    def _convert(self) -> None:
        if not (self.models["hybrid_init"] / "config.json").is_file():
            plan = self.plan
            self._zebra(
                "convert",
                str(self.models["teacher"]),
                str(self.models["hybrid_init"]),
                f"--layout={','.join(plan.layers)}",
                f"--kv-lora-rank={plan.kv_lora_rank}",
                f"--q-lora-rank={plan.q_lora_rank}",
            )

    def _distill(self, stage: str, student: Path, to: Path) -> None:
        if (to / DONE_FILE).is_file():
            return
        models = {"teacher": str(self.models["teacher"]), "student": str(student), "stage": stage}
        if stage not in self.state["steps"]:
            teacher = load_model(models["teacher"], self.device, self.state["precision"])
            model = load_model(models["student"], self.device)
            config = self._config(DistillConfig, stage, 1, out=str(to), **models)
            with objective(model, teacher, config) as loss:
                self._choose_steps(stage, model, loss)
        steps = self.state["steps"][stage]
        config = self._config(DistillConfig, stage, steps, out=str(to), **models)
        self._zebra("distill", *_flags(config))

    def _evaluate(self, name: str) -> float:
        path = self.out / f"eval-{name}.json"
        if not path.is_file():
            self._zebra(
                "eval",
                str(self.models[name]),
                "--data=stdlib:heldout",
                f"--context={self.plan.length}",
                f"--max-bytes={self.plan.eval_bytes}",
                f"--device={self.device}",
                f"--out={path}",
            )
        return float(json.loads(path.read_text(encoding="utf-8"))["bits_per_byte"])

    def _generate(self, name: str) -> str:
        path = self.out / f"text-{name}.txt"
        if not path.is_file():
            self._zebra(
                "generate",
                str(self.models[name]),
                f"--prompt={self.plan.prompt}",
                f"--max-new-tokens={self.plan.new_tokens}",
                "--temperature=0.7",
                f"--device={self.device}",
                f"--out={path}",
            )
        return path.read_text(encoding="utf-8")

    def _assemble(self, scores: dict[str, float], texts: dict[str, str]) -> dict[str, Any]:
        import transformers

        from zebra.models import ZebraConfig, kv_cache_report

        hybrid = ZebraConfig.from_pretrained(self.models["hybrid_kd"])
        cache, plan = kv_cache_report(hybrid), self.plan
        teacher_kv = 2 * len(plan.layers) * 2 * plan.kv_heads * plan.head_dim  # bf16 keys, values
        lost = scores["hybrid_init_bpb"] - scores["teacher_bpb"]
        regained = (scores["hybrid_init_bpb"] - scores["hybrid_kd_bpb"]) / lost
        return {
            **scores,
            "teacher_kept_percent": kept_percent(scores["teacher_bpb"], scores["hybrid_kd_bpb"]),
            "gap_closed_percent": 100 * regained,
            "kv_percent": cache["percent_of_teacher"],
            "kv_bytes_per_token": cache["bytes_per_token"],
            "teacher_kv_bytes_per_token": teacher_kv,
            "state_bytes_per_sequence": cache["state_bytes_per_sequence"],
            "parameters": {
                "teacher": load_model(str(self.models["teacher"]), "cpu").num_parameters(),
                "hybrid": cache["parameters"],
            },
            "layout": list(plan.layers),
            "seconds": sum(self.state["seconds"].values()),
            "stage_seconds": self.state["seconds"],
            "steps": self.state["steps"],
            "precision": self.state["precision"],
            "losses": {stage: self._losses(stage) for stage in STAGES},
            "text": texts,
            "config": self.state["plan"],
            "device": _device_name(self.device),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }

    def _losses(self, stage: str) -> list[float]:
        folder = self.models["teacher" if stage == "teacher" else f"hybrid_{stage}"]
        return [line["loss"] for line in read_metrics(folder)]

    # ------------------------------------------------------------ time

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        """Add the stage's time to the state, unless an earlier run completed it."""
        started = time.perf_counter()
        yield
        if stage not in self.state["seconds"]:
            self.state["seconds"][stage] = time.perf_counter() - started
            self._save()

    def _choose_steps(self, stage: str, model: Any, loss: LossFunction) -> None:
        """Set the stage's steps: as many as fit its share of the time left on this machine."""
        index = STAGES.index(stage)
        least, most = self.plan.least_steps[index], self.plan.most_steps[index]
        steps = least
        if most > least:
            spent = sum(self.state["seconds"].values())
            left = TARGET_SECONDS - RESERVED_SECONDS - spent
            budget = left * self.plan.shares[index] / sum(self.plan.shares[index:])
            each = self._seconds_per_step(model, loss, self.state["precision"])
            steps = min(most, max(least, int(budget / each)))
        self.state["steps"][stage] = steps
        self._save()

    def _faster_precision(self, model: Any, loss: LossFunction) -> str:
        """Return "bf16" where this machine has fast bf16 arithmetic, else "fp32"; by measuring."""
        times = {p: self._seconds_per_step(model, loss, p) for p in ("fp32", "bf16")}
        return min(times, key=lambda precision: times[precision])

    def _seconds_per_step(self, model: Any, loss: LossFunction, precision: str) -> float:
        """Measure for MEASURE_SECONDS: the mean, which a machine with other work also pays."""
        device, steps, started = torch.device(self.device), -2, 0.0  # two calls set things up
        trained = [p for p in model.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0, fused=True)
        tokens = torch.randint(256, (self.plan.batch, self.plan.length), device=device)
        while steps < 1 or time.perf_counter() - started < MEASURE_SECONDS:
            if steps == 0:
                started = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                value = loss(tokens)
            value.backward()
            nn.utils.clip_grad_norm_(trained, math.inf)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            value.item()  # waits for the device
            steps += 1
        return (time.perf_counter() - started) / steps

    # ------------------------------------------------------------ plumbing

    def _config(self, kind: Any, phase: str, steps: int, **values: Any) -> Any:
        common = {
            "out": str(self.models["teacher"]),
            "data": self.plan.data,
            "steps": steps,
            "batch": self.plan.batch,
            "length": self.plan.length,
            "learning_rate": self.plan.learning_rates[STAGES.index(phase)],
            "warmup": 0.05,
            "final_rate": 0.05,
            "beta2": 0.98,  # short runs: 0.999 would average over more steps than there are
            "precision": self.state["precision"],
            "device": self.device,
            "seed": STAGES.index(phase),  # each stage reads the corpus in an order of its own
            "save_every": max(20, steps // 5),
            "keep": 1,
        }
        return kind(**{**common, **values})

    def _zebra(self, *arguments: str) -> None:
        print(f"\n$ zebra {shlex.join(arguments)}", flush=True)
        if self._run(arguments) != 0:
            raise RuntimeError(f"zebra.demo: the command above failed: {arguments[0]}")

    def _save(self) -> None:
        write_text(self.out / "demo.json", json.dumps(self.state, indent=2) + "\n")


def _llama(plan: Plan, tokenizer: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    hidden = plan.hidden_size
    config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 16) * 16,
        hidden_size=hidden,
        intermediate_size=plan.intermediate_size,
        num_hidden_layers=len(plan.layers),
        num_attention_heads=plan.heads,
        num_key_value_heads=plan.kv_heads,
        head_dim=plan.head_dim,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=hidden**-0.5,  # 0.02 suits thousands of channels; this learns faster
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def _flags(config: DistillConfig) -> list[str]:
    """Return the flags that make ``zebra distill`` build this config; defaults are left out."""
    flags = []
    for name, field in DistillConfig.fields().items():
        value = getattr(config, name)
        if value != field.default:
            values = value if isinstance(value, tuple) else (value,)
            flags += [f"--{name.replace('_', '-')}", *map(str, values)]
    return flags


def _plain(value: Any) -> Any:
    """Return ``value`` as JSON gives it back: tuples as lists."""
    return json.loads(json.dumps(value))


def _device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return str(torch.cuda.get_device_name(torch.device(device)))
    return f"cpu, {torch.get_num_threads()} threads"
