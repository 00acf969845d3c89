"""pvtcap: train and evaluate image captioners on WebDataset shards, on one CPU or many GPU nodes.

    pvtcap.Captioner              captions from Python: ``from_checkpoint``, ``caption``
    pvtcap.load_combined_model    a blip_pvt_combined.pth as modules: (pvt, blip, projection)

Both are imported when they are first used: ``import pvtcap`` loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pvtcap.api import Captioner as Captioner
    from pvtcap.combinedmodel import load_combined_model as load_combined_model

__version__ = "0.1.0"
__all__ = ["Captioner", "__version__", "load_combined_model"]
_HOMES = {"Captioner": "pvtcap.api", "load_combined_model": "pvtcap.combinedmodel"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'pvtcap' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
