"""What a distillation step costs by arithmetic: memory of one worker by part, and FLOPs of one step by part.

Follows step.py, losses.py and model/modeling.py operation by operation; measures nothing and knows no devices.
Called by: distill/estimate.py, distill/utilisation.py. Calls: spec.

Letters: R rows of a pass, T tokens of a row, S positions of a row with loss, D hidden, I intermediate, V vocabulary.
"""

from dataclasses import dataclass, replace

from swiftkv.spec import SwiftKVSpec, TokenFlops

TILE_LOGITS = 2**23
"""As in losses.py, which this room does not import here because it loads torch; a test compares them."""
_TILE_BUFFERS = 7
_TRAINED_BYTES = 16
"""A trained weight, its gradient and AdamW's two moments, in float32."""
_FLASH_BACKWARD = 2.5
"""Five matrix products in the backward pass of attention for two in the forward pass."""


@dataclass(frozen=True)
class Workload:
    """What one worker computes in a pass, and with what."""

    spec: SwiftKVSpec
    rows: int
    row_tokens: int
    loss_positions: int
    """Of each row: where the student's later half runs."""
    packed: bool
    """Several documents per row, which attention tells apart by a mask."""
    checkpointed: bool
    teacher_rows: int
    """Rows that first half and teacher take at a time."""
    weight_bytes: int
    """Of a frozen weight."""
    product_bytes: int
    """Of a value in matrix products: 2 in bfloat16."""

    @property
    def selects(self) -> bool:
        """Whether the student's later half runs at some positions of each row, with one folded mask for all layers."""
        return self.loss_positions < self.row_tokens

    @property
    def masked_student(self) -> bool:
        """Whether the student's attention reads a mask instead of being plainly causal."""
        return self.packed or self.selects


def count_teacher_parameters(spec: SwiftKVSpec) -> int:
    """Weights of the whole teacher, all frozen; biases and head norms are left out."""
    return round(spec.teacher.compute_weight_bytes(1))


def compute_memory_parts(work: Workload, num_workers: int) -> dict[str, float]:
    """Bytes that one worker holds when it holds most, by part. Weights are divided over the workers (FSDP2)."""
    frozen, trained = count_teacher_parameters(work.spec), work.spec.count_trained_parameters()
    saved = _compute_saved_bytes(work)
    return {
        "frozen weights": frozen * work.weight_bytes / num_workers,
        "trained weights, gradients, optimizer": trained * _TRAINED_BYTES / num_workers,
        "gathered layers and vocabulary": _compute_gathered_bytes(work) if num_workers > 1 else 0.0,
        "weights in bfloat16": _compute_cast_bytes(work),
        "boundary, teacher, masks": _compute_shared_bytes(work),
        "student's activations": saved,
        "working space": max(
            _compute_loss_bytes(work), _compute_backward_bytes(work), _compute_teacher_bytes(work) - saved
        ),
    }


def _compute_gathered_bytes(work: Workload) -> float:
    """Two layers at a time (one computes, the next arrives), one layer's gradients, and the vocabulary throughout."""
    shape, spec = work.spec.shape, work.spec
    layer = 2 * shape.query_parameters + shape.key_value_parameters + shape.mlp_parameters
    trained = shape.query_parameters + shape.key_value_parameters if spec.num_later_layers else 0
    vocabulary = shape.vocab_parameters * (1 if shape.tie_word_embeddings else 2)
    return (2 * layer + vocabulary) * work.weight_bytes + 3 * trained * 4


def _compute_cast_bytes(work: Workload) -> float:
    """What autocast makes of float32 weights and the student's backward pass needs again: those of its later half."""
    if work.product_bytes == 4:
        return 0.0
    shape, spec = work.spec.shape, work.spec
    casts = spec.count_trained_parameters()
    if work.weight_bytes == 4:
        casts += spec.num_later_layers * (shape.query_parameters + shape.mlp_parameters) + shape.vocab_parameters
    return 2.0 * casts


def _compute_shared_bytes(work: Workload) -> float:
    """Boundary and token ids; two states of teacher and student each, their gradients; rotary tables; the masks."""
    tokens, positions = work.rows * work.row_tokens, work.rows * work.loss_positions
    states = work.spec.shape.hidden_size * work.weight_bytes * (2 * tokens + 6 * positions)
    rotary = 2 * work.spec.shape.head_dim * work.weight_bytes * (work.row_tokens + positions)
    mask = tokens * work.row_tokens * work.packed
    shape = work.spec.shape
    heads_per_kv_head = shape.num_attention_heads // shape.num_key_value_heads
    folded = heads_per_kv_head * positions * work.row_tokens * work.product_bytes * work.selects
    return states + rotary + mask + folded


def _compute_saved_bytes(work: Workload) -> float:
    """What the student's later half keeps for its backward pass."""
    tokens, positions = work.rows * work.row_tokens, work.rows * work.loss_positions
    spec, shape, size = work.spec, work.spec.shape, work.product_bytes
    if work.checkpointed:
        keys_values = 2 * shape.num_key_value_heads * shape.head_dim * size * tokens
        inputs = shape.hidden_size * work.weight_bytes * positions
        return spec.num_later_layers * inputs + len(spec.leader_layers) * keys_values
    return spec.num_later_layers * _compute_layer_bytes(work) + len(spec.leader_layers) * _compute_leader_bytes(work)


def _compute_layer_bytes(work: Workload) -> float:
    """Saved by one layer: both norms' inputs in float32, Q's input, Q, attention's output, gate, its SiLU and up.

    Of packed rows everywhere, attention keeps the mask as numbers, and K and V written out for every query head.
    """
    shape, size = work.spec.shape, work.product_bytes
    query = shape.num_attention_heads * shape.head_dim
    experts = shape.num_experts_per_tok or 1
    position = 8 * shape.hidden_size + 4 * shape.num_attention_heads
    position += size * (shape.hidden_size + 2 * query + 3 * shape.intermediate_size * experts)
    masked = 0
    if work.packed and not work.selects:
        repeated = 2 * query * (shape.num_key_value_heads < shape.num_attention_heads)
        masked = size * work.row_tokens * (work.loss_positions + repeated)
    return float(work.rows * (position * work.loss_positions + masked))


def _compute_leader_bytes(work: Workload) -> float:
    """Saved for one group's K and V: both, and in bfloat16 the normed boundary once for each projection."""
    shape = work.spec.shape
    values = 2 * shape.num_key_value_heads * shape.head_dim
    values += 2 * shape.hidden_size * (work.product_bytes == 2)
    return float(values * work.product_bytes * work.rows * work.row_tokens)


def _compute_loss_bytes(work: Workload) -> float:
    positions = work.rows * work.loss_positions
    tile = min(max(TILE_LOGITS, work.spec.shape.vocab_size), positions * work.spec.shape.vocab_size)
    return 4.0 * _TILE_BUFFERS * tile


def _compute_backward_bytes(work: Workload) -> float:
    """One layer's gradients: three of the MLP's width, and what a checkpointed layer computes again."""
    shape = work.spec.shape
    widest = shape.intermediate_size * (shape.num_experts_per_tok or 1)
    gradients = work.product_bytes * (3 * widest + 2 * shape.hidden_size) * work.rows * work.loss_positions
    again = _compute_layer_bytes(work) + _compute_leader_bytes(work) if work.checkpointed else 0
    return gradients + again


def _compute_teacher_bytes(work: Workload) -> float:
    """One layer without autograd: gate, up and their product, and the states around them."""
    shape = work.spec.shape
    widest = shape.intermediate_size * (shape.num_experts_per_tok or 1)
    values = work.product_bytes * 3 * widest + 3 * work.weight_bytes * shape.hidden_size
    return float(values * min(work.teacher_rows, work.rows) * work.row_tokens)


def compute_step_flops(work: Workload, rows: int, num_positions: int | None = None) -> dict[str, float]:
    """FLOPs of a step of so many rows, by part; a multiply and an add count as two.

    `num_positions`: with a loss, of all rows; None: none has fewer than `work.loss_positions`.
    As the kernels compute: attention with a mask multiplies all pairs, plainly causal attention half of them.
    """
    spec, tokens, positions = work.spec, rows * work.row_tokens, rows * work.loss_positions
    teacher = _compute_layer_flops(spec, work.row_tokens, work.packed)
    student = _compute_layer_flops(spec, work.row_tokens, work.masked_student)
    later, leaders = spec.num_later_layers, len(spec.leader_layers)
    keys_values = leaders * student.key_value * tokens
    elsewhere = later * (student.total - student.key_value) * positions
    # Frozen O and MLP pass gradients on; Q, K and V also get their own. Nothing goes below the boundary.
    queries = (2 * later - 1) * student.query_output / 2
    others = later * (student.query_output / 2 + student.mlp + _FLASH_BACKWARD * student.attention)
    # A checkpointed layer stops before its last product (down), whose result no gradient needs.
    again = keys_values + elsewhere - later * student.mlp / 3 * positions if work.checkpointed else 0.0
    return {
        "first half": spec.num_key_value_layers * teacher.total * tokens,
        # Its last layer is a student's with K and V of its own: only they are computed of every position.
        "teacher's later half": (later - 1) * teacher.total * tokens
        + student.key_value * tokens
        + (student.total - student.key_value) * positions,
        "student's later half": keys_values + elsewhere,
        "student's backward pass": 2 * keys_values + (queries + others) * positions + again,
        "LM head": 3 * spec.compute_lm_head_flops() * (positions if num_positions is None else num_positions),
    }


def _compute_layer_flops(spec: SwiftKVSpec, row_tokens: int, masked: bool) -> TokenFlops:
    """One token in one layer that computes its own K and V."""
    one_layer = SwiftKVSpec(replace(spec.shape, num_hidden_layers=1), 1)
    if masked:
        return one_layer.compute_decoded_token_flops(row_tokens)
    return one_layer.compute_prompt_token_flops(row_tokens)
