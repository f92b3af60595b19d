"""BLIP: padding changes no answer, ranking and generation against brute force."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from families import blip as family
from families.small import hooks, randomise
from families.tokenizers import word_tokenizer
from torch import Tensor, nn

import mmadapters
from mmadapters import AdapterModel, LoRAConfig, SeqBnConfig
from mmadapters.tasks.config.schema import BackboneConfig
from mmadapters.tasks.encoders.blip import BlipAnswerer, BlipMatcher, mend_cross_attention
from mmadapters.tasks.encoders.blip_text import BlipTokenizer, BlipTokens, blip_tokenizer

WORDS = ["what", "is", "this", "the", "red", "blue", "two", "cats", "dog", "'", "t", "don", "?"]
START, END, PAD = 1, 2, 0
SHORT, LONG = 4, 9  # tokens of the two questions
TOLERANCE = 1e-4


def adapted(build: Callable[[], nn.Module] = family.hf_blip_vqa) -> AdapterModel:
    """A small BLIP with random adapters in all its towers, whose answers depend on the question."""
    backbone = build()
    for name, parameter in backbone.named_parameters():
        if "text_decoder" in name and "crossattention.output.dense" in name:
            parameter.data.mul_(20)
        elif "text_decoder" in name and re.search(r"crossattention.self.(query|key).weight", name):
            parameter.data.mul_(10)
    model = mmadapters.init(backbone)
    model.add_adapter("a", SeqBnConfig(size=4))
    randomise(model.adapter("a"))
    model.set_active_adapters("a")
    return model


def pixels(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(4))


def questions() -> Tensor:
    """(2, LONG): the first is padded."""
    ids = torch.randint(8, family.VOCABULARY, (2, LONG), generator=torch.Generator().manual_seed(3))
    ids[0, SHORT:] = PAD
    return ids


def answers() -> Tensor:
    """(5, 4): of different lengths; the second and third begin alike."""
    rows = [[9, END, PAD], [10, 11, END], [10, 12, END], [13, END, PAD], [14, 15, END]]
    return torch.tensor([[START, *row] for row in rows])


@pytest.fixture(scope="module")
def answerer() -> BlipAnswerer:
    return BlipAnswerer(adapted())


@torch.no_grad()
def beside_and_alone(answerer: BlipAnswerer) -> tuple[tuple, tuple]:
    """The first question's states and mask, padded beside the second, and alone."""
    images = answerer.image_tokens(pixels())
    states, mask = answerer.question_states(images, questions())
    alone = answerer.question_states(images[:1], questions()[:1, :SHORT])
    return (states[:1], mask[:1]), alone


def test_transformers_forgets_the_mask_and_ours_acts() -> None:
    model = family.hf_blip_vqa()
    states = torch.randn(1, LONG, 32)
    masks = torch.tensor([[1] * SHORT + [0] * (LONG - SHORT)]), torch.ones(1, LONG).long()

    def logits(states: Tensor, mask: Tensor) -> Tensor:
        with torch.no_grad():
            return model.text_decoder(
                answers()[:1], encoder_hidden_states=states, encoder_attention_mask=mask
            ).logits

    padded, full = (logits(states, mask) for mask in masks)
    if torch.equal(padded, full):  # as of 4.57 and 5.23; a later version may mend it itself
        mend_cross_attention(model)
    padded = logits(states, masks[0])
    torch.testing.assert_close(logits(states, masks[1]), full)
    cut = logits(states[:, :SHORT], masks[0][:, :SHORT])
    torch.testing.assert_close(padded, cut, atol=TOLERANCE, rtol=0)
    assert (padded - full).abs().max() > 1e-3


def test_mending_twice_installs_one_hook_and_survives_copies() -> None:
    model = family.hf_blip_vqa()
    mend_cross_attention(model)
    once = hooks(model)
    mend_cross_attention(model)
    assert hooks(model) == once == 4  # two layers of the question's encoder, two of the decoder
    assert hooks(pickle.loads(pickle.dumps(copy.deepcopy(model)))) == once


def test_padded_question_gives_the_same_logits(answerer: BlipAnswerer) -> None:
    beside, alone = beside_and_alone(answerer)
    assert beside[0].shape[1] > alone[0].shape[1]
    with torch.no_grad():
        padded = answerer.logits(*beside, answers()[:1])
        expected = answerer.logits(*alone, answers()[:1])
    torch.testing.assert_close(padded, expected, atol=TOLERANCE, rtol=0)


def test_padded_answers_give_the_same_losses(answerer: BlipAnswerer) -> None:
    _, (states, mask) = beside_and_alone(answerer)
    with torch.no_grad():
        padded = answerer.losses(states.expand(5, -1, -1), mask.expand(5, -1), answers())
        for row, loss in zip(answers(), padded, strict=True):
            alone = answerer.losses(states, mask, row[row != PAD][None])
            torch.testing.assert_close(alone[0], loss, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("beams", [1, 3])
def test_padded_question_generates_the_same_answer(answerer: BlipAnswerer, beams: int) -> None:
    images = pixels(8)
    ids = torch.randint(8, family.VOCABULARY, (8, LONG), generator=torch.Generator().manual_seed(5))
    lengths = torch.tensor([3, 9, 4, 5, 9, 3, 8, 6])
    ids[torch.arange(LONG) >= lengths[:, None]] = PAD
    with torch.no_grad():
        tokens = answerer.image_tokens(images)
        states, mask = answerer.question_states(tokens, ids)
        together = answerer.generate(states, mask, beams=beams, max_tokens=6)
        for row, length in enumerate(lengths.tolist()):
            alone = answerer.question_states(tokens[row : row + 1], ids[row : row + 1, :length])
            expected = answerer.generate(*alone, beams=beams, max_tokens=6)
            got = together[row : row + 1]
            width = max(got.shape[1], expected.shape[1])
            assert torch.equal(_wide(got, width), _wide(expected, width))
    assert len(torch.unique(together, dim=0)) > 3


def _wide(ids: Tensor, width: int) -> Tensor:
    return F.pad(ids, (0, width - ids.shape[1]), value=PAD)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_adapters_learn_the_same_of_padded_questions(checkpointed: bool) -> None:
    """Checkpointed blocks run again in backward, when their masks must act, too."""
    model = adapted()
    model.train_adapter("a")
    answerer = BlipAnswerer(model)
    if checkpointed:
        model.gradient_checkpointing_enable()
    gradients = []
    for ids in (questions()[:1], questions()[:1, :SHORT]):
        model.zero_grad()
        states, mask = answerer.question_states(answerer.image_tokens(pixels(1)), ids)
        answerer.losses(states, mask, answers()[:1]).sum().backward()
        gradients.append([p.grad.clone() for p in model.adapter("a").parameters()])
    for padded, alone in zip(*gradients, strict=True):
        torch.testing.assert_close(padded, alone, atol=1e-4, rtol=1e-3)


def test_gradients_reach_the_adapters_of_every_tower() -> None:
    model = mmadapters.init(family.hf_blip_vqa())
    model.add_adapter("a", LoRAConfig(rank=2, targets=("q", "v")))
    randomise(model.adapter("a"))
    model.train_adapter("a")
    answerer = BlipAnswerer(model)
    states, mask = answerer.question_states(answerer.image_tokens(pixels()), questions())
    answerer.losses(states, mask, answers()[:2]).sum().backward()
    sites = {site for site, module in model.adapter("a").entries() for p in module.parameters()}
    for part in ("vision.blocks.0.attn", "fusion.blocks.1.cross", "decoder.blocks.0.cross"):
        assert any(site.startswith(part) for site in sites), sorted(sites)
    for site, module in model.adapter("a").entries():
        for parameter in module.parameters():
            assert parameter.grad is not None, site
            assert parameter.grad.abs().sum() > 0, site
    assert all(p.grad is None for p in model.backbone.parameters())


def test_losses_are_those_of_transformers() -> None:
    """Of unpadded questions: there its own forward is right."""
    backbone = family.hf_blip_vqa()
    ids, written = questions()[1:], answers()[1:2]
    with torch.no_grad():
        expected = backbone(
            input_ids=ids,
            pixel_values=pixels(1),
            decoder_input_ids=written,
            labels=written.masked_fill(written == PAD, -100),
        ).loss
        answerer = BlipAnswerer(mmadapters.init(backbone))
        states, mask = answerer.question_states(answerer.image_tokens(pixels(1)), ids)
        loss = answerer.losses(states, mask, written)
    counted = (written[:, 1:] != PAD).sum()
    torch.testing.assert_close(loss[0] / counted, expected)


def test_label_smoothing_is_that_of_torch(answerer: BlipAnswerer) -> None:
    _, (states, mask) = beside_and_alone(answerer)
    with torch.no_grad():
        logits = answerer.logits(states, mask, answers()[1:2])
        expected = F.cross_entropy(
            logits[0, :-1], answers()[1, 1:], reduction="sum", label_smoothing=0.1
        )
        loss = answerer.losses(states, mask, answers()[1:2], label_smoothing=0.1)
    torch.testing.assert_close(loss[0], expected)


def log_likelihood(answerer: BlipAnswerer, states: Tensor, mask: Tensor, row: Tensor) -> float:
    """Token by token, each from a decoder run of its own over what stands before it."""
    row = row[row != PAD]
    total = 0.0
    for position in range(1, len(row)):
        logits = answerer.logits(states, mask, row[None, :position])[0, -1]
        total += float(logits.log_softmax(0)[row[position]])
    return total


@torch.no_grad()
def test_ranking_of_all_candidates_is_the_order_of_their_likelihoods(
    answerer: BlipAnswerer,
) -> None:
    states, mask = answerer.question_states(answerer.image_tokens(pixels()), questions())
    likelihoods, order = answerer.rank(states, mask, answers(), count=99)
    for row in range(2):
        one = states[row : row + 1], mask[row : row + 1]
        expected = torch.tensor([log_likelihood(answerer, *one, answer) for answer in answers()])
        assert order[row].tolist() == expected.argsort(descending=True).tolist()
        torch.testing.assert_close(
            likelihoods[row], expected.sort(descending=True).values, atol=1e-4, rtol=0
        )


@torch.no_grad()
def test_ranking_reads_only_the_candidates_that_begin_best(answerer: BlipAnswerer) -> None:
    states, mask = answerer.question_states(answerer.image_tokens(pixels()), questions())
    _, chosen = answerer.rank(states, mask, answers(), count=2)
    for row in range(2):
        one = states[row : row + 1], mask[row : row + 1]
        first = answerer.logits(*one, torch.tensor([[START]]))[0, 0].log_softmax(0)
        best = first[answers()[:, 1]].topk(2).indices
        assert sorted(chosen[row].tolist()) == sorted(best.tolist())


@torch.no_grad()
def test_ranking_in_parts_is_ranking_at_once(
    answerer: BlipAnswerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    states, mask = answerer.question_states(answerer.image_tokens(pixels()), questions())
    whole = answerer.rank(states, mask, answers(), count=4)
    monkeypatch.setattr("mmadapters.tasks.encoders.blip.LOGITS_AT_A_TIME", 3 * 4 * 40)
    parts = answerer.rank(states, mask, answers(), count=4)
    torch.testing.assert_close(parts[0], whole[0])
    assert torch.equal(parts[1], whole[1])


@torch.no_grad()
def test_greedy_generation_takes_the_likeliest_token_each_time(answerer: BlipAnswerer) -> None:
    _, (states, mask) = beside_and_alone(answerer)
    expected = torch.tensor([[START]])
    while expected.shape[1] < 7 and expected[0, -1] != END:
        best = answerer.logits(states, mask, expected)[:, -1].argmax(dim=-1)
        expected = torch.cat([expected, best[None]], dim=1)
    assert torch.equal(answerer.generate(states, mask, max_tokens=6), expected)


@torch.no_grad()
def test_beam_search_finds_the_likeliest_answer_where_it_covers_all(answerer: BlipAnswerer) -> None:
    """Two tokens and as many beams as there are tokens: nothing is pruned."""
    _, (states, mask) = beside_and_alone(answerer)
    found = answerer.generate(states, mask, beams=family.VOCABULARY, max_tokens=2)
    scores = {}
    for pair in itertools.product(range(family.VOCABULARY), repeat=2):
        ids = torch.tensor([[START, *pair]])
        if pair[0] == END:
            ids = ids[:, :2]
        key = tuple(ids[0].tolist())
        if key not in scores:
            logits = answerer.logits(states, mask, ids)[0].log_softmax(-1)
            picked = logits[torch.arange(len(key) - 1), torch.tensor(key[1:])]
            scores[key] = float(picked.sum()) / (len(key) - 1)  # transformers' length penalty
    assert tuple(t for t in found[0].tolist() if t != PAD) == max(scores, key=scores.__getitem__)


@torch.no_grad()
def test_lm_head_stands_in_place_of_the_decoders_own(answerer: BlipAnswerer) -> None:
    _, (states, mask) = beside_and_alone(answerer)
    own = answerer.encoder.backbone.text_decoder.cls
    other = copy.deepcopy(own)
    randomise(other, std=0.5)
    before = answerer.logits(states, mask, answers()[:1])
    with_other = answerer.logits(states, mask, answers()[:1], lm_head=other)
    assert (before - with_other).abs().max() > 0.1
    written = answerer.generate(states, mask, max_tokens=3, lm_head=other)
    first = answerer.logits(states, mask, written[:, :1], lm_head=other)[0, 0].argmax()
    assert written[0, 1] == first
    assert torch.equal(before, answerer.logits(states, mask, answers()[:1]))
    assert torch.equal(
        answerer.logits(states, mask, answers()[:1], lm_head=copy.deepcopy(own)), before
    )


def test_matching_and_contrastive_features_are_those_of_transformers() -> None:
    backbone = family.hf_blip_retrieval()
    ids = questions()[1:]
    with torch.no_grad():
        itm = backbone(input_ids=ids, pixel_values=pixels(1)).itm_score
        itc = backbone(input_ids=ids, pixel_values=pixels(1), use_itm_head=False).itm_score
        matcher = BlipMatcher(mmadapters.init(backbone))
        image_tokens = matcher.image_tokens(pixels(1))
        image, text = matcher.images(pixels(1)), matcher.texts(ids)
        torch.testing.assert_close(matcher.match(image_tokens, ids), itm)
        torch.testing.assert_close(F.cosine_similarity(image, text), itc[:, 0])
    assert image.shape == text.shape == (1, matcher.width)
    assert torch.equal(matcher.images_of(image_tokens), image)


@torch.no_grad()
def test_padded_texts_match_and_embed_the_same() -> None:
    matcher = BlipMatcher(adapted(family.hf_blip_retrieval))
    image_tokens = matcher.image_tokens(pixels())
    ids, alone = questions(), questions()[:1, :SHORT]
    torch.testing.assert_close(
        matcher.match(image_tokens, ids)[:1],
        matcher.match(image_tokens[:1], alone),
        atol=TOLERANCE,
        rtol=0,
    )
    torch.testing.assert_close(matcher.texts(ids)[:1], matcher.texts(alone), atol=TOLERANCE, rtol=0)


def test_another_model_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"BlipForQuestionAnswering \(hf/blip-vqa\)"):
        BlipAnswerer(mmadapters.init(family.hf_blip_retrieval()))
    with pytest.raises(ValueError, match=r"BlipForImageTextRetrieval \(hf/blip-retrieval\)"):
        BlipMatcher(mmadapters.init(family.hf_blip_vqa()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return word_tokenizer(tmp_path_factory.mktemp("tokenizer"), WORDS)


@pytest.fixture
def tokenizer(folder: Path) -> BlipTokenizer:
    config = BackboneConfig(name="hf/blip-vqa", processor=str(folder))
    return blip_tokenizer(config, BlipTokens.of(family.hf_blip_vqa()))


def test_tokens_of_questions_and_answers(tokenizer: BlipTokenizer) -> None:
    assert tokenizer(["red dog", "blue"]).tolist() == [[3, 9, 13, 2], [3, 10, 2, 0]]
    assert tokenizer.answers(["red dog", "blue"]).tolist() == [[1, 9, 13, 2], [1, 10, 2, 0]]
    # The small config has no [ENC]: [CLS] begins a question, as transformers' processor has it.
    assert torch.equal(tokenizer.with_image(["red dog"]), tokenizer(["red dog"]))
    assert tokenizer.count("what is this ?") == 6


def test_answers_are_decoded_to_what_they_were(tokenizer: BlipTokenizer) -> None:
    texts = ["two cats", "red", "don't"]
    assert tokenizer.decode(tokenizer.answers(texts)) == texts


def test_long_texts_are_cut_to_the_encoders_context(tokenizer: BlipTokenizer) -> None:
    ids = tokenizer([" ".join(["red"] * 40)])
    assert ids.shape == (1, 16)
    assert ids[0, -1] == END


def test_questions_begin_with_enc_where_blip_appended_it() -> None:
    config = transformers.BlipConfig()
    model = nn.Module()
    model.config = config
    tokens = BlipTokens.of(model)
    assert (tokens.start, tokens.encode, tokens.end, tokens.pad) == (30522, 30523, 102, 0)


def test_tokenizer_that_cannot_be_found_says_what_to_set(tmp_path: Path, folder: Path) -> None:
    tokens = BlipTokens.of(family.hf_blip_vqa())
    with pytest.raises(ValueError, match=r"set backbone\.processor"):
        blip_tokenizer(BackboneConfig(name="hf/blip-vqa"), tokens)
    with pytest.raises(ValueError, match="no tokenizer could be loaded"):
        blip_tokenizer(BackboneConfig(name="hf/blip-vqa", processor=str(tmp_path)), tokens)
    small = dataclasses.replace(tokens, vocabulary=10)
    with pytest.raises(ValueError, match=f"has {len(WORDS) + 5} tokens"):
        blip_tokenizer(BackboneConfig(name="hf/blip-vqa", processor=str(folder)), small)
