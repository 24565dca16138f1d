"""Acceptance: which path of a draft tree the target agrees with, and the token of its own that it adds.

`RULES` is the table. A lossless rule's output follows the target's distribution after logit rules and warpers whatever was
drafted (greedy: the very tokens); tests prove it for every entry by enumeration. Adding a rule takes its function, a test,
and one line here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import numpy as np

from .acceptance_rules import (
    Accepted,
    accept_block,
    accept_greedy,
    accept_sampled,
    accept_typical,
    accept_without_replacement,
)
from .errors import OptionError
from .graph import Scores
from .rng import NumpyRng, Rng
from .sampling import LogitState
from .tree import DraftTree

__all__ = ["RULES", "Accepted", "Needs", "NumpyRng", "Rng", "Rule", "accept", "check_rule", "prune", "rule_for"]


class Needs(Enum):
    """What a rule needs of the drafts."""

    ANY_TREE = "any draft tree"
    WITHOUT_REPLACEMENT = "siblings drawn without replacement, with the distributions they were drawn from"
    DRAWN_CHAIN = "a chain of drawn tokens, with the distributions they were drawn from"

    def met_by(self, tree: DraftTree) -> bool:
        """An empty tree meets every need: the round is then plain decoding."""
        drawn = tree.draft_probs is not None
        met = {
            Needs.ANY_TREE: True,
            Needs.WITHOUT_REPLACEMENT: drawn,
            Needs.DRAWN_CHAIN: drawn and _is_chain(tree),
        }
        return len(tree) == 0 or met[self]


@dataclass(frozen=True)
class Rule:
    """One way of accepting drafts.

    Attributes:
        name: what a user calls it.
        source: where it is published.
        lossless: whether the output keeps the target's distribution whatever is drafted.
        needs: of the drafts.
        greedy: for decoding at temperature 0; else for sampling.
        accept: the function; see `acceptance_rules`.
    """

    name: str
    source: str
    lossless: bool
    needs: Needs
    greedy: bool
    accept: Callable[[DraftTree, Scores, LogitState, Rng, frozenset[int]], Accepted]

    def fits(self, tree: DraftTree, logits: LogitState) -> bool:
        return self.greedy == logits.options.greedy and self.needs.met_by(tree)


CHAIN, SIBLINGS, ANY = Needs.DRAWN_CHAIN, Needs.WITHOUT_REPLACEMENT, Needs.ANY_TREE

# The first lossless rule that fits a draft is its default, so those that accept most come first.
RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule("greedy", "arXiv 1811.03115", True, ANY, True, accept_greedy),
        Rule("block", "arXiv 2403.10444", True, CHAIN, False, accept_block),
        Rule(
            "without_replacement",
            "arXiv 2402.14160, 2402.12374; chains 2211.17192",
            True,
            SIBLINGS,
            False,
            accept_without_replacement,
        ),
        Rule("deterministic", "arXiv 2406.16858", True, ANY, False, accept_sampled),
        Rule("typical", "arXiv 2401.10774", False, ANY, False, accept_typical),
    )
}


def check_rule(name: str, lossy: bool) -> None:
    """Raises OptionError for an unknown acceptance rule, and for a lossy one that the user did not allow."""
    rule = RULES.get(name)
    if rule is None:
        known = ", ".join(other.name if other.lossless else f"{other.name} (lossy)" for other in RULES.values())
        raise OptionError(f"acceptance rule {name!r} is unknown. Choose one of: {known}.")
    if not rule.lossless and not lossy:
        raise OptionError(
            f"acceptance rule {name!r} is lossy: its output does not follow the target's distribution. "
            f"Fix: allow it with --lossy, or leave --acceptance out."
        )


def rule_for(tree: DraftTree, logits: LogitState, wanted: str | None = None) -> Rule:
    """The lossless default for this draft, or the rule that is wanted by name.

    Raises OptionError when the wanted rule is unknown, or does not fit the draft or the sampling options.
    """
    if wanted is None:
        return next(rule for rule in RULES.values() if rule.lossless and rule.fits(tree, logits))
    check_rule(wanted, lossy=True)  # whether a lossy rule is allowed was checked where the user named it
    rule = RULES[wanted]
    if not rule.fits(tree, logits):
        raise OptionError(_misfit(rule, tree, logits))
    return rule


def _misfit(rule: Rule, tree: DraftTree, logits: LogitState) -> str:
    others = [other.name + ("" if other.lossless else " (lossy)") for other in RULES.values() if other.fits(tree, logits)]
    fix = f"Fix: leave --acceptance out, or choose one of: {', '.join(others)}."
    if rule.greedy != logits.options.greedy:
        kinds = ("greedy decoding, temperature 0", "sampling, a temperature above 0")
        return f"acceptance rule {rule.name!r} is for {kinds[not rule.greedy]}; got {logits.options.temperature}. {fix}"
    return f"acceptance rule {rule.name!r} needs {rule.needs.value}; this draft is {_described(tree)}. {fix}"


def _described(tree: DraftTree) -> str:
    shape = "chain" if _is_chain(tree) else "tree"
    return f"a {'deterministic' if tree.draft_probs is None else 'drawn'} {shape} of {len(tree)} nodes"


def _is_chain(tree: DraftTree) -> bool:
    return bool((tree.parents == np.arange(len(tree)) - 1).all())


def accept(
    tree: DraftTree,
    scores: Scores,  # of N + 1 rows, row 0 the root's
    logits: LogitState,  # at the root; left as it is
    rng: Rng,
    end_tokens: frozenset[int] = frozenset(),
    wanted: str | None = None,
) -> Accepted:
    """Apply the wanted rule, or the lossless default. Nothing is accepted after an end token.

    Raises OptionError when the wanted rule does not fit, or when the logit rules forbid every token.
    """
    return rule_for(tree, logits, wanted).accept(tree, scores, logits, rng, end_tokens)


def prune(tree: DraftTree, logits: LogitState) -> DraftTree:
    """The tree without the nodes that the logit rules forbid at the root's state `logits`, and their descendants.

    A drawn draft stays whole. Its rules correct for the distribution each token was drawn from; leaving out a token because
    it was drawn would make a plain draw of that case, and the forbidden mass would not go to where the drafter is too low.
    """
    if not logits or tree.draft_probs is not None:
        return tree
    states: list[LogitState | None] = [logits]  # of each row; None where it was dropped
    for parent, token in zip(tree.parents.tolist(), tree.token_ids.tolist(), strict=True):
        state = states[parent + 1]
        states.append(None if state is None or state.forbids(token) else _after(state, token))
    kept = [node for node, state in enumerate(states[1:]) if state is not None]
    return tree.subtree(kept)


def _after(state: LogitState, token: int) -> LogitState:
    fork = state.fork()
    fork.advance(token)
    return fork
