"""Segmenter: prompting, caching, windows and errors, on the small models."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from PIL import Image

import ovseg_fast as ovs
from ovseg_fast import ops
from tolerances import GOLDEN_OUTPUT, relative_error

NAMES = ["cat", "grass", "sky"]


@pytest.fixture(params=["catseg-tiny", "cascade-clip-tiny"])
def seg(request):
    torch.manual_seed(1)
    return ovs.load(request.param, weights=None, device="cpu")


@pytest.fixture
def cascade():
    torch.manual_seed(1)
    return ovs.load("cascade-clip-tiny", weights=None, device="cpu")


@pytest.fixture
def photo():
    return np.random.default_rng(3).integers(0, 256, (70, 110, 3), dtype=np.uint8)


def test_result_has_a_label_for_every_pixel(seg, photo):
    out = seg.segment(photo, NAMES)
    assert out.labels.shape == (70, 110) and out.labels.dtype == np.int32
    assert out.labels.min() >= 0 and out.labels.max() < 3
    assert out.classes == NAMES
    assert out.scores.shape == (3, 70, 110) and out.scores.dtype == np.float32
    assert (out.scores >= 0).all() and (out.scores <= 1).all()


@pytest.mark.usefixtures("cpu_library")
def test_the_kernels_for_cpus_run_all_of_it_where_they_are_forced(seg, photo):
    with ovs.backend("torch"):
        expected = seg.segment(photo, NAMES).scores
    with ovs.backend("cpu"):
        assert relative_error(torch.from_numpy(seg.segment(photo, NAMES).scores), torch.from_numpy(expected)) < 1e-4
        ran = {operator for operator in ovs.explain("cpu").choices if ovs.last_backend(operator) == "cpu"}
        assert {"encoder_block", "label_map"} < ran
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError) as caught:
            seg.segment(photo, NAMES)
    sentence = str(caught.value)
    assert sentence.startswith("encoder_block: the cpu backend was asked for but cannot run: under autocast ")
    assert sentence.count(".") == 1 and "\n" not in sentence


def test_labels_are_the_best_scores(seg, photo):
    out = seg.segment(photo, NAMES)
    best = np.sort(out.scores, 0)
    clear = best[-1] - best[-2] > 1e-6
    assert clear.mean() > 0.9
    assert (out.labels == out.scores.argmax(0))[clear].all()


@pytest.mark.parametrize("size", [(2, 3), (10, 300), (31, 33), (97, 97)])
@pytest.mark.parametrize("mode", ["slide", "whole"])
def test_any_image_size(seg, size, mode):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    assert seg.segment(image, NAMES, mode=mode).labels.shape == size


def test_path_pil_and_array_give_the_same(seg, photo, tmp_path):
    Image.fromarray(photo).save(tmp_path / "photo.png")
    images = [tmp_path / "photo.png", str(tmp_path / "photo.png"), Image.fromarray(photo), photo]
    results = seg.segment(images, NAMES, scores=True)
    assert len(results) == 4
    for result in results[1:]:
        assert np.array_equal(result.labels, results[0].labels)
        assert np.array_equal(result.scores, results[0].scores)


def test_one_class_fills_the_picture(seg, photo):
    assert (seg.segment(photo, ["anything"]).labels == 0).all()


def test_many_classes(seg, photo):
    names = [f"thing {i}" for i in range(300)]
    out = seg.segment(photo, names)
    assert out.scores.shape == (300, 70, 110)
    assert (out.labels == out.scores.argmax(0)).mean() > 0.99


@pytest.mark.parametrize("mode", ["slide", "whole"])
def test_classes_that_no_window_kept_are_never_held(photo, mode, monkeypatch):
    """CAT-Seg computes its `pad_length` best classes of each window; the result is that of the logits of all."""
    seg = ovs.load("catseg-tiny", device="cpu")
    names = [f"thing {i}" for i in range(seg.model.config.pad_length + 30)]
    decode, shapes = seg.model.decode, []

    def spy(*arguments, **options):
        shapes.append(decode(*arguments, **options).logits.shape[1])
        return decode(*arguments, **options)

    monkeypatch.setattr(seg.model, "decode", spy)
    out = seg.segment(photo, names, mode=mode)
    assert set(shapes) == {seg.model.config.pad_length}
    monkeypatch.setattr(seg.model, "decode", lambda *args, **options: decode(*args, **{**options, "kept": False}))
    dense = seg.segment(photo, names, mode=mode)
    assert np.array_equal(out.labels, dense.labels)
    assert np.allclose(out.scores, dense.scores, atol=1e-6)
    for found, expected in zip(out.top(5), dense.top(5), strict=True):
        assert np.allclose(found, expected, atol=1e-6)


def test_encode_once_prompt_many(seg, photo):
    calls = []
    handle = seg.model.register_forward_pre_hook(lambda *_: calls.append(1))
    encoder = seg.model.clip.visual if hasattr(seg.model, "clip") else seg.model.image_encoder.clip
    handle = encoder.conv1.register_forward_pre_hook(lambda *_: calls.append(1))
    image = seg.encode(photo)
    encoded = len(calls)
    first, second = image.segment(["cat", "dog"]), image.segment(NAMES)
    assert encoded > 0 and len(calls) == encoded  # prompting runs no image encoder
    handle.remove()
    assert np.array_equal(first.labels, seg.segment(photo, ["cat", "dog"]).labels)
    assert np.array_equal(second.labels, seg.segment(photo, NAMES).labels)


def test_synonyms_use_the_first_name(seg, photo):
    plain = seg.segment(photo, ["cat", "door"])
    synonyms = seg.segment(photo, ["cat, kitten", "door, double door"])
    assert synonyms.classes == ["cat, kitten", "door, double door"]
    assert np.array_equal(plain.scores, synonyms.scores)


def test_own_embeddings_instead_of_names(seg, photo):
    named = seg.segment(photo, NAMES, seen=() if seg.model.preset == "cascade-clip-tiny" else None)
    own = seg.segment(photo, text=3 * seg.embed_text(NAMES), seen=() if "cascade" in seg.model.preset else None)
    assert own.classes == ["class 0", "class 1", "class 2"]
    assert relative_error(own.scores, named.scores) <= GOLDEN_OUTPUT


def test_own_embeddings_as_matrix_or_numpy(seg, photo):
    matrix = np.random.default_rng(0).standard_normal((4, 64))
    one = seg.segment(photo, ["a", "b", "c", "d"], text=matrix)
    other = seg.segment(
        photo, ["a", "b", "c", "d"], text=torch.from_numpy(matrix).float().unsqueeze(1).expand(4, 1, -1)
    )
    assert np.array_equal(one.labels, other.labels)


def test_each_prompt_is_encoded_once(seg):
    calls = []
    seg.model.text_encoder.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape[0]))
    first = seg.embed_text(NAMES)
    again = seg.embed_text(NAMES)
    more = seg.embed_text(["dog", *NAMES])
    prompts = len(seg.templates)
    assert calls == [3 * prompts, prompts]
    assert torch.equal(first, again) and torch.equal(more[1:], first)


def test_text_cache_follows_the_weights(seg):
    before = seg.embed_text(NAMES)
    with torch.no_grad():
        seg.model.text_encoder.ln_final.bias += 1
    after = seg.embed_text(NAMES)
    assert relative_error(after, before) > 1e-3
    assert torch.equal(after, seg.embed_text(NAMES))


def test_segmenting_does_not_change_the_model(seg, photo):
    seg.model.train()
    before = copy.deepcopy(seg.model.state_dict())
    out = seg.segment(photo, NAMES)
    assert seg.model.training
    seg.model.eval()
    assert np.array_equal(out.scores, seg.segment(photo, NAMES).scores)  # no dropout while it trains, either
    assert all(torch.equal(value, before[name]) for name, value in seg.model.state_dict().items())


def test_slide_and_whole_differ(seg, photo):
    assert relative_error(seg.segment(photo, NAMES, mode="whole").scores, seg.segment(photo, NAMES).scores) > 1e-4


def test_catseg_has_as_many_templates_as_prompts():
    with pytest.raises(ValueError, match="templates must hold as many prompts"):
        ovs.Segmenter(ovs.build("catseg-tiny"), templates=["a {}", "the {}"])


def test_cascade_averages_templates(photo):
    model = ovs.build("cascade-clip-tiny").eval()
    both = ovs.Segmenter(model, templates=["a {}", "the {}"]).embed_text(["cat"])
    assert both.shape == (1, 2, 64)
    pooled = model.text_from_prompts(both)
    expected = torch.nn.functional.normalize(both.mean(1), dim=-1)
    assert relative_error(pooled, expected) <= 1e-6


def test_seen_classes_are_lowered(cascade, photo):
    # Of the world's classes, whose seen ones the model is trained on, "red plain circle" is held out of training.
    encoded, names = cascade.encode(photo), ["red plain square", "red plain circle"]
    offsets = cascade._offset(["red plain square", "red plain circle", "Red striped circle, disc", "unicorn"], None)
    assert torch.allclose(offsets, torch.tensor([0.1, 0.0, 0.1, 0.0]))
    default = encoded.segment(names)
    explicit = encoded.segment(names, seen=names[:1])
    nothing = encoded.segment(names, seen=())
    assert np.array_equal(default.scores, explicit.scores)
    assert (default.scores[0] < nothing.scores[0]).all()


def test_seen_is_refused_by_catseg(photo):
    segmenter = ovs.load("catseg-tiny", weights=None, device="cpu")
    with pytest.raises(ValueError, match="seen must be None, as CATSeg treats all classes alike"):
        segmenter.segment(photo, NAMES, seen=["cat"])


def test_cascade_scores_are_a_softmax(cascade, photo):
    assert np.allclose(cascade.segment(photo, NAMES).scores.sum(0), 1, atol=1e-5)


def test_scores_are_computed_only_when_asked_for(seg, photo, monkeypatch):
    calls = []
    real = ops.score_map
    monkeypatch.setattr(ops, "score_map", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
    out = seg.segment(photo, NAMES)
    assert not calls
    assert out.scores is out.scores and calls == [1]


@pytest.mark.parametrize("classes", [2, 12])
def test_top_is_the_best_classes_in_order_without_all_maps(seg, photo, classes, monkeypatch):
    out = seg.segment(photo, [f"thing {i}" for i in range(classes)])
    monkeypatch.setattr(ops, "score_map", None)  # would hold a map of every class
    k = min(classes, 8)
    labels, scores = out.top(k)
    assert labels.shape == scores.shape == (k, 70, 110)
    assert (labels.dtype, scores.dtype) == (np.int32, np.float32)
    assert np.array_equal(labels[0], out.labels)
    assert (np.diff(scores, axis=0) <= 0).all()
    assert (np.diff(np.sort(labels, 0), axis=0) > 0).all()  # each class once
    first, best = out.top(1)
    assert np.array_equal(first[0], labels[0]) and np.array_equal(best[0], scores[0])
    monkeypatch.undo()
    ranked = np.sort(out.scores, 0)[::-1]
    assert np.allclose(np.take_along_axis(out.scores, labels, 0), ranked[:k], atol=1e-6)
    if seg.model.preset == "catseg-tiny":
        assert np.allclose(scores, ranked[:k], atol=1e-6)
    for bad in (0, k + 1):
        with pytest.raises(ValueError, match=f"k must be in .* = {k}, got {bad}"):
            out.top(bad)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"classes": []}, ValueError, "class"),
        ({"classes": ["cat", ""]}, ValueError, "empty"),
        ({"classes": ["cat", "Cat"]}, ValueError, "differ, got 'Cat' at position 2"),
        ({"classes": "cat"}, (TypeError, ValueError), "list"),
        ({"classes": None}, ValueError, "classes must be a list of names"),
        ({"classes": NAMES, "mode": "tile"}, ValueError, "mode must be 'slide' or 'whole'"),
        ({"text": torch.ones(2, 1, 64, dtype=torch.long)}, TypeError, "floating-point"),
        ({"text": torch.ones(2)}, ValueError, r"\(T, P, E\)"),
        ({"text": torch.ones(0, 1, 64)}, ValueError, "no size zero"),
        ({"text": torch.ones(2, 1, 31)}, ValueError, "text must have shape"),
        ({"text": torch.full((2, 1, 64), float("nan"))}, ValueError, "finite"),
        ({"text": torch.ones(2, 1, 64), "classes": NAMES}, ValueError, "name the 2 rows"),
        ({"text": torch.ones(2, 64, dtype=torch.float64) * 1e200}, ValueError, "text must have rows .* length inf"),
        ({"text": torch.ones(2, 64) * 1e25}, ValueError, "text must have rows .* length 8e"),
        ({"text": torch.full((2, 64), 6e4, dtype=torch.float16)}, ValueError, "text must have rows .* length 4"),
        ({"text": torch.eye(64)[:2] * torch.tensor([[1.0], [0.0]])}, ValueError, "text must have rows .* length 0"),
        ({"text": torch.ones(2, 64) * 1e-20}, ValueError, "text must have rows .* length 8e-20"),
        ({"text": "cat"}, TypeError, r"text must be a tensor or an array .*, got str\."),
        ({"text": [[1.0, 2.0], [3.0]]}, TypeError, r"text must be a tensor or an array .*, got list\."),
        ({"text": [[10**400]]}, TypeError, r"text must be a tensor or an array .*, got list\."),
        ({"text": np.array([["a", 1.0]], dtype=object)}, TypeError, r"text must be a tensor .*, got ndarray\."),
        ({"text": {"cat": 1}}, TypeError, r"text must be a tensor or an array .*, got dict\."),
        ({"text": torch.ones(2, 64).to_sparse()}, TypeError, "text must be a dense tensor .*, got a sparse one"),
        ({"text": torch.ones(2, 64, device="meta")}, TypeError, "text must be a dense tensor .*, got a meta one"),
        (
            {"text": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)},
            TypeError,
            "got a nested one",
        ),
    ],
)
def test_bad_arguments(seg, photo, arguments, error, words, monkeypatch):
    if "must have shape" not in words:  # of a width that only the model knows
        monkeypatch.setattr(seg.model, "encode_pixels", None)
    with pytest.raises(error, match=words) as caught:
        seg.segment(photo, **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "arguments", "error", "words"),
    [
        ("catseg-huge", {}, ValueError, "name must be one of catseg-vitb"),
        ("catseg-tiny", {"weights": "nowhere.pth"}, FileNotFoundError, "nowhere.pth"),
        ("catseg-tiny", {"weights": None, "device": "tpu9"}, ValueError, "device"),
        ("cascade-clip-vitb-voc", {}, ValueError, "no weights of cascade-clip-vitb-voc"),
    ],
)
def test_bad_loading(name, arguments, error, words):
    with pytest.raises(error, match=words):
        ovs.load(name, **arguments)


@pytest.mark.parametrize("seen", [5, "cat", b"cat", ["dog"], [3], [["cat"]], NAMES[0][0], iter(NAMES)])
def test_seen_is_a_list_of_names(cascade, photo, seen, monkeypatch):
    monkeypatch.setattr(cascade.model, "encode_pixels", None)
    with pytest.raises((TypeError, ValueError), match=r"^seen must be a list of names out of classes, got .*\.$"):
        cascade.segment(photo, NAMES, seen=seen)


@pytest.mark.parametrize("k", ["a", 1.5, True, None, float("nan"), [1]])
@pytest.mark.parametrize("kept", [True, False])
def test_top_takes_a_whole_number(seg, photo, k, kept):
    out = seg.segment(photo, NAMES)
    if not kept:
        scores = out.scores
        out = ovs.Segmentation(out.image, NAMES, out.labels, lambda: scores)
    with pytest.raises(TypeError, match=r"^k must be a whole number, got "):
        out.top(k)
    assert np.array_equal(out.top(np.int64(2))[0], out.top(2)[0])


@pytest.mark.parametrize(
    "templates", ["a photo of {}", 5, [], ["a photo"], [5], ["{} {}"], [None], ["a {}", b"a {}"], {"a {}": 1, "b": 2}]
)
def test_templates_are_refused_when_a_segmenter_is_made(seg, templates):
    with pytest.raises(
        (TypeError, ValueError), match=r"^(templates must hold|templates must be|a template must) .*got"
    ):
        ovs.Segmenter(seg.model, templates=templates)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_reported():
    with pytest.raises(RuntimeError, match="no CUDA GPU"):
        ovs.load("catseg-tiny", weights=None, device="cuda")
