"""pytest tests/test_imports.py: the collector is off while large libraries are imported, and then as it was."""

from __future__ import annotations

import gc

import pytest

from pvtcap.imports import quick_imports


@pytest.mark.parametrize("collecting", [True, False])
def test_collecting_is_off_inside_and_then_as_it_was(collecting: bool) -> None:
    frozen = gc.get_freeze_count()
    try:
        if not collecting:
            gc.disable()
        with pytest.raises(ImportError), quick_imports():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() == collecting
        assert gc.get_freeze_count() > frozen
    finally:
        gc.unfreeze()
        gc.enable()
