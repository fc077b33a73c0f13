"""What an evaluation resumes from, and what it does not: changed files, damaged states, another run into its result."""

from __future__ import annotations

import json
import logging
import os
import random
import re
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image

import ovseg_fast as ovs
from evaluation.photo_folder import PhotoFolder, make_photos
from ovseg_fast import backends
from ovseg_fast.evaluation import evaluate as evaluation
from ovseg_fast.evaluation.evaluate import Run, check_target, evaluate
from ovseg_fast.evaluation.state import FORMAT, State, StateError, stamp
from ovseg_fast.files import held

DAMAGED = r"result\.partial\.npz' is not the state of an evaluation, or is damaged; start over .*\(--restart\).*\.$"


@pytest.fixture(scope="module")
def segmenter():
    torch.manual_seed(11)
    return ovs.Segmenter(ovs.build("catseg-tiny"))


class Stopped(BaseException):
    """As a kill: nothing catches it."""


def run(segmenter, dataset, out=None, **options):
    return evaluate(segmenter, dataset, out, **{"mode": "whole", "progress": False, **options})


def stop_after(segmenter, photos, done, out):
    """An evaluation that is killed once this many images are done."""
    read = photos.read

    def stop(index):
        if index == done:
            raise Stopped
        return read(index)

    photos.read = stop
    with pytest.raises(Stopped):
        run(segmenter, photos, out, save_seconds=0)
    photos.read = read


@pytest.fixture
def photos(tmp_path):
    return make_photos(tmp_path / "photos", 4, random.getrandbits(31))


# Files that changed


@pytest.mark.parametrize("which", ["image", "mask"])
def test_a_file_that_changed_since_it_was_evaluated_is_noticed(segmenter, photos, tmp_path, which):
    out = tmp_path / "result.json"
    stop_after(segmenter, photos, 3, out)
    path = getattr(photos.pairs[1], which)
    with Image.open(path) as image:
        blank = Image.new(image.mode, image.size)
    blank.save(path)
    before = (tmp_path / "result.partial.npz").read_bytes()
    with pytest.raises(
        StateError, match=r"cannot be resumed: image or mask of 001 has changed since it was evaluated; .*--restart"
    ):
        run(segmenter, photos, out)
    assert (tmp_path / "result.partial.npz").read_bytes() == before
    assert run(segmenter, photos, out, restart=True).metrics == run(segmenter, photos).metrics


def test_a_file_of_the_same_size_that_is_gone_or_newer_is_noticed(segmenter, photos, tmp_path):
    out = tmp_path / "result.json"
    stop_after(segmenter, photos, 3, out)
    mask = photos.pairs[0].mask
    status = mask.stat()
    os.utime(mask, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    photos.pairs[2].image.unlink()
    with pytest.raises(StateError, match="image or mask of 000 and 1 more have changed"):
        run(segmenter, photos, out)


def test_a_file_that_is_not_done_may_change(segmenter, photos, tmp_path):
    out = tmp_path / "result.json"
    stop_after(segmenter, photos, 2, out)
    Image.new("L", Image.open(photos.pairs[3].mask).size).save(photos.pairs[3].mask)
    assert run(segmenter, photos, out).metrics == run(segmenter, photos).metrics


def test_operators_of_the_stopped_run_are_told_even_if_nothing_is_left_to_do(segmenter, photos, tmp_path, monkeypatch):
    """Killed after the last image and before the result: the resuming process runs no operator."""
    out = tmp_path / "result.json"
    with monkeypatch.context() as patch:
        patch.setattr(evaluation.Evaluation, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(segmenter, photos, out)
    monkeypatch.setattr(backends, "_last", {})
    operators = run(segmenter, photos, out).settings["operators"]
    assert {"cost_embedding", "label_map", "spatial_aggregation"} <= set(operators)


def test_pairs_without_files_have_no_stamp():
    class Drawn:
        name = "drawn"

    assert stamp(Drawn()) == [-1] * 4


def test_a_state_of_an_older_version_is_refused(segmenter, photos, tmp_path):
    out = tmp_path / "result.json"
    stop_after(segmenter, photos, 2, out)
    with np.load(tmp_path / "result.partial.npz") as file:
        about = json.loads(str(file["about"]))
        about = {"fingerprint": {k: v for k, v in about["fingerprint"].items() if k != "state format"}, "seconds": 1.0}
        np.savez(
            tmp_path / "result.partial.npz", about=np.array(json.dumps(about)), matrix=file["matrix"], done=file["done"]
        )
    with pytest.raises(StateError, match=r"an evaluation with other state format; .*--restart"):
        run(segmenter, photos, out)


def autocast(dtype):
    return torch.autocast("cpu", dtype) if dtype else nullcontext()


@pytest.mark.parametrize(
    ("before", "after"), [(torch.bfloat16, None), (None, torch.bfloat16), (torch.bfloat16, torch.float16)]
)
def test_a_run_under_autocast_resumes_under_the_same_only(segmenter, photos, tmp_path, before, after):
    out = tmp_path / "result.json"
    with autocast(before):
        stop_after(segmenter, photos, 2, out)
    with autocast(after), pytest.raises(StateError, match=r"an evaluation with other precision; .*--restart"):
        run(segmenter, photos, out)
    with autocast(before):
        result = run(segmenter, photos, out)
        assert result.metrics == run(segmenter, photos).metrics
    said = {None: "float32", torch.bfloat16: "float32 under autocast to bfloat16"}[before]
    assert result.settings["precision"] == said


def test_another_backend_and_other_products_are_told(segmenter, photos, tmp_path, caplog):
    out, before = tmp_path / "result.json", torch.get_float32_matmul_precision()
    stop_after(segmenter, photos, 2, out)
    torch.set_float32_matmul_precision("high")
    try:
        with caplog.at_level(logging.WARNING), ovs.backend("torch"):
            assert run(segmenter, photos, out).settings["float32_products"] == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert f"backend auto is now torch, float32 products {before} is now high" in caplog.text


def test_another_environment_is_told(segmenter, photos, tmp_path, caplog):
    out = tmp_path / "result.json"
    stop_after(segmenter, photos, 2, out)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with caplog.at_level(logging.WARNING):
            run(segmenter, photos, out)
    finally:
        torch.set_num_threads(threads)
    (record,) = caplog.records
    assert f"resuming with threads {threads} is now {threads + 1}: results may differ slightly" in record.getMessage()


# Damage


def test_a_damaged_state_is_refused_or_unchanged(tmp_path):
    """Cut to any length, or with any byte changed."""
    path = tmp_path / "result.partial.npz"
    fingerprint = {"state format": FORMAT, "model": "x"}
    state = State.new(fingerprint, 6, 9)
    state.matrix += np.random.randint(0, 10**9, (6, 6))
    state.done[:4], state.stamps[:4], state.seconds = True, np.random.randint(0, 10**9, (4, 4)), 2.5
    state.save(path)
    whole = path.read_bytes()
    draw = random.Random(random.getrandbits(32))
    mutants = [whole[:length] for length in (0, 1, 100, *(draw.randrange(len(whole)) for _ in range(60)))]
    for _ in range(300):
        mutant = bytearray(whole)
        for _ in range(draw.choice([1, 1, 1, 8])):
            mutant[draw.randrange(len(whole))] = draw.randrange(256)
        mutants.append(bytes(mutant))
    names = list("abcdefghi")
    refused = 0
    for mutant in mutants:
        path.write_bytes(mutant)
        try:
            loaded = State.load(path, fingerprint, names, state.stamps)
        except StateError as error:
            assert re.search(DAMAGED, str(error)), error
            refused += 1
        else:
            assert loaded.matrix.tolist() == state.matrix.tolist() and loaded.done.tolist() == state.done.tolist()
            assert loaded.seconds == 2.5 and loaded.fingerprint == fingerprint
    assert refused > 60


def test_a_state_whose_numbers_were_changed_by_hand_is_refused(segmenter, photos, tmp_path):
    """With checksums that fit."""
    out, partial = tmp_path / "result.json", tmp_path / "result.partial.npz"
    stop_after(segmenter, photos, 2, out)
    with np.load(partial) as file:
        content = dict(file)
    for name, value in (
        ("matrix", content["matrix"] + 1),
        ("matrix", content["matrix"].astype(np.int32)),
        ("matrix", content["matrix"][:-1]),
        ("done", np.ones(4, bool)),
        ("stamps", content["stamps"][:, :2]),
        ("about", np.array(str(content["about"]).replace('"seconds": ', '"seconds": 1'))),
        ("about", np.array("[" * 100_000)),
        ("about", np.array("3")),
    ):
        np.savez(partial, **{**content, name: value})
        with pytest.raises(StateError, match=DAMAGED):
            run(segmenter, photos, out)


# Beside each other, and from the start


def test_restart_killed_at_once_does_not_resume_the_old_run(segmenter, photos, tmp_path):
    out = tmp_path / "result.json"
    stop_after(segmenter, photos, 3, out)
    again = Run(segmenter, photos, out, mode="whole", restart=True)
    again._lock.close()  # killed before the first image
    names = []
    read = photos.read
    photos.read = lambda index: names.append(index) or read(index)
    run(segmenter, photos, out)
    assert names == [0, 1, 2, 3]


def test_two_evaluations_into_one_file_are_noticed(segmenter, photos, tmp_path):
    out = tmp_path / "result.json"
    first = Run(segmenter, photos, out, mode="whole")
    for restart in (False, True):
        with pytest.raises(ValueError, match=r"an evaluation into 'result\.json' is under way in '.*'; wait for it"):
            run(segmenter, photos, out, restart=restart)
    with pytest.raises(ValueError, match="is under way"):
        check_target(out)
    assert run(segmenter, photos, tmp_path / "other.json").images == 4
    first.go(progress=False)
    assert run(segmenter, photos, out).images == 4
    assert not list(tmp_path.glob(".*")), "the lock file is gone"


def test_a_target_that_cannot_be_written_is_told_first(segmenter, photos, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"out must be a folder, .*file is a file"):
        check_target(tmp_path / "file" / "below" / "result.json")
    for name in ("a" * 300 + ".json", "a" * 240 + ".json", "a\0.json"):
        with pytest.raises(ValueError, match="out must be a file name of at most 220 bytes and without null, got"):
            check_target(tmp_path / name)
    check_target(tmp_path / "new" / "below" / "result.json")
    assert not (tmp_path / "new").exists()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    photos.read = None
    with pytest.raises(OSError, match=r"^cannot write '.*result\.partial\.npz': No space left on device\.$"):
        run(segmenter, photos, tmp_path / "result.json")


def test_arguments_of_another_kind(segmenter, photos):
    with pytest.raises(TypeError, match=r"segmenter must be a Segmenter, as ovseg_fast\.load gives, got CATSeg"):
        ovs.evaluate(segmenter.model, photos)
    with pytest.raises(TypeError, match=r"dataset must be a dataset, as .*open_dataset gives, got str"):
        ovs.evaluate(segmenter, "world")
    for seen in (5, "cat", ["dog"], [["cat"]]):
        with pytest.raises((TypeError, ValueError), match="seen must be a list of names out of the dataset's classes"):
            ovs.evaluate(segmenter, photos, seen=seen)
    with pytest.raises(TypeError, match="limit must be a whole number of images, got '3'"):
        ovs.evaluate(segmenter, photos, limit="3")
    assert ovs.evaluate is evaluate


def test_a_bad_backend_is_no_fault_of_the_images(segmenter, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(backends, "_default", "foo")
    with pytest.raises(ValueError, match=r"^OVSEG_BACKEND must be one of .*, got 'foo'"):
        run(segmenter, photos, tmp_path / "new" / "result.json")
    assert not (tmp_path / "new").exists()


# Memory, and names of any kind


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("Unable to allocate 309. MiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("std::bad_alloc"),
    ],
    ids=str,
)
@pytest.mark.parametrize("place", ["read", "encode", "count"])
def test_a_pair_that_is_too_large_for_the_memory_is_left_out(segmenter, photos, error, place, monkeypatch, caplog):
    owner, name = {
        "read": (photos, "read"),
        "encode": (segmenter, "encode"),
        "count": (evaluation.ConfusionMatrix, "update"),
    }[place]
    real, calls = getattr(owner, name), []

    def fail(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise error
        return real(*arguments)

    monkeypatch.setattr(owner, name, fail)
    with caplog.at_level(logging.WARNING):
        result = run(segmenter, photos)
    (left_out,) = result.skipped
    assert left_out.name == "001" and ("memory" in left_out.reason) and result.images == 3
    kept = sum((PhotoFolder.read(photos, index)[1] >= 0).sum() for index in (0, 2, 3))
    assert result.scores.truth.sum() == kept


def test_names_that_are_not_utf8_are_kept(segmenter, photos, tmp_path):
    """In the result: as JSON's own escapes, which give the name back."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system takes no such name")
    names = [os.fsdecode(b"na\xefve"), "猫", *(pair.name for pair in photos.pairs[2:])]
    photos.pairs = [pair._replace(name=name) for pair, name in zip(photos.pairs, names, strict=True)]
    photos.pairs[0].image.write_bytes(b"")
    photos.image_folder = folder
    run(segmenter, photos, folder / "result.json")
    stored = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert [item["name"] for item in stored["images"]["skipped"]] == names[:1]
    assert stored["settings"]["image_folder"] == str(folder)


def test_the_lock_of_a_killed_evaluation_does_not_stay(segmenter, photos, tmp_path):
    with held(tmp_path / ".result.lock", "x"):
        pass
    (tmp_path / ".result.lock").touch()  # the file of a process that is gone
    assert run(segmenter, photos, tmp_path / "result.json").images == 4
