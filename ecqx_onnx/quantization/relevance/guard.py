"""Take relevances so that they cannot end a training: a failure is recorded, and ECQ goes on.

What enters and leaves is as in `relevance.Relevances`; this is the only way in which the Quantizer
calls it. Options and targets that do not fit what was asked for are still refused, since the user
can mend them at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn as nn
from torch import Tensor

from ecqx_onnx.errors import DataError, OptionError
from ecqx_onnx.quantization.relevance.relevance import Relevances, Start, take_first_line


class GuardedRelevances:
    """Takes relevances until that fails; from then on gives none.

    failure: one sentence on what ended them, or None. failures: (weight, reason) of single weights
    that have no relevance, or ("all weights", reason). left_out: why the last batch gave none, or
    None.
    """

    def __init__(
        self, model: nn.Module, names: list[str], *, composite: Any, start: Start = "logit"
    ) -> None:
        self.failure: str | None = None
        self.left_out: str | None = None
        self._worked = False  # whether some batch has given relevances
        self._inner: Relevances | None = None
        try:
            self._inner = Relevances(model, names, composite=composite, start=start)
        except OptionError:
            raise
        except Exception as error:  # any module's own code runs there
            self.give_up(take_first_line(error))

    def __call__(
        self, inputs: Any, target: Any, background: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """r_w by name; nothing once relevances have failed.

        Args:
            inputs: the model's input, or a tuple / mapping of its arguments.
            target: what the start of the relevances needs, class indices by default.
            background: name -> weights W.

        Returns:
            Name -> r_w, of the weight's shape; a weight that no relevance reached is left out.

        Raises:
            OptionError: the composite fits no layer.
            DataError: the targets of the first batch do not fit the model's output; of a later one,
                it is left out.
        """
        self.left_out = None
        if self._inner is None:
            return {}
        try:
            found = self._inner(inputs, target, background)
            self._worked = True
            return found
        except OptionError:
            raise
        except DataError as error:
            if not self._worked:
                raise
            self.left_out = take_first_line(error)
            return {}
        except Exception as error:  # any module's own code runs there
            self.give_up(take_first_line(error))
            return {}

    def give_up(self, reason: str) -> None:
        """Take no relevances from now on; the memory of the model's copy is freed.

        Args:
            reason: one line, for the report.
        """
        self.failure, self._inner = reason, None

    @property
    def rules(self) -> Mapping[str, str]:
        """Weight -> name of the rule of its layer."""
        return {} if self._inner is None else self._inner.rules

    @property
    def approximated(self) -> tuple[str, ...]:
        """Operators that relevance crossed by gradient times input."""
        return () if self._inner is None else self._inner.approximated

    @property
    def failures(self) -> tuple[tuple[str, str], ...]:
        """(weight, reason) for each weight that has no relevance because something failed."""
        if self.failure is not None:
            return (("all weights", self.failure),)
        return () if self._inner is None else tuple(self._inner.failures.items())
