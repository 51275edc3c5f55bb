from .clip import Clip as Clip, Frames as Frames
from .protocol import Column as Column, SetSignal as SetSignal, Signal as Signal
from .registry import find_signals as find_signals
