"""Texts become token ids that keep what matters, and batches that are padded little."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from models.tokens import Tokenizer, TokenSplit, alike_in_length, longest_first
from tasks.texts import pieces_of
from tests.readers import SPECIAL, tokenizer

WORDS = tokenizer(SPECIAL)
PIECES = pieces_of("premise: {a} | hypothesis: {b}")


def encoded(max_length, *row):
    words = Tokenizer(WORDS, max_length, (WORDS.cls_token_id,), (WORDS.sep_token_id,))
    (ids,) = words.encode(PIECES, ["a", "b"], [row])
    return WORDS.convert_ids_to_tokens(ids.tolist())


def test_a_text_is_its_template_with_its_fields_between_what_the_network_wants():
    tokens = encoded(64, "the film", "good")
    assert " ".join(tokens) == "[CLS] premise : the film | hypothesis : good [SEP]"


def test_the_longest_field_is_shortened_and_the_others_are_whole():
    tokens = encoded(12, "good good good good good good", "bad film")
    assert " ".join(tokens) == "[CLS] premise : good good good | hypothesis : bad film [SEP]"
    assert len(tokens) == 12
    tokens = encoded(12, "bad film", "good good good good good good")
    assert " ".join(tokens) == "[CLS] premise : bad film | hypothesis : good good good [SEP]"


@pytest.mark.parametrize("template", ["{a} again: {a}", "{a} : {b} : {a}", "{a} {a} {a} {b}"])
def test_a_column_that_a_template_names_twice_counts_twice(template):
    words = Tokenizer(WORDS, 16, (WORDS.cls_token_id,), (WORDS.sep_token_id,))
    (ids,) = words.encode(pieces_of(template), ["a", "b"], [["good " * 50, "bad"]])
    assert 14 <= len(ids) <= 16
    (short,) = words.encode(pieces_of(template), ["a", "b"], [["good", "bad"]])
    assert WORDS.convert_ids_to_tokens(short.tolist()).count("good") == template.count("{a}")
    with pytest.raises(UserError, match=r"model\.max_length=3 leaves no room"):
        Tokenizer(WORDS, 3, (1,), (2,)).encode(pieces_of("{a} {a}"), ["a"], [["good"]])


@pytest.mark.parametrize("template", ["{}", "{a!r}", "{a:>3}", "{a"])
def test_a_template_whose_braces_hold_no_plain_name_is_refused(template):
    with pytest.raises(UserError, match=r"task\.template"):
        pieces_of(template)


def split_of(lengths):
    ids = tuple(torch.full((length,), 5) for length in lengths)
    return TokenSplit(ids, torch.zeros(len(ids), dtype=torch.long), 0, "")


def test_a_batch_is_as_wide_as_its_longest_text():
    batch = split_of([2, 4, 1]).batch(torch.tensor([2, 0]))
    assert batch.tolist() == [[5, 0], [5, 5]]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=90), st.integers(1, 8), st.integers(1, 5), st.integers(0, 9))
def test_batches_of_like_length_hold_every_text_once_and_leave_the_rest_at_the_end(lengths, batch, window, seed):
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
    found = alike_in_length(order, torch.tensor(lengths), batch, window, torch.Generator().manual_seed(seed))
    whole = len(lengths) // batch * batch
    assert sorted(found.tolist()) == list(range(len(lengths)))
    assert found[whole:].tolist() == order[whole:].tolist()


def test_within_a_window_batches_do_not_overlap_in_length_and_come_in_another_order_for_another_seed():
    lengths = torch.arange(40)
    orders = [
        alike_in_length(torch.randperm(40), lengths, 4, 10, torch.Generator().manual_seed(seed)) for seed in (0, 1)
    ]
    spans = sorted((int(part.min()), int(part.max())) for part in lengths[orders[0]].split(4))
    assert spans == [(start, start + 3) for start in range(0, 40, 4)]
    assert orders[0].tolist() != orders[1].tolist()
    assert orders[0].tolist() != longest_first(lengths).tolist()  # batches are shuffled, not sorted
