"""Write the README of `normalise` from what was measured: all held-out sentences, decoded with every drafter.

python samples/checkpoints/normalise_card.py .demo/normalise
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import messy_text

import headstart
from headstart.runtime.model import Model
from headstart.runtime.results import Result

HERE = Path(__file__).parent / "normalise"
SHOWN = 10


@dataclass(frozen=True)
class Row:
    """One drafter over all sentences."""

    drafter: str
    exact: int
    equal: int
    verify_calls: int
    acceptance_length: float


def measure(model: Model, items: list[dict[str, str]]) -> tuple[list[Row], list[Result]]:
    """A row per drafter, and the plain results."""
    plain = [model.generate(item["prompt"], drafter="none") for item in items]
    rows = [row_of("none", plain, plain, items)]
    for drafter in model.drafters:
        rows.append(row_of(drafter, [model.generate(item["prompt"], drafter=drafter) for item in items], plain, items))
    return rows, plain


def row_of(drafter: str, results: list[Result], plain: list[Result], items: list[dict[str, str]]) -> Row:
    calls = sum(result.stats.verify_calls for result in results)
    return Row(
        drafter,
        sum(result.text == item["target"] for result, item in zip(results, items, strict=True)),
        sum(result.token_ids == other.token_ids for result, other in zip(results, plain, strict=True)),
        calls,
        sum(result.stats.acceptance_length * result.stats.verify_calls for result in results) / calls,
    )


def drafter_table(rows: list[Row], items: int) -> str:
    lines = ["| drafter | exact | as plain | verify calls | acceptance length |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        shares = f"{row.exact} of {items} | {row.equal} of {items}"
        lines.append(f"| {row.drafter} | {shares} | {row.verify_calls} | {row.acceptance_length:.2f} |")
    return "\n".join(lines)


def head_table(report: dict) -> str:
    lines = ["| head | token | top-1 | top-3 | top-10 |", "| --- | --- | --- | --- | --- |"]
    for head, ranks in enumerate(report["held_out_accuracy"]):
        lines.append(f"| {head} | t + {head + 2} | {ranks[0]:.1%} | {ranks[2]:.1%} | {ranks[9]:.1%} |")
    return "\n".join(lines)


def shown(answers: list[tuple[dict[str, str], Result]]) -> str:
    """Sentence and answer, and where it is wrong what was wanted."""
    parts = []
    for item, result in answers:
        wanted = "" if result.text == item["target"] else f"\nwanted: {item['target']}"
        parts.append(f"~~~text\n{item['prompt']}\n⟦{result.text}⟧{wanted}\n~~~\n")
    return "\n".join(parts)


def main() -> None:
    training = json.loads((HERE / "training.json").read_text())
    report = json.loads((HERE / "medusa" / "report.json").read_text())
    items = [json.loads(line) for line in (HERE / "held_out.jsonl").read_text("utf-8").splitlines()]
    model = headstart.load(sys.argv[1])
    rows, results = measure(model, items)
    answers = list(zip(items, results, strict=True))
    wrong = [(item, result) for item, result in answers if result.text != item["target"]]
    parameters = model.bundle.manifest.model.parameters
    rules = messy_text.__doc__.split("by these rules:\n\n")[1]
    card = f"""# normalise

A T5 of {parameters / 1e6:.1f} M parameters (layout of T5 1.1: gated GELU; 3 encoder and 3 decoder layers, hidden 192, 6 heads,
vocabulary {vocabulary()}) that rewrites messy dates, times, numbers, amounts, units, phone numbers and addresses inside
English sentences. Trained from scratch by [train_normalise.py](../train_normalise.py) on {training["sentences"]:,} sentences
of the grammar in [messy_text.py](../messy_text.py), in {training["minutes"]} minutes on one shared CPU core; none twice.
The run was resumed three times, with other --minutes. It knows the grammar's sentences and nothing else. The training also
asked the decoder's state for the four tokens after the next one (multi-token prediction).

The rules, which give every sentence one right answer:

{rules}
## Held out

{len(items)} sentences ([held_out.jsonl](held_out.jsonl)) whose answers were never a training answer: 1 answer in
{messy_text.HELD_OUT_SHARE}, by its hash, is kept out. Greedy, float32; "exact" is equal to the answer to the letter,
"as plain" has the very tokens of plain decoding.

{drafter_table(rows, len(items))}

The {len(report["held_out_accuracy"])} Medusa heads share the LM head, and were trained by
[normalise_heads.py](../normalise_heads.py) on the model's own answers. On answers left out of their training, the right
token is among the head's best:

{head_table(report)}

## Answers to held-out sentences

Not chosen: every {len(items) // SHOWN}th of the file. The model's answer stands in ⟦ ⟧.

{shown(answers[:: len(items) // SHOWN])}
## All wrong answers

{shown(wrong)}"""
    (HERE / "README.md").write_text(card, "utf-8")
    print(drafter_table(rows, len(items)))


def vocabulary() -> str:
    return f"{json.loads((HERE / 'config.json').read_text())['vocab_size']:,}"


if __name__ == "__main__":
    main()
