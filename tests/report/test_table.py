from __future__ import annotations

import io
import json

from rich.console import Console

from fedllm.report.table import interval_text, labels_text, partition_table, result_table


def drawn(table, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()


def test_result_table(run_folder) -> None:
    result = json.loads((run_folder() / "result.json").read_text())
    text = drawn(result_table(result))
    own = next(row for row in result["rows"] if row["model"] == "federated")
    line = next(line for line in text.splitlines() if "Federated" in line)
    for value in (own["pooled"]["exact_match"], own["summary"]["mean"], own["summary"]["worst_10_percent"]):
        assert f"{100 * value:.1f} %" in line
    assert "1.080" in line
    assert "fedavg, 15 rounds; higher is better" in text
    assert max(map(len, text.splitlines())) <= 120


def test_result_table_without_numbers_and_with_markup() -> None:
    row = {"model": "base", "label": "[red]x[/red]", "clients": {}, "pooled": {"n": 0, "loss": None}, "summary": {}}
    result = {"name": "r", "method": "m", "rounds": 0, "metric": "loss", "higher_is_better": False, "rows": [row]}
    text = drawn(result_table(result))
    assert "not measured" in text
    assert "[red]x[/red]" in text
    assert "lower is better" in text
    assert "r" in drawn(result_table({**result, "rows": []}))


def test_partition_table(run_folder) -> None:
    partition = json.loads((run_folder(clients=35) / "partition.json").read_text())
    text = drawn(partition_table({**partition, "gini": 0.25, "heterogeneity": None}))
    sizes = sorted((one["train"] for one in partition["clients"].values()), reverse=True)
    assert f"{sizes[0]:,}" in text.splitlines()[3]
    assert "5 smaller clients" in text
    assert f"{sum(sizes[30:]):,}" in next(line for line in text.splitlines() if "smaller" in line)
    assert f"{sum(sizes):,}" in next(line for line in text.splitlines() if "all 35 clients" in line)
    assert "Gini of sizes 0.25 (0: all alike)" in text


def test_partition_table_without_labels(run_folder) -> None:
    partition = json.loads((run_folder(clients=1, labels=0) / "partition.json").read_text())
    text = drawn(partition_table(partition))
    assert "labels" not in text
    assert "all" not in text


def test_labels_and_intervals() -> None:
    assert labels_text({"b": 1, "a": 2, "c": 1, "d": 0, "e": 6}) == "e 60 %, a 20 %, b 10 % and 1 more"
    assert labels_text({}) == ""
    assert interval_text("accuracy", [0.5, 0.75]) == "50.0\u00a0– 75.0 %"
    assert interval_text("loss", [0.5, 0.75]) == "0.500\u00a0– 0.750"
    assert interval_text("loss", None) == "–"
