"""Pretraining of the tiny CLIP: it learns, it goes on where it stopped, and its weights are open_clip's."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner

from ovseg_fast.data.vocabularies import WORLD
from ovseg_fast.data.world.classes import FIRST_GROUND
from ovseg_fast.data.world.scenes import World
from ovseg_fast.models.catseg import PIXEL_MEAN, PIXEL_STD, CATSeg
from ovseg_fast.models.clip import CLIP
from ovseg_fast.models.presets import get_preset
from ovseg_fast.models.token_table import compact_embedding, expand_embedding
from ovseg_fast.tiny import clip as pretraining
from ovseg_fast.tiny.clip import Batches, PretrainingConfig, pretrain
from ovseg_fast.tiny.contrast import SHARPNESS, encode, near_contrast, patch_aligned, soft_contrast
from ovseg_fast.tiny.crops import LAST_WORDS, class_captions, object_crops, shown_classes
from ovseg_fast.tiny.tokens import KnownTokens
from ovseg_fast.vocabulary import tokenize

SMALL: dict[str, Any] = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 96, "patch_size": 16, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def settings(**changes: Any) -> PretrainingConfig:
    values: dict[str, Any] = {"steps": 6, "scenes": 4, "crops": 8, "warmup": 2, "evaluate_every": 3}
    return PretrainingConfig(**values | {"checkpoint_every": 2, "evaluation_scenes": 2} | changes)


def fixed_loss(model: CLIP, config: PretrainingConfig) -> float:
    """The loss on pictures that no training step sees."""
    batch = Batches(dataclasses.replace(config, seed=99_999, forget=0))[0]
    ids = torch.cat([torch.zeros(1, dtype=torch.int64), KnownTokens().ids])  # back to CLIP's tokens
    with torch.no_grad():
        return pretraining.batch_loss(
            model, batch._replace(text=ids[batch.text], phrases=ids[batch.phrases]), config
        ).item()


def test_loss_on_fresh_pictures_falls(tmp_path: Path, rng: torch.Generator) -> None:
    seed = int(torch.randint(1000, (), generator=rng))
    before = pretrain(settings(seed=seed, steps=0), tmp_path / "none", SMALL)
    after = pretrain(settings(seed=seed, steps=60, lr=2e-3, warmup=5, evaluate_every=60), tmp_path / "some", SMALL)
    config = settings(seed=seed)
    assert fixed_loss(after, config) < 0.95 * fixed_loss(before, config)


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_stopped_run_goes_on_to_the_same_weights(
    stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: torch.Generator
) -> None:
    config = settings(seed=int(torch.randint(1000, (), generator=rng)))
    whole = pretrain(config, tmp_path / "whole", SMALL).state_dict()

    make = Batches.__getitem__

    def power_cut(self: Batches, step: int) -> Any:
        if step == stop:
            raise KeyboardInterrupt
        return make(self, step)

    monkeypatch.setattr(Batches, "__getitem__", power_cut)
    with pytest.raises(KeyboardInterrupt):
        pretrain(config, tmp_path / "cut", SMALL)
    assert not (tmp_path / "cut" / "clip.safetensors").exists()
    monkeypatch.undo()
    torch.manual_seed(stop)  # whatever else happened meanwhile
    resumed = pretrain(config, tmp_path / "cut", SMALL).state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    history = [torch.load(tmp_path / name / "checkpoint.pt")["history"] for name in ("whole", "cut")]
    assert [record["step"] for record in history[1]] == [3, 6]
    for name in ("retrieval", "dense_retrieval", "seen", "unseen"):
        # No number where the few scenes hold no such class, in both.
        np.testing.assert_equal([record[name] for record in history[0]], [record[name] for record in history[1]])


def test_batches_drawn_by_other_processes_are_the_same(tmp_path: Path) -> None:
    here, there = (pretrain(settings(steps=3), tmp_path / str(n), SMALL, workers=n).state_dict() for n in (0, 2))
    assert all(torch.equal(here[name], there[name]) for name in here)


def test_other_settings_are_refused(tmp_path: Path) -> None:
    pretrain(settings(steps=2), tmp_path, SMALL)
    with pytest.raises(ValueError, match="was made with another steps, lr; resume with the same settings"):
        pretrain(settings(steps=3, lr=1.0), tmp_path, SMALL)
    with pytest.raises(ValueError, match="was made with another clip"):
        pretrain(settings(steps=2), tmp_path, SMALL | {"embed_dim": 8})


def test_weights_are_those_of_open_clip_and_of_our_models(tmp_path: Path) -> None:
    trained = pretrain(settings(steps=2), tmp_path, SMALL)
    loaded = CLIP(SMALL, tmp_path / "clip.safetensors")  # open_clip loads it, strictly
    tokens = tokenize([["a crimson banded disc"], ["a photo of a cat"]])[:, 0]
    pixels = torch.rand(2, 3, 96, 96) * 255
    with torch.no_grad():
        torch.testing.assert_close(loaded.text(tokens), trained.text(tokens))
        for ours, theirs in zip(encode(trained.visual, pixels), encode(loaded.visual, pixels), strict=True):
            torch.testing.assert_close(ours, theirs)
    config = dataclasses.replace(get_preset("catseg-tiny").config, clip=SMALL, guidance_blocks=(0, 0))
    model = CATSeg(config, tmp_path / "clip.safetensors")
    torch.testing.assert_close(model.clip.visual.proj, trained.visual.proj)


def test_features_are_those_of_the_encoder() -> None:
    """`encode` gives CLIP's class token and the dense features that CAT-Seg reads."""
    model = CLIP(SMALL)
    pixels = torch.rand(2, 3, 96, 96) * 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (PIXEL_MEAN, PIXEL_STD))
    whole, dense = encode(model.visual, pixels)
    expected, _, _ = model.visual.dense_features((pixels - mean) / std, ())
    torch.testing.assert_close(dense, F.normalize(expected[:, 1:], dim=-1))
    tokens, _ = model.visual.embed((pixels - mean) / std, "bicubic")
    for block in model.visual.transformer.resblocks:
        tokens = block(tokens)
    torch.testing.assert_close(whole, F.normalize(model.visual.project(tokens[:, 0]), dim=-1))


def test_every_token_of_a_caption_is_known(rng: torch.Generator) -> None:
    known = KnownTokens()
    assert len(known) < 200
    batches = Batches(settings(seed=int(torch.randint(1000, (), generator=rng)), forget=0))
    for step in range(5):
        batch = batches[step]
        for rows in (batch.text, batch.phrases):
            length = rows.argmax(-1) + 1
            assert ((rows > 0).sum(-1) == length).all()  # nothing unknown up to the end token
            assert (rows.amax(-1) == len(known)).all()
    names = tokenize([[name] for name in WORLD.classes])
    assert (known.rows(names) == 0).eq(names == 0).all()


def test_rows_keep_the_end_token_last_and_unknown_words_share_a_row() -> None:
    known = KnownTokens()
    tokens = tokenize([["a red zebra"], ["a red quagga!"]])[:, 0]
    rows = known.rows(tokens)
    assert torch.equal(rows.argmax(-1), tokens.argmax(-1))
    assert int(rows.max()) == len(known)
    assert (rows[:, 3] == 0).all()
    assert (rows[:, :3] > 0).all()


def test_small_and_whole_table_give_the_same_text(rng: torch.Generator) -> None:
    known = KnownTokens()
    small = pretraining._small_model(SMALL, known, 0)
    whole = copy.deepcopy(small)
    table = expand_embedding(known.ids, small.text.token_embedding.weight.detach())
    whole.text.token_embedding = torch.nn.Embedding.from_pretrained(table)
    tokens = tokenize([["a photo of a red striped zebra in the scene"]])[:, 0]
    with torch.no_grad():
        torch.testing.assert_close(small.text(known.rows(tokens)), whole.text(tokens))
    ids, rows = compact_embedding(table)
    assert torch.equal(ids, known.ids)
    assert torch.equal(rows, small.text.token_embedding.weight)


def test_forgotten_words_leave_start_and_end() -> None:
    known = KnownTokens()
    rows = known.rows(tokenize([["a red striped circle"]] * 50)[:, 0])
    forgotten = known.forget(rows, 1.0, np.random.default_rng(0))
    assert torch.equal(forgotten > 0, (rows == len(known)) | (rows == len(known) - 1))
    some = known.forget(rows, 0.3, np.random.default_rng(0))
    assert 0.15 < (some != rows).sum() / (rows > 0).sum() < 0.45 * 4 / 6 + 0.1


def test_crops_show_different_classes_and_scenes_what_they_hold(rng: torch.Generator) -> None:
    world = World(int(torch.randint(1000, (), generator=rng)))
    scenes = [world.scene(index) for index in range(12)]
    crops, labels = object_crops(scenes, 64, 48, np.random.default_rng(0))
    assert crops.shape == (len(labels), 3, 48, 48)
    assert 20 < len(labels) <= 64
    assert len(object_crops(scenes, 5, 48, np.random.default_rng(0))[1]) == 5
    for scene, row in zip(scenes, shown_classes(scenes), strict=True):
        assert {scene.ground, *(region.label for region in scene.regions)} == set(row.nonzero()[:, 0].tolist())

    # Pictures of the labels themselves show what a crop is of.
    scenes = [dataclasses.replace(s, image=np.repeat(s.labels[..., None], 3, 2).astype(np.uint8)) for s in scenes]
    crops, labels = object_crops(scenes, 64, 48, np.random.default_rng(0))
    assert len(labels.unique()) == len(labels)
    for crop, label in zip(crops, labels.tolist(), strict=True):
        part = (crop[0].round() == label).float().mean()
        assert part > (0.7 if label >= FIRST_GROUND else 0.08)


def test_captions_of_classes_name_them_in_changing_words() -> None:
    first, second = (class_captions(np.random.default_rng(seed)) for seed in range(2))
    assert len(first) == len(WORLD.classes) and first != second
    plain = [captions for captions in zip(first, second, WORLD.classes, strict=True) if captions[2] in captions[0]]
    assert len(plain) > 20  # no synonym, no other order
    assert any(one != name and name in one for one, _, name in plain)


def test_neighbours_share_all_but_the_last_word() -> None:
    for label, near in enumerate(LAST_WORDS):
        assert near[0] == label and len(set(near)) == 5
        words = [WORLD.classes[index] for index in near]
        stem = WORLD.classes[label].rsplit(" ", 2 if words[0].endswith(("wall", "floor")) else 1)[0]
        assert all(word.startswith(stem + " ") for word in words)


def test_near_contrast_leaves_out_neighbours_that_are_right_too(rng: torch.Generator) -> None:
    logits = torch.randn(2, 4, dtype=torch.float64, generator=rng)
    near = torch.tensor([[0, 1], [1, 0], [2, 3], [3, 2]])
    right = torch.tensor([[True, False, False, False], [True, True, True, False]])
    expected = [
        -logits[0, [0, 1]].log_softmax(0)[0],
        torch.zeros((), dtype=torch.float64),  # 0 and 1 are both right: nothing to tell apart
        torch.zeros((), dtype=torch.float64),
        -logits[1, [2, 3]].log_softmax(0)[0],
    ]
    torch.testing.assert_close(near_contrast(logits, right, near), torch.stack(expected).mean())


def test_patch_aligned_similarity() -> None:
    dense = F.normalize(torch.randn(2, 5, 8), dim=-1)
    text = F.normalize(torch.randn(3, 8), dim=-1)
    expected = torch.empty(2, 3)
    for b in range(2):
        for t in range(3):
            cosine = dense[b] @ text[t]
            weights = torch.exp(SHARPNESS * cosine)
            expected[b, t] = (weights * cosine).sum() / weights.sum()
    torch.testing.assert_close(patch_aligned(dense, text), expected)


def test_soft_contrast_is_clips_loss_where_one_answer_is_right() -> None:
    from open_clip import ClipLoss

    pictures, texts = (F.normalize(torch.randn(6, 8), dim=-1) for _ in range(2))
    scale = torch.tensor(7.0)
    result = soft_contrast(scale * pictures @ texts.t(), torch.eye(6, dtype=torch.bool))
    torch.testing.assert_close(result, ClipLoss()(pictures, texts, scale))


def test_soft_contrast_with_several_answers_and_with_none() -> None:
    logits = torch.randn(2, 3, dtype=torch.float64)
    right = torch.tensor([[True, True, False], [True, False, False]])  # the last text fits no picture
    rows, columns = logits.log_softmax(1), logits.log_softmax(0)
    by_picture = (-(rows[0, 0] + rows[0, 1]) / 2 - rows[1, 0]) / 2
    by_text = (-(columns[0, 0] + columns[1, 0]) / 2 - columns[0, 1]) / 2
    torch.testing.assert_close(soft_contrast(logits, right), (by_picture + by_text) / 2)


def test_zero_shot_reads_each_patch() -> None:
    """Texts that are the features of two patches are found at these patches."""
    model = CLIP(SMALL).eval()
    image = World(1).scene(0).image
    with torch.no_grad():
        _, dense = encode(model.visual, torch.from_numpy(image).permute(2, 0, 1)[None].float())
    labels = pretraining.zero_shot(model.visual, image, dense[0, [0, 35]])
    assert labels.shape == (96, 96)
    assert labels[0, 0] == 0
    assert labels[-1, -1] == 1


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(pretraining, "pretrain", lambda *arguments, **options: calls.append((*arguments, options)))
    result = CliRunner().invoke(
        pretraining.main, ["--out", str(tmp_path), "--steps", "7", "--seed", "3", "--workers", "2"]
    )
    assert result.exit_code == 0, result.output
    assert calls == [(PretrainingConfig(steps=7, seed=3), tmp_path, {"device": "cpu", "workers": 2})]
