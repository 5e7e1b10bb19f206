"""Plan how the quantized weights of someone else's model are stored anew."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np
from ecqx_onnx_converters import FloatGraph, Matching, build, make_plan
from ecqx_onnx_converters.foreign.foreign import Foreign, find_quantized
from ecqx_onnx_converters.foreign.qonnx_functions import drop_uncalled
from ecqx_onnx_converters.graph.opset_raising import raise_opset
from ecqx_onnx_converters.graph.opsets import refuse_opset
from ecqx_onnx_converters.matching.matching import GraphWeight
from ecqx_onnx_converters.passes.batchnorm import BatchNorm, fold_batchnorms
from ecqx_onnx_converters.passes.shapes import find_stated_shapes
from ecqx_onnx_converters.passes.sharing import share_equal_tensors
from ecqx_onnx_converters.passes.work import Work
from ecqx_onnx_converters.planning.plan import Kept, Plan
from ecqx_onnx_converters.serialization.report import WrittenTensor
from ecqx_onnx_converters.targets import Target, find_target
from onnx import ModelProto

from ecqx_onnx.inputs.onnx_file import OnnxFile
from ecqx_onnx.recognition.foreign_graph import load_foreign_graph
from ecqx_onnx.recognition.left_alone import list_left_alone
from ecqx_onnx.recognition.recognition import NotRecognized, recognize

RAISED_TO = (21, 18, 13)  # opsets that bring storages: INT4; packed; several weights in a byte
WORTH_DECODING = 0.9  # of the bytes that several integers a byte take as they are
RECORD = 40  # bytes of metadata that a stored weight takes, about


@dataclass(frozen=True, kw_only=True)
class StorageOptions:
    """How integers are stored, and for whom.

    Attributes:
        storage: "auto" (fewest bytes), "dense", "sparse" or "packed".
        dequantize: "auto", "folded" (float speed) or "standard" (DequantizeLinear).
        target: the runtime that must load the file.
        opset: highest to write; None for what the target can load.
        prefer: with storage "auto", what to save: "auto", "disk" or "load".
    """

    storage: str = "auto"
    dequantize: str = "auto"
    target: str = "onnxruntime"
    opset: int | None = None
    prefer: str = "auto"

    def make_plan(
        self, graph: FloatGraph, matching: Matching, *, integer: Collection[str] = ()
    ) -> Plan:
        """Plan a file with these options.

        Args:
            graph: as `make_plan` of the converters takes it.
            matching: its quantized weights.
            integer: names of weights that integer kernels read.

        Returns:
            The plan.

        Raises:
            OptionError: the options do not go together, or the target has no such storage.
        """
        return make_plan(
            graph,
            matching,
            target=self.target,
            storage=self.storage,
            dequantize=self.dequantize,
            opset=self.opset,
            prefer=self.prefer,
            integer=integer,
        )


def rewrite_model(file: OnnxFile) -> ModelProto | None:
    """What `pack` makes of a model with its default options, in memory.

    Args:
        file: Someone else's model.

    Returns:
        The packed model with its data in it; None where nothing in it can be packed.
    """
    shared = share_equal_tensors(load_foreign_graph(file).graph)
    graph = shared.graph
    raised = raise_graph(graph, find_target("onnxruntime"), None)
    plan, _, _ = plan_packing(raised or graph, StorageOptions(), fold_batchnorm=True)
    plan = replace(plan, shapes=find_stated_shapes(graph))
    return build(plan).to_model() if plan.entries or shared.nbytes else None


def raise_graph(graph: FloatGraph, target: Target, opset: int | None) -> FloatGraph | None:
    """Raise a graph to an opset that has more storages.

    Args:
        graph: someone's model.
        target: bounds the opset.
        opset: bounds it, too, if given.

    Returns:
        The graph in a higher opset. None where it is in one already, can just be declared so, or
        can't be raised.
    """
    highest = min(target.max_opset, opset or target.max_opset)
    for wanted in RAISED_TO:
        if not graph.opset < wanted <= highest:
            continue
        if refuse_opset(graph.proto, wanted) is None:
            return None
        raised = raise_opset(graph, wanted)
        if isinstance(raised, FloatGraph):
            return raised
    return None


def plan_packing(
    graph: FloatGraph, options: StorageOptions, *, fold_batchnorm: bool
) -> tuple[Plan, tuple[Kept, ...], tuple[BatchNorm, ...]]:
    """Plan the storage of all weights that get smaller.

    Args:
        graph: a model with weights that some quantizer has put on few values, or stored as
            integers.
        options: how they are to be stored.
        fold_batchnorm: let BatchNormalization go into the scales before it.

    Returns:
        (the plan; weights that don't get smaller or can't be had, with the reason; the
        BatchNormalizations that were found).
    """
    # 1. Float weights that lie on few values.
    unrecognized: dict[str, NotRecognized] = {}
    recognized: dict[str, GraphWeight] = {}
    for name, values in graph.weights.items():
        if values.dtype == np.float32 and values.ndim >= 2:
            result = recognize(name, values)
            if isinstance(result, NotRecognized):
                unrecognized[name] = result
            else:
                recognized[name] = GraphWeight(name, result, (name,))
    # 2. With those that are integers already: a plan of all, again without what gained nothing,
    #    since weights that stay as they were change what is worth it for the others.
    leave: dict[str, Kept] = {}
    batchnorms: tuple[BatchNorm, ...] = ()
    while True:
        foreign = find_quantized(graph, leave=leave)
        there = [
            recognized[name]
            for name in foreign.graph.weights
            if name in recognized and name not in leave
        ]
        work = Work(foreign.graph, Matching((*foreign.weights, *there), ()))
        if fold_batchnorm:
            work = fold_batchnorms(work, before_rounding=False)
            batchnorms = work.find_notes(BatchNorm)
        plan = options.make_plan(work.graph, work.matching)
        useless = _list_useless(plan, foreign)
        if not useless:
            break
        leave |= {kept.name: kept for kept in useless}
    drop_uncalled(plan.graph.proto)
    # 3. Why the others are not stored anew.
    floats = [
        Kept(kept.name, kept.shape, unrecognized[kept.name].reason)
        for kept in plan.kept
        if kept.name in unrecognized
    ]
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.proto.graph.initializer}
    refused = [Kept(name, shapes.get(name, ()), reason) for name, reason in foreign.refused.items()]
    kept = (*leave.values(), *refused, *floats)
    told = {entry.name for entry in kept} | recognized.keys()
    for weight in foreign.weights:
        told.update((weight.name, *weight.sources))
    return plan, (*kept, *list_left_alone(graph, told)), batchnorms


def _list_useless(plan: Plan, foreign: Foreign) -> list[Kept]:
    """Weights that the plan can't store, or stores in no fewer bytes than they had.

    Weights of one source share their integers: they get smaller together, or not at all.
    """
    sources = {weight.name: weight.sources[0] for weight in foreign.weights}
    found = {*sources, *(entry.weight.name for entry in plan.entries)}
    narrow = {
        weight.name for weight in foreign.weights if weight.integers and weight.integers.digits > 1
    }
    useless = [kept for kept in plan.kept if kept.name in found]
    if not plan.entries:
        return useless
    rows: dict[str, list[WrittenTensor]] = {}
    for row in build(plan).tensors:
        rows.setdefault(sources.get(row.name, row.name), []).append(row)
    for source, members in rows.items():
        before = foreign.replaced.get(source)
        if before is None:
            before = foreign.graph.weights[source].nbytes
        after = sum(row.nbytes + RECORD for row in members)
        reason = ""
        if not before:
            reason = f"something else reads '{source}', too, which would stay beside it"
        elif after >= before:
            reason = f"stored anew it would take {after:,} bytes, not {before:,}"
        elif members[0].name in narrow and after > WORTH_DECODING * before:
            reason = (
                f"stored anew it would take {after / before:.0%} of its {before:,} bytes, too"
                " little gain to decode several integers a byte while loading"
            )
        if reason:
            useless += [Kept(row.name, row.shape, reason) for row in members]
    return useless
