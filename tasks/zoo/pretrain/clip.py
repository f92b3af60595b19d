"""The recipe of `nano/clip`: a tokenizer, then image-text contrast on photographs and drawn scenes.

It takes four minutes on one H100, and about two days on two CPU cores (estimated from single
steps). The vision tower starts from `nano/vit`. The loss is that of CLIP (Radford et al. 2021) with
one change. A photograph's caption is its class name in a template, and a batch holds many
photographs of a class. Photographs are therefore classified among the 200 class texts and all
captions of the batch, not among duplicates.

Shape legend: P photographs, S scenes, C class texts, E width of the shared space, L tokens.
"""

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip import CLIP
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from mmadapters.files import write_text
from mmadapters.zoo import NANO, clip
from mmadapters.zoo.files import CARD, WEIGHTS, read_weights, write_config, write_weights

from ...data.synthetic import scenes
from .. import clip_figures, photos
from . import training
from .training import IMAGE, figure

VOCABULARY_SIZE, CONTEXT_LENGTH = 1_024, 48
TOKENIZER_SCENES = 20_000  # number of scenes whose captions train the tokenizer
WORDINGS = 2  # number of captions of each scene, in different phrasings
TEXT_RATE, VISION_RATE, WARMUP, WEIGHT_DECAY = 1e-3, 6e-4, 300, 0.1
VISION: dict[str, Any] = {
    "layers": 8,
    "width": 224,
    "head_width": 32,
    "patch_size": 8,
    "image_size": 64,
}
TEXT: dict[str, Any] = {"context_length": CONTEXT_LENGTH, "width": 128, "heads": 4, "layers": 4}
EMBED_DIM = 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this recipe."""
    training.add_arguments(parser, steps=3_500, batch_size=512)
    parser.add_argument("--scene-batch-size", type=int, default=1_024, help="scenes in a step")
    parser.add_argument("--scenes", type=int, default=300_000, help="number of scenes, drawn once")
    parser.add_argument(
        "--vit",
        type=Path,
        default=NANO["nano/vit"].directory,
        help="folder of the ViT that the vision tower starts from",
    )


def run(options: argparse.Namespace) -> None:
    """Trains tokenizer and model; writes weights, tokenizer, `config.json` and card."""
    start = time.perf_counter()
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    folder = training.photo_folder(options.data)
    names = photos.class_names(folder)
    options.out.mkdir(parents=True, exist_ok=True)
    vocabulary_size = train_tokenizer(names, options.out)
    architecture = {
        "embed_dim": EMBED_DIM,
        "vision_cfg": VISION,
        "text_cfg": TEXT | {"vocab_size": vocabulary_size},
    }
    config: dict[str, Any] = {
        "name": "nano/clip",
        "architecture": architecture,
        "image": IMAGE,
        "tokenizer": {"context_length": CONTEXT_LENGTH},
    }
    write_config(config, options.out)
    tokenize = clip.load_tokenizer(options.out, "open_clip")
    drawn = draw(
        options.scenes, options.out / clip.TOKENIZER
    )  # forks, so it runs before CUDA starts
    data = ClipData(folder, *drawn, tokenize=tokenize, device=options.device)

    model = clip.build(**architecture)
    start_vision(model.visual, read_weights(options.vit))
    model.to(options.device)
    curve, seconds = pretrain(model, data, options=options)
    write_weights(model.state_dict(), options.out)

    shipped = clip.load(options.out, "open_clip").to(options.device)
    config["figures"] = measure(shipped, data)
    config["training"] = training.record(
        options, curve, seconds=seconds, start=start, more=("scene_batch_size", "scenes")
    )
    write_config(config, options.out)
    write_card(config, options.out)
    print({key: figure["value"] for key, figure in config["figures"].items()}, f"{seconds:.0f} s")


class ClipData:
    """The training data of `nano/clip`, on the device.

    Attributes:
        photos: training images (P, 3, 64, 64) uint8 and their labels (P,).
        held_out: the same of the validation photographs.
        pictures: drawn scenes, (S, 3, 64, 64) uint8.
        captions: token ids of the scenes' captions, (S, WORDINGS, L).
        prompts: token ids of the class names, (templates, C, L).
    """

    def __init__(
        self,
        folder: Path,
        pictures: Tensor,
        captions: Tensor,
        *,
        tokenize: Callable[[list[str]], Tensor],
        device: str,
    ) -> None:
        self.tokenize = lambda texts: tokenize(texts).to(device)
        self.names = photos.class_names(folder)
        images, labels = photos.read_photos(folder, "train")
        self.photos = images.to(device), labels.to(device)
        images, labels = photos.read_photos(folder, "validation")
        self.held_out = images.to(device), labels.to(device)
        self.pictures, self.captions = pictures.to(device), captions.to(device)
        self.prompts = torch.stack(
            [self.tokenize([t.format(name) for name in self.names]) for t in clip_figures.TEMPLATES]
        )

    def zero_shot(self, model: CLIP) -> float:
        """Measures zero-shot top-1 accuracy on the held-out photographs, in [0, 1]."""
        images, labels = self.held_out
        return clip_figures.zero_shot(
            model, self.tokenize, images=images, labels=labels, names=self.names, image=IMAGE
        )

    def recall(self, model: CLIP, **gallery: Any) -> dict[str, float]:
        """Measures text→image recall among drawn scenes; see `clip_figures.scene_recall`."""
        return clip_figures.scene_recall(model, self.tokenize, image=IMAGE, **gallery)


def draw(number: int, tokenizer: Path) -> tuple[Tensor, Tensor]:
    """Draws, describes and tokenizes the first `number` of `PRETRAINING_SEEDS` on all cores.

    Args:
        tokenizer: path of `tokenizer.json`.

    Returns:
        pictures: (N, 3, 64, 64) uint8.
        captions: (N, WORDINGS, L) int64.
    """
    seeds = scenes.PRETRAINING_SEEDS[:number]
    chunks = [seeds[start : start + 1_000] for start in range(0, number, 1_000)]
    pool = ProcessPoolExecutor(
        mp_context=multiprocessing.get_context("fork"), initializer=_one_thread
    )
    with pool:
        parts = pool.map(partial(_draw, tokenizer=tokenizer), chunks)
        pictures, captions = zip(
            *tqdm(parts, total=len(chunks), mininterval=5, desc="scenes"), strict=True
        )
    return torch.from_numpy(np.concatenate(pictures)), torch.from_numpy(np.concatenate(captions))


def _one_thread() -> None:
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _draw(seeds: range, *, tokenizer: Path) -> tuple[np.ndarray, np.ndarray]:
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(str(tokenizer))
    encoder.enable_truncation(CONTEXT_LENGTH)
    encoder.enable_padding(length=CONTEXT_LENGTH, pad_id=0, pad_token=clip.PAD)
    drawn = [scenes.make_scene(seed, scenes.PRETRAINING) for seed in seeds]
    pictures, _ = scenes.render(drawn, scenes.PRETRAINING, size=IMAGE["size"])
    texts = [
        text
        for scene in drawn
        for text in scenes.wordings(scene, scenes.PRETRAINING, range(WORDINGS), of=WORDINGS)
    ]
    ids = np.array([encoding.ids for encoding in encoder.encode_batch(texts)])
    return pictures.numpy(), ids.reshape(len(drawn), WORDINGS, CONTEXT_LENGTH)


def train_tokenizer(names: list[str], out: Path) -> int:
    """Trains byte-level BPE on class texts and `TOKENIZER_SCENES` captions; returns its size.

    The end token is added last, so it has the highest id, where open_clip pools.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY_SIZE - 2,
        special_tokens=[clip.PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [template.format(name) for name in names for template in clip_figures.TEMPLATES]
    for seed in scenes.PRETRAINING_SEEDS[:TOKENIZER_SCENES]:
        scene = scenes.make_scene(seed, scenes.PRETRAINING)
        texts.append(scenes.describe(scene, scenes.PRETRAINING))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([clip.START, clip.END])
    start, end = (tokenizer.token_to_id(token) for token in (clip.START, clip.END))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{clip.START} $A {clip.END}",
        special_tokens=[(clip.START, start), (clip.END, end)],
    )
    write_text(out / clip.TOKENIZER, tokenizer.to_str())
    clip.write_tokenizer_config(out, context_length=CONTEXT_LENGTH)
    return tokenizer.get_vocab_size()


def start_vision(visual: nn.Module, vit: dict[str, Tensor]) -> None:
    """Starts CLIP's vision tower from the weights of `nano/vit`.

    CLIP has no patch bias, so the bias is added to the positions. The ViT has no `ln_pre`, so its
    weight is set to the spread of the tokens that it normalises; the tower then computes about the
    same as the ViT.

    Raises:
        RuntimeError: the weights do not fit.
    """
    tensors = {
        "conv1.weight": vit["patch_embed.proj.weight"],
        "class_embedding": vit["cls_token"].flatten(),
        "positional_embedding": vit["pos_embed"][0].clone(),
        "ln_post.weight": vit["norm.weight"],
        "ln_post.bias": vit["norm.bias"],
    }
    tensors["positional_embedding"][1:] += vit["patch_embed.proj.bias"]
    spread = vit["patch_embed.proj.weight"].flatten(1).square().sum(dim=1).mean()
    positions = tensors["positional_embedding"].var(dim=1).mean()
    tensors["ln_pre.weight"] = (spread + positions).sqrt().expand(VISION["width"])
    parts = {"norm1": "ln_1", "norm2": "ln_2", "attn.proj": "attn.out_proj"}
    parts |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    for index in range(VISION["layers"]):
        ours, theirs = f"transformer.resblocks.{index}", f"blocks.{index}"
        for kind in ("weight", "bias"):
            tensors[f"{ours}.attn.in_proj_{kind}"] = vit[f"{theirs}.attn.qkv.{kind}"]
            for source, target in parts.items():
                tensors[f"{ours}.{target}.{kind}"] = vit[f"{theirs}.{source}.{kind}"]
    missing, unexpected = visual.load_state_dict(tensors, strict=False)
    if unexpected or set(missing) != {"proj", "ln_pre.bias"}:
        raise RuntimeError(f"nano/vit does not fit: missing {missing}, unknown {unexpected}")


def pretrain(
    model: CLIP, data: ClipData, *, options: argparse.Namespace
) -> tuple[list[dict[str, float]], float]:
    """Trains all of `model`; returns the held-out curve and the duration in seconds."""
    compiled = torch.compile if options.compile else (lambda function: function)
    encode_image, encode_text = compiled(model.encode_image), compiled(model.encode_text)
    text = [model.transformer, model.token_embedding, model.ln_final]
    text += [model.positional_embedding, model.text_projection, model.logit_scale]
    groups = [(model.visual, VISION_RATE), *((part, TEXT_RATE) for part in text)]
    adam = training.optimiser(groups, weight_decay=WEIGHT_DECAY)
    photo_batches = training.shuffled(len(data.photos[0]), options.batch_size, options.device)
    scene_batches = training.shuffled(len(data.pictures), options.scene_batch_size, options.device)

    def step(number: int) -> Tensor:
        p, s = next(photo_batches), next(scene_batches)
        x = torch.cat(
            [
                training.augment(data.photos[0][p]),
                # Neither crop nor flip, since the caption says where things are.
                training.augment(data.pictures[s], area=1, flip=False, colour=0.1),
            ]
        )
        prompts = data.prompts[number % len(data.prompts)]
        tokens = torch.cat([prompts, data.captions[s, number % WORDINGS]])
        with training.autocast(options.device):
            images, texts = encode_image(x), encode_text(tokens)
        images, texts = F.normalize(images.float(), dim=-1), F.normalize(texts.float(), dim=-1)
        return contrast(
            images, texts, labels=data.photos[1][p], scale=model.logit_scale.exp().clamp(max=100)
        )

    def evaluate(_number: int) -> dict[str, float]:
        write_weights(model.state_dict(), options.out)  # an interrupted run leaves its latest state
        model.eval()
        recall = data.recall(model, seeds=scenes.VALIDATION_SEEDS)
        figures = {
            "R@1, validation scenes": recall["R@1"],
            "zero-shot top-1": data.zero_shot(model),
        }
        model.train()
        return figures

    return training.train(
        step, evaluate, model=model.train(), adam=adam, options=options, warmup=WARMUP
    )


def contrast(images: Tensor, texts: Tensor, *, labels: Tensor, scale: Tensor) -> Tensor:
    """Returns the loss of P photographs and S scenes against C class texts and S captions.

    Every image is classified among all texts, and every caption among all images. Class texts are
    not classified, since several photographs match each of them.

    Args:
        images: (P + S, E) unit vectors.
        texts: (C + S, E) unit vectors.
        labels: (P,) class of each photograph.
        scale: factor of the cosines, a scalar.
    """
    photographs, pairs = len(labels), len(images) - len(labels)
    classes = len(texts) - pairs
    diagonal = torch.arange(pairs, device=images.device)
    logits = scale * images @ texts.T  # (P + S, C + S)
    return (
        F.cross_entropy(logits[:photographs], labels, label_smoothing=0.1)
        + 0.5 * F.cross_entropy(logits[photographs:], classes + diagonal)
        + 0.5 * F.cross_entropy(logits[:, classes:].T, photographs + diagonal)
    )


def measure(model: CLIP, data: ClipData) -> dict[str, dict[str, Any]]:
    """Measures the card's figures on scenes of `TEST_SEEDS`, which training does not use.

    Figures with a tolerance are the headlines that `verify` measures again.
    """
    test, unseen = data.recall(model), data.recall(model, vocabulary=scenes.UNSEEN)
    among = "text→image R@{} among 1,000 drawn {} scenes"
    zero_shot = "zero-shot top-1 on tiny_imagenet_64/validation, 200 class names"
    return {
        "scene_recall": figure(among.format(1, "test"), test["R@1"], 0.01),
        "scene_recall_at_5": figure(among.format(5, "test"), test["R@5"]),
        "unseen_recall": figure(among.format(1, "UNSEEN"), unseen["R@1"]),
        "zero_shot": figure(zero_shot, data.zero_shot(model), 0.01),
    }


def write_card(config: dict[str, Any], out: Path) -> None:
    """Writes the card of an encoder from its `config.json`."""
    figures = {key: 100 * figure["value"] for key, figure in config["figures"].items()}
    text = CARD_TEXT.format(
        **config["training"],
        **figures,
        megabytes=(out / WEIGHTS).stat().st_size / 1e6,
        vocabulary=config["architecture"]["text_cfg"]["vocab_size"],
        table=training.curve_table(config["training"]["curve"]),
        licence=training.DATA_LICENCE,
        scenes_licence=training.SCENES_LICENCE.format(**config["training"]),
    )
    write_text(out / CARD, text)


CARD_TEXT = """# nano/clip

CLIP for pictures of 64×64 and short English texts. The vision tower has patches of 8, width 224 and
8 blocks, the text tower width 128, 4 blocks and context 48. The shared space has 128 dimensions.
The file has {megabytes:.2f} MB in fp16. It loads as `open_clip.CLIP`, and with the same weights as
`transformers.CLIPModel`. The byte-level BPE of {vocabulary:,} tokens (`tokenizer.json`, lower case)
was trained on the same data; the end token has the highest id.

| held out | figure |
|---|---:|
| text→image R@1 among 1,000 drawn scenes (chance 0.1 %) | {scene_recall:.1f} % |
| text→image R@5 among the same | {scene_recall_at_5:.1f} % |
| text→image R@1 among 1,000 `UNSEEN` scenes: new shapes, colours, wording | {unseen_recall:.1f} % |
| zero-shot top-1 on `tiny_imagenet_64/validation`, 200 names (chance 0.5 %) | {zero_shot:.1f} % |

`mmadapters zoo verify nano/clip --data FOLDER` measures the first and the last again.

## Training
{steps:,} steps of {batch_size:,} photographs and {scene_batch_size:,} drawn scenes, seed {seed}:
{seconds:,} s, or {total_seconds:,} s with drawing and decoding, on {machine}. The command is

    python -m mmadapters.tasks.zoo.pretrain clip --data FOLDER --out FOLDER

A GPU adds in no fixed order, so the seed repeats the recipe, not every digit of the figures. Two
CPU cores would take about two days, estimated from single steps.

The vision tower starts from `nano/vit`, whose supervised pretraining saw the same photographs and
labels. Here their captions are the class names in templates. The classes of the zero-shot figure
are therefore classes of the training set; its photographs are new, its words are not.

{table}

The weights are those of the last step; nothing was chosen by the curve.

Data:
{licence}
{scenes_licence}

## Not good for
Texts other than class names and descriptions of drawn shapes, since its English is a few hundred
words. Pictures with detail beyond 64×64. Shapes, colours and wordings that it has not seen: see the
third row. Use it to learn and test adapters for image-text models, not to search or judge real
pictures.
"""
