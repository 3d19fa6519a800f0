"""Operations that move values about: relevance is routed by their transpose, in both message forms."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.oracles.agree import TOPS, Parallel
from tests.oracles.network import Net

SHAPE = (4, 4, 6)
INDEX = torch.tensor([3, 0, 0, 2])
MASK = torch.rand(4, 6, generator=torch.Generator().manual_seed(3)) < 0.5


def shuffle(v: Tensor) -> Tensor:
    n, c, h, w = v.shape
    return v.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


def chunk_twice(v: Tensor) -> Tensor:
    a, b = v.chunk(2, 1)
    return torch.cat((b, a, b), 1)


def swap_split(v: Tensor) -> Tensor:
    a, b, _ = torch.split(v, [1, 2, 1], 1)
    return torch.cat((b, a), 1)


def restack(v: Tensor) -> Tensor:
    a, b, c, d = v.unbind(1)
    return torch.stack((d, a, b, a, c), 2)


ROUTES: dict[str, Callable[[Tensor], Tensor]] = {
    "flatten": lambda v: v.flatten(1),
    "reshape": lambda v: v.reshape(v.shape[0], 8, 12),
    "view-unflatten": lambda v: v.flatten(1).unflatten(1, (6, 16)),
    "permute": lambda v: v.permute(0, 2, 3, 1),
    "transpose": lambda v: v.transpose(1, 3),
    "movedim": lambda v: v.movedim(1, -1),
    "contiguous": lambda v: v.permute(0, 2, 3, 1).contiguous(),
    "clone": torch.clone,
    "squeeze": lambda v: v.unsqueeze(2).squeeze(2),
    "slice": lambda v: v[:, 1:3, :, 2:],
    "strided slice": lambda v: v[:, :, ::2, 1::2],
    "one channel": lambda v: v[:, 2],
    "ellipsis": lambda v: v[..., -1],
    "narrow": lambda v: v.narrow(3, 1, 3),
    "pad": lambda v: F.pad(v, (1, 2, 0, 1)),
    "pad-value": lambda v: F.pad(v, (1, 1), value=2.5),
    "pad-reflect": lambda v: F.pad(v, (2, 1, 1, 1), mode="reflect"),
    "pad-replicate": lambda v: F.pad(v, (2, 1, 0, 1), mode="replicate"),
    "pad-circular": lambda v: F.pad(v, (2, 1, 1, 0), mode="circular"),
    "roll": lambda v: torch.roll(v, (1, -2), (2, 3)),
    "flip": lambda v: v.flip(3),
    "expand": lambda v: v[:, :1].expand(-1, 3, -1, -1),
    "repeat": lambda v: v.repeat(1, 2, 1, 3),
    "repeat_interleave": lambda v: v.repeat_interleave(2, 3),
    "index": lambda v: v[:, INDEX],
    "index_select": lambda v: v.index_select(1, INDEX),
    "chunk": chunk_twice,
    "split": swap_split,
    "unbind and stack": restack,
    "half of a chunk": lambda v: v.chunk(2, 1)[1],
    "channel shuffle": shuffle,
    "nn.ChannelShuffle": nn.ChannelShuffle(2),
    "pixel_shuffle": lambda v: F.pixel_shuffle(v, 2),
    "pixel_unshuffle": lambda v: F.pixel_unshuffle(v, 2),
    "cat with itself": lambda v: torch.cat((v, v), 2),
    "where": lambda v: torch.where(MASK, v, 0.0),
    "where-own-values": lambda v: torch.where(v > 0.1, v, torch.tensor(-0.5, dtype=v.dtype)),
    "masked_fill": lambda v: v.masked_fill(v < 0.2, 0.0),
    "index-two": lambda v: v[:, INDEX, INDEX],
    "dropout": nn.Dropout(0.5).eval(),
    "dropout2d": nn.Dropout2d(0.5).eval(),
    "identity": nn.Identity(),
    "detach": lambda v: v.clone().contiguous(),
}


@pytest.mark.parametrize("name", ROUTES)
def test_relevance_is_routed_by_the_transpose(name: str):
    def between_layers(net: Net, h: int, prefix: str) -> int:
        return net.op("route", ROUTES[name], net.layer(f"{prefix}a", nn.Conv2d(4, 4, 3, padding=1), h))

    def used_twice(net: Net, h: int, prefix: str) -> int:
        h = net.relu(net.layer(f"{prefix}a", nn.Conv2d(4, 4, 3, padding=1), h))
        a = net.op("route", lambda v: ROUTES[name](v).flatten(1), h)
        return net.op("route", lambda *v: torch.cat(v, 1), a, net.op("route", lambda v: v.flatten(1), h))

    branches = Parallel()
    for top in TOPS:
        branches.add(f"{name} between layers", SHAPE, between_layers, top)
    branches.add(f"{name} of a value used twice", SHAPE, used_twice, TOPS[1])
    branches.check()


def test_choice_between_two_signals():
    def choice(net: Net, h: int, prefix: str) -> int:
        a, b = (net.layer(f"{prefix}{name}", nn.Conv2d(4, 4, 1), h) for name in "ab")
        return net.op("route", lambda a, b: torch.where(MASK, a, b), a, b)

    branches = Parallel()
    for top in TOPS:
        branches.add("where", SHAPE, choice, top)
    branches.check()


def test_cat_of_branches():
    def inception(net: Net, h: int, prefix: str) -> int:
        h = net.relu(net.layer(f"{prefix}stem", nn.Conv2d(4, 4, 1), h))
        ends = [
            net.relu(net.layer(f"{prefix}a", nn.Conv2d(4, 2, 1), h)),
            net.relu(net.layer(f"{prefix}b", nn.Conv2d(4, 3, 3, padding=1), h)),
            net.layer(f"{prefix}c", nn.Conv2d(4, 2, 1), net.op("max_pool", lambda v: F.max_pool2d(v, 3, 1, 1), h)),
            h,
        ]
        return net.op("route", lambda *v: torch.cat(v, 1), *ends)

    branches = Parallel()
    for top in TOPS:
        branches.add("inception", SHAPE, inception, top)
    branches.check()


def test_dense_connections():
    def dense(net: Net, h: int, prefix: str) -> int:
        for k in range(3):
            new = net.layer(f"{prefix}c{k}", nn.Conv2d(4 + 2 * k, 2, 3, padding=1), net.relu(h))
            h = net.op("route", lambda a, b: torch.cat((a, b), 1), h, new)
        return h

    branches = Parallel()
    for top in TOPS:
        branches.add("dense block", SHAPE, dense, top)
    branches.check()
