"""Skeletal-temporal convolutions: the network of ScaleMoGen's tokenizer, and which joints it pools.

Shapes: J joints or nodes, B motions, T frames, W width, C features a frame. Activations are (J, B, T, W):
what mixes joints is then one product with a small matrix, and what differs by joint one batched product.

Frames past a motion's end are zero before everything that looks at neighbouring frames, and no average counts
them: a motion that is padded to a longer one gets what it gets alone. `masks` has 1 for the frames of each
time resolution, fine to coarse, float (B, T, 1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scamo.errors import ScaMoError
from scamo.motion.body import Body
from scamo.motion.per_joint import PerJoint

Groups = tuple[tuple[int, ...], ...]
Edges = tuple[tuple[int, int], ...]

DOWNSAMPLING = 4  # frames of a latent: each of the two poolings halves the frames

# The joints of each of 12 nodes, by the number of joints: root, left hip and leg, right hip and leg, spine,
# chest, left shoulder and arm, right shoulder and arm, head. Those of 22 joints are the released code's; it
# names none of SnapMoGen's 24 that we know of: these take the same parts of that body, and are inferred.
NODE_JOINTS: dict[int, Groups] = {
    22: (
        *((0, 1, 2, 3), (0, 1, 4), (4, 7, 10), (0, 2, 5), (5, 8, 11), (0, 3, 6, 9), (9, 6, 12, 13, 14)),
        *((9, 13, 16), (16, 18, 20), (9, 14, 17), (17, 19, 21), (9, 12, 15)),
    ),
    24: (
        *((0, 1, 15, 16, 20), (15, 16, 17), (17, 18, 19), (15, 20, 21), (21, 22, 23), (0, 1, 2, 3)),
        *((3, 2, 4, 7, 11), (3, 7, 8), (8, 9, 10), (3, 11, 12), (12, 13, 14), (3, 4, 5, 6)),
    ),
}
NODE_EDGES: Edges = (
    *((0, 1), (0, 3), (0, 5), (1, 2), (3, 4), (5, 6), (6, 7), (6, 9), (6, 11), (7, 8), (9, 10)),
)
# The nodes of each of 7 parts, and the parts of each of so many regions.
PART_NODES: Groups = ((0, 1, 3, 5), (0, 1, 2), (0, 3, 4), (0, 5, 6), (6, 7, 8), (6, 9, 10), (6, 11))
PART_NAMES = ("root", "left_leg", "right_leg", "spine", "left_arm", "right_arm", "head")
PARTS = len(PART_NAMES)
REGIONS: dict[int, Groups] = {
    1: ((0, 1, 2, 3, 4, 5, 6),),
    2: ((0, 3), (1, 2, 4, 5, 6)),
    3: ((0, 3), (1, 2), (4, 5, 6)),
    5: ((0,), (3,), (1, 2), (4, 5), (6,)),
    7: ((0,), (1,), (2,), (3,), (4,), (5,), (6,)),
}


@dataclass(frozen=True)
class Topology:
    """Which joints are pooled and which see each other. Get one by `Topology.of(joints)`.

    edges: of the joints, and of the nodes that they are pooled to. groups: the joints of each node, and the
    nodes of each part. regions: the parts of each of 1, 2, 3, 5 or 7 regions, which the quantiser averages.
    learned: the shares inside a group are learnt, else all are equal.
    """

    edges: tuple[Edges, Edges]
    groups: tuple[Groups, Groups]
    regions: Mapping[int, Groups]
    learned: bool

    @staticmethod
    def of(n_joints: int, pooling: str = "topology") -> Topology:
        """The one of a body of 22 or 24 joints.

        pooling: "topology", the limbs' overlapping groups with learnt shares, or "plain", for comparison: as
        many groups, but runs of neighbouring numbers, cut evenly, with equal shares. Raises ScaMoError.
        """
        if n_joints not in NODE_JOINTS:
            known = " or ".join(map(str, NODE_JOINTS))
            raise ScaMoError(f"joints: {n_joints} of them have no pooling groups, expected {known}")
        joints: Edges = tuple((p, j) for j, p in enumerate(Body.of(n_joints).parents) if p >= 0)
        if pooling == "topology":
            groups = NODE_JOINTS[n_joints], PART_NODES
            return Topology((joints, NODE_EDGES), groups, REGIONS, learned=True)
        if pooling != "plain":
            raise ScaMoError(f"pooling = {pooling!r}: expected topology or plain")
        nodes = _runs(n_joints, len(NODE_EDGES) + 1)
        of_joint = {joint: node for node, members in enumerate(nodes) for joint in members}
        edges = tuple(sorted({(of_joint[a], of_joint[b]) for a, b in joints if of_joint[a] != of_joint[b]}))
        regions = {count: _runs(PARTS, count) for count in REGIONS}
        return Topology((joints, edges), (nodes, _runs(len(nodes), PARTS)), regions, learned=False)


def _runs(count: int, groups: int) -> Groups:
    return tuple(tuple(run.tolist()) for run in np.array_split(np.arange(count), groups))


def membership(groups: Groups, count: int) -> Tensor:
    """1 where a group has a member, float32 (groups, count)."""
    matrix = torch.zeros(len(groups), count)
    for row, members in enumerate(groups):
        matrix[row, list(members)] = 1
    return matrix


def neighbour_mean(edges: Edges, count: int) -> Tensor:
    """The matrix (count, count) that averages every node and its neighbours."""
    matrix = torch.eye(count)
    for a, b in edges:
        matrix[a, b] = matrix[b, a] = 1
    return matrix / matrix.sum(1, keepdim=True)


def frame_masks(lengths: Tensor, frames: int) -> list[Tensor]:
    """Lengths (B,) -> masks of T, T / 2 and T / 4 frames; T = frames, a multiple of 4, is the padded length.

    A coarse frame is there when one of its fine frames is.
    """
    masks = []
    for _ in range(DOWNSAMPLING.bit_length()):
        masks.append((torch.arange(frames, device=lengths.device) < lengths[:, None]).float()[..., None])
        lengths, frames = (lengths + 1) // 2, frames // 2
    return masks


def mix_joints(matrix: Tensor, x: Tensor) -> Tensor:
    """(K, J) times (J, B, T, W) -> (K, B, T, W)."""
    return (matrix @ x.reshape(x.shape[0], -1)).view(-1, *x.shape[1:])


def halve_time(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of every two frames that are there: (J, B, T, W), zero past the ends -> (J, B, T / 2, W)."""
    count = mask.unflatten(1, (-1, 2)).sum(2).clamp_min(1)
    return x.unflatten(2, (-1, 2)).sum(3) / count


def double_time(x: Tensor, mask: Tensor) -> Tensor:
    """Linear interpolation to twice the frames: (J, B, T, W) -> (J, B, 2 T, W).

    Past either end of a motion its outermost frame goes on. mask: of the T frames.
    """
    before, after = F.pad(x[:, :, :-1], (0, 0, 1, 0)), F.pad(x[:, :, 1:], (0, 0, 0, 1))
    inside = F.pad(mask[:, 1:], (0, 0, 0, 1)) > 0
    after = torch.where(inside, after, x)
    first = torch.arange(x.shape[2], device=x.device)[:, None] == 0
    before = torch.where(first, x, before)
    return torch.stack([0.75 * x + 0.25 * before, 0.75 * x + 0.25 * after], 3).flatten(2, 3)


class JointMLP(nn.Module):
    """Linear, GELU, Linear with other weights for every joint: (J, B, T, in) -> (J, B, T, out).

    inputs and outputs: widths of each joint; the arrays are padded to the widest, with zeros where a joint
    has no such channel.
    """

    def __init__(self, inputs: Sequence[int], width: int, outputs: Sequence[int]) -> None:
        super().__init__()
        self.weight1, self.bias1 = self._linear(inputs, [width] * len(inputs))
        self.weight2, self.bias2 = self._linear([width] * len(outputs), outputs)

    @staticmethod
    def _linear(inputs: Sequence[int], outputs: Sequence[int]) -> tuple[nn.Parameter, nn.Parameter]:
        weight = torch.zeros(len(inputs), max(inputs), max(outputs))
        bias = torch.zeros(len(inputs), 1, max(outputs))
        for joint, (rows, columns) in enumerate(zip(inputs, outputs, strict=True)):
            bound = 1 / math.sqrt(rows)
            weight[joint, :rows, :columns].uniform_(-bound, bound)
            bias[joint, :, :columns].uniform_(-bound, bound)
        return nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(torch.baddbmm(self.bias1, x.flatten(1, 2), self.weight1))
        return torch.baddbmm(self.bias2, y, self.weight2).unflatten(1, x.shape[1:3])


class STConv(nn.Module):
    """W1 x + mean over neighbours and self of W2 x + a convolution over three frames; (J, B, T, W) alike.

    The frames past a motion's end must be zero on entry.
    """

    mean: Tensor

    def __init__(self, width: int, edges: Edges, count: int) -> None:
        super().__init__()
        self.own = nn.Linear(width, width)
        self.neighbours = nn.Linear(width, width)
        self.time = nn.Conv1d(width, width, 3, padding=1)
        self.register_buffer("mean", neighbour_mean(edges, count), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        # W1 is one more weight of the middle frame. A 2-d convolution takes channels-last without a copy.
        weight = self.time.weight + F.pad(self.own.weight[:, :, None], (1, 1))
        weight = weight.unsqueeze(2).contiguous(memory_format=torch.channels_last)
        image = x.flatten(0, 1).transpose(1, 2).unsqueeze(2)
        bias = cast(Tensor, self.time.bias) + self.own.bias
        y = F.conv2d(image, weight, bias, padding=(0, 1)).squeeze(2).transpose(1, 2)
        return y.unflatten(0, x.shape[:2]) + mix_joints(self.mean, self.neighbours(x))


class ResSTConv(nn.Module):
    """x + Dropout(STConv(GELU(STConv(GELU(x)))))."""

    def __init__(self, width: int, edges: Edges, count: int, dropout: float) -> None:
        super().__init__()
        self.conv1 = STConv(width, edges, count)
        self.conv2 = STConv(width, edges, count)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.conv1(F.gelu(x)) * mask
        return x + self.dropout(self.conv2(F.gelu(y))) * mask


class STPool(nn.Module):
    """Weighted means over groups of joints, then of two frames: (J, B, T, W) -> (groups, B, T / 2, W).

    The weights are a softmax inside each group, equal at the start and learnt if `learned`.
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, groups: Groups, count: int, learned: bool) -> None:
        super().__init__()
        rows, columns = membership(groups, count).nonzero(as_tuple=True)
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", columns, persistent=False)
        self.logits = nn.Parameter(torch.zeros(len(rows)), requires_grad=learned)
        self.shape = len(groups), count

    def weights(self) -> Tensor:
        """(groups, J), 0 outside of a group."""
        logits = torch.full(self.shape, -torch.inf, device=self.logits.device, dtype=self.logits.dtype)
        return logits.index_put((self.rows, self.columns), self.logits).softmax(1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return halve_time(mix_joints(self.weights(), x), mask)


class STUnpool(nn.Module):
    """ReLU(U) x, then twice the frames: (groups, B, T, W) -> (J, B, 2 T, W).

    U is 1 at the members of each group and 0 elsewhere; the zeros stay, as ReLU has no slope there.
    """

    def __init__(self, groups: Groups, count: int, learned: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(membership(groups, count).T.contiguous(), requires_grad=learned)

    def forward(self, x: Tensor, coarse: Tensor, fine: Tensor) -> Tensor:
        return double_time(mix_joints(self.weight.relu(), x), coarse) * fine


class SkeletalEncoder(nn.Module):
    """(B, T, C) normalised features -> (7, B, T / 4, W), zero past a motion's end, as its input must be."""

    def __init__(
        self, per_joint: PerJoint, topology: Topology, *, width: int, blocks: int, dropout: float
    ) -> None:
        super().__init__()
        self.per_joint = per_joint
        counts = len(per_joint.widths), len(topology.groups[0])
        self.joints = JointMLP(per_joint.widths, width, [width] * counts[0])
        self.blocks = nn.ModuleList(
            nn.ModuleList(ResSTConv(width, edges, count, dropout) for _ in range(blocks))
            for edges, count in zip(topology.edges, counts, strict=True)
        )
        self.pools = nn.ModuleList(
            STPool(groups, count, topology.learned)
            for groups, count in zip(topology.groups, counts, strict=True)
        )

    def forward(self, features: Tensor, masks: Sequence[Tensor]) -> Tensor:
        x = self.joints(self.per_joint.split(features).permute(2, 0, 1, 3).contiguous()) * masks[0]
        for blocks, pool, mask in zip(self.blocks, self.pools, masks[:-1], strict=True):
            for block in cast(nn.ModuleList, blocks):
                x = block(x, mask)
            x = pool(x, mask)
        return x


class SkeletalDecoder(nn.Module):
    """(7, B, N, W), zero past a motion's end -> (B, 4 N, C) normalised features."""

    def __init__(
        self, per_joint: PerJoint, topology: Topology, *, width: int, blocks: int, dropout: float
    ) -> None:
        super().__init__()
        self.per_joint = per_joint
        counts = len(per_joint.widths), len(topology.groups[0])
        levels = list(zip(topology.groups, topology.edges, counts, strict=True))[::-1]
        self.unpools = nn.ModuleList(STUnpool(groups, count, topology.learned) for groups, _, count in levels)
        self.blocks = nn.ModuleList(
            nn.ModuleList(ResSTConv(width, edges, count, dropout) for _ in range(blocks))
            for _, edges, count in levels
        )
        self.joints = JointMLP([width] * counts[0], width, per_joint.widths)

    def forward(self, x: Tensor, masks: Sequence[Tensor]) -> Tensor:
        coarse = masks[-1]
        for unpool, blocks, mask in zip(self.unpools, self.blocks, masks[-2::-1], strict=True):
            x, coarse = unpool(x, coarse, mask), mask
            for block in cast(nn.ModuleList, blocks):
                x = block(x, mask)
        return self.per_joint.merge(self.joints(x).permute(1, 2, 0, 3))
