"""The layers' inputs wait for the backward pass in pinned host memory (memory.activations=offload).

With the `full` policy a compiled layer saves only its input. Here that input is copied to the host while its layer
computes, and copied back while the next layer is being recomputed:

    forward    main   | layer i-1         | layer i             | layer i+1 |  waits for copy i, frees input i-1
               copies | input i-1 to host | input i to host     | ...
    backward   main   | layer i+1, its gradients | waits for input i; layer i, its gradients
               copies | input i to GPU           | input i-1 to GPU

The inputs of the first and the last layer stay on the GPU: autograd holds the first one in any case, because it is a
leaf, and the last one is read next. So three inputs are on the GPU at a time in the backward pass: those of the first
layer, of the current layer, and of the layer before it.

Autograd's saved-tensor hooks replace the input by a token. They act around the compiled layer: its graph and its guards
do not change.

Nothing here makes the host wait, and the stream that asked for a copy waits for it before the pass is over, so the
whole can be captured in a CUDA graph. A tensor is referenced until that stream has waited for its copy. record_stream
would not do: it would keep the memory from the rest of the capture.

Letters: B blocks, S positions of a block, D model width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from launcher.errors import MemoryExhausted
from launcher.memory.ledger import MIB

INPUTS_ON_DEVICE = 3  # at a time, in the backward pass


class Offloaded(NamedTuple):
    """The token that autograd saves in place of an input."""

    layer: int
    forward_pass: int  # counted from the first
    host: Tensor  # [B, S, D]


class Copy(NamedTuple):
    """A copy to the host or back that may still be running."""

    on_device: Tensor  # [B, S, D]
    done: torch.cuda.Event | None  # None on a CPU, where a copy is done at once


class HostInputs:
    """The inputs of `layers` decoder layers on `device`. There is one host buffer for each layer and shape, which the
    next pass reuses: a pass must end before the next begins."""

    def __init__(self, layers: int, device: torch.device) -> None:
        self._last = layers - 1
        self._device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.buffers: dict[tuple[int, torch.Size], Tensor] = {}
        self._forward_pass = 0
        self.to_host: dict[int, Copy] = {}
        self.on_host: dict[int, Tensor] = {}  # buffers of this pass that the backward pass has not asked for yet
        self.to_device: dict[int, Copy] = {}

    @property
    def host_mib(self) -> float:
        """MiB of host memory that the buffers of the shapes seen so far take."""
        return sum(self._allocated(buffer.nbytes) for buffer in self.buffers.values()) / MIB

    @contextmanager
    def around(self, layer: int, hidden: Tensor) -> Iterator[None]:
        """Context of the call of layer number `layer` with its input `hidden` [B, S, D]; layers come in order. Does
        nothing where no gradients are recorded."""
        if not torch.is_grad_enabled():
            yield
            return
        if layer == 0:
            self._begin()
        pack = self._send(layer, hidden) if 0 < layer < self._last else _unchanged
        with saved_tensors_hooks(pack, partial(self._unpack, layer)):
            yield
        if copy := self.to_host.pop(layer - 1, None):
            self.wait_for(copy)

    def _begin(self) -> None:
        if self.stream and (self.to_host or self.to_device):  # the last pass ended early: its copies may still run
            torch.cuda.synchronize(self._device)
        self._forward_pass += 1
        for unfinished in (self.to_host, self.on_host, self.to_device):
            unfinished.clear()

    def _send(self, layer: int, hidden: Tensor) -> Callable[[Tensor], Any]:
        """Start the copy to the host; returns the hook that recognises `hidden`. The hook compares data pointers:
        autograd keeps the hook, so holding the tensor itself would keep it on the GPU."""
        host, source = self.buffer_for(layer, hidden), hidden.detach()
        self.to_host[layer] = Copy(source, self.start_copy(host, source))
        token, address, dtype = Offloaded(layer, self._forward_pass, host), hidden.data_ptr(), hidden.dtype

        def pack(saved: Tensor) -> Any:
            if saved.shape != host.shape or saved.dtype != dtype or saved.data_ptr() != address:
                return saved
            self.on_host[layer] = host
            return token

        return pack

    def buffer_for(self, layer: int, hidden: Tensor) -> Tensor:
        """The host buffer for the input of `layer`. Allocated in warm-up, since a capture cannot. Raises
        MemoryExhausted."""
        key = layer, hidden.shape
        if key not in self.buffers:
            try:
                self.buffers[key] = torch.empty_like(hidden, device="cpu", pin_memory=self.stream is not None)
            except RuntimeError as error:
                mib = (self._last - 1) * self._allocated(hidden.nbytes) / MIB
                raise MemoryExhausted(
                    f"memory.activations=offload needs {mib:,.0f} MiB of host memory that stays in place for inputs of "
                    f"{tuple(hidden.shape)}; had {len(self.buffers)} buffers when: {str(error).splitlines()[0]}\n"
                    "Use memory.activations=full, or lower train.micro_batch or data.max_length."
                ) from error
        return self.buffers[key]

    def _allocated(self, size: int) -> int:
        """Bytes that a buffer of `size` bytes takes: torch rounds pinned memory up to a power of two."""
        return size if self.stream is None else 1 << (size - 1).bit_length()

    def _unpack(self, layer: int, packed: Any) -> Tensor:
        """The tensor that `layer` saved. The first call for a layer also starts to fetch the input of the layer before
        it."""
        self._prefetch(layer - 1)
        if not isinstance(packed, Offloaded):
            saved: Tensor = packed
            return saved
        assert packed.forward_pass == self._forward_pass, (
            "a forward pass with gradients began before the backward pass of the last one"
        )
        self._prefetch(layer)
        copy = self.to_device.pop(layer, None) or self.fetch(packed.host)  # the latter where it is unpacked again
        self.wait_for(copy)
        return copy.on_device

    def _prefetch(self, layer: int) -> None:
        if layer in self.on_host:
            self.to_device[layer] = self.fetch(self.on_host.pop(layer))

    def fetch(self, host: Tensor) -> Copy:
        """Start the copy of a host buffer to the device."""
        target = torch.empty_like(host, device=self._device)  # from the memory of the stream that asks
        return Copy(target, self.start_copy(target, host))

    def start_copy(self, target: Tensor, source: Tensor) -> torch.cuda.Event | None:
        """Copy once the work queued on the current stream is done; returns the event of the copy's end."""
        if self.stream is None:
            target.copy_(source)
            return None
        self.stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
        return self.stream.record_event()

    def wait_for(self, copy: Copy) -> None:
        """Make the current stream wait for the copy; afterwards its tensor is like any other of that stream."""
        if copy.done is not None:
            torch.cuda.current_stream(self._device).wait_event(copy.done)


def _unchanged(saved: Tensor) -> Tensor:
    return saved
