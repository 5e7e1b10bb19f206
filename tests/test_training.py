"""`train`: the best epoch by validation, resumed bit for bit, refusals in one sentence."""

import numpy as np
import pytest
import torch
import torch.nn as nn

from ecqx_onnx.errors import DataError, FileError, ModelError, OptionError
from ecqx_onnx.quantization import quantizer as quantizer_module
from ecqx_onnx.quantization import train, training
from ecqx_onnx.quantization.objectives.objective import Score
from ecqx_onnx.quantization.training import run

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other


class Split:
    """The door of a data set's split, on arrays."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.y)

    def batches(self, batch_size, *, shuffle=None):
        order = np.arange(len(self)) if shuffle is None else shuffle.permutation(len(self))
        for start in range(0, len(self), batch_size):
            rows = order[start : start + batch_size]
            yield self.x[rows], self.y[rows]

    def divide(self, fraction, *, seed):
        part = np.random.default_rng(seed).random(len(self)) < fraction
        return Split(self.x[~part], self.y[~part]), Split(self.x[part], self.y[part])


class Blobs:
    """Three clouds in five dimensions; its test split must never be looked at."""

    def __init__(self, samples=240):
        generator = np.random.default_rng(0)
        y = generator.integers(0, 3, samples)
        centres = generator.normal(size=(3, 5)) * 2
        self.train = Split(
            (centres[y] + generator.normal(size=(samples, 5))).astype(np.float32),
            y.astype(np.int64),
        )

    @property
    def test(self):
        raise AssertionError("training looked at the test split")


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(5, 16), nn.ReLU(), nn.Dropout(0.2), nn.BatchNorm1d(16), nn.Linear(16, 3)
    )


def options(**changes):
    return {
        "epochs": 4,
        "batch_size": 32,
        "learning_rate": 1e-2,
        "validation": 0.2,
        "device": "cpu",
        **changes,
    }


def same(a, b):
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


def test_training_learns_and_reports_its_way():
    model, seen = net(), []
    result = train(model, Blobs(), **options(progress=seen.append, epochs=6), bits=4)
    assert result.history[-1].validation_accuracy > 0.8
    assert [record.epoch for record in result.history] == [1, 2, 3, 4, 5, 6]
    assert (seen[0].epoch, seen[0].step, seen[0].epochs) == (1, 1, 6)
    assert (seen[-1].epoch, seen[-1].step) == (6, seen[-1].steps)
    assert 0 < seen[-1].zeros < 1
    assert seen[-1].bits_per_weight > 0
    assert not model.training


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not():
    models = [net(), net(), net()]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        torch.manual_seed(len(models) * 7)  # what the caller's generator holds does not matter
        torch.rand(1 + seed)
        train(model, Blobs(), **options(seed=seed))
    assert same(models[0], models[1])
    assert not same(models[0], models[2])


def test_training_leaves_the_callers_random_numbers_alone():
    model = net()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(model, Blobs(), **options(epochs=1))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"schedule": "cosine"},
        {"schedule": "constant"},
        {"entropy_ramp": 0.9},
        {"precision": "bfloat16"},
    ],
)
def test_a_run_resumed_after_an_interruption_ends_with_the_same_bits(tmp_path, changes):
    class StoppedError(Exception):
        pass

    def stop(progress):
        if (progress.epoch, progress.step) == (3, 2):
            raise StoppedError

    whole, parts = net(), net()
    expected = train(whole, Blobs(), **options(**changes), refresh_every=3)
    with pytest.raises(StoppedError):
        train(
            parts,
            Blobs(),
            **options(**changes, state_file=tmp_path / "s", progress=stop),
            refresh_every=3,
        )
    parts = net(seed=9)
    found = train(
        parts,
        Blobs(),
        **options(**changes, state_file=tmp_path / "s", resume=True),
        refresh_every=3,
    )
    assert same(whole, parts)
    assert found.history == expected.history
    assert found.best_epoch == expected.best_epoch


def test_zeros_come_gradually_when_the_entropy_weight_is_ramped_up():
    def zeros(ramp):
        seen = []
        result = train(
            net(),
            Blobs(),
            **options(entropy_ramp=ramp, progress=seen.append),
            entropy_weight=1.0,
            relevance=None,
        )
        return [progress.zeros for progress in seen], result

    (at_once, _), (ramped, result) = zeros(0.0), zeros(0.7)
    assert ramped[0] < at_once[0] - 0.2
    assert ramped[-1] > ramped[0] + 0.2
    assert result.best_epoch == 4  # the others had a smaller γ, and would have won by it


def test_learned_steps_come_to_rest_with_the_weights(monkeypatch):
    seen = []

    class Watched(quantizer_module.Quantizer):
        def step(self, *batch):
            super().step(*batch)
            seen.append([tensor.meaning.step.copy() for tensor in self.tensors()])

    monkeypatch.setattr(run, "Quantizer", Watched)
    train(net(), Blobs(), **options(), step="learned", step_rate=1e-2)

    def moved(before, after):
        return max(float(abs(a / b - 1).max()) for a, b in zip(after, before, strict=True))

    assert moved(seen[0], seen[1]) > 1e-3
    assert moved(seen[-2], seen[-1]) < 1e-4


def test_bfloat16_changes_the_forward_pass_and_leaves_the_levels_exact():
    models = net(), net()
    for model, precision in zip(models, ("float32", "bfloat16"), strict=True):
        result = train(model, Blobs(), **options(precision=precision, epochs=2), distillation=0.5)
        for tensor in result.quantizer.tensors():
            assert np.array_equal(model.state_dict()[tensor.name].numpy(), tensor.dequantize())
    assert not same(*models)


def test_resuming_another_run_is_refused(tmp_path):
    train(net(), Blobs(), **options(epochs=2, state_file=tmp_path / "s"))
    with pytest.raises(OptionError, match="had epochs 2, this one has 3"):
        train(net(), Blobs(), **options(epochs=3, state_file=tmp_path / "s", resume=True))
    with pytest.raises(OptionError, match="had recipe"):
        train(net(), Blobs(), **options(epochs=2, state_file=tmp_path / "s", resume=True), bits=2)


@pytest.mark.parametrize("content", [b"", b"junk" * 50, None])
def test_a_damaged_state_file_is_refused(tmp_path, content):
    path = tmp_path / "s"
    if content is None:
        torch.save({"model": 1}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(FileError, match="delete it to start anew"):
        train(net(), Blobs(), **options(state_file=path, resume=True))


def test_a_state_that_cannot_be_written_is_an_error_and_leaves_nothing(tmp_path):
    with pytest.raises(FileError, match="cannot write the training state"):
        train(net(), Blobs(), **options(epochs=1, state_file=tmp_path / "missing" / "s"))
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_while_the_state_is_written_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(state, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(net(), Blobs(), **options(epochs=1, state_file=tmp_path / "s"))
    assert list(tmp_path.iterdir()) == []


def test_the_best_epoch_by_validation_is_kept(monkeypatch):
    scores = iter([0.1, 0.9, 0.9, 0.3])
    monkeypatch.setattr(
        run.TrainingRun, "evaluate", lambda self, split: Score("accuracy", next(scores), 0.0, 1)
    )
    model = net()
    result = train(model, Blobs(), **options())
    assert result.best_epoch == 3
    for tensor in result.quantizer.tensors():
        assert np.array_equal(model.state_dict()[tensor.name].numpy(), tensor.dequantize())


def test_no_epochs_assign_with_relevances_and_leave_everything_else():
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = train(model, Blobs(), **options(epochs=0), bits=4)
    assert result.history == ()
    assert all(entry.beta is not None for entry in result.quantizer.report().tensors)
    assert all(
        torch.equal(model.state_dict()[name], before[name])
        for name in before
        if name not in ("0.weight", "4.weight")
    )


def test_distillation_follows_the_float_model():
    plain, distilled = net(), net()
    teacher = net()
    train(plain, Blobs(), **options(learning_rate=3e-2), bits=2)
    train(distilled, Blobs(), **options(learning_rate=3e-2, distillation=1.0), bits=2)
    x = torch.from_numpy(Blobs().train.x)
    teacher.eval()

    def distance(model):
        return float((model(x).softmax(1) - teacher(x).softmax(1)).abs().mean().detach())

    assert distance(distilled) < distance(plain)


def train_as_one_of_two(rank, folder):
    """One of the processes that torchrun would start."""
    import os

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    model = plain_net(
        seed=rank
    )  # the second process starts elsewhere and must get the first one's weights
    result = train(model, Blobs(), **options(epochs=2), refresh_every=2)
    torch.save(
        {"model": model.state_dict(), "background": result.quantizer.background()},
        folder / f"{rank}.pt",
    )
    if rank == 0:
        torch.save([record.accuracy for record in result.history], folder / "accuracy.pt")


def plain_net(seed=0):
    """Neither BatchNorm nor dropout: their statistics and masks are each process's own."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 3))


def test_two_processes_train_as_one_would_and_hold_the_same_levels(tmp_path, monkeypatch):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    torch.multiprocessing.spawn(train_as_one_of_two, (tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for part in ("model", "background"):
        assert all(torch.equal(value, second[part][name]) for name, value in first[part].items())

    alone = plain_net()
    result = train(alone, Blobs(), **options(epochs=2), refresh_every=2)
    for name, value in result.quantizer.background().items():
        torch.testing.assert_close(first["background"][name], value, rtol=1e-3, atol=1e-4)
    assert torch.load(tmp_path / "accuracy.pt") == pytest.approx(
        [record.accuracy for record in result.history], abs=0.02
    )


def drift(rank, folder, port):
    import torch.distributed as dist

    from ecqx_onnx.quantization import Quantizer

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    quantizer = Quantizer(plain_net(seed=rank), relevance=None)
    try:
        quantizer.step()
    except ModelError as error:
        (folder / f"{rank}.txt").write_text(str(error))
    dist.destroy_process_group()


def test_processes_that_drift_apart_are_told_so(tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(drift, (tmp_path, port), nprocs=2)
    assert all("holds other levels" in (tmp_path / f"{rank}.txt").read_text() for rank in (0, 1))


def test_refusals():
    with pytest.raises(DataError, match="no training samples"):
        train(net(), Blobs(0), **options())
    with pytest.raises(OptionError, match="learning rate nan"):
        train(net(), Blobs(), **options(learning_rate=float("nan")))
    with pytest.raises(OptionError, match=r"validation 1\.5"):
        train(net(), Blobs(), **options(validation=1.5))
    with pytest.raises(OptionError, match="precision 'half' is unknown"):
        train(net(), Blobs(), **options(precision="half"))
    with pytest.raises(OptionError, match="entropy_ramp is 1"):
        train(net(), Blobs(), **options(entropy_ramp=1.0))
    with pytest.raises(OptionError, match="relevance_until is 0"):
        train(net(), Blobs(), **options(relevance_until=0.0))
    with pytest.raises(ModelError, match="lower the learning rate"):
        train(net(), Blobs(), **options(learning_rate=1e30), relevance=None)


@pytest.mark.parametrize(
    "change",
    [
        lambda y: y + 2,
        lambda y: y.astype(np.float64),
        lambda y: y[:-1],
        lambda y: np.stack([y, y], 1),
        lambda y: -1 - y,
    ],
    ids=["out of range", "float", "too few", "two columns", "negative"],
)
def test_targets_that_do_not_fit_are_refused_in_one_sentence(change):
    data = Blobs()

    class Spoiled(Split):
        def batches(self, batch_size, *, shuffle=None):
            for x, y in super().batches(batch_size, shuffle=shuffle):
                yield x, change(y)

    data.train = Spoiled(data.train.x, data.train.y)
    for relevance in (None, "epsilon_plus_flat"):
        with pytest.raises(DataError, match="do not fit the model's output"):
            train(net(), data, **options(validation=0.0), relevance=relevance)


def test_each_epoch_has_its_own_order():
    orders = []

    class Recorded(Split):
        def batches(self, batch_size, *, shuffle=None):
            for x, y in super().batches(batch_size, shuffle=shuffle):
                orders.append(x[:3].tobytes())
                yield x, y

    data = Blobs()
    data.train = Recorded(data.train.x, data.train.y)
    train(net(), data, **options(epochs=2, validation=0.0))
    assert len(set(orders)) == len(orders)


def test_relevances_are_taken_up_to_a_share_of_the_training(monkeypatch):
    taken, seen = [], []

    class Watched(quantizer_module.Quantizer):
        def observe(self, *batch):
            taken.append(self._steps)
            super().observe(*batch)

    monkeypatch.setattr(run, "Quantizer", Watched)
    result = train(
        net(), Blobs(), **options(relevance_until=0.5, progress=seen.append), refresh_every=2
    )
    assert taken == list(range(0, len(seen) // 2, 2))
    assert result.setup["relevance_until"] == 0.5
    assert result.quantizer.relevances()


def test_a_state_from_before_relevance_until_resumes_as_it_began(tmp_path):
    train(net(), Blobs(), **options(epochs=1, state_file=tmp_path / "s"))
    state = torch.load(tmp_path / "s")
    del state["setup"]["relevance_until"]
    torch.save(state, tmp_path / "s")
    train(
        net(),
        Blobs(),
        **options(epochs=1, state_file=tmp_path / "s", resume=True, relevance_until=1.0),
    )
    with pytest.raises(OptionError, match="relevance_until"):
        train(net(), Blobs(), **options(epochs=1, state_file=tmp_path / "s", resume=True))


def test_whether_bfloat16_is_emulated_can_be_told(monkeypatch):
    told = training.emulates_bfloat16("cpu")
    assert told or torch.backends.cpu.get_cpu_capability() != "AVX2"
    assert not training.emulates_bfloat16("meta")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert training.emulates_bfloat16("cpu")
