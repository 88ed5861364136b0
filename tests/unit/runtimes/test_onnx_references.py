from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from google.protobuf.descriptor import Descriptor
from onnx import TensorProto, helper, numpy_helper
from tiny_graphs import WEIGHTS, write_tiny_bundle

from actionclip_deploy.bundle import Bundle, hash_files, write_manifest
from actionclip_deploy.errors import BundleError, IntegrityError
from actionclip_deploy.runtimes import onnx_references
from actionclip_deploy.runtimes.onnx_references import check_onnx_file, read_references


def external(location: str, name: str = "weights") -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[3, 16])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "192")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def in_an_initializer(model: Any, tensor: TensorProto) -> None:
    (old,) = (t for t in model.graph.initializer if t.name == "weights")
    model.graph.initializer.remove(old)
    model.graph.initializer.append(tensor)


def in_a_constant(model: Any, tensor: TensorProto) -> None:
    model.graph.node.append(helper.make_node("Constant", [], ["c"], value=tensor))


def in_a_list(model: Any, tensor: TensorProto) -> None:
    node = helper.make_node("Odd", [], ["c"], domain="odd")
    attribute = node.attribute.add(name="tensors", type=onnx.AttributeProto.TENSORS)
    attribute.tensors.append(tensor)
    model.graph.node.append(node)


def in_a_subgraph(model: Any, tensor: TensorProto) -> None:
    inner = helper.make_graph([], "inner", [], [], [tensor])
    node = helper.make_node("If", ["cond"], ["c"], then_branch=inner, else_branch=inner)
    model.graph.node.append(node)


def in_a_sparse_tensor(model: Any, tensor: TensorProto) -> None:
    model.graph.sparse_initializer.add().values.CopyFrom(tensor)


def in_a_function(model: Any, tensor: TensorProto) -> None:
    function = model.functions.add(name="f", domain="odd")
    function.node.append(helper.make_node("Constant", [], ["c"], value=tensor))


def in_training_information(model: Any, tensor: TensorProto) -> None:
    model.training_info.add().initialization.initializer.append(tensor)


PLACES = [
    in_an_initializer,
    in_a_constant,
    in_a_list,
    in_a_subgraph,
    in_a_sparse_tensor,
    in_a_function,
    in_training_information,
]


def bundle_with(folder: Path, tensor: TensorProto, place: Callable[..., None]) -> Bundle:
    """A bundle whose visual graph refers to `tensor`."""

    def change(name: str, model: Any) -> Any:
        if name == "visual":
            place(model, tensor)
        return model

    return write_tiny_bundle(folder, change=change)


def test_a_graph_by_itself_refers_to_no_file(tmp_path: Path) -> None:
    bundle = write_tiny_bundle(tmp_path)
    locations, op_types = read_references(bundle.graph_path("visual"))
    assert locations == set()
    assert op_types == {"Cast", "ReduceMean", "MatMul"}
    for graph in bundle.manifest.graphs:
        check_onnx_file(bundle.graph_path(graph), bundle)


@pytest.mark.parametrize("place", PLACES)
def test_a_file_is_found_wherever_a_graph_can_refer_to_it(
    tmp_path: Path, place: Callable[..., None]
) -> None:
    bundle = bundle_with(tmp_path, external("weights.data"), place)
    assert read_references(bundle.graph_path("visual"))[0] == {"weights.data"}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "location", ["../secret.bin", "/etc/passwd", "*/_ORT_MEM_ADDR_/*", "there.data", "", "./a"]
)
def test_a_file_that_the_manifest_does_not_name_is_refused(
    tmp_path: Path, place: Callable[..., None], location: str
) -> None:
    bundle = bundle_with(tmp_path / "bundle", external(location), place)
    (bundle.path / "there.data").write_bytes(WEIGHTS.tobytes())
    with pytest.raises(IntegrityError, match="is not a file of the bundle's manifest; do not"):
        check_onnx_file(bundle.graph_path("visual"), bundle)


@pytest.mark.parametrize("location", ["./visual.onnx.data", "a/../visual.onnx.data"])
def test_another_spelling_of_a_file_of_the_bundle_is_refused(tmp_path: Path, location: str) -> None:
    (tmp_path / "visual.onnx.data").write_bytes(WEIGHTS.tobytes())
    bundle = bundle_with(tmp_path, external(location), in_an_initializer)
    with pytest.raises(IntegrityError, match="which is not a file of the bundle's manifest"):
        check_onnx_file(bundle.graph_path("visual"), bundle)


def test_a_file_of_the_bundle_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "visual.onnx.data").write_bytes(WEIGHTS.tobytes())
    bundle = bundle_with(tmp_path, external("visual.onnx.data"), in_an_initializer)
    check_onnx_file(bundle.graph_path("visual"), bundle)


@pytest.mark.parametrize("is_altered", [True, False])
def test_a_file_of_the_bundle_that_is_a_link_out_of_it_is_used_by_its_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_altered: bool
) -> None:
    monkeypatch.setenv("ACTIONCLIP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "other.bin").write_bytes((WEIGHTS + is_altered).tobytes())
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "visual.onnx.data").write_bytes(WEIGHTS.tobytes())
    bundle = bundle_with(tmp_path / "bundle", external("visual.onnx.data"), in_an_initializer)
    (bundle.path / "visual.onnx.data").unlink()
    (bundle.path / "visual.onnx.data").symlink_to("../other.bin")
    if is_altered:
        with pytest.raises(IntegrityError, match=r"visual.onnx.data does not have the sha256"):
            bundle.graph_path("visual")
    else:
        check_onnx_file(bundle.graph_path("visual"), bundle)


def test_a_compiled_engine_is_refused(tmp_path: Path) -> None:
    def change(name: str, model: Any) -> Any:
        model.graph.node.append(helper.make_node("EPContext", ["a"], ["b"], domain="com.microsoft"))
        return model

    bundle = write_tiny_bundle(tmp_path, change=change)
    with pytest.raises(IntegrityError, match=r"holds a compiled engine \(EPContext\)"):
        check_onnx_file(bundle.graph_path("visual"), bundle)


def field(number: int, content: bytes, *, padding: int = 0) -> bytes:
    """A field with a length, which may be written with more bytes than it needs."""
    length = [len(content) & 0x7F, len(content) >> 7]
    head = bytes([length[0] | 0x80]) + b"\x80" * padding + bytes([length[1]])
    return bytes([number << 3 | 2]) + head + content


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("order", [1, -1])
def test_unusual_writing_hides_nothing(tmp_path: Path, padding: int, order: int) -> None:
    parts = [field(1, b"location", padding=padding), field(2, b"../secret.bin", padding=padding)]
    unknown = b"\x98\x06\x01"  # number 99, a small number
    entry = unknown.join(parts[::order])
    tensor = field(13, entry, padding=padding)
    content = field(7, field(5, tensor), padding=padding) + field(7, b"")
    path = tmp_path / "a.onnx"
    path.write_bytes(content)
    model = onnx.load_model_from_string(content)
    assert model.graph.initializer[0].external_data[0].value == "../secret.bin"
    assert read_references(path) == ({"../secret.bin"}, set())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        b"\x08",
        b"\x3a\x05ab",
        b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        b"\x0b",
        field(7, field(1, field(4, b"\xff\xfe"))),
    ],
    ids=["empty", "pointer", "cut off", "short", "length", "group", "text"],
)
def test_what_is_no_onnx_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.onnx"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"a\.onnx is not an ONNX file .*copy the bundle again"):
        read_references(path)


def test_a_graph_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    path = write_tiny_bundle(tmp_path).graph_path("visual")
    whole = path.read_bytes()
    for length in range(1, len(whole), 7):
        path.write_bytes(whole[:length])
        try:
            onnx.load(path)
        except Exception:  # noqa: BLE001 - protobuf's own error has no stable place
            with pytest.raises(BundleError, match="is not an ONNX file"):
                read_references(path)


def test_a_graph_nested_beyond_reason_is_refused(tmp_path: Path) -> None:
    content = b""
    for _ in range(60):
        content = field(1, field(5, field(6, content)))
    path = tmp_path / "a.onnx"
    path.write_bytes(field(7, content))
    with pytest.raises(BundleError, match="nested more than 100 deep"):
        read_references(path)


def test_every_way_of_the_format_to_a_tensor_is_known() -> None:
    messages: dict[str, Descriptor] = {}

    def collect(message: Descriptor) -> None:
        if message.name not in messages:
            messages[message.name] = message
            for inner in message.fields:
                if inner.message_type:
                    collect(inner.message_type)

    collect(onnx.ModelProto.DESCRIPTOR)
    ways: dict[str, set[int]] = {"TensorProto": set()}
    for _ in messages:  # each round goes one step further away from the tensors
        for name, message in messages.items():
            inner = (f for f in message.fields if f.message_type and f.message_type.name in ways)
            if found := {f.number for f in inner}:
                ways[name] = found
    del ways["TensorProto"]
    names = {
        "model": "ModelProto",
        "training": "TrainingInfoProto",
        "function": "FunctionProto",
        "graph": "GraphProto",
        "node": "NodeProto",
        "attribute": "AttributeProto",
        "sparse": "SparseTensorProto",
    }
    fields = onnx_references._FIELDS
    known = {names[m]: {n for n in fields[m] if fields[m][n] != "op_type"} for m in names}
    assert known == ways
    assert onnx.TensorProto.EXTERNAL_DATA_FIELD_NUMBER in fields["tensor"]
    assert fields["node"][onnx.NodeProto.OP_TYPE_FIELD_NUMBER] == "op_type"


def test_weights_are_stepped_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(name: str, model: Any) -> Any:
        big = np.zeros(1 << 22, np.float32)
        model.graph.initializer.append(numpy_helper.from_array(big, "big"))
        return model

    bundle = write_tiny_bundle(tmp_path, change=change)
    read = 0
    varint = onnx_references._varint

    def count(*given: Any) -> Any:
        nonlocal read
        read += 1
        return varint(*given)

    monkeypatch.setattr(onnx_references, "_varint", count)
    check_onnx_file(bundle.graph_path("visual"), bundle)
    assert read < 1000


@pytest.mark.parametrize("location", ["../secret.bin", "visual.onnx.data"])
def test_what_onnxruntime_does_by_itself(tmp_path: Path, location: str) -> None:
    # Known of this version; where it fails for a newer one, the module's docstring wants a look.
    (tmp_path / "secret.bin").write_bytes(WEIGHTS.tobytes())
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "visual.onnx.data").write_bytes(WEIGHTS.tobytes())
    bundle = bundle_with(tmp_path / "bundle", external(location), in_an_initializer)
    path = str(bundle.graph_path("visual"))
    if location == "visual.onnx.data":
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    elif onnxruntime.__version__ >= "1.32":
        with pytest.raises(Exception, match="escapes model directory"):
            onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def test_hashes_cover_external_data(tmp_path: Path) -> None:
    (tmp_path / "visual.onnx.data").write_bytes(WEIGHTS.tobytes())
    bundle = bundle_with(tmp_path, external("visual.onnx.data"), in_an_initializer)
    write_manifest(tmp_path, bundle.manifest.model_copy(update={"files": hash_files(tmp_path)}))
    (tmp_path / "visual.onnx.data").write_bytes((2 * WEIGHTS).tobytes())
    with pytest.raises(IntegrityError, match=r"visual\.onnx\.data does not have the sha256"):
        Bundle.open(tmp_path, check_hashes=True)
