"""permuquant: diffusion transformers in 4 bits, by ``torch.compile(model, backend="permuquant")``."""

__version__ = "0.1.0"
