"""Times several adapters on one encoder, ours and peft's, in one process; writes JSON.

The encoder is timm's ViT-S/16 at 224 pixels with random weights, the batch size 32. Every round
runs each case once, so that other load on the machine affects all cases. Figures are medians over
the rounds.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import peft
import timm
import torch

import mmadapters
from mmadapters import DoubleSeqBnConfig, Fuse, LoRAConfig, Route, SeqBnConfig

BATCH, ADAPTERS, ROUNDS = 32, 8, 7
NAMES = [f"a{index}" for index in range(ADAPTERS)]
MIXED = [NAMES[index % ADAPTERS] for index in range(BATCH)]


def main() -> None:
    torch.manual_seed(0)
    images = torch.randn(BATCH, 3, 224, 224)
    bare = timm.create_model("vit_small_patch16_224").eval()
    cases: dict[str, Callable[[], object]] = {"bare": lambda: bare(images)}
    models = {
        "seq_bn": SeqBnConfig(),
        "double_seq_bn": DoubleSeqBnConfig(),
        "lora": LoRAConfig(rank=8, targets=("q", "k", "v")),
    }
    ours = {}
    for key, config in models.items():
        model = mmadapters.init(timm.create_model("vit_small_patch16_224"))
        for name in NAMES:
            model.add_adapter(name, config)
        randomise(model.adapters)
        ours[key] = model
        cases[f"{key}, one"] = lambda model=model: using(model, "a0", images)
        cases[f"{key}, Route of 8"] = lambda model=model: using(model, Route(MIXED), images)
        if key != "lora":
            model.add_adapter_fusion(["a0", "a1"])
            randomise(model.fusions)
            cases[f"{key}, Fuse of 2"] = lambda model=model: using(model, Fuse("a0", "a1"), images)
    peer = peft_model()
    cases["peft lora, one"] = lambda: peer(images)
    cases["peft lora, mixed batch of 8"] = lambda: peer(images, adapter_names=MIXED)
    figures = {"seconds": rounds(cases), "switch_ms": switching(ours["double_seq_bn"])}
    figures |= {"load_ms": loading(ours["double_seq_bn"])}
    figures["versions"] = {"torch": torch.__version__, "timm": timm.__version__}
    figures["versions"]["peft"] = peft.__version__
    figures["threads"] = torch.get_num_threads()
    Path(sys.argv[1]).write_text(json.dumps(figures))


@torch.no_grad()
def randomise(module: torch.nn.Module) -> None:
    for parameter in module.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))


def using(model: mmadapters.AdapterModel, setup: object, images: torch.Tensor) -> None:
    with model.using(setup):  # type: ignore[arg-type]
        model(images)


def peft_model() -> torch.nn.Module:
    config = peft.LoraConfig(r=8, target_modules=["qkv"])
    model = peft.get_peft_model(timm.create_model("vit_small_patch16_224"), config, "a0")
    for name in NAMES[1:]:
        model.add_adapter(name, config)
    model.set_adapter("a0")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def rounds(cases: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Returns the median seconds of each case; the first round only warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(ROUNDS + 1):
        for name, run in cases.items():
            start = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - start)
        print(f"round {number} of {ROUNDS}", file=sys.stderr)
    return {name: statistics.median(values) for name, values in seconds.items()}


def switching(model: mmadapters.AdapterModel) -> float:
    """Returns the milliseconds of a switch of the active adapter (24 sites), median of 1000."""
    seconds = []
    for number in range(1000):
        name = NAMES[number % 2]
        start = time.perf_counter()
        model.set_active_adapters(name)
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds)


def loading(model: mmadapters.AdapterModel) -> tuple[float, int]:
    """Returns the milliseconds of load_adapter, median of 20, and the bytes of the files."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "a0"
        model.save_adapter(directory, "a0")
        size = sum(file.stat().st_size for file in directory.iterdir())
        seconds = []
        for number in range(20):
            start = time.perf_counter()
            model.load_adapter(directory, f"loaded {number}")
            seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds), size


if __name__ == "__main__":
    main()
