"""Configuration files of training runs: read whole, or refused with the key's name."""

from __future__ import annotations

import dataclasses

import pytest

from ovseg_fast.training.config import DataConfig, TrainingConfig, as_config, check_resumable, read_config

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
        ("steps = 3", "steps = 3\nlearning_rate = -1", r"learning_rate must be a rate in 1e-12\.\.1, got -1"),
        ("steps = 3", "steps = 3\nclip_learning_rate = 0", "clip_learning_rate must be a rate in .*, got 0"),
        ("steps = 3", "steps = 3\nmax_gradient_norm = 0", "max_gradient_norm must be inf or a number in .*, got 0"),
        ("steps = 3", "steps = 3\nscales = [2.0, 1.0]", "scales must be two numbers above 0, the smaller one first"),
        ("steps = 3", "steps = 3\nscales = [2.0]", "scales must be a list of 2 numbers, got"),
        ("steps = 3", 'steps = 3\nscales = [1, "2"]', r"scales\[1\] must be a number, got '2'"),
        ("steps = 3", 'steps = 3\nweights = "a"\nclip_pretrained = "b"', "weights and clip_pretrained exclude"),
        ("catseg-tiny", "resnet", "name must be one of catseg-vitb"),
        ('dataset = "coco-stuff"', 'datasets = "coco-stuff"', "unknown key data.datasets;"),
        ('[data]\ndataset = "coco-stuff"', 'data = "coco-stuff"', r"data must be a table \[data\], got 'coco-stuff'"),
        ("steps = 3", "steps = ", "is not a TOML file"),
        ("steps = 3", "steps = " + "[" * 5000, "is not a TOML file that can be read: it is nested too deeply"),
        ("steps = 3", "steps = " + "9" * 5000, "is not a TOML file: "),
        (
            "steps = 3",
            "steps = 9223372036854775808",
            "steps must be at most 9223372036854775807, got 9223372036854775808",
        ),
        ("steps = 3", "steps = 3\ncrop = 0", "crop must be at least 2, got 0"),
        ("steps = 3", "steps = 3\ncrop = 16385", "crop must be at most 16384, got 16385"),
        ("steps = 3", "steps = 3\nseed = -5", "seed must be at least 0, got -5"),
        ("steps = 3", "steps = 3\nwarmup = -5", "warmup must be at least 0, got -5"),
        ("steps = 3", "steps = 3\npictures = -1", "pictures must be at least 0, got -1"),
        ("steps = 3", "steps = 3\nworkers = -1", "workers must be at least 0, got -1"),
        ("steps = 3", "steps = 3\nworkers = 100000", "workers must be at most 1024, got 100000"),
        ("steps = 3", "steps = 3\nlearning_rate = inf", "learning_rate must be a rate in .*, got inf"),
        ("steps = 3", "steps = 3\nlearning_rate = nan", "learning_rate must be a rate in .*, got nan"),
        ("steps = 3", "steps = 3\nmax_gradient_norm = nan", "max_gradient_norm must be inf or a number in .*, got nan"),
        ("steps = 3", "steps = 3\nlearning_rate = 1e38", r"learning_rate must be a rate in .*, got 1e\+38"),
        ("steps = 3", "steps = 3\nlearning_rate = 1e-300", "learning_rate must be a rate in .*, got 1e-300"),
        ("steps = 3", "steps = 3\nclip_learning_rate = 2", "clip_learning_rate must be a rate in .*, got 2"),
        ("steps = 3", "steps = 3\nmax_gradient_norm = 1e300", r"max_gradient_norm must be inf or .*, got 1e\+300"),
        ("steps = 3", "steps = 3\nmax_gradient_norm = -inf", "max_gradient_norm must be inf or .*, got -inf"),
        ("steps = 3", "steps = 3\nbatch = 1000000", "batch must be at most 65536, got 1000000"),
        ("steps = 3", "steps = 3\npictures = 1001", "pictures must be at most 1000, got 1001"),
        ("steps = 3", "steps = 3\nlearning_rate = 1" + "0" * 400, "learning_rate must be a number that fits 64 bits"),
        (
            "steps = 3",
            "steps = 3\ntransductive = 1.5",
            r"transductive must be a share of the steps in 0\.\.1, got 1\.5",
        ),
        ("steps = 3", "steps = 3\ntransductive = nan", r"transductive must be a share of the steps in 0\.\.1, got nan"),
        ("steps = 3", "steps = 3\nscales = [nan, 1]", "scales must be two numbers above 0"),
        ("steps = 3", "steps = 3\nscales = [1, inf]", "scales must be two numbers above 0"),
        ("steps = 3", 'steps = 3\nweights = "a\\u0000b"', "weights must hold no null character"),
        ('out = "run"', 'out = ""', "out must name a folder"),
        ('dataset = "coco-stuff"', 'dataset = "coco-stuff"\nlimit = 0', "data.limit must be at least 1, got 0"),
        (
            'dataset = "coco-stuff"',
            'dataset = "coco-stuff"\n[validation]\ndataset = "world"\nlimit = -1',
            "validation.limit",
        ),
    ],
)
def test_bad_values_are_named(tmp_path, old, new, words):
    assert old in SMALLEST
    with pytest.raises((ValueError, TypeError), match=words) as caught:
        read(tmp_path, SMALLEST.replace(old, new))
    assert "run.toml" in str(caught.value) and "\n" not in str(caught.value)


def test_python_takes_the_same_values_with_the_same_errors(tmp_path):
    values = {"model": "catseg-tiny", "out": tmp_path, "steps": 3, "data": {"dataset": "coco-stuff"}, "scales": (1, 2)}
    config = as_config(values)
    assert config.out == str(tmp_path) and config.scales == (1.0, 2.0) and as_config(config) is config
    assert as_config({**values, "data": DataConfig("coco-stuff")}) == config
    (tmp_path / "run.toml").write_text(SMALLEST)
    assert as_config(tmp_path / "run.toml").steps == as_config(str(tmp_path / "run.toml")).steps == 3
    for change, words in (
        ({"steps": "3"}, "steps must be a whole number, got '3'"),
        ({"step": 3}, "unknown key step;"),
        ({"data": 3}, r"data must be a table \[data\], got 3"),
        ({"data": {}}, "data.dataset is missing"),
        ({"data": {"dataset": 3}}, "data.dataset must be a string, got 3"),
        ({1: 2}, "unknown key 1;"),
    ):
        with pytest.raises((ValueError, TypeError), match=words):
            as_config({**values, **change})
    with pytest.raises(TypeError, match="config must be a TrainingConfig, a dict or the path of a file, got list"):
        as_config([values])
    for change, words in (({"steps": 2.5}, "steps must be a whole number"), ({"data": None}, "data must be a table")):
        with pytest.raises(TypeError, match=words):
            dataclasses.replace(config, **change)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-8"])
def test_a_configuration_in_any_encoding_and_with_any_line_ends(tmp_path, encoding):
    (tmp_path / "run.toml").write_bytes(SMALLEST.replace("run", "lauf ü").replace("\n", "\r\n").encode(encoding))
    assert read_config(tmp_path / "run.toml").out == "lauf ü"


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
