"""The recipe of `nano/wav2vec2`: CTC on characters over synthetic US English, from scratch.

    python -m mmadapters.tasks.zoo.pretrain wav2vec2 --out FOLDER

Processes synthesise audio while the accelerator trains. The accelerator keeps the audio as 16-bit
samples and draws batches from it at random, so training starts with the first audio. Seeds are
fixed, but the audio that has arrived by a step depends on the machine: two runs agree in their
figures, not in their bits. The recipe takes seven minutes on one H100 with 16 cores, or two days on
two CPU cores. The card alone (`--stages card`) takes 11 minutes there.

Shape legend: B slots, T = 96,000 samples at 16,000 Hz in a slot (6 s), F = 299 frames, D width,
C characters.
"""

import argparse
import json
import math
import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from mmadapters.files import write_text
from mmadapters.zoo import wav2vec2
from mmadapters.zoo.files import write_config, write_weights

from ...data.synthetic import speech
from .. import wav2vec2_figures
from .wav2vec2_audio import SLOT, Store, validation_readings

if TYPE_CHECKING:
    from transformers import Wav2Vec2ForCTC

CURVE_SENTENCES = 96  # number of sentences of each evaluation
ARCHITECTURE: dict[str, Any] = {
    "vocab_size": len(wav2vec2.CHARACTERS),
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    # Statistics of each sample alone, so that batched = single and padded = unpadded.
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    # The usual strides, 320 samples a frame; layers with many frames are narrow.
    "conv_dim": [96, 128, 160, 192, 192, 192, 192],
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "conv_bias": False,  # quiet and loud speech look alike after the first norm
    "hidden_size": 224,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "intermediate_size": 640,
    "num_conv_pos_embeddings": 64,
    "num_conv_pos_embedding_groups": 16,
    "hidden_dropout": 0.05,
    "attention_dropout": 0.05,
    "activation_dropout": 0.05,
    "feat_proj_dropout": 0.0,
    "final_dropout": 0.05,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this recipe."""
    parser.add_argument(
        "--stages",
        choices=("train", "card", "all"),
        default="all",
        help="parts of the recipe to run",
    )
    parser.add_argument("--steps", type=int, default=5000, help="optimiser steps")
    parser.add_argument(
        "--minutes", type=float, default=0, help="longest training time in minutes; 0 is no limit"
    )
    parser.add_argument("--batch", type=int, default=128, help="slots of 6 s in a step")
    parser.add_argument(
        "--hours", type=float, default=240, help="hours of audio to synthesise and keep"
    )
    parser.add_argument(
        "--first-hours",
        type=float,
        default=0.2,
        help="hours of audio that must exist before training starts",
    )
    parser.add_argument("--learning-rate", type=float, default=1.5e-3, help="peak learning rate")
    parser.add_argument("--warmup", type=int, default=500, help="steps of linear warm-up")
    parser.add_argument(
        "--workers",
        type=int,
        default=max(1, (os.cpu_count() or 2) - 2),
        help="processes that synthesise",
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda"
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="use torch.compile on a GPU",
    )
    parser.add_argument("--evaluations", type=int, default=8, help="points of the curve")
    parser.add_argument(
        "--test-sentences",
        type=int,
        default=wav2vec2_figures.VERIFIED_SENTENCES,
        help="sentences of the card's figures",
    )
    parser.add_argument("--seed", type=int, default=0, help="of torch's random numbers")


def run(args: argparse.Namespace) -> None:
    """Trains, then measures and writes the card."""
    args.out.mkdir(parents=True, exist_ok=True)
    if args.stages in ("train", "all"):
        train(args)
    if args.stages in ("card", "all"):
        from . import wav2vec2_card

        wav2vec2_card.write(args.out, count=args.test_sentences)


def train(args: argparse.Namespace) -> None:
    """Trains from random weights; each evaluation writes the weights to `--out`."""
    console, started = Console(), time.monotonic()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    store = Store(math.ceil(args.hours * 3600 * speech.SAMPLE_RATE / SLOT), args.device)
    filler = threading.Thread(target=store.fill, args=(args.workers,), daemon=True)
    filler.start()
    model = wav2vec2.build(**ARCHITECTURE).to(args.device)
    network = logits
    generator = torch.Generator(args.device).manual_seed(args.seed)
    picker = torch.Generator().manual_seed(args.seed)
    if args.compile and args.device == "cuda":
        network = torch.compile(logits)
        # Compiling takes about as long as synthesising the first audio, so both run at once.
        silence_BT = torch.zeros(args.batch, SLOT, device=args.device)
        nothing = (torch.full((args.batch,), SLOT), [[1]] * args.batch)
        ctc_loss(network, model, silence_BT, *nothing, generator, picker).backward()
        console.print(f"compiled after {time.monotonic() - started:.0f} s")
    optimizer = torch.optim.AdamW(
        decay_groups(model), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.05
    )
    validation = list(validation_readings(CURVE_SENTENCES))
    wanted = min(store.size, math.ceil(args.first_hours * 3600 * speech.SAMPLE_RATE / SLOT))
    while store.ready < wanted:
        if not filler.is_alive():
            raise RuntimeError(
                "synthesis stopped before the first audio was ready; see the error above"
            )
        time.sleep(0.1)

    first, deadline = time.monotonic(), started + 60 * (args.minutes or math.inf)
    console.print(f"training from {first - started:.0f} s on, {store.ready} slots")
    curve: list[dict[str, float]] = []
    step, progress, loss_sum = 0, 0.0, torch.zeros((), device=args.device)
    for step in track(range(1, args.steps + 1), "training", console=console):
        # With a time limit, the schedule ends when steps or time are used up.
        spent = (time.monotonic() - first) / (deadline - first)
        progress = max(step / args.steps, spent)
        rate = min(1.0, step / args.warmup) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * rate
        waveform_BT, ends_B, targets = store.batch(args.batch, picker)
        loss = ctc_loss(network, model, waveform_BT, ends_B, targets, generator, picker)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss_sum += loss.detach()
        last = step == args.steps or progress >= 1
        if last or int(progress * args.evaluations) > len(curve):
            if not math.isfinite(loss_sum.item()):
                raise RuntimeError(
                    f"the loss is not finite before step {step}; try a lower --learning-rate"
                )
            error = wav2vec2_figures.word_error_rate(
                wav2vec2_figures.recognise(model.eval(), validation)
            )
            model.train()
            curve.append(
                {"step": step, "hours": round(store.ready * SLOT / speech.SAMPLE_RATE / 3600, 1)}
                | {"seconds": round(time.monotonic() - started), "wer": round(error, 4)}
            )
            console.print(curve[-1], f"loss {loss_sum.item() / step:.3f} on average so far")
            save(model, args, curve)
        if last:
            break
    store.closed = True
    filler.join()


def decay_groups(model: torch.nn.Module) -> list[dict]:
    """Splits the parameters: weight decay on matrices and kernels, none on biases and norms."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    return [
        {"params": matrices},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]


def logits(model: "Wav2Vec2ForCTC", x_BT: Tensor, frames_B: Tensor, keep_BFD: Tensor) -> Tensor:
    """Returns the logits (B, F, C) of HF's `Wav2Vec2ForCTC` with masked input of the encoder.

    HF's own forward masks on the CPU with NumPy, which would stall the accelerator at every step.

    Args:
        x_BT: waveforms.
        frames_B: number of frames of each waveform.
        keep_BFD: 0 where the encoder's input is masked, else 1.
    """
    hidden = x_BT[:, None]
    for layer in model.wav2vec2.feature_extractor.conv_layers:
        hidden = layer(hidden)
    hidden_BFD, _ = model.wav2vec2.feature_projection(hidden.transpose(1, 2))
    positions = torch.arange(hidden_BFD.shape[1], device=x_BT.device)
    mask_BF = positions < frames_B[:, None]
    hidden_BFD = model.wav2vec2.encoder(
        hidden_BFD * keep_BFD, attention_mask=mask_BF
    ).last_hidden_state
    return model.lm_head(model.dropout(hidden_BFD))


def ctc_loss(
    network: Callable[..., Tensor],
    model: "Wav2Vec2ForCTC",
    waveform_BT: Tensor,
    ends_B: Tensor,
    targets: list[list[int]],
    generator: torch.Generator,
    picker: torch.Generator,
) -> Tensor:
    """Augments, masks and scores a batch: the mean over slots of the loss per character, a scalar.

    Half of the slots keep some noise after the last word; the others end with the word. The rest of
    a slot is zeroed and masked, as padding is at inference. Lengths stay on the CPU, where
    `torch.nn.functional.ctc_loss` reads them; copying them would stall every step.

    Args:
        network: `logits`, compiled or not.
        ends_B: end of the last word of each slot, in samples, on the CPU.
        targets: character ids of each slot.
        generator: randomness of augmentation and masks, on the waveforms' device.
        picker: randomness of the lengths, on the CPU.
    """
    device = waveform_BT.device
    batch = len(waveform_BT)
    kept_B = (2 * torch.rand(batch, generator=picker) - 1).clamp_min(0)
    ends_B = ends_B + ((SLOT - ends_B) * kept_B).long()
    frames_B = (ends_B - 400) // 320 + 1
    samples = torch.arange(SLOT, device=device)
    x_BT = speech.augment(waveform_BT, generator=generator)
    x_BT = x_BT * (samples < ends_B.to(device)[:, None])
    keep_BFD = masks(batch, (SLOT - 400) // 320 + 1, ARCHITECTURE["hidden_size"], generator)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        logits_BFC = network(model, x_BT, frames_B.to(device), keep_BFD)
    return F.ctc_loss(
        logits_BFC.float().log_softmax(-1).transpose(0, 1),
        torch.tensor([i for ids in targets for i in ids], device=device),
        frames_B,
        torch.tensor([len(ids) for ids in targets]),
        # At 50 frames and about 15 characters a second, no slot should have fewer frames than its
        # text needs, but one very fast reader must not make the whole batch infinite.
        zero_infinity=True,
    )


def masks(batch: int, frames: int, width: int, generator: torch.Generator) -> Tensor:
    """Makes the mask (B, F, D) of SpecAugment (Park et al. 2019) in the form of wav2vec 2.0.

    Spans of 8 frames and spans of 8 channels are 0, about a tenth of each; the rest is 1.
    """

    def spans(length: int) -> Tensor:
        starts = torch.rand(batch, length, device=generator.device, generator=generator) < 0.1 / 8
        return F.max_pool1d(starts.float()[:, None], 8, 1, padding=4)[:, 0, :length]

    return (1 - spans(frames))[:, :, None] * (1 - spans(width))[:, None, :]


def save(model: torch.nn.Module, args: argparse.Namespace, curve: list[dict[str, float]]) -> None:
    """Writes the directory that `mmadapters.zoo.wav2vec2.load` reads, without figures and card."""
    write_weights(model.state_dict(), args.out)
    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    write_config(
        {
            "architecture": ARCHITECTURE,
            "audio": {"sampling_rate": speech.SAMPLE_RATE},
            "training": {
                **{"steps": curve[-1]["step"], "batch_seconds": args.batch * SLOT // 16_000},
                **{"audio_hours": curve[-1]["hours"], "learning_rate": args.learning_rate},
                **{"wall_seconds": curve[-1]["seconds"], "device": device, "seed": args.seed},
                **{"workers": args.workers, "curve_sentences": CURVE_SENTENCES, "curve": curve},
            },
        },
        args.out,
    )
    write_text(args.out / "vocab.json", json.dumps(wav2vec2.VOCABULARY) + "\n")
