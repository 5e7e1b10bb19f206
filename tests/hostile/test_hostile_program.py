"""Every part and every field of a .pt2 program, exchanged: torch never sees what the file says.

tests/watching.py sees what Python compiles, unpickles and opens meanwhile.
"""

import io
import itertools
import json
import pickle
import struct
import warnings
import zipfile

import pytest
import torch

from ecqx_onnx.errors import EcqxError, FileError
from ecqx_onnx.inputs.program import program
from ecqx_onnx.inputs.program.program import load_program, run_module, save_program
from ecqx_onnx.inputs.program.size_expression import NotArithmetic, print_anew
from tests.watching import CALL, Evil, nothing_runs, torch_pickle

TEXTS = (CALL, f"x): {CALL}\n  def f(y", f'x"); {CALL}; ("', f"x');{CALL};('")
VALUES = (*TEXTS, [CALL], {CALL: CALL}, None, 2**70, -1, 1.5, True)


class Net(torch.nn.Module):
    """A dynamic size, a parameter, a buffer, a constant, a keyword argument and a dict."""

    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(4, 2, bias=False)
        self.register_buffer("shift", torch.ones(1))

    def forward(self, x, *, scale):
        y = self.fc(x.reshape(x.shape[0] * 2, 4)) * scale + torch.tensor([1.0, 2.0])
        return {"y": y, "n": [y + self.shift]}


@pytest.fixture(scope="module")
def original():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def archive(original):
    shapes = {"x": {0: torch.export.Dim("batch")}, "scale": None}
    arguments = (torch.randn(3, 8),), {"scale": torch.ones(2)}
    exported = torch.export.export(original, *arguments, dynamic_shapes=shapes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return save_program(exported)


@pytest.fixture(scope="module")
def members(archive):
    with zipfile.ZipFile(io.BytesIO(archive)) as source:
        return {name.partition("/")[2]: source.read(name) for name in source.namelist()}


def pack(members, *, folder="archive"):
    """An archive of these members, laid out as torch's."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as target:
        for name, data in dict(members).items():
            target.writestr(f"{folder}/{name}", data)
    return buffer.getvalue()


def load_and_build(data):
    """What validate does with a program; whether it was accepted."""
    with nothing_runs():
        try:
            run_module(load_program(data, "evil.pt2"))
        except EcqxError as error:
            message = str(error)
        else:
            return True
    assert "\n" not in message
    assert len(message) < 1500
    return False


def test_the_watch_sees_a_planted_pickle_and_planted_source():
    with pytest.raises(AssertionError, match="unpickled"), nothing_runs():
        torch.load(io.BytesIO(torch_pickle()), weights_only=False)["state_dict"]["weight"].close()
    with pytest.raises(AssertionError, match="compiled"), nothing_runs():
        compile(f"lambda: {CALL}", "x", "eval")


def test_the_archive_as_torch_writes_it_is_read(original, archive, members):
    assert load_and_build(archive)
    assert load_and_build(pack(members))
    net = run_module(load_program(archive, "net.pt2"))
    x = torch.randn(5, 8)
    expected = original(x, scale=torch.ones(2))
    assert torch.equal(net(x, scale=torch.ones(2))["y"], expected["y"])


@pytest.mark.parametrize("planted", [torch_pickle(), pickle.dumps(Evil(), 2), b"", b"PLANTED(1)"])
def test_a_member_is_exchanged(members, planted):
    for name in members:
        accepted = load_and_build(pack({**members, name: planted}))
        assert accepted == (name == "data/sample_inputs/model.pt"), name


ADDED = (
    "data/constants/opaque_obj_0",
    "data/constants/opaque_obj_tensor_0",
    "data/constants/custom_obj_0",
    "data/constants/model.pt",
    "data/constants/tensor_x.pt",
    "data/constants/tensor_99",
    "data/weights/model.pt",
    "data/weights/weight_99",
    "data/sample_inputs/other.pt",
    "data/aotinductor/model/wrapper.so",
    "data/aotinductor/model/metadata.json",
    "data/executorch/model.pte",
    "data/extra/note.txt",
    "data/xl_weights/model",
    "models/model.jsoN",
    "models/other.json",
    "models/model",
    "serialized_exported_program.json",
    "version",
    "data.pkl",
    "code/x.py",
    "constants.pkl",
    "archive_format ",
    "Models/model.json",
)


@pytest.mark.parametrize("name", ADDED)
def test_a_member_is_added(members, name):
    assert not load_and_build(pack({**members, name: torch_pickle()}))
    assert not load_and_build(pack({**members, name: members["models/model.json"]}))


def test_a_member_is_renamed_or_lost(members):
    optional = ("data/sample_inputs/model.pt", ".data/version", ".data/serialization_id")
    for old in members:
        rest = {name: data for name, data in members.items() if name != old}
        assert load_and_build(pack(rest)) == (old in optional), old
        for new in (old + "x", "x" + old, old.upper(), old.replace("model", "tensor_x") + " "):
            assert not load_and_build(pack({**rest, new: members[old]})), new


def test_members_are_exchanged_with_each_other(members):
    for first in members:
        for second in ("models/model.json", "data/weights/weight_0"):
            if first != second and members[first] != members[second]:
                swapped = {**members, first: members[second], second: members[first]}
                assert not load_and_build(pack(swapped)), (first, second)


def places(document, path=()):
    """The path of every value of a JSON document."""
    yield path
    if isinstance(document, dict):
        for name, value in document.items():
            yield from places(value, (*path, name))
    if isinstance(document, list):
        for at, value in enumerate(document[:2]):  # of a kind, the first two
            yield from places(value, (*path, at))


def changed_at(document, path, change):
    if not path:
        return change(document)
    copy = dict(document) if isinstance(document, dict) else list(document)
    copy[path[0]] = changed_at(document[path[0]], path[1:], change)
    return copy


def names_changed(value):
    """A JSON value with a field renamed, added, lost; nothing if it has no fields."""
    if isinstance(value, dict):
        yield {**value, CALL: CALL}
        for name in value:
            renamed = {(CALL if key == name else key): entry for key, entry in value.items()}
            yield renamed
            yield {key: entry for key, entry in value.items() if key != name}
    if isinstance(value, list):
        yield [*value, CALL]


DOCUMENTS = (
    "models/model.json",
    "data/weights/model_weights_config.json",
    "data/constants/model_constants_config.json",
)
DROPPED = ("metadata", "guards_code", "torch_version", "range_constraints", "opset_version")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_field_is_exchanged_renamed_added_or_lost(members, name):
    """A part of the walk: every place gets a text, every object one other name."""
    walk(members, name, values=(CALL,), most_names=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_field_is_exchanged_for_every_value(members, name):
    walk(members, name, values=VALUES, most_names=1000)


def walk(members, name, *, values, most_names):
    document = json.loads(members[name])
    count = 0
    for path in list(places(document)):
        here = document
        for step in path:
            here = here[step]
        for planted in (*values, *itertools.islice(names_changed(here), most_names)):
            if planted == here:
                continue
            evil = changed_at(document, path, lambda _, planted=planted: planted)
            accepted = load_and_build(pack({**members, name: json.dumps(evil)}))
            count += 1
            if isinstance(planted, str) and not set(path) & set(DROPPED):
                is_free_text = path[-1:] == ("as_string",)
                assert not accepted or is_free_text, (path, planted)
    assert count > 30


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_field_is_doubled(members, name):
    text = members[name].decode()
    at = -1
    count = 0
    while (at := text.find('": ', at + 1)) >= 0:
        start = text.rindex('"', 0, at)
        if text[start - 1] == "\\":
            continue
        evil = text[:start] + f'"{text[start + 1 : at]}": {json.dumps(CALL)}, ' + text[start:]
        assert not load_and_build(pack({**members, name: evil})), text[start:at]
        count += 1
    assert count > 10


def structure(kind, context="null"):
    return json.dumps([1, {"type": kind, "context": context, "children_spec": []}])


@pytest.mark.parametrize(
    "spec",
    [
        structure("collections.namedtuple", '"PLANTED(1)"'),
        structure("collections.defaultdict", '{"default_factory_module": "os", "x": "system"}'),
        structure("torch.Size"),
        structure("builtins.list", '{"__enum__": true, "fqn": "os.system"}'),
        structure("builtins.dict", '[{"__enum__": true, "fqn": "os.system"}]'),
        structure("builtins.dict", "[" * 500 + "]" * 500),
        json.dumps([2, {"type": None, "context": None, "children_spec": []}]),
        "[" * 100_000,
        "PLANTED(1)",
        "",
    ],
)
@pytest.mark.parametrize("where", ["in_spec", "out_spec"])
def test_a_signature_of_other_classes_is_refused(members, spec, where):
    document = json.loads(members["models/model.json"])
    document["graph_module"]["module_call_graph"][0]["signature"][where] = spec
    assert not load_and_build(pack({**members, "models/model.json": json.dumps(document)}))


TARGETS = (
    "torch.load",
    "torch.hub.load",
    "torch.os.system",
    "torch.ops.load_library",
    "torch.ops.aten.from_file.default",
    "torch.ops.aten._sparse_coo_tensor_unsafe.default",
    "torch.ops.aten.relu.__class__",
    "torch.ops.aten.relu.default.__globals__",
    "torch.ops.aten.relu",
    "torch.ops.higher_order.call_torchbind",
    "torch.ops.higher_order.aoti_call_delegate",
    "torch.ops.inductor._alloc_from_pool.default",
    "torch._inductor.aot_compile",
    "_operator.methodcaller",
    "_operator.attrgetter",
    "math.sys.exit",
    "#shell:run",
    "os.system",
    "",
)


@pytest.mark.parametrize("target", TARGETS)
def test_a_call_of_anything_but_an_operator_of_networks_is_refused(members, target):
    document = json.loads(members["models/model.json"])
    document["graph_module"]["graph"]["nodes"][0]["target"] = target
    assert not load_and_build(pack({**members, "models/model.json": json.dumps(document)}))


def test_operators_and_objects_as_arguments_are_refused(members):
    for argument in (
        {"as_operator": "torch.load"},
        {"as_custom_obj": {"name": "x", "class_fqn": "x"}},
        {"as_string_to_argument": {"x": {"as_operator": "torch.load"}}},
        {"as_int": 1, "as_none": True},
        {},
    ):
        document = json.loads(members["models/model.json"])
        document["graph_module"]["graph"]["nodes"][0]["inputs"][0]["arg"] = argument
        assert not load_and_build(pack({**members, "models/model.json": json.dumps(document)}))


# Size expressions


@pytest.mark.parametrize(
    "text",
    [
        "Symbol('s77', positive=True, integer=True)",
        "Mul(Integer(16), Symbol('s39', positive=True, integer=True))",
        "Mul(Integer(24), Max(Integer(1), Add(Mul(Integer(2), Symbol('s39')), Integer(-2))))",
        "FloorDiv(Add(Symbol('s0'), Integer(-1)), Integer(2))",
        "Pow(Symbol('u0', integer=True), Integer(2))",
        "Mul(Rational(1, 2), Float('0.5', precision=53))",
        "StrictGreaterThan(Symbol('u0', integer=True), Integer(0))",
        "true",
    ],
)
def test_sizes_that_torch_writes_are_printed_as_they_were(text):
    assert print_anew(text) == text
    assert print_anew(f"  {text.replace(',', ' , ')} ") == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "s77",
        "().__class__",
        "__import__('os').system('x')",
        "Symbol('s77').name",
        "Symbol('x')",
        "Symbol('s7', positive=__import__('os'))",
        "Symbol('s7', commutative=False)",
        "Integer(2).__class__",
        "Function('f')(1)",
        "Lambda(1, 2)",
        "Integer(1) Integer(2)",
        "Integer('1')",
        "Integer(1",
        "Add()",
        "Pow(Integer(9), Pow(Integer(9), Integer(9)))",
        "Pow(Integer(9), Integer(99999999))",
        "LShift(Integer(1), Integer(99999999))",
        "Pow(Pow(Pow(Pow(Integer(99), Integer(16)), Integer(16)), Integer(16)), Integer(16))",
        "Pow(Add(Symbol('s0'), Symbol('s1'), Symbol('s2'), Symbol('s3')), Integer(16))",
        "Integer(99999999999999999999999)",
        "Float('1e999999999', precision=53)",
        "Float('0.5', precision=99999999)",
        "Add(" * 60 + "Integer(1)" + ")" * 60,
        "(" * 100_000,
        "-" * 100_000,
        "Ínteger(1)",
        "Symbol('s٣')",
        "Integer(1)\x00",
        "Integer(1);PLANTED(1)",
        "lambda: 1",
        "[1]",
        "'s0'",
    ],
)
def test_sizes_that_are_more_than_arithmetic_are_refused(text, members):
    with pytest.raises(NotArithmetic):
        print_anew(text)


# The archive itself


def refused(data, *, why="evil.pt2"):
    with nothing_runs(), pytest.raises(FileError, match=why) as caught:
        load_program(data, "evil.pt2")
    assert "\n" not in str(caught.value)


def test_a_member_comes_twice(members):
    for name in members:
        buffer = io.BytesIO(pack(members))
        with zipfile.ZipFile(buffer, "a") as target, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # zipfile warns of the double
            target.writestr(f"archive/{name}", members[name])
        refused(buffer.getvalue(), why="twice")


def test_members_lie_in_two_folders(members):
    buffer = io.BytesIO(pack(members))
    with zipfile.ZipFile(buffer, "a") as target:
        target.writestr("other/models/model.json", members["models/model.json"])
    refused(buffer.getvalue(), why="folders")


@pytest.mark.parametrize("folder", ["..", ".", "", "/", "a/b", "archive/..", "C:\\x"])
def test_the_folder_has_a_name_of_another_kind(members, folder):
    refused(pack(members, folder=folder))


def test_a_folder_of_any_plain_name_is_read(members):
    assert load_and_build(pack(members, folder="mein netz-1.2"))


def test_a_local_header_names_another_member(members):
    data = pack(members)
    at = data.index(b"archive/models/model.json")
    refused(data[:at] + b"archive/models/other.json" + data[at + 25 :])


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_members_are_refused(members, method):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as target:
        for name, data in members.items():
            target.writestr(f"archive/{name}", data)
    refused(buffer.getvalue(), why="claim|compressed")


def with_entry(members, change):
    """The archive with `change` applied to the directory's entry of the graph (a ZipInfo)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as target:
        for name, data in members.items():
            target.writestr(f"archive/{name}", data)
        change(next(i for i in target.filelist if i.filename.endswith("model.json")))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda entry: setattr(entry, "flag_bits", 1), "encrypted"),
        (lambda entry: setattr(entry, "external_attr", 0o120777 << 16), "link"),
        (lambda entry: setattr(entry, "file_size", 2**40), "claim"),
        (lambda entry: setattr(entry, "compress_size", 5), "compressed"),
        (lambda entry: setattr(entry, "header_offset", 0), "overlaps"),
        (lambda entry: setattr(entry, "CRC", 1), "CRC"),
        (lambda entry: setattr(entry, "compress_type", 8), "compressed"),
    ],
)
def test_the_directory_lies(members, change, why):
    refused(with_entry(members, change), why=why)


def test_bytes_in_front_of_and_behind_the_archive_are_refused(members):
    data = pack(members)
    refused(b"x" * 100 + data, why="in front")
    refused(data + b"x" * 100, why="behind|readable")
    comment = data[:-2] + struct.pack("<H", 4) + b"abcd"
    refused(comment, why="behind")


def test_two_directories_in_one_file_are_refused(members):
    evil = pack({**members, "data/sample_inputs/model.pt": torch_pickle()})
    refused(evil + pack(members))


# Raw tensors


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("sizes", [{"as_int": 2**40}, {"as_int": 4}], "claims"),
        ("sizes", [{"as_int": -2}, {"as_int": 4}], "count"),
        ("sizes", [{"as_int": 2}], "strides"),
        ("sizes", [{"as_expr": {"expr_str": "Integer(2)", "hint": None}}], "missing|unknown"),
        ("strides", [{"as_int": 2**60}, {"as_int": 1}], "claims"),
        ("storage_offset", {"as_int": 1}, "claims"),
        ("dtype", 8, "claims"),
        ("dtype", 99, "not supported"),
        ("dtype", 0, "not supported"),
        ("layout", 1, "not supported"),
        ("device", {"type": "cuda", "index": 0}, "cuda"),
    ],
)
def test_a_tensor_lies_about_its_bytes(members, field, value, why):
    name = "data/weights/model_weights_config.json"
    config = json.loads(members[name])
    config["config"]["fc.weight"]["tensor_meta"][field] = value
    refused(pack({**members, name: json.dumps(config)}), why=why)


def test_a_tensor_that_repeats_one_element_into_terabytes_is_refused(members):
    name = "data/weights/model_weights_config.json"
    config = json.loads(members[name])
    meta = config["config"]["fc.weight"]["tensor_meta"]
    meta["sizes"], meta["strides"] = [{"as_int": 2**40}, {"as_int": 4}], [{"as_int": 0}] * 2
    refused(pack({**members, name: json.dumps(config)}), why="contiguous")


@pytest.mark.parametrize(
    "name",
    ["__class__.forward", "fc.__dict__", "a..b", "", "x" * 2000, 'x"y', "x\\", "x\n", "\ud800"],
)
def test_a_parameter_has_a_name_of_another_kind(members, name):
    config = members["data/weights/model_weights_config.json"].decode()
    graph = members["models/model.json"].decode()
    evil = {
        **members,
        "data/weights/model_weights_config.json": config.replace('"fc.weight"', json.dumps(name)),
        "models/model.json": graph.replace('"fc.weight"', json.dumps(name)),
    }
    refused(pack(evil))


# Versions


def test_another_layout_is_refused_with_the_version_that_wrote_it(members):
    refused(pack({**members, "archive_version": b"1"}), why=r"written by torch 2\.13")
    document = json.loads(members["models/model.json"])
    document["torch_version"] = "2.99.1"
    document["graph_module"]["new_field"] = {}
    refused(pack({**members, "models/model.json": json.dumps(document)}), why=r"torch 2\.99\.1")
    document["schema_version"]["major"] = 9
    refused(pack({**members, "models/model.json": json.dumps(document)}), why="schema version is 9")


def test_the_layout_of_old_torch_is_refused():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as target:
        target.writestr("serialized_exported_program.json", b"{}")
        target.writestr("serialized_state_dict.pt", torch_pickle())
        target.writestr("version", b"8.2")
    refused(buffer.getvalue())


def test_json_that_would_fill_the_memory_is_refused(members, monkeypatch):
    monkeypatch.setattr("ecqx_onnx.inputs.program.schema.MOST_JSON_ITEMS", 10_000)
    refused(pack({**members, "models/model.json": b"[" + b"{}," * 20_000 + b"{}]"}), why="items")
    refused(pack({**members, "models/model.json": b"[" * 5_000}), why="deep")
    assert program.MOST_UNFOLDING >= 8
