"""A store of states: what is put in comes out, whoever fills it and whatever befalls its files."""

from __future__ import annotations

import json
import pickle
import signal
import time
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import fork_server
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from trunk import fill_store

from mmadapters.trunk.budget import cache_folder, check_room
from mmadapters.trunk.format import pack, unpack
from mmadapters.trunk.store import ABOUT, Entry, Part, TrunkStore, chunk_size

RECORDS, VIEWS, WIDTH = 10, 2, 6
ORDER = np.random.default_rng(0).permutation(RECORDS * VIEWS)


def state(place: int, layer: int) -> Tensor:
    """(N, D), N differing by place."""
    generator = torch.Generator().manual_seed(100 * place + layer)
    return torch.randn(2 + place % 4, WIDTH, generator=generator)


def entry(place: int) -> Entry:
    states = {layer: state(place, layer) for layer in (-1, 3)}
    texts = [Part({3: state(place, number)}) for number in range(place % 3)]
    rest = {"name": f"row {place}", "target": torch.tensor([place, 1])}
    return Entry(pack(rest), {"vision": [Part(states)], "text": texts})


def store(where: Path | None, **options: Any) -> TrunkStore:
    options = {"order": ORDER, "views": VIEWS, "per_chunk": 6, **options}
    if where is None:
        return TrunkStore.in_memory(**options)
    return TrunkStore.on_disk(where, {"weights": "w"}, **options)


def fill(kept: TrunkStore, chunks: list[int] | None = None) -> list[int]:
    made = []
    for chunk in kept.missing() if chunks is None else chunks:
        if kept.claim(chunk):
            kept.put(chunk, [entry(place) for place in kept.places(chunk).tolist()])
            kept.release(chunk)
            made.append(chunk)
    return made


def assert_whole(kept: TrunkStore) -> None:
    assert kept.missing() == []
    for place in range(RECORDS * VIEWS):
        record, view = divmod(place, VIEWS)
        assert kept.rest(record, view)["name"] == f"row {place}"
        found = kept.states("vision", [-1, 3], [(record, view, 0)])
        for layer in (-1, 3):
            assert torch.equal(found[layer][0], state(place, layer))


@pytest.mark.parametrize("disk", [False, True], ids=["memory", "disk"])
def test_what_is_put_in_comes_out(disk: bool, tmp_path: Path) -> None:
    kept = store(tmp_path if disk else None)
    assert len(kept) == 4
    assert fill(kept) == [0, 1, 2, 3]
    assert_whole(kept)
    assert_whole(pickle.loads(pickle.dumps(kept)))
    assert torch.equal(kept.states("text", [3], [(2, 1, 1)])[3][0], state(5, 1))


def test_a_batch_is_padded_with_zeros_to_its_longest_row(tmp_path: Path) -> None:
    kept = store(tmp_path)
    fill(kept)
    rows = [(0, 1, 0), (3, 1, 0), (1, 0, 0)]
    batch = kept.states("vision", [3], rows)[3]
    assert batch.shape == (3, 5, WIDTH)
    for row, place in zip(batch, (1, 7, 2), strict=True):
        own = state(place, 3)
        assert torch.equal(row[: len(own)], own)
        assert not row[len(own) :].any()


def test_values_of_any_kind_survive_and_others_are_refused() -> None:
    value = {
        "f": torch.randn(3, 2),
        "half": torch.randn(4).bfloat16(),
        "mask": torch.randint(0, 200, (40, 40)),
        "wide": torch.randint(-(2**40), 2**40, (20, 20)),
        "none": torch.zeros(0, 3),
        "one": torch.tensor(True),
        "heavy": torch.empty(3, 8, 8, device="meta"),
        "list": [1, 2.5, None, "é", {"deep": (True, [])}],
        "array": np.arange(6.0).reshape(2, 3),
        "id": 2**62,
    }
    again = unpack(pack(value))
    assert again.keys() == value.keys()
    for name, before in value.items():
        if isinstance(before, Tensor) and before.device.type == "meta":
            assert again[name].shape == before.shape
            assert again[name].device.type == "meta"
        elif isinstance(before, Tensor):
            assert again[name].dtype == before.dtype
            assert torch.equal(again[name], before)
        elif isinstance(before, np.ndarray):
            np.testing.assert_array_equal(again[name], before)
        else:
            assert again[name] == before
    # A mask's classes take a byte each.
    assert len(pack({"mask": value["mask"]})) < 2 * 1600
    for stranger in ({1: "a"}, {"a": object()}, {"a": {1, 2}}):
        with pytest.raises(ValueError, match="cannot be kept in a cache"):
            pack(stranger)


def test_a_single_number_of_any_stride_survives() -> None:
    odd = torch.tensor([7, 8, 9])[1:2].as_strided((1,), (0,))
    assert unpack(pack({"odd": odd}))["odd"].tolist() == [8]


def test_equal_keys_are_kept_once(tmp_path: Path) -> None:
    order = np.arange(8)
    sizes = []
    for keys in ([None] * 8, ["a"] * 4 + ["b"] * 4):
        kept = TrunkStore.in_memory(order=order, per_chunk=8)
        parts = [Part({0: torch.full((50, 64), float(i // 4))}, keys[i]) for i in range(8)]
        kept.put(0, [Entry(pack({}), {"vision": [part]}) for part in parts])
        states = kept.states("vision", [0], [(i, 0, 0) for i in range(8)])[0]
        assert states[:4].eq(0).all()
        assert states[4:].eq(1).all()
        sizes.append(kept.nbytes)
    assert sizes[1] < 0.3 * sizes[0]


@pytest.mark.parametrize(("dtype", "digits"), [(torch.bfloat16, 8), (torch.float16, 11)])
def test_states_are_kept_in_half_where_asked_for(dtype: torch.dtype, digits: int) -> None:
    whole, half = store(None), store(None, dtype=dtype)
    fill(whole)
    fill(half)
    assert half.states("vision", [3], [(1, 1, 0)])[3].dtype == dtype
    assert half.captured("vision", 3) == torch.float32
    torch.testing.assert_close(
        half.states("vision", [3], [(1, 1, 0)])[3].float(),
        whole.states("vision", [3], [(1, 1, 0)])[3],
        rtol=2**-digits,
        atol=1e-6,
    )


def test_states_too_large_for_fp16_are_refused() -> None:
    kept = TrunkStore.in_memory(order=np.arange(1), per_chunk=1, dtype=torch.float16)
    part = Part({0: torch.full((2, 3), 1e6)})
    with pytest.raises(ValueError, match="1e\\+06, which fp16 cannot hold: keep them as bf16"):
        kept.put(0, [Entry(pack({}), {"vision": [part]})])
    assert kept.missing() == [0]


def test_a_later_run_finds_what_is_there_and_another_does_not(tmp_path: Path) -> None:
    fill(store(tmp_path))
    again = store(tmp_path, per_chunk=3)  # settled by the first
    assert again.per_chunk == 6
    assert_whole(again)
    for other in (
        store(tmp_path, dtype=torch.bfloat16),
        store(tmp_path, order=ORDER[::-1].copy()),
        TrunkStore.on_disk(tmp_path, {"weights": "x"}, order=ORDER, views=VIEWS, per_chunk=6),
    ):
        assert other.missing() == [0, 1, 2, 3]
    (first, *_) = sorted(tmp_path.iterdir())
    about = json.loads((first / ABOUT).read_text())
    assert about["views"] == VIEWS
    assert about["places"] == RECORDS * VIEWS


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-200] ^= 4
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def foreign(path: Path) -> None:
    path.write_bytes(b"something else altogether" * 100)


def header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[40] ^= 4
    path.write_bytes(data)


def of_another_cache(path: Path) -> None:
    other = TrunkStore.on_disk(
        path.parents[1], {"weights": "other"}, order=ORDER, views=VIEWS, per_chunk=6
    )
    fill(other)
    path.write_bytes((path.parents[1] / other.key / path.name).read_bytes())


def of_other_rows(path: Path) -> None:
    path.write_bytes(path.with_name("00000.states").read_bytes())


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (flip, "its checksum differs"),
        (cut, "bytes instead of"),
        (empty, "not a file of a cache"),
        (foreign, "not a file of a cache"),
        (header, "its header was changed"),
        (of_another_cache, "of another cache"),
        (of_other_rows, "holds other records"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_file_that_is_not_what_was_written_is_made_anew(
    harm: Any, reason: str, tmp_path: Path
) -> None:
    kept = store(tmp_path)
    fill(kept)
    path = tmp_path / kept.key / "00002.states"
    before = {p.name: p.stat().st_mtime_ns for p in path.parent.glob("*.states")}
    harm(path)
    again = store(tmp_path)
    with pytest.warns(UserWarning, match=f"1 of 4 files .*{reason}") as warned:
        assert again.verify() == [2]
    assert len(warned) == 1
    assert "\n" not in str(warned[0].message)
    assert fill(again) == [2]
    assert_whole(again)
    after = {p.name: p.stat().st_mtime_ns for p in path.parent.glob("*.states")}
    assert [name for name in before if after[name] != before[name]] == ["00002.states"]


def test_a_damaged_description_is_written_anew(tmp_path: Path) -> None:
    kept = store(tmp_path)
    fill(kept)
    (tmp_path / kept.key / ABOUT).write_text("{")
    with pytest.warns(UserWarning, match="it cannot be read"):
        again = store(tmp_path)
    assert_whole(again)


class Rows(Dataset):
    def __init__(self, kept: TrunkStore) -> None:
        self.kept = kept

    def __len__(self) -> int:
        return RECORDS

    def __getitem__(self, record: int) -> Tensor:
        return self.kept.states("vision", [3], [(record, 1, 0)])[3][0]


@pytest.mark.parametrize("disk", [False, True], ids=["memory", "disk"])
def test_workers_of_a_loader_read_it(disk: bool, tmp_path: Path) -> None:
    kept = store(tmp_path if disk else None)
    fill(kept)
    loader = DataLoader(Rows(kept), batch_size=None, num_workers=2)
    for record, found in enumerate(loader):
        assert torch.equal(found, state(VIEWS * record + 1, 3))


def fillers(
    count: int, folder: Path, kill_at: int = -1, pause: float = 0.0
) -> list[tuple[BaseProcess, Connection]]:
    """Processes that fill one store; they begin together, once each has opened it."""
    several = []
    for _ in range(count):
        here, there = fork_server().Pipe()
        process = fork_server().Process(
            target=fill_store.fill, args=(folder, kill_at, pause, there)
        )
        process.start()
        there.close()
        several.append((process, here))
    for _, connection in several:
        assert connection.recv() == "ready"
    for _, connection in several:
        connection.send("go")
    return several


def test_a_filling_that_was_killed_goes_on_where_it_stopped(tmp_path: Path) -> None:
    ((killed, _),) = fillers(1, tmp_path, kill_at=4)
    killed.join(timeout=60)
    assert killed.exitcode == -signal.SIGKILL
    kept = store(tmp_path, per_chunk=2)
    assert kept.verify() == []
    assert len(kept.missing()) == len(kept) - 4
    # The lock that the dead process held stops nobody, and its half-written file is gone.
    assert len(fill(kept)) == len(kept) - 4
    assert_whole(kept)
    assert not list(tmp_path.rglob("*.tmp"))


def test_two_processes_fill_one_store_together(tmp_path: Path) -> None:
    several = fillers(2, tmp_path, pause=0.1)
    made = [set(connection.recv()) for _, connection in several]
    for process, _ in several:
        process.join(timeout=60)
    kept = store(tmp_path, per_chunk=2)
    assert made[0] | made[1] == set(range(len(kept)))
    assert not made[0] & made[1]
    assert all(made), "one process did everything"
    assert kept.verify() == []
    assert_whole(kept)


def test_what_another_process_fills_cannot_be_claimed_until_it_ends(tmp_path: Path) -> None:
    kept, ((other, _),) = store(tmp_path, per_chunk=2), fillers(1, tmp_path, pause=60.0)

    def claimable(chunk: int) -> bool:
        if claimed := kept.claim(chunk):
            kept.release(chunk)
        return claimed

    try:
        # It takes the first that it can claim: where this test just held 0, it is 1.
        deadline = time.monotonic() + 60
        while not (taken := [chunk for chunk in (0, 1) if not claimable(chunk)]):
            assert time.monotonic() < deadline, "the other process claims nothing"
            time.sleep(0.05)
        assert not claimable(taken[0])
        assert claimable(2)
    finally:
        other.kill()
        other.join()
    assert claimable(taken[0])


def test_a_cache_beyond_its_budget_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"2\.00 GiB for 1,000 records in 4 views, more than the "
        r"budget of 1\.5 GiB: keep fewer views",
    ):
        check_room(2 * 2**30, records=1000, views=4, budget=1.5, folder=tmp_path)
    with pytest.raises(ValueError, match=r"the disk of .* has .* GiB to spare"):
        check_room(2**60, records=1000, views=1, budget=2.0**40, folder=tmp_path / "not")
    with pytest.raises(ValueError, match=r"memory has .* GiB to spare"):
        check_room(2**60, records=1000, views=1, budget=2.0**40, folder=None)
    check_room(2**20, records=1000, views=1, budget=0.5, folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_chunks_are_of_a_size_that_can_be_made_anew(tmp_path: Path) -> None:
    assert chunk_size(2**20) == 64
    assert chunk_size(2**40) == 1
    assert chunk_size(1) == 4096


def test_the_folder_is_the_users_unless_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMADAPTERS_CACHE", "/some/where")
    assert cache_folder() == Path("/some/where")
    monkeypatch.delenv("MMADAPTERS_CACHE")
    assert cache_folder().name == "mmadapters"


def test_a_file_that_is_cut_or_deleted_while_it_is_open_is_told(tmp_path: Path) -> None:
    kept = store(tmp_path)
    fill(kept)
    assert_whole(kept)
    (first, second, *_) = sorted(tmp_path.rglob("*.states"))
    with open(first, "r+b") as file:
        file.truncate(100)
    record, view = divmod(int(kept.places(0)[0]), VIEWS)
    with pytest.raises(ValueError, match="was cut while a run used it: start that run again"):
        kept.rest(record, view)
    fresh = store(tmp_path)
    second.unlink()
    record, view = divmod(int(kept.places(1)[0]), VIEWS)
    kept.rest(record, view)  # a deleted file stays readable where it is open
    with pytest.raises(ValueError, match="is not there; if it was deleted while a run used it"):
        fresh.rest(record, view)
