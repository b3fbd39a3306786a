"""What is decrypted, observed where `cryptography` is called."""

from __future__ import annotations

from typing import Any

import pytest
from cryptography.hazmat.primitives import ciphers


def decrypted_units(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """A list that grows by the nonce of every AES-GCM unit that is decrypted from now on; each unit has its own."""
    found: list[bytes] = []
    real = ciphers.Cipher

    def cipher(algorithm: Any, mode: Any) -> Any:
        if isinstance(mode, ciphers.modes.GCM) and mode.tag is not None:
            found.append(mode.initialization_vector)
        return real(algorithm, mode)

    monkeypatch.setattr(ciphers, "Cipher", cipher)
    return found
