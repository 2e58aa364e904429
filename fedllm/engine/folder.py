"""Run folder - everything a run leaves behind, written so that no moment of interruption can damage it.

A file is written beside its place, flushed to disk and renamed. A checkpoint is one message of the wire: state,
meter, the names of the private-store files it belongs to and how long metrics.jsonl was; a resumed run cuts the
metrics back to that length and plays the rest again, to the same bits.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fedllm.core.errors import DecodeError, RunError
from fedllm.core.message import Dense, Json, Message
from fedllm.core.meter import Meter
from fedllm.core.state import State
from fedllm.core.tensors import Tensors
from fedllm.core.wire import decode, encode
from fedllm.engine import durable

KEPT = 2
"""Checkpoints kept of each leg: the last, and the one before it in case the last cannot be read."""


@dataclass(frozen=True)
class Checkpoint:
    """Where a leg stood."""

    state: State
    meter: Meter
    private: dict[str, str]
    metrics_bytes: int
    done: bool
    guard: Json = None
    remembered: Tensors = field(default_factory=dict)


class RunFolder:
    """A run's folder.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path) -> RunFolder:
        """Make a new folder; raises :class:`RunError` where one with a run in it exists or it cannot be written."""
        if (path / "recipe.yaml").exists():
            raise RunError(
                f"{path} already holds a run.",
                action=f"Continue it with 'fedllm resume {path}', or choose another folder.",
            )
        with _writing(path):
            path.mkdir(parents=True, exist_ok=True)
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing run; raises :class:`RunError` where there is none."""
        if not (path / "recipe.yaml").is_file():
            others = sorted(p.parent.name for p in path.parent.glob("*/recipe.yaml")) if path.parent.is_dir() else []
            raise RunError(
                f"{path} holds no run.",
                f"Runs beside it: {', '.join(others[-5:])}." if others else "",
                action="Name the folder that 'fedllm run' printed.",
            )
        return cls(path)

    def write_text(self, name: str, text: str) -> Path:
        """Write a text file atomically."""
        return self._write(self.path / name, text.encode())

    def write_json(self, name: str, value: Json) -> Path:
        """Write a JSON file atomically."""
        return self.write_text(name, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    def read_json(self, name: str) -> Json:
        """Read a JSON file; None where there is none."""
        file = self.path / name
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def log(self, value: Json) -> None:
        """Append a line to metrics.jsonl."""
        line = json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"
        with _writing(self.path), (self.path / "metrics.jsonl").open("ab") as file:
            file.write(line.encode())

    def metrics(self) -> Iterator[Json]:
        """The lines of metrics.jsonl; a last line cut off by a crash is left out."""
        file = self.path / "metrics.jsonl"
        if not file.is_file():
            return
        for line in file.read_bytes().split(b"\n"):
            try:
                if line.strip():
                    yield json.loads(line)
            except json.JSONDecodeError:
                return

    def metrics_bytes(self) -> int:
        """The length of metrics.jsonl."""
        file = self.path / "metrics.jsonl"
        return file.stat().st_size if file.is_file() else 0

    def cut_metrics(self, length: int) -> None:
        """Drop what was logged after a checkpoint."""
        file = self.path / "metrics.jsonl"
        if file.is_file() and file.stat().st_size > length:
            with file.open("r+b") as handle:
                handle.truncate(length)

    def forget(self, leg: str) -> None:
        """Drop what a leg logged that was interrupted before its first checkpoint; legs follow one another."""
        file, kept = self.path / "metrics.jsonl", 0
        for line in file.read_bytes().splitlines(keepends=True) if file.is_file() else ():
            try:
                if json.loads(line).get("model") == leg:
                    break
            except json.JSONDecodeError:
                break
            kept += len(line)
        self.cut_metrics(kept)

    def private(self, leg: str) -> Path:
        """Where a leg's private stores lie."""
        return self.path / "checkpoints" / leg / "private"

    def save(self, leg: str, checkpoint: Checkpoint) -> None:
        """Write a checkpoint; older ones are removed after it is safely on disk."""
        message = checkpoint.state.to_message()
        message.numbers["checkpoint"] = {
            "meter": checkpoint.meter.to_json(),
            "private": checkpoint.private,
            "metrics_bytes": checkpoint.metrics_bytes,
            "done": checkpoint.done,
            "guard": checkpoint.guard,
        }
        if checkpoint.remembered:
            message.parts["guard"] = Dense(checkpoint.remembered)
        folder = self.path / "checkpoints" / leg
        self._write(folder / f"round-{checkpoint.state.round:06d}.safetensors", encode(message))
        for old in sorted(folder.glob("round-*.safetensors"))[:-KEPT]:
            old.unlink()

    def load(self, leg: str) -> Checkpoint | None:
        """The last checkpoint of a leg that can be read; None where there is none."""
        files = sorted((self.path / "checkpoints" / leg).glob("round-*.safetensors"), reverse=True)
        for file in files:
            try:
                return _checkpoint(decode(file.read_bytes()))
            except (DecodeError, KeyError, TypeError):
                continue
        if files:
            raise RunError(f"No checkpoint of '{leg}' in {self.path} can be read.", action="Start the run again.")
        return None

    def manifests(self, leg: str) -> list[dict[str, str]]:
        """The private-store files that the kept checkpoints of a leg name."""
        files = sorted((self.path / "checkpoints" / leg).glob("round-*.safetensors"))
        return [_checkpoint(decode(file.read_bytes())).private for file in files]

    def _write(self, file: Path, data: bytes) -> Path:
        with _writing(self.path):
            durable.write(file, data)
        return file


def _checkpoint(message: Message) -> Checkpoint:
    facts = message.numbers["checkpoint"]
    return Checkpoint(
        State.from_message(message),
        Meter.from_json(facts["meter"]),
        dict(facts["private"]),
        int(facts["metrics_bytes"]),
        bool(facts["done"]),
        facts.get("guard"),
        message["guard"] if "guard" in message.parts else {},
    )


@contextmanager
def _writing(path: Path) -> Generator[None]:
    """Turn a full disk or a missing right into an error that says so."""
    try:
        yield
    except OSError as fault:
        reasons = {
            errno.ENOSPC: "the disk is full",
            errno.EDQUOT: "the quota is used up",
            errno.EROFS: "it is read-only",
        }
        reason = reasons.get(fault.errno or 0, fault.strerror or str(fault))
        raise RunError(
            f"{path} cannot be written: {reason}.",
            action="Nothing written before is lost: make room, then 'fedllm resume' the run.",
        ) from fault
