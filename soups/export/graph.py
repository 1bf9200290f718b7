"""A network as an ONNX graph that takes pixels or token ids and gives logits, normalisation included."""

import importlib
import importlib.util
import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.errors import UserError
from soups.export.source import Source
from store.atomic import write_json

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
GRAPH = "model.onnx"
LARGEST = 1_900_000_000  # bytes in one file; protobuf ends at 2 GiB, so what is larger has its weights beside it


def need_packages() -> None:
    """Say what to install.

    Raises:
        UserError: a package of requirements-export.txt is missing.
    """
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(
            f"to=onnx needs {', '.join(missing)}: pip install -r requirements-export.txt, or make export-setup"
        )


def facts(source: Source) -> dict[str, Any]:
    """What one who feeds the graph must know; JSON."""
    known: dict[str, Any] = {"class_names": list(source.class_names)}
    if source.model.is_reader:
        words = source.tokenizer
        template = source.task.template if source.task else None
        known |= {"template": template, "before": words.before, "after": words.after, "pad": words.pad}
        return known | {"max_length": words.max_length}
    images, (mean, std) = source.images, source.statistics()
    known |= {"resize": images.resize, "resize_mode": "squash" if images.squash else "shortest", "crop": images.size}
    return known | {"interpolation": "bicubic", "range": "uint8, 0 to 255, RGB", "mean_inside": mean, "std_inside": std}


def write_onnx(source: Source, folder: Path) -> None:
    """model.onnx: `images` (N, 3, S, S) uint8 or `input_ids` (N, L) int64 to `logits` (N, C) float32; any N and L.

    preprocessing.json, and the same in the graph's metadata, says what images or texts look like before.

    Raises:
        UserError: packages are missing, or torch cannot write the network as a graph.
    """
    need_packages()
    onnx: Any = importlib.import_module("onnx")
    text = source.model.is_reader
    name = "input_ids" if text else "images"
    axes = {0: torch.export.Dim.DYNAMIC} | ({1: torch.export.Dim.DYNAMIC} if text else {})
    size = sum(tensor.numel() * tensor.element_size() for tensor in source.network.state_dict().values())
    path = folder / GRAPH
    logging.disable(logging.WARNING)  # of operators that torch decomposes, which concerns nobody here
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                source.network,
                (source.example(3),),
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
        raise UserError(f"to=onnx: torch cannot write {source.model.kind} as a graph ({reason})") from error
    finally:
        logging.disable(logging.NOTSET)
    known = facts(source)
    graph = onnx.load(path, load_external_data=False)
    for key, value in known.items():
        graph.metadata_props.add(key=key, value=json.dumps(value, ensure_ascii=False))
    onnx.save(graph, path)
    write_json(folder / "preprocessing.json", known)
    if text:
        source.tokenizer.tokenizer.save_pretrained(folder)


def read_onnx(source: Source, folder: Path) -> Callable[[Tensor], Tensor]:
    """As anyone would load it."""
    runtime: Any = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(folder / GRAPH, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda inputs: torch.from_numpy(session.run(None, {name: inputs.numpy()})[0])
