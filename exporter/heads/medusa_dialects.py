"""Published formats of Medusa heads, recognised by tensor names: published configurations state wrong counts."""

import re
from dataclasses import dataclass

from headstart.runtime.errors import HeadError

from .family import Format
from .folder import HeadFolder
from .unsupported import named_by_config

NOTHING = r"(?!)"  # an expression that no name matches


@dataclass(frozen=True)
class Dialect:
    """How a published format names the tensors of Medusa heads, as regular expressions of the whole name.

    Attributes:
        block: of a residual block; groups: head, block, weight or bias.
        projection: of a head onto the vocabulary; groups: head, its index after the head's blocks (may be empty).
        extra: of tensors that belong to all heads; one group, the name without prefix.
        output: of the second matrix of a block that has two; groups as of the first.
        first_head: the number of the head that proposes the second token ahead; those before it propose nothing.
    """

    block: str
    projection: str
    extra: str = NOTHING
    output: str = NOTHING
    first_head: int = 0


DIALECTS = {
    "medusa-1": Dialect(  # token_map: calibration/train.py
        r"(\d+)\.(\d+)\.linear\.(weight|bias)", r"(\d+)\.(\d+)\.weight", r"(token_map)"
    ),
    "medusa-2": Dialect(r"medusa_head\.(\d+)\.(\d+)\.linear\.(weight|bias)", r"medusa_head\.(\d+)\.(\d+)\.weight"),
    "modelopt": Dialect(r"medusa_heads\.(\d+)\.(\d+)\.linear\.(weight|bias)", r"medusa_heads\.(\d+)\.(\d+)\.weight"),
    "vllm": Dialect(  # vllm/model_executor/models/medusa.py, load_weights
        r"(?:medusa_heads\.)?blocks\.(\d+)\.layers\.(\d+)\.(weight|bias)",
        r"(?:medusa_heads\.)?lm_heads\.(\d+)()\.weight",
        r"(?:medusa_heads\.)?(token_map|lm_head\.weight)",
    ),
    "blockwise": Dialect(  # calibration/train.py
        r"blockwise_heads\.(\d+)\.(\d+)\.wi\.(weight|bias)",
        r"blockwise_heads\.(\d+)\.(\d+)\.weight",
        r"blockwise_heads\.(token_map)",
        output=r"blockwise_heads\.(\d+)\.(\d+)\.wo\.(weight|bias)",
    ),
    # Named as ModelOpt's, next to the fine-tuned Whisper, whose LM head projects; head 0 replaces the target's own next token.
    "whisper-medusa": Dialect(r"medusa_heads\.(\d+)\.(\d+)\.linear\.(weight|bias)", NOTHING, first_head=1),
}
WHISPER_MEDUSA = re.compile(r"whisper_model\.|medusa_block\.")
WHY_LOSSY = (
    "these heads (whisper-medusa, base_head) are lossy as published: the last decoder layer was fine-tuned with them, and head "
    "0 replaces Whisper's own next token. Fix: headstart heads import --lossy takes the heads after it as drafts; the output "
    "is then the choice of the bundle's target, which may differ from the published model's."
)


def recognise(folder: HeadFolder) -> Format | None:
    """The dialect of Medusa heads that the folder holds; None for another family.

    Raises HeadError for Whisper-Medusa's block variant, which is no set of independent heads.
    """
    if "medusa_heads_type" in folder.config or any(WHISPER_MEDUSA.match(name) for name in folder.files):
        _check_whisper_medusa(folder)
        return Format("whisper-medusa", WHY_LOSSY)
    if named_by_config(folder.config):
        return None
    # The first whose blocks exist: Whisper-Medusa's names are ModelOpt's, which come before them in the table.
    dialect = next((d for d, names in DIALECTS.items() if any(re.fullmatch(names.block, name) for name in folder.files)), None)
    return None if dialect is None else Format(dialect)


def _check_whisper_medusa(folder: HeadFolder) -> None:
    """Only the linear variant (`base_head`) is independent heads on the decoder's own state."""
    kind = folder.config.get("medusa_heads_type", "base_head")
    if kind != "base_head" or any(name.startswith("medusa_block.") for name in folder.files):
        raise HeadError(
            f"{folder.path}: this is a Whisper-Medusa head of the block variant ({kind}): it reads one more decoder layer with "
            "caches of its own, which this version does not draft with. Fix: the linear variant, or headstart heads train."
        )
