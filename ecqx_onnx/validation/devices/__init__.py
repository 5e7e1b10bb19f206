"""Does the file say the same over there? Devices, and the runners that work on them."""

from ecqx_onnx.validation.devices.devices import (
    KNOWN,
    Device,
    DeviceList,
    Readiness,
    check_readiness,
    find_device,
)
from ecqx_onnx.validation.devices.setup import set_up
from ecqx_onnx.validation.devices.side_by_side import DeviceTable, Trouble
from ecqx_onnx.validation.devices.validation import TIME_LIMIT, validate_on

__all__ = [
    "KNOWN",
    "TIME_LIMIT",
    "Device",
    "DeviceList",
    "DeviceTable",
    "Readiness",
    "Trouble",
    "check_readiness",
    "find_device",
    "set_up",
    "validate_on",
]
