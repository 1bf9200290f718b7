"""The settings of soups of one's own checkpoints, without an experiment."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from configs.data import Metric
from configs.training import Count, NonNegative, Probability, closed


@closed
class HeldOutImages:
    """configs/task/image_folder.yaml: labelled images of one's own, which select and report nothing."""

    kind: Literal["image_folder"]
    root: Path  # root/<class>/<image>; classes are numbered in the order of their names, as torchvision does
    metric: Metric = "top1"


@closed
class HeldOutTexts:
    """configs/task/text_file.yaml: labelled texts of one's own, which select and report nothing."""

    kind: Literal["text_file"]
    file: Path  # a line each, tabs between fields, the columns named in the first line
    columns: Annotated[tuple[str, ...], Field(min_length=1, max_length=2)]  # that are read; two are a pair
    label: str  # the column of class ids, or of class names as in the network's config.json
    metric: Metric = "top1"


@closed
class OwnNetwork:
    """configs/model/{timm,open_clip,transformers,function}.yaml: what one's own checkpoints are weights of."""

    kind: Literal["timm", "open_clip", "transformers", "function"]
    # as timm or open_clip call it; of transformers a folder with config.json, or a name on the hub; of function
    # `module:function`, which is called with num_classes; null: what the config in the ingredients' folder says
    name: str | None = None
    batch_size: Count  # examples a forward pass
    image_size: Count | None = None  # pixels, square; null: the network's own, of function 224
    templates: Literal["openai", "name"] = "openai"  # of open_clip without a head: prompts around the class names
    max_length: Count = 128  # tokens of a text

    @model_validator(mode="after")
    def function_is_named(self) -> "OwnNetwork":
        """A function has no config file that could name it."""
        if self.kind == "function" and (self.name is None or self.name.count(":") != 1):
            raise ValueError("model=function needs model.name=module:function, as in torchvision.models:resnet18")
        return self


@closed
class OwnPool:
    """configs/own.yaml: averaging files of one's own, without an experiment."""

    recipe: Literal["uniform", "weighted", "wise_ft", "greedy"]
    ingredients: Annotated[tuple[str, ...], Field(min_length=1)]  # files, folders of shards, or patterns such as a/*.pt
    out: Path  # the soup, .safetensors
    weights: tuple[NonNegative, ...] | None = None  # of recipe=weighted, one per ingredient, in any scale
    init: Path | None = None  # the initialisation: of recipe=wise_ft, and of batch_norm=keep
    alpha: Probability = 0.5  # of recipe=wise_ft: (1 - alpha) init + alpha mean of ingredients
    dtype: Literal["keep", "F64", "F32", "F16", "BF16"] = "keep"  # of floating-point tensors in the soup
    batch_norm: Literal["average", "keep"] = "average"  # running means and variances; keep: those of init
    threads: Annotated[int, Field(ge=1, le=64)] = 2  # that read and add; the result does not depend on them
    unrelated: Literal["refuse", "average"] = "refuse"  # models whose weights look as if they started elsewhere
    # of recipe=greedy: the held-out examples
    task: Annotated[HeldOutImages | HeldOutTexts, Field(discriminator="kind")] | None = None
    model: OwnNetwork | None = None  # of recipe=greedy: what the weights belong to
    ties: Literal["keep", "drop"] = "keep"  # of recipe=greedy

    @model_validator(mode="after")
    def recipe_has_what_it_needs(self) -> "OwnPool":
        """Every setting that is given is used, and every one that is needed is given."""
        if (self.recipe == "greedy") != (self.task is not None and self.model is not None):
            raise ValueError(
                "recipe=greedy needs held-out images and a network, and no other recipe does: "
                "task=image_folder task.root=DIR model=timm model.name=NAME; of texts "
                "task=text_file task.file=FILE model=transformers"
            )
        if (self.recipe == "weighted") != (self.weights is not None):
            raise ValueError("weights=[...] and recipe=weighted belong together")
        if self.init is None and (self.recipe == "wise_ft" or self.batch_norm == "keep"):
            raise ValueError("recipe=wise_ft and batch_norm=keep need the initialisation, init=FILE")
        if self.init is not None and self.recipe != "wise_ft" and self.batch_norm != "keep":
            raise ValueError("init=FILE is for recipe=wise_ft or batch_norm=keep, and would be ignored")
        if isinstance(self.task, HeldOutTexts) and self.model is not None and self.model.kind != "transformers":
            raise ValueError(f"texts are read by model=transformers, not by model={self.model.kind}")
        return self
