"""Which files the coordinator keeps for boards to fetch: what is in force and what is new, nothing of the past."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from coordinator.journal import DeploymentRecord
from tests.coordinator.memory_site import Lab
from tests.coordinator.test_service import lab_test, record
from wire.memory import MemoryBroker
from wire.messages import Kit, KitModule


def with_graph(lab: Lab, made: DeploymentRecord, data: bytes) -> DeploymentRecord:
    """The same deployment with a stage graph that is really there, written long ago."""
    graph = lab.coordinator.artifacts.add_bytes(data, "stage.onnx")
    orders = {
        device: tuple(msgspec.structs.replace(order, graph=graph) for order in given)
        for device, given in made.orders.items()
    }
    return msgspec.structs.replace(made, orders=orders)


def grow_old(folder: Path) -> None:
    for path in folder.iterdir():
        os.utime(path, (1.0, 1.0))


def contents(state: Path) -> set[bytes]:
    return {path.read_bytes() for path in (state / "artifacts").iterdir()}


def test_files_that_no_deployment_refers_to_are_removed_at_the_next_one(tmp_path: Path) -> None:
    async def scenario(lab: Lab) -> None:
        coordinator = lab.coordinator
        coordinator.put_in_force(with_graph(lab, record(coordinator, "a"), b"first"))
        packed = tmp_path / "packed.safetensors"
        packed.write_bytes(b"weights")
        os.utime(packed, (1.0, 1.0))
        weights = coordinator.artifacts.add_file("sha256:" + "7" * 64, packed, "packed").digest
        kit = coordinator.artifacts.add_bytes(b"kit", "block-x1.onnx")
        module = KitModule(key="k", kind="block", graphs=((1, kit),), hidden=8, vocabulary=32, wire_dtype="f16")
        coordinator.offer_kit(Kit(artifacts_url="http://x", modules=(module,)))
        (tmp_path / "artifacts" / ".half-written").write_bytes(b"half")
        grow_old(tmp_path / "artifacts")
        second = with_graph(lab, record(coordinator, "a"), b"second")
        first = coordinator.records()[0].orders["a"][0].graph.digest
        coordinator.put_in_force(second)
        assert contents(tmp_path) == {b"second", b"kit"}
        assert coordinator.artifacts.path_of(first) is None
        assert set(coordinator.journal.artifacts()) == {second.orders["a"][0].graph.digest, kit.digest}
        assert packed.is_file() and coordinator.artifacts.path_of(weights) is None, "the cache is not ours to clean"

    lab_test(scenario, tmp_path)


def test_what_a_device_may_still_be_fetching_stays(tmp_path: Path) -> None:
    async def scenario(lab: Lab) -> None:
        coordinator = lab.coordinator
        coordinator.put_in_force(with_graph(lab, record(coordinator, "a"), b"first"))
        grow_old(tmp_path / "artifacts")
        coordinator.artifacts.add_bytes(b"being made", "x")
        coordinator.put_in_force(msgspec.structs.replace(record(coordinator, "b"), name="another"))
        assert contents(tmp_path) == {b"first", b"being made"}, "in force, however old; and new, in force or not"
        grow_old(tmp_path / "artifacts")
        coordinator.artifacts.add_bytes(b"being made", "x")
        coordinator.put_in_force(msgspec.structs.replace(record(coordinator, "b"), name="another"))
        assert contents(tmp_path) == {b"first", b"being made"}, "asked for again is as good as new"

    lab_test(scenario, tmp_path)


def test_a_restart_removes_what_is_left_of_the_past_and_serves_what_is_in_force(tmp_path: Path) -> None:
    digests: list[str] = []

    async def first(lab: Lab) -> None:
        made = with_graph(lab, record(lab.coordinator, "a"), b"in force")
        lab.coordinator.put_in_force(made)
        digests.append(made.orders["a"][0].graph.digest)
        lab.coordinator.artifacts.add_bytes(b"past", "x")
        grow_old(tmp_path / "artifacts")

    async def second(lab: Lab) -> None:
        assert contents(tmp_path) == {b"in force"}
        assert lab.coordinator.artifacts.path_of(digests[0]) is not None

    lab_test(first, tmp_path)
    lab_test(second, tmp_path, MemoryBroker())
