"""A callback for transformers' Trainer that keeps a model's weights on levels.

    quantizer = Quantizer(model, example, bits=4, relevance=None)
    trainer = Trainer(model, arguments, callbacks=[QuantizerCallback(quantizer)], ...)

The Trainer tells its callbacks nothing of the batch. With relevances, the model's own inputs are
remembered by a hook on its forward: `labels` among them are the targets.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ecqx_onnx.quantization.quantizer import Quantizer
from ecqx_onnx.quantization.relevance.zennit_import import import_zennit

import_zennit()  # it mends a torchvision that lacks its operators, which transformers may import
from transformers import TrainerCallback  # noqa: E402

STATE = "ecqx_quantizer.pt"


class QuantizerCallback(TrainerCallback):
    """Calls the quantizer after each step of the optimizer; its state lies beside checkpoints."""

    def __init__(self, quantizer: Quantizer) -> None:
        """Remember what to call.

        Args:
            quantizer: attached to the model that the Trainer trains.
        """
        self.quantizer = quantizer
        self._inputs: Mapping[str, Any] = {}
        self._hook: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Watch the model's inputs, and go on from a checkpoint if the Trainer does.

        Args:
            args: the Trainer's arguments.
            state: where the training stands.
            control: the Trainer's switches.
            **kwargs: the model, the optimizer and others.
        """
        if self.quantizer.options.relevance is not None:
            model = self.quantizer.model
            self._hook = model.register_forward_pre_hook(self._remember, with_kwargs=True)
        if state.global_step:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if (folder / STATE).is_file():
                kept = torch.load(folder / STATE, map_location="cpu", weights_only=True)
                self.quantizer.load_state_dict(kept)

    def _remember(self, module: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        if module.training and kwargs:
            self._inputs = kwargs

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Carry an update of the optimizer over to the background weights.

        Args:
            args: the Trainer's arguments.
            state: where the training stands.
            control: the Trainer's switches.
            **kwargs: the model, the optimizer and others.
        """
        if self.quantizer.options.relevance is None:
            self.quantizer.step()
            return
        inputs = {name: value for name, value in self._inputs.items() if name != "labels"}
        tensors = {name: v for name, v in inputs.items() if isinstance(v, torch.Tensor)}
        self.quantizer.step(tensors, self._inputs.get("labels"))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the quantizer's state into the checkpoint's folder.

        Args:
            args: the Trainer's arguments.
            state: where the training stands.
            control: the Trainer's switches.
            **kwargs: the model, the optimizer and others.
        """
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            torch.save(self.quantizer.state_dict(), folder / f"{STATE}.part")
            (folder / f"{STATE}.part").replace(folder / STATE)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop watching the model.

        Args:
            args: the Trainer's arguments.
            state: where the training stands.
            control: the Trainer's switches.
            **kwargs: the model, the optimizer and others.
        """
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
