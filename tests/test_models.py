"""The reference networks: they export with any batch size, and load the public checkpoints to their
known accuracy."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ecqx_onnx.data import load_dataset
from ecqx_onnx.inputs.user_code import load_function

MODELS = Path(__file__).parents[1] / "models"
SHARED = Path(__file__).parents[1].parent / "shared" / "data"
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason=f"the real data sets are not at {SHARED}"
)
NAMES = [
    "digits_cnn",
    "kws_dscnn",
    "lenet5",
    "lenet_300_100",
    "mlp_gsc",
    "resnet18",
    "resnet20",
    "vgg16",
]
PARAMETERS = {
    "lenet5": 61_706,
    "lenet_300_100": 266_610,
    "resnet18": 11_186_772,
    "resnet20": 269_722,
    "vgg16": 14_728_266,
    "digits_cnn": 38_282,
    "kws_dscnn": 23_052,
    "mlp_gsc": 766_688,
}


def factory(name: str):
    return load_function(f"{MODELS / name}.py:{name}")


def test_every_file_of_the_folder_is_tested_here():
    # tests/test_newcomer.py has torchvision's.
    others = {"mobilenet_v3"}
    assert sorted({path.stem for path in MODELS.glob("*.py")} - others) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_exports_with_any_batch_size_and_says_the_same(name):
    build = factory(name)
    torch.manual_seed(0)
    model = build().eval()
    shape = build.__globals__["INPUT_SHAPE"]
    program = torch.export.export(
        model, (torch.randn(2, *shape),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    for batch in (1, 3):
        x = torch.randn(batch, *shape)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_its_preprocessing_gives_its_input_shape(name):
    build = factory(name)
    preprocessing, shape = build.__globals__["PREPROCESSING"], build.__globals__["INPUT_SHAPE"]
    if preprocessing.kind == "image":
        raw = np.zeros((2, *shape[1:], shape[0]), np.uint8)
    else:
        raw = np.zeros((2, preprocessing.samples), np.int16)
    assert preprocessing.apply(raw).shape == (2, *shape)


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_has_as_many_parameters_as_its_page_says(name, count):
    assert sum(parameter.numel() for parameter in factory(name)().parameters()) == count


def test_the_shortcut_of_resnet20_halves_the_image_and_adds_zero_channels_on_both_sides():
    block = factory("resnet20")().layer2[0]
    x = torch.randn(2, 16, 8, 8)
    result = block.shortcut(x)
    assert result.shape == (2, 32, 4, 4)
    assert torch.equal(result[:, 8:24], x[:, :, ::2, ::2])
    assert result[:, :8].abs().sum() == result[:, 24:].abs().sum() == 0


@needs_shared
@pytest.mark.parametrize(
    ("name", "checkpoint", "data", "correct"),
    [
        ("lenet5", "lenet5_mnist_fp32", "mnist.npz", 9920),
        ("resnet20", "resnet20_cifar10_fp32", "cifar10_lossless_part.npz", 932),  # 91.64 % of 1017
        (
            "resnet20",
            "resnet20_cifar10_ec2t_ternary64",
            "cifar10_lossless_part.npz",
            929,
        ),  # 91.35 %
    ],
)
def test_loads_the_public_checkpoint_to_its_known_accuracy(name, checkpoint, data, correct):
    build = factory(name)
    model = build()
    saved = torch.load(
        SHARED / "checkpoints" / f"{checkpoint}.pt", weights_only=True, map_location="cpu"
    )
    state = {
        key.removeprefix("module."): value for key, value in saved.get("state_dict", saved).items()
    }
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(key.endswith("num_batches_tracked") for key in missing)
    test = load_dataset(str(SHARED / data), preprocessing=build.__globals__["PREPROCESSING"]).test
    model.eval()
    with torch.no_grad():
        right = sum(
            int((model(torch.from_numpy(x)).argmax(1).numpy() == y).sum())
            for x, y in test.batches(256)
        )
    assert abs(right - correct) <= 1  # a tie of two logits may fall either way on another CPU
