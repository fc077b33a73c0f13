"""Compact token tables: nothing is lost, nothing else changes, damage is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ovseg_fast as ovs
from ovseg_fast import checkpoints
from ovseg_fast.models.token_table import (
    CLIP_TOKENS,
    IDS,
    ROWS,
    TABLE,
    compact,
    compact_embedding,
    expand,
    expand_embedding,
)

KNOWN = torch.tensor([7, 320, 49406, 49407])


def table(rng: torch.Generator, width: int = 8) -> torch.Tensor:
    return expand_embedding(KNOWN, torch.randn(len(KNOWN) + 1, width, generator=rng))


def test_compacting_round_trip(rng: torch.Generator) -> None:
    whole = table(rng)
    ids, rows = compact_embedding(whole)
    assert torch.equal(ids, KNOWN) and rows.shape == (5, 8)
    assert torch.equal(expand_embedding(ids, rows), whole)
    state = {"clip.text." + TABLE: whole, "clip.logit_scale": torch.ones(())}
    small = compact(state)
    assert small.keys() == {"clip.text." + IDS, "clip.text." + ROWS, "clip.logit_scale"}
    back = expand(small)
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)


def test_full_tables_are_unchanged(rng: torch.Generator) -> None:
    state = {"text." + TABLE: torch.randn(CLIP_TOKENS, 2, generator=rng), "other." + TABLE: torch.zeros(5, 2)}
    assert compact(state) == state
    assert expand(state) == state


@pytest.mark.parametrize(
    "change",
    [
        {ROWS: None},
        {ROWS: torch.zeros(3, 8)},
        {ROWS: torch.zeros(5)},
        {IDS: torch.tensor([1, 2, 3, CLIP_TOKENS])},
        {IDS: torch.tensor([1, 2, 3, -1])},
        {IDS: torch.tensor([1.0, 2.0, 3.0, 4.0])},
    ],
)
def test_damage_is_refused(rng: torch.Generator, change: dict[str, torch.Tensor | None]) -> None:
    ids, rows = compact_embedding(table(rng))
    state = {name: tensor for name, tensor in ({IDS: ids, ROWS: rows} | change).items() if tensor is not None}
    with pytest.raises(ValueError, match="known_ids' must hold the ids of tokens"):
        expand(state)


def test_checkpoints_store_them_compactly_and_in_half_the_space(tmp_path: Path, rng: torch.Generator) -> None:
    model, other = ovs.build("catseg-tiny"), ovs.build("catseg-tiny")
    with torch.no_grad():
        model.clip.text.token_embedding.weight.copy_(table(rng, 64))
    checkpoints.save(model, tmp_path / "whole.safetensors")
    checkpoints.load(other, tmp_path / "whole.safetensors")
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())
    checkpoints.save(model, tmp_path / "half.safetensors", half=True)
    whole, half = ((tmp_path / f"{name}.safetensors").stat().st_size for name in ("whole", "half"))
    assert half < 0.6 * whole < 3e6
    checkpoints.load(other, tmp_path / "half.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.half().float(), other.state_dict()[name])


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"clip.text." + IDS: torch.tensor([1, 2])}, tmp_path / "bad.safetensors")
    with pytest.raises(checkpoints.CheckpointError, match=r"bad\.safetensors' is damaged"):
        checkpoints.load(ovs.build("catseg-tiny"), tmp_path / "bad.safetensors")
