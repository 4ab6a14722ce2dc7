"""Random numbers in a loss: detected, and refused unless they repeat."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

T = TypeVar("T")


def check_repeatable(loss: Callable[[], T], device: torch.device) -> T:
    """Return ``loss()``; raise ValueError if it draws random numbers that differ between calls.

    The global generators are restored if the loss draws from them. Random numbers of NumPy and Python are not detected.
    """
    devices = [device] if device.type == "cuda" else []
    before = torch.get_rng_state(), [torch.cuda.get_rng_state(each) for each in devices]
    draws, again = _Draws(), _Draws()
    try:
        with draws:
            value = loss()
        if draws.names:
            with again:
                loss()
        if draws.states != again.states:
            raise ValueError(
                f"loss_fn draws other random numbers in each call ({', '.join(sorted(draws.names))}), so it "
                "is no function of params; switch that off (training=False, or a rate of 0), let "
                "hvpkit.from_module(..., dropout=seed) fix the model's dropout and noise, if the first "
                "dimension of what is drawn is the examples, or draw from a torch.Generator that is seeded in "
                "each call"
            )
    finally:
        if draws.names:  # else what other threads have drawn since would be drawn again
            torch.set_rng_state(before[0])
            for each, state in zip(devices, before[1], strict=True):
                torch.cuda.set_rng_state(state, each)
    return value


class _Draws(TorchDispatchMode):
    """Recorder of the random operators called inside, and of the generators' states before each."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()
        self.states: list[list[int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.names.add(str(func.overloadpacket))
            given = kwargs.get("generator")
            generators = (
                (torch.default_generator, *torch.cuda.default_generators) if given is None else (given,)
            )
            self.states += [generator.get_state().tolist() for generator in generators]
        return func(*args, **kwargs)
