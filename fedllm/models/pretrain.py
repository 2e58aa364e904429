"""Pre-training - makes the bundled base model `fedllm-tiny` from nothing, by one command.

A federated run needs a base model to start from, and the package must work without a download. This file trains
one of four million parameters on two CPU cores within an hour and writes its model card from what it measured.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from fedllm.core.errors import ConfigError, DataError
from fedllm.core.seeds import derive, python_stream
from fedllm.models import pretrain_text

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

Record = dict[str, str]
log = logging.getLogger(__name__)

PROMPT = "### Instruction:\n{instruction}\n\n### Response:\n"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% elif message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% else %}{{ '### Instruction:\n' + message['content'] + '\n\n### Response:\n' }}{% endif %}"
    "{% endfor %}"
)
CONTEXT = 512
WIDTHS = (64, 96, 128, 192, 256, CONTEXT)
"""Batches are right-padded to one of these widths (tokens), so that few shapes occur."""
HELD_OUT_STREAM = 2**31
HELD_OUT_RECORDS = 200
CHUNK = 4096
"""Records that are drawn, tokenised and sorted into batches at a time."""


@dataclass(frozen=True)
class Plan:
    """What is trained and for how long; `minutes` (wall clock) or `steps`, whichever is given."""

    data: Path
    out: Path
    minutes: float | None = None
    steps: int | None = None
    seed: int = 0
    hidden: int = 256
    layers: int = 4
    heads: int = 4
    inner: int = 576
    vocabulary: int = 4096
    batch_tokens: int = 4096
    lr: float = 2e-3
    t0_share: float = 0.25
    prompt_weight: float = 0.5
    response_weight: float = 2.0
    compiled: bool = False
    checkpoint: Path | None = None
    checkpoint_minutes: float = 10.0

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.steps is None):
            raise ConfigError(
                f"The length is minutes={self.minutes}, steps={self.steps}.",
                "Exactly one of the two is allowed.",
                action="Give --minutes N or --steps N.",
            )


@dataclass
class Progress:
    """What the run has done so far; the model card is filled in from it."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)


def read_t0(path: Path) -> tuple[list[Record], list[Record]]:
    """The T0 records (task, instruction, response) of a JSON Lines file, plain or gzip: (training, held out 2 %)."""
    if not path.is_file():
        raise DataError(f"There is no file {path}.", "Allowed: a JSON Lines file, plain or .gz.")
    opener: Any = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines if line.strip()]
    missing = [i for i, row in enumerate(rows) if not {"instruction", "response"} <= row.keys()]
    if missing or not rows:
        what = f"Record {missing[0]} of {path.name} is incomplete." if missing else f"{path.name} is empty."
        raise DataError(what, "Each record needs the fields instruction and response.")
    held = [row for row in rows if _is_held_out(row)]
    return [row for row in rows if not _is_held_out(row)], held


def _is_held_out(row: Record) -> bool:
    digest = hashlib.sha256(f"{row['instruction']}\x1f{row['response']}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % 50 == 0


def train_tokenizer(texts: Iterator[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `vocabulary` entries; digits are split one by one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=CONTEXT,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def new_model(plan: Plan, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A randomly initialised Llama of the plan's shape (float32, tied embeddings), a function of the seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=plan.hidden,
        intermediate_size=plan.inner,
        num_hidden_layers=plan.layers,
        num_attention_heads=plan.heads,
        num_key_value_heads=plan.heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(plan.seed, "weights"))
        return LlamaForCausalLM(config)


@dataclass(frozen=True)
class Encoded:
    """One record as token ids with the position at which its response starts."""

    ids: list[int]
    start: int


def encode(records: Sequence[Record], tokenizer: PreTrainedTokenizerFast) -> list[Encoded]:
    """Records in the plain template `<bos>prompt response<eos>`; those longer than the context are left out."""
    prompts = tokenizer([PROMPT.format(instruction=r["instruction"]) for r in records], add_special_tokens=False)
    answers = tokenizer([r["response"] for r in records], add_special_tokens=False)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    encoded = [
        Encoded([bos, *prompt, *answer, eos], 1 + len(prompt))
        for prompt, answer in zip(prompts["input_ids"], answers["input_ids"], strict=True)
    ]
    return [one for one in encoded if len(one.ids) <= CONTEXT]


def collate(batch: Sequence[Encoded], width: int, plan: Plan, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and loss weights, both (records, width); padding has weight 0.

    No attention mask is needed: attention is causal and the padding stands behind every real token.
    """
    ids = torch.full((len(batch), width), pad)
    weights = torch.zeros(len(batch), width)
    for row, one in enumerate(batch):
        end = len(one.ids)
        ids[row, :end] = torch.tensor(one.ids)
        weights[row, 1 : one.start] = plan.prompt_weight
        weights[row, one.start : end] = plan.response_weight
    return ids, weights


def weighted_loss(model: LlamaForCausalLM, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean of the next-token cross-entropy (nats); `weights[:, t]` belongs to predicting `ids[:, t]`."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    logits = model.lm_head(hidden).float().flatten(0, 1)
    losses = functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
    wanted = weights[:, 1:].flatten()
    return (losses * wanted).sum() / wanted.sum()


def stream(t0: Sequence[Record], plan: Plan) -> Iterator[list[Record]]:
    """Endless chunks of records: T0 in a new order each pass, mixed with freshly generated ones."""
    rng = python_stream(plan.seed, "mixture")
    order: list[int] = []
    made = 0
    while True:
        chunk: list[Record] = []
        for _ in range(CHUNK):
            if rng.random() < plan.t0_share:
                if not order:
                    order = list(range(len(t0)))
                    rng.shuffle(order)
                chunk.append(t0[order.pop()])
            else:
                chunk.append(pretrain_text.record(made, plan.seed))
                made += 1
        yield chunk


def batches(
    t0: Sequence[Record], tokenizer: PreTrainedTokenizerFast, plan: Plan
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches of about `plan.batch_tokens` tokens; a batch holds records of one width."""
    rng = python_stream(plan.seed, "order")
    waiting: dict[int, list[Encoded]] = {width: [] for width in WIDTHS}
    for chunk in stream(t0, plan):
        ready: list[tuple[int, list[Encoded]]] = []
        for one in encode(chunk, tokenizer):
            width = next(w for w in WIDTHS if len(one.ids) <= w)
            waiting[width].append(one)
            if len(waiting[width]) == plan.batch_tokens // width:
                ready.append((width, waiting[width]))
                waiting[width] = []
        rng.shuffle(ready)
        for width, batch in ready:
            yield collate(batch, width, plan, tokenizer.pad_token_id)


def learning_rate(done: float, step: int, peak: float, warm_up: int = 200) -> float:
    """Linear warm-up over `warm_up` steps, then a cosine to 2 % of `peak`; `done` is the share of the run behind us."""
    rise = min(1.0, (step + 1) / warm_up)
    return peak * rise * (0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done))))


def _optimizer(model: LlamaForCausalLM, plan: Plan) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=plan.lr, betas=(0.9, 0.95), fused=True)


def fit(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, t0: Sequence[Record], plan: Plan) -> Progress:
    """Train in place: float32 master weights, bfloat16 matrix products, AdamW, gradient norm at most 1."""
    loss_of: Any = torch.compile(weighted_loss, dynamic=False) if plan.compiled else weighted_loss
    optimizer = _optimizer(model, plan)
    progress = Progress()
    begun = saved = shown = time.monotonic()
    model.train()
    for ids, weights in batches(t0, tokenizer, plan):
        now = time.monotonic()
        done = progress.steps / plan.steps if plan.steps else (now - begun) / (60.0 * (plan.minutes or 0.0))
        if done >= 1.0:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(done, progress.steps, plan.lr)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, ids, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress.steps += 1
        progress.tokens += int((weights > 0).sum())
        progress.losses.append(loss.item())
        if not math.isfinite(progress.losses[-1]):
            raise ConfigError(f"The loss is {progress.losses[-1]} at step {progress.steps}.", action="Lower --lr.")
        progress.seconds = now - begun
        if now - shown > 15.0:
            shown = now
            recent = progress.losses[-100:]
            log.info(
                "step %d, %.1f %% done, %.2f M tokens, loss %.3f, %.0f tokens/s",
                progress.steps, 100 * done, progress.tokens / 1e6, sum(recent) / len(recent),
                progress.tokens / max(progress.seconds, 1e-9),
            )  # fmt: skip
        if plan.checkpoint and now - saved > 60.0 * plan.checkpoint_minutes:
            saved = now
            save(model, tokenizer, plan.checkpoint)
            log.info("checkpoint at step %d in %s", progress.steps, plan.checkpoint)
    return progress


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a loadable folder, weights in bfloat16, replacing an older one only when the new one is complete.

    The config names float32, so that `from_pretrained` widens the weights again.
    """
    from transformers import GenerationConfig, LlamaForCausalLM

    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    rounded = LlamaForCausalLM(model.config)
    rounded.load_state_dict(model.state_dict())
    rounded.to(torch.bfloat16)
    rounded.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=64,
        do_sample=False,
    )
    rounded.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    config = json.loads((fresh / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = "float32"
    (fresh / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(fresh, folder)


@torch.no_grad()
def measure(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: Sequence[Record]) -> dict[str, float]:
    """Held-out loss (nats a token) over all tokens and over responses, and the share of responses whose every
    token is the most likely one (teacher-forced exact match)."""
    encoded = encode(records, tokenizer)
    total = torch.zeros(4, dtype=torch.float64)
    exact = 0
    for one in encoded:
        ids = torch.tensor([one.ids])
        logits = model(input_ids=ids).logits[0, :-1].float()
        losses = functional.cross_entropy(logits, ids[0, 1:], reduction="none").double()
        answer = losses[one.start - 1 :]
        total += torch.tensor([losses.sum(), len(losses), answer.sum(), len(answer)], dtype=torch.float64)
        exact += bool((logits[one.start - 1 :].argmax(-1) == ids[0, one.start :]).all())
    return {
        "records": len(encoded),
        "loss": float(total[0] / total[1]),
        "response_loss": float(total[2] / total[3]),
        "exact": exact / len(encoded),
    }


def card(plan: Plan, progress: Progress, model: LlamaForCausalLM, measured: dict[str, dict[str, float]]) -> str:
    """The model card in Markdown; every number in it comes from the run."""
    length = f"--minutes {plan.minutes:g}" if plan.minutes else f"--steps {plan.steps}"
    rows = "\n".join(
        f"| {name} | {m['records']} | {m['loss']:.3f} | {m['response_loss']:.3f} | {100 * m['exact']:.1f} % |"
        for name, m in measured.items()
    )
    return f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# fedllm-tiny

A Llama of {sum(p.numel() for p in model.parameters()) / 1e6:.2f} million parameters, trained from nothing so that
fedllm can be tried, taught and tested without a download. It copies and extracts; it knows next to nothing of the
world.

## How it was made

    python -m fedllm.models.pretrain --data {plan.data.name} --out {plan.out.name} {length} --seed {plan.seed}\
{" --compile" if plan.compiled else ""}

| | |
| --- | --- |
| shape | hidden {plan.hidden}, {plan.layers} layers, {plan.heads} heads, inner {plan.inner}, tied embeddings |
| tokenizer | byte-level BPE, {model.config.vocab_size} entries, digits one by one, trained on the same text |
| context | {CONTEXT} tokens |
| steps, tokens seen | {progress.steps}, {progress.tokens / 1e6:.1f} million (batches of about {plan.batch_tokens}) |
| time | {progress.seconds / 60:.1f} minutes on {torch.get_num_threads()} CPU threads |
| optimiser | AdamW, peak {plan.lr:g}, warm-up and cosine, bfloat16 products over float32 weights |
| last training loss | {sum(progress.losses[-100:]) / max(1, len(progress.losses[-100:])):.3f} (prompt tokens weigh \
{plan.prompt_weight:g}, response tokens {plan.response_weight:g}) |

A run of `--steps` gives the same bits on the same machine; a run of `--minutes` depends on the speed of the machine.

## Data and licences

{100 * plan.t0_share:.0f} % of the records: tasks of the T0 / P3 training mix as sampled by Self-Instruct (Apache-2.0).
The rest: records made by `fedllm/models/pretrain_text.py` (this package, Apache-2.0; names are invented). Records
longer than the context were left out. The documents of `fedllm.data.organisations`, their field names, and ISO
dates and currency codes in answers are not in it; `name=value; name=value` is one of its eight answer formats.

## Held-out results

Measured on the saved (bfloat16) weights. Loss in nats a token; exact: every response token is the most likely one.

| records | number | loss, all tokens | loss, responses | exact |
| --- | --- | --- | --- | --- |
{rows}

## Use and limits

Prompt: `<bos>### Instruction:\\n{{instruction}}\\n\\n### Response:\\n{{response}}<eos>`; the chat template renders
the same. For demonstrations and tests of federated fine-tuning. Not for answering questions: what it writes outside
short extraction tasks is often wrong. English only.
"""


def pretrain(plan: Plan) -> dict[str, dict[str, float]]:
    """Make the model, write it to `plan.out` with its card, and give back what was measured."""
    from transformers import AutoModelForCausalLM

    t0, held = read_t0(plan.data)
    made = list(pretrain_text.records(min(20_000, 4 * len(t0)), plan.seed))
    texts = (PROMPT.format(instruction=r["instruction"]) + r["response"] for r in [*t0, *made])
    tokenizer = train_tokenizer(texts, plan.vocabulary)
    model = new_model(plan, tokenizer)
    log.info("%d T0 records, vocabulary %d, %d parameters", len(t0), len(tokenizer), model.num_parameters())
    progress = fit(model, tokenizer, t0, plan)
    save(model, tokenizer, plan.out)
    saved = AutoModelForCausalLM.from_pretrained(plan.out).eval()
    fresh = list(pretrain_text.records(HELD_OUT_RECORDS, HELD_OUT_STREAM + plan.seed))
    measured = {"generated": measure(saved, tokenizer, fresh)}
    if held:
        measured["T0"] = measure(saved, tokenizer, held)
    (plan.out / "README.md").write_text(card(plan, progress, saved, measured), encoding="utf-8")
    log.info("%d steps, %d tokens, %s", progress.steps, progress.tokens, measured)
    return measured


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(prog="python -m fedllm.models.pretrain", description="Train fedllm-tiny.")
    parser.add_argument("--data", type=Path, required=True, help="T0 records: .jsonl or .jsonl.gz")
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished model")
    parser.add_argument("--minutes", type=float, help="train for this long (wall clock)")
    parser.add_argument("--steps", type=int, help="or for this many steps (same bits for the same seed)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=Plan.lr, help="peak learning rate")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--compile", action="store_true", dest="compiled", help="torch.compile; needs a C++ compiler")
    parser.add_argument("--checkpoint", type=Path, help="folder of the newest unfinished model")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if given.threads:
        torch.set_num_threads(given.threads)
    pretrain(Plan(
        data=given.data, out=given.out, minutes=given.minutes, steps=given.steps, seed=given.seed, lr=given.lr,
        compiled=given.compiled, checkpoint=given.checkpoint,
    ))  # fmt: skip


if __name__ == "__main__":
    main()
