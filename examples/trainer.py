"""Three fine-tunings by transformers' Trainer become one soup:  python examples/trainer.py FOLDER"""

import sys

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import soups

torch.manual_seed(0)
out, tokens = sys.argv[1], torch.randint(20, (1400, 8))  # made up: yours are a data set and a pretrained network
labels = ((tokens < 2).any(dim=1).float() + 0.3 * torch.randn(1400) > 0.5).long().tolist()
rows = [{"input_ids": row, "labels": label} for row, label in zip(tokens, labels, strict=True)]
size = {"vocab_size": 20, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def tuned(network, name, **settings):
    how = TrainingArguments(f"{out}/{name}", save_strategy="no", report_to=[], disable_tqdm=True, **settings)
    trainer = Trainer(network, how, train_dataset=rows[:400])
    trainer.train()
    trainer.save_model()
    return trainer


def right(weights, examples=rows[400:900]):
    trainer.model.load_state_dict(dict(weights))
    found = trainer.predict(examples)
    return found.predictions.argmax(axis=1) == found.label_ids  # of each example: the gain has an interval


trainer = tuned(BertForSequenceClassification(BertConfig(**size)), "start", learning_rate=5e-3, num_train_epochs=8)
for i in range(3):
    tuned(BertForSequenceClassification.from_pretrained(f"{out}/start"), f"run{i}", learning_rate=1e-3, seed=i)
soup = soups.greedy(f"{out}/run*", right, "max", report=lambda weights: right(weights, rows[900:]))
print(soup, soup.save(f"{out}/soup"), sep="\n")
