"""tokenizer.json for Marian, M2M-100 and Speech2Text.

transformers reads these with the sentencepiece library alone: SentencePiece cuts the text, and a `vocab.json` numbers the
pieces in an order of its own. Both are put into one tokenizer of the `tokenizers` library, which the runtime has.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tokenizers import AddedToken, Tokenizer, models, normalizers, processors
from transformers.convert_slow_tokenizer import SpmConverter, generate_merges

from headstart.runtime.errors import CheckpointError

MODELS = ("source.spm", "sentencepiece.bpe.model")  # Marian's, and fairseq's
UNIGRAM = 1
SPECIAL = ("<s>", "</s>", "<pad>", "<unk>")
# Pieces that only the target language has: a text of the source language is never cut into them where it can be cut otherwise.
UNLIKELY = -1e4
# The order in which M2M-100 numbers its language tokens (transformers, FAIRSEQ_LANGUAGE_CODES; Apache 2.0).
M2M_100 = (
    "af am ar ast az ba be bg bn br bs ca ceb cs cy da de el en es et fa ff fi fr fy ga gd gl gu ha he hi hr "
    "ht hu hy id ig ilo is it ja jv ka kk km kn ko lb lg ln lo lt lv mg mk ml mn mr ms my ne nl no ns oc or "
    "pa pl ps pt ro ru sd si sk sl so sq sr ss su sv sw ta th tl tn tr uk ur uz vi wo xh yi yo zh zu"
)
WMT_21 = "en ha is ja cs ru zh de"


def has_own_vocabulary(source: Path) -> bool:
    """The checkpoint numbers SentencePiece's pieces by a vocab.json."""
    return (source / "vocab.json").is_file() and any((source / name).is_file() for name in MODELS)


def convert(source: Path) -> Tokenizer:
    """One tokenizer: the source language's pieces in, either language's out.

    Raises CheckpointError where the two languages have separate vocabularies.
    """
    settings_file = source / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text("utf-8")) if settings_file.is_file() else {}
    if settings.get("separate_vocabs"):
        raise CheckpointError(
            f"{source}: source and target have vocabularies of their own, and a bundle's tokenizer has one for both. "
            "Fix: a checkpoint with a joint vocabulary."
        )
    model = next(source / name for name in MODELS if (source / name).is_file())
    tokenizer: Tokenizer = _Converter(model, json.loads((source / "vocab.json").read_text("utf-8")), settings).converted()
    return tokenizer


class _Converter(SpmConverter):
    """transformers' own conversion, with the pieces' numbers from vocab.json."""

    def __init__(self, model: Path, numbers: dict[str, int], settings: dict[str, Any]) -> None:
        super().__init__(SimpleNamespace(vocab_file=str(model)))
        self._numbers, self._settings = numbers, settings
        self._languages = _languages(settings)

    def tokenizer(self, proto: Any) -> Tokenizer:
        scores = {piece.piece: piece.score for piece in proto.pieces}
        ordered = sorted(self._numbers, key=lambda piece: self._numbers[piece])
        if proto.trainer_spec.model_type == UNIGRAM:
            pieces = [(piece, scores.get(piece, UNLIKELY)) for piece in ordered]
            tokenizer = Tokenizer(models.Unigram(pieces, self._numbers["<unk>"]))
        else:
            known = {piece: score for piece, score in scores.items() if piece in self._numbers}
            merges = generate_merges(self._numbers, known)
            tokenizer = Tokenizer(models.BPE(self._numbers, merges, unk_token="<unk>", fuse_unk=True))
        codes = [piece for piece in ordered if piece.startswith(">>") and piece.endswith("<<")]  # Marian's target languages
        special = [*(piece for piece in SPECIAL if piece in self._numbers), *codes, *self._languages]
        tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in special])
        return tokenizer

    def normalizer(self, proto: Any) -> Any:
        usual = super().normalizer(proto)
        return normalizers.Sequence([normalizers.Lowercase(), usual]) if self._settings.get("do_lower_case") else usual

    def post_processor(self) -> Any:
        """The end token behind, and the source's language before the text where the model wants it."""
        before = [f"__{self._settings.get('src_lang') or 'en'}__"] if self._languages else []
        numbers = {piece: len(self._numbers) + i for i, piece in enumerate(self._languages)} | self._numbers
        used = [*before, "</s>"]
        return processors.TemplateProcessing(
            single=[*before, "$A", "</s>"], special_tokens=[(piece, numbers[piece]) for piece in used]
        )


def _languages(settings: dict[str, Any]) -> list[str]:
    """M2M-100's language tokens, which follow behind vocab.json's."""
    if settings.get("tokenizer_class") != "M2M100Tokenizer":
        return []
    codes = WMT_21 if settings.get("language_codes") == "wmt21" else M2M_100
    return [f"__{code}__" for code in codes.split()]
