"""A soup for other libraries:  python -m soups.experiment.export soup=runs/demo/soups/greedy to=onnx out=DIR

Reads   the soup, the settings in its run folder, and the names of the classes from the data
Writes  DIR: weights, settings of images or texts, class names and README.md, a model card for the hub. DIR gets its
        name only after the library has loaded it by its own call and given the soup's logits. Libraries load it by

  to=timm          timm.create_model("local-dir:DIR", pretrained=True)
  to=open_clip     open_clip.create_model_and_transforms("local-dir:DIR")
  to=transformers  AutoModel.from_pretrained("DIR"), or what the model card in the folder says
  to=onnx          onnxruntime.InferenceSession("DIR/model.onnx"); needs requirements-export.txt

Soups of your own files:  soups export soup.safetensors --to timm --network timm:resnet50 --out DIR
"""

import sys
from typing import Any

from omegaconf import OmegaConf

from configs.help import settings_of
from configs.schema import checked
from configs.stages import Export
from soups.errors import UserError, one_line_errors


def main() -> None:
    """Export and say what was compared; the few settings are all typed."""
    words = sys.argv[1:]
    if not {"--help", "-h"}.isdisjoint(words):
        settings = [f"  {each.name}  {each.meaning} ({each.values})" for each in settings_of(Export)]
        print((__doc__ or "").strip(), "", *settings, sep="\n")
        return
    values: Any = OmegaConf.to_container(OmegaConf.from_dotlist(words))
    missing = [name for name in ("soup", "to", "out") if values.get(name) is None]
    if missing:
        typed = "soup=runs/demo/soups/greedy to=onnx out=FOLDER"
        raise UserError(f"{missing[0]} has no value: type, for example, {typed}")
    # Imported here, since --help needs none of it, and torch alone takes seconds.
    from soups.experiment.export.formats import export  # noqa: PLC0415

    print(export(checked(Export, values)))


if __name__ == "__main__":
    one_line_errors(main)
