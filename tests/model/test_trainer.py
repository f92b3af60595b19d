"""transformers' `Trainer` with an `AdapterModel`, as it comes; and `state_dict` in training."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from families.small import filled, output, small_vit
from safetensors.torch import load, load_file, save
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
    default_data_collator,
)
from transformers.utils.generic import find_labels

from mmadapters import AdapterModel, BottleneckConfig, LoRAConfig, init

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
IMAGE = {"image_size": 16, "patch_size": 8}
TEXT = {"vocab_size": 32, "max_position_embeddings": 16}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def pixels() -> torch.Tensor:
    return torch.randn(3, 16, 16)


def tokens(length: int = 6) -> torch.Tensor:
    return torch.randint(3, 30, (length,))


def vit() -> tuple[nn.Module, list[dict]]:
    config = transformers.ViTConfig(**SIZES, **IMAGE, num_labels=3)
    rows = [{"pixel_values": pixels(), "labels": number % 3} for number in range(4)]
    return transformers.ViTForImageClassification(config), rows


def wav2vec2() -> tuple[nn.Module, list[dict]]:
    config = transformers.Wav2Vec2Config(
        **SIZES,
        vocab_size=32,
        conv_dim=(8, 8),
        conv_kernel=(10, 3),
        conv_stride=(5, 2),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        mask_time_prob=0.0,
    )
    rows = [{"input_values": torch.randn(400), "labels": tokens()} for _ in range(4)]
    return transformers.Wav2Vec2ForCTC(config), rows


def clip() -> tuple[nn.Module, list[dict]]:
    config = transformers.CLIPConfig(
        text_config={**SIZES, **TEXT, **IDS},
        vision_config={**SIZES, **IMAGE},
        projection_dim=8,
    )
    rows = [{"pixel_values": pixels(), "input_ids": tokens()} for _ in range(4)]
    return transformers.CLIPModel(config), rows


def blip() -> tuple[nn.Module, list[dict]]:
    config = transformers.BlipConfig(
        text_config={**SIZES, **TEXT, **IDS, "encoder_hidden_size": 16, "sep_token_id": 2},
        vision_config={**SIZES, **IMAGE},
    )
    rows = []
    for _ in range(4):
        ids = tokens()
        rows.append({"pixel_values": pixels(), "input_ids": ids, "labels": ids})
    return transformers.BlipForConditionalGeneration(config), rows


def whisper() -> tuple[nn.Module, list[dict]]:
    config = transformers.WhisperConfig(
        vocab_size=32,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_mel_bins=8,
        max_source_positions=10,
        max_target_positions=16,
        decoder_start_token_id=1,
        **IDS,
    )
    rows = [{"input_features": torch.randn(8, 20), "labels": tokens()} for _ in range(4)]
    return transformers.WhisperForConditionalGeneration(config), rows


def t5() -> tuple[nn.Module, list[dict]]:
    config = transformers.T5Config(
        vocab_size=32,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    rows = [{"input_ids": tokens(), "labels": tokens()} for _ in range(4)]
    return transformers.T5ForConditionalGeneration(config), rows


def bert() -> tuple[nn.Module, list[dict]]:
    config = transformers.BertConfig(**SIZES, **TEXT, pad_token_id=0)
    rows = []
    for _ in range(4):
        ids = tokens()
        rows.append({"input_ids": ids, "labels": ids})
    return transformers.BertForMaskedLM(config), rows


MAKERS = [vit, wav2vec2, clip, blip, whisper, t5, bert]


def built(make: Callable[[], tuple[nn.Module, list[dict]]]) -> tuple[AdapterModel, list[dict]]:
    """A model of equal weights at every call, whose adapter is trained, and rows for it.

    One column is of no use to the model.
    """
    torch.manual_seed(0)
    backbone, rows = make()
    model = init(backbone)
    model.add_adapter("a", LoRAConfig(rank=2))
    model.train_adapter("a")
    return model, [{**row, "file": f"{number}.png"} for number, row in enumerate(rows)]


def pairs(rows: list[dict]) -> dict[str, Any]:
    """A batch of a CLIP, which computes its loss only if it is asked for it."""
    return {**default_data_collator(rows), "return_loss": True}


def trainer(model: nn.Module, rows: list[dict], folder: Path, **options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "load_best_model_at_end": True,
        "learning_rate": 0.01,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return Trainer(
        model,
        TrainingArguments(str(folder), **{**settings, **options}),
        train_dataset=rows,  # type: ignore[arg-type]
        eval_dataset=rows,  # type: ignore[arg-type]
        data_collator=pairs if "return_loss" in signature(model) else None,
    )


def signature(model: nn.Module) -> list[str]:
    return list(inspect.signature(model.forward).parameters)


def adapters_of(model: AdapterModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.adapters.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("make", MAKERS)
def test_trainer_trains_evaluates_keeps_the_best_and_resumes(make: Any, tmp_path: Path) -> None:
    model, rows = built(make)
    fresh = adapters_of(model)
    run = trainer(model, rows, tmp_path / "run")
    run.train()
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert len(losses) == 2
    assert not same(adapters_of(model), fresh)
    assert abs(run.evaluate()["eval_loss"] - min(losses)) < 1e-5
    for step in (1, 2):
        stored = load_file(tmp_path / f"run/checkpoint-{step}/model.safetensors")
        assert stored.pop("_extra_state").dtype == torch.uint8
        assert stored.keys() == {f"adapters.{name}" for name in fresh}
    trained = load_file(tmp_path / "run/checkpoint-2/model.safetensors")
    # As after a crash at step 1, in another process.
    other, _ = built(make)
    again = trainer(other, rows, tmp_path / "again", load_best_model_at_end=False)
    again.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-1"))
    assert again.state.global_step == 2
    for name, tensor in adapters_of(other).items():
        assert torch.allclose(tensor, trained[f"adapters.{name}"], atol=1e-6)


def test_the_signature_is_the_encoders_and_copies_keep_it() -> None:
    model, rows = built(vit)
    bare, _ = vit()
    assert signature(model) == signature(bare)
    assert isinstance(model, AdapterModel)
    batch = default_data_collator(rows)["pixel_values"]
    model.eval()
    with torch.no_grad():
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert type(other) is type(model)
            assert signature(other) == signature(bare)
            assert torch.equal(other(batch).logits, model(batch).logits)
    # `Trainer` takes the labels of such models from positions, by the name of their class.
    question = transformers.BertForQuestionAnswering(transformers.BertConfig(**SIZES, **TEXT))
    assert find_labels(init(question).__class__) == ["start_positions", "end_positions"]


def test_a_new_classifier_is_in_the_checkpoint_and_resumes(tmp_path: Path) -> None:
    def five() -> tuple[AdapterModel, list[dict]]:
        model, rows = built(vit)
        model.classifier = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(16), nn.Linear(16, 5))
        model.config.num_labels = model.num_labels = 5
        return model, rows

    model, rows = five()
    assert model.train().classifier.training
    assert not model.vit.training
    assert not model.eval().classifier.training
    trainer(model, rows, tmp_path, load_best_model_at_end=False).train()
    stored = load_file(tmp_path / "checkpoint-2/model.safetensors")
    inside = {key for key in stored if key.startswith("backbone.")}
    assert inside == {f"backbone.classifier.{name}" for name in model.classifier.state_dict()}
    # It stays in the checkpoint when it is no longer trained.
    model.classifier.requires_grad_(False)
    assert inside == {key for key in model.state_dict() if key.startswith("backbone.")}
    other, _ = five()
    assert not other.load_state_dict(stored).missing_keys
    assert same(other.classifier.state_dict(), model.classifier.state_dict())


def test_a_checkpoint_of_another_encoder_is_refused_and_changes_nothing() -> None:
    model, _ = built(vit)
    state = model.state_dict()
    other, _ = built(vit)
    with torch.no_grad():
        other.backbone.classifier.weight.add_(1.0)  # as a head that is random in every process
    before = adapters_of(other)
    with torch.no_grad():
        model.adapters.get_parameter(next(iter(before))).add_(1.0)
    for strict in (True, False):
        with pytest.raises(ValueError, match=r"other values or another dtype in classifier, ") as e:
            other.load_state_dict(model.state_dict(), strict=strict)
        assert "\n" not in str(e.value)
    assert same(adapters_of(other), before)
    damaged = {**state, "_extra_state": torch.zeros(3, dtype=torch.uint8)}
    with pytest.raises(ValueError, match="'_extra_state' of the checkpoint is damaged"):
        model.load_state_dict(damaged)
    del state[next(key for key in state if key.startswith("adapters."))]
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(state)


def test_whole_state_dicts_are_written_without_training_and_always_read() -> None:
    model = filled("lora")
    whole = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert {k for k in whole if k.startswith("backbone.")} == {
        f"backbone.{key}" for key in small_vit().state_dict()
    }
    expected = output(model)
    other = filled("lora")
    other.train_adapter("lora")
    assert not any(key.startswith("backbone.") for key in other.state_dict())
    other.eval()
    other.load_state_dict(whole)
    model.set_active_adapters("lora")
    assert torch.equal(output(other), output(model))
    assert not torch.equal(output(other), expected)
    # Inside another model, as Lightning and DistributedDataParallel have it.
    outer, twin = nn.ModuleDict({"module": other}), nn.ModuleDict({"module": filled("lora")})
    state = outer.state_dict()
    assert "module._extra_state" in state
    assert not any(key.startswith("module.backbone.") for key in state)
    assert not twin.load_state_dict(state).missing_keys


def test_trained_parts_of_the_encoder_and_merged_weights_are_in_the_state_dict() -> None:
    model, _ = built(t5)
    model.shared.requires_grad_(True)  # tied to the embeddings of both stacks and to the output
    state = model.state_dict()
    assert [key for key in state if key.startswith("backbone.")] == ["backbone.shared.weight"]
    other, _ = built(t5)
    with torch.no_grad():
        model.shared.weight.add_(1.0)
    assert not other.load_state_dict(model.state_dict()).missing_keys
    assert torch.equal(other.backbone.lm_head.weight, model.shared.weight)
    assert other.backbone.lm_head.weight is other.backbone.shared.weight


def test_a_merged_model_in_training_is_written_whole_each_tensor_once() -> None:
    def merged() -> AdapterModel:
        model, _ = built(bert)
        for parameter in model.adapter("a").parameters():
            parameter.data.add_(0.1)
        model.add_adapter("b", BottleneckConfig(size=2))
        model.merge_adapter("a")
        model.train_adapter("b")
        return model

    model, other = merged(), merged()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(0.1)
    stored = load(save(model.state_dict()))  # safetensors refuses a tensor of two names
    assert not other.load_state_dict(stored).missing_keys
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two), name


def test_a_part_of_the_encoder_that_was_trained_stays_in_checkpoints_when_frozen() -> None:
    model, _ = built(vit)
    model.classifier.requires_grad_(True)
    model.train_adapter("a")  # a first stage
    model.classifier.requires_grad_(False)
    inside = {key for key in model.state_dict() if key.startswith("backbone.")}
    assert inside == {"backbone.classifier.weight", "backbone.classifier.bias"}
    assert set(model.trained_of_encoder()) == {"classifier.weight", "classifier.bias"}


def test_an_assigned_part_can_be_taken_away_again() -> None:
    model, _ = built(vit)
    model.classifier = nn.Linear(16, 5)
    model.classifier = None
    model.train()
    model.classifier = nn.Linear(16, 5)
    del model.backbone.classifier
    model.train()
    assert not any(key.startswith("backbone.") for key in model.state_dict())


def test_other_keepers_of_checkpoints_know_the_digest() -> None:
    outer = nn.ModuleDict({"module": built(vit)[0]})
    state = get_model_state_dict(outer)
    assert "module._extra_state" in state
    assert not set_model_state_dict(outer, state).missing_keys


def test_a_sequence_trainer_generates_with_the_adapter(tmp_path: Path) -> None:
    model, rows = built(whisper)
    arguments = Seq2SeqTrainingArguments(
        str(tmp_path), predict_with_generate=True, generation_max_length=8, use_cpu=True
    )
    predictor = Seq2SeqTrainer(model, arguments)
    fresh = predictor.predict(rows).predictions  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.adapters.parameters():
            parameter.normal_(std=10.0)
    assert fresh.shape[0] == len(rows)
    trained = predictor.predict(rows).predictions  # type: ignore[arg-type]
    assert trained.shape != fresh.shape or (trained != fresh).any()


def test_resized_embeddings_are_in_the_checkpoint() -> None:
    model, _ = built(bert)
    model.resize_token_embeddings(40)
    state = model.state_dict()
    assert state["backbone.bert.embeddings.word_embeddings.weight"].shape == (40, 16)
    assert "backbone.bert.embeddings.position_embeddings.weight" not in state


def test_adapters_that_share_parameters_are_written_by_trainer(tmp_path: Path) -> None:
    def group() -> AdapterModel:
        torch.manual_seed(0)
        model = init(vit()[0])
        model.add_adapters(["a", "b"], BottleneckConfig(size=2), sharing="half_down")
        model.train_adapter("a")
        return model

    _, rows = built(vit)
    model = group()
    trainer(model, rows, tmp_path).train()
    other = group()
    stored = load_file(tmp_path / "checkpoint-2/model.safetensors")
    assert not other.load_state_dict(stored).missing_keys
    assert same(adapters_of(other), adapters_of(model))
    assert not same(adapters_of(other), adapters_of(group()))
    names = [name.removeprefix("adapters.") for name in stored if name != "_extra_state"]
    assert len(names) < len(adapters_of(model))  # what they share is written once


def test_accelerate_saves_and_loads_what_is_trained(tmp_path: Path) -> None:
    model, _ = built(bert)
    tool = accelerate.Accelerator(cpu=True)
    prepared = tool.prepare(model)
    tool.save_state(str(tmp_path / "state"))
    stored = load_file(tmp_path / "state/model.safetensors")
    assert not any(key.startswith("backbone.") for key in stored)
    before = adapters_of(model)
    with torch.no_grad():
        for parameter in model.adapters.parameters():
            parameter.add_(1.0)
    tool.load_state(str(tmp_path / "state"))
    assert same(adapters_of(prepared), before)


def test_checkpointing_of_trainer_is_ours(tmp_path: Path) -> None:
    model, rows = built(vit)
    plain, _ = built(vit)
    trainer(plain, rows, tmp_path / "plain").train()
    again = trainer(model, rows, tmp_path / "again", gradient_checkpointing=True)
    again.train()
    assert all("forward" in block.module.__dict__ for block in model.sites.blocks())
    for name, tensor in adapters_of(model).items():
        assert torch.allclose(tensor, adapters_of(plain)[name], atol=1e-6)
    model.activation_checkpointing_disable()
    assert not any("forward" in block.module.__dict__ for block in model.sites.blocks())
    with pytest.raises(ValueError, match="leave every_n_layers and offload out"):
        model.activation_checkpointing_enable(every_n_layers=2)


def test_the_digest_is_json_by_child() -> None:
    model, _ = built(vit)
    text = bytes(model.state_dict()["_extra_state"].numpy())
    assert set(json.loads(text)) == {"vit", "classifier"}
