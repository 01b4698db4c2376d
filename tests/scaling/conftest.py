"""Run folders as train.py leaves them, with losses from a law that is known."""

import json

import numpy as np
import pytest

from scamo.config import DataConfig, ModelConfig, RunConfig, to_dict
from scamo.scaling.flops import block_parameters, training_flops

# Text positions a motion token, and pairs a position, of the made-up data.
TEXT, PAIRS = 0.5, 20


@pytest.fixture
def write_run(tmp_path):
    def write(name, law, *, layers, width, codes, flops, seed=0, validations=4, noise=None, **changes):
        """A run that spends `flops`; law(n_nv, n_v, tokens) -> L_u. changes: of config.json, section__key."""
        model = ModelConfig(size="", layers=layers, heads=4, width=width, codes=codes, text_width=8)
        per_token = training_flops(model, positions=1 + TEXT, scored=1, pairs=PAIRS)
        steps = 10 * validations
        lines = [{"kind": "start", "step": 0}]
        tokens = 0.0
        for step in range(1, steps + 1):
            tokens += flops / per_token / steps
            lines.append(
                {
                    "kind": "train",
                    "step": step,
                    "loss": 1.0,
                    "motion_tokens": flops / per_token / steps,
                    "positions": flops / per_token / steps * (1 + TEXT),
                    "flops": flops / steps,
                }
            )
            if step % 10 == 0:
                l_u = float(law(block_parameters(model), codes * width, tokens))
                l_u += 0.0 if noise is None else float(noise.standard_normal()) * 0.01
                lines.append({"kind": "val", "step": step, "l_u": l_u, "loss": 8 + l_u})
        lines.append({"kind": "end", "step": steps, "status": 0})
        config = to_dict(RunConfig(DataConfig(dataset="any"), model=model))
        config["training"] |= {"steps": steps, "seed": seed}
        config["fingerprint"] = {"dataset": "d" * 64, "tokens": f"{codes:064d}", "text": "t"}
        for key, value in changes.items():
            section, _, field = key.partition("__")
            config[section][field] = value
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder

    return write


@pytest.fixture
def rng():
    return np.random.default_rng(0)
