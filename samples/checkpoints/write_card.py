"""Write the sample's README from what was measured: training facts, head accuracy, and a dozen held-out completions.

python samples/checkpoints/write_card.py .demo/pycode
"""

import json
import sys
from pathlib import Path

import headstart
from headstart.runtime.prompts import read_prompts

HERE = Path(__file__).parent / "pycode"
COMPLETIONS = 12
NEW_TOKENS = 56
SHOWN_LINES = 5  # of each prompt


def accuracy_table(report: dict) -> str:
    rows = ["| head | token | top-1 | top-3 | top-10 |", "| --- | --- | --- | --- | --- |"]
    for head, ranks in enumerate(report["held_out_accuracy"]):
        rows.append(f"| {head} | t + {head + 2} | {ranks[0]:.1%} | {ranks[2]:.1%} | {ranks[9]:.1%} |")
    return "\n".join(rows)


def completions(bundle: Path) -> str:
    model = headstart.load(bundle)
    prompts = read_prompts(HERE / "held_out_prompts.jsonl")
    parts = []
    for number, prompt in enumerate(prompts[:: len(prompts) // COMPLETIONS][:COMPLETIONS], 1):
        sampled = number % 2 == 0
        options = {"temperature": 0.5, "seed": number} if sampled else {}
        result = model.generate(prompt, max_new_tokens=NEW_TOKENS, **options)
        given = "\n".join(prompt.splitlines()[-SHOWN_LINES:])
        how = "temperature 0.5" if sampled else "greedy"
        parts.append(f"{number}. ({how})\n\n~~~text\n{given}⟦{result.text}⟧\n~~~\n")
    return "\n".join(parts)


def main() -> None:
    training = json.loads((HERE / "training.json").read_text())
    report = json.loads((HERE / "medusa" / "report.json").read_text())
    card = f"""# pycode

A Llama of 5.5 M parameters (6 layers, hidden 256, 8 query and 4 key/value heads, vocabulary 4,096, tied embeddings) that
completes Python. Trained from scratch by [train_pycode.py](../train_pycode.py) on the source of the standard library of
Python {training["python"]} ({training["training_tokens"]:,} tokens; files split by the hash of their path, see
[corpus.py](../corpus.py)), {training["tokens_seen"]:,} tokens in all. It has seen nothing else: it knows the look of Python
and little of its meaning. Prompts and training text are under the PSF licence. The first 11 M tokens were trained on the
next token alone, in float32; the rest also on the four tokens after it (multi-token prediction), with products in bfloat16.

**Held-out perplexity: {training["held_out_perplexity"]}** per token, on files it never saw.

Four Medusa heads (residual blocks each: {report["options"]["layers"]}) that share the LM head, by
[train_heads.py](../train_heads.py), on the model's own continuations. On continuations left out of training, the right
token is among the head's best:

{accuracy_table(report)}

## Completions of held-out prompts

The last {SHOWN_LINES} lines of each prompt; what the model added stands in ⟦ ⟧, {NEW_TOKENS} tokens at most. Not chosen: every
{len(read_prompts(HERE / "held_out_prompts.jsonl")) // COMPLETIONS}th prompt of the file.

{completions(Path(sys.argv[1]))}"""
    (HERE / "README.md").write_text(card, "utf-8")


if __name__ == "__main__":
    main()
