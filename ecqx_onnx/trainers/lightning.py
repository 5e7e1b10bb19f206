"""A Lightning callback that keeps a module's weights on levels.

quantizer = Quantizer(module.net, bits=4)
trainer = lightning.Trainer(callbacks=[QuantizerCallback(quantizer)], max_epochs=5)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ecqx_onnx.quantization.quantizer import Quantizer
from ecqx_onnx.quantization.relevance.zennit_import import import_zennit

import_zennit()  # it mends a torchvision that lacks its operators, which lightning imports
try:
    from lightning import Callback
except ImportError:
    from pytorch_lightning import Callback

Split = Callable[[Any], tuple[Any, Any]]


class QuantizerCallback(Callback):
    """Calls the quantizer after each step of the optimizer; its state travels in checkpoints.

    With gradient accumulation a step of the optimizer comes after several batches; relevances are
    then taken on the last of them.
    """

    def __init__(self, quantizer: Quantizer, *, split: Split | None = None) -> None:
        """Remember what to call.

        Args:
            quantizer: attached to the module, or to the network inside it that is trained.
            split: batch -> (inputs of the network, targets), for the relevances; by default a batch
                is (inputs, targets) already. Not needed for relevance=None.
        """
        self.quantizer = quantizer
        self._split = split or _take_pair
        self._steps = 0
        self._state: dict[str, Any] | None = None  # loaded, and not taken over yet

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Count from where a resumed training stands.

        Args:
            trainer: Lightning's.
            pl_module: the module in training.
        """
        self._steps = trainer.global_step

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Carry an update of the optimizer over to the background weights.

        Args:
            trainer: Lightning's.
            pl_module: the module in training.
            outputs: of the training step.
            batch: as the data loader gave it.
            batch_idx: its number.
        """
        if trainer.global_step == self._steps:
            return  # gradients are accumulated: the optimizer has not moved
        self._steps = trainer.global_step
        if self.quantizer.options.relevance is None:
            self.quantizer.step()
            return
        was_training = pl_module.training
        self.quantizer.step(*self._split(batch))
        pl_module.train(was_training)

    def state_dict(self) -> dict[str, Any]:
        """Give what a checkpoint keeps.

        Returns:
            The quantizer's state.
        """
        return self.quantizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint.

        Args:
            state_dict: as `state_dict` gave it.
        """
        self._state = state_dict

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        """Do nothing yet: the module's weights are loaded after the callbacks' states.

        Args:
            trainer: Lightning's.
            pl_module: the module in training.
            checkpoint: the whole checkpoint.
        """

    def on_sanity_check_start(self, trainer: Any, pl_module: Any) -> None:
        """Take over a loaded state, once the module has its weights.

        Args:
            trainer: Lightning's.
            pl_module: the module in training.
        """
        self._take_over()

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Take over a loaded state, where there was no sanity check.

        Args:
            trainer: Lightning's.
            pl_module: the module in training.
        """
        self._take_over()

    def _take_over(self) -> None:
        if self._state is not None:
            self.quantizer.load_state_dict(self._state)
            self._state = None


def _take_pair(batch: Any) -> tuple[Any, Any]:
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    return batch, None
