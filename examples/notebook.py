"""A notebook in a file: three hospitals, one model, data in memory, a method of one's own."""

import fedllm


class Careful(fedllm.Method):
    """FedAvg that takes only half of each change."""

    card = fedllm.Card(
        title="Careful - half steps",
        paper="this example",
        cells=("2.4 Decentralized Training",),
        travels="as FedAvg",
        claim="moves half as far per round",
    )

    def finalize(self, state, update):
        """x <- x + d / 2."""
        return state.with_({name: x + update.params[name] / 2 for name, x in state.params.items()})


def rows(word: str) -> list[dict[str, str]]:
    """A few question-answer pairs of one hospital."""
    return [
        {"instruction": f"Which ward is room {n} of {word}?", "response": f"{word}-{n // 10}"} for n in range(10, 50)
    ]


clients = {name: {"train": rows(name)[:32], "eval": rows(name)[32:]} for name in ("north", "south", "west")}
recipe = {
    "name": "notebook",
    "rounds": 3,
    "method": {"name": "careful", "train": {"steps": 4, "lr": 4e-3}},
    "adapter": {"targets": "all-linear"},
    "evaluation": {"against": ["base"]},
}

if __name__ == "__main__":
    result = fedllm.run(recipe, data=clients)
    print("\n".join(result.sentences))
    print("Held-out loss:", result.value("base", "loss"), "->", result.value("federated", "loss"))
    print("Adapter for PEFT:", result.folder / "adapter")
