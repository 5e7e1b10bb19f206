"""Classes are matched by name: a folder that lacks one, or sorts otherwise, is judged by the
model's own order."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import ecqx_onnx
from ecqx_onnx.data import Dataset, load_dataset
from ecqx_onnx.data.class_names import match_classes
from ecqx_onnx.errors import DataError
from ecqx_onnx.preprocessing import Preprocessing


def folder_of(root, *names, files=2):
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(files):
            pixels = np.full((4, 4), 20 * number, np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return load_dataset(str(root))


def named_classes(dataset):
    return {dataset.labels[label] for label in dataset.test.y.tolist()}


def test_a_folder_that_lacks_a_class_keeps_the_models_numbers(tmp_path):
    dataset, _ = match_classes(folder_of(tmp_path, "ant", "cow"), ("ant", "bee", "cow"))
    both = [dataset.test.y.tolist(), [] if dataset.train is None else dataset.train.y.tolist()]
    assert set(both[0] + both[1]) == {0, 2}
    assert dataset.labels == ("ant", "bee", "cow")


def test_a_model_whose_classes_lie_in_another_order_is_judged_in_its_own(tmp_path):
    given = folder_of(tmp_path, "ant", "bee", "cow", files=5)
    dataset, _ = match_classes(given, ("cow", "ant", "bee"))
    before = [given.labels[label] for label in given.test.y]
    assert [dataset.labels[label] for label in dataset.test.y] == before
    assert dataset.test.y.tolist() != given.test.y.tolist()


def test_a_class_that_the_model_does_not_know_is_named(tmp_path):
    given = folder_of(tmp_path, "ant", "zebra")
    with pytest.raises(DataError, match=r"'zebra'.*ant, bee"):
        match_classes(given, ("ant", "bee"))


def test_folders_of_numbers_are_matched_as_numbers_where_the_model_has_no_names(tmp_path):
    names = [str(number) for number in range(11)]
    given = folder_of(tmp_path, *names)  # sorted as text: 0, 1, 10, 2, ...
    dataset, _ = match_classes(given, (), outputs=11)
    meant = [int(given.labels[label]) for label in given.test.y]
    assert dataset.test.y.tolist() == meant


def test_a_folder_of_numbers_that_lacks_one_is_matched_with_numbered_labels(tmp_path):
    given = folder_of(tmp_path, "0", "2")
    dataset, _ = match_classes(given, ("0", "1", "2"))
    assert set(dataset.test.y.tolist() + dataset.training.y.tolist()) == {0, 2}


def test_names_without_the_models_names_are_taken_in_sorted_order_and_that_is_told(tmp_path):
    given = folder_of(tmp_path, "ant", "bee")
    dataset, notes = match_classes(given, (), outputs=5)
    np.testing.assert_array_equal(dataset.test.y, given.test.y)
    assert "5 classes" in notes[0]
    assert "2" in notes[0]
    _, notes = match_classes(given, (), outputs=2)
    assert "sorted" in notes[0]


def test_numbers_without_names_are_taken_as_they_are():
    arrays = {"x": np.zeros((4, 3), np.float32), "y": np.array([0, 1, 2, 1])}
    given = Dataset.from_arrays("a test", arrays)
    dataset, notes = match_classes(given, ("ant", "bee", "cow"))
    assert dataset is given
    assert notes == ()


def test_named_arrays_are_matched_as_folders_are():
    arrays = {"x": np.zeros((4, 3), np.float32), "y": np.array([0, 1, 1, 1])}
    given = Dataset.from_arrays("a test", {**arrays, "labels": np.array(["cow", "ant"])})
    dataset, _ = match_classes(given, ("ant", "bee", "cow"))
    assert set(dataset.test.y.tolist() + dataset.training.y.tolist()) == {2, 0}


def test_empty_and_stray_folders_are_told_and_a_stray_one_is_no_class(tmp_path):
    folder_of(tmp_path, "ant", "bee")
    for name in ("__MACOSX", "cow"):
        (tmp_path / name).mkdir()
    dataset = load_dataset(str(tmp_path))
    assert dataset.labels == ("ant", "bee", "cow")
    assert any("__MACOSX" in note for note in dataset.notes)
    assert any("'cow'" in note and "no image" in note for note in dataset.notes)
    matched, notes = match_classes(dataset, ("ant", "bee"))  # an empty folder need not be known
    assert matched.labels == ("ant", "bee")
    assert notes == dataset.notes


def test_a_class_folder_that_only_the_test_part_has_is_told(tmp_path):
    folder_of(tmp_path / "train", "ant", "bee")
    folder_of(tmp_path / "test", "ant", "cow")
    dataset = load_dataset(str(tmp_path))
    assert any("'cow'" in note and "training" in note for note in dataset.notes)
    assert any("'bee'" in note and "test" in note for note in dataset.notes)


def test_two_classes_of_the_model_by_one_name_cannot_be_matched(tmp_path):
    given = folder_of(tmp_path, "ant", "bee")
    with pytest.raises(DataError, match="'ant' twice"):
        match_classes(given, ("ant", "ant", "bee"))


def test_notes_stay_with_a_dataset_that_is_preprocessed_otherwise(tmp_path):
    given = replace(folder_of(tmp_path, "ant", "bee"), notes=("a note",))
    assert given.normalized((0.5,), (0.5,)).notes == ("a note",)


# Through the commands


class Brightness(torch.nn.Module):
    """The nearest of three gray levels: 0, 127 and 255, in the order dark, gray, light."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 3)
        with torch.no_grad():
            self.layer.weight.copy_(torch.tensor([[-2.0], [0.0], [2.0]]))
            self.layer.bias.copy_(torch.tensor([0.5, 0.0, -1.5]))

    def forward(self, x):
        return self.layer(x.mean((1, 2, 3))[:, None])


@pytest.fixture(scope="module")
def brightness(tmp_path_factory):
    folder = tmp_path_factory.mktemp("brightness")
    ecqx_onnx.save(
        Brightness(),
        folder / "model.pt",
        example=torch.zeros(2, 1, 4, 4),
        preprocessing=Preprocessing("image", scale=255.0),
        labels=("dark", "gray", "light"),
    )
    ecqx_onnx.convert(folder / "model.pt", folder / "model.onnx")
    return folder


def gray_folder(root, levels):
    for name, level in levels.items():
        (root / name).mkdir(parents=True)
        for i in range(8):
            Image.fromarray(np.full((4, 4), level, np.uint8)).save(root / name / f"{i}.png")
    return str(root)


@pytest.mark.parametrize("levels", [{"gray": 127, "light": 255}, {"dark": 0, "light": 255}])
def test_validate_judges_a_folder_that_lacks_a_class_by_name(brightness, tmp_path, levels):
    data = gray_folder(tmp_path / "test", levels)
    report = ecqx_onnx.validate(
        brightness / "model.onnx", against=brightness / "model.pt", data=data, latency_runs=0
    )
    assert report.ok, report.failures
    assert report.onnx_accuracy.share == 1


def test_deploy_writes_golden_labels_of_the_right_class(brightness, tmp_path):
    data = gray_folder(tmp_path / "test", {"gray": 127, "light": 255})
    found = ecqx_onnx.deploy(brightness / "model.onnx", tmp_path / "linux", to="linux", data=data)
    manifest = json.loads((tmp_path / "linux" / "manifest.json").read_text())
    assert found.accuracy.share == 1
    assert {label for case in manifest["golden"]["cases"] for label in case["labels"]} <= {1, 2}


def test_validate_tells_what_it_left_out(brightness, tmp_path):
    data = gray_folder(tmp_path / "test", {"gray": 127, "light": 255})
    (tmp_path / "test" / "__MACOSX").mkdir()
    report = ecqx_onnx.validate(
        brightness / "model.onnx", against=brightness / "model.pt", data=data, latency_runs=0
    )
    assert any("__MACOSX" in note for note in report.notes)
    assert any("__MACOSX" in note for note in report.to_json()["notes"])


def test_a_name_that_a_model_of_many_classes_has_twice_is_told(tmp_path):
    names = [*map(str, range(10_000)), "ant", "ant"]
    with pytest.raises(DataError, match="'ant' twice"):
        match_classes(folder_of(tmp_path, "ant"), names)
