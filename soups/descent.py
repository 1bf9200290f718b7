"""Learned soups (Appendix I): mixing coefficients by gradient descent, without autograd through the ingredients.

With w = sum_i a_i theta_i the chain rule gives dL/da_i = <dL/dw, theta_i>. So a step is one mix into the network's
own tensors, one backward pass of an ordinary network, and K inner products; memory does not depend on K.
"""

import hashlib
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from soups.average import Loader, Place, Placement, inner_products, mix_into, mixture, settle
from soups.chance import seed as keyed_seed
from soups.errors import UserError
from soups.files.atomic import replacing
from soups.ranks import from_first, sum_over_ranks, this_rank

_BLOCK = re.compile(r"^(?:.+?\.)??(?:(?:res)?blocks?|layers?|stages|h|layer\d+)\.\d+(?:(?:\.blocks)?\.\d+)*(?=\.)")
_BEFORE = re.compile(
    r"(?:^|\.)(?:\w*embed\w*|\w+_token|ln_pre|norm_pre|stem|conv_stem|conv1|bn1|shared|wte|wpe)(?:\.|$)"
)
_TOWER = re.compile(r"(?:^|\.)(visual|text)\.")
Batches = Callable[[int], Iterable[Any]]  # epoch -> batches: tensors, or dicts and tuples of tensors
# a network, a batch and the temperature -> the sum of a loss, and of how many examples or tokens it is the sum
Loss = Callable[[nn.Module, Any, Tensor], tuple[Tensor, int]]


def cross_entropy(module: nn.Module, batch: tuple[Any, Tensor], beta: Tensor) -> tuple[Tensor, int]:
    """Of inputs and (n,) labels, the logits multiplied by the temperature."""
    inputs, labels = batch
    return F.cross_entropy(beta * module(inputs), labels, reduction="sum"), len(labels)


def next_token(module: nn.Module, batch: Mapping[str, Tensor], beta: Tensor) -> tuple[Tensor, int]:
    """Cross-entropy of a causal language model of transformers, for every token but the first of each text."""
    logits = module(**batch).logits[:, :-1]
    right = batch["input_ids"][:, 1:].masked_fill(batch["attention_mask"][:, 1:] == 0, -100)
    return F.cross_entropy(beta * logits.flatten(0, 1).float(), right.flatten(), reduction="sum"), int(
        (right >= 0).sum()
    )


def mean_of(loss: Callable[[nn.Module, Any], Tensor]) -> Loss:
    """The user's loss, which is a mean over the examples of a batch; it knows no temperature."""

    def summed(module: nn.Module, batch: Any, beta: Tensor) -> tuple[Tensor, int]:
        examples = _examples(batch)
        return loss(module, batch) * examples, examples

    return summed


@dataclass(frozen=True)
class LearnedSettings:
    """How coefficients are learned. Defaults are the paper's; batch size and weight decay are the authors' script's.

    Their script by layer has one coefficient a tensor, lr 0.05 and 5 epochs.
    """

    per: Literal["model", "layer", "tensor"] = "model"  # what shares one coefficient of a model
    lr: float = 0.1  # AdamW, constant
    epochs: int = 3
    weight_decay: float = 0.0  # decoupled, of softmax logits and temperature
    batch_size: int = 256  # images a step, over all ranks
    place: Place = "stream"  # where ingredients live: read from files at each step, or held on host or device
    differences: bool = False  # hold bfloat16 differences to the mean; not with stream
    save_every: int = 10  # steps between two states on disk


@dataclass(frozen=True)
class LearnedSoup:
    """How a soup is mixed, and how that was learned."""

    coefficients: Tensor  # (G, K) float64, positive, rows summing to 1
    groups: tuple[str, ...]  # G names, in the network's order
    place: Mapping[str, int]  # every name of a floating-point tensor -> its group
    beta: float  # multiplies the logits; learned with the coefficients, and no part of the weights
    losses: tuple[float, ...]  # of each step's minibatch
    weights: dict[str, Tensor] = field(default_factory=dict)  # from `learned`

    def of(self, name: str) -> list[float]:
        """The K numbers that mix a tensor; an integer's, which are not mixed, are equal."""
        if name not in self.place:
            return [1 / self.coefficients.shape[1]] * self.coefficients.shape[1]
        return self.coefficients[self.place[name]].tolist()


def shuffled(inputs: Tensor, labels: Tensor, batch_size: int, *key: object) -> Batches:
    """Minibatches of a split in an order that depends on `key` and the epoch alone; the last may be smaller."""

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(keyed_seed(*key, "learned soup", epoch))
        for rows in torch.randperm(len(labels), generator=generator).split(batch_size):
            yield inputs[rows], labels[rows]

    return batches


def layer_of(name: str) -> str:
    """The block that a tensor belongs to, by the path up to its index; else `embedding` or `head`.

    What stands before the first block (patch, position and token embeddings, stem) is the embedding and what comes
    after the last (final norm, projection, classifier, logit scale) the head; those of a tower keep its name.

    >>> layer_of("visual.transformer.resblocks.3.mlp.c_fc.weight"), layer_of("trunk.blocks.2.1.conv_pw.weight")
    ('visual.transformer.resblocks.3', 'trunk.blocks.2.1')
    >>> layer_of("visual.class_embedding"), layer_of("visual.proj"), layer_of("classification_head.weight")
    ('visual.embedding', 'visual.head', 'head')
    """
    block = _BLOCK.match(name)
    if block:
        return block.group()
    tower = _TOWER.search(name)
    place = "embedding" if _BEFORE.search(name) else "head"
    return f"{tower.group(1)}.{place}" if tower else place


@dataclass(frozen=True)
class Layout:
    """The network's floating-point tensors and the row of the coefficients that mixes each."""

    targets: dict[str, Tensor]  # tied tensors stand here once
    groups: tuple[str, ...]
    row: dict[str, int]  # every name of the state dict -> index into `groups`

    @classmethod
    def of(
        cls, module: nn.Module, per: Literal["model", "layer", "tensor"], names: Mapping[str, str] | None = None
    ) -> "Layout":
        """One group for all tensors, for each layer as `layer_of` names it, or for each tensor.

        `names` are the network's -> those of the same tensors in the models; a tied tensor may have one alone.
        """
        label: dict[str, Callable[[str], str]] = {"model": lambda name: "all", "layer": layer_of, "tensor": str}
        targets, first = dict[str, Tensor](), dict[int, str]()
        labels = {}
        for own, tensor in module.state_dict(keep_vars=True).items():
            name = own if names is None else names.get(own)
            if name is not None and tensor.is_floating_point():
                kept = first.setdefault(id(tensor), name)
                targets[kept], labels[name] = tensor, label[per](kept)
        groups = tuple(dict.fromkeys(labels.values()))
        return cls(targets, groups, {name: groups.index(group) for name, group in labels.items()})


@dataclass
class State:
    """All that a restart needs."""

    run: str  # a digest of what must be the same to go on
    logits: Tensor  # (G, K) float64, before the softmax
    beta: Tensor  # () float64
    optimizer: torch.optim.AdamW
    epoch: int = 0
    taken: int = 0  # steps of this epoch
    losses: list[float] = field(default_factory=list)

    @classmethod
    def fresh(cls, run: str, groups: int, models: int, settings: LearnedSettings) -> "State":
        """Uniform coefficients and a temperature of 1."""
        logits = torch.zeros(groups, models, dtype=torch.float64, requires_grad=True)
        beta = torch.ones((), dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.AdamW([logits, beta], lr=settings.lr, weight_decay=settings.weight_decay, foreach=False)
        return cls(run, logits, beta, optimizer)

    def save(self, path: Path) -> None:
        """Write everything, whole or not at all."""
        values = {name: value for name, value in vars(self).items() if name != "optimizer"}
        # An archive is called as its file, so that it is given an open one, without a name.
        with replacing(path) as temporary, temporary.open("wb") as file:
            torch.save(values | {"moments": self.optimizer.state_dict()["state"]}, file)

    def resume(self, path: Path | None) -> None:
        """Become what was saved; rank 0 decides whether there is something, since it may write while others read."""
        if from_first(path is not None and path.exists()) and path is not None:
            try:
                saved = torch.load(path, weights_only=True)
                run = saved.pop("run")
            except (RuntimeError, OSError, EOFError, pickle.UnpicklingError, KeyError) as error:
                raise UserError(f"{path} is damaged ({error}): delete it to learn the soup from the start") from None
            if run != self.run:
                raise UserError(f"{path} belongs to other ingredients or settings: delete it to learn this soup")
            with torch.no_grad():
                self.logits.copy_(saved["logits"])
                self.beta.copy_(saved["beta"])
            self.epoch, self.taken, self.losses = saved["epoch"], saved["taken"], saved["losses"]
            self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": saved["moments"]})
        if dist.is_initialized():
            dist.barrier()  # rank 0 replaces the file only after all have read it


@contextmanager
def _learning(module: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout, stored batch-norm statistics), with a gradient for every parameter."""
    modes = [(part, part.training) for part in module.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    module.eval()
    module.requires_grad_(True)
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
        for parameter, flag in wanted:
            parameter.requires_grad_(flag)
            parameter.grad = None


def _part(batch: Any, rank: int, world: int) -> Any:
    if isinstance(batch, Mapping):
        return {name: _part(value, rank, world) for name, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return tuple(_part(value, rank, world) for value in batch)
    return batch[rank::world]


def _examples(batch: Any) -> int:
    while not isinstance(batch, Tensor):
        batch = next(iter(batch.values())) if isinstance(batch, Mapping) else batch[0]
    return len(batch)


def step(
    module: nn.Module, layout: Layout, placement: Placement, state: State, batch: Any, *, loss: Loss = cross_entropy
) -> None:
    """One step of descent on the logits of the coefficients and on the temperature."""
    shares = state.logits.softmax(dim=1)  # (G, K)
    numbers = shares.tolist()
    mix_into(layout.targets, placement, lambda name: numbers[layout.row[name]])
    state.optimizer.zero_grad()
    rank, world = this_rank()
    if loss is not cross_entropy and _examples(batch) < world:
        raise ValueError(f"a batch of {_examples(batch)} examples has none for some of {world} processes")
    # Every rank sees its part of the minibatch; the sums of losses and of gradients over ranks are the minibatch's.
    summed, counted = loss(module, _part(batch, rank, world), state.beta)
    share = summed / int(sum_over_ranks(torch.tensor(counted)))
    share.backward()
    total = float(sum_over_ranks(share.detach().double().cpu()))
    if not total < float("inf"):
        raise ValueError(f"the loss of step {len(state.losses)} is {total}; a smaller lr may help")
    gradients = {
        name: sum_over_ranks(tensor.grad) for name, tensor in layout.targets.items() if tensor.grad is not None
    }
    products = inner_products(gradients, placement)  # (T, K)
    rows = torch.tensor([layout.row[name] for name in gradients], dtype=torch.long)
    shares.backward(torch.zeros_like(shares).index_add_(0, rows, products))
    if state.beta.grad is not None:  # the user's loss has no temperature
        sum_over_ranks(state.beta.grad)
    module.zero_grad()  # gradients are a whole model; the next mix has no use for them
    state.optimizer.step()
    state.losses.append(total)


def learned(
    module: nn.Module, models: Sequence[Loader], batches: Batches, settings: LearnedSettings, **more: Any
) -> LearnedSoup:
    """The soup of `learn`, which has these arguments and more; each model is loaded once again at the end."""
    found = learn(module, models, batches, settings, **more)
    return replace(found, weights=mixture([load() for load in models], found.of))


def learn(
    module: nn.Module,
    models: Sequence[Loader],
    batches: Batches,
    settings: LearnedSettings,
    *,
    state_path: Path | None = None,
    identity: str = "",
    loss: Loss = cross_entropy,
    names: Mapping[str, str] | None = None,
) -> LearnedSoup:
    """Coefficients of K models that minimise a loss on the held-out split.

    The coefficients are a softmax over the models, one for each group of tensors, and start uniform; a temperature
    that multiplies the logits starts at 1 and is learned with them. Floating-point buffers (batch-norm statistics)
    are mixed with the coefficients of their group but give no gradient; integers follow `Average`. With
    torch.distributed each rank holds every W-th ingredient and works on its part of each minibatch.

    Args:
        module: the network, on its device, from inputs to (n, C) logits; its weights are overwritten by mixes.
        models: K loaders of the same tensors as `module.state_dict()`. Each is called at most once, and its answer
            is read tensor by tensor: `lambda: LazyWeights(path)` keeps memory under 4 models, whatever K.
        batches: of an epoch, the same at every call and on every rank, on the module's device. See `shuffled`.
        settings: of the descent, and where ingredients live.
        state_path: of a state that is kept every few steps; a run that finds it ends with the same bits as one that
            was never stopped.
        identity: names ingredients, data and loss (their digests), so that no other run's state is taken up.
        loss: what is minimised.
        names: the network's names -> the models'; None where they are equal.

    Raises:
        ValueError: no models, or a loss that is not finite.
        UserError: ingredients that do not fit the network; the state on disk is damaged or another run's.

    Source: Wortsman et al. 2022, Appendix I; alpha starts uniform and weight decay is 0 as in the authors' script.
    """
    layout = Layout.of(module, settings.per, names)
    network = module.state_dict()
    device = next(iter(layout.targets.values())).device
    placement = settle(
        models,
        layout.targets,
        network if names is None else {names[own]: tensor for own, tensor in network.items() if own in names},
        place=settings.place,
        differences=settings.differences,
        device=device,
    )
    # How far it goes and how often it is saved may change in a run that goes on; what a step does may not.
    same = asdict(replace(settings, epochs=1, save_every=1))
    run = hashlib.blake2b(f"{identity}/{len(models)}/{layout.groups}/{same}".encode(), digest_size=16).hexdigest()
    state = State.fresh(run, len(layout.groups), len(models), settings)
    state.resume(state_path)
    path = state_path if this_rank()[0] == 0 else None  # one writer
    with _learning(module):
        while state.epoch < settings.epochs:
            for batch in islice(batches(state.epoch), state.taken, None):
                step(module, layout, placement, state, batch, loss=loss)
                state.taken += 1
                if path is not None and len(state.losses) % settings.save_every == 0:
                    state.save(path)
            state.epoch, state.taken = state.epoch + 1, 0
    if path is not None:
        state.save(path)
    shares = state.logits.detach().softmax(dim=1)
    return LearnedSoup(shares, layout.groups, layout.row, state.beta.item(), tuple(state.losses))
