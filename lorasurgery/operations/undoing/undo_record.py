"""What brings a base back byte for byte from its merge: differences to what subtraction predicts.

The merged weight less the adapter's change is the base to within a rounding, and the kernel that
predicts gives the same bits everywhere: base - prediction is mostly zeros. Kept whole is what cannot be
predicted: replaced tensors, the scales of quantized weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import blake3
import numpy as np
import zstandard

from lorasurgery.arrays import NUMPY, Array, as_bytes
from lorasurgery.change import Piece
from lorasurgery.codec import Packed, Rule
from lorasurgery.device import HOST
from lorasurgery.model import Model
from lorasurgery.weights import codec_of

if TYPE_CHECKING:
    from lorasurgery.edit import Step

# (first row, last row + 1, merged [rows, columns], what was added to them)
Keep: TypeAlias = Callable[[int, int, Array, Piece], None]

FOLDER = "undo"
DIGEST_BYTES = 32
_LEVEL = 3
CHUNK = 1 << 16


def predict_codes(merged: Array, piece: Piece, packed: Packed, absmax: Array) -> Array:
    """A quantized base's codes uint8 as they must have been, its scales being known.

    On the processor, as is all that predicts: there they will be restored.
    """
    before, here = piece.before(merged, NUMPY["F32"]), replace(packed, device=HOST)
    codes, _ = codec_of(packed.codec).encode(before.reshape(-1), here, Rule(absmax=absmax))
    return codes


def difference(base: Array, predicted: Array) -> Array:
    """base - predicted as unsigned integers that wrap, flat."""
    kind = unsigned(base)
    wrapped: Array = base.reshape(-1).view(kind) - predicted.reshape(-1).view(kind)
    return wrapped


def restore(predicted: Array, wrapped: Array) -> Array:
    """The inverse: predicted + difference, in predicted's shape and dtype."""
    total: Array = predicted.reshape(-1).view(unsigned(predicted)) + wrapped
    return total.view(predicted.dtype).reshape(predicted.shape)


def unsigned(array: Array) -> np.dtype[Any]:
    """The unsigned integers as wide as an array's elements."""
    return np.dtype(f"u{array.dtype.itemsize}")


@dataclass(frozen=True, slots=True)
class Kept:
    """Of a base weight, what the undo file needs; it is stored quantized if `model` says so."""

    model: Model
    name: str
    whole: bool = False  # nothing in the merged model predicts it
    scales: bool = True  # a quantized weight's scales are lost too

    @property
    def packed(self) -> Packed | None:
        return self.model.weights.packed.get(self.name)

    @property
    def differences(self) -> tuple[str, ...]:
        """Stored tensors that are predicted."""
        if self.whole:
            return ()
        return (self.packed.codes if self.packed else self.name,)

    @property
    def wholes(self) -> tuple[str, ...]:
        """Stored tensors that are kept as they are."""
        if self.packed is None:
            return (self.name,) if self.whole else ()
        names = [p.name for p in self.packed.parts.values() if p.name != self.packed.codes]
        return (*([self.packed.codes] if self.whole else []), *(names if self.scales else []))


@contextmanager
def keeping(step: Step, kept: Kept | None) -> Iterator[Keep]:
    """Gives a function to be called with each merged tile; it does nothing in a rehearsal."""
    if kept is None or step.scratch is None:
        yield lambda *_: None
        return
    folder = step.scratch / FOLDER
    folder.mkdir(exist_ok=True)
    for name in kept.wholes:
        with recording(folder, name) as recorder:
            recorder.whole(kept.model.stored.read(name))
    if not kept.differences:
        yield lambda *_: None
        return
    with recording(folder, kept.differences[0]) as recorder:
        yield _keep_codes(kept, recorder) if kept.packed else _keep_rows(kept, recorder)


def _keep_rows(kept: Kept, recorder: Recorder) -> Keep:
    def keep(start: int, stop: int, merged: Array, piece: Piece) -> None:
        base = kept.model.stored.read(kept.name, start, stop).reshape(merged.shape)
        recorder.difference(base, piece.before(merged, base.dtype))

    return keep


def _keep_codes(kept: Kept, recorder: Recorder) -> Keep:
    def keep(start: int, stop: int, merged: Array, piece: Piece) -> None:
        codes, absmax = packed_rows(kept.model, kept.name, start, stop)
        packed = kept.model.weights.packed[kept.name]
        recorder.difference(codes, predict_codes(merged, piece, packed, absmax))

    return keep


def packed_rows(model: Model, name: str, start: int, stop: int) -> tuple[Array, Array]:
    """Codes uint8 and scales of rows start:stop, which must begin at a block."""
    packed = model.weights.packed[name]
    row = packed.info.numel // packed.info.shape[0]
    begin, end = start * row, min(stop, packed.info.shape[0]) * row
    block = codec_of(packed.codec).multiple(packed)
    codes = model.stored.read(packed.codes).reshape(-1).view(np.uint8)
    absmax = model.weights.scales(name)
    return codes[begin // 2 : -(-end // 2)], absmax[begin // block : -(-end // block)]


class Recorder:
    """The compressed record of one stored tensor, growing tile by tile.

    Differences are written in chunks of CHUNK elements, however they come: the elements' lowest
    bytes, then the next ones, since the higher are nearly always zero.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        compressor = zstandard.ZstdCompressor(level=_LEVEL)
        self._stream = compressor.stream_writer(self._file, closefd=False)
        self._digest, self._rest = blake3.blake3(), np.empty(0, np.uint8)

    def whole(self, base: Array) -> None:
        """Bytes that nothing predicts."""
        raw = as_bytes(base)
        self._digest.update(raw)
        self._stream.write(raw.tobytes())

    def difference(self, base: Array, predicted: Array) -> None:
        """The base's next elements, as the difference to what will be predicted for them."""
        self._digest.update(as_bytes(base))
        new = difference(base, predicted)
        held = np.concatenate([self._rest, new]) if self._rest.size else new
        full = held.size // CHUNK * CHUNK
        for chunk in held[:full].reshape(-1, CHUNK):
            self._stream.write(_planes(chunk))
        self._rest = held[full:].copy()

    def close(self) -> None:
        """The digest of the base's bytes ends the file."""
        if self._rest.size:
            self._stream.write(_planes(self._rest))
        self._stream.close()  # type: ignore[no-untyped-call]
        self._file.write(self._digest.digest())
        self._file.close()


def _planes(chunk: Array) -> bytes:
    return chunk.view(np.uint8).reshape(-1, chunk.itemsize).T.tobytes()


@contextmanager
def recording(folder: Path, name: str) -> Iterator[Recorder]:
    """The recorder of one stored tensor."""
    recorder = Recorder(folder / file_name(name))
    try:
        yield recorder
    finally:
        recorder.close()


def file_name(name: str) -> str:
    """Where a tensor's record lies until all are put together."""
    return f"{blake3.blake3(name.encode()).hexdigest()[:24]}.zst"
