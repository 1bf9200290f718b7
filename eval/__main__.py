"""Evaluate every finished model of an experiment:  python -m eval experiment=demo

Reads   runs/<name>/{ingredients,zero_shot,soups}, the held-out, test and shift splits
Writes  runs/<name>/logits/<split>/<key>.npy, scores.jsonl beside each model; what is there is not computed again
Several jobs share the models by share.of=N and share.index=0, ..., N - 1.
On several GPUs: torchrun --nproc-per-node 8 -m eval experiment=..., where each evaluates its part of the images.
"""

from configs.cli import entry_point
from configs.errors import UserError
from configs.schema import Experiment


def run(config: Experiment) -> None:
    """All models that are finished by now."""
    # Imported here, so that --help and mistyped settings are answered at once: torch and the models take seconds.
    from eval.pool import evaluate_all, evaluate_together, model_folders  # noqa: PLC0415
    from store.processes import end_processes, first_decides, start_processes  # noqa: PLC0415
    from store.runs import RunFolder  # noqa: PLC0415
    from store.staging import staged  # noqa: PLC0415
    from store.workers import use_threads  # noqa: PLC0415

    use_threads(config.cluster.threads)
    config = staged(config)
    processes = start_processes()
    folders = first_decides(lambda: model_folders(config), processes)
    if not folders and config.share.of == 1:
        raise UserError(f"no finished model in {RunFolder.of(config).root}: run python -m finetune first")
    if processes.world > 1:
        evaluate_together(config, folders, processes)
        end_processes()
    else:
        evaluate_all(config, folders)
    if processes.is_main:
        run = f"run={RunFolder.of(config).root}"
        print(f"{len(folders)} models evaluated. Next: python -m soups {run}, then python -m analysis {run}")


if __name__ == "__main__":
    entry_point(run, several=True)()
