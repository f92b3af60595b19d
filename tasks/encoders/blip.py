"""BLIP of transformers: matching images with texts, and answering questions about images.

transformers' own forward functions are not used here. They give the decoder's cross-attention a
mask that it ignores (4.57 and 5.x alike) and, in `generate`, a mask of ones over the question, so
that the padding of a question changes its answer. `mend_cross_attention` lets the mask act, and the
calls below say what is padding. Adapters act, as each module is called as it stands.

Shape legend: B images or questions, N image tokens, L question tokens, M answers, T answer tokens,
D width, E width of the shared space, V vocabulary of the tokenizer.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmadapters import AdapterModel

from ..config.schema import BackboneConfig
from ..core.errors import first_line

IGNORED = -100  # a label that counts nothing
LOGITS_AT_A_TIME = 2**26  # numbers of (M, T, V) held at once when answers are ranked


@dataclass(frozen=True)
class BlipTokens:
    """What a BLIP's text models read: ids of their special tokens and limits. JSON-ready by
    `asdict`.

    `start` begins an answer ([DEC]), `end` closes it, `encode` begins a text that is read together
    with an image ([ENC]); None where the vocabulary has no such token and [CLS] stands for it.
    """

    context_length: int
    vocabulary: int
    pad: int
    start: int
    end: int
    encode: int | None

    @classmethod
    def of(cls, backbone: nn.Module) -> BlipTokens:
        """As the encoder's config says.

        BLIP appends [DEC] and [ENC] to BERT's tokens and was trained with [ENC] in place of [CLS]
        before questions and before texts to match (salesforce/BLIP, models/blip_vqa.py). The
        config of transformers names only [DEC], as its `bos_token_id`.
        """
        text: Any = backbone.config.text_config  # type: ignore[union-attr]
        appended = text.bos_token_id + 2 == text.vocab_size
        return cls(
            context_length=text.max_position_embeddings,
            vocabulary=text.vocab_size,
            pad=text.pad_token_id,
            start=text.bos_token_id,
            end=text.sep_token_id,
            encode=text.vocab_size - 1 if appended else None,
        )

    def to_dict(self) -> dict[str, int | None]:
        return asdict(self)


class BlipTokenizer:
    """Texts -> token ids, padded to the longest of the call.

    Args:
        source: a tokenizer of transformers.
        length: longer texts are cut to so many tokens.
    """

    def __init__(self, source: Any, tokens: BlipTokens, *, length: int | None = None) -> None:
        self.source = source
        self.tokens = tokens
        self.length = min(length or tokens.context_length, tokens.context_length)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(B, L) int64: [CLS] text [SEP]."""
        ids = self.source(
            list(texts), padding=True, truncation=True, max_length=self.length, return_tensors="pt"
        ).input_ids
        # The tokenizer's own padding token may have another id than the config's.
        if self.source.pad_token_id != self.tokens.pad:
            ids = ids.masked_fill(ids == self.source.pad_token_id, self.tokens.pad)
        return ids

    def with_image(self, texts: Sequence[str]) -> Tensor:
        """(B, L) int64 of texts that are read together with an image: [ENC] text [SEP]."""
        return self._begun(texts, self.tokens.encode)

    def answers(self, texts: Sequence[str]) -> Tensor:
        """(M, T) int64 of texts that the decoder writes: [DEC] text [SEP]."""
        return self._begun(texts, self.tokens.start)

    def _begun(self, texts: Sequence[str], first: int | None) -> Tensor:
        ids = self(texts)
        if first is not None:
            ids[:, 0] = first
        return ids

    def count(self, text: str) -> int:
        """How many tokens the whole text has, start and end included."""
        return len(self.source(text, verbose=False).input_ids)

    def decode(self, ids: Tensor) -> list[str]:
        """(M, T) ids as the decoder writes them -> texts, without special tokens."""
        special = {self.tokens.pad, self.tokens.start, self.tokens.end, self.tokens.encode}
        plain = [[token for token in row if token not in special] for row in ids.tolist()]
        return [
            self.source.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=True)
            for row in plain
        ]


def blip_tokenizer(
    config: BackboneConfig, tokens: BlipTokens, *, length: int | None = None
) -> BlipTokenizer:
    """The tokenizer of `config.processor`, or of the hub name or folder in the backbone's name, or
    that of a nano encoder.

    Raises:
        ValueError: none is known or found, or it does not fit the encoder.
    """
    from transformers import AutoTokenizer

    library, _, name = config.name.partition("/")
    if config.processor is None and library == "nano":
        from mmadapters.zoo import load_tokenizer

        return BlipTokenizer(load_tokenizer(config.name, library="hf"), tokens, length=length)
    if config.processor is None and (library != "hf" or "/" not in name):
        raise ValueError(
            f"nothing says which tokenizer {config.name!r} reads: set backbone.processor to the "
            "folder or hub name of one (Salesforce/blip-vqa-base)"
        )
    place = config.processor or name
    try:
        source = AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise ValueError(
            f"no tokenizer could be loaded from {place!r} (backbone.processor names another): "
            f"{reason}"
        ) from error
    if len(source) > tokens.vocabulary:
        raise ValueError(
            f"the tokenizer {place!r} has {len(source)} tokens and the encoder only "
            f"{tokens.vocabulary}: set backbone.processor to the one that it was trained with"
        )
    return BlipTokenizer(source, tokens, length=length)


def mend_cross_attention(backbone: nn.Module) -> None:
    """Lets the mask of BLIP's cross-attentions act; without a mask nothing changes. Idempotent.

    transformers passes it on as the mask of the text itself, which a cross-attention does not
    read. The hooks hold no state, so that they also act when checkpointed blocks run again, and
    stay on the encoder.
    """
    for name, module in backbone.named_modules():
        mended = _give_mask in module._forward_pre_hooks.values()
        if name.endswith(".crossattention.self") and not mended:
            module.register_forward_pre_hook(_give_mask, with_kwargs=True)


def _give_mask(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    if kwargs.get("encoder_attention_mask") is None:
        kwargs["encoder_attention_mask"] = kwargs.get("attention_mask")
    return args, kwargs


class BlipMatcher:
    """Matching of images and texts by a BlipForImageTextRetrieval. Holds no parameters.

    Attributes:
        width: E.
        logit_scale: the logarithm of the inverse temperature with which BLIP's contrastive training
            begins (0.07); transformers keeps none in the model.

    Raises:
        ValueError: the encoder is another model.
    """

    def __init__(self, encoder: AdapterModel) -> None:
        require_blip(encoder, "BlipForImageTextRetrieval", "hf/blip-retrieval")
        mend_cross_attention(encoder.backbone)
        self.encoder = encoder
        self.backbone = cast(Any, encoder.backbone)
        self.tokens = BlipTokens.of(encoder.backbone)
        self.width: int = self.backbone.vision_proj.out_features
        self.logit_scale = torch.tensor(-math.log(0.07))

    def image_tokens(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, N, D), a class token first."""
        return image_tokens_of(self.encoder, pixels)

    def images(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> contrastive features (B, E), not of unit length."""
        return self.images_of(self.image_tokens(pixels))

    def images_of(self, image_tokens: Tensor) -> Tensor:
        """`image_tokens`' (B, N, D) -> contrastive features (B, E), not of unit length."""
        return self.backbone.vision_proj(image_tokens[:, 0])

    def texts(self, tokens: Tensor) -> Tensor:
        """(B, L) of `BlipTokenizer.__call__` -> contrastive features (B, E), not of unit length."""
        states = self.backbone.text_encoder(
            input_ids=tokens, attention_mask=token_mask(tokens, self.tokens), return_dict=True
        ).last_hidden_state
        return self.backbone.text_proj(states[:, 0])

    def match(
        self, image_tokens: Tensor, tokens: Tensor, *, itm_head: nn.Module | None = None
    ) -> Tensor:
        """Logits (B, 2) of "does not match" and "matches", pair by pair.

        Args:
            image_tokens: (B, N, D) of `image_tokens`.
            tokens: (B, L) of `BlipTokenizer.with_image`.
            itm_head: stands in place of the encoder's own last layer.
        """
        states = self.backbone.text_encoder(
            input_ids=tokens,
            attention_mask=token_mask(tokens, self.tokens),
            encoder_hidden_states=image_tokens,
            return_dict=True,
        ).last_hidden_state
        return (itm_head or self.backbone.itm_head)(states[:, 0])


class BlipAnswerer:
    """Answers by a BlipForQuestionAnswering. Holds no parameters.

    `lm_head` of the functions below stands in place of the decoder's own last layers, which may be
    trained as a copy while the encoder stays as it is.

    Raises:
        ValueError: the encoder is another model.
    """

    def __init__(self, encoder: AdapterModel) -> None:
        require_blip(encoder, "BlipForQuestionAnswering", "hf/blip-vqa")
        mend_cross_attention(encoder.backbone)
        self.encoder = encoder
        self.backbone = cast(Any, encoder.backbone)
        self.tokens = BlipTokens.of(encoder.backbone)

    def image_tokens(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, N, D)."""
        return image_tokens_of(self.encoder, pixels)

    def question_states(self, image_tokens: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Questions read together with their images: states (B, L, D) and their mask (B, L).

        Args:
            image_tokens: (B, N, D).
            tokens: (B, L) of `BlipTokenizer.with_image`.
        """
        mask = token_mask(tokens, self.tokens)
        states = self.backbone.text_encoder(
            input_ids=tokens,
            attention_mask=mask,
            encoder_hidden_states=image_tokens,
            return_dict=True,
        ).last_hidden_state
        return states, mask

    def logits(
        self, states: Tensor, mask: Tensor, answers: Tensor, *, lm_head: nn.Module | None = None
    ) -> Tensor:
        """What the decoder expects after each token of an answer: (M, T, V) float32.

        Args:
            states, mask: (M, L, D) and (M, L) of the question of each answer.
            answers: (M, T) of `BlipTokenizer.answers`.
        """
        decoder = self.backbone.text_decoder
        hidden = decoder.bert(
            input_ids=answers,
            attention_mask=token_mask(answers, self.tokens),
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
            is_decoder=True,
            use_cache=False,
            return_dict=True,
        ).last_hidden_state
        return (lm_head or decoder.cls)(hidden).float()

    def losses(
        self,
        states: Tensor,
        mask: Tensor,
        answers: Tensor,
        *,
        lm_head: nn.Module | None = None,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """(M,): the negative log-likelihood of each answer, its end token included.

        `label_smoothing`: of torch's cross-entropy; 0.1 in BLIP's training.
        """
        logits = self.logits(states, mask, answers, lm_head=lm_head)
        labels = answers.masked_fill(answers == self.tokens.pad, IGNORED)[:, 1:]
        losses = F.cross_entropy(
            logits[:, :-1].transpose(1, 2),
            labels,
            ignore_index=IGNORED,
            reduction="none",
            label_smoothing=label_smoothing,
        )
        return losses.sum(dim=1)

    def rank(
        self,
        states: Tensor,
        mask: Tensor,
        candidates: Tensor,
        *,
        count: int,
        lm_head: nn.Module | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The candidates with the most likely first token, by the likelihood of all their tokens.

        As BLIP answers (Li et al. 2022, §5.3). With `count` of at least M the order is exactly that
        of all candidates' likelihoods.

        Args:
            states, mask: (B, L, D) and (B, L) of the questions.
            candidates: (M, T) of `BlipTokenizer.answers`.
            count: K, how many are read to their end.

        Returns:
            Log-likelihoods (B, K), the greatest first, and the candidates' numbers (B, K).
        """
        count = min(count, len(candidates))
        first = self.logits(
            states, mask, candidates[:1, :1].expand(len(states), -1), lm_head=lm_head
        )
        first = first[:, 0].log_softmax(dim=-1)[:, candidates[:, 1]]
        chosen = first.topk(count, dim=1).indices  # (B, K)
        question = torch.arange(len(states), device=states.device).repeat_interleave(count)
        answers = candidates[chosen.flatten()]  # (B·K, T)
        step = max(1, LOGITS_AT_A_TIME // (candidates.shape[1] * self.tokens.vocabulary))
        likelihoods = torch.cat(
            [
                -self.losses(states[rows], mask[rows], part, lm_head=lm_head)
                for rows, part in zip(question.split(step), answers.split(step), strict=True)
            ]
        ).view(len(states), count)
        likelihoods, order = likelihoods.sort(dim=1, descending=True, stable=True)
        return likelihoods, chosen.gather(1, order)

    @torch.no_grad()
    def generate(
        self,
        states: Tensor,
        mask: Tensor,
        *,
        beams: int = 1,
        max_tokens: int = 10,
        lm_head: nn.Module | None = None,
    ) -> Tensor:
        """Answers (B, T) in the tokenizer's ids, [DEC] first, padded; greedily, or by beam search.

        Args:
            states, mask: (B, L, D) and (B, L) of the questions.
            max_tokens: the most tokens after [DEC].
        """
        decoder = self.backbone.text_decoder
        start = torch.full((len(states), 1), self.tokens.start, device=states.device)
        with _in_place_of(decoder.cls, lm_head):
            return decoder.generate(
                input_ids=start,
                attention_mask=torch.ones_like(start),
                encoder_hidden_states=states,
                encoder_attention_mask=mask,
                num_beams=beams,
                do_sample=False,
                max_new_tokens=max_tokens,
                eos_token_id=self.tokens.end,
                pad_token_id=self.tokens.pad,
            )


def is_blip(backbone: nn.Module) -> bool:
    """Whether the encoder is one of transformers' BLIP models."""
    return any(
        kind.__module__.startswith("transformers.models.blip.") for kind in type(backbone).__mro__
    )


@contextlib.contextmanager
def _in_place_of(module: nn.Module, other: nn.Module | None) -> Iterator[None]:
    """Inside the block `module` gives what `other` would give."""
    if other is None:
        yield
        return
    handle = module.register_forward_hook(lambda _, args, output: other(*args))
    try:
        yield
    finally:
        handle.remove()


def require_blip(encoder: AdapterModel, kind: str, name: str) -> None:
    """Raises a ValueError unless the encoder is BLIP's class `kind`, which `name` builds."""
    found = type(encoder.backbone)
    if not is_blip(encoder.backbone) or found.__name__ != kind:
        raise ValueError(f"this needs a {kind} ({name}), not a {found.__name__}")


def image_tokens_of(encoder: AdapterModel, pixels: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, N, D), a class token first."""
    backbone = cast(Any, encoder.backbone)
    return backbone.vision_model(pixel_values=pixels, return_dict=True).last_hidden_state


def token_mask(tokens: Tensor, special: BlipTokens) -> Tensor:
    """(B, L) ids -> (B, L) int64, 0 where padding stands."""
    return (tokens != special.pad).long()
