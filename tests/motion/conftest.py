"""Motions that several files of tests look at."""

import numpy as np
import pytest

from scamo.motion.synthetic import corpus_clip


@pytest.fixture(scope="session")
def noisy():
    """noisy(frames): the joints of a walk whose bones stretch by centimetres."""

    def make(frames=30):
        joints = corpus_clip(0).joints[:frames].copy()
        return joints + np.random.default_rng(0).normal(0, 0.01, joints.shape).astype(np.float32)

    return make
