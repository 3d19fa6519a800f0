"""What a call returns: the relevance, and what people ask of it next."""

from __future__ import annotations

import dataclasses
from os import PathLike
from typing import Any

import torch

FEATURES = "@features"  # among the names to record: what the last layer reads, by channel; no module can be called so


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The result of an explanation.

    Attributes
    ----------
    relevance
        Shaped like the inputs, ``[N, ...]``; ``[N, K, ...]`` for targets ``[N, K]``. A tuple for several inputs.
    output
        What the model returned.
    target
        Class indices as resolved, int64 ``[N]`` or ``[N, K]``; for a target that was itself the relevance at the output,
        that tensor.
    layers
        Relevance at the recorded layers, by the name of the module that the value leaves; of the last features by `FEATURES`.
    output_relevance
        The relevance at the output that was propagated, summed a sample: ``[N]`` or ``[N, K]``.
    """

    relevance: torch.Tensor | tuple[torch.Tensor, ...]
    output: Any
    target: torch.Tensor
    layers: dict[str, torch.Tensor]
    output_relevance: torch.Tensor

    @property
    def _maps(self) -> tuple[torch.Tensor, ...]:
        return self.relevance if isinstance(self.relevance, tuple) else (self.relevance,)

    def conservation(self) -> torch.Tensor:
        """Sum of the inputs' relevance over the relevance at the output, a sample: ``[N]`` or ``[N, K]``, float64.

        1 where nothing was lost; what is missing was absorbed by biases and stabilisers.
        """
        lead = self.output_relevance.dim()
        total = sum(r.double().flatten(lead).sum(-1) for r in self._maps)
        return torch.as_tensor(total) / self.output_relevance.double()

    def heatmap(self) -> torch.Tensor:
        """The relevance summed over channels: ``[N, H, W]``, or ``[N, K, H, W]``; of the first input that is an image.

        Raises
        ------
        ValueError
            No input is an image batch ``[N, C, H, W]``.
        """
        lead = self.output_relevance.dim()
        for relevance in self._maps:
            if relevance.dim() == lead + 3:
                return relevance.sum(lead)
        shapes = [list(r.shape) for r in self._maps]
        raise ValueError(f"a heat map needs relevance of images [N, C, H, W]; here it has the shape {shapes}")

    def save(self, path: str | PathLike[str]) -> None:
        """Render the heat map to an image file: zero white, red for, blue against. Several samples make a sheet.

        Raises
        ------
        lrpfast.errors.OutputError
            The file cannot be written.
        """
        from lrpfast import viz

        viz.save_explanation(self, path)
