"""The recipe of `nano/blip`: contrast, matching and captions over `nano/vit`, as BLIP is trained.

An hour on two CPU cores that multiply bf16, for the lower vision blocks stay as `nano/vit` has them
and are run once: what they give of each picture is kept in memory, and a step begins there. The
losses are BLIP's (Li et al. 2022, §3.2): image-text contrast with a learnt temperature, image-text
matching with hard negatives drawn by the contrast's similarities, and language modelling with label
smoothing 0.1; text encoder and decoder share all but their self-attention. Left out are the
momentum encoder and its queue, which a batch of different pairs can do without.

Shape legend: P photographs, S scenes, B pairs of both, T image tokens, D width, L text tokens,
E width of the shared space.
"""

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from mmadapters.files import write_text
from mmadapters.zoo import NANO, blip, clip
from mmadapters.zoo import vit as _vit
from mmadapters.zoo.files import CARD, WEIGHTS, read_config, write_config, write_weights

from ...data.synthetic import scenes
from .. import photos
from . import clip as clip_recipe
from . import training
from .training import IMAGE, figure

LEARNT_BLOCKS = 2  # of the vision tower, from its top
RATE, VISION_RATE, WARMUP, WEIGHT_DECAY, SMOOTHING = 1e-3, 3e-4, 200, 0.05, 0.1
EMBED_DIM = 128
TEXT: dict[str, Any] = {
    "hidden_size": 224,
    "encoder_hidden_size": 224,
    "intermediate_size": 448,
    "projection_dim": EMBED_DIM,
    "num_hidden_layers": 3,
    "num_attention_heads": 7,
    "max_position_embeddings": clip_recipe.CONTEXT_LENGTH,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this recipe."""
    training.add_arguments(parser, steps=1_800, batch_size=32)
    parser.add_argument("--scene-batch-size", type=int, default=128)
    parser.add_argument("--scenes", type=int, default=60_000, help="drawn once, used again")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=None)


def run(options: argparse.Namespace) -> None:
    """Train the model; write weights, `config.json` and card."""
    start = time.perf_counter()
    torch.manual_seed(options.seed)
    folder = training.photo_folder(options.data)
    options.out.mkdir(parents=True, exist_ok=True)
    vit = read_config(NANO["nano/vit"].directory)["architecture"]
    tokenizer = clip.load_tokenizer(blip.CLIP, "hf")
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
        "tokenizer": {"context_length": clip_recipe.CONTEXT_LENGTH},
    }
    pictures, captions = clip_recipe.draw(options.scenes, blip.CLIP / clip.TOKENIZER)
    model = Blip(architecture).to(options.device)
    data = Data(folder, pictures, captions, tokenizer=tokenizer, model=model, options=options)
    write_config(config, options.out)
    curve, seconds = pretrain(model, data, options=options)

    config["figures"] = measure(options.out)
    config["training"] = training.record(
        options, curve, seconds=seconds, start=start, more=("scene_batch_size", "scenes")
    )
    write_config(config, options.out)
    write_card(config, options.out)
    print({key: figure["value"] for key, figure in config["figures"].items()}, f"{seconds:.0f} s")


class Blip(nn.Module):
    """What is trained: `nano/vit`, of which the lower blocks stay, text encoder, heads, decoder."""

    def __init__(self, architecture: dict[str, Any]) -> None:
        super().__init__()
        from transformers import BlipForConditionalGeneration, BlipForImageTextRetrieval

        config = blip.config_of(architecture)
        vit = _vit.load(NANO["nano/vit"].directory, "timm")
        assert isinstance(vit, VisionTransformer)
        self.lower = len(vit.blocks) - LEARNT_BLOCKS
        self.vit = vit.requires_grad_(False)
        for part in (*vit.blocks[self.lower :], vit.norm):
            part.requires_grad_(True)
        # PyTorch's fused attention in bf16 on a CPU costs a fifth of a step.
        module: Any
        for module in vit.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
        retrieval = BlipForImageTextRetrieval(config)
        self.text_encoder = retrieval.text_encoder
        self.vision_proj, self.text_proj = retrieval.vision_proj, retrieval.text_proj
        self.itm_head = retrieval.itm_head
        self.text_decoder = BlipForConditionalGeneration(config).text_decoder
        shared = dict(self.text_encoder.named_parameters())
        for name, _ in list(self.text_decoder.bert.named_parameters()):
            if blip.is_shared(name):
                path, _, leaf = name.rpartition(".")
                setattr(self.text_decoder.bert.get_submodule(path), leaf, shared[name])
        output = self.text_decoder.cls.predictions
        output.decoder.weight = shared["embeddings.word_embeddings.weight"]
        output.decoder.bias = output.bias
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(0.07)))

    def begun(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 -> (B, T, D), what enters the first block that is trained."""
        x = self.vit._pos_embed(self.vit.patch_embed(photos.normalise(images, IMAGE)))
        return self.vit.blocks[: self.lower](x)

    def finished(self, states: Tensor) -> Tensor:
        """`begun`'s (B, T, D) -> image tokens (B, T, D)."""
        return self.vit.norm(self.vit.blocks[self.lower :](states))

    def encode(self, tokens: Tensor, images: Tensor | None = None) -> Tensor:
        """(B, L) -> the first token's state (B, D), read alone or together with (B, T, D)."""
        states = self.text_encoder(
            input_ids=tokens,
            attention_mask=(tokens != 0).long(),
            encoder_hidden_states=images,
            return_dict=True,
        ).last_hidden_state
        return states[:, 0]

    def logits(self, tokens: Tensor, images: Tensor) -> Tensor:
        """What the decoder expects behind each of (B, L) tokens: (B, L, V)."""
        hidden = self.text_decoder.bert(
            input_ids=tokens,
            attention_mask=(tokens != 0).long(),
            encoder_hidden_states=images,
            is_decoder=True,
            use_cache=False,
            return_dict=True,
        ).last_hidden_state
        return self.text_decoder.cls(hidden)

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds: see `_blip`."""
        upper = tuple(f"blocks.{n}." for n in range(self.lower, len(self.vit.blocks)))
        vit = self.vit.state_dict()
        found = blip.vision_tensors(
            {k: v for k, v in vit.items() if k.startswith((*upper, "norm."))}
        )
        own = self.state_dict()
        found |= {k: v for k, v in own.items() if k.startswith(blip.MATCHING)}
        bert, output = "text_decoder.bert.", "text_decoder.cls.predictions."
        found |= {k: v for k, v in own.items() if k.startswith(bert) and not blip.is_shared(k)}
        found |= {
            k: v
            for k, v in own.items()
            if k.startswith(output) and not k.startswith(f"{output}decoder.")
        }
        return found


class Data:
    """What a step draws from, in memory.

    Attributes:
        photos, pictures: `Blip.begun` of photographs and scenes, (N, T, D) bf16.
        classes: for each class the numbers of its photographs.
        prompts: (templates, C, L) token ids of the class names. captions: (N, WORDINGS, L).
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
        self.photos = self._begun(model, images, "photographs", options)
        self.pictures = self._begun(model, pictures, "scenes", options)
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
                for template in clip.TEMPLATES
            ]
        )

    def _begun(self, model: Blip, images: Tensor, what: str, options: argparse.Namespace) -> Tensor:
        parts = images.split(256)
        with torch.no_grad(), training.autocast(options.device, bf16=options.bf16):
            return torch.cat(
                [
                    model.begun(part.to(options.device)).to(torch.bfloat16)
                    for part in tqdm(parts, mininterval=5, desc=what)
                ]
            )

    def batches(self, options: argparse.Namespace) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless (states (B, T, D), captions (B, L)): each photograph of another class."""
        drawn = training.shuffled(len(self.pictures), options.scene_batch_size, "cpu")
        for number, s in enumerate(drawn):
            chosen = torch.randperm(len(self.classes))[: options.batch_size].tolist()
            own = [self.classes[c] for c in chosen]
            p = torch.stack([some[torch.randint(len(some), ())] for some in own])
            labels = torch.tensor([self.class_of[c] for c in chosen])
            states = torch.cat([self.photos[p], self.pictures[s]]).float()
            prompts = self.prompts[number % len(self.prompts)][labels]
            wording = number % clip_recipe.WORDINGS
            tokens = torch.cat([prompts, self.captions[s, wording]])
            tokens = tokens[:, : int((tokens != 0).sum(dim=1).max())]
            yield states.to(self.device), tokens.to(self.device)


def pretrain(
    model: Blip, data: Data, *, options: argparse.Namespace
) -> tuple[list[dict[str, float]], float]:
    """Train and write the weights; returns the held-out curve (validation scenes) and the seconds.

    `config.json` is there already: what is evaluated is loaded as it ships.
    """
    text = [model.text_encoder, model.vision_proj, model.text_proj, model.itm_head]
    own = [part for n, part in model.text_decoder.bert.named_modules() if n.endswith(".attention")]
    output = model.text_decoder.cls.predictions
    heads = [output.transform, output.bias, model.logit_scale]
    upper = [*model.vit.blocks[model.lower :], model.vit.norm]
    groups = [(part, RATE) for part in (*text, *own, *heads)]
    groups += [(part, VISION_RATE) for part in upper]
    adam = training.optimiser(groups, weight_decay=WEIGHT_DECAY)
    batches = data.batches(options)
    scene_images, scene_captions = blip.drawn(scenes.VALIDATION_SEEDS, size=IMAGE["size"])

    def step(_number: int) -> Tensor:
        states, tokens = next(batches)
        with training.autocast(options.device, bf16=options.bf16):
            return loss_of(model, states, tokens)

    def evaluate(_number: int) -> dict[str, float]:
        write_weights(model.tensors(), options.out)  # a run that is cut leaves its last state
        found = figures(options.out, scene_images, scene_captions)
        return {
            "R@1, validation scenes": found["embeddings"],
            "after matching": found["matching"],
            "CIDEr / 10": found["cider"] / 10,
        }

    return training.train(
        step, evaluate, model=model.train(), adam=adam, options=options, warmup=WARMUP
    )


def loss_of(model: Blip, states: Tensor, tokens: Tensor) -> Tensor:
    """Contrast + matching + language modelling of B pairs.

    Args:
        states: (B, T, D) of `Blip.begun`.
        tokens: (B, L), start and end token included, padded with zeros.
    """
    images = model.finished(states)
    image = F.normalize(model.vision_proj(images[:, 0]).float(), dim=-1)
    text = F.normalize(model.text_proj(model.encode(tokens)).float(), dim=-1)
    logits = model.logit_scale.exp().clamp(max=100) * image @ text.T  # (B, B)
    own = torch.arange(len(tokens), device=tokens.device)
    contrast = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

    decode, encode = model.text_encoder.config.vocab_size - 2, tokens.clone()
    encode[:, 0] = decode + 1
    with torch.no_grad():
        hard = logits.softmax(dim=1) + 1e-6
        text_of = torch.multinomial(hard.fill_diagonal_(0), 1)[:, 0]
        hard = logits.T.softmax(dim=1) + 1e-6
        image_of = torch.multinomial(hard.fill_diagonal_(0), 1)[:, 0]
    pairs = model.encode(
        torch.cat([encode, encode[text_of], encode]),
        torch.cat([images, images, images[image_of]]),
    )
    labels = (torch.arange(len(pairs), device=pairs.device) < len(own)).long()
    matching = F.cross_entropy(model.itm_head(pairs).float(), labels)

    begun = tokens.clone()
    begun[:, 0] = decode
    expected = model.logits(begun[:, :-1], images).float()
    words = F.cross_entropy(
        expected.transpose(1, 2),
        tokens[:, 1:],
        ignore_index=0,
        label_smoothing=SMOOTHING,
    )
    return contrast + matching + words


def figures(directory: Path, images: Tensor, captions: list[list[str]]) -> dict[str, float]:
    """Recall by embeddings and after matching, and CIDEr, of what a directory holds."""
    retrieval, caption = (blip.load(directory, "hf", kind=kind) for kind in blip.CLASSES)
    states = blip.image_tokens(retrieval, images, image=IMAGE)
    found = blip.recall(retrieval, states, [texts[0] for texts in captions])
    return found | {"cider": blip.caption_score(blip.describe(caption, states), captions)}


def measure(directory: Path) -> dict[str, dict[str, Any]]:
    """The card's figures; the scenes are those of `TEST_SEEDS`, which nothing was trained on."""
    test = figures(directory, *blip.drawn(scenes.TEST_SEEDS, size=IMAGE["size"]))
    unseen = figures(
        directory,
        *blip.drawn(scenes.TEST_SEEDS, size=IMAGE["size"], vocabulary=scenes.UNSEEN),
    )
    among = "text→image R@1 among 1,000 drawn {} scenes, {}"
    by, after = "by embeddings", f"the best {blip.RERANKED} matched"
    cider = "CIDEr of the captions of 1,000 drawn {} scenes, 5 references each"
    return {
        "scene_recall": figure(among.format("test", by), test["embeddings"], 0.01),
        "scene_matching": figure(among.format("test", after), test["matching"], 0.01),
        "scene_cider": figure(cider.format("test"), test["cider"], 0.1),
        "unseen_matching": figure(among.format("UNSEEN", after), unseen["matching"]),
        "unseen_cider": figure(cider.format("UNSEEN"), unseen["cider"]),
    }


def write_card(config: dict[str, Any], out: Path) -> None:
    """Write the card of an encoder from its `config.json`."""
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

BLIP for pictures of 64×64 and short English texts: `nano/vit` below, its upper {learnt} blocks
trained on; text encoder and decoder of 3 layers, width 224 like the vision tower, that share all
but their self-attention; shared space of 128; {megabytes:.2f} MB in fp16 beside `nano/vit`'s.
`nano/blip-retrieval` loads it as `transformers.BlipForImageTextRetrieval`, `nano/blip-caption` as
`transformers.BlipForConditionalGeneration`. The tokenizer is `nano/clip`'s; [DEC] and [ENC] follow
its last token.

| held out | figure |
|---|---:|
| text→image R@1 among 1,000 drawn scenes (chance 0.1 %), by embeddings | {scene_recall:.1f} % |
| the same, the best 16 matched pair by pair | {scene_matching:.1f} % |
| CIDEr of the captions of 1,000 drawn scenes, 5 references each (of 10) | {scene_cider:.2f} |
| R@1 after matching among 1,000 `UNSEEN` scenes (new words) | {unseen_matching:.1f} % |
| CIDEr of the captions of those | {unseen_cider:.2f} |

The first two are what `mmadapters zoo verify nano/blip-retrieval` measures again, the third what
`mmadapters zoo verify nano/blip-caption` does.

## Training
{steps:,} steps of {batch_size:,} photographs and {scene_batch_size:,} drawn scenes, seed {seed}:
{seconds:,} s, and {total_seconds:,} s with drawing, decoding and the lower blocks, on {machine}.
Made by

    python -m mmadapters.tasks.zoo.pretrain blip --bf16 --data FOLDER --out FOLDER

The losses are BLIP's: contrast, matching with hard negatives, captions. The lower vision blocks are
`nano/vit`'s and stay; photographs' captions are their class names in templates.

{table}

The last step ships, whatever the curve.

Data:
{licence}
{scenes_licence}

## Not good for
Any text but class names and descriptions of drawn shapes, any picture with detail beyond 64×64, any
real search or description. Use it to learn and test adapters for BLIP.
"""
