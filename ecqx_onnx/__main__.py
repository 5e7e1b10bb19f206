"""python -m ecqx_onnx: the command line, for torchrun and for places without the script on PATH."""

from ecqx_onnx.cli import main

main()
