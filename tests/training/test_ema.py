"""The moving average against float64, on real shards; in resumed runs: integration/test_train.py."""

import pytest
import torch
from safetensors.torch import load_file

from scamo.errors import ScaMoError
from scamo.training import ema

DECAY = 0.3  # of shards.py


def test_the_decay_grows_to_its_value():
    decays = [ema.ema_decay(step, 0.999) for step in (0, 1, 8, 10_000, 10**6)]
    assert decays == [1 / 10, 2 / 11, 9 / 18, 0.999, 0.999]
    assert ema.ema_decay(0, 0.05) == 0.05


@pytest.mark.parametrize(
    "variant", ["1-bf16", "2-fp32", "3-bf16", "3-offload-fp32", "1-bf16-to-2-offload-fp32"]
)
@pytest.mark.parametrize("run", ["saved", "continued_by_one"])
def test_average_of_the_masters(run, variant, request):
    folder = request.getfixturevalue(run) / variant
    states = sorted(folder.glob("state-*.pt"))
    tensors = [torch.load(path, weights_only=True)["tensors"] for path in states]
    first = int(states[0].stem.partition("-")[2])
    assert first == (0 if run == "saved" else 2)
    names = [name[7:] for name in tensors[0] if name.startswith("master ")]
    assert len(names) == 6
    for name in names:
        # A new run starts at the first weights, a continued one at what was loaded.
        average = tensors[0][f"{'master' if run == 'saved' else 'ema'} {name}"].double()
        for step, state in enumerate(tensors[1:], start=first):
            decay = min(DECAY, (1 + step) / (10 + step))
            average = decay * average + (1 - decay) * state[f"master {name}"].double()
            assert state[f"ema {name}"].dtype == torch.float32
            torch.testing.assert_close(state[f"ema {name}"].double(), average, atol=1e-7, rtol=1e-6)
        assert not torch.equal(average, tensors[-1][f"master {name}"].double())


def test_files_hold_whole_parameters_up_to_a_size(monkeypatch):
    monkeypatch.setattr(ema, "FILE_BYTES", 100)
    shapes = {"a": (5, 3), "b": (10,), "c": (2, 50), "d": (1,), "e": (24,)}  # 60, 40, 400, 4, 96 bytes
    assert ema._files(shapes) == [["a", "b"], ["c"], ["d", "e"]]


def test_a_checkpoint_keeps_names_and_shapes_and_is_read_as_a_whole(saved):
    checkpoint = saved / "3-bf16/step-0000002"
    (path,) = (checkpoint / "ema").iterdir()
    state = torch.load(saved / "3-bf16/state-2.pt", weights_only=True)["tensors"]
    assert {name: tuple(t.shape) for name, t in load_file(path).items()} == {
        "layers.0.weight": (13, 7), "layers.0.bias": (13,), "layers.1.weight": (13,), "layers.1.bias": (13,),
        "layers.3.weight": (5, 13), "layers.3.bias": (5,),
    }  # fmt: skip
    assert all(torch.equal(t, state[f"ema {name}"]) for name, t in ema.read_ema(checkpoint).items())


def test_a_checkpoint_without_an_average_is_an_error(tmp_path):
    with pytest.raises(ScaMoError, match="no moving average"):
        ema.read_ema(tmp_path)
