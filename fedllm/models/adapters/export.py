"""Export - adapters as files that other programs load, and back.

Kinds that PEFT has are written in PEFT's folder format, which serving and fine-tuning programs read. The others get
the same two files in a format of our own, and every kind that is a change of weights can also be written as a
complete model.
"""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from fedllm.core.errors import ModelError, RunError, nearest
from fedllm.core.settings import read
from fedllm.core.tensors import Tensors, finite
from fedllm.models.adapters import peft_format
from fedllm.models.adapters.attach import Adapted
from fedllm.models.adapters.settings import AdapterSettings
from fedllm.models.load import quiet
from fedllm.models.structure import head, role

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OWN_TYPE = "FEDLLM"
"""What stands for `peft_type` in a folder that PEFT cannot read."""
UNMERGEABLE = ("prompt", "prefix", "bottleneck", "context")
"""Kinds that are no change of weights."""
EXTRAS = {"personal": (".personal.", ".lora_B"), "bridge": ("bridge.", ".lora_B")}
"""Options that add tensors to the plain adapter: what their names hold, and the end of those that are 0 when idle."""
_FACTS = "fedllm"  # the key of our own record in the metadata of the weights file; PEFT does not look there


def save_adapter(folder: str | Path, adapted: Adapted, params: Tensors, extra: Mapping[str, Any] | None = None) -> None:
    """Write `params` into `folder` as adapter_config.json and adapter_model.safetensors, with a README.

    lora, ia3, prompt and prefix are in PEFT's format: `PeftModel.from_pretrained(base, folder)` gives the same
    outputs. The folder appears whole or not at all; an adapter that this function wrote there before is replaced.

    Args:
        folder: where to; its parents are made.
        adapted: the model that the tensors belong to.
        params: all trainable tensors, without a client axis; LoRA may have any rank, the same in every layer.
        extra: facts to keep with it (JSON), such as the run it comes from.

    Raises:
        ModelError: the tensors are not those of this adapter, or are not finite.
        RunError: the folder holds something else, or cannot be written.
    """
    folder, (settings, held) = Path(folder), _shared(adapted, _checked(adapted, params))
    as_peft = peft_format.has(adapted) and not any(getattr(settings, option) for option in EXTRAS)
    config, tensors = peft_format.to_peft(adapted, held) if as_peft else (_own_config(adapted, settings), held)
    facts = {
        "settings": settings.model_dump(mode="json"),
        "base": adapted.loaded.name,
        "fingerprint": adapted.loaded.fingerprint,
        "tensors": list(held),
        "extra": dict(extra or {}),
    }
    with _replacing(folder, _is_ours(folder)) as place:
        apart = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        # One key only: the library writes several in a random order, and equal adapters must be equal files.
        save_file(apart, place / WEIGHTS, {_FACTS: json.dumps(facts, sort_keys=True)})
        (place / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        (place / "README.md").write_text(_readme(adapted, facts, as_peft), encoding="utf-8")


def save_merged(folder: str | Path, adapted: Adapted, params: Tensors) -> None:
    """Write a complete model with the adapter inside its weights, and its tokenizer, as transformers writes them.

    LoRA is W + scale * B A; IA3 scales what comes out of a layer, or goes into a down projection; biases, heads and
    full weights take their place. Sums are formed in float32 and rounded once to the number type of the base. The
    configuration is that of the loaded base: its dropout is 0.

    Args:
        folder: where to, new or empty; its parents are made.
        adapted: the model that the tensors belong to.
        params: all trainable tensors, without a client axis.

    Raises:
        ModelError: the kind cannot be merged, the base is quantised, or the tensors do not fit.
        RunError: the folder holds something, or cannot be written.
    """
    kind, model = adapted.settings.kind, adapted.model
    if kind in UNMERGEABLE:
        raise ModelError(
            f"An adapter of kind {kind} is no change of weights and cannot be merged into the model.",
            "Kinds that can: lora, ia3, bitfit, head, full.",
            action="Save it as an adapter.",
        )
    state = dict(model.state_dict())
    settings, held = _shared(adapted, _checked(adapted, params))
    extra = next((option for option in EXTRAS if getattr(settings, option)), None)
    if extra is not None:
        raise ModelError(
            f"This adapter has adapter.{extra}={getattr(settings, extra)}, which cannot be merged into the model.",
            action="Save it as an adapter.",
        )
    state.update(_everywhere(model, _merged(adapted, held)))
    config = copy.deepcopy(model.config)
    for part in (config, config.get_text_config()):
        if hasattr(part, "use_cache"):
            part.use_cache = True  # switched off for training
    config.architectures, config.dtype = [type(model).__name__], model.dtype
    with _replacing(Path(folder), False) as place, quiet():
        model.save_pretrained(place, state_dict=state)
        config.save_pretrained(place)
        if adapted.loaded.tokenizer is not None:
            adapted.loaded.tokenizer.save_pretrained(place)


def load_adapter(folder: str | Path) -> tuple[AdapterSettings, Tensors]:
    """Read an adapter that :func:`save_adapter` or PEFT wrote.

    Returns:
        The settings and the tensors under our names. What this program wrote comes back bit by bit; of what PEFT
        wrote, `targets` are its target modules.

    Raises:
        ModelError: no adapter, damaged, not finite, of a PEFT type or with a PEFT option that fedllm does not have.
    """
    folder = Path(folder)
    config, stored, facts = _read(folder)
    if config.get("peft_type") == OWN_TYPE:
        settings, params = read(AdapterSettings, config.get("settings", {}), "adapter"), stored
    else:
        settings, params = peft_format.from_peft(config, stored)
    if facts:
        missing = [name for name in facts["tensors"] if name not in params]
        if missing:
            raise ModelError(f"The adapter in {folder} is damaged: it lacks the tensor '{missing[0]}'.")
        settings = _agreed(settings, read(AdapterSettings, facts["settings"], "adapter"))
        params = {name: params[name] for name in facts["tensors"]}
    if (bad := finite(params)) is not None:
        raise ModelError(f"The adapter in {folder} holds numbers that are not finite, in '{bad}'.")
    return settings, params


# --- what is saved -----------------------------------------------------------------------------------------------


def _checked(adapted: Adapted, params: Tensors) -> Tensors:
    """`params` in the order of the adapter, after a check of names, shapes, ranks and numbers."""
    expected, kind = adapted.initial(), adapted.settings.kind
    missing, strange = [n for n in expected if n not in params], [n for n in params if n not in expected]
    if missing or strange:
        first = f"'{missing[0]}' is missing" if missing else f"'{strange[0]}' does not belong to it"
        raise ModelError(
            f"These are not the tensors of this {kind} adapter: {first}.",
            f"It has {len(expected)} tensors.",
            nearest(strange[0], expected) if strange else None,
        )
    plain = [name for name in expected if _option(name) is None]
    rank = next((params[name].shape[0] for name in plain if name.endswith(".lora_A")), None)
    for name, like in expected.items():
        shape, given = list(like.shape), list(params[name].shape)
        if name in plain and name.endswith((".lora_A", ".lora_B")):
            shape[name.endswith(".lora_B")] = rank
        if given != shape:
            raise ModelError(
                f"'{name}' has the shape {given}.",
                f"Expected: {shape}.",
                action="A LoRA rank must be the same in every layer: pad with zeros." if rank else "",
            )
    if (bad := finite(params)) is not None:
        raise ModelError(f"'{bad}' holds numbers that are not finite, so nothing was saved.")
    return {name: params[name].detach().cpu() for name in expected}


def _option(name: str) -> str | None:
    """The option of the adapter that a tensor beside the plain adapter belongs to."""
    return next((option for option, (belongs, _) in EXTRAS.items() if belongs in name), None)


def _shared(adapted: Adapted, params: Tensors) -> tuple[AdapterSettings, Tensors]:
    """Settings and tensors without those parts that methods add and that do nothing here, such as private ones."""
    idle = [
        option
        for option, (belongs, decides) in EXTRAS.items()
        if getattr(adapted.settings, option)
        and not any(bool(t.any()) for name, t in params.items() if belongs in name and name.endswith(decides))
    ]
    kept = {name: tensor for name, tensor in params.items() if _option(name) not in idle}
    return adapted.settings.model_copy(update=dict.fromkeys(idle, 0)), kept


def _own_config(adapted: Adapted, settings: AdapterSettings) -> dict[str, Any]:
    """What adapter_config.json says of a kind that PEFT does not have."""
    labels = getattr(adapted.model.config, "id2label", None) if head(adapted.model) else None
    return {
        "peft_type": OWN_TYPE,
        "kind": settings.kind,
        "settings": settings.model_dump(mode="json"),
        "base_model_name_or_path": adapted.loaded.name,
        "loaded_as": adapted.loaded.kind,
        "labels": [labels[number] for number in sorted(labels)] if labels else None,
    }


# --- merging -----------------------------------------------------------------------------------------------------


def _merged(adapted: Adapted, params: Tensors) -> Tensors:
    """New values of parameters of the base by name, float32 where they were computed."""
    model, scale, result = adapted.model, adapted.settings.alpha / adapted.settings.rank, {}
    for name, value in params.items():
        owner, _, part = name.rpartition(".")
        if part == "lora_A":
            layer = _plain(model, owner)
            change = scale * (params[f"{owner}.lora_B"].float() @ value.float())
            result[f"{owner}.weight"] = _numbers(layer.weight) + (change.T if peft_format.transposed(layer) else change)
        elif part == "ia3":
            layer, after = _plain(model, owner), role(owner) != "down"
            by_row = after != peft_format.transposed(layer)
            result[f"{owner}.weight"] = _numbers(layer.weight) * (value.unsqueeze(1) if by_row else value)
            if after and layer.bias is not None:
                result[f"{owner}.bias"] = _numbers(layer.bias) * value
        elif part != "lora_B":
            result[name] = value
    return result


def _numbers(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.detach().float().cpu()


def _plain(model: nn.Module, name: str) -> Any:
    """The linear layer `name`; raises :class:`ModelError` where its weight is not a plain matrix of numbers."""
    layer = model.get_submodule(name)
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
        raise ModelError(
            f"The layer '{name}' is quantised, so nothing can be merged into it.",
            action="Load the model without `quantize` to merge, or save the adapter.",
        )
    return layer


def _everywhere(model: nn.Module, changed: Tensors) -> Tensors:
    """`changed` in the type of the base, under every name that a tied parameter has."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    result: Tensors = {}
    for name, value in changed.items():
        original = model.get_parameter(name)
        result.update(dict.fromkeys(names[id(original)], value.to(original).contiguous()))
    return result


# --- files -------------------------------------------------------------------------------------------------------


def _read(folder: Path) -> tuple[dict[str, Any], Tensors, dict[str, Any]]:
    """The configuration, the stored tensors and our own record (empty where another program wrote the folder)."""
    if not (folder / CONFIG).is_file():
        raise ModelError(f"{folder} holds no adapter: there is no {CONFIG}.", action="Name the folder of an adapter.")
    if not (folder / WEIGHTS).is_file():
        raise ModelError(
            f"{folder} has no {WEIGHTS}.",
            "Weights are read from safetensors only: other formats can hold program code.",
            action="Save it again with a current PEFT, which writes safetensors.",
        )
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        with safe_open(folder / WEIGHTS, "pt") as file:
            facts = json.loads((file.metadata() or {}).get(_FACTS, "{}"))
            return {**config}, {name: file.get_tensor(name) for name in file.keys()}, {**facts}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError) as fault:
        raise ModelError(
            f"The adapter in {folder} is damaged: {fault}.", action="Copy or download it again."
        ) from fault


def _is_ours(folder: Path) -> bool:
    """Whether :func:`save_adapter` wrote this folder."""
    try:
        return bool(_read(folder)[2])
    except ModelError:
        return False


def _agreed(configured: AdapterSettings, own: AdapterSettings) -> AdapterSettings:
    """Our own record, where the configuration beside it says the same."""
    scales = [settings.alpha / settings.rank for settings in (configured, own)]
    if configured.kind != own.kind or (own.kind == "lora" and not math.isclose(*scales)):
        raise ModelError(
            f"{CONFIG} was changed: it says {configured.kind} with alpha / rank = {scales[0]:g}.",
            f"The weights were saved as {own.kind} with {scales[1]:g}.",
            action="Restore it.",
        )
    return own


@contextmanager
def _replacing(folder: Path, ours: bool) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place at the end; where writing fails nothing has changed.

    Args:
        folder: where to.
        ours: whether what is there may go.
    """
    folder = folder.resolve()
    if folder.exists() and not ours and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"{folder} exists and holds something else.", action="Choose another folder.")
    place = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    old = place.with_name(f"{place.name}.old")
    try:
        place.mkdir(parents=True)
        yield place
        for file in (found for found in place.rglob("*") if found.is_file()):
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        if folder.exists():
            folder.rename(old)
        place.rename(folder)
    except (OSError, SafetensorError) as fault:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise RunError(f"{folder} cannot be written: {fault}.", action="Free space or choose another.") from fault
    finally:
        shutil.rmtree(place, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


_WITH_PEFT = """\
from peft import PeftModel

model = PeftModel.from_pretrained(base, "THIS_FOLDER")  # base: the model named above, loaded with transformers"""

_WITH_FEDLLM = """\
from fedllm.models.adapters.attach import Adapted
from fedllm.models.adapters.export import load_adapter
from fedllm.models.load import load_model
from fedllm.models.settings import ModelSettings

settings, params = load_adapter("THIS_FOLDER")
base = load_model(ModelSettings(name={name!r}), {kind!r}, labels={labels!r})
adapted = Adapted(base, settings, seed=0)
with adapted.using({{name: tensor.unsqueeze(0) for name, tensor in params.items()}}):
    output = adapted.call(inputs)"""


def _readme(adapted: Adapted, facts: dict[str, Any], as_peft: bool) -> str:
    """What the folder is and how to load it."""
    loaded, labels = adapted.loaded, _own_config(adapted, adapted.settings)["labels"]
    how = _WITH_PEFT if as_peft else _WITH_FEDLLM.format(name=loaded.name, kind=loaded.kind, labels=labels)
    about = json.dumps({"settings": facts["settings"], "extra": facts["extra"]}, indent=1, sort_keys=True)
    return f"""\
# An adapter trained by fedllm

- base model: `{loaded.name}` ({loaded.family}, loaded as {loaded.kind})
- SHA-256 of the base weights: `{loaded.fingerprint}`
- kind: {adapted.settings.kind}{"" if as_peft else ", for which PEFT has no format"}

## Load it

```python
{how}
```

## Facts

```json
{about}
```
"""
