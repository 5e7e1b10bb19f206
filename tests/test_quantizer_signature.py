"""The Quantizer names its options, refuses others, and shows itself."""

from __future__ import annotations

import inspect
from dataclasses import fields

import numpy as np
import pytest
import torch.nn as nn

from ecqx_onnx.data import Dataset
from ecqx_onnx.errors import OptionError
from ecqx_onnx.options.quantizer import Recipe
from ecqx_onnx.quantization import Quantizer, train
from ecqx_onnx.quantization.training import training


@pytest.fixture
def quantizer():
    return Quantizer(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)), exclude="2.*")


@pytest.mark.parametrize("function", [Quantizer, train])
def test_the_options_of_a_recipe_are_keywords_with_the_same_defaults(function):
    keywords = inspect.signature(function).parameters
    recipe = Recipe()
    for entry in fields(Recipe):
        assert keywords[entry.name].default == getattr(recipe, entry.name), entry.name
        assert keywords[entry.name].kind is inspect.Parameter.KEYWORD_ONLY
    kinds = {parameter.kind for parameter in keywords.values()}
    assert inspect.Parameter.VAR_KEYWORD not in kinds


def test_the_quantizer_has_no_other_options_than_a_recipe():
    keywords = inspect.signature(Quantizer).parameters.keys() - {"model", "example"}
    assert keywords == {entry.name for entry in fields(Recipe)}


@pytest.mark.parametrize("kind", [OptionError, TypeError])
def test_an_unknown_option_is_an_option_error_and_a_type_error(kind):
    with pytest.raises(kind, match="Quantizer has no option 'bit': did you mean bits"):
        Quantizer(nn.Linear(3, 2), bit=4)
    with pytest.raises(kind, match="train has no option 'epoch': did you mean epochs"):
        train(nn.Linear(3, 2), None, epoch=4)


def changed(value):
    """Another value than the default, that the option takes as well."""
    if isinstance(value, float):
        return value + 0.01 if value < 1 else 3.0
    others = {4: 3, 8: 5, "epsilon_plus_flat": None, "logit": "ones", None: 7, (): ("1.*",)}
    others |= {"symmetric": "asymmetric", "auto": "learned", "tensor": "channel"}
    others |= {"plain": "absolute", "float32": "int8"}
    return others[value]


@pytest.mark.parametrize("entry", fields(Recipe), ids=lambda entry: entry.name)
def test_every_keyword_reaches_the_option_of_its_name(entry, monkeypatch):
    """Of the Quantizer, and of `train`, each alone: no two are mistaken for each other."""
    value = 0.99 if entry.name == "size_exponent" else changed(entry.default)
    expected = Recipe(**{entry.name: value})
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    assert Quantizer(model, **{entry.name: value}).options == expected

    seen = []

    def watched(*given, **_):
        seen.append(given[3])
        return 1 / 0

    monkeypatch.setattr(training, "TrainingRun", watched)
    data = Dataset.from_arrays("x", {"x": np.zeros((8, 4), np.float32), "y": np.arange(8) % 2})
    with pytest.raises(ZeroDivisionError):
        train(model, data, **{entry.name: value})
    assert seen == [expected]


def test_the_quantizer_says_what_it_holds(quantizer):
    shown = repr(quantizer)
    assert shown.startswith("Quantizer(Sequential: 1 weights, ")
    assert "bits per weight, 0 steps)" in shown
    quantizer.detach()
    assert repr(quantizer).endswith("detached)")


def test_a_report_shows_its_sums_its_weights_and_its_warnings():
    report = Quantizer(nn.Linear(6, 5), exclude="[red]*").report()
    assert repr(report).startswith("Report(1 tensors of 30 weights, ")
    assert "warning: exclude '[red]*' matches no parameter" in str(report)
    assert "5x6" in str(report)
    assert report._repr_html_().startswith("<pre")


def test_a_weights_name_is_escaped_in_a_notebook():
    model = nn.Sequential()
    model.add_module("<b>x", nn.Linear(2, 2))
    assert "<b>x" not in Quantizer(model).report()._repr_html_()
