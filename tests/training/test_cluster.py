"""The processes that a launcher started match the trainer block, or the run is refused."""

import os
import socket
from pathlib import Path

import pytest
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from runs import Listener, command, ended, rows
from typer.testing import CliRunner

from conftest import tiny_config
from nestcli.cli.app import app
from nestcli.errors import ConfigError
from nestcli.training.launcher import check_launch, cluster_plugins
from nestcli.training.run import Pretraining

TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "LOCAL_RANK": "1"}
SLURM = {"SLURM_JOB_NAME": "nest", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}
PREFIXES = ("SLURM_", "TORCHELASTIC", "OMPI_", "PMI_", "JSM_", "LSB_")
NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK")


def put(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name in list(os.environ):
        if name.startswith(PREFIXES) or name in NAMES:
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rank_zero_only, "rank", 0)


@pytest.mark.parametrize(
    ("processes", "nodes", "variables"),
    [
        (1, 1, {}),
        (4, 1, {}),  # started here
        (2, 1, {**TORCHRUN, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}),
        (8, 2, {**TORCHRUN, "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1"}),
        (1, 1, {"SLURM_JOB_NAME": "nest", "SLURM_NTASKS": "1"}),
        (4, 1, {"SLURM_JOB_NAME": "nest", "SLURM_NTASKS": "1", "SLURM_NNODES": "1"}),  # one task with four GPUs
        (1, 1, {"SLURM_JOB_NAME": "interactive", "SLURM_NTASKS": "4"}),  # salloc -n 4, and no srun
        (1, 1, {"SLURM_JOB_NAME": "bash", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PTY_PORT": "1"}),
        (8, 2, {**SLURM, "SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4", "SLURM_NNODES": "2"}),
        (2, 1, {"LOCAL_RANK": "1", "WORLD_SIZE": "2", "NODE_RANK": "0"}),  # a process that another one has started
        (2, 2, {"NODE_RANK": "1"}),  # by hand
        (1, 1, {"OMPI_COMM_WORLD_SIZE": "1"}),
        (1, 1, {"RANK": "0", "WORLD_SIZE": "1"}),
        (1, 1, {"WORLD_SIZE": "4"}),  # a variable that nobody reads
    ],
)
def test_as_many_processes_as_the_trainer_has_are_let_pass(
    processes: int, nodes: int, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(monkeypatch, **variables)
    check_launch(processes, nodes)


@pytest.mark.parametrize(
    ("processes", "nodes", "variables", "said"),
    [
        (1, 1, {**TORCHRUN, "WORLD_SIZE": "2"}, r"torchrun has started 2 .* 1 x 1 = 1\. Set trainer.devices=2"),
        (4, 1, {**TORCHRUN, "WORLD_SIZE": "2"}, "torchrun has started 2 processes; .* 4 x 1 = 4"),
        (2, 1, {**TORCHRUN, "WORLD_SIZE": "1"}, "torchrun has started 1 process;"),
        (8, 2, {**TORCHRUN, "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "2"}, "trainer.devices=2 trainer.num_nodes=4"),
        (4, 4, {**TORCHRUN, "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}, "Set trainer.devices=4"),
        (1, 1, {**TORCHRUN, "WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        (1, 1, TORCHRUN, "WORLD_SIZE is ''"),
        (2, 2, {"NODE_RANK": "one"}, "NODE_RANK is 'one'"),
        (4, 2, {"LOCAL_RANK": "1", "WORLD_SIZE": "4", "RANK": "3"}, "RANK=3 is not the rank 1 .*Set NODE_RANK"),
        (1, 1, {**SLURM, "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}, "Slurm has started 2 .*gpus-per-node"),
        (4, 1, {**SLURM, "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}, "Slurm has started 2 .* 4 x 1 = 4"),
        (2, 1, {**SLURM, "SLURM_NTASKS": "2"}, "--ntasks-per-node"),
        (1, 1, {"SLURM_JOB_NAME": "bash", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"}, "srun --job-name=nest"),
        (1, 1, {"OMPI_COMM_WORLD_SIZE": "3"}, "mpirun has started 3 processes"),
        (1, 1, {"LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "has started 2 processes"),
        (2, 2, {"RANK": "1", "WORLD_SIZE": "2"}, r"--node-rank \$RANK"),
        (2, 2, {}, "the run was not started on the other machines"),
        (
            1, 1,
            {"LSB_JOBID": "1", "LSB_DJOB_RANKFILE": "x", "JSM_NAMESPACE_LOCAL_RANK": "0", "JSM_NAMESPACE_SIZE": "6"},
            "jsrun has started 6",
        ),
    ],
)  # fmt: skip
def test_more_or_fewer_are_refused_with_the_remedy(
    processes: int, nodes: int, variables: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(monkeypatch, **variables)
    with pytest.raises(ConfigError, match=said):
        check_launch(processes, nodes)


def test_a_run_asks_before_it_touches_its_folder(
    corpus: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(monkeypatch, **TORCHRUN, WORLD_SIZE="2")
    with pytest.raises(ConfigError, match="torchrun has started 2"):
        Pretraining(tiny_config(corpus, f"exp_manager.exp_dir={tmp_path}"), Listener())
    assert not list(tmp_path.iterdir())


def test_a_job_of_one_task_starts_its_own_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, SLURM_JOB_NAME="nest", SLURM_NTASKS="1")
    assert [type(plugin) for plugin in cluster_plugins()] == [LightningEnvironment]
    put(monkeypatch, **SLURM, SLURM_NTASKS="2", SLURM_NTASKS_PER_NODE="2")
    assert [type(plugin) for plugin in cluster_plugins()] == [SLURMEnvironment]
    put(monkeypatch)
    assert cluster_plugins() == []


@pytest.mark.parametrize(
    ("processes", "nodes", "variables", "rank"),
    [
        (1, 1, {"RANK": "1"}, 0),  # what another program left
        (1, 1, {"RANK": "1", "WORLD_SIZE": "1"}, 0),
        (1, 1, {"LOCAL_RANK": "1"}, 0),
        (1, 1, {"NODE_RANK": "1", "GROUP_RANK": "1"}, 0),
        (1, 1, {"SLURM_PROCID": "3"}, 0),
        (2, 1, {"RANK": "0", "WORLD_SIZE": "1"}, 0),  # the processes that it starts inherit no RANK
        (2, 1, {"LOCAL_RANK": "1"}, 1),  # two processes by hand
        (2, 2, {"NODE_RANK": "1"}, 1),
        (4, 2, {"NODE_RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}, 3),
        (4, 2, {"GROUP_RANK": "1"}, 2),
        (8, 2, {**TORCHRUN, "RANK": "5", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, 5),
        (8, 2, {**SLURM, "SLURM_PROCID": "6", "SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4", "RANK": "0"}, 6),
    ],
)
def test_a_process_knows_its_place_before_it_touches_the_folder(
    processes: int, nodes: int, variables: dict[str, str], rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(monkeypatch, **variables)
    check_launch(processes, nodes)
    assert rank_zero_only.rank == rank
    if rank == 0:
        assert not {*NAMES, "SLURM_PROCID"} & os.environ.keys() - {"WORLD_SIZE"}


def test_a_place_that_is_no_number_is_told_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, RANK="one")
    result = CliRunner().invoke(app, ["extract", "a.wav", "--checkpoint", "a.nemo", "--out", "out"])
    assert isinstance(result.exception, ConfigError)
    assert "RANK is 'one', but must be the rank of a process" in str(result.exception)


def test_a_rank_that_was_left_over_does_not_silence_a_run(corpus: dict[str, Path], tmp_path: Path) -> None:
    run = command(corpus, tmp_path, "trainer.max_steps=1", RANK="1")
    told = ended(run)
    assert run.returncode == 0, told
    assert "trained to step 1" in told
    assert (tmp_path / "run" / "config.yaml").is_file()


@pytest.mark.slow
def test_machines_that_are_started_by_hand_share_the_folder(corpus: dict[str, Path], tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    words = ("trainer.max_steps=1", "trainer.num_nodes=2")
    runs = [command(corpus, tmp_path, *words, NODE_RANK=str(node), **place) for node in (0, 1)]
    told = [ended(run) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], told
    assert [row["step"] for row in rows(tmp_path)] == [1]
