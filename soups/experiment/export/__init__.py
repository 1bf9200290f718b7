"""From a soup or a row of a run to a folder that timm, open_clip, transformers or onnxruntime loads."""
