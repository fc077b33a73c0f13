"""The command that tests the papers' claims small: its variants, that it goes on after a kill, its table and plot."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import claim_forms
import claim_tables
import claims
import pytest
import torch
import torch.nn.functional as F
from claim_forms import COMPARISONS, VARIANTS, Variant
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file

from ovseg_fast import ops
from ovseg_fast.layers import cost_aggregator
from ovseg_fast.models import build
from ovseg_fast.models.catseg import CATSeg
from ovseg_fast.tiny.clip import to_open_clip
from ovseg_fast.training.finetuning import set_trainable

CATSEG = [name for name in VARIANTS if VARIANTS[name].preset == "catseg-tiny"]
CASCADE = [name for name in VARIANTS if name not in CATSEG]


@pytest.fixture
def seed(rng: torch.Generator) -> int:
    return int(torch.randint(2**31, (), generator=rng))


def inputs(model: Any, classes: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two images, their labels, and the text of some classes."""
    images = torch.randint(0, 256, (2, 3, 96, 96), generator=rng, dtype=torch.uint8)
    labels = torch.randint(-1, classes, (2, 12, 12), generator=rng).repeat_interleave(8, 1).repeat_interleave(8, 2)
    text = F.normalize(torch.randn(classes, 1, model.text_encoder.embed_dim, generator=rng), dim=-1)
    return images, labels, model.text_from_prompts(text)


def trainable(name: str, seed: int) -> tuple[Any, list[str]]:
    model = VARIANTS[name].build(seed, None)
    return model, set_trainable(model, VARIANTS[name].policy)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_trains_a_step_with_all_that_it_trains(name, seed, rng):
    model, names = trainable(name, seed)
    images, labels, text = inputs(model, 60, rng)  # more than CAT-Seg's pad_length
    size = (2, 60, model.map_size, model.map_size) if isinstance(model, CATSeg) else (2, 60, 96, 96)
    assert model(images, text).shape == size

    model.train()
    if VARIANTS[name].policy != "none" and isinstance(model, CATSeg):
        tokens = torch.randint(1, 49000, (60, 1, 6), generator=rng)
        text = model.encode_text(torch.cat([tokens, torch.full((60, 1, 1), 49407)], -1))
    model.loss(images, labels, text)["loss"].backward()
    idle = [each for each, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None]
    # As published, see `set_trainable`; `full` also means what this method never reads of CLIP; and nothing is padded,
    # as many classes go on as the list holds.
    known = ("decoders.", "clip.visual.transformer.resblocks.5.attn", "clip.logit_scale", "padding_")
    assert [each for each in idle if not any(part in each for part in known)] == []
    before = {each: parameter.detach().clone() for each, parameter in model.named_parameters()}
    torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-3).step()
    moved = {each for each, parameter in model.named_parameters() if not torch.equal(parameter, before[each])}
    assert moved == set(names) - set(idle)


@pytest.mark.parametrize("name", CATSEG)
def test_what_of_cat_seg_is_trained(name, seed):
    _, names = trainable(name, seed)
    _, published = trainable("catseg", seed)
    head = {each for each in published if not each.startswith("clip.")}
    encoder = {each for each in names if each.startswith("clip.")}
    spatial = {each for each in head if ".spatial." in each or ".appearance_projection." in each}
    classes = {each for each in head if ".classes." in each or ".text_projection." in each}
    embedding = {each for each in head if ".cost_embedding." in each}
    features = {f"aggregator.{part}" for part in ("image_embedding.weight", "image_embedding.bias")}
    expected = {
        "catseg-features": head - embedding | features | {"aggregator.text_embedding.weight"},
        "catseg-spatial": head - classes,
        "catseg-classes": head - spatial,
        "catseg-neither": head - spatial - classes,
    }
    assert spatial and classes and embedding
    assert {each for each in names if not each.startswith("clip.")} == expected.get(name, head)
    if name == "catseg-frozen":
        assert encoder == set()
    elif name == "catseg-full":
        assert encoder == {each for each, _ in VARIANTS[name].build(seed, None).named_parameters() if "clip." in each}
    else:
        assert encoder == set(published) - head != set()


@pytest.mark.parametrize("name", CASCADE)
def test_what_of_cascade_clip_is_trained(name, seed):
    _, names = trainable(name, seed)
    _, published = trainable("cascade", seed)
    head = {each for each in names if each.startswith("head.")}
    assert {each for each in names if "prompt" in each} == set(names) - head == {e for e in published if "prompt" in e}
    assert ("head.stage_weights.0" in head) == (name == "cascade")
    decoders = 1 if name in ("cascade-last", "cascade-one-decoder") else 3
    for part in ("decoders", "query_projections"):
        assert {each.split(".")[2] for each in head if each.startswith(f"head.{part}.")} == set("012"[:decoders])


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_a_seed_begin_alike(name, seed):
    model = VARIANTS[name].build(seed, None)
    state, first = model.state_dict(), "catseg" if isinstance(model, CATSeg) else "cascade"
    published = VARIANTS[first].build(seed, None).state_dict()
    moved = ("head.", "image_encoder.norm_", "image_encoder.proj_layers")  # parts taken out, the rest numbered anew
    shared = [each for each in state if each in published and not (name != first and each.startswith(moved))]
    assert len(shared) > 40
    assert [each for each in shared if not torch.equal(state[each], published[each])] == []
    other = VARIANTS[name].build(seed + 1, None).state_dict()
    assert any(not torch.equal(state[each], other[each]) for each in state)


@pytest.mark.parametrize(("name", "preset"), [("catseg", "catseg-tiny"), ("cascade", "cascade-clip-tiny")])
def test_the_published_variant_is_the_published_model(name, preset, seed, rng):
    model = VARIANTS[name].build(seed, None).eval()
    torch.manual_seed(seed)
    published = build(preset).eval()
    assert type(model) is type(published)
    images, _, text = inputs(model, 5, rng)
    assert torch.equal(model(images, text), published(images, text))


@pytest.mark.parametrize("classes", [5, 60])
def test_features_are_linear_maps_added(classes, seed, rng):
    """With the pair's embedding put in the place of that of its costs, the published aggregator gives the same."""
    model, published = (VARIANTS[name].build(seed, None).eval() for name in ("catseg-features", "catseg"))
    images, _, text = inputs(model, classes, rng)
    aggregator = model.aggregator
    with torch.no_grad():
        dense = F.normalize(model.encode_image(images).dense, dim=-1)
        unit = F.normalize(text[:, 0], dim=-1)
        pair = torch.cat(torch.broadcast_tensors(dense[:, None], unit[None, :, None, None]), -1)
        weight = torch.cat([aggregator.image_embedding.weight, aggregator.text_embedding.weight], 1)
        embedded = F.linear(pair, weight, aggregator.image_embedding.bias)
        best = ops.cost_volume(dense, text).amax((2, 3, 4)).topk(min(classes, aggregator.pad_length))
        kept = best.indices.sort().values
        embedded = embedded[torch.arange(2)[:, None], kept]
        with pytest.MonkeyPatch.context() as patch:
            for operator in ("cost_embedding", "embed_volume"):
                patch.setattr(cost_aggregator.ops, operator, lambda *_: embedded)
            expected = published(images, text)
        assert torch.allclose(model(images, text), expected, atol=1e-4)


@pytest.mark.parametrize(("name", "parts"), [("spatial", "s"), ("classes", "c"), ("neither", ""), (None, "sc")])
def test_layers_are_left_out_and_nothing_else(name, parts, seed, rng):
    model = VARIANTS[f"catseg-{name}" if name else "catseg"].build(seed, None).eval()
    published = VARIANTS["catseg"].build(seed, None).eval()
    images, _, text = inputs(model, 5, rng)
    with torch.no_grad():
        head, (dense, appearance) = published.aggregator, published.encode_image(images)
        x = ops.cost_embedding(dense, text, head.cost_embedding.weight, head.cost_embedding.bias)
        guidance = F.relu(head.appearance_projection(dense.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        of_text = F.relu(head.text_projection(text[:, 0]))
        for layer in head.layers:
            x = layer.spatial(x, guidance) if "s" in parts else x
            x = layer.classes(x, of_text, 2) if "c" in parts else x
        assert torch.allclose(model(images, text), head.decoder(x, appearance), atol=1e-4)


@pytest.mark.parametrize(("name", "factor"), [("cascade-mean", 0.5), ("cascade-sum", 1.0), ("cascade", None)])
def test_layers_of_a_stage(name, factor, seed, rng):
    model = VARIANTS[name].build(seed, None).eval()
    images, _, _ = inputs(model, 5, rng)
    with torch.no_grad():
        pixels = (images.float() - model.pixel_mean) / model.pixel_std
        layers = model.image_encoder(pixels)[0]  # each by itself
        stages = model.encode_image(images).stages
    weights = torch.tensor([-0.5, 0.0]).exp() if factor is None else torch.tensor([factor, factor])
    for stage, (first, second) in zip(stages, (layers[0:2], layers[2:4]), strict=False):
        assert torch.allclose(stage, weights[0] * first + weights[1] * second, atol=1e-6)
    assert torch.equal(stages[2], layers[4])


def test_one_decoder_reads_the_last_layer_or_the_sum_of_all(seed, rng):
    published = VARIANTS["cascade"].build(seed, None).eval()
    images, _, text = inputs(published, 5, rng)
    with torch.no_grad():
        pixels = (images.float() - published.pixel_mean) / published.pixel_std
        layers, whole, grid = published.image_encoder(pixels)
        each = text.expand(2, -1, -1)
        queries = published.head.query_projections[2](torch.cat([whole[:, None] * each, each], -1))
        for name, memory in {"cascade-last": layers[-1], "cascade-one-decoder": sum(layers)}.items():
            model = VARIANTS[name].build(seed, None).eval()
            expected = published.head.decoders[2](queries, memory).unflatten(-1, grid)
            assert torch.allclose(model.decode(model.encode_image(images), text), expected, atol=1e-5)


def test_comparisons_name_every_variant():
    named = [name for variants in COMPARISONS.values() for name in variants.values()]
    assert set(named) == set(VARIANTS) and named.count("catseg") == 3 and named.count("cascade") == 2


# The command


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("clip") / "clip.safetensors"
    save_file(to_open_clip(build("catseg-tiny").clip), file)
    return file


def run(clip: Path, out: Path, *arguments: str) -> Any:
    quick = ["--catseg-steps", "2", "--catseg-batch", "1", "--cascade-steps", "2", "--cascade-batch", "2"]
    arguments = ("--clip", str(clip), "--out", str(out), "--scenes", "2", *quick, *arguments)
    return CliRunner().invoke(claims.main, [*arguments], catch_exceptions=False)


def test_a_killed_command_goes_on_and_repeats_nothing(clip, tmp_path, monkeypatch):
    out, trained, allowed = tmp_path / "results/claims.json", [], 2

    def train(name: str, seed: int, *others: Any) -> dict[str, Any]:
        if len(trained) == allowed:
            raise KeyboardInterrupt
        trained.append((name, seed))
        return record(name, seed, 0.1 * len(trained))

    only = ("--only", "catseg-neither", "--only", "cascade-last", "--only", "catseg-neither", "--seeds", "2")
    monkeypatch.setattr(claims, "run_one", train)
    assert run(clip, out, *only).exit_code != 0
    assert trained == [("catseg-neither", 0), ("cascade-last", 0)]
    begun = json.loads(out.read_text())
    assert begun["runs"] == [record("catseg-neither", 0, 0.1), record("cascade-last", 0, 0.2)]

    allowed = 9
    result = run(clip, out, *only)
    assert result.exit_code == 0, result.output
    assert trained[2:] == [("catseg-neither", 1), ("cascade-last", 1)]
    content = json.loads(out.read_text())
    assert content["runs"][:2] == begun["runs"]
    assert {name: content[name] for name in ("settings", "baseline")} == {
        name: begun[name] for name in ("settings", "baseline")
    }
    assert 0 <= content["baseline"]["miou"] <= 1
    assert str(clip.parent) not in out.read_text()  # it is published
    assert "run 1 of 2: catseg-neither, seed 1; about" in result.output
    assert {file.name for file in out.parent.iterdir()} == {"claims.json", "claims.md", "claims.png"}
    assert str(out.with_suffix(".md")) in result.output and str(out.with_suffix(".png")) in result.output

    assert run(clip, out, *only).exit_code == 0 and len(trained) == 4  # all is there
    assert run(clip, out, *only, "--seeds", "3").exit_code == 0  # more of the same
    assert trained[4:] == [("catseg-neither", 2), ("cascade-last", 2)]


def test_a_run_is_the_same_again_and_sees_what_its_siblings_see(clip, monkeypatch):
    seen: dict[str, list[torch.Tensor]] = {}
    schedule = claims.Schedule(2, 2, 1e-3)
    settings = claims.Settings("any", "any", schedule, schedule, scenes=1)
    step = claims.Run._step

    def spy(self: Any, number: int, parts: Any) -> Any:
        seen[current].append(parts[0][0])
        assert self.unseen and not set(parts[0][1].unique().tolist()) & set(self.unseen)
        return step(self, number, parts)

    monkeypatch.setattr(claims.Run, "_step", spy)
    records = []
    for current in ("catseg-neither", "catseg-classes", "again"):
        seen[current] = []
        records.append(claims.run_one(current.replace("again", "catseg-neither"), 1, settings, str(clip), False))
    assert all(torch.equal(a, b) for a, b in zip(seen["catseg-neither"], seen["catseg-classes"], strict=True))
    assert {name: records[0][name] for name in claims.METRICS} == {name: records[2][name] for name in claims.METRICS}
    assert 0 < records[0]["trained_parameters"] < records[1]["trained_parameters"]
    for each in records:
        assert each["seed"] == 1 and each["steps"] == 2 and each["training_seconds"] > 0 < each["evaluation_seconds"]
        assert 0 <= each["pixel_accuracy"] <= 1 and 0 <= each["miou"] <= 1
        assert str(clip.parent) not in json.dumps(each, allow_nan=False)  # it is published


def test_it_refuses_in_one_sentence(clip, tmp_path):
    out = tmp_path / "claims.json"
    results = claims.Results(out, claims.Settings("of others", "any", *[claims.Schedule(2, 2, 1e-3)] * 2, scenes=2))
    results.baseline = BASELINE
    results.add(record("catseg", 0, 0.5))
    before = out.read_bytes()
    result = run(clip, out)
    assert result.exit_code == 1 and "holds runs with other settings (clip 'of others' is now" in result.output
    assert result.output.count("\n") == 1 and out.read_bytes() == before

    for content in ("{", '{"format": "another"}', "[]"):
        out.write_text(content)
        for arguments in ((), ("--table",)):
            result = run(clip, out, *arguments)
            assert result.exit_code == 1 and "is damaged or does not hold results of this command" in result.output
            assert out.read_text() == content
    result = run(clip, tmp_path / "none.json", "--table")
    assert result.exit_code == 1 and "there are no results at" in result.output
    result = run(tmp_path / "no.safetensors", tmp_path / "new.json")
    assert result.exit_code == 1 and "--clip must be 'world' or a file" in result.output
    for content in (b"", clip.read_bytes()[:-5000]):
        (tmp_path / "bad.safetensors").write_bytes(content)
        result = run(tmp_path / "bad.safetensors", tmp_path / "new.json")
        assert result.exit_code == 1 and "does not or is damaged" in result.output
    save_file({"weight": torch.zeros(2)}, tmp_path / "bad.safetensors")
    result = run(tmp_path / "bad.safetensors", tmp_path / "new.json")
    assert result.exit_code == 1 and "does not or is damaged" in result.output
    (tmp_path / "bad.safetensors").unlink()
    assert [file.name for file in tmp_path.iterdir()] == ["claims.json"]


BASELINE = {"miou_seen": 0.111, "miou_unseen": 0.077, "hiou": 0.0909}


def record(name: str, seed: int, score: float, **changes: Any) -> dict[str, Any]:
    scores = {"miou_seen": score, "miou_unseen": score / 2, "hiou": score / 1.5}
    return {"variant": name, "seed": seed, "training_seconds": 10.0, "evaluation_seconds": 2.0, **scores, **changes}


def test_table_and_plot_from_made_results(tmp_path):
    out, schedule = tmp_path / "claims.json", claims.Schedule(30, 4, 2e-3)
    settings = claims.Settings(
        "0123", "any", schedule, dataclasses.replace(schedule, steps=77, clip_learning_rate=1e-4), scenes=9
    )
    results = claims.Results(out, settings)
    results.baseline = BASELINE
    for seed, score in enumerate((0.30, 0.40, 0.50)):
        results.add(record("catseg", seed, score))
        results.add(record("catseg-full", 2 - seed, score))
    results.add(record("catseg-full", 7, 0.9))
    results.add(record("catseg-features", 0, 0.123))
    results.add(record("cascade", 0, 0.2, miou_unseen=None))
    result = CliRunner().invoke(claims.main, ["--out", str(out), "--table"])
    assert result.exit_code == 0, result.output

    text = out.with_suffix(".md").read_text()
    published = "40.0 ± 10.0 | 20.0 ± 5.0 | 26.7 ± 6.7 |  | 3 |"
    assert text.count(published) == 3 and f"| costs (published) | {published}" in text
    assert "| features | 12.3 | 6.2 | 8.2 | -8.8 | 1 |" in text
    assert "| full | 52.5 ± 26.3 | 26.2 ± 13.1 | 35.0 ± 17.5 | +0.0 ± 10.0 | 4 |" in text
    assert "| spatial only | - | - | - | - | 0 |" in text
    assert "| NGA (published) | 20.0 | - | 13.3 |  | 1 |" in text
    assert "mIoU seen 11.1, mIoU unseen 7.7, hIoU 9.1." in text
    assert "30 steps of 4 images at a learning rate of 0.002, " in text
    assert "77 steps of 4 images at a learning rate of 0.002 (CLIP 0.0001)" in text and "9 scenes" in text
    for title, variants in COMPARISONS.items():
        assert f"## {title}\n" in text and all(f"\n| {label} | " in text for label in variants)
    with Image.open(out.with_suffix(".png")) as picture:
        assert picture.size[0] > 1000

    figure = claim_tables.plot(BASELINE, results.runs)
    assert [axis.get_title() for axis in figure.axes] == list(COMPARISONS)
    heights = [[round(bar.get_height(), 1) for bar in axis.patches] for axis in figure.axes]
    assert heights == [[12.3, 6.2, 40.0, 20.0], [40.0, 20.0], [40.0, 20.0, 52.5, 26.2], [20.0], [20.0]]


def test_the_estimate_follows_what_runs_took():
    settings = claims.Settings("any", "any", *[claims.Schedule(100, 4, 1e-3)] * 2, scenes=10)
    (step, scene), (cascade_step, cascade_scene) = claims.SECONDS["cat-seg"], claims.SECONDS["cascade-clip"]
    catseg, cascade = 100 * step + 10 * scene, 100 * cascade_step + 10 * cascade_scene
    assert claims.expected_seconds(["catseg", "cascade"], settings, []) == pytest.approx(catseg + cascade)
    twice = [record("catseg", 0, 0.1, training_seconds=2 * catseg - 1, evaluation_seconds=1.0)]
    assert claims.expected_seconds(["cascade"], settings, twice) == pytest.approx(2 * cascade)
    assert claims.expected_seconds(["catseg", "catseg"], settings, twice) == pytest.approx(4 * catseg)
    assert claims.expected_seconds([], settings, twice) == 0


def test_variants_are_new_models(seed, rng):
    """Making one leaves no trace on the presets that others are built from."""
    name = random.choice(list(VARIANTS))
    VARIANTS[name].build(seed, None)
    preset = VARIANTS[name].preset
    assert Variant(preset).build(seed, None).state_dict().keys() == build(preset).state_dict().keys()
    assert claim_forms.Skip()(7, 8) == 7
