"""FedAvg beats every client alone, and many local steps need fewer rounds than one: digits, two classes a client."""

from fedllm.effects import Evidence
from fedllm.effects.rig import Play, skewed_digits
from fedllm.methods import find
from fedllm.methods.baseline.fedavg import FedAvg

SEEDS = (0, 1, 2)
ROUNDS = 20


def measure() -> Evidence:
    """Held-out accuracy after 20 rounds of full participation: 10 local steps, 1 local step, the best single client."""
    found: dict[str, list[float]] = {"many": [], "one": [], "alone": []}
    for seed in SEEDS:
        learner, rows, held_out = skewed_digits(seed)
        for name, steps in (("many", 10), ("one", 1)):
            train = {"steps": steps, "lr": 0.5, "optimizer": "sgd", "clip_norm": None, "batch_size": 24}
            play = Play(FedAvg(train=train), learner, rows, seed=seed)
            found[name].append(held_out(play.rounds(ROUNDS).params)[0])
        alone = Play(find("local")(train=train | {"steps": 10}), learner, rows, seed=seed)
        alone.rounds(ROUNDS)
        found["alone"].append(max(held_out(alone.worker.private.open(c)["params"])[0] for c in rows))
    low = {name: min(values) for name, values in found.items()}
    high = {name: max(values) for name, values in found.items()}
    return Evidence(
        "fedavg",
        FedAvg.card.claim,
        f"Accuracy on all ten digits over seeds {SEEDS}: FedAvg {low['many']:.2f}-{high['many']:.2f}, one local step "
        f"{low['one']:.2f}-{high['one']:.2f}, best client alone {low['alone']:.2f}-{high['alone']:.2f} (margins 0.05, 0.3).",
        all(m > o + 0.05 and m > a + 0.3 for m, o, a in zip(*found.values(), strict=True)),
        {name: sum(values) / len(values) for name, values in found.items()},
    )
