"""BLIP's captions: losses and generation beside BLIP's own, and the same in every batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families.small import randomise
from torch import Tensor

import mmadapters
from mmadapters import DoubleSeqBnConfig, IA3Config, LoRAConfig, MethodConfig, ParBnConfig
from mmadapters.tasks.captioning.model import CaptioningModel
from mmadapters.tasks.captioning.task import CaptioningTask
from mmadapters.tasks.data.examples import Collate, Examples
from mmadapters.tasks.encoders.blip_captioner import BlipCaptioner

from .conftest import Fluent, SceneRows, made

METHODS: dict[str, MethodConfig] = {
    "double_seq_bn": DoubleSeqBnConfig(reduction_factor=8),
    "par_bn": ParBnConfig(reduction_factor=8),
    "lora": LoRAConfig(rank=4, targets=("q", "v")),
    "ia3": IA3Config(),
}
SEARCHES = {"greedy": {"beams": 1}, "beams": {"beams": 3, "length_penalty": 1.3}}


def adapted(fluent: Fluent, method: MethodConfig) -> tuple[CaptioningTask, CaptioningModel]:
    """The BLIP that writes captions, with a random adapter that changes them."""
    task, model = made(fluent[0].config, None, method=method, backbone=copied(fluent))
    torch.manual_seed(1)
    with torch.no_grad():
        # A rescaling must be large to change words that were learned by heart.
        randomise(model.encoder.adapter("scenes"), std=2.0 if method == IA3Config() else 0.5)
    return task, model.eval()


def copied(fluent: Fluent) -> torch.nn.Module:
    """Its encoder's weights, without what was inserted."""
    config = fluent[0].config.backbone
    backbone = mmadapters.load_backbone(config.name, **config.options)
    backbone.load_state_dict(fluent[1].encoder.backbone.state_dict())
    return backbone


def batch_of(task: CaptioningTask, rows: Any, *numbers: int) -> dict[str, Any]:
    batch = Collate(task)([Examples(task, rows, train=True)[number] for number in numbers]).batch
    assert batch is not None
    return batch


def loss(model: CaptioningModel, batch: dict[str, Any]) -> Tensor:
    return model(**batch)["loss"]


def pixels(task: CaptioningTask, rows: SceneRows) -> Tensor:
    return torch.stack([task.pixels(image) for image in rows["image"]])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@torch.no_grad()
def test_the_loss_of_a_caption_is_the_one_that_blip_gives(
    smoothing: float, fluent: Fluent, one: SceneRows
) -> None:
    config = fluent[0].config.model_copy(
        update={"loss": type(fluent[0].config.loss)(label_smoothing=smoothing)}
    )
    task, model = made(config, one, backbone=copied(fluent))
    model.eval()
    backbone: Any = model.encoder.backbone
    backbone.text_decoder.label_smoothing = smoothing
    batch = batch_of(task, one, 3)
    labels = batch["tokens"].clone()
    labels[:, : len(task.prompt)] = -100
    expected = backbone(
        pixel_values=batch["pixels"],
        input_ids=batch["tokens"],
        attention_mask=torch.ones_like(batch["tokens"]),
        labels=labels,
    ).loss
    torch.testing.assert_close(loss(model, batch), expected)


@torch.no_grad()
def test_padding_changes_no_loss(fluent: Fluent, several: SceneRows) -> None:
    """Rows of captions of different lengths, in one batch and alone."""
    task, model = adapted(fluent, METHODS["double_seq_bn"])
    numbers = range(len(several))
    together = batch_of(task, several, *numbers)
    assert (together["tokens"] == task.state["text"]["pad"]).any()
    states = model.captioner.image_tokens(together["pixels"])
    sums, counts = model.likelihoods(states, together["tokens"], together["image_of"])
    for number in numbers:
        alone = batch_of(task, several, number)
        states = model.captioner.image_tokens(alone["pixels"])
        own, count = model.likelihoods(states, alone["tokens"], alone["image_of"])
        torch.testing.assert_close(own[0], sums[number], rtol=1e-4, atol=1e-4)
        assert count[0] == counts[number]


def test_a_batch_in_parts_gives_the_gradient_of_the_whole(
    fluent: Fluent, several: SceneRows
) -> None:
    """As gradients are accumulated, and averaged over processes."""
    task, model = adapted(fluent, METHODS["double_seq_bn"])
    trained = [p for p in model.parameters() if p.requires_grad]
    whole = loss(model, batch_of(task, several, 0, 1, 2, 3))
    parts = [loss(model, batch_of(task, several, *some)) / 2 for some in ((0, 1), (2, 3))]
    torch.testing.assert_close(sum(parts), whole)
    for one, other in zip(
        torch.autograd.grad(whole, trained), torch.autograd.grad(sum(parts), trained), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_checkpointed_blocks_give_the_same_gradient(fluent: Fluent, several: SceneRows) -> None:
    task, model = adapted(fluent, METHODS["double_seq_bn"])
    trained = [p for p in model.parameters() if p.requires_grad]
    batch = batch_of(task, several, 0, 1)
    expected = torch.autograd.grad(loss(model, batch), trained)
    model.encoder.set_grad_checkpointing(True)
    for one, other in zip(
        expected, torch.autograd.grad(loss(model.train(), batch), trained), strict=True
    ):
        torch.testing.assert_close(one, other)
    assert model.eval().generate(model.captioner.image_tokens(batch["pixels"])).shape[0] == 2


def test_the_prompt_is_given_and_not_learned(fluent: Fluent, one: SceneRows) -> None:
    task, model = made(fluent[0].config, one, backbone=copied(fluent))
    batch = batch_of(task, one, 0)
    prompt = task.tokenizer.source("a picture of", add_special_tokens=False).input_ids
    assert batch["tokens"][0, 1 : len(task.prompt)].tolist() == prompt
    seen: list[Tensor] = []
    hook = model.encoder.backbone.text_decoder.register_forward_hook(  # type: ignore[union-attr]
        lambda module, args, output: seen.append(output.logits)
    )
    value = loss(model, batch)
    hook.remove()
    (gradient,) = torch.autograd.grad(value, seen[0])
    learned = gradient[0].abs().sum(dim=1) > 0
    # What stands behind the prompt is foretold from its last token on, and nothing from [SEP].
    expected = [len(task.prompt) - 1 <= place < len(learned) - 1 for place in range(len(learned))]
    assert learned.tolist() == expected


@pytest.mark.parametrize("prompt", ["a picture of", ""])
def test_generation_is_the_one_of_blip(prompt: str, fluent: Fluent, one: SceneRows) -> None:
    data = fluent[0].config.data.model_copy(update={"prompt": prompt})
    config = fluent[0].config.model_copy(update={"data": data})
    task, model = made(config, one, backbone=copied(fluent))
    model.eval()
    images = pixels(task, one)
    backbone: Any = model.encoder.backbone
    begun = task.tokenizer([prompt]).expand(len(images), -1).clone()  # [CLS] prompt [SEP]
    for options in SEARCHES.values():
        expected = backbone.generate(
            pixel_values=images,
            input_ids=begun.clone(),
            attention_mask=torch.ones_like(begun),
            num_beams=options["beams"],
            max_new_tokens=24,
            do_sample=False,
            **({"length_penalty": 1.3} if options["beams"] > 1 else {}),
        )
        ours = model.captioner.generate(
            model.captioner.image_tokens(images), task.prompt, max_tokens=24, **options
        )
        assert torch.equal(ours, expected[:, len(task.prompt) :])


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("method", METHODS)
def test_a_caption_is_the_same_alone_in_a_batch_and_without_a_cache(
    method: str, search: str, fluent: Fluent, one: SceneRows
) -> None:
    task, model = adapted(fluent, METHODS[method])
    images = pixels(task, one)

    def written(some: Tensor, **options: Any) -> list[str]:
        states = model.captioner.image_tokens(some)
        found = model.captioner.generate(
            states, task.prompt, max_tokens=24, **SEARCHES[search], **options
        )
        return task.tokenizer.decode(found)

    together = written(images)
    assert len(set(together)) > 1
    assert together == [written(image[None])[0] for image in images]
    assert together == written(images, use_cache=False)


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_changes_what_is_written(method: str, fluent: Fluent, one: SceneRows) -> None:
    task, model = adapted(fluent, METHODS[method])
    images = pixels(task, one)

    def written() -> list[str]:
        return task.tokenizer.decode(model.generate(model.captioner.image_tokens(images)))

    changed = written()
    model.encoder.set_active_adapters(None)
    plain = written()
    assert plain == fluent[0].tokenizer.decode(
        fluent[1].generate(fluent[1].captioner.image_tokens(images))
    )
    assert changed != plain


def test_options_of_the_search_act(fluent: Fluent, one: SceneRows) -> None:
    task, model = fluent
    states = model.captioner.image_tokens(pixels(task, one))

    def written(**options: Any) -> Tensor:
        return model.captioner.generate(states, task.prompt, **options)

    assert written(max_tokens=3).shape[1] == 3
    assert (written(min_tokens=20, max_tokens=24)[:, :19] != task.state["text"]["end"]).all()
    for row in written(no_repeat_ngram=1, max_tokens=24).tolist():
        row = [token for token in row if token != task.state["text"]["pad"]]
        assert len(set(row)) == len(row)
    assert not torch.equal(
        written(repetition_penalty=1e3, max_tokens=10), written(max_tokens=10)[:, :10]
    )


def test_generation_stops_where_the_decoders_positions_end(fluent: Fluent, one: SceneRows) -> None:
    task, model = fluent
    other = copy.copy(model)
    other.decoding = model.decoding.model_copy(update={"max_tokens": 500, "min_tokens": 500})
    states = model.captioner.image_tokens(pixels(task, one)[:1])
    positions = task.state["text"]["context_length"]
    assert other.generate(states).shape[1] == positions - len(task.prompt)


def test_other_models_are_refused(one: SceneRows) -> None:
    from families import blip

    encoder = mmadapters.init(blip.hf_blip_vqa())
    with pytest.raises(ValueError, match="needs a BlipForConditionalGeneration"):
        BlipCaptioner(encoder)
