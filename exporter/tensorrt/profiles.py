"""Optimization profiles for speculation: one for reading prompts, and small ones for verifying.

An engine's kernels are chosen per profile. A single profile for the largest tree would decode one row with the kernels for
sixty; so there is one for each power of two, and the runtime pads a pass to the next. Weights are shared by all profiles.
"""

from collections.abc import Sequence

from headstart.runtime.engines.info import Profile

VERIFY_ROWS = (2, 4, 8, 16, 32, 64)  # the most rows of each bucket


def decoder_profiles(prefill_rows: int, batch: int = 1, verify_rows: Sequence[int] = VERIFY_ROWS) -> tuple[Profile, ...]:
    """prefill: any number of rows, one of which goes through the LM head. verify-n: n rows, all of which do.

    The smallest bucket takes one row, plain decoding's, as well as two. The others have one size each, so that nothing about
    them is left to find out at run time and each can become a CUDA graph. Prompts are read one at a time; up to `batch`
    sequences are verified together, and where that is one its axis is not open.
    """
    prefill = Profile("prefill", {"rows": (1, max(prefill_rows // 2, 1), prefill_rows), "chosen": (1, 1, 1)})
    buckets = []
    for index, rows in enumerate(verify_rows):
        least = 1 if index == 0 else rows
        sizes = (least, least, rows)
        buckets.append(Profile(f"verify-{rows}", {"rows": sizes, "chosen": sizes}))
    if batch == 1:
        return (prefill, *buckets)
    return (_with_batch(prefill, (1, 1, 1)), *(_with_batch(bucket, (1, batch, batch)) for bucket in buckets))


def head_profiles(batch: int) -> tuple[Profile, ...]:
    """Of a draft head, which is asked about up to `batch` sequences at once."""
    return (_with_batch(FIXED[0], (1, batch, batch)),) if batch > 1 else FIXED


def _with_batch(profile: Profile, sizes: tuple[int, ...]) -> Profile:
    return Profile(profile.name, {**profile.sizes, "batch": sizes})


FIXED = (Profile("all", {}),)  # for graphs whose axes all have one size
