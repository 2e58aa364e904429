"""Private store - declared names only, staged until settled, files that are never rewritten."""

from __future__ import annotations

import errno
import gc
import os
import tempfile
import weakref
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedllm.core.errors import ConfigError, RunError
from fedllm.core.wire import decode
from fedllm.engine.private import BUDGET, PrivateStore

NAMES = ("control", "note", "params")


@pytest.fixture(params=["memory", "folder", "memory, no room", "folder, no room"])
def store(request: Any, tmp_path: Path) -> PrivateStore:
    folder = tmp_path / "private" if request.param.startswith("folder") else None
    return PrivateStore(NAMES, folder, 0 if request.param.endswith("no room") else BUDGET)


def entry(store: PrivateStore, client: str) -> dict[str, Any]:
    view = store.open(client)
    store.drop(client)
    return dict(view.items())


def keep(store: PrivateStore, client: str, **values: Any) -> None:
    view = store.open(client)
    for name, value in values.items():
        view[name] = value
    store.rest(client)
    store.settle([client])


# -- names and values -------------------------------------------------------------------------------------------------


def test_only_declared_names(store: PrivateStore) -> None:
    view = store.open("a")
    for use in (
        lambda: view["contrl"],
        lambda: view.get("contrl"),
        lambda: view.__setitem__("contrl", 1),
        lambda: "contrl" in view,
    ):
        with pytest.raises(
            ConfigError, match=r"'contrl' is not declared.*Declared: control, note, params\. Did you mean 'control'\?"
        ):
            use()
    with pytest.raises(ConfigError, match="Declared: nothing"):
        PrivateStore(()).open("a")["x"] = 1


def test_a_declared_name_that_is_not_there_yet(store: PrivateStore) -> None:
    view = store.open("a")
    assert view.get("control") is None
    assert "control" not in view
    assert (len(view), list(view)) == (0, [])
    with pytest.raises(KeyError):
        view["control"]
    with pytest.raises(KeyError):
        del view["control"]


def test_tensors_and_json_come_back(store: PrivateStore) -> None:
    tensors = {"w": torch.tensor([1.0, float("inf")]), "h": torch.ones(2, dtype=torch.bfloat16), "n": torch.tensor(3)}
    keep(store, "a", control=tensors, note={"list": [1, None, 2.5], "text": "x"}, params={})
    found = entry(store, "a")
    assert found["note"] == {"list": [1, None, 2.5], "text": "x"}
    assert found["params"] == {}
    assert found["control"].keys() == tensors.keys()
    assert all(torch.equal(found["control"][n], t) and found["control"][n].dtype == t.dtype for n, t in tensors.items())


@pytest.mark.parametrize(
    "value",
    [numpy.int64(3), torch.ones(1), {"w": torch.ones(1), "n": 1}, {"deep": {"w": torch.ones(1)}}, {1, 2}, object()],
)
def test_what_could_not_be_read_again_is_refused_at_once(store: PrivateStore, value: Any) -> None:
    """Not when the round is over and half of the clients are already written."""
    view = store.open("a")
    with pytest.raises(ConfigError, match=r"'note' cannot be stored.*Allowed"):
        view["note"] = value
    assert "note" not in view


def test_later_changes_of_a_value_do_not_reach_the_store(store: PrivateStore) -> None:
    tensor, numbers = torch.ones(2, requires_grad=True), [1, 2]
    view = store.open("a")
    view["control"], view["note"] = {"w": tensor}, numbers
    with torch.no_grad():
        tensor.add_(5)
    numbers.append(3)
    store.settle(["a"])
    assert entry(store, "a")["control"]["w"].tolist() == [1.0, 1.0]
    assert not entry(store, "a")["control"]["w"].requires_grad
    assert entry(store, "a")["note"] == [1, 2]


def test_views_of_one_client_share_nothing(store: PrivateStore) -> None:
    keep(store, "a", control={"w": torch.ones(2)})
    first = store.open("a")
    first["control"]["w"].add_(9)
    store.drop("a")
    assert entry(store, "a")["control"]["w"].tolist() == [1.0, 1.0]


# -- staged until settled ---------------------------------------------------------------------------------------------


def test_nothing_is_kept_before_it_is_settled(store: PrivateStore) -> None:
    store.open("a")["note"] = 1
    assert store.clients() == []
    assert entry(store, "b") == {}


def test_settle_keeps_the_accepted_and_drops_the_others(store: PrivateStore) -> None:
    for client in "abc":
        keep(store, client, note=0)
    for client in "abc":
        store.open(client)["note"] = 1
    store.settle(["a", "c"])
    assert [entry(store, c)["note"] for c in "abc"] == [1, 0, 1]
    store.settle(["a", "b", "c"])
    assert [entry(store, c)["note"] for c in "abc"] == [1, 0, 1], "what was dropped does not come back"


def test_a_dropped_turn_rolls_back_to_what_was_kept(store: PrivateStore) -> None:
    keep(store, "a", note=1, control={"w": torch.ones(1)})
    view = store.open("a")
    view["note"] = 2
    del view["control"]
    store.drop("a")
    store.settle(["a"])
    assert entry(store, "a")["note"] == 1
    assert "control" in entry(store, "a")


def test_deleting_is_kept_too(store: PrivateStore) -> None:
    keep(store, "a", note=1, params={"w": torch.ones(1)})
    view = store.open("a")
    del view["note"]
    store.settle(["a"])
    assert set(entry(store, "a")) == {"params"}


def test_a_view_is_dead_after_it_was_settled(store: PrivateStore) -> None:
    view = store.open("a")
    view["note"] = 1
    store.settle(["a"])
    view["note"] = 2
    assert entry(store, "a")["note"] == 1


def test_settling_clients_that_were_never_opened_is_nothing(store: PrivateStore) -> None:
    store.settle(["x", "y"])
    assert store.clients() == []


def test_clients_that_change_nothing_cost_nothing(store: PrivateStore) -> None:
    for n in range(1000):
        view = store.open(f"c{n}")
        view.get("control")
    store.settle([f"c{n}" for n in range(1000)])
    assert store.clients() == []
    assert store.manifest() == {}
    assert store.folder is None or not store.folder.exists()


def test_clients_do_not_see_each_other(store: PrivateStore) -> None:
    keep(store, "a", note="mine")
    keep(store, "a/../b", note="theirs")
    assert entry(store, "b") == {}
    assert entry(store, "a") == {"note": "mine"}
    assert entry(store, "a/../b") == {"note": "theirs"}


def test_two_turns_before_settling_build_on_each_other(store: PrivateStore) -> None:
    store.open("a")["note"] = 1
    second = store.open("a")
    second["params"] = {"w": torch.ones(1)}
    store.settle(["a"])
    assert set(entry(store, "a")) == {"note", "params"}


def test_dropping_a_second_turn_goes_back_to_the_first(store: PrivateStore) -> None:
    """Also where the second changed a tensor in place."""
    store.open("a")["control"] = {"w": torch.ones(2)}
    second = store.open("a")
    second["control"]["w"].add_(5)  # type: ignore[index,union-attr]
    second["note"] = 2
    store.drop("a")
    store.settle(["a"])
    assert set(entry(store, "a")) == {"control"}
    assert entry(store, "a")["control"]["w"].tolist() == [1.0, 1.0]


def test_many_turns_before_settling_keep_one_copy_to_go_back_to(store: PrivateStore) -> None:
    views = []
    for number in range(20):
        view = store.open("a")
        view["note"] = number
        views.append(view)
    assert sum(view.before is not None for view in views) == 1
    store.drop("a")
    store.settle(["a"])
    assert entry(store, "a")["note"] == 18


# -- files ------------------------------------------------------------------------------------------------------------


def files(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()} if folder.exists() else set()


def test_files_are_messages_and_hold_no_client_name(tmp_path: Path) -> None:
    store = PrivateStore(NAMES, tmp_path)
    keep(store, "../evil name\x00", note="x")
    (name,) = files(tmp_path)
    assert name.endswith(".safetensors")
    assert set(name.removesuffix(".safetensors")) <= set("0123456789abcdef")
    assert decode((tmp_path / name).read_bytes()).numbers == {"note": "x"}


def test_a_file_is_never_rewritten(tmp_path: Path) -> None:
    store = PrivateStore(NAMES, tmp_path)
    keep(store, "a", note=1)
    (first,) = files(tmp_path)
    content = (tmp_path / first).read_bytes()
    keep(store, "a", note=2)
    assert len(files(tmp_path)) == 2
    assert (tmp_path / first).read_bytes() == content
    keep(store, "a", note=1)
    assert len(files(tmp_path)) == 2, "the same content is the same file"


def test_two_clients_with_the_same_content_have_their_own_files(tmp_path: Path) -> None:
    store = PrivateStore(NAMES, tmp_path)
    keep(store, "a", note=1)
    keep(store, "b", note=1)
    assert len(set(store.manifest().values())) == 2


def test_a_checkpoint_brings_back_what_was_kept_then(tmp_path: Path) -> None:
    store = PrivateStore(NAMES, tmp_path)
    keep(store, "a", note=1)
    then = store.manifest()
    keep(store, "a", note=2)
    keep(store, "b", note=3)
    store.open("a")["note"] = 9
    fresh = PrivateStore(NAMES, tmp_path)
    for one in (store, fresh):
        one.restore(then)
        assert one.clients() == ["a"]
        assert entry(one, "a") == {"note": 1}
        assert entry(one, "b") == {}
        one.settle(["a"])
        assert entry(one, "a") == {"note": 1}, "nothing staged survives"
    keep(fresh, "a", note=5)
    assert then == {"a": then["a"]}, "the manifest is a copy"


def test_pruning_keeps_what_any_checkpoint_names(tmp_path: Path) -> None:
    store = PrivateStore(NAMES, tmp_path)
    manifests = []
    for number in range(4):
        keep(store, "a", note=number)
        keep(store, f"b{number}", note=number)
        manifests.append(store.manifest())
    (tmp_path / "left.partial").write_bytes(b"half a file")
    store.prune(manifests[2:])
    assert files(tmp_path) == {name for manifest in manifests[2:] for name in manifest.values()}
    store.prune([])
    assert files(tmp_path) == set(store.manifest().values()), "what is in use is never removed"
    assert entry(store, "a") == {"note": 3}
    PrivateStore(NAMES, tmp_path / "nowhere").prune([])
    PrivateStore(NAMES).prune([])


def test_a_crash_while_writing_leaves_no_file_under_a_final_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = PrivateStore(NAMES, tmp_path)
    keep(store, "a", note=1)

    def crash(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    store.open("a")["note"] = 2
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            store.settle(["a"])
    assert files(tmp_path) == set(store.manifest().values())
    fresh = PrivateStore(NAMES, tmp_path)
    fresh.restore(store.manifest())
    assert entry(fresh, "a") == {"note": 1}


def test_a_full_disk_is_an_error_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = PrivateStore(NAMES, tmp_path)
    keep(store, "a", note=1)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store.open("a")["note"] = 2
    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(
            RunError, match=r"client 'a' cannot be written: .*No space left.*Nothing written before is lost"
        ):
            store.settle(["a"])
    assert len(files(tmp_path)) == 1
    assert entry(store, "a") == {"note": 1}


@pytest.mark.parametrize("damage", ["gone", "cut", "other"])
def test_a_damaged_file_is_an_error_that_names_the_client(tmp_path: Path, damage: str) -> None:
    store = PrivateStore(NAMES, tmp_path)
    keep(store, "a", params={"w": torch.ones(100)})
    file = tmp_path / store.manifest()["a"]
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:200] if damage == "cut" else b"something else entirely")
    with pytest.raises(RunError, match="private entry of client 'a' cannot be read"):
        store.open("a")


def test_entries_in_memory_are_not_part_of_a_checkpoint() -> None:
    store = PrivateStore(NAMES)
    keep(store, "a", note=1)
    assert store.clients() == ["a"]
    assert store.manifest() == {}


# -- the budget -------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(["set", "read", "drop", "keep", "lose"])), max_size=30)
)
def test_a_store_without_room_holds_the_same(steps: list[tuple[str, str]]) -> None:
    with tempfile.TemporaryDirectory() as place:
        stores = [PrivateStore(NAMES), PrivateStore(NAMES, None, 0), PrivateStore(NAMES, Path(place), 0)]
        for number, (client, step) in enumerate(steps):
            for store in stores:
                if step in ("set", "read"):
                    view = store.open(client)
                    if step == "set":
                        view["params"] = {"w": torch.full((3,), float(number))}
                    store.rest(client)
                elif step == "drop":
                    store.drop(client)
                else:
                    store.settle([client] if step == "keep" else [])
                stores[2].prune([])
            seen = [repr(sorted(dict(view).items())) for view in [store.open(client) for store in stores]]
            for store in stores:
                store.drop(client)
            assert seen[0] == seen[1] == seen[2], (number, step)
            assert stores[0].clients() == stores[1].clients() == stores[2].clients()


def test_resting_entries_leave_memory_beyond_the_budget(tmp_path: Path) -> None:
    store, big, views = PrivateStore(NAMES, tmp_path, 3000), torch.ones(500), list[Any]()
    for number in range(4):
        view = store.open(f"c{number}")
        view["params"] = {"w": big * number}
        assert len(files(tmp_path)) == (0 if number < 2 else 2), "two of 2,000 bytes pass 3,000"
        store.rest(f"c{number}")
        views.append(weakref.ref(view))
        del view
    gc.collect()
    assert not any(view() for view in views) and len(files(tmp_path)) == 4
    assert store.manifest() == {}, "nothing is kept before the round is settled"
    store.settle(["c1", "c3"])
    assert set(store.manifest()) == {"c1", "c3"} and len(files(tmp_path)) == 4
    store.prune([])
    assert files(tmp_path) == set(store.manifest().values())
    kept = entry(store, "c3")["params"]
    assert torch.equal(kept["w"], big * 3)


def test_a_temporary_folder_ends_with_its_store() -> None:
    store = PrivateStore(NAMES, None, 0)
    keep(store, "a", note=1)
    place = store._place()
    assert len(files(place)) == 1 and store.manifest() == {} and entry(store, "a") == {"note": 1}
    if os.name == "posix":
        assert place.stat().st_mode & 0o077 == 0, "for its owner alone"
    del store
    gc.collect()
    assert not place.exists()
