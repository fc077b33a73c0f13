"""Every operator at its published sizes: the literal form and the operator, each row of `tests/samples` tagged bench.

.venv/bin/pytest benchmarks/bench_operators.py --benchmark-only -k cost_volume     one operator
"""

from __future__ import annotations

from typing import Any

import pytest
from operator_forms import compare

from samples import Sample, select

# Score maps and top labels are the work of a label map.
ROWS = [row for row in select("bench") if row.operator != "label_map" or row.function == "label_map"]


@pytest.mark.parametrize("form", ["literal", "operator"])  # by turns: both share what `compare` checks
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_operator(benchmark: Any, row: Sample, form: str) -> None:
    compare(benchmark, row, form)
