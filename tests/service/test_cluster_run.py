"""A server of a Ray cluster: studies run on its other nodes, a gang over two of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from autosft.profiles.errors import UserError
from autosft.profiles.hardware.device import ClusterProfile
from autosft.profiles.hardware.discover import profile_hardware, save_profile
from autosft.scheduler.finish.final_evaluation import FINAL
from autosft.service.client import ENDED
from autosft.service.cluster_devices import NodeFile, NodeWatch
from autosft.studies.store.records import open_records
from autosft.studies.trial import TrialState
from autosft.workers.runners.node import HARDWARE_VARIABLE
from tests.ray_nodes import RayNodes, ray_nodes
from tests.service.house import House, furnished

pytestmark = [pytest.mark.ray, pytest.mark.slow]

#: Of each node: too little for the larger model on one device, enough on two together.
MIB = 1 << 20
DEVICE_BYTES = 330 * MIB


def declare(folder: Path, name: str) -> dict[str, str]:
    """Return the environment of a raylet that offers one device."""
    found = profile_hardware("cpu").devices[0]
    device = replace(
        found, uuid=f"CPU-{name}", num_cores=1, total_bytes=DEVICE_BYTES, free_bytes=DEVICE_BYTES
    )
    path = folder / f"{name}.json"
    save_profile(ClusterProfile(devices=(device,), driver_version=None, cuda_version=None), path)
    return {HARDWARE_VARIABLE: str(path)}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[RayNodes]:
    with ray_nodes() as nodes:
        nodes.start_head()
        for name in ("one", "two"):
            nodes.add(declare(tmp_path, name))
        yield nodes


@pytest.fixture
def house(tmp_path: Path, cluster: RayNodes) -> Iterator[House]:
    options = ("--address", cluster.address)
    made = furnished(tmp_path, options=options, variables=dict(cluster.environment))
    make_large_model(tmp_path / "shared")
    yield made
    made.end()


def make_large_model(shared: Path) -> None:
    """Write a model whose full fine-tuning takes two of the devices, and little to train it on."""
    from transformers import LlamaConfig, LlamaForCausalLM

    (shared / "large").mkdir()
    for file in (shared / "llama").iterdir():
        if file.name.startswith(("tokenizer", "special", "chat")):
            (shared / "large" / file.name).write_bytes(file.read_bytes())
    config = LlamaConfig.from_pretrained(shared / "llama")
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 360, 1024, 8
    config.head_dim = 40
    config.vocab_size += config.vocab_size % 2  # so that its embedding has two equal parts
    LlamaForCausalLM(config).save_pretrained(shared / "large")
    lines = (shared / "chats.jsonl").read_text().splitlines()
    (shared / "few.jsonl").write_text("\n".join(lines[:16]) + "\n")


def test_studies_run_on_the_nodes_of_a_cluster(house: House, cluster: RayNodes) -> None:
    house.start()
    with house.client() as client:
        devices = {device["uuid"]: device for device in client.devices()}
        assert set(devices) == {"CPU-one", "CPU-two"}
        small = {"model": "llama", "data": "chats.jsonl", "method": "full", "trials": 2, "epochs": 1}
        large = {"model": "large", "data": "few.jsonl", "method": "full", "trials": 1, "epochs": 1}
        common = {"prune": False, "evaluations": 1, "effective_batch_size": 8, "seq_len": 128}
        first = client.submit("tune", small | common, name="small")
        gang = client.submit("tune", large | common, name="gang")
        ids = [first["id"], gang["id"]]
        house.until(lambda: all(client.item(each)["state"] in ENDED for each in ids))
        for item in (first, gang):
            shown = client.item(item["id"])
            assert shown["state"] == "done", (shown["note"], house.said())
    with closing(open_records(house.database)) as records:
        for name in ("small", "gang"):
            for trial in records.read_study(name).trials():
                assert trial.state is TrialState.COMPLETED
        used = {uuid for one in records.read_study("small").attempts() for uuid in one.device_uuids}
        assert used <= {"CPU-one", "CPU-two"}
        gang_study = records.read_study("gang")
        [attempt] = gang_study.attempts()
        assert set(attempt.device_uuids) == {"CPU-one", "CPU-two"}
        scored = any(score.examples == FINAL for score in gang_study.scores())
        assert scored or "Not evaluated again" in house.said(), "on one node, without waiting for more of it"


def test_a_cluster_that_does_not_answer_is_said(tmp_path: Path) -> None:
    watch = NodeWatch("127.0.0.1:1", tmp_path / "nodes.json", log=tmp_path / "log")
    with closing(watch):
        watch.begin(on_change=lambda: None)
        with pytest.raises(UserError, match=r"no Ray cluster answers at 127\.0\.0\.1:1"):
            watch.wait()
    assert NodeFile(tmp_path / "nodes.json").devices() == ()
