"""What depends on the prompt or the first frame alone, computed once for all steps of a sampling run.

The network has no part in it: hooks answer in place of the text embedder, of the keys and values of cross attention,
and of what the first frame contributes. At small sizes that is a third of a forward pass. Both branches of guidance
share a step's embedded time, too.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from flashi2v_model.layers import Attention

KeysValues = tuple[Tensor, Tensor]  # (B, L, K, d) each
_HOOK = "flashi2v_text"
# Texts and first frames that are kept: both branches of guidance, or both in one and one of them alone.
_MOST = 2


@contextmanager
def conditions_kept(transformer: nn.Module) -> Iterator[None]:
    """Embed every text, first frame and timestep only once while the block runs; no number changes.

    A tensor is known again by its memory: keep one text for each branch of the guidance, and do not write into it.
    """
    model: Any = transformer.get_submodule("")  # itself, also where it is wrapped to be compiled
    methods = [(model, "guide"), (model.condition_embedder, "embed_time")]
    methods = [(owner, name) for owner, name in methods if name not in vars(owner)]  # others are kept already
    for owner, name in methods:
        setattr(owner, name, _Once(getattr(owner, name)))
    keeps_text = _registry(model).get_hook(_HOOK) is not None
    if not keeps_text:
        keep_text(model, with_gradients=True)
    try:
        yield
    finally:
        for owner, name in methods:
            delattr(owner, name)
        if not keeps_text:
            forget_text(model)


def keep_text(transformer: nn.Module, *, with_gradients: bool = False) -> None:
    """Do so until `forget_text`; the end of a pipeline's run lets go of the texts.

    Args:
        transformer: the velocity network.
        with_gradients: also where gradients are computed, whose graph is used once; weights that learn change the text.
    """
    readers = []
    for block in transformer.get_submodule("blocks").children():
        attention = block.get_submodule("attn2")
        assert isinstance(attention, Attention)
        reader = _Reader(attention.keys_values)
        attention.keys_values = reader  # type: ignore[method-assign, assignment]
        readers.append(reader)
    _registry(transformer).register_hook(_TextEmbedder(readers, with_gradients), _HOOK)


def forget_text(transformer: nn.Module) -> None:
    """Undo `keep_text`."""
    _registry(transformer).remove_hook(_HOOK, recurse=False)
    for block in transformer.get_submodule("blocks").children():
        del block.get_submodule("attn2").keys_values


def _registry(transformer: nn.Module) -> HookRegistry:
    embedder = transformer.get_submodule("condition_embedder.text_embedder")
    return HookRegistry.check_if_exists_or_initialize(embedder)


class _Reader:
    """Keeps keys and values of the text that a forward pass is about."""

    def __init__(self, compute: Callable[[Tensor], KeysValues]) -> None:
        self._compute = compute
        self.kept: list[KeysValues] | None = None  # one, or still none; None where nothing is to be kept

    def __call__(self, text: Tensor) -> KeysValues:
        if self.kept is None:
            return self._compute(text)
        if not self.kept:
            self.kept.append(self._compute(text))
        return self.kept[0]


@dataclass(eq=False)
class _Known:
    """A text, embedded, and what each reader keeps of it."""

    text: Tensor
    embedded: Tensor
    kept: list[list[KeysValues]] = field(default_factory=list)


def _is_same(one: Any, other: Any) -> bool:
    """Tell whether two arguments are one; a view of the same memory is, too, as a cache that splits a batch has."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return type(one) is type(other) and bool(one == other)  # a number is no tensor, which nobody reads here
    return one is other or (bool(one.data_ptr()) and _place(one) == _place(other))


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


class _Once:
    """A function that keeps what it returned for the last arguments."""

    def __init__(self, compute: Callable[..., Any]) -> None:
        self._compute = compute
        self._known: list[tuple[tuple[Any, ...], Any]] = []

    @torch.compiler.disable
    def __call__(self, *arguments: Any) -> Any:
        for known, result in self._known:
            if all(map(_is_same, known, arguments)):
                return result
        result = self._compute(*arguments)
        self._known = [(arguments, result), *self._known][:_MOST]
        return result


class _TextEmbedder(ModelHook):
    """Keeps embedded texts, and tells the cross attentions which of them a forward pass is about."""

    _is_stateful = True

    def __init__(self, readers: list[_Reader], with_gradients: bool) -> None:
        super().__init__()
        self._readers, self._with_gradients = readers, with_gradients
        self._texts: list[_Known] = []

    def new_forward(self, module: nn.Module, text: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not self._with_gradients:
            for reader in self._readers:
                reader.kept = None
            embedded: Tensor = self.fn_ref.original_forward(text)
            return embedded
        known = next((entry for entry in self._texts if _is_same(entry.text, text)), None)
        if known is None:
            known = _Known(text, self.fn_ref.original_forward(text), [[] for _ in self._readers])
        else:
            self._texts.remove(known)
        self._texts = [known, *self._texts][:_MOST]
        for reader, kept in zip(self._readers, known.kept):
            reader.kept = kept
        return known.embedded

    def reset_state(self, module: nn.Module) -> nn.Module:
        self._texts = []
        for reader in self._readers:
            reader.kept = None
        return module
