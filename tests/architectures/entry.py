"""One architecture to try: how it is made and what it is called with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn as nn


@dataclass(frozen=True)
class Entry:
    """name: in the table. family: what it stands for. make: -> (module, example). refused: a part
    of the sentence that refuses it, for what torch's exporter cannot do."""

    name: str
    family: str
    make: Callable[[], tuple[nn.Module, Any]]
    refused: str | None = None
