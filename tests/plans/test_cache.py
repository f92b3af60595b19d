"""Plans: made once, forgotten in time, safe in threads."""

from __future__ import annotations

import sys
import threading

import torch
from families.small import hooks, output, randomise, small_vit

from mmadapters import AdapterModel, Parallel, Route, SeqBnConfig, init


def two() -> AdapterModel:
    model = init(small_vit())
    for name in "ab":
        model.add_adapter(name, SeqBnConfig(size=4))
    randomise(model.adapters)
    return model


def test_deleting_the_last_adapter_leaves_no_hook_of_a_parallel_either() -> None:
    model = two()
    model.set_active_adapters(Parallel("a", "b"))
    for name in "ab":
        model.delete_adapter(name)
    assert hooks(model.backbone) == 0


def many(model: AdapterModel) -> None:
    for number in range(300):
        with model.using(Route(["ab"[number >> bit & 1] for bit in range(10)])):
            pass


def test_what_acts_is_known_however_many_others_were_used_inside() -> None:
    model = two()
    with model.using("a"):
        many(model)
        assert model.active_adapters is not None


def test_deleted_adapter_stops_acting_however_many_others_were_used_inside() -> None:
    model = two()
    plain = output(model)
    with model.using("a"):
        many(model)
        model.delete_adapter("a")
        assert torch.equal(output(model), plain)


def test_threads_that_write_ever_new_routes_do_not_disturb_each_other() -> None:
    model, wrong = two(), list[object]()

    def serve(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(1500):
            route = Route(["ab"[i] for i in torch.randint(2, (12,), generator=generator)])
            try:
                with model.using(route):
                    if model.active_adapters != route:
                        wrong.append(route)
            except Exception as error:
                wrong.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    threads = [threading.Thread(target=serve, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    assert wrong == []
