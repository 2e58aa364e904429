"""FedProx ends nearer to the joint optimum than FedAvg: two quadratic clients, exact fixed points."""

from fedllm.effects import Evidence
from fedllm.effects.rig import OPTIMUM, on_quadratic
from fedllm.methods.baseline.fedprox import FedProx


def measure() -> Evidence:
    """Distances to the optimum 5/6 for FedAvg (mu = 0), mu = 1 and mu = 4; closed forms 0.605342, 0.6512, 0.7355."""
    found = {mu: on_quadratic("fedprox", mu=mu) for mu in (0.0, 1.0, 4.0)}
    away = {mu: OPTIMUM - value for mu, value in found.items()}
    passed = away[0.0] > away[1.0] + 0.04 and away[1.0] > away[4.0] + 0.04 and abs(found[0.0] - 0.605342) < 1e-6
    return Evidence(
        "fedprox",
        FedProx.card.claim,
        f"Distance to the optimum: FedAvg {away[0.0]:.4f}, mu=1 {away[1.0]:.4f}, mu=4 {away[4.0]:.4f} (margin 0.04).",
        passed,
        {"fedavg": away[0.0], "mu=1": away[1.0], "mu=4": away[4.0]},
    )
