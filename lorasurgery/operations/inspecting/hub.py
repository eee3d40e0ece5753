"""A repository on the hub, looked at through HTTP range reads: headers come, weights stay there."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lorasurgery.checkpoint import Checkpoint, Union
from lorasurgery.errors import FormatError
from lorasurgery.formats._safetensors_header import MAX_HEADER, parse_header
from lorasurgery.operations.inspecting.source import DOCUMENTS, Source
from lorasurgery.tensors import TensorInfo

if TYPE_CHECKING:
    from huggingface_hub import HfFileSystem

    from lorasurgery.arrays import Array

_AT_ONCE = 16  # requests
# small tensors that say what others mean: quantization states, kohya's alphas
_TELLING = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4", ".alpha")


def open_hub(text: str) -> Source:
    """`org/name[@revision]`, at the commit that the revision names now.

    Raises FormatError where there is no such repository, or no safetensors in it.
    """
    with _answers(text):
        repository = Repository(text)
        names = repository.weights()
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            shards: list[Checkpoint] = list(pool.map(lambda n: HubFile(repository, n), names))
        documents = {n: repository.json(n) for n in DOCUMENTS if n in repository.sizes}
    stored = (
        shards[0] if len(shards) == 1 else Union(Path(text), dict(zip(names, shards, strict=True)))
    )
    return Source(text, stored, tuple(names), documents)


class Repository:
    """The files of one revision and their sizes; `read` fetches a byte range."""

    def __init__(self, text: str) -> None:
        from huggingface_hub import HfFileSystem

        self.text = text
        self._files: HfFileSystem = HfFileSystem()
        entries = cast(list[dict[str, Any]], self._files.ls(text, detail=True))
        files = [entry for entry in entries if entry["type"] == "file"]
        self.sizes: dict[str, int] = {f["name"].rpartition("/")[2]: f["size"] for f in files}

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Bytes start:stop of a file, in one request."""
        with self._files.open(f"{self.text}/{name}", "rb", cache_type="none") as file:
            file.seek(start)
            data: bytes = file.read(stop - start)
        if len(data) != stop - start:
            raise FormatError(
                f"{self.text}: {name}: {len(data)} bytes came of {start} to {stop}. Try again."
            )
        return data

    def json(self, name: str) -> dict[str, Any]:
        """A JSON object from a small file."""
        try:
            value = json.loads(self.read(name, 0, self.sizes[name]))
        except ValueError as error:
            raise FormatError(f"{self.text}: {name}: no JSON ({error}). Tell its author.") from None
        if not isinstance(value, dict):
            raise FormatError(f"{self.text}: {name}: no JSON object. Tell its author.")
        return value

    def weights(self) -> list[str]:
        """The safetensors files, chosen as for a directory."""
        found = sorted(name for name in self.sizes if name.endswith(".safetensors"))
        index = next((n for n in sorted(self.sizes) if n.endswith(".safetensors.index.json")), "")
        if index and "model.safetensors" not in found:
            found = self._indexed(index)
        for name in ("model.safetensors", "adapter_model.safetensors"):
            if name in found:
                return [name]
        if not found:
            raise FormatError(
                f"{self.text}: no safetensors among its {len(self.sizes)} files. "
                f"Download it first: `hf download {self.text.replace('@', ' --revision ')}`."
            )
        if len(found) > 1 and not index:
            raise FormatError(
                f"{self.text}: {len(found)} safetensors files and no index says how they belong "
                "together. Download the one that is meant."
            )
        return found

    def _indexed(self, index: str) -> list[str]:
        weight_map = self.json(index).get("weight_map")
        names = weight_map.values() if isinstance(weight_map, dict) else ()
        shards = sorted({str(name) for name in names})
        absent = [name for name in shards if name not in self.sizes]
        if absent or not shards:
            raise FormatError(
                f"{self.text}: {index}: names {', '.join(absent[:3]) or 'no shard'}, which is not "
                "there. Tell its author."
            )
        return shards


class HubFile:
    """A checkpoint in one remote safetensors file; `read` fetches one whole tensor."""

    def __init__(self, repository: Repository, name: str) -> None:
        self.path = Path(f"{repository.text}/{name}")
        self._repository, self._name = repository, name
        size = repository.sizes[name]
        length = int.from_bytes(repository.read(name, 0, 8), "little")
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise FormatError(
                f"{self.path}: the header claims {length} bytes of a file of {size}. "
                "Tell its author."
            )
        header = repository.read(name, 8, 8 + length)
        self._start = 8 + length
        self.metadata, self._infos, self._offsets = parse_header(
            self.path, header, size - self._start
        )
        self._data = self._fetch(n for n in self._infos if n.endswith(_TELLING))

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    def info(self, name: str) -> TensorInfo:
        return self._infos[name]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Rows start:stop."""
        import numpy as np

        from lorasurgery.arrays import NUMPY

        info = self._infos[name]
        data = self._data.get(name) or self._bytes(name)
        whole = np.frombuffer(data, NUMPY.get(info.dtype, np.dtype(np.uint8)))
        if info.dtype not in NUMPY:
            return whole
        return whole.reshape(info.shape)[start:stop] if info.shape else whole.reshape(())

    def release(self, name: str) -> None:
        """Nothing is kept but what is small."""

    def place(self, name: str) -> tuple[Path, int] | None:  # noqa: ARG002
        return None

    def storage(self, name: str) -> tuple[str, int]:
        return self._infos[name].dtype, self._infos[name].nbytes

    def _fetch(self, names: Iterable[str]) -> Mapping[str, bytes]:
        """Several tensors at once: one after the other, 200 of them would take half a minute."""
        wanted = list(names)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return dict(zip(wanted, pool.map(self._bytes, wanted), strict=True))

    def _bytes(self, name: str) -> bytes:
        begin, end = (self._start + offset for offset in self._offsets[name])
        return self._repository.read(self._name, begin, end)


@contextmanager
def _answers(text: str) -> Iterator[None]:
    """What the hub or the network refuse, as one line."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # huggingface_hub has changed its HTTP client more than once
    clients = [n for n in ("httpx", "httpx2") if importlib.util.find_spec(n)]
    network = tuple(importlib.import_module(name).HTTPError for name in clients)
    try:
        yield
    except (HfHubHTTPError, HFValidationError, OSError, *network) as error:
        reason = " ".join(str(error).split())
        raise FormatError(
            f"{text}: no such path, and the hub does not give it ({reason}). Check the name."
        ) from None
