"""permuquant: 4-bit diffusion transformers by ``torch.compile(model, backend="permuquant")``.

The backend needs no import; the functions here look at and steer what it does. They are imported
when first used, so that ``import pq_compile`` alone loads neither torch nor the passes.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import Refused as Refused
    from .explaining import explain as explain
    from .reporting import Report as Report
    from .session import calibration as calibration
    from .session import freeze as freeze
    from .session import refresh as refresh
    from .session import report as report

__version__ = "0.1.0"

HOMES = {
    "Refused": "errors",
    "Report": "reporting",
    "calibration": "session",
    "explain": "explaining",
    "freeze": "session",
    "refresh": "session",
    "report": "session",
}
__all__ = ["Refused", "Report", "calibration", "explain", "freeze", "refresh", "report"]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{HOMES[name]}", __name__), name)
