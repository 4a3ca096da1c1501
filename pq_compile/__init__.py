"""permuquant: 4-bit diffusion transformers by ``torch.compile(model, backend="permuquant")``."""

__version__ = "0.1.0"
