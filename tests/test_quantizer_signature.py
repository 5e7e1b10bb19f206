"""The Quantizer names its options, refuses others, and shows itself."""

from __future__ import annotations

import inspect
from dataclasses import fields

import pytest
import torch.nn as nn

from ecqx_onnx.errors import OptionError
from ecqx_onnx.options.quantizer import Recipe
from ecqx_onnx.quantization import Quantizer


@pytest.fixture
def quantizer():
    return Quantizer(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)), exclude="2.*")


def test_the_keywords_of_the_quantizer_are_the_options_of_a_recipe_with_their_defaults():
    parameters = inspect.signature(Quantizer).parameters
    named = {
        name: parameter.default
        for name, parameter in parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    recipe = Recipe()
    assert named == {entry.name: getattr(recipe, entry.name) for entry in fields(Recipe)}


@pytest.mark.parametrize("kind", [OptionError, TypeError])
def test_an_unknown_option_is_an_option_error_and_a_type_error(kind):
    with pytest.raises(kind, match=r"no option 'bit'.*did you mean '?bits'?"):
        Quantizer(nn.Linear(3, 2), bit=4)


def test_every_option_reaches_the_recipe():
    given = {"bits": 3, "rho": 3.0, "relevance": None, "granularity": "channel", "step": "learned"}
    options = Quantizer(nn.Linear(3, 2), **given).options
    assert {name: getattr(options, name) for name in given} == given


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
