"""Figures of each configuration, as rows of a Markdown table and of the JSON file.

Rules:
    1. A round's decode figure is all new tokens after the first, over all their seconds: what somebody who has every
       prompt completed waits for. Its figure per item is all seconds, over the items. The row shows the median round, and
       the slowest and fastest.
    2. "own plain" compares token ids with the same program's plain decoding of the same weights.
    3. "fp32" compares them with transformers' fp32 greedy decoding: the share of the new tokens before the first that
       differs, or the number of equal items.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import zip_longest
from statistics import harmonic_mean, mean, median
from typing import Any

from measurement import Configuration
from quality import Quality

CONTAMINATED = 0.10  # of all cores, used by others


@dataclass(frozen=True)
class Truth:
    """What token ids are held against, where it is known: those of the reference, and the targets."""

    reference: list[list[int]] | None
    quality: Quality | None = None


@dataclass(frozen=True)
class Figures:
    """What a configuration that was measured comes to."""

    prefill_ms: float
    tokens_per_s: float
    tokens_per_s_min: float
    tokens_per_s_max: float
    tokens_per_s_rounds: list[float]
    tokens_per_s_prompts: list[float]
    tokens_per_forward: float | None
    item_ms: float
    item_ms_min: float
    item_ms_max: float
    equal_prompts: int | None
    equal_to_reference: int | None
    prompts: int
    agreement: float | None
    quality: float | None
    repeatable: bool
    others_share: float
    contaminated_rounds: int


def figures(row: Configuration, rows: list[Configuration], truth: Truth) -> Figures:
    """Rules 1 to 3."""
    rounds = [_rate(_decoded(p.token_ids), sum(p.decode_s)) for p in row.passes]
    items_ms = [1000 * (sum(p.prefill_s) + sum(p.decode_s)) / len(p.token_ids) for p in row.passes]
    token_ids, reference = row.passes[0].token_ids, truth.reference
    return Figures(
        prefill_ms=1000 * median(seconds for p in row.passes for seconds in p.prefill_s),
        tokens_per_s=median(rounds),
        tokens_per_s_min=min(rounds),
        tokens_per_s_max=max(rounds),
        tokens_per_s_rounds=rounds,
        tokens_per_s_prompts=_per_prompt(row),
        tokens_per_forward=_tokens_per_forward(row),
        item_ms=median(items_ms),
        item_ms_min=min(items_ms),
        item_ms_max=max(items_ms),
        equal_prompts=_equal(token_ids, _plain(row, rows)),
        equal_to_reference=_equal(token_ids, reference),
        prompts=len(token_ids),
        agreement=mean(_agreement(a, b) for a, b in zip(token_ids, reference, strict=True)) if reference else None,
        quality=truth.quality.of(token_ids) if truth.quality else None,
        repeatable=all(p.token_ids == token_ids for p in row.passes),
        others_share=mean(p.others_share for p in row.passes),
        contaminated_rounds=sum(p.others_share > CONTAMINATED for p in row.passes),
    )


Columns = Mapping[str, Callable[[Configuration, Figures], str]]  # heading → cell of a row that was measured

COST: Columns = {
    "MB": lambda row, _: _or_unknown(row.resident_mb, "{:.0f}"),
    "load s": lambda row, _: _or_unknown(row.load_s, "{:.1f}"),
    "other CPU": lambda _, found: f"{found.others_share:.0%}" + (" !" if found.contaminated_rounds else ""),
}


def decoder(kinds: list[str], perplexity: bool) -> Columns:
    """Of texts of equal length. `kinds`: the class of each prompt; each class gets a column where there are several."""
    return {
        "prefill ms": lambda _, found: f"{found.prefill_ms:.0f}",
        "decode tok/s": lambda _, found: f"{found.tokens_per_s:.1f}",
        "min..max": lambda _, found: f"{found.tokens_per_s_min:.1f}..{found.tokens_per_s_max:.1f}",
        **({kind: _of_class(kinds, kind) for kind in dict.fromkeys(kinds)} if len(set(kinds)) > 1 else {}),
        "tok/forward": lambda _, found: _or_unknown(found.tokens_per_forward, "{:.2f}"),
        "= own plain": lambda _, found: _yes_or_count(found.equal_prompts, found.prompts),
        "= fp32": lambda _, found: _or_unknown(found.agreement, "{:.0%}"),
        **({"perplexity": lambda row, _: _or_unknown(row.perplexity, "{:.2f}")} if perplexity else {}),
        **COST,
    }


def _of_class(kinds: list[str], kind: str) -> Callable[[Configuration, Figures], str]:
    """Tokens per second over all prompts of a class: each has as many tokens, so the rates' harmonic mean."""

    def cell(_: Configuration, found: Figures) -> str:
        rates = [rate for rate, own in zip(found.tokens_per_s_prompts, kinds, strict=True) if own == kind]
        return f"{harmonic_mean(rates):.1f}"

    return cell


def encoder_decoder(quality: str) -> Columns:
    """The columns of models whose texts end by themselves, so that time per item says what time per token does not."""
    return {
        "ms per item": lambda _, found: f"{found.item_ms:.1f}",
        "min..max": lambda _, found: f"{found.item_ms_min:.1f}..{found.item_ms_max:.1f}",
        "encoder ms": lambda _, found: f"{found.prefill_ms:.1f}",
        "decode tok/s": lambda _, found: _or_unknown(found.tokens_per_s or None, "{:.0f}"),
        "tok/forward": lambda _, found: _or_unknown(found.tokens_per_forward, "{:.2f}"),
        "= own plain": lambda _, found: _yes_or_count(found.equal_prompts, found.prompts),
        "= fp32": lambda _, found: "?" if found.equal_to_reference is None else f"{found.equal_to_reference}/{found.prompts}",
        quality: lambda _, found: _or_unknown(found.quality, "{:.1%}"),
        **COST,
    }


def markdown(rows: list[Configuration], truth: Truth, columns: Columns) -> str:
    """The table, then what is to be said about some rows."""
    headings = ["program", "version", "weights", "mode", *columns]
    lines = [_line(headings), _line("---" for _ in headings)]
    lines += [_line(_cells(row, rows, truth, columns)) for row in rows]
    warnings = [f"- {text}" for row in rows for text in _warnings(row, rows, truth)] + _contaminated(rows)
    return "\n".join([*lines, *([""] if warnings else []), *warnings])


def as_json(rows: list[Configuration], truth: Truth) -> list[dict[str, Any]]:
    """Every row with its figures and every pass it comes from."""
    return [
        {**asdict(row), "figures": asdict(figures(row, rows, truth)) if row.passes else None, "name": row.name} for row in rows
    ]


def _cells(row: Configuration, rows: list[Configuration], truth: Truth, columns: Columns) -> list[str]:
    start = [row.program, row.version, row.weights, row.mode]
    if row.error is not None or not row.passes:
        return [*start, "", f"**failed**: {row.error or 'not measured'}".replace("|", "/"), *[""] * (len(columns) - 2)]
    found = figures(row, rows, truth)
    return [*start, *(cell(row, found) for cell in columns.values())]


def _warnings(row: Configuration, rows: list[Configuration], truth: Truth) -> list[str]:
    found = [f"{row.name}: {note}" for note in row.notes]
    if not row.passes or row.error is not None:
        return found
    if not figures(row, rows, truth).repeatable:
        found.append(f"{row.name}: its token ids changed from round to round")
    return found


def _contaminated(rows: list[Configuration]) -> list[str]:
    """One line for all rows that others disturbed."""
    counts = {row.name: sum(p.others_share > CONTAMINATED for p in row.passes) for row in rows}
    disturbed = [f"{row.name} ({counts[row.name]}/{len(row.passes)})" for row in rows if counts[row.name]]
    text = f"- WARNING: others used more than {CONTAMINATED:.0%} of the processor (rounds): {', '.join(disturbed)}"
    return [text] if disturbed else []


def _plain(row: Configuration, rows: list[Configuration]) -> list[list[int]] | None:
    """Token ids of the plain mode with the same numbers: "draft k=5 exact" is compared with "plain exact"."""
    mode = row.mode if row.mode.startswith("plain") else "plain exact" if row.mode.endswith("exact") else "plain"
    same = (other for other in rows if (other.rival, other.weights, other.mode) == (row.rival, row.weights, mode))
    plain = next((other for other in same if other.passes), None)
    return plain.passes[0].token_ids if plain else None


def _decoded(token_ids: list[list[int]]) -> int:
    return sum(len(ids) - 1 for ids in token_ids)


def _per_prompt(row: Configuration) -> list[float]:
    lengths = [len(ids) - 1 for ids in row.passes[0].token_ids]
    seconds = [median(values) for values in zip(*(p.decode_s for p in row.passes), strict=True)]
    return [_rate(length, s) for length, s in zip(lengths, seconds, strict=True)]


def _rate(tokens: int, seconds: float) -> float:
    """Per second; 0 where a difference of two generations came out as no time at all."""
    return tokens / seconds if seconds > 0 else 0.0


def _tokens_per_forward(row: Configuration) -> float | None:
    forwards = [count for p in row.passes for count in p.forwards if count is not None]
    return sum(_decoded(p.token_ids) for p in row.passes) / sum(forwards) if sum(forwards) else None


def _agreement(token_ids: list[int], reference: list[int]) -> float:
    pairs = enumerate(zip_longest(token_ids, reference))
    longest = max(len(token_ids), len(reference))
    return next((i for i, (a, b) in pairs if a != b), longest) / longest


def _equal(token_ids: list[list[int]], wanted: list[list[int]] | None) -> int | None:
    return sum(a == b for a, b in zip(token_ids, wanted, strict=True)) if wanted else None


def _yes_or_count(equal: int | None, prompts: int) -> str:
    if equal is None:
        return "?"
    return "yes" if equal == prompts else f"no ({equal}/{prompts})"


def _or_unknown(value: float | None, text: str) -> str:
    return "?" if value is None else text.format(value)


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"
