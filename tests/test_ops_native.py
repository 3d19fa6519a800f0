"""The extension in its process: threads shared with torch, the instruction set chosen at run time, life without it."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import lrpfast
from lrpfast import backends
from lrpfast.ops import native


def run(code: str, **environment: str) -> str:
    """Run code in a process of its own; what it prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_extension_is_there_and_says_how_it_was_built():
    assert native.extension is not None, native.why_unavailable
    info = native.extension.build_info()
    assert info["compiler"].startswith(("gcc", "clang"))
    assert info["version"] == lrpfast.__version__
    assert info["cuda"].startswith("built: nvcc" if info["cuda_built"] else "not built: ")
    assert hasattr(native.extension, "cuda_ratio") == info["cuda_built"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_one_openmp_runtime_is_mapped_and_it_is_torchs():
    """Convolution (oneDNN), a matrix product and the fused ratio in two threads; then the libraries in memory."""
    out = run("""
        import os
        from pathlib import Path
        import torch
        torch.set_num_threads(2)
        before = set(os.listdir("/proc/self/task"))
        from lrpfast.ops import native
        assert native.why_single_thread == "", native.why_single_thread
        x = torch.empty(4, 64, 56, 56)
        native.ratio(x, x, x, 1e-6)
        started_by_ratio = len(set(os.listdir("/proc/self/task")) - before)
        torch.conv2d(x.fill_(1), torch.ones(64, 64, 3, 3))
        x.flatten(1) @ x.flatten(1).T
        native.ratio(x, x, x, 1e-6)
        started = len(set(os.listdir("/proc/self/task")) - before)
        paths = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
        print(started_by_ratio, started)
        print(*sorted(p for p in paths if any(n in Path(p).name for n in ("libgomp", "libomp", "libiomp"))))
    """)
    threads, runtimes = out.splitlines()
    # The second thread is started by the first kernel; torch's own work then finds it there and starts no other.
    assert threads == "1 1"
    assert len(runtimes.split()) == 1, runtimes
    torch_cpu = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    linked = subprocess.run(["ldd", torch_cpu], capture_output=True, text=True, check=True).stdout
    assert str(Path(runtimes).resolve()) in {str(Path(w).resolve()) for w in linked.split() if w.startswith("/")}


def test_without_openmp_work_runs_in_one_thread():
    out = run("""
        import os, ctypes
        import torch
        torch.set_num_threads(2)
        real = ctypes.CDLL
        def fail(*a, **k): raise OSError("no such library")
        ctypes.CDLL = fail
        from lrpfast.ops import native
        ctypes.CDLL = real
        from lrpfast import backends
        x = torch.empty(4, 64, 56, 56)
        before = len(os.listdir("/proc/self/task"))
        native.ratio(x, x, x, 1.0)
        print(len(os.listdir("/proc/self/task")) - before)
        assert torch.equal(native.ratio(None, x.fill_(1), x, 1.0), x / 2)
        print(backends.report())
    """)
    assert out.startswith("0\n")
    assert "run in one thread: no such library" in out


@pytest.mark.slow
def test_capability_can_be_forced_down_and_gives_the_same():
    code = """
        import torch
        from lrpfast.ops import native
        y, q, z = torch.randn(3, 2, 64, 57, 59, generator=torch.Generator().manual_seed(0))
        ratio = native.ratio(y.bfloat16(), q.bfloat16(), z, 1e-6)
        total = native.channel_sum(y, q, 2)
        import zlib
        result = (zlib.crc32(ratio.view(torch.uint8).numpy()), [round(v, 5) for v in total.flatten()[:50].tolist()])
    """
    here: dict[str, object] = {}
    exec(textwrap.dedent(code), here)
    out = run(code + "    print(native.extension.cpu_capability(), result)", LRPFAST_CPU_CAPABILITY="default")
    assert out == f"default {here['result']}"


@pytest.mark.slow
def test_unknown_capability_is_ignored_with_a_warning():
    out = run(
        """
        import warnings
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            from lrpfast.ops import native
        print(native.extension.cpu_capability(), *(str(w.message) for w in caught if w.category is RuntimeWarning))
        """,
        LRPFAST_CPU_CAPABILITY="sse9",
    )
    assert out.startswith(f"{native.extension.cpu_capability()} LRPFAST_CPU_CAPABILITY='sse9' is none of")


@pytest.mark.slow
def test_import_and_operators_work_without_the_extension():
    out = run("""
        import sys
        sys.modules["lrpfast._C"] = None
        import torch
        import lrpfast
        from lrpfast import backends
        from lrpfast.ops import native, reference
        y, q, z = torch.randn(3, 2, 4, 5, 6)
        assert native.extension is None
        assert torch.equal(torch.ops.lrpfast.ratio(y, q, z, 1e-6), reference.ratio(y, q, z, 1e-6))
        assert torch.equal(native.channel_sum(y, q, 2), reference.channel_sum(y, q, 2))
        print(backends.report())
    """)
    assert "native: not there: the extension lrpfast._C does not load" in out
    assert "torch: pure-torch reference operators" in out


def test_backends_are_reported():
    lines = {line.partition(":")[0]: line for line in backends.report().splitlines()}
    assert list(lines) == ["triton", "cuda", "native", "torch"]
    assert f"{native.extension.cpu_capability()}, threads shared with torch" in lines["native"]
    assert lines["cuda"].startswith(("cuda: built: nvcc", "cuda: not built: "))
    there = {b.name: b.available for b in backends.backends()}
    assert there["native"] and there["torch"]
    if not torch.cuda.is_available():
        assert not there["triton"] and not there["cuda"]
        assert "built" in lines["cuda"] and any(why in lines["triton"] for why in ("TRITON_INTERPRET", "not used: "))


@pytest.mark.skipif(
    not torch.cuda.is_available() or native.extension is None or not native.extension.build_info()["cuda_built"],
    reason="needs a GPU and a build with CUDA",
)
def test_cuda_ratio():
    for dtype, code in ((torch.float32, 0), (torch.bfloat16, 1)):
        for eps in (1e-6, 0.0):
            y, q, p, z = torch.randn(4, 3, 5, 7, 9, device="cuda").to(dtype)
            z[:, 0] = 0
            out = torch.full_like(q, float("nan"))
            failure = native.extension.cuda_ratio(
                y.data_ptr(), code, False, q.data_ptr(), p.data_ptr(), code, z.data_ptr(), code, True, out.data_ptr(),
                3, 5 * 7 * 9, eps, torch.cuda.current_stream().cuda_stream,
            )  # fmt: skip
            assert failure is None
            expected = native.ratio_sum(y.cpu(), q.cpu(), p.cpu(), z[:1].cpu(), eps)
            assert torch.equal(out.cpu(), expected)


SCALES = {"W+": (1.0, 0.0), "W-": (0.0, 1.0), "W + gamma W+": (1.25, 1.0)}


def modified(weight: torch.Tensor, scales: tuple[float, float] | None) -> torch.Tensor:
    """In float64, by the definition of RULES §2."""
    if scales is None:
        return weight.double()
    return scales[0] * weight.double().clamp(min=0) + scales[1] * weight.double().clamp(max=0)


def assert_exact_to_twice(found: torch.Tensor, torchs: torch.Tensor, exact: torch.Tensor, size: torch.Tensor) -> None:
    """At most twice torch's own error, in norm; `size` is the sum of the terms' magnitudes, for results of few values."""
    assert found.shape == exact.shape and found.dtype is torch.float32
    own, of_torch = (torch.linalg.vector_norm(t.double() - exact) for t in (found, torchs))
    assert own <= 2 * of_torch + 2**-22 * torch.linalg.vector_norm(size)


@pytest.mark.parametrize("batch", [0, 1, 2, 5, 16, 17])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (3, 7), (16, 64), (37, 1025), (130, 4099)])
@pytest.mark.parametrize("scales", [None, *SCALES.values()], ids=["W", *SCALES])
def test_dense_layers(batch: int, outputs: int, inputs: int, scales: tuple[float, float] | None) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)  # new memory is full of NaN
    try:
        x, s, weight = torch.randn(batch, inputs), torch.randn(outputs, batch).t(), torch.randn(outputs, inputs)
        bias, other_bias = torch.randn(2, outputs)
        wide = modified(weight, scales)
        narrow = wide.float()
        back, z = native.dense_dgrad(s, weight, scales), native.dense(x, weight, bias, scales)
        assert_exact_to_twice(back, s @ narrow, s.double() @ wide, s.double().abs() @ wide.abs())
        linear = torch.nn.functional.linear
        size = x.double().abs() @ wide.abs().t() + bias.abs()
        assert_exact_to_twice(z, linear(x, narrow, bias), linear(x.double(), wide, bias.double()), size)
        assert_exact_to_twice(native.dense(x, weight, None, scales), x @ narrow.t(), x.double() @ wide.t(), size)
        if scales is not None:
            own, scaled = native.dense_pair(x, weight, bias, other_bias, scales)
            assert torch.equal(own, native.dense(x, weight, bias))
            assert torch.equal(scaled, native.dense(x, weight, other_bias, scales))
        double = native.dense_dgrad(s.double(), weight.double(), scales)
        torch.testing.assert_close(double, s.double() @ wide, rtol=1e-12, atol=1e-12)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 64), (37, 1025), (4133, 33)])
@pytest.mark.parametrize("scales", [None, SCALES["W+"]], ids=["W", "W+"])
@pytest.mark.parametrize("reached", [0.0, 0.1, 0.5, 1.0])
def test_a_transpose_leaves_out_rows_that_nothing_reaches(
    batch: int, outputs: int, inputs: int, scales: tuple[float, float] | None, reached: float
) -> None:
    of_any = torch.rand(outputs) < reached
    s = torch.randn(batch, outputs) * of_any * (torch.rand(batch, outputs) < 0.7)
    weight = torch.randn(outputs, inputs)
    weight[~s.any(0)] = torch.nan  # a row that is read spoils what it is added to
    read = weight.nan_to_num(0)
    found = native.dense_dgrad(s, weight, scales)
    wide = modified(read, scales)
    assert_exact_to_twice(found, s @ wide.float(), s.double() @ wide, s.double().abs() @ wide.abs())
    for alone, together in zip(s.split(1), found.split(1), strict=True):
        assert torch.equal(native.dense_dgrad(alone, read, scales), together)
