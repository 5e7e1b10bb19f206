"""Rebuild the JSON of an exported program from the fields that we know.

Everything that torch.export of torch 2.13 (schema 8.20) writes is described below as a tree of
small readers. Each takes a value as JSON gives it and returns it checked; what no reader describes
is refused, so nothing reaches torch that was not named here. Three kinds of text matter most:

- names of nodes and arguments become Python source (torch.fx writes the graph as a function and
  runs it), so they are plain identifiers;
- names of operators are looked up below `torch`, so they are listed in `operators`;
- size expressions are evaluated, so they are parsed and printed anew by `size_expression`.

What torch does not need for running (stack traces, sources, guards) is dropped.
"""

from __future__ import annotations

import json
import keyword
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ecqx_onnx.inputs.bounded_json import BadJson, parse_json
from ecqx_onnx.inputs.program.operators import is_allowed_operator
from ecqx_onnx.inputs.program.size_expression import SYMBOL, NotArithmetic, print_anew

SCHEMA_MAJOR = 8
MOST_JSON_BYTES = 64 * 1024 * 1024  # a graph of 100 000 nodes takes about 60 MB
MOST_JSON_ITEMS = 6_000_000
MOST_SPEC_BYTES = 1024 * 1024
MOST_SYMBOLS = 10_000
LONGEST_NAME = 1024
LONGEST_TEXT = 1000  # of a string that an operator takes, such as einsum's equation
LARGEST = 2**63
STRIDED = 7  # torch._export.serde.schema.Layout
# torch._export.serde.schema.ScalarType -> bytes of one element
ELEMENT_BYTES = {
    1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 2, 7: 4, 8: 8, 9: 4, 10: 8, 11: 16, 12: 1, 13: 2,
    28: 2, 29: 1, 30: 1, 31: 1, 32: 1, 33: 1, 34: 4, 35: 8,
}  # fmt: skip
CONTAINERS = frozenset(
    ("builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict")
)
KEYED_CONTAINERS = frozenset(("builtins.dict", "collections.OrderedDict"))
VERIFIERS = frozenset(("ATEN", "TRAINING"))
# A component of a parameter's name lands between double quotes in generated source.
COMPONENT = re.compile(r"""[^"'\\{}.\x00-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029]+""")

Reader = Callable[[Any], Any]


class UnknownField(ValueError):  # noqa: N818 - says what was found
    """A value that no traced network has. `path` grows while the error leaves the readers."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.path: list[str] = []

    def __str__(self) -> str:
        place = "".join(reversed(self.path)).lstrip(".")
        return f"{place[:200]}: {self.reason}" if place else self.reason


@dataclass(frozen=True)
class Payload:
    """Where one tensor of the program lies among the archive's raw bytes.

    Attributes:
        path: the member's last name, "weight_0" or "tensor_0".
        dtype: torch's ScalarType number.
        sizes: in elements.
        strides: in elements.
        offset: of the first element, in elements.
    """

    path: str
    dtype: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    @property
    def bytes_needed(self) -> int:
        """How many stored bytes the elements reach into; 0 for an empty tensor."""
        if 0 in self.sizes:
            return 0
        reach = sum((n - 1) * stride for n, stride in zip(self.sizes, self.strides, strict=True))
        return (self.offset + reach + 1) * ELEMENT_BYTES[self.dtype]

    @property
    def bytes_unfolded(self) -> int:
        """How many bytes the tensor takes once copied: repeated elements count each time."""
        return math.prod(self.sizes) * ELEMENT_BYTES[self.dtype]


def read_program(data: bytes) -> dict[str, Any]:
    """Rebuild models/model.json.

    Args:
        data: the member's bytes.

    Returns:
        The document for torch, made of checked values only.

    Raises:
        BadJson: if it is no JSON within bounds.
        UnknownField: for anything that torch.export does not write for a network.
    """
    document = parse_json(data, most_bytes=MOST_JSON_BYTES, most_items=MOST_JSON_ITEMS)
    _check_version(document)
    return _read_program(document)


def read_payloads(data: bytes, prefix: str) -> tuple[dict[str, Any], dict[str, Payload]]:
    """Rebuild model_weights_config.json or model_constants_config.json.

    Args:
        data: the member's bytes.
        prefix: of the members' names: "weight_" or "tensor_".

    Returns:
        The document for torch, and each tensor's place by the tensor's name.

    Raises:
        BadJson, UnknownField: as `read_program`.
    """
    document = parse_json(data, most_bytes=MOST_JSON_BYTES, most_items=MOST_JSON_ITEMS)
    rebuilt = _read_payload_config(document)
    payloads = {}
    for name, entry in rebuilt["config"].items():
        meta = entry["tensor_meta"]
        if not re.fullmatch(prefix + r"\d{1,9}", entry["path_name"], re.ASCII):
            raise UnknownField(f"the bytes of {_show(name)} lie in {_show(entry['path_name'])}")
        payloads[name] = Payload(
            path=entry["path_name"],
            dtype=meta["dtype"],
            sizes=tuple(size["as_int"] for size in meta["sizes"]),
            strides=tuple(stride["as_int"] for stride in meta["strides"]),
            offset=meta["storage_offset"]["as_int"],
        )
    return rebuilt, payloads


def find_torch_version(data: bytes) -> str | None:
    """Find the torch version that a program says it was written by.

    Args:
        data: of models/model.json, not checked.

    Returns:
        Such as "2.13.0"; None if it says nothing readable.
    """
    found = re.search(rb'"torch_version": ?"([\w.+<=-]{1,60})"', data)
    return None if found is None else found[1].decode()


# Readers of plain values


def _read_flag(value: Any) -> bool:
    if type(value) is not bool:
        raise UnknownField(f"{_show(value)} where true or false should be")
    return value


def _read_integer(value: Any) -> int:
    if type(value) is not int or not -LARGEST <= value < LARGEST:
        raise UnknownField(f"{_show(value)} where an integer should be")
    return value


def _read_count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < LARGEST:
        raise UnknownField(f"{_show(value)} where a count should be")
    return value


def _read_number(value: Any) -> float | str:
    """torch writes infinities and NaN as text."""
    if value in ("Infinity", "-Infinity", "NaN"):
        return value
    if type(value) not in (int, float):
        raise UnknownField(f"{_show(value)} where a number should be")
    if type(value) is int:
        return float(_read_integer(value))
    return value


def _one_of(values: frozenset[Any] | Mapping[Any, Any] | range) -> Reader:
    def read(value: Any) -> Any:
        if type(value) not in (int, str) or value not in values:
            raise UnknownField(f"{_show(value)} is not supported")
        return value

    return read


def _read_text(value: Any) -> str:
    if type(value) is not str or len(value) > LONGEST_TEXT:
        raise UnknownField(f"{_show(value)} where a short text should be")
    if not value.isprintable():
        raise UnknownField(f"{_show(value)} has characters that cannot be printed")
    return value


def _read_identifier(value: Any) -> str:
    if type(value) is not str or len(value) > LONGEST_NAME or not value.isidentifier():
        raise UnknownField(f"{_show(value)} where a name should be")
    if keyword.iskeyword(value) or not value.isascii():
        raise UnknownField(f"{_show(value)} is no name that torch writes")
    return value


def _read_argument_name(value: Any) -> str:
    """Of an operator's schema: may be a keyword of Python ("from"); empty for control flow."""
    if value == "" or (type(value) is str and keyword.iskeyword(value)):
        return value
    return _read_identifier(value)


def _read_qualified_name(value: Any) -> str:
    """A parameter's name with its modules, such as "layers.0.weight"."""
    if type(value) is not str or not 0 < len(value) <= LONGEST_NAME:
        raise UnknownField(f"{_show(value)} where a parameter's name should be")
    for component in value.split("."):
        if not COMPONENT.fullmatch(component) or component.startswith("__"):
            raise UnknownField(f"{_show(value)} is no name of a parameter")
    return value


def _read_module_name(value: Any) -> str:
    return "" if value == "" else _read_qualified_name(value)


def _read_target(value: Any) -> str:
    if type(value) is not str or not is_allowed_operator(value):
        raise UnknownField(
            f"calls {_show(value)}, which is no ATen operator of a network; only traced networks"
            " are loaded"
        )
    return value


def _read_size_text(value: Any) -> str:
    if type(value) is not str:
        raise UnknownField(f"{_show(value)} where a size expression should be")
    try:
        return print_anew(value)
    except NotArithmetic as error:
        raise UnknownField(
            f"the size expression {_show(value)} is more than arithmetic ({error})"
        ) from None


def _drop(kind: type) -> Reader:
    """A field that torch does not need: its type is looked at, its content replaced by nothing."""

    def read(value: Any) -> Any:
        if type(value) is not kind:
            raise UnknownField(f"{_show(value)} where a {kind.__name__} should be")
        return kind()

    return read


def _require_empty(value: Any) -> Any:
    if value not in ({}, []):
        raise UnknownField(f"{_show(value)}: custom objects and named tuples are not loaded")
    return type(value)()


def _read_none(value: Any) -> bool:
    """torch writes None as {"as_none": true}."""
    return _read_flag(value)


# Readers of composed values


def _record(**fields: Reader) -> Reader:
    """An object with exactly these fields: torch writes every field of a class, null included."""

    def read(value: Any) -> dict[str, Any]:
        if type(value) is not dict:
            raise UnknownField(f"{_show(value)} where an object should be")
        for name in value:
            if name not in fields:
                raise UnknownField(f"the field {_show(name)} is unknown")
        rebuilt = {}
        for name, reader in fields.items():
            if name not in value:
                raise UnknownField(f"the field {name!r} is missing")
            rebuilt[name] = _read_within(f".{name}", reader, value[name])
        return rebuilt

    return read


def _union(**choices: Reader) -> Reader:
    """An object with exactly one of these fields."""

    def read(value: Any) -> dict[str, Any]:
        if type(value) is not dict or len(value) != 1:
            raise UnknownField(f"{_show(value)} where an object of one field should be")
        [(name, inner)] = value.items()
        if name not in choices:
            raise UnknownField(f"{_show(name)} is not supported")
        return {name: _read_within(f".{name}", choices[name], inner)}

    return read


def _list_of(reader: Reader) -> Reader:
    def read(value: Any) -> list[Any]:
        if type(value) is not list:
            raise UnknownField(f"{_show(value)} where a list should be")
        return [_read_within(f"[{at}]", reader, item) for at, item in enumerate(value)]

    return read


def _mapping(key: Reader, reader: Reader) -> Reader:
    def read(value: Any) -> dict[str, Any]:
        if type(value) is not dict:
            raise UnknownField(f"{_show(value)} where an object should be")
        return {key(name): _read_within(f".{name}", reader, inner) for name, inner in value.items()}

    return read


def _optional(reader: Reader) -> Reader:
    def read(value: Any) -> Any:
        return None if value is None else reader(value)

    return read


def _read_within(step: str, reader: Reader, value: Any) -> Any:
    try:
        return reader(value)
    except UnknownField as error:
        error.path.append(step)
        raise


def _show(value: Any) -> str:
    """A value of the file, short enough for a sentence."""
    if type(value) in (dict, list):
        return f"a {type(value).__name__} of {len(value)}"
    text = ascii(value if type(value) is not str else value[:100])
    return text[:80]


# torch's classes (torch/_export/serde/schema.py), less what no network of ours needs: custom
# objects, tokens, operators as arguments, nested lists for Triton.

_HINT = _union(as_int=_read_integer, as_bool=_read_flag, as_float=_read_number)
_SYM_EXPRESSION = _record(expr_str=_read_size_text, hint=_optional(_HINT))
_SYM_INT = _union(as_expr=_SYM_EXPRESSION, as_int=_read_integer)
_SYM_FLOAT = _union(as_expr=_SYM_EXPRESSION, as_float=_read_number)
_SYM_BOOL = _union(as_expr=_SYM_EXPRESSION, as_bool=_read_flag)
_DEVICE = _record(type=_one_of(frozenset(("cpu",))), index=_optional(_one_of(range(1))))
_TENSOR_META = _record(
    dtype=_one_of(ELEMENT_BYTES),
    sizes=_list_of(_SYM_INT),
    requires_grad=_read_flag,
    device=_DEVICE,
    strides=_list_of(_SYM_INT),
    storage_offset=_SYM_INT,
    layout=_one_of(frozenset((STRIDED,))),
)
_TENSOR = _record(name=_read_identifier)
_SYM_INT_ARGUMENT = _union(as_name=_read_identifier, as_int=_read_integer)
_SYM_FLOAT_ARGUMENT = _union(as_name=_read_identifier, as_float=_read_number)
_SYM_BOOL_ARGUMENT = _union(as_name=_read_identifier, as_bool=_read_flag)
_OPTIONAL_TENSOR = _union(as_tensor=_TENSOR, as_none=_read_none)
_COMPLEX = _record(real=_read_number, imag=_read_number)


def _read_inner_graph(value: Any) -> dict[str, Any]:
    """The graph of a branch or a loop's body; the depth is bounded by the JSON's."""
    return _record(name=_read_identifier, graph=_GRAPH)(value)


_ARGUMENT = _union(
    as_none=_read_none,
    as_tensor=_TENSOR,
    as_tensors=_list_of(_TENSOR),
    as_int=_read_integer,
    as_ints=_list_of(_read_integer),
    as_float=_read_number,
    as_floats=_list_of(_read_number),
    as_string=_read_text,
    as_strings=_list_of(_read_text),
    as_sym_int=_SYM_INT_ARGUMENT,
    as_sym_ints=_list_of(_SYM_INT_ARGUMENT),
    as_scalar_type=_one_of(ELEMENT_BYTES),
    as_memory_format=_one_of(range(1, 5)),
    as_layout=_one_of(frozenset((STRIDED,))),
    as_device=_DEVICE,
    as_bool=_read_flag,
    as_bools=_list_of(_read_flag),
    as_sym_bool=_SYM_BOOL_ARGUMENT,
    as_sym_bools=_list_of(_SYM_BOOL_ARGUMENT),
    as_graph=_read_inner_graph,
    as_optional_tensors=_list_of(_OPTIONAL_TENSOR),
    as_sym_float=_SYM_FLOAT_ARGUMENT,
    as_sym_floats=_list_of(_SYM_FLOAT_ARGUMENT),
    as_optional_tensor=_OPTIONAL_TENSOR,
    as_complex=_COMPLEX,
)
_NODE = _record(
    target=_read_target,
    inputs=_list_of(
        _record(name=_read_argument_name, arg=_ARGUMENT, kind=_optional(_one_of(range(3))))
    ),
    outputs=_list_of(_ARGUMENT),
    metadata=_drop(dict),
    is_hop_single_tensor_return=_optional(_read_flag),
    name=_optional(_read_identifier),
)
_GRAPH = _record(
    inputs=_list_of(_ARGUMENT),
    outputs=_list_of(_ARGUMENT),
    nodes=_list_of(_NODE),
    tensor_values=_mapping(_read_identifier, _TENSOR_META),
    sym_int_values=_mapping(_read_identifier, _SYM_INT),
    sym_bool_values=_mapping(_read_identifier, _SYM_BOOL),
    is_single_tensor_return=_read_flag,
    custom_obj_values=_require_empty,
    sym_float_values=_mapping(_read_identifier, _SYM_FLOAT),
)
_CONSTANT = _union(
    as_none=_read_none,
    as_int=_read_integer,
    as_float=_read_number,
    as_string=_read_text,
    as_bool=_read_flag,
)
_INPUT_SPEC = _union(
    user_input=_record(arg=_ARGUMENT),
    parameter=_record(arg=_TENSOR, parameter_name=_read_qualified_name),
    buffer=_record(arg=_TENSOR, buffer_name=_read_qualified_name, persistent=_read_flag),
    tensor_constant=_record(arg=_TENSOR, tensor_constant_name=_read_qualified_name),
    constant_input=_record(name=_read_identifier, value=_CONSTANT),
)
_OUTPUT_SPEC = _union(
    user_output=_record(arg=_ARGUMENT),
    buffer_mutation=_record(arg=_TENSOR, buffer_name=_read_qualified_name),
    user_input_mutation=_record(arg=_TENSOR, user_input_name=_read_identifier),
)
_SIGNATURE = _record(input_specs=_list_of(_INPUT_SPEC), output_specs=_list_of(_OUTPUT_SPEC))


def _read_structure(value: Any) -> str:
    """A pytree specification (text of JSON inside the JSON): how arguments or results nest."""
    if type(value) is not str:
        raise UnknownField(f"{_show(value)} where a structure should be")
    try:
        document = parse_json(value, most_bytes=MOST_SPEC_BYTES, most_items=MOST_SPEC_BYTES // 8)
    except BadJson as error:
        raise UnknownField(f"the structure is no JSON: {error}") from None
    if type(document) is not list or len(document) != 2 or document[0] != 1:
        raise UnknownField(f"{_show(value)} where a structure of version 1 should be")
    return json.dumps([1, _read_tree(document[1])])


def _read_tree(value: Any) -> dict[str, Any]:
    rebuilt = _record(
        type=_read_container, context=_optional(_read_any_text), children_spec=_list_of(_read_tree)
    )(value)
    children = rebuilt["children_spec"]
    context = rebuilt["context"]
    if rebuilt["type"] is None:
        if context is not None or children:
            raise UnknownField("a leaf of the structure has something in it")
    elif rebuilt["type"] in KEYED_CONTAINERS:
        keys = _read_keys(context)
        if len(keys) != len(children):
            raise UnknownField(f"{len(keys)} keys for {len(children)} values")
        rebuilt["context"] = json.dumps(keys)
    elif context != "null":
        raise UnknownField(f"{_show(context)} at a tuple or list")
    return rebuilt


def _read_container(value: Any) -> str | None:
    if value is not None and (type(value) is not str or value not in CONTAINERS):
        raise UnknownField(
            f"takes or returns {_show(value)}; only tensors, tuples, lists and dicts are loaded"
        )
    return value


def _read_any_text(value: Any) -> str:
    if type(value) is not str:
        raise UnknownField(f"{_show(value)} where a text should be")
    return value


def _read_keys(context: str | None) -> list[str | int]:
    try:
        keys = parse_json(context or "", most_bytes=MOST_SPEC_BYTES, most_items=100_000)
    except BadJson as error:
        raise UnknownField(f"the keys of a dict are no JSON: {error}") from None
    if type(keys) is not list:
        raise UnknownField(f"{_show(keys)} where keys of a dict should be")
    for key in keys:
        if type(key) is int:
            _read_integer(key)
        else:
            _read_text(key)
            _check_key(key)
    if len(set(keys)) != len(keys):
        raise UnknownField("a dict has a key twice")
    return keys


def _check_key(key: str) -> None:
    """Keys of keyword arguments land between quotes in generated source."""
    if key and not COMPONENT.fullmatch(key.replace(".", "_")):
        raise UnknownField(f"{_show(key)} is no key of a dict that we load")


_CALL_SIGNATURE = _record(
    inputs=_list_of(_ARGUMENT),
    outputs=_list_of(_ARGUMENT),
    in_spec=_read_structure,
    out_spec=_read_structure,
    forward_arg_names=_optional(_list_of(_read_identifier)),
)
_CALL = _record(fqn=_read_module_name, signature=_optional(_CALL_SIGNATURE))


def _read_calls(value: Any) -> list[dict[str, Any]]:
    """Only the network's own call is needed; those of its modules serve unflattening."""
    calls = _list_of(_CALL)(value)
    whole = [call for call in calls if call["fqn"] == ""]
    if len(whole) != 1 or whole[0]["signature"] is None:
        raise UnknownField("the network's own signature is not there once")
    _check_keywords(whole[0]["signature"]["in_spec"])
    return whole


def _check_keywords(in_spec: str) -> None:
    """The keyword arguments of the network become arguments in generated source."""
    children = json.loads(in_spec)[1]["children_spec"]
    if len(children) == 2 and children[1]["type"] == "builtins.dict":
        for key in json.loads(children[1]["context"]):
            _read_identifier(key)


_GRAPH_MODULE = _record(
    graph=_GRAPH,
    signature=_SIGNATURE,
    module_call_graph=_read_calls,
    metadata=_drop(dict),
    treespec_namedtuple_fields=_require_empty,
)
_RANGE = _record(min_val=_optional(_read_integer), max_val=_optional(_read_integer))


def _read_ranges(value: Any) -> dict[str, Any]:
    """Of symbols. Those of expressions ("2*s39") follow from them and are left out."""
    if type(value) is not dict or len(value) > MOST_SYMBOLS:
        raise UnknownField(f"{_show(value)} where ranges of sizes should be")
    rebuilt = {}
    for name, bounds in value.items():
        checked = _read_within(f".{name[:80]}", _RANGE, bounds)
        if SYMBOL.fullmatch(name):
            rebuilt[name] = checked
    return rebuilt


_PROGRAM = _record(
    graph_module=_GRAPH_MODULE,
    opset_version=_mapping(_read_identifier, _read_count),
    range_constraints=_read_ranges,
    schema_version=_record(major=_read_count, minor=_read_count),
    verifiers=_list_of(_one_of(VERIFIERS)),
    torch_version=_read_text,
    guards_code=_drop(list),
)


def _read_program(document: Any) -> dict[str, Any]:
    return _PROGRAM(document)


def _read_fixed_size(value: Any) -> dict[str, int]:
    return _record(as_int=_read_count)(value)


_PAYLOAD_META = _record(
    path_name=_read_identifier,
    is_param=_read_flag,
    use_pickle=_read_flag,
    tensor_meta=_record(
        dtype=_one_of(ELEMENT_BYTES),
        sizes=_list_of(_read_fixed_size),
        requires_grad=_read_flag,
        device=_DEVICE,
        strides=_list_of(_read_fixed_size),
        storage_offset=_read_fixed_size,
        layout=_one_of(frozenset((STRIDED,))),
    ),
)


def _read_payload(value: Any) -> dict[str, Any]:
    if type(value) is dict and value.get("use_pickle") is not False:
        raise UnknownField(
            "asks for unpickling a tensor; only raw tensors are loaded: export a contiguous CPU"
            " model again"
        )
    rebuilt = _PAYLOAD_META(value)
    meta = rebuilt["tensor_meta"]
    if len(meta["sizes"]) != len(meta["strides"]):
        raise UnknownField(f"{len(meta['sizes'])} sizes and {len(meta['strides'])} strides")
    return rebuilt


_read_payload_config = _record(config=_mapping(_read_qualified_name, _read_payload))


def _check_version(document: Any) -> None:
    version = document.get("schema_version") if type(document) is dict else None
    major = version.get("major") if type(version) is dict else None
    if major != SCHEMA_MAJOR:
        raise UnknownField(f"its schema version is {_show(major)}, not {SCHEMA_MAJOR}")
