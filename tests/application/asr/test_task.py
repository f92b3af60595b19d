"""Speech recognition from rows to scores: examples, heads, reports of what does not fit, a run."""

from __future__ import annotations

import copy
import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from application.endings import Told, until_error
from families import speech
from torch.utils.data import DataLoader

import mmadapters
from mmadapters.tasks.asr.decoding import Decoded
from mmadapters.tasks.asr.head import own_head, own_vocabulary
from mmadapters.tasks.asr.metrics import counts
from mmadapters.tasks.asr.task import ASRTask, _words
from mmadapters.tasks.asr.text import Vocabulary
from mmadapters.tasks.config.schema import BackboneConfig
from mmadapters.tasks.core.errors import BadRow
from mmadapters.tasks.data.examples import Collate, Examples
from mmadapters.tasks.training.evaluate import evaluate
from mmadapters.tasks.training.trainer import TaskTrainer

from .conftest import SPEECH, config, task_and_model


class Table(list):
    """Rows in memory, as the contract wants them."""

    @property
    def column_names(self) -> list[str]:
        return list(self[0])

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return [row[key] for row in self]
        found = super().__getitem__(key)
        return Table(found) if isinstance(key, slice) else found


def sound(samples: int, *, rate: int = 16_000, seed: int = 0) -> dict[str, Any]:
    """Noise as the bytes of a FLAC file."""
    noise = 0.1 * np.random.default_rng(seed).standard_normal(samples)
    buffer = io.BytesIO()
    soundfile.write(buffer, noise, rate, format="FLAC")
    return {"bytes": buffer.getvalue(), "path": None}


def rows(*pairs: tuple[int, str], **columns: str) -> Table:
    return Table(
        {"audio": sound(samples, seed=i), "text": text, **columns}
        for i, (samples, text) in enumerate(pairs)
    )


def fitted(table: Table | None = None, **sections: Any) -> ASRTask:
    """A task with its head fresh, or the encoder's own without rows."""
    init = "backbone" if table is None else "fresh"
    task = ASRTask(config(**{"head": {"init": init}, **sections}))
    task.fit(table, mmadapters.load_backbone("nano/wav2vec2"))
    return task


def test_a_fresh_vocabulary_holds_the_training_texts_normalised_characters() -> None:
    task = fitted(rows((9000, "Cab!"), (9000, "’bad’ — A")))
    assert task.state["vocabulary"]["tokens"] == ["<pad>", "|", "a", "b", "c", "d"]
    assert json.loads(json.dumps(task.state)) == {
        **task.state,
        "layers": [list(layer) for layer in task.state["layers"]],
    }


def test_a_fresh_head_needs_training_text() -> None:
    task = ASRTask(config())
    with pytest.raises(ValueError, match="a fresh head takes its characters from the training"):
        task.fit(None, mmadapters.load_backbone("nano/wav2vec2"))


def test_a_group_column_that_is_not_there_is_named_before_anything_runs() -> None:
    with pytest.raises(ValueError, match=r"no column 'acent'; there are audio, text, accent"):
        fitted(rows((9000, "a"), accent="x"), evaluation={"groups": ["acent"]})


def test_what_cannot_be_trained_on_says_why() -> None:
    task = fitted(rows((9000, "abc")), audio={"longest": 2.0})
    table = rows((9000, "ab"), (9000, "?!"), (9000, "xa"), (399, "a"), (1040, "aaa"), (40_000, "a"))
    assert task.example(table[0], train=True)["labels"] == [2, 3]
    reasons = []
    for row in table[1:]:
        with pytest.raises(BadRow) as error:
            task.example(row, train=True)
        reasons.append(str(error.value))
    assert reasons == [
        "the transcript is empty",
        "the transcript has 'x', which is not among the characters of the head",
        "399 samples are too few for one frame of the encoder",
        "too short for CTC: 3 frames for a transcript that needs 5",
        "2.5 s are longer than audio.longest, 2 s",
    ]
    # `check` knows without decoding any of them, but for what `example` says of every split.
    assert [(p.index, p.reason) for p in task.check(table)] == [
        (1, reasons[0]),
        (2, reasons[1]),
        (3, "too short for CTC: 0 frames for a transcript that needs 1"),
        (4, reasons[3]),
        (5, reasons[4]),
    ]


def test_all_but_unreadable_recordings_are_evaluated() -> None:
    task = fitted(rows((9000, "abc")))
    for row in rows((9000, "?!"), (9000, "xa"), (1040, "aaa")):
        assert "labels" not in task.example(row, train=False)
    with pytest.raises(BadRow):
        task.example({"audio": {"bytes": b"nothing", "path": None}, "text": "a"}, train=False)


def test_lengths_are_of_the_encoders_rate_from_headers_alone() -> None:
    task = fitted(rows((9000, "a")))
    table = Table(
        [
            {"audio": sound(8000, rate=8000), "text": "a"},
            {"audio": sound(4410, rate=44_100), "text": "a"},
            {"audio": {"bytes": b"", "path": None}, "text": "a"},
        ]
    )
    assert task.lengths(table) == [16_000, 1600, 0]
    assert len(task.example(table[0], train=False)["wave"]) == 16_000


def test_a_speed_that_leaves_too_few_frames_is_not_used() -> None:
    task = fitted(rows((9000, "abc")), augment={"speed": (2.0, 2.0)})
    long, short = rows((9000, "abc"), (400 + 320 * 4, "aaa"))
    assert len(task.example(long, train=True)["wave"]) == 4500
    assert len(task.example(short, train=True)["wave"]) == 1680
    assert len(task.example(long, train=False)["wave"]) == 9000


def test_without_options_nothing_is_augmented_and_with_them_the_seed_decides() -> None:
    table = rows((9000, "abc"))
    plain = fitted(table)
    assert torch.equal(
        plain.example(table[0], train=True)["wave"], plain.example(table[0], train=False)["wave"]
    )
    task = fitted(table, augment={"speed": (0.8, 1.2), "noise": 1.0, "gain": 6})
    examples = Examples(task, table, train=True)
    first, again, other = (examples[0, seed]["wave"] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)


def test_noise_lies_as_far_below_the_speech_as_it_says() -> None:
    table = rows((60_000, "abc"))
    clean = fitted(table).example(table[0], train=True)["wave"]
    examples = Examples(fitted(table, augment={"noise": 1.0}), table, train=True)
    levels = []
    for seed in range(40):
        noise = examples[0, seed]["wave"] - clean
        levels.append(10 * (clean.square().mean() / noise.square().mean()).log10().item())
    assert min(levels) > 4.8
    assert max(levels) < 40.2
    assert max(levels) - min(levels) > 25


def test_records_scores_and_groups_come_from_the_rows() -> None:
    task, model = task_and_model(
        SPEECH["hf-wav2vec2"], evaluation={"groups": ["accent"], "bootstrap": 50}
    )
    table = rows((3300, "abc"), (1700, "c a"), (2411, ""), (3300, "ab"))
    for i, row in enumerate(table):
        row["accent"] = "silent" if i == 2 else "xy"[i % 2]
    together = evaluate(task, model, table, batch_size=4).records
    alone = evaluate(task, model, table, batch_size=1).records
    assert [r["hypothesis"] for r in together] == [r["hypothesis"] for r in alone]
    scores = task.score(together, bootstrap=50)
    assert scores.metrics[0].name == task.metric == "WER"
    assert scores["WER"].count == 3
    assert set(scores.groups["accent"]) == {"x", "y"}
    assert scores["words heard in silence"].count == 1


def test_a_language_model_is_read_once(tmp_path: Path) -> None:
    path = tmp_path / "words.arpa"
    grams = "\n".join(f"-1.0\t{word}" for word in ("<s>", "</s>", "<unk>"))
    path.write_text(f"\\data\\\nngram 1=3\n\n\\1-grams:\n{grams}\n\n\\end\\\n", "utf-8")
    decoding = {"method": "beam", "beams": 8, "language_model": str(path)}
    table = rows((3300, "abc"), (2411, "b"))

    task, model = task_and_model(SPEECH["hf-wav2vec2-stable"], decoding=decoding)
    evaluate(task, model, table[:1], batch_size=1)
    path.unlink()
    assert len(evaluate(task, model, table, batch_size=1).records) == 2
    task, model = task_and_model(SPEECH["hf-wav2vec2-stable"], decoding=decoding)
    with pytest.raises(ValueError, match="no language model"):
        evaluate(task, model, table, batch_size=1)


def test_words_that_cost_too_much_are_not_heard(tmp_path: Path) -> None:
    path = tmp_path / "words.arpa"
    grams = "\n".join(f"-9.0\t{word}" for word in ("<s>", "</s>", "<unk>"))
    path.write_text(f"\\data\\\nngram 1=3\n\n\\1-grams:\n{grams}\n\n\\end\\\n", "utf-8")
    decoding = {"method": "beam", "language_model": str(path), "beams": 1000}
    heard = []
    for alpha in (0.0, 100.0):
        task, model = task_and_model(
            SPEECH["hf-wav2vec2-stable"], decoding={**decoding, "alpha": alpha, "beta": 0.0}
        )
        records = evaluate(task, model, rows((1040, "abc")), batch_size=1).records
        heard.append(records[0]["hypothesis"])
    assert heard[0] != ""
    assert heard[1] == ""


def test_nano_brings_its_own_head_and_characters() -> None:
    from mmadapters.zoo import NANO, wav2vec2

    task = fitted()
    backbone = mmadapters.load_backbone("nano/wav2vec2")
    model = task.build(mmadapters.init(backbone)).eval()
    wave = 0.1 * torch.randn(2, 8000)
    reference = wav2vec2.load_ctc(NANO["nano/wav2vec2"].directory)
    with torch.no_grad():
        log_probs, _ = model.log_probs(wave, torch.tensor([8000, 8000]))
        expected = reference(wave).logits.log_softmax(-1)
    torch.testing.assert_close(log_probs, expected, atol=1e-4, rtol=1e-4)
    assert task.vocabulary.tokens == wav2vec2.CHARACTERS
    assert task.vocabulary.encode("don't go") == [wav2vec2.VOCABULARY[c] for c in "don't|go"]


def test_a_hub_models_head_comes_with_its_tokenizers_characters(tmp_path: Path) -> None:
    from transformers import Wav2Vec2CTCTokenizer

    table = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "E": 5, "T": 6, "'": 7}
    (tmp_path / "vocab.json").write_text(json.dumps(table), "utf-8")
    Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json")).save_pretrained(tmp_path)
    backbone = speech.hf_wav2vec2()
    named = BackboneConfig(name="hf/wav2vec2-ctc", processor=str(tmp_path))
    vocabulary = own_vocabulary(named, backbone)
    head = own_head(named, backbone)
    assert vocabulary.tokens[:8] == tuple("|" if token == "|" else token for token in table)
    assert vocabulary.blank == 0
    assert len(vocabulary.tokens) == head.out_features == 12
    assert vocabulary.encode("te et") == [6, 5, 4, 5, 6]
    assert vocabulary.decode([6, 5, 9, 3, 4, 5, 6], lowercase=True) == "te et"
    nothing = BackboneConfig(name="hf/wav2vec2-ctc", processor=str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match=r"backbone\.processor: .*nothing has no tokenizer"):
        own_vocabulary(nothing, backbone)
    assert torch.equal(head.weight, backbone.lm_head.weight)  # type: ignore[union-attr, arg-type]
    head.weight.data.zero_()
    assert backbone.lm_head.weight.any()  # type: ignore[union-attr, operator]


def test_a_torchaudio_bundle_brings_its_labels() -> None:
    named = BackboneConfig(
        name="torchaudio/WAV2VEC2_ASR_BASE_960H",
        options={"encoder_num_layers": 1, "encoder_embed_dim": 48, "encoder_ff_interm_features": 8},
    )
    backbone = mmadapters.load_backbone(named.name, **named.options)
    vocabulary = own_vocabulary(named, backbone)
    assert vocabulary.tokens[:4] == ("<pad>", "|", "E", "T")
    assert vocabulary.decode([3, 2, 1, 1, 2], lowercase=True) == "te e"
    assert own_head(named, backbone).out_features == len(vocabulary.tokens) == 29


def test_a_folder_with_a_ctc_model_brings_all_that_it_needs(tmp_path: Path) -> None:
    from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2Processor

    letters = {"<pad>": 0, "|": 1, **{letter: i for i, letter in enumerate("ABCDEFGHIJ", 2)}}
    (tmp_path / "vocab.json").write_text(json.dumps(letters), "utf-8")
    tokenizer = Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"), bos_token=None, eos_token=None)
    Wav2Vec2Processor(Wav2Vec2FeatureExtractor(), tokenizer).save_pretrained(tmp_path)
    whole = speech.hf_wav2vec2()
    whole.save_pretrained(tmp_path)  # type: ignore[operator]
    named = {"name": f"hf/{tmp_path}", "pretrained": True}
    backbone = mmadapters.load_backbone(f"hf/{tmp_path}", pretrained=True)
    assert not hasattr(backbone, "lm_head")
    task = ASRTask(config(backbone=named, head={"init": "backbone"}))
    task.fit(None, backbone)
    assert task.state["normalise"] is True
    assert task.vocabulary.tokens == tuple(letters)
    model = task.build(mmadapters.init(backbone)).eval()
    wave = torch.randn(1, 4000)
    with torch.no_grad():
        log_probs, _ = model.log_probs(3 * wave + 1, torch.tensor([4000]))
        normal = (wave - wave.mean()) / wave.std(unbiased=False)
        expected = whole.eval()(normal).logits.log_softmax(-1)
    torch.testing.assert_close(log_probs, expected, atol=1e-4, rtol=1e-4)

    backbone.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="has no CTC head of its own"):
        own_head(BackboneConfig(name=f"hf/{tmp_path / 'bare'}", pretrained=True), backbone)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"decoding": {"language_model": "words.arpa"}}, "set method to beam"),
        ({"chunks": {"seconds": 10, "stride": 5}}, "more than two strides"),
        ({"augment": {"speed": [1.1, 0.9]}}, "a range from low to high"),
        ({"augment": {"speed": [0.0, 1.0]}}, "between 0.5 and 2"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(section: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**section)


@pytest.mark.parametrize("name", ["hf/hubert", "torchaudio/wav2vec2_base"])
def test_an_encoder_without_a_head_says_so(name: str) -> None:
    family = "hf-hubert" if name.startswith("hf") else "torchaudio-hubert"
    with pytest.raises(ValueError, match=r"has no CTC head of its own: set head\.init to fresh"):
        own_head(BackboneConfig(name=name), SPEECH[family].build())


def spoken(number: int) -> Table:
    """Short sentences in an accent that nano/wav2vec2 has not heard."""
    pytest.importorskip("espeakng_loader", reason="speech synthesis is the optional extra")
    from mmadapters.tasks.data.synthetic import sentences
    from mmadapters.tasks.data.synthetic import speech as synthetic

    reader = synthetic.Reader("en-gb-scotland")
    texts = sorted(map(sentences.sentence, sentences.TASK_SEEDS[: 4 * number]), key=len)[:number]
    table = Table()
    for text in texts:
        buffer = io.BytesIO()
        soundfile.write(buffer, synthetic.synthesize(text, reader).numpy(), 16_000, format="FLAC")
        table.append({"audio": {"bytes": buffer.getvalue(), "path": None}, "text": text})
    return table


def test_an_adapter_learns_an_accent_and_what_is_saved_predicts_the_same(tmp_path: Path) -> None:
    table = spoken(8)
    task = fitted()
    encoder = mmadapters.init(mmadapters.load_backbone("nano/wav2vec2"))
    encoder.add_adapter("accent", "double_seq_bn")
    encoder.train_adapter("accent")
    model = task.build(encoder)
    bits = copy.deepcopy(encoder.backbone.state_dict())
    before = task.score(evaluate(task, model, table, batch_size=8).records, bootstrap=0)["WER"]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    model.train()
    loader = DataLoader(Examples(task, table, train=True), batch_size=8, collate_fn=Collate(task))
    for _ in range(20):
        for loaded in loader:
            loss = model(**loaded.batch)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    records = evaluate(task, model.eval(), table, batch_size=8).records
    after = task.score(records, bootstrap=0)["WER"]
    assert before.value > 0.3
    assert after.value < 0.5 * before.value
    now = encoder.backbone.state_dict()
    assert all(torch.equal(now[key], value) for key, value in bits.items())

    path = tmp_path / "said.flac"
    path.write_bytes(table[7]["audio"]["bytes"])
    (said,) = task.predict(model, [str(path)], out=None)
    assert said["text"] == records[7]["hypothesis"]
    assert said["seconds"] == pytest.approx(soundfile.info(path).duration, abs=1e-3)
    assert " ".join(word["word"] for word in said["words"]) == said["text"]
    times = [time for word in said["words"] for time in (word["start"], word["end"])]
    assert times == sorted(times)
    assert times[-1] <= said["seconds"]

    encoder.save_adapter(tmp_path / "adapter", "accent", head=model.head)
    anew = mmadapters.init(mmadapters.load_backbone("nano/wav2vec2"))
    stored = anew.load_adapter(tmp_path / "adapter")
    anew.set_active_adapters("accent")
    again = ASRTask(task.config, json.loads(json.dumps(task.state)))
    second = again.build(anew).eval()
    second.head.load_state_dict(stored.head)
    assert list(again.predict(second, [str(path)], out=None)) == [said]


def test_what_cannot_be_heard_is_named_by_predict(tmp_path: Path) -> None:
    task, model = task_and_model(SPEECH["hf-wav2vec2"])
    short, damaged = tmp_path / "short.wav", tmp_path / "damaged.wav"
    soundfile.write(short, np.zeros(200), 16_000)
    damaged.write_bytes(b"RIFF0000WAVE")
    for path, message in ((short, "too short for one frame"), (damaged, "damaged.wav")):
        with pytest.raises(ValueError, match=message):
            list(task.predict(model, [str(path)], out=None))


def test_the_task_goes_to_worker_processes() -> None:
    task = fitted(rows((9000, "abc")))
    copied = pickle.loads(pickle.dumps(task))
    assert copied.example(rows((9000, "cab"))[0], train=True)["labels"] == [4, 2, 3]


def test_characters_decide_where_words_have_no_spaces_between_them() -> None:
    chinese = fitted(rows((9000, "三五七"), (9000, "一，二"), (9000, "九")))
    assert (chinese.metric, chinese.deciding, chinese.greater_is_better) == ("CER", "CER", False)
    records = [{"counts": counts("三五七", "三五"), "reference": "三五七"}]
    scores = chinese.score(records, bootstrap=0)
    assert [metric.name for metric in scores.metrics[:2]] == ["CER", "WER"]
    again = ASRTask(chinese.config, json.loads(json.dumps(chinese.state)))
    assert again.metric == "CER"
    assert fitted(rows((9000, "a cab"))).metric == "WER"
    # An adapter that was saved before does not say.
    assert ASRTask(config(), {"vocabulary": {"tokens": ["<pad>", "a"], "blank": 0}}).metric == "WER"


@pytest.mark.parametrize(
    ("asked", "metric", "deciding"),
    [("WER", "WER", "WER"), ("CER", "CER", "CER"), ("loss", "CER", "loss"), (None, "CER", "CER")],
)
def test_the_config_chooses_what_decides(asked: str | None, metric: str, deciding: str) -> None:
    task = fitted(rows((9000, "三五七")), evaluation={"deciding": asked})
    assert (task.metric, task.deciding) == (metric, deciding)


def test_no_other_figure_decides() -> None:
    with pytest.raises(ValueError, match="'WER', 'CER' or 'loss'"):
        config(evaluation={"deciding": "accuracy"})


def test_the_checkpoint_with_the_better_characters_is_kept(tmp_path: Path) -> None:
    """A head that learns no whole text: its WER is 1 throughout."""
    table = rows(*((6000, text) for text in ("三五七九一二", "五五七九", "九二三五七", "七一一二")))
    sections = {
        "trainer": {
            "max_steps": 6,
            "evaluate_every": 2,
            "batch_size": 4,
            "device": "cpu",
            "workers": 0,
        }
    }
    steps = {}
    for deciding in ("CER", "WER", "loss"):
        torch.manual_seed(0)
        task = fitted(table, evaluation={"deciding": deciding, "bootstrap": 0}, **sections)
        encoder = mmadapters.init(mmadapters.load_backbone("nano/wav2vec2"))
        trainer = TaskTrainer(
            task,
            task.build(encoder),
            train=table,
            validation=table,
            folder=tmp_path / deciding,
            quiet=True,
        )
        trainer.fit(None)
        logs = [log for log in trainer.state.log_history if "eval_WER" in log]
        assert [log["eval_WER"] for log in logs] == [1.0, 1.0, 1.0]
        values = [log[f"eval_{deciding}"] for log in logs]
        best = max(place for place, value in enumerate(values) if value == min(values))
        steps[deciding] = trainer.state.best_global_step
        assert steps[deciding] == 2 * best + 2
        assert ("eval_loss" in logs[0]) is (deciding == "loss")
    assert steps["WER"] == 6
    waves = task.collate([task.unchanging_example(row) for row in table])
    with torch.no_grad():
        loss = trainer.task_model.eval()(**waves)["loss"].item()
    assert loss == pytest.approx(min(values), rel=1e-5)


def test_rows_that_training_skips_add_no_characters() -> None:
    broken = {"bytes": sound(9000)["bytes"][:400], "path": None}
    table = rows(
        (9000, "cab"), (300, "d"), (1040, "efefef"), (60_000, "g"), (9000, "?!"), (9000, "ba")
    )
    table.append({"audio": broken, "text": "hi"})
    task = fitted(table, audio={"longest": 2.0})
    assert task.vocabulary.tokens == ("<pad>", "|", "a", "b", "c")
    with pytest.raises(ValueError, match=r"no row of the training split can be used \(row 0: "):
        fitted(Table(table[1:3]))


def test_phonemes_are_tokens_of_a_fresh_head() -> None:
    task = fitted(rows((9000, "h ə l oʊ"), (9000, "tʃ oʊ")), text={"tokens": "words"})
    assert task.vocabulary.tokens == ("<pad>", "h", "l", "oʊ", "tʃ", "ə")
    assert task.metric == "WER"
    example = task.example(rows((9000, "tʃ oʊ"))[0], train=True)
    assert (example["text"], example["labels"]) == ("tʃ oʊ", [4, 3])


def test_tokens_of_a_head_of_phonemes_are_no_punctuation() -> None:
    vocabulary = Vocabulary(("<pad>", "i.5", "S", "tʼ", "|"), special=(0,), spaced=True)
    task = ASRTask(config(), {"vocabulary": vocabulary.to_state()})
    assert task.normal("i.5 S tʼ . A") == "i.5 S tʼ a"
    decoded = Decoded([1, 3, 2], [0, 4, 9])
    words = _words(decoded, vocabulary, seconds=0.02)
    assert [word["word"] for word in words] == ["i.5", "tʼ", "S"]


def test_a_language_model_needs_words(tmp_path: Path) -> None:
    decoding = {"method": "beam", "language_model": str(tmp_path / "words.arpa")}
    vocabulary = Vocabulary(("<pad>", "a"), special=(0,), spaced=True)
    task = ASRTask(config(decoding=decoding), {"vocabulary": vocabulary.to_state()})
    with pytest.raises(ValueError, match="no sign between words"):
        task._decode(torch.zeros(1, 2, 2), torch.tensor([2]))


def test_a_bad_recording_does_not_end_the_others(tmp_path: Path) -> None:
    task, model = task_and_model(SPEECH["hf-wav2vec2"])
    for name in ("a.flac", "c.flac"):
        (tmp_path / name).write_bytes(sound(3300)["bytes"])
    (tmp_path / "b.wav").write_bytes(b"RIFF0000WAVE")
    names = [str(tmp_path / name) for name in ("a.flac", "b.wav", "c.flac", "gone.wav")]
    results, reasons = until_error(task.predict(model, names, out=None, bad=(told := Told())))
    assert told.names == [names[1], names[3]]
    assert [Path(result["input"]).name for result in results] == ["a.flac", "c.flac"]
    assert len(reasons) == 2
    assert reasons[0].startswith(f"{names[1]}: the audio cannot be decoded")
    assert reasons[1] == f"{names[3]}: no such file: {names[3]}"
