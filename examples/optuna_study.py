"""Optuna's trials become one soup:  python examples/optuna_study.py FOLDER"""

import sys

import optuna
import torch
from sklearn.linear_model import SGDClassifier

import soups

out, chance = sys.argv[1], torch.Generator().manual_seed(0)
inputs = torch.randn(900, 20, generator=chance)  # made up, as the model is: yours fine-tunes a network
labels = (inputs[:, :3] + torch.randn(900, 3, generator=chance)).argmax(1)


def accuracy(weights, rows=slice(300, 600)):
    return ((inputs[rows] @ weights["w"].T).argmax(1) == labels[rows]).double().mean().item()


def objective(trial):
    lr = trial.suggest_float("lr", 0.001, 0.1, log=True)
    model = SGDClassifier(learning_rate="constant", eta0=lr, random_state=trial.number)
    weights = {"w": torch.from_numpy(model.fit(inputs[:300], labels[:300]).coef_).float()}
    torch.save(weights, f"{out}/trial{trial.number}.pt")
    return accuracy(weights)


study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0))
study.optimize(objective, n_trials=6)
known = {f"trial{trial.number}.pt": trial.value for trial in study.trials}  # which are not computed again
on_others = {"report": lambda weights: accuracy(weights, slice(600, 900))}
soup = soups.greedy(f"{out}/trial*.pt", accuracy, "max", scores=known, **on_others)
print(soup, soup.save(f"{out}/soup.pt"), sep="\n")
