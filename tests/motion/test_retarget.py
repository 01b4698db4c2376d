"""Any skeleton to the 22 joints: units, axes, rates, joint maps, and CMU's clips in all their dialects."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from scamo.errors import ScaMoError
from scamo.motion.asf import read_amc
from scamo.motion.bvh import read_bvh, save_bvh
from scamo.motion.hierarchy import multiply
from scamo.motion.joint_maps import UNITS, JointMap, built_in, detect
from scamo.motion.motion import Motion
from scamo.motion.retarget import retarget
from scamo.motion.skeleton import DEFAULT_OFFSETS, JOINT_NAMES, forward_kinematics
from scamo.motion.synthetic import corpus_clip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A walk as a BVH file, read, and its joints as the file has them."""
    path = tmp_path_factory.mktemp("bvh") / "walk.bvh"
    motion = Motion(corpus_clip(0).joints)
    save_bvh(motion, path, stretch=False)
    return read_bvh(path), motion.joints


def distance(a, b):
    return float(np.linalg.norm(a - b, axis=-1).max())


def turned(animation, turn):
    """The animation in a world that is turned, its rest pose too."""
    offsets = turn.apply(animation.hierarchy.offsets)
    shape = animation.translations.shape
    moved = turn.apply(animation.translations.reshape(-1, 3)).reshape(shape)
    q = turn.as_quat(scalar_first=True)
    rotations = multiply(multiply(q, animation.rotations), q * [1, -1, -1, -1])
    hierarchy = replace(animation.hierarchy, offsets=offsets)
    return replace(animation, hierarchy=hierarchy, rotations=rotations, translations=moved)


def test_own_files_come_back(source):
    animation, joints = source
    back = retarget(animation, ground=False, face_forward=False)
    assert (back.up, back.metres_a_unit, back.fps) == ("y", 1.0, 20)
    assert distance(back.joints, joints) < 1e-3
    # The rotations say the same as the joints.
    fk = forward_kinematics(back.rotations, back.offsets, back.joints[:, 0])
    assert distance(fk, back.joints) < 1e-5


@pytest.mark.parametrize("unit", sorted(UNITS))
def test_units_are_found_by_the_legs(source, unit):
    animation, _ = source
    size = 1 / UNITS[unit]
    hierarchy = replace(animation.hierarchy, offsets=animation.hierarchy.offsets * size)
    other = replace(animation, hierarchy=hierarchy, translations=animation.translations * size)
    found = retarget(other)
    assert found.metres_a_unit == UNITS[unit]
    assert distance(found.joints, retarget(animation).joints) < 1e-5
    assert distance(retarget(other, units=unit).joints, found.joints) == 0


def test_a_unit_that_fits_no_body_is_refused(source):
    animation, _ = source
    small = replace(animation, translations=animation.translations * 0.2)
    with pytest.raises(ScaMoError, match=r"units: legs of 0\.1.* give the unit"):
        retarget(small)
    assert retarget(small, units=5.0).metres_a_unit == 5
    with pytest.raises(ScaMoError, match="units: 'yard', expected one of"):
        retarget(animation, units="yard")


@pytest.mark.parametrize(
    ("up", "axis", "degrees"),
    [("z", "X", 90), ("-z", "X", -90), ("x", "Z", -90), ("-x", "Z", 90), ("-y", "Z", 180)],
)
def test_the_up_axis_is_found(source, up, axis, degrees):
    animation, _ = source
    other = turned(animation, Rotation.from_euler(axis, degrees, degrees=True))
    found = retarget(other)
    assert found.up == up
    assert distance(found.joints, retarget(animation).joints) < 1e-5
    fk = forward_kinematics(found.rotations, found.offsets, found.joints[:, 0])
    assert distance(fk, found.joints) < 1e-5


def test_an_up_axis_in_doubt_is_refused(source):
    animation, _ = source
    lying = animation.rotations.copy()
    turn = Rotation.from_euler("X", 90, degrees=True).as_quat(scalar_first=True)
    lying[:, 0] = multiply(turn, lying[:, 0])
    lying = replace(animation, rotations=lying)
    with pytest.raises(ScaMoError, match="up: the rest pose stands along y, the motion along z; give the up"):
        retarget(lying)
    assert retarget(lying, up="y", face_forward=False).up == "y"
    with pytest.raises(ScaMoError, match="up: 'w', expected one of"):
        retarget(animation, up="w")


def test_clips_start_on_the_floor_at_the_origin_facing_ahead(source):
    animation, _ = source
    other = turned(animation, Rotation.from_euler("Y", 130, degrees=True))
    joints = retarget(other).joints
    assert joints[..., 1].min() == 0
    np.testing.assert_allclose(joints[0, 0, [0, 2]], 0, atol=1e-6)
    across = joints[0, 1] - joints[0, 2] + joints[0, 16] - joints[0, 17]
    assert across[0] > 0.1
    assert abs(across[2]) < 1e-5


def test_rates_are_converted(source):
    animation, _ = source
    fast = replace(animation, fps=60.0)
    np.testing.assert_array_equal(
        retarget(fast, ground=False).joints, retarget(animation, ground=False).joints[::3]
    )
    other = retarget(fast, fps=25.0, ground=False)
    assert other.fps == 25
    with pytest.raises(ScaMoError, match="1 frames a second are too few to make 20 of them"):
        retarget(replace(animation, fps=1.0))
    assert (
        distance(other.joints[::5], retarget(animation, ground=False).joints[::12][: len(other.joints[::5])])
        < 1e-5
    )


def test_another_skeleton_keeps_the_directions(source):
    animation, _ = source
    target = DEFAULT_OFFSETS * np.linspace(0.8, 1.2, 22)[:, None]
    own, other = (
        retarget(animation, target_offsets=offsets, face_forward=False) for offsets in (None, target)
    )
    legs = [4, 5, 7, 8, 10, 11, 18, 19, 20, 21]
    above = [1, 2, 4, 5, 7, 8, 16, 17, 18, 19]
    bones = [body.joints[:, legs] - body.joints[:, above] for body in (own, other)]
    lengths = [np.linalg.norm(b, axis=-1, keepdims=True) for b in bones]
    np.testing.assert_allclose(
        lengths[1][..., 0], np.tile(np.linalg.norm(target[legs], axis=-1), (len(lengths[1]), 1)), atol=1e-5
    )
    np.testing.assert_allclose(bones[0] / lengths[0], bones[1] / lengths[1], atol=1e-4)
    ratio = np.linalg.norm(target[[4, 7]], axis=-1).sum() / lengths[0][0, [0, 2]].sum()
    walked = [body.joints[-1, 0, 2] - body.joints[0, 0, 2] for body in (own, other)]
    assert walked[1] == pytest.approx(walked[0] * ratio, rel=0.02)
    with pytest.raises(ScaMoError, match=r"target_offsets: expected \(22, 3\)"):
        retarget(animation, target_offsets=target[:4])


def test_lost_frames_are_filled(source):
    animation, _ = source
    rotations, places = animation.rotations.copy(), animation.translations.copy()
    rotations[5] = [1, 0, 0, 0]
    places[5, 0] = 0
    holed = retarget(replace(animation, rotations=rotations, translations=places), ground=False)
    assert holed.notes == ("1 empty frames filled from their neighbours",)
    np.testing.assert_array_equal(holed.joints[5], holed.joints[4])


def test_exchanged_sides_are_refused(source):
    animation, _ = source
    smpl = built_in()["smpl"]
    swap = {"left": "right", "right": "left"}
    joints = tuple(
        tuple((name.replace(side, swap[side]), weight) for name, weight in pairs)
        for pairs in smpl.joints
        for side in ["left" if pairs[0][0].startswith("left") else "right"]
    )
    with pytest.raises(ScaMoError, match="toes point backwards"):
        retarget(animation, replace(smpl, joints=joints))


def test_a_joint_map_of_ones_own(tmp_path, source):
    animation, _ = source
    lines = ['name = "mine"', 'up = "y"', "[joints]"]
    lines += [f'{name} = "{name}"' for name in JOINT_NAMES if name != "spine3"]
    (tmp_path / "m.toml").write_text("\n".join([*lines, "spine3 = { spine2 = 0.25, neck = 0.75 }"]))
    joints = retarget(animation, JointMap.load(tmp_path / "m.toml")).joints
    np.testing.assert_allclose(joints[:, 9], 0.25 * joints[:, 6] + 0.75 * joints[:, 12], atol=1e-6)

    for spoiled, message in [
        (lines, r"m\.toml: \[joints\] lacks spine3"),
        ([*lines, 'spine3 = "spine3"', 'tail = "neck"'], "'tail' is none of pelvis"),
        ([*lines, "spine3 = { neck = 0.5 }"], r"joints\.spine3: the weights sum to 0\.5"),
        ([*lines, "spine3 = 3"], r"joints\.spine3: expected a joint's name"),
        (["colour = 1", *lines, 'spine3 = "spine3"'], "unknown key 'colour'"),
        (['units = "yard"', *lines, 'spine3 = "spine3"'], "units: 'yard'"),
        (["skip_frames = -1", *lines, 'spine3 = "spine3"'], "skip_frames = -1"),
        (["["], "not a readable TOML file"),
    ]:
        (tmp_path / "m.toml").write_text("\n".join(spoiled))
        with pytest.raises(ScaMoError, match=message):
            JointMap.load(tmp_path / "m.toml")
    with pytest.raises(ScaMoError, match=r"no joint map of that name \(100style, "):
        JointMap.load("cmu")


def renamed(hierarchy, **names):
    return replace(hierarchy, names=tuple(names.get(name, name) for name in hierarchy.names))


def test_maps_are_found_by_the_joints_and_say_what_is_missing(source):
    animation, _ = source
    assert detect(animation.hierarchy) is built_in()["smpl"]
    prefixed = replace(animation.hierarchy, names=tuple(f"a:{n}" for n in animation.hierarchy.names))
    assert detect(prefixed) is built_in()["smpl"]
    spoiled = renamed(animation.hierarchy, left_knee="lk")
    with pytest.raises(
        ScaMoError, match="no joint map fits; the nearest, .*, wants left_knee as well.*has pelvis, "
    ):
        detect(spoiled)
    with pytest.raises(ScaMoError, match="wants left_knee, which the file lacks; it has pelvis, "):
        retarget(replace(animation, hierarchy=spoiled), built_in()["smpl"])


def test_every_map_is_found_by_its_own_joints(source):
    """No map hides another."""
    animation, _ = source
    for joint_map in built_in().values():
        names = sorted(joint_map.sources())
        hierarchy = replace(
            animation.hierarchy,
            names=tuple(names),
            parents=(-1,) * 1 + (0,) * (len(names) - 1),
            offsets=np.zeros((len(names), 3)),
        )
        assert detect(hierarchy) is joint_map


# Mean distances to an independent mapping of the same clips, millimetres. The subjects' ASF files have the
# bone that cgspeed's lost, the reference of `mb` mostly an estimate of it; DAZ's legs were rebuilt there.
REAL = {"mb": 5.0, "max": 1.0, "amc": 0.01, "daz": 20.0}


@pytest.mark.parametrize("dialect", sorted(REAL))
def test_real_clips_agree_with_another_mapping(shared, dialect):
    with np.load(shared / "data" / "cmu_clips" / "clips20.npz") as clips:
        folder = shared / "data" / ("asf_amc" if dialect == "amc" else "bvh")
        paths = sorted(folder.glob("*.amc" if dialect == "amc" else f"*.{dialect}.bvh"))
        assert paths
        for path in paths:
            animation, skip, first = read_amc(path) if dialect == "amc" else read_bvh(path), None, 0
            if dialect == "daz":
                # The file says 120 frames a second; the clip was recorded, and is stored there, at 60.
                animation, skip, first = replace(animation, fps=60.0), 7, 2
            wanted = clips[path.name.split(".")[0]][first:]
            body = retarget(animation, skip_frames=skip, ground=False, face_forward=False)
            assert len(body.joints) == len(wanted)
            assert 1000 * np.linalg.norm(body.joints - wanted, axis=-1).mean() < REAL[dialect]
            # Without what the map knows, the same is found.
            bare = replace(detect(animation.hierarchy), units=None, up=None)
            found = retarget(replace(animation, metres_a_unit=None), bare, skip_frames=skip)
            assert (found.up, found.metres_a_unit) == ("y", body.metres_a_unit)


def bvh_text(animation):
    """An animation as BVH, with angles by SciPy."""
    hierarchy = animation.hierarchy
    children = [[j for j, p in enumerate(hierarchy.parents) if p == joint] for joint in range(len(hierarchy))]
    order: list[int] = []

    def joint_lines(joint):
        order.append(joint)
        name = hierarchy.names[joint]
        offset = "OFFSET " + " ".join(f"{x:.9f}" for x in hierarchy.offsets[joint])
        if name.endswith(".end"):
            order.pop()
            return ["End Site", "{", offset, "}"]
        moves = "" if joint else "Xposition Yposition Zposition "
        channels = f"CHANNELS {3 if joint else 6} {moves}Zrotation Yrotation Xrotation"
        lines = [f"{'JOINT' if joint else 'ROOT'} {name}", "{", offset, channels]
        for child in children[joint]:
            lines += joint_lines(child)
        return [*lines, "}"]

    lines = ["HIERARCHY", *joint_lines(0), "MOTION", f"Frames: {len(animation)}"]
    columns = [animation.translations[:, 0]]
    for joint in order:
        turn = Rotation.from_quat(animation.rotations[:, joint], scalar_first=True)
        columns.append(turn.as_euler("ZYX", degrees=True))
    rows = np.concatenate(columns, axis=1)
    lines += ["Frame Time: 0.0083333", *(" ".join(f"{x:.6f}" for x in row) for row in rows)]
    return "\n".join(lines)


def test_a_clip_is_the_same_as_amc_and_as_bvh(shared, tmp_path):
    animation = read_amc(shared / "data" / "asf_amc" / "127_03.amc")
    (tmp_path / "c.bvh").write_text(bvh_text(animation))
    again = read_bvh(tmp_path / "c.bvh")
    assert detect(again.hierarchy) is built_in()["cmu_asf"]
    assert distance(retarget(again).joints, retarget(animation).joints) < 1e-5
