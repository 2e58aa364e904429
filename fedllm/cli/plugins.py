"""Plug-ins - methods of one's own outside the package: the files of a folder `fedllm_methods` in the current folder.

`fedllm new-method` writes there where there is no source checkout. A package on PyPI uses the entry-point group
`fedllm.methods` instead.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from fedllm.cli import screen

FOLDER = "fedllm_methods"


def load_plugins() -> None:
    """Import the method files of the current folder, so that they register themselves; each is named on stderr.

    Raises:
        ConfigError: a file cannot be imported.
    """
    for file in sorted(Path(FOLDER).glob("*.py")):
        name = f"{FOLDER}.{file.stem}"
        if file.stem.startswith("_") or name in sys.modules:
            continue
        _load(name, file.resolve())
        screen.say(f"Loaded {file}", "dim", errors=True)


def _load(name: str, file: Path) -> None:
    from fedllm.core.errors import ConfigError, FedLLMError

    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{file} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except FedLLMError:
        del sys.modules[name]
        raise
    except Exception as fault:
        del sys.modules[name]
        raise ConfigError(
            f"The method file {file} cannot be imported: {type(fault).__name__}: {fault}.",
            action=f"Mend it, or move it out of {FOLDER}.",
        ) from fault
