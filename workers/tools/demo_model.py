"""Create and pre-train the demo's tokenizer and model, and cache them.

The model is a Llama of 1.0 M parameters over whole words.  It is pre-trained on short notes (see
`profiles.dataset.demo`), so it knows its words and can handle lists of them but has never seen a chat:
following instructions is left to fine-tuning.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from autosft.profiles.dataset import demo

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

_NUM_STEPS = 200
_BATCH_SIZE = 16
_SEQ_LEN = 32
_LEARNING_RATE = 5e-3
_WARMUP_STEPS = 30

_PAD, _UNKNOWN, _END = "<|pad|>", "<|unknown|>", "<|end|>"
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>")

#: Marks the assistant's messages, including their end of turn, as trained tokens.
_CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}"
    "{%- else -%}{{- message['content'] + eos_token -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def ensure_demo_model(
    cache_dir: Path, *, num_threads: int, progress: Callable[[float], None] | None = None
) -> Path:
    """Return the demo's model folder below `cache_dir`, creating it first if it is missing.

    An ordinary folder (config.json, model.safetensors, tokenizer.json) that `AutoModelForCausalLM` and
    `AutoTokenizer` load; it must not be changed.  Its name carries a fingerprint of the text, the recipe
    and the versions of torch, transformers and tokenizers.  The folder appears complete or not at all; if
    two processes create it at once, the first one wins.  Creating it takes about 15 s on one core;
    `progress` is called with the share done, rising to 1.

    Computes with torch in this process, which therefore must not fork trials afterwards.  The weights
    depend on the seed, the versions and, through the order of sums, on `num_threads`.
    """
    folder = cache_dir / f"demo-model-{_fingerprint()}"
    if not folder.exists():
        cache_dir.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=cache_dir))
        try:
            _make_model(unfinished, num_threads=num_threads, progress=progress or (lambda _: None))
            _publish(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    if progress is not None:
        progress(1.0)
    return folder


def _fingerprint() -> str:
    """Return a hash of everything that determines the model folder's content."""
    packages = {name: version(name) for name in ("torch", "transformers", "tokenizers")}
    sources = [Path(file).read_text(encoding="utf-8") for file in (__file__, demo.__file__)]
    return hashlib.sha256(json.dumps([packages, sources]).encode()).hexdigest()[:12]


def _publish(unfinished: Path, folder: Path) -> None:
    """Rename a finished folder into place, unless another process was faster."""
    unfinished.chmod(0o755)  # mkdtemp made it private
    try:
        os.rename(unfinished, folder)  # noqa: PTH104
    except OSError:
        if not folder.exists():
            raise


def _make_model(folder: Path, *, num_threads: int, progress: Callable[[float], None]) -> None:
    import torch

    tokenizer = _make_tokenizer()
    previous_num_threads = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = _pretrain(_new_model(tokenizer), _batches(tokenizer), progress)
    finally:
        torch.set_num_threads(previous_num_threads)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _make_tokenizer() -> PreTrainedTokenizerFast:
    """Build the word-level tokenizer: a word with the space before it, or a punctuation mark, is a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [f"▁{piece}" if piece[0].isalnum() else piece for piece in demo.vocabulary()]
    tokens = [_PAD, _UNKNOWN, _END, *_ROLES, *words]
    tokenizer = Tokenizer(
        models.WordLevel({token: id_ for id_, token in enumerate(tokens)}, unk_token=_UNKNOWN)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()]
    )
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        unk_token=_UNKNOWN,
        eos_token=_END,
        additional_special_tokens=list(_ROLES),
        chat_template=_CHAT_TEMPLATE,
        model_max_length=128,
        clean_up_tokenization_spaces=False,
    )


def _new_model(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Draw the model's weights.

    Weights start at a standard deviation of 0.15 behind norms with gains of 0.4, which is the same function
    as 0.06 behind gains of 1 (at the usual 0.02, copying takes several times as many steps to emerge).  So
    scaled, Adam's best learning rate is about 2.5 times as high: as with many real models, whose gains are
    small too, the rate that their size suggests is not the best one, and there is something to find.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=608,
            num_hidden_layers=2,
            num_attention_heads=6,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            initializer_range=0.15,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            attention_dropout=0.0,
            dtype="float32",
        )
    )
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.constant_(parameter, 0.4)
    return model


def _batches(tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield packed notes without end: token ids and labels, both `(batch, seq)`.

    The openings carry no label: their words are random, so that nothing but noise would come of them.
    """
    import torch

    shape, size = (_BATCH_SIZE, _SEQ_LEN), _BATCH_SIZE * _SEQ_LEN
    ids: list[int] = []
    labels: list[int] = []
    for note in demo.pretraining_notes(seed=0):
        opening, continuation = tokenizer(list(note))["input_ids"]
        ids += opening + continuation
        labels += [-100] * len(opening) + continuation
        if len(ids) >= size:
            yield torch.tensor(ids[:size]).view(shape), torch.tensor(labels[:size]).view(shape)
            ids, labels = ids[size:], labels[size:]


def _pretrain(
    model: PreTrainedModel,
    batches: Iterator[tuple[torch.Tensor, torch.Tensor]],
    progress: Callable[[float], None],
) -> PreTrainedModel:
    import torch
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, _WARMUP_STEPS, _NUM_STEPS)
    model.train()
    for step, (ids, labels) in enumerate(islice(batches, _NUM_STEPS)):
        model(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        progress(step / _NUM_STEPS)
    return model.eval()
