"""Property tests: random small networks under random composites, against the network oracle in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import lrpfast
from tests.oracles.agree import assert_agrees, make_seed, to_composite
from tests.oracles.network import distance, explain, one_hot_seed, stability
from tests.oracles.strategies import Drawn, networks

# Beyond this a map hangs on rounding (see `stability`): noise of 1e-13 in the values is amplified ten thousandfold.
STABLE = 1e-9


@pytest.mark.slow
@given(drawn=networks(), logit=st.booleans())
def test_any_network_under_any_composite(drawn: Drawn, logit: bool):
    with torch.no_grad():
        output = drawn.net(drawn.x)
    seed = one_hot_seed(output, torch.arange(len(output)) % 4) if logit else make_seed(drawn.net, [drawn.x])
    assume(stability(drawn.net, drawn.rules, [drawn.x], seed) < STABLE)
    assert_agrees(drawn.net, drawn.rules, [drawn.x], seed)


@settings(max_examples=6)
@given(drawn=networks())
def test_targets_of_any_network(drawn: Drawn):
    """The arg max, an int, one target a sample and K targets a sample, from one explainer."""
    rules = drawn.rules
    with torch.no_grad():
        output = drawn.net(drawn.x)
    batch = len(output)
    explainer = lrpfast.Explainer(drawn.net, drawn.x, composite=to_composite(drawn.net, rules))
    columns = torch.stack([torch.arange(batch) % 4, (torch.arange(batch) + 2) % 4], 1)
    seeds = [one_hot_seed(output, columns[:, k]) for k in range(2)]
    assume(all(stability(drawn.net, rules, [drawn.x], seed) < STABLE for seed in seeds))
    expected = [explain(drawn.net, rules, [drawn.x], seed).relevance[0] for seed in seeds]
    both = explainer(drawn.x, target=columns)
    assert both.relevance.shape == (batch, 2, *drawn.x.shape[1:])
    for k in range(2):
        assert distance(both.relevance[:, k], expected[k]) <= 1e-9
        assert distance(explainer(drawn.x, target=columns[:, k]).relevance, expected[k]) <= 1e-9
    best = output.argmax(1)
    default = explainer(drawn.x)
    assert torch.equal(default.target, best)
    assert torch.equal(default.relevance, explainer(drawn.x, target=best).relevance)
    with_int = explainer(drawn.x, target=3).relevance
    assert torch.equal(with_int, explainer(drawn.x, target=torch.full((batch,), 3)).relevance)


@settings(max_examples=6)
@given(drawn=networks())
def test_a_map_depends_on_its_sample_alone(drawn: Drawn):
    explainer = lrpfast.Explainer(drawn.net, drawn.x, composite=to_composite(drawn.net, drawn.rules))
    x = torch.cat([drawn.x, torch.randn_like(drawn.x)])
    seed = make_seed(drawn.net, [x])
    assume(stability(drawn.net, drawn.rules, [x], seed) < STABLE)
    together = explainer(x, target=seed).relevance
    for n in range(len(x)):
        assert distance(explainer(x[n : n + 1], target=seed[n : n + 1]).relevance, together[n : n + 1]) <= 1e-9
    order = torch.randperm(len(x))
    assert distance(explainer(x[order], target=seed[order]).relevance, together[order]) <= 1e-9
    if x.dim() == 4:
        last = x.contiguous(memory_format=torch.channels_last)
        assert distance(explainer(last, target=seed).relevance, together) <= 1e-9
    strided = torch.empty(*x.shape, 2, dtype=x.dtype)[..., 0].copy_(x)
    assert distance(explainer(strided, target=seed).relevance, together) <= 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "auto"])
@settings(max_examples=12)
@given(drawn=networks())
def test_float32_is_as_exact_as_its_digits(backend: str, drawn: Drawn):
    """The fastest operators run in float32 alone; noise of 1e-6 stands for its rounding, summed up over a layer."""
    net, x = drawn.net.float(), drawn.x.float()
    explainer = lrpfast.Explainer(net, x, to_composite(net, drawn.rules), backend=backend)
    found = explainer(x, target=1, seed="one").relevance
    assert found.dtype is torch.float32
    net, x = net.double(), x.double()  # the same numbers, for the oracle
    with torch.no_grad():
        seed = one_hot_seed(net(x), 1, "one")
    moves = stability(net, drawn.rules, [x], seed, size=1e-6)
    assume(moves < 1e-3)
    assert distance(found, explain(net, drawn.rules, [x], seed).relevance[0]) <= moves + 1e-6
