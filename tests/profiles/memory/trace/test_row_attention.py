"""Attention over rows of examples gives what attention over the padded examples gives."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402 - needs torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling  # noqa: E402

from autosft.profiles.memory.trace import row_attention  # noqa: E402
from autosft.profiles.memory.trace.row_attention import ROW_ATTENTION, attending  # noqa: E402

LENGTHS = (17, 9, 1, 30)
SHAPE = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
SAME = {
    "llama": {},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64},
    "gpt_neox": {},
    "gemma3_text": {"head_dim": 8, "sliding_window": 32},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
}
REFUSED = {
    "an example longer than the window": ("mistral", {"sliding_window": 20}, "longer than the window of 20"),
    "attention that is not told": ("stablelm", {}, "does not get the starts of the examples"),
    "no attention of torch's": (
        "gpt_neo",
        {"num_layers": 2, "attention_types": [[["global"], 2]]},
        "support",
    ),
}


def loss_and_gradients(name: str, changes: dict[str, Any], *, padding_free: bool) -> tuple[float, Any]:
    """Return the summed loss over all tokens of four examples, and all gradients in one."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**SHAPE, **changes})
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation=ROW_ATTENTION if padding_free else "sdpa", dtype=torch.float32
    )
    model.eval()  # without dropout
    ids = torch.randint(3, 100, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=padding_free)
    batch = collate([{"input_ids": part.tolist()} for part in ids.split(LENGTHS)])
    labels = batch.pop("labels")[:, 1:]
    with attending() as seen:
        logits = model(**batch, use_cache=False).logits[:, :-1]
    assert len(seen) == (config.num_hidden_layers if padding_free else 0)
    likely = logits.log_softmax(dim=-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    loss = -(likely * (labels != -100)).sum()
    loss.backward()
    return loss.item(), torch.cat(
        [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    )


@pytest.mark.parametrize("name", SAME)
def test_loss_and_gradients_are_those_of_padded_examples(name: str) -> None:
    (padded, expected), (row, got) = (
        loss_and_gradients(name, SAME[name], padding_free=item) for item in (False, True)
    )
    assert row == pytest.approx(padded, rel=1e-6)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_padded_prompts_are_answered_as_by_torchs_attention() -> None:
    answers = []
    for attention in ("sdpa", ROW_ATTENTION):
        torch.manual_seed(0)
        config = AutoConfig.for_model("llama", **SHAPE)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
        ids = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
        answers.append(
            model.generate(ids, attention_mask=(ids > 0).long(), max_new_tokens=8, do_sample=False).tolist()
        )
    assert answers[0] == answers[1]


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_not_be_the_same_is_refused(case: str) -> None:
    name, changes, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        loss_and_gradients(name, changes, padding_free=True)


def test_flash_attentions_kernel_is_called_with_the_rows_of_each_example(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def kernel(
        query: Any, key: Any, value: Any, starts: Any, ends: Any, longest: int, *_: Any, **told: Any
    ) -> Any:
        """Stand in for `varlen_attn`, as its documentation says what it computes."""
        assert told["window_size"] == (-1, 0)
        assert told["enable_gqa"]
        assert ends is starts
        assert longest == max(LENGTHS)
        parts = []
        for start, end in zip(starts.tolist(), starts.tolist()[1:], strict=False):
            heads = (tensor[start:end].transpose(0, 1)[None] for tensor in (query, key, value))
            parts.append(
                torch.nn.functional.scaled_dot_product_attention(
                    *heads, is_causal=True, scale=told["scale"], enable_gqa=True
                )[0].transpose(0, 1)
            )
        return torch.cat(parts)

    monkeypatch.setattr(row_attention, "varlen_attn", kernel)
    monkeypatch.setattr(row_attention, "takes_kernel", lambda *_: True)
    by_kernel = loss_and_gradients("llama", {}, padding_free=True)
    padded = loss_and_gradients("llama", {}, padding_free=False)
    assert by_kernel[0] == pytest.approx(padded[0], rel=1e-6)
    torch.testing.assert_close(by_kernel[1], padded[1], rtol=1e-4, atol=1e-5)
