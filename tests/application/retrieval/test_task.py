"""Retrieval from rows to scores, on nano/clip and on a small BLIP."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import blip as blip_family
from families.tokenizers import word_tokenizer
from families.vision_language import CLIP_FAMILIES
from PIL import Image
from pydantic import ValidationError
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import BlipImageProcessor

import mmadapters
from mmadapters import GatedCrossAttentionConfig, LoRAConfig, SeqBnConfig
from mmadapters.tasks.core.errors import BadRow
from mmadapters.tasks.data.examples import Collate, Examples
from mmadapters.tasks.retrieval.gallery import Gallery
from mmadapters.tasks.retrieval.metrics import TO_IMAGE, TO_TEXT
from mmadapters.tasks.retrieval.model import RetrievalModel
from mmadapters.tasks.retrieval.task import RetrievalTask, captions_of, image_id
from mmadapters.tasks.training.evaluate import evaluate

from .conftest import SceneRows, job, task_and_model


def records_of(task: RetrievalTask, model: RetrievalModel, rows: Any, size: int = 16) -> list[dict]:
    return evaluate(task, model, rows, batch_size=size).records


def trained(task: RetrievalTask, model: RetrievalModel, rows: Any, steps: int, rate: float) -> list:
    """The losses of a plain loop."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    loader = DataLoader(
        Examples(task, rows, train=True), batch_size=16, shuffle=True, collate_fn=Collate(task)
    )
    losses: list[float] = []
    while len(losses) < steps:
        for loaded in loader:
            loss = model(**loaded.batch)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    model.eval()
    return losses[:steps]


@pytest.fixture(scope="module")
def records(zero_shot: tuple[RetrievalTask, RetrievalModel], known: SceneRows) -> list[dict]:
    return records_of(*zero_shot, known)


def test_nano_clip_finds_scenes_of_words_that_it_knows(
    zero_shot: tuple[RetrievalTask, RetrievalModel], records: list[dict]
) -> None:
    scores = zero_shot[0].score(records, bootstrap=100)
    assert scores.metrics[0].name == "mean R@1"
    assert scores["text-to-image R@1"].value > 0.9
    assert scores["image-to-text R@1"].value > 0.9
    assert scores["text-to-image R@1"].count == 120
    assert scores["image-to-text R@1"].count == 40


def test_embeddings_are_the_encoders_own(records: list[dict], known: SceneRows) -> None:
    from mmadapters.zoo import image_transform, load_nano, load_tokenizer

    record = records[3]
    clip, transform = load_nano("nano/clip"), image_transform("nano/clip")
    with torch.no_grad():
        image = clip.encode_image(transform(known[3]["image"])[None], normalize=True)
        texts = clip.encode_text(load_tokenizer("nano/clip")(known[3]["captions"]), normalize=True)
    np.testing.assert_allclose(record["image"], image[0], atol=1e-5)
    np.testing.assert_allclose(record["texts"], texts, atol=1e-5)


def test_a_record_is_the_same_whatever_its_batch(
    zero_shot: tuple[RetrievalTask, RetrievalModel], records: list[dict], known: SceneRows
) -> None:
    task, model = zero_shot
    examples = Examples(task, known, train=False)
    for number in range(4):
        loaded = Collate(task)([examples[number]])
        with torch.no_grad():
            (one,) = task.records(model, loaded.batch)
        other = records[number]
        np.testing.assert_allclose(one["image"], other["image"], atol=2e-6)
        np.testing.assert_allclose(one["texts"], other["texts"], atol=2e-6)
        assert one["image_id"] == other["image_id"]


def test_training_teaches_words_and_shapes_that_were_unknown(unseen: SceneRows) -> None:
    task, model = task_and_model(job(), unseen)
    before = task.score(records_of(task, model, unseen), bootstrap=0)["mean R@1"].value
    losses = trained(task, model, unseen, steps=24, rate=3e-3)
    after = task.score(records_of(task, model, unseen), bootstrap=0)["mean R@1"].value
    assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4])
    assert after > before + 0.15


def test_every_trained_tensor_gets_a_gradient_and_the_encoder_none(unseen: SceneRows) -> None:
    task, model = task_and_model(job(head={"projection": "bottleneck"}), unseen)
    loaded = Collate(task)([Examples(task, unseen, train=True)[n] for n in range(8)])
    # From the second step on: a map that begins at zero hides what is before it.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "logit" not in name:
                parameter.add_(0.01 * torch.randn_like(parameter))
    model(**loaded.batch)["loss"].backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name
    assert model.encoder.backbone.logit_scale.requires_grad is False


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_the_loss_is_float32_under_autocast(unseen: SceneRows, precision: torch.dtype) -> None:
    task, model = task_and_model(job(), unseen)
    loaded = Collate(task)([Examples(task, unseen, train=True)[n] for n in range(8)])
    plain = model(**loaded.batch)["loss"]
    with torch.autocast("cpu", precision):
        loss = model(**loaded.batch)["loss"]
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain, rtol=0.1, atol=0.1)


def test_the_sigmoid_loss_trains_with_a_bias_of_its_own(unseen: SceneRows) -> None:
    task, model = task_and_model(job(loss={"kind": "sigmoid"}), unseen)
    assert model.head.logit_bias.item() == -10
    losses = trained(task, model, unseen, steps=8, rate=1e-3)
    assert np.mean(losses[-2:]) < 0.9 * np.mean(losses[:2])
    assert model.head.logit_bias.item() != -10


def test_siglip_keeps_its_own_bias_and_temperature() -> None:
    family = next(f for f in CLIP_FAMILIES if f.name == "hf-siglip")
    encoder = mmadapters.init(family.build())
    own = encoder.backbone.logit_bias, encoder.backbone.logit_scale
    head = RetrievalModel(encoder, job(loss={"kind": "sigmoid"})).head
    assert (head.logit_bias.item(), head.logit_scale.item()) == tuple(t.item() for t in own)
    assert head.logit_bias is not own[0]
    assert RetrievalModel(encoder, job()).head.logit_bias is None


def test_chunks_change_no_gradient(unseen: SceneRows) -> None:
    gradients = []
    for size in (None, 3):
        task, model = task_and_model(job(loss={"chunk_size": size}), unseen)
        loaded = Collate(task)([Examples(task, unseen, train=True)[n] for n in range(8)])
        model(**loaded.batch)["loss"].backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-4 * scale + 1e-8)


def test_a_row_draws_one_caption_in_training_and_keeps_all_in_evaluation(known: SceneRows) -> None:
    task, _ = task_and_model(job(), known, adapter=False)
    training, evaluation = (Examples(task, known, train=train) for train in (True, False))
    assert len(evaluation[0]["tokens"]) == 3
    drawn = {tuple(training[0, seed]["tokens"][0].tolist()) for seed in range(30)}
    assert drawn == {tuple(ids.tolist()) for ids in evaluation[0]["tokens"]}
    again = [training[0, 7]["tokens"] for _ in range(2)]
    assert torch.equal(*again)


def test_random_crops_are_drawn_by_the_seed_and_only_in_training(known: SceneRows) -> None:
    config = job(data={"source": "builtin/scenes", "random_crop": 0.5})
    task, _ = task_and_model(config, known, adapter=False)
    training, evaluation = (Examples(task, known, train=train) for train in (True, False))
    assert torch.equal(training[0, 1]["pixels"], training[0, 1]["pixels"])
    assert not torch.equal(training[0, 1]["pixels"], training[0, 2]["pixels"])
    assert torch.equal(evaluation[0]["pixels"], task.pixels(known[0]["image"]))


def test_rows_of_one_picture_are_told_by_its_bytes_or_by_a_column(tmp_path: Path) -> None:
    picture, other = (Image.new("RGB", (8, 8), color) for color in ("red", "blue"))
    path, copied = tmp_path / "a.png", tmp_path / "b.png"
    picture.save(path)
    copied.write_bytes(path.read_bytes())
    same = [{"image": str(path)}, {"image": str(copied)}, {"image": {"bytes": path.read_bytes()}}]
    assert len({image_id(row) for row in same}) == 1
    assert image_id({"image": picture}) == image_id({"image": picture.copy()})
    assert image_id({"image": picture}) != image_id({"image": other})
    assert image_id({"image": picture, "image_id": ""}) == image_id({"image": picture})
    named = [{"image": picture, "image_id": 7}, {"image": other, "image_id": "7"}]
    assert len({image_id(row) for row in named}) == 1
    assert 0 <= image_id(named[0]) < 2**63


@pytest.mark.parametrize(
    ("row", "captions"),
    [
        ({"caption": " a dog "}, ["a dog"]),
        ({"captions": ["a dog", "", None, "a cat"]}, ["a dog", "a cat"]),
        ({"caption": "a dog", "captions": ["a cat"]}, ["a dog", "a cat"]),
        ({"captions": "a dog"}, ["a dog"]),
        ({"caption": ["a dog", "a cat"]}, ["a dog", "a cat"]),
        ({"caption": "", "captions": ["a cat"]}, ["a cat"]),
    ],
)
def test_captions_are_one_or_several(row: dict[str, Any], captions: list[str]) -> None:
    assert captions_of(row) == captions


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"caption": "  "}, "there is no caption"),
        ({"caption": None, "captions": []}, "there is no caption"),
        ({"caption": 7}, "not text"),
        ({"captions": ["a", 3.5]}, "not text"),
    ],
)
def test_a_row_without_a_caption_is_bad(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        captions_of(row)


def test_broken_pictures_are_bad_rows(tmp_path: Path, known: SceneRows) -> None:
    task, _ = task_and_model(job(), known, adapter=False)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG no picture")
    for value in (str(broken), str(tmp_path / "missing.png"), None):
        with pytest.raises(BadRow):
            task.example({"image": value, "caption": "a dog"}, train=False)


def test_without_captions_there_is_no_task(known: SceneRows) -> None:
    rows = copy.copy(known)
    rows.columns = {name: known.columns[name] for name in ("image", "things")}
    with pytest.raises(ValueError, match=r"data\.columns.*image, things"):
        RetrievalTask(job()).fit(rows, mmadapters.load_backbone("nano/clip"))


def test_captions_beyond_the_context_are_reported(known: SceneRows) -> None:
    task, _ = task_and_model(job(), known, adapter=False)
    rows = copy.copy(known)
    rows.columns = {**known.columns, "captions": [*known.columns["captions"]]}
    rows.columns["captions"][2] = ["a star", "a large red star " * 20]
    rows.columns["captions"][3] = []
    (problem,) = task.check(rows)
    assert problem.index == 2
    assert "cut to the 48" in problem.reason


def test_templates_are_put_around_captions_and_must_have_a_place(known: SceneRows) -> None:
    config = job(data={"source": "builtin/scenes", "template": "a drawing of {}"})
    task, _ = task_and_model(config, known, adapter=False)
    plain, _ = task_and_model(job(), known, adapter=False)
    assert torch.equal(task.tokens(["a {red} star"]), plain.tokens(["a drawing of a {red} star"]))
    for template in ("a drawing", "{} and {}", "{caption}"):
        with pytest.raises(ValidationError, match="template holds"):
            job(data={"source": "builtin/scenes", "template": template})


def test_accumulation_is_refused_and_chunks_are_offered() -> None:
    with pytest.raises(ValidationError, match=r"loss\.chunk_size"):
        job(trainer={"accumulation": 2})


def test_head_mode_needs_something_to_train() -> None:
    with pytest.raises(ValidationError, match=r"head\.projection"):
        job(trainer={"mode": "head"}, head={"projection": "none"})
    assert job(trainer={"mode": "head"}).head.projection == "linear"


def test_groups_divide_the_queries_and_leave_the_gallery_whole(
    records: list[dict], known: SceneRows
) -> None:
    task = RetrievalTask(job(evaluation={"groups": ["things"]}))
    scores = task.score(records, bootstrap=0)
    groups = scores.groups["things"]
    assert set(groups) == set(known["things"])
    for name in ("text-to-image R@1", "image-to-text R@1"):
        parts = [next(m for m in found if m.name == name) for found in groups.values()]
        assert sum(m.count for m in parts) == scores[name].count
        total = sum(m.value * m.count for m in parts)
        assert total == pytest.approx(scores[name].value * scores[name].count)


def test_the_deciding_metric_is_the_configs(records: list[dict]) -> None:
    task = RetrievalTask(job(evaluation={"deciding": "text-to-image R@1"}))
    assert task.metric == "text-to-image R@1"
    assert task.score(records, bootstrap=0).metrics[0].name == task.metric
    assert RetrievalTask.metric == "mean R@1"


def test_a_task_is_built_again_from_its_state_and_pickles(
    zero_shot: tuple[RetrievalTask, RetrievalModel], known: SceneRows
) -> None:
    import json

    task, model = zero_shot
    for again in (
        RetrievalTask(task.config, json.loads(json.dumps(task.state))),
        pickle.loads(pickle.dumps(task)),
    ):
        expected, found = (t.example(known[0], train=False) for t in (task, again))
        assert torch.equal(expected["tokens"], found["tokens"])
        assert torch.equal(expected["pixels"], found["pixels"])
    assert isinstance(again.build(model.encoder), RetrievalModel)


def test_pictures_of_the_report_are_png_and_say_among_how_many(
    zero_shot: tuple[RetrievalTask, RetrievalModel], records: list[dict], known: SceneRows
) -> None:
    task, model = zero_shot
    figures = task.illustrate(model, known, records, count=8)
    assert len(figures) >= 2
    for figure in figures:
        assert figure.image.startswith(b"\x89PNG")
        assert "The first 5 of " in figure.caption


def test_the_table_names_the_texts_that_went_worst(
    zero_shot: tuple[RetrievalTask, RetrievalModel], records: list[dict]
) -> None:
    (table,) = zero_shot[0].score(records, bootstrap=0).tables
    ranks = Gallery.of(records).direction(TO_IMAGE).ranks()
    assert [rank for _, rank in table.rows] == (np.sort(ranks)[::-1][:10] + 1).tolist()


def test_adapters_where_nothing_passes_are_refused() -> None:
    coca = mmadapters.init(next(f for f in CLIP_FAMILIES if f.name == "open_clip-coca").build())
    coca.add_adapter("a", SeqBnConfig(size=4))
    with pytest.raises(ValueError, match=r"decoder, fusion of CoCa.*adapter\.sites"):
        RetrievalModel(coca, job())


def test_texts_that_look_at_an_image_are_refused() -> None:
    clip = mmadapters.init(next(f for f in CLIP_FAMILIES if f.name == "hf-clip").build())
    clip.add_adapter("a", GatedCrossAttentionConfig(size=4, heads=1))
    with pytest.raises(
        ValueError, match=r"gated_cross_attention reads the image.*without one: take mma"
    ):
        RetrievalModel(clip, job())


# BLIP: contrastive embeddings, then matching.

WORDS = [f"w{number}" for number in range(30)]


@pytest.fixture(scope="module")
def blip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = word_tokenizer(tmp_path_factory.mktemp("blip"), WORDS)
    BlipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


class Colours(SceneRows):
    """Twelve pictures of one colour each; two captions of two words that say which."""

    def __init__(self) -> None:
        generator = np.random.default_rng(0)
        colours = generator.integers(256, size=(12, 3))
        self.columns = {
            "image": [
                Image.fromarray(np.full((32, 32, 3), colour, dtype=np.uint8)) for colour in colours
            ],
            "captions": [
                [f"w{number} w{20 + number % 3}", f"w{number} w{23 + number % 5} w29"]
                for number in range(12)
            ],
        }


def blip_job(folder: Path, **sections: Any):  # type: ignore[no-untyped-def]
    config = blip_family.config().to_dict()
    options = {
        name: config[name]
        for name in ("text_config", "vision_config", "image_text_hidden_size", "projection_dim")
    }
    backbone = {"name": "hf/blip-retrieval", "options": options, "processor": str(folder)}
    return job(**{"backbone": backbone, "evaluation": {"rerank": 4}, **sections})


def blip_task(folder: Path, **sections: Any) -> tuple[RetrievalTask, RetrievalModel]:
    config = blip_job(folder, **sections)
    torch.manual_seed(0)
    task, backbone = RetrievalTask(config), blip_family.hf_blip_retrieval()
    task.fit(Colours(), backbone)
    encoder = mmadapters.init(backbone)
    encoder.add_adapter("a", SeqBnConfig(size=8))
    encoder.train_adapter("a")
    return task, task.build(encoder)


def test_blip_trains_both_losses_and_reranks_its_candidates(blip_folder: Path) -> None:
    task, model = blip_task(blip_folder)
    rows = Colours()
    loaded = Collate(task)([Examples(task, rows, train=True)[n] for n in range(12)])
    output = model(**loaded.batch)
    torch.testing.assert_close(output["loss"].detach(), output["contrastive"] + output["matching"])
    before = task.score(records_of(task, model, rows), bootstrap=0)["mean R@1"].value
    losses = trained(task, model, rows, steps=40, rate=1e-2)
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    records = records_of(task, model, rows)
    assert task.score(records, bootstrap=0)["mean R@1"].value > before + 0.3


def test_blip_reranks_in_bf16(blip_folder: Path) -> None:
    task, model = blip_task(blip_folder)
    rows = Colours()
    records = evaluate(task, model, rows, batch_size=16, precision="bf16").records
    gallery = Gallery.of(records)
    exact = (gallery.images @ gallery.texts.T).sort(dim=1, descending=True).values[:, :4]
    offered = [gallery.texts[records[n]["to_text"][0]] @ gallery.images[n] for n in range(12)]
    for image, found in enumerate(offered):  # The candidates are the first by exact similarity.
        torch.testing.assert_close(found, exact[image])
    assert {record["to_text"][1].dtype for record in records} == {np.dtype("float32")}


def test_blips_second_stage_scores_candidates_as_pair_by_pair(blip_folder: Path) -> None:
    task, model = blip_task(blip_folder)
    trained(task, model, Colours(), steps=10, rate=1e-2)
    rows = Colours()
    records = records_of(task, model, rows, size=5)
    gallery = Gallery.of(records)
    assert len(gallery.texts) == 24
    matcher = model.matcher
    pixels = torch.stack([task.pixels(image) for image in rows["image"]])

    @torch.no_grad()
    def score(image: int, text: int) -> float:
        """Alone, without any padding."""
        states = matcher.image_tokens(pixels[image : image + 1])
        tokens = task.tokenizer.with_image([gallery.captions[text]])
        logit = matcher.match(states, tokens, itm_head=model.head.itm_head)[0, 1]
        return float(logit + gallery.images[image] @ gallery.texts[text])

    for name, pair in ((TO_TEXT, lambda q, g: (q, g)), (TO_IMAGE, lambda q, g: (g, q))):
        direction = gallery.direction(name)
        similar = direction.queries @ direction.everything.T
        for query in range(0, len(similar), 3):
            reranking = direction.reranking
            chosen = reranking.chosen[query]
            assert set(chosen.tolist()) == set(similar[query].topk(4).indices.tolist())
            expected = [score(*pair(query, g)) for g in chosen.tolist()]
            np.testing.assert_allclose(reranking.scores[query], expected, atol=1e-4)


def test_processes_share_the_second_stage(blip_folder: Path) -> None:
    task, model = blip_task(blip_folder, evaluation={"rerank": 0})
    model.eval()
    rows = Colours()
    records = records_of(task, model, rows)
    stage = task.matching_stage(model, rows)
    given = (records, Gallery.of(records), np.arange(0, 12 * 24, 5))
    with torch.no_grad():
        whole = stage.scores(*given, rank=0, world=1)
        shares = [stage.scores(*given, rank=rank, world=2) for rank in range(2)]
    assert np.all(whole != 0)
    assert all(0 < np.count_nonzero(share) < len(whole) for share in shares)
    np.testing.assert_allclose(shares[0] + shares[1], whole, atol=1e-5)


def test_without_reranking_blip_ranks_by_embeddings(blip_folder: Path) -> None:
    task, model = blip_task(blip_folder, evaluation={"rerank": 0})
    records = records_of(task, model, Colours())
    assert "to_image" not in records[0]
    assert Gallery.of(records).direction(TO_IMAGE).reranking is None


def test_padding_does_not_change_blips_embeddings(blip_folder: Path) -> None:
    task, model = blip_task(blip_folder)
    model.eval()
    texts = ["w1", "w1 w2 w3 w4 w5 w6"]
    with torch.no_grad():
        together = model.texts(task.tokens(texts))
        alone = torch.cat([model.texts(task.tokens([text])) for text in texts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_blip_in_chunks_has_the_gradient_of_the_whole_batch(blip_folder: Path) -> None:
    gradients = []
    for size in (None, 4):
        task, model = blip_task(blip_folder, loss={"chunk_size": size})
        loaded = Collate(task)([Examples(task, Colours(), train=True)[n] for n in range(12)])
        torch.manual_seed(3)  # which negatives are drawn
        model.double()
        batch = {**loaded.batch, "pixels": loaded.batch["pixels"].double()}
        model(**batch)["loss"].backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any("itm_head" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-8)


def test_blips_matching_can_be_left_out(blip_folder: Path) -> None:
    config = blip_job(blip_folder, loss={"matching": 0}, evaluation={"rerank": 0})
    task, encoder = RetrievalTask(config), mmadapters.init(blip_family.hf_blip_retrieval())
    task.fit(Colours(), encoder.backbone)
    encoder.add_adapter("a", LoRAConfig(rank=2, sites=("fusion",)))
    with pytest.raises(ValueError, match=r"fusion of Blip.*adapter\.sites"):
        task.build(encoder)
    encoder.delete_adapter("a")
    model = task.build(encoder)
    assert model.head.itm_head is None
    loaded = Collate(task)([Examples(task, Colours(), train=True)[n] for n in range(12)])
    assert set(model(**loaded.batch)) == {"loss", "contrastive"}


def test_unit_vectors_stay_unit_vectors(unseen: SceneRows) -> None:
    task, model = task_and_model(job(), unseen)
    with torch.no_grad():
        model.head.image.up.weight.normal_()
    example = Examples(task, unseen, train=False)[0]
    with torch.no_grad():
        (record,) = task.records(model, Collate(task)([example]).batch)
    assert np.linalg.norm(record["image"]) == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(
        F.normalize(torch.from_numpy(record["texts"]), dim=1), torch.from_numpy(record["texts"])
    )


@pytest.mark.parametrize("name", ["image-to-text R@5", "loss"])
def test_the_config_chooses_what_decides(name: str) -> None:
    task = RetrievalTask(job(evaluation={"deciding": name}))
    assert task.deciding == name
    assert task.metric == ("mean R@1" if name == "loss" else name)
    with pytest.raises(ValueError, match="deciding"):
        job(evaluation={"deciding": "WER"})
