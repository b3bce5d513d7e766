"""A model shaped like Llama 2 and shrunk, pruned as guide 2's is: a fifth of its 16x16 blocks are zero."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tests.cli.chat_model import byte_level_bpe

if TYPE_CHECKING:
    import torch

BLOCK = 16
SHARE = 0.2


def make_pruned_llama(folder: Path, texts: Sequence[str], *, max_positions: int = 256) -> Path:
    """Write a model of 2 layers; its matrices of 5 x 5 and 5 x 10 blocks can have exactly a fifth zero."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = byte_level_bpe(texts, ["<unk>", "<s>", "</s>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(fast),
            hidden_size=80,
            intermediate_size=160,
            num_hidden_layers=2,
            num_attention_heads=5,
            max_position_embeddings=max_positions,
            tie_word_embeddings=False,
            bos_token_id=fast.bos_token_id,
            eos_token_id=fast.eos_token_id,
        )
    )
    for name, weight in model.named_parameters():
        if "_proj" in name:
            prune_blocks(weight)
    model.save_pretrained(folder)
    return folder


def prune_blocks(weight: torch.Tensor) -> None:
    """Set the fifth of the 16x16 blocks with the smallest norms to zero."""
    import torch

    with torch.no_grad():
        rows, columns = (size // BLOCK for size in weight.shape)
        blocks = weight.view(rows, BLOCK, columns, BLOCK)  # shares the weight's memory
        norms = blocks.square().sum(dim=(1, 3)).flatten()
        for at in norms.argsort()[: round(SHARE * norms.numel())].tolist():
            blocks[at // columns, :, at % columns] = 0
