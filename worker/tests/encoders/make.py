#!/usr/bin/env python3
"""Speaker encoders of a few kB with the interfaces of those that others publish; what they say is arithmetic.

    pip install onnx==1.23.2 numpy
    python3 worker/tests/encoders/make.py

| file | like | inputs | outputs |
|---|---|---|---|
| wespeaker.onnx | WeSpeaker's exports (ResNet34, CAM++) | feats [B, T, 80] | embs [B, 8] |
| nemo.onnx | NeMo's TitaNet | audio_signal [B, 80, T], length [B] | logits [B, 3], embs [B, 8] |
| three_inputs.onnx | nothing known | three | embs [B, 8] |

Each band's greatest value over time, times a matrix of ((7 i + 3 j) mod 11 - 5) / 5 for band i and number j. NeMo's also takes it
times the length, so that one that is not given shows; its logits are of the same kind and shorter."""

import pathlib

import numpy
from onnx import TensorProto, checker, helper, numpy_helper, save

HERE = pathlib.Path(__file__).resolve().parent
BINS, DIMS = 80, 8


def matrix(columns):
    band, number = numpy.indices((BINS, columns))
    return ((band * 7 + number * 3) % 11 - 5).astype(numpy.float32) / 5


def value(name, kind, shape):
    return helper.make_tensor_value_info(name, kind, shape)


def write(name, nodes, inputs, outputs, constants):
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, name, inputs, outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    checker.check_model(model, full_check=True)
    save(model, HERE / f"{name}.onnx")


def greatest(source, axis):
    return helper.make_node("ReduceMax", [source], ["greatest"], axes=[axis], keepdims=0)


FLOAT = TensorProto.FLOAT
EMBS = value("embs", FLOAT, ["B", DIMS])

write(
    "wespeaker",
    [greatest("feats", 1), helper.make_node("MatMul", ["greatest", "weights"], ["embs"])],
    [value("feats", FLOAT, ["B", "T", BINS])], [EMBS], {"weights": matrix(DIMS)},
)
write(
    "nemo",
    [
        greatest("audio_signal", 2),
        helper.make_node("Cast", ["length"], ["frames"], to=FLOAT),
        helper.make_node("Unsqueeze", ["frames", "one"], ["column"]),
        helper.make_node("Mul", ["greatest", "column"], ["scaled"]),
        helper.make_node("MatMul", ["scaled", "short"], ["logits"]),
        helper.make_node("MatMul", ["scaled", "weights"], ["embs"]),
    ],
    [value("audio_signal", FLOAT, ["B", BINS, "T"]), value("length", TensorProto.INT64, ["B"])],
    [value("logits", FLOAT, ["B", 3]), EMBS],
    {"weights": matrix(DIMS), "short": matrix(3), "one": numpy.array([1], numpy.int64)},
)
write(
    "three_inputs",
    [helper.make_node("Sum", ["a", "b", "c"], ["embs"])],
    [value(name, FLOAT, ["B", DIMS]) for name in "abc"], [EMBS], {},
)
