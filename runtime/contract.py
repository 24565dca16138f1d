"""The graph contract's names, fixed in one place (design: decoder inputs and outputs).

Axes: B batch, T new rows, S slots, R chosen rows, G key/value heads, D head size, H hidden size, V vocabulary,
E rows of the encoder's states (one per source token, or fewer per audio frame). In the manifest they are called as below.
"""

OPSET = 24  # the first with TensorScatter

BATCH, ROWS, SLOTS, CHOSEN, SOURCE = "batch", "rows", "slots", "chosen", "source"  # axes B, T, S, R, E
# The attention mask's last axis in lowered graphs that read no more slots than the mask covers, and whose batches need no
# padding of single rows; S, the capacity, elsewhere.

INPUT_IDS = "input_ids"  # [B, T] int64
POSITION_IDS = "position_ids"  # [B, T] int64
ATTENTION_MASK = "attention_mask"  # [B, 1, T, S] bool
WRITE_INDEX = "write_index"  # [B] int64
OUTPUT_ROWS = "output_rows"  # [B, R] int64
LOGITS = "logits"  # [B, R, V]
HIDDEN = "hidden"  # [B, T, H]
AUX_HIDDEN = "aux_hidden"  # [B, T, n * H]
ALIGNMENT = "alignment_queries"  # [B, T, n * D], scaled, of the n cross-attention heads that follow the source in time

# Of draft heads with K independent heads and k candidates each.
TOPK_IDS = "topk_ids"  # [B, K, k] int64
TOPK_LOG_PROBS = "topk_log_probs"  # [B, K, k] float32

# Of draft heads that draft a tree of M nodes by themselves, from a hidden state and the token after it, the root, of which they
# take the target's embedding or the number.
EMBEDDING = "embedding"  # [B, 1, H] float32, in
ROOT_IDS = "root_ids"  # [B, 1] int64, in
DRAFT_IDS = "draft_ids"  # [B, M] int64; a node's parent stands before it
DRAFT_PARENTS = "draft_parents"  # [B, M] int64, -1 for the root's children
DRAFT_LOG_PROBS = "draft_log_probs"  # [B, M] float32, of the whole path to a node

# Of short lists of K tokens.
SHORT_LOGITS = "short_logits"  # [B, R, K] float32, of hidden states [B, R, H]
SHORT_IDS = "short_ids"  # [K] int64, rising

AUDIO = "audio"  # [B, samples] float32, into the front-end's graph
INPUT_FEATURES = "input_features"  # out of it; [B, bands, frames], or as the encoder's graph takes it
ENCODER_MASK = "encoder_mask"  # [B, E] bool, which source rows exist; the encoder's graph takes it for text
ENCODER_STATES = "encoder_states"  # [B, E, H of the encoder], what an assistant's graph takes instead of a source
ENCODER_HIDDEN = "encoder_hidden"  # [B, E, H of the encoder]

# Decoders lowered for TensorRT compute the mask in the graph, and graphs with a recurrent state need no other. Decoders
# lowered for a GPU compute the best token of each chosen row as well.
ROW_MASK = "row_mask"  # [B, T, T] bool, instead of attention_mask: which of the new rows each new row sees
BEST_IDS = "best_ids"  # [B, R] int32

STEP_INPUTS = (INPUT_IDS, POSITION_IDS, ATTENTION_MASK, WRITE_INDEX, OUTPUT_ROWS)
# What an engine derives from the state and the row mask; callers of a graph pass everything else.
DERIVED_INPUTS = (ATTENTION_MASK, ROW_MASK, WRITE_INDEX)


def key_name(layer: int) -> str:
    """[B, G, S, D], in and out."""
    return f"key_cache.{layer}"


def value_name(layer: int) -> str:
    """[B, G, S, D], in and out."""
    return f"value_cache.{layer}"


def cross_key_name(layer: int) -> str:
    """[B, G, E, D], out of the encoder's graph and into the decoder's."""
    return f"cross_key.{layer}"


def cross_value_name(layer: int) -> str:
    """[B, G, E, D], out of the encoder's graph and into the decoder's."""
    return f"cross_value.{layer}"


def updated(name: str) -> str:
    """The output under which a state's tensor comes back. The runtime binds slots, in and out, to one buffer."""
    return f"{name}.out"
