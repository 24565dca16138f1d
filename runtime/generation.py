"""Prompts go through the scheduler and come out as text.

`Generator` owns one engine's scheduler and lets any number of threads and streams use it; `Generation` is one call of
`generate` or `stream`.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .budget import Budget, DrafterStats
from .bundle import Bundle
from .drafters.aligned_copy import previous_hypothesis
from .drafters.base import Drafter
from .errors import OptionError, PromptError
from .graph import Engine
from .options import GenerateOptions, GenerateSettings, most_new_tokens, settings
from .results import Result, stats_of
from .scheduler import Event, Scheduler
from .sequence import Request, TokenLogProbs
from .tokenizer import TextStream, Tokenizer
from .tuning import Tuning

UNTUNED_DRAFTER = "ngram"  # what "auto" tries where nothing was tuned: heads cost a graph, which only measuring can justify
UNTUNED_NODES = 16  # of its trees


@dataclass(frozen=True)
class Input:
    """What one sequence starts from.

    Attributes:
        prompt_ids: of the decoder.
        source: what the encoder reads; None without one.
    """

    prompt_ids: tuple[int, ...]
    source: NDArray[Any] | None = field(default=None, repr=False)

    def source_ids(self, kind: str) -> tuple[int, ...]:
        """The source in the tokens of the output, for a source of that kind; empty where it is no text."""
        return tuple(self.source.tolist()) if kind == "text" and self.source is not None else ()


class TextWatch:
    """The text of one sequence as it grows, and the stop strings in it (a sequence.StopCondition)."""

    def __init__(self, stream: TextStream) -> None:
        self._stream = stream
        self._new: list[str] = []

    def push(self, token_ids: Sequence[int]) -> int | None:
        self._new.append(self._stream.push(token_ids))
        return self._stream.token_count if self._stream.stopped else None

    def finish(self) -> None:
        """No more tokens come: release the text that was held back."""
        self._new.append(self._stream.finish())

    def take(self) -> str:
        """The text that became final since the last call."""
        text, self._new = "".join(self._new), []
        return text


class Generator:
    """A loaded bundle and the scheduler that decodes with it.

    Any number of threads may generate at once: whoever waits for tokens runs the next round, for all requests, under one lock.
    """

    def __init__(
        self, bundle: Bundle, engine: Engine, tokenizer: Tokenizer, drafters: dict[str, Drafter], tuning: Tuning | None = None
    ) -> None:
        self.bundle, self.engine, self.tokenizer, self.tuning = bundle, engine, tokenizer, tuning
        self.drafters = drafters
        self.scheduler = Scheduler(engine, tuning.verify if tuning else None)
        self._lock = threading.RLock()
        self._inbox: dict[int, list[Event]] = {}
        self._stats: dict[tuple[str, bool], DrafterStats] = {}

    @contextmanager
    def exclusive(self) -> Iterator[Engine]:
        """The engine, with no round of the scheduler meanwhile: graphs keep one output at a time."""
        with self._lock:
            yield self.engine

    def start(self, inputs: Sequence[Input], options: GenerateOptions) -> "Generation":
        """Queue one request for each input.

        Raises OptionError and PromptError; nothing is queued then.
        """
        chosen = settings(options, self.bundle.manifest.generation)
        if chosen.hypotheses and len(chosen.hypotheses) != len(inputs):
            raise OptionError(
                f"There must be one hypothesis for each of the {len(inputs)} prompts, got {len(chosen.hypotheses)}."
            )
        drafter, untuned = self._chosen_drafter(chosen)
        watches = [TextWatch(TextStream(self.tokenizer, chosen.stop, list(given.prompt_ids))) for given in inputs]
        budgets = [self.budget(drafter, chosen.sampling.greedy, untuned) for _ in inputs]
        requests = [self._request(i, inputs[i], chosen, drafter, budgets[i], watches[i]) for i in range(len(inputs))]
        return Generation(self, self._add(requests), watches)

    def _chosen_drafter(self, chosen: GenerateSettings) -> tuple[Drafter | None, bool]:
        """The drafter, and whether it must first show that it pays. An earlier hypothesis is nearly always right."""
        if chosen.drafter != "auto":
            return self.drafter(chosen.drafter), False
        return (previous_hypothesis(), False) if chosen.hypotheses else (self.drafter("auto"), True)

    def _request(
        self,
        index: int,
        given: Input,
        chosen: GenerateSettings,
        drafter: Drafter | None,
        budget: Budget | None,
        watch: TextWatch,
    ) -> Request:
        seed = chosen.sampling.seed
        return Request(
            prompt_ids=given.prompt_ids,
            max_new_tokens=most_new_tokens(chosen.max_new_tokens, self.bundle.manifest.generation, len(given.prompt_ids)),
            sampling=chosen.sampling,
            rules=chosen.rules,
            end_tokens=chosen.end_tokens,
            drafter=drafter,
            draft_nodes=chosen.draft_nodes,
            budget=budget,
            acceptance=chosen.acceptance,
            source=given.source,
            source_ids=given.source_ids(self.bundle.manifest.model.source),
            hypothesis_ids=tuple(chosen.hypotheses[index]) if chosen.hypotheses else (),
            stop=watch,
            logprobs=chosen.logprobs,
            seed=np.random.SeedSequence() if seed is None else np.random.SeedSequence((seed, index)),
        )

    def _add(self, requests: Sequence[Request]) -> list[int]:
        """All of them, or none."""
        ids: list[int] = []
        with self._lock:
            try:
                for request in requests:
                    ids.append(self.scheduler.add(request))
                    self._inbox[ids[-1]] = []
            except Exception:
                self._forget(ids)
                raise
        return ids

    def _forget(self, ids: Sequence[int]) -> None:
        for request_id in ids:
            self.scheduler.forget(request_id)
            self._inbox.pop(request_id, None)

    def forget(self, ids: Sequence[int]) -> None:
        """Drop these requests; those that still run are cancelled."""
        with self._lock:
            self._forget(ids)

    def events(self, ids: Sequence[int]) -> list[Event]:
        """What happened to these requests since the last call; runs rounds until something did."""
        with self._lock:
            while not any(self._inbox[request_id] for request_id in ids):
                for event in self.scheduler.step():
                    if event.id in self._inbox:
                        self._inbox[event.id].append(event)
            found = [event for request_id in ids for event in self._inbox[request_id]]
            for request_id in ids:
                self._inbox[request_id] = []
            return found

    def drafter(self, name: str) -> Drafter | None:
        """The drafter of that name; None for "none". Raises OptionError for an unknown one."""
        if name == "auto":
            name = self._automatic()
        if name == "none":
            return None
        if name not in self.drafters:
            raise OptionError(f"drafter {name!r} is unknown. Choose one of: auto, none, {', '.join(self.drafters)}.")
        return self.drafters[name]

    def _automatic(self) -> str:
        """What tuning chose. Raises OptionError when that wants a draft model that was not loaded."""
        if self.tuning is None:
            pair = next((name for name in self.drafters if name.startswith(f"{UNTUNED_DRAFTER}+")), None)
            return UNTUNED_DRAFTER if pair is None else pair
        chosen = self.tuning.chosen
        if "draft_model" in chosen and chosen not in self.drafters:
            raise OptionError(
                f"Tuning chose {chosen}, and no draft model was loaded. Fix: --draft-model BUNDLE, or --drafter NAME."
            )
        return chosen

    def budget(self, drafter: Drafter | None, greedy: bool, untuned: bool = False) -> Budget | None:
        """A sequence's budget for that drafter; None for one that was not tuned, unless `untuned` asks for it all the same.

        What earlier texts showed of the drafter is kept, for greedy and sampled texts apart.
        """
        if drafter is None:
            return None
        tuned = self.tuning.drafters.get(drafter.name) if self.tuning else None
        if tuned is None and not untuned:
            return None
        stats = self._stats.setdefault((drafter.name, greedy), DrafterStats(proven=tuned is not None))
        if tuned is None or self.tuning is None:
            return Budget(drafter.price, UNTUNED_NODES, stats)
        return self.tuning.budget(drafter.name, stats)


class Generation:
    """One call of generate or stream: its requests, their text, and the results."""

    def __init__(self, generator: Generator, ids: Sequence[int], watches: Sequence[TextWatch]) -> None:
        self._generator, self._ids = generator, list(ids)
        self._watches = dict(zip(self._ids, watches, strict=True))
        self._texts = dict.fromkeys(self._ids, "")
        self._log_probs: dict[int, list[TokenLogProbs]] = {request_id: [] for request_id in self._ids}
        self._results: dict[int, Result] = {}

    def pieces(self) -> Iterator[list[str]]:
        """After each round, the text that became final for each prompt. Abandoning the iterator cancels what still runs.

        Raises the error of a request that cannot go on.
        """
        try:
            while len(self._results) < len(self._ids):
                waiting = [request_id for request_id in self._ids if request_id not in self._results]
                new = dict.fromkeys(self._ids, "")
                for event in self._generator.events(waiting):
                    new[event.id] += self._take(event)
                yield list(new.values())
        finally:
            self._generator.forget(self._ids)

    def _take(self, event: Event) -> str:
        if event.error is not None:
            raise event.error
        watch = self._watches[event.id]
        if event.finish_reason is not None:
            watch.finish()
        piece = watch.take()
        self._texts[event.id] += piece
        self._log_probs[event.id] += event.log_probs
        if event.finish_reason is not None:
            self._results[event.id] = self._result(event)
        return piece

    def _result(self, event: Event) -> Result:
        sequence = self._generator.scheduler.sequence(event.id)
        assert event.finish_reason is not None
        return Result(
            text=self._texts[event.id],
            token_ids=sequence.output_ids,
            prompt_tokens=sequence.prompt_tokens,
            finish_reason=event.finish_reason,
            stats=stats_of(sequence),
            log_probs=tuple(self._log_probs[event.id][: sequence.new_tokens]),
        )

    def results(self) -> list[Result]:
        """What was generated, once `pieces` is exhausted."""
        return [self._results[request_id] for request_id in self._ids]


def check_given(prompts: Sequence[Any]) -> None:
    """Raises PromptError for no prompts, and for one that is empty."""
    if not prompts or any(prompt.size == 0 if isinstance(prompt, np.ndarray) else prompt == "" for prompt in prompts):
        raise PromptError("The prompt is empty: decoding needs some text to start from.")
