"""All architectures that are tried."""

from __future__ import annotations

from tests.architectures.language import TRANSFORMERS
from tests.architectures.own import OWN
from tests.architectures.vision import TIMM, TORCHVISION

ENTRIES = (*OWN, *TORCHVISION, *TIMM, *TRANSFORMERS)
