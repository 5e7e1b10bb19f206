"""Makes a float model small without training: any number of bytes or of lost points, one command.

    weights -> moments -> sensitivity -> allocation -> rounding -> encoding, and search around them.

Each part is a value that can be printed and tested alone. Nothing here imports torch where the
model is an .onnx file.
"""
