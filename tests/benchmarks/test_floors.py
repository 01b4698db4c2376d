"""Floors against counts by hand, and against numbers worked out apart for one batch of 128 samples."""

from __future__ import annotations

import json

import floors
import pytest

H200 = floors.DEVICES["h200"]

# D, heads, L, P: forward memory, matmul, exp; backward memory; L2 of a two-role backward with 64 and with 128
# owned rows. Microseconds on an H200 at 4.3 TB/s, rounded to whole ones.
ATTENTION = [
    ((64, 16, 126, 77), (31, 12, 9), 61, 108, 78),
    ((64, 16, 178, 128), (43, 21, 16), 87, 167, 130),
    ((64, 16, 201, 150), (49, 39, 29), 98, 238, 172),
    ((64, 16, 328, 128), (80, 66, 50), 160, 407, 279),
    ((100, 32, 201, 150), (153, 157, 59), 306, 744, 536),
]


@pytest.mark.parametrize(
    ("shape", "forward", "backward", "small", "large"),
    ATTENTION,
    ids=lambda x: "-".join(map(str, x)) if isinstance(x, tuple) else str(x),
)
def test_attention(shape, forward, backward, small, large):
    head_dim, heads, length, prefix = shape
    arguments = ([length] * 128, [prefix] * 128, heads, head_dim, H200)
    floor = floors.attention(*arguments, tile=(64, 64))
    assert [round(x * 1e6) for x in (floor.memory, floor.matmul, floor.exp)] == pytest.approx(
        forward, abs=0.5
    )
    assert floor.seconds == max(floor.memory, floor.matmul, floor.exp)
    for tile, expected in (((64, 64), small), ((128, 64), large)):
        floor = floors.attention(*arguments, way="backward", l2_tile=tile)
        assert floor.memory * 1e6 == pytest.approx(backward, abs=0.6)
        assert floor.l2 * 1e6 == pytest.approx(expected, abs=0.6)
        assert floor.bound == "l2"


def brute_force(length, prefix):
    return sum((prefix if i < prefix else i + 1) for i in range(length))


@pytest.mark.parametrize(
    ("length", "prefix"), [(0, 0), (1, 0), (1, 1), (7, 3), (64, 64), (126, 77), (330, 0)]
)
def test_score_elements(length, prefix):
    assert floors.score_elements([length], [prefix]) == brute_force(length, prefix)
    assert floors.score_elements([length, 5], [prefix, 2]) == brute_force(length, prefix) + brute_force(5, 2)


@pytest.mark.parametrize(("length", "prefix"), [(1, 0), (64, 64), (65, 0), (126, 77), (330, 128)])
def test_score_elements_of_tiles(length, prefix):
    seen = {
        (i // 64, j // 32)
        for i in range(length)
        for j in range(length)
        if j < (prefix if i < prefix else i + 1)
    }
    assert floors.score_elements([length], [prefix], (64, 32)) == len(seen) * 64 * 32


def test_exact_counts_are_below_those_of_tiles():
    arguments = ([126] * 4, [77] * 4, 2, 100, H200)
    exact, tiled = floors.attention(*arguments), floors.attention(*arguments, tile=(64, 64))
    assert exact.matmul < tiled.matmul
    assert exact.exp < tiled.exp
    assert exact.memory == tiled.memory


def test_both_is_forward_and_backward():
    parts = [floors.attention([126], [77], 2, 64, H200, way=way) for way in ("forward", "backward")]
    both = floors.attention([126], [77], 2, 64, H200, way="forward+backward")
    assert both == parts[0] + parts[1]
    assert both.moved == 12 * 126 * 2 * 64 * 2
    two = floors.attention([126], [77], 2, 64, H200, way="backward", roles=2)
    assert two.matmul / parts[1].matmul == pytest.approx(7 / 5)
    assert two.exp == 2 * parts[1].exp


def test_fsq_moves_28_bytes_a_token():
    assert floors.fsq(1000, 6, H200).moved == 28_000
    # z, the gradient of the codes, the gradient of z.
    assert floors.fsq(1000, 6, H200, way="backward").moved == 36_000
    fused = floors.fsq(1000, 6, H200, hidden=512)
    assert fused.moved == 1000 * (2 * 512 * 2 + 4) + 2 * 512 * 6 * 2


def test_decode_attention_reads_the_cache_once():
    floor = floors.decode_attention([100, 50], 16, 64, H200, append=False)
    assert floor.moved == (2 * 150 + 2 * 2) * 16 * 64 * 2
    # The new k and v are read from the step instead of the cache, and written.
    appended = floors.decode_attention([100, 50], 16, 64, H200)
    assert appended.moved - floor.moved == 2 * 2 * 16 * 64 * 2
    assert floor.bound == "memory"


def test_linear_cross_entropy():
    floor = floors.linear_cross_entropy(8192, 1024, 65537, H200)
    assert floor.bound == "matmul"
    assert floor.seconds == pytest.approx(2 * 8192 * 1024 * 65537 / (0.72 * 989e12))
    both = floors.linear_cross_entropy(8192, 1024, 65537, H200, way="forward+backward")
    assert both.matmul == pytest.approx(3 * floor.matmul)


def test_rms_norm_swiglu_and_histogram_bytes():
    tensor = 64 * 1024 * 2
    assert floors.rms_norm(64, 1024, H200).moved == 4 * tensor + 2048
    assert floors.rms_norm(64, 1024, H200, residual=False).moved == 2 * tensor + 2048
    assert floors.swiglu(64, 1024, H200).moved == 3 * tensor
    assert floors.swiglu(64, 1024, H200, way="backward").moved == 5 * tensor
    assert floors.histogram(4096, 1000, H200).moved == 4 * 4096 + 8 * 1000


@pytest.mark.parametrize("name", ["h200", "NVIDIA H200", "NVIDIA H100 80GB HBM3"])
def test_a_card_is_known_by_its_driver_name(name, monkeypatch, tmp_path):
    monkeypatch.setattr(floors, "RESULTS", tmp_path)
    assert floors.device(name).name == ("h200" if "200" in name else "h100")


def test_measured_rates_are_preferred(monkeypatch, tmp_path):
    monkeypatch.setattr(floors, "RESULTS", tmp_path)
    assert floors.device("h200").copy == 4.3e12
    (tmp_path / "h200").mkdir()
    rates = tmp_path / "h200" / "rates.json"
    rates.write_text(json.dumps({"copy_bytes_per_second": 4.1e12, "matmul_flops_per_second": 7e14}))
    measured = floors.device("h200")
    assert (measured.copy, measured.matmul, measured.exp) == (4.1e12, 7e14, H200.exp)
    assert floors.device("h100").copy == 3.0e12


@pytest.mark.parametrize(
    ("content", "field"),
    [("{", "rates.json"), ("[]", "copy_bytes_per_second"), ('{"copy_bytes_per_second": -1}', "copy_bytes")],
)
def test_a_broken_rates_file_is_named(tmp_path, content, field):
    path = tmp_path / "rates.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=field):
        floors.device("h200", path)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: floors.device("tpu"), "device = 'tpu'"),
        (lambda: floors.score_elements([3], [4]), "prefixes: expected 0 to the length 3"),
        (lambda: floors.score_elements([3], []), "prefixes: expected 1"),
        (lambda: floors.attention([3], [1], 1, 64, H200, way="sideways"), "way = 'sideways'"),
        (lambda: floors.attention([3], [1], 1, 64, H200, roles=3), "roles = 3"),
        (lambda: floors.linear_cross_entropy(1, 1, 1, H200, way="up"), "way = 'up'"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_tables_print(capsys):
    assert floors.main(["h200"]) == 0
    assert "| 64, 16 | 126, 77 | 30.7 / 12.1 / 9.05 |" in capsys.readouterr().out
    assert floors.main(["abacus"]) == 2


def test_rates_of_this_machine_are_positive():
    assert floors.copy_rate("cpu") > 1e8
    assert floors.matmul_rate("cpu", size=64) > 0


def test_the_readme_shows_the_computed_floors():
    text = (floors.RESULTS.parent / "README.md").read_text(encoding="utf-8")
    for described in floors.DEVICES.values():
        assert floors.attention_table(described) in text
        assert floors.op_table(described) in text
