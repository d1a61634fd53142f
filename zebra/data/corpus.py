"""Documents from files, folders, JSONL, or the Python standard library's own source."""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

HELD_OUT_PERCENT = 5  # share of standard-library files kept for evaluation
# Folders of the standard library that are not prose of the library: installed packages, tests (they
# quote the library's own source, which would leak), and generated tables that no model need learn.
SKIPPED_FOLDERS = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "encodings",
        "idle_test",
        "lib-dynload",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
    }
)
TEXT_SUFFIXES = frozenset(
    {".c", ".cc", ".cpp", ".cu", ".h", ".md", ".py", ".rst", ".text", ".txt", ".jsonl"}
)


class Document(NamedTuple):
    """One text and the name it is reported under."""

    name: str
    text: str


def read_documents(sources: Sequence[str | Path]) -> Iterator[Document]:
    """Yield the documents of each source in a fixed order.

    Args:
        sources: Each is ``"stdlib"`` (training files of the Python standard library),
            ``"stdlib:heldout"`` (the files kept apart), a text file, a ``.jsonl`` file (one object
            with a ``"text"`` string a line), or a folder, walked in sorted order for those.

    Yields:
        Documents; empty ones are left out.

    Raises:
        ValueError: A source does not exist, is not UTF-8 text, or a JSONL line has no text.
    """
    for source in sources:
        if str(source) == "stdlib":
            yield from _standard_library(held_out=False)
        elif str(source) == "stdlib:heldout":
            yield from _standard_library(held_out=True)
        else:
            yield from _from_path(Path(source))


def is_held_out(relative_path: str) -> bool:
    """Say whether a standard-library file is evaluation text: a hash of its path, so stable."""
    digest = hashlib.sha256(relative_path.encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


def _standard_library(held_out: bool) -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in _walk(root, {".py"}):
        name = path.relative_to(root).as_posix()
        if is_held_out(name) == held_out and not name.startswith("_sysconfigdata"):
            text = path.read_text(encoding="utf-8", errors="replace")
            if text:
                yield Document(name, text)


def _walk(root: Path, suffixes: set[str] | frozenset[str]) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(d for d in subfolders if d not in SKIPPED_FOLDERS)
        for name in sorted(files):
            if Path(name).suffix in suffixes:
                yield Path(folder, name)


def _from_path(path: Path) -> Iterator[Document]:
    if path.is_dir():
        found = False
        for file in _walk(path, TEXT_SUFFIXES):
            found = True
            yield from _from_path(file)
        if not found:
            raise ValueError(
                f"zebra.data: folder {path} must hold text files ({' '.join(sorted(TEXT_SUFFIXES))}"
                "), got none"
            )
    elif not path.is_file():
        raise ValueError(
            f"zebra.data: a source must be stdlib, stdlib:heldout, a file or a folder, got {path}"
        )
    elif path.suffix == ".jsonl":
        yield from _from_jsonl(path)
    else:
        text = _decode(path)
        if text:
            yield Document(str(path), text)


def _decode(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"zebra.data: {path} must be UTF-8 text, got {error}") from error


def _from_jsonl(path: Path) -> Iterator[Document]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(
                    f'zebra.data: {path}:{number} must be a JSON object with "text", '
                    f"got {line[:60]!r}"
                ) from error
            if not isinstance(text, str):
                raise ValueError(
                    f'zebra.data: {path}:{number} "text" must be a string, '
                    f"got {type(text).__name__}"
                )
            if text:
                yield Document(f"{path}:{number}", text)
