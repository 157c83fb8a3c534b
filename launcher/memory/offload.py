"""The layers' inputs wait for the backward pass in pinned host memory (memory.activations=offload).

With the `full` policy a compiled layer saves its input alone. Here that input leaves the card while its layer computes,
and comes back while the layer after it is computed again:

    forward    main   | layer i-1       | layer i           | layer i+1 |  waits for the copy of i, lets the card's go
               copies | input i-1 away  | input i away      | ...
    backward   main   | layer i+1, its gradients | waits for input i; layer i, its gradients
               copies | input i back             | input i-1 back

The first and the last layer's stay: autograd holds the first one anyway, as the leaf that it is; the last one is read
next. So three inputs are on the card at a time, in the backward pass: the first layer's, the present one's and that of
the layer before it.

Autograd's hooks for saved tensors put a token in the input's place. They act around the compiled layer, whose graph
they do not change, and whose guards do not see them.

Nothing here waits for the host, and every copy is waited for on the stream that asked for it before the pass is over:
so it can be captured in a CUDA graph. A tensor is referenced until the asking stream has waited for its copy; marking
it as used by another stream (record_stream) would keep its memory from the rest of the capture.

Letters: B rows, S positions of a row, D model width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from launcher.errors import MemoryExhausted

MIB = 2**20
INPUTS_ON_DEVICE = 3  # at a time, in the backward pass


class Away(NamedTuple):
    """What autograd saves in an input's place."""

    number: int  # the layer's
    turn: int  # of the forward passes
    host: Tensor  # [B, S, D]


class Copy(NamedTuple):
    """Under way to the host or from it."""

    on_device: Tensor  # [B, S, D]
    done: torch.cuda.Event | None  # None on a CPU, where it is done at once


class HostInputs:
    """The inputs of `layers` decoder layers on `device`. A pass ends before the next begins: its host buffers are the
    next one's, one for each layer and shape."""

    def __init__(self, layers: int, device: torch.device) -> None:
        self._last = layers - 1
        self._device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.buffers: dict[tuple[int, torch.Size], Tensor] = {}
        self._turn = 0
        self.leaving: dict[int, Copy] = {}
        self.away: dict[int, Tensor] = {}  # host buffers of this pass whose content was not asked back yet
        self.coming: dict[int, Copy] = {}

    @property
    def host_mib(self) -> float:
        """Of pinned host memory, for the shapes seen so far."""
        return sum(self._taken(buffer.nbytes) for buffer in self.buffers.values()) / MIB

    @contextmanager
    def around(self, number: int, hidden: Tensor) -> Iterator[None]:
        """Around the call of layer `number` with its input `hidden` [B, S, D], in the layers' order. Does nothing where
        no gradients are recorded."""
        if not torch.is_grad_enabled():
            yield
            return
        if number == 0:
            self._begin()
        pack = self._send(number, hidden) if 0 < number < self._last else _as_it_is
        with saved_tensors_hooks(pack, partial(self._unpack, number)):
            yield
        if leaving := self.leaving.pop(number - 1, None):
            self.join(leaving)

    def _begin(self) -> None:
        if self.stream and (self.leaving or self.coming):  # a pass that ended half-way: its copies may still run
            torch.cuda.synchronize(self._device)
        self._turn += 1
        for left_over in (self.leaving, self.away, self.coming):
            left_over.clear()

    def _send(self, number: int, hidden: Tensor) -> Callable[[Tensor], Any]:
        """Begin the copy to the host; returns the hook that knows `hidden`. Autograd keeps the hook: it knows it by its
        address, as a reference would keep it on the card."""
        host, source = self.buffer_for(number, hidden), hidden.detach()
        self.leaving[number] = Copy(source, self.start_copy(host, source))
        token, address, dtype = Away(number, self._turn, host), hidden.data_ptr(), hidden.dtype

        def pack(saved: Tensor) -> Any:
            if saved.shape != host.shape or saved.dtype != dtype or saved.data_ptr() != address:
                return saved
            self.away[number] = host
            return token

        return pack

    def buffer_for(self, number: int, hidden: Tensor) -> Tensor:
        """Where the input of layer `number` waits. Made once: in warm-up, as a capture could not. Raises
        MemoryExhausted."""
        key = number, hidden.shape
        if key not in self.buffers:
            try:
                self.buffers[key] = torch.empty_like(hidden, device="cpu", pin_memory=self.stream is not None)
            except RuntimeError as error:
                mib = (self._last - 1) * self._taken(hidden.nbytes) / MIB
                raise MemoryExhausted(
                    f"memory.activations=offload needs {mib:,.0f} MiB of host memory that stays in place for inputs of "
                    f"{tuple(hidden.shape)}; had {len(self.buffers)} buffers when: {str(error).splitlines()[0]}\n"
                    "Use memory.activations=full, or lower train.micro_batch or data.max_length."
                ) from error
        return self.buffers[key]

    def _taken(self, size: int) -> int:
        """Bytes of the host that a buffer of `size` bytes takes: torch rounds pinned memory up to a power of two."""
        return size if self.stream is None else 1 << (size - 1).bit_length()

    def _unpack(self, number: int, packed: Any) -> Tensor:
        """What layer `number` saved. Its first call has the input of the layer before it come back."""
        self._ask_back(number - 1)
        if not isinstance(packed, Away):
            saved: Tensor = packed
            return saved
        assert packed.turn == self._turn, "a forward pass with gradients began before the backward pass of the last one"
        self._ask_back(number)
        copy = self.coming.pop(number, None) or self.fetch(packed.host)  # the latter where it is unpacked again
        self.join(copy)
        return copy.on_device

    def _ask_back(self, number: int) -> None:
        if number in self.away:
            self.coming[number] = self.fetch(self.away.pop(number))

    def fetch(self, host: Tensor) -> Copy:
        target = torch.empty_like(host, device=self._device)  # of the asking stream's memory
        return Copy(target, self.start_copy(target, host))

    def start_copy(self, target: Tensor, source: Tensor) -> torch.cuda.Event | None:
        """Copy, once what the current stream has been given is done; returns when."""
        if self.stream is None:
            target.copy_(source)
            return None
        self.stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
        return self.stream.record_event()

    def join(self, copy: Copy) -> None:
        """Let the current stream wait for it: from here on its tensor is as any other of that stream."""
        if copy.done is not None:
            torch.cuda.current_stream(self._device).wait_event(copy.done)


def _as_it_is(saved: Tensor) -> Tensor:
    return saved
