"""Eleven diffusion transformers of diffusers, small: a name -> (model, keyword arguments)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

Tiny = tuple[nn.Module, dict[str, Any]]


def _float(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def flux(layers: int = 1, single_layers: int = 1, heads: int = 2) -> Tiny:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=layers,
        num_single_layers=single_layers,
        attention_head_dim=16,
        num_attention_heads=heads,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    return model, {
        "hidden_states": _float(2, 16, 4),
        "encoder_hidden_states": _float(2, 12, 32),
        "pooled_projections": _float(2, 32),
        "timestep": torch.tensor([0.3, 0.7], dtype=torch.float64),
        "img_ids": _float(16, 3),
        "txt_ids": _float(12, 3),
    }


def sd3() -> Tiny:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
    )
    return model, {
        "hidden_states": _float(2, 4, 8, 8),
        "encoder_hidden_states": _float(2, 10, 32),
        "pooled_projections": _float(2, 64),
        "timestep": torch.tensor([3, 700]),
    }


def pixart() -> Tiny:
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        cross_attention_dim=16,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=8,
        norm_type="ada_norm_single",
        use_additional_conditions=False,
        caption_channels=None,
    )
    return model, {
        "hidden_states": _float(2, 4, 8, 8),
        "timestep": torch.tensor([3, 700]),
        "encoder_hidden_states": _float(2, 8, 16),
        "added_cond_kwargs": {"aspect_ratio": None, "resolution": None},
    }


def sana() -> Tiny:
    from diffusers import SanaTransformer2DModel

    model = SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=4,
        num_cross_attention_heads=4,
        cross_attention_head_dim=4,
        cross_attention_dim=16,
        caption_channels=8,
        sample_size=8,
    )
    return model, {
        "hidden_states": _float(2, 4, 8, 8),
        "encoder_hidden_states": _float(2, 6, 8),
        "timestep": torch.tensor([3, 700]),
    }


def z_image() -> Tiny:
    from diffusers import ZImageTransformer2DModel

    model = ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=16,
        dim=16,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        qk_norm=True,
        cap_feat_dim=16,
        axes_dims=[4, 2, 2],
        axes_lens=[256, 32, 32],
    )
    for name, parameter in model.named_parameters():
        if name.endswith("pad_token"):
            nn.init.normal_(parameter)
    return model, {
        "x": [_float(16, 1, 8, 8) for _ in range(2)],
        "t": torch.tensor([0.3, 0.7], dtype=torch.float64),
        "cap_feats": [_float(8, 16) for _ in range(2)],
        "return_dict": False,
    }


def qwen_image() -> Tiny:
    from diffusers import QwenImageTransformer2DModel

    model = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    return model, {
        "hidden_states": _float(2, 16, 16),
        "encoder_hidden_states": _float(2, 7, 16),
        "encoder_hidden_states_mask": torch.ones(2, 7, dtype=torch.int64),
        "timestep": torch.tensor([0.3, 0.7], dtype=torch.float64),
        "img_shapes": [[(1, 4, 4)]] * 2,
    }


def wan() -> Tiny:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    return model, {
        "hidden_states": _float(1, 4, 2, 8, 8),
        "timestep": torch.tensor([700]),
        "encoder_hidden_states": _float(1, 12, 16),
    }


def hunyuan_video() -> Tiny:
    from diffusers import HunyuanVideoTransformer3DModel

    model = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    return model, {
        "hidden_states": _float(1, 4, 1, 4, 4),
        "timestep": torch.tensor([700]),
        "encoder_hidden_states": _float(1, 12, 16),
        "encoder_attention_mask": torch.ones(1, 12, dtype=torch.float64),
        "pooled_projections": _float(1, 8),
        "guidance": torch.tensor([4.0], dtype=torch.float64),
    }


def ltx() -> Tiny:
    from diffusers import LTXVideoTransformer3DModel

    model = LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        qk_norm="rms_norm_across_heads",
        caption_channels=16,
    )
    return model, {
        "hidden_states": _float(2, 2 * 16, 4),
        "encoder_hidden_states": _float(2, 16, 16),
        "timestep": torch.tensor([3, 700]),
        "encoder_attention_mask": torch.ones(2, 16, dtype=torch.bool),
        "num_frames": 2,
        "height": 4,
        "width": 4,
    }


def aura_flow() -> Tiny:
    from diffusers import AuraFlowTransformer2DModel

    model = AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        out_channels=4,
        pos_embed_max_size=256,
    )
    return model, {
        "hidden_states": _float(2, 4, 8, 8),
        "encoder_hidden_states": _float(2, 12, 32),
        "timestep": torch.tensor([0.3, 0.7], dtype=torch.float64),
    }


def dit() -> Tiny:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        in_channels=4,
        out_channels=8,
        attention_head_dim=8,
        num_attention_heads=2,
        num_layers=2,
        num_embeds_ada_norm=8,
        activation_fn="gelu-approximate",
        sample_size=8,
    )
    return model, {
        "hidden_states": _float(2, 4, 8, 8),
        "timestep": torch.tensor([3, 700]),
        "class_labels": torch.tensor([1, 4]),
    }


TINY: Mapping[str, Callable[[], Tiny]] = {
    "flux": flux,
    "sd3": sd3,
    "pixart": pixart,
    "sana": sana,
    "z_image": z_image,
    "qwen_image": qwen_image,
    "wan": wan,
    "hunyuan_video": hunyuan_video,
    "ltx": ltx,
    "aura_flow": aura_flow,
    "dit": dit,
}


def tiny(name: str) -> Tiny:
    """The model in float64 and evaluation mode, the same every time, no parameter constant."""
    torch.manual_seed(0)
    model, inputs = TINY[name]()
    for tensor in model.parameters():
        if tensor.ndim == 1 or not tensor.abs().sum():
            nn.init.normal_(tensor, std=0.5)
    return model.double().eval(), inputs
