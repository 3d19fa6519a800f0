"""What is made of a model is made by one thread at a time, and as the model says, whatever the caller's surroundings.

torch.export, fake tensors and make_fx keep what they are at in places that all threads of a process share: two models captured at once
take each other's. Running what was made needs no lock. Autocast would have layers compute in another dtype than the program says.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_LOCK = threading.RLock()


@contextmanager
def building(device: torch.device) -> Iterator[None]:
    """Capture, transform, compile or export: alone in this process, without autocast."""
    with _LOCK, without_autocast(device):
        yield


@contextmanager
def without_autocast(device: torch.device) -> Iterator[None]:
    """Compute in the dtypes that are given. Not by `torch.autocast`, which sets a dtype that all threads share."""
    kind = device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        yield
        return
    torch.set_autocast_enabled(kind, False)
    try:
        yield
    finally:
        torch.set_autocast_enabled(kind, True)
