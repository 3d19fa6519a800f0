"""How the fused operators are declared: schema, fake, dispatch, decomposition, export; errors of wrong operands."""

import pytest
import torch
from torch import Tensor, nn

from lrpfast.ops import DECOMPOSITIONS, decompositions, native, reference, schema

EPS = 1e-6
OPERATORS = torch.ops.lrpfast


def samples(dtype: torch.dtype = torch.float32) -> list[tuple[str, tuple]]:
    """Calls of every operator: with and without a carrier, one row for the batch, channels-last, a view with holes."""
    y, q, p, z = torch.randn(4, 3, 4, 5, 6, dtype=dtype)
    last = [t.contiguous(memory_format=torch.channels_last) for t in (y, q, p, z)]
    return [
        ("ratio", (y, q, z, EPS)),
        ("ratio", (None, q, z[:1], EPS)),
        ("ratio", (last[3], last[1], last[3], 0.0)),
        ("ratio", (y[..., ::2], q[..., ::2], z[..., ::2], EPS)),
        ("ratio", (y[:1], last[1], z, EPS)),
        ("ratio_sum", (y, q, p, z, EPS)),
        ("ratio_sum", (None, last[1], last[2], last[3][:1], 0.0)),
        ("gamma_pair", (y, q, z, p.abs(), 0.25, EPS)),
        ("gamma_pair", (None, last[1], last[3], last[2].abs(), 0.25, 0.0)),
        ("alpha_beta_pair", (y, q, p.abs(), -z.abs(), 2.0, 1.0, EPS)),
        ("alpha_beta_pair", (last[0].abs(), last[1], None, -last[3].abs(), 2.0, 1.0, EPS)),
        ("channel_sum", (y, q, 1)),
        ("channel_sum", (last[0], last[1], 2)),
        ("channel_sum", (None, q[:, :, 0, 0], 4)),
    ]


def _all(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(dtype):
    for name, arguments in samples(dtype):
        torch.library.opcheck(getattr(OPERATORS, name).default, arguments)


def transposes() -> list[tuple[str, tuple]]:
    """Calls of the transposes; operand and weight each in either layout, a batch of one, images of one pixel."""
    calls: list[tuple[str, tuple]] = []
    formats = (torch.contiguous_format, torch.channels_last)
    for batch, size in ((3, 6), (1, 6), (1, 1)):
        for of_s in formats:
            s = torch.randn(batch, 4, size, size).contiguous(memory_format=of_s)
            for of_weight in formats:
                weight = torch.randn(4, 5, 3, 3).contiguous(memory_format=of_weight)
                calls.append(("conv_dgrad", (s, weight, [size, size], [1, 1], [1, 1], [1, 1], 1)))
                calls.append(("conv_dgrad", (s, weight, [2 * size, 2 * size], [2, 2], [1, 1], [1, 1], 1)))
            window = ([2, 2], [2, 2], [0, 0])
            x = torch.randn(batch, 4, 2 * size, 2 * size).contiguous(memory_format=of_s)
            indices = torch.nn.functional.max_pool2d(x, 2, return_indices=True)[1]
            calls.append(("max_pool_dgrad", (s, indices, [2 * size, 2 * size], *window, [1, 1], False)))
            spread = torch.kron(torch.eye(size), torch.tensor([[0.5, 0.5]]))
            calls.append(("avg_pool_dgrad", (s, [2 * size, 2 * size], *window, False, True, None, spread, spread)))
    return calls


@pytest.mark.slow
def test_opcheck_of_the_transposes():
    """Inductor relies on the layout that the fake tells: a result laid out otherwise stops it."""
    for name, arguments in transposes():
        torch.library.opcheck(getattr(OPERATORS, name).default, arguments)


def test_every_operator_is_declared_once_and_has_every_form():
    for name in schema.OPERATORS:
        operator = getattr(OPERATORS, name).default
        assert operator in DECOMPOSITIONS
        assert callable(getattr(reference, name))
        assert callable(getattr(native, name))
        assert torch.Tag.pt2_compliant_tag in operator.tags


def test_cpu_takes_the_extension_and_other_devices_the_reference(monkeypatch):
    """On the CPU the dispatcher's result is the extension's; the reference serves what has no kernel of its own."""
    for name, arguments in samples():
        operator = getattr(OPERATORS, name).default
        for a, b in zip(_all(operator(*arguments)), _all(getattr(native, name)(*arguments)), strict=True):
            assert torch.equal(a, b)
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lrpfast::{name}", "CPU")
        assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"lrpfast::{name}", "CUDA")


def test_decompositions_agree_and_trace_to_functional_aten():
    for name, arguments in samples():
        operator = getattr(OPERATORS, name).default
        torch.testing.assert_close(DECOMPOSITIONS[operator](*arguments), operator(*arguments), rtol=1e-6, atol=1e-6)
        tensors = [t for t in arguments if isinstance(t, Tensor)]

        def call(*given, operator=operator, arguments=arguments):
            given = iter(given)
            return operator(*(next(given) if isinstance(a, Tensor) else a for a in arguments))

        traced = torch.fx.experimental.proxy_tensor.make_fx(call, decomposition_table=DECOMPOSITIONS)(*tensors)
        targets = [node.target for node in traced.graph.nodes if node.op == "call_function"]
        assert all(t.namespace == "aten" and not t._schema.is_mutable for t in targets), targets


class _Step(nn.Module):
    """All operators in one, as the joint program has them."""

    def forward(self, y: Tensor, q: Tensor, z: Tensor) -> Tensor:
        s = OPERATORS.ratio(y, q, z, EPS) + OPERATORS.ratio(None, q, y, 0.0)
        s = OPERATORS.ratio_sum(y, s, q, z, EPS)
        upper, lower = OPERATORS.gamma_pair(y, s, z, y.abs(), 0.25, EPS)
        plus, minus = OPERATORS.alpha_beta_pair(y.abs(), upper - lower, None, -z.abs(), 2.0, 1.0, EPS)
        return OPERATORS.channel_sum(y, plus + minus, 2)


def _step_inputs(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    y, q, z = torch.randn(3, batch, 4, 5, 6)
    y[:, 0] = 0
    z[:, 1] = 0
    z[:, 2] = -0.0
    return y, q, z


def _exported() -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    return torch.export.export(_Step(), _step_inputs(3), dynamic_shapes=({0: batch},) * 3)


def test_export_keeps_the_operators_and_decomposes_them():
    program = _exported()
    kept = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {f"lrpfast.{name}.default" for name in schema.OPERATORS} <= kept
    plain = program.run_decompositions(DECOMPOSITIONS)
    assert not any("lrpfast" in str(node.target) for node in plain.graph.nodes)
    for batch in (1, 3, 5):
        inputs = _step_inputs(batch)
        expected = _Step()(*inputs)
        assert torch.equal(program.module()(*inputs), expected)
        torch.testing.assert_close(plain.module()(*inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_onnx(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    path = tmp_path / "step.onnx"
    program = _exported().run_decompositions(DECOMPOSITIONS)
    torch.onnx.export(program, f=path, dynamo=True, verbose=False, external_data=False)
    session = onnxruntime.InferenceSession(path)
    for batch in (1, 4):
        inputs = _step_inputs(batch)
        feeds = {i.name: t.numpy() for i, t in zip(session.get_inputs(), inputs, strict=True)}
        (result,) = session.run(None, feeds)
        torch.testing.assert_close(torch.from_numpy(result), _Step()(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("decompose", [False, True])
def test_compile(decompose):
    """Whole-graph, once with the operators as they are and once as expressions that the compiler may fuse."""
    torch._dynamo.reset()
    step = _Step()

    def plain(y: Tensor, q: Tensor, z: Tensor) -> Tensor:
        s = decompositions.ratio(y, q, z, EPS) + decompositions.ratio(None, q, y, 0.0)
        s = decompositions.ratio_sum(y, s, q, z, EPS)
        upper, lower = decompositions.gamma_pair(y, s, z, y.abs(), 0.25, EPS)
        plus, minus = decompositions.alpha_beta_pair(y.abs(), upper - lower, None, -z.abs(), 2.0, 1.0, EPS)
        return decompositions.channel_sum(y, plus + minus, 2)

    compiled = torch.compile(plain if decompose else step, fullgraph=True, dynamic=True)
    for batch in (2, 3):
        inputs = _step_inputs(batch)
        torch.testing.assert_close(compiled(*inputs), step(*inputs), rtol=1e-5, atol=1e-5)


def test_wrong_operands_are_refused():
    q = torch.randn(3, 4, 5, 6)
    with pytest.raises(RuntimeError, match=r"ratio: denominator float32\[2, 4, 5, 6\] .* float32\[3, 4, 5, 6\]"):
        OPERATORS.ratio(None, q, torch.ones(2, 4, 5, 6), EPS)
    with pytest.raises(RuntimeError, match=r"ratio: carrier float64\[4, 5, 6\]"):
        OPERATORS.ratio(torch.ones(4, 5, 6, dtype=torch.float64), q, q, EPS)
    with pytest.raises(RuntimeError, match="ratio_sum: messages differ"):
        OPERATORS.ratio_sum(None, q, q.bfloat16(), q, EPS)
    with pytest.raises(RuntimeError, match=r"gamma_pair: operands differ in shape: .*, float32\[1, 4, 5, 6\]"):
        OPERATORS.gamma_pair(None, q, q, q[:1], 0.25, EPS)
    with pytest.raises(RuntimeError, match="alpha_beta_pair: operands differ in shape"):
        OPERATORS.alpha_beta_pair(q[:1], q, q, q, 2.0, 1.0, EPS)
    with pytest.raises(RuntimeError, match="alpha_beta_pair: neither z_plus nor a carrier"):
        OPERATORS.alpha_beta_pair(None, q, None, q, 2.0, 1.0, EPS)
    with pytest.raises(RuntimeError, match="4 channels do not divide into 3 groups"):
        OPERATORS.channel_sum(None, q, 3)
    with pytest.raises(RuntimeError, match=r"channel_sum: the message float32\[4\] is not"):
        OPERATORS.channel_sum(None, torch.ones(4), 1)
    with pytest.raises(RuntimeError, match="channel_sum: carrier"):
        OPERATORS.channel_sum(torch.ones(2, 4, 5, 6), q, 1)
