"""An ONNX model opened for surgery: the graph in onnx_ir, its data on disk until it is written.

The graph is read from a copy of the file's bytes that leaves the initializers out, so that memory holds
no weights; writing streams them, one at a time, into the file or into one beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasurgery.errors import FormatError
from lorasurgery.formats._onnx_tensor import Stored
from lorasurgery.formats._protobuf import BYTES, VARINT, Data, Field, encoded, fields
from lorasurgery.formats.onnx import File

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

    from lorasurgery.arrays import Array

MICROSOFT = "com.microsoft"
_KEPT = (1, 2, 8)  # of a TensorProto: dims, type, name
_GRAPH, _INITIALIZER = 7, 5


class Edited:
    """`nodes` are the graph's as they were, in the header's order; `made` computes new data by name."""

    def __init__(self, file: File) -> None:
        import onnx_ir as ir

        self.file = file
        _check_names(file)
        with _named(file):
            self.model: ir.Model = ir.from_proto(_skeleton(file))
        self.graph = self.model.graph
        self.nodes = list(self.graph)
        self.made: dict[str, Callable[[], Array]] = {}
        self._refuse_hidden()

    def add(self, name: str, dtype: Any, shape: tuple[int, ...], make: Callable[[], Array]) -> Any:
        """A new initializer, computed when it is written; `name` is lengthened where it is taken."""
        import onnx_ir as ir

        taken = {v.name for n in self.graph for v in n.outputs} | set(self.graph.initializers)
        taken |= {value.name for value in self.graph.inputs}
        while name in taken:
            name += "_"
        value = ir.Value(
            name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype),
            const_value=_promise(name, dtype, shape),
        )  # fmt: skip
        self.graph.register_initializer(value)
        self.made[name] = make
        return value

    def use_domain(self) -> None:
        """Declare onnxruntime's own operators."""
        self.graph.opset_imports.setdefault(MICROSOFT, 1)

    def drop_unused(self, value: Any) -> None:
        """Remove an initializer, or what leads to it, that nothing uses any more."""
        if value.uses() or value.is_graph_output():
            return
        node = value.producer()
        if node is None:
            self.graph.initializers.pop(value.name, None)
            if value in self.graph.inputs:
                self.graph.inputs.remove(value)
            return
        inputs = list(node.inputs)
        self.graph.remove(node, safe=True)
        for source in inputs:
            if source is not None:
                self.drop_unused(source)

    def proto(self) -> onnx.ModelProto:
        """The model without the data of its initializers."""
        import onnx_ir as ir

        # before version 4, each initializer was an input
        if self.model.ir_version < 4:
            self.model.ir_version = 4
            for value in list(self.graph.inputs):
                if value.is_initializer():
                    self.graph.inputs.remove(value)
        with _named(self.file):
            return ir.to_proto(self.model)

    def _refuse_hidden(self) -> None:
        """Data of subgraphs and of Constant nodes stays inline; beside the file it would be lost."""
        import onnx_ir as ir

        hidden = [
            value.name for graph in self.model.graphs() if graph is not self.graph
            for value in graph.initializers.values()
            if isinstance(value.const_value, ir.ExternalTensor)
        ]  # fmt: skip
        hidden += [
            node.outputs[0].name for node in self.graph.all_nodes()
            for attribute in node.attributes.values()
            if isinstance(attribute.value, ir.ExternalTensor)
        ]  # fmt: skip
        if hidden:
            raise FormatError(
                f"{self.file.path}: {hidden[0]} belongs to a subgraph or a Constant, and has its data in "
                "another file. Export it with that data inline."
            )


@contextmanager
def _named(file: File) -> Iterator[None]:
    """What protobuf and onnx_ir say of a broken graph, as an error that names the file."""
    from google.protobuf.message import DecodeError
    from onnx_ir.serde import SerdeError

    try:
        yield
    except (DecodeError, SerdeError) as error:
        why = str(error).split(":")[0].splitlines()[0]
        raise FormatError(
            f"{file.path}: its graph cannot be read ({why}). Export it again."
        ) from None


def _check_names(file: File) -> None:
    """Raise FormatError for a value that is used and that nothing makes."""
    header = file.header
    known = {
        "",
        *header.inputs,
        *header.initializers,
        *(o for n in header.nodes for o in n.outputs),
    }
    uses = [(n.name or n.op, name) for n in header.nodes for name in n.inputs]
    # what sparse initializers are called is not read
    wrong = [(by, name) for by, name in uses if name not in known and not header.sparse]
    if wrong or "" in header.initializers:
        by, name = wrong[0] if wrong else ("the graph", "")
        raise FormatError(f"{file.path}: {by} uses {name!r}, which nothing makes. Export it again.")


def _promise(name: str, dtype: Any, shape: tuple[int, ...]) -> ir.ExternalTensor:
    """Stands for data that comes when the model is written."""
    import onnx_ir as ir

    return ir.ExternalTensor("", 0, 0, dtype, shape=ir.Shape(shape), name=name)


def _skeleton(file: File) -> onnx.ModelProto:
    """The model with every initializer that lies in a file as it is, said to be elsewhere."""
    import onnx

    data, size = file.mapped()
    out = []
    for f in fields(data, 0, size):
        if (f.number, f.wire) != (_GRAPH, BYTES):
            out.append(_same(data, f))
            continue
        inner = [
            _same(data, g)
            for g in fields(data, f.begin, f.end)
            if (g.number, g.wire) != (_INITIALIZER, BYTES)
        ]
        for stored in file.header.initializers.values():
            message = data[slice(*stored.message)] if stored.file is None else _light(data, stored)
            inner.append(encoded(_INITIALIZER, BYTES, message))
        out.append(encoded(_GRAPH, BYTES, b"".join(inner)))
    model = onnx.ModelProto()
    model.ParseFromString(b"".join(out))
    return model


def _light(data: Data, stored: Stored) -> bytes:
    """A TensorProto's facts alone."""
    facts = [_same(data, f) for f in fields(data, *stored.message) if f.number in _KEPT]
    location = encoded(1, BYTES, b"location") + encoded(2, BYTES, b"elsewhere")
    return b"".join([*facts, encoded(13, BYTES, location), encoded(14, VARINT, 1)])


def _same(data: Data, f: Field) -> bytes:
    """A field as it is."""
    return encoded(f.number, f.wire, f.value if f.wire == VARINT else data[f.begin : f.end])


def open_for_surgery(path: Path) -> Edited:
    """Raises FormatError for what formats.onnx refuses, and for external data of subgraphs."""
    return Edited(File(path))
