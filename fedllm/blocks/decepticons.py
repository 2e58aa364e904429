"""Decepticons - a malicious server reshapes a transformer so that one gradient spells out the client's tokens.

The server changes values, never shapes. A first attention block writes a fingerprint of the sentence (the tag) into
every position; the first FFN matrix of every block then measures one direction m of its input u, row j with the cut
c_j. Rows whose cut lies below <m, u> fire, so the difference of the gradients of neighbouring rows holds the tokens
between two cuts only; where that is one token, weight difference / bias difference is its FFN input exactly.

Source: Fowl et al., Decepticons, ICLR 2023, arXiv:2201.12675. What differs here, and why:

* The norms before and behind attention become plain (weight 1, bias 0), so an FFN input is known up to scale and shift.
* One reserved coordinate is set at position 0 only, and every query reads it: with the position embedding itself as the
  query, other positions win where embeddings are not trained, and the number of heads would matter.
* Models that see both sides take the mean over positions as tag: in BERT position 0 holds [CLS] in every sentence.
* Blocks share an edge cut, so that no difference is taken across two blocks, whose gradients are not quite equal.
* Tokens and positions are matched in one search: the input of token t at p has correlation 1 with token_t + position_p.
* What collided, and the last position of a causal model (which no loss depends on), is sought in the output head: the
  gradient row of a label is minus the final state of the position before it.

It needs the gradient of all parameters, dropout off, float32 or better, and learned absolute positions. Clipping and
sums over clients do not stop it; noise per coordinate and frozen FFNs do. Tokens that repeat at the same position, as
[CLS] does, share a bin. :func:`suspicious` is the client's guard.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import layer_norm, normalize

from fedllm.core.errors import ConfigError, DataError, ModeConflict, ModelError, UploadRejected, nearest
from fedllm.core.tensors import Tensors, finite

SURE = 0.99
"""Correlation with token + position from which a breached input counts as found; a lone token has 1."""
TOGETHER = 0.999
"""Correlation of tags from which two inputs are of one sentence; it is 1 up to rounding."""
ELSEWHERE = 0.25
"""Weight of a token that the gradient of the embeddings does not show."""
QUERY = 100.0
"""The query that looks at position 0, s in the card. The card's 1e8 is no sharper, but in float32 fused attention
recomputes its weights from scores too large to be exact, and the embedding's gradient becomes NaN."""
SHARP = 1e5
"""Factor on the first FFN matrix and its cuts where the activation is smooth: at this scale GELU is a ReLU but for a
width of 1 / SHARP around each cut. Bins stay approximate: a token that near to a cut spoils two bins."""
RANK_ONE = 0.999
"""Share of a matrix's energy in one direction from which :func:`suspicious` takes it for rank 1."""
NARROW = 16
"""Matrices whose shorter side is below this are not judged: the factors of low-rank adapters are honest there."""
HUGE = 1e4
"""Magnitude above which no honest weight lies."""
CELLS = 20_000_000
"""Most correlations held at once."""
SMOOTH = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python", "quick_gelu", "silu", "swish")
ROTARY = ("rotary positions, not learned ones", "llama mistral mixtral qwen2 qwen3 gemma gemma2 gemma3 phi3 gpt_neox")
RELATIVE = ("relative positions, not learned absolute ones", "t5 mt5 umt5 deberta deberta-v2 xlnet bloom mpt")

Names = tuple[str, str]
"""A weight and its bias."""


@dataclass(frozen=True)
class Linear:
    """The names of a linear map; `transposed` for weights stored [in, out], `start` its first output where fused."""

    weight: str
    bias: str
    transposed: bool = False
    start: int = 0

    def write(self, state: Tensors, matrix: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """Put matrix [out, in] and bias [out] (None: zeros) into the state, in place."""
        rows = slice(self.start, self.start + len(matrix))
        stored = state[self.weight]
        (stored.T if self.transposed else stored)[rows] = matrix.to(stored.dtype)
        state[self.bias][rows] = 0 if bias is None else bias.to(state[self.bias].dtype)


@dataclass(frozen=True)
class Block:
    """The roles of one block. In a post-norm model the two norms stand behind attention and behind the FFN."""

    norms: tuple[Names, Names]
    query: Linear
    key: Linear
    value: Linear
    output: Linear
    ffn_in: Linear
    ffn_out: Linear


@dataclass(frozen=True)
class Layout:
    """Which tensor of a transformer plays which role.

    Attributes:
        token, position, kind: embeddings [V, d], [P, d] and of segments (None: there are none; row 0 is used).
        norms: outside of the blocks: behind the embeddings (post-norm) or behind the last block (pre-norm).
        blocks: in order.
        head, head_bias: output weight [V, d] (the token embedding where tied) and its bias.
        causal: positions see only those before, and norms stand before their layers; else neither.
        smooth: the activation is not a ReLU.
        width, epsilon: d; what layer norms add to the variance.
        shapes: of all tensors named here.
    """

    token: str
    position: str
    kind: str | None
    norms: tuple[Names, ...]
    blocks: tuple[Block, ...]
    head: str
    head_bias: str | None
    causal: bool
    smooth: bool
    width: int
    epsilon: float
    shapes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Key:
    """What the server keeps to read the gradient of a corrupted state.

    Attributes:
        tag: coordinates that carry the sentence; coordinate `tag` marks position 0, the last one is the output lane.
        blocks: indices of the blocks that hold bins, in the order of their cuts.
        tokens, positions: the embeddings as sent, [V, d] and [T, d].
        mean, spread: of <m, u>, from which the cuts follow.
    """

    tag: int
    blocks: tuple[int, ...]
    tokens: torch.Tensor
    positions: torch.Tensor
    mean: float
    spread: float


@dataclass(frozen=True)
class Reading:
    """What one gradient told.

    Attributes:
        tokens: [batch, length]; -1 where nothing is known. The order of the sentences carries no meaning.
        found: cells whose token and position were read with certainty (:data:`SURE`).
        confidence: [batch, length], 0 to 1: a correlation with what is expected.
    """

    tokens: torch.Tensor
    found: int
    confidence: torch.Tensor


# -- layouts -----------------------------------------------------------------------------------------------------------


def layout_of(shapes: Mapping[str, Sequence[int]], family: str, activation: str = "gelu") -> Layout:
    """The layout of a model from the names and shapes of its parameters.

    Args:
        shapes: by name, with or without the leading ``transformer.`` or ``bert.``.
        family: ``gpt2`` or ``bert``.
        activation: of the FFN, as Hugging Face names it. A smooth one is allowed; its bins are approximate.

    Raises:
        ModeConflict: a family or an activation that the attack cannot use.
        ModelError: a family without a layout, or tensors that are missing or of another shape.
    """
    for why, names in (ROTARY, RELATIVE):
        if family in names.split():
            raise ModeConflict(f"The attack cannot use '{family}': it has {why}.", "Allowed: gpt2, bert.")
    builders = {"gpt2": _gpt2, "bert": _bert}
    if family not in builders:
        raise ModelError(f"There is no layout of '{family}'.", "Allowed: gpt2, bert.", nearest(family, builders))
    if activation not in ("relu", *SMOOTH):
        allowed = f"Allowed: relu, {', '.join(SMOOTH)}."
        raise ModeConflict(f"The attack cannot use the activation '{activation}'.", allowed)
    found = builders[family](shapes, activation != "relu")
    expected = _expected(found, shapes)
    for name, size in expected.items():
        given = tuple(shapes.get(name, ()))
        if len(given) != len(size) or any(b not in (0, a) for a, b in zip(given, size, strict=True)):
            raise ModelError(
                f"The model has '{name}' in shape {given}." if given else f"The model has no '{name}'.",
                f"A {family} of width {found.width} has it in shape {size} (0: any).",
                action="Give the parameters of the whole model.",
            )
    roles = {*expected, found.head, found.head_bias, found.kind}
    return replace(found, shapes={name: tuple(shape) for name, shape in shapes.items() if name in roles})


def _expected(layout: Layout, shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """The shapes that the roles ask for; 0 is any size."""
    d = layout.width
    expected: dict[str, tuple[int, ...]] = {layout.token: (0, d), layout.position: (0, d)}
    norms = [*layout.norms, *(norm for block in layout.blocks for norm in block.norms)]
    expected |= {name: (d,) for norm in norms for name in norm}
    for block in layout.blocks:
        inner = (tuple(shapes.get(block.ffn_in.bias, ())) or (0,))[0]
        outs = 3 * d if block.query.weight == block.key.weight else d
        sizes = [(block.output, (d, d)), (block.ffn_in, (inner, d)), (block.ffn_out, (d, inner))]
        for linear, size in [*sizes, *((one, (outs, d)) for one in (block.query, block.key, block.value))]:
            expected |= {linear.weight: size[::-1] if linear.transposed else size, linear.bias: size[:1]}
    return expected


def _opened(shapes: Mapping[str, Sequence[int]], lead: str, token: str, block: str) -> tuple[str, int, list[str]]:
    """The prefix, the width and the prefixes of the blocks."""
    prefix = lead if lead + token in shapes else ""
    missing = f"{prefix}{block}0." if len(shapes.get(prefix + token, ())) == 2 else f"{lead}{token}"
    count = 0
    while any(name.startswith(f"{prefix}{block}{count}.") for name in shapes):
        count += 1
    if count == 0 or missing == lead + token:
        raise ModelError(f"The model has no '{missing}'.", action="Give the parameters of the whole model.")
    return prefix, int(shapes[prefix + token][1]), [f"{prefix}{block}{i}." for i in range(count)]


def _names(name: str) -> Names:
    return f"{name}.weight", f"{name}.bias"


def _gpt2(shapes: Mapping[str, Sequence[int]], smooth: bool) -> Layout:
    p, d, leads = _opened(shapes, "transformer.", "wte.weight", "h.")
    blocks = []
    for at in leads:
        inner = [Linear(*_names(f"{at}attn.c_attn"), True, k * d) for k in range(3)]
        inner += [Linear(*_names(at + name), True) for name in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
        blocks.append(Block((_names(f"{at}ln_1"), _names(f"{at}ln_2")), *inner))
    token, norms = f"{p}wte.weight", (_names(f"{p}ln_f"),)
    head = "lm_head.weight" if "lm_head.weight" in shapes else token
    return Layout(token, f"{p}wpe.weight", None, norms, tuple(blocks), head, None, True, smooth, d, 1e-5, {})


def _bert(shapes: Mapping[str, Sequence[int]], smooth: bool) -> Layout:
    p, d, leads = _opened(shapes, "bert.", "embeddings.word_embeddings.weight", "encoder.layer.")
    names = [f"attention.self.{role}" for role in ("query", "key", "value")]
    names += ["attention.output.dense", "intermediate.dense", "output.dense"]
    blocks = []
    for at in leads:
        norms = _names(f"{at}attention.output.LayerNorm"), _names(f"{at}output.LayerNorm")
        blocks.append(Block(norms, *(Linear(*_names(at + name)) for name in names)))
    e, bias = f"{p}embeddings.", "cls.predictions.bias"
    token, kind = f"{e}word_embeddings.weight", f"{e}token_type_embeddings.weight"
    kind, bias = (name if name in shapes else None for name in (kind, bias))
    where, norms = f"{e}position_embeddings.weight", (_names(f"{e}LayerNorm"),)
    return Layout(token, where, kind, norms, tuple(blocks), token, bias, False, smooth, d, 1e-12, {})


# -- corrupt -----------------------------------------------------------------------------------------------------------


def corrupt(
    state: Mapping[str, torch.Tensor],
    layout: Layout,
    *,
    sequence: int,
    rng: torch.Generator,
    tag: int = 6,
    public: torch.Tensor | None = None,
    statistics: Callable[[Tensors, torch.Tensor], torch.Tensor] | None = None,
    eps: float = 0.01,
    spread: bool | None = None,
) -> tuple[Tensors, Key]:
    """A state of the same shapes whose gradient :func:`read` can read; `state` is untouched. Steps 1 to 4 of the card.

    Args:
        state: all parameters, float32 or float64.
        layout: of the model.
        sequence: tokens per sentence, T.
        rng: draws m, and tokens where `public` is None.
        tag: coordinates for the sentence, v (2 v + 10 of d at least are needed).
        public: token ids [n, T] on which the distribution of <m, u> is estimated; None for 64 rows of random tokens.
        statistics: (state, ids) -> [n, d], the inputs of the first FFN; None computes them, which is exact here.
        eps: how far an FFN moves the last coordinate, per unit of mean activation. The gradients read are in proportion
            to it. The card's 1e-4 reads as well from a gradient, but drowns in the rounding of a difference of weights.
        spread: the last block averages over positions and holds no bins, so that positions without a loss of their
            own get a gradient; needed for masked models and classifiers. None: where the model is not causal.

    Raises:
        ConfigError: `tag`, `sequence` or `eps` out of range.
        ModeConflict: half precision, or one block only where the last must average.
        ModelError: tensors missing or of another shape.
        DataError: `public` or what `statistics` gives cannot be used, or the state is not finite.
    """
    spread = not layout.causal if spread is None else spread
    _checked(state, layout, sequence, tag, eps, spread)
    new = {name: tensor.detach().clone() for name, tensor in state.items()}
    vocabulary, d = new[layout.token].shape
    if public is None:
        public = torch.randint(vocabulary, (64, sequence), generator=rng)
    elif public.ndim != 2 or public.shape[1] > sequence or not _within(public, vocabulary):
        raise DataError(
            f"The public tokens have shape {tuple(public.shape)}.",
            f"Allowed: ids [n, {sequence}] from 0 to {vocabulary - 1}.",
        )
    free = slice(tag + 1, d - 1)
    new[layout.token][:, : tag + 1] = 0
    old = state[layout.token]
    for name in (n for n, t in state.items() if n != layout.token and t.shape == old.shape and torch.equal(t, old)):
        new[name] = new[layout.token].clone()  # a tied head under its own name, as in a state_dict
    for name in filter(None, (layout.position, layout.kind)):
        new[name][:, : 2 * tag + 1] = 0
    scale = float(_embedded(new, layout, public)[..., free].std()) if layout.causal else 1.0
    if layout.causal:
        new[layout.position][0, tag] = 5 * scale
    for weight, bias in [*layout.norms, *(norm for block in layout.blocks for norm in block.norms)]:
        new[weight].fill_(1)
        new[bias].zero_()
    _write_attention(new, layout, tag, scale, spread)
    measured = (
        _ffn_inputs(new, layout, public, tag, scale) if statistics is None else statistics(new, public)
    ).double()
    if measured.ndim != 2 or measured.shape[1] != d or not bool(torch.isfinite(measured).all()):
        raise DataError(f"The FFN inputs have shape {tuple(measured.shape)}.", f"Allowed: finite, [n, {d}].")
    m = torch.zeros(d, dtype=torch.float64)
    drawn = torch.randn(d - tag - 2, generator=rng, dtype=torch.float64)
    m[free] = normalize(drawn - drawn.mean(), dim=0)
    along = measured.cpu() @ m
    mean, wide = float(along.mean()), float(along.std())
    if not wide > 1e-6 * (1 + abs(mean)):
        raise DataError("All FFN inputs give the same <m, u>.", action="Give more, and different, public tokens.")
    blocks = tuple(range(len(layout.blocks) - spread))
    _write_ffns(new, layout, blocks, m, mean, wide, eps)
    positions = new[layout.position][:sequence] + (new[layout.kind][0] if layout.kind else 0)
    return new, Key(tag, blocks, new[layout.token].clone(), positions, mean, wide)


def cuts(count: int, mean: float, spread: float) -> torch.Tensor:
    """Lower edges of `count` bins that a normal variable falls in equally often, float64 [count].

    The first is mean - 10 spread. The card puts Phi^-1(j / K) at edge j, which for j = K is infinite; it is j - 1 here.
    """
    edges = torch.special.ndtri(torch.arange(count, dtype=torch.float64) / count)
    edges[0] = -10.0
    return mean + spread * edges


def _write_attention(new: Tensors, layout: Layout, tag: int, scale: float, spread: bool) -> None:
    """Step 2: the first block writes the tag, the last one averages where `spread`, all others give 0."""
    d = layout.width
    nothing, marker, source, lane = (torch.zeros(d, d) for _ in range(4))
    marker[:, tag] = 1
    source[range(tag), range(tag + 1, 2 * tag + 1)] = 1
    lane[-1, -1] = 1
    first, last = layout.blocks[0], layout.blocks[-1]
    for block in layout.blocks:
        block.output.write(new, nothing)
    first.query.write(new, nothing, torch.full((d,), QUERY) if layout.causal else None)
    first.key.write(new, marker if layout.causal else nothing)
    first.value.write(new, source)
    first.output.write(new, scale * torch.eye(d))
    if spread:
        last.query.write(new, nothing)
        last.key.write(new, nothing)
        last.value.write(new, lane)
        last.output.write(new, scale * torch.eye(d))


def _write_ffns(
    new: Tensors, layout: Layout, bins: tuple[int, ...], m: torch.Tensor, mean: float, wide: float, eps: float
) -> None:
    """Steps 3 and 4: cuts that rise over the blocks, of which neighbours share one; only the last coordinate moves."""
    sharp = SHARP if layout.smooth else 1.0
    widths = [layout.shapes[layout.blocks[i].ffn_in.bias][0] for i in bins]
    edges, start = cuts(sum(widths) - len(bins) + 1, mean, wide), 0
    for i, block in enumerate(layout.blocks):
        inner = layout.shapes[block.ffn_in.bias][0]
        out = torch.zeros(layout.width, inner, dtype=torch.float64)
        if i in bins:
            block.ffn_in.write(new, sharp * m.expand(inner, -1), -sharp * edges[start : start + inner])
            out[-1] = eps / (inner * sharp)
            start += inner - 1
        block.ffn_out.write(new, out)


def _embedded(state: Mapping[str, torch.Tensor], layout: Layout, ids: torch.Tensor) -> torch.Tensor:
    """Token + position + segment 0, [n, T, d]."""
    ids = ids.to(state[layout.token].device)
    kind = state[layout.kind][0] if layout.kind else 0
    return state[layout.token][ids] + state[layout.position][: ids.shape[1]] + kind


def _ffn_inputs(new: Tensors, layout: Layout, ids: torch.Tensor, tag: int, scale: float) -> torch.Tensor:
    """What the first FFN of a corrupted state receives, [n T, d], computed without the model."""

    def plain(x: torch.Tensor) -> torch.Tensor:
        return layer_norm(x, (layout.width,), eps=layout.epsilon)

    x = _embedded(new, layout, ids)
    normed = plain(x)
    x = x if layout.causal else normed
    seen = normed[..., tag + 1 : 2 * tag + 1].clone()
    x[..., :tag] += scale * (seen[:, :1] if layout.causal else seen.mean(1, keepdim=True))
    return plain(x).flatten(0, 1)


def _within(ids: torch.Tensor, vocabulary: int) -> bool:
    return not ids.is_floating_point() and ids.numel() > 0 and int(ids.min()) >= 0 and int(ids.max()) < vocabulary


def _checked(
    state: Mapping[str, torch.Tensor], layout: Layout, sequence: int, tag: int, eps: float, spread: bool
) -> None:
    for name, shape in layout.shapes.items():
        if name not in state or tuple(state[name].shape) != shape:
            found = f"'{name}' in shape {tuple(state[name].shape)}" if name in state else f"no '{name}'"
            raise ModelError(f"The state has {found}.", f"The layout has it in shape {shape}.")
        if state[name].dtype not in (torch.float32, torch.float64):
            raise ModeConflict(f"'{name}' is {state[name].dtype}.", "The attack needs float32 or float64.")
    if (name := finite(state)) is not None:
        raise DataError(f"The state holds a NaN or an infinity in '{name}'.")
    longest, most = layout.shapes[layout.position][0], (layout.width - 10) // 2
    if not 2 <= sequence <= longest:
        raise ConfigError(f"sequence is {sequence}.", f"Allowed: 2 to {longest}, the positions of the model.")
    if not 2 <= tag <= most:
        raise ConfigError(f"tag is {tag}.", f"Allowed: 2 to {most} for a model of width {layout.width}.")
    if not 0 < eps <= 1:
        raise ConfigError(f"eps is {eps}.", "Allowed: above 0, at most 1.")
    if spread and len(layout.blocks) < 2:
        raise ModeConflict("The model has one block.", "Where the last block averages over positions, it needs two.")


# -- read --------------------------------------------------------------------------------------------------------------


def read(gradient: Mapping[str, torch.Tensor], key: Key, layout: Layout, *, batch: int, length: int) -> Reading:
    """The tokens that a gradient of a corrupted state holds. Steps 5 to 8 of the card.

    Args:
        gradient: by name; a mean or a sum, also over clients. Names that are missing were not trained: without any FFN
            nothing is found. What is not finite is dropped.
        key: from :func:`corrupt`.
        layout: from :func:`layout_of`.
        batch: sentences of all clients.
        length: tokens per sentence.

    Raises:
        ConfigError: `batch` or `length` out of range.
        UploadRejected: a tensor of another shape.
    """
    if batch < 1 or not 1 <= length <= len(key.positions):
        raise ConfigError(
            f"batch is {batch} and length {length}.", f"Allowed: 1 or more and 1 to {len(key.positions)}."
        )
    for name, tensor in gradient.items():
        if name in layout.shapes and tuple(tensor.shape) != layout.shapes[name]:
            raise UploadRejected(
                f"The gradient has '{name}' in shape {tuple(tensor.shape)}.", f"Expected {layout.shapes[name]}."
            )
    inputs = _inputs(gradient, key, layout, batch * length)
    leaked = leaked_tokens(gradient, layout, batch * length)
    free = slice(key.tag + 1, layout.width - 1)
    tokens, positions = key.tokens[:, free].double().cpu(), key.positions[:length, free].double().cpu()
    score, which = _matched(inputs[:, free], tokens, positions, leaked)
    cells = torch.full((batch, length), -1)
    for sentence, members in enumerate(_sentences(inputs[:, : key.tag], batch, length)):
        for hit, at in zip(*_assigned(score[members]), strict=True):
            cells[sentence, at] = members[hit]
    at = torch.arange(length).expand(batch, length)
    hit = cells >= 0
    found, confidence = torch.full((batch, length), -1), torch.zeros(batch, length, dtype=torch.float64)
    found[hit], confidence[hit] = which[cells[hit], at[hit]], score[cells[hit], at[hit]].clamp(0, 1)
    sure = int((confidence >= SURE).sum())
    if layout.causal:
        _fill(found, confidence, cells, inputs, leaked, gradient, layout)
    return Reading(found, sure, confidence)


def breached(weight: torch.Tensor, bias: torch.Tensor, last: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Differences of neighbouring rows: inputs [n, d] and their strength |bias difference| [n].

    Args:
        weight: [h, d], gradient of the first FFN matrix, rows by rising cut.
        bias: [h], gradient of its bias.
        last: whether the last row is a bin of its own, with no cut above.
    """
    rounding = 16 * torch.finfo(weight.dtype).eps
    weight, bias = weight.double().cpu(), bias.double().cpu()
    above = torch.cat([weight[1:], torch.zeros_like(weight[:1])]), torch.cat([bias[1:], torch.zeros_like(bias[:1])])
    rows, strength = weight - above[0], bias - above[1]
    if not last:
        rows, strength = rows[:-1], strength[:-1]
    inputs = rows / strength[:, None]
    least = rounding * float(bias.abs().nan_to_num(0, 0, 0).max())
    kept = torch.isfinite(inputs).all(1) & (strength.abs() > least)
    return inputs[kept], strength[kept].abs()


def leaked_tokens(gradient: Mapping[str, torch.Tensor], layout: Layout, most: int) -> torch.Tensor:
    """The ids that the embedding rows show by their norm, or the output bias by its negative entries.

    They are a set: how often a token occurred is not estimated. Where at most `most` rows are not zero, as in an
    embedding that is not tied to the head, all of these are meant; else the upper of two groups of log norms, of at
    most `most`, split where the variance between them is largest (the card's mean + 1.5 std misses tokens where they
    are many). Empty where neither gradient is there.
    """
    shown = []
    if layout.token in gradient:
        logs = gradient[layout.token].double().cpu().norm(dim=1).log()
        live = torch.isfinite(logs)
        if int(live.sum()) > most:
            live &= logs > _split(logs[live], most)
        shown.append(live.nonzero()[:, 0])
    if layout.head_bias and layout.head_bias in gradient:
        shown.append((gradient[layout.head_bias].cpu() < 0).nonzero()[:, 0])
    return torch.cat(shown).unique() if shown else torch.zeros(0, dtype=torch.long)


def _split(values: torch.Tensor, most: int) -> float:
    """The value that parts a group of at most `most` from those below, with the largest variance between the two."""
    values = values.sort(descending=True).values
    high = torch.arange(1, len(values), dtype=values.dtype)
    low, sums = len(values) - high, values.cumsum(0)
    between = (sums[:-1] / high - (sums[-1] - sums[:-1]) / low).square() * low * high
    return float(values[int(between[:most].argmax()) + 1])


def _inputs(gradient: Mapping[str, torch.Tensor], key: Key, layout: Layout, most: int) -> torch.Tensor:
    """The strongest FFN inputs of all blocks, at most `most`, [n, d]."""
    rows, strength = [torch.zeros(0, layout.width, dtype=torch.float64)], [torch.zeros(0, dtype=torch.float64)]
    for i in key.blocks:
        linear = layout.blocks[i].ffn_in
        if linear.weight in gradient and linear.bias in gradient:
            weight = gradient[linear.weight]
            some = breached(weight.T if linear.transposed else weight, gradient[linear.bias], i == key.blocks[-1])
            rows.append(some[0])
            strength.append(some[1])
    best = torch.cat(strength).argsort(descending=True, stable=True)[:most]
    return torch.cat(rows)[best]


def _matched(
    inputs: torch.Tensor, tokens: torch.Tensor, positions: torch.Tensor, leaked: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """For every input [n, f] and position the best correlation with token + position and its token, [n, T] twice.

    Tokens that leaked come first; an input that none of them explains is sought in the whole vocabulary.
    """
    score, which = _correlated(inputs, tokens[leaked], positions)
    which = leaked[which] if len(leaked) else which
    rest = (score.amax(1) < SURE).nonzero()[:, 0] if len(inputs) else torch.zeros(0, dtype=torch.long)
    other, token = _correlated(inputs[rest], tokens, positions)
    other = torch.where(other >= SURE, other, ELSEWHERE * other)
    better = other > score[rest]
    score[rest] = torch.where(better, other, score[rest])
    which[rest] = torch.where(better, token, which[rest])
    return score, which


def _correlated(
    inputs: torch.Tensor, tokens: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest over tokens of corr(input, token + position), and where, [n, T] each; -1 and 0 without tokens."""
    score = torch.full((len(inputs), len(positions)), -1.0, dtype=torch.float64)
    which = torch.zeros(score.shape, dtype=torch.long)
    inputs, tokens, positions = (x - x.mean(1, keepdim=True) for x in (inputs, tokens, positions))
    inputs = normalize(inputs, dim=1)
    with_positions = inputs @ positions.T
    for start in range(0, len(tokens) if len(inputs) else 0, max(1, CELLS // len(positions))):
        some = tokens[start : start + max(1, CELLS // len(positions))]
        squares = some.square().sum(1)[:, None] + positions.square().sum(1) + 2 * some @ positions.T
        inverse = squares.clamp(min=1e-30).rsqrt()
        step = max(1, CELLS // inverse.numel())
        for low in range(0, len(inputs), step):
            part = slice(low, low + step)
            found = (((inputs[part] @ some.T)[:, :, None] + with_positions[part, None]) * inverse).max(1)
            better = found.values > score[part]
            score[part] = torch.where(better, found.values, score[part])
            which[part] = torch.where(better, found.indices + start, which[part])
    return score, which


def _sentences(tags: torch.Tensor, batch: int, length: int) -> list[torch.Tensor]:
    """Indices of the inputs of each sentence, at most `length` each: balanced clusters of the tags [n, v].

    Centred and scaled, the tags of a sentence are equal up to rounding, whatever its layer norms did. So the densest
    place is a centre, with at most `length` inputs around it; the next is sought among the rest; then all inputs go to
    the nearest centre that has room.
    """
    tags = normalize(tags - tags.mean(1, keepdim=True), dim=1)
    alike, left = tags @ tags.T, torch.ones(len(tags), dtype=torch.bool)
    centres = []
    while len(centres) < batch and bool(left.any()):
        near = (alike > TOGETHER) & left
        densest = int(torch.where(left, near.sum(1), -1).argmax())
        around = torch.where(near[densest], alike[densest], -2).topk(min(length, int(near[densest].sum()))).indices
        centres.append(tags[around].mean(0))
        left[around] = False
        left[densest] = False
    members: list[list[int]] = [[] for _ in range(batch)]
    if centres:
        order = (tags @ torch.stack(centres).T).flatten().argsort(descending=True, stable=True)
        placed = set()
        for flat in order.tolist():
            hit, centre = divmod(flat, len(centres))
            if hit not in placed and len(members[centre]) < length:
                members[centre].append(hit)
                placed.add(hit)
    return [torch.tensor(sorted(some), dtype=torch.long) for some in members]


def _assigned(score: torch.Tensor) -> tuple[list[int], list[int]]:
    """The assignment of rows to columns with the largest sum."""
    from scipy.optimize import linear_sum_assignment  # pyright: ignore[reportMissingTypeStubs]

    rows, columns = linear_sum_assignment(score.numpy(), maximize=True)
    return rows.tolist(), columns.tolist()


def _fill(
    found: torch.Tensor,
    confidence: torch.Tensor,
    cells: torch.Tensor,
    inputs: torch.Tensor,
    leaked: torch.Tensor,
    gradient: Mapping[str, torch.Tensor],
    layout: Layout,
) -> None:
    """Give cells that are not sure the leaked tokens that were not placed, in place.

    Minus the head's gradient row of a token is the final state before it, which is the FFN input found there.
    """
    head = gradient.get(layout.head, gradient.get(layout.token))
    left = leaked[~torch.isin(leaked, found[confidence >= SURE])]
    empty = (confidence < SURE).nonzero()
    if head is None or not len(left) or not len(empty):
        return
    rows = -head[left].double().cpu()[:, :-1]
    before = torch.where(empty[:, 1] > 0, cells[empty[:, 0], empty[:, 1] - 1], -1)
    score = normalize(rows, dim=1) @ normalize(inputs[before.clamp(min=0), :-1], dim=1).T if len(inputs) else None
    score = torch.zeros(len(left), len(empty), dtype=torch.float64) if score is None else score
    score = torch.where(before >= 0, score, 0).nan_to_num(0, 0, 0)
    for row, column in zip(*_assigned(score), strict=True):
        sentence, at = empty[column].tolist()
        if score[row, column] > confidence[sentence, at] or found[sentence, at] < 0:
            found[sentence, at], confidence[sentence, at] = left[row], score[row, column].clamp(0, 1)


def in_place(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Share of tokens read at their own place, 0 to 1, over the best pairing of sentences; both are [batch, length].

    Raises:
        DataError: shapes that differ, or nothing.
    """
    if found.shape != truth.shape or truth.ndim != 2 or not truth.numel():
        raise DataError(f"Tokens of shape {tuple(found.shape)} and {tuple(truth.shape)}.", "Allowed: equal, [B, T].")
    hits = (found[:, None] == truth[None]).double().sum(2)
    return float(sum(hits[pair] for pair in zip(*_assigned(hits), strict=True))) / truth.numel()


# -- guard -------------------------------------------------------------------------------------------------------------


def suspicious(state: Mapping[str, torch.Tensor], watched: Layout | Iterable[str] | None = None) -> str | None:
    """Why a received state looks corrupted, or None: the client's guard.

    Flags matrices [a, b] whose energy lies in one direction (:data:`RANK_ONE`; equal rows are a case of it), entries
    above :data:`HUGE`, and what is not finite. Zero matrices and those narrower than :data:`NARROW` pass: factors of
    low-rank adapters are honest there. It knows this attack: a server that adds noise to its rows can pass it.

    Args:
        state: by name, tensors of any shape.
        watched: look at these names only; a layout means the tensors it names.
    """
    if isinstance(watched, Layout):
        watched = watched.shapes
    for name in state if watched is None else watched:
        tensor = state.get(name)
        if tensor is None or not tensor.is_floating_point() or tensor.ndim == 0 or not tensor.numel():
            continue
        top = float(tensor.detach().abs().max())
        if not math.isfinite(top):
            return f"'{name}' holds a NaN or an infinity."
        if top > HUGE:
            return f"'{name}' holds a value of magnitude {top:.1e}."
        if tensor.ndim == 2 and min(tensor.shape) >= NARROW and top > 0:
            share = top_share(tensor)
            if share > RANK_ONE:
                return f"'{name}' {tuple(tensor.shape)} has rank 1: {share:.4%} of it lies in one direction."
    return None


def top_share(matrix: torch.Tensor) -> float:
    """A lower bound on s_1^2 / sum s_i^2 by two steps of power iteration, exact for rank 1; in float32 or better."""
    matrix = matrix.detach()
    matrix = (matrix / matrix.abs().max()).to(torch.promote_types(matrix.dtype, torch.float32))
    line = matrix[int(matrix.square().sum(1).argmax())]
    for _ in range(2):
        line = normalize(matrix.T @ (matrix @ line), dim=0)
    return min(1.0, float((matrix @ line).square().sum() / matrix.square().sum()))
