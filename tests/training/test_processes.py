"""Which rank a process is, from the variables that launchers set."""

from __future__ import annotations

import pytest

from mllm.training.processes import first_host, place, tasks_per_node

SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_NTASKS": "10",
    "SLURM_STEP_NUM_TASKS": "10",
    "SLURM_STEP_NODELIST": "gpu[07-09,12],login",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),2",
}
"""As srun sets them for the last task of ten on three nodes (Slurm 22.05)."""


def test_srun_says_who_a_process_is() -> None:
    environment = dict(SLURM)
    assert place(environment) == 9
    assert (environment["RANK"], environment["WORLD_SIZE"]) == ("9", "10")
    assert (environment["LOCAL_RANK"], environment["LOCAL_WORLD_SIZE"]) == ("1", "2")
    assert environment["LOCAL_SIZE"] == "2"
    assert environment["MASTER_ADDR"] == "gpu07"
    others = dict(SLURM) | {"SLURM_PROCID": "0", "SLURM_NODEID": "0"}
    place(others)
    assert others["MASTER_PORT"] == environment["MASTER_PORT"]
    assert 1024 < int(others["MASTER_PORT"]) < 2**16


def test_two_steps_of_a_slurm_job_meet_at_two_ports() -> None:
    first, second = dict(SLURM), dict(SLURM) | {"SLURM_STEP_ID": "3"}
    place(first)
    place(second)
    assert first["MASTER_PORT"] != second["MASTER_PORT"]


def test_a_gpu_that_a_task_sees_alone_is_its_first() -> None:
    for visible, local in (("3", "0"), ("0,1,2,3", "1"), ("", "1")):
        environment = dict(SLURM) | {"CUDA_VISIBLE_DEVICES": visible}
        place(environment)
        assert environment["LOCAL_RANK"] == local


def test_what_a_launcher_or_a_person_set_is_kept() -> None:
    environment = dict(SLURM) | {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "29500",
    }
    before = dict(environment)
    assert place(environment) == 1  # torchrun inside a Slurm job
    assert environment == before | {"LOCAL_SIZE": "2"}
    given = dict(SLURM) | {"MASTER_ADDR": "10.0.0.1"}
    place(given)
    assert given["MASTER_ADDR"] == "10.0.0.1"


def test_a_process_alone_is_the_only_rank() -> None:
    environment: dict[str, str] = {}
    assert place(environment) == 0
    assert environment["WORLD_SIZE"] == "1"
    assert int(environment["MASTER_PORT"]) > 0


def test_what_cannot_meet_is_refused_and_not_waited_for() -> None:
    with pytest.raises(ValueError, match="LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not"):
        place({"RANK": "0", "WORLD_SIZE": "2"})
    batch = {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}
    with pytest.raises(ValueError, match="8 tasks and srun did not start this process"):
        place(batch)
    assert place(batch | {"SLURM_NTASKS": "1"}) == 0


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("n1", "n1"),
        ("n[1-2]", "n1"),
        ("n[001-010,20]", "n001"),
        ("n[5,7-9]", "n5"),
        ("a1,b[1-2]", "a1"),
        ("rack[2-3]-node[4-5],x", "rack2-node4"),
    ],
)
def test_the_first_host_of_a_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_tasks_of_every_node() -> None:
    assert tasks_per_node("2") == [2]
    assert tasks_per_node("4(x2),3,1(x3)") == [4, 4, 3, 1, 1, 1]
