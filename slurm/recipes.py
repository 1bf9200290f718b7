"""What each recipe asks of a machine, beside the evaluation of what it made."""

from configs.schema import Experiment
from finetune.meter import BACKWARD_TOO
from slurm.workload import FLOAT32, Work, looked, network
from soups.cook import ENSEMBLES

STEP_READS = 2  # times that a learned soup's step reads each ingredient: to mix, and for the inner products


def members(config: Experiment) -> int:
    """K, the models of the pool: fine-tuned rows and the initialisation."""
    return config.sweep.size + 1


def learned_steps(config: Experiment, held_out: int) -> int:
    """Steps of a learned soup."""
    settings = config.cooking.learned
    return settings.epochs * -(-held_out // settings.batch_size)


def dish_work(config: Experiment, name: str, images: dict[str, int]) -> Work:
    """What cooking one dish asks; of what ends by itself, the most.

    Args:
        config: of the experiment.
        name: of `soups.cook.dishes`.
        images: how many each split has.
    """
    recipe, k, held_out = name.partition("/")[0], members(config), images[config.task.held_out]
    size = network(config.model, config.task).bytes
    evaluation = looked(config, held_out)
    if recipe in ENSEMBLES:
        return Work(read=k * held_out * config.task.size * FLOAT32)
    match recipe:
        case "greedy" | "greedy_random_order":
            return evaluation.times(k - 1) + Work(read=k * size)
        case "greedy_with_replacement":
            tries = config.cooking.rounds * k
            return evaluation.times(tries) + Work(read=k * size, again=(tries - k) * size)
        case "learned" | "learned_by_layer" | "learned_by_tensor":
            return _learned(config, held_out, size * k)
    few = {"best": 1, "second_best": 1, "wise_ft": 2, "subset": len(config.cooking.rows)}
    return Work(read=few.get(recipe, k) * size)


def _learned(config: Experiment, held_out: int, pool: int) -> Work:
    """A forward and a backward pass over held-out in each epoch; the pool is read at every step, or once."""
    forward = network(config.model, config.task).inference
    images = looked(config, held_out)
    steps = learned_steps(config, held_out) if config.cooking.learned.place == "stream" else 0
    return Work(
        trained=BACKWARD_TOO * forward * held_out * config.cooking.learned.epochs,
        fixed=images.fixed,
        copied=images.copied,
        read=pool,
        again=STEP_READS * steps * pool,
    )
