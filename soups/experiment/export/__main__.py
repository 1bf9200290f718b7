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

from configs.cli import export_entry_point
from configs.stages import Export


def run(settings: Export) -> None:
    """Export and say what was compared."""
    # Imported here, since --help needs none of it, and torch alone takes seconds.
    from soups.experiment.export.formats import export  # noqa: PLC0415

    print(export(settings))


if __name__ == "__main__":
    export_entry_point(run)()
