"""A dataset of random motions that the training tests share; nothing here looks at what is learnt."""

import sys
from pathlib import Path

import numpy as np
import pytest

from scamo.config import TokenizerConfig

# The tests are no packages: this is for training_runs.
sys.path.append(str(Path(__file__).parent))

CODES, TEXT_WIDTH = 50, 16

CONFIG = """
[data]
dataset = "{folder}/dataset"
tokenizer = "{folder}/tokenizer"
[model]
size = ""
layers = 2
heads = 2
width = 32
max_text = 24
[training]
run = "{folder}/unnamed"
steps = 40
micro_batch_tokens = 256
micro_batches = 2
learning_rate = 2e-3
ema_decay = 0.9
validate_every = 20
save_every = 10
keep_checkpoints = 2
log_every = 1
seed = 3
"""


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A dataset with tokens and text states, the tokenizer, and config.toml."""
    from scamo.data.dataset import Caption, DatasetWriter, MotionDataset, write_text_states, write_tokens
    from scamo.tokenizers.autoencoder import FSQAutoencoder

    folder = tmp_path_factory.mktemp("training")
    rng = np.random.default_rng(0)
    with DatasetWriter(folder / "dataset", provenance={"source": "random numbers"}) as writer:
        for clip in range(48):
            features = rng.standard_normal((int(rng.integers(40, 200)), 263)).astype(np.float32)
            captions = [Caption(f"a person does thing {clip}"), Caption(f"somebody does thing {clip}")]
            writer.add_clip(f"clip{clip:03d}", features, "val" if clip % 6 == 0 else "train", captions)
    dataset = MotionDataset.open(folder / "dataset")
    tokens = [rng.integers(0, CODES, length // 4) for length in dataset.item_lengths]
    write_tokens(folder / "dataset", "random", tokens, codes=CODES, downsampling=4)
    states = [rng.standard_normal((int(rng.integers(4, 20)), TEXT_WIDTH)) for _ in range(dataset.n_captions)]
    write_text_states(folder / "dataset", "random", [s.astype(np.float16) for s in states], encoder="minilm")
    config = TokenizerConfig(codebook_size=CODES, levels=(5, 10), width=8, latent_width=8, depth=1)
    FSQAutoencoder(config).save(folder / "tokenizer")
    (folder / "config.toml").write_text(CONFIG.format(folder=folder))
    return folder
