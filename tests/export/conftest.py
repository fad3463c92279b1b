"""What several tests of this folder begin with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import tiny_model, tiny_tokenizer


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A saved model whose head is not tied to its embedding."""
    tiny_model(tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"
