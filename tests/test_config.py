"""Configurations are strict: every mistake is named."""

import dataclasses

import pytest

from scamo.config import (
    FSQ_LEVELS,
    MODEL_SIZES,
    ModelConfig,
    RunConfig,
    TokenizerConfig,
    TokenizerRunConfig,
    from_dict,
    load_config,
    to_dict,
)
from scamo.errors import ScaMoError

RUN = '[data]\ndataset = "d"\n'


def write(tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


def test_read_with_defaults_and_overrides(tmp_path):
    path = write(tmp_path, RUN + '[model]\nsize = "3B"\n')
    config = load_config(RunConfig, path, ["training.steps=7", "training.run=some/where", "model.layers=2"])
    assert (config.model.layers, config.model.heads, config.model.width) == (2, 32, 3200)
    assert config.training.steps == 7
    assert config.training.run == "some/where"
    assert from_dict(RunConfig, to_dict(config)) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "missing key data"),
        ("[data]\n", r"data.dataset is missing"),
        (RUN + "[trainig]\n", r"unknown key trainig; did you mean training\?"),
        (RUN + "[training]\nstep = 3\n", r"unknown key training.step; did you mean training.steps\?"),
        (RUN + "[training]\nsteps = 1.5\n", "training.steps = 1.5: expected int"),
        (RUN + "[training]\nsteps = true\n", "training.steps = True: expected int"),
        (RUN + "[training]\nsteps = 0\n", "steps = 0: expected a value above 0"),
        (RUN + "[training]\nbetas = [0.9]\n", r"training.betas = \[0.9\]: expected 2 values"),
        (RUN + "[training]\ndrop_token = 2\n", r"drop_token = 2.0: expected a probability"),
        (RUN + '[model]\nsize = "2B"\n', "size = '2B' is not known"),
        (
            RUN + '[model]\nsize = ""\nlayers = 1\nheads = 3\nwidth = 64\n',
            "width = 64 does not divide by heads = 3",
        ),
        (RUN + '[model]\nsize = ""\nlayers = 1\nheads = 1\nwidth = 132\n', "multiple of 4 up to 128"),
        ("data = 3\n", "expected a table of keys"),
        ("[data\n", "not valid TOML"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    with pytest.raises(ScaMoError, match=message) as error:
        load_config(RunConfig, write(tmp_path, text))
    assert "run.toml" in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file_and_bad_override(tmp_path):
    with pytest.raises(ScaMoError, match="no such configuration file"):
        load_config(RunConfig, tmp_path / "none.toml")
    with pytest.raises(ScaMoError, match="expected section.key=value"):
        load_config(RunConfig, write(tmp_path, RUN), ["training.steps"])


def test_codebook_without_levels():
    with pytest.raises(ScaMoError, match="codebook_size = 1000 has no FSQ levels"):
        TokenizerConfig(codebook_size=1000)
    assert TokenizerConfig(codebook_size=1000, levels=(10, 10, 10)).codes == 1000
    with pytest.raises(ScaMoError, match="levels"):
        from_dict(TokenizerRunConfig, {"tokenizer": {"levels": [1]}})


def test_tables_of_the_paper():
    codes = {size: TokenizerConfig(codebook_size=size).codes for size in FSQ_LEVELS}
    assert codes == {256: 240, 512: 512, 1024: 1000, 2048: 1920, 4096: 4375, 16384: 15360, 65536: 64000}
    hidden = {size: ModelConfig(size=size).hidden for size in MODEL_SIZES}
    assert hidden == {"44M": 1536, "111M": 2048, "343M": 2816, "775M": 3584, "1.4B": 4096, "3B": 8704}
    assert ModelConfig(size="3B").head_dim == 100
    assert ModelConfig().max_positions == 201


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig().layers = 3  # type: ignore[misc]
