"""The command ``zebra``: build facts, conversion, distillation, evaluation, generation, the demo.

Heavy imports are inside the functions, and only the chosen command's flags are built.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from zebra._version import __version__

INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The arguments after ``zebra``; the process's own if None.

    Returns:
        The exit code: 0 done, 2 a mistake in the request (told in one line), 130 interrupted.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    args = _parser(given).parse_args(given)
    try:
        COMMANDS[args.command].run(args)
        return 0
    except KeyboardInterrupt:
        print(f"\nzebra: stopped; go on with: zebra {shlex.join(given)}", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError, ArithmeticError, RuntimeError, ImportError) as error:
        if args.debug:
            raise
        print(f"zebra {args.command}: {_one_line(error)}", file=sys.stderr)
        return 2


def _parser(given: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="zebra", description="Turn a Llama checkpoint into a distilled MLA + Mamba2 hybrid."
    )
    parser.add_argument("--version", action="version", version=f"zebra {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.help, description=command.help)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if name in given:
            command.add_flags(sub)
    return parser


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text or type(error).__name__


# ---------------------------------------------------------------- info


def _info_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="model folder to describe beside the build")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _info(args: argparse.Namespace) -> None:
    facts = _model_facts(args.model) if args.model else _build_facts()
    if args.json:
        print(json.dumps(facts, indent=2, default=str))
    else:
        _print_facts(facts)


def _build_facts() -> dict[str, Any]:
    import platform

    import torch

    import zebra.ops
    from zebra import _extension

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "devices": devices or ["cpu"],
        "build": _extension.build_info(),
        "operators": zebra.ops.support_matrix(),
    }


def _model_facts(path: str) -> dict[str, Any]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    import zebra.models

    try:
        config: Any = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path!r} must be a model folder: {error}") from error
    facts: dict[str, Any] = {
        "model": path,
        "type": config.model_type,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "query_heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
    }
    if isinstance(config, zebra.models.ZebraConfig):
        facts["layout"] = " ".join(config.layer_types)
        facts["kv_cache"] = zebra.models.kv_cache_report(config)
    else:
        head_dim = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        width = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        facts["kv_cache"] = {
            "bytes_per_token": 2 * width,  # keys and values in bf16
            "parameters": model.num_parameters(),
        }
    return facts


def _print_facts(facts: dict[str, Any], indent: str = "") -> None:
    width = max(len(key) for key in facts) + 2
    for key, value in facts.items():
        if isinstance(value, dict) and any(isinstance(item, dict) for item in value.values()):
            print(f"{indent}{key}")
            _print_facts(value, indent + "  ")
        elif isinstance(value, dict):
            line = ", ".join(f"{name} {_shown(item)}" for name, item in value.items())
            print(f"{indent}{key:<{width}}{line}")
        else:
            print(f"{indent}{key:<{width}}{_shown(value)}")


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    if isinstance(value, float):
        return f"{value:,.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


# ---------------------------------------------------------------- convert


def _convert_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("teacher", help="folder or hub name: dense Llama, Mistral, Qwen2 or Qwen3")
    parser.add_argument("out", help="folder to write the hybrid to; must not hold a model")
    parser.add_argument(
        "--layout",
        required=True,
        help="a published layout (8b-8mla-24m2), the type of every layer (mla,mamba2,mamba2,mla), "
        "or shares (mla=0.25,mamba2=0.75)",
    )
    for name, what in (
        ("kv-lora-rank", "width of the cached latent, a multiple of 16"),
        ("q-lora-rank", "query rank of MLA layers"),
        ("qk-rope-head-dim", "rotated channels of MLA layers"),
    ):
        parser.add_argument(f"--{name}", type=int, help=f"{what} (default: the layout's)")
    parser.add_argument(
        "--rope-aware",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="start MLA layers from the teacher's own rotations (default on)",
    )
    parser.add_argument("--lossy", action="store_true", help="accept biases and qk-norm, dropped")
    parser.add_argument("--seed", type=int, default=0, help="of the random parts (default 0)")
    parser.add_argument("--device", help="where the SVDs run (default: where the teacher is)")


def _convert(args: argparse.Namespace) -> None:
    import shutil

    from zebra.distill.checkpoint import make_durable, save_model
    from zebra.distill.stages import load_tokenizer
    from zebra.init.convert import convert
    from zebra.models import kv_cache_report

    _quiet_libraries()
    out = Path(args.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out must be a new or empty folder, got {out}")
    tokenizer = load_tokenizer(args.teacher)
    model: Any = convert(
        args.teacher,
        parse_layout(args.layout),
        q_lora_rank=args.q_lora_rank,
        kv_lora_rank=args.kv_lora_rank,
        qk_rope_head_dim=args.qk_rope_head_dim,
        rope_aware=args.rope_aware,
        lossy=args.lossy,
        seed=args.seed,
        device=args.device,
        progress=True,
    )
    aside = out.with_name(f".writing-{out.name}")  # so that out, once there, is whole
    shutil.rmtree(aside, ignore_errors=True)
    save_model(aside, model, tokenizer)
    make_durable(aside)
    if out.exists():
        out.rmdir()
    aside.rename(out)
    cache = kv_cache_report(model.config)
    print(
        f"{out}: {cache['parameters']:,} parameters, {cache['bytes_per_token']:,} bytes of KV "
        f"cache per token, {cache['percent_of_teacher']:.2f} % of the teacher's"
    )


def parse_layout(text: str) -> str | list[str] | dict[str, float]:
    """Read ``--layout``: a preset's name, layer types, or shares of them.

    Raises:
        ValueError: A share is no number.
    """
    parts = [part.strip() for part in text.split(",")]
    if "=" in text:
        try:
            pairs = [part.split("=") for part in parts]
            return {name: float(share) for name, share in pairs}
        except ValueError:
            raise ValueError(f"layout must have shares like mla=0.25, got {text!r}") from None
    return parts if len(parts) > 1 or text in ("mla", "mamba2", "attention") else text


# ---------------------------------------------------------------- distill


def _distill_flags(parser: argparse.ArgumentParser) -> None:
    from zebra.distill import DistillConfig

    parser.add_argument("--config", help="YAML recipe of one or more stages; flags override it")
    for name, field in DistillConfig.fields().items():
        default = " ".join(field.default) if isinstance(field.default, tuple) else field.default
        suffix = "" if default == "" else f" (default {default})"
        options: dict[str, Any] = {
            "default": argparse.SUPPRESS,
            "help": field.metadata["help"].replace("%", "%%") + suffix,
        }
        if isinstance(field.default, bool):
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["metavar"] = name.upper()
            if isinstance(field.default, tuple):
                options["nargs"] = "+"
        parser.add_argument(f"--{name.replace('_', '-')}", **options)


def _distill(args: argparse.Namespace) -> None:
    from zebra.distill import DistillConfig
    from zebra.distill.config import read_recipe
    from zebra.distill.stages import distill

    flags = {k: v for k, v in vars(args).items() if k in DistillConfig.fields()}
    _quiet_libraries()
    configs = (
        read_recipe(args.config, flags) if args.config else [DistillConfig.from_mapping(flags)]
    )
    for config in configs:
        summary = distill(config)
        print(
            f"{config.stage}: loss {summary['loss']:.4f} after {summary['steps']:,} steps, "
            f"{summary['tokens']:,} tokens, {summary['seconds']:.0f} s -> {config.out}"
        )


# ---------------------------------------------------------------- eval


def _eval_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="model folder, Zebra or any Hugging Face causal LM")
    parser.add_argument(
        "--data", nargs="+", required=True, help="text files, JSONL, folders, stdlib:heldout"
    )
    parser.add_argument("--context", type=int, default=1024, help="tokens a window (default 1024)")
    parser.add_argument("--batch", type=int, default=8, help="windows a pass (default 8)")
    parser.add_argument("--max-bytes", type=int, help="score only the first bytes of each document")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", default="cpu", help="cpu or cuda[:index] (default cpu)")
    parser.add_argument("--out", help="also write the scores to this JSON file")


def _eval(args: argparse.Namespace) -> None:
    from zebra.data import read_documents
    from zebra.distill.checkpoint import write_text
    from zebra.distill.stages import load_model, load_tokenizer
    from zebra.evaluate import bits_per_byte

    _quiet_libraries()
    model = load_model(args.model, args.device, args.precision)
    score = bits_per_byte(
        model,
        load_tokenizer(args.model),
        read_documents(args.data),
        args.context,
        args.batch,
        args.max_bytes,
        progress=True,
    )
    print(
        f"{args.model}: {score.bits_per_byte:.4f} bits per byte "
        f"({score.nats_per_token:.4f} nats per token; {score.tokens:,} tokens, "
        f"{score.bytes:,} bytes, {score.documents} documents)"
    )
    if args.out:
        write_text(Path(args.out), json.dumps(score._asdict(), indent=2) + "\n")


# ---------------------------------------------------------------- generate


def _generate_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="model folder, Zebra or any Hugging Face causal LM")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="default 200")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the likeliest token (default 0)"
    )
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus mass (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default 0)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", default="cpu", help="cpu or cuda[:index] (default cpu)")
    parser.add_argument("--out", help="also write prompt and continuation to this text file")


def _generate(args: argparse.Namespace) -> None:
    import torch
    from transformers import TextStreamer

    from zebra.distill.checkpoint import write_text
    from zebra.distill.stages import load_model, load_tokenizer

    if args.temperature < 0 or not 0 < args.top_p <= 1 or args.max_new_tokens < 1:
        raise ValueError(
            "temperature must be at least 0, top-p in (0, 1], max-new-tokens at least 1, got "
            f"{args.temperature}, {args.top_p}, {args.max_new_tokens}"
        )
    _quiet_libraries()
    model, tokenizer = (
        load_model(args.model, args.device, args.precision),
        load_tokenizer(args.model),
    )
    inputs = tokenizer(args.prompt, return_tensors="pt").to(model.device)
    if inputs["input_ids"].size(1) == 0:
        raise ValueError("prompt must give at least one token, got none")
    sampling: dict[str, Any] = {"do_sample": False}
    if args.temperature > 0:
        sampling = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p}
    torch.manual_seed(args.seed)
    ids = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=args.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        **sampling,
    )
    if args.out:
        write_text(Path(args.out), tokenizer.decode(ids[0], skip_special_tokens=True))


# ---------------------------------------------------------------- demo


def _demo_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="runs/demo", help="folder of the run (default runs/demo)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda[:index] (default cpu)")
    parser.add_argument("--quick", action="store_true", help="seconds, not minutes: a smoke test")


def _demo(args: argparse.Namespace) -> None:
    from zebra.demo import demo

    _quiet_libraries()
    demo(Path(args.out), args.device, args.quick, main)


def _quiet_libraries() -> None:
    """Leave the screen to our own progress bars."""
    from transformers.utils import logging as module

    logging: Any = module
    logging.disable_progress_bar()
    logging.set_verbosity_error()


class Command(NamedTuple):
    """One command: its help line, its flags, and what it does."""

    help: str
    add_flags: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


COMMANDS = {
    "info": Command("build, devices and operators, or a model folder", _info_flags, _info),
    "convert": Command("build a hybrid from a teacher", _convert_flags, _convert),
    "distill": Command("teach a hybrid, one stage or a recipe", _distill_flags, _distill),
    "eval": Command("bits per byte of a model on text", _eval_flags, _eval),
    "generate": Command("continue a prompt with a model", _generate_flags, _generate),
    "demo": Command("train, convert, distil and compare, in minutes", _demo_flags, _demo),
}

if __name__ == "__main__":
    sys.exit(main())
