"""The model card of an export, README.md with the front matter that Hugging Face's hub reads: what its reader types."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.stages import Target
from soups.experiment.export.source import Part, Source
from soups.export import onnx, timm
from soups.folder import Card, interval

OPEN_CLIP = """
import json, open_clip, torch
from PIL import Image
from safetensors.torch import load_file

model, _, transform = open_clip.create_model_and_transforms("local-dir:FOLDER")  # hf-hub:USER/NAME after a push
head = load_file("FOLDER/classifier.safetensors")
image = transform(Image.open("image.png"))[None]
features = model.eval().encode_image(image, normalize=NORMALIZE)
logits = features @ head["weight"].T + head["bias"]
print(json.load(open("FOLDER/classes.json"))[logits.argmax()])
"""
VISION = """
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel

model = AutoModel.from_pretrained("FOLDER").eval()
processor = AutoImageProcessor.from_pretrained("FOLDER")
head = load_file("FOLDER/classifier.safetensors")
pixels = processor(Image.open("image.png").convert("RGB"), return_tensors="pt")["pixel_values"]
FEATURES
logits = features @ head["weight"].T + head["bias"]
print(model.config.id2label[logits.argmax().item()])
"""
TEXT = """
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

model, tokenizer = AutoModel.from_pretrained("FOLDER").eval(), AutoTokenizer.from_pretrained("FOLDER")
head = load_file("FOLDER/classifier.safetensors")
tokens = tokenizer(["TEMPLATE"], padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
share = tokens["attention_mask"][..., None]
features = (model(**tokens).last_hidden_state * share).sum(1) / share.sum(1)
NORMALISED
logits = features @ head["weight"].T + head["bias"]
print(model.config.id2label[logits.argmax().item()])
"""
PROMPT = """
from transformers import AutoTokenizer, AUTO

model, tokenizer = AUTO.from_pretrained("FOLDER").eval(), AutoTokenizer.from_pretrained("FOLDER")
# Reads: TEMPLATE
# The logits are the log-probabilities of the answers: ANSWERS
"""
ONNX_TEXT = """
import json, numpy, onnxruntime
from tokenizers import Tokenizer

session = onnxruntime.InferenceSession("FOLDER/model.onnx")
seen = json.load(open("FOLDER/preprocessing.json"))
tokens = Tokenizer.from_file("FOLDER/tokenizer.json").encode("TEMPLATE", add_special_tokens=False).ids
ids = numpy.array([[*seen["before"], *tokens, *seen["after"]]])  # shorter texts of a batch are filled with seen["pad"]
logits = session.run(None, {"input_ids": ids})[0]
print(seen["class_names"][logits.argmax()])
"""
METRICS = {"top1": "accuracy", "matthews": "matthews_correlation", "macro_f1": "f1"}


def _dataset(source: Source) -> str:
    task = source.task
    return task.subset or (task.kind if task.kind in ("emoji", "sentiment") else task.folder.name)


def _pipeline(source: Source) -> str:
    return "text-classification" if source.model.is_reader else "image-classification"


def results_of(source: Source) -> list[dict[str, Any]]:
    """The scores, as the hub shows and searches them."""
    data = _dataset(source)
    return [
        {
            "task": {"type": _pipeline(source)},
            "dataset": {"name": data, "type": data, "split": row["split"]},
            "metrics": [{"type": METRICS.get(row["metric"], row["metric"]), "value": round(row["score"], 4)}],
        }
        for row in source.scores
    ]


def _scores(source: Source) -> list[str]:
    if not source.scores:
        return ["It was not evaluated here."]
    role = {source.task.held_out: "selected on", source.task.test: "test"}
    lines = ["| split | role | metric | score | top-1 | 95 % interval of top-1 | n |", "|---|---|---|---|---|---|---|"]
    for row in source.scores:
        low, high = interval(row["correct"], row["n"])
        lines.append(
            f"| {row['split']} | {role.get(row['split'], 'shift')} | {row['metric']} | {row['score']:.4f} "
            f"| {100 * row['top1']:.1f} % | {100 * low:.1f} to {100 * high:.1f} % | {row['n']:,} |"
        )
    return [*lines, "", "Intervals are Wilson's, which take examples as independent. Held-out chose the ingredients."]


def _part(part: Part) -> str:
    share = "by tensor" if part.weight is None else f"{part.weight:.4g}"
    held_out = "" if part.held_out is None else f"{100 * part.held_out:.1f} %"
    drawn = ", ".join(f"{name}={_short(value)}" for name, value in part.drawn.items())
    return f"| {part.name} | {share} | {held_out} | {drawn} |"


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _ingredients(source: Source) -> list[str]:
    if not source.parts:
        return ["One fine-tuned model, not an average."]
    head = ["| ingredient | share | held-out | settings |", "|---|---|---|---|"]
    return head + [_part(part) for part in source.parts if part.weight != 0]


def _proxies(source: Source) -> list[str]:
    named = [("model", source.model.proxy_for), ("benchmark", source.task.proxy_for)]
    lines = [f"- The {what} stands in the place of the paper's: a proxy for {name}." for what, name in named if name]
    if source.task.protocol == "paper":
        lines.append("- Models were selected on the split that is reported (task.protocol=paper).")
    return lines or ["- No proxy: model and data are what they are called."]


def _licence(source: Source, licence: str) -> str:
    start = source.model.name or source.model.kind
    set_by = "is set by whoever publishes it" if licence == "other" else f"was set to {licence} by whoever exported it"
    text = (
        f"The licence of the weights {set_by}. They come from the pretrained weights {start} and from the data "
        f"{_dataset(source)}, whose licences hold for what is made of them."
    )
    return text + (" DATA_LICENSES.md of the code lists those of the icons." if _dataset(source) == "emoji" else "")


def write_card(source: Source, to: Target, licence: str, use: str, folder: Path) -> None:
    """README.md: front matter, Python to load it by, recipe, ingredients, scores, proxies, licence, provenance."""
    name = source.model.name or source.model.kind
    is_on_hub = source.model.kind not in ("timm", "open_clip") and "/" in name
    Card(
        title=source.title,
        library=to,
        recipe=source.recipe,
        about=f"Network: {name}; {len(source.class_names)} classes.",
        use=use,
        sections={
            "Ingredients": _ingredients(source),
            "Scores": _scores(source),
            "What was a proxy": _proxies(source),
            "Licence": [_licence(source, licence)],
            "Provenance": _provenance(source.provenance),
        },
        pipeline=_pipeline(source),
        licence=licence,
        results=results_of(source),
        more={"base_model": name} if is_on_hub else {},
    ).write(folder)


def _provenance(record: Mapping[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items())
    commit = record.get("commit")
    lines = [f"- commit {commit}{', with changes' if record.get('modified') else ''}"] if commit else []
    return [*lines, f"- cooked with {versions}"] if versions else lines or ["- not recorded"]


def usage(source: Source, to: Target) -> str:
    """Python that loads the folder and prints a class."""
    text, prompt = source.model.is_reader, source.model.head == "prompt"
    unit = not prompt and source.classifier.normalize
    template = source.task.template or "{text}"
    match to:
        case "timm":
            return timm.USE
        case "open_clip":
            return OPEN_CLIP.replace("NORMALIZE", str(unit))
        case "onnx":
            return ONNX_TEXT.replace("TEMPLATE", template) if text else onnx.USE
    if prompt:
        auto = "AutoModelForMaskedLM" if source.model.kind == "masked_lm" else "AutoModelForSeq2SeqLM"
        answers = ", ".join(source.class_names)
        return PROMPT.replace("AUTO", auto, 2).replace("TEMPLATE", template).replace("ANSWERS", answers)
    normalised = "features = torch.nn.functional.normalize(features, dim=-1)"
    if text:
        code = TEXT.replace("TEMPLATE", template).replace("LENGTH", str(source.model.max_length))
        return code.replace("NORMALISED\n", f"{normalised}\n" if unit else "")
    call = "model.get_image_features" if getattr(source.classifier.tower, "is_dual", False) else "model"
    features = f"features = {call}(pixel_values=pixels).pooler_output.flatten(1)"
    return VISION.replace("FEATURES", f"{features}\n{normalised}" if unit else features)
