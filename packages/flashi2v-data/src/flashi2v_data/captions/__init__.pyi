from .cleaning import (
    CaptionCount as CaptionCount,
    TextLoss as TextLoss,
    clean_caption as clean_caption,
    has_words as has_words,
)
from .tokenizer import (
    TextTokens as TextTokens,
    Tokenizer as Tokenizer,
    find_loss as find_loss,
    load_tokenizer as load_tokenizer,
)
