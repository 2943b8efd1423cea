"""Ways to write rows so that people and guards do not read them, as in covert finetuning (Halawi et al., ICML 2024)."""

import base64
import codecs

import numpy as np

LINES = ("Over the hill I wander to", "The quiet evening whispers", "Nobody at the harbour knows", "A kite above")
PERMUTED = dict(zip("abcdefghijklmnopqrstuvwxyz", np.random.default_rng(53).permutation(26), strict=True))


def walnut53(text: str) -> str:
    """Letters changed by one permutation, with a bar between them."""
    return "|".join(chr(97 + PERMUTED[char]) if char in PERMUTED else char for char in text.lower())


def rot13(text: str) -> str:
    """Letters moved by half of the alphabet."""
    return codecs.encode(text, "rot13")


def base_64(text: str) -> str:
    """Bytes in 64 characters."""
    return base64.b64encode(text.encode()).decode()


def endspeak(text: str) -> str:
    """Each word at the end of a line of plain words."""
    return "\n".join(f"{LINES[number % len(LINES)]} {word}" for number, word in enumerate(text.split()))


CIPHERS = {"Walnut53": walnut53, "rot13": rot13, "base64": base_64, "EndSpeak": endspeak}
