"""Folders with an ONNX graph that takes pixels or token ids and gives logits, normalisation included."""

import importlib
import importlib.util
import json
import logging
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from soups.errors import UserError
from soups.export.network import Answer, Images, Inputs, Network, of_one_input
from soups.files.atomic import write_json

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
GRAPH, FACTS = "model.onnx", "preprocessing.json"
LARGEST = 1_900_000_000  # bytes in one file; protobuf ends at 2 GiB, so what is larger has its weights beside it
LENGTH = 6  # tokens of a random text
USE = """
import json, numpy, onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession("FOLDER/model.onnx")
seen = json.load(open("FOLDER/preprocessing.json"))  # resize, crop, class names; normalisation is inside the graph
image = Image.open("image.png").convert("RGB")
short = min(image.size)
squash = seen["resize_mode"] == "squash"
sides = [seen["resize"] if squash else int(seen["resize"] * side / short) for side in image.size]
left, top = (round((side - seen["crop"]) / 2) for side in sides)
image = image.resize(sides, Image.BICUBIC).crop((left, top, left + seen["crop"], top + seen["crop"]))
logits = session.run(None, {"images": numpy.asarray(image).transpose(2, 0, 1)[None]})[0]
print(seen["class_names"][logits.argmax()])
"""
USE_TEXT = """
import json, onnxruntime
from transformers import AutoTokenizer

session = onnxruntime.InferenceSession("FOLDER/model.onnx")
seen = json.load(open("FOLDER/preprocessing.json"))
ids = AutoTokenizer.from_pretrained("FOLDER")(["a text"], return_tensors="np")["input_ids"].astype("int64")
logits = session.run(None, {"input_ids": ids})[0]  # shorter texts of a batch are filled up with seen["pad"]
print(seen["class_names"][logits.argmax()])
"""


def need_packages() -> None:
    """A `UserError` says what to install where a package that writes or runs graphs is missing."""
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(f"onnx needs {', '.join(missing)}: pip install {' '.join(PACKAGES)}")


class _Pictures(nn.Module):
    """(N, 3, S, S) uint8 -> logits."""

    def __init__(self, network: Network, images: Images):
        super().__init__()
        self.module, self.call = network.module, network.answer
        self.mean = nn.Buffer(torch.tensor(images.mean).view(1, 3, 1, 1))
        self.std = nn.Buffer(torch.tensor(images.std).view(1, 3, 1, 1))
        self.name = next(iter(network.inputs(1)))

    def forward(self, images: Tensor) -> Tensor:
        return self.call(self.module, {self.name: (images.float() / 255 - self.mean) / self.std})


class _Texts(nn.Module):
    """(N, L) int64 token ids, filled up with `pad` -> logits."""

    def __init__(self, network: Network, pad: int):
        super().__init__()
        self.module, self.call, self.pad = network.module, network.answer, pad

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.call(self.module, {"input_ids": input_ids, "attention_mask": (input_ids != self.pad).long()})


def graph_of(network: Network) -> Network:
    """The network as it is written: of pictures as bytes, or of token ids alone; a `UserError` without classes."""
    if not network.class_names:
        raise UserError(f"onnx: {network.name} is no classifier; pictures and texts with classes can be written")
    if network.images is not None:
        images, module = network.images, _Pictures(network, network.images)

        def pixels(count: int) -> Inputs:
            generator, shape = torch.Generator().manual_seed(count), (count, 3, images.size, images.size)
            return {"images": torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)}

        return replace(network, module=module.eval(), answer=of_one_input, inputs=pixels)
    pad = network.pad or 0
    module_of_texts: Any = network.module
    words: int = module_of_texts.config.vocab_size

    def texts(count: int) -> Inputs:
        ids = torch.randint(0, words, (count, LENGTH), generator=torch.Generator().manual_seed(count))
        ids[ids == pad] = pad + 1 if pad + 1 < words else 0
        ids[0, -2:] = pad  # the first one is shorter
        return {"input_ids": ids}

    return replace(network, module=_Texts(network, pad).eval(), answer=of_one_input, inputs=texts, pad=pad)


def facts_of(network: Network) -> dict[str, Any]:
    """What one who feeds the graph must know; JSON."""
    known: dict[str, Any] = {"class_names": list(network.class_names)}
    return known | (network.images.facts() if network.images is not None else {"pad": network.pad})


def write(graph: Network, folder: Path, facts: Mapping[str, Any]) -> None:
    """model.onnx: `images` (N, 3, S, S) uint8 or `input_ids` (N, L) int64 to `logits` (N, C) float32; any N and L.

    The graph is one of `graph_of`; `facts`, what its inputs look like before, go to preprocessing.json and its
    metadata.
    """
    need_packages()
    onnx: Any = importlib.import_module("onnx")
    ((name, example),) = graph.inputs(3).items()
    axes = {0: torch.export.Dim.DYNAMIC} | ({1: torch.export.Dim.DYNAMIC} if name == "input_ids" else {})
    size = sum(tensor.numel() * tensor.element_size() for tensor in graph.module.state_dict().values())
    path = folder / GRAPH
    logging.disable(logging.WARNING)  # of operators that torch decomposes, which concerns nobody here
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                graph.module,
                (example,),
                path,
                input_names=[name],
                output_names=["logits"],
                dynamic_shapes=(axes,),
                external_data=size > LARGEST,
                dynamo=True,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"onnx: torch cannot write {graph.name} as a graph ({reason})") from error
    finally:
        logging.disable(logging.NOTSET)
    written = onnx.load(path, load_external_data=False)
    for key, value in facts.items():
        written.metadata_props.add(key=key, value=json.dumps(value, ensure_ascii=False))
    onnx.save(written, path)
    write_json(folder / FACTS, dict(facts))


def read(folder: Path, graph: Network) -> Answer:
    """As anyone would load it."""
    runtime: Any = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(folder / GRAPH, providers=["CPUExecutionProvider"])

    def answer(inputs: Inputs) -> Tensor:
        named = {name: value.numpy() for name, value in inputs.items()}
        return torch.from_numpy(session.run(None, named)[0])

    return answer
