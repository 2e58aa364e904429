"""Pieces - the bytes of large letters as FLARE carries them: whoever they are for fetches one after the other.

FLARE packs arrays of NumPy into zip archives, with copies and check sums that take as long as their journey; a letter
has check sums of its own. Here they are copied once as they leave, and lie in memory as they came.
"""

# pyright: reportMissingTypeStubs=false, reportIncompatibleMethodOverride=false
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nvflare.fuel.f3.streaming.cacheable import CacheableObject, ItemConsumer
from nvflare.fuel.f3.streaming.download_service import download_object
from nvflare.fuel.utils import fobs
from nvflare.fuel.utils.fobs.datum import DatumManager
from nvflare.fuel.utils.fobs.decomposers.via_downloader import ViaDownloaderDecomposer

DOT = 201
"""The number (one byte) under which FLARE knows what it has to fetch; its own are below ten."""
TOGETHER = 2 * 2**20
"""Bytes up to which small pieces are fetched together."""


class Piece:
    """Bytes that FLARE carries on their own.

    Attributes:
        data: the bytes.
    """

    __slots__ = ("data",)

    def __init__(self, data: bytes | memoryview) -> None:
        self.data = data


class _Source(CacheableObject):
    """What is fetched: the pieces of one letter, in their order."""

    def get_item_count(self) -> int:
        return len(self._held)

    def get_item_size(self, index: int) -> int:
        return len(self._held[index].data)

    def produce_item(self, index: int) -> bytes:
        return bytes(self._held[index].data)  # FLARE keeps the last that it sent: not a view of the whole letter

    @property
    def _held(self) -> Sequence[Piece]:
        """The pieces; FLARE lets go of them once everybody has them."""
        found: Any = self.base_obj
        return found


class _Sink(ItemConsumer):
    """What came, by the names that FLARE gives: T0, T1, ..."""

    def consume_items(self, items: Sequence[Any], result: dict[str, Piece] | None) -> dict[str, Piece]:
        found = result or {}
        for item in items:
            if not isinstance(item, bytes | bytearray | memoryview):
                raise TypeError(f"a piece of a letter is a {type(item).__name__}")
            found[f"T{len(found)}"] = Piece(memoryview(item))
        return found


class PieceDecomposer(ViaDownloaderDecomposer):
    """Tells FOBS, by which FLARE writes what it sends, how pieces travel."""

    def __init__(self) -> None:
        super().__init__(TOGETHER, "fedllm_")

    def supported_type(self) -> type[Piece]:
        """See :class:`nvflare.fuel.utils.fobs.Decomposer`."""
        return Piece

    def get_download_dot(self) -> int:
        """See :class:`ViaDownloaderDecomposer`."""
        return DOT

    def to_downloadable(self, items: Mapping[str, Piece], max_chunk_size: int, fobs_ctx: dict[str, Any]) -> _Source:
        """See :class:`ViaDownloaderDecomposer`."""
        return _Source(list(items.values()), max_chunk_size)

    def download(self, from_fqcn: str, ref_id: str, **words: Any) -> tuple[str | None, dict[str, Piece] | None]:
        """See :class:`ViaDownloaderDecomposer`."""
        words.pop("fobs_ctx", None)
        sink = _Sink()
        download_object(from_fqcn=from_fqcn, ref_id=ref_id, consumer=sink, **words)
        return sink.error, sink.result

    def native_decompose(self, target: Piece, manager: DatumManager | None = None) -> bytes:
        """See :class:`ViaDownloaderDecomposer`; for messages that never leave a process."""
        return bytes(target.data)

    def native_recompose(self, data: bytes, manager: DatumManager | None = None) -> Piece:
        """See :class:`ViaDownloaderDecomposer`."""
        return Piece(data)


def register() -> None:
    """Let FLARE carry pieces in this process; more than once does no harm."""
    fobs.register(PieceDecomposer)
