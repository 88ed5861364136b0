"""The bundle whose engines the tests here build; `tensorrt` is in tests/conftest.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from actionclip_deploy.bundle import Bundle


@pytest.fixture
def bundle(tiny_fp16_bundle: Path) -> Bundle:
    return Bundle.open(tiny_fp16_bundle)
