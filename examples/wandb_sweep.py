"""The runs of a sweep of W&B become one soup:  python examples/wandb_sweep.py FOLDER [ENTITY/PROJECT/SWEEP]

Without a sweep, as offline, its runs are started in a loop.
"""

import sys

import torch
import wandb
from sklearn.linear_model import SGDClassifier

import soups

out, chance = sys.argv[1], torch.Generator().manual_seed(0)
inputs = torch.randn(900, 20, generator=chance)  # made up, as the model is: yours fine-tunes a network
labels = (inputs[:, :3] + torch.randn(900, 3, generator=chance)).argmax(1)


def right(weights, rows=slice(300, 600)):  # of each example: the gain has an interval
    return (inputs[rows] @ weights["w"].T).argmax(1) == labels[rows]


def train(lr=0.01):
    with wandb.init(project="soups", config={"lr": lr}) as run:  # an agent sets the sweep's lr
        model = SGDClassifier(learning_rate="constant", eta0=run.config.lr).fit(inputs[:300], labels[:300])
        weights = {"w": torch.from_numpy(model.coef_).float()}
        torch.save(weights, f"{out}/{run.id}.pt")
        run.summary["held_out"] = right(weights).double().mean().item()


wandb.agent(sys.argv[2], train, count=6) if sys.argv[2:] else list(map(train, (0.003, 0.01, 0.02, 0.03, 0.1)))
soup = soups.greedy(f"{out}/*.pt", right, "max", report=lambda weights: right(weights, slice(600, 900)))
with wandb.init(project="soups", job_type="soup", config=soup.record) as run:
    run.summary.update({"held_out": soup.score, "test": soup.report.score, "test_gain": soup.report.gain.mean})
print(soup, soup.save(f"{out}/soup.safetensors"), sep="\n")
