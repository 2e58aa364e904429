"""CKKS - vectors of floats as ciphertexts that can be added: ring 8192, one limb, scale 2^40, 128-bit security.

One limb suffices for sums, as clients apply their weights before they encrypt. A fresh ciphertext holds 4,096 numbers
in about 131 kB, 32 bytes a number. Decrypted sums are rounded to 2^-20 before anybody outside the key holders sees
them, since the raw noise of an approximate scheme tells of the key (Li and Micciancio, EUROCRYPT 2021).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fedllm.core.errors import MissingExtra, ModelError, UploadRejected

SLOTS = 4096
"""Numbers of one ciphertext."""
LARGEST = 2.0**18
"""The largest magnitude of a number; beyond it CKKS wraps silently."""
GRAIN = 2.0**-20
"""What a decrypted sum is rounded to."""


class Keys:
    """The clients' key: encrypts and decrypts. The server has :class:`Public` alone."""

    def __init__(self) -> None:
        seal = library()
        context = seal.context(seal.SCHEME_TYPE.CKKS, 8192, coeff_mod_bit_sizes=[60, 60])
        context.global_scale = 2.0**40
        self._context = context

    @property
    def public(self) -> bytes:
        """What the server gets: it encrypts and adds, and decrypts nothing."""
        return self._context.serialize(save_secret_key=False)

    def encrypt(self, values: torch.Tensor) -> list[bytes]:
        """A vector as ciphertexts of 4,096 numbers.

        Raises:
            UploadRejected: a number that is not finite, or too large.
        """
        most = float(values.abs().max()) if values.numel() else 0.0
        if not most < LARGEST:
            raise UploadRejected(
                f"A vector to be encrypted has a magnitude of {most:g}.", f"Allowed: below {LARGEST:g}, and finite."
            )
        return [
            library().ckks_vector(self._context, piece.double().tolist()).serialize() for piece in values.split(SLOTS)
        ]

    def decrypt(self, ciphertexts: Sequence[bytes], size: int) -> torch.Tensor:
        """A sum of `size` numbers, float64, rounded to :data:`GRAIN`."""
        found: list[float] = []
        for data in ciphertexts:
            found += library().ckks_vector_from(self._context, data).decrypt()
        return torch.round(torch.tensor(found[:size], dtype=torch.float64) / GRAIN) * GRAIN


class Public:
    """The server's side: adds ciphertexts.

    Args:
        context: see :attr:`Keys.public`.
    """

    def __init__(self, context: bytes) -> None:
        self._context = library().context_from(context)
        if self._context.is_private():
            raise ModelError("The server was given a context with a secret key.", "It must have the public one.")

    def add(self, total: list[Any] | None, ciphertexts: Sequence[bytes]) -> list[Any]:
        """`total` with one upload more; raises :class:`UploadRejected` for what is no ciphertext of this context."""
        try:
            found = [library().ckks_vector_from(self._context, data) for data in ciphertexts]
            if total is None:
                return found
            if [one.size() for one in found] != [one.size() for one in total]:
                raise ValueError("another number of ciphertexts, or of numbers in them")
            return [one + other for one, other in zip(total, found, strict=True)]
        except (ValueError, RuntimeError, TypeError) as fault:
            raise UploadRejected(f"An upload is no ciphertext of this run: {fault}.") from fault

    def bytes_of(self, total: Sequence[Any]) -> list[bytes]:
        """A sum as it travels back to the clients."""
        return [one.serialize() for one in total]


def library() -> Any:
    """TenSEAL; raises :class:`MissingExtra` where it is not installed."""
    try:
        import tenseal  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise MissingExtra("tenseal", "encrypted", "Homomorphic encryption") from None
    return tenseal
