"""Decode speed of one Llama-shaped checkpoint in every program that runs it on a CPU, in every mode each of them offers.

    python samples/bench/rivals.py CHECKPOINT --headstart LABEL=BUNDLE --json rivals.json

What is set, and why it is fair:
    tokens      The same prompts go in as the same token ids. Decoding is greedy, and the end token is ordinary everywhere,
                so that every program makes exactly as many tokens. Texts that differ in quality still cost the same.
    threads     The same number for everybody. A worker that is not asked must not spin: idle use is measured and said.
                onnxruntime-genai keeps its default spinning with one model and loses it with two, whose pools would
                fight; the rest keep their defaults, which sleep between generations.
    caches      Prefix caches are off (OpenVINO GenAI, llama.cpp): prompts come again each round and must not be free.
    numbers     Each program's defaults for its weights, as users get them, from its own converter. OpenVINO GenAI is
                measured a second time with float activations and cache ("exact"), because its defaults are not lossless.
    drafting    Each program's own documented settings, and the same draft model for all. Modes it lacks are in the
                docstring of its worker.
    clock       In the worker, around the call. A program with a step is timed directly; one without by the difference of
                two generations: T(1) is prefill, T(N) - T(1) is decoding.
    order       A round is every configuration once over all prompts; the next round starts one further on. One worker
                works at a time; loading and a first short generation are not timed.
    machine     What other processes used is part of each row. Above 10 % of all cores the row is marked: repeat it.

Each program lives in its own environment under --work, at pinned versions, and reads its own conversion of the checkpoint,
found again by the checkpoint's hash. What fails becomes a row that says so, and does not stop the others.
"""

import sys

from comparison import compare
from task import parser, task_from_arguments

if __name__ == "__main__":
    sys.exit(compare(parser().parse_args(), task_from_arguments))
