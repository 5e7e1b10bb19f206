"""Deployment folders: a model with its manifest, golden outputs, a runner and a README.

Each is ready to use on a platform, and can prove there that the model gives the same outputs.
"""

from ecqx_onnx.deployment.card import check_base_model
from ecqx_onnx.deployment.deployed import Deployed
from ecqx_onnx.deployment.folder import check_page_options, deploy
from ecqx_onnx.deployment.platforms import PLATFORMS, Platform, find_platform

__all__ = [
    "PLATFORMS",
    "Deployed",
    "Platform",
    "check_base_model",
    "check_page_options",
    "deploy",
    "find_platform",
]
