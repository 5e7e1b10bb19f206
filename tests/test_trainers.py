"""The callbacks inside the real trainers: levels at every step, saved and resumed bit for bit."""

import numpy as np
import pytest
import torch
import torch.nn as nn

from ecqx_onnx.quantization import Quantizer

torch.set_num_threads(1)
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x=None, labels=None):
        logits = self.body(x)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, i):
        generator = torch.Generator().manual_seed(i)
        return {"x": torch.randn(8, generator=generator), "labels": torch.tensor(i % 3)}


def make(relevance):
    torch.manual_seed(0)
    model = Net()
    quantizer = Quantizer(model, {"x": torch.randn(2, 8)}, relevance=relevance)
    return model, quantizer


def assert_on_levels(model, quantizer):
    for tensor in quantizer.tensors():
        assert np.array_equal(model.state_dict()[tensor.name].numpy(), tensor.dequantize())


def same_levels(one, other):
    pairs = zip(one.tensors(), other.tensors(), strict=True)
    return all(np.array_equal(a.levels, b.levels) for a, b in pairs)


@pytest.mark.parametrize("relevance", [None, "epsilon_plus_flat"])
def test_huggingfaces_trainer_trains_saves_and_resumes(tmp_path, relevance):
    try:
        from ecqx_onnx.trainers.huggingface import QuantizerCallback
    except ImportError:
        pytest.skip("needs pip install 'ecqx-onnx[trainers]'")
    from transformers import Trainer, TrainingArguments

    def run(folder, **options):
        model, quantizer = make(relevance)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / folder),
            num_train_epochs=2,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            save_strategy="epoch",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
            seed=1,
        )
        callbacks = [QuantizerCallback(quantizer)]
        trainer = Trainer(model, arguments, train_dataset=Rows(), callbacks=callbacks)
        trainer.train(**options)
        assert_on_levels(model, quantizer)
        return quantizer

    whole = run("a")
    again = run("a", resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert same_levels(whole, again)
    assert whole._steps == 8
    assert bool(whole.relevances()) == (relevance is not None)


@pytest.mark.parametrize("relevance", [None, "epsilon_plus_flat"])
def test_lightning_trains_saves_and_resumes(tmp_path, relevance):
    try:
        from ecqx_onnx.trainers.lightning import QuantizerCallback
    except ImportError:
        pytest.skip("needs pip install 'ecqx-onnx[trainers]'")
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def training_step(self, batch, index):
            return self.net(x=batch["x"], labels=batch["labels"])["loss"]

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05)

    def run(epochs, checkpoint=None):
        model, quantizer = make(relevance)
        callback = QuantizerCallback(quantizer, split=lambda b: ({"x": b["x"]}, b["labels"]))
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accumulate_grad_batches=2,
            callbacks=[callback],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
            default_root_dir=tmp_path,
        )
        loader = torch.utils.data.DataLoader(Rows(), batch_size=8)
        trainer.fit(Module(model), loader, ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        assert_on_levels(model, quantizer)
        return quantizer

    run(1)
    whole, again = run(2), run(2, str(tmp_path / "1.ckpt"))
    assert same_levels(whole, again)
    assert whole._steps == 8
