"""What the text encoder will not get of the captions of the clips that a filter keeps."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from flashi2v_data.captions.cleaning import CaptionCount, TextLoss, becomes_empty, clean_caption, plain_start
from flashi2v_data.curation.config import FilterConfig
from flashi2v_data.records import printable

if TYPE_CHECKING:
    from flashi2v_data.captions.tokenizer import TextTokens

Captions = str | Sequence[str]


class CaptionAudit:
    """Looks at captions as training will: cleaned, and tokenised where the settings name a tokenizer.

    Without a tokenizer only captions that a quick look does not clear are cleaned, so nearly all pass for nothing.
    """

    def __init__(self, config: FilterConfig) -> None:
        self._config = config
        self._tokenizer: Callable[[str], TextTokens] | None = None
        self._how = config.clean_captions

    def new_count(self) -> CaptionCount:
        """Return a count of no captions."""
        return CaptionCount(self._config.tokenizer_max_length or 0)

    def nothing_left(self, captions: Captions) -> bool:
        """Tell whether all captions of a clip are empty, or become so when cleaned."""
        if isinstance(captions, str):
            return plain_start(captions) is None and becomes_empty(captions, self._how)
        return all(map(self.nothing_left, captions))

    def count(self, count: CaptionCount, captions: Captions, path: str) -> None:
        """Count the captions of one clip.

        Raises:
            InputError: the settings name a tokenizer that cannot be loaded.
        """
        for caption in [captions] if isinstance(captions, str) else captions:
            if self._config.text_tokenizer_path is not None:
                count.add(self._loss(caption), printable(path))
            elif self.nothing_left(caption):
                count.add(TextLoss(is_empty=True), printable(path))
            else:
                count.total += 1

    def _loss(self, caption: str) -> TextLoss:
        # Imported here, and loaded in the process that needs it: it takes seconds, and most filters do without.
        from flashi2v_data.captions.tokenizer import find_loss, load_tokenizer

        if self._tokenizer is None:
            assert self._config.text_tokenizer_path is not None
            assert self._config.tokenizer_max_length is not None
            self._tokenizer = load_tokenizer(self._config.text_tokenizer_path, self._config.tokenizer_max_length)
        text = clean_caption(caption, self._how)
        return find_loss(self._tokenizer, text, self._tokenizer(text))
