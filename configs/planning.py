"""Settings of estimates: what a plan of GPU-hours and storage assumes about the machines."""

from typing import Annotated

from pydantic import Field

from configs.training import Count, Positive, closed

Share = Annotated[float, Field(gt=0, le=1)]


@closed
class Plan:
    """configs/plan/*.yaml: of `python -m slurm.plan`; no result depends on it."""

    gpu: str  # words of its name in the table of finetune/log.py, as in h100 or a100 or "h100 pcie"
    gpus: Count | None = None  # wall time is said for so many too
    gpus_per_row: Count | None = None  # that train one row together; null: 8 where compute.strategy=fsdp, else 1
    utilisation: Share  # of the GPU's peak while it trains, what is computed again for memory included
    inference_utilisation: Share  # of the GPU's peak in forward passes alone
    cores_per_gpu: Count  # CPU cores that decode images for each GPU
    augmented_per_core: Positive  # images a second that a core decodes and augments
    fixed_per_core: Positive  # images a second that a core decodes for evaluation
    copied_per_core: Positive  # images a second that a core reads from decoded copies (compute.decoded)
    read_gigabytes: Positive  # 10^9 bytes a second that one task reads from the shared file system
    reread_gigabytes: Positive  # 10^9 bytes a second that one task reads once more, where the node has kept the files
    cache_gigabytes: Positive  # 10^9 bytes of files that a node's memory keeps between two readings
