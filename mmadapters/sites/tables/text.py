"""Text encoders of transformers: tower `text`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..spec import Architecture, SublayerSpec, TableRow, TowerSpec
from .huggingface import below, if_sdpa, path_of, token_ids

NO_PROMPTS = (
    "its blocks take a mask or position biases made for the given tokens alone, so that an "
    "appended token would not fit them"
)


def post_norm_layer(*, attention: str | None, crossed: bool = False) -> Mapping[str, SublayerSpec]:
    """Returns the sublayers of BERT's layer, which RoBERTa and BLIP's text models share.

    Each sublayer ends in an `output` module that maps, drops out, adds and norms. The branch is the
    output of its dropout, and the residual stream is the input of the sublayer.

    Args:
        attention: the path of the module that prefix tuning can enter; None if there is none.
        crossed: the layer has cross-attention.
    """

    def attends(path: str, inside: str | None) -> SublayerSpec:
        return SublayerSpec(
            output=f"{path}.output.dropout",
            residual=path,
            input=path,
            attention=inside,
            norm=f"{path}.output.LayerNorm",
            post_norm=True,
            leaves={
                "q": f"{path}.self.query",
                "k": f"{path}.self.key",
                "v": f"{path}.self.value",
                "o": f"{path}.output.dense",
            },
        )

    ffn = SublayerSpec(
        output="output.dropout",
        residual="intermediate",
        input="intermediate",
        norm="output.LayerNorm",
        post_norm=True,
        leaves={"up": "intermediate.dense", "down": "output.dense"},
    )
    if not crossed:
        return {"attn": attends("attention", attention), "ffn": ffn}
    return {
        "attn": attends("attention", attention),
        "cross": attends("crossattention", None),
        "ffn": ffn,
    }


def bert_example(model: Any) -> tuple[tuple, dict]:
    """Returns four random tokens (1, L), or (1, 2, L) of two choices for a multiple-choice head."""
    vocabulary = model.config.vocab_size
    if path_of(model, "BertForMultipleChoice", "RobertaForMultipleChoice") == "":
        return (), {"input_ids": token_ids(model, vocabulary, 1, 2, 4)}
    return (), {"input_ids": token_ids(model, vocabulary, 1, 4)}


def _bert(model: Any) -> Iterable[Architecture]:
    path = path_of(model, "BertEncoder", "RobertaEncoder")
    assert path is not None
    # transformers 4 adds relative positions to the scores itself.
    positions = getattr(model.config, "position_embedding_type", "absolute")
    attention = if_sdpa(model, "attention.self") if positions == "absolute" else None
    tower = TowerSpec(
        name="text",
        blocks=below(path, "layer"),
        sublayers=post_norm_layer(attention=attention),
        prompts=NO_PROMPTS,
    )
    yield Architecture(towers=(tower,), example=bert_example, library="transformers")


def t5_example(model: Any) -> tuple[tuple, dict]:
    """Returns four random tokens (1, L), and two for the decoder if there is one."""
    vocabulary = model.config.vocab_size
    inputs = {"input_ids": token_ids(model, vocabulary, 1, 4)}
    if getattr(model, "decoder", None) is not None:
        inputs["decoder_input_ids"] = token_ids(model, vocabulary, 1, 2)
    return (), inputs


def _t5(model: Any) -> Iterable[Architecture]:
    stack = getattr(model, "encoder", None)
    if stack is None:
        raise ValueError(
            f"{type(model).__name__} does not hold T5's encoder itself; init the T5EncoderModel, "
            "T5Model or T5ForConditionalGeneration inside it"
        )
    gated = model.config.is_gated_act
    dense = "layer.1.DenseReluDense"
    up = {"gate": f"{dense}.wi_0", "up": f"{dense}.wi_1"} if gated else {"up": f"{dense}.wi"}
    attn = SublayerSpec(
        output="layer.0.dropout",
        residual="layer.0.layer_norm",
        input="layer.0.SelfAttention",
        # A key without a position would need a position bias that T5 does not have.
        attention=None,
        norm="layer.0.layer_norm",
        leaves={role: f"layer.0.SelfAttention.{role}" for role in "qkvo"},
    )
    ffn = SublayerSpec(
        output="layer.1.dropout",
        residual="layer.1.layer_norm",
        input=dense,
        norm="layer.1.layer_norm",
        leaves={**up, "down": f"{dense}.wo"},
    )
    tower = TowerSpec(
        name="text",
        blocks="encoder.block",
        sublayers={"attn": attn, "ffn": ffn},
        norm="encoder.final_layer_norm",
        prompts=NO_PROMPTS,
    )
    yield Architecture(towers=(tower,), example=t5_example, library="transformers")


ROWS: tuple[TableRow, ...] = (
    TableRow(
        classes=(
            "transformers.models.bert.modeling_bert.BertPreTrainedModel",
            "transformers.models.roberta.modeling_roberta.RobertaPreTrainedModel",
        ),
        architectures=_bert,
    ),
    TableRow(classes=("transformers.models.t5.modeling_t5.T5PreTrainedModel",), architectures=_t5),
)
