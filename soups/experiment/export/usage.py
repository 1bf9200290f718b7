"""What a model card tells its reader to type."""

from configs.stages import Target
from soups.experiment.export.source import Source
from soups.export import onnx, timm

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
