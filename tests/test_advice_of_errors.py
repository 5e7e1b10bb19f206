"""What an error recommends can be done, and helps."""

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import ecqx_onnx
from ecqx_onnx.cli import app
from ecqx_onnx.data import Dataset
from ecqx_onnx.errors import DataError, OptionError


def labeled(y):
    return Dataset.from_arrays("a test", {"x": np.zeros((4, 3), np.float32), "y": np.array(y)})


@pytest.mark.parametrize(
    ("y", "advice"),
    [
        ([0.5, 1.2, 3.4, 1.0], "regression"),
        ([[0.5], [1.2], [3.4], [1.0]], "regression"),
        ([0.0, 1.0, 2.0, 1.0], "save them as int64"),
        ([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]], "argmax of one-hot"),
        (["a", "b", "a", "b"], "number the classes"),
    ],
)
def test_labels_of_another_kind_are_told_what_they_are(y, advice):
    with pytest.raises(DataError, match=advice):
        labeled(y)


def test_a_misspelled_option_of_the_quantizer_is_named_with_the_right_one():
    with pytest.raises(OptionError, match="no option 'bit': did you mean bits"):
        ecqx_onnx.Quantizer(nn.Linear(3, 2), bit=4)
    with pytest.raises(OptionError, match="no option 'color': there are model, example, bits"):
        ecqx_onnx.Quantizer(nn.Linear(3, 2), color=4)


def test_relevance_none_means_in_python_what_it_means_on_the_command_line():
    quantizer = ecqx_onnx.Quantizer(nn.Linear(3, 2), relevance="none")
    assert quantizer.options.relevance is None
    assert quantizer.recipe()["relevance"] is None


def test_validate_takes_the_input_shape_that_it_asks_for(tmp_path):
    (tmp_path / "user.py").write_text(
        "from torch import nn\n\ndef network():\n    return nn.Linear(3, 2)\n"
    )
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "float.pt")
    files = [str(tmp_path / "float.pt"), "--model", f"{tmp_path / 'user.py'}:network"]
    shape = ["--input-shape", "3"]
    run = CliRunner().invoke
    assert (
        run(
            app, ["convert", files[0], str(tmp_path / "m.onnx"), *files[1:], "--bits", "6", *shape]
        ).exit_code
        == 0
    )
    asked = ["validate", str(tmp_path / "m.onnx"), "--against", *files]
    without = run(app, asked)
    assert without.exit_code == 2
    assert "--input-shape" in without.stderr
    assert run(app, [*asked, *shape]).exit_code == 0
