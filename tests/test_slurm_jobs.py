"""The plan of an experiment's jobs: what is left, what waits for what, and nothing written or asked of SLURM."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from configs.errors import UserError
from configs.schema import Paths, load
from configs.slurm import State
from finetune.length import refuse_unequal_shares
from slurm.cost import Costs, Stage
from slurm.jobs import ROWS, TRAINING, Shape, jobs_of, sbatch_words
from slurm.plan import paper_experiments
from slurm.status import failures, output_of, show
from slurm.submit import Sent, active, cut, planned, reproduce, sent_states
from soups.files.atomic import write_json, write_jsonl
from store.rows import identity, row_config
from store.runs import RunFolder
from tests.experiments import EXPERIMENTS, loaded


def plan(experiment, *typed):
    """The jobs of an experiment of which nothing is done, but for what is in the paths.runs that is typed."""
    runs = [] if any(word.startswith("paths.runs=") for word in typed) else ["paths.runs=new"]
    return jobs_of(load(experiment, *typed, *runs), [f"experiment={experiment}", *typed])


def finished(config, rows):
    """done.json of rows, as training writes it."""
    for row in rows:
        done = {"identity": identity(config, row), "row": row, "status": "done", "digest": f"d{row}", "drawn": {}}
        folder = RunFolder.of(config).ingredient(row)
        folder.mkdir(parents=True)
        write_json(folder / "done.json", done | {"held_out": {"correct": 1, "n": 2}, "seconds": 60.0})


def test_table_3_is_72_models_then_their_evaluation_recipes_and_tables(tmp_path):
    jobs = plan("table3_clip_b32", "cluster=slurm_8gpu", f"paths.runs={tmp_path / 'runs'}")
    stages = {"initialise": 1, "fine-tune": 71, "evaluate": 8, "recipes": 12, "evaluate soups": 8, "figures": 3}
    assert {job.stage: len(job.tasks) for job in jobs} == stages | {"analysis": 0}  # figures 4, B.1 and D.1
    assert jobs[1].script == "finetune_multi" and "--gres=gpu:8" in jobs[1].options
    scripts = [job.script for job in jobs if job.stage != "fine-tune"]
    assert scripts == ["finetune", "evaluate", "soups", "evaluate", "figures", "analysis"]
    assert "--gres=gpu:1" in jobs[5].options
    assert not any("gres" in option for option in jobs[-1].options)
    assert list(tmp_path.iterdir()) == []


def assert_shared(config, jobs, name):
    """Each row has a job, which gives as many pairs of a batch to each process, and several to a sharded network."""
    rows = sorted(row for job in jobs for row in job.tasks)
    assert rows == sorted(list(range(1, config.sweep.size + 1)) * len({job.name for job in jobs})), name
    for job in jobs if config.sweep.imported is None else ():
        for row in job.tasks[:: max(1, len(job.tasks) // 3)]:
            assert_can_train(row_config(config, row), job)


def assert_can_train(row, job):
    processes = job.shape.processes
    refuse_unequal_shares(row.optim, processes)
    assert (processes > 1) == (job.script == "finetune_multi")
    assert processes > 1 or row.compute.strategy != "fsdp"
    assert (f"--gres=gpu:{job.shape.gpus}" if job.shape.gpus else "--gres=none") in job.options
    if processes > 1:
        words = sbatch_words(job, {})
        assert f"--nodes={job.shape.nodes}" in words
        assert f"--export=ALL,MODEL_SOUPS_PROCESSES={processes // job.shape.nodes}" in words


@pytest.mark.slow  # since it composes every experiment
def test_every_row_of_every_experiment_gets_a_job_that_can_train_it():
    clusters = {name: load("demo", f"cluster={name}").cluster for name in ("slurm_cpu", "slurm_1gpu", "slurm_8gpu")}
    refused, on_gpus = set(), set(paper_experiments())  # which tests/test_costs.py plans on GPUs
    for name in (each for each in EXPERIMENTS if not loaded(each).parts and not loaded(each).towers):
        for cluster in clusters if name not in on_gpus else ("slurm_cpu",):
            config = replace(loaded(name), cluster=clusters[cluster], paths=Paths(runs=Path("new")))
            try:
                jobs = [job for job in jobs_of(config, [f"experiment={name}"]) if job.stage in TRAINING]
            except UserError as error:
                assert "cluster.slurm.sharded_gpus=0" in str(error)
                refused.add((name, cluster))
            else:
                assert_shared(config, jobs, name)
    # Without GPUs, networks that are sharded over several are refused when they are planned.
    assert refused == {("table4_vitg", "slurm_cpu"), ("tablec1_basic", "slurm_cpu")}


def test_rows_whose_batches_are_shared_by_different_numbers_of_gpus_are_arrays_of_their_own():
    jobs = [job for job in plan("tablej1_t5_small_rte", "cluster=slurm_8gpu") if job.stage == "fine-tune"]
    config = loaded("tablej1_t5_small_rte")
    found = {job.shape.gpus: {row_config(config, row).optim.batch_size for row in job.tasks} for job in jobs}
    assert found[4] == {8} and min(found[8]) == 16
    assert sum(job.at_once for job in jobs) <= 4
    assert sum(len(job.tasks) for job in jobs) == jobs[0].of == jobs[1].of == config.sweep.size


@pytest.mark.parametrize(
    ("experiment", "typed", "shape"),
    [
        # A row of several nodes gets as many processes on each as can share its batch.
        ("figuref1_lr", "cluster=slurm_8gpu cluster.slurm.nodes=2 optim.batch_size=24", Shape(2, 6)),
        # Without GPUs several processes could not train a network whose batch norms are not frozen.
        ("demo_tiny", "cluster=slurm_test cluster.slurm.nodes=2 model.frozen_batch_norm=true", Shape(2, 0)),
        ("demo_tiny", "cluster=slurm_test cluster.slurm.nodes=2 model.frozen_batch_norm=false", Shape(1, 0)),
    ],
)
def test_a_row_gets_the_processes_that_can_share_it(experiment, typed, shape):
    assert {job.shape for job in plan(experiment, *typed.split()) if job.stage == "fine-tune"} == {shape}


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["cluster=slurm_1gpu", "compute.strategy=fsdp", "cluster.slurm.sharded_gpus=1"], "type cluster.slurm.sharded"),
        (["cluster=slurm_test", "compute.strategy=fsdp"], "type cluster.slurm.sharded_gpus=8"),
        (["cluster=slurm_test", "optim.batch_size=4000"], r"4000 is more than the \d+ training images"),
    ],
)
def test_what_a_job_would_refuse_is_refused_when_it_is_planned(typed, message):
    with pytest.raises(UserError, match=message):
        planned(load("demo_tiny", *typed, "paths.runs=new"), ["experiment=demo_tiny", *typed])


def test_a_job_asks_for_the_time_that_it_is_expected_to_take_and_no_more_than_the_limit(monkeypatch):
    config = load("demo", "cluster=slurm_8gpu", "paths.runs=new", "sweep.rows=2", "recipes=[best,greedy]")
    stages = {"fine-tune": (8.0, 80.0), "evaluate": (1.0, 0.5, 0.5, 0.5), "recipes": (0.1, 1.0)}
    stages |= {"evaluate soups": (0.1, 0.1), "initialise": (0.2,)}
    parts = tuple(Stage(name, jobs, 1, "", 0) for name, jobs in stages.items())
    found = Costs(2, 1, 1.0, parts, 1)
    times = {job.stage: option_of(job, "time") for job in jobs_of(config, ["experiment=demo"], found)}
    assert times["initialise"] == "12:00:00"  # all that a row may have
    assert times["fine-tune"] == "12:00:00"  # 80 GPU-hours on 8, twice, and a start, are more than the limit
    assert times["recipes"] == "02:15:00"  # twice an hour, and a quarter to start
    assert times["evaluate"] == "02:15:00"  # the longest share: the first model, which decodes all images
    assert times["evaluate soups"] == "01:00:00"  # minutes, but estimates are not so sure
    assert times["figures"] == times["analysis"] == "04:00:00"  # not known
    short = replace(config.cluster, restarts=0, slurm=replace(config.cluster.slurm, time="09:00:00"))
    with pytest.raises(UserError, match=r"fine-tune takes about 10 hours, more than 09:00:00 and cluster\.restarts=0"):
        jobs_of(replace(config, cluster=short), ["experiment=demo"], found)


def option_of(job, name):
    return next(option.partition("=")[2] for option in job.options if option.startswith(f"--{name}="))


def test_one_row_or_recipe_that_fails_stops_what_needs_it_and_nothing_else():
    jobs = {job.stage: job for job in plan("tablel1_distill", "cluster=slurm_1gpu")}
    after = {stage: {each.stage: each.how for each in job.after} for stage, job in jobs.items()}
    assert after["evaluate"]["fine-tune"] == "afterany"  # the other rows are evaluated
    assert after["recipes"]["fine-tune"] == "afterok"  # which need the whole pool
    assert after["evaluate soups"] == {**dict.fromkeys(ROWS, "afterok"), "recipes": "afterany"}
    assert after["figures"]["recipes"] == "afterany" and after["figures"]["distil"] == "afterok"
    assert set(after["analysis"].values()) == {"afterok"} and "figures" not in after["analysis"]
    # Students wait for their own teachers only.
    (taught,) = [each for each in jobs["distil"].after if each.stage == "fine-tune"]
    config = loaded("tablel1_distill")
    teachers = {row for task in jobs["distil"].tasks for row in row_config(config, task).regularizer.distill.rows}
    assert set(taught.tasks) == teachers < set(jobs["fine-tune"].tasks)
    assert set(jobs["distil"].tasks).isdisjoint(jobs["fine-tune"].tasks)


def test_a_figure_of_other_experiments_models_waits_for_their_rows_and_trains_nothing():
    (job,) = plan("figuree1_soups", "cluster=slurm_1gpu")
    assert (job.stage, job.tasks) == ("figures", (0,)) and "artefact=forward" in job.settings
    data = ("cifar10", "dtd", "food101", "sun397", "cars", "imagenet")
    assert {(each.name, each.how) for each in job.after} == {(f"figuree1_{name}", "afterok") for name in data}


def test_rows_that_take_settings_or_heads_of_other_experiments_wait_for_them():
    job = next(job for job in plan("figureg4_in22k", "cluster=slurm_1gpu") if job.stage == "fine-tune")
    assert {(each.name, each.stage) for each in job.after if each.name} == {("figureg3_in22k", s) for s in ROWS}
    jobs = plan("figuref1_lr", "cluster=slurm_1gpu", "model.head_of=probes")
    job = next(job for job in jobs if job.stage in TRAINING)
    assert [each.stage for each in job.after if each.name == "probes"] == ["initialise"]


def test_arrays_that_are_longer_than_slurm_takes_are_cut_into_several():
    jobs = plan("demo", "cluster=slurm_1gpu", "sweep.rows=25")
    parts = [job for job in cut(jobs, 10) if job.stage == "fine-tune"]
    assert [(job.first, job.array) for job in parts] == [(0, "1-9"), (10, "0-9"), (20, "0-5")]
    assert [task for job in parts for task in job.tasks] == list(range(1, 26))
    assert sum(job.at_once for job in parts) <= 16
    calls = [sbatch_words(job, {}) for job in parts]
    assert ["--export=ALL,MODEL_SOUPS_FIRST=10" in call for call in calls] == [False, True, False]
    sent = Sent("7", "demo", "fine-tune", parts[1].tasks[:2], 25, 0.0, "", parts[1].first)
    assert sent.ids == {"7_0": 10, "7_1": 11}
    assert cut(jobs, 10**6) == jobs


def test_the_dry_run_prints_jobs_and_lines_and_needs_neither_disk_nor_slurm(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "160")
    typed = ["experiment=demo", "cluster=slurm_8gpu", f"paths.runs={tmp_path / 'runs'}"]
    config = load("demo", *typed[1:])
    reproduce([(config, typed)])
    printed = capsys.readouterr().out
    assert printed.count("sbatch --parsable") == 7
    assert f"--array=1-{config.sweep.size}%4" in printed and "GPU-hours expected on h100" in printed
    assert "will be written, and the disk of" in printed and "Nothing was sent" in printed
    assert not (tmp_path / "runs").exists()
    with pytest.raises(UserError, match="without submit=true it only prints"):
        reproduce([(replace(config, submit=True), typed)])
    monkeypatch.setattr("slurm.submit.free_space", lambda folder: (folder, 1000))
    with pytest.raises(UserError, match=r"too little space: about [0-9.]+ [MG]B will be written, .*check_space=false"):
        reproduce([(replace(config, submit=True), typed)])


def test_only_rows_without_their_end_are_left_and_later_stages_wait_for_what_is_sent(tmp_path):
    typed = ("cluster=slurm_1gpu", "sweep.rows=6", f"paths.runs={tmp_path}")
    config = load("demo", *typed)
    finished(config, [0, 1, 2, 4])
    jobs = plan("demo", *typed)
    assert [job.stage for job in jobs][:2] == ["fine-tune", "evaluate"]
    assert jobs[0].tasks == (3, 5, 6)
    words = sbatch_words(jobs[0], {})
    assert "--array=3,5-6%16" in words
    assert not any("dependency" in word for word in words)
    later = sbatch_words(jobs[1], {"afterok": ["17", "18_3"], "afterany": ["9"]})
    assert "--dependency=afterok:17:18_3,afterany:9" in later and "--kill-on-invalid-dep=yes" in later


def test_evaluation_is_left_for_the_shares_with_a_model_that_has_no_scores(tmp_path):
    typed = ("cluster=slurm_1gpu", "sweep.rows=3", "model.templates=null", f"paths.runs={tmp_path}")
    config = load("demo", *typed, "cluster.slurm.evaluate_jobs=2")
    finished(config, range(4))
    for row in (0, 2, 3):
        write_jsonl(RunFolder.of(config).ingredient(row) / "scores.jsonl", [{"weights": f"d{row}"}])
    evaluate = next(job for job in plan("demo", *typed, "cluster.slurm.evaluate_jobs=2") if job.stage == "evaluate")
    assert (evaluate.tasks, evaluate.of) == ((1,), 2)  # rows 1 and 3
    assert "share.of=2" in evaluate.settings


def test_replicates_are_planned_each_with_its_seed_and_one_table_at_the_end():
    jobs = plan("demo_seeds", "cluster=slurm_cpu")
    assert [job.name for job in jobs if job.stage == "fine-tune"] == [f"demo_seeds/seed{seed}" for seed in range(3)]
    second = next(job for job in jobs if job.name == "demo_seeds/seed1")
    assert {"sweep.seed=1", "name=demo_seeds/seed1", "replicates=[]"} <= set(second.settings)
    assert [job.name for job in jobs if job.stage == "analysis"] == ["demo_seeds"]


def test_settings_of_the_command_line_reach_the_jobs_but_for_those_that_say_what_it_does():
    jobs = plan("demo", "cluster=slurm_cpu", "submit=true", "optim.lr=0.001", "~sweep.draw.optim.lr")
    assert jobs[1].settings == ("experiment=demo", "cluster=slurm_cpu", "optim.lr=0.001", "~sweep.draw.optim.lr")


def test_a_cluster_file_asks_for_what_it_says():
    typed = ["cluster.slurm.partition=gpu", "cluster.slurm.account=lab", "cluster.slurm.gpu_type=h100"]
    typed += ["cluster=slurm_1gpu", 'cluster.slurm.options=["--exclude=n7"]']
    options = plan("demo", *typed)[1].options
    assert {"--partition=gpu", "--account=lab", "--gres=gpu:h100:1", "--exclude=n7", "--mem-per-cpu=5G"} <= set(options)
    with pytest.raises(UserError, match=r"cluster\.slurm\.time: should be hours:minutes:seconds"):
        load("demo", "cluster=slurm_1gpu", "cluster.slurm.time=8h")
    with pytest.raises(UserError, match="belong together"):
        load("demo", "cluster=slurm_1gpu", "cluster.kind=local")


def test_hours_are_those_of_what_is_left(tmp_path):
    typed = ("cluster=slurm_1gpu", "sweep.rows=4", f"paths.runs={tmp_path}")
    config = load("demo", *typed)
    whole = {job.stage: job.hours * job.count for job in planned(config, typed).jobs if job.hours is not None}
    finished(config, [0, 1])
    left = planned(config, typed)
    hours = {job.stage: job.hours * job.count for job in left.jobs if job.hours is not None}
    assert 0.6 * whole["fine-tune"] < hours["fine-tune"] < 0.9 * whole["fine-tune"]  # rows have epochs of their own
    assert "initialise" not in hours and left.hours == pytest.approx(sum(hours.values()))


def test_of_several_calls_the_latest_counts_and_what_waits_or_runs_has_not_failed(tmp_path):
    config = load("demo", "cluster=slurm_cpu", "sweep.rows=3", f"paths.runs={tmp_path}")
    jobs = plan("demo", "cluster=slurm_cpu", "sweep.rows=3", f"paths.runs={tmp_path}")
    sent = [Sent("10", "demo", "fine-tune", (1, 2, 3), 3, 0.0, ""), Sent("11", "demo", "fine-tune", (2,), 3, 1.0, "")]
    states = {"10_1": State("FAILED", "NonZeroExitCode"), "10_2": State("CANCELLED", "None")}
    states |= {"10_3": State("PENDING", "DependencyNeverSatisfied"), "11_2": State("RUNNING", "None")}
    assert active(sent, states) == {("demo", "fine-tune", 2): "11_2"}
    logs = RunFolder.of(config).root / "slurm/logs"
    logs.mkdir(parents=True)
    (logs / "demo-fine-tune-10_1.out").write_text("row 1: step 3\nerror: no space left\n\nsrun: error: node1: exit 2\n")
    found = {each.task: each for each in failures(config, jobs, sent, states)}
    assert set(found) == {1, 3}
    assert found[1].line == "demo: fine-tune 1 (job 10_1): FAILED, NonZeroExitCode: error: no space left"
    assert output_of(config, "10_3")[0] == "it printed nothing"


def test_the_status_of_rows_in_several_arrays_counts_all_of_them(capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    config = load("tablej1_t5_small_rte", "cluster=slurm_8gpu", "paths.runs=new")
    show(config, ["experiment=tablej1_t5_small_rte"])
    lines = {line.split()[1]: line.split()[-5:] for line in capsys.readouterr().out.splitlines() if "tablej1" in line}
    assert lines["fine-tune"] == ["0", "0", "0", "0", str(config.sweep.size)]
    show(load("figuree1_soups", "cluster=slurm_1gpu", "paths.runs=new"), ["experiment=figuree1_soups"])
    assert "figures" in capsys.readouterr().out


# A task that waited before it ran, one that runs, and an array that was cancelled before it began.
SACCT = r"10_1|OUT_OF_MEMORY|Dependency\n9_0|RUNNING|None\n11_[0,2-3]|CANCELLED by 0|Dependency"


def test_what_slurm_has_forgotten_is_told_by_its_accounts_or_by_the_job_s_own_output(tmp_path, monkeypatch):
    typed = ("cluster=slurm_cpu", "sweep.rows=3", f"paths.runs={tmp_path / 'runs'}")
    config = load("demo", *typed)
    sent = [Sent("10", "demo", "fine-tune", (1, 2, 3), 3, 0.0, ""), Sent("9", "demo", "initialise", (0,), 1, 0.0, "")]
    for name, says in {"squeue": "10_3|RUNNING|None", "sacct": SACCT}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\necho \"$@\" >> {tmp_path}/{name}.calls\nprintf '{says}\\n'\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    states = sent_states(sent)
    # 9_0 runs by the accounts and is not in the queue: it ended unseen.
    cancelled = {f"11_{task}": State("CANCELLED", "Dependency") for task in (0, 2, 3)}
    assert states == cancelled | {"10_3": State("RUNNING", "None"), "10_1": State("OUT_OF_MEMORY", "None")}
    assert len((tmp_path / "squeue.calls").read_text().splitlines()) == 1
    logs = RunFolder.of(config).root / "slurm/logs"
    logs.mkdir(parents=True)
    log = "row 2: step 7\nslurmstepd: error: *** JOB 12 ON n1 CANCELLED AT 2026-01-01T00:00:00 DUE TO TIME LIMIT ***\n"
    (logs / "demo-fine-tune-10_2.out").write_text(log)
    found = {(each.stage, each.task): each.why for each in failures(config, plan("demo", *typed), sent, states)}
    assert found == {
        ("initialise", 0): State("ENDED", "SLURM has forgotten why"),
        ("fine-tune", 1): State("OUT_OF_MEMORY", "None"),
        ("fine-tune", 2): State("TIMEOUT", "by its output"),
    }
