"""Labelled texts, perplexity and multiple choice, read by classifiers and language models of transformers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from soups.candidates import Candidate
from soups.errors import UserError
from soups.files.tables import column, read_objects, read_table, read_text
from soups.scorers.metrics import of_classes
from soups.scorers.networks import device, from_pretrained, read_source, settings_in, tokenizer_of
from soups.scoring import HeldOut, Learning, Scored, Scorer, key_of, mean_of_answers
from soups.sources import Pool

LONGEST = 1024  # tokens of a window, where the network can read more
MASKED_AT_ONCE = 128  # tokens of a window of a masked model, each of which takes a forward pass of the window
BATCH = 8  # windows, or prompts with a choice, of a forward pass
TEXTS, TOKENS = 64, 128  # labelled texts of a forward pass, and the most tokens of one
LEARNED_TEXTS = 32  # of a step of a learned soup


def of_texts(asked: HeldOut, pool: Pool) -> Scorer:
    """A metric of a text classifier's answers."""
    from transformers import AutoModelForSequenceClassification  # noqa: PLC0415

    path, batch_size, max_length = asked.path, asked.batch_size or TEXTS, asked.max_length or TOKENS
    source, config = read_source(asked, pool, "Classification")
    rows = read_table(path)
    remedy = ": see --columns, --label"
    texts = [column(path, rows, name, remedy) for name in asked.columns]
    ids = {str(i): i for i in config.id2label} | {name: i for i, name in config.id2label.items()}
    found = column(path, rows, asked.label, remedy)
    strange = sorted(set(found) - ids.keys())
    if strange:
        classes = ", ".join(config.id2label.values())
        raise UserError(f"{path}: the label {strange[0]!r} is no class of {source}, which has {classes}")
    known = torch.tensor([ids[name] for name in found])
    tokenizer = tokenizer_of(source)
    # Without padding token a text at a time would be needed; such tokenizers name their end instead.
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def tokenized(columns: Sequence[Sequence[str]]) -> Any:
        return tokenizer(*columns, padding=True, truncation=True, max_length=max_length, return_tensors="pt")

    starts = range(0, len(rows), batch_size)
    read = [tokenized([column[start : start + batch_size] for column in texts]) for start in starts]

    @torch.inference_mode()
    def predicted(candidate: Candidate) -> Tensor:
        network = from_pretrained(AutoModelForSequenceClassification, candidate.folder(source), candidate.name)
        network.config.pad_token_id = tokenizer.pad_token_id
        network.eval().to(device())
        return torch.cat([network(**batch.to(device())).logits.argmax(dim=1).cpu() for batch in read])

    def learning(batch_size: int | None) -> Learning:
        from soups.descent import cross_entropy, shuffled  # noqa: PLC0415

        module = AutoModelForSequenceClassification.from_config(config).to(device())
        module.config.pad_token_id = tokenizer.pad_token_id
        order = shuffled(torch.arange(len(known)), known, batch_size or LEARNED_TEXTS, "texts")

        def batches(epoch: int) -> Iterator[tuple[Any, Tensor]]:
            for places, labels in order(epoch):
                columns = [[column[place] for place in places.tolist()] for column in texts]
                yield dict(tokenized(columns).to(device())), labels.to(device())

        def loss(module: Any, batch: tuple[Any, Tensor], beta: Tensor) -> tuple[Tensor, int]:
            return cross_entropy(lambda inputs: module(**inputs).logits, batch, beta)  # type: ignore[arg-type]

        return Learning(module, batches, loss)

    more = [version("transformers"), asked.metric, max_length, list(asked.columns), asked.label, path]
    return of_classes(asked.metric, predicted, known, key_of("texts", *more, *settings_in(source)), learning=learning)


@dataclass(frozen=True)
class Span:
    """Tokens, and which of them are scored."""

    tokens: tuple[int, ...]
    first: int  # the first token that is scored
    last: int  # one after the last


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """(b, L) on the device, with zeros behind the shorter rows."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(device())


@dataclass(frozen=True)
class Reader:
    """A language model's tokenizer and what kind of model it is."""

    source: Path
    tokenizer: Any
    masked: bool  # BERT's kind, which sees both sides of a token that is masked
    max_length: int
    batch_size: int

    def spans(self, text: str) -> list[Span]:
        """A text in windows of at most `max_length` tokens; of a causal model the first token of each is not scored."""
        tokens = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if not self.masked:
            begin = self.tokenizer.bos_token_id
            head = [] if begin is None else [begin]
            width = self.max_length - len(head)
            windows = [[*head, *tokens[start : start + width]] for start in range(0, len(tokens), width)]
            return [Span(tuple(each), 1, len(each)) for each in windows if len(each) > 1]
        before, after = self._around()  # special tokens
        width = self.max_length - len(before) - len(after)
        parts = [tokens[start : start + width] for start in range(0, len(tokens), width)]
        return [Span((*before, *part, *after), len(before), len(before) + len(part)) for part in parts]

    def _around(self) -> tuple[list[int], list[int]]:
        plain = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        full = self.tokenizer("a")["input_ids"]
        place = next(i for i in range(len(full)) if full[i : i + len(plain)] == plain)
        return full[:place], full[place + len(plain) :]

    def answer(self, prompt: str, choice: str) -> Span:
        """A prompt with one choice behind it, of which the choice is scored; a UserError where they are too long."""
        joined = prompt if not prompt or prompt[-1].isspace() or choice[:1].isspace() else prompt + " "
        read = self.tokenizer(joined + choice, return_offsets_mapping=True)
        tokens, places = read["input_ids"], read["offset_mapping"]
        if len(tokens) > self.max_length:
            raise UserError(f"{len(tokens)} tokens of {joined[:40]!r}... are more than --max-length {self.max_length}")
        # Special tokens stand at no place, (0, 0); a space before the choice may be a part of its first token.
        inside = [i for i, (start, end) in enumerate(places) if end > max(start, len(joined.rstrip()))]
        first = max(inside[0], 0 if self.masked else 1)
        return Span(tuple(tokens), first, inside[-1] + 1)

    def scored_tokens(self, network: Any, spans: Sequence[Span]) -> Iterator[tuple[int, float]]:
        """A span's number and the log-likelihood of one of its tokens, for each token scored."""
        jobs = [
            (of, span, i)
            for of, span in enumerate(spans)
            for i in (range(span.first, span.last) if self.masked else [span.first])
        ]
        order = sorted(range(len(jobs)), key=lambda place: len(jobs[place][1].tokens))  # little padding
        for start in range(0, len(order), self.batch_size):
            batch = [jobs[place] for place in order[start : start + self.batch_size]]
            tokens = _padded([span.tokens for _, span, _ in batch])
            there = _padded([(1,) * len(span.tokens) for _, span, _ in batch])
            if self.masked:
                for row, (_, _, place) in enumerate(batch):
                    tokens[row, place] = self.tokenizer.mask_token_id
            logits = network(input_ids=tokens, attention_mask=there).logits
            for row, (of, span, place) in enumerate(batch):
                wanted = [place] if self.masked else list(range(span.first, span.last))
                seen = logits[row, wanted if self.masked else [i - 1 for i in wanted]].float().log_softmax(dim=-1)
                right = torch.tensor([span.tokens[i] for i in wanted], device=seen.device)
                for found in seen.gather(1, right[:, None]).flatten().tolist():
                    yield of, found

    @torch.inference_mode()
    def likelihoods(self, candidate: Candidate, spans: Sequence[Span]) -> NDArray[np.float64]:
        """(N, 2) sums of log-likelihoods and counts of tokens, of N spans."""
        from transformers import AutoModelForCausalLM, AutoModelForMaskedLM  # noqa: PLC0415

        library = AutoModelForMaskedLM if self.masked else AutoModelForCausalLM
        network = from_pretrained(library, candidate.folder(self.source), candidate.name).eval().to(device())
        sums: list[list[float]] = [[] for _ in spans]
        for of, found in self.scored_tokens(network, spans):
            sums[of].append(found)
        # Sorted, so that the sum does not depend on the order in which batches were made.
        return np.array([[sum(sorted(found)), len(found)] for found in sums])


def reader_of(asked: HeldOut, pool: Pool) -> Reader:
    """What reads for the language model that the ingredients are weights of."""
    source, config = read_source(asked, pool, "ForCausalLM", "LMHeadModel", "ForMaskedLM")
    tokenizer, longest = tokenizer_of(source), asked.max_length
    masked = (config.architectures or [""])[0].endswith("ForMaskedLM")
    if masked and tokenizer.mask_token_id is None:
        raise UserError(f"{source}: its tokenizer has no token for what is masked")
    reads = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or LONGEST
    if longest is not None and longest > reads:
        raise UserError(f"--max-length {longest}: {source} reads {reads} tokens")
    usual = MASKED_AT_ONCE if masked else LONGEST
    return Reader(source, tokenizer, masked, longest or min(reads, usual), asked.batch_size or BATCH)


def _key(kind: str, reader: Reader, path: Path, *more: Any) -> str:
    return key_of(kind, version("transformers"), reader.max_length, *more, path, *settings_in(reader.source))


def perplexity_of(answers: NDArray[Any], times: NDArray[Any]) -> float:
    """exp of minus the mean log-likelihood of a token, over (N, 2) windows that count (N,) times."""
    total, tokens = times @ answers
    return float(np.exp(-total / tokens))


def of_perplexity(asked: HeldOut, pool: Pool) -> Scorer:
    """Perplexity of a token, lower is better; of a masked model pseudo-perplexity, each token masked once.

    A text file is one document, a .jsonl has one in `text` of each line. Documents are cut into windows that do not
    overlap, and each window is an example of the interval.

    Source: for masked models Salazar et al. 2020.
    """
    reader, path = reader_of(asked, pool), asked.path
    texts = [read_text(path)]
    if path.suffix == ".jsonl":
        rows = read_objects(path)
        missing = [i for i, row in enumerate(rows, start=1) if not isinstance(row.get("text"), str)]
        if missing:
            raise UserError(f'{path}, object {missing[0]}: it has no "text"')
        texts = [row["text"] for row in rows]
    spans = [span for text in texts for span in reader.spans(text)]
    if not spans:
        raise UserError(f"{path} has no text of two tokens")
    once = np.ones(len(spans))

    def measure(candidate: Candidate) -> Scored:
        found = reader.likelihoods(candidate, spans)
        value = perplexity_of(found, once)
        if np.isnan(value):
            raise UserError(f"the perplexity of {candidate.name} is NaN: leave that model out")
        return Scored(value, found)

    key, learning = _key("perplexity", reader, path), partial(_learning, reader, spans)
    return Scorer(measure, "min", "perplexity", key, perplexity_of, len(spans), learning)


def _learning(reader: Reader, spans: Sequence[Span], batch_size: int | None) -> Learning:
    """Windows in an order that depends on the epoch alone, and the cross-entropy of their tokens."""
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415

    from soups.descent import next_token, shuffled  # noqa: PLC0415

    if reader.masked:
        raise UserError("learned takes causal language models by --perplexity; for a masked one write --loss")
    module = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(reader.source)).float().to(device())
    order = shuffled(torch.arange(len(spans)), torch.arange(len(spans)), batch_size or reader.batch_size, "windows")

    def batches(epoch: int) -> Iterator[dict[str, Tensor]]:
        for rows, _ in order(epoch):
            windows = [spans[row].tokens for row in rows.tolist()]
            yield {"input_ids": _padded(windows), "attention_mask": _padded([(1,) * len(each) for each in windows])}

    return Learning(module, batches, next_token)


def read_questions(path: Path) -> list[tuple[str, list[str], int]]:
    """A prompt, its choices and the number of the right one, for each line.

    Lines are as {"prompt": "The sky is", "choices": ["blue", "green"], "answer": 0}; `question` may stand for `prompt`,
    and the answer may be the right choice itself.
    """
    found = []
    for number, row in enumerate(read_objects(path), start=1):
        prompt: Any = row.get("prompt", row.get("question"))
        choices: Any = row.get("choices")
        answer: Any = row.get("answer")
        good = isinstance(prompt, str) and isinstance(choices, list) and len(choices) > 1
        good = good and all(isinstance(choice, str) and choice.strip() for choice in choices)
        if good and isinstance(answer, str) and answer in choices:
            answer = choices.index(answer)
        if not (good and isinstance(answer, int) and 0 <= answer < len(choices)):
            raise UserError(
                f'{path}, object {number}: need {{"prompt": "The sky is", "choices": ["blue", "green"], "answer": 0}}'
            )
        found.append((prompt, choices, answer))
    return found


def of_choices(asked: HeldOut, pool: Pool) -> Scorer:
    """The share of questions whose right choice is the most likely text behind the prompt."""
    reader, questions = reader_of(asked, pool), read_questions(asked.path)
    if not reader.tokenizer.is_fast:
        raise UserError(f"{reader.source}: its tokenizer does not say where tokens stand; a tokenizer.json is needed")
    spans = [reader.answer(prompt, choice) for prompt, choices, _ in questions for choice in choices]
    ends = np.cumsum([len(choices) for _, choices, _ in questions])[:-1]

    def measure(candidate: Candidate) -> Scored:
        found = reader.likelihoods(candidate, spans)
        values = found[:, 0] / found[:, 1] if asked.per_token else found[:, 0]
        if np.isnan(values).any():
            raise UserError(f"a likelihood of {candidate.name} is NaN: leave that model out")
        each = zip(np.split(values, ends), questions, strict=True)
        answers = np.array([int(mine.argmax()) == answer for mine, (_, _, answer) in each])
        return Scored(float(answers.mean()), answers)

    key = _key("choices", reader, asked.path, asked.per_token)
    return Scorer(measure, "max", "accuracy", key, mean_of_answers, len(questions))
