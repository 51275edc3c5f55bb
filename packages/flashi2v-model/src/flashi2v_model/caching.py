"""What depends on the prompt alone, computed once for all steps of a sampling run.

The network has no part in it: for the time of a run, something from outside answers in place of the text embedder and
of the keys and values of cross attention. At small sizes the text is a seventh of a forward pass.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from flashi2v_model.layers import Attention
from flashi2v_model.transformer import FlashI2VTransformer3DModel

KeysValues = tuple[Tensor, Tensor]  # (B, L, K, d) each
_HOOK = "flashi2v_text"


@contextmanager
def text_kept(transformer: FlashI2VTransformer3DModel) -> Iterator[None]:
    """Embed every text that the transformer is given only once while the block runs; no number changes.

    A text is known again as the same tensor: keep one for each branch of the guidance, and do not write into it.
    """
    readers = []
    for block in transformer.blocks.children():
        attention = block.get_submodule("attn2")
        assert isinstance(attention, Attention)
        reader = _Reader(attention.keys_values)
        attention.keys_values = reader  # type: ignore[method-assign, assignment]
        readers.append((attention, reader))
    registry = HookRegistry.check_if_exists_or_initialize(transformer.condition_embedder.text_embedder)
    registry.register_hook(_TextEmbedder([reader for _, reader in readers]), _HOOK)
    try:
        yield
    finally:
        registry.remove_hook(_HOOK, recurse=False)
        for attention, _ in readers:
            del attention.keys_values


class _Reader:
    """Keeps keys and values of the text that a forward pass is about."""

    def __init__(self, compute: Callable[[Tensor], KeysValues]) -> None:
        self._compute = compute
        self.kept: list[KeysValues] = []  # one, or still none

    def __call__(self, text: Tensor) -> KeysValues:
        if not self.kept:
            self.kept.append(self._compute(text))
        return self.kept[0]


class _TextEmbedder(ModelHook):
    """Keeps embedded texts, and tells the cross attentions which of them a forward pass is about."""

    def __init__(self, readers: list[_Reader]) -> None:
        super().__init__()
        self._readers = readers
        # (text, embedded text, what each reader keeps of it)
        self._texts: list[tuple[Tensor, Tensor, list[list[KeysValues]]]] = []

    def new_forward(self, module: nn.Module, text: Tensor) -> Tensor:
        known = next((entry for entry in self._texts if entry[0] is text), None)
        if known is None:
            embedded: Tensor = self.fn_ref.original_forward(text)
            known = (text, embedded, [[] for _ in self._readers])
            self._texts.append(known)
        for reader, kept in zip(self._readers, known[2]):
            reader.kept = kept
        return known[1]
