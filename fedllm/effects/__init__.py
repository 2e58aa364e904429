"""Effects - each method's claim, checked small; `fedllm verify KEY` runs a check and prints claim beside measurement.

A check is a module named by the method's key with a function `measure() -> Evidence`. It drives the real method
through the real engine. Where the published effect does not show at this size, the evidence says so and passes
nothing: `passed` is None.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pkgutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace

from fedllm.core.errors import ConfigError


@dataclass(frozen=True)
class Evidence:
    """What a check measured.

    Attributes:
        key: the method.
        claim: what its paper claims.
        measured: what was measured, in a sentence with numbers.
        passed: whether the stated margin was met; None where the effect is measured but not asserted.
        numbers: the numbers by name.
        seconds: wall time.
    """

    key: str
    claim: str
    measured: str
    passed: bool | None
    numbers: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


def checks() -> list[str]:
    """The keys that have a check."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    return sorted(name.replace("_", "-") for name in names if not name.endswith("rig"))


def verify(key: str) -> Evidence:
    """Run the check of a method; raises :class:`ConfigError` where there is none."""
    if key not in checks():
        raise ConfigError.unknown("effect check for the method", key, checks())
    begun = time.perf_counter()
    module = importlib.import_module(f"{__name__}.{key.replace('-', '_')}")
    return replace(module.measure(), seconds=time.perf_counter() - begun)


def verify_all(keys: Sequence[str], jobs: int, check: Callable[[str], Evidence] | None = None) -> Iterator[Evidence]:
    """Run several checks (None: :func:`verify`), `jobs` at once, each on one processor; in the order of the keys."""
    check = check or verify
    if jobs == 1 or len(keys) == 1:
        yield from map(check, keys)
        return
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the processes when they begin
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))
    try:
        yield from pool.map(check, keys)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        os.environ.pop("OMP_NUM_THREADS")
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before
