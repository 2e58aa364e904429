"""Threshold - CKKS whose key is in shares, by OpenFHE: nobody holds the key, and all shares together open one sum.

Ring N = 8192, one limb q of 60 bits, scale 2^50, 128-bit security. What travels is numbers modulo q and nothing else:
the library's own form of an object is a program's memory, and no bytes of a stranger are parsed as one.

    a = hash of the session               share i: b_i = e_i - a s_i        joint key: b = sum b_i
    upload: c0 = b v + e + u, c1 = a v + e'      partial decryption: d_i = s_i c1 + smudge      sum u = c0 + sum d_i

All shares are alike: the server adds c0 itself, so no party leads. Nobody chooses a, with which a cheat could make
uploads readable. The smudge has a deviation of 2^20 a coefficient (OpenFHE's for fixed noise), some thousand times that
of the noise it hides, and far less than a statistical proof asks for. So a share opens one sum and is then forgotten.

Sources: Asharov et al., EUROCRYPT 2012, section 3 (keys that add up, smudging); Mouchet et al., PETS 2021 (one a for
all); Cheon et al., ASIACRYPT 2017 (CKKS).
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import math
import re
import sys
from pathlib import Path
from typing import Any, Protocol

import torch

from fedllm.core.errors import ConfigError, FedLLMError, MissingExtra, UploadRejected
from fedllm.modes.encrypted.ckks import GRAIN

RING = 8192
"""N, the coefficients of a polynomial."""
SLOTS = RING // 2
"""Numbers of one ciphertext."""
SCALE_BITS = 50
"""Bits behind the point. The smudge makes fewer useless: at 40 the error is 4e-4."""
LARGEST = 2.0**8
"""The largest magnitude of a sum; from 2^9 on it would wrap silently."""
SMUDGE = 2.0**20
"""Deviation of the noise on each coefficient of a partial decryption."""
DEVIATIONS = 8
"""So many deviations of its noise a number of a sum may be wrong by: one in 10^15 is further off."""


class Scheme(Protocol):
    """Additive encryption whose key is in shares. All it makes is int64 from 0 to `modulus` - 1.

    Attributes:
        identity: the same where two schemes understand each other.
        modulus: q, at most 2^62.
        width: numbers of a public share, and of each half of a ciphertext.
        slots: entries of a vector in one ciphertext.
        largest: bound on the magnitudes of a sum.
    """

    identity: str
    modulus: int
    width: int
    slots: int
    largest: float

    def share(self, about: bytes) -> tuple[Any, torch.Tensor]:
        """A fresh secret, which its client keeps, and its public share b_i [width] under the a of `about`."""
        ...

    def encrypt(self, about: bytes, key: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """c0 and c1 [pieces, width] of a vector under the joint key b [width]."""
        ...

    def partial(self, secret: Any, c1: torch.Tensor) -> torch.Tensor:
        """d_i [pieces, width] of the sum's c1 [pieces, width], smudged."""
        ...

    def fuse(self, total: torch.Tensor, size: int) -> torch.Tensor:
        """The sum [size], float64, from c0 + sum d_i [pieces, width]; raises :class:`UploadRejected` for nonsense."""
        ...

    def error(self, parties: int) -> float:
        """How far a number of a sum may be off."""
        ...


class Threshold:
    """The scheme of OpenFHE; implements :class:`Scheme`. It holds no secret.

    Raises:
        MissingExtra: OpenFHE is not installed.
        ConfigError: it is installed and cannot be loaded, or is too old or too new to be understood.
    """

    width, slots, largest = RING, SLOTS, LARGEST

    def __init__(self) -> None:
        self._fhe = fhe = library()
        context = self._context = _context(fhe)
        pair = context.KeyGen()  # of which only the form is used
        ciphertext = context.Encrypt(pair.publicKey, context.MakeCKKSPackedPlaintext([0.0] * SLOTS))
        (partial,) = context.MultipartyDecryptMain([ciphertext], pair.secretKey)
        self._key, self._ciphertext, self._partial = (
            _Form(fhe.Serialize(one, fhe.BINARY), count)
            for one, count in ((pair.publicKey, 2), (ciphertext, 2), (partial, 1))
        )
        self.modulus = self._key.modulus
        self.identity = f"ckks-threshold-1 {RING} {self.modulus} {SCALE_BITS}"

    def share(self, about: bytes) -> tuple[Any, torch.Tensor]:
        """See :class:`Scheme`."""
        pair = self._context.MultipartyKeyGen(self._public(torch.zeros(RING, dtype=torch.int64), about), False, True)
        return pair.secretKey, self._key.read(self._bytes(pair.publicKey))[0]

    def encrypt(self, about: bytes, key: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See :class:`Scheme`."""
        public, pieces = self._public(key, about), []
        for piece in values.double().split(SLOTS):
            text = self._context.MakeCKKSPackedPlaintext(piece.tolist())
            pieces.append(self._ciphertext.read(self._bytes(self._context.Encrypt(public, text))))
        c0, c1 = (torch.stack(half) for half in zip(*pieces, strict=True))
        return c0, c1

    def partial(self, secret: Any, c1: torch.Tensor) -> torch.Tensor:
        """See :class:`Scheme`."""
        nothing, found = torch.zeros(RING, dtype=torch.int64), []
        for row in c1:
            (answer,) = self._context.MultipartyDecryptMain([self._parsed(self._ciphertext, nothing, row)], secret)
            found += self._partial.read(self._bytes(answer))
        return torch.stack(found)

    def fuse(self, total: torch.Tensor, size: int) -> torch.Tensor:
        """See :class:`Scheme`; rounded to :data:`~fedllm.modes.encrypted.ckks.GRAIN`."""
        found: list[float] = []
        for row in total:
            try:
                text = self._context.MultipartyDecryptFusion([self._parsed(self._partial, row)])
                found += text.GetRealPackedValue()
            except RuntimeError as fault:
                raise UploadRejected("The partial decryptions do not open the sum: only noise comes out.") from fault
        values = torch.tensor(found, dtype=torch.float64)
        most = float(values.abs().max())
        if not most < LARGEST + 1:  # where a share is missing or wrong, numbers are about 10^4
            raise UploadRejected(
                f"The partial decryptions do not open the sum: it has a magnitude of {most:g}.",
                f"Allowed: below {LARGEST:g}.",
            )
        return torch.round(values[:size] / GRAIN) * GRAIN

    def error(self, parties: int) -> float:
        """See :class:`Scheme`.

        Each party's smudge enters a number as a sum of N / 2 coefficients' noise; decoding adds as much again, so that
        a sum tells less of the key; rounding adds half a grain.
        """
        deviation = math.sqrt(2 * parties * SLOTS) * SMUDGE / 2.0**SCALE_BITS
        return DEVIATIONS * deviation + GRAIN / 2

    def _public(self, key: torch.Tensor, about: bytes) -> Any:
        data = self._key.written(key, uniform(about, self.modulus, RING))
        return self._fhe.DeserializePublicKeyString(data, self._fhe.BINARY)

    def _parsed(self, form: _Form, *rows: torch.Tensor) -> Any:
        return self._fhe.DeserializeCiphertextString(form.written(*rows), self._fhe.BINARY)

    def _bytes(self, thing: Any) -> bytes:
        return self._fhe.Serialize(thing, self._fhe.BINARY)


class _Form:
    """Where the polynomials lie in the library's own bytes of an object, so that only they travel.

    A polynomial is its length, N numbers of 64 bits and their modulus, which is 1 modulo 2 N; that is found by looking.

    Args:
        example: an object made here, whose polynomials are random.
        count: how many it has.
    """

    def __init__(self, example: bytes, count: int) -> None:
        found = self._places(example)
        if len(found) != count or len({modulus for _, modulus in found}) != 1:
            raise ConfigError(
                "This release of OpenFHE writes its objects in a form that is not known here.",
                "Known: 1.4 to 1.6.",
                action="Install another release of openfhe, or set encrypted.keys=shared.",
            )
        self._example, self._count, self.modulus = example, count, found[0][1]
        self._starts = [start for start, _ in found]

    @staticmethod
    def _places(data: bytes) -> list[tuple[int, int]]:
        """(start, modulus) of each polynomial."""
        mark, at, found = RING.to_bytes(8, "little"), -1, list[tuple[int, int]]()
        while (at := data.find(mark, at + 1)) >= 0:
            start, end = at + 8, at + 8 + 8 * RING
            modulus = int.from_bytes(data[end : end + 8], "little")
            if len(data) >= end + 8 and modulus % (2 * RING) == 1 and modulus < 2**62:
                words = torch.frombuffer(bytearray(data[start:end]), dtype=torch.int64)
                if int(words.min()) >= 0 and modulus // 2 < int(words.max()) < modulus:
                    found.append((start, modulus))
        return found

    def read(self, data: bytes) -> list[torch.Tensor]:
        """The polynomials [N] of an object made here."""
        places = self._places(data)
        if len(places) != self._count or {modulus for _, modulus in places} != {self.modulus}:
            raise ConfigError(
                "OpenFHE wrote an object in another form than the first one.", action="Set encrypted.keys=shared."
            )
        return [torch.frombuffer(bytearray(data[s : s + 8 * RING]), dtype=torch.int64) for s, _ in places]

    def written(self, *rows: torch.Tensor) -> bytes:
        """The bytes of an object with these polynomials [N]."""
        found = bytearray(self._example)
        for start, row in zip(self._starts, rows, strict=True):
            found[start : start + 8 * RING] = row.contiguous().numpy().tobytes()
        return bytes(found)


def uniform(about: bytes, modulus: int, count: int) -> torch.Tensor:
    """int64 [count], uniform from 0 to `modulus` - 1, that everybody finds from `about` and nobody can choose."""
    mask, spare, found = 2 ** modulus.bit_length() - 1, 64, torch.zeros(0, dtype=torch.int64)
    while len(found) < count:
        data = hashlib.shake_256(b"fedllm a" + about).digest(8 * (count + spare))
        words = torch.frombuffer(bytearray(data), dtype=torch.int64) & mask
        found, spare = words[words < modulus], 2 * spare + count
    return found[:count]


def added(left: torch.Tensor, right: torch.Tensor, modulus: int) -> torch.Tensor:
    """left + right modulo `modulus`, both reduced."""
    total = left + right
    return torch.where(total >= modulus, total - modulus, total)


def library() -> Any:
    """OpenFHE.

    Raises:
        MissingExtra: it is not installed.
        ConfigError: it is installed, and has no module for this Python, or one that cannot be loaded here.
    """
    try:
        import openfhe  # pyright: ignore[reportMissingImports]
    except ImportError as fault:
        raise _why(fault) from fault
    return openfhe


def _why(fault: ImportError) -> FedLLMError:
    """What stands in the way: wheels are tagged for any Python, and hold a module for one."""
    spec = importlib.util.find_spec("openfhe")
    if spec is None:
        return MissingExtra("openfhe", "threshold", "The option encrypted.keys=threshold")
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    files = [p.name for folder in spec.submodule_search_locations or () for p in Path(folder).glob("openfhe.*")]
    action = "Use another Python or build openfhe-python from its sources; or set encrypted.keys=shared."
    if not any(name == "openfhe" + suffix for name in files for suffix in importlib.machinery.EXTENSION_SUFFIXES):
        tags = {found.groups() for name in files if (found := re.search(r"(?:cpython-|cp)(\d)(\d+)", name))}
        held = ", ".join(f"{major}.{minor}" for major, minor in sorted(tags, key=lambda tag: int(tag[1]))) or "none"
        return ConfigError(
            f"OpenFHE is installed, but has no module for Python {here}.", f"It has modules for: {held}.", action=action
        )
    return ConfigError(f"OpenFHE is installed, but cannot be loaded: {fault}.", action=action)


def _context(fhe: Any) -> Any:
    """OpenFHE's parameters. With its default key switching it would ask for a ring of 16384; sums switch no keys."""
    parameters = fhe.CCParamsCKKSRNS()
    parameters.SetMultiplicativeDepth(0)
    parameters.SetFirstModSize(60)
    parameters.SetScalingModSize(SCALE_BITS)
    parameters.SetScalingTechnique(fhe.ScalingTechnique.FIXEDMANUAL)
    parameters.SetRingDim(RING)
    parameters.SetBatchSize(SLOTS)
    parameters.SetSecurityLevel(fhe.SecurityLevel.HEStd_128_classic)
    parameters.SetKeySwitchTechnique(fhe.KeySwitchTechnique.BV)
    context = fhe.GenCryptoContext(parameters)
    for feature in (fhe.PKESchemeFeature.PKE, fhe.PKESchemeFeature.LEVELEDSHE, fhe.PKESchemeFeature.MULTIPARTY):
        context.Enable(feature)
    return context
