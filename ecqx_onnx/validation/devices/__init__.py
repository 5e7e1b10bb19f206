"""Does the file say the same over there? Runners in Python and JavaScript, and the devices that they run on."""

from ecqx_onnx.validation.devices.devices import KNOWN, Device, find_device
from ecqx_onnx.validation.devices.setup import set_up
from ecqx_onnx.validation.devices.validation import DeviceTable, validate_on

__all__ = ["KNOWN", "Device", "DeviceTable", "find_device", "set_up", "validate_on"]
