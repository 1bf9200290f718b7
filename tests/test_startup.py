"""What is imported before there is work to do: --help, mistyped settings and login nodes would wait for it."""

import subprocess
import sys

import pytest

from configs.schema import CONFIGS

NETWORKS = {"timm", "open_clip", "transformers"}


def imported(module, names):
    """Those of some packages that importing a module brings in."""
    code = f"import {module}, sys; print(*({names!r} & sys.modules.keys()))"
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=CONFIGS.parent, capture_output=True, text=True, check=True
    )
    return set(answer.stdout.split())


@pytest.mark.parametrize("stage", ["finetune", "eval", "soups", "analysis"])
def test_a_stage_loads_torch_after_its_settings_are_read(stage):
    assert imported(f"{stage}.__main__", {"torch", *NETWORKS}) == set()


@pytest.mark.parametrize("module", ["slurm.status", "slurm.plan", "analysis.commands", "soups.cook", "reproduce"])
def test_what_builds_no_network_does_without_their_libraries(module):
    assert imported(module, NETWORKS) == set()


def test_images_do_without_the_classes_of_language_models():
    assert imported("models.classifier", {"transformers.modeling_utils", "sklearn"}) == set()
