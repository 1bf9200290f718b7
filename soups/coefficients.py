"""Learned soups of models in any form: held-out examples or the user's loss say how much each model weighs."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from soups.averaging import Models, by_tensor, open_pool, writer
from soups.errors import UserError
from soups.files.opening import opened
from soups.heldout import HeldOut
from soups.mean import Mixing
from soups.scores import digests_of
from soups.scoring import Learning, key_of
from soups.soup import Soup


def learned(
    models: Models,
    held_out: HeldOut | str | Learning,
    *,
    per: Literal["model", "layer", "tensor"] = "model",
    lr: float = 0.1,
    epochs: int = 3,
    weight_decay: float = 0.0,
    place: Literal["stream", "host", "device"] = "stream",
    state: str | Path | None = None,
    **settings: Any,
) -> Soup:
    """Learn how much each model weighs by gradient descent on held-out examples (Appendix I).

    Under torchrun each process holds every W-th model and works on its part of each minibatch. Their sums are rounded
    in another order than one process's, so the coefficients agree to about 5 digits and not in every bit.

    Args:
        models: of one network.
        held_out: `soups.images(...)`, `soups.texts(...)`, `soups.perplexity(...)`; or your loss, as
            `soups.user_loss(network, batches, loss)` or as "module:function", a function without arguments that returns
            these three.
        per: what shares one coefficient of a model.
        lr: of AdamW, constant.
        epochs: over the examples.
        weight_decay: decoupled.
        place: where models live: read from files at each step, or held on host or device.
        state: a file from which a killed run continues.
        settings: of the averaging.

    Raises:
        UserError: models that do not fit the network, or a loss that is not finite.
    """
    from soups.descent import LearnedSettings, learn  # noqa: PLC0415
    from soups.files.tensors import LazyWeights  # noqa: PLC0415
    from soups.scorers.networks import places  # noqa: PLC0415
    from soups.scorers.outside import code_of, function_named  # noqa: PLC0415

    pool, how, _ = open_pool(models, settings, score=held_out if isinstance(held_out, HeldOut) else None)
    digests, size = digests_of(pool, pool.paths), held_out.batch_size if isinstance(held_out, HeldOut) else None
    if isinstance(held_out, HeldOut):
        scorer = held_out.scorer(pool)
        if scorer.learning is None:
            raise UserError(f"--{held_out.kind} has no loss whose gradient a soup could be learned by")
        learning, key = scorer.learning(size), scorer.key
        if how.batch_norm == "recompute" and how.measured_on is None:
            how = replace(how, measured_on=scorer)
    elif isinstance(held_out, str):
        build = function_named(held_out)
        learning, key = user_loss(*build()), code_of(build)
    else:
        learning, key = held_out, code_of(held_out.loss)
    with opened(pool.paths, pool.reading) as checkpoints:
        state_dict = learning.module.state_dict(keep_vars=True)
        try:
            found = learn(
                learning.module,
                [partial(LazyWeights, checkpoint) for checkpoint in checkpoints],
                learning.batches,
                LearnedSettings(per=per, lr=lr, epochs=epochs, weight_decay=weight_decay, place=place),
                state_path=None if state is None else Path(state),
                identity=key_of(key, digests, size),
                loss=learning.loss,
                names=places(checkpoints[0].names, state_dict, pool.names[0], learning.rename),
            )
        except ValueError as error:
            raise UserError(f"learned: {error}") from None
    mean = found.coefficients.mean(dim=0).tolist()
    note = {"per": per, "lr": lr, "epochs": epochs, "first_loss": found.losses[0], "last_loss": found.losses[-1]}
    mixing: Mixing = mean if per == "model" else by_tensor(pool, [], found.of)
    return Soup("learned", pool, writer(pool, mixing, how), dict(zip(pool.names, mean, strict=True)), note)


def user_loss(network: Any, batches: Any, loss: Any = None) -> Learning:
    """What a soup is learned by.

    Args:
        network: a module of torch, on its device; its weights do not matter.
        batches: a function of the epoch to batches, or a list of batches: tensors, or dicts and tuples of tensors.
        loss: of network and batch, a mean over its examples; None: cross-entropy of (inputs, labels).
    """
    from soups.descent import cross_entropy, mean_of  # noqa: PLC0415

    each = batches if callable(batches) else (lambda epoch: batches)
    return Learning(network, each, cross_entropy if loss is None else mean_of(loss))
