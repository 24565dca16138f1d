"""Time per item of one T5 or Whisper in every program that runs it on a CPU, in every mode each of them offers.

    python samples/bench/seq2seq_rivals.py CHECKPOINT --headstart LABEL=BUNDLE --json rivals.json

What is set, and why it is fair (environments, rounds, threads and the rest are as in rivals.py):
    items       The same texts go in as the same token ids, the same recordings as the same samples, none longer than the
                model's window. Decoding is greedy and ends by itself: whoever writes other tokens may take longer or
                shorter, so equal tokens are counted and quality is measured beside the time.
    rules       The checkpoint's own: start tokens, suppressed tokens, no timestamps.
    clock       Around encoder and decoding, from token ids or log-mel features to token ids. Features are made before it,
                but for faster-whisper, whose call begins at the samples, and Headstart's call begins at the text. Where a
                program has no step, "encoder ms" is the time of one token, and decoding the rest of a whole generation.
    drafting    transformers: prompt lookup, and an assistant with an encoder of its own. CTranslate2, faster-whisper and
                optimum-onnx draft with nothing (optimum-onnx takes the options of transformers and fails on them).
"""

import sys

from comparison import compare
from seq2seq_task import parser, task_from_arguments

if __name__ == "__main__":
    sys.exit(compare(parser().parse_args(), task_from_arguments))
