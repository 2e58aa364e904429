from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fedllm.core.errors import RunError
from fedllm.report.page import duration, page, read_run, write_report

VOID = {"meta", "br", "path", "rect"}


class Reader(HTMLParser):
    """Collects text and tables, and checks that tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.words.append(data)
        if self.open and ({"td", "th"} & set(self.open)):
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def made(folder: Path) -> Reader:
    return Reader(write_report(folder).read_text(encoding="utf-8"))


def change(folder: Path, name: str, act: Callable[[dict], None]) -> None:
    found = json.loads((folder / name).read_text())
    act(found)
    (folder / name).write_text(json.dumps(found))


def test_one_file_without_network_or_script(run_folder) -> None:
    folder = run_folder()
    file = write_report(folder)
    text = file.read_text(encoding="utf-8")
    assert file == folder / "report.html"
    assert not list(folder.glob("*.partial"))
    reader = Reader(text)
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in reader.tags}
    links = [value for _, attrs in reader.tags for name, value in attrs.items() if name in ("src", "href")]
    assert links == ["adapter", "metrics.jsonl"]
    assert re.findall(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", text) == []
    ids = re.findall(r'\sid="([^"]+)"', text)
    assert len(ids) == len(set(ids))


def test_the_numbers_of_the_result_stand_in_the_table(run_folder) -> None:
    folder = run_folder()
    reader = made(folder)
    result = json.loads((folder / "result.json").read_text())
    partition = json.loads((folder / "partition.json").read_text())["clients"]
    head = next(row for row in reader.rows if "Overall" in row)
    assert head[1:9] == [one["name"] for one in partition.values()]
    for given in result["rows"]:
        row = next(row for row in reader.rows if row[0] == given["label"] and len(row) == len(head))
        assert row[1:9] == [f"{100 * given['clients'][client]['exact_match']:.1f}" for client in partition]
        summary = given["summary"]
        wanted = [given["pooled"]["exact_match"], summary["mean"], summary["worst_10_percent"]]
        assert row[9:12] == [f"{100 * value:.1f}" for value in wanted]
        low, high = summary["interval"]
        assert row[12] == f"{100 * low:.1f}\u00a0– {100 * high:.1f}"
    local, own = (next(r for r in result["rows"] if r["model"] == model) for model in ("local", "federated"))
    gain = next(row for row in reader.rows if row[0] == "Gain over each alone")
    assert gain[9] == f"{100 * (own['pooled']['exact_match'] - local['pooled']['exact_match']):+.1f}"
    for sentence in result["sentences"]:
        assert sentence in reader.text


def test_every_section_speaks_of_its_file(run_folder) -> None:
    text = made(run_folder()).text
    for part in (
        "8 of 8 clients do better than alone",
        "110.1 MB sent by the clients",
        "32 min 14 s",
        "Training loss",
        "Held-out exact match",
        "Bytes sent",
        "Training rows by label",
        "Qwen3-0.6B",
        "2,293,760 (0.38 %)",
        "3f9a1c77d2e0",
        "torch 2.13.0",
        "note: <b>&",
        "31 rows were left out",
        "Hôpital Saint-Louis: upload refused in rounds 3, 7: the upload's 'lora.A' is not finite",
        "St Mary's Hospital: did not answer in round 9.",
    ):
        assert part in text, part


def test_a_loss_is_better_where_it_is_lower(run_folder) -> None:
    folder = run_folder(clients=3)
    change(folder, "result.json", lambda r: r.update(metric="loss", higher_is_better=False))
    text = write_report(folder).read_text(encoding="utf-8")
    assert "Lower is better" in text
    gain = re.search(r'class="gain">(.*?)</tr>', text, re.DOTALL).group(1)
    assert '<span class="up">−0.280</span>' in gain
    assert "down" not in gain
    assert "3 of 3" in text
    change(folder, "result.json", lambda r: r.update(metric="exact_match"))
    low, high = next(row for row in made(folder).rows if row[0].startswith("Gain"))[-1].split("\u00a0– ")
    assert float(low.replace("−", "-")) < float(high.replace("−", "-"))


def test_many_clients_become_a_distribution(run_folder) -> None:
    folder = run_folder(clients=168, labels=12, every=0)
    reader = made(folder)
    head = next(row for row in reader.rows if "Overall" in row)
    assert head[1:5] == ["Std", "Lowest", "Highest", "10th percentile"]
    assert "168 clients, worst to best" in reader.text
    assert "One row for each client" in reader.text
    assert "measured once, at the end" in reader.text


@pytest.mark.parametrize(
    "missing", ["recipe.yaml", "environment.json", "partition.json", "metrics.jsonl", "result.json"]
)
def test_a_missing_file_is_named(run_folder, missing: str) -> None:
    folder = run_folder(clients=2, rounds=2)
    (folder / missing).unlink()
    assert missing in made(folder).text


def test_an_empty_folder_gives_a_page(tmp_path: Path) -> None:
    reader = made(tmp_path)
    for name in ("result.json", "partition.json", "environment.json", "metrics.jsonl", "recipe.yaml"):
        assert name in reader.text
    assert "nan" not in reader.text.lower().split()


@pytest.mark.parametrize("given", [{"clients": 1, "rounds": 1, "labels": 0}, {"clients": 2, "rounds": 1, "labels": 30}])
def test_small_runs(run_folder, given) -> None:
    text = made(run_folder(**given)).text
    assert "one round" in text
    assert "Round by round" in text


def test_nothing_was_measured(run_folder) -> None:
    folder = run_folder(clients=2, rounds=2)

    def forget(result: dict) -> None:
        for row in result["rows"]:
            row["pooled"] = {"n": 0, "exact_match": None, "loss": None}
            row["clients"] = {client: {"n": 0, "exact_match": None, "loss": None} for client in row["clients"]}

    change(folder, "result.json", forget)
    reader = made(folder)
    own = next(row for row in reader.rows if row[0] == "Federated (fedavg)")
    assert set(own[1:]) == {"–"}
    change(folder, "result.json", lambda result: result.update(rows=[]))
    assert "No model has been measured" in made(folder).text


def test_text_of_others_is_escaped(run_folder) -> None:
    folder, nasty = run_folder(clients=3), "<script>alert(1)</script>\"'&"

    def spoil(result: dict) -> None:
        result.update(name=nasty, about=nasty, sentences=[nasty], warnings=[nasty], files={nasty: f"{nasty}.txt"})
        result["rows"][0]["label"] = nasty

    def rename(partition: dict) -> None:
        for one in partition["clients"].values():
            one.update(name=nasty, labels={nasty: 3})

    change(folder, "result.json", spoil)
    change(folder, "partition.json", rename)
    (folder / "recipe.yaml").write_text(nasty)
    text = write_report(folder).read_text(encoding="utf-8")
    assert "<script" not in text
    assert text.count("&lt;script&gt;") > 8
    Reader(text)


def test_files_elsewhere_are_named_without_their_place(run_folder) -> None:
    folder = run_folder(clients=2)
    change(folder, "result.json", lambda result: result.update(files={"adapter": "/home/someone/secret/adapter.bin"}))
    reader = made(folder)
    assert "adapter.bin" in reader.text
    assert "someone" not in reader.text


def test_a_line_cut_off_by_a_crash_is_left_out(run_folder) -> None:
    folder = run_folder(clients=2, rounds=3)
    file = folder / "metrics.jsonl"
    whole = len(read_run(folder).rounds)
    file.write_text(file.read_text() + '{"event": "round", "rou')
    run = read_run(folder)
    assert (len(run.rounds), run.notes) == (whole, [])
    file.write_text("not json\n" + file.read_text())
    run = read_run(folder)
    assert run.notes == ["Line 1 of metrics.jsonl cannot be read and is left out."]
    assert "Line 1 of metrics.jsonl" in page(run)


def test_damaged_files_and_folders_are_refused(run_folder, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="There is no folder"):
        write_report(tmp_path / "nowhere")
    folder = run_folder(clients=2)
    for text in ("{", "[]", '{"rounds": NaN}'):
        (folder / "result.json").write_text(text)
        with pytest.raises(RunError, match=r"result\.json is damaged"):
            write_report(folder)
    (folder / "result.json").unlink()
    (folder / "report.html.partial").mkdir()
    with pytest.raises(RunError, match="cannot be written"):
        write_report(folder)


def test_the_page_is_the_same_every_time(run_folder) -> None:
    folder = run_folder()
    assert write_report(folder).read_bytes() == write_report(folder).read_bytes()


def test_old_rounds_without_a_model_belong_to_the_federation(run_folder) -> None:
    folder = run_folder(clients=2, rounds=2)
    events = [{"event": "round", "round": n, "loss": 1 / n, "bytes_up": 500_000, "cohort": ["a"]} for n in (1, 2)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, events)))
    text = made(folder).text
    assert "1 MB" in text
    assert "Training loss" in text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0.0 s"), (9.94, "9.9 s"), (59.6, "1 min"), (75, "1 min 15 s"), (3725, "1 h 2 min")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_what_is_promised_stands_in_the_report_and_nothing_where_nothing_is(run_folder: Callable[..., Path]) -> None:
    place = run_folder()
    assert "What is promised" not in page(read_run(place))
    result = json.loads((place / "result.json").read_text(encoding="utf-8"))
    result["guarantee"] = ["epsilon 2.1 of 8 (delta 1e-05, per client), 40 releases.", "- The noise is <secret>."]
    (place / "result.json").write_text(json.dumps(result), encoding="utf-8")
    shown = page(read_run(place))
    assert "What is promised" in shown and "<li>The noise is &lt;secret&gt;.</li>" in shown
