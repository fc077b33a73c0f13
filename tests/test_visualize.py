"""Colours, overlays with a legend, label images."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from ovseg_fast import visualize
from ovseg_fast.visualize import GRADIENT, Panel, check_label_map, cost_map, key, label_image, overlay, palette, panels

NAMES = [
    "cat",
    "grass",
    "sky",
    "door, double door",
    "a name that is far too long for any legend whatever its size",
    "x",
]


def photograph(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.randint(0, 256, (height, width, 3), dtype=np.uint8))


def regions(width: int, height: int, classes: int) -> np.ndarray:
    """Every class appears where there are enough pixels, the lower ones over more of the picture."""
    values = np.sqrt(np.linspace(0, 1, height * width, endpoint=False)) * classes
    return classes - 1 - values.astype(np.int64).reshape(height, width)


# Colours


@given(st.integers(0, 3000), st.integers(0, 3000))
def test_a_class_keeps_its_colour(n: int, m: int) -> None:
    small, large = sorted((n, m))
    assert palette(small).shape == (small, 3) and palette(small).dtype == np.uint8
    assert np.array_equal(palette(large)[:small], palette(small))


@pytest.mark.parametrize("n", [20, 171, 1024, 1025, 66_000])
def test_colours_are_distinct(n: int) -> None:
    assert len({tuple(colour) for colour in palette(n).tolist()}) == n


@pytest.mark.parametrize(("n", "distance"), [(10, 80), (30, 45), (171, 16)])
def test_colours_can_be_told_apart(n: int, distance: float) -> None:
    colours = palette(n).astype(float)
    between = np.linalg.norm(colours[:, None] - colours, axis=-1) + np.diag(np.full(n, np.inf))
    assert between.min() > distance
    assert np.ptp(colours, axis=1).min() > 25, "no greys: they vanish in a photograph"


def test_palette_is_not_shared() -> None:
    palette(5)[:] = 0
    assert palette(5).any()
    with pytest.raises(ValueError, match="at least 0, got -1"):
        palette(-1)


# Overlays


def inside(labels: np.ndarray, margin: int = 8) -> np.ndarray:
    """Pixels far from any border."""
    same = np.ones(labels.shape, dtype=bool)
    for axis in (0, 1):
        change = np.diff(labels, axis=axis) != 0
        for at in zip(*np.nonzero(change), strict=True):
            near = tuple(slice(max(0, i - margin), i + margin + 1) for i in at)
            same[near] = False
    return same


@pytest.mark.parametrize("alpha", [0, 0.3, 0.5, 1])
def test_colours_lie_over_the_photograph(alpha: float) -> None:
    image = photograph(60, 50)
    labels = np.zeros((50, 60), dtype=np.uint8)
    labels[:20, :30], labels[30:, 10:] = 1, 2
    before = np.asarray(image).copy()
    result = overlay(image, labels, NAMES, alpha=alpha, legend=False)
    assert result.mode == "RGB" and result.size == image.size
    expected = (1 - alpha) * before + alpha * palette(3)[labels]
    far = inside(labels)
    assert far.mean() > 0.2
    assert np.abs(np.asarray(result)[far] - expected[far]).max() <= 1
    assert np.array_equal(np.asarray(image), before)


def test_regions_have_thin_borders() -> None:
    labels = np.zeros((50, 60), dtype=np.int32)
    labels[:, 30:] = 1
    result = np.asarray(overlay(Image.new("RGB", (60, 50)), labels, NAMES, alpha=1, legend=False))
    for column, colour in [(29, palette(2)[0]), (31, palette(2)[1])]:
        assert (result[:, column] == colour).all()
    assert (result[:, 30] > palette(2)[1]).any() and not (result[:, 30] == palette(2)[1]).all()


def test_borders_widen_with_the_picture() -> None:
    labels = np.zeros((2000, 2000), dtype=np.int32)
    labels[:, 1000:] = 1
    result = np.asarray(overlay(Image.new("RGB", (2000, 2000)), labels, NAMES, alpha=1, legend=False))
    assert (result[5] != palette(2)[labels[5]]).any(-1).sum() == 4


def test_one_class_has_no_border() -> None:
    result = overlay(Image.new("RGB", (60, 50)), np.full((50, 60), 4), NAMES, alpha=1, legend=False)
    assert (np.asarray(result) == palette(5)[4]).all()


class Written:
    """What was written where: texts with their boxes, and swatches."""

    def __init__(self) -> None:
        self.texts: list[tuple[str, tuple[float, float, float, float]]] = []
        self.swatches: list[tuple[tuple[float, ...], tuple[int, ...]]] = []

    def rows(self) -> list[tuple[str, str]]:
        """(name, share) of each entry."""
        texts = [text for text, _ in self.texts]
        return list(zip(texts[::2], texts[1::2], strict=True))


@pytest.fixture
def written(monkeypatch) -> Iterator[Written]:
    record = Written()
    text, rectangle = ImageDraw.ImageDraw.text, ImageDraw.ImageDraw.rectangle

    def record_text(self, xy, string, fill, font, anchor):
        record.texts.append((string, self.textbbox(xy, string, font, anchor)))
        return text(self, xy, string, fill, font, anchor=anchor)

    def record_rectangle(self, xy, colour):
        record.swatches.append((xy, colour))
        return rectangle(self, xy, colour)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record_text)
    monkeypatch.setattr(ImageDraw.ImageDraw, "rectangle", record_rectangle)
    yield record


def number(share: str) -> float:
    assert share.endswith(" %")
    return 0.05 if share.startswith("<") else float(share[:-2])


def check_layout(written: Written, page: Image.Image, picture: tuple[int, int]) -> None:
    """Everything is inside the page, outside the picture, and apart."""
    boxes = [box for _, box in written.texts] + [box for box, _ in written.swatches]
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= page.width and 0 <= top < bottom <= page.height
        assert left >= picture[0] or top >= picture[1]
    for i, one in enumerate(boxes):
        for two in boxes[:i]:
            beside = one[0] >= two[2] + 4 or two[0] >= one[2] + 4
            assert beside or one[1] >= two[3] or two[1] >= one[3]


SIZES = [(20, 20), (2, 2), (30, 10), (451, 300), (300, 451), (320, 199), (640, 480), (2, 3000), (3000, 2), (17, 900)]
SIZES += [(5000, 300), (2500, 1800)]


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("classes", [1, 6, 300])
def test_legend(written: Written, size: tuple[int, int], classes: int) -> None:
    image = photograph(*size)
    labels = regions(*size, classes)
    names = (NAMES + [f"class {i}" for i in range(6, 300)])[:classes]
    page = overlay(image, labels, names)
    counts = np.bincount(labels.ravel(), minlength=classes)

    # The picture itself, perhaps enlarged, stays in the corner.
    factor = -(-320 // max(size)) if max(size) < 320 else 1
    picture = (size[0] * factor, size[1] * factor)
    assert max(picture) >= 320
    plain = overlay(
        image.resize(picture, Image.Resampling.NEAREST), labels.repeat(factor, 0).repeat(factor, 1), names, legend=False
    )
    assert np.array_equal(np.asarray(page.crop((0, 0, *picture))), np.asarray(plain))
    assert page.width == picture[0] or page.height == picture[1]

    check_layout(written, page, picture)
    assert min(bottom - top for _, (_, top, _, bottom) in written.texts) >= 7

    # Only classes that appear, the most first, at most as many as fit.
    rows = written.rows()
    more = [name for name, _ in rows if name.startswith("+ ")]
    shown = len(rows) - len(more)
    present = int(np.count_nonzero(counts))
    assert more == ([] if shown == present else [f"+ {present - shown} more"])
    assert shown >= min(present, 7)
    order = np.argsort(-counts, kind="stable")[:shown]
    for (name, share), index in zip(rows, order, strict=False):
        assert name == names[index] or (name.endswith("…") and names[index].startswith(name[:-1]))
        assert abs(number(share) - 100 * counts[index] / counts.sum()) <= 0.05 + 1e-9
    assert [colour for _, colour in written.swatches] == [tuple(palette(classes)[i].tolist()) for i in order]
    assert abs(sum(number(share) for _, share in rows) - 100) <= 0.05 * len(rows) + 1e-9

    # It was really drawn.
    pixels = np.asarray(page)
    for (left, top, right, bottom), colour in written.swatches:
        assert (pixels[top : bottom + 1, left : right + 1] == colour).all()
    for _, box in written.texts:
        left, top, right, bottom = map(int, box)
        assert pixels[top:bottom, left:right].min() < 120


@pytest.mark.parametrize("size", [(320, 330), (700, 330)])
def test_legend_of_any_length(written: Written, size: tuple[int, int]) -> None:
    lengths = set()
    for classes in range(1, 70):
        written.texts.clear()
        written.swatches.clear()
        page = overlay(photograph(*size), regions(*size, classes), [f"class {i}" for i in range(classes)])
        check_layout(written, page, size)
        rows = written.rows()
        more = classes - len(written.swatches)
        assert len(rows) == len(written.swatches) + (more > 0)
        if more:
            assert rows[-1][0] == f"+ {more} more"
        lengths.add((len(rows), more))
    longest = max(length for length, _ in lengths)
    assert (longest, 0) in lengths and (longest, 2) in lengths and (longest, 1) not in lengths


def test_absent_classes_are_left_out(written: Written) -> None:
    labels = np.full((50, 60), 2)
    labels[:10] = 5
    overlay(photograph(60, 50), labels, NAMES)
    assert written.rows() == [("sky", "80.0 %"), ("x", "20.0 %")]


def test_tiny_shares_are_not_shown_as_zero(written: Written) -> None:
    labels = np.zeros((500, 500), dtype=np.int32)
    labels[3, 4] = 1
    overlay(photograph(500, 500), labels, NAMES)
    assert written.rows() == [("cat", "100.0 %"), ("grass", "< 0.1 %")]


def test_long_names_are_cut_short_names_are_not(written: Written) -> None:
    overlay(photograph(451, 300), regions(451, 300, 6), NAMES)
    names = [name for name, _ in written.rows()]
    assert {"cat", "grass", "sky", "door, double door", "x"} < set(names)
    (cut,) = [name for name in names if name.endswith("…")]
    assert len(cut) > 15 and NAMES[4].startswith(cut[:-1].rstrip())


def test_a_name_of_several_lines_takes_one(written: Written) -> None:
    overlay(photograph(60, 50), np.zeros((50, 60), dtype=int), ["cat\nand   dog"])
    assert written.rows() == [("cat and dog", "100.0 %")]


def test_legend_is_larger_in_larger_pictures(written: Written) -> None:
    heights = []
    for width, height in [(600, 400), (3000, 2000)]:
        written.texts.clear()
        overlay(Image.new("RGB", (width, height)), np.zeros((height, width), dtype=int), ["cat"])
        top, bottom = written.texts[0][1][1::2]
        heights.append(bottom - top)
    assert heights[1] > 3 * heights[0]


def test_other_modes_of_the_photograph() -> None:
    labels = regions(60, 50, 3)
    image = photograph(60, 50)
    expected = np.asarray(overlay(image.convert("L").convert("RGB"), labels, NAMES))
    assert np.array_equal(np.asarray(overlay(image.convert("L"), labels, NAMES)), expected)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"labels": np.zeros((60, 50), int)}, ValueError, r"50 x 60 .*got \(60, 50\)"),
        ({"labels": np.zeros((1, 50, 60), int)}, ValueError, r"\(H, W\).*got \(1, 50, 60\)"),
        ({"labels": np.zeros((0, 60), int)}, ValueError, r"got \(0, 60\)"),
        ({"labels": np.zeros((50, 60))}, TypeError, "integers, got float64"),
        ({"labels": np.zeros((50, 60), bool)}, TypeError, "integers, got bool"),
        ({"labels": np.full((50, 60), -1)}, ValueError, r"0\.\.5 for 6 classes, got -1\.\.-1"),
        ({"labels": np.full((50, 60), 6)}, ValueError, r"0\.\.5 for 6 classes, got 6\.\.6"),
        ({"alpha": 1.1}, ValueError, "alpha .* got 1.1"),
        ({"alpha": -0.1}, ValueError, "alpha .* got -0.1"),
        ({"alpha": float("nan")}, ValueError, "alpha .* got nan"),
    ],
)
def test_bad_arguments(change: dict, error: type[Exception], words: str) -> None:
    arguments = {"image": photograph(60, 50), "labels": np.zeros((50, 60), int), "classes": NAMES} | change
    with pytest.raises(error, match=words):
        overlay(**arguments)


# Labels


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.int64, np.uint64])
def test_check_label_map(dtype) -> None:
    labels = np.random.randint(0, 7, (5, 6)).astype(dtype)[:, ::2]
    result = check_label_map(labels, 7)
    assert result.dtype == np.int32 and result.flags.c_contiguous and np.array_equal(result, labels)


@pytest.mark.parametrize(("n", "mode"), [(1, "P"), (2, "P"), (3, "P"), (17, "P"), (256, "P"), (257, "I;16")])
@pytest.mark.parametrize("extreme", [False, True])
def test_label_image_round_trip(n: int, mode: str, extreme: bool) -> None:
    labels = np.random.randint(0, n, (21, 34))
    labels[0, 0] = n - 1 if extreme else 0
    image = label_image(labels, n)
    assert image.mode == mode
    file = io.BytesIO()
    image.save(file, "PNG")
    again = Image.open(file)
    assert np.array_equal(np.asarray(again), labels)
    if mode == "P":
        assert again.mode == "P"  # 16 bits come back as I;16 or I, by the version of PIL
        assert np.array_equal(np.asarray(again.convert("RGB")), palette(n)[labels])


def test_label_image_of_many_classes() -> None:
    labels = np.random.randint(0, 65_536, (21, 34))
    labels[0, 0] = 65_535
    assert np.array_equal(np.asarray(label_image(labels, 65_536)), labels)
    with pytest.raises(ValueError, match="at most 65536 classes, got 65537"):
        label_image(labels, 65_537)
    with pytest.raises(ValueError, match="classes, got"):
        label_image(labels, 65_535)


def test_ellipsis_keeps_as_much_as_fits() -> None:
    font = visualize.ImageFont.load_default(13)
    text = "abcdefghij" * 3
    for width in range(20, 260, 7):
        cut = visualize._fit(text, font, width)
        assert font.getlength(cut) <= width
        if cut != text:
            longer = text[: len(cut)] + "…"
            assert font.getlength(longer) > width


# Cost maps and pages


def luminance(pixels: np.ndarray) -> np.ndarray:
    return np.asarray(pixels, dtype=float) @ (0.2126, 0.7152, 0.0722)


def test_cost_map_is_lighter_where_values_are_higher() -> None:
    values = np.random.normal(size=(20, 30))
    picture = cost_map(values)
    assert picture.mode == "RGB" and picture.size == (30, 20)
    order = np.argsort(values.ravel())
    light = luminance(np.asarray(picture)).ravel()[order]
    assert (np.diff(light) > -1.5).all()  # colours are rounded
    assert tuple(np.asarray(picture).reshape(-1, 3)[order[0]]) == GRADIENT[0]
    assert tuple(np.asarray(picture).reshape(-1, 3)[order[-1]]) == GRADIENT[-1]


def test_cost_maps_on_one_scale_can_be_compared() -> None:
    values = np.random.uniform(-0.5, 0.5, (2, 8, 9))
    low, high = float(values.min()), float(values.max())
    apart = [np.asarray(cost_map(part, low, high)) for part in values]
    assert np.array_equal(np.concatenate(apart), np.asarray(cost_map(values.reshape(16, 9))))
    clipped = np.asarray(cost_map([[-9.0, 9.0]], low, high))
    assert clipped.tolist() == [[list(GRADIENT[0]), list(GRADIENT[-1])]]


def test_cost_map_of_one_value_is_one_colour_of_the_middle() -> None:
    colours = np.unique(np.asarray(cost_map(np.full((3, 4), 0.7))).reshape(-1, 3), axis=0)
    assert len(colours) == 1
    assert luminance(GRADIENT[0]) < luminance(colours)[0] < luminance(GRADIENT[-1])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((np.zeros((2, 3, 4)),), r"\(H, W\).*got \(2, 3, 4\)"),
        ((np.zeros((0, 4)),), r"got \(0, 4\)"),
        ((np.array([[0.0, np.nan]]),), "finite"),
        ((np.array([[0.0, np.inf]]),), "finite"),
        ((np.zeros((2, 3)), 1.0, 0.0), "low must not be above high, got 1.0 and 0.0"),
        ((np.zeros((2, 3)), float("nan"), 0.0), "low must be a finite number, got nan"),
    ],
)
def test_bad_cost_maps(arguments: tuple, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        cost_map(*arguments)


def find(page: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """The box of a colour, all of which must have it."""
    rows, columns = np.nonzero((np.asarray(page) == colour).all(-1))
    box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert len(rows) == (box[2] - box[0]) * (box[3] - box[1])
    return box


@pytest.mark.parametrize(("size", "expected"), [((40, 30), (120, 90)), ((96, 96), (120, 120)), ((300, 600), (60, 120))])
def test_panels_have_one_size_and_what_is_written_lies_between_them(written: Written, size, expected) -> None:
    colours = [(200, 10 * i, 20) for i in range(8)]
    plain = [Image.new("RGB", size, colour) for colour in colours]
    rows = [
        [Panel(plain[0], "first"), Panel(plain[1], "second", "more", "a note"), Panel(plain[2])],
        [Panel(image, f"title {i}", "sub", "x to y", (1, 2, 3 + i)) for i, image in enumerate(plain[3:5])],
        [Panel(image, note="below") for image in plain[5:]],
    ]
    page = panels(rows, "A title", "and a line below", side=120)
    boxes = [find(page, colour) for colour in colours]
    assert {(right - left, bottom - top) for left, top, right, bottom in boxes} == {expected}
    assert [box[1] for box in boxes[:3]] == [boxes[0][1]] * 3  # a row is level
    assert [box[0] for box in boxes[:3]] == [box[0] for box in boxes[5:]]  # a column upright
    assert boxes[3][0] == boxes[0][0]
    assert len(written.swatches) == 2
    everything = [box for _, box in written.texts] + [box for box, _ in written.swatches]
    for left, top, right, bottom in everything:
        assert 0 <= left < right <= page.width and 0 <= top < bottom <= page.height
        for panel in boxes:
            assert right <= panel[0] or left >= panel[2] or bottom <= panel[1] or top >= panel[3]
    for i, one in enumerate(everything):
        for two in everything[:i]:
            assert one[2] <= two[0] or two[2] <= one[0] or one[3] <= two[1] or two[3] <= one[1]


def test_long_titles_end_at_their_panel(written: Written) -> None:
    long = "a name that is far too long for any panel"
    panels([[Panel(Image.new("RGB", (50, 50)), long, long, long, (1, 2, 3))]], long, long, side=100)
    assert len(written.texts) == 5
    assert all(text.endswith("…") and len(text) > 5 for text, _ in written.texts)
    assert {box[2] <= 13 + 100 + 22 for _, box in written.texts} == {True}


def test_panels_enlarged_by_whole_steps_stay_sharp() -> None:
    pixels = np.random.randint(0, 2, (20, 20), dtype=np.uint8) * 255
    page = np.asarray(panels([[Panel(Image.fromarray(pixels))]], side=60).convert("L"))
    expected = pixels.repeat(3, 0).repeat(3, 1)
    places = [
        (y, x)
        for y in range(page.shape[0] - 59)
        for x in range(page.shape[1] - 59)
        if np.array_equal(page[y : y + 60, x : x + 60], expected)
    ]
    assert len(places) == 1


def test_bad_pages() -> None:
    for rows in ([], [[]], [[], []]):
        with pytest.raises(ValueError, match="at least one panel, got none"):
            panels(rows)
    with pytest.raises(ValueError, match="side must be a number of pixels of at least 32, got 31"):
        panels([[Panel(photograph(5, 5))]], side=31)


def test_key_holds_what_fits_and_counts_the_rest(written: Written) -> None:
    entries = [((10 * i, 200, 30), f"name {i}") for i in range(20)]
    image = key(entries[:5], 192, 192)
    assert image.size == (192, 192)
    assert [text for text, _ in written.texts] == [f"name {i}" for i in range(5)]
    assert [colour for _, colour in written.swatches] == [colour for colour, _ in entries[:5]]
    written.texts.clear()
    written.swatches.clear()
    key(entries, 192, 192)
    shown = len(written.swatches)
    assert 5 < shown < 20 and written.texts[-1][0] == f"+ {20 - shown} more"
    for left, top, right, bottom in [box for _, box in written.texts] + [box for box, _ in written.swatches]:
        assert 0 <= left < right <= 192 and 0 <= top < bottom <= 192
