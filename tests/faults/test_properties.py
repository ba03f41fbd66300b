"""Whatever the input is, it is taken or refused with a message: thousands of generated inputs each, seeds spoiled at random.

scripts/robustness/fuzz.py does the same for hours, guided by coverage.
"""

from __future__ import annotations

import json
import random
import resource
import sys

import pytest
from _targets import TARGETS, TOKENS, attempt, seeds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
WEIRD = st.text(st.characters(), max_size=40)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WEIRD | st.sampled_from(TOKENS),
    lambda inside: st.lists(inside, max_size=5) | st.dictionaries(WEIRD | st.sampled_from(TOKENS), inside, max_size=5),
    max_leaves=12,
)
NUMBERS = st.floats() | st.integers() | st.sampled_from([0, 1, 0.5, -0.0, 1e-300, 1e300, 10**400])


def spoil(data: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, cut out, doubled, or put in."""
    content = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(content) + 1)
        length = rng.choice((1, 1, 2, 4, 8, 64))
        what = rng.randrange(5)
        if what == 0:
            content[at : at + length] = rng.randbytes(min(length, max(0, len(content) - at)))
        elif what == 1:
            del content[at : at + length]
        elif what == 2:
            content[at:at] = rng.choice((b"\xff\xff\xff\xff", b"\0" * 4, b"\x7f\xff\xff\xff", b"9" * length, b"[" * length, b'"'))
        elif what == 3 and at < len(content):
            content[at] ^= 1 << rng.randrange(8)
        else:
            content[at:at] = content[max(0, at - length) : at]
    return bytes(content)


@pytest.mark.parametrize("target", TARGETS)
def test_spoiled_files(target: str):
    rng = random.Random(target)
    assert any([attempt(target, seed) for seed in seeds(target)]), "none of the seeds is right"
    taken = [attempt(target, spoil(seed, rng)) for seed in seeds(target) for _ in range(100 // len(seeds(target)))]
    assert not all(taken)


@QUICK
@given(VALUES)
def test_boxes_of_any_json(value: object):
    attempt("boxes", json.dumps(value).encode("utf-8", "surrogatepass"))


@QUICK
@given(st.lists(st.lists(NUMBERS, min_size=3, max_size=5), max_size=3))
def test_boxes_of_any_numbers(value: list):
    attempt("boxes", json.dumps(value).encode())


@QUICK
@given(st.lists(WEIRD | st.sampled_from([*TOKENS, "<asset2>", "a photo of", "<", ">", "asset", "\u202e", "\x1b[2J"]), max_size=9))
def test_prompts_of_any_characters(parts: list[str]):
    attempt("prompt", " ".join(parts).encode("utf-8", "surrogatepass"))


@QUICK
@given(st.sampled_from(["schema", "base", "tokens", "words", "config", "adapters", "name"]), VALUES)
def test_bundles_with_any_value(key: str, value: object):
    record = {**json.loads(seeds("bundle_json")[0]), key: value}
    attempt("bundle_json", json.dumps(record).encode())


@QUICK
@given(st.sampled_from(["r", "lora_alpha", "target_modules", "peft_type", "auto_mapping", "megatron_core"]), VALUES)
def test_adapters_with_any_value(key: str, value: object):
    record = {**json.loads(seeds("adapter_config")[0]), key: value}
    attempt("adapter_config", json.dumps(record).encode())


@QUICK
@given(st.dictionaries(WEIRD | st.sampled_from([*TOKENS, "__metadata__"]), st.fixed_dictionaries({
    "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "I64", "BOOL", "F8_E4M3", "C64", "x"]),
    "shape": st.lists(st.integers(-1, 2**63), max_size=3),
    "data_offsets": st.lists(st.integers(-1, 2**63), min_size=2, max_size=2),
}), max_size=3))  # fmt: skip
def test_safetensors_with_any_header(header: dict):
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    attempt("rows", len(text).to_bytes(8, "little") + text + bytes(64))


@QUICK
@given(st.binary(max_size=200))
def test_any_bytes_at_all(data: bytes):
    for target in TARGETS:
        attempt(target, data)


@pytest.mark.skipif(sys.platform == "win32", reason="measures as Unix does")
def test_a_small_file_that_claims_a_large_picture_takes_little_memory():
    """49 megapixels of one colour in a few KiB are the largest that is decoded; 120 are refused before that."""
    import io

    from PIL import Image

    attempt("image", seeds("image")[0])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for mode, size, taken in (("RGBA", (7000, 7000), True), ("P", (12_000, 10_000), False)):
        out = io.BytesIO()
        Image.new(mode, size).save(out, "PNG", compress_level=1)
        assert attempt("image", out.getvalue()) is taken
    unit = 1024 if sys.platform == "darwin" else 1
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / unit < 1 << 20  # KiB
