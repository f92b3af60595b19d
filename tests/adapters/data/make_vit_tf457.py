"""Makes `vit_tf457_lora/`: an adapter saved with transformers 4.57, and what it computes there.

    base/                weights of a small ViTModel, as `save_pretrained` of 4.57 writes them
    adapter/             a LoRA and a bottleneck on it, as `save_adapter` writes them
    expected.safetensors `images`; `plain` and `adapted`: last hidden states without and with it

Run with the oldest supported versions: `.venv-oldest/bin/python tests/data/make_vit_tf457.py`.
Weights and images are rounded to bfloat16, so that the files are small and still exact.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from mmadapters import ConfigUnion, LoRAConfig, SeqBnConfig, init

FOLDER = Path(__file__).parent / "vit_tf457_lora"
CONFIG = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 4,
    # timm's epsilon: the same weights are run there too.
    "layer_norm_eps": 1e-6,
}
ADAPTER = ConfigUnion(LoRAConfig(rank=2, targets=("q", "k", "v", "o", "up")), SeqBnConfig(size=4))


@torch.no_grad()
def randomise(module: nn.Module, std: float) -> None:
    for parameter in module.parameters():
        noisy = parameter + std * torch.randn_like(parameter)
        parameter.copy_(noisy.bfloat16())


def main() -> None:
    assert transformers.__version__.startswith("4.57."), transformers.__version__
    torch.manual_seed(0)
    vit = transformers.ViTModel(transformers.ViTConfig(**CONFIG), add_pooling_layer=False).eval()
    randomise(vit, 0.1)
    images = torch.randn(2, 3, 16, 16).bfloat16().float()
    model = init(vit)
    model.add_adapter("tf457", ADAPTER)
    randomise(model.adapter("tf457"), 0.3)
    with torch.no_grad():
        plain = model(pixel_values=images).last_hidden_state
        model.set_active_adapters("tf457")
        adapted = model(pixel_values=images).last_hidden_state
    model.save_adapter(FOLDER / "adapter", "tf457", metadata={"made with": "transformers 4.57"})
    model.detach().to(torch.bfloat16).save_pretrained(FOLDER / "base")
    tensors = {"images": images, "plain": plain, "adapted": adapted}
    save_file(tensors, FOLDER / "expected.safetensors")


if __name__ == "__main__":
    main()
