"""Notice that a model was changed since its program was made: a map of weights that are no longer there would be a wrong map.

torch counts what is written to a tensor. It does not count what is written through ``p.data``, through NumPy or by another process, and
an inference tensor has no count. So on a CPU a few values of each tensor are compared as well: whatever changes weights in bulk changes
these. Comparing all would take as long as reading the model.

A forward pass also hangs on which modules there are, on their hooks, and on their plain attributes (a slope, a stride, `training`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch._subclasses import FakeTensor
from torch.export import ExportedProgram

from lrpfast.building import building

_VALUES = 8  # of each tensor, evenly spread over its memory
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_PLAIN = {bool, int, float, str}

Places = tuple[int, ...]


class Watch:
    """Watches the parameters, buffers and modes of a model, which it keeps a reference to.

    Parameters
    ----------
    model
        A module, or an exported program.
    """

    def __init__(self, model: torch.nn.Module | ExportedProgram) -> None:
        self._model = model
        self._sampled: tuple[Places, list[torch.Tensor]] = ((), [])

    def tensors(self) -> Iterator[torch.Tensor]:
        """The parameters, then the buffers; shared ones more than once."""
        if isinstance(self._model, ExportedProgram):
            yield from self._model.state_dict.values()
            return
        modules = list(self._model.modules())
        # Of each module its own dictionaries: `parameters()` and `buffers()` of a ResNet-50 take a millisecond, at each call.
        for owned in ([m._parameters for m in modules], [m._buffers for m in modules]):
            yield from (tensor for tensors in owned for tensor in tensors.values() if tensor is not None)

    def named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The parameters and buffers with their names."""
        if isinstance(self._model, ExportedProgram):
            yield from self._model.state_dict.items()
            return
        yield from self._model.named_parameters()
        yield from self._model.named_buffers()

    def state(self) -> tuple[object, ...]:
        """What is another value once a tensor is written to or replaced, or a module, its mode, a hook or a plain attribute of it."""
        tensors = list(self.tensors())
        if any(
            isinstance(t, FakeTensor) for t in tensors
        ):  # another thread captures this very model: wait until it is done
            with building(tensors[0].device):
                tensors = list(self.tensors())
        places = tuple(t.data_ptr() for t in tensors)
        versions = tuple(t._version for t in tensors if not t.is_inference())
        modules = () if isinstance(self._model, ExportedProgram) else tuple(map(_told, self._model.modules()))
        return places, versions, modules, self._values(tensors, places)

    def _values(self, tensors: list[torch.Tensor], places: Places) -> bytes:
        known, samples = self._sampled
        if known != places:
            samples = [sample for t in tensors for sample in _samples(t)]
            self._sampled = places, samples
        with torch.inference_mode(False), torch.no_grad():
            return torch.cat(samples).double().numpy().tobytes() if samples else b""


def _told(module: torch.nn.Module) -> tuple[object, ...]:
    """What a module is told by beside its tensors. An integer of a module that is not torch's own may be a counter, which would have
    the model captured anew after each forward pass."""
    kinds = _PLAIN if type(module).__module__.startswith("torch.nn.") else _PLAIN - {int}
    plain = [v for v in vars(module).values() if type(v) in kinds or (type(v) is tuple and _is_plain(v))]
    return id(module), type(module), *plain, *module._forward_hooks, *module._forward_pre_hooks


def _is_plain(values: tuple[object, ...]) -> bool:
    return all(type(value) in _PLAIN for value in values)


def _samples(tensor: torch.Tensor) -> list[torch.Tensor]:
    """A few of a tensor's values, as a view of its memory, in which they may change; none where that is no plain memory."""
    plain = tensor.detach()
    if type(plain) is not torch.Tensor or plain.device.type != "cpu" or plain.dtype not in _DTYPES or not plain.numel():
        return []
    if plain.layout is not torch.strided:
        return []
    lying = plain.permute(sorted(range(plain.dim()), key=plain.stride, reverse=True))
    return [lying.view(-1)[:: -(-plain.numel() // _VALUES)]] if lying.is_contiguous() else []
