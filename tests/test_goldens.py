"""The generator of weights and inputs gives what the goldens were made from."""

from __future__ import annotations

import json

import pytest

from goldens import PARITY
from parity import fill


@pytest.mark.parametrize("row", json.loads((PARITY / "fill_check.json").read_text()), ids=lambda r: r["name"])
def test_generated_arrays_are_those_of_the_goldens(row):
    if row["kind"] == "image":
        array = fill.image(row["name"], *row["shape"], row["salt"])
    elif row["kind"] == "tokens":
        array = fill.tokens(row["shape"][0], row["salt"], row["name"])
    elif row["kind"] == "labels":
        array = fill.labels(row["name"], *row["shape"], row["classes"], row["salt"])
    elif row["kind"] == "sample_index":
        array = fill.sample_index(row["name"], row["size"])
    else:
        array = getattr(fill, row["kind"])(row["name"], row["shape"], row["salt"])
    assert fill.checksum(array) == row["crc32"]
