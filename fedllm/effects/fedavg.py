"""FedAvg beats every client alone, and many local steps need fewer rounds than one: digits, two classes a client."""

from fedllm.effects import Evidence
from fedllm.effects.rig import Play, skewed_digits, spread
from fedllm.methods import find
from fedllm.methods.baseline.fedavg import FedAvg

SEEDS = (0, 1, 2)
ROUNDS = 10


def measure() -> Evidence:
    """Held-out loss on all ten digits after 10 rounds: 10 local steps, 1 local step, the best single client."""
    many, one, alone = [], [], []
    for seed in SEEDS:
        learner, rows, held_out = skewed_digits(seed)
        train = {"lr": 0.5, "optimizer": "sgd", "clip_norm": None, "batch_size": 24}
        for steps, losses in ((10, many), (1, one)):
            play = Play(FedAvg(train={**train, "steps": steps}), learner, rows, seed=seed)
            losses.append(held_out(play.rounds(ROUNDS).params)[1])
        single = Play(find("local")(train={**train, "steps": 10}), learner, rows, seed=seed)
        single.rounds(ROUNDS)
        alone.append(min(held_out(single.worker.private.open(client)["params"])[1] for client in rows))
    return Evidence(
        "fedavg",
        FedAvg.card.claim,
        f"Held-out loss over seeds {SEEDS}: FedAvg {spread(many)}, one local step {spread(one)}, best client alone "
        f"{spread(alone)} (margins 0.3 and 1.0).",
        all(m + 0.3 < o and m + 1.0 < a for m, o, a in zip(many, one, alone, strict=True)),
        {"fedavg": max(many), "one step": min(one), "best alone": min(alone)},
    )
