"""`ovseg-fast train`: exit code 2 where nothing was begun, 1 where a training ended early, one sentence each."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from ovseg_fast import backends
from ovseg_fast.cli.train import train_command
from ovseg_fast.training.config import DataConfig
from ovseg_fast.training.run import CHECKPOINT, WEIGHTS
from training.colours import configuration, make_data, write


@pytest.fixture
def folder(tmp_path):
    make_data(tmp_path / "data", 2)
    return tmp_path


def run(folder, *arguments, **changes):
    config = write(configuration(folder, **{"steps": 1, **changes}), folder / "run.toml")
    return CliRunner().invoke(train_command, [str(config), "--quiet", *arguments], catch_exceptions=False)


def refused(result, *words, code=2):
    assert result.exit_code == code, result.output
    line = result.stderr.splitlines()[-1]
    assert line.startswith("ovseg-fast: ") and all(word in line for word in words), line


def test_a_training_and_what_its_resumption_refuses(folder):
    assert run(folder).exit_code == 0 and (folder / "run" / WEIGHTS).is_file()
    refused(run(folder, seed=3), "seed 0 is now 3", "--restart")
    (folder / "data/classes.txt").write_text("a\nb\nc")
    refused(run(folder, steps=2), "class 0, 'red', is now 'a'", "--restart")
    (folder / "run" / CHECKPOINT).write_bytes(b"cut")
    refused(run(folder), "or damaged; --restart starts over.")
    assert run(folder, "--restart").exit_code == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"validation": DataConfig("folder", "nowhere")}, ("[validation]", "'nowhere'")),
        ({"data": DataConfig("folder", "nowhere")}, ("[data]", "'nowhere'")),
        ({"weights": "nowhere.pth"}, ("weights", "'nowhere.pth'")),
        ({"policy": "lora"}, ("policy", "'lora'")),
        ({"transductive": 0.5}, ("transductive needs unseen classes",)),
        ({"clip_pretrained": "nothing"}, ("clip_pretrained", "'nothing'")),
        ({"crop": 99, "model": "cascade-clip-tiny"}, ("crop 99 does not fit",)),
    ],
)
def test_what_can_be_known_is_refused_before_the_first_step(folder, changes, words):
    refused(run(folder, **changes), *words)
    assert not (folder / "run").exists()


@pytest.mark.parametrize("value", ["1e38", "nan", "1e-300"])
def test_a_rate_that_cannot_be_used_is_refused_before_the_first_step(folder, value):
    config = write(configuration(folder, learning_rate=0.5), folder / "run.toml")
    config.write_text(config.read_text().replace("learning_rate = 0.5", f"learning_rate = {value}"))
    result = CliRunner().invoke(train_command, [str(config), "--quiet"], catch_exceptions=False)
    refused(result, "learning_rate must be a rate in 1e-12..1, got")
    assert not (folder / "run").exists()


@pytest.mark.parametrize("policy", ["attention", "none"])  # whether the text encoder is trained
@pytest.mark.parametrize("table", ["data", "validation"])
def test_names_that_cannot_be_prompted_are_refused_before_the_first_step(folder, table, policy):
    make_data(folder / "long", 2)
    (folder / "long/classes.txt").write_text("word " * 100 + "\ngreen\nblue", encoding="utf-8")
    long = DataConfig("folder", str(folder / "long"))
    words = f"in [{table}]: a prompt must fit into CLIP's 77 tokens", "word word"
    refused(run(folder, policy=policy, **{table: long}), *words)
    assert not (folder / "run").exists()


def test_a_validation_list_that_changed_refuses_the_resumption(folder):
    make_data(folder / "other", 2)
    validation = DataConfig("folder", str(folder / "other"))
    assert run(folder, validation=validation).exit_code == 0
    (folder / "other/classes.txt").write_text("red\ngreen\n<start_of_text>", encoding="utf-8")
    refused(run(folder, validation=validation, steps=2), "in [validation]: a prompt must not spell out CLIP's special")


@pytest.mark.parametrize(
    ("backend", "words"),
    [
        ("foo", "OVSEG_BACKEND must be one of auto, cuda, triton, cpu, torch, got 'foo'"),
        ("triton", "the triton backend was asked for but cannot run"),
        (
            "cpu",
            "training: the cpu backend was asked for but cannot run: its kernels are for inference, without gradients",
        ),
    ],
)
@pytest.mark.usefixtures("on_cpu")
def test_a_backend_that_cannot_train_is_refused_before_the_first_step(folder, monkeypatch, backend, words):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backends, "_default", backend)
    refused(run(folder), words)
    assert not (folder / "run").exists()
    (folder / "run").mkdir()
    (folder / "run" / CHECKPOINT).write_bytes(b"of a finished run")
    refused(run(folder, "--restart"), words)
    assert (folder / "run" / CHECKPOINT).read_bytes() == b"of a finished run"


def test_a_training_that_ends_early_has_exit_code_1(folder):
    for mask in (folder / "data/masks").iterdir():
        mask.write_bytes(b"")
    refused(run(folder), "all 2 pairs of the training data cannot be used", code=1)
