"""The plan of an experiment's jobs: what is left, what waits for what, and nothing written or asked of SLURM."""

import subprocess
import sys
from pathlib import Path

import pytest

from configs.errors import UserError
from configs.schema import load
from finetune.rows import identity
from slurm.jobs import compact, jobs_of, sbatch_words, totals
from slurm.queue import Sent, State, active
from slurm.reproduce import hours_of
from slurm.status import failures, last_line
from store.atomic import write_json, write_jsonl
from store.runs import RunFolder

ROOT = Path(__file__).resolve().parents[1]


def plan(experiment, *typed):
    words = [f"experiment={experiment}", *typed]
    return jobs_of(load(experiment, *typed), words)


def finished(config, rows):
    """done.json of rows, as training writes it."""
    for row in rows:
        done = {"identity": identity(config, row), "row": row, "status": "done", "digest": f"d{row}", "drawn": {}}
        folder = RunFolder.of(config).ingredient(row)
        folder.mkdir(parents=True)
        write_json(folder / "done.json", done | {"held_out": {"correct": 1, "n": 2}, "seconds": 60.0})


def test_table_3_is_72_models_then_their_evaluation_recipes_and_tables(tmp_path):
    jobs = plan("table3_clip_b32", "cluster=slurm_8gpu", f"paths.runs={tmp_path / 'runs'}")
    assert [(job.stage, len(job.tasks)) for job in jobs] == [
        ("initialise", 1),
        ("fine-tune", 71),
        ("evaluate", 8),
        ("recipes", 11),
        ("evaluate soups", 8),
        ("analysis", 0),
    ]
    assert jobs[1].script == "finetune_multi" and "--gres=gpu:8" in jobs[1].options
    assert {job.script for job in jobs if job.stage != "fine-tune"} == {"finetune", "evaluate", "soups", "analysis"}
    assert "--gres=none" in jobs[-1].options
    assert list(tmp_path.iterdir()) == []


def test_the_dry_run_prints_jobs_and_lines_and_needs_neither_disk_nor_slurm(tmp_path):
    typed = ["experiment=table3_clip_b32", "cluster=slurm_8gpu", f"paths.runs={tmp_path / 'runs'}"]
    own = {"PATH": str(tmp_path), "COLUMNS": "160", "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "reproduce.py", *typed]
    done = subprocess.run(words, cwd=ROOT, env=own, capture_output=True, text=True, check=True)
    assert done.stdout.count("sbatch --parsable") == 6
    assert "--array=1-71%4" in done.stdout and "GPU-hours expected on h100" in done.stdout
    assert "Nothing was sent" in done.stdout
    assert not (tmp_path / "runs").exists()
    sent = subprocess.run([*words, "submit=true"], cwd=ROOT, env=own, capture_output=True, text=True, check=False)
    assert sent.returncode == 2
    assert sent.stderr.strip().endswith("without submit=true it only prints")


def test_only_rows_without_their_end_are_left_and_later_stages_wait_for_what_is_sent(tmp_path):
    typed = ("cluster=slurm_1gpu", "sweep.rows=6", f"paths.runs={tmp_path}")
    config = load("demo", *typed)
    finished(config, [0, 1, 2, 4])
    jobs = plan("demo", *typed)
    assert [job.stage for job in jobs][:2] == ["fine-tune", "evaluate"]
    assert jobs[0].tasks == (3, 5, 6)
    words = sbatch_words(config, jobs[0], [])
    assert "--array=3,5-6%16" in words
    assert not any("dependency" in word for word in words)
    later = sbatch_words(config, jobs[1], ["17", "18_3"])
    assert "--dependency=afterok:17:18_3" in later and "--kill-on-invalid-dep=yes" in later


def test_evaluation_is_left_for_the_shares_with_a_model_that_has_no_scores(tmp_path):
    typed = ("cluster=slurm_1gpu", "sweep.rows=3", "model.templates=null", f"paths.runs={tmp_path}")
    config = load("demo", *typed, "cluster.slurm.evaluate_jobs=2")
    finished(config, range(4))
    for row in (0, 2, 3):
        write_jsonl(RunFolder.of(config).ingredient(row) / "scores.jsonl", [{"weights": f"d{row}"}])
    evaluate = next(job for job in plan("demo", *typed, "cluster.slurm.evaluate_jobs=2") if job.stage == "evaluate")
    assert (evaluate.tasks, evaluate.of) == ((1,), 2)  # rows 1 and 3
    assert "share.of=2" in evaluate.settings


def test_rows_that_are_distilled_come_after_their_teachers():
    jobs = {job.stage: job for job in plan("tablel1_distill", "cluster=slurm_1gpu")}
    assert "fine-tune" in jobs["distil"].after
    assert set(jobs["distil"].tasks).isdisjoint(jobs["fine-tune"].tasks)
    assert len(jobs["distil"].tasks) + len(jobs["fine-tune"].tasks) == 14


def test_replicates_are_planned_each_with_its_seed_and_one_table_at_the_end():
    jobs = plan("demo_seeds", "cluster=slurm_cpu")
    assert [job.name for job in jobs if job.stage == "fine-tune"] == [
        "demo_seeds/seed0",
        "demo_seeds/seed1",
        "demo_seeds/seed2",
    ]
    second = next(job for job in jobs if job.name == "demo_seeds/seed1")
    assert {"sweep.seed=1", "name=demo_seeds/seed1", "replicates=[]"} <= set(second.settings)
    assert [job.name for job in jobs if job.stage == "analysis"] == ["demo_seeds"]


def test_settings_of_the_command_line_reach_the_jobs_but_for_those_that_say_what_it_does():
    jobs = plan("demo", "cluster=slurm_cpu", "submit=true", "optim.lr=0.001", "~sweep.draw.optim.lr")
    assert jobs[1].settings == ("experiment=demo", "cluster=slurm_cpu", "optim.lr=0.001", "~sweep.draw.optim.lr")


def test_a_row_of_other_settings_stops_the_plan(tmp_path):
    config = load("demo", "cluster=slurm_cpu", f"paths.runs={tmp_path}")
    finished(config, [0, 1])
    with pytest.raises(UserError, match="was made with other settings"):
        plan("demo", "cluster=slurm_cpu", f"paths.runs={tmp_path}", "optim.clip_norm=2.0")


def test_a_cluster_file_asks_for_what_it_says():
    typed = [
        "cluster=slurm_1gpu",
        "cluster.slurm.partition=gpu",
        "cluster.slurm.account=lab",
        "cluster.slurm.gpu_type=h100",
    ]
    options = plan("demo", *typed, 'cluster.slurm.options=["--exclude=n7"]')[1].options
    assert {"--partition=gpu", "--account=lab", "--gres=gpu:h100:1", "--exclude=n7", "--mem-per-cpu=5G"} <= set(options)
    with pytest.raises(UserError, match=r"cluster\.slurm\.time: String should match"):
        load("demo", "cluster=slurm_1gpu", "cluster.slurm.time=8h")
    with pytest.raises(UserError, match="belong together"):
        load("demo", "cluster=slurm_1gpu", "cluster.kind=local")


def test_totals_are_what_a_new_experiment_plans():
    config = load("table3_clip_b32", "cluster=slurm_1gpu")
    planned = {job.stage: max(1, len(job.tasks)) for job in plan("table3_clip_b32", "cluster=slurm_1gpu")}
    assert totals(config) == planned


def test_hours_are_those_of_what_is_left(tmp_path):
    counts = "task.counts={train: 1000, held_out: 30, test: 20, v2: 4, r: 4, sketch: 4, objectnet: 4, a: 4}"
    typed = ("cluster=slurm_1gpu", "sweep.rows=4", counts, f"paths.runs={tmp_path}")
    config = load("demo", *typed)
    whole = hours_of(config, plan("demo", *typed))
    finished(config, [0, 1])
    left = hours_of(config, plan("demo", *typed))
    assert left["fine-tune"] == pytest.approx(0.75 * whole["fine-tune"])
    assert "initialise" not in left


def test_of_several_calls_the_latest_counts_and_what_waits_or_runs_has_not_failed(tmp_path):
    config = load("demo", "cluster=slurm_cpu", "sweep.rows=3", f"paths.runs={tmp_path}")
    jobs = plan("demo", "cluster=slurm_cpu", "sweep.rows=3", f"paths.runs={tmp_path}")
    sent = [Sent("10", "demo", "fine-tune", (1, 2, 3), 3, 0.0, ""), Sent("11", "demo", "fine-tune", (2,), 3, 1.0, "")]
    states = {
        "10_1": State("FAILED", "NonZeroExitCode"),
        "10_2": State("CANCELLED", "None"),
        "10_3": State("PENDING", "DependencyNeverSatisfied"),
        "11_2": State("RUNNING", "None"),
    }
    assert active(sent, states) == {("demo", "fine-tune", 2): "11_2"}
    logs = RunFolder.of(config).root / "slurm/logs"
    logs.mkdir(parents=True)
    (logs / "demo-fine-tune-10_1.out").write_text("row 1: step 3\nerror: no space left\n\nsrun: error: node1: exit 2\n")
    found = {each.task: each for each in failures(config, jobs, sent, states)}
    assert set(found) == {1, 3}
    assert found[1].told == "demo: fine-tune 1 (job 10_1): FAILED, NonZeroExitCode: error: no space left"
    assert last_line(config, "10", 3) == "it printed nothing"


def test_indices_are_written_as_short_as_sbatch_takes_them():
    assert compact([]) == ""
    assert compact([71, 3, 4, 5]) == "3-5,71"
