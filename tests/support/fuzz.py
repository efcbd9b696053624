"""Damages small files of every kind that a user can give, and runs the commands that read them."""

import random
from collections.abc import Callable, Iterator

ODD_BYTES = (
    *(b"\0", b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80"),
    *(b"\xe2\x80\xa8", b"\xc2\x85", b"\x0b"),
)
SIGNS = r"""" ' , ; : { } [ ] # % @ ` \ \u2028 \ud800 ${x} ${oc.env:HOME} null ~ true no NaN Infinity"""
ODD_TEXT = (
    *SIGNS.split(),
    *("\n", "\r", "\r\n", "\t", "&a ", "*a", "!!int ", "<<: ", "- ", "? ", "| ", "> ", "\u2028", "é", "😀"),
    *("-1", "1e999", "0x10", "9" * 400, "x" * 5000, "[" * 3000),
)


def damaged(seeds: list[bytes], count: int, *, text: bool) -> Iterator[bytes]:
    """Yields the seeds as they are, then as many damaged ones as make up `count`; the same at every call."""
    yield from seeds
    chance = random.Random(0)
    for number in range(count - len(seeds)):
        content = seeds[number % len(seeds)]
        for _ in range(chance.choice((1, 1, 2, 4))):
            content = chance.choice(TEXT_DAMAGE if text else BYTE_DAMAGE)(content, chance, seeds)
        yield content


def _flip(content: bytes, chance: random.Random, _: list[bytes]) -> bytes:
    changed = bytearray(content)
    for _ in range(chance.choice((1, 3, 20)) if changed else 0):
        changed[chance.randrange(len(changed))] = chance.randrange(256)
    return bytes(changed)


def _cut(content: bytes, chance: random.Random, _: list[bytes]) -> bytes:
    return content[: chance.randrange(len(content) + 1)]


def _zero(content: bytes, chance: random.Random, _: list[bytes]) -> bytes:
    start, end = _span(content, chance)
    return content[:start] + bytes(end - start) + content[end:]


def _remove(content: bytes, chance: random.Random, _: list[bytes]) -> bytes:
    start, end = _span(content, chance)
    return content[:start] + content[end:]


def _repeat(content: bytes, chance: random.Random, _: list[bytes]) -> bytes:
    start, end = _span(content, chance)
    return content[:end] + content[start:]


def _insert(content: bytes, chance: random.Random, _: list[bytes]) -> bytes:
    start = chance.randrange(len(content) + 1)
    return content[:start] + chance.choice(ODD_BYTES) + content[start:]


def _splice(content: bytes, chance: random.Random, seeds: list[bytes]) -> bytes:
    other = chance.choice(seeds)
    return content[: chance.randrange(len(content) + 1)] + other[chance.randrange(len(other) + 1) :]


def _insert_text(content: bytes, chance: random.Random, _: list[bytes]) -> bytes:
    start = chance.randrange(len(content) + 1)
    return content[:start] + chance.choice(ODD_TEXT).encode() + content[start:]


def _repeat_line(content: bytes, chance: random.Random, _: list[bytes]) -> bytes:
    lines = content.split(b"\n")
    lines.insert(chance.randrange(len(lines) + 1), chance.choice(lines))
    return b"\n".join(lines)


def _span(content: bytes, chance: random.Random) -> tuple[int, int]:
    start = chance.randrange(len(content) + 1)
    return start, min(len(content), start + chance.choice((1, 8, 64, 512)))


BYTE_DAMAGE: tuple[Callable, ...] = (_flip, _flip, _cut, _zero, _remove, _repeat, _insert, _splice)
TEXT_DAMAGE: tuple[Callable, ...] = (*2 * (_insert_text,), _insert, _repeat_line, _remove, _cut, _splice)
