"""The recipe of `nano/blip`: contrast, matching and captions on `nano/vit`, as BLIP is trained.

It takes an hour on two CPU cores that multiply bf16. The lower vision blocks stay frozen as in
`nano/vit` and run once for each picture; their output is kept in memory and every step starts from
it. The losses are those of BLIP (Li et al. 2022, §3.2): image-text contrast with a learnt
temperature, image-text matching with hard negatives sampled by the contrast's similarities, and
language modelling with label smoothing 0.1. Text encoder and decoder share all but their
self-attention. Unlike BLIP, there is no momentum encoder and no queue; a batch of different pairs
does not need them.

Shape legend: P photographs, S scenes, B pairs of both, T image tokens, D width, L text tokens,
E width of the shared space.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mmadapters.files import write_text
from mmadapters.zoo import NANO, blip, load_tokenizer
from mmadapters.zoo.clip import TOKENIZER
from mmadapters.zoo.files import CARD, WEIGHTS, read_config, write_config, write_weights

from ...data.synthetic import scenes
from .. import blip_figures, photos
from ..clip_figures import TEMPLATES
from . import training
from .blip_model import LEARNT_BLOCKS, Blip, loss_of
from .clip import CONTEXT_LENGTH, WORDINGS, draw
from .training import IMAGE, figure

RATE, VISION_RATE, WARMUP, WEIGHT_DECAY = 1e-3, 3e-4, 200, 0.05
EMBED_DIM = 128
TEXT: dict[str, Any] = {
    "hidden_size": 224,
    "encoder_hidden_size": 224,
    "intermediate_size": 448,
    "projection_dim": EMBED_DIM,
    "num_hidden_layers": 3,
    "num_attention_heads": 7,
    "max_position_embeddings": CONTEXT_LENGTH,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this recipe."""
    training.add_arguments(parser, steps=1_800, batch_size=32)
    parser.add_argument("--scene-batch-size", type=int, default=128, help="scenes in a step")
    parser.add_argument("--scenes", type=int, default=60_000, help="number of scenes, drawn once")
    parser.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="multiply in bf16; None means on a GPU only",
    )


def run(options: argparse.Namespace) -> None:
    """Trains the model; writes weights, `config.json` and card."""
    start = time.perf_counter()
    torch.manual_seed(options.seed)
    folder = training.photo_folder(options.data)
    options.out.mkdir(parents=True, exist_ok=True)
    vit = read_config(NANO["nano/vit"].directory)["architecture"]
    tokenizer = load_tokenizer("nano/blip-retrieval")
    architecture = {
        "embed_dim": EMBED_DIM,
        "vision_config": {
            "hidden_size": vit["embed_dim"],
            "intermediate_size": 4 * vit["embed_dim"],
            "num_hidden_layers": vit["depth"],
            "num_attention_heads": vit["num_heads"],
            "image_size": vit["img_size"],
            "patch_size": vit["patch_size"],
            "layer_norm_eps": 1e-6,
        },
        "text_config": TEXT | {"vocab_size": len(tokenizer) + 2},  # type: ignore[arg-type]
    }
    config: dict[str, Any] = {
        "name": "nano/blip",
        "architecture": architecture,
        "image": IMAGE,
        "tokenizer": {"context_length": CONTEXT_LENGTH},
    }
    pictures, captions = draw(options.scenes, blip.CLIP / TOKENIZER)
    model = Blip(architecture).to(options.device)
    data = BlipData(folder, pictures, captions, tokenizer=tokenizer, model=model, options=options)
    write_config(config, options.out)
    curve, seconds = pretrain(model, data, options=options)

    config["figures"] = measure(options.out)
    config["training"] = training.record(
        options, curve, seconds=seconds, start=start, more=("scene_batch_size", "scenes")
    )
    write_config(config, options.out)
    write_card(config, options.out)
    print({key: figure["value"] for key, figure in config["figures"].items()}, f"{seconds:.0f} s")


class BlipData:
    """The training data of `nano/blip`, in memory.

    Attributes:
        photos: `Blip.frozen_states` of the photographs, (P, T, D) bf16.
        pictures: `Blip.frozen_states` of the scenes, (S, T, D) bf16.
        classes: for each class that has photographs, their indices.
        class_of: for each entry of `classes`, its label.
        captions: token ids of the scenes' captions, (S, WORDINGS, L).
        prompts: token ids of the class names, (templates, C, L).
    """

    def __init__(
        self,
        folder: Path,
        pictures: Tensor,
        captions: Tensor,
        *,
        tokenizer: Any,
        model: Blip,
        options: argparse.Namespace,
    ) -> None:
        self.device = options.device
        names = photos.class_names(folder)
        images, labels = photos.read_photos(folder, "train")
        self.photos = self._states(model, images, "photographs", options)
        self.pictures = self._states(model, pictures, "scenes", options)
        self.classes = [torch.nonzero(labels == label)[:, 0] for label in range(len(names))]
        self.classes = [numbers for numbers in self.classes if len(numbers)]
        self.class_of = [int(labels[numbers[0]]) for numbers in self.classes]
        self.captions = captions
        length = captions.shape[-1]
        self.prompts = torch.tensor(
            [
                tokenizer(
                    [template.format(name) for name in names],
                    padding="max_length",
                    truncation=True,
                    max_length=length,
                ).input_ids
                for template in TEMPLATES
            ]
        )

    def _states(
        self, model: Blip, images: Tensor, what: str, options: argparse.Namespace
    ) -> Tensor:
        parts = images.split(256)
        with torch.no_grad(), training.autocast(options.device, bf16=options.bf16):
            return torch.cat(
                [
                    model.frozen_states(part.to(options.device)).to(torch.bfloat16)
                    for part in tqdm(parts, mininterval=5, desc=what)
                ]
            )

    def batches(self, options: argparse.Namespace) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields pairs of states (B, T, D) and captions (B, L) without end.

        Each photograph of a batch is of another class.
        """
        drawn = training.shuffled(len(self.pictures), options.scene_batch_size, "cpu")
        for number, s in enumerate(drawn):
            chosen = torch.randperm(len(self.classes))[: options.batch_size].tolist()
            numbers = [self.classes[c] for c in chosen]
            p = torch.stack([some[torch.randint(len(some), ())] for some in numbers])
            labels = torch.tensor([self.class_of[c] for c in chosen])
            states = torch.cat([self.photos[p], self.pictures[s]]).float()
            prompts = self.prompts[number % len(self.prompts)][labels]
            wording = number % WORDINGS
            tokens = torch.cat([prompts, self.captions[s, wording]])
            tokens = tokens[:, : int((tokens != 0).sum(dim=1).max())]
            yield states.to(self.device), tokens.to(self.device)


def pretrain(
    model: Blip, data: BlipData, *, options: argparse.Namespace
) -> tuple[list[dict[str, float]], float]:
    """Trains and writes the weights; returns the held-out curve and the duration in seconds.

    `config.json` must exist, since evaluation loads the written files as users do.
    """
    text = [model.text_encoder, model.vision_proj, model.text_proj, model.itm_head]
    bert = model.text_decoder.bert
    attention = [part for name, part in bert.named_modules() if name.endswith(".attention")]
    output = model.text_decoder.cls.predictions
    heads = [output.transform, output.bias, model.logit_scale]
    upper = [*model.vit.blocks[model.lower :], model.vit.norm]
    groups = [(part, RATE) for part in (*text, *attention, *heads)]
    groups += [(part, VISION_RATE) for part in upper]
    adam = training.optimiser(groups, weight_decay=WEIGHT_DECAY)
    batches = data.batches(options)
    scene_images, scene_captions = blip_figures.drawn(scenes.VALIDATION_SEEDS, size=IMAGE["size"])

    def step(_number: int) -> Tensor:
        states, tokens = next(batches)
        with training.autocast(options.device, bf16=options.bf16):
            return loss_of(model, states, tokens)

    def evaluate(_number: int) -> dict[str, float]:
        write_weights(model.tensors(), options.out)  # an interrupted run leaves its latest state
        measured = figures(options.out, scene_images, scene_captions)
        return {
            "R@1, validation scenes": measured["embeddings"],
            "after matching": measured["matching"],
            "CIDEr / 10": measured["cider"] / 10,
        }

    return training.train(
        step, evaluate, model=model.train(), adam=adam, options=options, warmup=WARMUP
    )


def figures(directory: Path, images: Tensor, captions: list[list[str]]) -> dict[str, float]:
    """Measures recall by embeddings and after matching, and CIDEr, of the files in a directory."""
    retrieval, caption = (blip.load(directory, "hf", kind=kind) for kind in blip.CLASSES)
    states = blip_figures.image_tokens(retrieval, images, image=IMAGE)
    measured = blip_figures.recall(retrieval, states, [texts[0] for texts in captions])
    return measured | {
        "cider": blip_figures.caption_score(blip_figures.describe(caption, states), captions)
    }


def measure(directory: Path) -> dict[str, dict[str, Any]]:
    """Measures the card's figures on scenes of `TEST_SEEDS`, which training does not use."""
    test = figures(directory, *blip_figures.drawn(scenes.TEST_SEEDS, size=IMAGE["size"]))
    unseen = figures(
        directory,
        *blip_figures.drawn(scenes.TEST_SEEDS, size=IMAGE["size"], vocabulary=scenes.UNSEEN),
    )
    among = "text→image R@1 among 1,000 drawn {} scenes, {}"
    by, after = "by embeddings", f"the best {blip_figures.RERANKED} matched"
    cider = "CIDEr of the captions of 1,000 drawn {} scenes, 5 references each"
    return {
        "scene_recall": figure(among.format("test", by), test["embeddings"], 0.01),
        "scene_matching": figure(among.format("test", after), test["matching"], 0.01),
        "scene_cider": figure(cider.format("test"), test["cider"], 0.1),
        "unseen_matching": figure(among.format("UNSEEN", after), unseen["matching"]),
        "unseen_cider": figure(cider.format("UNSEEN"), unseen["cider"]),
    }


def write_card(config: dict[str, Any], out: Path) -> None:
    """Writes the card of an encoder from its `config.json`."""
    shares = {
        key: 100 * figure["value"] if "cider" not in key else figure["value"]
        for key, figure in config["figures"].items()
    }
    text = CARD_TEXT.format(
        **config["training"],
        **shares,
        megabytes=(out / WEIGHTS).stat().st_size / 1e6,
        learnt=LEARNT_BLOCKS,
        table=training.curve_table(config["training"]["curve"]),
        licence=training.DATA_LICENCE,
        scenes_licence=training.SCENES_LICENCE.format(**config["training"]),
    )
    write_text(out / CARD, text)


CARD_TEXT = """# nano/blip

BLIP for pictures of 64×64 and short English texts. The vision tower is `nano/vit`, its upper
{learnt} blocks trained further. Text encoder and decoder have 3 layers of width 224 and share all
but their self-attention. The shared space has 128 dimensions. The file has {megabytes:.2f} MB in
fp16, in addition to `nano/vit`'s. `nano/blip-retrieval` loads it as
`transformers.BlipForImageTextRetrieval`, `nano/blip-caption` as
`transformers.BlipForConditionalGeneration`. The tokenizer is that of `nano/clip`; the ids of [DEC]
and [ENC] follow its last id.

| held out | figure |
|---|---:|
| text→image R@1 among 1,000 drawn scenes (chance 0.1 %), by embeddings | {scene_recall:.1f} % |
| the same, the best 16 matched pair by pair | {scene_matching:.1f} % |
| CIDEr of the captions of 1,000 drawn scenes, 5 references each (of 10) | {scene_cider:.2f} |
| R@1 after matching among 1,000 `UNSEEN` scenes (new words) | {unseen_matching:.1f} % |
| CIDEr of the captions of those | {unseen_cider:.2f} |

`mmadapters zoo verify nano/blip-retrieval` measures the first two again,
`mmadapters zoo verify nano/blip-caption` the third.

## Training
{steps:,} steps of {batch_size:,} photographs and {scene_batch_size:,} drawn scenes, seed {seed}:
{seconds:,} s, or {total_seconds:,} s with drawing, decoding and the lower blocks, on {machine}.
The command is

    python -m mmadapters.tasks.zoo.pretrain blip --bf16 --data FOLDER --out FOLDER

The losses are those of BLIP: contrast, matching with hard negatives, captions. The lower vision
blocks stay frozen as in `nano/vit`. The captions of photographs are their class names in templates.

{table}

The weights are those of the last step; nothing was chosen by the curve.

Data:
{licence}
{scenes_licence}

## Not good for
Texts other than class names and descriptions of drawn shapes, pictures with detail beyond 64×64,
real search or description. Use it to learn and test adapters for BLIP.
"""
