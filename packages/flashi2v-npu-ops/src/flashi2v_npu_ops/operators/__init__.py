"""The operators: one file per contract, with the plain-torch reference that specifies it."""

from flashi2v_npu_ops.operators.activation import gelu_tanh
from flashi2v_npu_ops.operators.attention import attention
from flashi2v_npu_ops.operators.attention_part import attention_part, attention_part_grad, merge_parts
from flashi2v_npu_ops.operators.convolution import conv3d, route_conv3d
from flashi2v_npu_ops.operators.fourier import split_frequencies
from flashi2v_npu_ops.operators.modulation import gated_residual, layer_norm_modulate
from flashi2v_npu_ops.operators.norm import rms_norm
from flashi2v_npu_ops.operators.rope import apply_rope

__all__ = [
    "apply_rope",
    "attention",
    "attention_part",
    "attention_part_grad",
    "conv3d",
    "gated_residual",
    "gelu_tanh",
    "layer_norm_modulate",
    "merge_parts",
    "rms_norm",
    "route_conv3d",
    "split_frequencies",
]
