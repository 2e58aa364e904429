"""Server control - control variates and momentum that live on the server, so that correcting drift costs no traffic.

FedPepTAO (Che et al., EMNLP 2023, 2310.15080, section 4.2). A client sends its tensors only; from them, its steps and
its rates the server keeps its control variate c_i, and moves what each sampled client brought before it averages:

    w' = sum p_i w_i                     D = w - w'
    c_i <- c_i - c + (w - w_i) / (sum of the rates of i)        c <- c + q sum (t_i / sum t) (change of c_i)
    m_i = beta m + (1 - beta) g          v_i = m_i + c - c_i
    w <- w' - eta sum p_i v_i            m <- sum p_i v_i

p are the weights of the mean, t the local steps, q the share of clients that were asked. With everybody there and
equal weights the control variates cancel, and this is momentum alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedllm.core.tensors import Tensors, add, over, subtract, zeros


@dataclass(frozen=True)
class Brought:
    """What one client brought.

    Attributes:
        delta: its change w_i - w.
        weight: its weight in the mean, above 0.
        steps: local steps taken.
        rates: the sum of their learning rates.
    """

    delta: Tensors
    weight: float
    steps: float
    rates: float


def mean_change(brought: Mapping[str, Brought]) -> Tensors:
    """w' - w."""
    whole, total = sum(b.weight for b in brought.values()), None
    for one in brought.values():
        total = add(zeros(one.delta) if total is None else total, one.delta, one.weight / whole)
    return total or {}


def renewed_controls(
    brought: Mapping[str, Brought], controls: Mapping[str, Tensors], control: Tensors, share: float
) -> tuple[dict[str, Tensors], Tensors]:
    """The sampled clients' new c_i, and the new c; a client that took no step keeps its own."""
    moved = {client: one for client, one in brought.items() if one.steps > 0 and one.rates > 0}
    steps, new, total = sum(one.steps for one in moved.values()), {}, control
    for client, one in moved.items():
        old = controls.get(client) or zeros(control)
        new[client] = over(lambda c_i, c, d, rates=one.rates: c_i - c - d / rates, old, control, one.delta)
        total = add(total, subtract(new[client], old), share * one.steps / steps)
    return new, total


def mean_correction(brought: Mapping[str, Brought], controls: Mapping[str, Tensors], control: Tensors) -> Tensors:
    """sum p_i (c - c_i)."""
    whole, total = sum(one.weight for one in brought.values()), zeros(control)
    for client, one in brought.items():
        own = controls.get(client) or zeros(control)
        total = add(total, subtract(control, own), one.weight / whole)
    return total
