"""The Explainer: captures and transforms a model for the shapes that it meets, checks every call, runs the program.

All checks of a call are here or in `lrpfast.checks`, before or after the program and never within: a bad input is an error
that names it, and no map leaves that is not finite.
"""

from __future__ import annotations

import dataclasses
import statistics
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from lrpfast import checks
from lrpfast.assign import Assignment, assign
from lrpfast.building import building, without_autocast
from lrpfast.canonical import canonicalise
from lrpfast.capture import capture
from lrpfast.changes import Watch
from lrpfast.composites import Composite, get
from lrpfast.errors import CaptureError, InputError
from lrpfast.explanation import Explanation
from lrpfast.graph import Program
from lrpfast.ops import gpu, native
from lrpfast.plan import Plan, StepTime, make_plan, step_time
from lrpfast.relevance import Joint, Seed, default_seed, transform
from lrpfast.runtime import Executor
from lrpfast.runtime.graphs import CudaRecorder, Recorder, Replay
from lrpfast.runtime.memory import give_back_free_memory, give_back_large_pieces
from lrpfast.runtime.splitting import run_parts
from lrpfast.runtime.tune import Tuner

_PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_KEPT_PROGRAMS = 4


@dataclasses.dataclass
class Compiled:
    """A model captured for inputs of one shape, with its rules; joint programs and executors are made as they are needed."""

    program: Program
    pack: Callable[[torch.Tensor], Any]
    rules: dict[fx.Node, Assignment]
    record: tuple[str, ...]
    backend: str
    autotune: bool
    state: tuple
    _joints: dict[Seed, Joint] = dataclasses.field(default_factory=dict)
    _executors: dict[tuple[Seed, bool, int], Executor] = dataclasses.field(default_factory=dict)
    replays: dict[Seed, Replay] = dataclasses.field(default_factory=dict)

    @property
    def default_seed(self) -> Seed:
        return default_seed(self.program)

    def joint(self, seed: Seed) -> Joint:
        if seed not in self._joints:
            with building(self.device), give_back_large_pieces(self.device):
                self._joints[seed] = transform(self.program, self.rules, seed, self.record)
        return self._joints[seed]

    def executor(self, seed: Seed, repeated: bool, batch: int) -> Executor:
        """The executor for a batch: of one, where weights are wanted otherwise and other kernels are fastest, or of several."""
        key = (seed, repeated, self._batch_class(batch))
        if key not in self._executors:
            self._executors[key] = self._build(seed, repeated, key[2])
        return self._executors[key]

    def _batch_class(self, batch: int) -> int:
        """The batch that kernels are chosen for, of those that are alike: one, some, and on a GPU many."""
        if batch == 1:
            return 1
        return 64 if batch > 16 and self.device.type == "cuda" else 8

    @property
    def device(self) -> torch.device:
        return self.program.inputs[0].meta["val"].device

    def recorded(self, seed: Seed, recorder: Recorder, examples: tuple[torch.Tensor, ...], sizes: list[int]) -> Replay:
        """The program recorded for some sizes of batch."""

        def program(*arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
            *inputs, target = arguments
            with torch.no_grad(), without_autocast(self.device):
                run = self.executor(seed, False, target.shape[0]).start(*inputs)
                output = next(run)
                return (output, *run.send(target))

        return Replay(recorder, program, examples, sizes)

    def any_executor(self, seed: Seed) -> Executor:
        """An executor to describe: one that is there, lest weights be packed for this alone."""
        there = (e for (kind, repeated, _), e in self._executors.items() if kind is seed and not repeated)
        return next(there, None) or self.executor(seed, False, 8)

    def timed(self, batch: int, timer: Callable[[fx.Node, str, float], None]) -> Executor:
        """An executor that reports what each step takes."""
        return self._build(Seed.LOGIT, False, self._batch_class(batch), timer)

    def _build(self, seed: Seed, repeated: bool, batch: int, timer: Any = None) -> Executor:
        with building(self.device):
            tuner = Tuner(device=self.device) if self.autotune else None
            executor = Executor(self.joint(seed), self.backend, repeated, batch, tuner, timer)
            if tuner is not None:
                tuner.save()
            for program in (self.joint(seed).program, self.program):
                program.constants.let_go()
            give_back_free_memory(self.device)
            return executor


class Explainer:
    """Explains the decisions of a model by Layer-wise Relevance Propagation.

    Parameters
    ----------
    model
        A module in eval mode, or a `torch.export.ExportedProgram`; never modified. Where its parameters are changed
        later, the next call captures the model anew; what is written past torch's own count of changes (through ``p.data``, or by
        NumPy) is noticed on a CPU alone, and where it changes some of the values that are looked at, eight of each parameter.
    example_inputs
        A tensor or a tuple of tensors, dim 0 the batch (of any size). Without, a program is compiled at the first call.
        Programs of a few shapes are kept, the least recently used goes first.
    composite
        A name (`lrpfast.composites.names()`) or a `lrpfast.Composite`.
    precision
        None: the model's own dtype. "float32", "bfloat16", "float16": the program computes in this dtype, with
        denominators in float32 at least; maps and output come in the inputs' dtype.
    backend
        "auto": the fastest operators for the inputs' device; "torch": pure-torch reference operators; "native": those compiled for
        CPUs; "triton": those for NVIDIA GPUs.
    record
        Names of modules (globs) whose relevance is returned as well: that of the value which leaves the module. "@features": that
        of the channels [N, C] which the last dense layer or convolution reads, summed over positions (concept relevance,
        Achtibat et al. 2023).
    autotune
        Whether kernels are chosen on a CPU by timing them when a program is made, which takes some seconds where this machine has
        not timed the shapes before; choices are kept on disk (``LRPFAST_CACHE_DIR``) and shown by `plan`. All choices give
        the same map to rounding.

    Raises
    ------
    CaptureError
        The model cannot be captured, or is in training mode with batch norms.
    RuleError, CompositeError, UnsupportedOperationError
        The composite does not fit the model, or the model has an operation without a rule.
    InputError
        An argument is malformed.
    """

    def __init__(
        self,
        model: torch.nn.Module | ExportedProgram,
        example_inputs: torch.Tensor | Sequence[torch.Tensor] | None = None,
        composite: str | Composite = "epsilon_plus_flat",
        precision: str | None = None,
        backend: str = "auto",
        record: str | Sequence[str] | None = (),
        autotune: bool = True,
    ) -> None:
        if not isinstance(model, (torch.nn.Module, ExportedProgram)):
            raise InputError(f"model must be a torch.nn.Module or an ExportedProgram, got {type(model).__name__}")
        if precision is not None and precision not in _PRECISIONS:
            raise InputError(f"precision must be None or one of {', '.join(_PRECISIONS)}, got {precision!r}")
        self._model = model
        self._watch = Watch(model)
        self._composite = get(composite)
        self._precision = None if precision is None else _PRECISIONS[precision]
        self._backend = _check_backend(backend)
        self._record = checks.as_names(record)
        self._autotune = autotune
        self._compiled: OrderedDict[tuple, Compiled] = OrderedDict()
        self._latest: Compiled | None = None
        self._lock = threading.Lock()
        if example_inputs is not None:
            inputs = checks.as_inputs(example_inputs)
            checks.check_inputs(inputs, self._watch.tensors(), finite=False)
            compiled = self._compile(inputs)
            compiled.executor(compiled.default_seed, False, inputs[0].shape[0])

    def __call__(
        self,
        inputs: torch.Tensor | Sequence[torch.Tensor],
        target: int | Sequence[int] | torch.Tensor | None = None,
        seed: str = "logit",
    ) -> Explanation:
        """Explain a batch; on a CPU in parts, where it is large, so that memory is bounded.

        Parameters
        ----------
        inputs
            A tensor, or a tuple of tensors; dim 0 is the batch.
        target
            None: the arg max. An int, int64 ``[N]``, or int64 ``[N, K]``: K maps a sample from one forward pass. A
            floating-point tensor of the output's shape: the relevance at the output itself.
        seed
            The relevance at the output of the target: "logit", its value; "one".

        Raises
        ------
        InputError, TargetError
            An argument has a wrong shape, dtype, device or value.
        NumericsError
            NaN or infinity in the inputs, the output or the relevance.
        """
        chosen = checks.check_seed(seed)
        tensors = checks.as_inputs(inputs)
        checks.check_inputs(tensors, self._watch.tensors())
        compiled = self._compile(tensors)
        is_relevance = isinstance(target, torch.Tensor) and target.is_floating_point()
        kind = Seed.TENSOR if is_relevance else chosen
        if kind is not Seed.TENSOR and compiled.default_seed is Seed.TENSOR:
            checks.refuse_classes(compiled.program.outputs[0].meta["val"].shape)
        batch = tensors[0].shape[0]
        asked = checks.check_target(target, batch, compiled.program.outputs[0].meta["val"])
        several = asked is not None and asked.dim() == 2 and not is_relevance
        with self._lock:
            replay = None if several or not batch else compiled.replays.get(kind)
            size = batch if replay is None else replay.size_for(batch) or replay.sizes[-1]
            executor = compiled.executor(kind, several, size)
            if executor.chunks(batch)[0][1] == 1:
                executor = compiled.executor(kind, several, 1)
        chunks = executor.chunks(batch)
        if replay is not None:
            chunks = [(begin, min(batch, begin + replay.sizes[-1])) for begin in range(0, batch, replay.sizes[-1])]

        def run(start: int, end: int) -> Explanation:
            own_inputs = tuple(x[start:end] for x in tensors)
            own = None if asked is None else asked[start:end]
            if replay is not None:
                return _replay(compiled, replay, executor, own_inputs, own, kind, start)
            return _run(compiled, executor, own_inputs, own, kind, start)

        with torch.no_grad(), without_autocast(compiled.device):
            parts = run_parts(run, chunks, executor.samples_are_separate)
        return _joined(parts, compiled.pack)

    def __reduce__(self) -> tuple:
        """Pickled and copied as the model and the options; programs are made again where they are needed."""
        precision = None if self._precision is None else str(self._precision).removeprefix("torch.")
        return Explainer, (
            self._model, None, self._composite, precision, self._backend, self._record, self._autotune,
        )  # fmt: skip

    def warmup(self, batch_sizes: Sequence[int] = (1, 8, 64), seed: str = "logit") -> None:
        """Prepare the latest program for batches of some sizes, so that no later call has to.

        On a GPU each size is recorded as a CUDA graph: a later batch that is no larger than the largest size is padded to the next
        one and replayed, with neither Python nor an allocation between its kernels; a larger one is replayed in parts. Calls with K
        targets a sample, or with the relevance at the output as the target, run as before. On a CPU weights are packed and kernels
        chosen.

        Parameters
        ----------
        batch_sizes
            Sizes, at least 1.
        seed
            Of the calls to come: "logit" or "one".

        Raises
        ------
        InputError
            A size is less than 1, there is no program yet, or the samples of a batch meet in the model, which may then not be padded.
        """
        kind = checks.check_seed(seed)
        sizes = sorted(set(batch_sizes))
        if not sizes or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in sizes):
            raise InputError(f"batch_sizes must be integers of at least 1, got {list(batch_sizes)}")
        compiled = self._need_compiled("warmup")
        kind = Seed.TENSOR if compiled.default_seed is Seed.TENSOR else kind
        with self._lock:
            for size in sizes:
                executor = compiled.executor(kind, False, size)
            recorder = _recorder(compiled.device)
            if recorder is None or kind is Seed.TENSOR:
                return
            if not executor.samples_are_separate:
                raise InputError("warmup: the samples of a batch meet in this model, so a batch may not be padded")
            examples = tuple(_zeros_like(node) for node in compiled.program.inputs)
            compiled.replays[kind] = compiled.recorded(kind, recorder, examples, sizes)

    def plan(self) -> Plan:
        """The plan of the latest program: layer, operation, rule, schedule, cost, and the facts proved; printable."""
        compiled = self._need_compiled("plan")
        with self._lock:
            seed = compiled.default_seed
            return make_plan(compiled.joint(seed), compiled.any_executor(seed), self._composite.name)

    @property
    def program(self) -> fx.GraphModule:
        """The joint program of the latest shape: ``(*inputs, target) -> (output, *relevances, *recorded layers)``.

        ``target`` is int64 ``[N]``; -1 stands for the arg max. Where the output has more than two dimensions, the last
        argument is the relevance at the output in place of the target.
        """
        compiled = self._need_compiled("program")
        with self._lock:
            return compiled.joint(compiled.default_seed).program.module()  # of a copy: the caller's to change

    @property
    def composite(self) -> Composite:
        """The composite in use."""
        return self._composite

    def profile(self, inputs: torch.Tensor | Sequence[torch.Tensor], repeats: int = 5) -> list[StepTime]:
        """Time each step of the program on a batch, run in one part: medians, with what each step has to do.

        Parameters
        ----------
        inputs
            As `__call__` takes them.
        repeats
            Runs, at least 1.

        Raises
        ------
        InputError, NumericsError
            As `__call__`; also for fewer than one run.
        """
        if repeats < 1:
            raise InputError(f"repeats must be at least 1, got {repeats}")
        tensors = checks.as_inputs(inputs)
        checks.check_inputs(tensors, self._watch.tensors())
        compiled = self._compile(tensors)
        batch = tensors[0].shape[0]
        times: dict[fx.Node, list[float]] = {}
        with self._lock:
            executor = compiled.timed(batch, lambda node, note, s: times.setdefault(node, []).append(s))
        target = torch.full((batch,), -1, dtype=torch.int64, device=tensors[0].device)
        for _ in range(repeats):
            with torch.no_grad(), without_autocast(compiled.device):
                run = executor.start(*_prepare(compiled, tensors))
                next(run)
                run.send(target)
        return [
            step_time(step, statistics.median(times[step.node]), batch) for step in executor.steps if step.node in times
        ]

    def save(self, path: str | PathLike[str], extra: dict[str, Any] | None = None) -> None:
        """Save the joint program as a ``.pt2`` file that needs neither the model nor its code; see `lrpfast.load`.

        Parameters
        ----------
        path
            The file; written whole or not at all.
        extra
            What JSON can hold; kept with the program.

        Raises
        ------
        OutputError
            The file cannot be written.
        """
        from lrpfast import export

        joint = self._joint_for("save")
        with building(joint.program.inputs[0].meta["val"].device):
            export.save_program(joint, path, self._metadata(extra))

    def export_onnx(self, path: str | PathLike[str], opset: int = 18) -> None:
        """Export the joint program to ONNX, with a dynamic batch and no custom operators.

        The model takes the inputs and ``target`` (int64 ``[N]``, -1 for the arg max); it gives ``output``, ``relevance`` and
        the recorded layers.

        Raises
        ------
        MissingDependencyError
            onnx or onnxscript is not installed.
        OutputError
            The file cannot be written.
        """
        from lrpfast import export

        joint = self._joint_for("export_onnx")
        with building(joint.program.inputs[0].meta["val"].device):
            export.export_onnx(joint, path, opset, self._metadata(None))

    def _metadata(self, extra: dict[str, Any] | None) -> dict[str, Any]:
        return {"composite": self._composite.name, "extra": extra or {}}

    def _joint_for(self, what: str) -> Joint:
        compiled = self._need_compiled(what)
        with self._lock:
            return compiled.joint(compiled.default_seed)

    def _need_compiled(self, what: str) -> Compiled:
        if self._latest is None:
            raise InputError(f"{what}: no program yet; give the Explainer example_inputs, or call it once")
        if self._latest.state != self._watch.state():
            raise InputError(
                f"{what}: the model was changed since the program was made; call the Explainer once more first"
            )
        return self._latest

    def _compile(self, inputs: tuple[torch.Tensor, ...]) -> Compiled:
        key = tuple((tuple(x.shape[1:]), x.dtype, x.device) for x in inputs)
        state = self._watch.state()
        with self._lock:
            compiled = self._compiled.get(key)
            if compiled is None or compiled.state != state:
                compiled = self._make(inputs, state)
                self._compiled[key] = compiled
                while len(self._compiled) > _KEPT_PROGRAMS:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(key)
            self._latest = compiled
            return compiled

    def _make(self, inputs: tuple[torch.Tensor, ...], state: tuple) -> Compiled:
        with building(inputs[0].device):
            return self._made(inputs, state)

    def _made(self, inputs: tuple[torch.Tensor, ...], state: tuple) -> Compiled:
        checks.check_parameters(self._watch.named_tensors())
        captured = capture(self._model, inputs)
        if len(captured.program.inputs) != len(inputs):
            raise InputError(f"the model takes {len(captured.program.inputs)} tensor inputs, {len(inputs)} were given")
        for node, given in zip(captured.program.inputs, inputs, strict=True):
            _check_batch(node)
            if tuple(node.meta["val"].shape[1:]) != tuple(given.shape[1:]):
                raise InputError(
                    f"the exported program takes inputs of shape {list(node.meta['val'].shape[1:])} a sample, got "
                    f"{list(given.shape[1:])}"
                )
        with give_back_large_pieces(inputs[0].device):
            program = canonicalise(captured.program, self._precision)
        rules = assign(program, self._composite)
        backend = _backend_on(inputs[0].device, self._backend)
        autotune = self._autotune and (backend == "native" or (backend == "triton" and inputs[0].is_cuda))
        compiled = Compiled(program, captured.pack, rules, self._record, backend, autotune, state)
        for node in compiled.joint(compiled.default_seed).program.inputs:
            _check_batch(node)
        return compiled


def _check_batch(node: fx.Node) -> None:
    batch = node.meta["val"].shape[0]
    if isinstance(batch, int) or not batch.node.expr.free_symbols:
        raise CaptureError(
            "the program is bound to one size of batch. A model must neither compare that size with a constant nor calculate with "
            "it, as a mean over dimension 0 does; an exported program must have dynamic_shapes for dimension 0"
        )


def _check_backend(backend: str) -> str:
    """The backend asked for; raises an InputError where it is unknown, or not there."""
    if backend not in ("auto", "torch", "native", "triton"):
        raise InputError(f"backend must be 'auto', 'torch', 'native' or 'triton', got {backend!r}")
    if backend == "native" and native.extension is None:
        raise InputError(f"backend 'native' is not available: {native.why_unavailable}")
    if backend == "triton" and gpu.load()[0] is None:
        raise InputError(f"backend 'triton' is not available: {gpu.load()[1]}")
    return backend


def _backend_on(device: torch.device, backend: str) -> str:
    """The backend for inputs on a device: "auto" is the fastest there."""
    if backend == "triton" and not gpu.runs_on(device.type):
        raise InputError(f"backend 'triton' runs on CUDA devices, the inputs are on {device}")
    if backend != "auto":
        return backend
    if device.type == "cuda" and gpu.runs_on("cuda"):
        return "triton"
    return "native" if device.type == "cpu" and native.extension is not None else "torch"


def _recorder(device: torch.device) -> Recorder | None:
    """What records programs on a device; None where nothing is gained by it."""
    return CudaRecorder(device) if device.type == "cuda" else None


def _zeros_like(node: fx.Node) -> torch.Tensor:
    """A batch of one as the program takes it."""
    fake = node.meta["val"]
    tensor = torch.zeros((1, *fake.shape[1:]), dtype=fake.dtype, device=fake.device)
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def _prepare(compiled: Compiled, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Inputs as the program takes them: its dtype, images channels-last."""
    prepared = []
    for node, given in zip(compiled.program.inputs, inputs, strict=True):
        tensor = given.detach().to(node.meta["val"].dtype)
        prepared.append(tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor)
    return prepared


def _run(
    compiled: Compiled,
    executor: Executor,
    inputs: tuple[torch.Tensor, ...],
    target: torch.Tensor | None,
    seed: Seed,
    first: int,
) -> Explanation:
    """Explain samples `first` and up of a batch."""
    run = executor.start(*_prepare(compiled, inputs))
    output = next(run)
    checks.check_finite(output, "the model's output", first)
    if seed is Seed.TENSOR:
        assert target is not None
        resolved = checks.check_output_relevance(target, output)
        results = [run.send(resolved)]
    else:
        resolved = checks.resolve_target(target, output)
        results = [run.send(t) for t in (resolved.unbind(1) if resolved.dim() == 2 else [resolved])]
    run.close()
    executor.settle(inputs[0].shape[0])
    several = seed is not Seed.TENSOR and resolved.dim() == 2
    columns = [torch.stack(c, 1) if several else c[0] for c in zip(*results, strict=True)]
    return _explanation(executor, inputs, output, resolved, columns, seed, first)


def _replay(
    compiled: Compiled,
    replay: Replay,
    executor: Executor,
    inputs: tuple[torch.Tensor, ...],
    target: torch.Tensor | None,
    seed: Seed,
    first: int,
) -> Explanation:
    """`_run` by what was recorded."""
    batch, device = inputs[0].shape[0], inputs[0].device
    asked = torch.full((batch,), -1, dtype=torch.int64, device=device) if target is None else target.to(device)
    output, *columns = replay(tuple(_prepare(compiled, inputs)), asked)
    checks.check_finite(output, "the model's output", first)
    resolved = checks.resolve_target(target, output)
    return _explanation(executor, inputs, output, resolved, columns, seed, first)


def _explanation(
    executor: Executor,
    inputs: tuple[torch.Tensor, ...],
    output: torch.Tensor,
    resolved: torch.Tensor,
    columns: list[torch.Tensor],
    seed: Seed,
    first: int,
) -> Explanation:
    """The results of a run as its caller gets them, checked."""
    if seed is Seed.TENSOR:
        total = resolved.flatten(1).sum(1) if resolved.dim() > 1 else resolved
    else:
        total = checks.seed_relevance(output, resolved, seed)
    columns = [_finished(c, inputs[0].dtype) for c in columns]
    count = len(inputs)
    for index, name in enumerate((*("the relevance" for _ in inputs), *executor.recorded)):
        checks.check_finite(columns[index], name if index < count else f"the relevance at {name!r}", first)
    layers = dict(zip(executor.recorded, columns[count:], strict=True))
    dtype = inputs[0].dtype
    return Explanation(tuple(columns[:count]), output.to(dtype), resolved, layers, total.to(dtype))


def _joined(parts: list[Explanation], pack: Callable[[torch.Tensor], Any]) -> Explanation:
    """One explanation of all samples, with the output as the model returns it."""

    def join(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))

    maps = tuple(join(m) for m in zip(*(p.relevance for p in parts), strict=True))
    return Explanation(
        relevance=maps[0] if len(maps) == 1 else maps,
        output=pack(join([p.output for p in parts])),
        target=join([p.target for p in parts]),
        layers={name: join([p.layers[name] for p in parts]) for name in parts[0].layers},
        output_relevance=join([p.output_relevance for p in parts]),
    )


def _finished(result: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A result in the inputs' dtype and in memory of its own; an expanded view is written out."""
    image = result.dim() == 4 and result.is_contiguous(memory_format=torch.channels_last)
    return result.to(dtype) if image else result.to(dtype).contiguous()


def explain(
    model: torch.nn.Module | ExportedProgram,
    inputs: torch.Tensor | Sequence[torch.Tensor],
    target: int | Sequence[int] | torch.Tensor | None = None,
    composite: str | Composite = "epsilon_plus_flat",
    seed: str = "logit",
    **options: Any,
) -> Explanation:
    """Explain one batch: ``Explainer(model, inputs, composite, **options)(inputs, target, seed)``."""
    return Explainer(model, inputs, composite, **options)(inputs, target, seed)
