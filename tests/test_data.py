"""Data sets as users have them -> splits that stream batches."""

import io
import wave
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ecqx_onnx.data import Dataset, load_dataset
from ecqx_onnx.data.augmentation import crop_and_flip, shift_audio, shift_images
from ecqx_onnx.data.split import Arrays, Split
from ecqx_onnx.errors import DataError, OptionError
from ecqx_onnx.preprocessing import Preprocessing
from ecqx_onnx.preprocessing.spectrum import Spectrum

SHARED = Path(__file__).parents[1].parent / "shared" / "data"
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason=f"the real data sets are not at {SHARED}"
)


def numbered(count: int) -> Dataset:
    """x is [i] for sample i."""
    return Dataset.from_arrays(
        "numbers",
        {"x_test": np.arange(count, dtype=np.float32)[:, None], "y_test": np.arange(count) % 3},
    )


def values(split: Split, batch_size: int = 4, **options) -> list[int]:
    return [int(value) for x, _ in split.batches(batch_size, **options) for value in x[:, 0]]


def save_wav(path: Path, samples: np.ndarray, rate: int = 8000) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())


def save_image(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


# Splits


def test_batches_come_in_order_and_the_last_one_is_short():
    batches = list(numbered(10).test.batches(4))
    assert [len(y) for _, y in batches] == [4, 4, 2]
    assert all(x.dtype == np.float32 and y.dtype == np.int64 for x, y in batches)
    assert values(numbered(10).test) == list(range(10))


def test_shuffled_batches_hold_every_sample_once_and_follow_the_generator():
    split = numbered(10).test
    first, again, other = (values(split, shuffle=np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert sorted(first) == list(range(10))
    assert first == again != other


def test_labels_stay_with_their_samples_when_shuffled():
    for x, y in numbered(50).test.batches(7, shuffle=np.random.default_rng(0)):
        np.testing.assert_array_equal(x[:, 0] % 3, y)


def test_a_last_shuffled_batch_of_one_is_left_out():
    assert len(values(numbered(9).test, shuffle=np.random.default_rng(0))) == 8
    assert len(values(numbered(9).test)) == 9
    assert len(values(numbered(1).test, shuffle=np.random.default_rng(0))) == 1
    assert len(values(numbered(3).test, 1, shuffle=np.random.default_rng(0))) == 3


def test_only_one_batch_is_read_at_a_time():
    class Watched(Arrays):
        def read(self, rows):
            assert len(rows) <= 4
            return super().read(rows)

    split = Split(
        Watched("watched", np.zeros((10, 2), np.float32)),
        np.arange(10),
        np.zeros(10, np.int64),
        Preprocessing(),
    )
    assert len(list(split.batches(4))) == 3


def test_divide_gives_two_disjoint_parts_that_a_seed_repeats():
    rest, part = numbered(10).test.divide(0.3, seed=5)
    again = numbered(10).test.divide(0.3, seed=5)[1]
    assert len(part) == 3
    assert sorted(values(rest) + values(part)) == list(range(10))
    assert values(part) == values(again) != values(numbered(10).test.divide(0.3, seed=6)[1])


def test_the_held_out_samples_are_the_same_for_ever():
    # Golden: another draw would let later versions validate on what earlier ones trained on.
    arrays = {"x": np.arange(20, dtype=np.float32)[:, None], "y": np.arange(20) % 3}
    assert values(Dataset.from_arrays("golden", arrays).test) == [1, 8, 18, 19]


def test_take_spreads_over_sorted_data():
    assert values(numbered(10).test.take(5)) == [0, 2, 4, 6, 8]
    assert values(numbered(3).test.take(99)) == [0, 1, 2]


def test_statistics_are_those_of_all_training_samples_per_channel():
    x = np.random.default_rng(0).integers(0, 256, (300, 3, 4, 3), dtype=np.uint8)
    arrays = {
        "x_train": x,
        "y_train": np.zeros(300, int),
        "x_test": x[:2],
        "y_test": np.zeros(2, int),
    }
    dataset = Dataset.from_arrays("images", arrays)
    mean, std = dataset.training.statistics()
    np.testing.assert_allclose(mean, (x / 255).mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(std, (x / 255).std((0, 1, 2)), rtol=1e-6)
    with_normalized = np.concatenate(
        [batch for batch, _ in dataset.normalized().training.batches(64)]
    )
    np.testing.assert_allclose(with_normalized.mean((0, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(with_normalized.std((0, 2, 3)), 1, atol=1e-5)


def test_a_constant_channel_is_not_divided_by_zero():
    dataset = Dataset.from_arrays(
        "flat", {"x_test": np.full((4, 2), 7.0), "y_test": np.zeros(4, int)}
    )
    assert dataset.test.statistics() == ((7.0, 7.0), (1.0, 1.0))


def test_a_label_that_the_model_has_no_output_for_is_refused():
    numbered(10).check_outputs(3)
    with pytest.raises(DataError, match="label 2"):
        numbered(10).check_outputs(2)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_holds_at_least_one_sample(batch_size):
    with pytest.raises(OptionError, match="batch size"):
        next(numbered(3).test.batches(batch_size))


# Augmentation


def test_augmented_images_are_shifted_windows_of_the_padded_original():
    images = np.random.default_rng(0).integers(1, 256, (6, 5, 7, 3), dtype=np.uint8)
    shifted = shift_images(images, np.random.default_rng(1), most=2)
    for image, result in zip(images, shifted, strict=True):
        padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
        assert any(
            (padded[i : i + 5, j : j + 7] == result).all() for i in range(5) for j in range(5)
        )


def test_crop_and_flip_mirrors_some_images_and_leaves_the_originals_alone():
    images = np.random.default_rng(0).integers(1, 256, (40, 5, 7), dtype=np.uint8)
    before = images.copy()
    result = crop_and_flip(images, np.random.default_rng(1), padding=0)
    mirrored = [(r == i[:, ::-1]).all() for r, i in zip(result, images, strict=True)]
    same = [(r == i).all() for r, i in zip(result, images, strict=True)]
    assert all(np.logical_xor(mirrored, same))
    assert 5 < sum(mirrored) < 35
    np.testing.assert_array_equal(images, before)


def test_shifted_audio_keeps_its_samples_in_order():
    waves = np.arange(1, 41, dtype=np.int16).reshape(2, 20)
    for original, shifted in zip(
        waves, shift_audio(waves, np.random.default_rng(3), most=0.2), strict=True
    ):
        padded = np.pad(original, 4)
        assert any((padded[i : i + 20] == shifted).all() for i in range(9))


@pytest.mark.parametrize("augment", [crop_and_flip, shift_images])
def test_augmentation_follows_the_generator(augment):
    images = np.random.default_rng(0).integers(0, 256, (8, 6, 6, 3), dtype=np.uint8)
    dataset = Dataset.from_arrays("images", {"x_test": images, "y_test": np.zeros(8, int)})
    batches = [
        dataset.test.batches(4, shuffle=np.random.default_rng(seed), augment=augment)
        for seed in (0, 0, 1)
    ]
    runs = [np.concatenate([x for x, _ in run]) for run in batches]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert (runs[0] != runs[2]).any()
    with pytest.raises(OptionError, match="shuffle"):
        next(dataset.test.batches(4, augment=augment))


# Files and folders


def test_npz_with_named_splits(tmp_path):
    x, y = np.arange(24, dtype=np.uint8).reshape(6, 2, 2), np.array([0, 1, 2, 0, 1, 2])
    labels = np.array(["cat", "dog", "owl"])
    arrays = {
        "x_train": x[:4],
        "y_train": y[:4],
        "x_test": np.asfortranarray(x[4:]),
        "y_test": y[4:],
        "labels": labels,
    }
    np.savez_compressed(tmp_path / "d.npz", **arrays)
    dataset = load_dataset(str(tmp_path / "d.npz"))
    assert (len(dataset.training), len(dataset.test), dataset.labels) == (
        4,
        2,
        ("cat", "dog", "owl"),
    )
    ((batch, classes),) = dataset.test.batches(8)
    np.testing.assert_array_equal(batch, (x[4:, None] / np.float32(255)).astype(np.float32))
    np.testing.assert_array_equal(classes, y[4:])


def test_npz_without_splits_holds_a_fifth_out_or_what_is_test_says(tmp_path):
    x, y = np.zeros((10, 3), np.float32), np.zeros(10, int)
    np.savez(tmp_path / "a.npz", x=x, y=y)
    np.savez(tmp_path / "b.npz", x=x, y=y, is_test=np.arange(10) < 3)
    drawn, said = load_dataset(str(tmp_path / "a.npz")), load_dataset(str(tmp_path / "b.npz"))
    assert (len(drawn.training), len(drawn.test)) == (8, 2)
    assert said.test.rows.tolist() == [0, 1, 2]
    assert said.training.rows.tolist() == [3, 4, 5, 6, 7, 8, 9]


def test_npz_with_only_a_test_part_can_validate_and_says_that_it_cannot_train(tmp_path):
    np.savez(tmp_path / "d.npz", x_test=np.zeros((3, 4)), y_test=np.zeros(3, int))
    dataset = load_dataset(str(tmp_path / "d.npz"))
    assert dataset.train is None
    with pytest.raises(DataError, match="no training samples"):
        _ = dataset.training


def test_jpegs_in_an_array_are_decoded_once(tmp_path):
    files = []
    for shade in (0, 100, 200):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 6), (shade, 0, 0)).save(buffer, "jpeg", quality=95)
        files.append(buffer.getvalue())
    parts = {"jpeg_train": files, "jpeg_test": files[1:]}
    arrays = {name: np.frombuffer(b"".join(part), np.uint8) for name, part in parts.items()}
    offsets = {
        name.replace("jpeg", "offset"): np.cumsum([0, *map(len, part)])
        for name, part in parts.items()
    }
    np.savez(tmp_path / "d.npz", **arrays, **offsets, y_train=np.arange(3), y_test=np.arange(2))
    dataset = load_dataset(str(tmp_path / "d.npz"))
    ((x, y),) = dataset.training.batches(8)
    assert x.shape == (3, 3, 6, 8)
    np.testing.assert_allclose(x[:, 0].mean((1, 2)) * 255, [0, 100, 200], atol=4)  # JPEG's own loss
    assert y.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(next(dataset.training.batches(8))[0], x)


@pytest.mark.parametrize("splits", [("",), ("train", "test"), ("train", "val")])
def test_image_folders_give_classes_in_sorted_order(tmp_path, splits):
    for part in splits:
        for shade, name in enumerate(["zebra", "ant"]):
            for number in range(5):
                save_image(
                    tmp_path / part / name / f"{number}.png",
                    np.full((4, 6, 3), 100 * shade + number, np.uint8),
                )
        (tmp_path / part / "notes.txt").write_text("not an image")
        (tmp_path / part / "ant" / ".hidden.png").write_text("not an image")
    dataset = load_dataset(str(tmp_path))
    assert dataset.labels == ("ant", "zebra")
    assert (len(dataset.training), len(dataset.test)) == ((8, 2) if splits == ("",) else (10, 10))
    for x, y in dataset.training.batches(4):
        assert x.shape[1:] == (3, 4, 6)
        np.testing.assert_array_equal(x[:, 0, 0, 0] * 255 >= 100, y == 0)


def test_files_of_a_folder_are_not_sorted_by_class_and_come_in_the_same_order_each_time(tmp_path):
    for name in ("a", "b"):
        for number in range(20):
            save_image(tmp_path / "test" / name / f"{number}.png", np.zeros((2, 2), np.uint8))
    first, again = load_dataset(str(tmp_path)).test.y, load_dataset(str(tmp_path)).test.y
    assert 0 < first[:20].sum() < 20
    np.testing.assert_array_equal(first, again)


def test_classes_may_be_called_train_and_test(tmp_path):
    for name in ("bus", "test", "train"):
        save_image(tmp_path / name / "1.png", np.zeros((4, 4), np.uint8))
        save_image(tmp_path / name / "2.png", np.zeros((4, 4), np.uint8))
    assert load_dataset(str(tmp_path)).labels == ("bus", "test", "train")


def test_a_class_that_one_split_lacks_does_not_move_the_others(tmp_path):
    for name in ("train/a/1.png", "train/b/1.png", "test/b/1.png"):
        save_image(tmp_path / name, np.zeros((4, 4), np.uint8))
    dataset = load_dataset(str(tmp_path))
    assert dataset.labels == ("a", "b")
    assert dataset.test.y.tolist() == [1]


def test_images_of_many_sizes_and_formats_are_brought_to_one_shape(tmp_path):
    wide = np.zeros((10, 40, 3), np.uint8)
    wide[:, 13:27] = 200  # the middle square, and what the filter reaches beyond it
    save_image(tmp_path / "test" / "a" / "wide.png", wide)
    save_image(tmp_path / "test" / "a" / "gray.bmp", np.full((7, 7), 200, np.uint8))
    opaque = np.full((9, 5, 4), 200, np.uint8)
    opaque[..., 3] = 255
    save_image(tmp_path / "test" / "a" / "alpha.png", opaque)
    dataset = load_dataset(
        str(tmp_path), preprocessing=Preprocessing("image", image_shape=(5, 5, 3))
    )
    ((x, _),) = dataset.test.batches(8)
    np.testing.assert_array_equal(x, np.full((3, 3, 5, 5), 200))


def test_wav_folders_are_cut_and_padded_to_one_length(tmp_path):
    save_wav(tmp_path / "test" / "no" / "1.wav", np.arange(1, 21))
    save_wav(tmp_path / "test" / "yes" / "1.wav", np.arange(1, 6))
    dataset = load_dataset(str(tmp_path), preprocessing=Preprocessing("waveform", samples=10))
    ((x, y),) = dataset.test.batches(8)
    by_class = x[np.argsort(y), 0]
    np.testing.assert_array_equal(by_class, [range(1, 11), [1, 2, 3, 4, 5, 0, 0, 0, 0, 0]])
    assert dataset.labels == ("no", "yes")


def test_wavs_last_one_second_unless_told_otherwise(tmp_path):
    save_wav(tmp_path / "test" / "a" / "1.wav", np.ones(9000))
    ((x, _),) = load_dataset(str(tmp_path)).test.batches(1)
    assert x.shape == (1, 1, 8000)


def test_a_function_may_return_arrays_or_a_dataset(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import numpy as np, torch\n"
        "from ecqx_onnx.data import Dataset\n"
        "def arrays(): return {'x_test': torch.ones(3, 4), 'y_test': torch.tensor([0, 1, 1])}\n"
        "def dataset(): return Dataset.from_arrays('mine', {'x_test': np.ones((3, 4)), 'y_test': "
        "np.zeros(3, int)})\n"
    )
    dataset = load_dataset(f"{tmp_path}/mine.py:arrays")
    assert (len(dataset.test), dataset.labels) == (3, ("0", "1"))
    scaled = load_dataset(
        f"{tmp_path}/mine.py:dataset", preprocessing=Preprocessing("array", scale=2.0)
    )
    assert (next(scaled.test.batches(3))[0] == 0.5).all()


def test_scikit_learns_digits():
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    dataset = load_dataset("sklearn:digits")
    assert (len(dataset.training), len(dataset.test), dataset.labels) == (
        1438,
        359,
        tuple("0123456789"),
    )
    x, _ = next(dataset.test.batches(100))
    assert x.shape == (100, 1, 8, 8)
    assert (x.min(), x.max()) == (0, 1)


# The real data sets


@needs_shared
@pytest.mark.parametrize(
    ("file", "train", "test", "shape"),
    [
        ("mnist.npz", 60_000, 10_000, (1, 28, 28)),
        ("cifar10_lossless_part.npz", 8068, 1017, (3, 32, 32)),
        ("cifar10_jpeg.npz", 50_000, 10_000, (3, 32, 32)),
        ("fsdd.npz", 2700, 300, (1, 8000)),
    ],
)
def test_the_real_data_sets_load(file, train, test, shape):
    dataset = load_dataset(str(SHARED / file))
    assert (len(dataset.training), len(dataset.test)) == (train, test)
    x, y = next(dataset.test.batches(8))
    assert x.shape == (8, *shape)
    assert len(y) == 8
    assert len(dataset.labels) == 10


@needs_shared
def test_spoken_digits_become_log_mel_frames():
    spectrum = Spectrum(8000, frame_length=256, hop=160, fft_length=256, mel_bands=40)
    dataset = load_dataset(
        str(SHARED / "fsdd.npz"),
        preprocessing=Preprocessing("waveform", scale=32768.0, spectrum=spectrum),
    )
    assert next(dataset.test.take(4).batches(4))[0].shape == (4, 1, 49, 40)
