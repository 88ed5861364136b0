"""Named label banks: versions, builds in the background, and what ends them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import FakeRuntime, write_fake_bundle
from serving import running_app

from actionclip_deploy.bundle import Bundle
from actionclip_deploy.errors import InferenceError, RequestRefusedError
from actionclip_deploy.labels import LabelBank
from actionclip_deploy.serve.banks import AdhocBanks, BankRegistry, BankVersion

TIMEOUT_SECONDS = 60.0  # of a busy machine; nothing waits so long where all is right


class Builder:
    """Builds banks of a fake bundle; waits for `gate` in the middle of each."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.calls: list[str] = []

    def __call__(
        self,
        name: str,
        labels: Sequence[str],
        templates: Sequence[str] | None,
        progress: Callable[[int, int], None],
    ) -> LabelBank:
        self.calls.append(name)
        progress(0, len(labels))
        assert self.gate.wait(TIMEOUT_SECONDS)
        progress(1, len(labels))
        if self.error is not None:
            raise self.error
        runtime = FakeRuntime(self.bundle.manifest)
        return LabelBank.build(self.bundle, runtime, labels, name=name, templates=templates)


def run_registry(
    folder: Path, use: Callable[[BankRegistry, Builder], Awaitable[Any]], **options: Any
) -> Any:
    builder = Builder(write_fake_bundle(folder / "bundle"))

    async def run() -> Any:
        registry = BankRegistry(builder, **{"max_banks": 3, "max_bytes": 10**6, **options})
        try:
            return await asyncio.wait_for(use(registry, builder), TIMEOUT_SECONDS)
        finally:
            builder.gate.set()
            await registry.stop()

    return asyncio.run(run())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


async def build(registry: BankRegistry, name: str, labels: Sequence[str]) -> BankVersion:
    started = registry.start_build(name, labels, None)
    await until(lambda: not started.is_under_way)
    assert started.error is None
    return registry.get(name)


def test_a_build_becomes_active_and_counts_versions(tmp_path: Path) -> None:
    changes: list[tuple[str, int | None]] = []

    async def use(registry: BankRegistry, _: Builder) -> None:
        first = await build(registry, "mine", ["run", "walk"])
        second = await build(registry, "mine", ["run", "sit"])
        assert (first.version, second.version) == (1, 2)
        assert first.sha256 != second.sha256 == second.bank.sha256
        found = registry.diff("mine", 1, 2)
        assert (found.added, found.removed) == (("sit",), ("walk",))
        assert [each.version for each in registry.history("mine")] == [1, 2]
        await registry.remove("mine")
        assert registry.names() == []
        assert (await build(registry, "mine", ["run"])).version == 3  # never a number twice

    run_registry(
        tmp_path,
        use,
        on_change=lambda name, active: changes.append((name, active and active.version)),
    )
    assert changes == [("mine", 1), ("mine", 2), ("mine", None), ("mine", 3)]


def test_the_active_version_stays_while_another_is_built(tmp_path: Path) -> None:
    async def use(registry: BankRegistry, builder: Builder) -> None:
        held = await build(registry, "mine", ["run"])
        builder.gate.clear()
        under_way = registry.start_build("mine", ["walk", "sit"], None)
        await until(lambda: under_way.state == "building")
        assert (under_way.done, under_way.total) == (0, 2)
        assert registry.get("mine") is held
        with pytest.raises(RequestRefusedError, match="'mine' is being built") as caught:
            registry.start_build("mine", ["stand"], None)
        assert caught.value.status == 409
        builder.gate.set()
        await until(lambda: under_way.state == "ready")
        assert registry.get("mine").bank.labels == ("walk", "sit")
        assert held.bank.labels == ("run",)

    run_registry(tmp_path, use)


@pytest.mark.parametrize("error", [InferenceError("no memory"), ValueError("no such label")])
def test_a_build_that_fails_says_why(error: Exception, tmp_path: Path) -> None:
    async def use(registry: BankRegistry, builder: Builder) -> None:
        builder.error = error
        failed = registry.start_build("mine", ["run"], None)
        await until(lambda: failed.state == "failed")
        assert failed.error == str(error)
        assert registry.names() == []

    run_registry(tmp_path, use)


def test_removing_ends_a_build_that_is_under_way_or_waits(tmp_path: Path) -> None:
    async def use(registry: BankRegistry, builder: Builder) -> None:
        builder.gate.clear()
        registry.start_build("first", ["run"], None)
        await until(lambda: builder.calls == ["first"])
        registry.start_build("second", ["walk"], None)
        assert registry.building_names() == ["first", "second"]
        removing = [asyncio.ensure_future(registry.remove(n)) for n in ("second", "first")]
        await asyncio.sleep(0.02)
        builder.gate.set()
        await asyncio.gather(*removing)
        assert registry.names() == registry.building_names() == []
        assert builder.calls == ["first"]
        with pytest.raises(RequestRefusedError, match="no label bank 'first'"):
            await registry.remove("first")

    run_registry(tmp_path, use)


def test_more_banks_than_there_may_be_are_refused(tmp_path: Path) -> None:
    async def use(registry: BankRegistry, _: Builder) -> None:
        for name in "abc":
            await build(registry, name, ["run"])
        await build(registry, "a", ["walk"])  # in the place of another
        with pytest.raises(RequestRefusedError, match="4 label banks") as caught:
            registry.start_build("d", ["run"], None)
        assert caught.value.status == 413

    run_registry(tmp_path, use)


def test_banks_that_take_too_much_together_are_refused(tmp_path: Path) -> None:
    async def use(registry: BankRegistry, builder: Builder) -> None:
        first = await build(registry, "a", ["run"])
        left = 2000 - first.bank.embeddings.nbytes
        builder.gate.clear()
        under_way = registry.start_build("b", ["walk"], None, num_bytes=left)
        with pytest.raises(RequestRefusedError, match="bytes of label banks") as caught:
            registry.start_build("c", ["sit"], None, num_bytes=1)
        assert caught.value.status == 413
        builder.gate.set()
        await until(lambda: not under_way.is_under_way)

    run_registry(tmp_path, use, max_bytes=2000)


def test_what_is_saved_is_saved_before_it_is_active(tmp_path: Path) -> None:
    saved: list[str] = []

    async def use(registry: BankRegistry, _: Builder) -> None:
        await build(registry, "mine", ["run"])
        assert saved == ["mine"]

    run_registry(tmp_path, use, save=lambda bank: saved.append(bank.name))


def test_a_bank_that_cannot_be_saved_is_not_active(tmp_path: Path) -> None:
    from actionclip_deploy.errors import LabelBankError

    def fail(bank: LabelBank) -> None:
        raise LabelBankError("The disk is full.")

    async def use(registry: BankRegistry, _: Builder) -> None:
        failed = registry.start_build("mine", ["run"], None)
        await until(lambda: failed.state == "failed")
        assert failed.error == "The disk is full."
        assert registry.names() == []

    run_registry(tmp_path, use, save=fail)


def adhoc(
    folder: Path, use: Callable[[AdhocBanks, Builder], Awaitable[Any]], **options: Any
) -> Any:
    builder = Builder(write_fake_bundle(folder / "bundle"))

    def make(labels: Sequence[str], templates: Sequence[str]) -> BankVersion:
        bank = builder("adhoc", labels, templates, lambda *_: None)
        return BankVersion(bank, 0, bank.sha256, 0.0)

    async def run() -> Any:
        banks = AdhocBanks(make, **options)
        try:
            return await asyncio.wait_for(use(banks, builder), TIMEOUT_SECONDS)
        finally:
            builder.gate.set()
            banks.stop()

    return asyncio.run(run())


TEMPLATES = ("a video of {}",)


def test_labels_of_requests_are_embedded_once(tmp_path: Path) -> None:
    async def use(banks: AdhocBanks, builder: Builder) -> None:
        found = await asyncio.gather(*(banks.get(("run", "walk"), TEMPLATES) for _ in range(5)))
        again = await banks.get(("run", "walk"), TEMPLATES)
        assert len(builder.calls) == 1
        assert all(each is again for each in found)
        assert await banks.get(("walk", "run"), TEMPLATES) is not again  # in the order given

    adhoc(tmp_path, use)


def test_those_that_were_not_used_for_longest_go_first(tmp_path: Path) -> None:
    async def use(banks: AdhocBanks, builder: Builder) -> None:
        for label in ("a", "b", "a", "c", "a", "b"):
            await banks.get((label,), TEMPLATES)
        assert len(builder.calls) == 4  # b was dropped for c

    one = np.zeros((1, 1, 16), np.float32).nbytes
    adhoc(tmp_path, use, max_bytes=2 * one)


def test_one_whose_request_ends_is_made_for_the_others(tmp_path: Path) -> None:
    async def use(banks: AdhocBanks, builder: Builder) -> None:
        builder.gate.clear()
        first = asyncio.ensure_future(banks.get(("run",), TEMPLATES))
        second = asyncio.ensure_future(banks.get(("run",), TEMPLATES))
        await until(lambda: len(builder.calls) == 1)
        first.cancel()
        builder.gate.set()
        assert (await second).bank.labels == ("run",)

    adhoc(tmp_path, use)


def test_a_deadline_and_too_many_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from actionclip_deploy.serve import banks as banks_adhoc

    monkeypatch.setattr(banks_adhoc, "_MAX_UNDER_WAY", 1)

    async def use(banks: AdhocBanks, builder: Builder) -> list[int]:
        builder.gate.clear()
        now = asyncio.get_running_loop().time()
        with pytest.raises(RequestRefusedError) as late:
            await banks.get(("run",), TEMPLATES, deadline=now + 0.02)
        with pytest.raises(RequestRefusedError, match="sets of labels are being embedded") as many:
            await banks.get(("walk",), TEMPLATES)
        return [late.value.status, many.value.status]

    assert adhoc(tmp_path, use) == [504, 429]


def test_labels_that_fail_are_tried_again(tmp_path: Path) -> None:
    async def use(banks: AdhocBanks, builder: Builder) -> None:
        builder.error = InferenceError("no memory")
        with pytest.raises(InferenceError):
            await banks.get(("run",), TEMPLATES)
        builder.error = None
        assert (await banks.get(("run",), TEMPLATES)).bank.labels == ("run",)

    adhoc(tmp_path, use)


def test_a_build_that_was_removed_is_never_saved(tmp_path: Path) -> None:
    saved: list[LabelBank] = []
    forgotten: list[str] = []

    async def use(registry: BankRegistry, builder: Builder) -> None:
        builder.gate.clear()
        registry.start_build("mine", ["run", "walk"], None)
        await until(lambda: builder.calls == ["mine"])
        removal = asyncio.ensure_future(registry.remove("mine"))
        await until(lambda: forgotten == ["mine"])
        with pytest.raises(RequestRefusedError, match="is being deleted; try again"):
            registry.start_build("mine", ["run", "walk"], None)
        builder.gate.set()
        await removal
        registry.start_build("mine", ["run", "walk"], None)
        await until(lambda: registry.names() == ["mine"])

    run_registry(tmp_path, use, save=saved.append, forget=forgotten.append)
    assert len(saved) == 1


def put(client: Any, name: str, labels: list[str]) -> dict[str, Any]:
    """Put a bank, and give what became of the build."""
    assert client.put(f"/v1/labels/{name}", json={"labels": labels}).status_code == 202
    while True:
        build: dict[str, Any] = client.get(f"/v1/labels/{name}").json()["build"]
        if build["state"] in ("ready", "failed"):
            return build


def test_a_saved_bank_that_is_deleted_stays_deleted(tmp_path: Path) -> None:
    with running_app(tmp_path, save_labels=True) as client:
        bundle = client.service.bundle  # type: ignore[attr-defined]
        put(client, "mine", ["an", "in"])
        assert bundle.label_bank_names() == ("mine",)
        assert client.delete("/v1/labels/mine").status_code == 204
        assert bundle.label_bank_names() == ()
        assert put(client, "mine", ["and"])["state"] == "ready"
        assert LabelBank.load(bundle, "mine").labels == ("and",)


def test_a_bank_that_is_not_saved_is_deleted_in_the_server_alone(tmp_path: Path) -> None:
    bundle = write_fake_bundle(tmp_path / "bundle")
    bank = LabelBank.build(bundle, FakeRuntime(bundle.manifest), ["an", "in"], name="mine")
    with running_app(tmp_path, banks=[bank]) as client:
        assert client.delete("/v1/labels/mine").status_code == 204
    assert bundle.label_bank_names() == ("mine",)


def test_a_bank_that_the_command_line_built_is_not_replaced_unseen(tmp_path: Path) -> None:
    with running_app(tmp_path, save_labels=True) as client:
        bundle = client.service.bundle  # type: ignore[attr-defined]
        assert put(client, "mine", ["an", "in"])["state"] == "ready"
        runtime = FakeRuntime(bundle.manifest)
        theirs = LabelBank.build(bundle, runtime, ["and"], name="mine")
        theirs.save(bundle, overwrite=True)
        failed = put(client, "mine", ["in", "an"])
        assert failed["state"] == "failed"
        assert "was changed by another program" in failed["error"]
        assert LabelBank.load(bundle, "mine").labels == ("and",)
        # Who was told, and asks again, means it.
        assert put(client, "mine", ["in", "an"])["state"] == "ready"
        assert LabelBank.load(bundle, "mine").labels == ("in", "an")


def test_labels_that_are_read_alike_are_embedded_once_and_named_as_given(tmp_path: Path) -> None:
    async def use(banks: AdhocBanks, builder: Builder) -> None:
        first = await banks.get(("caf\u00e9", "it's"), TEMPLATES)
        second = await banks.get(("cafe\u0301", "It\u2019s"), TEMPLATES)
        assert len(builder.calls) == 1
        assert second.bank.labels == ("cafe\u0301", "It\u2019s")
        assert (await banks.get(("caf\u00e9", "it's"), TEMPLATES)).bank.labels[0] == "caf\u00e9"
        assert second.sha256 == second.bank.sha256 != first.sha256

    adhoc(tmp_path, use)
