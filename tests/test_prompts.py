"""Language models answer prompts by what they were pretrained for, and with nothing else."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer, BertForMaskedLM, RobertaConfig, RobertaForMaskedLM, T5ForConditionalGeneration

from configs.data import lettered
from configs.errors import UserError
from models.classifier import architecture, pretrained_network
from models.hub import tokenizer_of
from models.prompts import question
from models.tokens import TokenSplit
from soups.average import Average
from soups.files.weights import load_weights, save_weights
from tests.readers import FOLDERS, SPECIAL, prompted_model, tokenizer

OPTIONS = ("negative", "not good", "positive")  # answers of unequal length
ANSWERS = lettered(OPTIONS)
TEXTS = ["the film is good", "the film was bad , not good .", "c"]
PIECES = [("sentence : ", "sentence")]
KINDS = ("masked_lm", "seq2seq_lm")
LIBRARY = {"masked_lm": BertForMaskedLM, "seq2seq_lm": T5ForConditionalGeneration}


@pytest.fixture(scope="module", params=KINDS)
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return prompted_model(request.param, FOLDERS[request.param](folder))


def tokens(model, texts=TEXTS, options=OPTIONS, order=()):
    words = tokenizer_of(model, lettered(options, order))
    ids = words.encode(PIECES, ["sentence"], [[text] for text in texts])
    return TokenSplit(ids, torch.zeros(len(texts), dtype=torch.long), words.pad, "")


def slowly(model, text, option):
    """The log-probability of one answer to one text, by the library's own network and nothing of ours."""
    words = AutoTokenizer.from_pretrained(model.weights)
    network = LIBRARY[model.kind].from_pretrained(model.weights).eval()
    prompt = f"sentence : {text} | options: A) negative B) not good C) positive | label:"
    option_text = {"negative": "A) negative", "not good": "B) not good", "positive": "C) positive"}[option]
    ids, answer = (words(part, add_special_tokens=False)["input_ids"] for part in (prompt, option_text))
    if model.kind == "seq2seq_lm":
        labels = torch.tensor([[*answer, words.eos_token_id]])
        output = network(input_ids=torch.tensor([[*ids, words.eos_token_id]]), labels=labels)
        return -output.loss.item() * labels.shape[1]
    longest = len(["B", ")", "not", "good"])
    answer += (longest - len(answer)) * [words.sep_token_id]
    row = [words.cls_token_id, *ids, *longest * [words.mask_token_id], words.sep_token_id]
    logits = network(input_ids=torch.tensor([row])).logits[0, -1 - longest : -1].log_softmax(dim=1)
    return sum(logits[place, token].item() for place, token in enumerate(answer))


def test_prompt_and_answers_are_those_of_the_paper():
    assert question(["B) negative", "A) positive"]) == " | options: A) positive B) negative | label:"


@torch.no_grad()
def test_an_order_of_options_changes_letters_and_not_which_logit_is_which_class(model):
    words = AutoTokenizer.from_pretrained(model.weights)
    prompt = words.decode(tokens(model, order=(2, 1, 0)).ids[0])
    assert prompt.index("positive") < prompt.index("not good") < prompt.index("negative")
    network = pretrained_network(model, OPTIONS, lettered(OPTIONS, (2, 1, 0)))
    for answer, option_text in zip(network.options, ("C) negative", "B) not good", "A) positive"), strict=True):
        ids = words(option_text, add_special_tokens=False)["input_ids"]
        assert answer[: len(ids)].tolist() == ids


def test_logits_are_the_log_probabilities_of_the_answers_computed_the_slow_way(model):
    network, split = pretrained_network(model, OPTIONS, ANSWERS).eval(), tokens(model)
    logits = network(split.batch(torch.arange(3)))  # padded together, which the slow way is not
    expected = torch.tensor([[slowly(model, text, option) for option in OPTIONS] for text in TEXTS])
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert logits.argmax(dim=1).tolist() == expected.argmax(dim=1).tolist()


def test_no_parameter_is_added_and_a_tied_one_stands_once(model):
    network = pretrained_network(model, OPTIONS, ANSWERS)
    library = LIBRARY[model.kind].from_pretrained(model.weights)
    assert sum(p.numel() for p in network.parameters()) == sum(p.numel() for p in library.parameters())
    assert {f"network.{name}" for name, _ in library.named_parameters()} == set(network.state_dict())
    several = {name for name, _ in library.named_parameters(remove_duplicate=False)}
    assert len(several) > len(network.state_dict())  # the library ties some


def test_one_step_moves_the_loss_towards_the_answer(model):
    network, split = pretrained_network(model, OPTIONS, ANSWERS).eval(), tokens(model)
    batch = split.batch(torch.arange(3))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    before = -network(batch)[:, 2].mean()
    before.backward()
    optimizer.step()
    assert -network(batch)[:, 2].mean() < before
    assert all(parameter.grad is not None for parameter in network.parameters())  # all that is souped is trained


def test_the_average_of_two_is_their_mean_exactly_once_and_stays_tied_when_saved_and_loaded_by_the_library(
    model, tmp_path
):
    other = replace(model, weights=FOLDERS[model.kind](tmp_path / "other", seed=1))
    two = [pretrained_network(each, OPTIONS, ANSWERS) for each in (model, other)]
    one, another = (network.state_dict() for network in two)
    mean = Average().plus(one).plus(another).weights()
    assert mean.keys() == one.keys()
    # In place, as a careless loop over all names would do it, tied weights would be averaged several times.
    for name, tensor in mean.items():
        assert torch.equal(tensor, ((one[name].double() + another[name].double()) / 2).float()), name
    save_weights(tmp_path / "soup.safetensors", mean)
    soup = architecture(model, 3, ANSWERS)
    soup.load_state_dict(load_weights(tmp_path / "soup.safetensors"), strict=True)
    soup.network.save_pretrained(tmp_path / "library")
    for library in (soup.network, LIBRARY[model.kind].from_pretrained(tmp_path / "library")):
        assert library.get_output_embeddings().weight is library.get_input_embeddings().weight
        for name, parameter in library.named_parameters():
            assert torch.equal(parameter, mean[f"network.{name}"]), name


def test_integer_buffers_are_neither_averaged_nor_lost(model):
    network = pretrained_network(model, OPTIONS, ANSWERS)
    network.network.register_buffer("position_ids", torch.arange(512))
    state = network.state_dict()
    mean = Average().plus(state).plus(state).weights()
    assert torch.equal(mean["network.position_ids"], torch.arange(512))
    assert mean["network.position_ids"].dtype == torch.int64


def test_what_looks_like_a_special_token_in_a_text_is_read_as_words(model):
    ids = tokens(model, ["the [PAD] film [MASK] is", "the film is"])
    special = set(AutoTokenizer.from_pretrained(model.weights).all_special_ids)
    words = [[token for token in row.tolist() if token in special] for row in ids.ids]
    unknown = AutoTokenizer.from_pretrained(model.weights).unk_token_id
    assert [token for token in words[0] if token != unknown] == [token for token in words[1] if token != unknown]
    assert ids.pad not in ids.ids[0].tolist()


def test_a_masked_language_model_that_is_no_bert_is_refused(tmp_path):
    small = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    RobertaForMaskedLM(RobertaConfig(**small)).save_pretrained(tmp_path)
    tokenizer(SPECIAL).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="takes BertForMaskedLM"):
        pretrained_network(prompted_model("masked_lm", tmp_path), OPTIONS, ANSWERS)


def test_a_model_that_is_nowhere_is_one_line_with_the_download(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # the variable was read long ago
    with pytest.raises(UserError, match=r"hf download small config\.json"):
        pretrained_network(replace(prompted_model("masked_lm", tmp_path), weights=None), OPTIONS, ANSWERS)
