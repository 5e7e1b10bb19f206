"""Each verb's options are said once: the command line and the Python function agree with them."""

import inspect
import re
from dataclasses import MISSING, fields

import pytest
import typer

import ecqx_onnx
from ecqx_onnx import api
from ecqx_onnx.cli import app
from ecqx_onnx.errors import OptionError, UnknownOptionError
from ecqx_onnx.options.compress import CompressOptions
from ecqx_onnx.options.convert import ConvertOptions
from ecqx_onnx.options.deploy import DeployOptions
from ecqx_onnx.options.option import check_limits, get_defaults, get_help, get_limits
from ecqx_onnx.options.pack import PackOptions, UnpackOptions
from ecqx_onnx.options.quantize import QuantizeOptions
from ecqx_onnx.options.validate import ValidateOptions

VERBS = {
    "quantize": (api.quantize, QuantizeOptions),
    "convert": (api.convert, ConvertOptions),
    "validate": (api.validate, ValidateOptions),
    "deploy": (api.deploy, DeployOptions),
    "pack": (ecqx_onnx.pack, PackOptions),
    "unpack": (ecqx_onnx.unpack, UnpackOptions),
    "compress": (ecqx_onnx.compress, CompressOptions),
}
# Of the command alone: how its result is shown, and a file of options.
OF_THE_COMMAND = {"as_json", "quiet", "debug", "all_weights", "help", "recipe", "report", "serve"}
# Of Python alone: values that cannot be typed.
OF_PYTHON = {"progress", "example", "say", "latency_runs", "rewrite"}
# Where the command's option has another name than the keyword.
RENAMED = {"quantize": {"model": "factory", "per_channel": "granularity"}}
# Options that Python takes as one value, or in another function.
GATHERED = {
    "convert": {"float_bounds": {"min_agreement", "max_error", "max_drop"}},
    "validate": {
        "float_bounds": {"min_agreement", "max_error", "max_drop"},
        "validate_on": {"device", "time_limit"},
    },
}
# How the command line types values that Python has otherwise.
TYPED = {
    ("quantize", "bits"): "4",
    ("quantize", "granularity"): False,
}
EMPTY = (None, (), [], MISSING, inspect.Parameter.empty)
# Beginnings and ends of a text that needs another one beside it.
FRAGMENT = re.compile(r"^(And|Or|Of|Its|Their|Also|Likewise|It|Them)\b|likewise\.?$")


def commands(command=None, path=()):
    """(words, command) of every command that does something."""
    command = command or typer.main.get_command(app)
    inner = getattr(command, "commands", {})
    if not inner:
        yield " ".join(path), command
    for name, each in inner.items():
        yield from commands(each, (*path, name))


COMMANDS = dict(commands())


def gathered(verb):
    return set().union(*GATHERED.get(verb, {}).values())


def same(one, other):
    return one == other or (one in EMPTY and other in EMPTY)


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_of_a_command_is_a_keyword_with_the_same_default(verb):
    keywords = inspect.signature(VERBS[verb][0]).parameters
    seen = set()
    for parameter in COMMANDS[verb].params:
        if parameter.name in OF_THE_COMMAND | gathered(verb):
            continue
        name = RENAMED.get(verb, {}).get(parameter.name, parameter.name)
        seen.add(name)
        assert name in keywords, f"{verb} has no keyword '{name}'"
        wanted = TYPED.get((verb, name), keywords[name].default)
        assert same(parameter.default, wanted), name
    left = keywords.keys() - seen - OF_PYTHON - GATHERED.get(verb, {}).keys()
    assert not left, f"{verb} has keywords that cannot be typed: {left}"


@pytest.mark.parametrize("verb", VERBS)
def test_the_keywords_of_a_verb_are_its_options_with_their_defaults(verb):
    function, options = VERBS[verb]
    keywords = inspect.signature(function).parameters
    defaults = get_defaults(options)
    for entry in fields(options):
        if entry.name in gathered(verb):
            continue
        default = keywords[entry.name].default
        assert same(default, defaults.get(entry.name, MISSING)), entry.name
    names = {entry.name for entry in fields(options)}
    assert keywords.keys() - names <= OF_PYTHON | GATHERED.get(verb, {}).keys()


@pytest.mark.parametrize("verb", VERBS)
def test_a_command_takes_help_and_limits_from_the_options(verb):
    options = VERBS[verb][1]
    names = {entry.name for entry in fields(options)}
    for parameter in COMMANDS[verb].params:
        name = RENAMED.get(verb, {}).get(parameter.name, parameter.name)
        if name not in names or name in ("granularity", "force"):
            continue
        assert parameter.help.split(" [")[0] == get_help(options, name), name
        limits = getattr(parameter, "min", None), getattr(parameter, "max", None)
        assert limits == tuple(get_limits(options, name)), name


def test_validate_on_has_the_options_of_validate():
    keywords = inspect.signature(api.validate_on).parameters
    defaults = get_defaults(ValidateOptions)
    for name in keywords.keys() & defaults.keys():
        assert same(keywords[name].default, defaults[name]), name
    assert {"time_limit", "against", "data", "samples"} <= keywords.keys()


@pytest.mark.parametrize("words", COMMANDS)
def test_every_help_is_complete_in_itself(words):
    for parameter in COMMANDS[words].params:
        if parameter.name in ("help", "context"):
            continue
        text = (parameter.help or "").split(" [")[0]
        where = f"{words} {parameter.name}: {text!r}"
        assert text, f"{where} is empty"
        assert not FRAGMENT.search(text), f"{where} needs another text beside it"
        assert text.endswith((".", "?")), f"{where} is no sentence"


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_shows_an_example_of_itself(words):
    text = COMMANDS[words].help
    assert f"Example:  ecqx-onnx {words}" in text
    assert text.split("\n")[0].endswith("."), "the first line stands alone in the list of commands"


def test_an_unknown_keyword_is_named_with_the_nearest_one():
    message = "quantize has no option 'bit': did you mean bits"
    with pytest.raises(OptionError, match=message):
        ecqx_onnx.quantize("net.py:net", data="data.npz", out="out.pt", bit=3)
    with pytest.raises(TypeError, match=message):
        ecqx_onnx.quantize("net.py:net", data="data.npz", out="out.pt", bit=3)


@pytest.mark.parametrize("verb", [api.convert, api.validate, api.validate_on, api.deploy, api.save])
def test_every_verb_names_the_nearest_keyword(verb):
    with pytest.raises(UnknownOptionError, match=f"{verb.__name__} has no option 'forse'"):
        verb("model.pt", "out.onnx", forse=True)


@pytest.mark.parametrize("verb", [ecqx_onnx.pack, ecqx_onnx.unpack, ecqx_onnx.compress])
def test_pack_unpack_and_compress_name_the_nearest_keyword(verb):
    with pytest.raises(UnknownOptionError, match="did you mean force"):
        verb("model.onnx", "out.onnx", forse=True)


def test_the_quantizers_unknown_option_is_a_type_error_too():
    import torch

    with pytest.raises(TypeError, match="did you mean bits"):
        ecqx_onnx.Quantizer(torch.nn.Linear(3, 2), bit=4)


def test_a_missing_argument_is_told_as_python_tells_it():
    with pytest.raises(TypeError, match="data"):
        ecqx_onnx.quantize("net.py:net", out="out.pt")


def test_numbers_beyond_their_limits_are_named():
    with pytest.raises(OptionError, match="bits is 9: choose 2 to 8"):
        check_limits(ConvertOptions, bits=9)
    with pytest.raises(OptionError, match="samples is 0: choose 1 or more"):
        check_limits(ValidateOptions, samples=0)
    check_limits(ConvertOptions, bits=None, entropy_weight=0.0)


def test_nan_lies_within_no_limits():
    with pytest.raises(OptionError, match="entropy_weight is nan"):
        check_limits(ConvertOptions, entropy_weight=float("nan"))


def test_options_are_refused_before_anything_is_loaded():
    with pytest.raises(OptionError, match="choose 2 to 8"):
        ecqx_onnx.quantize("nowhere.py:net", data="nowhere.npz", out="out.pt", bits=9)
