"""What attention saves for the backward pass, kept in the host's memory meanwhile.

The streams were never run on a GPU or an NPU so far; the bookkeeping is tested on the CPU.
"""

import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

# Smaller tensors (sums of a softmax, say) are not worth a transfer.
MIN_BYTES = 2**20


class HostMemory:
    """Saved tensors go to pinned memory on a stream of their own, and come back one call before they are needed.

    Args:
        device: where the computation runs; on the CPU the copies are plain ones.
        min_bytes: smaller tensors stay.
    """

    def __init__(self, device: torch.device, min_bytes: int = MIN_BYTES) -> None:
        self._device = device
        self._min_bytes = min_bytes
        self._stream = None if device.type == "cpu" else torch.Stream(device)
        self._latest: weakref.ref[_Call] | None = None

    @torch.compiler.disable  # hooks of saved tensors act on what runs as it is written
    def run(self, function: Callable[..., Tensor], *args: Tensor) -> Tensor:
        """Call a function; what it saves for its backward pass leaves the device."""
        call = _Call(self._latest)
        self._latest = weakref.ref(call)

        def pack(tensor: Tensor) -> "_Parked | Tensor":
            stays = tensor.nbytes < self._min_bytes or tensor.device != self._device or isinstance(tensor, nn.Parameter)
            return tensor if stays else call.park(tensor, self._stream)

        def unpack(saved: "_Parked | Tensor") -> Tensor:
            if isinstance(saved, Tensor):
                return saved
            call.bring_back()
            if (before := call.before()) is not None:  # whose backward pass comes next
                before.bring_back()
            return saved.take()

        with saved_tensors_hooks(pack, unpack):
            result = function(*args)
        call.release_sources()
        return result


class _Call:
    """One call of `run`: what it saved, and which call came before it."""

    def __init__(self, before: "weakref.ref[_Call] | None") -> None:
        self._before = before
        # By address, as the same tensor may be saved twice; the graph keeps what is still needed alive.
        self._parked: weakref.WeakValueDictionary[tuple[object, ...], _Parked] = weakref.WeakValueDictionary()
        # An address means one tensor only as long as nothing that was saved is freed.
        self._sources: list[Tensor] = []

    def park(self, tensor: Tensor, stream: torch.Stream | None) -> "_Parked":
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        parked = self._parked.get(key)
        if parked is None:
            parked = self._parked[key] = _Parked(tensor, stream)
            self._sources.append(tensor.detach())
        return parked

    def release_sources(self) -> None:
        """Release what was saved, now that the call saves nothing more."""
        self._sources.clear()

    def before(self) -> "_Call | None":
        return None if self._before is None else self._before()

    def bring_back(self) -> None:
        for parked in list(self._parked.values()):
            parked.bring_back()


class _Parked:
    """A tensor on the host, or on its way there or back."""

    def __init__(self, tensor: Tensor, stream: torch.Stream | None) -> None:
        self._device, self._stream = tensor.device, stream
        self._back: Tensor | None = None
        self._returned: torch.Event | None = None
        self._host = torch.empty_like(tensor, device="cpu", pin_memory=stream is not None)
        if stream is None:
            self._host.copy_(tensor)
            return
        stream.wait_stream(torch.accelerator.current_stream(self._device))
        with stream:
            self._host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)  # its memory is used again only when the copy is done

    def bring_back(self) -> None:
        """Start the way back; without effect a second time."""
        if self._back is not None:
            return
        if self._stream is None:
            self._back = self._host.clone()
            return
        with self._stream:
            self._back = self._host.to(self._device, non_blocking=True)
            self._returned = self._stream.record_event()

    def take(self) -> Tensor:
        assert self._back is not None
        if self._returned is not None:
            current = torch.accelerator.current_stream(self._device)
            current.wait_event(self._returned)
            self._back.record_stream(current)
        return self._back
