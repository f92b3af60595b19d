"""`TrunkStore` keeps the states of a frozen trunk, in memory or on disk.

A store has a place for every record in every view. It keeps a record's states (those that a
`FrozenTrunk` captured, each (N, D) with an N of its own) and everything else of the record that is
needed later. Places are grouped in chunks. A chunk is filled, checked, locked and made anew as a
whole; on disk it is a file that is written under a temporary name and renamed. So an interrupted
filling continues where it stopped, and several processes can fill and read one store.

Shape legend: B rows of a batch, N tokens, D width.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from ..files import write_text
from .chunks import Chunks, DiskChunks, MemoryChunks
from .format import Damaged, file_parts, open_file, unpack

FORMAT = 1
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
ABOUT = "about.json"
CHUNK_BYTES = 2**26


@dataclass(frozen=True)
class Part:
    """The states of one row of a tower's batch.

    Attributes:
        states: by layer, (N, D) with the row's own number of tokens N.
        key: equal for rows whose states are equal, which a chunk keeps once; None to compare with
            no other row.
    """

    states: Mapping[int, Tensor]
    key: str | None = None


@dataclass(frozen=True)
class Entry:
    """The data of one record in one view.

    Attributes:
        rest: everything but the states, as bytes that `format.pack` returned.
        parts: by tower, the rows of its batch that come from the record (several texts of an
            image, say).
    """

    rest: bytes
    parts: Mapping[str, Sequence[Part]]


class TrunkStore:
    """Keeps the entries of `records` × `views` places.

    Args:
        chunks: the container of the chunks.
        key: the name of the content; a chunk with another key counts as damaged.
        views: how many views there are of each record.
        order: (records × views,) int64, each place (record · views + view) once: places that
            follow each other share a chunk.
        per_chunk: how many places a chunk has.
        dtype: the type in which states are kept; None to keep them as they are.
    """

    def __init__(
        self,
        chunks: Chunks,
        *,
        key: str,
        views: int,
        order: np.ndarray,
        per_chunk: int,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.chunks, self.key, self.views = chunks, key, views
        self.order, self.per_chunk, self.dtype = order, per_chunk, dtype
        self._position = np.empty(len(order), dtype=np.int64)
        self._position[order] = np.arange(len(order))
        self._open: dict[int, tuple[dict[str, Any], dict[str, Tensor]]] = {}
        self._sizes: dict[int, int] = {}  # bytes of the open chunks

    @classmethod
    def in_memory(cls, *, order: np.ndarray, views: int = 1, **options: Any) -> TrunkStore:
        """Returns an empty store in the memory of this process."""
        return cls(MemoryChunks(), key="", views=views, order=order, **options)

    @classmethod
    def on_disk(
        cls,
        root: Path,
        description: Mapping[str, Any],
        *,
        order: np.ndarray,
        views: int = 1,
        per_chunk: int,
        dtype: torch.dtype | None = None,
    ) -> TrunkStore:
        """Returns the store with the content that `description` names, in a subfolder of `root`.

        Args:
            root: the folder of all caches.
            description: JSON-ready; stores with equal descriptions are the same.
            per_chunk: how many places a chunk has, unless the folder is there and says otherwise.

        Raises:
            ValueError: the folder cannot be made.
        """
        whole = {**description, "dtype": str(dtype), "places": len(order), "views": views}
        key = key_of({**whole, "order": hashlib.sha256(order.tobytes()).hexdigest()})
        folder = root / key
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / "about.lock"):
                per_chunk = _places_per_chunk(folder / ABOUT, key, whole, per_chunk)
        except OSError as error:
            raise ValueError(f"no cache can be kept in {folder}: {error}") from error
        return cls(
            DiskChunks(folder),
            key=key,
            views=views,
            order=order,
            per_chunk=per_chunk,
            dtype=dtype,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}, "_sizes": {}}

    def __len__(self) -> int:
        """Returns the number of chunks."""
        return -(-len(self.order) // self.per_chunk)

    def places(self, chunk: int) -> np.ndarray:
        """Returns the places of a chunk, (n,) int64: record · views + view."""
        return self.order[chunk * self.per_chunk : (chunk + 1) * self.per_chunk]

    def missing(self) -> list[int]:
        """Returns the numbers of the chunks that are not there."""
        return [chunk for chunk in range(len(self)) if not self.has(chunk)]

    def has(self, chunk: int) -> bool:
        """Says whether the chunk is there."""
        return chunk in self._open or self.chunks.read(chunk) is not None

    def verify(self, chunks: Iterable[int] | None = None) -> list[int]:
        """Reads chunks (all by default), drops the damaged ones, and returns their numbers.

        If there are any, it gives one warning.
        """
        bad: dict[int, str] = {}
        for chunk in range(len(self)) if chunks is None else chunks:
            try:
                self._chunk(chunk, verify=True)
            except KeyError:
                continue
            except Damaged as error:
                bad[chunk] = str(error)
        for chunk in bad:
            self._open.pop(chunk, None)
            self.chunks.drop(chunk)
        if bad:
            where = getattr(self.chunks, "folder", "memory")
            first, reason = next(iter(bad.items()))
            warnings.warn(
                f"{len(bad)} of {len(self)} files of the cache in {where} cannot be used "
                f"({first:05d}.states: {reason}); they are made anew",
                stacklevel=2,
            )
        return list(bad)

    def claim(self, chunk: int) -> bool:
        """Says whether this process may fill the chunk: it is missing, and no other fills it."""
        if not self.chunks.claim(chunk):
            return False
        if self.chunks.read(chunk) is not None:  # another has just filled it
            self.chunks.release(chunk)
            return False
        return True

    def release(self, chunk: int) -> None:
        """Lets other processes claim the chunk again."""
        self.chunks.release(chunk)

    def put(self, chunk: int, entries: Sequence[Entry]) -> None:
        """Fills a chunk with an entry for each of its places, in order.

        Raises:
            ValueError: there are too few or too many entries, or states do not fit into the type
                in which they are kept.
        """
        places = self.places(chunk)
        if len(entries) != len(places):
            raise ValueError(f"chunk {chunk} has {len(places)} places, not {len(entries)}")
        rests = [entry.rest for entry in entries]
        arrays = {
            "places": torch.from_numpy(np.ascontiguousarray(places)),
            "rest": torch.frombuffer(bytearray().join(rests), dtype=torch.uint8),
            "rest/ends": _ends(map(len, rests)),
        }
        was: dict[str, str] = {}
        for tower in entries[0].parts:
            arrays |= self._tower(tower, [entry.parts[tower] for entry in entries], was)
        about = {"format": FORMAT, "key": self.key, "chunk": chunk, "was": was}
        self.chunks.write(chunk, file_parts(about, arrays))
        self._open.pop(chunk, None)

    def _tower(
        self, tower: str, entries: Sequence[Sequence[Part]], was: dict[str, str]
    ) -> dict[str, Tensor]:
        """Returns the arrays of a tower: rows of each entry, states of each row, and their ends.

        Args:
            entries: by entry, its rows of the tower's batch.
            was: is given the type that each layer's states have before they are kept.
        """
        kept: list[Part] = []
        numbers: dict[str, int] = {}
        rows: list[int] = []
        for parts in entries:
            for part in parts:
                number = len(kept) if part.key is None else numbers.setdefault(part.key, len(kept))
                if number == len(kept):
                    kept.append(part)
                rows.append(number)
        arrays = {
            f"{tower}/rows": torch.tensor(rows, dtype=torch.int64),
            f"{tower}/rows/ends": _ends(map(len, entries)),
            f"{tower}/ends": _ends(len(next(iter(part.states.values()))) for part in kept),
        }
        for layer in kept[0].states if kept else ():
            states = torch.cat([part.states[layer].detach().cpu() for part in kept])
            was[f"{tower}/{layer}"] = str(states.dtype).removeprefix("torch.")
            arrays[f"{tower}/states/{layer}"] = _as(self.dtype, states, tower)
        return arrays

    def rest(self, record: int, view: int = 0) -> Any:
        """Returns everything that was kept of a record besides its states.

        Raises:
            KeyError: its chunk is not there.
        """
        chunk, slot = self._find(record, view)
        _, arrays = self._chunk(chunk)
        start, stop = _span(arrays["rest/ends"], slot)
        return unpack(arrays["rest"][start:stop].numpy())

    def states(
        self, tower: str, layers: Sequence[int], rows: Sequence[tuple[int, int, int]]
    ) -> dict[int, Tensor]:
        """Returns by layer the states (B, N, D) of rows, in the type in which they are kept.

        Zeros follow the states of rows that have fewer tokens than others.

        Args:
            rows: each as (record, view, number of the row in its entry).

        Raises:
            KeyError: a chunk is not there.
        """
        spans = []
        for record, view, part in rows:
            chunk, slot = self._find(record, view)
            _, arrays = self._chunk(chunk)
            first, _ = _span(arrays[f"{tower}/rows/ends"], slot)
            number = int(arrays[f"{tower}/rows"][first + part])
            spans.append((arrays, *_span(arrays[f"{tower}/ends"], number)))
        tokens = max(stop - start for _, start, stop in spans)
        states = {}
        for layer in layers:
            name = f"{tower}/states/{layer}"
            like = spans[0][0][name]
            batch = torch.empty(len(spans), tokens, like.shape[1], dtype=like.dtype)
            for row, (arrays, start, stop) in zip(batch, spans, strict=True):
                row[: stop - start] = arrays[name][start:stop]
                row[stop - start :] = 0
            states[layer] = batch
        return states

    def captured(self, tower: str, layer: int) -> torch.dtype:
        """Returns the type that states had before they were kept.

        Raises:
            KeyError: no state of the tower is kept.
        """
        for chunk in range(len(self)):
            about, _ = self._chunk(chunk)
            if name := about["was"].get(f"{tower}/{layer}"):
                return getattr(torch, name)
        raise KeyError(f"{tower}/{layer}")

    @property
    def nbytes(self) -> int:
        """The size in bytes of all chunks that are there."""
        chunks = (self.chunks.read(chunk) for chunk in range(len(self)))
        return sum(len(data) for data in chunks if data is not None)

    def _find(self, record: int, view: int) -> tuple[int, int]:
        return divmod(int(self._position[record * self.views + view]), self.per_chunk)

    def _chunk(self, chunk: int, *, verify: bool = False) -> tuple[dict, dict[str, Tensor]]:
        if verify or chunk not in self._open:
            data = self.chunks.read(chunk)
            if data is None:
                raise Gone(
                    f"chunk {chunk} of the cache in {getattr(self.chunks, 'folder', 'memory')} is "
                    "not there; if it was deleted while a run used it, start that run again"
                )
            about, arrays = open_file(data, verify=verify)
            if about.get("format") != FORMAT or about.get("key") != self.key:
                raise Damaged("it is of another cache")
            if not np.array_equal(arrays["places"].numpy(), self.places(chunk)):
                raise Damaged("it holds other records")
            self._open[chunk] = about, arrays
            self._sizes[chunk] = len(data)
            return about, arrays
        # To read a mapped file beyond its end would end the process. A deleted one stays readable.
        if (size := self.chunks.size(chunk)) is not None and size < self._sizes[chunk]:
            del self._open[chunk]
            raise Damaged(
                f"chunk {chunk} of the cache in {getattr(self.chunks, 'folder', 'memory')} was cut "
                "while a run used it: start that run again"
            )
        return self._open[chunk]


class Gone(KeyError, ValueError):
    """A chunk that was there is not there any more."""

    def __str__(self) -> str:
        return str(self.args[0])


def key_of(description: Mapping[str, Any]) -> str:
    """Returns a name that is equal for equal descriptions (JSON-ready)."""
    text = json.dumps({**description, "format": FORMAT}, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def chunk_size(entry_bytes: float) -> int:
    """Returns how many places a chunk has if an entry takes about `entry_bytes`."""
    return min(max(int(CHUNK_BYTES / max(entry_bytes, 1)), 1), 4096)


def _places_per_chunk(path: Path, key: str, description: Mapping[str, Any], per_chunk: int) -> int:
    """Returns how many places a chunk has by the `about.json` at `path`.

    If that file is missing or unreadable, it is written with `per_chunk`.
    """
    if path.exists():
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
            if about["key"] == key and isinstance(about["per_chunk"], int):
                return max(about["per_chunk"], 1)
            reason = "it is of another cache"
        except (ValueError, KeyError, TypeError):
            reason = "it cannot be read"
        warnings.warn(f"{path}: {reason}; it is written anew", stacklevel=4)
    about = {"format": FORMAT, "key": key, "per_chunk": per_chunk, **description}
    write_text(path, json.dumps(about, indent=2, ensure_ascii=False) + "\n")
    return per_chunk


def _as(dtype: torch.dtype | None, states: Tensor, tower: str) -> Tensor:
    """Returns states in `dtype`, or raises ValueError if it cannot hold them."""
    if dtype is None or not states.is_floating_point() or states.dtype == dtype:
        return states
    kept = states.to(dtype)
    if dtype == torch.float16 and not torch.isfinite(kept).all() and torch.isfinite(states).all():
        raise ValueError(
            f"states of tower {tower!r} are as large as {float(states.abs().max()):.3g}, which "
            "fp16 cannot hold: keep them as bf16"
        )
    return kept


def _ends(lengths: Iterable[int]) -> Tensor:
    """Returns where each of several pieces ends that follow each other."""
    return torch.from_numpy(np.cumsum([0, *lengths])[1:].astype(np.int64))


def _span(ends: Tensor, number: int) -> tuple[int, int]:
    """Returns where piece `number` begins and ends."""
    return int(ends[number - 1]) if number else 0, int(ends[number])
