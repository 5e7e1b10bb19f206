"""An .onnx file -> a folder that is ready to use on a platform: model, manifest, golden outputs, runner, README."""

from ecqx_onnx.deployment.folder import Deployed, deploy
from ecqx_onnx.deployment.platforms import PLATFORMS, Platform, find_platform

__all__ = ["PLATFORMS", "Deployed", "Platform", "deploy", "find_platform"]
