"""Help texts of options that several verbs have."""

FACTORY = "A function (or class) that returns the network of a state dict."
INPUT_SHAPE = (
    "Shape of one input without the batch, such as 3,32,32; or each input with its batch, such as"
    " ids=2,16:int64, repeated. Needed with --model where FILE.py has no INPUT_SHAPE, EXAMPLE or"
    " example_inputs()."
)
DYNAMIC = (
    "Axis of an input that is free, NAME:AXIS or NAME:AXIS=LABEL, such as ids:1=time; repeat for"
    " more, or none. By default the first of every input, where that can be."
)
STRICT = "Refuse a state dict that lacks weights of the model's, or has others."
TRUST_PICKLE = "Unpickle MODEL. This runs its author's code."
FORCE = "Replace the output file if it exists."
STORAGE = (
    "How integers lie in the file: auto, dense, sparse or packed. auto takes the fewest bytes."
)
STORAGE_PREFERRED = (
    "How integers lie in the file: auto, dense, sparse or packed. auto goes by --prefer."
)
PREFER = (
    "With --storage auto: disk (fewest bytes), load (nothing is decoded at load), or auto: decoded"
    " where that saves 15 % of the file."
)
DEQUANTIZE = "How levels become floats: auto, folded (float speed) or standard (DequantizeLinear)."
TARGET = "The runtime that must load the file; `ecqx-onnx targets` lists them."
OPSET = "Highest ONNX opset to write; by default what the target can load."
SAMPLES = "Use only so many samples of the test split."
DATA = "Labelled data for accuracy: as for quantize. Without it, random inputs are compared."
OUT_ONNX = "The .onnx file to write."
MIN_AGREEMENT = (
    "Quantised without training: per cent of samples that must keep the float model's class;"
    " default: 99, and 95 for what convert --bits made."
)
MAX_ERROR = (
    "Quantised without training: largest relative error of an output; default where there are no"
    " class scores: 0.05, and 0.1 for what convert --bits made."
)
MAX_DROP = "Quantised without training: points of accuracy that may be lost on --data."
