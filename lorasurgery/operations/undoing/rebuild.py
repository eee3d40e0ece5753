"""The edits that put a base together again, byte for byte: predictions corrected, wholes, copies."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import blake3
import numpy as np

from lorasurgery.arrays import NUMPY, Array, as_bytes
from lorasurgery.change import Change, LowRank, Piece
from lorasurgery.checkpoint import Checkpoint
from lorasurgery.codec import Packed
from lorasurgery.edit import Edit, Metrics, Step, copy_edit
from lorasurgery.errors import FormatError, VerificationError
from lorasurgery.formats._safetensors_header import parse_header
from lorasurgery.formats._writer import Shard
from lorasurgery.model import Model
from lorasurgery.operations.undoing.undo_read import UndoFile
from lorasurgery.operations.undoing.undo_record import predict_codes, restore
from lorasurgery.tensors import TensorInfo
from lorasurgery.weights import codec_of, packed_weights


class Base:
    """The base as a checkpoint of facts; only what was kept whole, or lies unchanged in the merge, reads."""

    def __init__(self, merged: Checkpoint, undo: UndoFile) -> None:
        self.path, self._merged, self._undo = undo.path, merged, undo
        self.metadata: Mapping[str, str] = {}
        self.shards: list[Shard] = []
        self._infos: dict[str, TensorInfo] = {}
        for shard in undo.facts["shards"]:
            header = shard["header"].encode()
            size = _data_size(undo.path, header)
            _, infos, offsets = parse_header(undo.path, header, size)
            ordered = sorted(infos.values(), key=lambda info: offsets[info.name])
            self.shards.append(Shard(shard["file"], header, tuple(ordered)))
            self._infos |= infos

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    def info(self, name: str) -> TensorInfo:
        return self._infos[name]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        info = self._infos[name]
        if name in self._undo:
            whole = self._undo.whole(name).view(NUMPY[info.dtype]).reshape(info.shape)
            return whole[start:stop] if info.shape else whole
        return self._merged.read(name, start, stop)

    def release(self, name: str) -> None:
        """Nothing is held."""

    def place(self, name: str) -> tuple[Path, int] | None:
        return None if name in self._undo else self._merged.place(name)

    def storage(self, name: str) -> tuple[str, int]:
        return self._infos[name].dtype, self._infos[name].nbytes


def _data_size(path: Path, header: bytes) -> int:
    """What the header's tensors take; parse_header then finds them consistent."""
    entries = json.loads(header)
    ends: list[int] = [
        e["data_offsets"][1] for name, e in entries.items() if name != "__metadata__"
    ]
    if not ends:
        raise FormatError(f"{path}: describes a file without tensors. Restore it.")
    return max(ends)


@dataclass(frozen=True, slots=True)
class Rebuild:
    """Everything that the edits need; `changes` is what was added to each logical weight."""

    merged: Model
    undo: UndoFile
    base: Base
    changes: Mapping[str, Callable[[], Change]]

    def edits(self) -> Iterator[Edit]:
        """One for each logical weight of the base."""
        packed = packed_weights(self.base)
        parts = {info.name for p in packed.values() for info in p.parts.values()}
        for name in self.base:
            if name in packed:
                yield self._packed_edit(packed[name])
            elif name not in parts:
                yield self._plain_edit(name)

    def _plain_edit(self, name: str) -> Edit:
        info = self.base.info(name)
        if name not in self.undo:
            self._must_hold(info)
            return copy_edit(self.merged.stored, name)

        def apply(step: Step) -> Metrics:
            digest = blake3.blake3()
            tiles = [self.undo.whole(name)] if name in self.undo.wholes else self._rows(step, info)
            for tile in tiles:
                digest.update(as_bytes(tile))
                step.append(name, tile)
            self._check(name, digest)
            return {"restored": float(info.numel)}

        return Edit(name, (info,), apply)

    def _rows(self, step: Step, info: TensorInfo) -> Iterator[Array]:
        dtype = NUMPY[info.dtype]
        with self.undo.differences(info.name, np.dtype(f"u{dtype.itemsize}")) as take:
            for merged, piece in self._tiles(step, info, 1):
                predicted = piece.before(merged, dtype)
                yield restore(predicted, take(predicted.size))

    def _packed_edit(self, packed: Packed) -> Edit:
        infos = tuple(packed.parts.values())
        for info in infos:
            if info.name not in self.undo:
                self._must_hold(info)

        def apply(step: Step) -> Metrics:
            for info in infos:
                if info.name not in self.undo:
                    step.copy(info.name, self.merged.stored)
                    continue
                digest = blake3.blake3()
                whole = info.name in self.undo.wholes
                tiles = [self.undo.whole(info.name)] if whole else self._codes(step, packed)
                for tile in tiles:
                    digest.update(as_bytes(tile))
                    step.append(info.name, tile)
                self._check(info.name, digest)
            touched = any(info.name in self.undo for info in infos)
            return {"restored": float(packed.info.numel)} if touched else {}

        return Edit(packed.info.name, infos, apply)

    def _codes(self, step: Step, packed: Packed) -> Iterator[Array]:
        codec, row = codec_of(packed.codec), packed.info.numel // packed.info.shape[0]
        block, scales = codec.multiple(packed), codec.scales(packed, self.base.read)
        first = 0
        with self.undo.differences(packed.codes, np.dtype(np.uint8)) as take:
            for merged, piece in self._tiles(step, packed.info, block):
                begin, end = first * row, (first + len(merged)) * row
                absmax = scales[begin // block : -(-end // block)]
                predicted = predict_codes(merged, piece, packed, absmax)
                yield restore(predicted, take(predicted.size))
                first += len(merged)

    def _tiles(self, step: Step, info: TensorInfo, multiple: int) -> Iterator[tuple[Array, Piece]]:
        """(merged [rows, columns], what was added to them) over the merged weight, in its order."""
        weights, name = self.merged.weights, info.name
        change = self.changes[name]() if name in self.changes else LowRank.nothing(info)
        row = info.numel // max(1, info.shape[0] if info.shape else 1)
        for start, tile in step.tiles(weights, name, multiple):
            stop = start + (len(tile) if tile.ndim else 1)
            for part, piece in change.tiles(start, stop):
                begin = (part.start or 0) * row
                end = tile.size if part.stop is None else part.stop * row
                yield tile.reshape(-1)[begin:end].reshape(-1, change.columns), piece

    def _must_hold(self, info: TensorInfo) -> None:
        stored = self.merged.stored
        if info.name not in stored or stored.info(info.name) != info:
            got = str(stored.info(info.name)) if info.name in stored else "nothing of that name"
            raise FormatError(
                f"{self.merged.path}: {info} is to be copied from it, but it has {got}. "
                f"{self.undo.path} was written for another merge."
            )

    def _check(self, name: str, digest: blake3.blake3) -> None:
        if f"blake3:{digest.hexdigest()}" != self.undo.digest(name):
            raise VerificationError(
                f"{self.merged.path}: {name} does not come back: its bytes differ from the base's. "
                "The merged weights were changed since, or another adapter was named."
            )
