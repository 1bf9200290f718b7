"""From a soup to a folder that timm, open_clip, transformers or onnxruntime loads."""
