"""What the text encoder will not get of the captions of the clips that a filter keeps."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from flashi2v_data.captions.cleaning import CaptionCount, TextLoss, becomes_empty, clean_caption, plain_start
from flashi2v_data.curation.config import FilterConfig
from flashi2v_data.records import Entry, printable

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
        return all(becomes_empty(caption, self._how) for caption in _listed(captions))

    def count(self, count: CaptionCount, clips: Sequence[Entry]) -> None:
        """Count the captions of clips.

        Raises:
            InputError: the settings name a tokenizer that cannot be loaded.
        """
        if self._config.text_tokenizer_path is None:
            others = [clip for clip in clips if not isinstance(clip.cap, str) or plain_start(clip.cap) is None]
            count.total += len(clips) - len(others)
            clips = others
        for clip in clips:
            for caption in _listed(clip.cap):
                count.add(self._loss(caption), printable(clip.path))

    def _loss(self, caption: str) -> TextLoss:
        if self._config.text_tokenizer_path is None:
            return TextLoss(is_empty=becomes_empty(caption, self._how))
        # Imported here, and loaded in the process that needs it: it takes seconds, and most filters do without.
        from flashi2v_data.captions.tokenizer import find_loss, load_tokenizer

        if self._tokenizer is None:
            assert self._config.tokenizer_max_length is not None
            self._tokenizer = load_tokenizer(self._config.text_tokenizer_path, self._config.tokenizer_max_length)
        text = clean_caption(caption, self._how)
        return find_loss(self._tokenizer, text, self._tokenizer(text))


def _listed(captions: Captions) -> Sequence[str]:
    return [captions] if isinstance(captions, str) else captions
