"""Configuration files of training runs: read whole, or refused with the key's name."""

from __future__ import annotations

import dataclasses

import pytest

from ovseg_fast.training.config import DataConfig, TrainingConfig, check_resumable, read_config

SMALLEST = 'model = "catseg-tiny"\nout = "run"\nsteps = 3\n[data]\ndataset = "coco-stuff"\n'


def read(tmp_path, text: str) -> TrainingConfig:
    (tmp_path / "run.toml").write_text(text, encoding="utf-8")
    return read_config(tmp_path / "run.toml")


def test_omitted_keys_have_defaults(tmp_path):
    expected = TrainingConfig(model="catseg-tiny", out="run", steps=3, data=DataConfig("coco-stuff"))
    assert read(tmp_path, SMALLEST) == expected


def test_every_key_is_read(tmp_path):
    text = SMALLEST.replace(
        "steps = 3", 'steps = 3\nlearning_rate = 1\nprecision = "bf16"\nseen_only = true\nscales = [1, 1.5]'
    )
    config = read(tmp_path, text + 'root = "there"\nlimit = 7\n[validation]\ndataset = "ade20k-150"\n')
    assert config.learning_rate == 1.0 and isinstance(config.learning_rate, float)
    assert config.scales == (1.0, 1.5) and isinstance(config.scales[0], float)
    assert config.precision == "bf16" and config.seen_only is True
    assert config.data == DataConfig("coco-stuff", "there", limit=7)
    assert config.validation == DataConfig("ade20k-150")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("steps = 3\n", "", "steps is missing"),
        ("steps = 3", 'steps = "3"', "steps must be a whole number, got '3'"),
        ("steps = 3", "steps = true", "steps must be a whole number, got True"),
        ("steps = 3", "steps = 0", "steps must be at least 1, got 0"),
        ("steps = 3", "steps = 3\nstep = 4", "unknown key step;"),
        ("steps = 3", "steps = 3\nbatch = 5\naccumulation = 2", "batch must be a multiple of accumulation, 2, got 5"),
        ("steps = 3", 'steps = 3\nprecision = "int8"', "precision must be one of fp32, bf16, fp16, got 'int8'"),
        ("steps = 3", "steps = 3\nlearning_rate = -1", "learning_rate must be above 0, got -1"),
        ("steps = 3", "steps = 3\nclip_learning_rate = 0", "clip_learning_rate must be above 0, got 0"),
        ("steps = 3", "steps = 3\nmax_gradient_norm = 0", "max_gradient_norm must be above 0, got 0"),
        ("steps = 3", "steps = 3\nscales = [2.0, 1.0]", "scales must be two numbers above 0, the smaller one first"),
        ("steps = 3", "steps = 3\nscales = [2.0]", "scales must be a list of 2 numbers, got"),
        ("steps = 3", 'steps = 3\nscales = [1, "2"]', r"scales\[1\] must be a number, got '2'"),
        ("steps = 3", 'steps = 3\nweights = "a"\nclip_pretrained = "b"', "weights and clip_pretrained exclude"),
        ("catseg-tiny", "resnet", "name must be one of catseg-vitb"),
        ('dataset = "coco-stuff"', 'datasets = "coco-stuff"', "unknown key data.datasets;"),
        ('[data]\ndataset = "coco-stuff"', 'data = "coco-stuff"', r"data must be a table \[data\], got 'coco-stuff'"),
        ("steps = 3", "steps = ", "is not a TOML file"),
    ],
)
def test_bad_values_are_named(tmp_path, old, new, words):
    assert old in SMALLEST
    with pytest.raises((ValueError, TypeError), match=words) as caught:
        read(tmp_path, SMALLEST.replace(old, new))
    assert "run.toml" in str(caught.value) and "\n" not in str(caught.value)


def test_layout_is_an_older_spelling_of_dataset(tmp_path):
    older = SMALLEST.replace("dataset =", "layout =") + '[validation]\nlayout = "world"\n'
    config = read(tmp_path, older)
    assert config.data == DataConfig("coco-stuff") and config.validation == DataConfig("world")
    with pytest.raises(ValueError, match=r"data\.layout is an older spelling of data\.dataset; give only"):
        read(tmp_path, SMALLEST + 'layout = "coco-stuff"\n')
    saved = dataclasses.asdict(config)
    saved["data"]["layout"] = saved["data"].pop("dataset")
    check_resumable(saved, config)


def test_missing_and_unreadable_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no configuration file .*missing\.toml"):
        read_config(tmp_path / "missing.toml")
    (tmp_path / "latin.toml").write_bytes(b'model = "\xe9"')
    with pytest.raises(ValueError, match="not UTF-8"):
        read_config(tmp_path / "latin.toml")


def test_a_run_resumes_only_with_its_own_configuration():
    config = TrainingConfig(model="catseg-tiny", out="run", steps=3, data=DataConfig("coco-stuff"))
    saved = dataclasses.asdict(config)
    check_resumable(saved, dataclasses.replace(config, steps=9, out="moved", workers=0))
    with pytest.raises(ValueError, match="batch 4 is now 8") as caught:
        check_resumable(saved, dataclasses.replace(config, batch=8))
    assert "--restart" in str(caught.value)
    with pytest.raises(ValueError, match="data"):
        check_resumable(saved, dataclasses.replace(config, data=DataConfig("ade20k-150")))
