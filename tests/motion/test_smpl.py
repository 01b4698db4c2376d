"""Joints of SMPL's bodies against a mesh that is reduced for every pose, and files that are none."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.linalg import expm

from scamo.errors import ScaMoError
from scamo.motion.skeleton import PARENTS, forward_kinematics
from scamo.motion.smpl import SmplBody

HANDS = [20, 22, 23] * 5  # any parents below 52 for the 30 finger joints


def model_fields(seed=0, vertices=120, betas=16):
    """Random fields of SMPL+H's shapes and, seen as a body, nonsense."""
    rng = np.random.default_rng(seed)
    regressor = rng.random((52, vertices))
    parents = [2**32 - 1, *PARENTS[1:], *HANDS, *HANDS]
    return {
        "v_template": rng.normal(size=(vertices, 3)),
        "J_regressor": regressor / regressor.sum(1, keepdims=True),
        "shapedirs": rng.normal(0, 0.1, (vertices, 3, betas)),
        "kintree_table": np.array([parents, range(52)], dtype=np.uint32),
        "weights": rng.random((vertices, 52)),
    }


@pytest.fixture
def model(tmp_path):
    np.savez(tmp_path / "model.npz", **model_fields())
    return tmp_path / "model.npz"


def skinned(fields, poses, betas, trans):
    """Joints (T, 22, 3) as the mesh gives them: shaped, reduced, turned joint by joint."""
    shaped = fields["v_template"] + fields["shapedirs"][:, :, : len(betas)] @ betas
    rest = fields["J_regressor"] @ shaped
    out = []
    for pose, move in zip(poses.reshape(len(poses), -1, 3), trans, strict=True):
        worlds = []
        for joint in range(22):
            x, y, z = pose[joint]
            own = np.eye(4)
            own[:3, :3] = expm(np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]]))
            parent = PARENTS[joint]
            own[:3, 3] = rest[joint] - (rest[parent] if joint else 0)
            worlds.append(worlds[parent] @ own if joint else own)
        out.append([world[:3, 3] + move for world in worlds])
    return np.array(out)


def poses_of(frames=6, joints=52, seed=1):
    rng = np.random.default_rng(seed)
    return rng.normal(0, 0.7, (frames, 3 * joints)), rng.normal(size=10), rng.normal(size=(frames, 3))


def test_it_is_the_mesh_reduced(model):
    poses, betas, trans = poses_of()
    body = SmplBody.load(model)
    found = body.pose(poses, betas, trans)
    np.testing.assert_allclose(found.joints, skinned(model_fields(), poses, betas, trans), atol=1e-12)
    # The rotations that come along are those that made the joints.
    rest = body.rest(betas)
    offsets = rest - np.concatenate([rest[:1] * 0, rest[list(PARENTS[1:])]])
    again = forward_kinematics(found.rotations, offsets, trans + rest[0])
    np.testing.assert_allclose(again, found.joints, atol=1e-12)
    three = body.pose(poses.reshape(6, 52, 3)[:, :24], betas, trans)
    np.testing.assert_array_equal(three.joints, found.joints)


def test_without_shape_and_place_it_is_the_template(model):
    fields = model_fields()
    body = SmplBody.load(model)
    template = (fields["J_regressor"] @ fields["v_template"])[:22]
    np.testing.assert_allclose(body.rest(), template, atol=1e-14)
    np.testing.assert_allclose(body.pose(np.zeros((1, 66))).joints[0], template, atol=1e-12)


def test_a_body_of_smplx():
    fields = model_fields()
    body = SimpleNamespace(
        **{name: torch.from_numpy(fields[name]) for name in ("v_template", "J_regressor", "shapedirs")},
        parents=torch.tensor([-1, *fields["kintree_table"][0, 1:].tolist()]),
    )
    poses, betas, trans = poses_of()
    found = SmplBody.from_smplx(body).pose(poses, betas, trans).joints
    np.testing.assert_allclose(found, skinned(fields, poses, betas, trans), atol=1e-12)
    with pytest.raises(ScaMoError, match="body: expected a body model of smplx"):
        SmplBody.from_smplx(object())


class Trap:
    """Unpickling this would raise."""

    def __reduce__(self):
        return (pytest.fail, ("it was unpickled",))


def test_no_pickle_is_ever_read(tmp_path):
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ScaMoError, match=r"model\.pkl: expected a \.npz: a pickle can run code .* np\.savez"):
        SmplBody.load(tmp_path / "model.pkl")
    (tmp_path / "renamed.npz").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ScaMoError, match=r"renamed\.npz: cannot be read: .*a pickle can run code"):
        SmplBody.load(tmp_path / "renamed.npz")
    np.savez(tmp_path / "inside.npz", **model_fields() | {"J_regressor": np.array(Trap(), dtype=object)})
    with pytest.raises(ScaMoError, match=r"inside\.npz: cannot be read: .*a pickle can run code"):
        SmplBody.load(tmp_path / "inside.npz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v_template": np.zeros((5, 2))}, r"v_template has shape \[5, 2\]"),
        ({"J_regressor": np.zeros((21, 120))}, r"J_regressor has shape \[21, 120\]"),
        ({"shapedirs": np.zeros((119, 3, 10))}, r"shapedirs has shape \[119, 3, 10\]"),
        ({"kintree_table": np.zeros((2, 5))}, r"kintree_table has shape \[2, 5\]"),
        ({"kintree_table": np.zeros((2, 52))}, r"not those of the SMPL body"),
        ({"v_template": np.full((120, 3), np.nan)}, "not finite"),
        ({"shapedirs": None}, "lacks shapedirs"),
    ],
)
def test_files_of_another_kind(tmp_path, change, message):
    fields = model_fields() | change
    np.savez(tmp_path / "m.npz", **{name: value for name, value in fields.items() if value is not None})
    with pytest.raises(ScaMoError, match=message):
        SmplBody.load(tmp_path / "m.npz")


def test_missing_and_broken_files(tmp_path, model):
    with pytest.raises(ScaMoError, match=r"none\.npz: no such file\. SMPL\+H is at https"):
        SmplBody.load(tmp_path / "none.npz")
    whole = model.read_bytes()
    for size in (0, 100, len(whole) // 2, len(whole) - 10):
        model.write_bytes(whole[:size])
        with pytest.raises(ScaMoError, match=r"model\.npz: cannot be read"):
            SmplBody.load(model)


def test_bad_poses_are_named(model):
    body = SmplBody.load(model)
    poses, betas, trans = poses_of()
    bad = poses.copy()
    bad[4, 7] = np.nan
    lost = trans.copy()
    lost[2, 0] = np.inf
    for arguments, message in [
        ((bad, betas, trans), "poses: frame 4 is not finite"),
        ((poses, betas, lost), "trans: frame 2 is not finite"),
        ((poses[:, :63], betas, trans), "poses: expected shape"),
        ((poses[:, :67], betas, trans), "poses: expected shape"),
        ((poses[:0], betas, trans[:0]), "poses: expected shape"),
        ((poses, betas, trans[:-1]), r"trans: expected shape \(6, 3\), got \(5, 3\)"),
        ((poses, np.zeros(17), trans), "betas: shape .*at most 16"),
        ((poses, betas * np.nan, trans), "betas: shape"),
    ]:
        with pytest.raises(ScaMoError, match=message):
            body.pose(*arguments)
    # Fingers may be broken: nothing of them is used.
    poses[:, 100] = np.nan
    assert np.isfinite(body.pose(poses, betas, trans).joints).all()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_files_are_refused_or_read(tmp_path, save):
    """Whatever byte is wrong, nothing but a ScaMoError comes out."""
    save(tmp_path / "model.npz", **model_fields(vertices=30))
    whole = (tmp_path / "model.npz").read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(400):
        broken = bytearray(whole)
        # Headers and the zip's directory are where it matters.
        for place in (
            *rng.integers(0, len(whole), 3),
            rng.integers(0, 200),
            len(whole) - rng.integers(1, 300),
        ):
            broken[place] = rng.integers(256)
        (tmp_path / "model.npz").write_bytes(broken)
        try:
            SmplBody.load(tmp_path / "model.npz")
        except ScaMoError:
            refused += 1
    assert refused > 200
