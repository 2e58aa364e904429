"""Complete - what the shell offers after a tab: recipe names, method keys, run folders.

Only file names are read, no module is imported, because a shell waits for the answer.
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def recipes(incomplete: str) -> list[str]:
    """Bundled recipes and recipe files."""
    return _matching([*bundled_recipes(), *_files(incomplete, (".yaml", ".yml"))], incomplete)


def methods(incomplete: str) -> list[str]:
    """Keys of methods and protocols."""
    return _matching(keys(), incomplete)


def topics(incomplete: str) -> list[str]:
    """Folders of the survey's map."""
    return _matching(topic_names(), incomplete)


def method_lists(incomplete: str) -> list[str]:
    """The last of several keys with commas between them."""
    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{key}" for key in _matching([*keys(), "base"], last)]


def explained(incomplete: str) -> list[str]:
    """What `explain` knows, but for the places inside a recipe."""
    return _matching([*keys(), "recipe"], incomplete)


def runs(incomplete: str) -> list[str]:
    """Folders that hold a run."""
    start = Path(incomplete).parent if incomplete else Path()
    found = [place.parent for pattern in ("*/recipe.yaml", "*/*/recipe.yaml") for place in start.glob(pattern)]
    return _matching(sorted(str(place) for place in found), incomplete)


def sources(incomplete: str) -> list[str]:
    """Recipes and data files."""
    endings = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".gz")
    return [*recipes(incomplete), *_matching(_files(incomplete, endings), incomplete)]


def bundled_recipes() -> list[str]:
    """Names of the recipes that come with fedllm."""
    return sorted(file.stem for file in (PACKAGE / "recipes").glob("*.yaml"))


def topic_names() -> list[str]:
    """Folders of methods."""
    return sorted(place.parent.name for place in (PACKAGE / "methods").glob("*/__init__.py"))


def keys() -> list[str]:
    """Keys of methods and protocols, by their file names."""
    files = [
        *(PACKAGE / "methods").glob("*/*.py"),
        *(PACKAGE / "protocols").glob("*.py"),
        *Path("fedllm_methods").glob("*.py"),
    ]
    return sorted({file.stem.replace("_", "-") for file in files if not file.stem.startswith("_")})


def _files(incomplete: str, endings: tuple[str, ...]) -> list[str]:
    start = Path(incomplete).parent if incomplete else Path()
    return sorted(str(file) for file in start.glob("*") if file.suffix in endings) if start.is_dir() else []


def _matching(choices: list[str], incomplete: str) -> list[str]:
    return [choice for choice in choices if choice.startswith(incomplete)]
