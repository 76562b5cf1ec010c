"""Operators: what each computes, its torch reference, and its implementations. One file an
operator."""

from .block_fp8_linear import block_fp8_linear, linear_fp32
from .compress import compress
from .grouped_output import grouped_output
from .indexer_logits import indexer_logits
from .mhc import mhc_head, mhc_post, mhc_post_pre, mhc_pre
from .moe import moe
from .qk_norm_rope_store import qk_norm_rope_store
from .rms_norm_quant import rms_norm_quant
from .rope_hadamard_quant import rope_hadamard_quant
from .route import route
from .sample_greedy import sample_greedy
from .shared_expert import shared_expert
from .sparse_mla import sparse_mla
from .step_plan import build_draft_plan, build_step_plan
from .topk_select import topk_select

__all__ = [
    "block_fp8_linear",
    "build_draft_plan",
    "build_step_plan",
    "compress",
    "grouped_output",
    "indexer_logits",
    "linear_fp32",
    "mhc_head",
    "mhc_post",
    "mhc_post_pre",
    "mhc_pre",
    "moe",
    "qk_norm_rope_store",
    "rms_norm_quant",
    "rope_hadamard_quant",
    "route",
    "sample_greedy",
    "shared_expert",
    "sparse_mla",
    "topk_select",
]
