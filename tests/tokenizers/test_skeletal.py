"""The skeletal network: tables of the released code, exact masking, and each layer against its formula."""

import pytest
import torch
import torch.nn.functional as F

from scamo.errors import ScaMoError
from scamo.motion.body import Body
from scamo.motion.per_joint import PerJoint
from scamo.tokenizers.skeletal import (
    NODE_EDGES,
    NODE_JOINTS,
    PART_NAMES,
    PART_NODES,
    REGIONS,
    JointMLP,
    ResSTConv,
    SkeletalDecoder,
    SkeletalEncoder,
    STConv,
    STPool,
    STUnpool,
    Topology,
    double_time,
    frame_masks,
    halve_time,
    neighbour_mean,
)

EDGES_22 = (
    "0-1 0-2 0-3 1-4 2-5 3-6 4-7 5-8 6-9 7-10 8-11 9-12 9-13 9-14 12-15 13-16 14-17 16-18 17-19 18-20 19-21"
)
EDGES_12 = "0-1 0-3 0-5 1-2 3-4 5-6 6-7 6-9 6-11 7-8 9-10"


def pairs(text):
    return {tuple(sorted(map(int, edge.split("-")))) for edge in text.split()}


def random_motions(lengths, frames, width, joints):
    """(J, B, T, W), zero past each length."""
    x = torch.randn(joints, len(lengths), frames, width)
    return x * frame_masks(torch.tensor(lengths), frames)[0]


def test_tables_of_the_released_code():
    topology = Topology.of(22)
    assert [set(edges) for edges in topology.edges] == [pairs(EDGES_22), pairs(EDGES_12)]
    assert [set(group) for group in topology.groups[0]] == [
        *({0, 1, 2, 3}, {0, 1, 4}, {4, 7, 10}, {0, 2, 5}, {5, 8, 11}, {0, 3, 6, 9}, {6, 9, 12, 13, 14}),
        *({9, 13, 16}, {16, 18, 20}, {9, 14, 17}, {17, 19, 21}, {9, 12, 15}),
    ]
    parts = [{0, 1, 3, 5}, {0, 1, 2}, {0, 3, 4}, {0, 5, 6}, {6, 7, 8}, {6, 9, 10}, {6, 11}]
    assert [set(group) for group in topology.groups[1]] == parts
    assert topology.regions[1] == (tuple(range(7)),)
    assert topology.regions[2] == ((0, 3), (1, 2, 4, 5, 6))
    assert topology.regions[3] == ((0, 3), (1, 2), (4, 5, 6))
    assert topology.regions[5] == ((0,), (3,), (1, 2), (4, 5), (6,))
    assert topology.regions[7] == tuple((part,) for part in range(7))


@pytest.mark.parametrize("joints", NODE_JOINTS)
def test_groups_fit_the_body(joints):
    """Every joint is pooled; the groups are connected; left is the mirror of right; arms hold arms."""
    body, topology = Body.of(joints), Topology.of(joints)
    assert {joint for group in topology.groups[0] for joint in group} == set(range(joints))
    for edges, groups in zip(topology.edges, topology.groups, strict=True):
        for group in groups:
            reached = {group[0]}
            for _ in group:
                reached |= {b for a, b in [*edges, *(e[::-1] for e in edges)] if a in reached and b in group}
            assert reached == set(group)
    names = [[body.names[joint] for joint in group] for group in topology.groups[0]]
    for left, right in ((1, 3), (2, 4), (7, 9), (8, 10)):
        assert [name.replace("left", "right") for name in names[left]] == names[right]
    assert [name for name in names[8] if "left" in name] == [
        "left_shoulder",
        "left_elbow",
        "left_wrist",
    ]
    assert len(PART_NAMES) == len(PART_NODES)
    assert max(node for edge in NODE_EDGES for node in edge) == 11


def test_plain_pooling_knows_no_limbs():
    topology = Topology.of(22, "plain")
    for groups, count in zip(topology.groups, (22, 12), strict=True):
        assert [joint for group in groups for joint in group] == list(range(count))
    assert [len(groups) for groups in topology.groups] == [12, 7]
    assert {count: len(groups) for count, groups in topology.regions.items()} == {n: n for n in REGIONS}
    assert not topology.learned
    pool = STPool(topology.groups[0], 22, topology.learned)
    x = torch.randn(22, 1, 2, 3)
    expected = torch.stack([x[list(group)].mean(0) for group in topology.groups[0]]).mean(2, keepdim=True)
    torch.testing.assert_close(pool(x, torch.ones(1, 2, 1)), expected)
    assert not any(p.requires_grad for p in [*pool.parameters()])


def test_other_bodies_are_refused():
    with pytest.raises(ScaMoError, match="joints: 21 of them have no pooling groups, expected 22 or 24"):
        Topology.of(21)
    with pytest.raises(ScaMoError, match="pooling = 'none': expected topology or plain"):
        Topology.of(22, "none")


def test_stconv_is_its_formula():
    torch.manual_seed(0)
    topology = Topology.of(22)
    conv = STConv(6, topology.edges[0], 22)
    x = torch.randn(22, 2, 9, 6)
    neighbours = {joint: {joint} for joint in range(22)}
    for a, b in topology.edges[0]:
        neighbours[a].add(b)
        neighbours[b].add(a)
    for joint in range(22):
        messages = torch.stack([conv.neighbours(x[other]) for other in neighbours[joint]]).mean(0)
        time = F.conv1d(x[joint].transpose(1, 2), conv.time.weight, conv.time.bias, padding=1)
        expected = conv.own(x[joint]) + messages + time.transpose(1, 2)
        torch.testing.assert_close(conv(x)[joint], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        neighbour_mean(((0, 1),), 3), torch.tensor([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]])
    )


def test_joint_mlp_is_a_network_for_each_joint():
    torch.manual_seed(0)
    mlp = JointMLP([3, 5], 4, [2, 1])
    x = torch.randn(2, 3, 7, 5)
    x[0, ..., 3:] = 0
    for joint, (width, out) in enumerate([(3, 2), (5, 1)]):
        hidden = x[joint, ..., :width] @ mlp.weight1[joint, :width] + mlp.bias1[joint]
        expected = F.gelu(hidden) @ mlp.weight2[joint] + mlp.bias2[joint]
        torch.testing.assert_close(mlp(x)[joint], expected)
        assert (expected[..., out:] == 0).all()


def test_pool_starts_as_a_mean_and_its_weights_stay_one():
    pool = STPool(PART_NODES, 12, True)
    for row, group in zip(pool.weights(), PART_NODES, strict=True):
        expected = torch.zeros(12)
        expected[list(group)] = 1 / len(group)
        torch.testing.assert_close(row, expected)
    with torch.no_grad():
        pool.logits.normal_()
    torch.testing.assert_close(pool.weights().sum(1), torch.ones(7))
    assert ((pool.weights() > 0).sum(1) == torch.tensor([len(group) for group in PART_NODES])).all()


def test_unpool_starts_as_the_mapping():
    unpool = STUnpool(PART_NODES, 12, True)
    x = torch.randn(7, 1, 1, 4)
    ones = torch.ones(1, 2, 1)
    made = unpool(x, ones[:, :1], ones)
    for node in range(12):
        parts = [part for part, nodes in enumerate(PART_NODES) if node in nodes]
        torch.testing.assert_close(made[node, 0, 0], x[parts, 0, 0].sum(0))
        torch.testing.assert_close(made[node, 0, 1], made[node, 0, 0])
    made.sum().backward()
    assert torch.equal(unpool.weight.grad != 0, unpool.weight.detach() > 0)


def test_time_goes_there_and_back():
    """Halving averages the frames that are there; doubling is torch's linear interpolation, without pads."""
    x = random_motions([8, 5], 8, 3, 2)
    masks = frame_masks(torch.tensor([8, 5]), 8)
    assert [mask[1, :, 0].tolist() for mask in masks] == [[1] * 5 + [0] * 3, [1, 1, 1, 0], [1, 1]]
    half = halve_time(x, masks[0])
    torch.testing.assert_close(half[:, 0], x[:, 0].unflatten(1, (4, 2)).mean(2))
    torch.testing.assert_close(half[:, 1, 2], x[:, 1, 4])
    assert (half[:, 1, 3] == 0).all()
    twice = double_time(half, masks[1])
    for motion, length in enumerate((4, 3)):
        alone = half[:, motion, :length].transpose(1, 2)
        expected = F.interpolate(alone, scale_factor=2, mode="linear").transpose(1, 2)
        torch.testing.assert_close(twice[:, motion, : 2 * length], expected)


@pytest.mark.parametrize("feature_dim", [263, 296])
def test_padding_changes_nothing(feature_dim):
    torch.manual_seed(0)
    per_joint = PerJoint.of(feature_dim)
    topology = Topology.of(len(per_joint.widths))
    sizes = {"width": 8, "blocks": 2, "dropout": 0.1}
    encoder = SkeletalEncoder(per_joint, topology, **sizes).eval()
    decoder = SkeletalDecoder(per_joint, topology, **sizes).eval()
    lengths = [29, 3, 12, 40]
    masks = frame_masks(torch.tensor(lengths), 40)
    x = torch.randn(4, 40, feature_dim) * masks[0]
    z = encoder(x, masks)
    made = decoder(z, masks)
    assert z.shape == (7, 4, 10, 8)
    assert made.shape == (4, 40, feature_dim)
    for motion, length in enumerate(lengths):
        frames = -(-length // 4) * 4
        alone = frame_masks(torch.tensor([length]), frames)
        latents = encoder(x[motion : motion + 1, :frames], alone)
        torch.testing.assert_close(latents, z[:, [motion], : frames // 4], rtol=0, atol=1e-6)
        assert (z[:, motion, frames // 4 :] == 0).all()
        features = decoder(latents, alone)[:, :length]
        torch.testing.assert_close(features, made[[motion], :length], rtol=1e-6, atol=1e-6)


def test_what_stands_past_the_end_would_matter():
    """The test above can fail: without the masks the same network lets the padding in."""
    torch.manual_seed(0)
    block = ResSTConv(8, NODE_EDGES, 12, 0.0)
    x = random_motions([6], 8, 8, 12)
    masked, free = block(x, frame_masks(torch.tensor([6]), 8)[0]), block(x, torch.ones(1, 8, 1))
    assert (masked[:, :, 5] - free[:, :, 5]).abs().max() > 1e-3
    torch.testing.assert_close(masked[:, :, :6], block(x[:, :, :6], torch.ones(1, 6, 1)), rtol=0, atol=1e-6)


def test_dropout_is_in_the_branch_alone():
    torch.manual_seed(0)
    block = ResSTConv(8, NODE_EDGES, 12, 0.5)
    x = torch.randn(12, 1, 8, 8)
    full = torch.ones(1, 8, 1)
    branch = block.eval()(x, full) - x
    seen = block.train()(x, full) - x
    dropped = seen == 0
    assert 0.4 < dropped.float().mean() < 0.6
    torch.testing.assert_close(seen[~dropped], 2 * branch[~dropped], rtol=1e-4, atol=1e-5)
